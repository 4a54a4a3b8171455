"""What figures share: their size, their style, and colours and markers that all readers tell apart."""

from __future__ import annotations

__all__ = [
    "COLOURS",
    "LINES",
    "MARKERS",
    "WIDTH",
    "at_least_one",
    "by_name",
    "close_own",
    "house_style",
    "number",
    "numbered_log",
    "own_axes",
    "own_figure",
    "particles_axis",
    "settle",
    "styled",
    "text_size",
    "without_pyplot",
]

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

from matplotlib import is_interactive, rc_params_from_file, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

STYLE_FILE = Path(__file__).with_name("jensen.mplstyle")
"""The style of new figures; ``plt.style.use("jensen.plots.jensen")`` takes it for figures of one's own."""

_STYLE = rc_params_from_file(STYLE_FILE, use_default_template=False)

COLOURS: tuple[str, ...] = tuple(_STYLE["axes.prop_cycle"].by_key()["color"])
"""The style's colours, of ten classes, told apart by colour-blind readers."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Shapes that go with the colours, for readers who see no colour and for grey print."""

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
"""Dashes that go with the colours where a curve has no markers."""

WIDTH = 3.4
"""Width in inches of a new figure: a column of a paper in two columns."""

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

_made: WeakSet[Figure] = WeakSet()
_pyplot: ContextVar[bool] = ContextVar("pyplot", default=True)


def at_least_one(columns: int) -> int:
    """The number of panels per row. Raises ValueError for fewer than one."""
    if columns < 1:
        raise ValueError(f"columns is the number of images or panels per row, at least 1, but got {columns}")
    return columns


@contextmanager
def without_pyplot() -> Iterator[None]:
    """New figures are not registered with pyplot: for commands, reports and callbacks, which write or show them."""
    token = _pyplot.set(False)
    try:
        yield
    finally:
        _pyplot.reset(token)


@contextmanager
def house_style() -> Iterator[None]:
    """New axes and what is drawn on them have the style of jensen; afterwards that of the caller is back."""
    before = {name: rcParams[name] for name in _STYLE}
    rcParams.update(_STYLE)
    try:
        yield
    finally:  # of the style alone: the first figure of a notebook loads its backend, which sets parameters to stay
        rcParams.update(before)


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Let a function that makes a figure draw it in the style of jensen; given axes keep the style of their maker."""
    signature = inspect.signature(plot)

    @wraps(plot)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return plot(*args, **kwargs)  # raises it, in Python's words
        if given.get("ax") is not None or given.get("axes") is not None:
            return plot(*args, **kwargs)
        known = set(_made)
        with house_style():
            try:
                drawn = plot(*args, **kwargs)
            except BaseException:
                for figure in set(_made) - known:  # a notebook would show it empty
                    _close(figure)
                raise
            axes: Any = drawn[0] if isinstance(drawn, list) else drawn
            settle(axes.figure)
        return drawn

    return call


def settle(figure: Figure) -> None:
    """Make the ticks of a figure now: matplotlib makes them when it draws, in the style of that time."""
    for ax in [inner for outer in figure.axes for inner in (outer, *outer.child_axes)]:
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_ticks()
            axis.get_minor_ticks()


def own_figure(width: float = WIDTH, height: float = 2.6) -> Figure:
    """A new figure (in inches) of pyplot, so that a notebook and ``plt.show()`` show it."""
    if not _pyplot.get():
        return Figure(figsize=(width, height))
    import matplotlib.pyplot as plt  # imported here, since `import jensen.plots` would be slower by its backends

    figure = plt.figure(figsize=(width, height))
    _made.add(figure)
    return figure


def own_axes(ax: Axes | None, height: float = 2.6) -> Axes:
    """The given axes, or those of a new figure of a column's width."""
    return own_figure(height=height).add_subplot() if ax is None else ax


def close_own(figure: Figure) -> None:
    """Take a figure of :func:`own_figure` out of pyplot, unless a notebook or a window is still to show it."""
    if figure in _made and not is_interactive():
        _close(figure)


def _close(figure: Figure) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def text_size(ax: Axes, share: float = 0.875) -> float:
    """The size of smaller text in points: a share of that of the axes' labels."""
    return share * float(ax.xaxis.label.get_fontsize())


def number(value: float, form: str) -> str:
    """A number as the axes' own ticks have it: with a minus sign, and no negative zero."""
    return f"{value + 0.0:{form}}".replace("-", "\N{MINUS SIGN}")


def particles_axis(ax: Axes) -> None:
    """Make x a logarithmic axis of numbers of particles, written as numbers."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(_plainly))
    ax.set_xlabel("particles K")


def numbered_log(ax: Axes) -> None:
    """Make y a logarithmic axis with ticks that are written as numbers, three of them at least."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs) if decades > 0.4 else MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(_plainly))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _: int | None = None) -> str:
    return f"{value:.6g}"


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
