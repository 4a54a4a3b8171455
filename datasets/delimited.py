"""A reader of text tables (CSV) with fields separated by commas, semicolons, tabs, bars or blanks.

The standard library splits the text, to check that all records have as many fields as the first and to locate fields
that are not numbers; pandas then reads the numbers. Encoding, delimiter, decimal sign and names are determined here,
not by pandas, and ambiguous numbers raise an error.
"""

from __future__ import annotations

__all__ = ["PACKED", "read_csv"]

import bz2
import csv
import gzip
import lzma
import math
import re
import shlex
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from .arrays import LIMIT, Pieces, check_size
from .columns import Wanted, advise_drop, advise_label, check_names, listed, select
from .missing import WORDS, Missing
from .tables import Table

_MARKERS = sorted({*WORDS, *map(str.upper, WORDS), *map(str.title, WORDS), "NaN"})  # pandas is case-sensitive
_NUMBER = {
    sign: re.compile(rf"[+-]?(({digits})(e[+-]?[0-9]+)?|inf(inity)?|nan)", re.IGNORECASE)
    for sign, digits in ((".", r"[0-9]+\.?[0-9]*|\.[0-9]+"), (",", r"[0-9]+(,[0-9]+)?"))  # "3," is a number and a comma
}
_REAL = {  # without leading zeros, which occur in house numbers and codes
    sign: re.compile(rf"[+-]?((0|[1-9][0-9]*)([{sign}][0-9]*)?|[{sign}][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
    for sign in ".,"
}
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}([., '\u00a0\u202f][0-9]{3})+([.,][0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_RENAME = (
    "rename them, drop them by position (drop=), or pass header=False if the first line has no names, in a shell "
    "--no-header"
)
_SAMPLE = 20  # records used to detect the delimiter and the header
_FEW, _FAR = 10, 3.0  # records needed for a range, and the multiple of a range that counts as far
_RISING = 8  # this many numbers rise by chance once in 40,000
_LINE = 2**26  # maximal characters of a line of a compressed file
_CHUNK = 2**19  # numbers or characters read at once


def read_csv(
    path: Path,
    label: str | int | None = None,
    header: bool | None = None,
    limit: int = LIMIT,
    drop: Wanted = None,
    only: Wanted = None,
    missing: Missing | None = None,
) -> Table:
    """Read a table of numbers from a text file, which may be compressed (.gz, .bz2, .xz).

    The delimiter is a comma, semicolon, tab, bar or blank: the one that gives every record the same number of fields,
    and the most numbers. With semicolons, tabs and bars the decimal sign may be a comma. The text is UTF-8, UTF-16 with
    a byte order mark, or otherwise Latin-1. Lines above the table that begin with # are comments; the last one is the
    header if it has a name for each column. A line ``sep=;`` sets the delimiter. Empty records, and empty unnamed
    columns at the end of every line, are dropped.

    Args:
        path: the file.
        label: name or position of the column of labels; labels may be words.
        header: whether the first line has names. None: detected if unambiguous.
        limit: the maximal bytes of the numbers in memory, and of the text of a compressed file.
        drop: columns to omit, of any content.
        only: the columns of the data, if not all others.
        missing: other words that mark missing values.

    Returns:
        The table. Columns without names are called 0, 1, ...; missing values (empty, NA, NaN, ?, - and similar) are
        NaN.

    Raises:
        ValueError: if there are no data, a line has another number of fields than the first, a column other than the
            label is not numeric (the message names all), the header is ambiguous, or commas may be decimal signs or
            thousands separators.
    """
    from pandas.errors import ParserError, ParserWarning  # imported here because pandas is slow to import

    try:
        texts = _texts(path, limit, missing or Missing())
        text = max(texts, key=_fit)
        layout = _lay_out(text, label, header, drop, only)
        if not layout.rows or not layout.kept:
            raise ValueError(f"{path} has no {'column of ' if layout.rows else ''}data")
        check_size(path, 8 * layout.rows * len(layout.kept), limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # pandas would drop fields
            x = _numbers(text, layout)
    except (csv.Error, ParserError, ParserWarning, UnicodeError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a text table of numbers: {error}") from error
    except OSError as error:
        if error.errno is not None:  # an error of the disk; others are from a damaged compressed file
            raise
        raise ValueError(f"{path} is not a text table of numbers: {error}") from error
    names = tuple(layout.columns[i] for i in layout.kept)
    return Table(x, names, _classes(layout.labels, text.decimals) if layout.labels else None)


@dataclass(frozen=True)
class _Text:
    """The file, its encoding, and its delimiter; a blank means any number of blanks and tabs.

    Attributes:
        missing: which words mark missing values.
        skip: the number of lines before the table.
        comment: the last of these lines without its #, if it is a comment.
    """

    path: Path
    encoding: str
    delimiter: str
    missing: Missing
    skip: int = 0
    comment: str = ""

    @property
    def decimals(self) -> str:
        """The possible decimal signs."""
        return ".," if self.delimiter in ";\t|" else "."

    def open(self) -> TextIO:
        """The text from the first line of the table."""
        file = _opened(self.path, self.encoding)
        for _ in range(self.skip):
            file.readline()
        return file

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The fields of every record, and the line where it ends; a blank line has no fields."""
        with self.open() as file:
            reader = self._reader(file)
            for fields in reader:
                yield reader.line_num + self.skip, fields

    def names(self) -> list[str]:
        """The fields of the comment above the table."""
        return next(self._reader([self.comment]), [])

    def _reader(self, lines: Iterable[str]) -> Any:
        single = (re.sub(r"[ \t]+", " ", line.strip()) + "\n" for line in lines)
        return csv.reader(single if self.delimiter == " " else lines, delimiter=self.delimiter, skipinitialspace=True)


def _opened(path: Path, encoding: str, newline: str | None = "") -> TextIO:
    """Open a text file, decompressed while reading."""
    unpack: Any = PACKED.get(path.suffix.lower(), open)
    file: TextIO = unpack(path, "rt", encoding=encoding, newline=newline)
    return file


def _texts(path: Path, limit: int, missing: Missing) -> list[_Text]:
    """The file in its encoding, for each possible delimiter."""
    encoding = _encoding(path, limit)
    skip, comment, delimiters = 0, "", "\t;,| "
    with _opened(path, encoding) as file:
        while (line := file.readline(_LINE)).startswith(("#", "sep=")):
            while not line.endswith("\n") and (rest := file.readline(_LINE)):
                line += rest
            skip, comment = skip + 1, line[1:].strip() if line[0] == "#" else ""
            if line[0] != "#":
                delimiters = line.strip().removeprefix("sep=") or "\t"
    some = [delimiter for delimiter in delimiters if delimiter in "\t;,| "]
    return [_Text(path, encoding, delimiter, missing, skip, comment) for delimiter in some]


@dataclass(frozen=True)
class _Layout:
    """The layout of a table.

    Attributes:
        columns: the names of the columns, or 0, 1, ...
        width: the number of fields of a record, including empty ones at the end.
        kept: the columns of the data.
        start: the record where the data begin, after the names.
        rows: the number of data points.
        blank: the blank records among the data.
        labels: the labels as text.
    """

    columns: tuple[str, ...]
    width: int
    kept: list[int]
    start: int
    rows: int
    blank: list[int]
    labels: list[str]


def _encoding(path: Path, limit: int) -> str:
    packed = path.suffix.lower() in PACKED
    with _opened(path, "latin-1") as file:
        encoding = "utf-16" if file.read(2) in ("\xff\xfe", "\xfe\xff") else "utf-8-sig"
    try:
        size = line = 0
        with _opened(path, encoding, newline=None) as text:
            for piece in iter(lambda: text.read(_CHUNK), ""):
                if "\0" in piece:
                    raise ValueError(f"{path} is not a text table of numbers: it contains zero bytes")
                size, end = size + len(piece), piece.rfind("\n")
                line = line + len(piece) if end < 0 else len(piece) - end
                if packed and (size > limit or line > _LINE):
                    what = f"expands to more than {limit} bytes" if size > limit else f"has a line above {_LINE} bytes"
                    raise ValueError(f"{path} {what}: decompress it, or pass a larger limit=")
    except UnicodeDecodeError:
        return "latin-1"
    return encoding


def _fit(text: _Text) -> tuple[int, float]:
    """Score a delimiter: first whether all records have it equally often, then the share of numbers."""
    try:
        sample = [fields for _, fields in islice(text.records(), _SAMPLE) if fields]
    except csv.Error:  # a line of many fields is too long for one field
        return 0, 0.0
    if not sample or len(sample[0]) < 2:
        return 1, float(text.delimiter == ",")  # one column
    if any(len(fields) != len(sample[0]) for fields in sample):
        likely = text.delimiter not in " |" or len(sample[1]) == len(sample[0]) or _has_row_names(text, sample)
        return 2 if likely else 0, 0.0  # names may contain blanks
    fields = [field for record in sample[1:] or sample for field in record]
    return 3, sum(any(_is_value(text, field, sign) for sign in text.decimals) for field in fields) / len(fields)


def _lay_out(text: _Text, label: str | int | None, header: bool | None, drop: Wanted, only: Wanted) -> _Layout:
    """Determine the layout of a table; all records must have as many fields as the first."""
    sample = list(islice((fields for _, fields in text.records() if _holds(fields)), _SAMPLE + 1))
    if not sample:
        return _Layout((), 0, [], 0, 0, [], [])
    if header is not False and _has_row_names(text, sample):
        sample[0] = ["", *sample[0]]
    width = len(sample[0])
    names, above = _names(text, sample, label, header)
    columns = tuple(name or _called(j, names) for j, name in enumerate(names or [""] * width))
    columns = columns[: _ending(text, names or sample[0])]
    at, kept = select(text.path, columns, label, drop, only)
    if names and (nameless := [j for j in kept if not names[j]]):
        raise ValueError(
            f"{text.path}: column {nameless[0]} has no name: if it is an index, "
            f"{advise_drop([columns[j] for j in nameless])} (or write the file without it, in pandas: index=False)"
        )
    used = [columns[j] for j in sorted([*kept, *([] if at is None else [at])])]
    check_names(text.path, used, _RENAME)
    blank: list[int] = []
    labels: list[str] = []
    start, rows, heading = 0, 0, bool(names) and not above
    for i, (line, fields) in enumerate(text.records()):
        if not fields or (len(fields) == 1 < width and not fields[0].strip()) or (width > 1 and not _holds(fields)):
            blank.append(i)
        elif heading:
            start, blank, heading = i + 1, [], False
        elif len(fields) != width:
            raise ValueError(
                f"{text.path}: line {line} has {len(fields)} fields, but the first has {width}"
                f"{_other_width(text, width, len(fields), rows)}"
            )
        else:
            rows += 1
            if at is not None:
                labels.append(fields[at].strip())
    return _Layout(columns, width, kept, start, rows, blank, labels)


def _called(j: int, names: Sequence[str]) -> str:
    """The name given to an unnamed column: its position, unless another column has that name."""
    return f"Unnamed: {j}" if str(j) in names else str(j)


def _other_width(text: _Text, width: int, fields: int, rows: int) -> str:
    """A hint about a line with another number of fields."""
    if fields == 2 * width > 2 and text.delimiter == ",":
        return "; if every second comma is a decimal sign, use decimal points, or semicolons as delimiters"
    return "; if the first lines are a title, remove them" if width < fields and not rows else ""


def _holds(fields: Sequence[str]) -> bool:
    return any(map(str.strip, fields))


def _has_row_names(text: _Text, sample: list[list[str]]) -> bool:
    """Whether the first record has no name for the first column, as in files written by R."""
    first, *rest = sample
    more = bool(rest) and {len(fields) for fields in rest} == {len(first) + 1}
    return (
        more
        and all(_kind(text, field) == "word" for field in first)
        and any(_kind(text, fields[-1]) != "missing" for fields in rest)
        and any(_kind(text, field) != "word" for field in rest[0])  # otherwise these are the names, below a title
    )


def _ending(text: _Text, first: Sequence[str]) -> int:
    """The number of columns without empty unnamed ones at the end, which come from a delimiter at the end of lines."""
    end = len(first)
    while end and not first[end - 1].strip():
        end -= 1
    if end in (0, len(first)):
        return len(first)
    for _, fields in text.records():
        while end < len(fields) and _holds(fields[end:]):
            end += 1
    return min(end, len(first))


def _names(
    text: _Text, sample: list[list[str]], label: str | int | None, header: bool | None
) -> tuple[tuple[str, ...], bool]:
    """The names of the columns, if any, and whether they are in a comment above the table."""
    first, *rest = sample
    if header is None and text.comment:
        names = text.names()
        if len(names) == len(first) and all(_kind(text, name) == "word" for name in names):
            return tuple(name.strip() for name in names), True
    if header is None:
        header = _is_header(text, first, rest, label)
    return (tuple(field.strip() for field in first), False) if header else ((), False)


def _is_header(text: _Text, first: list[str], rest: list[list[str]], label: str | int | None) -> bool:
    """Whether the first record has names, judged by the records below it; an ambiguous one raises ValueError.

    Names are words, and data are numbers. A line with both is data if its words occur again below, or its numbers have
    fractions and are unordered. It is a header if the label has the name of such a word, or if the words are above
    numbers and the numbers count the columns. A line of numbers is data, unless no other line is like it and its
    numbers count the columns, form an even grid (wavelengths, years) or rise from column to column, or unless they are
    far from all numbers below.

    Raises:
        ValueError: for a line that may be either.
    """
    kinds = [_kind(text, field) for field in first]
    below = [fields for fields in rest if len(fields) == len(first)]
    if len(first) > 1 and not first[0].strip() and all(fields[0].strip() for fields in below):  # an unnamed index
        first, kinds, below = first[1:], kinds[1:], [fields[1:] for fields in below]
        numbers = [_value(text, field) for field in first]
        if _counts(numbers) and _looks_like_names(text, first, numbers, below):
            return True
    words = [j for j, kind in enumerate(kinds) if kind == "word"]
    numbers = [_value(text, field) for field, kind in zip(first, kinds, strict=True) if kind == "number"]
    if words and all(kind == "word" or not field.strip() for kind, field in zip(kinds, first, strict=True)):
        return True
    if words:
        again = any(fields[j].strip() == first[j].strip() for fields in below for j in words)
        if not again and label in [first[j].strip() for j in words]:
            return True
        above = all({_kind(text, fields[j]) for fields in below} - {"missing"} == {"number"} for j in words)
        if above and numbers and _counts(numbers):
            return True
        if again and not (numbers and _counts(numbers)):
            return False
        counted = [field for field, kind in zip(first, kinds, strict=True) if kind == "number"]
        written = any(sign in field for field in counted for sign in ".,")
        if written and {a < b for a, b in pairwise(numbers)} == {True, False}:
            return False
    elif numbers and not _looks_like_names(text, first, numbers, below):
        return False
    raise ValueError(
        f"{text.path}: the first line may be names or data: {text.delimiter.join(first)[:80]!r}; pass header=True or "
        "header=False, in a shell --header or --no-header"
    )


def _looks_like_names(text: _Text, first: list[str], numbers: list[float], below: list[list[str]]) -> bool:
    """Whether a line of numbers differs from the lines below and looks like column names."""
    others = [[_value(text, field) for field in fields] for fields in below]
    if not others or len(numbers) != len(others[0]):  # a field is missing
        return False
    if len(numbers) < 3:
        fractions = all(any(v % 1 for v in column if math.isfinite(v)) for column in zip(*others, strict=True))
        return _counts(numbers) and fractions and all(field.strip().isdigit() for field in first)
    if _is_even(numbers):
        return not (all if _counts(numbers) else any)(map(_is_even, others))
    return (_rises(numbers) and not any(map(_rises, others))) or _is_far_off(numbers, others)


def _is_far_off(numbers: list[float], others: list[list[float]]) -> bool:
    """Whether each number is much farther from the numbers below it than these are from each other."""
    if len(others) < _FEW:
        return False
    below = np.array(others)
    low, high = np.nanmin(below, 0, initial=np.inf), np.nanmax(below, 0, initial=-np.inf)
    away = np.maximum(low - numbers, numbers - high)
    return bool((away > _FAR * (high - low)).all() and (high > low).any())


def _counts(numbers: list[float]) -> bool:
    return numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _is_even(numbers: list[float]) -> bool:
    """Whether three rising numbers, or more in any order, are equally spaced."""
    with np.errstate(invalid="ignore"):  # of infinities
        steps = np.diff(numbers)
    step = steps.mean() if len(steps) > 2 else max(0.0, steps.mean() if len(steps) > 1 else 0.0)
    return bool(step) and bool(abs(steps - step).max() <= 1e-6 * abs(step))


def _rises(numbers: list[float]) -> bool:
    return len(numbers) >= _RISING and all(a < b for a, b in pairwise(numbers))


def _kind(text: _Text, field: str) -> str:
    """The kind of a field: number, missing, or word."""
    if any(_is_number(field, sign) for sign in text.decimals):
        return "number"
    return "missing" if text.missing.marks(field) else "word"


def _value(text: _Text, field: str) -> float:
    return next((float(field.replace(sign, ".")) for sign in text.decimals if _is_number(field, sign)), math.nan)


class _NoNumbers(Exception):
    """Raised if a column is not numeric, or pandas finds other records."""


def _numbers(text: _Text, layout: _Layout) -> Pieces:
    """The numbers [N, X], readable in pieces; NaN for missing values."""
    wrong: list[tuple[dict[str, _Fault], dict[str, int]]] = []
    for decimal in text.decimals:
        faults: dict[str, _Fault] = {}
        missing: dict[str, int] = {}
        x = Pieces((layout.rows, len(layout.kept)), np.dtype(np.float64), partial(_parsed, text, layout, decimal))
        try:
            for _ in x.read():  # one full pass, because errors are only known at the end
                pass
        except _NoNumbers:
            faults, missing = _faults(text, layout, decimal)
            x = Pieces.of(_spell(text, layout, decimal)) if not faults else x
        if not faults:
            if decimal == ",":
                _check_commas(text, layout)
            return x
        wrong.append((faults, missing))
    raise ValueError(f"{text.path}: {_complaint(text, layout.rows, *min(wrong, key=lambda found: len(found[0])))}")


def _parsed(text: _Text, layout: _Layout, decimal: str) -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
    """The numbers read by pandas in pieces; raises _NoNumbers if they are not numeric."""
    import pandas

    exact = tuple(map(int, pandas.__version__.split(".")[:2])) >= (
        3,
        1,
    )  # in earlier versions correct rounding was an option
    blank = np.array(layout.blank, np.int64) - layout.start
    done = kept = 0
    with (
        text.open() as file,
        pandas.read_csv(
            file,
            sep=r"\s+" if text.delimiter == " " else text.delimiter,
            decimal=decimal,
            header=layout.start - 1 if layout.start else None,
            names=list(range(layout.width)),
            index_col=False,
            usecols=layout.kept,
            na_values=[*_MARKERS, *text.missing.words],
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
            low_memory=False,
            chunksize=max(1, _CHUNK // layout.width),
            **({} if exact else {"float_precision": "round_trip"}),
        ) as frames,
    ):
        for frame in frames:
            # pandas infers the types, because with dtype=float it reads True as 1.
            stop = done + len(frame)
            if any(dtype.kind not in "iuf" for dtype in frame.dtypes) or stop > layout.rows + len(blank):
                raise _NoNumbers
            values = np.delete(frame.to_numpy(np.float64), blank[(blank >= done) & (blank < stop)] - done, 0)
            yield (slice(kept, kept + len(values)), ..., slice(None)), values
            done, kept = stop, kept + len(values)
    if done < layout.rows + len(blank):
        raise _NoNumbers


def _fields(text: _Text, layout: _Layout) -> Iterator[tuple[int, int, str]]:
    """Line, column and text of all fields of the data."""
    blank = set(layout.blank)
    for record, (line, fields) in enumerate(text.records()):
        if record >= layout.start and record not in blank:
            yield from ((line, i, fields[i].strip()) for i in layout.kept)


def _spell(text: _Text, layout: _Layout, decimal: str) -> NDArray[np.float64]:
    """Convert the numbers field by field if pandas has no type for them: integers of more than 64 bits."""
    texts = (field for _, _, field in _fields(text, layout))
    values = (float(field.replace(decimal, ".")) if _is_number(field, decimal) else np.nan for field in texts)
    return np.fromiter(values, np.float64).reshape(layout.rows, len(layout.kept))


class _Fault(NamedTuple):
    """Fields of a column that are not numbers: line and text of the first, and their count."""

    line: int
    text: str
    found: int = 0


def _faults(text: _Text, layout: _Layout, decimal: str) -> tuple[dict[str, _Fault], dict[str, int]]:
    """The non-numeric fields, and the number of missing ones, by column."""
    faults: dict[str, _Fault] = {}
    missing: Counter[str] = Counter()
    for line, column, field in _fields(text, layout):
        if _is_number(field, decimal):
            continue
        name = layout.columns[column]
        if text.missing.marks(field):
            missing[name] += 1
        else:
            fault = faults.get(name, _Fault(line, field))
            faults[name] = fault._replace(found=fault.found + 1)
    return faults, {name: missing[name] for name in missing if name not in faults}


def _complaint(text: _Text, rows: int, faults: dict[str, _Fault], missing: dict[str, int]) -> str:
    (name, (line, field, count)), *others = faults.items()
    which = f" (nor are {listed([repr(other) for other, _ in others])})" if others else ""
    few = count <= rows / 2
    if few:
        which += f"; of its {rows} fields {count} {'is not a number' if count == 1 else 'are not numbers'}"
    if missing:
        which += f", and values are missing: {listed([f'{count} of {column!r}' for column, count in missing.items()])}"
    comma = field not in WORDS and _is_number(field, ",")
    hint = "; a decimal comma is supported only with semicolons or tabs as delimiters: write a point" if comma else ""
    if _GROUPED.fullmatch(field):
        hint = "; write it without thousands separators"
    if any(_is_value(text, field, sign) for sign in text.decimals):
        hint = "; other numbers use another decimal sign: use only one of the two"
    out = [*faults, *missing]
    mend = (
        f"correct {'that line' if count == 1 else 'those lines'} (if the value is missing, pass missing={field!r}, in "
        f"a shell --missing {shlex.quote(field)}), or "
        if few
        else ""
    )
    return (
        f"column {name!r} is not numeric: line {line} has {field!r}{which}; {mend}{advise_drop(out)}; encode "
        f"{'it' if len(out) == 1 else 'them'} as numbers; or, if {name!r} holds the classes, {advise_label(name)}{hint}"
    )


def _check_commas(text: _Text, layout: _Layout) -> None:
    """Raise ValueError if a comma as in 1,234 may be a decimal sign or a thousands separator."""
    commas = ((line, field) for line, _, field in _fields(text, layout) if "," in field)
    line, first = next(commas)
    if _THOUSANDS.fullmatch(first) and all(_THOUSANDS.fullmatch(field) for _, field in commas):
        raise ValueError(
            f"{text.path}: line {line} has {first!r}, and every comma here may be a decimal sign or a thousands "
            "separator: write decimal points, or remove the separators"
        )


def _classes(labels: list[str], decimals: str) -> NDArray[np.generic]:
    """Labels as numbers or words, None if missing; "-" is a class if "+" is one, and 007 is a word."""
    if all(re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", label) for label in labels):
        return np.array([int(label) for label in labels], dtype=np.int64)
    for sign in decimals:
        if all(_REAL[sign].fullmatch(label) for label in labels):
            return np.array([float(label.replace(sign, ".")) for label in labels])
    missing = WORDS - {"-"} if "+" in labels else WORDS
    return np.array([None if label.lower() in missing else label for label in labels], dtype=object)


def _is_number(field: str, decimal: str) -> bool:
    return bool(_NUMBER[decimal].fullmatch(field.strip()))


def _is_value(text: _Text, field: str, decimal: str) -> bool:
    """Whether a field is a number or a marker of a missing value."""
    return _is_number(field, decimal) or text.missing.marks(field)
