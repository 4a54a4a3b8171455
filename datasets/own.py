"""Your own data: arrays, DataFrames and torch datasets as a :class:`Dataset`; nothing is done to them unasked."""

from __future__ import annotations

__all__ = ["from_array", "read_table"]

import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jensen.checked import check_tensor, checked, shown

from .arrays import LIMIT, Pieces, read_npy, read_npz
from .dataset import Dataset
from .delimited import read_csv
from .preparation import Split, draw_split, prepare
from .tables import Table, is_frame, of_frame, read_parquet


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
    n, *sizes = _checked_shape(name, table.x)
    channels, shape = 1, None
    if image_shape is not None:
        sizes, channels, shape = _images(name, tuple(sizes), image_shape)
    if dequantize and levels is None:
        raise ValueError(f"dequantize needs to know how many levels {name} has: levels=256 for bytes")
    if levels is not None and levels < 2:
        raise ValueError(f"levels is at least 2, but got {levels}")
    if dtype.is_complex:
        raise ValueError(f"dtype is {dtype}, but data are real: take torch.float32 or torch.float64")
    rows = draw_split(n, split, seed)
    codes, classes = (None, ()) if table.labels is None else _encode(name, table.labels, n)
    found = _Found(whole=levels is not None or not dtype.is_floating_point)
    made = _placed(table.x, rows, dtype, found)
    found.check(name, table.columns, dtype, levels)
    raw = Dataset(
        name=name,
        train=made["train"].reshape(-1, *sizes),
        validation=made["validation"].reshape(-1, *sizes),
        test=made["test"].reshape(-1, *sizes),
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
        width = x.shape[1] if len(x.shape) == 2 else 0
        if not isinstance(label, int) or not -width <= label < width or width < 2:
            raise ValueError(f"label is the position of a column of {path}, of shape {x.shape}, but got {label!r}")
        return Table(x.without(label % width), (), x.column(label % width))
    raise ValueError(f"{path} is of no kind that is read: .npy, .npz, .csv and .parquet are")


def _table(x: Any, labels: Any, limit: int) -> Table:
    if isinstance(x, Table):
        return x
    if is_frame(x):
        column = labels if isinstance(labels, str) else None
        table = of_frame(x, column)
        return (
            table if labels is None or column is not None else Table(table.x, table.columns, _array(labels, "labels"))
        )
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r} names a column, but x is no DataFrame: pass the labels themselves")
    if isinstance(x, torch.utils.data.Dataset):
        values, own = _collect(x, limit)
        if own is not None and labels is not None:
            raise ValueError("x brings labels of its own: leave labels out")
        return Table(Pieces.of(values), (), own if labels is None else _array(labels, "labels"))
    return Table(Pieces.of(_array(x)), (), None if labels is None else _array(labels, "labels"))


def _array(x: Any, name: str = "x") -> NDArray[np.generic]:
    if isinstance(x, Tensor):
        check_tensor(x, name)
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # of which NumPy knows nothing
    try:
        return x.numpy() if isinstance(x, Tensor) else np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:  # of parts that have different shapes, or other types
        raise ValueError(f"{name} is {shown(x)}, which NumPy takes for no array of numbers: {error}") from error


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


def _checked_shape(name: str, x: Pieces) -> tuple[int, ...]:
    """The shape of what may be data: numbers, [N, X] or more."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype}, where numbers were expected")
    if len(x.shape) < 2 or not math.prod(x.shape):
        hint = "x[:, None]" if len(x.shape) == 1 else "no data"
        raise ValueError(f"{name} has the shape {x.shape}, where [N, X] was expected: {hint}")
    return x.shape


def _placed(x: Pieces, rows: dict[str, NDArray[np.int64]], dtype: torch.dtype, found: _Found) -> dict[str, Tensor]:
    """The rows of each split as a tensor, each piece of them looked at and converted on its own."""
    made = {part: torch.empty((len(order), *x.shape[1:]), dtype=dtype) for part, order in rows.items()}
    rank: NDArray[np.int64] = np.empty(x.shape[0], np.int64)
    for order, start in zip(rows.values(), np.cumsum([0, *map(len, rows.values())]), strict=False):
        rank[order] = np.arange(start, start + len(order))
    for (some, _, columns), piece in x.read():
        values = piece.astype(piece.dtype.newbyteorder("=") if piece.dtype.itemsize <= 8 else np.float64, copy=False)
        found.look(values, (some.start or 0, columns.start or 0))
        first = 0
        for target in made.values():
            here = (rank[some] >= first) & (rank[some] < first + len(target))
            to = torch.from_numpy(rank[some][here] - first)
            target[to, ..., columns] = torch.from_numpy(values[here]).to(dtype)
            first += len(target)
    return made


class _Found:
    """What values are, found a piece at a time: where some are missing or infinite, their ends, any fractions."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole  # whether fractions matter
        self.missing = self.infinite = 0
        self.places: list[tuple[int, ...]] = []  # the first of them
        self.low: float = math.inf
        self.high: float = -math.inf
        self.fractions = False

    def look(self, values: NDArray[np.generic], start: tuple[int, int]) -> None:
        """Look at a piece that begins at this row and column."""
        finite = np.isfinite(values) if values.dtype.kind == "f" else np.True_
        if not finite.all():
            places, nan = np.argwhere(~finite), int(np.isnan(values).sum())
            self.missing, self.infinite = self.missing + nan, self.infinite + len(places) - nan
            places = places[:_SHOWN] + np.array([start[0], *[0] * (values.ndim - 2), start[1]])
            self.places = sorted([*self.places, *map(tuple, places.tolist())])[:_SHOWN]
            values = values[finite]
        if values.size:
            self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        if self._whole and not self.fractions and values.dtype.kind == "f":
            self.fractions = bool((values % 1).any())

    def check(self, name: str, columns: tuple[str, ...], dtype: torch.dtype, levels: int | None) -> None:
        """Refuse values that are not there, or that a dtype or a number of levels would change."""
        if self.places:
            shown = ", ".join(_place(place, columns) for place in self.places)
            more = self.missing + self.infinite - len(self.places)
            what = [f"{self.missing} missing values (NaN)"] if self.missing else []
            what += [f"{self.infinite} infinite values"] if self.infinite else []
            where = f"{shown} and {more} more" if more else shown
            raise ValueError(f"{name} has {' and '.join(what)}, at {where}: drop those rows, or fill them")
        ends = f"values from {self.low:g} to {self.high:g}"
        if dtype.is_floating_point:
            largest = max(abs(self.low), abs(self.high))
            if largest > torch.finfo(dtype).max:
                raise ValueError(
                    f"{name} has values as large as {largest:g}, which {dtype} does not hold: take dtype=torch.float64"
                )
        else:
            least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            if self.fractions or self.low < least or self.high > most:
                raise ValueError(
                    f"{name} has {'fractions' if self.fractions else ends}, which {dtype} does not hold: take "
                    "dtype=torch.float32 or torch.float64"
                )
        if levels is not None and (self.low < 0 or self.high > levels - 1 or self.fractions):
            raise ValueError(f"{name} has {ends}, where levels={levels} means whole numbers from 0 to {levels - 1}")


_SHOWN = 5  # places that a message names


def _place(place: tuple[int, ...], columns: tuple[str, ...]) -> str:
    row, *rest = place
    return f"row {row}, column {columns[rest[0]]!r}" if columns else f"row {row}, feature {', '.join(map(str, rest))}"


def _images(name: str, sizes: tuple[int, ...], image_shape: tuple[int, ...]) -> tuple[list[int], int, tuple[int, int]]:
    """The shape of a row of pixels, channels, height and width."""
    if len(image_shape) not in (2, 3) or min(image_shape) < 1:
        raise ValueError(f"image_shape is (height, width) or (channels, height, width), but got {image_shape}")
    size = int(np.prod(image_shape))
    if sizes not in (image_shape, (size,), (1, *image_shape)):
        raise ValueError(f"{name} has data of shape {sizes}, which are no images of image_shape={image_shape}")
    return [size], image_shape[0] if len(image_shape) == 3 else 1, (image_shape[-2], image_shape[-1])


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
