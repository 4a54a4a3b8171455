"""Grids of images, grey or in colour, which figures of samples, reconstructions and traversals share."""

from __future__ import annotations

__all__ = ["HOLE", "Shape", "as_images", "cell_centres", "draw_grid", "draw_rows", "gap_of", "plot_images"]

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from torch import Tensor

from jensen.checked import checked

from .axes import WIDTH, at_least_one, own_axes, styled, text_size

Shape = tuple[int, int] | tuple[int, int, int]

HOLE = "#b4d3e7"
"""The colour of missing values in images: neither grey, as their values, nor white, as the gaps between images."""


@checked
@styled
def plot_images(
    images: Tensor,
    shape: Shape,
    *,
    columns: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    title: str | None = None,
    row_labels: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Images in a grid, row after row; missing pixels (NaN) are light blue.

    Args:
        images: [N, height * width] or [N, height, width]; in colour, three channels one after the other, [N, 3 * height
            * width] or [N, 3, height, width], or three values for each pixel where ``shape`` says so.
        shape: height and width of an image in pixels: ``data.image_shape``; (height, width, 3) where the channels come
            last.
        columns: images per row.
        value_range: the values that are drawn white and black (in colour: without and with full intensity); values
            outside are clipped: ``data.value_range``.
        cmap: the colour map of grey values: ``"gray_r"`` draws dark on white, ``"gray"`` light on black.
        title: above the grid.
        row_labels: left of the rows, from the top: for data above reconstructions.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, without ticks. Their first image is the whole grid, with gaps between its cells. If pixels are
        missing, a second one colours them.

    Raises:
        ValueError: if the images do not have ``shape``, or there are none.

    Example:
        >>> from jensen.datasets import load
        >>> data = load("digits")
        >>> ax = plot_images(data.test[:50], data.image_shape, title="digits")
        >>> ax.get_title()
        'digits'
    """
    return _labelled(images, shape, columns, value_range, cmap, ax, "plot_images", title, row_labels)


def draw_rows(
    rows: Mapping[str, Tensor],
    shape: Shape,
    columns: int,
    value_range: tuple[float, float],
    cmap: str,
    ax: Axes | None,
    owner: str,
    title: str | None = None,
) -> Axes:
    """Draw several images [N, ...] of each of N data points below each other, with labels of the rows.

    Args:
        rows: for each label the images, as for :func:`plot_images`.
        shape: as for :func:`plot_images`.
        columns: data points per row.
        value_range: as for :func:`plot_images`.
        cmap: as for :func:`plot_images`.
        ax: where to draw; a new figure if None.
        owner: the function that errors name.
        title: above the grid.
    """
    n = len(next(iter(rows.values())))
    columns = max(1, min(at_least_one(columns), n))
    cells = [(i // columns * len(rows) + row) * columns + i % columns for row in range(len(rows)) for i in range(n)]
    labels = [*rows] * -(-n // columns)
    images = torch.cat(list(rows.values()))
    return _labelled(images, shape, columns, value_range, cmap, ax, owner, title, labels, cells)


def _labelled(
    images: Tensor,
    shape: Shape,
    columns: int,
    value_range: tuple[float, float],
    cmap: str,
    ax: Axes | None,
    owner: str,
    title: str | None = None,
    row_labels: Sequence[str] = (),
    cells: Sequence[int] | None = None,
) -> Axes:
    """Images in a grid with a title and labels of its rows."""
    left = max((0.1 + 0.06 * len(label) for label in row_labels), default=0.0)
    room = (left, 0.22 if title else 0.0)
    ax = draw_grid(images, shape, columns, value_range, cmap, ax, owner, room=room, cells=cells)
    ax.set_xticks([])
    ax.set_yticks(cell_centres(len(row_labels), shape[0], gap_of(shape)), labels=row_labels)
    if title:
        ax.set_title(title, fontsize=text_size(ax, 1.0))
    return ax


def draw_grid(
    images: Tensor,
    shape: Shape,
    columns: int,
    value_range: tuple[float, float],
    cmap: str,
    ax: Axes | None,
    owner: str,
    *,
    gaps: tuple[int, int] | None = None,
    room: tuple[float, float] = (0.0, 0.0),
    cells: Sequence[int] | None = None,
) -> Axes:
    """Draw images in a grid without marks of ticks and without a frame; the height of a new figure fits the grid.

    Args:
        images: as for :func:`plot_images`.
        shape: as for :func:`plot_images`.
        columns: images per row.
        value_range: as for :func:`plot_images`.
        cmap: as for :func:`plot_images`.
        ax: where to draw; a new figure if None.
        owner: the function that errors name.
        gaps: pixels between rows and between columns; an eighth of an image's height if None.
        room: inches in a new figure for labels left of the grid, and for those below and above it.
        cells: the place of each image in the grid, counted row after row; None: one after the other.
    """
    if cmap not in colormaps:
        raise ValueError(f"cmap is the name of a colour map of matplotlib, such as 'gray_r', but got {cmap!r}")
    images, between = as_images(images, shape, owner), gaps or (gap_of(shape), gap_of(shape))
    places = range(len(images)) if cells is None else cells
    canvas = _canvas(images, columns, between, places, float("nan"))
    ax = own_axes(ax, height=0.1 + room[1] + (WIDTH - 0.1 - room[0]) * canvas.shape[0] / canvas.shape[1])
    low, high = value_range
    if canvas.dim() == 3:
        canvas = ((canvas - low) / (high - low)).clamp(0, 1).nan_to_num(1.0)  # gaps are white
    ax.imshow(canvas.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    holes = images.isnan().flatten(3).any(-1) if images.dim() > 3 else images.isnan()
    if holes.any():
        colours = np.array([to_rgba(HOLE, 0.0), to_rgba(HOLE)])
        ax.imshow(colours[_canvas(holes, columns, between, places, False).long().numpy()], interpolation="nearest")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def cell_centres(count: int, size: int, gap: int) -> list[float]:
    """The middles of the first cells along one side of a grid of images, in its pixels."""
    return [i * (size + gap) + (size - 1) / 2 for i in range(count)]


def gap_of(shape: Shape) -> int:
    """The gap between images, in pixels."""
    return max(1, shape[0] // 8)


def as_images(images: Tensor, shape: Shape, owner: str) -> Tensor:
    """Images [N, height, width] or [N, height, width, 3] on the CPU."""
    size = images[0].numel() if images.dim() > 1 and len(images) else 0
    planes = len(shape) == 2 and size == 3 * prod(shape)
    if size != prod(shape) and not planes:
        sizes = ", ".join(["N", *map(str, shape)])
        raise ValueError(
            f"{owner} needs images of shape [N, {prod(shape)}], or [{sizes}], but got {list(images.shape)}"
        )
    images = images.detach().cpu().float()
    return images.reshape(-1, 3, *shape).movedim(1, -1) if planes else images.reshape(-1, *shape)


def _canvas(images: Tensor, columns: int, gaps: tuple[int, int], places: Sequence[int], empty: float) -> Tensor:
    """Images [N, H, W, ...] in their places of a grid, ``empty`` between them."""
    _, height, width, *colours = images.shape
    rows = max(places) // at_least_one(columns) + 1
    down, across = height + gaps[0], width + gaps[1]
    canvas = images.new_full((rows * down - gaps[0], columns * across - gaps[1], *colours), empty)
    for place, image in zip(places, images, strict=True):
        top, left = (place // columns) * down, (place % columns) * across
        canvas[top : top + height, left : left + width] = image
    return canvas
