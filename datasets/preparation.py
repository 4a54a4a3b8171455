"""What may be done to data before they are used, each on request: split, scaled, dequantized, binarized, standardized.

Grey images with L levels 0 ... L - 1 become x / (L - 1), or dequantized (x + u) / L with u uniform on [0, 1).
"""

from __future__ import annotations

__all__ = ["SPLITS", "Split", "draw_split", "prepare"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import BLOCK
from .dataset import Dataset

SPLITS = ("train", "validation", "test")
Split = tuple[float, float, float]


def draw_split(n: int, split: Split, seed: int) -> dict[str, NDArray[np.int64]]:
    """Rows of a random split.

    Args:
        n: number of data.
        split: shares that sum to 1, or numbers that sum to ``n``, of training, validation and test data.
        seed: fixes the permutation.

    Returns:
        Row numbers by split name; each row is in one split.

    Raises:
        ValueError: if the three do not sum to 1 or to ``n``, one is negative, or no training datum remains.
    """
    total = sum(split) if len(split) == 3 and all(part >= 0 for part in split) else -1.0
    if total == n and all(part == int(part) for part in split):
        sizes = [int(part) for part in split]
    elif abs(total - 1) < 1e-6:
        ends = [round(n * sum(split[: i + 1])) for i in range(3)]
        sizes = [ends[0], ends[1] - ends[0], n - ends[1]]
    else:
        raise ValueError(f"split is three shares that sum to 1, or three numbers that sum to {n}, but got {split}")
    if not sizes[0]:
        raise ValueError(f"split {split} leaves no training datum of {n}: give training a larger share")
    order = np.random.default_rng(seed).permutation(n)
    return dict(zip(SPLITS, np.split(order, [sizes[0], sizes[0] + sizes[1]]), strict=True))


def prepare(
    raw: Dataset,
    *,
    binarize: str | None,
    dequantize: bool,
    standardize: bool,
    seed: int,
    dtype: torch.dtype,
) -> Dataset:
    """Scale raw data, and binarize, dequantize or standardize them as the arguments say.

    Args:
        raw: data as they were read: levels 0 ... L - 1 where ``levels`` is set, else anything. They are overwritten
            where they have the ``dtype`` already, since two copies may not fit into memory.
        binarize: None, ``"threshold"`` at one half, or ``"sample"`` from Bernoulli(x).
        dequantize: whether to add uniform noise to levels.
        standardize: whether to take off the mean and divide by the standard deviation of each training feature.
        seed: fixes the noise.
        dtype: of the data.

    Returns:
        The data set, and in its attributes what was done to it.

    Raises:
        ValueError: if the data have no levels to dequantize, values outside [0, 1] to binarize, features without
            spread to standardize, or if two of the three exclude each other.
    """
    if binarize not in (None, "threshold", "sample"):
        raise ValueError(f"binarize is None, 'threshold' or 'sample', but got {binarize!r}")
    if binarize and (dequantize or standardize):
        other = "dequantize" if dequantize else "standardize"
        raise ValueError(f"binarize and {other} exclude each other: zeros and ones have no density; choose one of them")
    data = _scaled(raw, dequantize, seed, dtype)
    if binarize:
        data = _binarized(data, binarize, seed)
    return _standardized(data) if standardize else data


def _each(data: Dataset, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Dataset:
    """The data with every row changed, some rows at a time, in the order of the splits."""

    def changed(x: Tensor) -> Tensor:
        made = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        for part, target in zip(_blocks(x), _blocks(made), strict=True):
            target.copy_(change(part))
        return made

    return replace(data, train=changed(data.train), validation=changed(data.validation), test=changed(data.test))


def _blocks(x: Tensor) -> Sequence[Tensor]:
    return torch.split(x, max(1, BLOCK // max(1, 8 * x[:1].numel())))


def _scaled(raw: Dataset, dequantize: bool, seed: int, dtype: torch.dtype) -> Dataset:
    levels = raw.levels
    if dequantize and levels is None:
        raise ValueError(f"{raw.name} holds measurements: there is nothing to dequantize")
    if dequantize and levels == 2:
        raise ValueError(f"{raw.name} is binary: there is nothing to dequantize")
    if levels is None or levels == 2:
        return raw if raw.train.dtype == dtype else _each(raw, lambda x: x.to(dtype), dtype)
    noise = torch.Generator().manual_seed(seed)

    def scale(x: Tensor) -> Tensor:
        if not dequantize:
            return x.to(dtype) / (levels - 1)
        u = torch.rand(x.shape, generator=noise, dtype=torch.float32)
        return (x.to(dtype) + u.clamp_max(1 - 2**-16)) / levels  # 255 + u stays below 256 in float32

    return replace(_each(raw, scale, dtype), value_range=(0.0, 1.0), dequantized=dequantize)


def _binarized(data: Dataset, how: str, seed: int) -> Dataset:
    if data.levels == 2:
        raise ValueError(f"{data.name} is binary: there is nothing to binarize")
    for split in SPLITS:
        x = getattr(data, split)
        if x.numel() and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"binarize needs values between 0 and 1, but {data.name} has values from {x.min():g} to {x.max():g}; "
                "if they are grey levels, say how many: levels=256"
            )
    noise = torch.Generator().manual_seed(seed)
    change = {
        "threshold": lambda x: (x > 0.5).to(x.dtype),
        "sample": lambda x: torch.bernoulli(x, generator=noise),
    }[how]
    return replace(
        _each(data, change, data.train.dtype), value_range=(0.0, 1.0), levels=2, binarized=how, log_density=None
    )


def _standardized(data: Dataset) -> Dataset:
    if not data.train.is_floating_point() or len(data.train) < 2:
        raise ValueError(
            f"standardize needs at least two training data in a floating-point dtype, but {data.name} has "
            f"{len(data.train)} in {data.train.dtype}"
        )
    location, scale = _moments(data.train)
    if not scale.all():
        constant = (scale == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"standardize needs features that vary, but {len(constant)} of {data.name} are constant over the training "
            f"data, the first of them feature {constant[0]} of 0 ... {len(scale) - 1}: drop them first"
        )
    density = _Rescaled(data.log_density, location, scale) if data.log_density else None
    return replace(
        _each(data, lambda x: ((x.double() - location) / scale).to(x.dtype), data.train.dtype),
        value_range=None,
        location=location.to(data.train.dtype),
        scale=scale.to(data.train.dtype),
        log_density=density,
    )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, [X] each: exactly zero spread where a feature is constant."""
    first = x.flatten(0, -2)[0].double()  # near the mean, so that no digits are lost to it
    n = x.numel() // x.shape[-1]
    mean = sum(((part.double() - first).flatten(0, -2).sum(0) for part in _blocks(x)), torch.zeros_like(first)) / n
    location = first + mean
    squares = ((part.double() - first - mean).square().flatten(0, -2).sum(0) for part in _blocks(x))
    return location, (sum(squares, torch.zeros_like(first)) / (n - 1)).sqrt()


@dataclass(frozen=True)
class _Rescaled:
    """The log-density of y = (x - location) / scale, from that of x."""

    density: Callable[[Tensor], Tensor]
    location: Tensor
    scale: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        vectors = y[0].numel() // len(self.scale) if len(y) else 0  # the steps of a sequence
        return self.density(y.double() * self.scale + self.location) + vectors * self.scale.log().sum()
