"""What measurements and training do with their arguments first: data as tensors, layout, modes, device, randomness."""

from __future__ import annotations

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "Device",
    "Transform",
    "as_tensors",
    "buffers_kept",
    "expect_rows",
    "in_cache",
    "modes_kept",
    "placed",
    "plan",
    "running",
]

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .layout import Layout
from .parameters import owners_of
from .randomness import private_randomness
from .weights import Program, check_pair

Data = Tensor | tuple[Tensor, ...]
Batch = tuple[Tensor, ...]
Device = torch.device | str | None
Transform = Callable[[Tensor], Tensor]

_CACHE = 2**23  # bytes: measured to be near the best for decoders of 64 to 784 features


def as_tensors(data: Data) -> tuple[Tensor, ...]:
    """Data as a tuple of tensors that agree in their first dimension, which is not zero."""
    tensors = data if isinstance(data, tuple) else (data,)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"data is a tensor or a tuple of tensors, but got {type(x).__name__}; use torch.as_tensor, or tuple"
            )
    shapes = [list(x.shape) for x in tensors]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
        raise ValueError(f"data need one first dimension N of at least 1, but got tensors of shape {shapes}")
    return tensors


def placed(tensors: Iterable[Tensor], device: Device, transform: Transform | None) -> tuple[Tensor, ...]:
    """Tensors on their device, the first of them transformed."""
    first, *others = (x.to(device or x.device) for x in tensors)
    return (first if transform is None else transform(first), *others)


class Batches(NamedTuple):
    """Data, how many rows a batch takes, where it goes, and what happens to its first tensor."""

    tensors: tuple[Tensor, ...]
    size: int
    device: Device
    transform: Transform | None

    @property
    def n(self) -> int:
        """The number of data."""
        return len(self.tensors[0])

    @property
    def where(self) -> torch.device:
        """The device that batches are on."""
        return torch.device(self.device) if self.device is not None else self.tensors[0].device

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batch of these rows."""
        return placed((x.index_select(0, rows.to(x.device)) for x in self.tensors), self.device, self.transform)

    def first(self) -> tuple[Tensor, ...]:
        """The batch of the first rows."""
        return self.take(torch.arange(min(self.size, self.n)))

    def shuffled(self) -> tuple[Tensor, ...]:
        """Rows of shuffled batches; all in their own order if they fit one, as guides with a value per datum need."""
        return torch.randperm(self.n).split(self.size) if self.size < self.n else (torch.arange(self.n),)


def in_cache(tensors: tuple[Tensor, ...]) -> int:
    """How many (datum, particle) pairs to run at once: so many that a value for each feature stays in cache."""
    size = max(x[0].numel() for x in tensors) * tensors[0].element_size()  # bytes
    return max(256, min(8192, _CACHE // max(1, size)))


def plan(model: Program, guide: Program, data: tuple[Tensor, ...], rows: int) -> tuple[bool, int]:
    """Whether a pair's weights are per datum, and how many rows to run at once: at most ``rows``, or all N.

    All at once go joint weights, and guides that hold a value for each datum (AutoGuides; any that fits only all N).
    """
    n = len(data[0])
    rows = n if isinstance(guide, AutoGuide) else min(rows, n)
    try:
        layout = check_pair(model, guide, *(x[:rows] for x in data))
    except (RuntimeError, ValueError):
        if rows == n:
            raise
        rows = n
        layout = check_pair(model, guide, *data)
    if layout.points:
        raise ValueError(
            f"the guide is a point estimate at {list(layout.points)} (Delta): it has no density, so there is neither "
            "an ELBO nor an estimate of log p(x); measure a guide with a density"
        )
    if not layout.sizes:
        return False, n
    expect_rows(layout, rows)
    return True, rows


def expect_rows(layout: Layout, rows: int) -> None:
    """Raise ValueError unless the weights of a batch are one for each of its rows."""
    if layout.sizes != (rows,):
        raise ValueError(
            f"the plates around every site have sizes {layout.sizes}, but the model was given {rows} data: measure "
            "a model that has one plate over its data around every site, and does not subsample"
        )


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
def running(model: Program, guide: Program, *, seed: int | None = None, device: Device = None) -> Iterator[None]:
    """Measure: no gradient, evaluation mode (kept from the user's), the device asked for, a random stream if seeded."""
    modules = owners_of(model, guide)
    with torch.no_grad(), modes_kept(modules), private_randomness(seed):
        for module in modules:
            if device is not None:
                module.to(device)
            module.eval()
        yield
