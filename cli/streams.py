"""Files of data above a quarter of the free memory: read by the batch, in the same random splits as in memory.

A split is one of rows, as :func:`jensen.datasets.load` draws it, so a row is in the same split however the file is
read. A few rows of each split are kept as tensors, for figures and for advice.
"""

from __future__ import annotations

__all__ = ["Streamed", "Values", "count", "holed", "is_large", "opened", "picked", "rows_in", "values_of"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jensen.datasets import Dataset
from jensen.datasets.arrays import LIMIT
from jensen.datasets.preparation import Moments, check_scale, draw_split
from jensen.datasets.streams import Standardized
from jensen.sources import Mapped, Source, as_blocks, converted

from .memory import free_memory, size_of
from .terminal import say

_SPLIT = (0.8, 0.1, 0.1)  # of load, for a file
_KEPT = 2000  # rows of a split that are kept as tensors
_IN_MEMORY = ("label", "header", "drop", "only", "member", "levels", "image_shape", "dequantize")


@dataclass
class Values:
    """What is known of all observed values: their range, and whether they are whole numbers, and zeros and ones."""

    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    bits: bool = True
    missing: int = 0
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add the values of some rows."""
        seen = x if not x.is_floating_point() or not (holes := x.isnan()).any() else x[~holes]
        self.count += x.numel()
        self.missing += x.numel() - seen.numel()
        if seen.numel():
            self.low, self.high = min(self.low, float(seen.min())), max(self.high, float(seen.max()))
            self.whole = self.whole and bool((seen == seen.floor()).all())
            self.bits = self.bits and self.whole and self.low >= 0 and self.high <= 1


@dataclass(frozen=True, eq=False, repr=False)
class Streamed(Dataset):
    """Data that are read by the batch: ``train``, ``validation`` and ``test`` hold some of their rows.

    Attributes:
        sources: all rows, by split.
        order: the numbers of the rows of a split in the file, in the order in which ``load`` gives them.
        values: what is known of all values.
    """

    sources: dict[str, Mapped] = field(default_factory=dict)
    order: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    values: Values = field(default_factory=Values)


def rows_in(data: Dataset, split: str) -> Tensor | Source:
    """The rows of a split."""
    return data.sources[split] if isinstance(data, Streamed) else getattr(data, split)


def count(data: Dataset, split: str) -> int:
    """The number of rows of a split."""
    return len(data.order[split]) if isinstance(data, Streamed) else len(getattr(data, split))


def picked(data: Dataset, split: str, rows: Tensor) -> Tensor:
    """Rows of a split, by their positions in the order in which ``load`` gives them."""
    if not isinstance(data, Streamed):
        x: Tensor = getattr(data, split)[rows]
        return x
    order = data.order[split]
    places = np.searchsorted(np.sort(order), order[rows.numpy()])
    return data.sources[split].take(torch.from_numpy(places))[0]


def values_of(data: Dataset) -> Values:
    """What is known of the values; of those of the training data, if these are in memory."""
    if isinstance(data, Streamed):
        return data.values
    values = Values()
    values.add(data.train)
    return values


def holed(data: Dataset) -> bool:
    """Whether values are missing."""
    return data.values.missing > 0 if isinstance(data, Streamed) else bool(data.masks)


def is_large(settings: Mapping[str, Any]) -> bool:
    """Whether a file is read by the batch: if its data need more than a quarter of the free memory; this is printed.

    A folder of Parquet files is always read by the batch. With an option that needs all data at once, a file is not.

    Raises:
        ValueError: for such an option and a folder.
    """
    path = Path(settings["source"])
    blocks = as_blocks(path)
    if blocks is None:
        return False
    x = blocks.head(1)[0]
    needed, free = 4 * (blocks.n or 0) * x.numel(), free_memory()
    if not path.is_dir() and needed <= min(free / 4, LIMIT):
        return False
    given = [name for name in _IN_MEMORY if settings.get(name)]
    given += ["binarize"] if settings["binarize"] in ("threshold", "sample") else []
    given += ["missing"] if settings.get("missing") not in (None, ["nan"]) else []
    much = f"{path.name}: its data need {size_of(needed)}, a quarter of the free memory is {size_of(free / 4)}"
    if given:
        option = f"--{given[0].replace('_', '-')}"
        if path.is_dir():
            raise ValueError(f"{option} needs all data at once, but {path} is a folder, which is read by the batch")
        say(f"{much}; they are loaded nevertheless, because {option} needs all of them at once")
        return False
    say(f"{much}, so they are read by the batch")
    return True


def opened(settings: Mapping[str, Any]) -> Streamed:
    """The data of a file in splits, after one pass over it.

    Raises:
        ValueError: for infinite values, missing ones without the setting ``missing``, rows that are not vectors, and
            features that cannot be standardized.
    """
    path = Path(settings["source"])
    blocks = as_blocks(path)
    if blocks is None or blocks.n is None:
        raise ValueError(f"{path} cannot be read by the batch: give a .npy or Parquet file, or a folder of these")
    name, n, shape = path.stem, blocks.n, tuple(blocks.head(1)[0].shape[1:])
    if len(shape) != 1:
        raise ValueError(f"{path} has data points of shape {list(shape)}, but vectors are needed: flatten them")
    order = draw_split(n, _SPLIT, settings["seed"])
    kept = {split: np.sort(rows[:_KEPT]) for split, rows in order.items()}
    values, moments = Values(), Moments(shape)
    training = np.zeros(n, bool)
    training[order["train"]] = True
    shown: dict[str, list[Tensor]] = {split: [] for split in order}
    first = 0

    def look(batch: tuple[Tensor, ...]) -> None:
        nonlocal first
        (x,) = batch
        last = first + len(x)
        if x.is_floating_point() and bool(x.isinf().any()):
            raise ValueError(f"{name} holds infinite values in the rows {first} to {last - 1}: remove these rows")
        values.add(x)
        if settings["standardize"]:
            moments.add(x.double().numpy()[training[first:last]])
        for split, rows in kept.items():
            begin, end = np.searchsorted(rows, [first, last])
            shown[split].append(x[torch.from_numpy(rows[begin:end] - first)])
        first = last

    blocks.survey(look)
    if values.missing and settings.get("missing") is None:
        raise ValueError(
            f"{name} holds {values.missing} values that are NaN: if they mark missing values, add --missing nan; else "
            "remove these rows"
        )
    wide, scale, location = torch.get_default_dtype(), None, None
    if settings["standardize"]:
        check_scale(name, moments, len(order["train"]), wide)
        location, scale = torch.from_numpy(moments.location), torch.from_numpy(moments.scale)
        values.whole = values.bits = False

    def prepared(rows: NDArray[np.int64]) -> Mapped:
        some = blocks.only(rows)
        if location is None or scale is None:
            return converted(some)
        return Standardized(some, location, scale, wide)

    sources = {split: prepared(np.sort(rows)) for split, rows in order.items() if len(rows)}
    tensors = {split: sources["train"].change((torch.cat(parts),))[0] for split, parts in shown.items()}
    return Streamed(
        name=name,
        train=tensors["train"],
        validation=tensors["validation"],
        test=tensors["test"],
        labels={},
        image_shape=None,
        value_range=None,
        levels=None,
        dequantized=False,
        licence="none stated",
        citation="",
        location=location,
        scale=scale,
        sources=sources,
        order=order,
        values=values,
    )
