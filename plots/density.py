"""Curves that hold shares of the mass of draws in two dimensions, by a kernel density estimate."""

from __future__ import annotations

__all__ = ["mass_contours"]

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

_POINTS = 61  # along each side of the grid
_MOST = 4000  # draws that the estimate rests on


def mass_contours(ax: Axes, draws: Tensor, mass: Sequence[float], **style: Any) -> None:
    """Draw a curve for each share of the mass, from the largest, of draws [M, 2]; ``style`` goes to ``ax.contour``.

    References:
        Scott (1992), Multivariate Density Estimation.
    """
    x, y, density = _smoothed(draws[:: -(-len(draws) // _MOST)])
    ordered = density.flatten().sort(descending=True).values
    enclosed = ordered.cumsum(0) / ordered.sum()
    ax.contour(x, y, density, levels=[float(ordered[int((enclosed < share).sum())]) for share in mass], **style)


def _smoothed(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel density estimate of draws [M, 2] on a grid: the places along both sides, and the density [y, x]."""
    root = torch.linalg.cholesky(torch.cov(v.T) + 1e-12 * torch.eye(2, dtype=v.dtype)) * len(v) ** (-1 / 6)
    reach = 3 * root.square().sum(1).sqrt()
    low, high = v.amin(0) - reach, v.amax(0) + reach
    x, y = (torch.linspace(float(low[d]), float(high[d]), _POINTS, dtype=v.dtype) for d in (0, 1))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # [P^2, 2]
    far = torch.cdist(*(torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (grid, v)))  # [P^2, M]
    return x, y, (-0.5 * far.square()).exp().mean(1).reshape(_POINTS, _POINTS)
