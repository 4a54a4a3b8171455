"""Missing values: NaN marks them."""

from __future__ import annotations

__all__ = ["has_holes"]

from torch import Tensor


def has_holes(x: Tensor) -> bool:
    """Whether ``x`` has missing values."""
    return x.is_floating_point() and bool(x.isnan().any())
