"""Check the contents of a file against a schema of types, and against a digest.

A schema is a type: a dataclass, a ``TypedDict`` (keys that may be missing are ``NotRequired``), ``dict[str, float]``,
``list[int]``, ``tuple[int, int]``, ``Literal["a", "b"]``, a union, a tensor. :func:`decoded` converts JSON or a
checkpoint to this type, or raises a ``ValueError`` that names the field of another type. All contents of files are
checked by it before use.

A digest is the SHA-256 of a document in a canonical form of JSON, and is stored in the document itself. If it differs,
the file was changed after writing; a file of version 0.1.0 has no digest.
"""

from __future__ import annotations

__all__ = ["DIGEST", "Checked", "check_digest", "decoded", "digest_of", "expect", "refused"]

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor

DIGEST = "sha256"  # the key of the digest in a document
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_DTYPES |= {str(t).removeprefix("torch."): t for t in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
_DTYPES |= {"bool": torch.bool}
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Checked:
    """A class with a check in addition to its types: :func:`decoded` calls :meth:`check`."""

    def check(self) -> None:
        """Raise a ValueError if fields do not fit together."""


def digest_of(document: Mapping[str, Any]) -> str:
    """The digest of a JSON document, computed without the stored digest.

    Example:
        >>> digest_of({"a": 1, "sha256": "..."}) == digest_of({"a": 1})
        True
    """
    rest = {name: value for name, value in document.items() if name != DIGEST}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_digest(document: Mapping[str, Any]) -> None:
    """Compare a document with its stored digest, if it has one.

    Raises:
        ValueError: if they differ.
    """
    if DIGEST in document and document[DIGEST] != digest_of(document):
        raise ValueError("its SHA-256 does not match its contents: it was changed after writing")


def expect(value: Any, good: bool, what: str, where: str) -> Any:
    """The value, if it is good.

    Raises:
        ValueError: if it is not; the message names its place and the expected value.
    """
    if not good:
        raise ValueError(f"{where} must be {what}, but got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list | tuple):  # never printed in full: it may be deeply nested
        return f"a {type(value).__name__} of {len(value)}"
    return repr(str(value)[:40])


def decoded(hint: Any, value: Any, where: str) -> Any:
    """Convert a value of JSON or a checkpoint to the type of a schema.

    Args:
        hint: the schema, a type.
        value: the value from the file.
        where: its name in an error message.

    Raises:
        ValueError: for the first field of another type.

    Example:
        >>> decoded(dict[str, tuple[int, int]], {"size": [2, 3]}, "document")
        {'size': (2, 3)}
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is Literal:
        known = isinstance(value, str | int) and value in inner
        return expect(value, known, f"one of {inner}", where)
    if origin is NotRequired:
        return decoded(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)  # __required_keys__ is wrong if annotations are text
        return _fields(
            hint, value, where, {name for name, part in hints.items() if get_origin(part) is not NotRequired}
        )
    if hint is Tensor:
        return value if isinstance(value, Tensor) else _tensor(value, where)
    if hint is float:
        return _float(value, where)
    if origin is dict:
        expect(value, isinstance(value, dict), "an object", where)
        return {
            decoded(inner[0], name, f"a key of {where}"): decoded(inner[1], part, f"{where}.{name}")
            for name, part in value.items()
        }
    if origin in (list, tuple):
        return _sequence(origin, inner, value, where)
    return expect(value, type(value) is hint, f"of type {hint.__name__}", where)


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    for hint in kinds[:-1]:
        try:
            return decoded(hint, value, where)
        except ValueError:
            continue
    return decoded(kinds[-1], value, where)


def _sequence(origin: type, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    expect(value, isinstance(value, list | tuple), "a list", where)
    if origin is tuple and inner[-1] is not Ellipsis:
        expect(value, len(value) == len(inner), f"a list of {len(inner)}", where)
        hints = inner
    else:
        hints = inner[:1] * len(value)
    return origin(decoded(hint, part, f"{where}[{i}]") for i, (hint, part) in enumerate(zip(hints, value, strict=True)))


def _fields(schema: Any, value: Any, where: str, needed: set[str]) -> dict[str, Any]:
    """The fields of an object by name; ValueError if any is missing or unknown."""
    expect(value, isinstance(value, dict), f"the object of a {schema.__name__.lstrip('_')}", where)
    hints = get_type_hints(schema, include_extras=True)
    known = set(hints) if is_typeddict(schema) else {f.name for f in dataclasses.fields(schema)}
    missing, unknown = sorted(needed - set(value)), sorted(str(name)[:40] for name in set(value) - known)
    if missing or unknown:
        name = schema.__name__.lstrip("_")
        raise ValueError(f"{where} of a {name} misses {missing}, and {unknown[:5]} are unknown")
    return {name: decoded(hints[name], part, f"{where}.{name}") for name, part in value.items()}


def _dataclass(cls: Any, value: Any, where: str) -> Any:
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    made = cls(**_fields(cls, value, where, needed))
    if isinstance(made, Checked):
        made.check()
    return made


def _float(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    number: float = expect(value, type(value) in (int, float), "a number", where)
    return number


def _tensor(value: Any, where: str) -> Tensor:
    good = isinstance(value, dict) and set(value) == {"dtype", "shape", "values"}
    expect(value, good, "a tensor with dtype, shape and values", where)
    known = isinstance(value["dtype"], str) and value["dtype"] in _DTYPES
    expect(value["dtype"], known, f"one of the dtypes {sorted(_DTYPES)}", where)
    dtype, shape, values = _DTYPES[value["dtype"]], value["shape"], value["values"]
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    expect(shape, sizes, "a shape of whole numbers", where)
    whole = isinstance(values, list) and len(values) == math.prod(shape)
    expect(values, whole, f"a list with the number of values of shape {shape}", where)
    if dtype.is_floating_point:
        values = [_float(number, where) for number in values]
    else:
        kind = bool if dtype is torch.bool else int
        expect(values, all(type(number) is kind for number in values), f"a list of {value['dtype']} values", where)
    made = torch.tensor(values, dtype=dtype).reshape(shape)
    if not dtype.is_floating_point:
        expect(values, made.flatten().tolist() == values, f"a list of numbers in the range of {value['dtype']}", where)
    return made


def refused(name: str) -> NoReturn:
    """Raise for NaN and infinities, which JSON does not have: the ``parse_constant`` of ``json.loads``."""
    raise ValueError(f"{name} is not valid JSON")
