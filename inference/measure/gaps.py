r"""The variational gap in two parts: the approximation gap of the family and the amortization gap of the encoder.

.. math::
    \log p(x) - \text{ELBO}(q_{\lambda(x)}) =
    \underbrace{\log p(x) - \text{ELBO}(q_{\lambda^*})}_{\text{approximation gap}} +
    \underbrace{\text{ELBO}(q_{\lambda^*}) - \text{ELBO}(q_{\lambda(x)})}_{\text{amortization gap}}, \qquad
    \lambda^* = \arg\max_\lambda \text{ELBO}(q_\lambda)

with parameters lambda* of the same family optimised for each data point separately, all data of a batch at once.
"""

from __future__ import annotations

__all__ = ["Gaps", "gaps", "has_local"]

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from jensen import processes
from jensen.checked import checked
from jensen.graphs.compile import Compile
from jensen.graphs.products import product_route
from jensen.kernel.batches import Data, Device, Part, Transform, as_tensors, in_cache, place_of, placed, stream
from jensen.kernel.modes import running
from jensen.kernel.parameters import is_autoguide
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program
from jensen.results.records import Measurement, Quantity
from jensen.results.standard_errors import mc_error
from jensen.results.tables import Table, decimals, percent

from .adaptive import equally
from .diagnostics import corrections_of
from .evaluate import Evidence, Refine, evaluate, warn_of_impossible_elbo
from .gaussians import Landscape
from .search import LocalSearch, originals_kept

_LIKELY = 4  # rounds


@dataclass(frozen=True, eq=False, repr=False)
class Gaps(Measurement):
    """The result of :func:`~jensen.inference.gaps`. Tensors are per data point, [N], float64, in nats.

    Attributes:
        evidence: the measurement of the guide.
        local: the measurement of the family's optimum, found for each data point.
        gained: the ELBO gained in the last round of the local optimisation.
        converged: whether that is less than the tolerance and twice its Monte Carlo error; a round with a loss larger
            than these does not show convergence either.
        rounds: the maximal number of rounds of a batch.
        seconds: the time of the local optimisation.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import gaps
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> split = gaps(model, ExactPosterior(model), torch.randn(20, 5).double(), particles=50, progress=False)
        >>> float(split.approximation.abs().max()) < 1e-10, float(split.amortization.abs().max()) < 1e-10
        (True, True)
    """

    evidence: Evidence
    local: Evidence
    gained: Tensor
    converged: Tensor
    rounds: int
    seconds: float

    @property
    def log_evidence(self) -> Tensor:
        r"""Log p(x): exact if known, else refined, else from the pooled weights of both guides: [N].

        .. math:: \log \frac{e^{\text{ELBO}} \, \hat p(x) + e^{\text{ELBO}^*} \, \hat p^*(x)}
            {e^{\text{ELBO}} + e^{\text{ELBO}^*}}

        with stars for the family's optimum. Of two estimates the one with the smaller k-hat has often missed a
        large weight, so none is selected; a guide whose ELBO is nats lower has almost no weight.
        """
        if self.evidence.exact is not None or self.evidence.by_guide is not None:
            return self.evidence.best
        return self._parts.logsumexp(0)

    @property
    def _shares(self) -> Tensor:
        """Log of the weight of each guide in the pool: [2, N]."""
        elbo = torch.stack([self.evidence.elbo, self.local.elbo])
        return elbo.log_softmax(0).nan_to_num(nan=-math.log(2), neginf=-math.inf)  # NaN: neither ELBO is finite

    @property
    def _parts(self) -> Tensor:
        """Log of the contribution of each guide to the pooled estimate: [2, N]."""
        return torch.stack([self.evidence.log_evidence, self.local.log_evidence]) + self._shares

    @property
    def _standard_error(self) -> Tensor:
        """The Monte Carlo error of the pooled estimate, by the delta method: [N]."""
        errors = torch.stack([self.evidence.standard_error, self.local.standard_error])
        if not self.rounds or self.evidence.by_guide is not None:  # one measurement
            return errors[0]
        parts = self._parts.softmax(0)
        pooled: Tensor = torch.where(parts > 0, parts * errors, 0.0 * parts).norm(dim=0)
        return pooled

    @property
    def route(self) -> str:
        """The method for particles of the guide, and how it ran."""
        return self.evidence.route

    @property
    def approximation(self) -> Tensor:
        """Log p(x) minus the ELBO of the family's optimum: [N]."""
        return self.log_evidence - self.local.elbo

    @property
    def amortization(self) -> Tensor:
        """The ELBO of the family's optimum minus that of the guide: [N]."""
        return self.local.elbo - self.evidence.elbo

    @property
    def total(self) -> Tensor:
        """Log p(x) minus the ELBO of the guide: [N], the sum of both gaps."""
        return self.log_evidence - self.evidence.elbo

    @property
    def unreliable(self) -> float | None:
        """The share of data points where a k-hat of the pool is not below 0.7; None if log p(x) is exact, or unknown.

        The k-hat of a guide with a weight below one percent is ignored.
        """
        if self.evidence.exact is not None or self.evidence.particles < 25:
            return None
        if self.evidence.by_guide is not None:
            return self.evidence.unreliable
        k = torch.stack([self.evidence.pareto_k, self.local.pareto_k])
        return float((~(k <= 0.7) & (self._shares > math.log(0.01))).any(0).double().mean())

    def _errors(self) -> tuple[float, float]:
        """The Monte Carlo errors of the mean approximation gap and of the mean amortization gap."""
        of_evidence = mc_error(self._standard_error) if self.evidence.exact is None else 0.0
        of_local, of_guide = mc_error(self.local.elbo_error), mc_error(self.evidence.elbo_error)
        both = math.hypot(of_local, of_guide) if self.rounds else 0.0  # one measurement
        return math.hypot(of_local, of_evidence), both

    def _quantities(self) -> list[Quantity]:
        errors = self._errors()
        return [
            Quantity("particles", self.evidence.particles),
            Quantity("log_evidence", self.log_evidence, in_summary=False),
            Quantity("gap", self.total, "gap = log p(x) - ELBO", digits=math.hypot(*errors), frame="total"),
            Quantity("approximation", self.approximation, "  approximation (the family)", errors[0]),
            Quantity("amortization", self.amortization, "  amortization (the encoder)", errors[1]),
            Quantity("gained", self.gained),
            Quantity("converged", self.converged),
            Quantity("rounds", self.rounds),
            Quantity("seconds", self.seconds),
            Quantity("unreliable", self.unreliable),
        ]

    def _table(self) -> Table:
        share = percent(float(self.converged.double().mean()))
        last = f"{share} of the data points; last round gained {decimals(float(self.gained.mean()), 4)} nats"
        facts = [("local optimisation converged", last)]
        if self.unreliable:
            facts.append(("log p(x) doubtful (k-hat > 0.7)", f"{percent(self.unreliable)} of data: gaps may be low"))
        head = f"{len(self.total)} data points, {self.evidence.particles} particles each, nats per data point"
        return self._summary_table(head, facts)


@checked
@processes.together("gaps")
def gaps(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 5000,
    *,
    tolerance: float = 0.002,
    rounds: int = 10,
    steps: int = 200,
    lr: float = 0.1,
    draws: int = 8,
    batch_size: int = 250,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    max_plate_nesting: int | None = None,
    device: Device = None,
    compile: Compile = "auto",
    refine: Refine = "auto",
    progress: bool = True,
) -> Gaps:
    r"""Split log p(x) - ELBO into the approximation gap of the family and the amortization gap of the encoder.

    For each data point the parameters of the same family are optimised, starting from the encoder's output: offsets to
    that output, and one copy of every other weight of the family (a flow's networks) per data point. A Gaussian family
    of all continuous latents is moved to the optimum of each data point: from the mode and its curvature, in up to
    three rounds, until the mean gradient is zero and the precision equals the mean curvature (Opper and Archambeau).
    For other families, and if that ends below the encoder's output, Adam is used. A round is ``steps``
    steps of Adam whose learning rate falls to a tenth; its result is the mean of the second half. Each data point keeps
    the better of the parameters before and after, by the ELBO under the same noise. After a round that gains less than
    the tolerance on average, rounds with a quarter and a sixteenth of its learning rate follow; when none gains,
    the optimisation ends. The optimum is a local one, so the approximation gap is an upper bound. If log q of
    a given value is known and costs little more than a sample, gradients use sticking the landing: their noise vanishes
    as q approaches the posterior.

    References:
        Cremer, Li and Duvenaud (2018), Inference Suboptimality in Variational Autoencoders.
        https://arxiv.org/abs/1801.03558
        Roeder, Wu and Duvenaud (2017), Sticking the Landing.
        Opper and Archambeau (2009), The Variational Gaussian Approximation Revisited.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide; one of jensen's (with ``local(*data)``), or an AutoGuide, which has no encoder: the rest of
            its optimisation counts as amortization.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of samples per data point of the final measurements.
        tolerance: in nats per data point: the criterion of convergence.
        rounds: the maximal number of rounds.
        steps: steps of Adam in a round.
        lr: the initial learning rate of rounds, for parameters that are offsets; a twentieth of it for copies of
            weights.
        draws: samples from the guide per data point and step.
        batch_size: how many data points are optimised at once.
        seed: makes everything reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once.
        max_plate_nesting: as for :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: no move.
        compile: as for :func:`~jensen.inference.evaluate`; steps of the local optimisation are traced and compiled
            too.
        refine: as for :func:`~jensen.inference.evaluate`: the source of the log p(x) from which gaps are measured.
        progress: whether to show progress bars.

    Returns:
        The :class:`Gaps`.

    Raises:
        TypeError: for a guide without ``local``.
        NotImplementedError: for sites without ``rsample``, whose samples give no gradient, and for a family that
            ``torch.vmap`` does not support.
        ValueError: for invalid settings, joint weights, and the errors of
            :func:`~jensen.inference.evaluate`.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [3]), MeanField, context=3)
        >>> split = gaps(model, guide, torch.randn(20, 5), particles=100, seed=0, progress=False)
        >>> bool(split.amortization.mean() > 0.1), split.summary()["converged"] > 0.5
        (True, True)
    """
    if min(rounds, steps, draws, batch_size) < 1 or not tolerance > 0 or not lr > 0:
        raise ValueError("rounds, steps, draws and batch_size must be at least 1, tolerance and lr positive")
    if not has_local(guide):
        raise TypeError(
            f"gaps needs the family of the guide, but {type(guide).__name__} has no method local(*data); use "
            "amortize(...), or add that method: it returns a guide with separate parameters for each of these data "
            "points"
        )
    seed, device = processes.shared_seed(seed), processes.place(device)
    tensors = as_tensors(data)
    with private_randomness(seed, "gaps", "data"):
        tensors = placed(tensors, device, batch_transform)
    how: dict[str, Any] = {"device": device, "compile": compile, "max_plate_nesting": max_plate_nesting}
    evidence = evaluate(model, guide, tensors, particles, seed=seed, progress=progress, refine=refine, **how)
    if evidence.joint:
        raise ValueError(
            "the weights of this model and guide are joint, so parameters cannot be optimised for each data point: the "
            "total gap is evaluate(model, guide, data).gap"
        )
    start = time.perf_counter()
    results: list[tuple[Evidence, Tensor, Tensor, int]] = []
    spent = 0.0
    where = place_of(tensors, device, model, guide)
    with originals_kept(model, guide), running(model, guide, "gaps", seed=seed, device=device), product_route(where):
        search: LocalSearch | None = None
        land: Landscape | None = None
        at_once = in_cache(tensors)
        settings: Any = {"progress": progress, "seed": seed, "shared": True}
        for part in stream(model, guide, tensors, "gaps", at_once=batch_size, **settings):
            batch, parts = part.data, -(-len(tensors[0]) // part.size)
            local = copy.deepcopy(guide) if is_autoguide(guide) else guide.local(*batch)  # type: ignore[attr-defined]
            land = Landscape(model, part.layout.nesting, compile, parts) if land is None else land
            if search is None or not search.take(local, batch):
                own, ahead = tuple(x.clone() for x in batch), _LIKELY * steps * parts
                chunk = replace(part, at_once=at_once).chunks(particles)[0] if particles >= 128 else None
                search = LocalSearch(model, local, own, draws, compile, ahead, max_plate_nesting, land, chunk)
            change, error, done = search.run(rounds, steps, lr, tolerance)
            spent, start = spent + time.perf_counter() - start, time.perf_counter()
            theirs = _rows(evidence.by_guide or evidence, part.rows)
            if search.free:  # else the same guide
                theirs = _measured(search, replace(part, at_once=at_once), particles, parts, theirs)
            gain, converged = change.clamp_min(0.0).double().cpu(), (change.abs() <= tolerance + 2 * error).cpu()
            results.append((theirs, gain, converged, done))
            start = time.perf_counter()
    measured, gains, reached, rounds_done = zip(*processes.in_order(results, part.of), strict=True)
    local_best = _joined(measured)
    warn_of_impossible_elbo(local_best)
    return Gaps(evidence, local_best, torch.cat(gains), torch.cat(reached), max(rounds_done), spent)


def _measured(search: LocalSearch, part: Part, particles: int, parts: int, of_guide: Evidence) -> Evidence:
    """The measurement of a local guide, in graphs shared by all batches; ``of_guide`` has the common fields."""

    def draw(_: Tensor | None, k: int) -> tuple[Tensor, ...]:
        drawn = search.weights.parts(search.batch, k, max(1, parts * (particles // k)))
        return (drawn.log_weights, drawn.elbo) if search.pair.elbo_differs else (drawn.log_weights,)

    reduced: dict[str, Any] = {name: values.cpu() for name, values in equally(draw, part, particles).items()}
    corrections = corrections_of(reduced)
    route = f"{search.pair.way}, {search.weights.route}"
    return replace(of_guide, **reduced, **corrections, route=route)


def has_local(guide: Program) -> bool:
    """Whether the gap of a guide can be split."""
    return is_autoguide(guide) or callable(getattr(guide, "local", None))


def _rows(evidence: Evidence, rows: slice) -> Evidence:
    """The measurement of some of the data points."""
    return Evidence(**{field.name: _cut(getattr(evidence, field.name), rows) for field in fields(Evidence)})


def _cut(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {name: _cut(part, rows) for name, part in value.items()}
    return value[rows] if isinstance(value, Tensor) else value


def _joined(parts: Sequence[Evidence]) -> Evidence:
    """The measurement of all data, from those of its batches."""
    return Evidence(
        **{field.name: _concatenated([getattr(part, field.name) for part in parts]) for field in fields(Evidence)}
    )


def _concatenated(pieces: list[Any]) -> Any:
    """Concatenated tensors, also inside a dict; for anything else, the first."""
    if isinstance(pieces[0], dict):
        return {name: _concatenated([piece[name] for piece in pieces]) for name in pieces[0]}
    return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]
