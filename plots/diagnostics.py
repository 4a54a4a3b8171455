"""How reliable an estimate is for each data point: Pareto k-hat and effective sample sizes, ranked."""

from __future__ import annotations

__all__ = ["plot_ess", "plot_pareto_k"]

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from jensen.checked import checked
from jensen.inference import Evidence

from .axes import COLOURS, MARKERS, by_name, numbered_log, own_axes, styled, text_size

_MARKS = 8  # markers along a curve


@checked
@styled
def plot_pareto_k(results: Mapping[str, Evidence], ax: Axes | None = None) -> Axes:
    r"""Pareto k-hat of the data points, ranked, one curve for each guide, with the limits of reliability.

    .. math:: \hat{k} < \min\left(1 - \frac{1}{\log_{10} K}, \; 0.7\right)

    Below this limit the estimate of log p(x) and its error are usually reliable with K samples; below 0.5 the weights
    also have finite variance. The legend gives the share of the data points above the limit. A triangle at the upper
    edge is an infinite k-hat. Refined estimates have curves of their own, with their number of samples as K. A small
    k-hat does not show that the guide reaches every region of the posterior.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.

    Args:
        results: what :func:`jensen.inference.evaluate` returned, by name.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: data points in per cent to the right, from the best to the worst; k-hat upwards.

    Raises:
        ValueError: without results, and for K below 25, where there is no k-hat.
        TypeError: if they have no names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> data, results = load("digits"), {}
        >>> for latent in (1, 2, 3):
        ...     model = PPCA(64, latent).fit_closed_form(data.train)
        ...     how = {"particles": 500, "refine": False, "seed": 0, "progress": False}
        ...     results[f"D = {latent}"] = evaluate(model, PriorGuide(model), data.test[:100], **how)
        >>> ax = plot_pareto_k(results)
        >>> ax.get_ylabel()
        'Pareto k-hat of the weights'
    """
    by_name(results, "plot_pareto_k", "evaluate(...)")
    few = {name: evidence.particles for name, evidence in results.items() if evidence.particles < 25}
    if few:
        raise ValueError(f"k-hat takes at least 25 particles, but results have {few}: evaluate with more")
    ax = own_axes(ax)
    curves = _curves(results)
    for i, (name, pareto_k, _, draws) in enumerate(curves):
        k = pareto_k.nan_to_num(math.inf, math.inf)
        limit = _limit(draws)
        above = 100 * float((k >= limit).double().mean())
        x, y = _ranked(k)
        endless = np.isinf(y)
        _curve(ax, i, x, np.where(endless, np.nan, y), f"{name}: {above:.0f} % above {limit:.2g}")
        if endless.any():
            edge = ax.get_xaxis_transform()
            colour = COLOURS[i % len(COLOURS)]
            ax.scatter(
                x[endless], np.ones(endless.sum()), s=12, marker="^", color=colour, transform=edge, clip_on=False
            )
    _draw_limits(ax, {draws for *_, draws in curves})
    return _finish(ax, "Pareto k-hat of the weights")


@checked
@styled
def plot_ess(results: Mapping[str, Evidence], ax: Axes | None = None) -> Axes:
    r"""Effective sample sizes of the data points, ranked, one curve for each guide, and the K samples of each.

    .. math:: \text{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}

    The estimate is as good as one from so many independent samples of the posterior. It is 1 where one weight
    dominates, and it is meaningless where k-hat is above its limit. Refined estimates have curves of their own.

    References:
        Kong (1992), A Note on Importance Sampling Using Standardized Weights.

    Args:
        results: what :func:`jensen.inference.evaluate` returned, by name.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: data points in per cent to the right, from the best to the worst; samples upwards, on a logarithmic
            axis.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> data, results = load("digits"), {}
        >>> for latent in (1, 2, 3):
        ...     model = PPCA(64, latent).fit_closed_form(data.train)
        ...     how = {"particles": 500, "refine": False, "seed": 0, "progress": False}
        ...     results[f"D = {latent}"] = evaluate(model, PriorGuide(model), data.test[:100], **how)
        >>> ax = plot_ess(results)
        >>> ax.get_ylabel()
        'effective sample size (samples)'
    """
    by_name(results, "plot_ess", "evaluate(...)")
    ax = own_axes(ax)
    curves = _curves(results)
    for i, (name, _, ess, _) in enumerate(curves):
        x, y = _ranked(-ess)
        _curve(ax, i, x, -y, f"{name}: mean {float(ess.mean()):.3g}")
    for particles in sorted({draws for *_, draws in curves}):
        ax.axhline(particles, color="0.4", linewidth=0.8, linestyle="--", zorder=0, label=f"K = {particles}")
    numbered_log(ax)
    return _finish(ax, "effective sample size (samples)")


def _curves(results: Mapping[str, Evidence]) -> list[tuple[str, Tensor, Tensor, int]]:
    """Name, k-hat, effective sample size and number of samples of each guide, and of each refined estimate, once."""
    curves: list[tuple[str, Tensor, Tensor, int]] = []
    refined: list[tuple[str, Tensor, Tensor, int]] = []
    for name, evidence in results.items():
        own = evidence.by_guide or evidence
        curves.append((name, own.pareto_k, own.ess, own.particles))
        known = any(torch.equal(evidence.pareto_k, k) for _, k, _, _ in refined)  # of guides that share a model
        if evidence.by_guide is not None and evidence.draws is not None and not known:
            refined.append((f"{name}, refined", evidence.pareto_k, evidence.ess, int(evidence.draws.min())))
    return curves + refined


def _limit(particles: int) -> float:
    """The largest k-hat at which an estimate from so many samples is reliable."""
    return min(1 - 1 / math.log10(particles), 0.7)


def _ranked(values: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The places of ranked data points in per cent, each in the middle of its share, and the values, ascending: [N]."""
    n = len(values)
    return 100 * (np.arange(n) + 0.5) / n, values.cpu().double().sort().values.numpy()


def _curve(ax: Axes, i: int, x: NDArray[np.float64], y: NDArray[np.float64], label: str) -> None:
    """The i-th curve, with markers at equal distances."""
    marks = [] if len(x) < 2 else sorted({round(j) for j in np.linspace(0, len(x) - 1, _MARKS)})
    style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
    ax.plot(x, y, linewidth=1.2, markevery=marks or None, label=label, **style)


def _draw_limits(ax: Axes, particles: set[int]) -> None:
    limits = {0.5: (":", "0.5"), 0.7: ("-", "0.7")}
    for k in sorted(particles):
        if _limit(k) < 0.7:
            limits[_limit(k)] = ("--", f"{_limit(k):.2f}, for K = {k}")
    for limit, (dashes, label) in sorted(limits.items()):
        ax.axhline(limit, color="0.4", linewidth=0.8, linestyle=dashes, zorder=0, label=label)


def _finish(ax: Axes, label: str) -> Axes:
    ax.set_xlim(0, 100)
    ax.set_xlabel("data points, from the best to the worst (%)")
    ax.set_ylabel(label)
    ax.legend(fontsize=text_size(ax))
    return ax
