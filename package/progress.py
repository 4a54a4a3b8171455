"""Progress bars: one rule for whether they show, one form for what they say.

A bar is shown where ``progress`` asks for it and somebody can see it: in a terminal, or in a notebook that a person
runs. In a log, a pipe, and a notebook that a program executes (nbclient, papermill), nothing is written. A bar that is
done goes away; the result is what stays.
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

_name: ContextVar[str] = ContextVar("name", default="")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Bars that open inside say what they measure or train.

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
    """A progress bar of tqdm, to be closed by its user: a context manager.

    Args:
        what: what is done, in a word: "evaluate".
        points: the number of data points; 0 where there are none.
        over: what to iterate over.
        progress: False shows nothing, whoever watches.
        how: arguments of ``tqdm``.

    Example:
        >>> with progress_bar("fit", 100, range(3), progress=False) as epochs:
        ...     list(epochs)
        [0, 1, 2]
    """
    if not progress or not watched():
        return tqdm.tqdm(over, disable=True)
    with warnings.catch_warnings():  # a notebook without ipywidgets gets a bar of text
        warnings.simplefilter("ignore", tqdm.TqdmWarning)
        from tqdm.auto import tqdm as shown
    return shown(over, desc=label(what, points), leave=False, **how)


def label(what: str, points: int) -> str:
    """What stands before a bar: what is done, with which model and guide, to how many data points."""
    details = [_name.get()] * bool(_name.get()) + [f"{points} data points"] * (points > 0)
    return ": ".join([what, ", ".join(details)]) if details else what


def watched() -> bool:
    """Whether somebody can see a bar. A program that executes a notebook takes no input; a person's front end does."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is not None:
        return bool(kernel.get_parent().get("content", {}).get("allow_stdin", True))
    return bool(getattr(sys.stderr, "isatty", bool)())
