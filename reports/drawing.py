"""Figures of results as SVG inside a page: in the page's colours, with marks that a pointer finds."""

from __future__ import annotations

__all__ = ["PANEL", "drawn", "gap_bars", "panel"]

import hashlib
import io
import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.legend import Legend
from torch import Tensor

from jensen.plots.axes import COLOURS, MARKERS, numbered_log, own_axes, styled
from jensen.results.tables import decimals, digits_of

from .page import Figure

_SCALE = 1.6  # pixels of the screen for a pixel of the figure, at most
_INK = re.compile(r"(?<=[:\"\s])#([0-5][0-9a-f])\1\1(?=[;\"])")  # black and dark greys
PANEL = 1000
"""The most points of a series in a panel."""


def drawn(ax: Axes | Canvas, caption: str = "", points: Sequence[int] = ()) -> Figure:
    """The SVG of a figure, black made the colour of the page's text, as a block of a page."""
    figure = ax.figure.figure if isinstance(ax, Axes) else ax
    for legend in figure.findobj(Legend):
        legend.get_frame().set_alpha(0)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "jensen", "savefig.bbox": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    width, height = (72 * inches for inches in figure.get_size_inches())
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    label = re.sub(r"[<>\"&]", " ", caption) or "figure"
    text = re.sub(r"<svg[^>]*>", _opening(width, height, label), text, count=1, flags=re.S)
    text = _INK.sub("currentColor", text)
    for i, colour in enumerate(COLOURS):  # the page has a lighter one of each for dark screens
        text = text.replace(colour.lower(), f"var(--c{i})")
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"  # names of one page are told apart
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    return Figure(Markup(text), round(_SCALE * width / 72 * 96), caption, points)


def _opening(width: float, height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
    )


def panel(
    series: Mapping[str, tuple[Tensor, Tensor, Sequence[int]]],
    label: str,
    *,
    caption: str = "",
    line: tuple[float, str] | None = None,
    log: bool = False,
) -> Figure | None:
    """A number of each data point against its log p(x).

    Args:
        series: by name, log p(x) [N], the number [N], and the items that the points stand for.
        label: of the number.
        caption: a line below.
        line: a level to mark, and its name.
        log: whether the number's axis is logarithmic.

    Returns:
        The figure; None where no number is finite.
    """
    places: list[int] = []
    ax = _scattered(series, label, line, log, places)
    return drawn(ax, caption, places) if places else None


@styled
def _scattered(
    series: Mapping[str, tuple[Tensor, Tensor, Sequence[int]]],
    label: str,
    line: tuple[float, str] | None,
    log: bool,
    places: list[int],
) -> Axes:
    """Marks of the finite numbers; their items are added to the places."""
    ax = own_axes(None, height=2.5)
    for i, (name, (x, y, items)) in enumerate(series.items()):
        good = (x.isfinite() & y.isfinite() & ((y > 0) if log else True)).nonzero().squeeze(-1)
        if not len(good):
            continue
        ax.scatter(
            x[good].numpy(),
            y[good].numpy(),
            s=9,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            alpha=0.55,
            linewidths=0,
            label=name,
            gid=f"points-{i}",
        )
        places += [items[n] for n in good.tolist()]
    if log:
        numbered_log(ax)
    if line is not None:
        ax.axhline(line[0], color="black", linestyle="--", linewidth=0.8, label=line[1])
    ax.set_xlabel("log p(x) (nats)")
    ax.set_ylabel(label)
    if len(series) > 1 or line is not None:
        ax.legend()
    return ax


@styled
def gap_bars(rows: Mapping[str, tuple[float, float]]) -> Axes:
    """Bars of the variational gap, one for each row; whiskers are two standard errors over the data."""
    ax = own_axes(None, height=0.9 + 0.32 * len(rows))
    ends = [mean + 2 * (error if error == error else 0.0) for mean, error in rows.values()]
    for i, (mean, error) in enumerate(rows.values()):
        ax.barh(i, mean, color=COLOURS[0], height=0.6)
        if error == error:
            ax.errorbar(mean, i, xerr=2 * error, fmt="none", ecolor=COLOURS[1], elinewidth=1.5, capsize=3)
    ax.set_yticks(range(len(rows)), labels=list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    largest, second = sorted(ends, reverse=True)[:2] if len(ends) > 1 else (*ends, *ends)
    ax.set_xlim(right=1.25 * (largest if largest < 8 * second or second <= 0 else 2 * second))  # one bar may be cut off
    for i, ((mean, error), end) in enumerate(zip(rows.values(), ends, strict=True)):
        cut = end > ax.get_xlim()[1]
        number = decimals(mean, digits_of(error))
        shown = ax.text(ax.get_xlim()[1] if cut else max(end, 0), i, f" {number}", va="center", fontsize=7)
        if cut:
            shown.set(text=f"{number} \N{RIGHTWARDS ARROW}", ha="right", color="white")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("log p(x) - ELBO (nats per data point)")
    return ax
