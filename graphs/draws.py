"""Log weights of one model and guide, computed many times: traced and compiled where that pays."""

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
    """The result for a batch: [K, N] each ([K] if joint).

    Attributes:
        log_weights: log w.
        elbo: the values that average to the ELBO: log w, unless the guide enumerates states.
        observed: log p(x | z), if requested.
    """

    log_weights: Tensor
    elbo: Tensor
    observed: Tensor | None


class LogWeights:
    """``log_weights`` of a model and guide with constant parameters, as a function of data and K.

    The part that does not depend on the samples (the encoder) is computed once per batch of data.

    Args:
        pair: model and guide.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.evaluate`.
        observed: whether to return log p(x | z) of the same samples, too.
    """

    def __init__(self, pair: Pair, mode: Compile, observed: bool = False) -> None:
        self.pair, self.observed = pair, observed
        self.weights = weights_of(pair.model)
        self.state = PlainState(pair.model, pair.guide)
        self.routes = Routes(mode, _LEAST, "model and guide are not compiled; they run", split=True)

    @property
    def held(self) -> list[Tensor]:
        """The parameters and buffers of model and guide; an AutoGuide makes them at its first call."""
        return tensors_of(self.pair.model, self.pair.guide)

    @property
    def route(self) -> str:
        """How batches of the first size are run: ``"traced and compiled"``, ``"traced: ..."``, ``"eager: ..."``."""
        return self.routes.sentence

    def __call__(self, batch: Batch, particles: int, ahead: int | None = None) -> Tensor:
        """Log weights [K, N] ([K] if joint) of fresh samples.

        Args:
            batch: the data; results that do not depend on the samples are reused while the same tensors are given.
            particles: K.
            ahead: how many calls with this many rows and particles will follow; None: as many as before.
        """
        return self.parts(batch, particles, ahead).log_weights

    def parts(self, batch: Batch, particles: int, ahead: int | None = None) -> Draws:
        """Log weights, the values that average to the ELBO, and, if ``observed``, log p(x | z), of fresh samples."""
        out = self._parts(batch, particles, ahead)
        return Draws(out[0], out[1] if self.pair.elbo_differs else out[0], out[-1] if self.observed else None)

    def _parts(self, batch: Batch, particles: int, ahead: int | None) -> Outputs:

        def eager(*data: Tensor) -> Outputs:
            return self._of(data, particles)

        def one(*data: Tensor) -> Outputs:
            return self._of(data, 1)

        first, state = None, self.state
        if self.pair.way_for(batch, particles) is None:
            first = self._of(batch, particles)  # this determines the method
        operations = 2 * self.weights * particles * rows_of(batch)
        if self.pair.way_for(batch, particles) == LOOP:  # repeat the graph of one particle
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
        """Forget the results computed for a batch, after parameters have changed."""
        self.routes.forget()
