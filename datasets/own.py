"""The function ``from_array``: your own arrays, DataFrames and torch data sets as a :class:`Dataset`."""

from __future__ import annotations

__all__ = ["from_array"]

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jensen.checked import checked

from .arrays import LIMIT, Pieces
from .columns import listed
from .containers import of_memory
from .dataset import Dataset
from .findings import Findings
from .images import Images, images_of
from .labels import encode, warn_of_many
from .missing import Missing
from .places import on_cpu
from .preparation import Moments, Split, check_scale, draw_split, prepare
from .tables import Table


@checked
@on_cpu
def from_array(
    x: Any,
    labels: Any = None,
    *,
    name: str = "array",
    split: Split = (0.8, 0.1, 0.1),
    seed: int = 0,
    levels: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    binarize: str | None = None,
    dequantize: bool = False,
    standardize: bool = False,
    missing: Any = None,
    dtype: torch.dtype = torch.float32,
    limit: int = LIMIT,
) -> Dataset:
    r"""Your own data in random splits. Values are unchanged unless an argument requests a transformation.

    Args:
        x: a NumPy array, a tensor, or anything that NumPy reads as a numeric array, of shape [N, X] or [N, T, X];
            images [N, height, width], or with channels first or last, together with ``image_shape``; a DataFrame of
            pandas or polars, a table of pyarrow or a structured array, with one column per feature; a SciPy sparse
            matrix, which is made dense; an ``AnnData``; or a torch ``Dataset`` with a length, whose items are data
            points, (data point, label) tuples or mappings with the entries ``data`` and ``labels``.
        labels: class of each data point, [N], integers or words; for data with named columns also the name of a column
            (for an ``AnnData``, of ``obs``). Words are numbered in alphabetical order.
        name: the name of the data.
        split: shares that sum to 1, or numbers that sum to N, of training, validation and test data.
        seed: fixes the split and all other random steps.
        levels: the number L of levels, if the data are grey levels 0, ..., L - 1. They become x / (L - 1), or (x + u) /
            L if dequantized.
        image_shape: if the data are images: (height, width), (channels, height, width) or (height, width, channels).
            They become rows of X pixels, channel after channel.
        binarize: None; ``"threshold"``: 1 where a value exceeds one half; or ``"sample"``: sampled once from
            Bernoulli(x). Values must lie between 0 and 1 (see ``levels``).
        dequantize: whether to add uniform noise to grey levels, so that they have a density (:func:`load`).
        standardize: whether to subtract the mean and divide by the standard deviation of each training feature, in
            float64, before the values are stored.
        missing: None: a missing value is an error. ``"nan"``: NaN, None and masked values were not observed. A word, a
            number or a list of them, such as ``-999`` or ``["?", -999]``: so were values equal to it. Or a Boolean mask
            of the shape of x, True where a value was not observed. In the result such values are NaN, and statistics
            are those of the observed values. Labels must be known.
        dtype: of the data.
        limit: the maximal bytes in memory of the items of a torch ``Dataset`` or of a sparse matrix made dense; 4 GiB
            by default.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: if the data are empty, not numeric, of another shape, have infinite values or, without ``missing``,
            missing ones (the message gives their number and positions), are not grey levels although ``levels`` is
            given, or would lose precision by rounding; if a mask has another shape, a row has no observed value, a
            feature has none in the training data, or ``dtype`` has no NaN; if labels do not match the data, are missing
            or are not classes; if the data exceed ``limit``; and as for :func:`load`.
        TypeError: for a torch ``Dataset`` without a length, a ``DataLoader``, a path, data that already have splits, or
            another type of ``missing``.

    Example:
        >>> data = from_array(torch.arange(40.0).reshape(20, 2), [0, 1] * 10, standardize=True)
        >>> data
        <Dataset array: 16 training, 2 validation, 2 test data of 2 features; standardized; licence: none stated>
        >>> round(data.train.mean().item(), 6), data.labels["test"].shape
        (0.0, torch.Size([2]))
        >>> data = from_array([[1.0, -999.0], [2.0, 3.0], [4.0, 5.0]], missing=-999, split=(3, 0, 0))
        >>> data
        <Dataset array: 3 training, 0 validation, 0 test data of 2 features; 17 % missing; licence: none stated>
        >>> int(data.masks["train"].sum())
        1
    """
    given = Missing.of(missing)
    table = of_memory(x, labels, limit, given)
    n, *sizes = _checked_shape(name, table.x)
    if given is not None:
        if not dtype.is_floating_point:
            raise ValueError(
                f"missing= needs a floating-point dtype for NaN, but got {dtype}: use torch.float32 or torch.float64"
            )
        table = replace(table, x=given.applied(name, table.x, table.columns))
    images = None if image_shape is None else images_of(name, tuple(sizes), image_shape)
    if dequantize and levels is None:
        raise ValueError(f"dequantize needs the number of levels of {name}: pass levels, for bytes levels=256")
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2, but got {levels}")
    if dtype.is_complex:
        raise ValueError(f"dtype is {dtype}, but data are real: use torch.float32 or torch.float64")
    rows = draw_split(n, split, seed)
    codes, classes = (None, ()) if table.labels is None else encode(name, table.labels, n, sizes)
    of_file = isinstance(x, Table)
    direct = standardize and levels is None and binarize is None  # with statistics of the values before rounding
    found = Findings(
        table, rows["train"], dtype, levels, images=images is not None, spread=direct, of_file=of_file, missing=given
    )
    if direct:
        for place, values in _native(table.x):
            found.look(place, values)
        found.check(name, rounded=False)
        check_scale(name, found.moments, len(rows["train"]), dtype, table.columns)
    made = _placed(table.x, rows, dtype, None if direct else found, found.moments if direct else None, images)
    if not direct:
        found.check(name)
    found.warn(name)
    if table.labels is not None:
        warn_of_many(name, table.labels)
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
        columns=() if images is not None else tuple(map(str, table.columns)),
        location=_flat(found.moments.location, images) if direct else None,
        scale=_flat(found.moments.scale, images) if direct else None,
    )
    return prepare(
        raw, binarize=binarize, dequantize=dequantize, standardize=standardize and not direct, seed=seed, dtype=dtype
    )


def _checked_shape(name: str, x: Pieces) -> tuple[int, ...]:
    """The shape of valid data: numbers, [N, X] or more dimensions."""
    if x.dtype.names:
        raise ValueError(
            f"{name} has a structured array with the fields {listed(x.dtype.names)}: load it with numpy.load and pass "
            "it to from_array, or save its fields as the columns of one array"
        )
    if x.dtype.kind not in "biuf":
        hint = ": for numbers as text, use x.astype(float)" if x.dtype.kind in "SU" else ""
        raise ValueError(f"{name} has dtype {x.dtype}, but numbers were expected{hint}")
    if len(x.shape) < 2 or not math.prod(x.shape):
        hint = "x[:, None]" if len(x.shape) == 1 else "no data"
        raise ValueError(f"{name} has the shape {x.shape}, but [N, X] was expected: {hint}")
    return x.shape


def _native(x: Pieces) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The pieces, in a byte order and precision that PyTorch supports."""
    for place, values in x.read():
        wanted = values.dtype.newbyteorder("=") if values.dtype.itemsize <= 8 else np.dtype(np.float64)
        yield place, values.astype(wanted, copy=False)


def _placed(
    x: Pieces,
    rows: dict[str, NDArray[np.int64]],
    dtype: torch.dtype,
    found: Findings | None,
    moments: Moments | None,
    images: Images | None,
) -> dict[str, Tensor]:
    """The rows of each split as a tensor; each piece is checked and converted separately."""
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


def _flat(features: NDArray[np.float64], images: Images | None) -> Tensor:
    """Statistics of each input feature, in the order of the resulting features."""
    values = torch.from_numpy(features)
    if images is None:
        return values
    made = torch.empty(1, values.numel(), dtype=values.dtype)
    if images.order is not None:
        made[0, images.order] = values
    else:
        images.view(made, tuple(values.shape)).copy_(values[None])
    return made[0]
