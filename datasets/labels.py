"""Encoding of labels as class numbers: integers are unchanged, words are numbered alphabetically."""

from __future__ import annotations

__all__ = ["encode", "is_missing", "warn_of_many"]

import warnings
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(
    name: str, labels: NDArray[np.generic], n: int, sizes: list[int]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as integers, and the names of the classes if labels are words."""
    if labels.shape not in ((n,), (n, 1)):
        hint = "; for one-hot labels use labels.argmax(1)" if labels.ndim == 2 and len(labels) == n else ""
        hint = "; data points must be rows: transpose the data" if sizes and labels.size == sizes[0] else hint
        raise ValueError(f"labels of {name} have the shape {labels.shape}, but there are {n} data points{hint}")
    labels = labels.reshape(n)
    if labels.dtype.kind in "mM":
        raise ValueError(f"labels of {name} must be classes, but they are dates or times, {labels.dtype}: omit them")
    if labels.dtype.kind == "O" and all(isinstance(label, Number) for label in labels.tolist()):
        labels = labels.astype(np.float64) if any(label % 1 for label in labels.tolist()) else labels.astype(np.int64)
    if labels.dtype.kind in "biuf":
        if labels.dtype.kind == "f" and (missing := np.flatnonzero(np.isnan(labels)).tolist()):
            raise _missing(name, missing)
        if labels.dtype.kind == "f" and (labels % 1 != 0).any():  # NaN for infinity
            other = labels[labels % 1 != 0]
            raise ValueError(
                f"labels of {name} must be classes (integers or words), but {len(other)} are other numbers, such as "
                f"{other[0]:g}: keep a column of measurements as data, or convert it to classes, for example with "
                "numpy.digitize"
            )
        if len(labels) and labels.dtype.kind in "uf" and not -(2**63) <= int(labels.min()) <= int(labels.max()) < 2**63:
            raise ValueError(f"labels of {name} are as large as {labels.max()}, above int64: renumber the classes")
        return labels.astype(np.int64), ()
    missing = [i for i, label in enumerate(labels.tolist()) if is_missing(label)]
    if missing:
        raise _missing(name, missing)
    words = [_word(label) for label in labels.tolist()]  # in an array, each would be as long as the longest
    classes = sorted(set(words))
    code = {word: i for i, word in enumerate(classes)}
    return np.fromiter((code[word] for word in words), np.int64, len(words)), tuple(classes)


def _missing(name: str, rows: list[int]) -> ValueError:
    return ValueError(
        f"labels of {name} have {len(rows)} missing values, the first in row {rows[0]}: give these data points a class "
        "of their own, drop them, or omit the labels"
    )


def _word(label: Any) -> str:
    """A label as text; bytes are decoded as UTF-8, or otherwise Latin-1."""
    if not isinstance(label, bytes):
        return str(label)
    try:
        return label.decode()
    except UnicodeDecodeError:
        return label.decode("latin-1")


def is_missing(label: Any) -> bool:
    """Whether a label is None, NaN, or the missing value of pandas."""
    return label is None or type(label).__name__ in ("NAType", "NaTType") or bool(label != label)


def warn_of_many(name: str, labels: NDArray[np.generic]) -> None:
    """Warn if most labels are different, because names and measurements are not classes."""
    different = len(set(np.ravel(labels).tolist())) if len(labels) >= _MANY else 0
    if different > len(labels) / 2:
        warnings.warn(
            f"{name}: the {len(labels)} labels have {different} different values, but labels should be classes: omit "
            "them if they are names or measurements",
            stacklevel=4,
        )


_MANY = 50  # with fewer labels, all may differ
