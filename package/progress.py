"""Progress bars: when they are shown, and their labels.

A bar is shown if ``progress`` is True and someone can see it: in a terminal, or in a notebook that a person runs.
Nothing is written to a log or a pipe, or in a notebook that a program executes (nbclient, papermill). A finished bar
disappears.
"""

from __future__ import annotations

__all__ = ["label", "named", "progress_bar", "watched"]

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tqdm

from . import processes

_name: ContextVar[str] = ContextVar("name", default="")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Add a name to the labels of all bars inside this block.

    Example:
        >>> with named("full covariance"):
        ...     label("evaluate", 400)
        'evaluate: full covariance, 400 data points'
    """
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


def progress_bar(
    what: str, points: int = 0, over: Iterable[Any] | None = None, *, progress: bool = True, **how: Any
) -> Any:
    """A progress bar of tqdm, as a context manager.

    Args:
        what: the name of the task, such as "evaluate".
        points: the number of data points; 0 if there are none.
        over: an iterable.
        progress: False shows no bar.
        how: other arguments of ``tqdm``.

    Example:
        >>> with progress_bar("fit", 100, range(3), progress=False) as epochs:
        ...     list(epochs)
        [0, 1, 2]
    """
    if not progress or processes.rank() or not watched():
        return tqdm.tqdm(over, disable=True)
    with warnings.catch_warnings():  # a notebook without ipywidgets shows a text bar
        warnings.simplefilter("ignore", tqdm.TqdmWarning)
        from tqdm.auto import tqdm as shown
    return shown(over, desc=label(what, points), leave=False, **how)


def label(what: str, points: int) -> str:
    """The label of a bar: the task, the name of model and guide, and the number of data points."""
    details = [_name.get()] * bool(_name.get()) + [f"{points} data points"] * (points > 0)
    return ": ".join([what, ", ".join(details)]) if details else what


def watched() -> bool:
    """Whether someone can see a bar. A notebook that a program executes does not allow input; one of a person does."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is not None:
        return bool(kernel.get_parent().get("content", {}).get("allow_stdin", True))
    return bool(getattr(sys.stderr, "isatty", bool)())
