r"""Several processes that take the steps of one run: each computes a part of the loss, and all take the same step.

.. math:: \nabla L(x_{1..B}) = \sum_r \nabla L(x_{\text{rows of process } r})

where the loss is a sum over the data points of a batch, so that a step is that of one process. A loss that is scaled
like an average (``pyro.plate("data", N, subsample_size=len(x))``) is averaged with the numbers of rows as weights.
Other losses (a global latent, a guide with a value per data point, free bits, batch normalisation) do not divide, as
:mod:`~jensen.inference.training.division` finds out: then each process takes the whole batch with its own noise, and
gradients are averaged.

The gradients of a step are summed as one flat tensor, between the graph that computes them and the update.
"""

from __future__ import annotations

__all__ = ["Shares", "shares_of"]

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from jensen import processes
from jensen.kernel.batches import Batches
from jensen.kernel.layout import Layout
from jensen.kernel.randomness import derived_seed
from jensen.sources import Order

from .checkpoint import Run
from .division import Kind, divided

_AGAIN = 2.0  # seconds: an interrupt that comes sooner after the first is the same one, which torchrun sends again


class Shares:
    """The share of this process in every batch, and the sum of all shares.

    Args:
        kind: ``"sum"``: each process takes a part of the rows of a batch, and their losses add up; ``"mean"``: they are
            averaged, weighted by their numbers of rows; ``"whole"``: each process takes all rows, and losses are
            averaged.
        reason: why batches are not divided; else empty.
        seed: of the order of the data, the same in all processes.
        agreed: how many parameters all processes train.
    """

    def __init__(self, kind: Kind, reason: str, seed: int, agreed: int) -> None:
        self.kind, self.reason, self.seed, self._agreed = kind, reason, seed, agreed
        self._interrupted = self._telling = self._summed = False
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

    def reduce(
        self,
        loss: Tensor,
        bound: Tensor,
        parameters: list[nn.Parameter],
        rows: int,
        names: Callable[[], list[str]],
    ) -> tuple[Tensor, Tensor, bool]:
        """Loss and bound of the step, and in the parameters its gradients, from those of all processes.

        Args:
            loss: of this process.
            bound: of this process.
            parameters: those trained; the gradient of some may be None.
            rows: of this process in the batch.
            names: returns the names of the parameters.

        Returns:
            The loss, the bound, and whether these and the gradients are finite.

        Raises:
            ValueError: if parameters are new in some processes only.
        """
        known = parameters[: self._agreed]
        weight = {"sum": 1.0, "mean": float(rows), "whole": 1.0}[self.kind]
        dtype = torch.float64 if any(p.dtype in _LONG for p in known) else torch.float32
        place = known[0].device
        slopes = [p.grad for p in known]
        new = len(parameters) > len(known)
        facts = [weight, self._interrupted, self._error is not None, new, *(g is not None for g in slopes)]
        numbers = [loss.detach(), bound.detach()] if rows else [torch.zeros(()), torch.zeros(())]
        sizes = [1, 1, *(torch.view_as_real(p).numel() if p.is_complex() else p.numel() for p in known)]
        flat = torch.cat(
            [
                torch.tensor(facts, dtype=dtype, device=place),
                *(weight * x.to(place, dtype).reshape(1) for x in numbers),
                *(
                    torch.zeros(size, dtype=dtype, device=place) if g is None else weight * _real(g).to(place, dtype)
                    for size, g in zip(sizes[2:], slopes, strict=True)
                ),
            ]
        )
        self._telling = True
        processes.summed(flat)
        total, interrupted, failed, some_new, *seen = flat[: len(facts)].tolist()
        if failed:
            self._raise_all()
        if interrupted:
            raise KeyboardInterrupt
        if some_new:
            self._agree_on(parameters, names()[len(known) :])
            return self.reduce(loss, bound, parameters, rows, names)
        self._telling, self._summed = False, True
        rest = flat[len(facts) :]
        if self.kind != "sum":
            rest = rest / total
        loss, bound, *parts = rest.split(sizes)
        for p, g, some in zip(known, parts, seen, strict=True):
            g = torch.view_as_complex(g.reshape(*p.shape, 2)) if p.is_complex() else g.view(p.shape)
            p.grad = g.to(p.device, p.dtype) if some else None
        finite = math.isfinite(float(rest.sum())) or bool(rest.isfinite().all())  # the sum is faster, and may overflow
        return loss.reshape(()), bound.reshape(()), finite

    def _agree_on(self, parameters: list[nn.Parameter], names: list[str]) -> None:
        """Sum the gradients of new parameters as well, if all processes have the same ones."""
        found = processes.gathered((names, processes.facts_of(parameters[self._agreed :])))
        for i, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"the parameters that a step trains for the first time must be equal in all processes, but they "
                    f"are {found[0][0]} in process 0 and {other[0]} in process {i}"
                    + ", of other values" * (found[0][0] == other[0])
                    + ": create or unfreeze them in every process, before fit or in a callback"
                )
        self._agreed = len(parameters)

    def _raise_all(self) -> None:
        """Raise the error of this process, or one that names those of the others."""
        error = self._error
        if error is not None:
            raise error
        processes.gathered(None)

    @contextmanager
    def step(self, parameters: list[nn.Parameter], last: bool) -> Iterator[None]:
        """A step of this process; the others hear of its error when they sum gradients, and raise one as well.

        Args:
            parameters: those trained.
            last: whether no sum of gradients follows this step; then an error after its own is told later.
        """
        self._telling = self._summed = False
        try:
            yield
        except BaseException as error:
            if not (self._telling or processes.has_left() or (self._summed and last)):
                self._error = error
                for p in parameters:
                    p.grad = None
                self.reduce(torch.zeros(()), torch.zeros(()), parameters[: self._agreed], 0, list)
            raise

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block, Ctrl-C stops all processes at the same step; a second one stops this process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        first = 0.0

        def note(*_: Any) -> None:
            nonlocal first
            if not self._interrupted:
                self._interrupted, first = True, time.monotonic()
            elif time.monotonic() > first + _AGAIN:
                processes.leave()
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, note)
        try:
            processes.gathered(None)  # from here on, all processes stop at the same step
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self._interrupted:  # after the last step
            raise KeyboardInterrupt

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


_LONG = (torch.float64, torch.complex128)


def _real(g: Tensor) -> Tensor:
    """The numbers of a gradient in a row."""
    g = g.to_dense() if g.layout != torch.strided else g
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).flatten()


def shares_of(run: Run, objective: ELBO, layout: Layout, data: Batches, seed: int | None) -> Shares | None:
    """How the processes share the batches of the data; None for one process alone."""
    if processes.count() == 1 or seed is None:
        return None
    kind, reason = divided(run, objective, layout, data)
    found = processes.gathered((kind, reason))
    other = [reason for other, reason in found if other != kind and other == "whole"]
    if other and kind != "whole":
        kind, reason = "whole", other[0]
    return Shares(kind, reason, seed, len(run.trained))
