"""Check arguments against their annotations; the error names the argument that does not fit.

| annotation | accepted | refused |
| --- | --- | --- |
| ``int`` | whole numbers below 2^31, also of NumPy or in a tensor without dimensions | True, 64.0 |
| ``float`` | real numbers, likewise | NaN, True |
| ``Tensor`` | dense tensors that hold values | tensors on the device "meta", sparse and quantized ones |
| ``Literal`` | its values | |
| ``Callable`` | callables | |

and sequences, mappings, tuples and unions of these. Data (``Tensor | tuple[Tensor, ...]``, ``*data``) are checked
later, by :func:`jensen.kernel.arguments.as_tensors`. Each function checks the range of its arguments itself.
"""

from __future__ import annotations

__all__ = ["as_data", "as_event", "check_data", "check_features", "check_tensor", "checked", "checked_fields", "shown"]

import inspect
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
import torch.utils.data
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

_LARGEST = 2**31 - 1
_WIDE = {"limit": 2**63 - 1, "seed": 2**64 - 1}  # bytes of a file; the range of torch.manual_seed
_SHOWN = 60  # characters of a value in a message


class _Misfit(Exception):
    """A value does not fit its annotation; the message is the expected value, in words."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function, or of the ``__init__`` of a class, before it runs.

    Numbers of other libraries are converted to Python's. An annotation that cannot be evaluated (names for type
    checkers only) is not checked.

    Args:
        function: a function with annotations.

    Returns:
        The function: it raises TypeError for an argument of the wrong type, ValueError for a wrong value.

    Example:
        >>> @checked
        ... def draws(n: int, scale: float = 1.0) -> int:
        ...     return n
        >>> draws(torch.tensor(3))
        3
        >>> draws(2.5)
        Traceback (most recent call last):
        TypeError: n must be a whole number, but got 2.5 (a float)
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises the error of Python
        if not hints:
            hints.update(_hints(function, signature))
        for name, value in given.arguments.items():
            kind = signature.parameters[name].kind
            if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                given.arguments[name] = _fitted(value, hints[name], name)
        return function(*given.args, **given.kwargs)

    return call


def checked_fields(record: type[C]) -> type[C]:
    """Check the fields of a dataclass before an object is created."""
    record.__init__ = checked(record.__init__)  # type: ignore[method-assign]
    return record


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError for an object that is not a tensor, ValueError for a tensor without values or not dense."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but got {shown(value)}; {as_data(value, name)}")
    if value.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor, but got a nested one; use torch.nested.to_padded_tensor({name}, 0.0), and "
            "mask the padding"
        )
    if value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, but got one of layout {value.layout}; use {name}.to_dense()")
    if value.is_meta:
        raise ValueError(f"{name} must hold values, but got a tensor on the device 'meta': use another device")


def as_data(value: object, name: str) -> str:
    """The code that converts an object with data to a tensor.

    Example:
        >>> as_data(np.zeros((3, 2)), "data")
        'use torch.as_tensor(data, dtype=torch.float32)'
        >>> as_data(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3, 2))), "data")
        'batches are made by this function (batch_size=): use data.dataset.tensors[0]'
    """
    read = f"jensen.datasets.from_array({name}).train"
    kind = type(value).__module__.partition(".")[0]
    if isinstance(getattr(value, "train", None), Tensor):  # a data set in splits
        return f"use {name}.train (and {name}.validation, {name}.test)"
    from .sources import Source  # which stands on this file

    if isinstance(value, Source):
        return f"only fit and evaluate read data by the batch: use a part that fits into memory, {name}.head(1000)"
    if isinstance(value, torch.utils.data.DataLoader):
        made = as_data(value.dataset, f"{name}.dataset")
        call = f"({name}.dataset)" * made.endswith("as_tensor")
        return f"batches are made by this function (batch_size=): {made}{call}"
    if isinstance(value, torch.utils.data.TensorDataset):
        one = len(value.tensors) == 1
        return f"use {name}.tensors[0]" + ("" if one else f", or {name}.tensors for all of them")
    if isinstance(value, np.ma.MaskedArray):
        return f"use torch.as_tensor({name}.astype(float).filled(numpy.nan), dtype={torch.get_default_dtype()})"
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return f"use torch.as_tensor({name}, dtype={torch.get_default_dtype()})"
    if isinstance(value, (str, os.PathLike)):
        return f"use jensen.datasets.load({name}).train for the name of a data set or a file"
    if isinstance(value, torch.utils.data.Dataset) or (isinstance(value, np.ndarray) and value.dtype.names):
        return f"use {read}"
    if kind in _TABLES:
        whole = f"torch.tensor({name}{_TABLES[kind]}, dtype={torch.get_default_dtype()})"
        if getattr(value, "ndim", 2) == 1:  # labels, or one feature
            return f"use {whole}"
        return f"use {read} for the training rows, or {whole} for all rows"
    return "use torch.as_tensor"


def as_event(x: Tensor, shape: tuple[int, ...], name: str) -> str:
    """The code that changes data points to the required shape; empty if the number of values differs.

    Example:
        >>> as_event(torch.zeros(5, 8, 8, 3), (3, 8, 8), "x")
        'the channels come last: use x.movedim(-1, -3)'
        >>> as_event(torch.zeros(5, 192), (3, 8, 8), "x")
        'use x.unflatten(-1, (3, 8, 8))'
    """
    sizes = tuple(x.shape[1:])
    last = len(shape) == 3 and sizes == (*shape[1:], shape[0])
    if last:
        return f"the channels come last: use {name}.movedim(-1, -3)"
    if len(shape) == 1 and len(sizes) == 3 and sizes[2] in (3, 4) and math.prod(sizes) == shape[0] and sizes[0] > 4:
        return f"the channels come last: use {name}.movedim(-1, -3).flatten(1)"
    if len(shape) == 1 and math.prod(sizes) == shape[0] and len(sizes) > 1:
        return f"use {name}.flatten(1)"
    if len(sizes) == 1 and sizes[0] == math.prod(shape) and len(shape) > 1:
        return f"use {name}.unflatten(-1, {shape})"
    return ""


_TABLES = {  # the method that makes one array of an object of the library
    "pandas": ".to_numpy()",
    "polars": ".to_numpy()",
    "pyarrow": ".to_pandas().to_numpy()",
    "scipy": ".toarray()",
    "anndata": ".to_df().to_numpy()",
    "xarray": ".to_numpy()",
}


def check_data(x: object, name: str) -> None:
    """Raise TypeError for an object that is not a tensor, ValueError for no values, not dense, or complex."""
    check_tensor(x, name)
    assert isinstance(x, Tensor)
    if x.is_complex():
        raise ValueError(f"{name} must be real, but got {x.dtype}: use torch.view_as_real({name})")


def check_features(x: object, name: str, like: Tensor | None = None) -> None:
    """Raise an error unless a layer can read ``x``: a tensor with the floating-point type of its weights."""
    check_data(x, name)
    assert isinstance(x, Tensor)
    wanted = x.dtype if like is None or torch.is_autocast_enabled(x.device.type) else like.dtype
    if not x.is_floating_point() or x.dtype != wanted:
        to = torch.get_default_dtype() if not wanted.is_floating_point else wanted
        raise ValueError(f"{name} must be {to} for the layers, but got {x.dtype}: convert it ({name}.to({to}))")


def shown(value: object) -> str:
    """A short description of a value."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} ({value.dtype})"
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)} ({value.dtype})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (tuple, list)):
        return f"{_with_article(kind)} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a whole number of more than 20 digits"
    if isinstance(value, (bool, int, float, complex, str, bytes, os.PathLike)):
        text = repr(value)
        return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({_with_article(kind)})"
    return _with_article(kind)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeioAEIO' else 'a'} {kind}"


def _hints(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """The annotations of a function; Any if one cannot be evaluated."""
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    hints = {}
    for name, parameter in signature.parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, scope)
            except (NameError, AttributeError, TypeError):
                hint = Any
        hints[name] = Any if hint is inspect.Parameter.empty else hint
    return hints


def _fitted(value: Any, hint: Any, name: str) -> Any:
    """The value, converted to its annotation; TypeError or ValueError if it does not fit."""
    if name in ("model", "guide") and isinstance(value, type) and callable(value):
        raise TypeError(f"{name} must be an object, but got the class {value.__name__}: use {value.__name__}(...)")
    if name == "objective":  # checked later, with better messages for objectives of Pyro
        return value
    if name == "pairs":
        _check_pairs(value)
    if name == "optimizer" and isinstance(value, torch.optim.Optimizer):
        kind = type(value).__name__
        raise TypeError(
            f"optimizer must be a class such as torch.optim.{kind}, which is called with parameters and lr, but got an "
            f"object of it: use torch.optim.{kind}, or a functools.partial of it"
        )
    if name == "device" and isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
        return _device(value)
    try:
        return _as(value, hint, name)
    except _Misfit as misfit:
        error = ValueError if _right_type(value, hint) else TypeError
        raise error(f"{name} must be {misfit}, but got {shown(value)}") from None


def _check_pairs(value: Any) -> None:
    """Raise TypeError unless the value is a dictionary of models and guides by name."""
    what = "pairs must be a dictionary {name: (model, guide)}, or {name: [(model, guide), ...]} with one per seed"
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}, but got {shown(value)}")
    for name, pair in value.items():
        if not isinstance(name, str):
            raise TypeError(f"{what}, but got the name {shown(name)}")
        alone = isinstance(pair, tuple) and len(pair) == 2 and not isinstance(pair[0], (tuple, list))
        for one in [pair] if alone else pair if isinstance(pair, (tuple, list)) else [pair]:
            if not (isinstance(one, tuple) and len(one) == 2 and all(map(callable, one))):
                raise TypeError(f"{what}, but got {shown(one)} for {name!r}")
            for half, program in zip(("model", "guide"), one, strict=True):
                if isinstance(program, type):
                    raise TypeError(
                        f"the {half} of {name!r} must be an object, but got the class {program.__name__}: use "
                        f"{program.__name__}(...)"
                    )


def _right_type(value: Any, hint: Any) -> bool:
    """Whether the type of a value fits an annotation, so that only the value is wrong."""
    kinds = _flat(hint)
    if isinstance(value, bool):
        return bool in kinds or any(get_origin(k) is Literal and True in get_args(k) for k in kinds)
    if isinstance(value, str):
        return str in kinds or any(get_origin(k) is Literal for k in kinds)
    if isinstance(value, (tuple, list)):  # of the wrong length
        lengths = [len(get_args(k)) for k in kinds if get_origin(k) is tuple and ... not in get_args(k)]
        return bool(lengths) and len(value) not in lengths
    if isinstance(value, (int, np.integer)):
        return not {int, float}.isdisjoint(kinds)
    return isinstance(value, (float, np.floating)) and float in kinds


def _flat(hint: Any) -> list[Any]:
    """The members of a union, None last."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for part in get_args(hint) for kind in _flat(part)]
        return sorted(kinds, key=lambda kind: kind is type(None))
    return [type(None) if hint is None else hint]


def _as(value: Any, hint: Any, name: str) -> Any:
    """The value, converted to an annotation; _Misfit with the expected value if it does not fit."""
    kinds = _flat(hint)
    if tuple[Tensor, ...] in kinds and Tensor in kinds:  # data
        return value
    whats = []
    for kind in kinds:
        try:
            return _as_one(value, kind, name)
        except _Misfit as misfit:
            whats.append(str(misfit))
    raise _Misfit(_either(whats))


def _either(whats: list[str]) -> str:
    """The expected values as a list in words; the values of a Literal are separated by zeros."""
    listed = list(dict.fromkeys(what for whole in whats for what in whole.split("\0")))
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"


def _as_one(value: Any, kind: Any, name: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, (TypeVar, ParamSpec)):
        return value
    if origin is typing.Annotated:
        return _as(value, parts[0], name)
    if kind in _PLAIN:
        return _PLAIN[kind](value, name)
    if origin is Literal:
        if isinstance(value, (str, bool, int, type(None))) and any(value is p or value == p for p in parts):
            return value
        raise _Misfit("\0".join(map(repr, parts)))
    if origin in _CONTAINERS:
        return _CONTAINERS[origin](value, parts, name)
    if origin is type(None) or kind is type(None):
        if value is None:
            return None
        raise _Misfit("None")
    what = origin or kind
    if not isinstance(what, type):
        return value
    try:
        fits = isinstance(value, what)
    except TypeError:  # a protocol without isinstance: only its attributes are checked
        lacking = [name for name in what.__annotations__ if not hasattr(value, name)]
        if lacking or isinstance(value, type):
            raise _Misfit(f"an object with {' and '.join(what.__annotations__) or what.__name__}") from None
        return value
    if not fits:
        raise _Misfit(_with_article(what.__name__.lstrip("_")))
    _check_forward(value)
    return value


def _whole(value: Any, name: str) -> int:
    what = "a whole number"
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and (value.dim() or not _whole_tensor(value))):
        raise _Misfit(what)
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise _Misfit(what) from None
    least, most = (0, _WIDE["seed"]) if name == "seed" else (-_LARGEST, _WIDE.get(name, _LARGEST))
    if not least <= number <= most:
        raise _Misfit(f"a whole number from 0 to {most}" if least == 0 else f"{what} of at most {most}")
    return number


def _whole_tensor(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool or value.is_meta)


def _real(value: Any, name: str) -> float:
    what = "a number"
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.dtype is torch.bool or value.is_meta or value.requires_grad:
            raise _Misfit(what)
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise _Misfit(what)
    try:
        number = float(value)
    except OverflowError:
        raise _Misfit(what) from None
    if math.isnan(number):
        raise _Misfit(f"{what} other than NaN")
    exact: Any = value  # an int is kept if a float can hold it
    return exact if type(exact) is float or (type(exact) is int and abs(exact) < 2**53) else number


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _Misfit("True or False")
    return bool(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Misfit("a string")
    return value


def _dense(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise _Misfit("a tensor")
    check_tensor(value, name)
    return value


def _device(value: str | torch.device | int) -> torch.device:
    try:
        device = torch.device(value)
        if device.type == "meta":
            raise RuntimeError("tensors on it hold no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError, AttributeError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device must be a device such as 'cpu', but {value!r} cannot be used here: {why}; omit device"
        ) from error
    return device


def _called(value: Any, parts: tuple[Any, ...], name: str) -> Any:
    if not callable(value):
        raise _Misfit("a function")
    _check_forward(value)
    return value


def _check_forward(value: Any) -> None:
    """Raise _Misfit for a module that cannot be called, because its class defines no ``forward``."""
    if isinstance(value, nn.Module) and getattr(value.forward, "__func__", None) is nn.Module.forward:
        raise _Misfit("a module with a forward method")


def _sequence(value: Any, parts: tuple[Any, ...], name: str) -> Any:
    part = parts[0] if parts else Any
    what = f"a sequence of {_plural(part)}"
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        raise _Misfit(what)
    return _each(value, part, name, what)


def _tuple(value: Any, parts: tuple[Any, ...], name: str) -> Any:
    if parts[-1:] == (...,):
        if not isinstance(value, tuple):
            raise _Misfit(f"a tuple of {_plural(parts[0])}")
        return _each(value, parts[0], name, f"a tuple of {_plural(parts[0])}")
    what = f"a tuple of {len(parts)}"
    if not isinstance(value, (tuple, list)) or len(value) != len(parts):
        raise _Misfit(what)
    try:
        return tuple(_as(x, part, name) for x, part in zip(value, parts, strict=True))
    except _Misfit as misfit:
        raise _Misfit(f"{what}, each {misfit}") from None


def _each(value: Any, part: Any, name: str, what: str) -> Any:
    try:
        entries = [_as(x, part, name) for x in value]
    except _Misfit:
        raise _Misfit(what) from None
    if all(new is old for new, old in zip(entries, value, strict=True)):
        return value
    return tuple(entries) if isinstance(value, tuple) else entries


def _iterable(value: Any, parts: tuple[Any, ...], name: str) -> Any:
    part = parts[0] if parts else Any
    what = f"a sequence of {_plural(part)}"
    if isinstance(value, (str, bytes, Tensor, np.ndarray, Mapping)) or not isinstance(value, Iterable):
        raise _Misfit(what)
    return _each(value, part, name, what) if isinstance(value, Collection) else value


def _mapping(value: Any, parts: tuple[Any, ...], name: str) -> Any:
    key, entry = parts or (Any, Any)
    what = f"a dictionary of {_plural(entry)}{' by name' if key is str else ''}"
    if not isinstance(value, Mapping):
        raise _Misfit(what)
    try:
        fitted = {_as(k, key, name): _as(v, entry, f"{name}[{k!r}]") for k, v in value.items()}
    except _Misfit:
        raise _Misfit(what) from None
    same = all(fitted.get(k) is v for k, v in value.items())
    return value if same else fitted


def _plural(hint: Any) -> str:
    kinds = [kind for kind in _flat(hint) if kind is not type(None)]
    kind = kinds[0] if kinds else Any
    if kind in _PLURALS:
        return _PLURALS[kind]
    origin = get_origin(kind)
    if origin is tuple:
        parts = [part for part in get_args(kind) if part is not ...]
        return f"tuples ({', '.join(_plural(part) for part in parts)})"
    if origin in (Sequence, list):
        return f"sequences of {_plural((get_args(kind) or (Any,))[0])}"
    if isinstance(kind, type):
        return f"{kind.__name__.lstrip('_')} objects"
    return "functions" if origin is Callable or origin is typing.get_origin(Callable[[], Any]) else "values"


_PLURALS: dict[Any, str] = {
    int: "whole numbers",
    float: "numbers",
    str: "strings",
    bool: "True or False",
    Tensor: "tensors",
    Any: "values",
}
_PLAIN: dict[Any, Callable[[Any, str], Any]] = {
    int: _whole,
    float: _real,
    bool: _switch,
    str: _text,
    Tensor: _dense,
}
_CALLABLE: Any = get_origin(Callable[[], Any])
_CONTAINERS: dict[Any, Callable[[Any, tuple[Any, ...], str], Any]] = {
    _CALLABLE: _called,
    Sequence: _sequence,
    list: _sequence,
    tuple: _tuple,
    Iterable: _iterable,
    Mapping: _mapping,
    dict: _mapping,
}
