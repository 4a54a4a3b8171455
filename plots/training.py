"""How a training went, epoch by epoch."""

from __future__ import annotations

__all__ = ["plot_training"]

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jensen.checked import checked
from jensen.inference import History

from .axes import COLOURS, MARKERS, own_axes, styled, text_size

CURVES = {
    "elbo": ("training bound", "bound on log p(x)"),
    "shaped": ("objective", "bound on log p(x)"),
    "validation": ("validation ELBO", "bound on log p(x)"),
    "rate": ("rate", "rate KL(q(z|x) ‖ p(z))"),
    "distortion": ("distortion", "distortion -E log p(x|z)"),
}
"""By the names of a history's lists: what a curve is called, and what its axis measures."""

_BOUNDS = ("elbo", "shaped", "validation")
_MARKS = 8  # markers along a curve


@checked
@styled
def plot_training(history: History, curves: Sequence[str] = _BOUNDS, ax: Axes | None = None) -> Axes:
    """Curves of a training run against its epochs.

    Of a run of twenty epochs or more the frame holds all but the first tenth, which is usually far off. A vertical line
    marks the epoch whose parameters were kept, where training stopped early.

    Args:
        history: what :func:`jensen.inference.fit` returned.
        curves: which lists of the history, among ``"elbo"``, ``"shaped"``, ``"validation"``, ``"rate"`` and
            ``"distortion"``; those that the run did not write down are left out. Rate and distortion are of the
            validation data.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: epochs, counted from 1, to the right; nats per datum (or in all) upwards.

    Raises:
        ValueError: for unknown curves, and a history that has none of them.

    Example:
        >>> from jensen.inference import History
        >>> history = History(elbo=[-9.0, -4.0, -3.0], validation=[-7.0, -4.5, -3.5])
        >>> [line.get_label() for line in plot_training(history).get_lines()]
        ['training bound', 'validation ELBO']
    """
    if unknown := sorted(set(curves) - set(CURVES)):
        raise ValueError(f"curves are among {list(CURVES)}, but got {unknown}")
    columns = history.per_epoch()
    shown = [name for name in curves if name in columns]
    if not shown:
        raise ValueError(f"the history holds none of {list(curves)}: it has {[n for n in CURVES if n in columns]}")
    ax = own_axes(ax, height=2.2)
    epochs = columns["epoch"]
    marks = sorted({round(j) for j in np.linspace(0, len(epochs) - 1, _MARKS)})
    for name in shown:
        i = list(CURVES).index(name)
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3.5, "linewidth": 1.2}
        ax.plot(epochs, columns[name], markevery=marks, label=CURVES[name][0], **style)
    late = np.array([columns[name][len(epochs) // 10 if len(epochs) >= 20 else 0 :] for name in shown])
    low, high = (float(edge(late[np.isfinite(late)])) for edge in (np.min, np.max))
    margin = 0.06 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    if history.best_epoch is not None:
        ax.axvline(history.best_epoch, color="0.4", linewidth=0.8, linestyle=":", label="kept")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel(" and ".join(dict.fromkeys(CURVES[name][1] for name in shown)) + f"\n({history.unit})")
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=text_size(ax))
    return ax
