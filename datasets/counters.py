"""Detection of columns that number the rows (indices, identifiers), which would dominate the other features."""

from __future__ import annotations

__all__ = ["Counters"]

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST = 10  # with fewer rows, a column may count by chance
_EARLY = 64  # rows after which most columns are excluded
_OFF = 0.01  # of a step
_FIRST, _LAST = 1900_01_01, 2100_12_31  # dates as integers: year, month and day
_NAME = re.compile(r"(?i:(^|[\W_])(id|idx|index|row_?(names?|id|number)|unnamed.*)$)|[a-z]I[dD]$")


class Counters:
    """Finds columns with a constant step between rows, a permutation of 1 ... N, dates or identifiers.

    Args:
        shape: of the table, [N, X].
        columns: the column names, if any.

    Example:
        >>> counters = Counters((20, 2), ("id", "x"))
        >>> rng = np.random.default_rng(0)
        >>> counters.look(np.stack([np.arange(20) + 7, rng.normal(size=20)], 1), 0, 0)
        >>> counters.found()
        {0: 'rises by 1 from row to row'}
    """

    def __init__(self, shape: tuple[int, ...], columns: tuple[str, ...] = ()) -> None:
        n, *rest = shape
        self._active = len(rest) == 1 and rest[0] > 1 and n >= _LEAST
        width = rest[0] if self._active else 0
        self._n = n
        self._even = np.ones(width, bool)
        self._start, self._step = np.zeros(width), np.zeros(width)
        self._seen: dict[int, NDArray[np.bool_]] = {}
        self._days = np.zeros(width, bool)
        self._names: dict[int, list[NDArray[np.generic]]] = {
            i: [] for i, name in enumerate(columns) if _NAME.search(name)
        }

    def look(self, values: NDArray[np.generic], row: int, column: int) -> None:
        """Process a piece of finite numbers that begins at this row and column; rows must come in order."""
        if not self._active or values.dtype.kind not in "iuf" or not len(values):
            return
        here = slice(column, column + values.shape[1])
        if row == 0:
            self._begin(values, here)
        for i in (np.flatnonzero(self._even[here]) + column).tolist():
            line = self._start[i] + self._step[i] * np.arange(row, row + len(values))
            off = abs(values[:, i - column].astype(np.float64) - line)
            self._even[i] = bool((off <= _OFF * abs(self._step[i])).all())
        for i in (np.flatnonzero(self._days[here]) + column).tolist():
            self._days[i] = bool(_are_days(values[:, i - column]).all())
        for i in [i for i in self._seen if here.start <= i < here.stop]:
            some = values[:, i - column].astype(np.float64)
            if ((some < 0) | (some > self._n) | (some % 1 != 0)).any():
                del self._seen[i]
            else:
                self._seen[i][some.astype(np.int64)] = True
        for i in [i for i in self._names if here.start <= i < here.stop]:
            self._names[i].append(values[:, i - column].astype(np.float64))

    def _begin(self, values: NDArray[np.generic], here: slice) -> None:
        early = np.asarray(values[:_EARLY], np.float64)
        many = len(values) > 1
        self._start[here] = early[0]
        self._step[here] = (np.asarray(values[-1], np.float64) - early[0]) / (len(values) - 1) if many else 0.0
        self._even[here] = self._step[here] != 0
        self._days[here] = _are_days(early).all(0)
        line = early[0] + self._step[here] * np.arange(len(early))[:, None]
        self._even[here] &= (abs(early - line) <= _OFF * abs(self._step[here])).all(0)
        ordered = np.sort(early, 0)
        single = (np.diff(ordered, axis=0) > 0).all(0) & (early % 1 == 0).all(0)
        inside = (ordered[0] >= 0) & (ordered[-1] <= self._n)
        for i in (np.flatnonzero(single & inside) + here.start).tolist():
            self._seen[i] = np.zeros(self._n + 1, bool)

    def found(self) -> dict[int, str]:
        """A description of each column found, by position; empty if these are all columns of the data."""
        found = {i: f"rises by {self._step[i]:g} from row to row" for i in np.flatnonzero(self._even).tolist()}
        for i, seen in self._seen.items():
            if seen.sum() == self._n:
                first = int(not seen[0])
                found.setdefault(i, f"holds each of {first} to {self._n - 1 + first} once")
        for i in np.flatnonzero(self._days).tolist():
            found.setdefault(i, f"holds dates as integers, such as {self._start[i]:.0f}")
        for i, pieces in self._names.items():
            values = np.concatenate(pieces) if pieces else np.zeros(0)
            if len(values) == self._n and not (values % 1).any() and len(np.unique(values)) == self._n:
                found.setdefault(i, "holds a different integer in each row")
        for i in found:
            if self._even[i] and self._step[i] == 1 and self._start[i] in (0, 1):
                found[i] = "counts the rows"
        return {} if len(found) == len(self._even) else found


def _are_days(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether numbers are dates such as 20240131."""
    month, day = values // 100 % 100, values % 100
    days: NDArray[np.bool_] = (values >= _FIRST) & (values <= _LAST) & (month >= 1) & (month <= 12)
    days &= (day >= 1) & (day <= 31) & (values % 1 == 0)
    return days
