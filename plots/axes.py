"""What pictures share: a figure of their own, a column wide, and colours and markers that all readers tell apart."""

from __future__ import annotations

__all__ = [
    "COLOURS",
    "LINES",
    "MARKERS",
    "WIDTH",
    "at_least_one",
    "by_name",
    "close_own",
    "number",
    "own_axes",
    "own_figure",
    "plain",
    "text_size",
    "without_pyplot",
]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakSet

from matplotlib import is_interactive
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
    "#882255",
    "#999999",
)
"""The palette of Okabe and Ito (2008), Color Universal Design, and two more: ten classes."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Shapes that go with the colours, for readers who see no colour and for grey print."""

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
"""Dashes that go with the colours where a curve has no markers."""

WIDTH = 3.4
"""Width in inches of a new figure: a column of a paper in two columns."""

_TEXT = 8.0  # points, in figures of our own
_DPI = 200  # on a screen; print has its own

T = TypeVar("T")

_made: WeakSet[Figure] = WeakSet()
_pyplot: ContextVar[bool] = ContextVar("pyplot", default=True)


def at_least_one(columns: int) -> int:
    """The number of pictures per row. Raises ValueError for fewer than one."""
    if columns < 1:
        raise ValueError(f"columns is the number of pictures per row, at least 1, but got {columns}")
    return columns


@contextmanager
def without_pyplot() -> Iterator[None]:
    """New figures are not registered with pyplot: for commands, reports and callbacks, which write or show them."""
    token = _pyplot.set(False)
    try:
        yield
    finally:
        _pyplot.reset(token)


def own_figure(width: float = WIDTH, height: float = 2.6) -> Figure:
    """A new figure (in inches) of pyplot, so that a notebook and ``plt.show()`` show it."""
    if not _pyplot.get():
        return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    import matplotlib.pyplot as plt  # imported here, since `import jensen.plots` would be slower by its backends

    figure = plt.figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    _made.add(figure)
    return figure


def close_own(figure: Figure) -> None:
    """Take a figure of :func:`own_figure` out of pyplot, unless a notebook or a window is still to show it."""
    if figure in _made and not is_interactive():
        import matplotlib.pyplot as plt

        plt.close(figure)


def own_axes(ax: Axes | None, height: float = 2.6) -> Axes:
    """The given axes, or those of a new figure of a column's width, with text of 8 points."""
    return plain(own_figure(height=height).add_subplot()) if ax is None else ax


def plain(ax: Axes) -> Axes:
    """Give new axes the text of a column: labels of 8 points, ticks a little smaller."""
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_fontsize(_TEXT)
    ax.tick_params(which="both", labelsize=0.875 * _TEXT)
    return ax


def text_size(ax: Axes, share: float = 0.875) -> float:
    """The size of smaller text in points: a share of that of the axes' labels."""
    return share * float(ax.xaxis.label.get_fontsize())


def number(value: float, form: str) -> str:
    """A number as the axes' own ticks have it: with a minus sign, and no negative zero."""
    return f"{value + 0.0:{form}}".replace("-", "\N{MINUS SIGN}")


def by_name(results: Mapping[str, T], owner: str, call: str) -> Mapping[str, T]:
    """Results by name, at least one of them.

    Raises:
        TypeError: if they have no names.
        ValueError: if there are none.
    """
    if not isinstance(results, Mapping):
        raise TypeError(f"{owner} takes results by name, {{'guide': {call}}}, but got {type(results).__name__}")
    if not results:
        raise ValueError(f"results is empty: {owner} needs at least one")
    return results
