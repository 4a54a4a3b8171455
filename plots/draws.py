"""Draws from the posterior of several data, and a guide's draws over them: one picture for each datum."""

from __future__ import annotations

__all__ = ["plot_draws"]

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from jensen.checked import checked
from jensen.inference import PosteriorDraws

from .axes import COLOURS, WIDTH, at_least_one, own_figure, styled, text_size
from .density import mass_contours

_MASS = (0.9, 0.5)
_SHOWN = 1000  # draws of the posterior in a picture
_PANEL = 1.7  # inches: two in a column of a paper


@checked
@styled
def plot_draws(
    posterior: PosteriorDraws,
    guide: Callable[..., Any] | None = None,
    *,
    draws: int = 2000,
    columns: int = 2,
    titles: Sequence[str] | None = None,
    seed: int | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Posterior draws of each datum as points, and curves that hold 50 and 90 % of a guide's mass.

    The latents are shown in their unconstrained coordinates: two as they are, one as histograms. Of more, in units in
    which the posterior has unit covariance, the picture shows the direction in which the guide's mean is off, and
    across it the one in which the guide's scale is most unlike the posterior's; without a guide, the two principal
    directions of the posterior. Draws that agree look off by about sqrt(F / ESS) all the same. The curves are those of
    a kernel density estimate of the guide's draws, with Scott's bandwidth, which widens it a little.

    References:
        Scott (1992), Multivariate Density Estimation.

    Args:
        posterior: what :func:`~jensen.inference.mcmc_posterior` returned.
        guide: a guide of the same model; None shows the posterior alone.
        draws: how many draws of the guide the curves rest on.
        columns: pictures per row, in a new figure: two fill a column of a paper, four its page.
        titles: above the pictures, one for each datum; its number if None.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        axes: where to draw, one for each datum; a new figure if None.

    Returns:
        The axes, one for each datum.

    Raises:
        ValueError: for titles or axes that are not one for each datum, and on what
            :meth:`~jensen.inference.PosteriorDraws.distance` names.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import mcmc_posterior
        >>> from jensen.models import Ring
        >>> model = Ring()
        >>> posterior = mcmc_posterior(model, torch.tensor([[1.0], [4.0]]), method="rejection", progress=False)
        >>> len(plot_draws(posterior, PriorGuide(model), draws=500))
        2
    """
    n, _, features = posterior.unconstrained.shape
    for name, given in (("titles", titles), ("axes", axes)):
        if given is not None and len(given) != n:
            raise ValueError(f"{name} needs one for each of the {n} data, but got {len(given)}")
    of_guide = None if guide is None else posterior.guide_draws(guide, draws, seed=seed).double()
    figure = None
    if axes is None:
        columns = min(at_least_one(columns), n)
        rows = math.ceil(n / columns)
        figure = own_figure(max(WIDTH, _PANEL * columns), 0.3 + _PANEL * rows)
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    small, large = text_size(axes[0]), text_size(axes[0], 1.0)
    for i, ax in enumerate(axes):
        u = posterior.unconstrained[i].double()  # [S, F]
        v = None if of_guide is None else of_guide[i]
        if features == 1:
            _histograms(ax, u, v)
            ax.set_xlabel(posterior.names[0])
        else:
            u, v, labels = _flat(u, v, posterior.names)
            _clouds(ax, u, v)
            ax.set_aspect("equal", adjustable="box" if figure is None else "datalim")
            ax.set_xlabel(labels[0])
            ax.set_ylabel(labels[1] if i == 0 else "")
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_fontsize(small)
        ax.set_title(f"datum {i}" if titles is None else titles[i], fontsize=large)
    handles = [Line2D([], [], linestyle="", marker="o", markersize=4, color=COLOURS[0], label="posterior")]
    handles += [Line2D([], [], color=COLOURS[1], label="guide, 50 and 90 %")] * (guide is not None)
    if figure is None:
        axes[0].legend(handles=handles, fontsize=0.85 * small)
    else:
        figure.legend(handles=handles, fontsize=small, loc="outside upper center", ncols=2, frameon=False)
    return list(axes)


def _flat(u: Tensor, v: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor | None, Sequence[str]]:
    """Two coordinates of draws [S, F] and [M, F], and what they are called."""
    if u.shape[1] == 2:
        return u, v, names
    away, covariance = u - u.mean(0), torch.cov(u.T)
    if v is None:
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :2]
        return away @ directions, None, ("1st principal direction", "2nd principal direction")
    root = torch.linalg.cholesky(covariance)
    white_u, white_v = (torch.linalg.solve_triangular(root, w.T, upper=False).T for w in (away, v - u.mean(0)))
    along = white_v.mean(0, keepdim=True)
    across = torch.linalg.svd(along).Vh[1:]  # [F - 1, F], orthogonal to it
    scales, turned = torch.linalg.eigh(across @ torch.cov(white_v.T) @ across.T)
    most = turned[:, scales.clamp_min(1e-12).log().abs().argmax()]
    directions = torch.stack([along[0] / along.norm(), most @ across], 1)  # [F, 2]
    return white_u @ directions, white_v @ directions, ("along the mean's error (sd)", "across it (sd)")


def _histograms(ax: Axes, u: Tensor, v: Tensor | None) -> None:
    every = u if v is None else torch.cat([u, v])
    edges = torch.linspace(float(every.min()), float(every.max()), 41).tolist()
    ax.hist(u[:, 0], edges, density=True, color=COLOURS[0], alpha=0.5)
    if v is not None:
        ax.hist(v[:, 0], edges, density=True, histtype="step", color=COLOURS[1])


def _clouds(ax: Axes, u: Tensor, v: Tensor | None) -> None:
    shown = u[:: math.ceil(len(u) / _SHOWN)]
    ax.scatter(shown[:, 0], shown[:, 1], s=3, color=COLOURS[0], alpha=0.4, linewidths=0)
    if v is not None:
        mass_contours(ax, v, _MASS, colors=COLOURS[1], linewidths=1.2)
