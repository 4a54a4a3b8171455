"""Standard errors of means over data."""

from __future__ import annotations

__all__ = ["mc_error", "standard_error_of_mean"]

import math

from torch import Tensor


def standard_error_of_mean(values: Tensor) -> float:
    """The standard error of a mean over data; NaN for one datum."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mc_error(errors: Tensor) -> float:
    """The Monte Carlo error of a mean over data, from those of its terms."""
    return float(errors.square().sum().sqrt()) / len(errors)
