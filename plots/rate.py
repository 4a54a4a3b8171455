"""Rate against distortion, for a sweep of beta or of guides."""

from __future__ import annotations

__all__ = ["plot_rate_distortion"]

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from jensen.checked import checked
from jensen.inference import RateDistortion

from .axes import COLOURS, by_name, own_axes, styled, text_size

_AWAY = 4  # points between a name and its point
_CORNERS = tuple(np.array(corner) for corner in ((1, 1), (-1, -1), (1, -1), (-1, 1)))


@checked
@styled
def plot_rate_distortion(results: Mapping[str, RateDistortion], ax: Axes | None = None) -> Axes:
    """Rate and distortion, one point for each result, with dotted lines of equal ELBO.

    Whiskers are two standard errors over the data.

    Args:
        results: what :func:`jensen.inference.rate_distortion` returned, by name, in the order of the sweep.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: rate to the right, distortion upwards, both in bits per data point.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import rate_distortion
        >>> from jensen.models import PPCA
        >>> data, results = load("digits"), {}
        >>> for latent in (1, 2, 4, 8, 16):
        ...     model = PPCA(64, latent).fit_closed_form(data.train)
        ...     how = {"particles": 20, "seed": 0, "progress": False}
        ...     results[f"D = {latent}"] = rate_distortion(model, ExactPosterior(model), data.test, **how)
        >>> ax = plot_rate_distortion(results)
        >>> ax.get_xlabel()
        'rate KL(q(z|x) ‖ p(z)) (bits per data point)'
    """
    by_name(results, "plot_rate_distortion", "rate_distortion(...)")
    ax = own_axes(ax)
    summaries = [result.summary() for result in results.values()]
    rate, distortion = (np.array([s[name] for s in summaries]) for name in ("rate", "distortion"))
    ax.plot(rate, distortion, color=COLOURS[0], linewidth=1, zorder=1)
    for s in summaries:
        across, up = (2 * np.nan_to_num(s[f"{axis}_data_error"]) for axis in ("rate", "distortion"))
        ax.errorbar(s["rate"], s["distortion"], up, across, fmt="o", color=COLOURS[0], markersize=4, elinewidth=1)
    ax.margins(0.2)
    view = ax.axis()
    _name_points(ax, list(results), rate, distortion)
    for total in np.unique(np.round(rate + distortion, 6)):  # -ELBO is constant along these
        ax.axline((0, total), slope=-1, color="grey", linewidth=0.6, linestyle=":", zorder=0)
    ax.axis(view)
    ax.set_xlim(left=max(view[0], 0.0))
    ax.set_xlabel("rate KL(q(z|x) ‖ p(z)) (bits per data point)")
    ax.set_ylabel("distortion -E log p(x|z)\n(bits per data point)")
    return ax


def _name_points(ax: Axes, names: Sequence[str], rate: NDArray[np.float64], distortion: NDArray[np.float64]) -> None:
    """Write each name beside its point: above at the right, or at the first other corner where it covers no name."""
    size = text_size(ax)
    inches = ax.figure.figure.get_size_inches() * 0.7  # of the axes, about
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    places = np.stack([(rate - left) / (right - left), (distortion - low) / (high - low)], 1) * inches * 72  # points
    taken: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for name, at, x, y in zip(names, places, rate, distortion, strict=True):
        extent = np.array([0.6 * size * len(name), 1.2 * size])
        boxes = [(corner, at + corner * (_AWAY + extent / 2)) for corner in _CORNERS]  # with their centres
        free = [
            (corner, centre)
            for corner, centre in boxes
            if not any((abs(centre - other) < (extent + width) / 2).all() for other, width in taken)
        ]
        corner, centre = (free or boxes)[0]
        taken.append((centre, extent))
        ax.annotate(
            name,
            (x, y),
            xytext=tuple(_AWAY * corner),
            textcoords="offset points",
            ha="left" if corner[0] > 0 else "right",
            va="bottom" if corner[1] > 0 else "top",
            fontsize=size,
        )
