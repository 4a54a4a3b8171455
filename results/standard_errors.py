"""Standard errors of means over data."""

from __future__ import annotations

__all__ = ["MANY", "mc_error", "significant", "standard_error_of_mean", "within_t"]

import math

from torch import Tensor

MANY = 1000  # degrees of freedom from which Student's t is treated as normal


def standard_error_of_mean(values: Tensor) -> float:
    """The standard error of a mean over data; NaN for a single data point."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mc_error(errors: Tensor) -> float:
    """The Monte Carlo error of a mean over data, from the errors of its terms."""
    return float(errors.square().sum().sqrt()) / len(errors)


def within_t(t: float, freedom: int) -> float:
    """The probability that Student's t with ``freedom`` degrees of freedom lies between -t and t.

    References:
        Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for j in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (j - 1) / j * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def significant(mean: float, error: float, freedom: float) -> bool:
    """Whether a difference exceeds two standard errors, or the equivalent quantile of Student's t.

    Example:
        >>> significant(2.1, 1.0, math.inf), significant(2.1, 1.0, 4), significant(3.1, 1.0, 4)
        (True, False, True)
    """
    if not error or freedom >= MANY:
        return mean > 2 * error
    return within_t(mean / error, max(1, math.floor(freedom))) > within_t(2.0, MANY)
