"""Results: their summary, table and data frame, and a JSON file without loss of precision.

A :class:`Measurement` declares each :class:`Quantity` once; summary, table and frame follow. A file is one JSON object:

| key | contents |
| --- | --- |
| ``"format"`` | ``"jensen."`` and the name of the class |
| ``"version"`` | the schema version, 1 |
| ``"fields"`` | the fields of the class by name |
| ``"sha256"`` | the digest of these three (:mod:`jensen.results.schema`); files of version 0.1.0 have none |

A tensor is ``{"dtype": "float64", "shape": [2, 3], "values": [...]}``, its values in row-major order; a result inside
a result is the object of its fields. Numbers that JSON does not have are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``. Floats have enough digits for a bitwise identical result.
"""

from __future__ import annotations

__all__ = ["Measurement", "Quantity", "Record"]

import dataclasses
import json
import math
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

from torch import Tensor

from .files import check_schema, whole
from .schema import DIGEST, Checked, check_digest, decoded, digest_of, expect, refused
from .standard_errors import standard_error_of_mean
from .tables import Printed, Table, decimals, digits_of

VERSION = 1
_UNITS = {"nats": 1.0, "bits": math.log(2)}


class Record(Printed, Checked):
    """A result, as a dataclass of tensors, numbers, text, and lists, dicts and dataclasses of these."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @abstractmethod
    def _columns(self) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
        """The index name, the index and the columns of the data frame; a column without values is None."""

    def check(self) -> None:
        """Raise a ValueError unless each column of the frame has one value per row."""
        try:
            _, rows, columns = self._columns()
            lengths = {
                name: list(column.shape) if isinstance(column, Tensor) else [len(column)]
                for name, column in columns.items()
                if column is not None
            }
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, StopIteration) as error:
            raise ValueError(f"the fields of the {type(self).__name__} do not agree: {error}") from error
        if wrong := {name: shape for name, shape in lengths.items() if shape != [len(rows)]}:
            raise ValueError(f"the {type(self).__name__} has {len(rows)} rows, but columns of the shapes {wrong}")

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, in the order of the class."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_frame(self) -> Any:
        """This result as a ``pandas.DataFrame`` of unrounded numbers; quantities with a unit are in nats."""
        import pandas

        name, rows, columns = self._columns()
        values = {
            key: column.cpu().numpy() if isinstance(column, Tensor) else column
            for key, column in columns.items()
            if column is not None
        }
        return pandas.DataFrame(values, index=pandas.Index(rows, name=name))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """This result as one JSON object; :meth:`from_json` reads it, with bitwise identical numbers.

        Numbers that JSON does not have are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

        Args:
            path: a file to write as well, completely or not at all; missing parent folders are created.

        Returns:
            The text.
        """
        document = {"format": _format(type(self)), "version": VERSION, "fields": _encoded(self)}
        document[DIGEST] = digest_of(document)
        text = json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"
        if path is not None:
            with whole(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Self:
        """Read a result that :meth:`to_json` wrote.

        Args:
            source: the text, or the path of a file. A string that starts with a bracket is the text.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the text is damaged, is not this kind of result, or has a newer schema version.
        """
        is_text = isinstance(source, str) and source.lstrip()[:1] in ("{", "[", "")
        what = "the text" if is_text else str(source)
        try:
            text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
            document = json.loads(text, parse_constant=refused)
            version, fields = _opened(document, cls)
            result: Any = decoded(cls, fields, "fields") if version <= VERSION else None
        except (ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as error:
            raise ValueError(
                f"{what} cannot be read as the JSON of a {cls.__name__}: {error}; write it again with {cls.__name__}."
                "to_json()"
            ) from error
        check_schema(version, VERSION, what)
        return cast(Self, result)


class Quantity(NamedTuple):
    """A quantity of a :class:`Measurement`: its summary, columns and table row follow from this declaration.

    Attributes:
        name: its key in ``summary()``, in ``to_dict()["per_datum"]`` and in the frame.
        value: a tensor with one number per data point, [N]; or one value for all, which the summary repeats; None if
            unknown.
        label: the label of its row in the table; without one it has no row, and no standard error over the data.
        error: the Monte Carlo standard error of its mean, if it has one.
        data_error: whether the summary has the standard error of its mean over the data.
        digits: an error of another quantity; the row shows the digits for this error, too.
        unit: the unit of the summary and the table; values per data point are always in nats.
        total: whether the summary has the sum of the values instead of their mean.
        in_summary: whether it is in the summary.
        frame: its name in the frame, if it follows from other quantities: then ``to_dict`` omits its values.
    """

    name: str
    value: Any
    label: str = ""
    error: float | None = None
    data_error: bool = True
    digits: float = 0.0
    unit: Literal["nats", "bits"] = "nats"
    total: bool = False
    in_summary: bool = True
    frame: str = ""

    def summary(self) -> dict[str, Any]:
        """Its mean, total or single value, with its errors."""
        value, unit = self.value, _UNITS[self.unit]
        per_datum = isinstance(value, Tensor)
        result = {self.name: value if not per_datum else int(value.sum()) if self.total else _mean(value) / unit}
        if self.label and self.data_error:
            result[f"{self.name}_data_error"] = standard_error_of_mean(value) / unit if per_datum else None
        if self.error is not None:
            result[f"{self.name}_mc_error"] = self.error / unit
        return result

    def row(self) -> list[str]:
        """Its label, mean and both errors, rounded to the precision of the errors."""
        mean, *errors = (self.summary().get(f"{self.name}{part}") for part in ("", "_data_error", "_mc_error"))
        digits = digits_of(*errors, self.digits)
        return [self.label, decimals(mean, digits), *("" if e is None else decimals(e, digits) for e in errors)]


class Measurement(Record):
    """A record of quantities per data point, each declared once by :meth:`_quantities`."""

    @abstractmethod
    def _quantities(self) -> Sequence[Quantity]:
        """The measured quantities, in the order of the summary and the table."""

    def _per_datum(self, frame: bool = False) -> dict[str, Tensor]:
        """The values per data point, by name; for a frame, also those that follow from other quantities."""
        tensors = [q for q in self._quantities() if isinstance(q.value, Tensor)]
        return {q.frame or q.name: q.value for q in tensors if frame or not q.frame}

    def _columns(self) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
        columns = self._per_datum(frame=True)
        return "datum", range(len(next(iter(columns.values())))), columns

    def _summary_table(self, head: str, facts: Sequence[tuple[str, str]]) -> Table:
        """A table with a row for each labelled quantity."""
        rows = [q.row() for q in self._quantities() if q.label]
        return Table(head, ("", "mean", "± data", "± Monte Carlo"), rows, facts)

    def summary(self) -> dict[str, Any]:
        """Means over the data with their errors.

        ``*_data_error`` is the standard error over the data set (how much the mean would change with other data),
        ``*_mc_error`` the Monte Carlo error of the mean (how much it would change with other particles). Boolean
        quantities are given as the share of data points; zero weights and particles spent are totals.
        """
        quantities = self._quantities()
        n = next(len(q.value) for q in quantities if isinstance(q.value, Tensor))
        return {"n": n} | {name: v for q in quantities if q.in_summary for name, v in q.summary().items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per data point."""
        return {"summary": self.summary(), "per_datum": {k: v.tolist() for k, v in self._per_datum().items()}}


def _mean(values: Tensor) -> float:
    return float((values if values.is_floating_point() else values.double()).mean())


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, list | tuple) else value


def _format(cls: type) -> str:
    return f"jensen.{cls.__name__}"


def _opened(document: Any, cls: type) -> tuple[int, Any]:
    """The schema version and the fields of a document of the right format."""
    kind = document.get("format") if isinstance(document, dict) else None
    if kind != _format(cls):
        raise ValueError(f'"format" is {kind!r}, but {_format(cls)!r} was expected')
    expect(
        document,
        set(document) <= {"format", "version", "fields", DIGEST},
        "an object with only the known keys",
        "the text",
    )
    version = document.get("version")
    expect(version, type(version) is int and version > 0, "a number of at least 1", "version")
    if version <= VERSION:
        check_digest(document)
    return version, document.get("fields")


def _encoded(value: Any) -> Any:
    """A value in the form for JSON."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "values": _encoded(value.flatten().tolist())}
    if dataclasses.is_dataclass(value):
        return {f.name: _encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _encoded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
