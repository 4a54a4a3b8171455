"""Your own data: arrays, DataFrames and torch datasets as a :class:`Dataset`; nothing is done to them unasked."""

from __future__ import annotations

__all__ = ["from_array", "read_table"]

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jensen.checked import checked

from .arrays import LIMIT, read_npy, read_npz
from .dataset import Dataset
from .delimited import read_csv
from .preparation import Split, draw_split, prepare
from .tables import Table, is_frame, of_frame, read_parquet

_BLOCK = 2**22  # bytes that are checked or copied at once


@checked
def from_array(
    x: Any,
    labels: ArrayLike | Tensor | str | None = None,
    *,
    name: str = "array",
    split: Split = (0.8, 0.1, 0.1),
    seed: int = 0,
    levels: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    binarize: str | None = None,
    dequantize: bool = False,
    standardize: bool = False,
    dtype: torch.dtype = torch.float32,
    limit: int = LIMIT,
) -> Dataset:
    r"""Your own data in random splits. Values are left as they are, unless an argument says what to do with them.

    Args:
        x: a NumPy array, a tensor, or whatever NumPy takes for an array of numbers, of shape [N, X] or [N, T, X];
            images [N, height, width] or [N, channels, height, width] with ``image_shape``; a pandas DataFrame, a column
            a feature; or a torch ``Dataset`` with a length, whose items are data or (datum, label) pairs.
        labels: class of each datum, [N], numbers or words; of a DataFrame also the name of a column. Words are
            numbered in alphabetical order.
        name: what to call the data.
        split: shares that sum to 1, or numbers that sum to N, of training, validation and test data.
        seed: fixes the split and whatever else is random.
        levels: if the data are grey levels 0, ..., L - 1: their number L. They become x / (L - 1), or
            (x + u) / L if dequantized.
        image_shape: if the data are images: (height, width) or (channels, height, width). They become rows of X pixels.
        binarize: None; ``"threshold"``: 1 where a value exceeds one half; or ``"sample"``: drawn once from
            Bernoulli(x). Values have to lie between 0 and 1 (see ``levels``).
        dequantize: whether to add uniform noise to grey levels, so that they have a density (:func:`load`).
        standardize: whether to take off the mean and divide by the standard deviation of each training feature.
        dtype: of the data.
        limit: bytes that the items of a torch ``Dataset`` may take in memory; 4 GiB by default.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: if the data are empty, not numeric, of another shape, missing or infinite in places (the message
            says how many and where), no grey levels though ``levels`` is given; if labels do not fit them; if they
            take more memory than ``limit``; and as :func:`load` does.
        TypeError: for a torch ``Dataset`` without a length.

    Example:
        >>> data = from_array(torch.arange(40.0).reshape(20, 2), [0, 1] * 10, standardize=True)
        >>> data
        <Dataset array: 16 training, 2 validation, 2 test data of 2 features; standardized; licence: none stated>
        >>> round(data.train.mean().item(), 6), data.labels["test"].shape
        (0.0, torch.Size([2]))
    """
    table = _table(x, labels, limit)
    values = _checked(name, table, dtype)
    channels, shape = 1, None
    if image_shape is not None:
        values, channels, shape = _images(name, values, image_shape)
    if dequantize and levels is None:
        raise ValueError(f"dequantize needs to know how many levels {name} has: levels=256 for bytes")
    if levels is not None:
        _check_levels(name, values, levels)
    rows = draw_split(len(values), split, seed)
    codes, classes = (None, ()) if table.labels is None else _encode(name, table.labels, len(values))
    raw = Dataset(
        name=name,
        train=_rows(values, rows["train"], dtype),
        validation=_rows(values, rows["validation"], dtype),
        test=_rows(values, rows["test"], dtype),
        labels={} if codes is None else {part: torch.tensor(codes[r]) for part, r in rows.items()},
        image_shape=shape,
        value_range=(0.0, 1.0) if levels else None,
        levels=levels,
        dequantized=False,
        licence="none stated",
        citation="",
        channels=channels,
        classes=classes,
    )
    return prepare(raw, binarize=binarize, dequantize=dequantize, standardize=standardize, seed=seed, dtype=dtype)


def read_table(path: Path, label: str | int | None, header: bool | None, limit: int) -> Table:
    """Read a ``.npy``, ``.npz``, ``.csv`` or ``.parquet`` file.

    Args:
        path: the file.
        label: column of labels by name or position; of a ``.npz`` file the name of their array.
        header: whether the first line of a CSV file holds names; None: detected.
        limit: bytes that the data may take in memory.

    Returns:
        Its data and labels.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for another kind of file, or what the reader of this kind finds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    kind = path.suffix.lower()
    if header is not None and kind != ".csv":
        raise ValueError(f"header belongs to .csv files, but got {path}")
    if kind == ".csv":
        return read_csv(path, label, header, limit)
    if kind == ".parquet":
        return read_parquet(path, label, limit)
    if kind == ".npz":
        x, labels = read_npz(path, label, limit)
        return Table(x, (), labels)
    if kind == ".npy":
        x = read_npy(path, limit)
        if label is None:
            return Table(x, (), None)
        if not isinstance(label, int) or x.ndim != 2 or not -x.shape[1] <= label < x.shape[1] or x.shape[1] < 2:
            raise ValueError(f"label is the position of a column of {path}, of shape {x.shape}, but got {label!r}")
        return Table(np.delete(x, label, 1), (), x[:, label])
    raise ValueError(f"{path} is of no kind that is read: .npy, .npz, .csv and .parquet are")


def _table(x: Any, labels: Any, limit: int) -> Table:
    if isinstance(x, Table):
        return x
    if is_frame(x):
        column = labels if isinstance(labels, str) else None
        table = of_frame(x, column)
        return table if labels is None or column is not None else Table(table.x, table.columns, _array(labels))
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r} names a column, but x is no DataFrame: pass the labels themselves")
    if isinstance(x, torch.utils.data.Dataset):
        values, own = _collect(x, limit)
        if own is not None and labels is not None:
            raise ValueError("x brings labels of its own: leave labels out")
        return Table(values, (), own if labels is None else _array(labels))
    return Table(_array(x), (), None if labels is None else _array(labels))


def _array(x: Any) -> NDArray[np.generic]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _collect(
    dataset: torch.utils.data.Dataset[Any], limit: int
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """All items of a map-style dataset, after a look at the first one."""
    if not isinstance(dataset, Sized):
        raise TypeError(f"{type(dataset).__name__} has no length: collect its items into an array, and pass that")
    n = len(dataset)
    if not n:
        raise ValueError(f"{type(dataset).__name__} is empty")
    first, label = _item(dataset[0])
    if n * first.nbytes > limit:
        raise ValueError(
            f"{type(dataset).__name__} would take {n * first.nbytes} bytes of memory: pass limit= to allow it"
        )
    values, labels = np.empty((n, *first.shape), first.dtype), []
    for i in range(n):
        value, label = _item(dataset[i])
        if value.shape != first.shape or value.dtype != first.dtype:
            raise ValueError(
                f"item {i} of {type(dataset).__name__} is {value.dtype} {value.shape}, but the first is {first.dtype} "
                f"{first.shape}"
            )
        values[i] = value
        labels.append(label)
    return values, None if labels[0] is None else np.array([_array(label) for label in labels])


def _item(item: Any) -> tuple[NDArray[np.generic], Any]:
    if isinstance(item, Sequence) and not isinstance(item, str):
        if len(item) not in (1, 2):
            raise ValueError(f"an item of x is a datum or a (datum, label) pair, but has {len(item)} parts")
        return _array(item[0]), item[1] if len(item) == 2 else None
    return _array(item), None


def _checked(name: str, table: Table, dtype: torch.dtype) -> NDArray[np.generic]:
    """The values, if they are numbers, all there, finite, and small enough for the dtype."""
    x = table.x
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype}, where numbers were expected")
    x = x.astype(x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.float64, copy=False)
    if x.ndim < 2 or not x.size:
        raise ValueError(
            f"{name} has the shape {x.shape}, where [N, X] was expected: {'x[:, None]' if x.ndim == 1 else 'no data'}"
        )
    if all(np.isfinite(part).all() for part in _blocks(x)):
        low = min(float(part.min()) for part in _blocks(x))
        high = max(float(part.max()) for part in _blocks(x))
        _check_dtype(name, x, (low, high), dtype)
        return x
    places = np.argwhere(~np.isfinite(x))
    shown = ", ".join(_place(place, table.columns) for place in places[:5])
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    missing = sum(int(np.isnan(part).sum()) for part in _blocks(x))
    what = [f"{missing} missing values (NaN)"] if missing else []
    what += [f"{len(places) - missing} infinite values"] if len(places) > missing else []
    raise ValueError(f"{name} has {' and '.join(what)}, at {shown}{more}: drop those rows, or fill them")


def _blocks(x: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """Rows a few at a time, so that what is made of them takes little memory."""
    rows = max(1, _BLOCK // max(1, x[0].nbytes))
    return (x[i : i + rows] for i in range(0, len(x), rows))


def _check_dtype(name: str, x: NDArray[np.generic], ends: tuple[float, float], dtype: torch.dtype) -> None:
    """Refuse a dtype that would change values: infinities for large ones, whole numbers for fractions."""
    largest = max(map(abs, ends))
    if dtype.is_floating_point:
        if largest > torch.finfo(dtype).max:
            raise ValueError(
                f"{name} has values as large as {largest:g}, which {dtype} does not hold: take dtype=torch.float64"
            )
        return
    if dtype.is_complex:
        raise ValueError(f"dtype is {dtype}, but data are real: take torch.float32 or torch.float64")
    least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    fractions = x.dtype.kind == "f" and any((part % 1).any() for part in _blocks(x))
    if fractions or ends[0] < least or int(x.max()) > most:
        raise ValueError(
            f"{name} has {'fractions' if fractions else f'values from {ends[0]:g} to {ends[1]:g}'}, which {dtype} does "
            "not hold: take dtype=torch.float32 or torch.float64"
        )


def _rows(values: NDArray[np.generic], rows: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
    """Rows of an array as a tensor, a few at a time: no copy of them in the array's own dtype is made."""
    made = torch.empty((len(rows), *values.shape[1:]), dtype=dtype)
    step = max(1, _BLOCK // max(1, values[0].nbytes))
    for i in range(0, len(rows), step):
        made[i : i + step] = torch.from_numpy(values[rows[i : i + step]])
    return made


def _place(place: NDArray[np.int64], columns: tuple[str, ...]) -> str:
    row, *rest = place.tolist()
    return f"row {row}, column {columns[rest[0]]!r}" if columns else f"row {row}, feature {', '.join(map(str, rest))}"


def _images(
    name: str, x: NDArray[np.generic], image_shape: tuple[int, ...]
) -> tuple[NDArray[np.generic], int, tuple[int, int]]:
    if len(image_shape) not in (2, 3) or min(image_shape) < 1:
        raise ValueError(f"image_shape is (height, width) or (channels, height, width), but got {image_shape}")
    size = int(np.prod(image_shape))
    if x.shape[1:] not in (image_shape, (size,), (1, *image_shape)):
        raise ValueError(f"{name} has data of shape {x.shape[1:]}, which are no images of image_shape={image_shape}")
    return x.reshape(len(x), size), image_shape[0] if len(image_shape) == 3 else 1, (image_shape[-2], image_shape[-1])


def _check_levels(name: str, x: NDArray[np.generic], levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels is at least 2, but got {levels}")
    if x.min() < 0 or x.max() > levels - 1 or (x.dtype.kind == "f" and (x % 1).any()):
        raise ValueError(
            f"{name} has values from {x.min():g} to {x.max():g}, where levels={levels} means whole numbers from 0 to "
            f"{levels - 1}"
        )


def _encode(name: str, labels: NDArray[np.generic], n: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as whole numbers, and the names of the classes where labels are words."""
    if labels.shape not in ((n,), (n, 1)):
        raise ValueError(f"labels of {name} have the shape {labels.shape}, but there are {n} data")
    labels = labels.reshape(n)
    if labels.dtype.kind in "biuf":
        if labels.dtype.kind == "f" and (not np.isfinite(labels).all() or (labels % 1).any()):
            raise ValueError(f"labels of {name} are classes: whole numbers or words, but some are neither")
        if len(labels) and labels.dtype.kind in "uf" and not -(2**63) <= int(labels.min()) <= int(labels.max()) < 2**63:
            raise ValueError(f"labels of {name} are as large as {labels.max()}, beyond int64: number the classes anew")
        return labels.astype(np.int64), ()
    missing = [i for i, label in enumerate(labels.tolist()) if label is None or label != label]
    if missing:
        raise ValueError(f"labels of {name} have {len(missing)} missing values, the first in row {missing[0]}")
    words = [str(label) for label in labels.tolist()]  # as an array, each would be as long as the longest
    classes = sorted(set(words))
    code = {word: i for i, word in enumerate(classes)}
    return np.fromiter((code[word] for word in words), np.int64, len(words)), tuple(classes)
