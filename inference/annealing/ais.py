r"""Annealed importance sampling: log p(x) by many small steps from a guide, or the prior, to the posterior.

Importance sampling draws z from the guide and weights it once; annealing moves it through intermediate densities,

.. math:: \log f_b(z) = (1 - b) \log q_0(z \mid x) + b \log p(x, z), \qquad 0 = b_0 < \dots < b_T = 1

so the chains can reach regions that the guide misses. The weights average to p(x), as importance weights do.

For C chains u_t in unconstrained coordinates the weights are

.. math::
    \log w = \sum_{t=0}^{T-1} (b_{t+1} - b_t) \, \big( \log p(x, u_t) - \log q_0(u_t) \big), \qquad
    u_t \sim K_{b_t}(\cdot \mid u_{t-1})

with K_b a transition that leaves f_b invariant. A reversed run uses the same sum and the same transitions from
the end to the start; Hamiltonian transitions are their own reversals.

| symbol | meaning | shape |
| --- | --- | --- |
| C, N, F | chains, data, unconstrained features | |
| T, b | steps, temperatures 0 = b_0 < ... < b_T = 1 | [T + 1] |
| e, S | step sizes and scales of the T - 1 transitions | [T - 1, N], [T - 1, N, F, F] |
"""

from __future__ import annotations

__all__ = [
    "AIS",
    "Path",
    "Start",
    "Tuning",
    "ais",
    "anneal",
    "check_settings",
    "prior_of",
    "temperatures_of",
    "tune",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine, validation_enabled
from torch import Tensor

from jensen import processes
from jensen.checked import checked
from jensen.kernel.batches import Data, Device, Transform, as_tensors, placed, stream
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.lifts import Lifted, Way, slowest
from jensen.kernel.modes import running
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Program, densities
from jensen.results.records import Measurement, Quantity
from jensen.results.standard_errors import mc_error
from jensen.results.tables import Table, decimals, percent

from ..exact.log_evidence import exact_evidence
from ..measure.diagnostics import RunningWeights, tail_guard
from ..measure.hmc import Point, move

Start = Literal["guide", "prior"]
_ACCEPTANCE = 0.65
_EVEN = 0.3  # of the chains: the minimal effective sample size for reliable errors
_SHARPNESS = 4.0  # of the sigmoid schedule
_MOST_CORRELATED = 32  # features whose correlations the pilot run estimates
_PILOT_MOVES = 60  # the minimal number of transitions of a pilot run: with a short schedule each is repeated


class Tuning(NamedTuple):
    """Step sizes and scales set by a pilot run and used by later runs.

    Attributes:
        steps: step sizes, [T - 1, N].
        scales: square roots of the covariance of the coordinates, [T - 1, N, F, F]; with more than 32 features their
            standard deviations only, [T - 1, N, F].
    """

    steps: Tensor
    scales: Tensor


def temperatures_of(temperatures: int | Sequence[float] | Tensor, schedule: str) -> list[float]:
    r"""The temperatures 0 = b_0 < ... < b_T = 1, given or by a schedule.

    .. math::
        b_t = \frac{\sigma(\delta (2 t / T - 1)) - \sigma(-\delta)}{\sigma(\delta) - \sigma(-\delta)}, \quad \delta = 4
        \qquad \text{or} \qquad b_t = t / T
    """
    if not isinstance(temperatures, int):
        if isinstance(temperatures, Tensor) and temperatures.dim() != 1:
            raise ValueError(f"temperatures are a number of steps, or [T + 1], but got {list(temperatures.shape)}")
        given = [float(b) for b in temperatures]
        if len(given) < 2 or given[0] != 0 or given[-1] != 1 or any(b <= a for a, b in pairwise(given)):
            raise ValueError(f"temperatures increase from exactly 0 to exactly 1, but got {given[:3]} ... {given[-3:]}")
        return given
    if temperatures < 1:
        raise ValueError(f"temperatures is the number of steps from the start to the posterior, but got {temperatures}")
    even = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if schedule == "linear":
        return even.tolist()
    if schedule != "sigmoid":
        raise ValueError(f"schedule is 'sigmoid' or 'linear', but got {schedule!r}")
    curve = (_SHARPNESS * (2 * even - 1)).sigmoid()
    return [0.0, *((curve - curve[0]) / (curve[-1] - curve[0]))[1:-1].tolist(), 1.0]


class Path:
    """The path of densities of one batch of data: its densities and its start.

    Args:
        model: the model.
        guide: the guide at the start of the path; None starts from the model's prior.
        data: the batch.
        nesting: how deep the plates of model and guide are nested.

    Raises:
        ValueError: the errors of :class:`~jensen.kernel.coordinates.Coordinates`, and for a guide that samples other
            sites than the model's.
        NotImplementedError: if the guide cannot compute log q of a given value.
    """

    def __init__(self, model: Program, guide: Program | None, data: tuple[Tensor, ...], nesting: int) -> None:
        self.coordinates = Coordinates(model, *data)
        self.model, self.guide, self.data = model, guide, data
        self._lifted_model = Lifted(model, nesting)
        self._log_p = densities(model, *data, lifted=self._lifted_model)
        self._lifted = self._lifted_model if guide is None else Lifted(guide, nesting, "guide")
        if guide is not None:
            with forked_rng():
                drawn = self._start(1)
            self._check_guide(drawn)

    def _check_guide(self, drawn: Mapping[str, Tensor]) -> None:
        assert self.guide is not None
        if extra := sorted(set(drawn) - set(self.coordinates.pieces)):
            raise ValueError(
                f"the guide samples {extra} beside the model's sites {sorted(self.coordinates.pieces)}: with an "
                "auxiliary site (of Joint, Laplace, an AutoGuide) log q(z | x) at a given z is unknown; start from the "
                "prior (start='prior'), or use a guide that samples the model's sites directly, as amortize does"
            )
        self._log_q = densities(self.guide, *self.data, lifted=self._lifted)
        try:
            with forked_rng():
                self._log_q({name: value.clone() for name, value in self._shaped(drawn, 1).items()})
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                "annealing needs log q(z | x) at changing values, but the guide can compute it for its own samples "
                f"only ({error}); start from the prior (start='prior'), or use a family with an inverse"
            ) from error

    def _shaped(self, drawn: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
        return {name: drawn[name].reshape(chains, *piece.shape) for name, piece in self.coordinates.pieces.items()}

    def draw(self, chains: int) -> Point:
        """C samples of the start for each data point."""
        return self(self.coordinates.free(self._start(chains)))

    @property
    def way(self) -> Way:
        """The method for parallel chains: the slower one of model and start."""
        return slowest((self._lifted_model.way, self._lifted.way))

    def _start(self, chains: int) -> dict[str, Tensor]:
        """C samples of each site of the start."""
        with torch.no_grad():
            return {name: site.value for name, site in self._lifted(self.data, chains).sites.items()}

    def at(self, values: Mapping[str, Tensor], chains: int) -> Point:
        """C chains that start at the same given values [N, *event]."""
        u = self.coordinates.free({name: value.unsqueeze(0) for name, value in values.items()})
        return self(u.expand(chains, -1, -1))

    def log_joint(self, u: Tensor) -> Tensor:
        """Log p(x, u), the log-determinant of the map included: [C, N], without gradient."""
        with validation_enabled(False):
            values, log_det = self.coordinates.values(u)
            return torch.as_tensor(sum(self._log_p(values).values())) + log_det

    def __call__(self, u: Tensor) -> Point:
        """Evaluate the path's densities and gradients at coordinates [C, N, F]."""
        with torch.enable_grad(), validation_enabled(False):
            u = u.detach().requires_grad_()
            values, log_det = self.coordinates.values(u)
            log_p = self._log_p(values)
            if self.guide is None:
                base = sum(log_p[site] for site in values) + log_det
                ratio: Any = sum(value for site, value in log_p.items() if site not in values)
            else:
                log_q = sum(self._log_q(values).values())
                base, ratio = log_q + log_det, sum(log_p.values()) - log_q
            slopes = [_slope(part, u) for part in (base, ratio)]
        return Point(u.detach(), base.detach(), ratio.detach(), *slopes)


def _slope(part: Tensor, u: Tensor) -> Tensor:
    if not part.requires_grad:
        return torch.zeros_like(u)
    (slope,) = torch.autograd.grad(part.sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if slope is None else slope


def tune(path: Path, betas: Sequence[float], leapfrog: int, chains: int) -> tuple[Tuning, int]:
    """A pilot run that sets step sizes for an acceptance of 0.65, and scales by the covariance of its chains.

    Correlations are shrunk: more strongly with fewer chains relative to the number of features.

    Returns:
        The :class:`Tuning`, and the number of points that each chain evaluated.
    """
    point = path.draw(chains)
    n, features = point.u.shape[1:]
    log_step = point.u.new_full((n,), math.log(1 / max(1, features) ** 0.25))
    covariance = _spread(point.u)
    trust, most = ((chains - 1) * moves / ((chains - 1) * moves + features) for moves in (1, 10))  # ten are averaged
    steps, scales, evaluated = [], [], 1
    repeats = math.ceil(_PILOT_MOVES / max(1, len(betas) - 2))
    for b in betas[1:-1]:
        scale = _root(covariance, trust)
        for _ in range(repeats):
            point, chance, _ = move(path, point, b, log_step.exp(), scale, leapfrog)
            log_step = log_step + 0.5 * (chance.mean(0) - _ACCEPTANCE)
            covariance = 0.9 * covariance + 0.1 * _spread(point.u)
            trust = 0.9 * trust + 0.1 * most
            evaluated += leapfrog
        steps.append(log_step.exp())
        scales.append(scale)
    if not steps:
        return Tuning(log_step.new_empty(0, n), point.u.new_empty(0, n, features)), evaluated
    return Tuning(torch.stack(steps), torch.stack(scales)), evaluated


def _spread(u: Tensor) -> Tensor:
    """Covariance over the chains, [N, F, F]; with many features only the variances, [N, F]."""
    away = u - u.mean(0)
    if u.shape[-1] > _MOST_CORRELATED:
        return away.square().sum(0) / (len(u) - 1)
    return torch.einsum("cni,cnj->nij", away, away) / (len(u) - 1)


def _root(covariance: Tensor, trust: float) -> Tensor:
    """A square root of covariances whose correlations are shrunk, [N, F, F]; of variances [N, F]."""
    if covariance.dim() == 2:
        return covariance.clamp_min(1e-10).sqrt()
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-10).diag_embed()
    root: Tensor = torch.linalg.cholesky(trust * covariance + (1 - trust) * variance)
    return root


def anneal(
    path: Path, point: Point, betas: Sequence[float], tuning: Tuning, leapfrog: int, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Run chains along the path, or back.

    Args:
        path: the path.
        point: the start of the chains: samples of q_0, or of the posterior for a reversed run.
        betas: the temperatures.
        tuning: frozen step sizes and scales; the reversed run uses them from last to first.
        leapfrog: leapfrog steps of a transition.
        backwards: from the posterior to q_0.

    Returns:
        Log weights, float64 [C, N], and the share of accepted moves, [N].
    """
    total = torch.zeros_like(point.ratio, dtype=torch.float64)
    accepted = torch.zeros_like(point.ratio[0])
    last = len(betas) - 2
    for t in range(last, -1, -1) if backwards else range(last + 1):
        total = total + (betas[t + 1] - betas[t]) * point.ratio.double()
        if t == (0 if backwards else last):
            break
        i = t - 1 if backwards else t  # the transition at b_{i + 1}
        point, _, moved = move(path, point, betas[i + 1], tuning.steps[i], tuning.scales[i], leapfrog)
        accepted = accepted + moved.to(accepted).mean(0) / last
    return total, accepted if last else torch.full_like(accepted, math.nan)


@dataclass(frozen=True, eq=False, repr=False)
class AIS(Measurement):
    """The result of :func:`ais`. Tensors are per data point, in nats.

    Attributes:
        log_weights: float64 [C, N]; their exponentials average to p(x).
        acceptance: the share of accepted Hamiltonian moves, [N].
        evaluations: how often log p(x, z) was evaluated for each data point, over all chains, including the pilot; a
            value counts one and a gradient one more.
        exact: log p(x) if the model has it, else None: float64 [N].
        betas: the temperatures, 0 to 1.
        step_sizes: the frozen step sizes of the T - 1 transitions, in units of the posterior's spread: [T - 1, N].
        leapfrog: leapfrog steps of a transition.
        start: the start of the chains.
        route: the method for parallel chains, such as ``"outer plate"``.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(3, 5).double()
        >>> annealed = ais(model, ExactPosterior(model), x, chains=4, temperatures=3, start="guide", progress=False)
        >>> torch.allclose(annealed.log_weights, annealed.exact.expand(4, 3))
        True
    """

    log_weights: Tensor
    acceptance: Tensor
    evaluations: int
    exact: Tensor | None
    betas: list[float]
    step_sizes: Tensor
    leapfrog: int
    start: Start
    route: str = ""

    @property
    def chains(self) -> int:
        """C."""
        return len(self.log_weights)

    @property
    def _moments(self) -> RunningWeights:
        moments = RunningWeights(self.chains)
        moments.update(self.log_weights)
        return moments

    @property
    def log_evidence(self) -> Tensor:
        """Log of the mean weight: float64 [N]. Below log p(x) in expectation: see :attr:`reliable`."""
        return self._moments.log_evidence

    @property
    def standard_error(self) -> Tensor:
        """Monte Carlo standard error of ``log_evidence``: the jackknife's, times 1 to 6 for k-hat of 0.5 to 1.5: [N].

        The delta method's error never exceeds 1, even if one chain of many has all the weight. With fewer
        than 25 chains k-hat is unknown, and the jackknife's error is used.
        """
        moments = self._moments
        return moments.jackknife[1] * tail_guard(moments.pareto_k).nan_to_num(1.0)

    @property
    def reliable(self) -> bool:
        """Whether estimates and errors are reliable: the effective sample size, over all data, is at least 0.3 C.

        It is computed from C - 1 chains beside one, so that one chain with all the weight counts as none. If it is
        smaller, there are too few temperatures: estimates are below log p(x) by more than their errors. The verdict is
        about the whole run: a data point with a large effective sample size in a bad run may have missed large weights.
        """
        return bool((self.ess.mean() - 1) / (self.chains - 1) >= _EVEN)

    @property
    def error(self) -> float:
        r"""The error of the mean of ``log_evidence`` over the data: noise, and the bias that averaging does not reduce.

        .. math:: \sqrt{\frac{1}{N^2} \sum_n e_n^2 + \Big( \frac{1}{2 N} \sum_n e_n^2 \Big)^2}
        """
        return math.hypot(mc_error(self.standard_error), float(self.standard_error.square().mean()) / 2)

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the C weights, 1 to C: float64 [N]."""
        return self._moments.ess

    def _quantities(self) -> list[Quantity]:
        noise = self.error
        return [
            Quantity("chains", self.chains),
            Quantity("temperatures", len(self.betas) - 1),
            Quantity("log_evidence", self.log_evidence, "log p(x), annealed", noise),
            Quantity("standard_error", self.standard_error, in_summary=False),
            Quantity("ess", self.ess),
            Quantity("reliable", self.reliable),
            Quantity("acceptance", self.acceptance),
            Quantity("exact", self.exact, "log p(x), exact", data_error=False, digits=noise),
            Quantity("evaluations", self.evaluations),
        ]

    def _table(self) -> Table:
        n, temperatures = self.log_weights.shape[1], len(self.betas) - 1
        facts = [
            ("effective sample size, mean", f"{decimals(float(self.ess.mean()), 1)} of {self.chains}"),
            ("moves accepted", percent(float(self.acceptance.mean()))),
            ("evaluations per data point", f"{self.evaluations:.4g} of log p(x, z), a gradient counting one more"),
        ]
        head = (
            f"{n} data points, {self.chains} chains each, {temperatures} temperatures from the {self.start}, nats per "
            "data point"
        )
        if not self.reliable:
            facts.append(("reliable", "no: too few temperatures, so log p(x) is too low; use more"))
        return self._summary_table(head, facts)


@checked
@processes.together("ais")
def ais(
    model: Program,
    guide: Program | None,
    data: Data,
    *,
    chains: int = 50,
    temperatures: int | Sequence[float] | Tensor = 100,
    schedule: str = "sigmoid",
    leapfrog: int = 2,
    pilot: int = 16,
    start: Start = "prior",
    seed: int | None = None,
    batch_transform: Transform | None = None,
    chunk_size: int = 2**14,
    device: Device = None,
    progress: bool = True,
) -> AIS:
    r"""Annealed importance sampling of log p(x), per data point.

    .. math::
        \log w = \sum_{t=0}^{T-1} (b_{t+1} - b_t) \, \log \frac{p(x, z_t)}{q_0(z_t \mid x)}, \qquad
        \mathbb{E}\, w = p(x), \qquad \widehat{\log p}(x) = \log \frac{1}{C} \sum_c w_c

    z_0 is sampled from q_0; z_t follows from z_{t-1} by L leapfrog steps of Hamiltonian Monte Carlo at temperature b_t,
    in unconstrained coordinates, accepted or not for each chain and data point. A pilot run of other chains sets step
    sizes and scales for each data point and temperature, for an acceptance of 65 %; then they are frozen, and the
    final run uses new samples: the estimate of p(x) is unbiased, and that of its logarithm is a lower bound in
    expectation. More temperatures lower the variance of log w, about as 1 / T once the chains equilibrate. With too
    few, the weights of a few chains dominate: the result is then not :attr:`~jensen.inference.AIS.reliable`.

    ESS and error do not show regions that no chain reached. Chains from the prior explore widely, but need more
    temperatures. From a guide the path is short, but if the guide is narrower than the posterior, or misses a
    mode, so do its chains: a few rare weights are then very large, and if none of them was sampled, estimate and
    error are both too small. :func:`~jensen.inference.sandwich` detects this, on data whose latents are known.

    References:
        Neal (2001), Annealed Importance Sampling. https://arxiv.org/abs/physics/9803008
        Wu, Burda, Salakhutdinov and Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.
        https://arxiv.org/abs/1611.04273

    Args:
        model: any Pyro model whose latent sites are continuous, called as ``model(*data)``.
        guide: its guide, called with the same data; used with ``start="guide"``, else it may be None.
        data: a tensor [N, ...], or a tuple of such tensors.
        chains: the number C of chains per data point, at least 2.
        temperatures: the number T of steps, or the temperatures themselves, increasing from 0 to 1.
        schedule: the spacing of T temperatures: ``"sigmoid"`` (finer at both ends) or ``"linear"``.
        leapfrog: the number L of leapfrog steps of a transition. At equal cost, many temperatures with one to
            three steps each are better than few with many.
        pilot: the number of chains of the pilot run, at least 2.
        start: q_0: ``"prior"`` or ``"guide"``.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        chunk_size: how many (data point, chain) combinations are run at once.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`AIS`.

    Raises:
        ValueError: for invalid settings, discrete latent sites, joint weights, a guide with auxiliary sites,
            and the errors of :func:`~jensen.inference.log_weights`.
        NotImplementedError: if the guide cannot compute log q of a given value.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> result = ais(model, None, torch.randn(20, 5), temperatures=20, progress=False)
        >>> result.log_weights.shape, bool((result.log_evidence - result.exact).abs().max() < 0.5)
        (torch.Size([50, 20]), True)
    """
    betas = temperatures_of(temperatures, schedule)
    check_settings(guide, chains, leapfrog, pilot, start)
    seed, device = processes.shared_seed(seed), processes.place(device)
    origin = guide if start == "guide" else None
    tensors = as_tensors(data)
    results: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    evaluated = 0
    proposal = prior_of(model) if origin is None else origin
    with running(model, proposal, "ais", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        how: dict[str, Any] = {"at_once": chunk_size, "together": chains, "progress": progress, "seed": seed}
        for part in stream(model, proposal, tensors, "ais", shared=True, **how):
            path = Path(part.pair.model, None if origin is None else part.pair.guide, part.data, part.layout.nesting)
            tuning, evaluated = tune(path, betas, leapfrog, pilot)
            weights, accepted = anneal(path, path.draw(chains), betas, tuning, leapfrog)
            known = exact_evidence(model, part.data)
            known = None if known is None else known.cpu()
            results.append((weights.cpu(), accepted.double().cpu(), tuning.steps.cpu(), known))
    log_w, acceptance, steps, known_of = zip(*processes.in_order(results, part.of), strict=True)
    exact = [known for known in known_of if known is not None]
    return AIS(
        log_weights=torch.cat(log_w, 1),
        acceptance=torch.cat(acceptance),
        evaluations=2 * (pilot * evaluated + chains * (1 + leapfrog * (len(betas) - 2)))
        + (pilot + chains) * (origin is None),  # sampling from the prior runs the model
        exact=torch.cat(exact) if exact else None,
        betas=betas,
        step_sizes=torch.cat(steps, 1),
        leapfrog=leapfrog,
        start=start,
        route=path.way,
    )


def prior_of(model: Program) -> Program:
    """The model without its observed sites."""
    hidden: Program = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    return hidden


def check_settings(guide: Program | None, chains: int, leapfrog: int, pilot: int, start: str) -> None:
    """Raise ValueError for invalid settings of an annealed run."""
    if start not in ("guide", "prior"):
        raise ValueError(f"start is 'guide' or 'prior', but got {start!r}")
    if guide is None and start == "guide":
        raise ValueError("start='guide' needs a guide, but got None: give one, or start from the prior (start='prior')")
    for name, value, least in (("chains", chains, 2), ("leapfrog", leapfrog, 1), ("pilot", pilot, 2)):
        if value < least:
            raise ValueError(f"{name} is at least {least}, but got {value}")
