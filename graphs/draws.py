"""Log weights of one pair, many times over: captured and compiled where that pays."""

from __future__ import annotations

__all__ = ["LogWeights"]

from functools import cached_property

from torch import Tensor

from jensen.kernel.batches import Batch, rows_of
from jensen.kernel.parameters import tensors_of
from jensen.kernel.weights import Program, log_weights, terms

from .capture import Outputs
from .compile import Compile
from .routes import Routes, weights_of

_LEAST = 1000  # calls


class LogWeights:
    """``log_weights`` of a pair whose parameters stay as they are, as a function of data and K.

    What does not depend on the draws (the encoder) is worked out once for a batch of data.

    Args:
        model: the model.
        guide: its guide.
        nesting: how deep the pair's plates are nested.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.evaluate`.
        observed: whether log p(x | z) of the same draws is wanted too.
    """

    def __init__(self, model: Program, guide: Program, nesting: int, mode: Compile, observed: bool = False) -> None:
        self.model, self.guide, self.nesting, self.observed = model, guide, nesting, observed
        self.weights = weights_of(model)
        self.routes = Routes(mode, _LEAST, "this pair is not compiled; its draws are", split=True)

    @cached_property
    def held(self) -> list[Tensor]:
        """The parameters and buffers of the pair, which an AutoGuide makes at its first call."""
        return tensors_of(self.model, self.guide)

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
        return self.parts(batch, particles, ahead)[0]

    def parts(self, batch: Batch, particles: int, ahead: int | None = None) -> Outputs:
        """Log weights and, where ``observed`` asks for it, log p(x | z) of the same draws: each [K, N]."""

        def eager(*data: Tensor) -> Outputs:
            if self.observed:
                t = terms(self.model, self.guide, *data, particles=particles, max_plate_nesting=self.nesting)
                return t.log_weights, t.observed
            return (log_weights(self.model, self.guide, *data, particles=particles, max_plate_nesting=self.nesting),)

        operations = 2 * self.weights * particles * rows_of(batch)
        return self.routes(eager, self.held, batch, operations, ahead=ahead, key=particles)(*batch)

    def forget(self) -> None:
        """Forget what was worked out for a batch: parameters have changed."""
        self.routes.forget()
