"""Samples of the posterior of several data points, and those of a guide over them: one panel for each data point."""

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
_SHOWN = 1000  # samples of the posterior in a panel
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
    """Posterior samples of each data point as points, and curves that enclose 50 and 90 % of a guide's mass.

    The latents are shown in their unconstrained coordinates: two as they are, one as histograms. Of more than two, in
    units in which the posterior has unit covariance, the panel shows two directions: the one in which the guide's mean
    is off, and, orthogonal to it, the one in which the guide's scale differs most from that of the posterior. Without a
    guide it shows the two principal directions of the posterior. Even two equal distributions seem to differ by about
    sqrt(F / ESS). The curves are those of a kernel density estimate of the guide's samples, with Scott's bandwidth,
    which widens it a little.

    References:
        Scott (1992), Multivariate Density Estimation.

    Args:
        posterior: what :func:`~jensen.inference.mcmc_posterior` returned.
        guide: a guide of the same model; None shows the posterior alone.
        draws: how many samples of the guide the curves are estimated from.
        columns: panels per row, in a new figure: two are as wide as a column of a paper, four as its page.
        titles: above the panels, one for each data point; its number if None.
        seed: makes the samples repeatable and leaves the global random stream alone; None samples from that stream.
        axes: where to draw, one for each data point; a new figure if None.

    Returns:
        The axes, one for each data point.

    Raises:
        ValueError: if there is not one title, or one of the axes, for each data point, and on what
            :meth:`~jensen.inference.PosteriorDraws.distance` names.

    Example:
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit, mcmc_posterior
        >>> from jensen.models import Banana
        >>> from jensen.networks import mlp
        >>> model, x = Banana(), torch.tensor([[-1.0], [2.0]])
        >>> guide = amortize(model, mlp(1, [16]), "full-covariance", context=16)
        >>> history = fit(model, guide, model(n=500).detach(), epochs=40, lr=0.02, seed=0, progress=False)
        >>> posterior = mcmc_posterior(model, x, method="rejection", seed=0, progress=False)
        >>> axes = plot_draws(posterior, guide, seed=0)
        >>> len(axes)
        2
    """
    n, _, features = posterior.unconstrained.shape
    for name, given in (("titles", titles), ("axes", axes)):
        if given is not None and len(given) != n:
            raise ValueError(f"{name} needs one for each of the {n} data points, but got {len(given)}")
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
        ax.set_title(f"data point {i}" if titles is None else titles[i], fontsize=large)
    handles = [Line2D([], [], linestyle="", marker="o", markersize=4, color=COLOURS[0], label="posterior")]
    handles += [Line2D([], [], color=COLOURS[1], label="guide, 50 and 90 %")] * (guide is not None)
    if figure is None:
        axes[0].legend(handles=handles, fontsize=0.85 * small)
    else:
        figure.legend(handles=handles, fontsize=small, loc="outside upper center", ncols=2, frameon=False)
    return list(axes)


def _flat(u: Tensor, v: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor | None, Sequence[str]]:
    """Two coordinates of samples [S, F] and [M, F], and what they are called."""
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
