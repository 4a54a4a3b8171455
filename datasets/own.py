"""Your own data: arrays, DataFrames and torch datasets as a :class:`Dataset`; nothing is done to them unasked."""

from __future__ import annotations

__all__ = ["from_array"]

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jensen.checked import checked

from .arrays import LIMIT, Pieces
from .columns import advise_drop, listed
from .containers import of_memory
from .counters import Counters
from .dataset import Dataset
from .preparation import Moments, Split, check_scale, draw_split, prepare
from .tables import Table


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
    table = of_memory(x, labels, limit)
    n, *sizes = _checked_shape(name, table.x)
    images = None if image_shape is None else _images(name, tuple(sizes), image_shape)
    if dequantize and levels is None:
        raise ValueError(f"dequantize needs to know how many levels {name} has: levels=256 for bytes")
    if levels is not None and levels < 2:
        raise ValueError(f"levels is at least 2, but got {levels}")
    if dtype.is_complex:
        raise ValueError(f"dtype is {dtype}, but data are real: take torch.float32 or torch.float64")
    rows = draw_split(n, split, seed)
    codes, classes = (None, ()) if table.labels is None else _encode(name, table.labels, n, sizes)
    direct = standardize and levels is None and binarize is None  # by statistics of what is not yet rounded
    whole = levels is not None or not dtype.is_floating_point
    spread = direct or _may_round(table.x.dtype, dtype)
    found = _Found(table, rows["train"], dtype, whole, spread, images, of_file=table is x)
    if direct:
        for place, values in _native(table.x):
            found.look(place, values)
        found.check(name, levels, rounded=False)
        check_scale(name, found.moments, len(rows["train"]), dtype, table.columns)
    made = _placed(table.x, rows, dtype, None if direct else found, found.moments if direct else None, images)
    if not direct:
        found.check(name, levels)
    _warn(name, table, found, given=x)
    raw = Dataset(
        name=name,
        train=made["train"],
        validation=made["validation"],
        test=made["test"],
        labels={} if codes is None else {part: torch.tensor(codes[r]) for part, r in rows.items()},
        image_shape=None if images is None else images.shape[1:],
        value_range=(0.0, 1.0) if levels else None,
        levels=levels,
        dequantized=False,
        licence="none stated",
        citation="",
        channels=1 if images is None else images.shape[0],
        classes=classes,
        location=_flat(found.moments.location, images) if direct else None,
        scale=_flat(found.moments.scale, images) if direct else None,
    )
    return prepare(
        raw, binarize=binarize, dequantize=dequantize, standardize=standardize and not direct, seed=seed, dtype=dtype
    )


def _checked_shape(name: str, x: Pieces) -> tuple[int, ...]:
    """The shape of what may be data: numbers, [N, X] or more."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype}, where numbers were expected")
    if len(x.shape) < 2 or not math.prod(x.shape):
        hint = "x[:, None]" if len(x.shape) == 1 else "no data"
        raise ValueError(f"{name} has the shape {x.shape}, where [N, X] was expected: {hint}")
    return x.shape


def _native(x: Pieces) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The pieces, in a byte order and precision that PyTorch has."""
    for place, values in x.read():
        wanted = values.dtype.newbyteorder("=") if values.dtype.itemsize <= 8 else np.dtype(np.float64)
        yield place, values.astype(wanted, copy=False)


def _placed(
    x: Pieces,
    rows: dict[str, NDArray[np.int64]],
    dtype: torch.dtype,
    found: _Found | None,
    moments: Moments | None,
    images: _Images | None,
) -> dict[str, Tensor]:
    """The rows of each split as a tensor, each piece of them looked at and converted on its own."""
    sizes = x.shape[1:] if images is None else (math.prod(x.shape[1:]),)
    made = {part: torch.empty((len(order), *sizes), dtype=dtype) for part, order in rows.items()}
    targets = [part if images is None else images.view(part, x.shape[1:]) for part in made.values()]
    location, scale = (None, None) if moments is None else (moments.location, moments.scale)
    rank: NDArray[np.int64] = np.empty(x.shape[0], np.int64)
    for order, start in zip(rows.values(), np.cumsum([0, *map(len, rows.values())]), strict=False):
        rank[order] = np.arange(start, start + len(order))
    for place, values in _native(x):
        some, _, columns = place
        if found is not None:
            found.look(place, values)
        if location is not None and scale is not None:
            values = (values.astype(np.float64) - location[..., columns]) / scale[..., columns]
        first = 0
        for target in targets:
            here = (rank[some] >= first) & (rank[some] < first + len(target))
            to = torch.from_numpy(rank[some][here] - first)
            new = torch.from_numpy(values[here]).to(dtype)
            if images is not None and images.order is not None:
                target[to[:, None], images.order[columns]] = new
            else:
                target[to, ..., columns] = new
            first += len(target)
    return made


def _flat(features: NDArray[np.float64], images: _Images | None) -> Tensor:
    """What there is of each feature, in the order of the features that come of it."""
    values = torch.from_numpy(features)
    if images is None:
        return values
    made = torch.empty(1, values.numel(), dtype=values.dtype)
    if images.order is not None:
        made[0, images.order] = values
    else:
        images.view(made, tuple(values.shape)).copy_(values[None])
    return made[0]


class _Found:
    """What values are, found a piece at a time: where some are missing or infinite, their ends, any fractions.

    Also the moments of the training data, where they are to be standardized or may be rounded, and columns that count.
    """

    def __init__(
        self,
        table: Table,
        train: NDArray[np.int64],
        dtype: torch.dtype,
        whole: bool,  # whether fractions matter
        spread: bool,  # whether moments do
        images: _Images | None,
        of_file: bool,
    ) -> None:
        shape, self._of_file = table.x.shape, of_file
        self._columns, self._dtype, self._whole, self._spread = table.columns, dtype, whole, spread
        self._train = np.zeros(shape[0], bool)
        self._train[train] = True
        self._vectors = images is None and len(shape) > 2  # the steps of a sequence
        self.moments = Moments(shape[-1:] if self._vectors else shape[1:])
        self.counters = Counters(shape, table.columns) if images is None else Counters((0, 0))
        self.missing = self.infinite = 0
        self._at: Counter[int] = Counter()  # missing and infinite values, by column
        self.places: list[tuple[int, ...]] = []  # the first of them
        self.low: float = math.inf
        self.high: float = -math.inf
        self.fractions = False

    def look(self, place: tuple[Any, ...], values: NDArray[np.generic]) -> None:
        """Look at a piece, and where it stands."""
        some, _, columns = place
        start = (some.start or 0, columns.start or 0)
        finite = np.isfinite(values) if values.dtype.kind == "f" else np.True_
        if not finite.all():
            places, nan = np.argwhere(~finite), int(np.isnan(values).sum())
            self.missing, self.infinite = self.missing + nan, self.infinite + len(places) - nan
            if self._columns:
                for column, count in enumerate((~finite).reshape(len(values), -1).sum(0).tolist()):
                    self._at[start[1] + column] += count
            places = places[:_SHOWN] + np.array([start[0], *[0] * (values.ndim - 2), start[1]])
            self.places = sorted([*self.places, *map(tuple, places.tolist())])[:_SHOWN]
            values = values[finite]
        elif not self.places:
            self._add(some, columns, values)
            self.counters.look(values, *start)
        if values.size:
            self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        if self._whole and not self.fractions and values.dtype.kind == "f":
            self.fractions = bool((values % 1).any())

    def _add(self, some: slice, columns: slice, values: NDArray[np.generic]) -> None:
        if not self._spread:
            return
        train = values[self._train[some]].astype(np.float64, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # of numbers whose squares are too large
            self.moments.add(train.reshape(-1, train.shape[-1]) if self._vectors else train, columns)

    def check(self, name: str, levels: int | None, rounded: bool = True) -> None:
        """Refuse values that are not there, or that a dtype or a number of levels would change."""
        columns, dtype = self._columns, self._dtype
        if self.places:
            shown = ", ".join(_place(place, columns) for place in self.places)
            more = self.missing + self.infinite - len(self.places)
            what = [f"{self.missing} missing values (NaN)"] if self.missing else []
            what += [f"{self.infinite} infinite values"] if self.infinite else []
            where = f"{shown} and {more} more" if more else shown
            bad = [columns[i] for i in sorted(self._at) if self._at[i]]
            counts = listed([f"{self._at[i]} of {columns[i]!r}" for i in sorted(self._at) if self._at[i]])
            out = f" ({counts})" if bad else ""
            out += f"; or {advise_drop(bad)}" if self._of_file and 0 < len(bad) < len(columns) else ""
            raise ValueError(f"{name} has {' and '.join(what)}, at {where}: drop those rows, or fill them{out}")
        ends = f"values from {self.low:g} to {self.high:g}"
        if dtype.is_floating_point:
            largest = max(abs(self.low), abs(self.high))
            if largest > torch.finfo(dtype).max:
                raise ValueError(
                    f"{name} has values as large as {largest:g}, which {dtype} does not hold: take dtype=torch.float64"
                )
            if rounded and levels is None:
                self._check_rounding(name)
        else:
            least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            if self.fractions or self.low < least or self.high > most:
                raise ValueError(
                    f"{name} has {'fractions' if self.fractions else ends}, which {dtype} does not hold: take "
                    "dtype=torch.float32 or torch.float64"
                )
        if levels is not None and (self.low < 0 or self.high > levels - 1 or self.fractions):
            raise ValueError(f"{name} has {ends}, where levels={levels} means whole numbers from 0 to {levels - 1}")

    def _check_rounding(self, name: str) -> None:
        """Refuse a dtype whose steps are not small beside the spread of a feature."""
        location, scale = self.moments.location.reshape(-1), self.moments.scale.reshape(-1)
        about = torch.finfo(self._dtype)
        step = np.maximum(about.eps * abs(location), about.tiny * (scale > 0))
        coarse = np.flatnonzero((scale > 0) & (step > _COARSE * scale)).tolist()
        if coarse:
            i, more = coarse[0], f" (and {len(coarse) - 1} more)" if len(coarse) > 1 else ""
            raise ValueError(
                f"{self._dtype} would round {_which(i, self._columns)} of {name}{more} to steps of {step[i]:.2g}: its "
                f"values lie near {location[i]:g} with a standard deviation of {scale[i]:.2g}; take standardize=True, "
                "in a shell --standardize, or dtype=torch.float64"
            )


def _may_round(given: np.dtype[Any], dtype: torch.dtype) -> bool:
    """Whether a dtype holds fewer digits than another: those of bytes it always holds."""
    narrow = given.itemsize <= (dtype.itemsize if given.kind == "f" else 2)
    return dtype.is_floating_point and given.kind in "iuf" and not narrow


def _warn(name: str, table: Table, found: _Found, given: Any) -> None:
    """Say which columns number the rows, and where labels are as many as data."""
    found_now = found.counters.found()
    for i, what in list(found_now.items())[:_SHOWN]:
        column = _which(i, table.columns)
        names = [table.columns[i]] if table.columns else [str(i)]
        out = (
            advise_drop(names)
            if given is table
            else f"leave it out of x, {'by its name' if table.columns else 'by its position'}"
        )
        warnings.warn(f"{name}: {column} {what}: if it is an index, {out}", stacklevel=4)
    if table.labels is not None and len(table.labels) >= _MANY:
        different = len(set(np.ravel(table.labels).tolist()))
        if different > len(table.labels) / 2:
            warnings.warn(
                f"{name}: the {len(table.labels)} labels have {different} different values, and labels are classes: "
                "leave them out if they are names or measurements",
                stacklevel=4,
            )


_SHOWN = 5  # places that a message names


_COARSE = 0.05  # of a standard deviation, to which rounding is no harm
_MANY = 50  # labels, below which they may all differ


def _place(place: tuple[int, ...], columns: tuple[str, ...]) -> str:
    row, *rest = place
    return f"row {row}, column {columns[rest[0]]!r}" if columns else f"row {row}, feature {', '.join(map(str, rest))}"


def _which(i: int, columns: tuple[str, ...]) -> str:
    return f"column {columns[i]!r}" if columns else f"feature {i}"


@dataclass(frozen=True)
class _Images:
    """How data become rows of pixels, plane after plane.

    Attributes:
        shape: channels, height and width.
        last: whether the channels come last in the data.
        order: where each pixel goes, if the data are rows of pixels whose channels come last.
    """

    shape: tuple[int, int, int]
    last: bool
    order: Tensor | None

    def view(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Rows of pixels [n, X] in the shape of the data, [n, *sizes]."""
        if self.last and len(sizes) > 1:
            return rows.view(-1, *self.shape).movedim(1, -1)
        return rows.view(-1, *sizes)


def _images(name: str, sizes: tuple[int, ...], image_shape: tuple[int, ...]) -> _Images:
    """What data of a shape are as images: channels may come first or last, in the data and in ``image_shape``."""
    if len(image_shape) not in (2, 3) or min(image_shape) < 1:
        raise ValueError(
            "image_shape is (height, width), (channels, height, width) or (height, width, channels), but got "
            f"{image_shape}"
        )
    told_last = len(image_shape) == 3 and image_shape[0] > _CHANNELS >= image_shape[2]
    height, width, channels = image_shape if told_last else (*image_shape[-2:], (1, *image_shape)[-3])
    shape = channels, height, width
    pixels = math.prod(shape)
    if sizes == (pixels,):
        order = torch.arange(pixels).view(shape).movedim(0, -1).flatten() if told_last else None
        return _Images(shape, told_last, order)
    if sizes == shape or (channels == 1 and sizes == (height, width)):
        return _Images(shape, False, None)
    if sizes == (height, width, channels):
        return _Images(shape, True, None)
    remedy = f": image_shape={sizes} is what they have" if len(sizes) in (2, 3) else ""
    raise ValueError(f"{name} has data of shape {sizes}, which are no images of image_shape={image_shape}{remedy}")


_CHANNELS = 4  # of an image, at most, where a third size is told to be that of the channels


def _encode(
    name: str, labels: NDArray[np.generic], n: int, sizes: list[int]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as whole numbers, and the names of the classes where labels are words."""
    if labels.shape not in ((n,), (n, 1)):
        hint = "; for one-hot labels take labels.argmax(1)" if labels.ndim == 2 and len(labels) == n else ""
        hint = "; data are rows: transpose them" if sizes and labels.size == sizes[0] else hint
        raise ValueError(f"labels of {name} have the shape {labels.shape}, but there are {n} data{hint}")
    labels = labels.reshape(n)
    if labels.dtype.kind in "mM":
        raise ValueError(f"labels of {name} are dates or times, {labels.dtype}, and labels are classes: leave them out")
    if labels.dtype.kind == "O" and all(isinstance(label, Number) for label in labels.tolist()):
        labels = labels.astype(np.float64) if any(label % 1 for label in labels.tolist()) else labels.astype(np.int64)
    if labels.dtype.kind in "biuf":
        if labels.dtype.kind == "f" and (missing := np.flatnonzero(np.isnan(labels)).tolist()):
            raise ValueError(f"labels of {name} have {len(missing)} missing values, the first in row {missing[0]}")
        if labels.dtype.kind == "f" and (labels % 1 != 0).any():  # of infinity NaN
            other = labels[labels % 1 != 0]
            raise ValueError(
                f"labels of {name} are classes: whole numbers or words, but {len(other)} are other numbers, such as "
                f"{other[0]:g}: a column of measurements is data, or make classes of it, as by numpy.digitize"
            )
        if len(labels) and labels.dtype.kind in "uf" and not -(2**63) <= int(labels.min()) <= int(labels.max()) < 2**63:
            raise ValueError(f"labels of {name} are as large as {labels.max()}, beyond int64: number the classes anew")
        return labels.astype(np.int64), ()
    missing = [i for i, label in enumerate(labels.tolist()) if _is_missing(label)]
    if missing:
        raise ValueError(f"labels of {name} have {len(missing)} missing values, the first in row {missing[0]}")
    words = [_word(label) for label in labels.tolist()]  # as an array, each would be as long as the longest
    classes = sorted(set(words))
    code = {word: i for i, word in enumerate(classes)}
    return np.fromiter((code[word] for word in words), np.int64, len(words)), tuple(classes)


def _word(label: Any) -> str:
    """A label as text; bytes in UTF-8, or else Latin-1."""
    if not isinstance(label, bytes):
        return str(label)
    try:
        return label.decode()
    except UnicodeDecodeError:
        return label.decode("latin-1")


def _is_missing(label: Any) -> bool:
    """Whether a label is None, NaN, or what pandas writes in their place, which equals nothing and is not false."""
    return label is None or type(label).__name__ in ("NAType", "NaTType") or bool(label != label)
