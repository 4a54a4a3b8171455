"""A warning where the machine is overloaded and PyTorch's threads wait by spinning."""

from __future__ import annotations

__all__ = ["warn_if_busy"]

import os
import warnings

import torch

from .caller import outside

_said: list[float] = []  # the load of the warning, once it was given


def warn_if_busy() -> None:
    """Warn once per process if PyTorch's threads compete with other jobs.

    OpenMP's threads spin while they wait for each other at the end of every operation. On an overloaded machine the
    last thread waits for a core, and the others wait for it: two threads were 17 times slower than one. A load average
    exists only on Linux and macOS.

    Warns:
        UserWarning: if the load average of the last minute is above the number of cores, PyTorch has more than one
            thread, and ``OMP_WAIT_POLICY`` is not ``PASSIVE``.
    """
    if _said or torch.get_num_threads() < 2 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # no load average here
        return
    cores = os.cpu_count() or 1
    if load <= cores:
        return
    _said.append(load)
    warnings.warn(
        f"the load of this machine is {load:.1f}, above its {cores} cores, and PyTorch's {torch.get_num_threads()} "
        "threads spin while they wait for each other, which may be many times slower: call torch.set_num_threads(1), "
        "or set OMP_WAIT_POLICY=PASSIVE in the environment before Python starts",
        stacklevel=outside(),
    )
