"""Numbers as text, and the error of a mean: what printed results share."""

from __future__ import annotations

__all__ = ["decimals", "digits_of", "mc_error", "percent", "standard_error_of_mean", "with_error"]

import math

from torch import Tensor


def standard_error_of_mean(values: Tensor) -> float:
    """The standard error of a mean over data; NaN for one datum."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mc_error(errors: Tensor) -> float:
    """The Monte Carlo error of a mean over data, from those of its terms."""
    return float(errors.square().sum().sqrt()) / len(errors)


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, without a negative zero; a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(share: float | None) -> str:
    """A share in per cent; a dash for what is not known."""
    return "-" if share is None else f"{100 * share:.1f} %"


def digits_of(data: float | None, *others: float | None) -> int:
    """The decimals that show two digits of the smallest error of a number, at most 4; 3 where no error is known.

    Args:
        data: its error over the data, of which no more than three digits are shown.
        others: its other errors.
    """
    known = [_two_digits(error) for error in (data, *others) if error is not None and 0 < error < math.inf]
    if not known:
        return 3
    most = _two_digits(data) + 1 if data is not None and 0 < data < math.inf else 4
    return max(0, min(max(known), 4, most))


def _two_digits(error: float) -> int:
    return 1 - math.floor(math.log10(error))


def with_error(value: float, error: float) -> str:
    """A value and its error, to two digits of the error."""
    digits = digits_of(error)
    return f"{decimals(value, digits)} ± {decimals(error, digits)}"
