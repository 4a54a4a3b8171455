r"""Several pairs measured on the same data, in one table with paired differences between them.

If all rows share one model, log p(x) is the same for all, so

.. math:: \text{ELBO}_a - \text{ELBO}_b = \text{KL}(q_b \| p) - \text{KL}(q_a \| p)

and ELBO differences measure the guides. If each row has a model of its own, compare log p(x).
"""

from __future__ import annotations

__all__ = ["Comparison", "Row", "compare"]

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.graphs.products import product_route
from jensen.kernel.batches import Data, Part, Transform, as_tensors, place_of, placed, stream
from jensen.kernel.modes import buffers_kept, running
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program, parameters_of
from jensen.results.records import Record
from jensen.results.standard_errors import mc_error, standard_error_of_mean
from jensen.results.tables import Table, decimals, digits_of, percent, with_error

from ..training.history import History
from .evaluate import Evidence, Refine, evaluate, of_refined, refined, with_refined
from .gaps import Gaps, has_local
from .gaps import gaps as split


@dataclass(frozen=True, eq=False)
class Row:
    """One measured pair.

    Attributes:
        evidence: what :func:`~jensen.inference.evaluate` measured.
        parameters: the number of trainable parameters; of the guide alone where the model is shared.
        seconds: the time that training (where known) and measuring took.
        gaps: approximation and amortization gap, if ``compare(..., gaps=True)`` could measure them; else None.

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


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Record):
    """The table that :func:`~jensen.inference.compare` makes; ``print`` it, or read ``rows[name].evidence``.

    Attributes:
        rows: the measured pairs, by name.
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
        """Mean of a minus b over the data, in nats per datum, and its standard error, paired by datum.

        For ``"log_evidence"`` the exact values are taken where they are known, and estimates, which are below log p(x)
        in expectation, elsewhere. Where each pair has one number only
        (joint weights, in nats in all; or one datum), there is no error over data: the Monte Carlo error is returned.
        """
        first, second = (self._values(name, quantity) for name in (a, b))
        delta = first - second
        error = standard_error_of_mean(delta)
        if len(delta) == 1:
            error = math.hypot(*(self._noise(name, quantity) for name in (a, b)))
        return float(delta.mean()), error

    @property
    def joint(self) -> bool:
        """Whether the weights are joint, so that each pair has one number for all data."""
        return self._first.joint

    @property
    def unit(self) -> str:
        """The unit of the numbers, in words."""
        return self._first.unit

    @property
    def _first(self) -> Evidence:
        return next(iter(self.rows.values())).evidence

    def sentence(self) -> str:
        """How far the rows lie below the best one, each difference with its standard error, and warnings."""
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
        else:
            mean, error = differences[others[0]]
            ranking = f"`{best}` and `{others[0]}` do not differ significantly (two standard errors)"
            if mean > 2 * error:
                by = f"{decimals(mean / error, 1)} standard errors" if error else "the same amount at every test point"
                ranking = f"`{best}` is {by} above `{others[0]}`"
            text = (
                f"Each row is a different model: compare log p(x), not the ELBO. {ranking}; log p(x) {below} Errors "
                f"cover {'test points' if paired else 'particles'}, not training seeds.{self._mixed()}"
            )
        return text + self._warnings()

    def _mixed(self) -> str:
        """A sentence where exact values of log p(x) are ranked against estimates."""
        exact = [name for name, row in self.rows.items() if row.evidence.exact is not None]
        estimated = [name for name in self.rows if name not in exact]
        if not (exact and estimated):
            return ""
        return (
            f" log p(x) is exact for {', '.join(exact)} and estimated for {', '.join(estimated)}; an estimate is below "
            "log p(x) in expectation, so these differences hold its bias."
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
        text = f" The log p(x) of {', '.join(low)} is probably too low: k-hat > 0.7{far}." if low else ""
        if above:
            names = ", ".join(above)
            text += f" The approximation gap of {names} is an upper bound: local optimization did not converge{many}."
        return text

    def table(self, bits: bool = False, offset: float = 0.0) -> str:
        """The aligned table, in nats per datum (in all, where weights are joint), or in bits per dimension.

        Args:
            bits: whether ELBO, log p(x) and gaps are shown as bits per dimension (of minus the value: less is better).
            offset: log2 of the number of grey levels, added to the bits of dequantized data.
        """
        return "\n".join(Table("", *self._cells(bits, offset)).grid())

    def _cells(self, bits: bool = False, offset: float = 0.0) -> tuple[list[str], list[list[str]]]:
        """The headings and the rows."""
        parts = ["approximation", "amortization"] if any(row.gaps is not None for row in self.rows.values()) else []
        before = ["", "ELBO", "log p(x)", "± data", "± MC", "exact", "gap"]
        rows = []
        for name, row in self.rows.items():
            unit = row.evidence.features * math.log(2) if bits else 1.0
            split = None if row.gaps is None else row.gaps.summary()
            cells = [
                *_levels(row.evidence.summary(), split, unit, offset if bits else None),
                *(_with_spread(split, part, unit) for part in parts),
                *(decimals(float(row.evidence.ess.mean()), 1), _tail(row.evidence)),
                *(f"{row.parameters:,}", decimals(row.seconds, 1)),
            ]
            rows.append([name, *cells])
        return [*before, *parts, "ESS", "k-hat" if self.joint else "k>0.7", "params", "seconds"], rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers: a summary for each row."""
        rows = {
            name: {**row.evidence.summary(), "parameters": row.parameters, "seconds": row.seconds}
            | ({} if row.gaps is None else {"gaps": row.gaps.summary()})
            for name, row in self.rows.items()
        }
        return {"shared_model": self.shared_model, "rows": rows, "sentence": self.sentence()}

    def _columns(self) -> tuple[str, list[str], dict[str, list[Any]]]:
        rows = {name: dict(summary) for name, summary in self.to_dict()["rows"].items()}
        for row in rows.values():
            row |= {key: value for key, value in row.pop("gaps", {}).items() if key not in row}
        names = dict.fromkeys(key for row in rows.values() for key, value in row.items() if value is not None)
        columns = {key: [row.get(key) for row in rows.values()] for key in names}
        return "pair", list(rows), {key: [math.nan if v is None else v for v in c] for key, c in columns.items()}

    def _table(self) -> Table:
        first = self._first
        drawn = first.drawn if first.converged is None else "as many particles as each needs"
        what = "all data jointly" if self.joint else f"{len(first.elbo)} data"
        return Table(f"{what}, {drawn}, {self.unit}", *self._cells(), notes=[self.sentence()])

    def _values(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> Tensor:
        evidence = self.rows[name].evidence
        return evidence.elbo if quantity == "elbo" else evidence.best

    def _noise(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> float:
        """The Monte Carlo error of a row's mean."""
        evidence = self.rows[name].evidence
        if quantity == "elbo":
            return mc_error(evidence.elbo_error)
        return mc_error(evidence.standard_error) if evidence.exact is None else 0.0


def _tail(evidence: Evidence) -> str:
    """The share of data with a k-hat above 0.7; the k-hat itself where weights are joint."""
    return decimals(float(evidence.pareto_k), 2) if evidence.joint else percent(evidence.unreliable)


def _levels(s: Any, split: Any, unit: float, offset: float | None) -> list[str]:
    """ELBO, log p(x), both of its errors, the exact log p(x) and the gap of a row, to the digits that errors allow."""
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
    """One part of the gap with its error over the data; a dash where it is not known."""
    value, error = (None, None) if split is None else (split[part], split[f"{part}_data_error"])
    return "-" if value is None or error is None else with_error(value / unit, error / unit)


@checked
def compare(
    pairs: Mapping[str, tuple[Program, Program]],
    data: Data,
    particles: int = 5000,
    *,
    gaps: bool = False,
    tolerance: float | None = None,
    max_particles: int = 100_000,
    refine: Refine = "auto",
    histories: Mapping[str, History] | None = None,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    max_plate_nesting: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure several pairs on the same data. It never trains.

    Args:
        pairs: (model, guide) by name, in the order of the table's rows.
        data: a tensor [N, ...], or a tuple of such tensors; ``()`` for pairs that hold their data, as in
            :func:`~jensen.inference.evaluate`.
        particles: the number K of draws per datum.
        gaps: whether to split every gap into approximation and amortization, by :func:`~jensen.inference.gaps` with its
            defaults; the gap is then taken from the better of its two estimates of log p(x). Guides that cannot be
            taken apart, and joint weights, get a dash.
        tolerance: as in :func:`~jensen.inference.evaluate`; not together with ``gaps``.
        max_particles: as in :func:`~jensen.inference.evaluate`.
        refine: as in :func:`~jensen.inference.evaluate`. Pairs that share one model share its log p(x): it is found
            once, from the guide with the highest ELBO on, so that their gaps are measured against one number.
        histories: what :func:`~jensen.inference.fit` returned for some of the pairs: its time is added to theirs.
        seed: makes the draws repeatable, the same stream for every pair; None draws from the user's stream.
        batch_transform: applied to the first tensor, once, before all pairs: every pair sees the same data.
        max_plate_nesting: as in :func:`~jensen.inference.evaluate`, for every pair.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show progress bars.

    Returns:
        The :class:`Comparison`.

    Raises:
        ValueError: without pairs, for a history of no pair, a tolerance with gaps, joint weights beside weights per
            datum, and on what :func:`~jensen.inference.evaluate` names.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> table = compare({"exact": (model, ExactPosterior(model))}, torch.randn(20, 5), particles=50, progress=False)
        >>> list(table.rows), table.rows["exact"].parameters
        (['exact'], 16)
    """
    histories = histories or {}
    if not pairs or set(histories) - set(pairs):
        raise ValueError(
            f"compare needs at least one pair, and histories only of its pairs, but got pairs {list(pairs)} and "
            f"histories {list(histories)}"
        )
    if gaps and tolerance is not None:
        raise ValueError("gaps are measured with the same particles for all data: leave tolerance out, or gaps")
    tensors = as_tensors(data, held=True)
    with private_randomness(seed, "compare"):
        tensors = placed(tensors, None, batch_transform)
    models = [model for model, _ in pairs.values()]
    shared = all(model == models[0] for model in models) and len(models) > 1
    settings: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    settings["max_plate_nesting"] = max_plate_nesting
    needs: dict[str, Any] = {"tolerance": tolerance, "max_particles": max_particles}
    rows: dict[str, Row] = {}
    here = placed(tensors, device, None)
    for name, (model, guide) in pairs.items():
        start = time.perf_counter()
        gap_parts = None
        try:
            if gaps and has_local(guide) and not _some(model, guide, here).joint:
                with suppress(NotImplementedError):  # a guide that cannot be taken apart: a dash in the table
                    gap_parts = split(model, guide, tensors, particles, refine=False, **settings)
            evidence = (
                gap_parts.evidence
                if gap_parts
                else evaluate(model, guide, tensors, particles, refine=False, **needs, **settings)
            )
        except Exception as error:
            error.add_note(f"in compare, at the pair '{name}'")
            raise
        seconds = time.perf_counter() - start + (histories[name].seconds if name in histories else 0.0)
        rows[name] = Row(evidence, _count(model, guide, here, shared), seconds, gap_parts)
    if refine and not (refine == "auto" and tolerance is not None):
        rows = _refined(pairs, rows, here, refine, settings)
    if len({row.evidence.joint for row in rows.values()}) > 1:
        joint = [name for name, row in rows.items() if row.evidence.joint]
        raise ValueError(
            f"the weights of {joint} are joint (one number for all data), those of the other pairs per datum: they "
            "do not compare; is a plate missing around a site of the guide?"
        )
    if len({len(row.evidence.elbo) for row in rows.values()}) > 1:
        sizes = {name: len(row.evidence.elbo) for name, row in rows.items()}
        raise ValueError(f"these pairs hold different numbers of data, {sizes}, so they do not compare")
    return Comparison(rows, shared)


def _refined(
    pairs: Mapping[str, tuple[Program, Program]],
    rows: dict[str, Row],
    data: tuple[Tensor, ...],
    refine: Refine,
    settings: dict[str, Any],
) -> dict[str, Row]:
    """The rows with the refined log p(x) of their models, found once for each model."""
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
            with running_so, product_route(place_of(data, settings["device"], model, guide)):
                first = refined(rows[best].evidence, model, guide, data, refine, **how)
        except Exception as error:
            error.add_note(f"in compare, at the pair '{best}'")
            raise
        seconds = time.perf_counter() - start
        for name in group:
            row = rows[name]
            if name == best:
                evidence = first
            elif first.by_guide is not None:
                evidence = with_refined(row.evidence, of_refined(first))
            elif first.method == "guide":  # its weights are constant, at the exact value: no proposal would do better
                evidence = with_refined(row.evidence, of_refined(first), f"weights of '{best}', which are constant")
            else:
                evidence = replace(row.evidence, method=first.method)
            took = row.seconds + (seconds if name == best else 0.0)
            parts = None if row.gaps is None else replace(row.gaps, evidence=evidence)
            made[name] = replace(row, evidence=evidence, seconds=took, gaps=parts)
    return made


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _count(model: Program, guide: Program, data: tuple[Tensor, ...], shared: bool) -> int:
    """Trainable parameters of the pair; of the guide alone where the model is shared. A part of the data is enough."""
    part = _some(model, guide, data)
    with running(model, guide), buffers_kept(model, guide):
        of_model, of_guide = parameters_of(model, guide, *part.data)
    return sum(p.numel() for p in (of_guide if shared else [*of_model, *of_guide]))


def _some(model: Program, guide: Program, data: tuple[Tensor, ...]) -> Part:
    """A part of the data, and how the pair is laid out there."""
    with running(model, guide), buffers_kept(model, guide):
        return next(stream(model, guide, data, "parameters", at_once=_COUNTED, weights="none", progress=False))


_COUNTED = 64  # data on which the pair is run to see which parameters it reads
