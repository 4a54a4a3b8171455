"""Several processes that compute together, as ``torchrun`` starts them; one process is the ordinary case.

A function of jensen that several processes call together (the same call with the same data in each) shares the work:
:func:`~jensen.inference.fit` takes a part of every batch in each process, measurements take whole blocks of the data.
The processes talk through the default group of ``torch.distributed``. If the program has not made one,
``torchrun``'s environment tells how, and the first function that shares work does so: gloo on CPUs, NCCL on GPUs.

:func:`apart` makes each process work for itself, for example to train a different model in each.

There are two kinds of exchange. ``gathered`` collects objects, and also errors: a process that fails inside
``together`` tells the others, which raise an error instead of waiting for it. Each says where in the program it
stands, so that processes which call different functions raise an error as well. The other kind is the sum of
gradients in training, which carries a flag for the same purpose. Ctrl-C waits for the end of an exchange.
"""

from __future__ import annotations

__all__ = ["apart", "count", "rank"]

import atexit
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_MARK = "JENSEN_PROCESS"  # the process that torchrun has started; its own children inherit the environment
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_apart: ContextVar[bool] = ContextVar("apart", default=False)
_inside: ContextVar[tuple[str, ...]] = ContextVar("inside", default=())  # the names of the calls of together


class _State:
    objects: Any = None  # the group for objects, if the default group cannot carry them
    forked = False
    apart = 0  # how many blocks of apart() are open in all threads
    left = False  # whether this process has stopped without telling the others


def _begin_anew() -> None:
    """In a forked process: the connections belong to the parent."""
    _State.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


class PeerError(RuntimeError):
    """Another process failed."""


@contextmanager
def apart() -> Iterator[None]:
    """Inside the block, and in the threads started there, this process works for itself, as if there were no others.

    Example:
        >>> with apart():
        ...     rank(), count()
        (0, 1)
    """
    token = _apart.set(True)
    with _lock:
        _State.apart += 1
    try:
        yield
    finally:
        _apart.reset(token)
        with _lock:
            _State.apart -= 1


_lock = threading.Lock()


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


def count() -> int:
    """The number of processes that work together.

    Example:
        >>> count()
        1
    """
    if _apart.get() or (_State.apart and not _main()) or _State.forked or not _joined():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0; the process 0 alone prints, and writes files.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if count() > 1 else 0


def _joined() -> bool:
    """Whether there is a group; made from torchrun's environment if the program has not made one."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return True
    if not _started_by_torchrun() or int(os.environ["WORLD_SIZE"]) < 2:
        return False
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_local() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    here, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found, *_ = next(dist.rendezvous("env://", here, processes))  # type: ignore[attr-defined]
    # started again, processes find the addresses of those before them under the same names: so each start has its own
    start = f"jensen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{processes}"
    store = dist.PrefixStore(start, found)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=here, world_size=processes)
    atexit.register(_leave)
    return True


def _started_by_torchrun() -> bool:
    """Whether torchrun has started this process itself, not one of its parents; marks the environment if so."""
    if not all(name in os.environ for name in _TORCHRUN):
        return False
    launch = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    marked = os.environ.get(_MARK, "").partition("@")
    if marked[2] != launch:
        os.environ[_MARK] = f"{os.getpid()}@{launch}"
        return True
    return marked[0] == str(os.getpid())


_started_by_torchrun()  # before this process starts others


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # its threads may outlive it: one that frees a tensor after the interpreter's end would abort


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of the processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def place(device: torch.device | str | None) -> torch.device | str | None:
    """The device of this process: ``"cuda"`` without a number is a different GPU in each process of a machine."""
    if device is None or count() == 1 or torch.device(device) != torch.device("cuda"):
        return device
    return torch.device("cuda", _local() % torch.cuda.device_count())


def _group(device: torch.device) -> Any:
    """The group for tensors of a device: NCCL has none for those of the CPU."""
    if device.type == "cuda" or "gloo" in str(dist.get_backend_config()):
        return None
    if _State.objects is None:
        _State.objects = dist.new_group(backend="gloo")
    return _State.objects


@contextmanager
def _connected() -> Iterator[None]:
    """Inside the block, Ctrl-C waits; raise PeerError if a process has ended without a word."""
    if _State.left:
        raise PeerError("this process was interrupted and has left the others: start all of them again")
    try:
        with _undisturbed():
            yield
    except PeerError:
        raise
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise PeerError(
                "another process has not come here for too long; if it is only slow, give it more time: "
                "torch.distributed.init_process_group(timeout=...) at the beginning of the program"
            ) from error
        raise PeerError("another process has ended without an error: its own output may tell why") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C inside the block takes effect at its end: else others would wait for the second half of an exchange."""
    if not _main() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)


def leave() -> None:
    """This process stops without an exchange; the others notice it when it ends."""
    _State.left = True


def has_left() -> bool:
    """Whether :func:`leave` was called."""
    return _State.left


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order.

    Raises:
        PeerError: if another process has failed, or is in another function, instead of coming here.
    """
    if count() == 1:
        return [value]
    return _exchanged((value, None))


def _exchanged(said: tuple[Any, str | None]) -> list[Any]:
    found: list[Any] = [None] * count()
    with _connected():
        dist.all_gather_object(found, (*said, _inside.get(), _place()), group=_group(torch.device("cpu")))
    failed = [f"process {i} of {count()}: {error}" for i, (_, error, *_) in enumerate(found) if error is not None]
    if failed:
        if said[1] is None:
            raise PeerError("; ".join(failed))
        return []
    where = [(inside, place) for *_, inside, place in found]
    other = next((i for i, at in enumerate(where) if at != where[0]), None)
    if other is not None:
        inside = where[0][0] != where[other][0]
        ours, theirs = (
            " > ".join(at[0]) or "no function of jensen" if inside else at[1] for at in (where[0], where[other])
        )
        raise PeerError(
            f"the processes do not call the same functions: process 0 is in {ours}, process {other} in {theirs}; call "
            "functions that share work in every process (in a callback as well), or let one work for itself (with "
            "jensen.processes.apart(): ...)"
        )
    return [value for value, *_ in found]


def _place() -> str:
    """The line of jensen that makes an exchange."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals is globals():
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}, line {frame.f_lineno}"


@contextmanager
def together(name: str) -> Iterator[None]:
    """The other processes hear of an error inside the block at their next exchange; others than process 0 do not warn.

    Whatever is exchanged inside the block is exchanged by ``gathered``.

    Args:
        name: of the function that the block is.
    """
    if count() == 1:
        yield
        return
    outer = _inside.get()
    token = _inside.set((*outer, name))
    try:
        if outer:
            yield
            return
        with warnings.catch_warnings():
            if rank():
                warnings.simplefilter("ignore", UserWarning)
            yield
    except PeerError:
        raise
    except BaseException as error:
        if not outer and not _State.left:
            with suppress(PeerError):
                _exchanged((None, f"{type(error).__name__}: {error}"))
        raise
    finally:
        _inside.reset(token)


def of_first(make: Callable[[], T]) -> T:
    """What the function returns in process 0, which alone calls it."""
    if count() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    with _undisturbed():
        gathered(None)
        with _connected():
            dist.broadcast_object_list(made, 0, group=_group(torch.device("cpu")))
    value: Any = made[0]
    return value  # type: ignore[no-any-return]


def shared_seed(seed: int | None) -> int | None:
    """The same seed in all processes: for None and several processes, one from the random stream of process 0."""
    if seed is not None or count() == 1:
        return seed
    return of_first(lambda: int(torch.randint(2**31, ())))


def own_seed(seed: int | None) -> int | None:
    """The seed of this process, from the one of all: the same for one process, of its own for each of several."""
    return seed if seed is None or count() == 1 else (seed + 0x9E3779B1 * rank()) % 2**32


def own_share(total: int) -> range:
    """The whole blocks of this process, of ``total`` in a row; at least one, which others have as well if too few."""
    processes, here = count(), rank()
    if total < processes:
        one = min(here, total - 1)
        return range(one, one + 1)
    return range(here * total // processes, (here + 1) * total // processes)


def in_order(own: Sequence[T], total: int) -> list[T]:
    """The results of all blocks in their order, from those of :func:`own_share`."""
    if count() == 1:
        return list(own)
    return [result for results in gathered(list(own))[:total] for result in results]


def check_alike(**facts: Any) -> None:
    """Raise ValueError, naming what differs, unless each fact is the same in all processes."""
    if count() == 1:
        return
    found = gathered(facts)
    for name, first in found[0].items():
        for i, other in enumerate(facts[name] for facts in found):
            if repr(other) != repr(first):  # NaN is like NaN
                raise ValueError(
                    f"the processes call the same function with different {name}: {_differing(first, other)} in "
                    f"process 0, {_differing(other, first)} in process {i}; give all of them the same model, settings "
                    "and all data (each takes its share), or let each work for itself "
                    "(with jensen.processes.apart(): ...)"
                )


def _differing(one: Any, other: Any) -> Any:
    """The part of a fact that differs from another one."""
    if isinstance(one, dict):
        return {key: value for key, value in one.items() if repr(value) != repr(other.get(key))}
    if not isinstance(one, list):
        return one
    differing = [value for value in one if value not in other]
    return differing if len(differing) < 4 else [*differing[:2], f"and {len(differing) - 2} others"]


def facts_of(tensors: Sequence[Tensor]) -> list[str]:
    """Words that differ if data differ, also in their order: the shape, type and checksum of each tensor."""
    if count() == 1:
        return []
    return [f"{x.dtype} {list(x.shape)}, checksum {_checksum(x):08x}" for x in tensors]


def _checksum(x: Tensor) -> int:
    whole = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(whole.view(torch.uint8).numpy().data) if len(whole) else 0


@torch.no_grad()
def of_first_process(tensors: Sequence[Tensor]) -> None:
    """Write the values of process 0 into the tensors of all processes."""
    if count() == 1:
        return
    with _connected():
        for tensor in tensors:
            value = tensor.detach().clone().contiguous()
            dist.broadcast(value, 0, group=_group(value.device))
            tensor.copy_(value)


def summed(flat: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    with _connected():
        dist.all_reduce(flat, group=_group(flat.device))
    return flat
