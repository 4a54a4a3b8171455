"""Values of your own data that were not observed: the argument ``missing`` of the readers, and their result, NaN."""

from __future__ import annotations

__all__ = ["WORDS", "Missing"]

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jensen.checked import check_tensor, shown

from .arrays import Pieces
from .labels import is_missing

WORDS = frozenset({"", "-", "?", "#n/a", "<na>", "n/a", "na", "nan", "none", "null"})  # in any case
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Missing:
    """What marks a value that was not observed, besides NaN, None and empty cells, which always do.

    Attributes:
        words: other words in text than the usual :data:`WORDS`.
        numbers: numbers.
        mask: True where a value was not observed, of the shape of the data; None without a mask.
        columns: the names of the columns of the mask, if it is a DataFrame.
        index: the index of that DataFrame.
    """

    words: frozenset[str] = frozenset()
    numbers: tuple[float, ...] = ()
    mask: NDArray[np.bool_] | None = None
    columns: tuple[str, ...] = ()
    index: Any = None

    @staticmethod
    def of(given: Any) -> Missing | None:
        """The argument ``missing`` of :func:`from_array` and :func:`load`; None if no value may be missing.

        Raises:
            TypeError: for another type.

        Example:
            >>> Missing.of(["unknown", "NA", "-999"])
            Missing(words=frozenset({'unknown'}), numbers=(-999.0,), mask=None, columns=(), index=None)
        """
        if given is None or isinstance(given, Missing):
            return given
        if isinstance(given, Tensor):
            check_tensor(given, "missing")
        markers = _markers(given)
        if markers is None:
            columns = tuple(map(str, getattr(given, "columns", ())))
            return Missing(mask=_mask(given), columns=columns, index=getattr(given, "index", None))
        words: set[str] = set()
        numbers: dict[float, None] = {}
        for marker in markers:
            if isinstance(marker, str):
                text = marker.strip()
                if _NUMBER.fullmatch(text):
                    numbers[float(text)] = None
                elif text.lower() not in WORDS:
                    words.add(text)
            elif isinstance(marker, bool) or not isinstance(marker, Real):
                raise _refuse(given)
            elif not math.isnan(number := _float(marker)):
                numbers[number] = None
        return Missing(frozenset(words), tuple(numbers))

    def marks(self, word: str) -> bool:
        """Whether a field of a text stands for a missing value."""
        word = word.strip()
        return word.lower() in WORDS or word in self.words

    def numeric(self, cells: NDArray[np.generic]) -> NDArray[np.float64] | None:
        """Objects or text as numbers, NaN where they are missing; None if a cell is neither.

        Raises:
            ValueError: for a whole number that float64 does not hold.

        Example:
            >>> Missing.of("?").numeric(np.array([["1.5", "?"], [None, 2]], dtype=object)).tolist()
            [[1.5, nan], [nan, 2.0]]
        """
        numbers = np.empty(cells.size)
        for i, cell in enumerate(cells.ravel().tolist()):
            if isinstance(cell, str):
                text = cell.strip()
                if not self.marks(text) and not _NUMBER.fullmatch(text):
                    return None
                numbers[i] = np.nan if self.marks(text) else float(text)
            elif is_missing(cell):
                numbers[i] = np.nan
            elif isinstance(cell, Real | np.bool_):
                numbers[i] = _float(cell)
            else:
                return None
        return numbers.reshape(cells.shape)

    def applied(self, name: str, x: Pieces, columns: tuple[str, ...] = ()) -> Pieces:
        """The data with NaN where a number or the mask marks a missing value, in pieces.

        Raises:
            ValueError: if the mask has another shape.
        """
        mask = self._fitted(name, x.shape, columns)
        if mask is None and not self.numbers:
            return x

        def read() -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
            for place, values in x.read():
                for here, part in _thinner(place, values):
                    marked = np.zeros(part.shape, bool) if mask is None else mask[here]
                    for number in self.numbers:
                        with np.errstate(over="ignore"):  # a number that is infinite in the dtype of the values
                            marked = marked | (part == number)
                    if marked.any():
                        part = part.astype(np.result_type(part.dtype, np.float32))
                        part[marked] = np.nan
                    yield here, part

        return Pieces(x.shape, np.result_type(x.dtype, np.float32), read)

    def _fitted(self, name: str, shape: tuple[int, ...], columns: tuple[str, ...]) -> NDArray[np.bool_] | None:
        """The mask of these columns."""
        mask = self.mask
        if mask is None:
            return None
        if columns and set(columns) <= set(self.columns):  # the mask may also have columns that are not data
            mask = mask[:, [self.columns.index(column) for column in columns]]
        if mask.shape != shape:
            raise ValueError(
                f"missing is a mask of shape {mask.shape}, but the data of {name} have the shape {shape}: pass one "
                "True or False for each value"
            )
        return mask

    def advice(self, number: float) -> str:
        """How to mark another number as missing, in Python and in a shell."""
        texts = [str(int(one)) if one.is_integer() else repr(one) for one in (*self.numbers, number)]
        words = [repr(word) for word in sorted(self.words)]
        python = texts[0] if len(texts) == 1 and not words else f"[{', '.join([*words, *texts])}]"
        return f"missing={python}, in a shell --missing {' '.join([*map(_quoted, sorted(self.words)), *texts])}"


def _thinner(
    place: tuple[Any, ...], values: NDArray[np.generic]
) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The rows of a piece in pieces that have its bytes as float64: bytes grow eightfold."""
    some, *rest = place
    start, step = some.start or 0, max(1, len(values) * values.itemsize // 8)
    for first in range(0, len(values), step):
        part = values[first : first + step]
        yield (slice(start + first, start + first + len(part)), *rest), part


def _float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"float64 does not hold {shown(number)}: use another number") from None


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w.-]+", word) else f"'{word}'"


def _markers(given: Any) -> Sequence[Any] | None:
    """The words and numbers of an argument; None for a mask."""
    if isinstance(given, Tensor | np.ndarray | np.generic) and not given.ndim:
        given = given.item()
    if isinstance(given, str | Real):
        return [given]
    if isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iufUO":
        given = given.tolist()
    if not isinstance(given, list | tuple | set | frozenset):
        return None
    some = [one.item() if isinstance(one, np.generic) else one for one in given]
    return None if not some or isinstance(some[0], bool | list | tuple | np.ndarray | Tensor) else some


def _mask(given: Any) -> NDArray[np.bool_]:
    """A Boolean array from an array, a tensor, a DataFrame or nested lists."""
    try:
        mask = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _refuse(given) from error
    if mask.dtype != np.bool_ or not mask.ndim:
        raise _refuse(given)
    return mask


def _refuse(given: Any) -> TypeError:
    return TypeError(
        "missing must be 'nan', another word or number that marks missing values, a list of these, or a Boolean mask "
        f"that is True where a value is missing, but got {shown(given)}"
    )
