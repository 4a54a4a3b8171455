r"""Exact samples from a posterior with one or two latent features, by rejection sampling on a grid.

The line is mapped to an interval with heavy tails, u = m + s tan(pi (v - 1/2)), so that all of it is covered. With
g the density of v, the cells of a grid over v get heights that should be above g; v is sampled from the heights and
kept with probability g / height. Kept values are exact samples if the heights are above g, and every proposal tests
this. If a posterior is narrow relative to the cells, centre and scale are computed again from the grid until 50 nodes
are in its bulk.
"""

from __future__ import annotations

__all__ = ["Rejected", "posterior_draws"]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d

from ..measure.hmc import Point

_CELLS = {1: 1024, 2: 128}  # initial number for each feature
_SAFETY = 0.5  # nats from the largest value at the nodes of a cell and of the cells around it to its height
_AT_ONCE = 2**17  # (node, data point) combinations
_PROPOSALS = 64
_ROUNDS = 200
_ENOUGH = 50.0  # nodes in the bulk of a posterior that a grid resolves
_ZOOMS = 12


class Rejected(NamedTuple):
    """Exact samples, and the statistics of the proposals.

    Attributes:
        u: coordinates, [S, N, F].
        above: the share of proposals where the density was above the height of its cell, float64 [N].
        kept: the share of proposals that were kept, [N].
    """

    u: Tensor
    above: Tensor
    kept: Tensor


def posterior_draws(prior: Point, log_joint: Callable[[Tensor], Tensor], draws: int = 1) -> Rejected:
    """Exact samples from the posterior of each data point.

    Args:
        prior: samples of the prior, a few thousand for each data point.
        log_joint: log p(x, u) at coordinates [K, N, F]: [K, N].
        draws: the number S of samples for each data point.

    Returns:
        The :class:`Rejected`. The grid is refined up to twice to make ``above`` zero.

    Raises:
        ValueError: for more than two coordinates.
        RuntimeError: if almost no proposal is kept.
    """
    features = prior.u.shape[-1]
    if features not in _CELLS:
        raise ValueError(
            f"exact samples from the posterior of given data need one or two latent coordinates, but this model has "
            f"{features}: omit data; then they are sampled from the model together with their latents"
        )
    m, s = _region(prior)  # [N, F] each

    def log_g(v: Tensor) -> tuple[Tensor, Tensor]:
        """Points [K, N or 1, F] of the box to coordinates [K, N, F], and the log-density of v there: [K, N]."""
        t = (math.pi * (v - 0.5)).tan()
        u = m + s * t
        log_density = log_joint(u.to(prior.u)).double()
        log_density = log_density + (math.pi * s * (1 + t.square())).log().sum(-1)
        return u, log_density.masked_fill(log_density.isnan(), -math.inf)

    nodes = _nodes(_CELLS[features], features, m.device)
    for _ in range(_ZOOMS):
        values = _over(log_g, nodes, len(m))
        coarse = _size(values) < _ENOUGH  # [N]
        if not coarse.any():
            break
        places = m + s * (math.pi * (nodes - 0.5)).tan()  # [nodes, N, F]
        closer = _bulk(places.nan_to_num(), values)
        m, s = (torch.where(coarse.unsqueeze(-1), new, old) for new, old in zip(closer, (m, s), strict=True))
    for finer in (1, 2, 4):
        sample = _reject(log_g, len(m), features, draws, finer * _CELLS[features], m.device)
        if not sample.above.any():
            break
    return sample._replace(u=sample.u.to(prior.u))


def _nodes(cells: int, features: int, device: torch.device) -> Tensor:
    """The corners of the cells of the box, [nodes, 1, F]."""
    edge = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=device)
    return torch.cartesian_prod(*[edge] * features).reshape(-1, 1, features)


def _over(log_g: Callable[[Tensor], tuple[Tensor, Tensor]], nodes: Tensor, n: int) -> Tensor:
    """The log-density at all nodes, [nodes, N]."""
    return torch.cat([log_g(part)[1] for part in nodes.split(max(1, _AT_ONCE // n))])


def _size(log_w: Tensor) -> Tensor:
    """The effective number of equal weights: [N]."""
    return 1 / log_w.softmax(0).square().sum(0)


def _region(prior: Point) -> tuple[Tensor, Tensor]:
    """The approximate location of the posterior: centre and width of its coordinates, float64 [N, F]."""
    return _bulk(prior.u.double(), prior.ratio.double())


def _bulk(u: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and width of points [K, N, F] with log weights [K, N], to the largest power that leaves 50 of them."""
    log_w = log_w.nan_to_num(-1e30, -1e30, -1e30)
    low, high = torch.zeros_like(log_w[0]), torch.ones_like(log_w[0])
    for _ in range(40):
        power = (low + high) / 2
        enough = _size(power * log_w) >= _ENOUGH
        low, high = torch.where(enough, power, low), torch.where(enough, high, power)
    w = (low * log_w).softmax(0).unsqueeze(-1)
    m = (w * u).sum(0)
    return m, (w * (u - m).square()).sum(0).sqrt().clamp_min(1e-8)


def _reject(
    log_g: Callable[[Tensor], tuple[Tensor, Tensor]],
    n: int,
    features: int,
    draws: int,
    cells: int,
    device: torch.device,
) -> Rejected:
    values = _over(log_g, _nodes(cells, features, device), n)  # [nodes, N]
    pool = max_pool1d if features == 1 else max_pool2d
    height = pool(values.T.reshape(n, 1, *[cells + 1] * features), 4, stride=1, padding=1).flatten(1) + _SAFETY
    chances = (height - height.amax(1, keepdim=True)).exp()  # [N, cells^F]
    accepted = values.new_zeros(draws, n, features)
    count = torch.zeros(n, dtype=torch.long, device=device)
    per_round = max(_PROPOSALS, draws)
    tried, above = 0, torch.zeros_like(count)
    for _ in range(_ROUNDS):
        cell = chances.multinomial(per_round, replacement=True)  # [N, P]
        corner = torch.stack([cell // cells ** (features - 1 - d) % cells for d in range(features)], -1)
        v = (corner + torch.rand(corner.shape, dtype=torch.float64, device=device)) / cells  # [N, P, F]
        u, value = log_g(v.transpose(0, 1))  # [P, N, F], [P, N]
        excess = value - height.gather(1, cell).T
        kept = torch.rand_like(excess).log() < excess
        place = count + kept.cumsum(0) - 1  # among the samples of its data point
        proposal, datum = (kept & (place < draws)).nonzero(as_tuple=True)
        accepted[place[proposal, datum], datum] = u[proposal, datum]
        count += kept.sum(0)
        tried, above = tried + per_round, above + (excess > 0).sum(0)
        if (count >= draws).all():
            return Rejected(accepted, above.double() / tried, count / tried)
    raise RuntimeError(
        f"of {tried} proposals for each data point fewer than {draws} were kept for {int((count < draws).sum())} of "
        f"the data, the first at row {int((count < draws).nonzero()[0])}: their posterior is too narrow for the grid, "
        "or not finite"
    )
