"""The arguments of a model and guide: tensors with one row per data point, or none where they hold their data.

Any other argument of a program (a dict, a number, a matrix of weights) is not data. The user fixes it with a closure;
the errors here contain the code of that closure.
"""

from __future__ import annotations

__all__ = [
    "Batch",
    "Data",
    "Given",
    "as_tensors",
    "check_tensors",
    "explained",
    "in_a_line",
    "misfit",
    "other_lengths",
    "prepared",
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
from jensen.missing import Missing, expect_holes
from jensen.missing import prepared as with_missing
from jensen.sources import Readable, as_source

from .alone import on_one_thread_if_forked

Data = Tensor | tuple[Tensor, ...]
Given = Data | Readable  # what fit and evaluate take
Batch = tuple[Tensor, ...]

_SHAPES = "Trace Shapes:"  # the heading under which Pyro appends the shapes of sites to an error
_BELOW = ("numpy", "pyro", "torch")
_PLAINLY = as_data([], "")
_LITERALS = (bool, int, float, str, type(None))


def as_tensors(data: Data, held: bool = False) -> Batch:
    """Data as a tuple of tensors with the same first dimension, which is at least 1.

    Args:
        data: the user's data.
        held: whether no data, ``()``, is accepted, for a model and guide that hold their data.

    Raises:
        TypeError: for anything that is not a tensor, with the closure that fixes it.
        ValueError: for tensors of different lengths, with the closure that fixes them, and for missing data.
    """
    if isinstance(data, PackedSequence):  # a subclass of tuple
        raise TypeError(_no_tensor(data))
    tensors = data if isinstance(data, tuple) else (data,)
    if not tensors and held:
        return tensors
    if not tensors:
        raise ValueError(
            "data is (), but at least one tensor is needed here: only fit, evaluate, compare, log_weights and terms "
            "take a model and guide that hold their data. For other functions write model(x) and guide(x)"
        )
    check_tensors(data)
    shapes = [list(x.shape) for x in tensors]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
        raise ValueError(
            "data must share a first dimension N of at least 1, but got tensors of shape "
            f"{shapes}{other_lengths(shapes)}"
        )
    return tensors


def check_tensors(data: Any) -> None:
    """Raise TypeError for data that are not tensors, with the closure that fixes it; ValueError for invalid ones."""
    tensors = data if isinstance(data, tuple) else (data,)
    if not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(_no_tensor(data))
    for i, x in enumerate(tensors):
        check_data(x, f"data[{i}]" if isinstance(data, tuple) else "data")
    on_one_thread_if_forked()
    expect_holes(*tensors)


def prepared(model: Any, data: Any, missing: Missing) -> tuple[Any, Any]:
    """:func:`jensen.missing.prepared`, also in a forked process, and for data that are read by the batch.

    Raises:
        ValueError: for a mask of data that are read by the batch.
    """
    on_one_thread_if_forked()
    source = as_source(data)
    if source is not None and isinstance(missing, Tensor):
        raise ValueError(
            "missing is a mask of the first tensor of the data, but data is read by the batch: put NaN where a value "
            "is missing, and give missing='nan'"
        )
    if source is not None and missing is not None:
        expect_holes(torch.tensor([torch.nan]))
    return with_missing(model, data if source is None else source, missing)


def in_a_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def rows_of(batch: Batch) -> int:
    """The number of rows of a batch; 1 without tensors (model and guide hold their data)."""
    return len(batch[0]) if batch and batch[0].dim() else 1


@contextmanager
def explained(data: Batch) -> Iterator[None]:
    """Replace a foreign error inside the block by one sentence: the program does not run on these data.

    Errors that the library or the user raises stay as they are.
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
    """Whether the library or the user's own code raised the error; its message is then kept."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, torch.OutOfMemoryError):
        return True
    room = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return room not in _BELOW and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _does_not_run(data: Batch, error: Exception) -> str:
    """The sentence that model and guide do not run on the data, and why."""
    came = " and ".join(f"data[{i}] of shape {list(x.shape)} ({x.dtype})" for i, x in enumerate(data)) or "no data, ()"
    whole = [i for i, x in enumerate(data) if not x.is_floating_point()]
    remedy = other_lengths([list(x.shape) for x in data])
    if whole and "dtype" in str(error) and not remedy:
        remedy = "; use " + ", ".join(f"data[{i}].to({torch.get_default_dtype()})" for i in whole) + " instead"
    return f"model and guide do not run on {came}: {in_a_line(error)}{remedy}"


def misfit(program: Callable[..., Any], half: str, data: Batch) -> str | None:
    """A sentence about a wrong number of arguments in the call of a program; None if the number is right."""
    try:
        signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):  # no signature available
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
    """How to call a program of this signature with n tensors."""
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not n:
        return f"give its data, or bind them with `functools.partial({half}, x)`"
    if not parameters:
        return f"if it holds its data, give () as data; if it needs none, give `lambda *data: {half}()` instead"
    if len(named) < n:
        return (
            f"`lambda *data: {half}(data)` passes the tensors as one argument, `lambda x, *rest: {half}(x)` drops the "
            "others"
        )
    listed = ", ".join(p.name for p in named[:n])
    call = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in named[:n])
    rest = [f"{p.name}=..." for p in named[n:] if p.default is p.empty]
    return f"give `lambda {listed}: {half}({', '.join([call, *rest])})` instead"


def other_lengths(shapes: list[list[int]]) -> str:
    """The remedy for tensors whose number of rows differs from that of the data."""
    if shapes == [[]]:
        return (
            "; if it is an option of a model that holds its data, give `functools.partial(model, data)` instead of the "
            "model, do the same for the guide, and give () as data; if it is one data point, give data[None]"
        )
    lengths = [shape[0] for shape in shapes if shape and shape[0]]
    if len(shapes) < 2 or not lengths:
        return ""
    n = max(lengths, key=lengths.count)  # the most frequent length; the first one if several are
    fixed = [i for i, shape in enumerate(shapes) if not shape or shape[0] != n]
    if not fixed:
        return ""
    names = {i: "other" if len(fixed) == 1 else f"other{i}" for i in fixed}
    return f"; {_closure(len(shapes), names)}"


def _no_tensor(data: Any) -> str:
    """The remedy for data that are not all tensors, in one sentence."""
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
        text += f"; if it has one row per data point, {made}" + f"(data[{i}])" * (made == _PLAINLY)
    return text


def _written(value: Any, rows: set[int]) -> str:
    """The code of a value if it has a literal; a number equal to the number of rows becomes the expression for it."""
    if type(value) is int and value in rows:
        return "len(x)"
    return repr(value) if isinstance(value, _LITERALS) else ""


def _one_argument(value: Any, where: str) -> str:
    """The remedy for a value that is not a tensor and is the only argument."""
    if isinstance(value, PackedSequence):
        return _packed(where, [""])
    if isinstance(value, dict) and any(isinstance(x, Tensor) for x in value.values()):
        return _unpacked(value, where)
    if isinstance(value, tuple):
        names = ", ".join(f"x{j}" for j in range(len(value)))
        return (
            f"give its tensors as data, {where}; if model and guide take them as one argument, give `lambda {names}: "
            f"model(({names}))` instead of the model, and do the same for the guide"
        )
    if value is None:
        return "a model and guide that hold their data and take no arguments are given ()"
    if isinstance(value, (*_LITERALS, dict)):
        code = repr(value) if isinstance(value, _LITERALS) else "options"
        return (
            f"if it is an option of a model that holds its data, give `functools.partial(model, {code})` instead of "
            "the model, do the same for the guide, and give () as data"
            + (f"; if it names a data set, {as_data(value, where)}" if isinstance(value, str) else "")
        )
    if isinstance(value, list) and value and all(isinstance(x, Tensor) for x in value):
        if len({x.shape[:1] for x in value}) > 1:
            given = f"(pad_sequence({where}, batch_first=True), torch.tensor([len(x) for x in {where}]))"
            return (
                f"for sequences of different lengths give {given} as data, `lambda padded, lengths: model([x[:n] for "
                "x, n in zip(padded, lengths)])` instead of the model, and do the same for the guide"
            )
        return f"use tuple({where}) for tensors with one row per data point, torch.stack({where}) for a list of rows"
    made = as_data(value, where)
    return f"{made}, or tuple" if made == _PLAINLY else made


def _packed(where: str, arguments: list[str]) -> str:
    """How to give a packed sequence as data; it stands at the empty entry of the arguments."""
    listed = ", ".join(name or "padded, lengths" for name in arguments)
    packed = "pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)"
    return (
        f"give the padded tensor and the lengths, `padded, lengths = pad_packed_sequence({where}, batch_first=True)`, "
        f"and pack them inside: `lambda {listed}: model({', '.join(name or packed for name in arguments)})` instead of "
        "the model, and do the same for the guide"
    )


def _unpacked(entries: dict[Any, Any], where: str) -> str:
    """How to give the entries of a dict as data."""
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
    named = {key: str(key) if str(key).isidentifier() else f"x{i}" for i, key in enumerate(tensors)}
    rebuilt = ", ".join(f"{key!r}: {named.get(key, f'{where}[{key!r}]')}" for key in entries)
    listed, given = ", ".join(named.values()), ", ".join(f"{where}[{key!r}]" for key in tensors)
    code = f"`lambda {listed}: model({{{rebuilt}}})` instead of the model"
    if all(isinstance(key, str) for key in entries):
        code += f", or `lambda {listed}: model(**{{{rebuilt}}})` if they are its keyword arguments"
    return f"give its tensors as data, ({given}{',' * (len(tensors) == 1)}), and {code}, and do the same for the guide"


def _closure(arguments: int, fixed: dict[int, str]) -> str:
    """The code that fixes the arguments that are not rows of data, by their positions."""
    rows = [i for i in range(arguments) if i not in fixed]
    names = {i: "x" if len(rows) == 1 else f"x{i}" for i in rows} | fixed
    first = ", ".join(names[i] for i in rows)
    code = f"`lambda {first}: model({', '.join(names[i] for i in range(arguments))})`".replace("lambda :", "lambda:")
    if not rows or max(fixed) < min(rows):
        code = f"`functools.partial(model, {', '.join(fixed.values())})`"
    given = ", ".join(f"data[{i}]" for i in rows)
    return (
        f"fix the argument that is not data: give {code} instead of the model, do the same for the guide, and give "
        f"{given if len(rows) == 1 else f'({given})'} as data"
    )


def _named(value: Any) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"
