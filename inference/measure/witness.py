"""A test for modes that the proposals miss: a few short chains annealed from the prior.

If more than two percent of their weight ends at points whose importance weight, log p(x, u) - log q(u), is more
than a hundred times above the mean, the proposal q may have missed a part of the posterior. Or the point is in a thin
tail of a known part, as happens with many coordinates: so copies of it continue as separate chains, and the part is
reported as missed if most of them stay at such points. The chains find a mode that contains a fair part of the
prior's samples; they prove nothing about others.
"""

from __future__ import annotations

__all__ = ["missed"]

import math
from itertools import pairwise

import torch
from torch import Tensor

from .hmc import Point, move
from .plan import TEMPERATURES, TYPICAL, WITNESSES
from .proposals import Proposal
from .target import Block, Target

_POWER = 3  # of the temperatures: small temperatures matter most
_STEP = 1.1  # of a move, times F^(-1/4)
_ABOVE = math.log(100)
_SHARE = 0.02
_COPIES, _MOVES = 4, 30  # of a point that may be in a separate mode


@torch.no_grad()
def missed(target: Target, proposal: Proposal) -> Tensor:
    """Whether the proposal of each data point of the target's block misses a part of the posterior: bool [N].

    Args:
        target: the target.
        proposal: the proposals.
    """
    doubts = torch.zeros(len(target), dtype=torch.bool, device=target.spent.device)
    ends, means = target.of_prior(1)[0], doubts.double()
    for block in target.blocks_of(target.rows):
        own, here = proposal.of(block.rows), block.rows[: block.real]
        log_w = own.log_joint_weights(target, block, TYPICAL)
        mean = log_w.logsumexp(0) - math.log(TYPICAL)
        point, total = _annealed(target, block, own)
        mass = total.nan_to_num(-math.inf).softmax(0).nan_to_num(0.0) * (_above(target, block, own, point.u) > mean)
        doubts[here] = (mass.sum(0) > _SHARE)[: block.real]
        ends[here] = point.u.gather(0, mass.argmax(0)[None, :, None].expand_as(point.u[:1]))[0, : block.real]
        means[here] = mean[: block.real]
    for block in target.blocks_of(doubts.nonzero().flatten()):
        own, here = proposal.of(block.rows), block.rows[: block.real]
        path = target.path(block, target.blocks)
        point = path(ends[block.rows].expand(_COPIES, -1, -1))
        step = _step(point)
        for _ in range(_MOVES):
            point, _, _ = move(path, point, 1.0, step, own.main, 1)
        stay = _above(target, block, own, point.u) > means[block.rows]
        doubts[here] = (stay.double().mean(0) > 0.5)[: block.real]
    return doubts


def _annealed(target: Target, block: Block, proposal: Proposal) -> tuple[Point, Tensor]:
    """The final positions of chains from the prior, and their log weights [C, N]."""
    path = target.path(block, target.blocks * TEMPERATURES)
    point = path(target.of_prior(WITNESSES, block))
    of_mode = torch.cholesky_inverse(proposal.main.double())
    spread = target.of_prior(32, block).double().var(0).clamp_min(1e-8)
    of_prior = spread.reciprocal().diag_embed()
    step = _step(point)
    betas = [(t / TEMPERATURES) ** _POWER for t in range(TEMPERATURES + 1)]
    total = torch.zeros_like(point.ratio, dtype=torch.float64)
    for before, b in pairwise(betas):
        total = total + (b - before) * point.ratio.double()
        if b < 1:
            precision = torch.linalg.cholesky((1 - b) * of_prior + b * of_mode)
            scale = torch.linalg.inv(precision).mT.to(point.u)
            point, _, _ = move(path, point, b, step, scale, 1)
    return point, total


def _step(point: Point) -> Tensor:
    return torch.full_like(point.base[0], _STEP / point.u.shape[-1] ** 0.25)


def _above(target: Target, block: Block, proposal: Proposal, u: Tensor) -> Tensor:
    """The log of a hundredth of the importance weights of points [C, N, F]: [C, N]."""
    return proposal.log_weights_at(target, block, u, proposal.counts(1000)) - _ABOVE
