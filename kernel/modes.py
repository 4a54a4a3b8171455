"""The state that a pair is run in, and given back: modes, buffers, gradient, device, random stream."""

from __future__ import annotations

__all__ = ["buffers_kept", "modes_kept", "running"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .parameters import owners_of
from .randomness import private_randomness
from .weights import Program


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put every submodule back into the mode, training or evaluation, that it was in."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


@contextmanager
def buffers_kept(*programs: Program) -> Iterator[None]:
    """Put back the buffers (running means, say) that looking at programs moves."""
    buffers = [buffer for owner in owners_of(*programs) for buffer in owner.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@contextmanager
def running(
    model: Program, guide: Program, *, seed: int | None = None, device: torch.device | str | None = None
) -> Iterator[None]:
    """Measure: no gradient, evaluation mode (kept from the user's), the given device, a random stream if seeded."""
    modules = owners_of(model, guide)
    with torch.no_grad(), modes_kept(modules), private_randomness(seed):
        for module in modules:
            if device is not None:
                module.to(device)
            module.eval()
        yield
