"""How long a guide was trained in this process, so that a table can say it without being told."""

from __future__ import annotations

__all__ = ["add_seconds", "seconds_of"]

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from jensen.kernel.weights import Program

_SECONDS: WeakKeyDictionary[Any, float] = WeakKeyDictionary()


def add_seconds(guide: Program, seconds: float, before: float) -> None:
    """Count a training run; what cannot be held weakly is not counted.

    Args:
        guide: what was trained.
        seconds: of the run, with those before it was resumed.
        before: of these, those before it was resumed, which are counted already where that was in this process.
    """
    with suppress(TypeError):
        known = seconds_of(guide)
        _SECONDS[_owner(guide)] = known + seconds - (before if known else 0.0)


def seconds_of(guide: Program) -> float:
    """The seconds that ``fit`` has taken to train a guide, in all its runs of this process; 0 if it has not."""
    try:
        return _SECONDS.get(_owner(guide), 0.0)
    except TypeError:
        return 0.0


def _owner(guide: Program) -> Any:
    """What outlives a call: a bound method is a new object each time, so the object that it belongs to."""
    return getattr(guide, "__self__", guide)
