r"""Several processes that take the steps of one run: each computes a part of the loss, and all take the same step.

.. math:: \nabla L(x_{1..B}) = \sum_r \nabla L(x_{\text{rows of process } r})

where the loss is a sum over the data points of a batch, so that a step is that of one process. A loss that is scaled
like an average (``pyro.plate("data", N, subsample_size=len(x))``) is averaged with the numbers of rows as weights.
Other losses (a global latent, a guide with a value per data point, free bits, batch normalisation) do not divide:
then each process takes the whole batch with its own noise, and gradients are averaged.

The gradients of a step are summed as one flat tensor, between the graph that computes them and the update.
"""

from __future__ import annotations

__all__ = ["Shares", "shares_of"]

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.infer import ELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from jensen import processes
from jensen.kernel.batches import Batches
from jensen.kernel.layout import Layout
from jensen.kernel.looks import layout_on
from jensen.kernel.modes import buffers_kept
from jensen.kernel.parameters import is_autoguide, owners_of
from jensen.kernel.randomness import derived_seed, forked_rng
from jensen.kernel.sites import sites_of
from jensen.kernel.weights import Program, trace_pair
from jensen.sources import Order

from .objectives import Objective

_SUMS = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, ReweightedWakeSleep)  # over the data, by their definition


class Shares:
    """The share of this process in every batch, and the sum of all shares.

    Args:
        kind: ``"sum"``: each process takes a part of the rows of a batch, and their losses add up; ``"mean"``: they are
            averaged, weighted by their numbers of rows; ``"whole"``: each process takes all rows, and losses are
            averaged.
        reason: why batches are not divided; else empty.
        seed: of the order of the data, the same in all processes.
    """

    def __init__(self, kind: Literal["sum", "mean", "whole"], reason: str, seed: int) -> None:
        self.kind, self.reason, self.seed = kind, reason, seed
        self._interrupted = self._telling = False
        self._error: BaseException | None = None

    @property
    def sentence(self) -> str:
        """How the processes share the batches."""
        each = "each with a share of every batch" if self.kind != "whole" else f"each on whole batches: {self.reason}"
        return f"{processes.count()} processes, {each}"

    def order(self, epoch: int) -> Order:
        """The order of an epoch and the share of this process; a batch may leave some process without rows."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        return Order(generator) if self.kind == "whole" else Order(generator, processes.rank(), processes.count())

    def reduce(self, loss: Tensor, bound: Tensor, parameters: list[nn.Parameter], rows: int) -> tuple[Tensor, Tensor]:
        """Loss and bound of the step, and in the parameters its gradients, from those of all processes.

        Args:
            loss: of this process.
            bound: of this process.
            parameters: those trained; the gradient of some may be None.
            rows: of this process in the batch.
        """
        weight = {"sum": 1.0, "mean": float(rows), "whole": 1.0}[self.kind]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        place = parameters[0].device
        slopes = [p.grad for p in parameters]
        facts = [weight, self._interrupted, self._error is not None, *(g is not None for g in slopes)]
        numbers = [loss.detach(), bound.detach()] if rows else [torch.zeros(()), torch.zeros(())]
        head = torch.tensor(facts, dtype=dtype, device=place)
        flat = torch.cat(
            [
                head,
                *(weight * x.to(place, dtype).reshape(1) for x in numbers),
                *(
                    torch.zeros(p.numel(), dtype=dtype, device=place) if g is None else weight * g.to(dtype).flatten()
                    for p, g in zip(parameters, slopes, strict=True)
                ),
            ]
        )
        self._telling = True
        processes.summed(flat)
        total, interrupted, failed, *seen = flat[: len(facts)].tolist()
        if failed:
            self._raise_all()
        if interrupted:
            raise KeyboardInterrupt
        self._telling = False
        rest = flat[len(facts) :]
        if self.kind != "sum":
            rest = rest / total
        sizes = [1, 1, *(p.numel() for p in parameters)]
        loss, bound, *parts = rest.split(sizes)
        for p, g, some in zip(parameters, parts, seen, strict=True):
            p.grad = g.view(p.shape).to(p.dtype) if some else None
        return loss.reshape(()), bound.reshape(())

    def _raise_all(self) -> None:
        """Raise the error of this process, or one that names those of the others."""
        error = self._error
        if error is not None:
            raise error
        processes.gathered(None)

    @contextmanager
    def step(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """A step of this process; the others hear of its error when they sum gradients, and raise one as well."""
        self._telling = False
        try:
            yield
        except BaseException as error:
            if not self._telling:
                self._error = error
                for p in parameters:
                    p.grad = None
                self.reduce(torch.zeros(()), torch.zeros(()), parameters, 0)
            raise

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block, Ctrl-C stops all processes at the same step; a second one stops this process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def agree(self, parameters: list[nn.Parameter]) -> None:
        """Raise an error if the processes were interrupted, or if their parameters are not equal after an epoch."""
        with torch.no_grad():
            mark = [float(p.detach().double().sum()) for p in parameters]
        found = processes.gathered((self._interrupted, mark))
        if any(interrupted for interrupted, _ in found):
            raise KeyboardInterrupt
        for i, (_, other) in enumerate(found):
            if repr(other) != repr(found[0][1]):
                raise RuntimeError(
                    f"the parameters of process {i} differ from those of process 0 after an epoch: something changes "
                    "them outside of the steps (a callback that acts in one process only?)"
                )


def shares_of(
    model: Program, guide: Program, data: Batches, layout: Layout, objective: ELBO, seed: int | None
) -> Shares | None:
    """How the processes share the batches of the data; None for one process alone."""
    if processes.count() == 1 or seed is None:
        return None
    kind, reason = _divided(model, guide, data, layout, objective)
    found = processes.gathered((kind, reason))
    whole = [reason for kind, reason in found if kind == "whole"]
    return Shares("whole", whole[0], seed) if whole else Shares(kind, "", seed)


def _divided(
    model: Program, guide: Program, data: Batches, layout: Layout, objective: ELBO
) -> tuple[Literal["sum", "mean", "whole"], str]:
    """Whether losses of parts of a batch are summed or averaged; else why batches are not divided."""
    n = data.known or data.size
    size, count = min(data.size, n), processes.count()
    if not data.tensors:
        return "whole", "the model holds its data"
    if not layout.sizes:
        return "whole", "a latent site is outside of the plate of the data"
    if type(objective) not in _SUMS and not (isinstance(objective, Objective) and not objective.coupled):
        return "whole", f"{type(objective).__name__} does not sum over the data points of a batch"
    if is_autoguide(guide):
        return "whole", f"{type(guide).__name__} holds a value for each data point"
    if any(isinstance(part, _NormBase) for owner in owners_of(model, guide) for part in owner.modules()):
        return "whole", "batch normalisation couples the data points of a batch"
    parts = {some for rows in (size, n % size) for some in (rows // count, -(-rows // count))} - {0}
    whole = _scales(model, guide, data, size)
    kinds: set[str] = set()
    for rows in parts - {size}:
        found = layout_on(model, guide, data.head(rows), rows)
        if not isinstance(found, Layout) or found.sizes != (rows,):
            return "whole", f"model and guide do not run on {rows} of the {size} rows of a batch"
        some = _scales(model, guide, data, rows)
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(some, whole, strict=True)):
            kinds.add("sum")
        elif all(math.isclose(a * rows, b * size, rel_tol=1e-5) for a, b in zip(some, whole, strict=True)):
            kinds.add("mean")
        else:
            kinds.add("neither")
    if kinds <= {"sum"}:
        return "sum", ""
    if kinds == {"mean"}:
        return "mean", ""
    return "whole", "the scale of the loss does not follow the number of rows"


def _scales(model: Program, guide: Program, data: Batches, rows: int) -> list[float]:
    """The smallest and largest scale of the sites on a batch of this size, sorted by name."""
    with torch.no_grad(), forked_rng(), buffers_kept(model, guide):
        p, q = trace_pair(model, guide, data.head(rows))
    made: list[float] = []
    for site in sorted([*sites_of(p), *sites_of(q)], key=lambda site: str(site["name"])):
        scale = torch.as_tensor(site["scale"], dtype=torch.float64)
        made += [float(scale.min()), float(scale.max())]
    return made
