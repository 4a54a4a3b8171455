"""The state of programs beside the values of tensors: plain numbers, flags, named modules and parameters.

A graph traced from a program contains this state as it was then. The state consists of:

| where | what |
| --- | --- |
| modules and their parts | attributes, ``training``, parameters, buffers, hooks; ``requires_grad`` of every tensor |
| objects and classes of the user's own | attributes |
| functions that programs call | the variables that they close over, the globals that they name |
| lists, dicts, sets | what they hold |

Plain values (numbers, strings, None, tuples of them) are compared by value, everything else by identity. In-place
writes into tensors are not changes here: a graph reads the tensors.
"""

from __future__ import annotations

__all__ = ["PlainState"]

import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from .parameters import is_autoguide, owners_of

_PLAIN = frozenset([int, float, bool, complex, str, bytes, type(None)])
_LIBRARIES = frozenset([*sys.stdlib_module_names, "torch", "pyro", "jensen", "numpy"]) - {"__main__"}
_NAMESPACES = ("argparse", "types")  # of argparse.Namespace and types.SimpleNamespace
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_REGISTERED = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CALLED = ("forward", "__call__", "value")  # methods that run without being named
_LONGEST = 1000  # items of a container that are checked
_MOST = 2000  # containers
_KEPT = 8  # states remembered at once
_OFTEN = 3  # new values of one attribute

State = tuple[int, list[Any], list[Any]]  # its number, the values, their labels


class _Space(NamedTuple):
    """Values stored in one place, their names, and a function that restores them."""

    place: int
    read: Callable[[], Iterable[Any]]
    names: Callable[[], Iterable[Any]]
    write: Callable[[list[Any], list[Any]], None]  # names, values
    text: str  # of a name


class PlainState:
    """The state of programs beside the values of their tensors: equal states have equal numbers.

    Args:
        programs: modules, functions, and other objects whose attributes count.

    Attributes:
        changing: why no graph can represent these programs, if :meth:`watch_run` found a reason; else empty.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> model.temperature = 5.0
        >>> state = PlainState(model)
        >>> first = state.now()
        >>> model.temperature = 4.0
        >>> state.now() == first, state.changed()
        (False, ["the attribute 'temperature' of Linear"])
        >>> model.temperature = 5.0
        >>> state.now() == first
        True
    """

    def __init__(self, *programs: Any) -> None:
        self.programs = programs
        self.changing = ""
        self._known: OrderedDict[Any, State] = OrderedDict()
        self._new_values: Counter[str] = Counter()
        self._walk()
        values = self._read()
        self._here: State = (0, values, self._labels())
        self._before = self._here
        self._known[_key(values)] = self._here
        self._count = 1

    def now(self) -> int:
        """The number of the present state; a state that occurred before keeps its number."""
        values = self._read()
        last = self._here[1]
        filled = any(map(len, self._empty))
        if not filled and len(values) == len(last) and all(map(is_, values, last)):
            return self._here[0]
        labels = self._here[2]
        if filled or not _same_objects(values, last):
            self._walk()
            values, labels = self._read(), self._labels()
        key = _key(values)
        new = key not in self._known
        number = self._count if new else self._known[key][0]
        self._count += new
        if number != self._here[0]:
            self._before = self._here
        self._here = self._known[key] = number, values, labels
        self._known.move_to_end(key)
        if new:
            self._new_values.update(self.changed())
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return number

    def changed(self) -> list[str]:
        """The differences from the previous state."""
        states = (self._before, self._here)
        before, after = (dict(zip(labels, _key(values), strict=True)) for _, values, labels in states)
        new = (label for label, value in after.items() if before.get(label) != value)
        gone = (label for label in before if label not in after)
        return list(dict.fromkeys(text for _, _, text in chain(new, gone)))

    @property
    def often(self) -> str:
        """An attribute that changes repeatedly, with the remedy; empty if there is none."""
        name = next((name for name, n in self._new_values.items() if n > _OFTEN), "")
        return name and (
            f"{name} changes repeatedly, but a graph holds one value of it: keep it in a buffer (register_buffer, then "
            "fill_), or make it a knob of an Objective"
        )

    def watch_run(self, run: Callable[[], object]) -> str:
        """Run programs and report whether every run changes their state: :attr:`changing`.

        Changes made by every run are undone; changes made only by a first run remain. The next run reports errors.
        """
        kept = [(space, list(space.names()), list(space.read())) for space in self._spaces]
        empty = self._empty
        for _ in range(2):
            before = self.now()
            with suppress(ValueError, RuntimeError):
                run()
            if self.now() == before:
                return ""
        self.changing = f"each run of model and guide changes {next(iter(self.changed()), 'their state')}"
        for container in empty:
            container.clear()
        for space, names, values in kept:
            if len(now := list(space.read())) != len(values) or not all(map(is_, now, values)):
                space.write(names, values)
        return self.changing

    def _read(self) -> list[Any]:
        with suppress(KeyError, ValueError):  # a deleted global or variable
            values = [*chain.from_iterable([read() for read in self._reads])]
            values += [t.requires_grad for t, _ in self._tensors]
            return values
        return []

    def _labels(self) -> list[Any]:
        """For each value: its place, its name, and both in words."""
        named = [(space.place, name, space.text.format(name)) for space in self._spaces for name in space.names()]
        return named + [(-1, id(t), f"requires_grad of {text}") for t, text in self._tensors]

    def _walk(self) -> None:
        """Find the places where programs hold state."""
        found = _Walk()
        found.through([*owners_of(*filter(callable, self.programs)), *self.programs])
        self._spaces, self._tensors, self._empty = found.spaces, found.tensors, found.empty
        self._reads = [space.read for space in self._spaces]


class _Walk:
    """Visits everything that programs hold."""

    def __init__(self) -> None:
        self.spaces: list[_Space] = []
        self.tensors: list[tuple[Tensor, str]] = []
        self.empty: list[Any] = []  # containers: only whether they are empty is checked
        self.named: set[str] = set(_CALLED)  # methods that run
        self.idle: dict[str, list[Any]] = {}  # methods that may not run
        self.seen: dict[int, Any] = {}
        self.waiting: list[tuple[Any, str]] = []

    def through(self, programs: list[Any]) -> None:
        """Visit programs of any kind, and what they hold."""
        for program in programs:
            if isinstance(program, nn.Module | types.FunctionType | types.MethodType | partial | type):
                self.waiting.append((program, ""))
            elif id(program) not in self.seen:
                self.seen[id(program)] = program
                self._object(program)
            while self.waiting and len(self.spaces) < _MOST:
                thing, text = self.waiting.pop()
                if not _is_plain(thing) and id(thing) not in self.seen:
                    self.seen[id(thing)] = thing
                    self._look(thing, text)

    def _look(self, thing: Any, text: str) -> None:
        if isinstance(thing, Tensor):
            self.tensors.append((thing, text))
        elif isinstance(thing, nn.Module):
            self._module(thing)
        elif isinstance(thing, types.MethodType):
            self._follow([thing.__func__, thing.__self__], text)
        elif isinstance(thing, partial):
            self._holder(thing.keywords, "the argument '{}' of a partial")
            self._follow([thing.func, *thing.args], text)
        elif isinstance(thing, property | staticmethod | classmethod):
            self._follow([getattr(thing, "fget", None) or getattr(thing, "__func__", None)], text)
        elif isinstance(thing, tuple):
            self._follow(thing, text)
        elif isinstance(thing, dict | list | set):
            if len(thing) <= _LONGEST:
                self._container(thing, text)
        elif not _is_own(thing if isinstance(thing, types.FunctionType | type) else type(thing)):
            return
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif isinstance(thing, type):
            self._class(thing)
        else:
            self._object(thing)

    def _follow(self, things: Iterable[Any], text: str) -> None:
        self.waiting += [(thing, text) for thing in things]

    def _holder(self, holder: dict[str, Any], text: str) -> None:
        if not holder:
            self.empty.append(holder)
            return
        self.spaces.append(_Space(id(holder), holder.values, holder.keys, partial(_refill, holder), text))
        self.waiting += [(value, text.format(name)) for name, value in holder.items() if name not in _OF_TORCH]

    def _attributes(self, of: str, holder: dict[str, Any]) -> None:
        self._holder(holder, f"the attribute '{{}}' of {of}")

    def _module(self, module: nn.Module) -> None:
        of = type(module).__name__
        if is_autoguide(module):  # it creates plates in every run
            plain = [k for k, v in vars(module).items() if _is_plain(v) or isinstance(v, Tensor)]
            self._picked(vars(module), plain, f"the attribute '{{}}' of {of}")
        else:
            self._attributes(of, vars(module))
        for name in _REGISTERED:  # in a scripted module these are views of TorchScript's data
            registered = getattr(module, name)
            self._attributes(of, registered if isinstance(registered, dict) else dict(registered.items()))
        for hooks in (getattr(module, name) for name in _HOOKS):
            self._container(hooks, f"a hook of {of}")
        self._follow([type(module)], "")

    def _object(self, thing: Any) -> None:
        if hasattr(thing, "__dict__") and not isinstance(thing, types.ModuleType):
            self._attributes(type(thing).__name__, vars(thing))
        self._follow([type(thing)], "")

    def _class(self, thing: type) -> None:
        text = f"the attribute '{{}}' of {thing.__name__}"
        self.spaces.append(_Space(id(thing), vars(thing).values, vars(thing).keys, partial(_set_all, thing), text))
        for name, value in vars(thing).items():
            if name in self.named or not isinstance(value, types.FunctionType | property | staticmethod | classmethod):
                self.waiting.append((value, text.format(name)))
            else:
                self.idle.setdefault(name, []).append(value)
        self._follow(thing.__bases__, "")

    def _container(self, thing: Any, text: str) -> None:
        text = text.replace("{", "{{").replace("}", "}}")
        if not thing:
            self.empty.append(thing)
        elif isinstance(thing, dict):
            self.spaces.append(_Space(id(thing), thing.values, thing.keys, partial(_refill, thing), text))
            self._follow(thing.values(), text)
        else:
            write = partial(_replace, thing)
            self.spaces.append(_Space(id(thing), partial(tuple, thing), lambda: range(len(thing)), write, text))
            self._follow(thing, text)

    def _picked(self, holder: dict[str, Any], names: list[str], text: str) -> None:
        if names:
            read, write = (lambda: [holder[name] for name in names]), partial(_write_names, holder)
            self.spaces.append(_Space(id(holder), read, lambda: names, write, text))
            self.waiting += [(holder[name], text.format(name)) for name in names]

    def _function(self, fn: types.FunctionType) -> None:
        named = _names_in(fn.__code__)
        for name in named - self.named:
            self._follow(self.idle.pop(name, ()), "")
        self.named |= named
        held = [(name, cell) for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)]
        cells = {name: cell for name, cell in held if _is_full(cell)}
        if cells:
            text = f"the variable '{{}}' of {fn.__name__}"
            contents = list(cells.values())
            read = lambda: [cell.cell_contents for cell in contents]  # noqa: E731
            self.spaces.append(_Space(id(fn), read, cells.keys, partial(_fill_cells, cells), text))
            self.waiting += [(cell.cell_contents, text.format(name)) for name, cell in cells.items()]
        names = sorted(named & fn.__globals__.keys())
        self._picked(fn.__globals__, names, "the global '{}'")
        for module in (fn.__globals__[name] for name in names):
            if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] not in _LIBRARIES:
                self._picked(vars(module), sorted(named & vars(module).keys()), f"'{{}}' of {module.__name__}")
        self._follow([fn.__defaults__, fn.__kwdefaults__], f"a default of {fn.__name__}")


def _is_plain(value: Any) -> bool:
    return (
        type(value) in _PLAIN or isinstance(value, float) or (isinstance(value, tuple) and all(map(_is_plain, value)))
    )


def _key(values: list[Any]) -> tuple[Any, ...]:
    """The key of a state: plain values with their types, and the identity of all others."""
    return tuple((type(v), v if _is_plain(v) else id(v)) for v in values)


def _same_objects(values: list[Any], others: list[Any]) -> bool:
    """Whether only plain values differ."""
    return len(values) == len(others) and all(
        a is b or (_is_plain(a) and _is_plain(b)) for a, b in zip(values, others, strict=True)
    )


def _is_own(thing: Any) -> bool:
    """Whether a class or a function is the user's own."""
    name = getattr(thing, "__module__", None) or ""
    return name.partition(".")[0] not in _LIBRARIES or name in _NAMESPACES


def _names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, including code nested in it."""
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _refill(holder: dict[Any, Any], names: list[Any], values: list[Any]) -> None:
    holder.clear()
    holder.update(zip(names, values, strict=True))


def _write_names(holder: dict[Any, Any], names: list[Any], values: list[Any]) -> None:
    holder.update(zip(names, values, strict=True))


def _replace(holder: Any, names: list[Any], values: list[Any]) -> None:
    if isinstance(holder, list):
        holder[:] = values
    else:
        holder.clear()
        holder.update(values)


def _fill_cells(cells: dict[str, Any], names: list[Any], values: list[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        cells[name].cell_contents = value


def _set_all(holder: type, names: list[Any], values: list[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        if vars(holder)[name] is not value:
            setattr(holder, name, value)
