"""The validation pass of :func:`~jensen.inference.fit`: the ELBO of held-out data, and its two parts."""

from __future__ import annotations

__all__ = ["Validation"]

import torch

from jensen.graphs.compile import Compile
from jensen.graphs.draws import LogWeights
from jensen.kernel.batches import Batches
from jensen.kernel.layout import Layout
from jensen.kernel.modes import running
from jensen.kernel.weights import Pair, Program

from .history import History

_PARTICLES = 8


class Validation:
    """The ELBO of data per datum, from 8 particles that are the same at every call; joint weights on all data at once.

    Args:
        model: the model.
        guide: its guide.
        data: the held-out data.
        layout: how the pair is laid out on them.
        mode: the setting ``compile`` of :func:`~jensen.inference.fit`.
        epochs: how many calls are to come.
    """

    def __init__(
        self, model: Program, guide: Program, data: Batches, layout: Layout, mode: Compile, epochs: int
    ) -> None:
        self.data, self.layout = data, layout
        self.rows = data.size if layout.sizes else data.n
        self.split = bool(layout.sizes) and not (layout.points or layout.enumerated)
        self.weights = LogWeights(Pair(model, guide, layout.nesting), mode, observed=self.split)
        self.ahead = epochs * -(-data.n // data.size)

    def __call__(self, history: History) -> None:
        """Add the ELBO of the data to a history; and its rate and distortion, where weights are per datum."""
        weights, data = self.weights, self.data
        elbo = observed = 0.0
        weights.forget()
        with running(weights.pair.model, weights.pair.guide, seed=0, device=data.device):
            for rows in torch.arange(data.n).split(self.rows):
                drawn = weights.parts(data.take(rows), _PARTICLES, self.ahead)
                elbo += float(drawn.elbo.mean(0).sum())
                observed += 0.0 if drawn.observed is None else float(drawn.observed.mean(0).sum())
        full_size = self.layout.full_size
        n = data.n if self.layout.sizes or full_size is None else full_size
        history.validation.append(elbo / n)
        if self.split:
            history.distortion.append(-observed / n)
            history.rate.append(-history.validation[-1] - history.distortion[-1])
