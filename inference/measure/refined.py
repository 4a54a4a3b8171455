r"""A proposal of its own for each datum: modes of the posterior, their curvature, a short local search, a mixture.

.. math::
    q_n(u) = \sum_m \pi_{nm} \big( a \, N(u; \mu_{nm}, w^2 \Sigma_{nm}) + b \, t_5(u; \mu_{nm}, \Sigma_{nm}) \big)
        + c \, q(u \mid x_n) + d \, p(u)

in the unconstrained coordinates u of all latent values, [F] for a datum. Draws are stratified: every part of the
mixture gives a number of them that is fixed beforehand, and each is weighted by the density of the whole mixture (the
balance heuristic), so that no part can make a weight larger than one over its share times its own.

1. Uphill from draws of the guide, and of the prior where it is far from these, all at once, by Adam and by Newton's
   steps.
2. At each end the negative Hessian; ends that lie within two standard deviations of another are one mode.
3. A Gaussian with full covariance for each mode, in the coordinates that whiten the Laplace approximation, by
   gradients that stick the landing; the mean of the second half of the steps is kept.
4. Fresh draws make the estimate; none that chose the proposal.

References:
    Veach and Guibas (1995), Optimally Combining Sampling Techniques for Monte Carlo Rendering.
    Hesterberg (1995), Weighted Average Importance Sampling and Defensive Mixture Distributions.
    Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194
"""

from __future__ import annotations

__all__ = ["Refined", "refine"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from jensen.kernel.batches import stream
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.lifts import Lifted
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Program, densities

from .diagnostics import RunningWeights

_BLOCK = 2**7  # data that are refined at once
_MOST = 256  # coordinates
_DRAWS = 64  # fresh draws at least
_FEWEST, _STEPS = 2, 8  # starts of guide and prior each, and steps uphill, at least
_CANDIDATES = 32  # draws of the prior, of which starts are chosen
_NEWTON = 4  # Newton's steps; two where they are dear
_MODES = 4
_LEAST = 7.0  # nats that a mode may hold less than the best
_APART = 2.0  # standard deviations between modes
_FREEDOM = 5.0  # of Student's t
_FEW = 10  # coordinates up to which draws of the prior are part of the mixture


class Refined(NamedTuple):
    """What fresh draws from the proposals say, [N] each.

    Attributes:
        log_evidence: log p(x).
        standard_error: its Monte Carlo error, within strata.
        ess: effective sample size of the draws.
        pareto_k: k-hat of their weights.
        modes: how many modes a proposal has.
        evaluations: of log p(x, z) for each datum, over all; a gradient counts three.
        draws: how many fresh draws there were.
    """

    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    modes: Tensor
    evaluations: Tensor
    draws: Tensor


def refine(
    model: Program,
    guide: Program,
    data: tuple[Tensor, ...],
    budget: int,
    *,
    seed: int | None = None,
    max_plate_nesting: int | None = None,
    progress: bool = True,
) -> Refined | str:
    """Log p(x) by a proposal of its own for each datum; or why there is none.

    Args:
        model: the model.
        guide: its guide.
        data: the data.
        budget: the most evaluations of log p(x, z) for a datum, of which a third at least are fresh draws.
        seed: as for :func:`~jensen.inference.evaluate`.
        max_plate_nesting: as for :func:`~jensen.inference.evaluate`.
        progress: whether to show a progress bar.
    """
    parts: list[Refined] = []
    how: Any = {"weights": "any", "max_plate_nesting": max_plate_nesting, "progress": progress, "seed": seed}
    for part in stream(model, guide, data, "refine", at_once=_BLOCK, **how):
        if part.joint or not data:
            return f"{'joint weights' if part.joint else 'pairs that hold their data'} are not refined"
        try:
            target = Target(model, guide, part.data, part.layout.nesting)
        except ValueError as error:
            return str(error)
        features, least = target.coordinates.features, _least(target.coordinates.features)
        if features > _MOST or least > budget:
            return (
                f"{features} coordinates of a datum take a budget of {least} evaluations, but particles={budget}"
                if features <= _MOST
                else f"a datum has {features} coordinates, and the curvature of more than {_MOST} is not worked out"
            )
        proposal = propose(target, 2 * budget // 3)
        found, counts = proposal.log_joint_weights(target, max(_DRAWS, budget - target.evaluations))
        log_evidence, noise = estimate(found, counts)
        weights = RunningWeights(len(found))
        weights.update(found)
        reduced = weights.results()
        full = torch.full_like(reduced["zero_weights"], 0)
        modes = proposal.log_weights.isfinite().sum(0)
        parts.append(
            Refined(
                *(log_evidence, noise, reduced["ess"], reduced["pareto_k"], modes),
                *(full + target.evaluations, full + len(found)),
            )
        )
    return Refined(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def _least(features: int) -> int:
    """The evaluations that a proposal takes at least: the way uphill, Newton's steps, some draws."""
    return 3 * 2 * _FEWEST * _STEPS + 3 * (1 + _newton_steps(features)) * features + 8 + _DRAWS


def _newton_steps(features: int) -> int:
    return _NEWTON if features <= _FEW else 2


class Target:
    """Log p(x, u) of a block of data at coordinates [C, N, F], and draws of what proposals start from.

    Args:
        model: the model.
        guide: its guide.
        data: the block.
        nesting: how deep the pair's plates are nested.
    """

    def __init__(self, model: Program, guide: Program, data: tuple[Tensor, ...], nesting: int) -> None:
        self.programs, self.nesting = (model, guide), nesting
        self.data, self.coordinates = data, Coordinates(model, *data)
        self.model, self.guide = Lifted(model, nesting), Lifted(guide, nesting, "guide")
        self._log_p = densities(model, *data, lifted=self.model)
        self._log_q: Callable[..., dict[str, Tensor]] | None = None
        with forked_rng():
            drawn = self._drawn(self.guide, 2)
        if set(drawn) == set(self.coordinates.pieces):
            self._log_q = densities(guide, *data, lifted=self.guide)
            try:
                with forked_rng():
                    self._log_q({name: value.clone() for name, value in drawn.items()})
            except (KeyError, NotImplementedError):
                self._log_q = None
        self.evaluations = 0  # for each datum

    def __call__(self, u: Tensor) -> Tensor:
        """Log p(x, u), the log-determinant of the map included: [C, N]; its gradient counts as two more evaluations."""
        self.evaluations += len(u) * (3 if torch.is_grad_enabled() else 1)
        return self._densities(u)[0]

    def of_rows(self, rows: Tensor) -> Target:
        """The same of some of the data, each as often as it is named."""
        return Target(*self.programs, tuple(x[rows.to(x.device)] for x in self.data), self.nesting)

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log p(x, u), log p(u), and log q(u | x) where the guide knows it: [C, N] each."""
        self.evaluations += len(u)
        joint, prior, values, log_det = self._densities(u)
        if self._log_q is None:
            return joint, prior, None
        return joint, prior, torch.as_tensor(sum(self._log_q(values).values())) + log_det

    def _densities(self, u: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        with validation_enabled(False):
            values, log_det = self.coordinates.values(u)
            log_p = self._log_p(values)
        prior = torch.as_tensor(sum(log_p[name] for name in values)) + log_det
        return torch.as_tensor(sum(log_p.values())) + log_det, prior, values, log_det

    def of_guide(self, count: int) -> Tensor:
        """Draws of the guide, [C, N, F]."""
        return self.coordinates.free(self._drawn(self.guide, count))

    def of_prior(self, count: int) -> Tensor:
        """Draws of the prior, [C, N, F]."""
        return self.coordinates.free(self._drawn(self.model, count))

    @property
    def knows_guide(self) -> bool:
        """Whether the guide says log q of any value."""
        return self._log_q is not None

    @torch.no_grad()
    def _drawn(self, lifted: Lifted, count: int) -> dict[str, Tensor]:
        sites = lifted(self.data, count).sites
        return {name: site.value for name, site in sites.items() if not site.facts.observed}


class Mode(NamedTuple):
    """Gaussians at modes: locations [M, N, F], Cholesky factors [M, N, F, F], and the log of what they hold, [M, N]."""

    loc: Tensor
    lower: Tensor
    log_mass: Tensor


@dataclass(frozen=True)
class Proposal:
    """A mixture for each datum.

    Attributes:
        modes: its Gaussians.
        log_weights: log of the share of each mode, [M, N]; minus infinity for one that is none.
        shares: of Gaussians, Student's t, the guide and the prior.
        widened: how much wider the Gaussians are.
    """

    modes: Mode
    log_weights: Tensor
    shares: tuple[float, float, float, float]
    widened: float

    @torch.no_grad()
    def log_joint_weights(self, target: Target, count: int) -> tuple[Tensor, list[int]]:
        """Log weights [K, N] of stratified draws, and how many of them each stratum gave: one after the other."""
        counts = [max(2, round(share * count)) if share else 0 for share in self.shares]
        draws = []
        for kind, number in enumerate(counts[:2]):
            if number:
                draws.append(self._draw(number, student=kind == 1))
        if counts[2]:
            draws.append(target.of_guide(counts[2]))
        if counts[3]:
            draws.append(target.of_prior(counts[3]))
        parts = []
        for u in torch.cat(draws).split(128):
            joint, prior, guide = target.parts(u)
            parts.append(joint.double() - self.log_density(u, prior, guide, counts))
        return torch.cat(parts), [number for number in counts if number]

    def log_density(self, u: Tensor, prior: Tensor, guide: Tensor | None, counts: list[int]) -> Tensor:
        """Log of the mixture, by the counts that its strata have: [C, N], float64."""
        total = sum(counts)
        y = self._whitened(u)  # [M, C, N, F]
        squares = y.double().square().sum(-1)
        d = y.shape[-1]
        log_det = self.modes.lower.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).double()[:, None]  # [M, 1, N]
        w = self.widened
        normal = -0.5 * squares / w**2 - d * math.log(w) - 0.5 * d * math.log(2 * math.pi) - log_det
        v = _FREEDOM
        constant = math.lgamma((v + d) / 2) - math.lgamma(v / 2) - 0.5 * d * math.log(v * math.pi)
        student = constant - log_det - 0.5 * (v + d) * (squares / v).log1p()
        weights = self.log_weights.double()[:, None]
        terms = [
            part + math.log(count / total)
            for part, count in zip(
                ((normal + weights).logsumexp(0), (student + weights).logsumexp(0)), counts, strict=False
            )
            if count
        ]
        for part, count in ((guide, counts[2]), (prior, counts[3])):
            if count and part is not None:
                terms.append(part.double() + math.log(count / total))
        return torch.stack(terms).logsumexp(0)

    def _whitened(self, u: Tensor) -> Tensor:
        away = u[None] - self.modes.loc[:, None]  # [M, C, N, F]
        solved = torch.linalg.solve_triangular(self.modes.lower, away.permute(0, 2, 3, 1), upper=False)  # [M, N, F, C]
        whitened: Tensor = solved.permute(0, 3, 1, 2)
        return whitened

    def _draw(self, count: int, student: bool) -> Tensor:
        """Draws [C, N, F]; as many of each mode as its share says, to one (systematic)."""
        modes, n, features = self.modes.loc.shape
        edges = self.log_weights.exp().cumsum(0).clamp_max(1.0)  # [M, N]
        device = edges.device
        at = (torch.arange(count, device=device)[:, None] + torch.rand(n, device=device)) / count
        chosen = (at[None] >= edges[:, None]).sum(0).clamp_max(modes - 1)  # [C, N]
        noise = torch.randn(count, n, features, dtype=self.modes.loc.dtype, device=device)
        if student:
            scale = 2 * torch._standard_gamma(noise.new_full((count, n), _FREEDOM / 2)) / _FREEDOM
            noise = noise * scale.rsqrt().unsqueeze(-1)
        else:
            noise = noise * self.widened
        u = noise.new_empty(count, n, features)
        for m in range(modes):
            here = chosen == m
            if here.any():
                moved = self.modes.loc[m] + torch.einsum("nij,cnj->cni", self.modes.lower[m], noise)
                u = torch.where(here.unsqueeze(-1), moved, u)
        return u


def propose(target: Target, budget: int, starts: int = 4) -> Proposal:
    """Find a mixture for each datum.

    Args:
        target: the block.
        budget: about how many evaluations for each datum this may take; a gradient counts three.
        starts: draws of the guide, and as many of the prior.
    """
    starts = starts if budget >= 1500 else _FEWEST
    u = target.of_guide(starts)
    features = u.shape[-1]
    prior = target.of_prior(_CANDIDATES)
    scale = _spread(prior)
    u = _spread_out(u, prior, scale, starts)
    steps = max(_STEPS, min(40, budget // 5 // (3 * len(u))))
    u = climb(target, u, scale, steps)
    modes = merged(target, u, scale)
    pairs = float(modes.log_mass.isfinite().double().sum(0).mean())
    steps = min(200, int(max(0, budget - target.evaluations) / (3 * 4 * pairs)))
    if steps >= 20:
        modes = searched(target, modes, steps, draws=4)
    log_weights = modes.log_mass.log_softmax(0)
    floor = torch.where(modes.log_mass.isfinite(), math.log(0.02), -math.inf).to(log_weights)
    log_weights = torch.logaddexp(log_weights, floor).log_softmax(0)
    of_guide = 0.1 if target.knows_guide else 0.0
    of_prior = 0.15 if features <= _FEW else 0.0
    rest = (1 - of_guide - of_prior) / 2
    return Proposal(modes, log_weights, (rest, rest, of_guide, of_prior), min(1.1, 1 + 0.7 / math.sqrt(features)))


def _spread_out(u: Tensor, candidates: Tensor, scale: Tensor, count: int) -> Tensor:
    """Points, and so many of the candidates, one after the other that which is farthest from all before: [C, N, F]."""
    for _ in range(count):
        away = ((candidates[:, None] - u) / scale).square().sum(-1).amin(1)  # [candidates, N]
        farthest = away.argmax(0)[None, :, None].expand(1, *u.shape[1:])
        u = torch.cat([u, candidates.gather(0, farthest)])
    return u


def _spread(u: Tensor) -> Tensor:
    """A scale for each coordinate, [N, F], from draws of the prior: by the distance between their quartiles."""
    low, high = u.quantile(u.new_tensor([0.25, 0.75]), dim=0)
    scale: Tensor = (high - low) / 1.35
    return scale.clamp_min(1e-6)


def climb(target: Target, u: Tensor, scale: Tensor, steps: int, lr: float = 0.3) -> Tensor:
    """The best points on the way uphill from these, [S, N, F]."""
    v = (u / scale).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=lr, betas=(0.9, 0.95))
    best, at = u.new_full(u.shape[:2], -math.inf), v.detach().clone()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / steps)
        with torch.enable_grad():
            f = target(v * scale)
            (slope,) = torch.autograd.grad(torch.where(f.isfinite(), f, 0.0).sum(), v)
        higher = f.detach() > best
        best, at = torch.where(higher, f.detach(), best), torch.where(higher.unsqueeze(-1), v.detach(), at)
        v.grad = -slope.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    return at * scale


def curvature(target: Target, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log density [N], slope [N, F] and negative Hessian [N, F, F] at points [N, F]."""
    features = u.shape[-1]
    with torch.enable_grad():
        at = u.detach().expand(features, *u.shape).clone().requires_grad_()
        f = target(at)
        (slope,) = torch.autograd.grad(f.sum(), at, create_graph=True)
        own = slope.diagonal(dim1=0, dim2=2).sum()
        hessian = torch.autograd.grad(own, at)[0] if own.requires_grad else torch.zeros_like(at)
    target.evaluations += 3 * features
    hessian = -hessian.transpose(0, 1).nan_to_num(0.0, 0.0, 0.0)  # [N, F, F]
    return f[0].detach(), slope[0].detach().nan_to_num(0.0, 0.0, 0.0), (hessian + hessian.mT) / 2


def newton(target: Target, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's steps uphill [N, F]; the log density there, and a covariance's Cholesky factor, [N, F, F]."""
    floor = 0.25  # of the eigenvalues in units of the prior's scale: a Gaussian prior alone gives one
    steps = _newton_steps(u.shape[-1])
    f, slope, negative = curvature(target, u)
    for step in range(steps + 1):
        whitened = negative * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        values, vectors = torch.linalg.eigh(whitened.double())
        lower = scale.unsqueeze(-1) * torch.linalg.cholesky(
            vectors @ (1 / values.clamp_min(floor)).diag_embed() @ vectors.mT
        ).to(u)
        if step == steps:
            break
        along = (vectors.mT @ (slope * scale).double().unsqueeze(-1)).squeeze(-1) / values.abs().clamp_min(floor)
        move = scale * (vectors @ along.unsqueeze(-1)).squeeze(-1).to(u)
        new = torch.stack([u + move, u + move / 4])
        with torch.no_grad():
            values_there = target(new).nan_to_num(-math.inf, neginf=-math.inf)
        better, which = values_there.max(0)
        u = torch.where((better > f).unsqueeze(-1), new.gather(0, which[None, :, None].expand(1, *u.shape))[0], u)
        f, slope, negative = curvature(target, u)
    return u, f, lower


def merged(target: Target, ends: Tensor, scale: Tensor) -> Mode:
    """The distinct modes among points [S, N, F], best first."""
    with torch.no_grad():
        f = target(ends).nan_to_num(-math.inf)  # [S, N]
    s, n, features = ends.shape
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def whole(start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return start, start.new_zeros(n), torch.eye(features).to(start).repeat(n, 1, 1)

    left = f.clone()
    for _ in range(_MODES):
        best, which = left.max(0)
        if not (best > -math.inf).any():
            break
        start = ends.gather(0, which[None, :, None].expand(1, n, features))[0]
        rows = (best > -math.inf).nonzero().flatten()
        here = target if len(rows) == n else target.of_rows(rows)
        before = here.evaluations
        some = newton(here, start[rows], scale[rows])
        target.evaluations += math.ceil((here.evaluations - before) * len(rows) / n) if here is not target else 0
        u, top, lower = (full.index_copy(0, rows, part) for full, part in zip(whole(start), some, strict=True))
        log_mass = top.double() + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1).double()
        log_mass = torch.where(best > -math.inf, log_mass + features / 2 * math.log(2 * math.pi), -math.inf)
        for other, _, _ in found:  # it led to one that is known
            away = torch.linalg.solve_triangular(lower, (other - u).unsqueeze(-1), upper=False).squeeze(-1)
            log_mass = torch.where(away.square().sum(-1) < _APART**2, -math.inf, log_mass)
        found.append((u, lower, log_mass))
        for i in range(s):
            away = torch.linalg.solve_triangular(lower, (ends[i] - u).unsqueeze(-1), upper=False).squeeze(-1)
            near = away.square().sum(-1) < max(_APART**2, features + 3 * math.sqrt(2 * features))
            left[i] = torch.where(near | (which == i), -math.inf, left[i])
    kept = Mode(*map(torch.stack, zip(*found, strict=True)))
    useful = [m for m in range(len(kept.loc)) if bool((kept.log_mass[m] > kept.log_mass.amax(0) - _LEAST).any())]
    log_mass = torch.where(kept.log_mass > kept.log_mass.amax(0) - _LEAST, kept.log_mass, -math.inf)
    return Mode(kept.loc[useful], kept.lower[useful], log_mass[useful])


def searched(target: Target, modes: Mode, steps: int, draws: int, lr: float = 0.02) -> Mode:
    """The Gaussian at each mode that is best by its ELBO, found with gradients that stick the landing."""
    index, rows = modes.log_mass.isfinite().nonzero(as_tuple=True)  # P pairs of a mode and a datum
    start, whitening = modes.loc[index, rows], modes.lower[index, rows]
    pairs, features = start.shape
    here = target if pairs == modes.loc.shape[1] and len(modes.loc) == 1 else target.of_rows(rows)
    free = [torch.zeros_like(start), torch.zeros_like(whitening), torch.zeros_like(start)]
    mean = [torch.zeros_like(p) for p in free]
    for p in free:
        p.requires_grad_()
    optimizer = torch.optim.Adam(free, lr=lr, betas=(0.9, 0.99))
    elbo = torch.zeros(pairs, dtype=torch.float64, device=start.device)

    def factor(below: Tensor, log_scale: Tensor) -> Tensor:
        return torch.tril(below, -1) + torch.diag_embed(log_scale.exp())

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / steps)
        noise = torch.randn(draws, pairs, features, dtype=start.dtype, device=start.device)
        with torch.enable_grad():
            inner = factor(free[1], free[2])  # [P, F, F]
            y = free[0] + torch.einsum("pij,cpj->cpi", inner, noise)
            log_p = here(start + torch.einsum("pij,cpj->cpi", whitening, y))
            stopped = inner.detach()
            away = (y - free[0].detach()).permute(1, 2, 0)  # [P, F, C]
            white = torch.linalg.solve_triangular(stopped, away, upper=False)
            log_q = -0.5 * white.square().sum(1).T - stopped.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            total = log_p - log_q
            loss = -torch.where(total.isfinite(), total, 0.0).mean(0).sum()
            slopes = torch.autograd.grad(loss, free)
        for p, slope in zip(free, slopes, strict=True):
            p.grad = slope.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        if step >= steps // 2:
            elbo += total.detach().double().mean(0) / (steps - steps // 2)
            for kept, p in zip(mean, free, strict=True):
                kept += p.detach() / (steps - steps // 2)
    target.evaluations += math.ceil(3 * steps * draws * pairs / modes.loc.shape[1]) if here is not target else 0
    constant = features / 2 * math.log(2 * math.pi) + whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1).double()
    found = Mode(*(part.clone() for part in modes))
    found.loc[index, rows] = start + torch.einsum("pij,pj->pi", whitening, mean[0])
    found.lower[index, rows] = whitening @ factor(*mean[1:])
    found.log_mass[index, rows] = elbo + constant
    return found


def estimate(log_weights: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Log of the mean of stratified weights [K, N], and its error within strata: [N] each."""
    top = log_weights.amax(0)
    top = torch.where(top.isfinite(), top, 0.0)
    weights = (log_weights - top).exp()
    mean = weights.mean(0)
    total = len(weights)
    variance = sum(len(part) * part.var(0) for part in weights.split(counts)) / total**2
    return mean.log() + top, torch.as_tensor(variance).sqrt() / mean
