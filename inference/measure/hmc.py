r"""Hamiltonian Monte Carlo for many chains of many data points at once, each with a separate accept decision.

Along the path between a start f_0 = q_0 and the posterior, f_1 = p(x, z), with everything in unconstrained coordinates,

.. math::
    \log f_b(u) = \underbrace{\log q_0(u)}_{\text{base}} +
                  b \, \underbrace{\big( \log p(x, u) - \log q_0(u) \big)}_{\text{ratio}}

so values and gradients of the two parts at a point give every temperature b, and nothing is evaluated twice.

| symbol | meaning | shape |
| --- | --- | --- |
| C, N, F | chains, data, unconstrained features | |
| u | positions of the chains | [C, N, F] |
| v | their momenta, standard normal | [C, N, F] |
| e, S | step size of a data point, scale of its coordinates: a root of their covariance | [N], [N, F, F] |
"""

from __future__ import annotations

__all__ = ["Landscape", "Point", "move"]

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """Positions of chains, and the path's densities and gradients there.

    Attributes:
        u: coordinates, [C, N, F].
        base: log q_0, [C, N].
        ratio: log p(x, u) - log q_0, [C, N].
        base_slope: the gradient of ``base`` in u, [C, N, F].
        ratio_slope: the gradient of ``ratio`` in u, [C, N, F].
    """

    u: Tensor
    base: Tensor
    ratio: Tensor
    base_slope: Tensor
    ratio_slope: Tensor

    def log_density(self, b: float) -> Tensor:
        """Log f_b, not normalised: [C, N]."""
        return self.base + b * self.ratio

    def slope(self, b: float) -> Tensor:
        """The gradient of log f_b in u: [C, N, F]."""
        return self.base_slope + b * self.ratio_slope


Landscape = Callable[[Tensor], Point]


def move(
    landscape: Landscape, point: Point, b: float, step: Tensor, scale: Tensor, leapfrog: int
) -> tuple[Point, Tensor, Tensor]:
    r"""One transition that leaves f_b invariant: L leapfrog steps, then a decision per (chain, data point).

    .. math::
        v \leftarrow v + \tfrac{e}{2} S^\top \nabla \log f_b(u), \qquad u \leftarrow u + e S v, \qquad
        v \leftarrow v + \tfrac{e}{2} S^\top \nabla \log f_b(u)

    accepted with probability min(1, f_b(u') N(v') / (f_b(u) N(v))). The step size of each chain is sampled between
    0.5 e and 1.5 e, independently of its position, so that no orbit closes. At a non-finite density the chain stays.

    References:
        Duane, Kennedy, Pendleton and Roweth (1987), Hybrid Monte Carlo.
        Neal (2011), MCMC Using Hamiltonian Dynamics.

    Args:
        landscape: evaluates coordinates [C, N, F].
        point: the positions of the chains.
        b: the temperature, 0 to 1.
        step: e, [N].
        scale: S, [N, F, F], or its diagonal [N, F].
        leapfrog: L. Each step evaluates the landscape once.

    Returns:
        The new positions, the probability of acceptance [C, N], and whether the move was accepted [C, N].
    """
    e = (step * (0.5 + torch.rand_like(point.base))).unsqueeze(-1)  # [C, N, 1]
    start = torch.randn_like(point.u)
    v = start + e / 2 * _scaled(scale, point.slope(b), transposed=True)
    new = point
    for i in range(leapfrog):
        new = landscape(new.u + e * _scaled(scale, v))
        v = v + (e if i < leapfrog - 1 else e / 2) * _scaled(scale, new.slope(b), transposed=True)
    there = new.log_density(b)
    gain = there - point.log_density(b) + (start.square() - v.square()).sum(-1) / 2
    chance = gain.clamp_max(0.0).exp().masked_fill(~there.isfinite(), 0.0).nan_to_num(0.0)  # [C, N]
    accepted = torch.rand_like(chance) < chance
    chosen = (
        torch.where(accepted if ours.dim() == 2 else accepted.unsqueeze(-1), theirs, ours)
        for ours, theirs in zip(point, new, strict=True)
    )
    return Point(*chosen), chance, accepted


def _scaled(scale: Tensor, vector: Tensor, transposed: bool = False) -> Tensor:
    """The scale of each data point, or its transpose, times vectors [C, N, F]."""
    if scale.dim() == 2:  # diagonal
        return scale * vector
    matrix = scale.mT if transposed else scale
    product: Tensor = (matrix @ vector.unsqueeze(-1)).squeeze(-1)
    return product
