"""Where a warning points: at the first line outside of the library."""

from __future__ import annotations

__all__ = ["outside"]

import sys

_BETWEEN = ("jensen", "contextlib", "pyro", "torch")  # the last three call the library, or wrap a function of it


def outside() -> int:
    """The ``stacklevel`` of the first caller outside of the library, for ``warnings.warn`` in the calling function."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        depth, frame = depth + 1, frame.f_back
    return depth
