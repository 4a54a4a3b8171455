"""Threads that wait by spinning: a warning where a machine has more to do than cores to do it."""

from __future__ import annotations

__all__ = ["warn_if_busy"]

import os
import warnings

import torch

from .caller import outside

_said: list[float] = []  # the load, once it was said


def warn_if_busy() -> None:
    """Say once per process that threads of PyTorch get into the way of other jobs, where they do.

    OpenMP's threads spin while they wait for each other at the end of every operation. Beside other jobs the last of
    them waits for a core, and all others for it: two threads were 17 times slower than one. A load average can only be
    had on Linux and macOS.

    Warns:
        UserWarning: if the load average of the last minute is above the number of cores, PyTorch has more than one
            thread, and ``OMP_WAIT_POLICY`` is not ``PASSIVE``.
    """
    if _said or torch.get_num_threads() < 2 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not known here
        return
    cores = os.cpu_count() or 1
    if load <= cores:
        return
    _said.append(load)
    warnings.warn(
        f"the load of this machine is {load:.1f}, above its {cores} cores, and PyTorch has {torch.get_num_threads()} "
        "threads, which spin while they wait for each other and may take many times as long: "
        "torch.set_num_threads(1), or set OMP_WAIT_POLICY=PASSIVE in the environment before Python starts",
        stacklevel=outside(),
    )
