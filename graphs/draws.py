"""Log weights of one pair, many times over: captured and compiled where that pays."""

from __future__ import annotations

__all__ = ["Draws", "LogWeights"]

from typing import NamedTuple

import torch
from torch import Tensor

from jensen.kernel.batches import Batch, rows_of
from jensen.kernel.lifts import LOOP
from jensen.kernel.parameters import tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.weights import Pair

from .capture import Outputs
from .compile import Compile
from .routes import Routes, weights_of

_LEAST = 1000  # calls


class Draws(NamedTuple):
    """What is drawn of a batch: [K, N] each ([K] where joint).

    Attributes:
        log_weights: log w.
        elbo: what averages to the ELBO: log w, but where the guide enumerates states.
        observed: log p(x | z), where it is asked for.
    """

    log_weights: Tensor
    elbo: Tensor
    observed: Tensor | None


class LogWeights:
    """``log_weights`` of a pair whose parameters stay as they are, as a function of data and K.

    What does not depend on the draws (the encoder) is worked out once for a batch of data.

    Args:
        pair: the pair.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.evaluate`.
        observed: whether log p(x | z) of the same draws is wanted too.
    """

    def __init__(self, pair: Pair, mode: Compile, observed: bool = False) -> None:
        self.pair, self.observed = pair, observed
        self.weights = weights_of(pair.model)
        self.state = PlainState(pair.model, pair.guide)
        self.routes = Routes(mode, _LEAST, "this pair is not compiled; its draws are", split=True)

    @property
    def held(self) -> list[Tensor]:
        """The parameters and buffers of the pair, which an AutoGuide makes at its first call."""
        return tensors_of(self.pair.model, self.pair.guide)

    @property
    def route(self) -> str:
        """How batches of the first size are run: ``"captured and compiled"``, ``"captured: ..."``, ``"eager: ..."``."""
        return self.routes.sentence

    def __call__(self, batch: Batch, particles: int, ahead: int | None = None) -> Tensor:
        """Log weights [K, N] ([K] where joint) of fresh draws.

        Args:
            batch: the data; what does not depend on the draws is kept as long as the same tensors come.
            particles: K.
            ahead: how many calls with so many data and particles are to come; None: as many as there were.
        """
        return self.parts(batch, particles, ahead).log_weights

    def parts(self, batch: Batch, particles: int, ahead: int | None = None) -> Draws:
        """Log weights, what averages to the ELBO, and, where ``observed`` asks for it, log p(x | z), of fresh draws."""
        out = self._parts(batch, particles, ahead)
        return Draws(out[0], out[1] if self.pair.elbo_differs else out[0], out[-1] if self.observed else None)

    def _parts(self, batch: Batch, particles: int, ahead: int | None) -> Outputs:

        def eager(*data: Tensor) -> Outputs:
            return self._of(data, particles)

        def one(*data: Tensor) -> Outputs:
            return self._of(data, 1)

        first, state = None, self.state
        if self.pair.way_for(batch, particles) is None:
            first = self._of(batch, particles)  # which finds the way
        operations = 2 * self.weights * particles * rows_of(batch)
        if self.pair.way_for(batch, particles) == LOOP:  # the graph of one particle, again and again
            if first is not None:
                return first
            again = None if ahead is None else ahead * particles
            run = self.routes(
                one, self.held, batch, operations / particles, ahead=again, calls=particles, key=1, state=state
            )
            return tuple(map(torch.cat, zip(*(run(*batch) for _ in range(particles)), strict=True)))
        run = self.routes(eager, self.held, batch, operations, ahead=ahead, key=particles, state=state)
        return run(*batch) if first is None else first

    def _of(self, data: Batch, particles: int) -> Outputs:
        self.pair.prepare(data)
        if not (self.observed or self.pair.elbo_differs):
            return (self.pair.log_weights(data, particles),)
        t = self.pair.terms(data, particles)
        elbo = [t.elbo] if self.pair.elbo_differs else []
        return (t.log_weights, *elbo, *([t.observed] if self.observed else []))

    def forget(self) -> None:
        """Forget what was worked out for a batch: parameters have changed."""
        self.routes.forget()
