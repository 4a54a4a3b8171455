"""Log weights of one pair, many times over: captured and compiled where that pays.

A graph is made for each number of data and particles. What does not depend on the draws (the encoder) is worked out
once for a batch of data.
"""

from __future__ import annotations

__all__ = ["LogWeights"]

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from jensen.kernel.batches import Batch
from jensen.kernel.parameters import owners_of, tensors_of
from jensen.kernel.weights import Program, log_weights, terms

from .capture import CannotCapture, Outputs, agrees, capture, split_draws
from .compile import CannotCompile, Compile, compiled, price

_WORTH_COMPILING = 20.0  # seconds of eager work ahead, by a rough estimate
_WORTH_CAPTURE = 3.0
_HANDLERS = 3e-3  # seconds of a call that Pyro's handlers take
_PER_SECOND = 1e10  # products and sums, with the elementwise work around them


class LogWeights:
    """``log_weights`` of a pair whose parameters stay as they are, as a function of data and K.

    Args:
        model: the model.
        guide: its guide.
        nesting: how deep the pair's plates are nested.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.evaluate`.
        observed: whether log p(x | z) of the same draws is wanted too.

    Attributes:
        route: how batches of the first size are run: ``"captured and compiled"``, ``"captured"``, ``"eager: ..."``.
    """

    def __init__(self, model: Program, guide: Program, nesting: int, mode: Compile, observed: bool = False) -> None:
        self.model, self.guide, self.nesting, self.mode = model, guide, nesting, mode
        self.observed = observed
        self.route = "eager"
        owned = {p for owner in owners_of(model) for p in owner.parameters() if p.dim() > 1}
        self.weights: int = sum(p.numel() for p in owned)
        self._sizes: dict[Any, _Size] = {}

    def __call__(self, batch: Batch, particles: int, ahead: int | None = None) -> Tensor:
        """Log weights [K, N] ([K] where joint) of fresh draws.

        Args:
            batch: the data; what does not depend on the draws is kept as long as the same tensors come.
            particles: K.
            ahead: how many calls with so many data and particles are to come; None: as many as there were.
        """
        return self.parts(batch, particles, ahead)[0]

    def parts(self, batch: Batch, particles: int, ahead: int | None = None) -> Outputs:
        """Log weights and, where ``observed`` asks for it, log p(x | z) of the same draws: each [K, N]."""
        key = (particles, *((x.shape, x.dtype) for x in batch))
        if key not in self._sizes:
            self._sizes[key] = _Size(self, particles, first=not self._sizes)
        return self._sizes[key](batch, ahead)

    def forget(self) -> None:
        """Forget what was worked out for a batch: parameters have changed."""
        for size in self._sizes.values():
            size.known = None


class _Size:
    """Batches of one size: eager calls, until it pays to do better."""

    def __init__(self, owner: LogWeights, particles: int, first: bool) -> None:
        self.owner, self.particles, self.first = owner, particles, first
        self.calls = 0
        self.decided = owner.mode is False
        self.draw: Callable[[Batch], Outputs] = self._eager
        self.known: tuple[Batch, Outputs] | None = None

    def __call__(self, batch: Batch, ahead: int | None) -> Outputs:
        if not self.decided:
            self._decide(batch, ahead)
        self.calls += 1
        return self.draw(batch)

    def _eager(self, batch: Batch) -> Outputs:
        o = self.owner
        if o.observed:
            t = terms(o.model, o.guide, *batch, particles=self.particles, max_plate_nesting=o.nesting)
            return t.log_weights, t.observed
        return (log_weights(o.model, o.guide, *batch, particles=self.particles, max_plate_nesting=o.nesting),)

    def _decide(self, batch: Batch, ahead: int | None) -> None:
        seconds, capturing = self._worth(batch, ahead)
        if not capturing:
            return
        self.decided = True
        try:
            self.draw, compiling = self._captured(batch, seconds)
            route = "captured and compiled" if compiling else "captured: compiling would not pay"
        except CannotCompile as error:
            self.draw, route = self._captured(batch, 0.0)[0], f"captured: {error}"
        except CannotCapture as error:
            route = f"eager: {error}"
        if self.first:
            self.owner.route = route
            if self.owner.mode is True and not route.endswith("compiled"):
                warnings.warn(f"this pair is not compiled; its draws are {route}", stacklevel=6)

    def _worth(self, batch: Batch, ahead: int | None) -> tuple[float, bool]:
        """The seconds of eager work ahead, roughly, and whether capturing pays.

        They are not measured, so that a seed repeats every digit.
        """
        if self.owner.mode is True:
            return math.inf if self.first else 0.0, True
        handlers = _HANDLERS * (self.calls if ahead is None else ahead)
        products = 2 * self.owner.weights * self.particles * len(batch[0])
        arithmetic = handlers / _HANDLERS * products / _PER_SECOND
        seconds = handlers + arithmetic
        return seconds, seconds > _WORTH_COMPILING or (handlers > _WORTH_CAPTURE and arithmetic < 4 * handlers)

    def _captured(self, batch: Batch, seconds: float) -> tuple[Callable[[Batch], Outputs], bool]:
        """Draws from a graph, compiled where that pays for so many seconds of work; and whether it is."""
        held = tensors_of(self.owner.model, self.owner.guide)
        graph = capture(lambda *flat: self._eager(flat[len(held) :]), *held, *batch)
        once, again = split_draws(graph)
        compiling = seconds > 2 * price(again)

        def draw(batch: Batch) -> Outputs:
            inputs = (*held, *batch, *graph.constants)
            if self.known is None or any(a is not b for a, b in zip(self.known[0], batch, strict=True)):
                self.known = batch, once(*inputs)
            return fast(*inputs, *self.known[1])

        other = tuple(x.flip(0) for x in batch)
        fast: Callable[..., Outputs] = again
        try:
            if not agrees(lambda: self._eager(other), lambda: draw(other)):
                raise CannotCapture("the captured graph gives other numbers than the pair itself")
            if compiling:
                inputs = (*held, *batch, *graph.constants)
                fast = compiled(again, *inputs, *once(*inputs))
                if not agrees(lambda: self._eager(other), lambda: draw(other)):
                    raise CannotCompile("the compiled graph gives other numbers than the pair itself")
        finally:
            self.known = None
        return draw, compiling
