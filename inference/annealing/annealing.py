r"""Annealed runs from a start q_0 to the posterior, and back: what AIS and its reversal share.

.. math::
    \log w = \sum_{t=0}^{T-1} (b_{t+1} - b_t) \, \big( \log p(x, u_t) - \log q_0(u_t) \big), \qquad
    u_t \sim K_{b_t}(\cdot \mid u_{t-1})

with K_b a transition that leaves f_b as it is. A reversed run goes through the same sum and the same transitions from
the end to the start; Hamiltonian transitions are their own reversals.

| symbol | meaning | shape |
| --- | --- | --- |
| C, N, F | chains, data, unconstrained features | |
| T, b | steps, temperatures 0 = b_0 < ... < b_T = 1 | [T + 1] |
| e, S | step sizes and scales of the T - 1 transitions | [T - 1, N], [T - 1, N, F, F] |
"""

from __future__ import annotations

__all__ = ["Path", "Start", "Tuning", "anneal", "temperatures_of", "tune"]

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from jensen.kernel.coordinates import Coordinates
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import in_plate
from jensen.kernel.weights import Program, densities, model_sites

from .hmc import Point, move

Start = Literal["guide", "prior"]
_ACCEPTANCE = 0.65
_SHARPNESS = 4.0  # of the sigmoid schedule
_MOST_CORRELATED = 32  # features, of which the pilot run learns the correlations
_PILOT_MOVES = 60  # the least number of transitions of a pilot run: a short schedule repeats each of its own


class Tuning(NamedTuple):
    """What a pilot run found and later runs keep.

    Attributes:
        steps: step sizes, [T - 1, N].
        scales: square roots of the covariance of the coordinates, [T - 1, N, F, F]; with more than 32 features their
            standard deviations alone, [T - 1, N, F].
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
        given = [float(b) for b in temperatures]
        if len(given) < 2 or given[0] != 0 or given[-1] != 1 or any(b <= a for a, b in pairwise(given)):
            raise ValueError(f"temperatures rise from exactly 0 to exactly 1, but got {given[:3]} ... {given[-3:]}")
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
    """The path of densities of one batch of data: what is evaluated, and where it starts.

    Args:
        model: the model.
        guide: the guide that the path starts from; None starts it from the model's prior.
        data: the batch.
        nesting: how deep the pair's plates are nested.

    Raises:
        ValueError: on what :class:`~jensen.kernel.coordinates.Coordinates` names, and for a guide that draws other
            sites than the model's.
        NotImplementedError: if the guide does not know log q of a given value.
    """

    def __init__(self, model: Program, guide: Program | None, data: tuple[Tensor, ...], nesting: int) -> None:
        self.coordinates = Coordinates(model, *data)
        self.model, self.guide, self.data, self.nesting = model, guide, data, nesting
        self._log_p = densities(model, *data)
        if guide is not None:
            with forked_rng():
                drawn = {site["name"]: site["value"] for site in model_sites(in_plate(guide, 1, nesting), *data)}
            self._check_guide(drawn)

    def _check_guide(self, drawn: Mapping[str, Tensor]) -> None:
        assert self.guide is not None
        if extra := sorted(set(drawn) - set(self.coordinates.pieces)):
            raise ValueError(
                f"the guide draws {extra} beside the model's sites {sorted(self.coordinates.pieces)}: with an "
                "auxiliary site (of Joint, Laplace, an AutoGuide) log q(z | x) at a given z is not known; start from "
                "the prior (start='prior'), or take a guide that draws the model's sites directly, as amortize does"
            )
        self._log_q = densities(self.guide, *self.data)
        try:
            with forked_rng():
                self._log_q({name: value.clone() for name, value in self._shaped(drawn, 1).items()})
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                "annealing starts from log q(z | x) at values that move, but the guide knows it for its own draws only "
                f"({error}); start from the prior (start='prior'), or take a family with an inverse"
            ) from error

    def _shaped(self, drawn: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
        return {name: drawn[name].reshape(chains, *piece.shape) for name, piece in self.coordinates.pieces.items()}

    def draw(self, chains: int) -> Point:
        """C draws of the start for each datum."""
        start = self.model if self.guide is None else self.guide
        drawn = {s["name"]: s["value"] for s in model_sites(in_plate(start, chains, self.nesting), *self.data)}
        return self(self.coordinates.free(self._shaped(drawn, chains)))

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
        """Evaluate the path's densities and slopes at coordinates [C, N, F]."""
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

    Correlations are shrunk: the fewer chains there are for the number of features, the more.

    Returns:
        The :class:`Tuning`, and how many points each chain evaluated.
    """
    point = path.draw(chains)
    n, features = point.u.shape[1:]
    log_step = point.u.new_full((n,), math.log(1 / max(1, features) ** 0.25))
    covariance = _spread(point.u)
    trust, most = ((chains - 1) * moves / ((chains - 1) * moves + features) for moves in (1, 10))  # ten are remembered
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
    """Covariance over the chains, [N, F, F]; of many features the variances alone, [N, F]."""
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
        point: where the chains start: draws of q_0, or of the posterior for a run backwards.
        betas: the temperatures.
        tuning: frozen step sizes and scales; the run backwards uses them from last to first.
        leapfrog: leapfrog steps of a transition.
        backwards: from the posterior to q_0.

    Returns:
        Log weights, float64 [C, N], and the share of moves that were accepted, [N].
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
