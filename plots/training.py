"""Training curves: bounds, rate and distortion against the epoch."""

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
    "validation": ("validation bound", "bound on log p(x)"),
    "rate": ("rate", "rate KL(q(z|x) ‖ p(z))"),
    "distortion": ("distortion", "distortion -E log p(x|z)"),
}
"""By the name of a history's list: the name of the curve, and the quantity on its axis."""

_BOUNDS = ("elbo", "shaped", "validation")
_MARKS = 8  # markers along a curve


@checked
@styled
def plot_training(history: History, curves: Sequence[str] = _BOUNDS, ax: Axes | None = None) -> Axes:
    """Training curves against the epoch.

    For twenty epochs or more, the y axis covers all but the first tenth of them, whose values are usually far lower.
    With early stopping, a vertical line marks the epoch whose parameters were kept.

    Args:
        history: what :func:`jensen.inference.fit` returned.
        curves: which lists of the history, among ``"elbo"``, ``"shaped"``, ``"validation"``, ``"rate"`` and
            ``"distortion"``; those that the history does not hold are left out. Rate and distortion are those of the
            validation data.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: epochs, counted from 1, to the right; nats per data point (or in all) upwards.

    Raises:
        ValueError: for unknown curves, and a history that has none of them.

    Example:
        >>> import torch
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(20, latent=4)
        >>> x = model(n=300).detach()
        >>> guide = amortize(model, mlp(20, [32]), "full-covariance", context=32)
        >>> how = {"epochs": 100, "patience": 20, "lr": 0.01, "seed": 0, "progress": False}
        >>> history = fit(model, guide, x[:100], validation=x[100:], **how)
        >>> ax = plot_training(history)
        >>> [line.get_label() for line in ax.get_lines()]
        ['training bound', 'validation bound', 'kept']
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
    quantities = list(dict.fromkeys(CURVES[name][1] for name in shown))
    what = quantities[0] if len(quantities) == 1 else ", ".join(CURVES[name][0] for name in shown)
    ax.set_ylabel(f"{what}\n({history.unit})")
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=text_size(ax))
    return ax
