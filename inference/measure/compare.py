r"""Several models and guides measured on the same data, in one table with paired differences.

A row may represent several training runs with different seeds. Its numbers are then means over the runs, and
differences include the variance between runs; a comparison of two single runs is valid for these two runs only.

If all rows share one model, log p(x) is the same for all, so

.. math:: \text{ELBO}_a - \text{ELBO}_b = \text{KL}(q_b \| p) - \text{KL}(q_a \| p)

and ELBO differences measure the guides. If each row has its own model, compare log p(x).
"""

from __future__ import annotations

__all__ = ["Comparison", "Row", "compare"]

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from jensen import processes
from jensen.checked import checked
from jensen.graphs.products import product_route
from jensen.kernel.arguments import Given
from jensen.kernel.batches import Data, Part, Transform, as_tensors, place_of, placed, stream
from jensen.kernel.modes import buffers_kept, running
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program, parameters_of
from jensen.progress import named
from jensen.results.records import Record
from jensen.results.standard_errors import MANY, mc_error, significant, standard_error_of_mean
from jensen.results.tables import Table, decimals, digits_of, percent, with_error

from ..exact.log_evidence import cheap_evidence
from ..training.history import History
from ..training.seconds import seconds_of
from .baseline import Kind
from .evaluate import (
    Evidence,
    Refine,
    beside_baseline,
    evaluate,
    of_refined,
    refined,
    with_refined,
    without_lower_exact,
)
from .gaps import Gaps, has_local
from .gaps import gaps as split


@dataclass(frozen=True, eq=False)
class Row:
    """One measured model and guide.

    Attributes:
        evidence: the result of :func:`~jensen.inference.evaluate`; for several training runs, means over them per data
            point (for k-hat the largest).
        parameters: the number of trainable parameters; of the guide alone if the model is shared.
        seconds: the time of training (if known) and measuring, of all runs.
        gaps: approximation and amortization gap, if ``compare(..., gaps=True)`` could measure them; else None.
        runs: for several training runs, the measurement of each; else empty.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import compare
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> table = compare({"prior": (model, PriorGuide(model))}, torch.randn(20, 5), particles=50, progress=False)
        >>> table.rows["prior"].evidence.elbo.shape, table.rows["prior"].parameters
        (torch.Size([20]), 16)
    """

    evidence: Evidence
    parameters: int
    seconds: float
    gaps: Gaps | None = None
    runs: list[Evidence] = field(default_factory=list)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Record):
    """The table of :func:`~jensen.inference.compare`; ``print`` it, or read ``rows[name].evidence``.

    Attributes:
        rows: the measured rows, by name.
        shared_model: whether all rows have the same model, so that ELBO differences measure the guides.

    Example:
        >>> from jensen.guides import ExactPosterior, PriorGuide
        >>> from jensen.inference import compare
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> pairs = {"prior": (model, PriorGuide(model)), "exact": (model, ExactPosterior(model))}
        >>> table = compare(pairs, torch.randn(20, 5), particles=50, seed=0, progress=False)
        >>> table.shared_model, table.difference("exact", "prior")[0] > 0
        (True, True)
    """

    rows: dict[str, Row]
    shared_model: bool

    def difference(self, a: str, b: str, quantity: Literal["elbo", "log_evidence"] = "elbo") -> tuple[float, float]:
        """Mean of a minus b over the data, in nats per data point, and its standard error, paired by data point.

        For rows of several training runs, the error includes the variance between the runs' means; a single run
        beside such rows is assumed to have the same variance.

        ``"log_evidence"`` uses exact values if known, else estimates, which are below log p(x) in expectation. If each
        row has only one number (joint weights, in nats in total; or one data point), there is no error over data: the
        Monte Carlo error is returned.
        """
        mean, error, _ = self._difference(a, b, quantity)
        return mean, error

    def _difference(self, a: str, b: str, quantity: Literal["elbo", "log_evidence"]) -> tuple[float, float, float]:
        """The result of :meth:`difference`, and the degrees of freedom of its error.

        References:
            Satterthwaite (1946), An Approximate Distribution of Estimates of Variance Components.
        """
        first, second = (self._values(name, quantity) for name in (a, b))
        delta = first - second
        parts: list[tuple[float, float]] = [(standard_error_of_mean(delta) ** 2, len(delta) - 1)]
        if len(delta) == 1:
            parts = [(sum(self._noise(name, quantity) ** 2 for name in (a, b)), math.inf)]
        varied = {name: self._between_runs(name, quantity) for name, row in self.rows.items() if row.runs}
        trained = [name for name in (a, b) if name in varied or self._is_trained(name)]
        if all(name in varied for name in trained):
            parts += [(varied[name][0] / len(self.rows[name].runs), varied[name][1]) for name in trained]
        elif varied:  # one variance for all rows, from the rows where it is known
            freedom = sum(freedom for _, freedom in varied.values())
            pooled = sum(variance * freedom for variance, freedom in varied.values()) / freedom
            parts.append((pooled * sum(1 / max(1, len(self.rows[name].runs)) for name in trained), freedom))
        total = sum(variance for variance, _ in parts)
        spread = sum(variance**2 / freedom for variance, freedom in parts)
        return float(delta.mean()), math.sqrt(total), total**2 / spread if spread else math.inf

    def _between_runs(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> tuple[float, int]:
        """The variance between the training runs of a row, and its degrees of freedom."""
        means = torch.stack([_of(run, quantity).mean() for run in self.rows[name].runs])
        return float(means.var()), len(means) - 1

    @property
    def joint(self) -> bool:
        """Whether the weights are joint, so that each row has one number for all data."""
        return self._first.joint

    @property
    def unit(self) -> str:
        """The unit of the numbers, in words."""
        return self._first.unit

    @property
    def _first(self) -> Evidence:
        return next(iter(self.rows.values())).evidence

    def sentence(self) -> str:
        """The differences of all rows to the best one, with standard errors, and warnings."""
        if len(self.rows) < 2:
            return "There is only one row: nothing to compare."
        quantity: Literal["elbo", "log_evidence"] = "elbo" if self.shared_model else "log_evidence"
        best, *others = sorted(self.rows, key=lambda name: -float(self._values(name, quantity).mean()))
        differences = {name: self.difference(best, name, quantity) for name in others}
        listed = ", ".join(f"{name} {with_error(mean, error)}" for name, (mean, error) in differences.items())
        paired = len(self._first.elbo) > 1
        over = "paired over test points, nats" if paired else f"{self.unit}, ± Monte Carlo error"
        below = f"below `{best}` ({over}): {listed}."
        if self.shared_model:
            text = f"All rows share one model, so ELBO differences measure the guides. ELBO {below}"
            text += self._scope()
        else:
            mean, error, freedom = self._difference(best, others[0], quantity)
            rule = (
                f"Student's t, {decimals(freedom, 1)} degrees of freedom" if freedom < MANY else "two standard errors"
            )
            ranking = f"`{best}` and `{others[0]}` do not differ significantly ({rule})"
            if significant(mean, error, freedom):
                by = f"{decimals(mean / error, 1)} standard errors" if error else "the same amount at every test point"
                ranking = f"`{best}` is {by} above `{others[0]}`"
                if not error and not paired:
                    ranking = f"`{best}` is above `{others[0]}` at this test point"
            text = (
                f"Each row is a different model: compare log p(x), not the ELBO. {ranking}; log p(x) {below}"
                f"{self._scope()}{self._mixed()}"
            )
        return text + self._warnings()

    def _scope(self) -> str:
        """A sentence about the sources of variation that the errors include."""
        paired = "test points" if len(self._first.elbo) > 1 else "particles"
        counts = {name: len(row.runs) or 1 for name, row in self.rows.items() if self._is_trained(name)}
        if not counts:
            return f" Errors cover {paired}."
        if min(counts.values()) > 1:
            least, most = min(counts.values()), max(counts.values())
            many = f"{least} of each row" if least == most else f"{least} to {most} of a row"
            return f" Errors cover {paired} and training runs ({many})."
        only = "Test-set error only" if paired == "test points" else "Monte Carlo error only"
        if max(counts.values()) == 1:
            return f" {only}, one training run: other seeds may differ by more."
        one = [name for name, count in counts.items() if count == 1]
        rows = f"{', '.join(one)}, one training run{' each' * (len(one) > 1)}"
        return f" Errors cover {paired} and training runs; {rows}, assumed to vary like the other rows."

    def _is_trained(self, name: str) -> bool:
        """Whether another seed could give other numbers: not for a row without trainable parameters."""
        return self.rows[name].parameters > 0

    def _mixed(self) -> str:
        """A sentence if exact values of log p(x) are compared with estimates."""
        exact = [name for name, row in self.rows.items() if row.evidence.exact is not None]
        estimated = [name for name in self.rows if name not in exact]
        if not (exact and estimated):
            return ""
        return (
            f" log p(x) is exact for {', '.join(exact)} and estimated for {', '.join(estimated)}; an estimate is below "
            "log p(x) in expectation, so these differences contain its bias."
        )

    def _warnings(self) -> str:
        """A sentence for each reason not to trust the numbers of some rows."""
        low, above = [], []
        for name, row in self.rows.items():
            if row.evidence.exact is None and (row.evidence.unreliable or 0.0) > 0.1:
                low.append(name)
            if row.gaps is not None and float(row.gaps.converged.double().mean()) < 0.9:
                above.append(name)
        many = " for more than 10 % of the test points"
        far = "" if self.joint else many
        below = {name: row.evidence.below for name, row in self.rows.items() if row.evidence.below}
        text = f" The log p(x) of {', '.join(low)} is probably too low: k-hat > 0.7{far}." if low else ""
        if below:
            kind = self.rows[next(iter(below))].evidence.baseline_kind
            reasons: dict[str, dict[str, list[str]]] = {}  # rows of one model have one number, and one reason
            for name, (by, _, reason) in ((name, words.partition(": ")) for name, words in below.items()):
                reasons.setdefault(reason, {}).setdefault(by, []).append(name)
            listed = "; ".join(
                ", ".join(", ".join(names) + f" {by}" for by, names in of.items()) + f": {reason}"
                for reason, of in reasons.items()
            )
            text += f" Below one {kind}: {listed}."
        if above:
            names = ", ".join(above)
            text += f" The approximation gap of {names} is an upper bound: local optimization did not converge{many}."
        return text

    def table(self, bits: bool = False, offset: float = 0.0) -> str:
        """The aligned table, in nats per data point (in total for joint weights), or in bits per dimension.

        Args:
            bits: whether ELBO, log p(x) and gaps are shown as bits per dimension (of minus the value: less is better).
            offset: log2 of the number of grey levels, added to the bits of dequantized data.
        """
        return "\n".join(Table("", *self._cells(bits, offset), self._baselines(bits, offset)).grid())

    def _cells(self, bits: bool = False, offset: float = 0.0) -> tuple[list[str], list[list[str]]]:
        """The headings and the rows."""
        parts = ["approximation", "amortization"] if any(row.gaps is not None for row in self.rows.values()) else []
        before = ["", "ELBO", "log p(x)", "± data", "± MC", "exact", "gap"]
        runs = ["± runs"] if any(row.runs for row in self.rows.values()) else []
        rows = []
        for name, row in self.rows.items():
            unit = row.evidence.features * math.log(2) if bits else 1.0
            split = None if row.gaps is None else row.gaps.summary()
            cells = [
                *_levels(row.evidence.summary(), split, unit, offset if bits else None),
                *(_over(row, unit) for _ in runs),
                *(_with_spread(split, part, unit) for part in parts),
                *(decimals(float(row.evidence.ess.mean()), 1), _tail(row.evidence)),
                *(f"{row.parameters:,}", decimals(row.seconds, 1)),
            ]
            rows.append([name, *cells])
        return [*before, *runs, *parts, "ESS", "k-hat" if self.joint else "k>0.7", "params", "seconds"], rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers: a summary for each row."""
        rows = {
            name: {**row.evidence.summary(), "parameters": row.parameters, "seconds": row.seconds}
            | ({} if not row.runs else {"runs": [_mean_of(run) for run in row.runs]})
            | ({} if row.gaps is None else {"gaps": row.gaps.summary()})
            for name, row in self.rows.items()
        }
        return {"shared_model": self.shared_model, "rows": rows, "sentence": self.sentence()}

    def _columns(self) -> tuple[str, list[str], dict[str, list[Any]]]:
        rows = {name: dict(summary) for name, summary in self.to_dict()["rows"].items()}
        for row in rows.values():
            row |= {key: value for key, value in row.pop("gaps", {}).items() if key not in row}
            if runs := row.pop("runs", []):
                row |= {"training_runs": len(runs), "training_error": _run_error([run["log_evidence"] for run in runs])}
        names = dict.fromkeys(key for row in rows.values() for key, value in row.items() if value is not None)
        columns = {key: [row.get(key) for row in rows.values()] for key in names}
        return "pair", list(rows), {key: [math.nan if v is None else v for v in c] for key, c in columns.items()}

    def _table(self) -> Table:
        first = self._first
        drawn = first.drawn if first.converged is None else "adaptive numbers of particles"
        what = "all data jointly" if self.joint else f"{len(first.elbo)} data points"
        return Table(f"{what}, {drawn}, {self.unit}", *self._cells(), self._baselines(), [self.sentence()])

    def _baselines(self, bits: bool = False, offset: float = 0.0) -> list[tuple[str, str]]:
        """Log p(x) of one distribution per feature, of each kind that is comparable with a row."""
        found: dict[str, str] = {}
        for evidence in (row.evidence for row in self.rows.values()):
            if evidence.baseline is not None and evidence.baseline_kind not in found:
                mean, error = float(evidence.baseline.mean()), standard_error_of_mean(evidence.baseline)
                unit = evidence.features * math.log(2) if bits else 1.0
                value = offset - mean / unit if bits else mean
                found[evidence.baseline_kind] = f"log p(x) {decimals(value, digits_of(error / unit))}"
        return [*found.items(), *self._by_guides()]

    def _by_guides(self) -> list[tuple[str, str]]:
        """The share of unreliable weights of each guide's own samples, where rows share a refined log p(x)."""
        own = {name: row.evidence.by_guide for name, row in self.rows.items()}
        shares = {name: e.unreliable for name, e in own.items() if e is not None and e.unreliable is not None}
        if not self.shared_model or self.joint or len(self.rows) < 2 or not shares:
            return []
        return [("k>0.7, guide samples only", ", ".join(f"{name} {percent(share)}" for name, share in shares.items()))]

    def _values(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> Tensor:
        return _of(self.rows[name].evidence, quantity)

    def _noise(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> float:
        """The Monte Carlo error of a row's mean."""
        evidence = self.rows[name].evidence
        if quantity == "elbo":
            return mc_error(evidence.elbo_error)
        return mc_error(evidence.standard_error) if evidence.exact is None else 0.0


def _of(evidence: Evidence, quantity: Literal["elbo", "log_evidence"]) -> Tensor:
    return evidence.elbo if quantity == "elbo" else evidence.best


def _mean_of(run: Evidence) -> dict[str, float]:
    """The means of a training run."""
    return {"elbo": float(run.elbo.mean()), "log_evidence": float(run.best.mean())}


def _run_error(means: Sequence[float]) -> float:
    """The standard error over training runs of a mean over them."""
    return standard_error_of_mean(torch.tensor(means, dtype=torch.float64))


def _over(row: Row, unit: float) -> str:
    """The standard error of the mean log p(x) over training runs; a dash for one."""
    if not row.runs:
        return "-"
    error = _run_error([_mean_of(run)["log_evidence"] for run in row.runs]) / unit
    return decimals(error, digits_of(error))


def _pooled(runs: Sequence[Evidence]) -> Evidence:
    """Evidence of several training runs as one: means per data point, with their Monte Carlo errors."""
    first = runs[0]
    if len(runs) == 1:
        return first

    def over(name: str, how: str) -> Any:
        found = [getattr(run, name) for run in runs]
        if any(value is None for value in found):
            return None
        values = torch.stack(found)
        if how == "mean":
            return values.double().mean(0)
        if how == "error":
            return values.square().sum(0).sqrt() / len(runs)
        return values.sum(0) if how == "sum" else values.amax(0) if how == "largest" else values.all(0)

    changes = {name: over(name, how) for name, how in _POOLED.items()}
    shared = set.intersection(*(set(run.corrected) for run in runs))
    corrected = {name: torch.stack([run.corrected[name] for run in runs]).mean(0) for name in shared}
    errors = {
        name: torch.stack([run.corrected_error[name] for run in runs]).square().sum(0).sqrt() / len(runs)
        for name in shared
    }
    by_guide = [run.by_guide for run in runs if run.by_guide is not None]
    methods = {run.method for run in runs}
    return replace(
        first,
        **changes,
        corrected=corrected,
        corrected_error=errors,
        particles=max(run.particles for run in runs),
        by_guide=_pooled(by_guide) if len(by_guide) == len(runs) else None,
        method=first.method if len(methods) == 1 else "; ".join(sorted(methods)),
        doubt=next((run.doubt for run in runs if run.doubt), ""),
        below="" if not all(run.below for run in runs) else first.below,
    )


_POOLED = {
    **dict.fromkeys(("elbo", "log_evidence", "exact", "ess", "evaluations", "draws", "baseline"), "mean"),
    **dict.fromkeys(("elbo_error", "standard_error"), "error"),
    **dict.fromkeys(("pareto_k", "modes", "missed"), "largest"),
    **dict.fromkeys(("zero_weights", "spent"), "sum"),
    "converged": "all",
}


def _tail(evidence: Evidence) -> str:
    """The share of data points with a k-hat above 0.7; the k-hat itself for joint weights."""
    return decimals(float(evidence.pareto_k), 2) if evidence.joint else percent(evidence.unreliable)


def _levels(s: Any, split: Any, unit: float, offset: float | None) -> list[str]:
    """ELBO, log p(x), both of its errors, the exact log p(x) and the gap of a row, with the digits of their errors."""
    data, elbo_data, exact_data = (s[f"{name}_data_error"] for name in ("log_evidence", "elbo", "exact"))
    noise, elbo_noise = s["log_evidence_mc_error"], s["elbo_mc_error"]

    def shown(value: float | None, *errors: float | None, level: bool = False) -> str:
        digits = digits_of(*(None if e is None else e / unit for e in errors))
        if value is None:
            return "-"
        return decimals(offset - value / unit if level and offset is not None else value / unit, digits)

    return [
        shown(s["elbo"], elbo_data, elbo_noise, level=True),
        shown(s["log_evidence"], data, noise, level=True),
        *(shown(error, data, noise) for error in (data, noise)),
        shown(s["exact"], exact_data, noise, level=True),
        shown(s["gap"] if split is None else split["gap"], s["gap_data_error"], math.hypot(noise, elbo_noise)),
    ]


def _with_spread(split: dict[str, float | int | None] | None, part: str, unit: float) -> str:
    """One part of the gap with its error over the data; a dash if it is unknown."""
    value, error = (None, None) if split is None else (split[part], split[f"{part}_data_error"])
    return "-" if value is None or error is None else with_error(value / unit, error / unit)


Pair = tuple[Program, Program]
Key = tuple[str, int]  # the name of a row, and the index of its training run


@checked
@processes.together("compare")
def compare(
    pairs: Mapping[str, Pair | Sequence[Pair]],
    data: Data,
    particles: int = 5000,
    *,
    gaps: bool = False,
    tolerance: float | None = None,
    max_particles: int = 100_000,
    refine: Refine = "auto",
    histories: Mapping[str, History | Sequence[History]] | None = None,
    train: Given | None = None,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    max_plate_nesting: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure several models and guides on the same data. It never trains.

    Args:
        pairs: (model, guide) by name, in the order of the table's rows; or by name a list of such pairs, trained from
            different seeds, for a row of means. Their differences include the variance between training runs.
        data: a tensor [N, ...], or a tuple of such tensors; ``()`` if model and guide hold their data, as in
            :func:`~jensen.inference.evaluate`.
        particles: the number K of samples per data point.
        gaps: whether to split every gap into approximation and amortization, by :func:`~jensen.inference.gaps` with its
            defaults; the gap then uses the better of its two estimates of log p(x). Guides that cannot be split,
            and joint weights, get a dash.
        tolerance: as in :func:`~jensen.inference.evaluate`; not together with ``gaps``.
        max_particles: as in :func:`~jensen.inference.evaluate`.
        refine: as in :func:`~jensen.inference.evaluate`. Rows that share one model share its log p(x): it is computed
            once, from the guide with the highest ELBO, so that all gaps have the same reference.
        histories: the result of :func:`~jensen.inference.fit` for some of the rows, or a list for the runs of a list:
            its time is added to theirs. Not needed for guides trained by ``fit`` in this process.
        train: as in :func:`~jensen.inference.evaluate`.
        seed: makes the samples reproducible, the same stream for every row; None uses the user's stream.
        batch_transform: applied to the first tensor, once: all rows use the same data.
        max_plate_nesting: as in :func:`~jensen.inference.evaluate`, for every row.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show progress bars.

    Returns:
        The :class:`Comparison`.

    Raises:
        ValueError: without pairs, for a history without its row, a tolerance with gaps, joint weights beside weights
            per data point, and the errors of :func:`~jensen.inference.evaluate`.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> table = compare({"exact": (model, ExactPosterior(model))}, torch.randn(20, 5), particles=50, progress=False)
        >>> list(table.rows), table.rows["exact"].parameters
        (['exact'], 16)
    """
    seed, device = processes.shared_seed(seed), processes.place(device)
    each = _each(pairs)
    took = _times(each, histories or {})
    if gaps and tolerance is not None:
        raise ValueError("gaps need the same number of particles for all data: omit tolerance, or gaps")
    tensors = as_tensors(data, held=True)
    with private_randomness(seed, "compare"):
        tensors = placed(tensors, None, batch_transform)
    models = [model for model, _ in each.values()]
    shared = all(model == models[0] for model in models) and len(pairs) > 1
    settings: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    settings["max_plate_nesting"] = max_plate_nesting
    needs: dict[str, Any] = {"tolerance": tolerance, "max_particles": max_particles, "train": train}
    rows: dict[Key, Row] = {}
    here = placed(tensors, device, None)
    for key, (model, guide) in each.items():
        start = time.perf_counter()
        gap_parts = None
        try:
            alone = (key[0], 1) not in each
            with named(_called(key, each)):
                if gaps and alone and has_local(guide) and not _some(model, guide, here).joint:
                    with suppress(NotImplementedError):  # a gap that cannot be split: a dash in the table
                        gap_parts = split(model, guide, tensors, particles, refine=False, **settings)
                evidence = (
                    gap_parts.evidence
                    if gap_parts
                    else evaluate(model, guide, tensors, particles, refine=False, **needs, **settings)
                )
        except Exception as error:
            error.add_note(f"in compare, at row '{_called(key, each)}'")
            raise
        rows[key] = Row(
            evidence, _count(model, guide, here, shared), time.perf_counter() - start + took[key], gap_parts
        )
    known = _exact(each, rows, here, settings)
    if refine and not (refine == "auto" and tolerance is not None):
        rows = _refined(each, rows, here, refine, settings)
    rows = {key: replace(row, evidence=_with_exact(row.evidence, known.get(key))) for key, row in rows.items()}
    for key, row in rows.items():  # beside the final estimate
        if row.evidence.baseline is not None:
            kind = cast(Kind, row.evidence.baseline_kind.split()[0])
            rows[key] = replace(row, evidence=beside_baseline(row.evidence, kind, here, train))
    if len({row.evidence.joint for row in rows.values()}) > 1:
        joint = [_called(key, each) for key, row in rows.items() if row.evidence.joint]
        raise ValueError(
            f"the weights of {joint} are joint (one number for all data), those of the other rows per data point, so "
            "they cannot be compared; is a plate missing around a site of the guide?"
        )
    if len({len(row.evidence.elbo) for row in rows.values()}) > 1:
        sizes = {_called(key, each): len(row.evidence.elbo) for key, row in rows.items()}
        raise ValueError(f"these models hold different numbers of data points, {sizes}, so they cannot be compared")
    return Comparison({name: _over_runs([rows[key] for key in rows if key[0] == name]) for name in pairs}, shared)


def _each(pairs: Mapping[str, Pair | Sequence[Pair]]) -> dict[Key, Pair]:
    """Every training run of every row."""
    if not pairs:
        raise ValueError("compare needs at least one pair (model, guide) with its name, but got none")
    runs: dict[str, list[Pair]] = {}
    for name, value in pairs.items():
        alone = isinstance(value, tuple) and callable(value[0])
        runs[name] = [cast(Pair, value)] if alone else list(cast(Sequence[Pair], value))
    if empty := [name for name, of in runs.items() if not of]:
        raise ValueError(f"the list of training runs of {empty} is empty: give a pair (model, guide) for each seed")
    each = {(name, i): pair for name, of in runs.items() for i, pair in enumerate(of)}
    for name, of in runs.items():
        if len({id(guide) for _, guide in of}) < len(of) and len({id(model) for model, _ in of}) < len(of):
            raise ValueError(f"'{name}' has one pair more than once: each training run needs its own model and guide")
    return each


def _called(key: Key, each: Mapping[Key, Pair]) -> str:
    """The name of a training run in messages: that of its row, if it is the only run."""
    name, i = key
    return f"{name}, run {i + 1}" if (name, 1) in each else name


def _times(each: Mapping[Key, Pair], histories: Mapping[str, History | Sequence[History]]) -> dict[Key, float]:
    """The seconds of training: from the given histories, else from training in this process."""
    names = {name for name, _ in each}
    if set(histories) - names:
        raise ValueError(
            f"histories must have names of pairs, but got pairs {sorted(names)} and histories {list(histories)}"
        )
    given: dict[Key, float] = {}
    for name, found in histories.items():
        listed = [found] if isinstance(found, History) else list(found)
        runs = sum(1 for key in each if key[0] == name)
        if len(listed) != runs:
            raise ValueError(f"'{name}' has {runs} training runs, but {len(listed)} histories: give one for each")
        given |= {(name, i): history.seconds for i, history in enumerate(listed)}
    return {key: given.get(key, seconds_of(guide)) for key, (_, guide) in each.items()}


def _exact(
    pairs: Mapping[Key, Pair], rows: Mapping[Key, Row], data: tuple[Tensor, ...], settings: dict[str, Any]
) -> dict[Key, Tensor | None]:
    """Log p(x) by a sum or an integral, for models where sampling used too few particles to pay for it."""
    found: dict[Key, Tensor | None] = {}
    models: list[tuple[Program, Tensor | None]] = []
    for key, (model, guide) in pairs.items():
        evidence = rows[key].evidence
        if not data or evidence.joint or evidence.exact is not None or evidence.doubt:
            continue
        known = [value for other, value in models if other == model]
        if not known:
            with running(model, guide, device=settings["device"]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Pyro's parameter store held other values")  # said before
                known = [cheap_evidence(model, data, budget=_AFFORDABLE, rows=len(data[0]), joint=False)]
            models.append((model, known[0]))
        found[key] = known[0]
    return found


def _with_exact(evidence: Evidence, exact: Tensor | None) -> Evidence:
    if exact is None or evidence.exact is not None:
        return evidence
    guide = None if evidence.by_guide is None else replace(evidence.by_guide, exact=exact)
    return without_lower_exact(replace(evidence, exact=exact, by_guide=guide))


_AFFORDABLE = 20_000  # the maximal number of evaluations of log p(x, z) per data point, on average, for an exact value


def _over_runs(rows: Sequence[Row]) -> Row:
    """One row for all training runs."""
    if len(rows) == 1:
        return rows[0]
    runs = [row.evidence for row in rows]
    return replace(rows[0], evidence=_pooled(runs), seconds=sum(row.seconds for row in rows), runs=runs)


def _refined(
    pairs: Mapping[Key, Pair],
    rows: dict[Key, Row],
    data: tuple[Tensor, ...],
    refine: Refine,
    settings: dict[str, Any],
) -> dict[Key, Row]:
    """The rows with the refined log p(x) of their models, computed once per model."""
    made = dict(rows)
    waiting = list(rows)
    while waiting:
        model = pairs[waiting[0]][0]
        group = [name for name in waiting if pairs[name][0] == model]
        waiting = [name for name in waiting if name not in group]
        best = max(group, key=lambda name: _or_lowest(float(rows[name].evidence.elbo.mean())))
        start = time.perf_counter()
        try:
            guide, how = pairs[best][1], {name: settings[name] for name in ("seed", "max_plate_nesting", "progress")}
            running_so = running(model, guide, "refine", seed=settings["seed"], device=settings["device"])
            place = place_of(data, settings["device"], model, guide)
            with running_so, product_route(place), named(_called(best, pairs)):
                first = refined(rows[best].evidence, model, guide, data, refine, **how)
        except Exception as error:
            error.add_note(f"in compare, at row '{_called(best, pairs)}'")
            raise
        seconds = time.perf_counter() - start
        for name in group:
            row = rows[name]
            if name == best:
                evidence = first
            elif first.by_guide is not None:
                evidence = with_refined(row.evidence, of_refined(first))
            elif first.method == "guide":  # its weights are constant, at the exact value, so no proposal is better
                method = f"weights of '{_called(best, pairs)}', which are constant"
                evidence = with_refined(row.evidence, of_refined(first), method)
            else:
                evidence = replace(row.evidence, method=first.method)
            took = row.seconds + (seconds if name == best else 0.0)
            parts = None if row.gaps is None else replace(row.gaps, evidence=evidence)
            made[name] = replace(row, evidence=evidence, seconds=took, gaps=parts)
    return made


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _count(model: Program, guide: Program, data: tuple[Tensor, ...], shared: bool) -> int:
    """The number of trainable parameters; of the guide alone if the model is shared. Uses a part of the data."""
    part = _some(model, guide, data)
    with running(model, guide), buffers_kept(model, guide):
        of_model, of_guide = parameters_of(model, guide, *part.data)
    return sum(p.numel() for p in (of_guide if shared else [*of_model, *of_guide]))


def _some(model: Program, guide: Program, data: tuple[Tensor, ...]) -> Part:
    """A part of the data, and the layout of model and guide on it."""
    with running(model, guide), buffers_kept(model, guide):
        return next(stream(model, guide, data, "parameters", at_once=_COUNTED, weights="none", progress=False))


_COUNTED = 64  # data points used to find which parameters are read
