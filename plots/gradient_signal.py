"""The signal-to-noise ratio of gradients against the number of particles."""

from __future__ import annotations

__all__ = ["plot_signal"]

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import GradientSignal

from .axes import COLOURS, MARKERS, by_name, numbered_log, own_axes, particles_axis, styled, text_size


@checked
@styled
def plot_signal(results: Mapping[str, Mapping[int, GradientSignal]], ax: Axes | None = None) -> Axes:
    """Draw the signal-to-noise ratio of gradients against K, a curve for each estimator, on logarithmic axes.

    A dotted line falls as 1 / sqrt(K), as the standard gradient of the importance-weighted bound does.

    Args:
        results: what :func:`jensen.inference.gradient_signal` returned for each K, by the name of the estimator.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: K to the right, the ratio upwards.

    Raises:
        ValueError: without results, and for a result without any K.
        TypeError: if they have no names.

    References:
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better.

    Example:
        >>> import torch
        >>> from jensen.inference import GradientSignal
        >>> def signal(k, mean, variance):
        ...     return GradientSignal(torch.full((3,), mean / k), torch.full((3,), variance / k), repeats=1000)
        >>> results = {
        ...     "standard": {k: signal(k, 1.0, 1.0) for k in (1, 4, 16, 64)},
        ...     "doubly reparameterized": {k: signal(k, 1.0, 0.8 / k) for k in (1, 4, 16, 64)},
        ... }
        >>> ax = plot_signal(results)
        >>> ax.get_ylabel()
        'signal-to-noise ratio of the gradient'
    """
    by_name(results, "plot_signal", "{K: gradient_signal(...)}")
    if not all(results.values()):
        raise ValueError("plot_signal needs at least one K for each of its results")
    ax = own_axes(ax)
    for i, (name, signals) in enumerate(results.items()):
        ratios = [signal.snr for signal in signals.values()]
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
        }
        ax.plot(list(signals), ratios, label=name, **style)
    counts = np.array(sorted({k for signals in results.values() for k in signals}), dtype=float)
    first = next(iter(results.values()))
    start, at = next((signal.snr, k) for k, signal in first.items())
    ax.plot(counts, start * np.sqrt(at / counts), color="grey", linestyle=":", linewidth=1, label="falls as 1/√K")
    particles_axis(ax)
    numbered_log(ax)
    ax.set_ylabel("signal-to-noise ratio of the gradient")
    ax.legend(fontsize=text_size(ax))
    return ax
