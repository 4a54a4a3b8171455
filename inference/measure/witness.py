r"""A witness for modes that no proposal knows: a few short chains annealed from the prior.

Where more than two percent of their weight ends at points whose importance weight, log p(x, u) - log q(u), lies more
than a hundred times above the mean of the estimate, the proposal q has missed a part of the posterior. The chains find
a mode that holds a fair part of the prior's draws; they prove nothing about others.
"""

from __future__ import annotations

__all__ = ["missed"]

import math
from itertools import pairwise

import torch
from torch import Tensor

from .hmc import move
from .plan import TEMPERATURES, WITNESSES
from .proposals import Proposal
from .target import Block, Target

_POWER = 3  # of the temperatures: a likelihood counts most where it begins
_STEP = 1.1  # of a move, times F^(-1/4)
_ABOVE = math.log(100)
_SHARE = 0.02


@torch.no_grad()
def missed(target: Target, block: Block, proposal: Proposal, log_mean: Tensor) -> Tensor:
    """Whether a part of the posterior is missing from the proposal of each of a block's data: bool [real].

    Args:
        target: the target.
        block: the data.
        proposal: their proposals.
        log_mean: the estimates of log p(x), [N].
    """
    path = target.path(block, target.blocks * TEMPERATURES)
    point = path(target.of_prior(WITNESSES, block))
    n, features = point.u.shape[1:]
    best = proposal.log_weights.argmax(0)
    of_mode = torch.cholesky_inverse(proposal.modes.lower[best, torch.arange(n, device=best.device)].double())
    spread = target.of_prior(32, block).double().var(0).clamp_min(1e-8)
    of_prior = spread.reciprocal().diag_embed()
    step = point.base.new_full((n,), _STEP / features**0.25)
    betas = [(t / TEMPERATURES) ** _POWER for t in range(TEMPERATURES + 1)]
    total = torch.zeros_like(point.ratio, dtype=torch.float64)
    for before, b in pairwise(betas):
        total = total + (b - before) * point.ratio.double()
        if b < 1:
            precision = torch.linalg.cholesky((1 - b) * of_prior + b * of_mode)
            scale = torch.linalg.inv(precision).mT.to(point.u)
            point, _, _ = move(path, point, b, step, scale, 1)
    joint, prior, guide = target.parts(block, point.u)
    counts = [round(1000 * share) for share in proposal.shares]
    above = joint.double() - proposal.log_density(point.u, prior, guide, counts) - log_mean
    mass = total.nan_to_num(-math.inf).softmax(0).nan_to_num(0.0)
    return ((mass * (above > _ABOVE)).sum(0) > _SHARE)[: block.real]
