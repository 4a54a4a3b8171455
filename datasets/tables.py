"""Tables of numeric columns, with an optional label column, from Parquet files and pandas DataFrames."""

from __future__ import annotations

__all__ = ["Table", "is_frame", "of_frame", "read_parquet"]

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .arrays import LIMIT, Pieces, check_size
from .columns import Wanted, advise_drop, advise_label, check_names, listed, select
from .missing import Missing


@dataclass(frozen=True)
class Table:
    """Numbers [N, X], the names of their columns, and labels [N] if there is a label column."""

    x: Pieces
    columns: tuple[str, ...]
    labels: NDArray[np.generic] | None


def read_parquet(
    path: Path, label: str | int | None = None, limit: int = LIMIT, drop: Wanted = None, only: Wanted = None
) -> Table:
    """Read the numeric columns of a Parquet file with pyarrow.

    Args:
        path: the file.
        label: name or position of the column of labels.
        limit: the maximal bytes of the columns in memory.
        drop: columns to omit.
        only: the columns of the data, if not all others.

    Returns:
        The table.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: if there are no data, a column other than the label is not numeric, two columns have the same name,
            or the file is damaged or exceeds the limit.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("reading Parquet files needs pyarrow: pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            meta = file.metadata
            columns = tuple(file.schema_arrow.names)
            check_names(path, columns)
            at, kept = select(path, columns, label, drop, only)
            if index := [columns[i] for i in kept if columns[i] in _index(file.schema_arrow)]:
                raise ValueError(
                    f"{path} has the index of a DataFrame as a column: write it with index=False, or "
                    f"{advise_drop(index)}"
                )
            used = kept if at is None else [*kept, at]
            held = _bytes_of(meta, None if len(used) == len(columns) else {columns[i] for i in used})
            check_size(path, max(held, 8 * meta.num_rows * len(kept)), limit)
            _check_columns(path, file.schema_arrow, at, kept)
            if not meta.num_rows:
                raise ValueError(f"{path} has no data")
            labels = None if at is None else _labels(path, columns[at], meta.num_rows)
            kinds = [np.dtype(file.schema_arrow.field(i).type.to_pandas_dtype()) for i in kept]
            names = tuple(columns[i] for i in kept)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the names of its columns are not UTF-8 text: rename them ({error})") from error
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file: {error}") from error
    shape, dtype = (meta.num_rows, len(kept)), np.result_type(*kinds)
    return Table(Pieces(shape, dtype, lambda: _numbers(path, names, meta.num_rows)), names, labels)


def _bytes_of(meta: Any, names: set[str] | None) -> int:
    """The uncompressed bytes of some columns, or of all."""
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    if names is None:
        return sum(group.total_byte_size for group in groups)
    columns = (group.column(i) for group in groups for i in range(meta.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema in names or column.path_in_schema.split(".")[0] in names
    )


def _index(schema: Any) -> set[str]:
    """The columns that contain a pandas index."""
    about = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    return {name for name in about.get("index_columns", []) if isinstance(name, str)}


def _check_columns(path: Path, schema: Any, at: int | None, kept: list[int]) -> None:
    """Raise ValueError for columns that are not numeric, and for labels with several values per row, before reading."""
    from pyarrow import types

    number = (types.is_integer, types.is_floating, types.is_boolean)
    wrong = [schema.field(i) for i in kept if not any(kind(schema.field(i).type) for kind in number)]
    if wrong:
        _refuse_columns(str(path), {field.name: str(field.type) for field in wrong})
    if at is not None and types.is_nested(schema.field(at).type):
        raise ValueError(
            f"{path}: column {schema.field(at).name!r} has type {schema.field(at).type}, which cannot be labels: name "
            "another column"
        )


def _batches(path: Path, names: list[str], n: int, **how: Any) -> Iterator[tuple[int, Any]]:
    """Yield blocks of rows, with the number of rows before them."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    done = 0
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=2**16, **how) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=names):
                if done + batch.num_rows > n:
                    raise ValueError(f"{path} has more than the {n} rows in its metadata: write it again")
                yield done, batch
                done += batch.num_rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file: {error}") from error
    if done < n:
        raise ValueError(f"{path} has {done} of the {n} rows in its metadata: write it again")


def _numbers(path: Path, names: Sequence[str], n: int) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The pieces of numeric columns, a few columns at a time."""
    for first in range(0, len(names), _COLUMNS):
        some = list(names[first : first + _COLUMNS])
        for done, batch in _batches(path, some, n):
            columns = [_values(batch.column(batch.schema.get_field_index(name))) for name in some]
            yield (slice(done, done + batch.num_rows), ..., slice(first, first + len(some))), np.stack(columns, 1)


def _values(column: Any) -> NDArray[np.generic]:
    values: NDArray[np.generic] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "O":  # booleans with missing values
        return np.array([np.nan if v is None else v for v in values.tolist()], dtype=np.float64)
    return values


def _labels(path: Path, name: str, n: int) -> NDArray[np.generic]:
    """Labels as an array; repeated words share one object."""
    from pyarrow import ArrowInvalid, DictionaryArray

    labels: list[NDArray[np.generic]] = []
    for _, batch in _batches(path, [name], n, read_dictionary=[name]):
        column = batch.column(batch.schema.get_field_index(name))
        try:
            column.validate(full=True)
        except ArrowInvalid as error:
            raise ValueError(
                f"{path}: the labels, column {name!r}, are not UTF-8 text, or are damaged: write them again as "
                f"correctly decoded text ({error})"
            ) from error
        if isinstance(column, DictionaryArray):
            words: NDArray[np.generic] = np.array([*column.dictionary.to_pylist(), None], dtype=object)
            places: NDArray[np.int64] = column.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)
            labels.append(words[places])
        else:
            labels.append(np.asarray(column.to_numpy(zero_copy_only=False)))
    return np.concatenate(labels)


_ROWS, _COLUMNS = 16_384, 8  # in memory at once, with one page of each of these columns


def _refuse_columns(source: str, wrong: dict[str, str]) -> NoReturn:
    names, many = list(wrong), len(wrong) > 1
    which = listed([f"{name!r} ({shorten(kind, 60)})" for name, kind in wrong.items()])
    label = f"name it: labels={names[0]!r}" if source == _FRAME else advise_label(names[0])
    out = (
        f"leave {'them' if many else 'it'} out: x.drop(columns={names[:10]})"
        if source == _FRAME
        else advise_drop(names)
    )
    raise ValueError(
        f"{source}: column{'s' * many} {which} {'are' if many else 'is'} not numeric: {out}; encode as numbers; or, if "
        f"{names[0]!r} holds the classes, {label}"
    )


_FRAME = "the DataFrame"


def is_frame(x: object) -> bool:
    """Whether x is a pandas DataFrame, without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, pandas.DataFrame)


def of_frame(frame: Any, label: str | int | None = None, missing: Missing | None = None) -> Table:
    """The columns of a DataFrame, without its index; text becomes numbers only where ``missing`` marks the other cells.

    Raises:
        ValueError: if a column other than the label is not numeric, or two columns have the same name.
    """
    check_names(_FRAME, list(frame.columns))
    columns = {str(name): _plain(frame.iloc[:, i]) for i, name in enumerate(frame.columns)}
    return _of_columns(_FRAME, columns, label if label is None else str(label), missing)


def _plain(column: Any) -> NDArray[np.generic]:
    if column.dtype.kind not in "biuf":
        return np.asarray(column, dtype=object)
    if column.isna().any():  # also for nullable numbers
        return np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
    values = np.asarray(column)
    return values if values.dtype.kind in "biuf" else values.astype(np.float64)


def _of_columns(
    source: str, columns: dict[str, NDArray[np.generic]], label: str | int | None, missing: Missing | None
) -> Table:
    names = tuple(columns)
    if label is not None and label not in names:
        raise ValueError(f"{source} has no column {label!r} for labels=; it has {listed(names)}")
    at = None if label is None else names.index(str(label))
    kept = [name for i, name in enumerate(names) if i != at]
    if missing is not None:
        texts = [name for name in kept if columns[name].dtype.kind == "O"]
        read = {name: missing.numeric(columns[name]) for name in texts}
        columns = {**columns, **{name: numbers for name, numbers in read.items() if numbers is not None}}
    wrong = {name: str(columns[name].dtype) for name in kept if columns[name].dtype.kind not in "biuf"}
    if wrong:
        _refuse_columns(source, wrong)
    if not kept:
        raise ValueError(f"{source} has no column of data")
    labels = None if at is None else columns[names[at]]
    return Table(Pieces.of(np.stack([columns[name] for name in kept], 1)), tuple(kept), labels)
