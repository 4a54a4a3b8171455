"""Checks of data values while they are read in pieces: errors and warnings about unsuitable values."""

from __future__ import annotations

__all__ = ["Findings", "IndexColumnWarning"]

import math
import warnings
from collections import Counter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .columns import advise_drop, listed
from .counters import Counters
from .missing import Missing
from .preparation import Moments
from .stand_ins import StandIns
from .tables import Table


class IndexColumnWarning(UserWarning):
    """Warns of a column that numbers the rows."""


class Findings:
    """Statistics of values from pieces: missing and infinite ones, the range, and whether there are fractions.

    Also the moments of the training data if they are standardized or may be rounded, columns that number the rows, and
    placeholders of missing values such as -999.

    Args:
        table: the table that is read.
        train: the rows of the training data.
        dtype: the dtype of the resulting data.
        levels: the number of grey levels, if the values are grey levels.
        images: whether the data are images.
        spread: whether moments are always needed.
        of_file: whether the table is from a file, for the advice in messages.
        missing: what marks missing values; None if there may be none.
    """

    def __init__(
        self,
        table: Table,
        train: NDArray[np.int64],
        dtype: torch.dtype,
        levels: int | None,
        *,
        images: bool,
        spread: bool,
        of_file: bool,
        missing: Missing | None = None,
    ) -> None:
        shape = table.x.shape
        self._columns, self._dtype, self._levels, self._of_file = table.columns, dtype, levels, of_file
        self._allowed = missing
        self._whole = levels is not None or not dtype.is_floating_point  # whether fractions are errors
        self._spread = spread or _may_round(table.x.dtype, dtype)
        self._train = np.zeros(shape[0], bool)
        self._train[train] = True
        self._images = images
        self._vectors = not images and len(shape) > 2  # the steps of a sequence
        features = shape[-1:] if self._vectors else shape[1:]
        self.moments = Moments(features)
        self._known_rows = np.full(shape[0], missing is None)  # with an observed value
        self._known_features = np.full(features, missing is None)  # with an observed value in the training data
        self._counters = Counters((0, 0) if images else shape, table.columns)
        self._stand_ins = StandIns(shape[1] if len(shape) == 2 and not images else 0)
        self._missing = self._infinite = 0
        self._at: Counter[int] = Counter()  # missing and infinite values, by column
        self._places: list[tuple[int, ...]] = []  # positions of the first of them
        self._low: float = math.inf
        self._high: float = -math.inf
        self._fractions = False

    def look(self, place: tuple[Any, ...], values: NDArray[np.generic]) -> None:
        """Process a piece and its position."""
        some, _, columns = place
        start = (some.start or 0, columns.start or 0)
        finite = np.isfinite(values) if values.dtype.kind == "f" else np.full(values.shape, True)
        legal = finite if self._allowed is None else finite | np.isnan(values)
        if not legal.all():
            places, nan = np.argwhere(~legal), 0 if self._allowed is not None else int(np.isnan(values).sum())
            self._missing, self._infinite = self._missing + nan, self._infinite + len(places) - nan
            if self._columns:
                for column, count in enumerate((~legal).reshape(len(values), -1).sum(0).tolist()):
                    self._at[start[1] + column] += count
            places = places[:_SHOWN] + np.array([start[0], *[0] * (values.ndim - 2), start[1]])
            self._places = sorted([*self._places, *map(tuple, places.tolist())])[:_SHOWN]
        elif not self._places:
            self._add(some, columns, values)
            self._counters.look(values, *start)
            if not self._images:
                self._stand_ins.look(values, start[1])
            if self._allowed is not None:
                self._known_rows[some] |= finite.reshape(len(values), -1).any(1)
                train = finite[self._train[some]]
                self._known_features[..., columns] |= self._steps(train).any(0)
        if not finite.all():
            values = values[finite]
        if values.size:
            self._low, self._high = min(self._low, values.min().item()), max(self._high, values.max().item())
        if self._whole and not self._fractions and values.dtype.kind == "f":
            self._fractions = bool((values % 1).any())

    def _add(self, some: slice, columns: slice, values: NDArray[np.generic]) -> None:
        if not self._spread:
            return
        train = values[self._train[some]].astype(np.float64, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # numbers whose squares overflow
            self.moments.add(self._steps(train), columns)

    def _steps(self, values: NDArray[_Kind]) -> NDArray[_Kind]:
        """The rows of values whose features have moments of their own: for sequences their steps."""
        return values.reshape(-1, values.shape[-1]) if self._vectors else values

    def check(self, name: str, rounded: bool = True) -> None:
        """Raise ValueError for missing values, and for values that the dtype (if ``rounded``) or levels would change.

        Where values may be missing, a row or a feature must have an observed one.

        Raises:
            ValueError: for such values; the message gives their number and positions.
        """
        columns, dtype, levels = self._columns, self._dtype, self._levels
        if self._places:
            shown = ", ".join(_place(place, columns) for place in self._places)
            more = self._missing + self._infinite - len(self._places)
            what = [f"{self._missing} missing values (NaN)"] if self._missing else []
            what += [f"{self._infinite} infinite values"] if self._infinite else []
            where = f"{shown} and {more} more" if more else shown
            bad = [columns[i] for i in sorted(self._at) if self._at[i]]
            counts = listed([f"{self._at[i]} of {columns[i]!r}" for i in sorted(self._at) if self._at[i]])
            out = f" ({counts})" if bad else ""
            out += f"; or {advise_drop(bad)}" if self._of_file and 0 < len(bad) < len(columns) else ""
            mark = "pass missing='nan', in a shell --missing nan, if they were not observed; " if self._missing else ""
            raise ValueError(
                f"{name} has {' and '.join(what)}, at {where}: {mark}drop those rows, or fill in values{out}"
            )
        self._check_known(name)
        ends = f"values from {self._low:g} to {self._high:g}"
        if dtype.is_floating_point:
            largest = max(abs(self._low), abs(self._high))
            if rounded and largest > torch.finfo(dtype).max:
                raise ValueError(
                    f"{name} has values as large as {largest:g}, which {dtype} cannot represent: use "
                    "dtype=torch.float64"
                )
            if rounded and levels is None:
                self._check_rounding(name)
        else:
            least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            if self._fractions or self._low < least or self._high > most:
                raise ValueError(
                    f"{name} has {'fractions' if self._fractions else ends}, which {dtype} cannot represent: use "
                    "dtype=torch.float32 or torch.float64"
                )
        if levels is not None and (self._low < 0 or self._high > levels - 1 or self._fractions):
            raise ValueError(f"{name} has {ends}, but levels={levels} requires integers from 0 to {levels - 1}")

    def _check_known(self, name: str) -> None:
        """Raise ValueError for rows without any observed value, and for features without one in the training data."""
        if len(empty := np.flatnonzero(~self._known_rows)):
            many = len(empty) > 1
            raise ValueError(
                f"{name} has {len(empty)} row{'s' * many} without any observed value, row{'s' * many} "
                f"{listed(empty.tolist())}: drop {'them' if many else 'it'}"
            )
        if len(unknown := np.flatnonzero(~self._known_features.reshape(-1)).tolist()):
            out = [self._columns[i] for i in unknown] if self._columns else list(map(str, unknown))
            remedy = advise_drop(out) if self._of_file else f"leave {'them' if len(out) > 1 else 'it'} out of x"
            raise ValueError(
                f"{name} has no observed training value of {_which(unknown[0], self._columns)}"
                f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}: {remedy}"
            )

    def _check_rounding(self, name: str) -> None:
        """Raise ValueError if the rounding steps of the dtype are not small compared with the spread of a feature."""
        location, scale = self.moments.location.reshape(-1), self.moments.scale.reshape(-1)
        about = torch.finfo(self._dtype)
        step = np.maximum(about.eps * abs(location), about.tiny * (scale > 0))
        coarse = np.flatnonzero((scale > 0) & (step > _COARSE * scale)).tolist()
        if coarse:
            i, more = coarse[0], f" (and {len(coarse) - 1} more)" if len(coarse) > 1 else ""
            raise ValueError(
                f"{self._dtype} would round {_which(i, self._columns)} of {name}{more} to steps of {step[i]:.2g}: its "
                f"values are near {location[i]:g} with a standard deviation of {scale[i]:.2g}; use standardize=True, "
                "in a shell --standardize, or dtype=torch.float64"
            )

    def warn(self, name: str) -> None:
        """Warn of columns that number the rows, and of placeholders of missing values."""
        for i, what in list(self._counters.found().items())[:_SHOWN]:
            out = advise_drop([self._columns[i] if self._columns else str(i)]) if self._of_file else "remove it from x"
            text = f"{name}: {_which(i, self._columns)} {what}: if it is an index, {out}"
            warnings.warn(text, IndexColumnWarning, stacklevel=4)
        for i, (code, count) in list(self._stand_ins.found().items())[:_SHOWN]:
            warnings.warn(
                f"{name}: {_which(i, self._columns)} holds {code:g} in {count} row{'s' * (count > 1)}, far from its "
                f"other values: if it marks missing values, pass {(self._allowed or Missing()).advice(code)}",
                stacklevel=4,
            )


def _may_round(given: np.dtype[Any], dtype: torch.dtype) -> bool:
    """Whether a dtype has fewer digits than the given one; bytes are always exact."""
    narrow = given.itemsize <= (dtype.itemsize if given.kind == "f" else 2)
    return dtype.is_floating_point and given.kind in "iuf" and not narrow


_Kind = TypeVar("_Kind", bound=np.generic)
_SHOWN = 5  # positions named in a message
_COARSE = 0.05  # harmless rounding, in standard deviations


def _place(place: tuple[int, ...], columns: tuple[str, ...]) -> str:
    row, *rest = place
    return f"row {row}, column {columns[rest[0]]!r}" if columns else f"row {row}, feature {', '.join(map(str, rest))}"


def _which(i: int, columns: tuple[str, ...]) -> str:
    return f"column {columns[i]!r}" if columns else f"feature {i}"
