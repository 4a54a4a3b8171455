"""Conversion of data in memory: arrays, tensors, tables, sparse and masked arrays, AnnData, torch data sets."""

from __future__ import annotations

__all__ = ["of_memory"]

import sys
from collections.abc import Mapping, Sequence, Sized
from os import PathLike
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from jensen.checked import check_tensor, shown

from .arrays import Pieces, check_size, of_sparse
from .columns import listed
from .dataset import Dataset
from .missing import Missing
from .tables import Table, is_frame, of_frame

_TABLES = ("polars", "pyarrow")  # their tables are converted to pandas


def of_memory(x: Any, labels: Any, limit: int, missing: Missing | None = None) -> Table:
    """Data and labels from any supported container.

    Args:
        x: the data.
        labels: their labels, or the name of a column of ``x``.
        limit: the maximal bytes of a dense array of the data.
        missing: what marks missing values.

    Raises:
        ValueError: for anything that is not data, labels given twice, or data above the limit.
        TypeError: for a data set without a length, a data loader, or data for another function.
    """
    if isinstance(x, Table):
        return x
    _check_kind(x)
    if type(x).__module__.partition(".")[0] in _TABLES and hasattr(x, "to_pandas"):
        x = x.to_pandas()
    if isinstance(x, np.ndarray) and x.dtype.names:  # named columns
        import pandas

        x = pandas.DataFrame(x if x.ndim == 1 else x.ravel())
    if is_frame(x):
        column = labels if isinstance(labels, str | int) else None
        _check_order(x, labels, "labels")
        _check_order(x, missing, "missing")
        table = of_frame(x, column, missing)
        return table if labels is None or column is not None else _labelled(table.x, labels, table.columns)
    if _is_anndata(x):
        return _of_anndata(x, labels, limit, missing)
    if isinstance(labels, str | int | float):
        raise ValueError(f"labels={labels!r} names a column, but x is not a DataFrame: pass the labels themselves")
    if isinstance(x, torch.utils.data.Dataset):
        values, own = _collect(x, limit)
        if own is not None and labels is not None:
            raise ValueError("x already contains labels: omit the argument labels")
        return _labelled(Pieces.of(values), own if labels is None else labels)
    return _labelled(_pieces(x, limit, missing), labels)


def _check_order(frame: Any, other: Any, name: str) -> None:
    """Raise ValueError if the index of labels or a mask has another order than the data: rows match by position."""
    index = getattr(other, "index", None)
    if not isinstance(index, sys.modules["pandas"].Index) or index.equals(frame.index):
        return
    if len(index) == len(frame) and index.sort_values().equals(frame.index.sort_values()):
        raise ValueError(f"got {name} with the index of x in another order: pass {name}.loc[x.index]")


def _labelled(x: Pieces, labels: Any, columns: tuple[str, ...] = ()) -> Table:
    return Table(x, columns, None if labels is None else _array(labels, "labels"))


def _check_kind(x: Any) -> None:
    """Raise an error with a remedy for containers that are not supported."""
    if isinstance(x, Dataset):
        raise TypeError(f"x is already a Dataset with splits, {x!r}: use x.train, x.validation and x.test")
    if isinstance(x, torch.utils.data.DataLoader):
        raise TypeError("x is a DataLoader, which makes batches: pass its data set, x.dataset")
    if isinstance(x, str | PathLike):
        raise TypeError(f"x is {shown(x)}, but from_array takes data in memory: use load(x) for files")
    if isinstance(x, Mapping):
        raise ValueError(
            f"x is a {type(x).__name__} with the entries {listed(list(x))}: pass one of them, x[...], or "
            "pandas.DataFrame(x) if each is a column"
        )


def _pieces(x: Any, limit: int, missing: Missing | None) -> Pieces:
    """Data in one array, sparse or dense."""
    if _is_sparse(x):
        return of_sparse(x, "x", limit)
    values = _array(x)
    if values.dtype.kind in "OU" and missing is not None and (numbers := missing.numeric(values)) is not None:
        return Pieces.of(numbers)
    if values.dtype.kind == "O":
        raise ValueError(
            f"x is {shown(x)}, which NumPy does not read as a numeric array: pass rows of equal length, and numbers "
            "stored as objects as x.astype(float)"
        )
    return Pieces.of(values)


def _is_sparse(x: object) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(x))


def _is_anndata(x: object) -> bool:
    return any(kind.__name__ == "AnnData" for kind in type(x).__mro__)


def _of_anndata(x: Any, labels: Any, limit: int, missing: Missing | None) -> Table:
    """The matrix of an AnnData with its variable names, and labels from its observations."""
    if isinstance(labels, str):
        if labels not in x.obs:
            raise ValueError(f"x.obs has no column {labels!r} for labels=; it has {listed(list(x.obs.columns))}")
        labels = x.obs[labels]
    return _labelled(_pieces(x.X, limit, missing), labels, tuple(map(str, x.var_names)))


def _array(x: Any, name: str = "x") -> NDArray[np.generic]:
    if isinstance(x, Tensor):
        check_tensor(x, name)
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # bfloat16 does not exist in NumPy
    try:
        values: NDArray[np.generic] = x.numpy() if isinstance(x, Tensor) else np.ma.asanyarray(x)
    except (ValueError, TypeError, RuntimeError) as error:  # parts have different shapes or types
        raise ValueError(f"{name} is {shown(x)}, which NumPy does not read as a numeric array: {error}") from error
    return _filled(values)


def _filled(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """Replace masked values by missing ones."""
    if not isinstance(x, np.ma.MaskedArray):
        return np.asarray(x)
    if not np.ma.is_masked(x):
        return np.asarray(x.data)
    numbers = x.dtype.kind in "biuf"
    wide = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64 if numbers else object)
    made = np.asarray(x.data).astype(wide)
    made[np.ma.getmaskarray(x)] = np.nan if numbers else None
    return made


def _collect(
    dataset: torch.utils.data.Dataset[Any], limit: int
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """All items of a map-style data set, checked against the first one."""
    kind = type(dataset).__name__
    streams = isinstance(dataset, torch.utils.data.IterableDataset)
    if streams or not isinstance(dataset, Sized):
        raise TypeError(f"{kind} has no length: collect its items in an array, and pass the array")
    n = len(dataset)
    if not n:
        raise ValueError(f"{kind} is empty")
    first, label = _item(dataset[0])
    check_size(kind, n * first.nbytes, limit)
    values, labels = np.empty((n, *first.shape), first.dtype), []
    for i in range(n):
        value, label = _item(dataset[i])
        if value.shape != first.shape or value.dtype != first.dtype:
            raise ValueError(
                f"item {i} of {kind} is {value.dtype} {value.shape}, but the first is {first.dtype} {first.shape}"
            )
        values[i] = value
        labels.append(label)
    return values, None if labels[0] is None else np.array([_array(label) for label in labels])


def _item(item: Any) -> tuple[NDArray[np.generic], Any]:
    """The data point and label of an item: a data point, a tuple of both, or a mapping with data and labels."""
    if isinstance(item, Mapping):
        if "data" not in item:
            raise ValueError(
                f"an item of x is a {type(item).__name__} with the entries {listed(list(item))}, but a data point, a "
                "(data point, label) tuple, or the entries data and labels were expected: pass an array of one "
                f"entry, such as numpy.stack([item[{next(iter(item), '...')!r}] for item in x])"
            )
        return _array(item["data"]), item.get("labels")
    if isinstance(item, Sequence) and not isinstance(item, str):
        if len(item) not in (1, 2):
            raise ValueError(
                f"an item of x must be a data point or a (data point, label) tuple, but it has {len(item)} parts: "
                "pass an array of the data, such as numpy.stack([item[0] for item in x])"
            )
        return _array(item[0]), item[1] if len(item) == 2 else None
    return _array(item), None
