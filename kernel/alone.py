"""One thread at a time, without OpenMP threads in a forked process: Pyro and PyTorch keep global state per process.

Pyro's handlers and parameter store, the modes of modules and the default random stream are global: two threads that
measure or train at once would run inside each other's handlers and leave modules in evaluation mode. So every function
that runs a model and guide holds a lock, which is reentrant (a callback of ``fit`` may evaluate). A thread that runs
programs without jensen (``pyro.infer.SVI.step``, ``model(x)``) does not take the lock.
"""

from __future__ import annotations

__all__ = ["alone", "on_one_thread_if_forked"]

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jensen.missing import holes_forgotten

from .caller import outside


class _Process:
    """State that exists once per process."""

    def __init__(self, forked: bool = False) -> None:
        self.lock = threading.RLock()
        self.depth = 0  # of nested blocks
        self.forked = forked


_here = _Process()


def _begin_anew() -> None:
    """In a forked process: another thread of the parent may have held the lock, and that thread does not exist here."""
    global _here
    _here = _Process(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def on_one_thread_if_forked() -> None:
    """Before tensors are read: in a forked process, continue with one thread.

    Warns:
        UserWarning: in a forked process: OpenMP threads do not survive a fork, and PyTorch would wait for them forever.
    """
    process = _here
    if process.forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked, and OpenMP threads do not survive a fork: PyTorch now runs on one thread. To "
            "use more, start processes with multiprocessing.get_context('spawn')",
            stacklevel=outside(),
        )
    process.forked = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block, no other thread runs a model and guide; warns as :func:`on_one_thread_if_forked`."""
    process = _here
    with process.lock:
        on_one_thread_if_forked()
        process.depth += 1
        try:
            yield
        finally:
            process.depth -= 1
            if not process.depth:
                holes_forgotten()
