r"""The measurement: ELBO, importance-weighted log p(x) and exact value, per data point, each with its error.

.. math::
    \text{ELBO}_n = \frac{1}{K} \sum_k \log w_{kn}, \qquad
    \widehat{\log p}(x_n) = \log \frac{1}{K} \sum_k w_{kn}, \qquad
    \text{gap}_n = \log p(x_n) - \text{ELBO}_n
"""

from __future__ import annotations

__all__ = [
    "Evidence",
    "Refine",
    "beside_baseline",
    "evaluate",
    "of_refined",
    "refined",
    "warn_of_impossible_elbo",
    "with_refined",
    "without_lower_exact",
]

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from jensen import processes
from jensen.checked import checked
from jensen.graphs.compile import Compile
from jensen.graphs.draws import LogWeights
from jensen.graphs.products import product_route
from jensen.kernel.arguments import Given, prepared
from jensen.kernel.batches import Batch, Data, Part, Placed, Transform, as_tensors, in_cache, place_of, placed, stream
from jensen.kernel.caller import outside
from jensen.kernel.looks import look_at, warn_of_no_plate
from jensen.kernel.modes import running
from jensen.kernel.sites import observed_numbers
from jensen.kernel.weights import Program, observed_sites
from jensen.missing import Missing, has_holes
from jensen.results.records import Measurement, Quantity
from jensen.results.standard_errors import mc_error, significant, standard_error_of_mean
from jensen.results.tables import Table, decimals, percent, with_error
from jensen.sources import Source, as_source

from ..exact.log_evidence import cheap_evidence
from .adaptive import as_needed, check_settings, equally
from .baseline import Kind, baseline, kind_of, likely_reason
from .diagnostics import corrections_of
from .refined import Refined
from .refined import refine as find

Refine = Literal["auto"] | bool | int


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Measurement):
    """The result of :func:`~jensen.inference.evaluate`. Tensors are per data point, [N], float64, in nats.

    Joint weights (a global latent) refer to all data at once: tensors are [1].

    Attributes:
        elbo: mean log weight.
        elbo_error: its Monte Carlo standard error.
        log_evidence: importance-weighted estimate of log p(x); a refined one is corrected for the bias of the
            logarithm by half its squared error.
        standard_error: its Monte Carlo standard error (delta method); reliable if k-hat is below 0.7.
        ess: effective sample size of the K weights.
        pareto_k: Pareto k-hat of the weights.
        exact: log p(x) if the model has it, or if a sum or an integral over the latents needs at most ``particles``
            evaluations of log p(x, z) per data point; else None.
        particles: K; with a tolerance, the maximum over the data points.
        features: the number of observed numbers in one data point, without masked or padded ones (in all data, for
            joint weights); the mean if data points differ.
        joint: whether the weights are joint.
        corrected: log p(x) by other estimators, from the guide's samples; empty if it is refined. Two have less bias
            than ``log_evidence`` and more variance: ``"delta"`` is corrected for the bias of order 1/K, ``"jackknife"``
            is JVI-1. ``"smoothed"`` replaces the largest weights by quantiles of a fitted Pareto distribution (PSIS;
            NaN for K below 25), which trades bias for variance: it is lower on average if tails are heavy. If k-hat
            is above 0.7, none of them is reliable.
        corrected_error: their Monte Carlo standard errors.
        zero_weights: how many of the K weights are zero: samples where the model has no density.
        spent: the number of particles sampled; with a tolerance this includes the pilot, which is used for no other
            number here.
        converged: with a tolerance, whether each data point got as many particles as its pilot required; else None.
            It does not depend on the samples of the estimate, so converged data points are not a biased selection.
        route: the method for particles, and how it ran, such as ``"outer plate, traced and compiled"``.
        by_guide: with ``refine``, the result from the guide's own samples, as without it; else None. The ELBO is the
            same in both; the other numbers here then come from a separate proposal for each data point.
        doubt: why ``exact`` was omitted although the model has it: how far the weights lie above it. Else empty.
        method: ``"guide"``, ``"refined"``, the row of a comparison whose numbers are used, or why refining failed.
        modes: the number of modes of a refined proposal, [N].
        evaluations: of log p(x, z) to refine a data point, including its final samples; a gradient counts three.
        draws: the number of final samples, from which the refined estimate is computed.
        missed: whether a few chains annealed from the prior, if the budget allows them, found a part of the
            posterior that the proposal of a data point misses: bool [N]. A mode that no chain visited is not detected.
        baseline: log p(x) of one distribution per feature, fitted in closed form, [N]; None if no baseline is
            comparable with the model: masks, several observed sites.
        baseline_kind: its distribution, and the data of its fit.
        below: if log p(x) is below the baseline, by how much, and the likely reason; else empty.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(20, 5).double()
        >>> evidence = evaluate(model, ExactPosterior(model), x, particles=100, progress=False)
        >>> torch.allclose(evidence.log_evidence, evidence.exact), float(evidence.gap.abs().max()) < 1e-10
        (True, True)
        >>> again = Evidence.from_json(evidence.to_json())
        >>> torch.equal(again.elbo, evidence.elbo), again.particles
        (True, 100)
    """

    elbo: Tensor
    elbo_error: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    exact: Tensor | None
    particles: int
    features: float
    joint: bool = False
    corrected: dict[str, Tensor] = field(default_factory=dict)
    corrected_error: dict[str, Tensor] = field(default_factory=dict)
    zero_weights: Tensor | None = None
    spent: Tensor | None = None
    converged: Tensor | None = None
    route: str = ""
    by_guide: Evidence | None = None
    doubt: str = ""
    method: str = "guide"
    modes: Tensor | None = None
    evaluations: Tensor | None = None
    draws: Tensor | None = None
    missed: Tensor | None = None
    baseline: Tensor | None = None
    baseline_kind: str = ""
    below: str = ""

    @property
    def best(self) -> Tensor:
        """Log p(x): exact if known, else the importance-weighted estimate: [N]."""
        return self.log_evidence if self.exact is None else self.exact

    @property
    def gap(self) -> Tensor:
        """Log p(x) minus ELBO, with the exact log p(x) if known: [N].

        NaN for a single particle: both would be the same weight, so their difference has no meaning.
        """
        alone = self.particles == 1 and self.exact is None and self.by_guide is None
        return self.best - self.elbo if not alone else torch.full_like(self.elbo, math.nan)

    @property
    def drawn(self) -> str:
        """The number of particles per data point, in words."""
        if self.converged is None or self.spent is None:
            return f"{self.particles} particles" + ("" if self.joint else " each")
        return f"{float(self.spent.double().mean()):.0f} particles" + ("" if self.joint else " on average")

    @property
    def unit(self) -> str:
        """The unit of the numbers, in words: a total for joint weights."""
        return "nats in total" if self.joint else "nats per data point"

    @property
    def unreliable(self) -> float | None:
        """The share of data points whose k-hat is not below 0.7; None for fewer than 25 particles."""
        return float((~(self.pareto_k <= 0.7)).double().mean()) if self.particles >= 25 else None

    @property
    def too_low(self) -> str:
        """If an estimated log p(x) lies below the ELBO, which is impossible, by how much; else empty."""
        excess = float((self.elbo - self.log_evidence).mean())
        error = math.hypot(mc_error(self.elbo_error), mc_error(self.standard_error))
        rounding = 1e-4 * (1 + float(self.elbo.abs().mean()))
        if self.exact is not None or self.particles < 25 or not excess > 3 * error + rounding:
            return ""
        return f"by {decimals(excess, 2)} {self.unit}, which is impossible: the estimate of log p(x) is too low"

    def _quantities(self) -> list[Quantity]:
        noise = mc_error(self.elbo_error), mc_error(self.standard_error)
        errors = {name: mc_error(values) for name, values in self.corrected_error.items()}
        corrected = [
            Quantity(f"log_evidence_{name}", values, _LABELS[name], errors[name], data_error=False)
            for name, values in self.corrected.items()
        ]
        return [
            Quantity("particles", self.particles),
            Quantity("elbo", self.elbo, "ELBO", noise[0]),
            Quantity(
                "log_evidence",
                self.log_evidence,
                "log p(x), refined" if self.method == "refined" else "log p(x), importance-weighted",
                noise[1],
            ),
            *corrected,
            *self._of_guide(),
            Quantity("exact", self.exact, "log p(x), exact", digits=noise[1]),
            *([Quantity("baseline", self.baseline, self.baseline_kind)] if self.baseline is not None else []),
            Quantity("gap", self.gap, "gap = log p(x) - ELBO", digits=math.hypot(*noise)),
            Quantity("ess", self.ess),
            Quantity("unreliable", self.unreliable),
            Quantity("zero_weights", self.zero_weights, total=True),
            Quantity("spent", self.spent, total=True),
            Quantity("converged", self.converged),
            *(Quantity(name, getattr(self, name)) for name in _OF_REFINED if self.by_guide is not None),
        ]

    def _of_guide(self) -> list[Quantity]:
        if self.by_guide is None:
            return []
        label, error = f"  guide samples only, K = {self.particles}", mc_error(self.by_guide.standard_error)
        return [Quantity("log_evidence_by_guide", self.by_guide.log_evidence, label, error)]

    def bits_per_dimension(self, offset: float = 0.0) -> float:
        """Sum of -log2 p(x) over the data per observed number of all of them, plus ``offset``.

        Args:
            offset: log2 of the number of grey levels, for data dequantized to [0, 1]: it turns the density of the
                scaled data into that of the levels.
        """
        return -float(self.best.mean()) / (self.features * math.log(2)) + offset

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per data point."""
        return {**super().to_dict(), "features": self.features}

    def _per_datum(self, frame: bool = False) -> dict[str, Tensor]:
        values = {f"log_evidence_{name}": of for name, of in self.corrected.items()}
        errors = {f"log_evidence_{name}_error": of for name, of in self.corrected_error.items()}
        return {**self._tensors(), **({"gap": self.gap} if frame else {}), **values, **errors}

    def _table(self) -> Table:
        drawn = self.drawn.removesuffix(" each").replace(" particles", "")
        if self.by_guide is not None and self.draws is not None:
            drawn = decimals(float(self.draws.double().mean()), 0)
        size = f"{decimals(float(self.ess.mean()), 1)} of {drawn}"
        if self.joint:
            facts = [*self._joint_facts(size), *self._refined_facts()]
            return self._summary_table(f"all data jointly, {self.drawn}, {self.unit}", facts)
        facts = [("effective sample size, mean", size), ("data points with k-hat > 0.7", percent(self.unreliable))]
        if self.by_guide is not None:
            facts[1] = facts[1][0], f"{facts[1][1]}; guide samples only: {percent(self.by_guide.unreliable)}"
        facts += self._refined_facts()
        if self.converged is not None and self.spent is not None:
            share, missed = percent(float(self.converged.double().mean())), int((~self.converged).sum())
            facts.append(("tolerance reached", f"{share} of the data points; missed by {missed}"))
            facts.append(("particles spent", f"{int(self.spent.sum()):,}, at most {self.particles:,} per data point"))
        if self.zero_weights is not None and self.zero_weights.any():
            total, where = int(self.zero_weights.sum()), int((self.zero_weights > 0).sum())
            facts.append(("weights of zero", f"{total:,} in {where} data points: samples without density"))
        return self._summary_table(f"{len(self.elbo)} data points, {self.drawn}, {self.unit}", facts)

    def _refined_facts(self) -> list[tuple[str, str]]:
        if self.by_guide is None or self.evaluations is None:
            label = "not refined" if self.by_guide is None else "log p(x) by"
            return [] if self.method in ("guide", "refined") else [(label, self.method)]
        mean = f"{float(self.evaluations.double().mean()):,.0f}"
        facts = [(f"evaluations{'' if self.joint else ', mean'}", f"{mean}, including final samples")]
        if self.missed is not None and self.missed.any():
            where = "" if self.joint else f"in {percent(float(self.missed.double().mean()))} of the data points, "
            facts.append(("modes missed", f"{where}found by chains from the prior"))
        return [*facts, ("", "modes that no search found are not detected")]

    def _summary_table(self, head: str, facts: Sequence[tuple[str, str]]) -> Table:
        doubt = [("exact log p(x) omitted", self.doubt)] if self.doubt else []
        doubt += [("below the ELBO", self.too_low)] if self.too_low else []
        doubt += [("below the baseline", self.below)] if self.below else []
        return super()._summary_table(head, [*facts, *doubt])

    def _joint_facts(self, size: str) -> list[tuple[str, str]]:
        k_hat, more = decimals(float(self.pareto_k), 2), "refine=20_000" if self.by_guide else "particles=20_000"
        if self.exact is None and self.particles >= 25 and not float(self.pareto_k) <= 0.7:
            k_hat += f", above 0.7: log p(x) is unreliable; use more evaluations, such as {more}"
        facts = [("effective sample size", size), ("k-hat", k_hat)]
        if self.converged is not None and self.spent is not None:
            facts.append(("tolerance reached", "yes" if self.converged.all() else "no"))
            facts.append(("particles spent", f"{int(self.spent):,}"))
        if self.zero_weights is not None and self.zero_weights.any():
            facts.append(("weights of zero", f"{int(self.zero_weights):,}: samples without density"))
        return facts


_LOOKED_AT = 10_000  # rows of a source that are searched for the reason of a low log p(x)
_OF_REFINED = ("modes", "evaluations", "missed")
_LABELS = {"delta": "  delta-corrected", "jackknife": "  jackknifed", "smoothed": "  Pareto-smoothed"}


@checked
@processes.together("evaluate")
def evaluate(
    model: Program,
    guide: Program,
    data: Given,
    particles: int = 5000,
    *,
    tolerance: float | None = None,
    max_particles: int = 100_000,
    refine: Refine = "auto",
    train: Given | None = None,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    missing: Missing = None,
    chunk_size: int | None = None,
    max_plate_nesting: int | None = None,
    compile: Compile = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Measure a model and guide: per data point the ELBO, an importance-weighted log p(x), and its reliability.

    Weights are streamed in chunks of data and particles and reduced in float64. Memory does not grow with K, except for
    the 3 sqrt(K) largest weights of the present data, nor with N, except for the results. (Joint weights, guides that
    hold a value per data point, and models that hold their data are run on all data at once.) Parameters do not change;
    modules are in evaluation mode during the measurement.

    With a ``tolerance``, a pilot of at least 256 particles sets the number for each data point, many more if k-hat is
    above 0.5 (four times at 0.7). The estimate uses fresh particles only, whose number is fixed before they are
    sampled. So the tolerance is the expected error; the reported error is that of the fresh particles and may be
    larger or smaller. Means are over all data, converged or not. Modes that the guide never samples are not detected.
    For joint weights, and guides that hold a value per data point, the maximum over data points is used for all.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.
        Nowozin (2018), Debiasing Evidence Approximations: the delta-method and jackknife corrections.
        https://openreview.net/forum?id=HyZoi-WRb
        Stein (1945), A Two-Sample Test for a Linear Hypothesis: the sample size from a pilot.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors; ``()`` if model and guide hold their data and are called
            without arguments: weights are then joint, or one for each element of the plate around every site; or data
            that are read by the batch, as for :func:`fit`: the numbers are those of the same rows in memory. They are
            read several times, in the same order.
        particles: the number K of samples per data point; not used with a tolerance.
        tolerance: the Monte Carlo standard error of log p(x), in nats, to reach for each data point. None: K samples.
        max_particles: with a tolerance, the maximal number of samples per data point, at least 512. If it is reached
            first, the data point is not ``converged``.
        refine: whether log p(x) is estimated with a separate proposal for each data point instead of the guide, whose
            numbers are kept as :attr:`Evidence.by_guide`: ascents from samples of guide and prior to modes, their
            curvature, a short local search, then fresh samples from a mixture of the modes, wide tails and the guide.
            This needs at most ``particles`` additional evaluations of log p(x, z) per data point, a gradient counting
            three; an integer is another budget (with many latents several thousand). ``"auto"``: if it is possible,
            without a tolerance, and unless the weights are constant at the exact value; ``True``: also with a
            tolerance, with a warning if it is impossible; ``False``: never. :attr:`Evidence.method` shows the result.
        train: training data to fit the baseline: one distribution per feature. None: it is fitted to the
            measured data, which favours it, and its row is marked.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once: ``torch.bernoulli`` binarizes grey images at random. To data
            that are read by the batch, in blocks of 512 rows, with the same result at each pass.
        missing: ``"nan"``, or a Boolean mask of the first tensor, as for :func:`fit`: log p(x) is then that of the
            observed values.
        chunk_size: how many (data point, particle) combinations are run at once (how many particles, if the model holds
            its data); None: as many as fit into a processor's cache.
        max_plate_nesting: how many dimensions the plates take, as in Pyro's losses. None: found by a run.
        compile: whether the computation is traced once as a graph and compiled: ``"auto"`` where that pays, ``True``
            wherever possible (else a warning gives the reason), ``False`` never. The samples are the same.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Evidence`.

    Raises:
        ValueError: for ``particles`` below 1, a tolerance that is not positive, ``max_particles`` below 512, data
            that are empty or not finite, a guide that holds values for other data, data read by the batch that change
            from pass to pass or that model and guide need at once, and the errors of
            :func:`~jensen.inference.log_weights`.
        TypeError: for data that are not tensors, and a call that does not match the arguments of model or guide.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), MeanField, context=16)
        >>> evidence = evaluate(model, guide, torch.randn(20, 5), particles=100, progress=False)
        >>> evidence.elbo.shape, evidence.summary()["particles"]
        (torch.Size([20]), 100)
        >>> evidence = evaluate(model, guide, torch.randn(20, 5), tolerance=0.1, progress=False)
        >>> evidence.spent.shape, evidence.converged.shape
        (torch.Size([20]), torch.Size([20]))
    """
    check_settings(particles, tolerance, max_particles)
    seed, device = processes.shared_seed(seed), processes.place(device)
    exactly = model
    model, data = prepared(model, data, missing)
    source = as_source(data)
    tensors = as_tensors(cast(Data, data), held=True) if source is None else as_tensors(source.head(1))
    needs = {"particles": particles, "tolerance": tolerance, "max_particles": max_particles, "refine": refine}
    processes.check_alike(seed=seed, settings=needs)
    where = place_of(tensors, device, model, guide)
    with running(model, guide, "evaluate", seed=seed, device=device), product_route(where):
        measured: Batch | Source
        if source is None:
            measured = tensors = placed(tensors, device, batch_transform)
        else:
            measured = Placed(source, device, batch_transform)
        numbers = tensors[0].numel() if tensors else _observed(model, guide)
        chunk_size = in_cache(tensors, numbers) if chunk_size is None else chunk_size
        parts: list[dict[str, Tensor]] = []
        counts: list[float] = []
        weights: LogWeights | None = None
        kind: Kind | None = None
        for part in stream(
            model,
            guide,
            measured,
            "evaluate",
            at_once=chunk_size,
            together=min(64, particles if tolerance is None else 64),
            most=64,
            weights="any",
            units=particles if tolerance is None else None,
            max_plate_nesting=max_plate_nesting,
            progress=progress,
            seed=seed,
            shared=True,
        ):
            if weights is None:
                kind = kind_of(model, guide, part.data)
                if part.joint:
                    warn_of_no_plate(model, guide, part.data)
            weights = LogWeights(part.pair, compile) if weights is None else weights
            counts.append(_observed_of(model, guide, part.data) if tensors else numbers)

            def draw(
                positions: Tensor | None, k: int, part: Part = part, weights: LogWeights = weights
            ) -> tuple[Tensor, ...]:
                some = part.data if positions is None else tuple(x[positions.to(x.device)] for x in part.data)
                drawn = weights.parts(some, k, None if tolerance is not None else max(1, part.ahead * (particles // k)))
                part.advance(k * (len(part) if positions is None else len(positions)))
                numbers = (drawn.log_weights, drawn.elbo) if part.pair.elbo_differs else (drawn.log_weights,)
                return tuple(t.unsqueeze(-1) if part.joint else t for t in numbers)

            reduced = (
                equally(draw, part, particles) if tolerance is None else as_needed(draw, part, tolerance, max_particles)
            )
            parts.append({name: values.cpu() for name, values in reduced.items()})
        parts = processes.in_order(parts, part.of)
        counted = sum(processes.in_order(counts, part.of))
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        budget = int(joined["spent"].double().mean())
        known = cheap_evidence(exactly, measured, budget=budget, rows=part.size, joint=part.joint) if tensors else None
        if known is not None and bool(known.isnan().any()):
            lost = int(known.isnan().sum())
            warnings.warn(
                f"log_evidence of the model is NaN for {lost} data points, so the exact log p(x) is omitted"
                + (": it does not accept missing values" if _holed(measured) else ""),
                stacklevel=outside(),
            )
            known = None
        corrections = corrections_of(joined)
        evidence = Evidence(
            **joined,
            exact=known,
            particles=int(joined["spent"].max()),
            features=_whole(counted / len(joined["elbo"])),
            joint=part.joint,
            **corrections,
            route="" if weights is None else f"{weights.pair.way}, {weights.route}",
        )
        warn_of_impossible_elbo(evidence)
        if refine and not (refine == "auto" and tolerance is not None):
            settings: dict[str, Any] = {
                "max_plate_nesting": max_plate_nesting,
                "compile": compile,
                "progress": progress,
            }
            evidence = refined(evidence, model, guide, measured, refine, seed=seed, **settings)
    evidence = without_lower_exact(evidence)
    return evidence if kind is None else beside_baseline(evidence, kind, measured, train)


def _holed(data: Batch | Source) -> bool:
    return data.survey().holes if isinstance(data, Source) else any(map(has_holes, data))


def beside_baseline(evidence: Evidence, kind: Kind, data: Batch | Source, train: Given | None) -> Evidence:
    """The evidence with the baseline of one distribution per feature, and the likely reason if it is lower."""
    fitted = None if train is None else as_source(train) or as_tensors(cast(Data, train))[0]
    x = data if isinstance(data, Source) else data[0]
    if fitted is None and (data.survey().n if isinstance(data, Source) else len(data[0])) < 2:
        return evidence  # one data point has no variance to fit
    found = baseline(kind, x, fitted)
    known = found.log_prob.sum(0, keepdim=True) if evidence.joint else found.log_prob
    below, label = float((known - evidence.best).mean()), f"{kind} per feature{', fitted here' * found.own}"
    error = standard_error_of_mean(known - evidence.best) if len(known) > 1 else 0.0
    n = len(found.log_prob)
    favour = found.favour * (n * (1 + 0.5 * math.log(n)) if evidence.joint else 1)  # p(x) penalizes its latents
    if not significant(below - favour - 1e-6 * abs(float(known.mean())), error, len(known) - 1 or math.inf):
        return replace(evidence, baseline=known, baseline_kind=label, below="")
    some = x if fitted is None else fitted
    some = some.head(_LOOKED_AT)[0] if isinstance(some, Source) else some
    reason = likely_reason(some) if kind == "Gaussian" else ""
    reason = reason or "a model that is too simple, trained too short, or with too high an lr"
    words = f"by {with_error(below, error) if error else decimals(below, 1)} {evidence.unit}: {reason}"
    return replace(evidence, baseline=known, baseline_kind=label, below=words)


def refined(
    evidence: Evidence,
    model: Program,
    guide: Program,
    data: Batch | Source,
    refine: Refine,
    **how: Any,
) -> Evidence:
    """The evidence with numbers from a separate proposal per data point instead of the guide's, which are kept.

    Modules must be in evaluation mode, and the random stream private if there is a seed.

    Args:
        evidence: the result from the guide's samples.
        model: the model.
        guide: the guide, or another one of the same model.
        data: the data, on their device, or a source of them.
        refine: as for :func:`evaluate`; not ``False``.
        how: settings of :func:`~jensen.inference.measure.refined.refine`.
    """
    if refine == "auto" and _known_already(evidence):
        return evidence
    budget = evidence.particles if isinstance(refine, bool | str) else refine
    found = find(model, guide, data, budget, **how)
    if isinstance(found, str):
        if refine != "auto":
            warnings.warn(f"log p(x) is estimated from the guide's samples only: {found}", stacklevel=outside())
        return replace(evidence, method=found)
    return with_refined(evidence, found)


def with_refined(evidence: Evidence, found: Refined, method: str = "refined") -> Evidence:
    """The evidence with refined numbers, or those of a better guide, instead of the guide's, which are kept.

    If no fresh sample has a density, but some of the guide's have, the guide's numbers stay.
    """
    numbers = found._asdict()
    lost = found.log_evidence.isneginf() & evidence.log_evidence.isfinite()
    for name in ("log_evidence", "standard_error", "ess", "pareto_k"):
        numbers[name] = torch.where(lost, getattr(evidence, name), numbers[name])
    return replace(evidence, **numbers, corrected={}, corrected_error={}, by_guide=evidence, method=method)


def of_refined(evidence: Evidence) -> Refined:
    """The refined numbers of evidence."""
    return Refined(**{name: getattr(evidence, name) for name in Refined._fields})


def _known_already(evidence: Evidence) -> bool:
    """Whether weights are constant at the exact value, so that no proposal can be better."""
    if evidence.exact is None:
        return False
    rounding = 1e-4 * (1 + evidence.exact.abs())
    off = (evidence.log_evidence - evidence.exact).abs()
    return bool(((off <= rounding) & (evidence.standard_error <= rounding)).all())


def _observed(model: Program, guide: Program) -> int:
    """The number of observed numbers if model and guide hold their data."""
    look_at(model, guide, ())
    return int(_observed_of(model, guide, ()))


def _observed_of(model: Program, guide: Program, data: tuple[Tensor, ...]) -> float:
    """The number of observed numbers of these data; all of the first tensor if the model observes nothing itself."""
    seen = observed_sites(model, guide, data)
    return sum(map(observed_numbers, seen)) if seen else float(data[0].numel() if data else 0)


def _whole(count: float) -> float:
    return int(count) if count == int(count) else count


def warn_of_impossible_elbo(evidence: Evidence) -> None:
    """Warn of an ELBO above the exact log p(x) by more than its error and rounding, which is impossible."""
    if evidence.exact is None or evidence.particles < 10:
        return
    excess = float((evidence.elbo - evidence.exact).mean())
    error = mc_error(evidence.elbo_error)
    if excess > 6 * error + 1e-4 * (1 + float(evidence.exact.abs().mean())):
        warnings.warn(
            f"the ELBO is {excess:.3g} nats above the exact log p(x), which is impossible: precision is lost to "
            "rounding; measure in float64 (model.double(), guide.double())",
            stacklevel=outside(),
        )


def without_lower_exact(evidence: Evidence) -> Evidence:
    """Omit the exact log p(x), with a warning, if the weights sum to far more: the exact value then misses mass.

    The test covers the mean over the data and single data points. An estimate that is high by chance also has a high
    error, so false alarms are rare.
    """
    if evidence.exact is None or evidence.particles < 25:
        return evidence
    excess = evidence.log_evidence - evidence.exact
    rounding = 1e-4 * (1 + evidence.exact.abs())
    mean = float(excess.mean())
    single = excess > 6 * evidence.standard_error + rounding
    if mean > 6 * mc_error(evidence.standard_error) + float(rounding.mean()):
        above, where = mean, "on average"
    elif single.any():
        row = int(torch.where(single, excess, -math.inf).argmax())
        above, where = float(excess[row]), f"at row {row}"
    else:
        return evidence
    warnings.warn(
        f"the importance-weighted log p(x) is {above:.3g} nats above the exact log p(x) {where}, by more than six "
        "Monte Carlo errors, so the exact value is omitted: it is too low (a quadrature that missed a narrow peak, a "
        "log_evidence of another model), or precision is lost to rounding; compare with ais, or measure in float64 "
        "(model.double(), guide.double())",
        stacklevel=outside(),
    )
    guide = evidence.by_guide and replace(evidence.by_guide, exact=None)
    return replace(evidence, exact=None, by_guide=guide, doubt=f"the weights are {above:.3g} nats above it {where}")
