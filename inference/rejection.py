r"""Exact draws from a posterior of one or two latent features, by rejection from a grid.

The line is mapped to an interval with heavy tails, u = m + s tan(pi (v - 1/2)), so that no part of it is left out. With
g the density of v, the cells of a grid over v get heights that g should not exceed; v is drawn from the heights and
kept with probability g / height. What is kept is an exact draw where the heights hold, and every proposal says whether
they do.
"""

from __future__ import annotations

__all__ = ["posterior_draws"]

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d

from .hmc import Point

_CELLS = {1: 1024, 2: 128}  # for each feature, to begin with
_SAFETY = 0.5  # nats from the largest value at the nodes of a cell and of the cells around it to its height
_AT_ONCE = 2**17  # (node, datum) pairs
_PROPOSALS = 64
_ROUNDS = 200


def posterior_draws(prior: Point, log_joint: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """One exact draw from the posterior of each datum.

    Args:
        prior: draws of the prior, a few thousand for each datum.
        log_joint: log p(x, u) at coordinates [K, N, F]: [K, N].

    Returns:
        Coordinates [1, N, F], and the share of proposals where the density stood above the height of its cell. The grid
        is refined twice to make it zero.

    Raises:
        ValueError: for more than two coordinates.
        RuntimeError: if next to nothing is kept.
    """
    features = prior.u.shape[-1]
    if features not in _CELLS:
        raise ValueError(
            f"exact draws from the posterior of given data need one or two latent coordinates, but this model has "
            f"{features}: leave data out, and they are drawn from the model together with the latents that made them"
        )
    m, s = _region(prior)

    def log_g(v: Tensor) -> tuple[Tensor, Tensor]:
        """Points [K, N or 1, F] of the box to coordinates [K, N, F], and the log-density of v there: [K, N]."""
        t = (math.pi * (v - 0.5)).tan()
        u = m + s * t
        log_density = log_joint(u.to(prior.u)).double()
        log_density = log_density + (math.pi * s * (1 + t.square())).log().sum(-1)
        return u, log_density.masked_fill(log_density.isnan(), -math.inf)

    for finer in (1, 2, 4):
        u, above = _reject(log_g, len(m), features, finer * _CELLS[features], m.device)
        if not above:
            break
    return u.to(prior.u), above


def _region(prior: Point) -> tuple[Tensor, Tensor]:
    """Where the posterior is, roughly: centre and width of its coordinates, float64 [N, F].

    Draws of the prior are weighed by the likelihood, to the largest power that leaves 50 of them.
    """
    u, log_w = prior.u.double(), prior.ratio.double().nan_to_num(-1e30, -1e30, -1e30)  # [K, N, F], [K, N]
    low, high = torch.zeros_like(log_w[0]), torch.ones_like(log_w[0])
    for _ in range(40):
        power = (low + high) / 2
        enough = 1 / (power * log_w).softmax(0).square().sum(0) >= 50
        low, high = torch.where(enough, power, low), torch.where(enough, high, power)
    w = (low * log_w).softmax(0).unsqueeze(-1)
    m = (w * u).sum(0)
    return m, (w * (u - m).square()).sum(0).sqrt().clamp_min(1e-8)


def _reject(
    log_g: Callable[[Tensor], tuple[Tensor, Tensor]], n: int, features: int, cells: int, device: torch.device
) -> tuple[Tensor, float]:
    edge = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=device)
    nodes = torch.cartesian_prod(*[edge] * features).reshape(-1, 1, features)  # [nodes, 1, F]
    values = torch.cat([log_g(part)[1] for part in nodes.split(max(1, _AT_ONCE // n))])  # [nodes, N]
    pool = max_pool1d if features == 1 else max_pool2d
    height = pool(values.T.reshape(n, 1, *[cells + 1] * features), 4, stride=1, padding=1).flatten(1) + _SAFETY
    chances = (height - height.amax(1, keepdim=True)).exp()  # [N, cells^F]
    found = values.new_zeros(1, n, features)
    missing = torch.ones(n, dtype=torch.bool, device=device)
    proposed = above = 0
    for _ in range(_ROUNDS):
        cell = chances.multinomial(_PROPOSALS, replacement=True)  # [N, P]
        corner = torch.stack([cell // cells ** (features - 1 - d) % cells for d in range(features)], -1)
        v = (corner + torch.rand(corner.shape, dtype=torch.float64, device=device)) / cells  # [N, P, F]
        u, value = log_g(v.transpose(0, 1))  # [P, N, F], [P, N]
        excess = value - height.gather(1, cell).T
        kept = torch.rand_like(excess).log() < excess
        first = kept.int().argmax(0)  # the first one kept, of each datum
        new = missing & kept.any(0)
        found[0] = torch.where(new.unsqueeze(-1), u[first, torch.arange(n, device=device)], found[0])
        missing = missing & ~new
        proposed, above = proposed + excess.numel(), above + int((excess > 0).sum())
        if not missing.any():
            return found, above / proposed
    raise RuntimeError(
        f"of {_ROUNDS * _PROPOSALS} proposals for each datum none was kept for {int(missing.sum())} data, the first at "
        f"row {int(missing.nonzero()[0])}: their posterior is too narrow for the grid, or not finite"
    )
