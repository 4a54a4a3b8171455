"""The state of a run, restored afterwards: modes, buffers, gradient, device, random stream."""

from __future__ import annotations

__all__ = [
    "buffers_kept",
    "calls_seen",
    "fix",
    "fixed_parameters",
    "modes_kept",
    "running",
    "store_restored",
    "tensors_kept",
    "watched_modes",
]

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .alone import alone
from .caller import outside
from .load import warn_if_busy
from .parameters import owners_of, store_kept
from .randomness import private_randomness
from .sites import Program


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the mode, training or evaluation, of every submodule afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def fixed_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that require no gradient. Pyro requires one as soon as it puts them into its store."""
    return [p for module in modules for p in module.parameters() if not p.requires_grad]


def fix(parameters: Iterable[nn.Parameter]) -> None:
    """Require no gradient."""
    for p in parameters:
        p.requires_grad_(False)


@contextmanager
def tensors_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors that are written to inside the block; the others are not touched."""
    kept = list(tensors)
    before = [tensor.clone() for tensor in kept]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def store_restored() -> Iterator[None]:
    """Restore Pyro's store in full: its names, and their parameters with their values."""
    with alone():
        store = pyro.get_param_store()
        tables = [getattr(store, name) for name in ("_params", "_constraints", "_param_to_name")]
        before = [dict(table) for table in tables]
        try:
            with tensors_kept(store._params.values()):
                yield
        finally:
            for table, entries in zip(tables, before, strict=True):
                table.clear()
                table.update(entries)


def buffers_kept(*programs: Program) -> AbstractContextManager[None]:
    """Restore the buffers (running means, for example) that checks of programs change."""
    return tensors_kept(buffer for owner in owners_of(*programs) for buffer in owner.buffers())


@contextmanager
def running(
    model: Program,
    guide: Program,
    what: str = "",
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[None]:
    """The state of a measurement: no gradient, evaluation mode, the given device, a private random stream if seeded.

    The stream is that of ``what``, the measuring function: see :func:`~jensen.kernel.randomness.derived_seed`.

    Modes, buffers and Pyro's store are restored afterwards; no other thread runs programs meanwhile.
    """
    warn_if_busy()
    modules = owners_of(model, guide)
    with store_kept(), torch.no_grad(), modes_kept(modules), private_randomness(seed, what):
        for module in modules:
            if device is not None:
                module.to(device)
            module.eval()
        fixed = fixed_parameters(modules)
        try:
            with buffers_kept(model, guide), _Watch(modules):
                yield
        finally:
            fix(fixed)


@contextmanager
def watched_modes() -> Iterator[None]:
    """During a measurement: record what runs in training mode inside the block, which is one run of the programs.

    Modules that were not found before are put into evaluation mode until the measurement ends.

    Warns:
        UserWarning: naming what still samples noise or normalises by batches in training mode.
    """
    if not _open:
        yield
        return
    watch = _open[-1]
    handle = register_module_forward_pre_hook(watch.module)
    try:
        with _Functions(watch):
            yield
    finally:
        handle.remove()
    watch.say()


@contextmanager
def calls_seen(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Collect, into the set it yields, the modules that are called inside the block, including parts."""
    seen: set[nn.Module] = set()
    parts = {part for module in modules for part in module.modules()}
    handles = [part.register_forward_pre_hook(lambda part, _: seen.add(part)) for part in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The modules of a measurement: those in evaluation mode, and those that run in training mode.

    Args:
        modules: those in evaluation mode.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.names = {part: name for module in modules for name, part in module.named_modules()}
        self.turned: list[weakref.ref[nn.Module]] = []
        self.new: list[tuple[weakref.ref[nn.Module], str]] = []  # of this run
        self.found: dict[str, None] = {}

    def __enter__(self) -> _Watch:
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        for reference in self.turned:
            if (part := reference()) is not None:
                part.training = True

    def module(self, part: nn.Module, _: Any) -> None:
        """Check a module that is about to be called."""
        if not part.training:
            return
        name, kind = self.names.get(part), type(part).__name__
        if name is not None or any(reference() is part for reference in self.turned):
            if _is_noisy(part):  # it was in evaluation mode: it, or its owner, calls train() itself
                self.found[f"{name} ({kind})" if name else kind] = None
            return
        part.training = False
        self.turned.append(weakref.ref(part))
        if _is_noisy(part):
            self.new.append((weakref.ref(part), kind))

    def say(self) -> None:
        """Warn of what ran in training mode, at the end of a run."""
        for reference, kind in self.new:
            if reference() is None:  # created anew in every run
                self.found[f"{kind} (made inside the program)"] = None
        self.new.clear()
        if self.found:
            warnings.warn(
                f"{', '.join(self.found)} runs in training mode during the measurement, so estimates contain its noise "
                "or depend on the batch: create modules outside of the program, let train() and eval() set their mode, "
                "and pass training=module.training to functions such as dropout",
                stacklevel=outside(),
            )
            self.found.clear()


class _Functions(TorchFunctionMode):
    """Reports functions of ``torch.nn.functional`` that are called in training mode, outside of modules."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.functional" and (signature := _with_training(func)):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            rate = given.arguments.get("p", given.arguments.get("dropout_p", 1.0))
            if given.arguments["training"] and rate > 0 and not self.watch.found and not self.watch.new:
                self.watch.found[f"torch.nn.functional.{func.__name__}"] = None
        return func(*args, **kwargs)


@cache
def _with_training(func: Callable[..., Any]) -> inspect.Signature | None:
    signature = inspect.signature(func)
    return signature if "training" in signature.parameters else None


def _is_noisy(part: nn.Module) -> bool:
    """Whether a module in training mode samples noise, or couples the rows of a batch."""
    if isinstance(part, _NormBase):
        return part.track_running_stats
    rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
    return isinstance(part, nn.RReLU) or (isinstance(rate, float) and rate > 0)


_open: list[_Watch] = []  # measurements, nested
