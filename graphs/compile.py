"""Compilation of traced graphs: when it pays, its requirements, and the reuse of compiled graphs.

A graph receives everything it reads as inputs, so its code and the shapes of its inputs determine it: two models of
one class share compiled code, but never a parameter.
"""

from __future__ import annotations

__all__ = ["CannotCompile", "Compile", "check_compile", "compiled", "ensure_cache", "price"]

import atexit
import getpass
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jensen.kernel.arguments import in_a_line
from jensen.kernel.caller import outside
from jensen.kernel.randomness import forked_rng

from .capture import Graph, Outputs
from .recorded import Recorded, recordable, written_inputs
from .rewrites import rewritten

Compile = Literal["auto"] | bool

_KEPT = 32
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
_cache: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()


class CannotCompile(Exception):
    """The reason why a graph could not be compiled, in one sentence."""


def check_compile(value: object) -> None:
    """Raise ValueError for a setting other than ``"auto"``, ``True`` and ``False``."""
    if value is not True and value is not False and value != "auto":
        raise ValueError(f"compile is 'auto', True or False, but got {value!r}")


@cache
def ensure_cache() -> None:
    """Let PyTorch keep compiled code in a temporary folder if its cache folder is not writable.

    PyTorch creates that folder when a compiler or an optimizer is first imported, and its error would stop a run that
    needs tracing but no compiling.

    Warns:
        UserWarning: naming the folder, once per process.
    """
    try:
        usual = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name: PyTorch uses another folder
        usual = Path(tempfile.gettempdir()) / f"torchinductor_uid_{os.getuid()}"
    folder = Path(os.environ.get(_CACHE_DIR, usual))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        made = tempfile.mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        os.environ[_CACHE_DIR] = made
        warnings.warn(
            f"the cache of compiled code, {_CACHE_DIR}={folder}, is not writable ({error.strerror}): this process "
            f"keeps its code in {made}, and the next process compiles again",
            stacklevel=outside(),
        )


def price(graph: Graph) -> float:
    """The approximate time to compile a graph in seconds: larger for flows, which have thousands of operations."""
    return 5.0 + 0.03 * len(graph.module.graph.nodes)


def compiled(graph: Graph, *inputs: Tensor) -> Callable[..., Outputs]:
    """A graph compiled for inputs like these, to which its in-place operations may write.

    Random samples come from PyTorch's own generators, so the same seed gives the same numbers as without compiling. On
    a CUDA device the compiled function is replayed as a CUDA graph if :func:`~jensen.graphs.recorded.cuda_graphs` says
    so. Inductor's own CUDA graphs are not used: they leave out functions that write to their inputs, such as steps.

    Raises:
        CannotCompile: if there is no C++ compiler, or the compiler fails.
    """
    arguments = (*inputs, *graph.constants)
    key = (graph.module.code, *((t.shape, t.stride(), t.dtype, t.device) for t in arguments))
    if key not in _cache:
        _cache[key] = _compile(graph, arguments)
        while len(_cache) > _KEPT:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    fast, constants = _cache[key], graph.constants
    if recordable(arguments):
        fast = Recorded(fast, written_inputs(graph))

    def run(*values: Tensor) -> Outputs:
        with torch.no_grad():
            return tuple(fast(*(t.detach() if t.requires_grad else t for t in values), *constants))

    return run


def _compile(graph: Graph, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    ensure_cache()
    options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": False}
    copies: list[Any] = [_copy(t.detach()) for t in arguments]
    try:
        import torch._inductor  # here, because its import takes longer than that of Pyro

        with torch.no_grad(), warnings.catch_warnings(), forked_rng():
            warnings.simplefilter("ignore")
            fast: Callable[..., Any] = torch._inductor.compile(rewritten(graph.module), list(copies), options=options)
            fast(*copies)
    except Exception as error:
        raise CannotCompile(in_a_line(error)) from error
    return fast


def _copy(t: Tensor) -> Tensor:
    """A copy with the same memory layout; a tensor that shares its memory with itself or others is not copied."""
    copy = t.clone(memory_format=torch.preserve_format)
    return copy if copy.stride() == t.stride() else t
