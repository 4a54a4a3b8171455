"""The data set object that every loader returns: three splits of tensors and their description."""

from __future__ import annotations

__all__ = ["Dataset"]

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from jensen.missing import has_holes


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set in three splits. A value that was not observed is NaN.

    Attributes:
        name: its name.
        train: training data, [N, X]; sequences are [N, T, X].
        validation: validation data, [N, X].
        test: test data, [N, X].
        labels: class of each data point by split name, int64 [N]; empty without classes.
        image_shape: height and width of an image, or None if the data are not images.
        value_range: the smallest and largest possible value, if bounded.
        levels: grey levels of the raw images; 2 for binary ones; None for measurements.
        dequantized: whether uniform noise was added to the levels, so that the data have a density.
        licence: the licence as its distributor states it, or "none stated".
        citation: the publication to cite.
        channels: number of channels of an image, stored one after the other in a row of X = channels * height * width
            features.
        classes: the names of the classes, in the order of their numbers; empty if they have no names.
        binarized: how grey values were binarized, "threshold" or "sample"; None if they were not.
        location: the means subtracted by standardization, [X] in float64; None if the data were not standardized.
        scale: the standard deviations that it divided by, [X] in float64.
        columns: the names of the features of a table, in their order; empty if they have no names.
        log_density: for synthetic data, the exact log-density of the true distribution, in nats: x of shape [N, X] to
            [N].

    Example:
        >>> from jensen.datasets import load
        >>> data = load("digits")
        >>> data.train.shape, data.test.shape, data.levels
        (torch.Size([1197, 64]), torch.Size([400, 64]), 17)
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    labels: dict[str, Tensor]
    image_shape: tuple[int, int] | None
    value_range: tuple[float, float] | None
    levels: int | None
    dequantized: bool
    licence: str
    citation: str
    channels: int = 1
    classes: tuple[str, ...] = ()
    binarized: str | None = None
    location: Tensor | None = None
    scale: Tensor | None = None
    columns: tuple[str, ...] = ()
    log_density: Callable[[Tensor], Tensor] | None = field(default=None)

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test data"
        shape = " x ".join(str(size) for size in self.train.shape[1:])
        done = [f"binarized by {self.binarized}"] if self.binarized else []
        done += ["dequantized"] if self.dequantized else []
        done += ["standardized"] if self.scale is not None else []
        missing = {part: count for part, x in self._splits().items() if (count := _missing(x))}
        whole = sum(x.numel() for x in self._splits().values())
        done += [f"{100 * sum(missing.values()) / whole:.2g} % missing"] if missing else []
        words = "".join(f"; {word}" for word in done)
        return f"<Dataset {self.name}: {sizes} of {shape} features{words}; licence: {self.licence}>"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Where values are missing, by split name: Boolean tensors [N, X], True for NaN; empty if none is missing.

        Example:
            >>> from jensen.datasets import hide, load
            >>> data = load("digits")
            >>> data.masks
            {}
            >>> hide(data, 0.5).masks["test"].shape
            torch.Size([400, 64])
        """
        splits = self._splits()
        return {part: x.isnan() for part, x in splits.items()} if any(map(_missing, splits.values())) else {}

    def _splits(self) -> dict[str, Tensor]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def bits_offset(self) -> float:
        """Bits per dimension to add, to refer to the data before scaling.

        log2 of the number of grey levels for dequantized data, and the mean log2 of the scales of standardization over
        the observed values of the test data (of the training data if there are none).
        """
        return self.bits_offset_of(self.test if len(self.test) else self.train)

    def bits_offset_of(self, x: Tensor) -> float:
        """:attr:`bits_offset` for some of the data, such as the measured rows: the mean is over their observed values.

        Example:
            >>> from jensen.datasets import from_array
            >>> x = torch.tensor([[1.0, 4.0], [3.0, torch.nan], [2.0, 8.0]]).repeat(10, 1)
            >>> data = from_array(x, missing="nan", standardize=True)
            >>> narrow, wide = data.scale.log2().tolist()
            >>> data.bits_offset_of(torch.tensor([[0.0, torch.nan]])) == narrow
            True
        """
        levels = math.log2(self.levels) if self.dequantized and self.levels else 0.0
        if self.scale is None:
            return levels
        log_scale = self.scale.double().log2()
        if not has_holes(x):
            return levels + float(log_scale.mean())
        seen = (~x.isnan()).double().reshape(len(x), -1, len(log_scale)).mean((0, 1))
        return levels + float((seen * log_scale).sum() / seen.sum())


def _missing(x: Tensor) -> int:
    """The number of missing values."""
    return sum(int(part.isnan().sum()) for part in x.split(_ROWS)) if has_holes(x) else 0


_ROWS = 4096  # at once
