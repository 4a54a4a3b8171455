"""Preparation of data on request: splitting, scaling, dequantization, binarization, standardization.

Grey images with L levels 0 ... L - 1 become x / (L - 1), or dequantized (x + u) / L with u uniform on [0, 1).
"""

from __future__ import annotations

__all__ = ["SPLITS", "Moments", "Split", "check_scale", "draw_split", "prepare"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import BLOCK
from .columns import advise_drop, listed
from .dataset import Dataset

SPLITS = ("train", "validation", "test")
Split = tuple[float, float, float]


def draw_split(n: int, split: Split, seed: int) -> dict[str, NDArray[np.int64]]:
    """Rows of a random split.

    Args:
        n: number of data points.
        split: shares that sum to 1, or numbers that sum to ``n``, of training, validation and test data.
        seed: fixes the permutation.

    Returns:
        Row numbers by split name; each row is in one split.

    Raises:
        ValueError: if the three do not sum to 1 or to ``n``, one is negative, or no training data remain.
    """
    total = sum(split) if len(split) == 3 and all(part >= 0 for part in split) else -1.0
    if total == n and all(part == int(part) for part in split):
        sizes = [int(part) for part in split]
    elif abs(total - 1) < 1e-6:
        ends = [round(n * sum(split[: i + 1])) for i in range(3)]
        sizes = [ends[0], ends[1] - ends[0], n - ends[1]]
    else:
        raise ValueError(f"split must be three shares that sum to 1, or three numbers that sum to {n}, but got {split}")
    if not sizes[0]:
        raise ValueError(f"split {split} leaves no training data of {n} data points: give training a larger share")
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
    """Scale raw data, and binarize, dequantize or standardize them on request.

    Args:
        raw: data as read: levels 0 ... L - 1 if ``levels`` is set, otherwise any values. Data that already have the
            ``dtype`` are overwritten, because two copies may not fit into memory.
        binarize: None, ``"threshold"`` at one half, or ``"sample"`` from Bernoulli(x).
        dequantize: whether to add uniform noise to levels.
        standardize: whether to subtract the mean and divide by the standard deviation of each training feature.
        seed: fixes the noise.
        dtype: of the data.

    Returns:
        The data set, with these transformations in its attributes.

    Raises:
        ValueError: to dequantize data without levels, to binarize values outside [0, 1], to standardize constant
            features, or for two options that exclude each other.
    """
    if binarize not in (None, "threshold", "sample"):
        raise ValueError(f"binarize must be None, 'threshold' or 'sample', but got {binarize!r}")
    if binarize and (dequantize or standardize):
        other = "dequantize" if dequantize else "standardize"
        raise ValueError(f"binarize and {other} exclude each other: zeros and ones have no density; choose one of them")
    if standardize and raw.levels is None:
        return _standardized(raw, dtype)
    data = _scaled(raw, dequantize, seed, dtype)
    if binarize:
        data = _binarized(data, binarize, seed)
    return _standardized(data, dtype) if standardize else data


def _each(data: Dataset, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Dataset:
    """Apply a change to all rows, some rows at a time, in the order of the splits; missing values stay NaN."""

    def changed(x: Tensor) -> Tensor:
        made = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        for part, target in zip(_blocks(x), _blocks(made), strict=True):
            holes = part.isnan() if part.is_floating_point() else None
            if holes is None or not holes.any():
                target.copy_(change(part))
            else:  # the observed values become what they would be without holes, noise included
                target.copy_(change(part.masked_fill(holes, 0))).masked_fill_(holes, torch.nan)
        return made

    return replace(data, train=changed(data.train), validation=changed(data.validation), test=changed(data.test))


def _blocks(x: Tensor) -> Sequence[Tensor]:
    return torch.split(x, max(1, BLOCK // max(1, 8 * x[:1].numel())))


def _scaled(raw: Dataset, dequantize: bool, seed: int, dtype: torch.dtype) -> Dataset:
    levels = raw.levels
    if dequantize and levels is None:
        raise ValueError(f"{raw.name} has measurements, not levels: there is nothing to dequantize")
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
        low, high = math.inf, -math.inf
        for part in _blocks(getattr(data, split)):
            if len(seen := part[~part.isnan()]):
                low, high = min(low, seen.min().item()), max(high, seen.max().item())
        if low < 0 or high > 1:
            raise ValueError(
                f"binarize needs values between 0 and 1, but {data.name} has values from {low:g} to {high:g}; if they "
                "are grey levels, pass their number, such as levels=256"
            )
    noise = torch.Generator().manual_seed(seed)
    change = {
        "threshold": lambda x: (x > 0.5).to(x.dtype),
        "sample": lambda x: torch.bernoulli(x, generator=noise),
    }[how]
    return replace(
        _each(data, change, data.train.dtype), value_range=(0.0, 1.0), levels=2, binarized=how, log_density=None
    )


def _standardized(data: Dataset, dtype: torch.dtype) -> Dataset:
    """Standardize data of any dtype with float64 statistics of the values before rounding."""
    moments = Moments((data.train.shape[-1],))
    for part in _blocks(data.train):
        moments.add(part.flatten(0, -2).double().numpy())
    check_scale(data.name, moments, len(data.train), dtype)
    location, scale = torch.from_numpy(moments.location), torch.from_numpy(moments.scale)
    density = _Rescaled(data.log_density, location, scale) if data.log_density else None
    return replace(
        _each(data, lambda x: ((x.double() - location) / scale).to(dtype), dtype),
        value_range=None,
        location=location,
        scale=scale,
        log_density=density,
    )


class Moments:
    """Mean and standard deviation of features in float64, accumulated over blocks of rows; NaN is left out.

    Args:
        shape: of the features.

    Example:
        >>> moments = Moments((2,))
        >>> for part in (np.array([[1e9, 5.0]]), np.array([[1e9 + 2, 5.0], [1e9 + 4, 5.0]])):
        ...     moments.add(part)
        >>> (moments.location - [1e9, 5.0]).tolist(), moments.scale.tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = np.zeros(shape, np.int64)  # with an observed value
        self._first, self._mean, self._squares = np.zeros((3, *shape))

    def add(self, x: NDArray[np.float64], columns: slice = slice(None)) -> None:
        """Add rows [n, ..., k] of these columns of the last dimension."""
        if not len(x):
            return
        here = (..., columns)
        n, seen = self._rows[here], ~np.isnan(x)
        whole = bool(seen.all())
        m = np.full(n.shape, len(x)) if whole else seen.sum(0)
        first = x[0] if whole else np.where(m > 0, np.take_along_axis(x, seen.argmax(0)[None], 0)[0], 0.0)
        self._first[here] = np.where(n > 0, self._first[here], first)  # a shift near the mean, to avoid loss of digits
        x = x - self._first[here]
        mean = (x if whole else np.where(seen, x, 0.0)).sum(0) / np.maximum(1, m)
        off, total = mean - self._mean[here], np.maximum(1, n + m)
        squares = (x - mean) ** 2
        self._mean[here] += off * m / total
        self._squares[here] += (squares if whole else np.where(seen, squares, 0.0)).sum(0) + off**2 * n * m / total
        self._rows[here] = n + m

    @property
    def location(self) -> NDArray[np.float64]:
        """The means."""
        return np.asarray(self._first + self._mean)

    @property
    def scale(self) -> NDArray[np.float64]:
        """The standard deviations: exactly zero for a constant feature."""
        return np.asarray(np.sqrt(self._squares / np.maximum(1, self._rows - 1)))


def check_scale(name: str, moments: Moments, n: int, dtype: torch.dtype, columns: tuple[str, ...] = ()) -> None:
    """Raise ValueError if standardization is not possible.

    Raises:
        ValueError: for fewer than two data points, an integer dtype, or features that are constant or too large to be
            squared.
    """
    if not dtype.is_floating_point or n < 2:
        raise ValueError(
            f"standardize needs at least two training data points in a floating-point dtype, but {name} has {n} in "
            f"{dtype}"
        )
    scale = moments.scale.reshape(-1)
    if not np.isfinite(scale).all():
        raise ValueError(f"standardize needs numbers with finite squares, but {name} has larger ones: rescale them")
    if not scale.all():
        constant = np.flatnonzero(scale == 0).tolist()
        names = [columns[i] for i in constant] if columns else []
        where = listed([repr(c) for c in names]) if columns else f"the first is feature {constant[0]} of 0 ... "
        remedy = advise_drop(names) if columns else "drop them first"
        raise ValueError(
            f"standardize needs features that vary, but {len(constant)} of {name} are constant in the training data, "
            f"{where}{'' if columns else len(scale) - 1}: {remedy}"
        )


@dataclass(frozen=True)
class _Rescaled:
    """The log-density of y = (x - location) / scale, given that of x."""

    density: Callable[[Tensor], Tensor]
    location: Tensor
    scale: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        vectors = y[0].numel() // len(self.scale) if len(y) else 0  # the steps of a sequence
        return self.density(y.double() * self.scale + self.location) + vectors * self.scale.log().sum()
