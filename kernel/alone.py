"""One thread at a time, and none of OpenMP's in a forked process: what Pyro and PyTorch have one of per process.

Pyro's handlers and parameter store, the modes of modules and the default random stream are global: two threads that
measure or train at once would run inside each other's handlers and leave modules in evaluation mode. So whoever runs
pairs holds a lock, which a thread may take again (a callback of ``fit`` that evaluates). A thread that runs a pair
without jensen (``pyro.infer.SVI.step``, ``model(x)``) does not ask for it.
"""

from __future__ import annotations

__all__ = ["alone"]

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .caller import outside


class _Process:
    """What a process has one of."""

    def __init__(self, forked: bool = False) -> None:
        self.lock = threading.RLock()
        self.forked = forked


_here = _Process()


def _begin_anew() -> None:
    """In a forked process: another thread of the parent may have held the lock, and does not exist here."""
    global _here
    _here = _Process(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def alone() -> Iterator[None]:
    """Run pairs inside the block while no other thread does.

    Warns:
        UserWarning: in a forked process, which goes on with one thread: OpenMP's do not survive a fork, and PyTorch
            would wait for them for ever.
    """
    process = _here
    with process.lock:
        if process.forked and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            warnings.warn(
                "this process was forked, and the threads of OpenMP do not survive that: PyTorch runs on one thread "
                "here; start processes by multiprocessing.get_context('spawn') to use more",
                stacklevel=outside(),
            )
        process.forked = False
        yield
