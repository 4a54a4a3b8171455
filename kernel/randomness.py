"""The random stream in use: the user's stream, or a private one that leaves the user's unchanged.

A seed names many streams, one per function, stage and part of the data: a measurement with the seed that generated the
data must not sample the same latent values again.
"""

from __future__ import annotations

__all__ = [
    "accelerator_states",
    "derived_seed",
    "forked_rng",
    "private_randomness",
    "set_accelerator_states",
    "stream",
]

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def forked_rng() -> Iterator[None]:
    """Restore the user's random stream afterwards, on the CPU and on the accelerators in use."""
    back = stream()
    try:
        yield
    finally:
        back()


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
    """A function that restores the user's random stream as it is now, on the CPU and on the accelerators in use."""
    state, others = torch.get_rng_state(), accelerator_states()

    def back() -> None:
        torch.set_rng_state(state)
        set_accelerator_states(others)

    return back


def accelerator_states() -> list[Tensor]:
    """The state of the random stream of each accelerator (a GPU), in their order; none if no accelerator is in use."""
    module = _accelerator()
    return [] if module is None else list(module.get_rng_state_all())


def set_accelerator_states(states: list[Tensor]) -> None:
    """Set the random streams of the accelerators, as far as there are that many."""
    module = _accelerator() if states else None
    if module is not None:
        module.set_rng_state_all(states[: module.device_count()])


def _accelerator() -> Any:
    """The functions of PyTorch for the kind of accelerator in use, such as ``torch.cuda``; None if none is in use."""
    device = torch.accelerator.current_accelerator()  # the kind that PyTorch was built for
    if device is None or device.type == "mps":  # which has no numbered devices
        return None
    module: Any = torch.get_device_module(device)
    return module if module.is_initialized() else None
