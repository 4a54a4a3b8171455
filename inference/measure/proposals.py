r"""A separate proposal for each data point: modes of the posterior, their curvature, a local search, a mixture.

.. math::
    q_n(u) = \sum_m \pi_{nm} \big( a \, N(u; \mu_{nm}, w^2 \Sigma_{nm}) + b \, t_5(u; \mu_{nm}, v^2 \Sigma_{nm}) \big)
        + c \, q(u \mid x_n) + d \, p(u)

in the unconstrained coordinates u of all latent values, [F] for a data point. Student's t is v = 1 + 2 / F times as
wide: this widening, which is useful with few coordinates, costs a factor v^F < e^2 that does not grow with F. Samples
are stratified: every part of the mixture gives a fixed number of them, and each is weighted by the density of the
whole mixture (the balance heuristic), so that no part can make a weight larger than the inverse of its share times its
own weight.

1. Ascents from samples of the guide, and of the prior if it is far from these, all at once, by Adam and by Newton's
   method, with many coordinates a single Newton step.
2. At each end the negative Hessian; ends within two standard deviations of another one count as the same mode.
3. A Gaussian with full covariance for each mode, in the coordinates that whiten the Laplace approximation, by
   gradients with sticking the landing; the mean of the second half of the steps is kept if its ELBO is above that of
   the start. Data points with few coordinates skip this, unless the weights of a pilot show that it is needed.
4. If a pilot shows that this is still insufficient, Gaussians adapted to the weights of several rounds of samples.

The pilot's samples are not used in any estimate.

References:
    Veach and Guibas (1995), Optimally Combining Sampling Techniques for Monte Carlo Rendering.
    Hesterberg (1995), Weighted Average Importance Sampling and Defensive Mixture Distributions.
    Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194
    Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive Importance Sampling in General Mixture Classes.
    https://arxiv.org/abs/0710.4242
"""

from __future__ import annotations

__all__ = ["Mode", "Proposal", "propose"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jensen.kernel.newton import climb

from .diagnostics import pareto_k
from .plan import FEW, SOME, Plan
from .target import Block, Target

_CANDIDATES = 32  # samples of the prior, from which starts are chosen
_MODES = 4
_LEAST = 5.0  # nats below the best: minimal mass of a mode
_APART = 2.0  # standard deviations between modes
_DIP = 0.5  # nats: minimal decrease of the density between two modes
_HOPELESS = 10.0  # nats below the best: such an end leads to no relevant mode
_FREEDOM = 5.0  # degrees of freedom of Student's t
_HALF = 12  # steps, after which most ascents from guide samples are stopped
_DRAWS = 4  # per step of the local search
_STEPS = 20, 200  # of the local search, at least and at most
_COMPARED = 48  # samples that decide whether the search found a better Gaussian
_DOUBT = 0.4  # k-hat of a pilot
_COMPONENTS, _ROUNDS = 8, 6  # of an adapted mixture
_ROUND, _AT_ONCE = 512, 32  # maximal samples of a round, and data points adapted at once: memory stays flat


class Mode(NamedTuple):
    """Gaussians at modes: locations [M, N, F], Cholesky factors [M, N, F, F], and the log of their mass, [M, N]."""

    loc: Tensor
    lower: Tensor
    log_mass: Tensor


@dataclass(frozen=True)
class Proposal:
    """A mixture for each data point.

    Attributes:
        modes: its Gaussians.
        log_weights: log of the share of each mode, [M, N]; minus infinity for an absent mode.
        shares: of Gaussians, Student's t, the guide and the prior.
        widened: the factor by which the Gaussians are wider.
    """

    modes: Mode
    log_weights: Tensor
    shares: tuple[float, float, float, float]
    widened: float

    @property
    def main(self) -> Tensor:
        """The Cholesky factor of the mode with the largest share of each data point, [N, F, F]."""
        best = self.log_weights.argmax(0)
        return self.modes.lower[best, torch.arange(len(best), device=best.device)]

    def of(self, rows: Tensor) -> Proposal:
        """The proposals of some of the data points."""
        some = Mode(*(part[:, rows] for part in self.modes))
        used = self.log_weights[:, rows].isfinite().any(1)
        modes = Mode(*(part[used] for part in some))
        return Proposal(modes, self.log_weights[:, rows][used], self.shares, self.widened)

    def counts(self, count: int) -> list[int]:
        """The number of samples from each stratum, out of ``count``."""
        counts = [max(2, int(share * count)) if share else 0 for share in self.shares]
        counts[0] += count - sum(counts)
        return counts

    @torch.no_grad()
    def log_joint_weights(self, target: Target, block: Block, count: int) -> Tensor:
        """Log weights [K, N] of stratified samples."""
        counts = self.counts(count)
        return torch.cat([self.log_weights_at(target, block, u, counts) for u in self.draw(target, block, counts)])

    def log_weights_at(self, target: Target, block: Block, u: Tensor, counts: list[int], calls: int = 1) -> Tensor:
        """Log weights of points [C, N, F] beside strata with these numbers of samples: [C, N], float64."""
        return torch.cat([log_w for log_w, _ in self.weighed(target, block, u, counts, calls)])

    def draw(self, target: Target, block: Block, counts: list[int], most: int = 0) -> Iterator[Tensor]:
        """Samples for a block's data, one stratum after the other, in pieces: [C, N, F].

        Args:
            target: the target.
            block: the data.
            counts: the number of samples from each stratum.
            most: the maximal number in a piece; 0: all in one.
        """
        total, most = sum(counts), most or sum(counts)
        offsets = torch.rand(2, len(block.rows), device=block.rows.device)
        for first in range(0, total, most):
            piece, edge = [], 0
            for kind, number in enumerate(counts):
                here = range(max(first - edge, 0), min(first + most - edge, number))
                edge += number
                if not here:
                    continue
                if kind < 2:
                    piece.append(self._draw((here.start + torch.arange(len(here))).to(offsets), number, offsets, kind))
                else:
                    piece.append((target.of_guide if kind == 2 else target.of_prior)(len(here), block))
            yield torch.cat(piece)

    @torch.no_grad()
    def slot_of(self, target: Target, block: Block, u: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Log weights [N] of points [N, F], and the index of the sample that each may replace, [N].

        A posterior sample replaces sample k with a probability proportional to the density from which k was
        sampled.
        """
        joint, prior, guide = target.parts(block, u.unsqueeze(0))
        log_w = joint.double() - self.log_density(u.unsqueeze(0), prior, guide, counts)
        n = len(u)
        modes = len(self.log_weights)
        kinds = [
            part[:, 0] + math.log(count) if count else torch.full_like(part[:, 0], -math.inf)
            for part, count in zip(self.by_mode(u.unsqueeze(0)), counts, strict=False)
        ]
        for part, count in ((guide, counts[2]), (prior, counts[3])):
            none = log_w.new_full((1, n), -math.inf)
            kinds.append(none if part is None or not count else part.double() + math.log(count))
        logits = torch.cat(kinds)  # [2 M + 2, N]
        gumbel = -torch.empty_like(logits).exponential_().log()
        kind = (logits + gumbel).argmax(0)  # [N]
        edges = torch.cat([torch.zeros_like(self.log_weights[:1]), self.log_weights.exp().cumsum(0)]).double()
        mode = kind % modes
        low, high = (edges.gather(0, (mode + i)[None])[0] for i in (0, 1))
        within = low + (high - low) * torch.rand_like(low)
        within = torch.where(kind < 2 * modes, within, torch.rand_like(within))
        stratum = torch.where(kind < 2 * modes, kind // modes, kind - 2 * modes + 2)
        sizes = torch.tensor(counts, device=u.device)
        first = sizes.cumsum(0) - sizes
        slot = (within * sizes[stratum]).long().clamp_max(sizes[stratum] - 1)
        return log_w[0], first[stratum] + slot

    def weighed(
        self, target: Target, block: Block, u: Tensor, counts: list[int], calls: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Log weights and log densities of the mixture at samples, chunk by chunk: [k, N] each, float64."""
        made = []
        for part in u.split(target.at_once):
            joint, prior, guide = target.parts(block, part, calls * sum(counts) // target.at_once)
            log_q = self.log_density(part, prior, guide, counts)
            joint = joint.double().nan_to_num(-math.inf, math.inf, -math.inf)  # extreme parameters may overflow
            made.append((joint - log_q, log_q))
        return made

    def log_density(self, u: Tensor, prior: Tensor, guide: Tensor | None, counts: list[int]) -> Tensor:
        """Log of the mixture, with the counts of its strata: [C, N], float64."""
        normal, student = (log.logsumexp(0) for log in self.by_mode(u))
        parts = (normal, student, guide, prior)
        terms = [
            part.double().nan_to_num(-math.inf, math.inf, -math.inf) + math.log(count / sum(counts))
            for part, count in zip(parts, counts, strict=True)
            if count and part is not None
        ]
        return torch.stack(terms).logsumexp(0)

    def by_mode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log of share times density of each mode's Gaussian and Student's t: [M, C, N] each, float64."""
        away = u[None] - self.modes.loc[:, None]  # [M, C, N, F]
        white = torch.linalg.solve_triangular(self.modes.lower, away.permute(0, 2, 3, 1), upper=False)  # [M, N, F, C]
        squares = white.square().sum(2, dtype=torch.float64).transpose(1, 2)  # [M, C, N]
        d, w, v = u.shape[-1], self.widened, _FREEDOM
        log_det = self.modes.lower.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).double()
        share = (self.log_weights.double() - log_det)[:, None]  # [M, 1, N]
        normal = share - 0.5 * squares / w**2 - d * math.log(w) - 0.5 * d * math.log(2 * math.pi)
        constant = math.lgamma((v + d) / 2) - math.lgamma(v / 2) - 0.5 * d * math.log(v * math.pi)
        far = _far(d)
        return normal, share + constant - d * math.log(far) - 0.5 * (v + d) * (squares / far**2 / v).log1p()

    def _draw(self, numbers: Tensor, of: int, offsets: Tensor, kind: int) -> Tensor:
        """Samples [C, N, F] of the Gaussians (kind 0) or Student's ts (1), from each mode according to its share.

        Args:
            numbers: the indices of these samples in the stratum, [C].
            of: the number of samples in the stratum.
            offsets: the start of each data point's systematic sampling, [2, N].
            kind: 0 or 1.
        """
        modes, n, features = self.modes.loc.shape
        count, device = len(numbers), offsets.device
        edges = self.log_weights.exp().cumsum(0).clamp_max(1.0)  # [M, N]
        at = (numbers[:, None] + offsets[kind]) / of
        chosen = (at[None] >= edges[:, None]).sum(0).clamp_max(modes - 1)  # [C, N]
        noise = torch.randn(count, n, features, dtype=self.modes.loc.dtype, device=device)
        if kind:
            scale = 2 * torch._standard_gamma(noise.new_full((count, n), _FREEDOM / 2)) / _FREEDOM
            noise = noise * (_far(features) * scale.rsqrt()).unsqueeze(-1)
        else:
            noise = noise * self.widened
        u = noise.new_empty(count, n, features)
        for m in range(modes):
            here = chosen == m
            if here.any():
                moved = self.modes.loc[m] + torch.einsum("nij,cnj->cni", self.modes.lower[m], noise)
                u = torch.where(here.unsqueeze(-1), moved, u)
        return u


def _far(features: int) -> float:
    """The width of Student's t relative to the fitted Gaussians."""
    return 1 + 2 / features


def propose(target: Target, plan: Plan) -> tuple[Proposal, Tensor]:
    """A mixture for each data point of the block, and the number of modes found, [N]."""
    (block,) = target.blocks_of(target.rows)
    features = target.features
    prior = target.of_prior(_CANDIDATES)
    scale = _spread(prior)
    u = _spread_out(target.of_guide(plan.starts), prior, scale, plan.starts)
    few = features <= FEW
    u, filled = _filled(u, block), _filled(scale, block)
    if not few and plan.climb > 2 * _HALF:  # ascents from guide samples mostly end in one mode: the best one continues
        u, f = climbed(target, block, u, filled, _HALF)
        u = torch.cat([_best(u[: plan.starts], f[: plan.starts], 1), u[plan.starts :]])
        u, _ = climbed(target, block, u, filled, plan.climb - _HALF)
    else:
        u, _ = climbed(target, block, u, filled, plan.climb)
    modes = merged(target, u[:, : block.real], scale, prior, plan)
    hard = target.rows
    if few:
        hard = doubtful(target, _mixture(target, modes), plan)
    modes = searched(target, modes, hard, plan, 3 if few else 1)
    proposal = _mixture(target, modes)
    if plan.pilot and len(hard):
        hard = doubtful(target, proposal, plan, hard)
        proposal = adapted(target, proposal, hard, plan)
    return proposal, modes.log_mass.isfinite().sum(0)


def _mixture(target: Target, modes: Mode) -> Proposal:
    log_weights = modes.log_mass.log_softmax(0)
    floor = torch.where(modes.log_mass.isfinite(), math.log(0.02), -math.inf).to(log_weights)
    log_weights = torch.logaddexp(log_weights, floor).log_softmax(0)
    of_guide = 0.1 if target.knows_guide else 0.0
    of_prior = 0.15 if target.features <= FEW and target.draws_prior else 0.0
    rest = (1 - of_guide - of_prior) / 2
    widened = min(1.1, 1 + 0.7 / math.sqrt(target.features))
    return Proposal(modes, log_weights, (rest, rest, of_guide, of_prior), widened)


def _best(u: Tensor, f: Tensor, count: int) -> Tensor:
    """Of points [S, N, F] those with the largest values [S, N]: [C, N, F]."""
    which = f.topk(count, dim=0).indices
    best: Tensor = u.gather(0, which.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
    return best


def _filled(values: Tensor, block: Block) -> Tensor:
    """Values of the rows of a block along the last but one dimension; padded with the first one if needed."""
    missing = len(block.rows) - block.real
    if not missing:
        return values
    return torch.cat([values, values[..., :1, :].expand(*values.shape[:-2], missing, -1)], -2)


def _spread_out(u: Tensor, candidates: Tensor, scale: Tensor, count: int) -> Tensor:
    """Points, and ``count`` of the candidates, each the farthest from all points before it: [C, N, F]."""
    for _ in range(count):
        away = ((candidates[:, None] - u) / scale).square().sum(-1).amin(1)  # [candidates, N]
        farthest = away.argmax(0)[None, :, None].expand(1, *u.shape[1:])
        u = torch.cat([u, candidates.gather(0, farthest)])
    return u


def _spread(u: Tensor) -> Tensor:
    """A scale for each coordinate, [N, F], from samples of the prior: the distance between their quartiles."""
    low, high = u.quantile(u.new_tensor([0.25, 0.75]), dim=0)
    scale: Tensor = (high - low) / 1.35
    return scale.clamp_min(1e-6)


def doubtful(target: Target, proposal: Proposal, plan: Plan, rows: Tensor | None = None) -> Tensor:
    """The rows whose pilot has a heavy tail; all rows if there is no pilot."""
    rows = target.rows if rows is None else rows
    if not plan.pilot:
        return rows
    hard = []
    for block in target.blocks_of(rows):
        found = proposal.of(block.rows).log_joint_weights(target, block, plan.pilot)
        hard.append(~(pareto_k(found)[: block.real] <= _DOUBT))
    return rows[torch.cat(hard)] if hard else rows


def climbed(target: Target, block: Block, u: Tensor, scale: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The best points of an ascent from these, [S, N, F], and their log densities [S, N]."""
    slopes = target.slopes(block, u, steps * target.blocks)

    def uphill(v: Tensor) -> tuple[Tensor, Tensor]:
        f, slope = slopes(v * scale)
        return f, slope * scale

    v, f = climb(uphill, u / scale, (), steps)
    return v * scale, f


def newton(
    target: Target, block: Block, u: Tensor, scale: Tensor, prior: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Points after Newton steps [N, F]; the log density there, and a covariance's Cholesky factor, [N, F, F].

    Each curvature is at least a quarter of that of a Gaussian prior in the same direction, whose variance is
    estimated from samples, [S, N, F].
    """
    prior = ((prior - prior.mean(0)) / scale).double().movedim(0, -1)  # [N, F, S]
    f, slope, negative = target.curvature(block, u)
    for step in range(steps + 1):
        whitened = negative * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        values, vectors = torch.linalg.eigh(whitened.double())
        floor = 0.25 / (vectors.mT @ prior).square().mean(-1).clamp_min(1e-6)  # [N, F]
        lower = scale.unsqueeze(-1) * torch.linalg.cholesky(
            vectors @ (1 / values.maximum(floor)).diag_embed() @ vectors.mT
        ).to(u)
        along = (vectors.mT @ (slope * scale).double().unsqueeze(-1)).squeeze(-1) / values.abs().maximum(floor)
        move = scale * (vectors @ along.unsqueeze(-1)).squeeze(-1).to(u)
        new = torch.stack([u + move, u + move / 4])
        there = target.parts(block, new)[0].nan_to_num(-math.inf, neginf=-math.inf)
        better, which = there.max(0)
        u = torch.where((better > f).unsqueeze(-1), new.gather(0, which[None, :, None].expand(1, *u.shape))[0], u)
        if step == steps:  # one more step with the known curvature
            f = torch.maximum(f, better)
            break
        f, slope, negative = target.curvature(block, u)
    return u, f, lower


def merged(target: Target, ends: Tensor, scale: Tensor, prior: Tensor, plan: Plan) -> Mode:
    """The distinct modes among points [S, N, F], best first; as many as the plan allows."""
    s, n, features = ends.shape
    f = _at(target, ends)  # [S, N]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    price = (1 + plan.newton) * (3 * features + 2)
    left = f.clone()
    for number in range(_MODES):
        if number and number * price > plan.proposal // 4:
            break
        best, which = left.max(0)
        rows = (best > -math.inf).nonzero().flatten()
        if not len(rows):
            break
        start = ends.gather(0, which[None, :, None].expand(1, n, features))[0]
        u, top = start.clone(), start.new_zeros(n)
        lower = torch.eye(features).to(start).repeat(n, 1, 1)
        for block in target.blocks_of(rows):
            here = block.rows[: block.real]
            some = newton(target, block, start[block.rows], scale[block.rows], prior[:, block.rows], plan.newton)
            u[here], top[here], lower[here] = (part[: block.real] for part in some)
        log_mass = top.double() + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1).double()
        log_mass = torch.where(best > -math.inf, log_mass + features / 2 * math.log(2 * math.pi), -math.inf)
        for other, _, _ in found:  # it ended in a known mode
            away = torch.linalg.solve_triangular(lower, (other - u).unsqueeze(-1), upper=False).squeeze(-1)
            log_mass = torch.where(away.square().sum(-1) < _APART**2, -math.inf, log_mass)
        found.append((u, lower, log_mass))
        dip = _dips(target, u, ends)  # [S, N]
        for i in range(s):
            away = torch.linalg.solve_triangular(lower, (ends[i] - u).unsqueeze(-1), upper=False).squeeze(-1)
            near = (away.square().sum(-1) < _APART**2) | ~(dip[i] > _DIP) | (f[i] < f.amax(0) - _HOPELESS)
            left[i] = torch.where(near | (which == i), -math.inf, left[i])
    if not found:
        found.append((ends[0], scale.diag_embed(), torch.full_like(f[0], -math.inf, dtype=torch.float64)))
    kept = Mode(*map(torch.stack, zip(*found, strict=True)))
    nowhere = ~kept.log_mass.isfinite().any(0)  # no ascent reached a positive density: use the width of the prior
    kept.loc[0, nowhere], kept.lower[0, nowhere] = ends[0, nowhere], scale.diag_embed()[nowhere]
    kept.log_mass[0, nowhere] = 0.0
    log_mass = torch.where(kept.log_mass > kept.log_mass.amax(0) - _LEAST, kept.log_mass, -math.inf)
    useful = log_mass.isfinite().any(1)
    return Mode(kept.loc[useful], kept.lower[useful], log_mass[useful])


def _dips(target: Target, u: Tensor, ends: Tensor) -> Tensor:
    """The decrease of the log density below both ends on straight lines from u [N, F] to points: [S, N]."""
    ways = torch.cat([u + t * (ends - u) for t in (0.0, 0.25, 0.5, 0.75, 1.0)])  # [5 S, N, F]
    f = _at(target, ways).unflatten(0, (5, len(ends)))
    dips: Tensor = torch.minimum(f[0], f[-1]) - f[1:-1].amin(0)
    return dips


def _at(target: Target, u: Tensor) -> Tensor:
    """Log density of all data of the block at points [S, N, F]: [S, N]."""
    parts = [
        target.parts(block, _filled(u[:, block.rows[: block.real]], block))[0][:, : block.real]
        for block in target.blocks_of(target.rows)
    ]
    return torch.cat(parts, -1).nan_to_num(-math.inf, neginf=-math.inf)


def searched(target: Target, modes: Mode, rows: Tensor, plan: Plan, part: int) -> Mode:
    """The Gaussian at each mode with the best ELBO, for some of the data points.

    Args:
        target: the block.
        modes: the start of the search.
        rows: the data points.
        plan: the use of evaluations.
        part: the fraction of the remaining evaluations for the proposal that the search may use.
    """
    made = Mode(*(values.clone() for values in modes))
    held = modes.log_mass.isfinite().sum(0)  # [N]
    left = (plan.proposal - plan.pilot * (part == 1) - target.spent) // part
    affordable = (
        ((left - 2 * _COMPARED * held) // (3 * _DRAWS * held)).clamp_max(_STEPS[1]) // _STEPS[0] * _STEPS[0]
    )  # [N]
    for steps in affordable[rows].unique().tolist():
        some = rows[affordable[rows] == steps]
        if steps < _STEPS[0] or not len(some):
            continue
        data, index = modes.log_mass[:, some].isfinite().T.nonzero(as_tuple=True)  # pairs of a data point and a mode
        data = some[data]
        first = 0
        for block in target.blocks_of(data):
            of = index[first : first + block.real]
            of = torch.cat([of, of[:1].expand(len(block.rows) - block.real)])
            first += block.real
            here = (of, block.rows)
            begun = modes.loc[here], modes.lower[here]
            found = _better(target, block, _landed(target, block, *begun, steps), begun, modes.log_mass[here])
            where = (of[: block.real], block.rows[: block.real])
            for kept, values in zip(made, found, strict=True):
                kept[where] = values[: block.real].to(kept)
    return made


def _landed(
    target: Target, block: Block, start: Tensor, whitening: Tensor, steps: int, lr: float = 0.05
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussians found by gradients with sticking the landing: [P, F], [P, F, F], and their ELBO [P]."""
    pairs, features = start.shape
    free = [torch.zeros_like(start), torch.zeros_like(whitening), torch.zeros_like(start)]
    mean = [torch.zeros_like(p) for p in free]
    below = min(1.0, math.sqrt(2 / features))  # the noise of a row's entries below the diagonal accumulates
    groups = [{"params": free[:1] + free[2:], "size": lr}, {"params": free[1:2], "size": lr * below}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    elbo = torch.zeros(pairs, dtype=torch.float64, device=start.device)
    noise = start.new_empty(_DRAWS, pairs, features)
    step_of = target.landing(block, _DRAWS, (*free, start, whitening, noise), steps * target.blocks)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["size"] * (1 - 0.9 * step / steps)
        total, *slopes = step_of(*free, start, whitening, noise.normal_())
        for p, slope in zip(free, slopes, strict=True):
            p.grad = slope
        optimizer.step()
        if step >= steps // 2:
            elbo += total.double() / (steps - steps // 2)
            for kept, p in zip(mean, free, strict=True):
                kept += p / (steps - steps // 2)
    constant = features / 2 * math.log(2 * math.pi) + whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1).double()
    inner = torch.tril(mean[1], -1) + torch.diag_embed(mean[2].exp())
    return start + torch.einsum("pij,pj->pi", whitening, mean[0]), whitening @ inner, elbo + constant


def _better(
    target: Target,
    block: Block,
    found: tuple[Tensor, Tensor, Tensor],
    begun: tuple[Tensor, Tensor],
    log_mass: Tensor,
) -> tuple[Tensor, ...]:
    """The result of a search if its ELBO is above that of the initial Gaussian, else the latter."""
    noise = torch.randn(_COMPARED, *found[0].shape, dtype=found[0].dtype, device=found[0].device)
    elbos = []
    for loc, lower in (found[:2], begun):
        u = loc + torch.einsum("nij,cnj->cni", lower, noise)
        log_w = target.parts(block, u)[0].double().nan_to_num(-math.inf, neginf=-math.inf)
        elbos.append(log_w.mean(0) + lower.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).double())
    kept = elbos[0] > elbos[1]
    pairs = zip(found, (*begun, log_mass), strict=True)
    return tuple(torch.where(kept.view(-1, *[1] * (a.dim() - 1)), a, b.to(a)) for a, b in pairs)


def adapted(target: Target, proposal: Proposal, rows: Tensor, plan: Plan) -> Proposal:
    """Gaussians of some of the data points, adapted to the weights of samples in several rounds.

    Each round samples from the present mixture and takes a step of the EM algorithm on the samples of all rounds,
    weighted by the density of all their proposals. Covariances are shrunk to those of the mode.
    """
    if not len(rows) or target.features > SOME:
        return proposal
    left = int((plan.proposal - target.spent[rows]).amin())
    count = min(_ROUND, left // _ROUNDS)
    if count < 64:
        return proposal
    grown = _grown(proposal, _COMPONENTS)
    for block in [block for some in rows.split(_AT_ONCE) for block in target.blocks_of(some)]:
        found = _followed(target, block, grown.of(block.rows), count)
        here = block.rows[: block.real]
        for kept, values in zip((*grown.modes[:2], grown.log_weights), found, strict=True):
            kept[: len(values), here] = values[:, : block.real].to(kept)
            if values.dim() == 2:
                kept[len(values) :, here] = -math.inf
    return grown


def _grown(proposal: Proposal, components: int) -> Proposal:
    """The same proposal with space for ``components`` components."""
    missing = components - len(proposal.modes.loc)
    if missing <= 0:
        return proposal
    modes = Mode(*(torch.cat([part, part[:1].expand(missing, *part.shape[1:])]) for part in proposal.modes))
    weights = torch.cat(
        [proposal.log_weights, torch.full_like(proposal.log_weights[:1], -math.inf).expand(missing, -1)]
    )
    return Proposal(modes, weights, proposal.shares, proposal.widened)


@torch.no_grad()
def _followed(target: Target, block: Block, proposal: Proposal, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Locations [L, N, F], Cholesky factors and log weights of a mixture adapted to the weights of its samples."""
    features = target.features
    lower = proposal.main  # [N, F, F]
    prior = (lower @ lower.mT).double() / 4  # the target of covariance shrinkage
    draws: list[tuple[Tensor, Tensor, Tensor]] = []  # coordinates, log p, log q of the round
    for number in range(_ROUNDS):
        counts = proposal.counts(count)
        (u,) = proposal.draw(target, block, counts)
        made = proposal.weighed(target, block, u, counts)
        log_w, log_q = (torch.cat(parts) for parts in zip(*made, strict=True))
        draws.append((u.double(), log_w + log_q, log_w))
        points = torch.cat([u for u, _, _ in draws])  # [K, N, F]
        log_w = torch.cat([w for _, _, w in draws])
        log_w = log_w - log_w.amax(0)
        cut = log_w.logsumexp(0) - 0.5 * math.log(len(log_w))  # truncated at sqrt(K) times the mean
        weights = torch.minimum(log_w, cut).softmax(0)  # [K, N]
        if not number:  # put further components at samples, one by one where the mixture is thinnest
            proposal = _seeded(proposal, points, weights, prior)
        normal, student = proposal.by_mode(points.to(u))
        share = (torch.logaddexp(normal, student)).softmax(0).nan_to_num(0.0) * weights  # [L, K, N]
        mass = share.sum(1)  # [L, N]
        loc = torch.einsum("lkn,knf->lnf", share, points) / mass.clamp_min(1e-12).unsqueeze(-1)
        away = points[None] - loc[:, None]  # [L, K, N, F]
        spread = torch.einsum("lkn,lknf,lkng->lnfg", share, away, away)
        size = (share.square().sum(1) / mass.square().clamp_min(1e-24)).clamp_min(1e-12).reciprocal()  # [L, N], draws
        trust = (size / (size + 2 * features))[..., None, None]
        covariance = trust * spread / mass.clamp_min(1e-12)[..., None, None] + (1 - trust) * prior
        lower = torch.linalg.cholesky(covariance + 1e-8 * prior)
        log_weights = (0.98 * mass + 0.02 / len(mass)).log().masked_fill(mass < 1e-6, -math.inf).log_softmax(0)
        modes = Mode(loc.to(u), lower.to(u), log_weights)
        proposal = Proposal(modes, log_weights, proposal.shares, proposal.widened)
    return proposal.modes.loc, proposal.modes.lower, proposal.log_weights


def _seeded(proposal: Proposal, points: Tensor, weights: Tensor, prior: Tensor) -> Proposal:
    """The same proposal with all components in use: new ones at samples, by their weights, with narrow covariances."""
    components = max(_COMPONENTS, len(proposal.log_weights))
    grown = _grown(proposal, components)
    loc, lower = grown.modes.loc.clone(), grown.modes.lower.clone()
    log_weights = grown.log_weights.clone()
    narrow = torch.linalg.cholesky(prior).to(lower)
    n = loc.shape[1]
    rows = torch.arange(n, device=loc.device)
    white = torch.linalg.solve_triangular(narrow.double(), points.permute(1, 2, 0), upper=False)  # [N, F, K]
    nearest = torch.full_like(weights, math.inf)
    for m in range(components):
        known = log_weights[m].isfinite()
        score = weights * nearest.clamp_max(1e6)  # far from all others, with a large weight
        at = score.argmax(0)
        loc[m] = torch.where(known.unsqueeze(-1), loc[m], points[at, rows].to(loc))
        lower[m] = torch.where(known[:, None, None], lower[m], narrow)
        centre = torch.linalg.solve_triangular(narrow.double(), loc[m].double().unsqueeze(-1), upper=False)
        nearest = torch.minimum(nearest, (white - centre).square().sum(1).T)
        log_weights[m] = torch.where(known, log_weights[m], math.log(1 / components))
    log_weights = log_weights.log_softmax(0)
    return Proposal(Mode(loc, lower, log_weights), log_weights, grown.shares, grown.widened)
