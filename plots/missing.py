"""The pattern of missing values: which features are missing in which rows, and how often."""

from __future__ import annotations

__all__ = ["plot_missing"]

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from jensen.checked import checked

from .axes import own_axes, styled, text_size
from .images import HOLE

_OBSERVED = "0.35"
_ROWS = 0.72  # of the height, for the rows; the shares are above them
_LINES = 400  # of the figure: more rows share a line, which has the colour of their mean
_NAMED = 30  # characters that fit below the axis, or names if they are rotated
_LONGEST = 16  # characters of a name


@checked
@styled
def plot_missing(x: Tensor, *, columns: Sequence[str] = (), title: str | None = None, ax: Axes | None = None) -> Axes:
    """Missing values (NaN) of a table: rows sorted by pattern, and above them the share that each feature misses.

    Rows with fewer missing values come first; rows with the same pattern are together. A line of the figure stands for
    several rows if there are many of them, and its colour for the share of them in which the feature is missing.

    Args:
        x: data [N, ...], with NaN where a value is missing; images are flattened.
        columns: the name of each feature; empty shows their numbers.
        title: above the figure; if None, the share of all values that are missing, and the number of patterns.
        ax: where to draw; a new figure if None. Its upper part is used for the shares.

    Returns:
        The axes of the rows. Those of the shares are ``ax.child_axes[0]``.

    Raises:
        ValueError: for data without rows or features, or ``columns`` of another length.

    Example:
        >>> import torch
        >>> from jensen.datasets import load
        >>> x = load("digits").train[:, 18:26]
        >>> hidden = torch.rand(x.shape) < torch.linspace(0.0, 0.5, 8)
        >>> ax = plot_missing(x.masked_fill(hidden, torch.nan), columns=[f"pixel {i}" for i in range(18, 26)])
        >>> ax.get_ylabel()
        'rows, sorted by pattern'
    """
    if x.dim() < 1 or not x.numel():
        raise ValueError(f"plot_missing needs data x [N, X] with at least one row and feature, but got {list(x.shape)}")
    holes = x.detach().isnan().reshape(len(x), -1).cpu()  # [N, X]
    N, X = holes.shape
    if columns and len(columns) != X:
        raise ValueError(f"columns needs a name for each of the {X} features, but has {len(columns)}")
    patterns, counts = holes.unique(dim=0, return_counts=True)  # sorted
    order = patterns.sum(1).argsort(stable=True)
    rows = patterns[order].repeat_interleave(counts[order], 0)
    ax = own_axes(ax, height=3.0)
    colours = LinearSegmentedColormap.from_list("holes", [_OBSERVED, HOLE])
    place: Any = {"extent": (-0.5, X - 0.5, N, 0), "aspect": "auto", "interpolation": "nearest"}
    ax.imshow(_lines(rows).numpy(), cmap=colours, vmin=0, vmax=1, **place)
    ax.set_ylim(N, N - N / _ROWS)  # with room for the shares
    ax.set_yticks([tick for tick in MaxNLocator(5, integer=True).tick_values(0, N) if 0 <= tick <= N])
    ax.spines["left"].set_bounds(N, 0)
    ax.set_ylabel("rows, sorted by pattern", y=_ROWS / 2)
    _name_features(ax, columns, X)
    ax.legend(
        handles=[Patch(color=_OBSERVED, label="observed"), Patch(color=HOLE, label="missing")],
        loc="upper left",
        bbox_to_anchor=(1.0, _ROWS),
        fontsize=text_size(ax),
    )
    above = ax.inset_axes((0, _ROWS + 0.06, 1, 0.94 - _ROWS), sharex=ax)
    share = (100 * holes.double().mean(0)).numpy()
    above.bar(range(X), share, width=0.8 if X <= _NAMED else 1.0, color=HOLE, linewidth=0)
    above.tick_params(labelbottom=False, bottom=False)
    above.set_ylim(0, max(5.0, 1.05 * float(share.max())))
    above.set_ylabel("missing (%)")
    ax.set_title(title or _summary(float(share.mean()), len(patterns)), fontsize=text_size(ax, 1.0))
    return ax


def _lines(rows: Tensor) -> Tensor:
    """The share of missing values in at most so many groups of successive rows: [L, X]."""
    N = len(rows)
    line = torch.arange(N) * min(N, _LINES) // N
    counts = line.bincount()
    return (
        rows.new_zeros(len(counts), rows.shape[1], dtype=torch.float).index_add(0, line, rows.float()) / counts[:, None]
    )


def _name_features(ax: Axes, columns: Sequence[str], features: int) -> None:
    if not columns or features > _NAMED:
        ax.set_xlabel("feature")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return
    short = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..." for name in columns]
    wide = max(map(len, short)) * features > _NAMED
    ax.set_xticks(range(features), labels=short, rotation=90 if wide else 0)


def _summary(share: float, patterns: int) -> str:
    return f"{share:.3g} % missing, {patterns} pattern{'s' * (patterns != 1)}"
