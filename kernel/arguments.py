"""What a pair is called with: tensors with a row for each datum, or nothing where the pair holds its data.

What else a program takes (a dict, a number, a matrix of weights) is no data, and is fixed by a closure before the pair
is handed over: the errors here write that closure.
"""

from __future__ import annotations

__all__ = [
    "Batch",
    "Data",
    "as_tensors",
    "check_tensors",
    "explained",
    "in_a_line",
    "misfit",
    "other_lengths",
    "rows_of",
]

import dis
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from jensen.checked import as_data, check_data

Data = Tensor | tuple[Tensor, ...]
Batch = tuple[Tensor, ...]

_SHAPES = "Trace Shapes:"  # what Pyro adds to an error, with those of its sites
_BELOW = ("numpy", "pyro", "torch")
_PLAINLY = as_data([], "")
_LITERALS = (bool, int, float, str, type(None))


def as_tensors(data: Data, held: bool = False) -> Batch:
    """Data as a tuple of tensors that agree in their first dimension, which is not zero.

    Args:
        data: what the user gave.
        held: whether no data at all, ``()``, will do: those of a pair that holds its data.

    Raises:
        TypeError: for what is no tensor, with the closure that fixes it.
        ValueError: for tensors of other lengths, with the closure that fixes them, and where data are missing.
    """
    if isinstance(data, PackedSequence):  # a tuple, by its type
        raise TypeError(_no_tensor(data))
    tensors = data if isinstance(data, tuple) else (data,)
    if not tensors and held:
        return tensors
    if not tensors:
        raise ValueError(
            "data is (), but data are needed here, a tensor or more: a pair that holds its data and takes no arguments "
            "is served by fit, evaluate, compare, log_weights and terms; for the others write it as model(x), guide(x)"
        )
    check_tensors(data)
    shapes = [list(x.shape) for x in tensors]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
        raise ValueError(
            f"data need one first dimension N of at least 1, but got tensors of shape {shapes}{other_lengths(shapes)}"
        )
    return tensors


def check_tensors(data: Any) -> None:
    """Raise TypeError for data that are not all tensors, with the closure that fixes it, ValueError for unfit ones."""
    tensors = data if isinstance(data, tuple) else (data,)
    if not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(_no_tensor(data))
    for i, x in enumerate(tensors):
        check_data(x, f"data[{i}]" if isinstance(data, tuple) else "data")


def in_a_line(error: BaseException) -> str:
    """What an error is, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def rows_of(batch: Batch) -> int:
    """The number of rows of a batch; 1 where there are no tensors (a pair that holds its data)."""
    return len(batch[0]) if batch and batch[0].dim() else 1


@contextmanager
def explained(data: Batch) -> Iterator[None]:
    """Say in a sentence that a program does not run on data, where what is raised inside the block is not jensen's own.

    What users raise themselves stays as it is.
    """
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if not _is_own(error):
            raise ValueError(_does_not_run(data, error)) from error
        said, shapes, _ = str(error).partition(_SHAPES)
        if not shapes:
            raise
        raise type(error)(said.rstrip()) from error


def _is_own(error: Exception) -> bool:
    """Whether an error was raised by the library, or by a statement of the user's: then it says all there is to say."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, torch.OutOfMemoryError):
        return True
    room = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return room not in _BELOW and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _does_not_run(data: Batch, error: Exception) -> str:
    """That a pair does not run on data, and why, in a sentence."""
    came = " and ".join(f"data[{i}] of shape {list(x.shape)} ({x.dtype})" for i, x in enumerate(data)) or "no data, ()"
    whole = [i for i, x in enumerate(data) if not x.is_floating_point()]
    remedy = other_lengths([list(x.shape) for x in data])
    if whole and "dtype" in str(error) and not remedy:
        remedy = "; " + ", ".join(f"data[{i}].to({torch.get_default_dtype()})" for i in whole) + " is what layers read"
    return f"the pair does not run on {came}: {in_a_line(error)}{remedy}"


def misfit(program: Callable[..., Any], half: str, data: Batch) -> str | None:
    """What is wrong with the number of arguments that a program is called with, in a sentence; None if nothing."""
    try:
        signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):  # one that has none
        return None
    try:
        signature.bind(*data)
    except TypeError as error:
        return (
            f"the {half} takes {signature}, but it is called as {half}({_listed(len(data))}) ({error}): "
            f"{_other_call(signature, half, len(data))}"
        )
    return None


def _listed(n: int) -> str:
    return ", ".join(f"data[{i}]" for i in range(n))


def _other_call(signature: inspect.Signature, half: str, n: int) -> str:
    """How a program of this signature is called with so many tensors."""
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not n:
        return f"give its data, or fix them by `functools.partial({half}, x)`"
    if not parameters:
        return f"where it holds its data give () as data, where it needs none `lambda *data: {half}()` in its place"
    if len(named) < n:
        return (
            f"`lambda *data: {half}(data)` gives it the tensors as one argument, `lambda x, *rest: {half}(x)` leaves "
            "the rest out"
        )
    listed = ", ".join(p.name for p in named[:n])
    call = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in named[:n])
    rest = [f"{p.name}=..." for p in named[n:] if p.default is p.empty]
    return f"give `lambda {listed}: {half}({', '.join([call, *rest])})` in its place"


def other_lengths(shapes: list[list[int]]) -> str:
    """What to do with tensors that have not as many rows as the data."""
    if shapes == [[]]:
        return (
            "; where it is an option of a pair that holds its data, give `functools.partial(model, data)` in place of "
            "the model, the like for the guide, and () as data; where it is one datum, give data[None]"
        )
    lengths = [shape[0] for shape in shapes if shape and shape[0]]
    if len(shapes) < 2 or not lengths:
        return ""
    n = max(lengths, key=lengths.count)  # the first of them, where several are as frequent
    fixed = [i for i, shape in enumerate(shapes) if not shape or shape[0] != n]
    if not fixed:
        return ""
    names = {i: "other" if len(fixed) == 1 else f"other{i}" for i in fixed}
    return f"; {_closure(len(shapes), names)}"


def _no_tensor(data: Any) -> str:
    """What to do with data that are not all tensors, in a sentence."""
    expected = "data is a tensor or a tuple of tensors, but"
    if not isinstance(data, tuple) or isinstance(data, PackedSequence):
        return f"{expected} got {type(data).__name__}; {_one_argument(data, 'data')}"
    i = next(i for i, x in enumerate(data) if not isinstance(x, Tensor))
    if isinstance(data[i], PackedSequence):
        others = [f"x{j}" if j != i else "" for j in range(len(data))]
        return f"{expected} data[{i}] is a PackedSequence; {_packed(f'data[{i}]', others)}"
    if len(data) == 1:
        return f"{expected} data[0] is {_named(data[0])}; {_one_argument(data[0], 'data[0]')}"
    fixed = [j for j, x in enumerate(data) if not isinstance(x, Tensor)]
    rows = {len(x) for x in data if isinstance(x, Tensor) and x.dim()} if len(data) - len(fixed) == 1 else set()
    kinds = [type(data[j]).__name__.lower() for j in fixed]
    names = {
        j: _written(data[j], rows) or (f"a_{kind}" if kinds.count(kind) == 1 else f"{kind}{j}")
        for j, kind in zip(fixed, kinds, strict=True)
    }
    text = f"{expected} data[{i}] is {_named(data[i])}; {_closure(len(data), names)}"
    made = as_data(data[i], f"data[{i}]")
    if made != _PLAINLY or hasattr(data[i], "__array__") or isinstance(data[i], list):
        text += f"; if it has a row for each datum, {made}" + f"(data[{i}])" * (made == _PLAINLY)
    return text


def _written(value: Any, rows: set[int]) -> str:
    """A value as code, where it can be written down; a number of data as the number of rows, which differs by batch."""
    if type(value) is int and value in rows:
        return "len(x)"
    return repr(value) if isinstance(value, _LITERALS) else ""


def _one_argument(value: Any, where: str) -> str:
    """What to do with a value that is no tensor, and all that the pair is called with."""
    if isinstance(value, PackedSequence):
        return _packed(where, [""])
    if isinstance(value, dict) and any(isinstance(x, Tensor) for x in value.values()):
        return _unpacked(value, where)
    if isinstance(value, tuple):
        names = ", ".join(f"x{j}" for j in range(len(value)))
        return (
            f"give its tensors as data, {where}, and where the pair takes them as one argument `lambda {names}: "
            f"model(({names}))` in place of the model, and the like for the guide"
        )
    if value is None:
        return "a pair that holds its data, and takes no arguments, is given ()"
    if isinstance(value, (*_LITERALS, dict)):
        code = repr(value) if isinstance(value, _LITERALS) else "options"
        return (
            f"where it is an option of a pair that holds its data, give `functools.partial(model, {code})` in place of "
            "the model, the like for the guide, and () as data"
            + (f"; where it says what the data are, {as_data(value, where)}" if isinstance(value, str) else "")
        )
    if isinstance(value, list) and value and all(isinstance(x, Tensor) for x in value):
        if len({x.shape[:1] for x in value}) > 1:
            given = f"(pad_sequence({where}, batch_first=True), torch.tensor([len(x) for x in {where}]))"
            return (
                f"for sequences of different lengths give {given} as data, `lambda padded, lengths: model([x[:n] for "
                "x, n in zip(padded, lengths)])` in place of the model, and the like for the guide"
            )
        return f"use tuple({where}) for tensors with a row for each datum, torch.stack({where}) for a list of rows"
    made = as_data(value, where)
    return f"{made}, or tuple" if made == _PLAINLY else made


def _packed(where: str, arguments: list[str]) -> str:
    """How a packed sequence, which stands at the empty one of the arguments, is given as data."""
    listed = ", ".join(name or "padded, lengths" for name in arguments)
    packed = "pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)"
    return (
        f"give the padded tensor and the lengths, `padded, lengths = pad_packed_sequence({where}, batch_first=True)`, "
        f"and pack them inside: `lambda {listed}: model({', '.join(name or packed for name in arguments)})` in place "
        "of the model, and the like for the guide"
    )


def _unpacked(entries: dict[Any, Any], where: str) -> str:
    """How the entries of a dict are given as data."""
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
    named = {key: str(key) if str(key).isidentifier() else f"x{i}" for i, key in enumerate(tensors)}
    rebuilt = ", ".join(f"{key!r}: {named.get(key, f'{where}[{key!r}]')}" for key in entries)
    listed, given = ", ".join(named.values()), ", ".join(f"{where}[{key!r}]" for key in tensors)
    code = f"`lambda {listed}: model({{{rebuilt}}})` in place of the model"
    if all(isinstance(key, str) for key in entries):
        code += f", or `lambda {listed}: model(**{{{rebuilt}}})` where they are its keyword arguments"
    return f"give its tensors as data, ({given}{',' * (len(tensors) == 1)}), and {code}, and the like for the guide"


def _closure(arguments: int, fixed: dict[int, str]) -> str:
    """The code that fixes arguments which are no rows of data, by their positions."""
    rows = [i for i in range(arguments) if i not in fixed]
    names = {i: "x" if len(rows) == 1 else f"x{i}" for i in rows} | fixed
    first = ", ".join(names[i] for i in rows)
    code = f"`lambda {first}: model({', '.join(names[i] for i in range(arguments))})`".replace("lambda :", "lambda:")
    if not rows or max(fixed) < min(rows):
        code = f"`functools.partial(model, {', '.join(fixed.values())})`"
    given = ", ".join(f"data[{i}]" for i in rows)
    return (
        f"fix what is no row of data: give {code} in place of the model, the like for the guide, and "
        f"{given if len(rows) == 1 else f'({given})'} as data"
    )


def _named(value: Any) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"
