"""The signal-to-noise ratio of gradients against the number of particles."""

from __future__ import annotations

__all__ = ["plot_signal"]

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import GradientSignal

from .axes import COLOURS, MARKERS, by_name, own_axes, styled, text_size


@checked
@styled
def plot_signal(results: Mapping[str, Mapping[int, GradientSignal]], ax: Axes | None = None) -> Axes:
    """Draw the signal-to-noise ratio of gradients against K, a line for each kind, on logarithmic axes.

    A dotted line falls like 1 / sqrt(K), as the standard gradient of the importance-weighted bound does.

    Args:
        results: by the name of the gradient, what :func:`jensen.inference.gradient_signal` returned for each K.
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
        >>> one = torch.ones(3)
        >>> signals = {k: GradientSignal(one / k, one / k, repeats=1000) for k in (1, 4, 16)}
        >>> plot_signal({"standard": signals}).get_ylabel()
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
    ax.plot(counts, start * np.sqrt(at / counts), color="grey", linestyle=":", linewidth=1, label="like 1/√K")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("particles K")
    ax.set_ylabel("signal-to-noise ratio of the gradient")
    ax.legend(fontsize=text_size(ax))
    return ax
