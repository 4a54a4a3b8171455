"""Grids of images: samples, and data above their reconstructions."""

from __future__ import annotations

__all__ = ["plot_images"]

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .axes import own_axes


def plot_images(
    images: Tensor,
    shape: tuple[int, int],
    *,
    columns: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
    title: str | None = None,
    row_labels: tuple[str, ...] = (),
    ax: Axes | None = None,
) -> Axes:
    """Images in a grid, row after row.

    Args:
        images: [N, height * width].
        shape: height and width of an image, in pixels.
        columns: images per row.
        value_range: the values drawn black and white; what lies outside is clipped.
        title: above the grid.
        row_labels: left of the rows, from the top: for data above reconstructions.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, without ticks.

    Raises:
        ValueError: if the images do not have ``shape``.

    Example:
        >>> from jensen.datasets import load
        >>> data = load("digits")
        >>> plot_images(data.test[:20], data.image_shape, title="digits").get_title()
        'digits'
    """
    height, width = shape
    if images.dim() != 2 or images.shape[1] != height * width or not len(images):
        raise ValueError(f"plot_images needs images of shape [N, {height * width}], but got {list(images.shape)}")
    images = images.detach().cpu().reshape(-1, height, width)
    rows = -(-len(images) // columns)
    gap = max(1, height // 8)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap), float("nan"))
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    ax = own_axes(ax, width=5.0, height=0.4 + 5.0 * rows / columns)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=value_range[0], vmax=value_range[1], interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([row * (height + gap) + height / 2 for row in range(len(row_labels))], labels=row_labels)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title, fontsize="medium")
    return ax
