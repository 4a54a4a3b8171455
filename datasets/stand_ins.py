"""Detection of placeholders of missing values: -999, 9999 and similar, far from all other values of a column."""

from __future__ import annotations

__all__ = ["StandIns"]

import numpy as np
from numpy.typing import NDArray

_CODES = np.array([-9.0, -99.0, -999.0, -9999.0, -99999.0, -200.0, 99.0, 999.0, 9999.0, 99999.0])
_LONG = 900  # above this, one value is enough
_LEAST = 10  # with fewer other values in a column, nothing counts as far


class StandIns:
    """Finds columns whose smallest or largest value is such a placeholder, far from all others.

    Far means farther than the others are from each other.

    Args:
        width: the number of columns.

    Example:
        >>> found = StandIns(2)
        >>> found.look(np.array([[0.1 * i, -999.0 if i % 3 else 2.0 + i] for i in range(60)]), 0)
        >>> found.found()
        {1: (-999.0, 40)}
    """

    def __init__(self, width: int) -> None:
        self._count = np.zeros((len(_CODES), width), np.int64)
        self._low, self._high = np.full((2, width), np.inf) * [[1], [-1]]
        self._others = np.zeros(width, np.int64)

    def look(self, values: NDArray[np.generic], column: int) -> None:
        """Process a piece of finite or missing numbers [n, X] that begins at this column."""
        if values.ndim != 2 or values.dtype.kind not in "if" or not len(values):
            return
        here = slice(column, column + values.shape[1])
        gone = np.isnan(values)
        holes = gone.any()
        low = (np.where(gone, np.inf, values) if holes else values).min(0).astype(np.float64)
        high = (np.where(gone, -np.inf, values) if holes else values).max(0).astype(np.float64)
        others = len(values) - gone.sum(0)
        for i in np.flatnonzero(np.isin(low, _CODES) | np.isin(high, _CODES)).tolist():
            of = values[~gone[:, i], i].astype(np.float64)
            coded = np.isin(of, _CODES)
            self._count[:, column + i] += (of[coded] == _CODES[:, None]).sum(1)
            others[i] -= coded.sum()
            low[i], high[i] = of[~coded].min(initial=np.inf), of[~coded].max(initial=-np.inf)
        self._others[here] += others
        self._low[here] = np.minimum(self._low[here], low)
        self._high[here] = np.maximum(self._high[here], high)

    def found(self) -> dict[int, tuple[float, int]]:
        """The placeholder of each such column, and its count."""
        found: dict[int, tuple[float, int]] = {}
        for i in np.flatnonzero(self._count.any(0) & (self._others >= _LEAST)).tolist():
            code = float(_CODES[self._count[:, i].argmax()])
            away = self._low[i] - code if code < 0 else code - self._high[i]
            count = int(self._count[:, i].max())
            if away > self._high[i] - self._low[i] > 0 and (count > 1 or abs(code) > _LONG):
                found[i] = (code, count)
        return found
