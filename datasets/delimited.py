"""Tables written as text (CSV): a record a line, with commas, semicolons, tabs or blanks between its fields.

The standard library splits the text, to see that all records have as many fields as the first and to say where a field
is no number; pandas reads the numbers. It guesses nothing: the encoding, the delimiter, the decimal sign and the names
are found here, and what could mean two numbers is refused.
"""

from __future__ import annotations

__all__ = ["read_csv"]

import codecs
import csv
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import LIMIT, Pieces, check_size
from .tables import Table, advise_label, check_names, position

_MISSING = frozenset({"", "-", "?", "#n/a", "<na>", "n/a", "na", "nan", "none", "null"})
_MARKERS = sorted({*_MISSING, *map(str.upper, _MISSING), *map(str.title, _MISSING), "NaN"})  # pandas minds the case
_NUMBER = {
    sign: re.compile(rf"[+-]?(({digits})(e[+-]?[0-9]+)?|inf(inity)?|nan)", re.IGNORECASE)
    for sign, digits in ((".", r"[0-9]+\.?[0-9]*|\.[0-9]+"), (",", r"[0-9]+(,[0-9]+)?"))  # 3, is a number and a comma
}
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_SAMPLE = 20  # records by which delimiters are judged
_CHUNK = 2**19  # numbers or characters at once


def read_csv(path: Path, label: str | int | None = None, header: bool | None = None, limit: int = LIMIT) -> Table:
    """Read a table of numbers from a text file.

    Fields are separated by commas, semicolons, tabs or blanks: by what gives every record as many fields as the first,
    and the most numbers. Between semicolons and tabs the decimal sign may be a comma. The text is UTF-8, UTF-16 with a
    byte order mark, or else Latin-1.

    Args:
        path: the file.
        label: name or position of the column of labels; their values may be words.
        header: whether the first line holds names. None: detected, where it is unambiguous: all of its fields are
            words, or all are numbers.
        limit: bytes that the numbers may take in memory.

    Returns:
        The table; columns without names are called 0, 1, ..., and missing values (empty, NA, NaN, ?, - and the like)
        are NaN.

    Raises:
        ValueError: if there are no data, a line has another number of fields than the first, a column that is not
            the label is not numeric (the message names it), the first line may or may not be a header, or commas may
            be decimal or separate thousands.
    """
    from pandas.errors import ParserError, ParserWarning  # here, since pandas takes long to import

    try:
        encoding = _encoding(path)
        text = max((_Text(path, encoding, delimiter) for delimiter in "\t;, "), key=_fit)
        layout = _lay_out(text, label, header)
        if not layout.rows or not layout.kept:
            raise ValueError(f"{path} holds no {'column of ' if layout.rows else ''}data")
        check_size(path, 8 * layout.rows * len(layout.kept), limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # pandas would leave fields out
            x = _numbers(text, layout)
    except (csv.Error, ParserError, ParserWarning, UnicodeError) as error:
        raise ValueError(f"{path} is no table of numbers as text: {error}") from error
    names = tuple(layout.columns[i] for i in layout.kept)
    return Table(x, names, _classes(layout.labels) if layout.labels else None)


@dataclass(frozen=True)
class _Text:
    """The file, its encoding, and what stands between fields, where a blank is any number of blanks and tabs."""

    path: Path
    encoding: str
    delimiter: str

    @property
    def decimals(self) -> str:
        """The decimal signs that numbers may have."""
        return ".," if self.delimiter in ";\t" else "."

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The fields of every record and the line where it ends; a blank line has no fields."""
        with self.path.open(newline="", encoding=self.encoding) as file:
            single = (re.sub(r"[ \t]+", " ", line.strip()) + "\n" for line in file)
            lines = single if self.delimiter == " " else file
            reader = csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True)
            for fields in reader:
                yield reader.line_num, fields


@dataclass(frozen=True)
class _Layout:
    """What stands where in a table.

    Attributes:
        columns: the names of the columns, or 0, 1, ...
        kept: the columns of the data.
        start: the record where the data begin, after that of the names.
        rows: the number of data.
        blank: the blank records among the data.
        labels: the labels as text.
    """

    columns: tuple[str, ...]
    kept: list[int]
    start: int
    rows: int
    blank: list[int]
    labels: list[str]


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        with path.open(encoding=encoding) as text:
            if any("\0" in piece for piece in iter(lambda: text.read(_CHUNK), "")):
                raise ValueError(f"{path} is no table of numbers as text: it holds zero bytes")
    except UnicodeDecodeError:
        return "latin-1"
    return encoding


def _fit(text: _Text) -> tuple[int, float]:
    """Best is a delimiter that all records have equally often, and of those the one that leaves most numbers."""
    try:
        sample = [fields for _, fields in islice(text.records(), _SAMPLE) if fields]
    except csv.Error:  # a line of many fields is too long for one
        return 0, 0.0
    if not sample or len(sample[0]) < 2:
        return 1, float(text.delimiter == ",")  # one column
    if any(len(fields) != len(sample[0]) for fields in sample):
        return 2 if text.delimiter != " " or len(sample[1]) == len(sample[0]) else 0, 0.0  # names hold blanks too
    fields = [field for record in sample[1:] or sample for field in record]
    return 3, sum(any(_is_value(field, sign) for sign in text.decimals) for field in fields) / len(fields)


def _lay_out(text: _Text, label: str | int | None, header: bool | None) -> _Layout:
    """The layout of a table, all of whose records have as many fields as the first."""
    columns: tuple[str, ...] = ()
    blank: list[int] = []
    labels: list[str] = []
    start, rows, at = 0, 0, None
    for i, (line, fields) in enumerate(text.records()):
        if not fields or (len(fields) == 1 < len(columns) and not fields[0].strip()):
            blank.append(i)
            continue
        if not columns:
            names = _names(text, fields, label in fields or header)
            columns = names or tuple(str(j) for j in range(len(fields)))
            at = None if label is None else position(text.path, label, columns)
            if names:
                start, blank = i + 1, []
                continue
        if len(fields) != len(columns):
            raise ValueError(f"{text.path}: line {line} has {len(fields)} fields, but the first has {len(columns)}")
        rows += 1
        if at is not None:
            labels.append(fields[at].strip())
    return _Layout(columns, [j for j in range(len(columns)) if j != at], start, rows, blank, labels)


def _names(text: _Text, first: Sequence[str], header: bool | None) -> tuple[str, ...]:
    """The names in the first record; none if it holds data."""
    numeric = [any(_is_number(field, sign) for sign in text.decimals) for field in first]
    if header is None and any(numeric) and not all(numeric):
        which = f"{text.path}: the first line may be names or data: {text.delimiter.join(first)[:80]!r}"
        raise ValueError(f"{which}; say header=True or header=False")
    if header is False or (header is None and all(numeric)):
        return ()
    names = tuple(field.strip() for field in first)
    if "" in names:
        which = f"{text.path}: column {names.index('')} has no name"
        raise ValueError(f"{which}: if it is an index, leave it out (in pandas: index=False)")
    check_names(text.path, names)
    return names


class _NoNumbers(Exception):
    """A column holds anything else, or pandas sees other records."""


def _numbers(text: _Text, layout: _Layout) -> Pieces:
    """The numbers [N, X], to be read in pieces; NaN where they are missing."""
    wrong = []
    for decimal in text.decimals:
        faults: dict[str, tuple[int, str]] = {}
        x = Pieces((layout.rows, len(layout.kept)), np.dtype(np.float64), partial(_parsed, text, layout, decimal))
        try:
            for _ in x.read():  # all of it once, since what it holds is known in the end
                pass
        except _NoNumbers:
            faults = _faults(text, layout, decimal)
            x = Pieces.of(_spell(text, layout, decimal)) if not faults else x
        if not faults:
            if decimal == ",":
                _check_commas(text, layout)
            return x
        wrong.append(faults)
    raise ValueError(f"{text.path}: {_complaint(text, min(wrong, key=len))}")


def _parsed(text: _Text, layout: _Layout, decimal: str) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The numbers by pandas, piece by piece; _NoNumbers if they are none."""
    import pandas

    exact = tuple(map(int, pandas.__version__.split(".")[:2])) >= (3, 1)  # correct rounding was an option before
    blank = np.array(layout.blank, np.int64) - layout.start
    done = kept = 0
    with pandas.read_csv(
        text.path,
        sep=r"\s+" if text.delimiter == " " else text.delimiter,
        decimal=decimal,
        encoding=text.encoding,
        header=layout.start - 1 if layout.start else None,
        names=list(range(len(layout.columns))),
        index_col=False,
        usecols=layout.kept,
        na_values=_MARKERS,
        keep_default_na=False,
        skip_blank_lines=False,
        skipinitialspace=True,
        low_memory=False,
        chunksize=max(1, _CHUNK // len(layout.columns)),
        **({} if exact else {"float_precision": "round_trip"}),
    ) as frames:
        for frame in frames:
            # The types are those that pandas finds: told to read floats, it takes True for 1.
            stop = done + len(frame)
            if any(dtype.kind not in "iuf" for dtype in frame.dtypes) or stop > layout.rows + len(blank):
                raise _NoNumbers
            values = np.delete(frame.to_numpy(np.float64), blank[(blank >= done) & (blank < stop)] - done, 0)
            yield (slice(kept, kept + len(values)), ..., slice(None)), values
            done, kept = stop, kept + len(values)
    if done < layout.rows + len(blank):
        raise _NoNumbers


def _fields(text: _Text, layout: _Layout) -> Iterator[tuple[int, int, str]]:
    """Line, column and text of all fields that should be numbers."""
    blank = set(layout.blank)
    for record, (line, fields) in enumerate(text.records()):
        if record >= layout.start and record not in blank:
            yield from ((line, i, fields[i].strip()) for i in layout.kept)


def _spell(text: _Text, layout: _Layout, decimal: str) -> NDArray[np.float64]:
    """The numbers field by field, where pandas finds no type for them: whole ones of more than 64 bits."""
    texts = (field for _, _, field in _fields(text, layout))
    values = (float(field.replace(decimal, ".")) if _is_number(field, decimal) else np.nan for field in texts)
    return np.fromiter(values, np.float64).reshape(layout.rows, len(layout.kept))


def _faults(text: _Text, layout: _Layout, decimal: str) -> dict[str, tuple[int, str]]:
    """Line and text of the first field that is no number, by column."""
    faults: dict[str, tuple[int, str]] = {}
    for line, column, field in _fields(text, layout):
        if layout.columns[column] not in faults and not _is_value(field, decimal):
            faults[layout.columns[column]] = line, field
    return faults


def _complaint(text: _Text, faults: dict[str, tuple[int, str]]) -> str:
    (name, (line, field)), *others = faults.items()
    which = f" (nor are {', '.join(repr(other) for other, _ in others)})" if others else ""
    hint = "; a decimal comma is read only between semicolons or tabs: write a point" if _is_value(field, ",") else ""
    if any(_is_value(field, sign) for sign in text.decimals):
        hint = "; in other places the decimal sign is another: write one of the two"
    return (
        f"column {name!r} is not numeric: line {line} has {field!r}{which}; leave the column out, encode it, or, if it "
        f"holds the classes, {advise_label(name)}{hint}"
    )


def _check_commas(text: _Text, layout: _Layout) -> None:
    """Refuse 1,234 where nothing in the table tells whether it is more than a thousand or more than one."""
    commas = ((line, field) for line, _, field in _fields(text, layout) if "," in field)
    line, first = next(commas)
    if _THOUSANDS.fullmatch(first) and all(_THOUSANDS.fullmatch(field) for _, field in commas):
        raise ValueError(
            f"{text.path}: line {line} has {first!r}, and every comma here may be decimal or separate thousands: "
            "write decimal points, or leave the separators out"
        )


def _classes(labels: list[str]) -> NDArray[np.generic]:
    """Whole numbers as numbers, words as words, None where they are missing; - is a class beside +."""
    if all(re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", label) for label in labels):
        return np.array([int(label) for label in labels], dtype=np.int64)
    missing = _MISSING - {"-"} if "+" in labels else _MISSING
    return np.array([None if label.lower() in missing else label for label in labels], dtype=object)


def _is_number(field: str, decimal: str) -> bool:
    return bool(_NUMBER[decimal].fullmatch(field.strip()))


def _is_value(field: str, decimal: str) -> bool:
    """Whether it is a number, or stands for a missing one."""
    return _is_number(field, decimal) or field.strip().lower() in _MISSING
