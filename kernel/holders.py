"""The modules that a program holds, in any place.

| where | what is searched |
| --- | --- |
| a module | its plain attributes (lists, tuples, functions), those of its submodules, the code of ``forward`` |
| a function | the variables of its closure, its defaults, the globals that its code names, what it wraps |
| a bound method | its object, and the function |
| ``functools.partial``, a handler of Pyro | the wrapped program and its arguments |
| an object of the user's own, or its class | its attributes and methods |
| lists, tuples, dictionaries, sets | their entries |

The globals of libraries are excluded, and the search ends after 10,000 objects of a program. It proceeds from near to
far, program by program, and its order is the same in every process, except for the entries of sets.
"""

from __future__ import annotations

__all__ = ["modules_held"]

import dis
import functools
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from pyro.params.param_store import ParamStoreDict
from pyro.poutine import Trace
from torch import Tensor, nn

_MOST = 10_000  # objects
_LONGEST = 1_000  # entries of a container
_LIBRARIES = ("jensen", "numpy", "pyro", "torch")
_STDLIB = sysconfig.get_path("stdlib")
_PLAIN = (str, bytes, int, float, complex, type(None), Tensor, torch.dtype, torch.device, ModuleType)
_OPAQUE = (BuiltinFunctionType, ParamStoreDict, Trace)
_WRAPPERS = (torch.distributions.Distribution, torch.distributions.Transform, SimpleNamespace)
_OF_MODULES = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks


def modules_held(*programs: Any) -> list[nn.Module]:
    """The modules that programs hold, each once, without modules that are parts of another one.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> modules_held(functools.partial(lambda nets, x: nets["a"](x), {"a": net}))
        [Linear(in_features=2, out_features=3, bias=True)]
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}  # also keeps the objects alive, since an id is reused after deletion
    for program in programs:
        waiting, last = deque([program]), len(seen) + _MOST
        while waiting and len(seen) < last:  # near objects first
            thing = waiting.popleft()
            if isinstance(thing, _PLAIN) or id(thing) in seen:
                continue
            seen[id(thing)] = thing
            if isinstance(thing, nn.Module):
                found[id(thing)] = thing
            waiting.extend(_held_by(thing))
    parts = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in parts]


def _held_by(thing: Any) -> Iterator[Any]:
    """The objects that a thing holds directly."""
    if isinstance(thing, nn.Module):
        yield from _by_module(thing)
    elif isinstance(thing, dict):
        yield from islice(thing.values(), _LONGEST)
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from islice(thing, _LONGEST)
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values(), *_attributes(thing))
    elif isinstance(thing, FunctionType):
        yield from _by_function(thing)
    elif isinstance(thing, staticmethod | classmethod):
        yield thing.__func__
    elif isinstance(thing, property):
        yield thing.fget
    elif isinstance(thing, type):
        classes = [c for c in thing.__mro__ if not _is_foreign(c.__module__)]
        yield from (value for c in classes for value in vars(c).values())
    elif not isinstance(thing, _OPAQUE):
        name = type(thing).__module__
        if isinstance(thing, _WRAPPERS) or name.startswith("pyro."):
            yield from _attributes(thing)
        elif not _is_foreign(name):
            yield from _attributes(thing)
            yield type(thing)
        else:
            yield vars(thing).get("__wrapped__") if hasattr(thing, "__dict__") else None


def _by_module(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        name = type(part).__module__
        if not name.startswith("torch."):
            yield from (value for key, value in vars(part).items() if key not in _OF_MODULES)
            if not _is_foreign(name):
                yield type(part).forward


def _by_function(fn: FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    yield from vars(fn).values()
    if not _is_foreign(fn.__globals__.get("__name__", "")):
        for name, *attributes in _globals_named(fn.__code__):
            value = fn.__globals__.get(name)
            for attribute in attributes:
                if not isinstance(value, ModuleType) or _is_foreign(value.__name__):
                    break
                value = vars(value).get(attribute)
            yield value


def _attributes(thing: Any) -> Iterable[Any]:
    """The values of an object's attributes, without computing properties."""
    slots = (name for c in type(thing).__mro__ for name in _as_names(vars(c).get("__slots__", ())))
    slotted = [getattr(thing, name, None) for name in slots if not name.startswith("__")]
    return [*getattr(thing, "__dict__", {}).values(), *slotted]


def _as_names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.lru_cache(maxsize=1_000)
def _globals_named(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """The globals that code and its nested code read, each with the attributes that are read from it."""
    paths: list[list[str]] = []
    follows = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            paths.append([step.argval])
            follows = True
        elif follows and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            paths[-1].append(step.argval)
        else:
            follows = False
    inner = [path for constant in code.co_consts if isinstance(constant, CodeType) for path in _globals_named(constant)]
    return tuple(dict.fromkeys([*map(tuple, paths), *inner]))


@functools.cache
def _is_foreign(name: str) -> bool:
    """Whether a Python module belongs to a library."""
    root = name.partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    installed = file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file
    return root in _LIBRARIES or installed or (not file and root in sys.stdlib_module_names)
