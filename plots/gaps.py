"""The variational gap of each guide as bars: approximation gap and amortization gap."""

from __future__ import annotations

__all__ = ["plot_gaps"]

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from jensen.checked import checked
from jensen.inference import Gaps
from jensen.results.tables import with_error

from .axes import COLOURS, by_name, own_axes, styled, text_size

_ROOM = 1.55  # the width of the frame, in that of the longest bar with its whisker: for the numbers


@checked
@styled
def plot_gaps(results: Mapping[str, Gaps | None], ax: Axes | None = None) -> Axes:
    """Stacked bars, one for each guide: approximation gap, then amortization gap; whiskers are two standard errors.

    The whisker at the boundary is that of the approximation gap, the one at the end that of the whole gap, both over
    the data. The number beside a bar is the whole gap with its standard error, so that small bars can be read too.

    Args:
        results: what :func:`jensen.inference.gaps` returned, by name, from the top; None is left out.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: nats per data point to the right, one row for each guide.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> import torch
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit, gaps
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model, results = PPCA(5, latent=3), {}
        >>> x = model(n=200).detach()
        >>> for family in ("mean-field", "full-covariance"):
        ...     guide = amortize(model, mlp(5, [16]), family, context=16)
        ...     history = fit(model, guide, x, freeze=model, epochs=30, lr=0.01, seed=0, progress=False)
        ...     results[family] = gaps(model, guide, x[:40], particles=50, seed=0, progress=False)
        >>> ax = plot_gaps(results)
        >>> ax.get_xlabel()
        'log p(x) - ELBO (nats per data point)'
    """
    by_name(results, "plot_gaps", "gaps(...)")
    shown = {name: result for name, result in results.items() if result is not None}
    if not shown:
        raise ValueError("results are all None: plot_gaps needs at least one that is not")
    ax = own_axes(ax, height=1.1 + 0.35 * len(shown))
    summaries = [result.summary() for result in shown.values()]
    columns = ("approximation", "amortization", "gap", "approximation_data_error", "gap_data_error")
    value = {name: np.nan_to_num(np.array([summary[name] for summary in summaries], dtype=float)) for name in columns}
    y = np.arange(len(shown))
    own, rest = value["approximation"], value["amortization"]
    for width, left, colour, label in (
        (own, 0.0, COLOURS[0], "approximation gap (family)"),
        (rest, own, COLOURS[4], "amortization gap (encoder)"),
    ):  # an edge in the same colour, so that a bar close to zero is a line
        ax.barh(y, width, left=left, height=0.7, color=colour, edgecolor=colour, linewidth=1.2, label=label)
    halo = [withStroke(linewidth=2.6, foreground="white")]  # whiskers can be seen on bars of any colour
    for name, at in (("approximation", y - 0.14), ("gap", y + 0.14)):
        error = 2 * value[f"{name}_data_error"]
        style: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1, "capsize": 2}
        _, caps, whiskers = ax.errorbar(value[name], at, xerr=error, **style)
        for artist in (*caps, *whiskers):
            artist.set_path_effects(halo)
    ends = np.maximum(value["gap"] + 2 * value["gap_data_error"], own + 2 * value["approximation_data_error"])
    for row, end, gap, error in zip(y, ends, value["gap"], value["gap_data_error"], strict=True):
        text = with_error(gap, error) if error > 0 else f"{gap:.2f}"
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text.replace("-", "\N{MINUS SIGN}"), (max(end, 0.0), row), fontsize=text_size(ax), **place)
    left, right = ax.get_xlim()
    right = max(right, _ROOM * float(max(ends.max(), 0.0)))
    ax.set_xlim(min(left, -0.02 * right), right)  # bars begin beside the frame
    ax.set_yticks(y, labels=list(shown))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(shown) + 0.65, -0.5)  # from the top, with room for the legend below the bars
    ax.axvline(0, color="black", linewidth=0.8, zorder=0)
    ax.set_xlabel("log p(x) - ELBO (nats per data point)")
    ax.legend(fontsize=text_size(ax), loc="lower right")
    return ax
