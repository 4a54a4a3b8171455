"""Data sets are in the processor's memory, whatever the default device of PyTorch."""

from __future__ import annotations

__all__ = ["on_cpu"]

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose new tensors are on the CPU also under ``torch.set_default_device``."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return call
