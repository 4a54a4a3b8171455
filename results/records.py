"""Results that are kept: as a data frame, and as a JSON file that gives back every bit.

A file is one JSON object:

| key | what it holds |
| --- | --- |
| ``"format"`` | ``"jensen."`` and the name of the class |
| ``"version"`` | 1 |
| ``"fields"`` | the fields of the class by name |

A tensor is ``{"dtype": "float64", "shape": [2, 3], "values": [...]}``, its values one after the other; a result inside
a result is the object of its fields. Numbers that JSON does not have are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``. Floats are written with as many digits as give back the same bits, so nothing is lost either way.
"""

from __future__ import annotations

__all__ = ["Record"]

import dataclasses
import json
import math
import os
import types
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .files import whole
from .tables import Printed

VERSION = 1
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_DTYPES |= {str(t).removeprefix("torch."): t for t in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
_DTYPES |= {"bool": torch.bool}
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Record(Printed):
    """A result, as a dataclass of tensors, numbers, text, and lists, dicts and dataclasses of these."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @abstractmethod
    def _columns(self) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
        """What the rows of a data frame are, their names, and its columns; None for one that is not there."""

    def to_frame(self) -> Any:
        """This result as a ``pandas.DataFrame``: the numbers as they are, unrounded, in nats where they have a unit."""
        import pandas

        name, rows, columns = self._columns()
        values = {
            key: column.cpu().numpy() if isinstance(column, Tensor) else column
            for key, column in columns.items()
            if column is not None
        }
        return pandas.DataFrame(values, index=pandas.Index(rows, name=name))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """This result as one JSON object, from which :meth:`from_json` makes it again, bit by bit.

        Numbers that JSON does not have are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

        Args:
            path: a file to write it to as well, whole or not at all; folders on the way to it are made.

        Returns:
            The text.
        """
        document = {"format": _format(type(self)), "version": VERSION, "fields": _encoded(self)}
        text = json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"
        if path is not None:
            with whole(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Self:
        """The result that :meth:`to_json` wrote.

        Args:
            source: the text, or the path of a file. A string that begins with a bracket is the text.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for text that is torn, or of something else.
        """
        is_text = isinstance(source, str) and source.lstrip()[:1] in ("{", "[", "")
        what = "the text" if is_text else str(source)
        try:
            text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
            document = json.loads(text, parse_constant=_refused)
            result: Self = _decoded(cls, _opened(document, cls), "fields")
        except (ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as error:
            raise ValueError(
                f"{what} cannot be read as the JSON of a {cls.__name__}: {error}; write it anew, with {cls.__name__}."
                "to_json()"
            ) from error
        return result


def _format(cls: type) -> str:
    return f"jensen.{cls.__name__}"


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _opened(document: Any, cls: type) -> Any:
    """The fields of a document of the right format and version."""
    found = document.get("format") if isinstance(document, dict) else None
    if found != _format(cls):
        raise ValueError(f'it holds "format": {found!r} in the place of {_format(cls)!r}')
    if document.get("version") != VERSION:
        raise ValueError(f"it is of version {document.get('version')!r}, and this jensen reads version {VERSION}")
    return document.get("fields")


def _encoded(value: Any) -> Any:
    """A value as JSON has it."""
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


def _decoded(hint: Any, value: Any, where: str) -> Any:
    """The value that JSON stands for, of the type that a dataclass says it has."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (kind,) = (part for part in inner if part is not type(None))
        return None if value is None else _decoded(kind, value, where)
    if origin is Literal:
        return _expect(value, value in inner, f"one of {inner}", where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if hint is Tensor:
        return _tensor(value, where)
    if hint is float:
        return _float(value, where)
    if origin is dict:
        _expect(value, isinstance(value, dict), "an object", where)
        return {name: _decoded(inner[1], part, f"{where}.{name}") for name, part in value.items()}
    if origin in (list, tuple):
        _expect(value, isinstance(value, list), "a list", where)
        return origin(_decoded(inner[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    return _expect(value, type(value) is hint, f"of type {hint.__name__}", where)


def _expect(value: Any, good: bool, what: str, where: str) -> Any:
    if not good:
        raise ValueError(f"{where} is {what}, but got {str(value)[:40]!r}")
    return value


def _dataclass(cls: Any, value: Any, where: str) -> Any:
    _expect(value, isinstance(value, dict), f"the object of a {cls.__name__}", where)
    hints, known = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    needed = {name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing, unknown = sorted(needed - set(value)), sorted(set(value) - set(known))
    if missing or unknown:
        raise ValueError(f"{where} of a {cls.__name__} misses {missing}, and {unknown} are not known")
    return cls(**{name: _decoded(hints[name], part, f"{where}.{name}") for name, part in value.items()})


def _float(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    return float(_expect(value, type(value) in (int, float), "a number", where))


def _tensor(value: Any, where: str) -> Tensor:
    good = isinstance(value, dict) and set(value) == {"dtype", "shape", "values"}
    _expect(value, good, "a tensor: its dtype, shape and values", where)
    _expect(value["dtype"], value["dtype"] in _DTYPES, f"of a dtype out of {sorted(_DTYPES)}", where)
    dtype, shape, values = _DTYPES[value["dtype"]], value["shape"], value["values"]
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    _expect(shape, sizes, "of a shape of whole numbers", where)
    whole = isinstance(values, list) and len(values) == math.prod(shape)
    _expect(values, whole, f"a list of as many values as shape {shape} has", where)
    if dtype.is_floating_point:
        values = [_float(number, where) for number in values]
    else:
        kind = bool if dtype is torch.bool else int
        _expect(values, all(type(number) is kind for number in values), f"of {value['dtype']} values only", where)
    return torch.tensor(values, dtype=dtype).reshape(shape)
