"""Importance-weighted bounds against the number of particles."""

from __future__ import annotations

__all__ = ["plot_bounds"]

from collections.abc import Mapping

from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import Bounds, Evidence
from jensen.results.tables import percent

from .axes import COLOURS, MARKERS, by_name, own_axes, particles_axis, styled, text_size

_FEW = 0.05  # of the data points: up to this share with a high k-hat, log p(x) is drawn like any other


@checked
@styled
def plot_bounds(
    results: Mapping[str, Bounds], ax: Axes | None = None, *, evidence: Mapping[str, Evidence] | None = None
) -> Axes:
    """Bounds on log p(x) against K, one curve for each guide, with bands of two Monte Carlo standard errors.

    Upper bounds, where the results have them, have the colour of their guide, dashes and open markers. A dashed black
    line marks the exact log p(x) where the results hold it. Where every guide has a model of its own, each has a log
    p(x) of its own: give ``evidence``, and a line in the colour of the guide marks it, dotted where the estimate is
    unreliable.

    Args:
        results: what :func:`jensen.inference.bounds` returned, by name.
        ax: where to draw; a new figure if None.
        evidence: what :func:`jensen.inference.evaluate` returned for the same data, by the names of ``results``, as in
            ``{name: row.evidence for name, row in comparison.rows.items()}``. Names that ``results`` lacks are left
            out.

    Returns:
        The axes: K to the right on a logarithmic axis, nats per data point upwards.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import bounds, simulate
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> latents, x = simulate(model, 500)
        >>> how = {"particles": 256, "latents": latents, "seed": 0, "progress": False}
        >>> results = {"prior as guide": bounds(model, PriorGuide(model), x, **how)}
        >>> ax = plot_bounds(results)
        >>> ax.get_xlabel()
        'particles K'
    """
    by_name(results, "plot_bounds", "bounds(...)")
    ax = own_axes(ax)
    for i, (name, b) in enumerate(results.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(b.particles, b.mean, color=colour, marker=marker, markersize=4, label=name)
        ax.fill_between(b.particles, b.mean - 2 * b.error, b.mean + 2 * b.error, color=colour, alpha=0.25, linewidth=0)
        if b.upper is not None and b.upper_error is not None:
            (line,) = ax.plot(b.particles, b.upper, color=colour, linestyle="--", label=f"{name}, upper bound")
            line.set(marker=marker, markersize=4, markerfacecolor="white")
            low, high = b.upper - 2 * b.upper_error, b.upper + 2 * b.upper_error
            ax.fill_between(b.particles, low, high, color=colour, alpha=0.15, linewidth=0)
    own = {name: evidence[name] for name in results if name in evidence} if evidence else {}
    exact = {b.exact for name, b in results.items() if b.exact is not None and name not in own}
    for i, value in enumerate(sorted(exact)):
        ax.axhline(value, color="black", linestyle="--", linewidth=1, label="exact log p(x)" if i == 0 else None)
    for i, name in enumerate(results):
        if name in own:
            _mark(ax, name, own[name], COLOURS[i % len(COLOURS)])
    particles_axis(ax)
    ax.set_ylabel("bound on log p(x) (nats per data point)")
    ax.legend(fontsize=text_size(ax))
    return ax


def _mark(ax: Axes, name: str, evidence: Evidence, colour: str) -> None:
    """A line at the log p(x) of one model; dotted where the estimate is unreliable."""
    label, style = f"{name}: log p(x)", "-."
    if evidence.exact is None and (evidence.unreliable or 0.0) > _FEW:
        label, style = f"{label}, k-hat > 0.7 for {percent(evidence.unreliable)}", ":"
    ax.axhline(float(evidence.best.mean()), color=colour, linestyle=style, linewidth=1, label=label)
