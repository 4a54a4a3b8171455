"""What every model does first: look at its data, and open the plate over them."""

from __future__ import annotations

__all__ = ["check_width", "data_plate"]

from collections.abc import Sequence

import pyro
from torch import Tensor


def check_width(x: Tensor, event_shape: Sequence[int], owner: str) -> None:
    """Raise ValueError unless ``x`` has the shape [N, *event_shape]."""
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[1:]) != tuple(event_shape):
        expected = ", ".join(["N", *map(str, event_shape)])
        raise ValueError(f"{owner} expects data x of shape [{expected}], but got {list(x.shape)}")


def data_plate(x: Tensor | None, event_shape: Sequence[int], n: int, owner: str) -> pyro.plate:
    """The plate of a model's data: over the rows of ``x``, or over ``n`` new data.

    Raises:
        ValueError: if ``x`` is empty or of another shape than [N, *event_shape], or ``n`` is less than 1.
    """
    if x is not None:
        check_width(x, event_shape, owner)
        n = len(x)
    if n < 1:
        raise ValueError(f"{owner} needs at least one datum, but got {n}")
    return pyro.plate("data", n, dim=-1)
