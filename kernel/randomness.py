"""The random stream in use: the user's stream, or a private one that leaves the user's unchanged.

A seed names many streams, one per function, stage and part of the data: a measurement with the seed that generated the
data must not sample the same latent values again.
"""

from __future__ import annotations

__all__ = ["derived_seed", "forked_rng", "private_randomness", "stream"]

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng() -> Iterator[None]:
    """Restore the user's random stream afterwards, on the CPU and on every CUDA device in use."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def derived_seed(seed: int, *of: str | int) -> int:
    """The seed of one of the streams of a seed: equal for the same function, stage and part.

    Args:
        seed: the user's seed.
        of: the user of the stream: the function, then its stage or the first row of the part of the data, if any.

    Returns:
        An integer of 32 bits (a CPU's generator reads no more), different from small seeds except by a chance of 2^-32.

    Example:
        >>> derived_seed(0, "evaluate") == derived_seed(0, "evaluate"), derived_seed(0, "evaluate") == 0
        (True, False)
        >>> len({derived_seed(s, name, row) for s in range(3) for name in ("evaluate", "ais") for row in (0, 64)})
        12
    """
    digest = hashlib.blake2b("/".join(map(str, (int(seed), *of))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def private_randomness(seed: int | None, *of: str) -> Iterator[None]:
    """With a seed: its random stream, or the :func:`derived_seed` stream if names are given; without: the user's."""
    if seed is None:
        yield
        return
    with forked_rng():
        torch.manual_seed(derived_seed(seed, *of) if of else seed)
        yield


def stream() -> Callable[[], None]:
    """A function that restores the user's random stream as it is now, on the CPU and on the CUDA devices in use."""
    state = torch.get_rng_state()
    others = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def back() -> None:
        torch.set_rng_state(state)
        if others:
            torch.cuda.set_rng_state_all(others)

    return back
