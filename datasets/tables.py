"""Tables: columns of numbers, one of which may be labels, from CSV and Parquet files and from pandas DataFrames."""

from __future__ import annotations

__all__ = ["Table", "is_frame", "of_frame", "read_csv", "read_parquet"]

import csv
import re
import shlex
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import LIMIT, check_size

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


@dataclass(frozen=True)
class Table:
    """Numbers [N, X], the names of their columns, and labels [N] where a column holds them."""

    x: NDArray[np.generic]
    columns: tuple[str, ...]
    labels: NDArray[np.generic] | None


def read_csv(path: Path, label: str | int | None = None, header: bool | None = None, limit: int = LIMIT) -> Table:
    """Read numbers separated by commas.

    Args:
        path: the file, UTF-8.
        label: name or position of the column of labels; their values may be words.
        header: whether the first line holds names. None: found out, where it is unambiguous: all of its fields are
            words, or all are numbers.
        limit: bytes that the numbers may take in memory.

    Returns:
        The table; columns without names are called 0, 1, ..., and missing values are NaN.

    Raises:
        ValueError: if there are no data, a line has another number of fields than the first, a column that is not
            the label is not numeric (the message names it), or the first line may or may not be a header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            first = next((row for row in lines if row), None)
            if first is None:
                raise ValueError(f"{path} holds no data")
            names = _names(path, first, label in first or header)
            columns = names or tuple(str(i) for i in range(len(first)))
            at = None if label is None else _position(path, label, columns)
            rows = (row for row in chain(() if names else (first,), lines) if row)
            return _Parser(path, columns, at, limit).parse(rows, lambda: lines.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text of numbers separated by commas: {error}") from error


def read_parquet(path: Path, label: str | int | None = None, limit: int = LIMIT) -> Table:
    """Read columns of numbers of a Parquet file, by pyarrow.

    Args:
        path: the file.
        label: name or position of the column of labels.
        limit: bytes that the columns may take in memory.

    Returns:
        The table.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: as :func:`read_csv`, or if what the file says of its size exceeds the limit or is untrue.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("reading Parquet files takes pyarrow: pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            meta = file.metadata
            columns = tuple(file.schema_arrow.names)
            if any(name.startswith("__index_level_") for name in columns):
                raise ValueError(f"{path} holds the index of a DataFrame as a column: write it with index=False")
            held = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            check_size(path, max(held, 8 * meta.num_rows * len(columns)), limit)
            batches, rows = [], 0
            for batch in file.iter_batches(batch_size=65_536):
                rows += batch.num_rows
                if rows > meta.num_rows:
                    raise ValueError(f"{path} holds more than the {meta.num_rows} rows that it claims")
                batches.append(batch)
    except ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error
    parts = {
        name: [batch.column(i).to_numpy(zero_copy_only=False) for batch in batches] for i, name in enumerate(columns)
    }
    if not batches:
        raise ValueError(f"{path} holds no data")
    return _of_columns(str(path), {name: np.concatenate(part) for name, part in parts.items()}, label)


def is_frame(x: object) -> bool:
    """Whether x is a pandas DataFrame; pandas is not imported for the question."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, pandas.DataFrame)


def of_frame(frame: Any, label: str | int | None = None) -> Table:
    """The columns of a DataFrame; its index is left out.

    Raises:
        ValueError: as :func:`read_csv`.
    """
    columns = {str(name): _plain(frame.iloc[:, i]) for i, name in enumerate(frame.columns)}
    if len(columns) < frame.shape[1]:
        raise ValueError(f"the DataFrame has columns of one name: {', '.join(map(str, frame.columns))}")
    return _of_columns("the DataFrame", columns, label if label is None else str(label))


def _plain(column: Any) -> NDArray[np.generic]:
    if column.dtype.kind not in "biuf":
        return np.asarray(column, dtype=object)
    if column.isna().any():  # nullable numbers too
        return np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
    values = np.asarray(column)
    return values if values.dtype.kind in "biuf" else values.astype(np.float64)


def _as_label(name: str) -> str:
    return f"name it: label={name!r}, in a shell --label {shlex.quote(name)}"


def _of_columns(source: str, columns: dict[str, NDArray[np.generic]], label: str | int | None) -> Table:
    names = tuple(columns)
    at = None if label is None else _position(source, label, names)
    kept = [name for i, name in enumerate(names) if i != at]
    wrong = [name for name in kept if columns[name].dtype.kind not in "biuf"]
    if wrong:
        which = ", ".join(f"{name!r} ({columns[name].dtype})" for name in wrong)
        raise ValueError(
            f"{source}: column {which} is not numeric: leave it out, encode it, or, if it holds the classes, "
            f"{_as_label(wrong[0])}"
        )
    if not kept:
        raise ValueError(f"{source} holds no column of data")
    labels = None if at is None else columns[names[at]]
    return Table(np.stack([columns[name] for name in kept], 1), tuple(kept), labels)


class _Parser:
    """Turns lines of text into a table, and says what is wrong with them."""

    def __init__(self, path: Path, columns: tuple[str, ...], at: int | None, limit: int) -> None:
        self.path, self.columns, self.at, self.limit = path, columns, at, limit
        self.kept = tuple(name for i, name in enumerate(columns) if i != at)

    def parse(self, rows: Iterable[Sequence[str]], line: Callable[[], int]) -> Table:
        values, labels = array("d"), []
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.path}: line {line()} has {len(row)} fields, but the first has {len(self.columns)}"
                )
            fields = list(row)
            if self.at is not None:
                labels.append(fields.pop(self.at).strip())
            try:
                values.extend([float(field) for field in fields])
            except ValueError:
                values.extend([self._number(*pair, line()) for pair in zip(self.kept, fields, strict=True)])
            if 8 * len(values) > self.limit:
                raise ValueError(
                    f"{self.path} would take more bytes of memory than the limit of {self.limit}: pass limit="
                )
        if not values:
            raise ValueError(f"{self.path} holds no data")
        x = np.frombuffer(values, dtype=np.float64).reshape(-1, len(self.kept))
        return Table(x, self.kept, None if self.at is None else self._labels(labels))

    def _labels(self, labels: list[str]) -> NDArray[np.generic]:
        """Whole numbers as numbers, words as words."""
        if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", label) for label in labels):
            return np.array([int(label) for label in labels], dtype=np.int64)
        return np.array([None if label.lower() in _MISSING else label for label in labels], dtype=object)

    def _number(self, name: str, field: str, line: int) -> float:
        if field.strip().lower() in _MISSING:
            return float("nan")
        try:
            return float(field)
        except ValueError:
            hint = "; are the fields separated by semicolons? They have to be by commas" if ";" in field else ""
            raise ValueError(
                f"{self.path}: column {name!r} is not numeric: line {line} has {field!r}; leave the column out, encode "
                f"it, or, if it holds the classes, {_as_label(name)}{hint}"
            ) from None


def _names(path: Path, first: Sequence[str], header: bool | None) -> tuple[str, ...]:
    """The names in the first line; none if it holds data."""
    numeric = [_is_number(field) for field in first]
    if header is None and any(numeric) and not all(numeric):
        raise ValueError(
            f"{path}: the first line may be names or data: {','.join(first)[:80]!r}; say header=True or header=False"
        )
    if header is False or (header is None and all(numeric)):
        return ()
    names = tuple(field.strip() for field in first)
    if "" in names:
        raise ValueError(
            f"{path}: column {names.index('')} has no name: if it is an index, leave it out (in pandas: index=False)"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has columns of one name: {', '.join(names)}")
    return names


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _position(source: str | Path, label: str | int, columns: tuple[str, ...]) -> int:
    if isinstance(label, int) and -len(columns) <= label < len(columns):
        return label % len(columns)
    if label in columns:
        return columns.index(str(label))
    raise ValueError(f"{source} has no column {label!r} for label=; it has {', '.join(columns)}")
