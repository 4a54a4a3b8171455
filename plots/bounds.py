"""Importance-weighted bounds against the number of particles."""

from __future__ import annotations

__all__ = ["plot_bounds"]

from collections.abc import Mapping

from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import Bounds

from .axes import COLOURS, MARKERS, by_name, own_axes, styled, text_size


@checked
@styled
def plot_bounds(results: Mapping[str, Bounds], ax: Axes | None = None) -> Axes:
    """Bounds on log p(x) against K, one line a guide, with bands of two Monte Carlo standard errors.

    Upper bounds, where the results have them, are drawn in the colour of their guide, dashed and with open markers. A
    black line marks the exact value where the results know it.

    Args:
        results: what :func:`jensen.inference.bounds` returned, by name.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: K on a logarithmic axis, nats per datum.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> import torch
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import bounds
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> b = bounds(model, PriorGuide(model), torch.randn(20, 5), particles=64, progress=False)
        >>> plot_bounds({"prior": b}).get_xlabel()
        'particles K'
    """
    by_name(results, "plot_bounds", "bounds(...)")
    ax = own_axes(ax)
    for i, (name, b) in enumerate(results.items()):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(b.particles, b.mean, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
        ax.fill_between(b.particles, b.mean - 2 * b.error, b.mean + 2 * b.error, color=colour, alpha=0.25, linewidth=0)
        if b.upper is not None and b.upper_error is not None:
            (line,) = ax.plot(b.particles, b.upper, color=colour, linestyle="--", label=f"{name}, from above")
            line.set(marker=MARKERS[i % len(MARKERS)], markersize=4, markerfacecolor="white")
            low, high = b.upper - 2 * b.upper_error, b.upper + 2 * b.upper_error
            ax.fill_between(b.particles, low, high, color=colour, alpha=0.15, linewidth=0)
    exact = {b.exact for b in results.values() if b.exact is not None}
    for i, value in enumerate(sorted(exact)):
        ax.axhline(value, color="black", linestyle="--", linewidth=1, label="exact log p(x)" if i == 0 else None)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("particles K")
    ax.set_ylabel("bound on log p(x) (nats per datum)")
    ax.legend(fontsize=text_size(ax))
    return ax
