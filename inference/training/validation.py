"""The validation pass of :func:`~jensen.inference.fit`: the ELBO of held-out data, and its two parts."""

from __future__ import annotations

__all__ = ["Validation"]

import torch
from torch import Tensor

from jensen import processes
from jensen.graphs.compile import Compile
from jensen.graphs.draws import LogWeights
from jensen.kernel.batches import Batches, data_in_epoch, nested
from jensen.kernel.looks import look_at
from jensen.kernel.modes import running
from jensen.kernel.randomness import derived_seed, forked_rng
from jensen.kernel.weights import Pair, Program, check_pair

from .history import History

_PARTICLES = 8


class Validation:
    """The ELBO per data point, from 8 particles that are equal at every call; joint weights use all data at once.

    Args:
        model: the model.
        guide: its guide.
        data: the held-out data, all of which are checked.
        max_plate_nesting: as for :func:`~jensen.inference.fit`.
        mode: the setting ``compile`` of :func:`~jensen.inference.fit`.
        epochs: the number of future calls.

    Raises:
        ValueError: for data on which model and guide do not run in evaluation mode.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Batches,
        max_plate_nesting: int | None,
        mode: Compile,
        epochs: int,
    ) -> None:
        self.data = data
        with running(model, guide, device=data.device), forked_rng():
            layout = nested(look_at(model, guide, data.first()), max_plate_nesting)
            self.rows = data.size if layout.sizes else data.n
            if data.source is not None and not layout.sizes:
                raise ValueError(
                    "the validation ELBO of joint weights needs all data at once, but they are read by the batch: give "
                    "tensors"
                )
            for batch in data.in_order(self.rows):  # the only look at data in memory
                check_pair(model, guide, *batch)
            spoken_of, full = data_in_epoch(model, guide, data._replace(size=self.rows))
            self.count = spoken_of if layout.sizes else full  # joint weights scale a subsample up
        self.split = bool(layout.sizes) and not (layout.points or layout.enumerated)
        self.weights = LogWeights(Pair(model, guide, layout), mode, observed=self.split)
        self.ahead = epochs * -(-data.n // data.size)

    def __call__(self, history: History) -> Tensor | None:
        """Add the ELBO of the data to a history; and its rate and distortion, if weights are per data point.

        Returns:
            The ELBO of each data point [N], if weights are per data point.
        """
        weights, data = self.weights, self.data
        parts = -(-data.n // self.rows)
        own = processes.own_share(parts)
        sums: list[tuple[float, float, Tensor | None]] = []
        weights.forget()
        with running(weights.pair.model, weights.pair.guide, "validation", seed=0, device=data.device):
            batches = data.in_order(self.rows, own.start * self.rows, min(data.n, own.stop * self.rows))
            for part in own:
                first = part * self.rows
                torch.manual_seed(derived_seed(0, "validation", "data", first))  # of transforms, and of loaders
                batch = next(batches)
                torch.manual_seed(derived_seed(0, "validation", first))
                if weights.pair.way_for(batch, _PARTICLES) is None:  # find the final route first, so that the numbers
                    with forked_rng():  # of a resumed run equal those of an uninterrupted one
                        weights.parts(batch, _PARTICLES, self.ahead)
                drawn = weights.parts(batch, _PARTICLES, self.ahead)
                observed = 0.0 if drawn.observed is None else float(drawn.observed.mean(0).sum())
                each = drawn.elbo.mean(0)
                sums.append((float(each.sum()), observed, each.cpu() if self.split else None))
        elbos, distortions, rows = zip(*processes.in_order(sums, parts), strict=True)
        elbo, observed = sum(elbos), sum(distortions)
        history.validation.append(elbo / self.count)
        if self.split:
            history.distortion.append(-observed / self.count)
            history.rate.append(-history.validation[-1] - history.distortion[-1])
        return torch.cat(rows) if self.split else None
