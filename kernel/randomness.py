"""Whose random stream is drawn from: the user's, or one that leaves it alone."""

from __future__ import annotations

__all__ = ["forked_rng", "private_randomness", "stream"]

from collections.abc import Callable, Iterator
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


def stream() -> Callable[[], None]:
    """A function that returns to the user's random stream as it is now, on the CPU and on the CUDA devices in use."""
    state = torch.get_rng_state()
    others = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def back() -> None:
        torch.set_rng_state(state)
        if others:
            torch.cuda.set_rng_state_all(others)

    return back
