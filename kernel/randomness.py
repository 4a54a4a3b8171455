"""Whose random stream is drawn from: the user's, or one that leaves it alone."""

from __future__ import annotations

__all__ = ["forked_rng", "private_randomness"]

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng() -> Iterator[None]:
    """Give the user's random stream back as it was, on the CPU and on every CUDA device in use."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def private_randomness(seed: int | None) -> Iterator[None]:
    """With a seed, a random stream of its own; without, the user's."""
    if seed is None:
        yield
        return
    with forked_rng():
        torch.manual_seed(seed)
        yield
