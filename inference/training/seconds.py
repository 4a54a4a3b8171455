"""The training time of a guide in this process, so that tables can show it."""

from __future__ import annotations

__all__ = ["add_seconds", "seconds_of"]

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from jensen.kernel.weights import Program

_SECONDS: WeakKeyDictionary[Any, float] = WeakKeyDictionary()


def add_seconds(guide: Program, seconds: float, before: float) -> None:
    """Count a training run; a guide that cannot be weakly referenced is not counted.

    Args:
        guide: the trained guide.
        seconds: of the run, including parts before a resumption.
        before: the seconds before a resumption; these are already counted if they were in this process.
    """
    with suppress(TypeError):
        known = seconds_of(guide)
        _SECONDS[_owner(guide)] = known + seconds - (before if known else 0.0)


def seconds_of(guide: Program) -> float:
    """The seconds of all runs of ``fit`` for a guide in this process; 0 if it was not trained."""
    try:
        return _SECONDS.get(_owner(guide), 0.0)
    except TypeError:
        return 0.0


def _owner(guide: Program) -> Any:
    """The object that outlives a call: the owner of a bound method, which is a new object at each access."""
    return getattr(guide, "__self__", guide)
