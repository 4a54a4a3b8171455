"""Results as tables: aligned text for a terminal, or a small HTML table for a notebook."""

from __future__ import annotations

__all__ = ["Printed", "Table", "decimals", "digits_of", "percent", "with_error"]

import html
import math
import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

_NUMBER = re.compile(r"-?[\d,]+(?:\.\d+)?(?: ± [\d,]+(?:\.\d+)?)?")
_CELL = "padding:0.1em 0.6em;text-align:{}"
_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums"
_LINE = "border-bottom:1px solid currentColor"


class Table(NamedTuple):
    """The printed form of a result: a head line, columns of numbers, facts in one line each, sentences below.

    Attributes:
        head: the kind of result, and the unit.
        columns: the headings; the first one is above the names of the rows.
        rows: the cells; the first cell is the name of the row.
        facts: pairs of a name and a value.
        notes: sentences.
    """

    head: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned lines: names on the left, numbers aligned at the decimal point."""
        return "\n".join([*filter(None, [self.head]), *self.grid(), *filter(None, self.notes)])

    def grid(self) -> list[str]:
        """The lines of the columns and the facts."""
        lines = [self.columns, *self.rows] if self.columns else []
        names = [line[0] for line in lines] + [name for name, _ in self.facts]
        width = max(map(len, names), default=0)
        columns = [_by_point(column) for column in zip(*(line[1:] for line in lines), strict=True)]
        cells = zip(*columns, strict=True) if columns else [()] * len(lines)
        text = ["  ".join([line[0].ljust(width), *rest]) for line, rest in zip(lines, cells, strict=True)]
        rule = ["-" * len(text[0])] if text else []
        facts = [f"{name.ljust(width)}  {value}" for name, value in self.facts]
        return [line.rstrip() for line in [*text[:1], *rule, *text[1:], *facts]]

    def html(self) -> str:
        """A table in the colours of the page; text is escaped, and there are no scripts."""
        parts = [f"<p>{_escaped(self.head)}</p>" if self.head else ""]
        if self.columns or self.facts:
            head = "".join(_cell(name, "th", "col", i) for i, name in enumerate(self.columns))
            body = ["".join(_cell(c, "td" if i else "th", "row", i) for i, c in enumerate(row)) for row in self.rows]
            span = max(1, len(self.columns) - 1)
            left = _CELL.format("left")
            body += [
                _cell(name, "th", "row", 0) + f'<td colspan="{span}" style="{left}">{_escaped(value)}</td>'
                for name, value in self.facts
            ]
            parts.append(f'<table style="{_TABLE}">')
            parts.append(f'<thead><tr style="{_LINE}">{head}</tr></thead>' if head else "")
            parts += ["<tbody>", *(f"<tr>{row}</tr>" for row in body), "</tbody></table>"]
        parts += [f"<p>{_escaped(note)}</p>" for note in self.notes if note]
        return "<div>\n" + "\n".join(filter(None, parts)) + "\n</div>"


class Printed:
    """A result that is printed as its :class:`Table`: by ``print``, at the prompt, and in a notebook."""

    @abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return self._table().text()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._table().html()

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "",
        data: Tensor | None = None,
        image_shape: tuple[int, int] | tuple[int, int, int] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Path:
        """Write this result as one self-contained HTML page: see :class:`jensen.reports.Report`.

        Args:
            path: the file.
            title: of the page; the name of the class by default.
            data: the measured data points, [N, ...]: with them, points and rows of the page show their data.
            image_shape: the height and width of data points that are images, such as ``data.image_shape``.
            value_range: the values drawn white and black; by default the range of the data.

        Returns:
            The path.
        """
        from jensen.reports import Report  # imported late, because reports import results

        page = Report(title or type(self).__name__, data=data, image_shape=image_shape, value_range=value_range)
        return page.add(self).write(path)


def _by_point(cells: Sequence[str]) -> list[str]:
    """A column of cells of equal width, with numbers aligned at the decimal point."""
    after = [_after_point(cell) for cell in cells]
    most = max((n for n in after if n is not None), default=0)
    padded = [cell if n is None else cell + " " * (most - n) for cell, n in zip(cells, after, strict=True)]
    width = max(map(len, padded))
    return [cell.rjust(width) for cell in padded]


def _after_point(cell: str) -> int | None:
    """The number of characters from the decimal point on; None if the cell is not a number."""
    if _NUMBER.fullmatch(cell) is None:
        return None
    return len(cell) - cell.rindex(".") if "." in cell else 0


def _cell(text: str, kind: str, scope: str, column: int) -> str:
    style = _CELL.format("right" if column else "left")
    scoped = f' scope="{scope}"' if kind == "th" else ""
    return f'<{kind}{scoped} style="{style}">{_escaped(text)}</{kind}>'


def _escaped(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals, without a negative zero; a dash if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(share: float | None) -> str:
    """A share in per cent; a dash if it is unknown."""
    return "-" if share is None else f"{100 * share:.1f} %"


def digits_of(data: float | None, *others: float | None) -> int:
    """The number of decimals that shows two digits of the smallest error, at most 4; 3 if no error is known.

    Args:
        data: the error over the data, of which at most three digits are shown.
        others: the other errors.
    """
    known = [_two_digits(error) for error in (data, *others) if error is not None and 0 < error < math.inf]
    if not known:
        return 3
    most = _two_digits(data) + 1 if data is not None and 0 < data < math.inf else 4
    return max(0, min(max(known), 4, most))


def _two_digits(error: float) -> int:
    return 1 - math.floor(math.log10(error))


def with_error(value: float, error: float) -> str:
    """A value and its error, rounded to two digits of the error."""
    digits = digits_of(error)
    return f"{decimals(value, digits)} ± {decimals(error, digits)}"
