"""What measurements and training do with their arguments first: data as tensors, modes, device, random stream."""

from __future__ import annotations

__all__ = ["Data", "Transform", "as_tensors", "measuring", "per_datum"]

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .weights import Program, check_pair

Data = Tensor | tuple[Tensor, ...]
Transform = Callable[[Tensor], Tensor]


def as_tensors(data: Data) -> tuple[Tensor, ...]:
    """Data as a tuple of tensors that agree in their first dimension, which is not zero."""
    tensors = data if isinstance(data, tuple) else (data,)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"data is a tensor or a tuple of tensors, but got {type(x).__name__}; use torch.as_tensor")
    if len({len(x) for x in tensors}) != 1 or not len(tensors[0]):
        shapes = [list(x.shape) for x in tensors]
        raise ValueError(f"data need one first dimension N of at least 1, but got tensors of shape {shapes}")
    return tensors


def per_datum(model: Program, guide: Program, data: tuple[Tensor, ...]) -> bool:
    """Whether the pair's weights are per datum (else they are joint), from its layout on a few data."""
    n = len(data[0])
    sizes = check_pair(model, guide, *data if n < 3 else (x[:3] for x in data)).sizes
    if sizes and sizes != (min(n, 3),):
        raise ValueError(
            f"the plates around every site have sizes {sizes}, but the model was given {min(n, 3)} data: measure the "
            "model without subsampling, in one plate over its data"
        )
    return bool(sizes)


@contextmanager
def measuring(
    model: Program, guide: Program, *, seed: int | None = None, device: torch.device | str | None = None
) -> Iterator[None]:
    """No gradient, evaluation mode (restored), the device asked for, and a random stream of its own if seeded."""
    modules = [half for half in (model, guide) if isinstance(half, nn.Module)]
    with torch.no_grad(), ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        for module in modules:
            if device is not None:
                module.to(device)
            stack.callback(module.train, module.training)
            module.eval()
        yield
