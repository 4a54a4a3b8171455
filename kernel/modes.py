"""The state that a pair is run in, and given back: modes, buffers, gradient, device, random stream."""

from __future__ import annotations

__all__ = ["buffers_kept", "modes_kept", "running", "tensors_kept"]

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .parameters import owners_of
from .randomness import private_randomness
from .sites import Program


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
def tensors_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the values of tensors that are written to inside the block; the others are not touched."""
    kept = list(tensors)
    before = [tensor.clone() for tensor in kept]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def buffers_kept(*programs: Program) -> AbstractContextManager[None]:
    """Put back the buffers (running means, say) that looking at programs moves."""
    return tensors_kept(buffer for owner in owners_of(*programs) for buffer in owner.buffers())


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
