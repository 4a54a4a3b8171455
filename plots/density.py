"""Curves that enclose shares of the mass of samples in two dimensions, by a kernel density estimate."""

from __future__ import annotations

__all__ = ["mass_contours"]

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

_POINTS = 61  # along each side of the grid
_MOST = 10_000  # samples that the estimate rests on
_AT_ONCE = 2000


def mass_contours(ax: Axes, draws: Tensor, mass: Sequence[float], **style: Any) -> None:
    """Draw a curve for each share of the mass, from the largest, of samples [M, 2]; ``style`` goes to ``ax.contour``.

    The frame grows to hold the curves, but not the whole grid of the estimate.

    References:
        Scott (1992), Multivariate Density Estimation.
    """
    x, y, density = _smoothed(draws[:: -(-len(draws) // _MOST)])
    ordered = density.flatten().sort(descending=True).values
    enclosed = ordered.cumsum(0) / ordered.sum()
    levels = [float(ordered[int((enclosed < share).sum())]) for share in mass]
    frame = ax.dataLim.frozen()
    ax.contour(x, y, density, levels=levels, **style)
    inside = density >= levels[0]  # [y, x]
    places, heights = x[inside.any(0)], y[inside.any(1)]
    ax.dataLim.set(frame)
    ax.update_datalim([(float(edge(places)), float(edge(heights))) for edge in (torch.min, torch.max)])
    ax.autoscale_view(tight=False)


def _smoothed(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel density estimate of samples [M, 2] on a grid: the places along both sides, and the density [y, x]."""
    root = torch.linalg.cholesky(torch.cov(v.T) + 1e-12 * torch.eye(2, dtype=v.dtype)) * len(v) ** (-1 / 6)
    reach = 3 * root.square().sum(1).sqrt()
    low, high = v.amin(0) - reach, v.amax(0) + reach
    x, y = (torch.linspace(float(low[d]), float(high[d]), _POINTS, dtype=v.dtype) for d in (0, 1))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # [P^2, 2]
    white_grid, white_v = (torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (grid, v))
    density = torch.zeros(len(grid), dtype=v.dtype)
    for part in white_v.split(_AT_ONCE):
        density += (-0.5 * torch.cdist(white_grid, part).square()).exp().sum(1)  # of [P^2, M]
    return x, y, density.reshape(_POINTS, _POINTS)
