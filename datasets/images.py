"""Conversion of images to rows of pixels, channel after channel, for channels first or last."""

from __future__ import annotations

__all__ = ["Images", "images_of"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """The conversion of data to rows of pixels, channel after channel.

    Attributes:
        shape: channels, height and width.
        last: whether the channels come last in the data.
        order: the new position of each pixel, if the data are rows of pixels with channels last.
    """

    shape: tuple[int, int, int]
    last: bool
    order: Tensor | None

    def view(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Rows of pixels [n, X] in the shape of the data, [n, *sizes]."""
        if self.last and len(sizes) > 1:
            return rows.view(-1, *self.shape).movedim(1, -1)
        return rows.view(-1, *sizes)


def images_of(name: str, sizes: tuple[int, ...], image_shape: tuple[int, ...]) -> Images:
    """The conversion for data of a given shape: channels may be first or last, in the data and in ``image_shape``."""
    if len(image_shape) not in (2, 3) or min(image_shape) < 1:
        raise ValueError(
            "image_shape must be (height, width), (channels, height, width) or (height, width, channels), but got "
            f"{image_shape}"
        )
    told_last = len(image_shape) == 3 and image_shape[0] > _CHANNELS >= image_shape[2]
    height, width, channels = image_shape if told_last else (*image_shape[-2:], (1, *image_shape)[-3])
    shape = channels, height, width
    pixels = math.prod(shape)
    if sizes == (pixels,):
        order = torch.arange(pixels).view(shape).movedim(0, -1).flatten() if told_last else None
        return Images(shape, told_last, order)
    if sizes == shape or (channels == 1 and sizes == (height, width)):
        return Images(shape, False, None)
    if sizes == (height, width, channels):
        return Images(shape, True, None)
    remedy = f": use image_shape={sizes}" if len(sizes) in (2, 3) else ""
    if sizes == (pixels + 1,):
        remedy = ": there is one extra column; if it has the classes, name it with label= (in a shell --label)"
    raise ValueError(f"{name} has data of shape {sizes}, which do not match image_shape={image_shape}{remedy}")


_CHANNELS = 4  # a dimension of at most this size counts as the channels
