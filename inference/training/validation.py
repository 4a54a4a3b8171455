"""The validation pass of :func:`~jensen.inference.fit`: the bound of held-out data, and the two parts of their ELBO."""

from __future__ import annotations

__all__ = ["Validation"]

import torch
from pyro.infer import ELBO
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
from .objectives import Objective, power_mean

_PARTICLES = 8


class Validation:
    """The bound per data point, from particles that are equal at every call; joint weights use all data at once.

    It is the bound that the objective trains: the ELBO, from 8 particles, or a power mean of the weights of its K
    particles, the mean over as many groups of K as make 8.

    Args:
        model: the model.
        guide: its guide.
        objective: the objective of the training.
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
        objective: ELBO,
        data: Batches,
        max_plate_nesting: int | None,
        mode: Compile,
        epochs: int,
    ) -> None:
        self.data = data
        self.power = objective.power if isinstance(objective, Objective) else 0.0
        K = objective.num_particles if self.power else 1
        self.groups, self.particles = -(-_PARTICLES // K), -(-_PARTICLES // K) * K
        with running(model, guide, device=data.device), forked_rng():
            layout = nested(look_at(model, guide, data.first()), max_plate_nesting)
            self.rows = data.size if layout.sizes else data.n
            if data.source is not None and not layout.sizes:
                raise ValueError(
                    "the validation bound of joint weights needs all data at once, but they are read by the batch: "
                    "give tensors"
                )
            for batch in data.in_order(self.rows):  # the only look at data in memory
                check_pair(model, guide, *batch)
            spoken_of, full = data_in_epoch(model, guide, data._replace(size=self.rows))
            self.count = spoken_of if layout.sizes else full  # joint weights scale a subsample up
        self.split = bool(layout.sizes) and not (layout.points or layout.enumerated)
        self.weights = LogWeights(Pair(model, guide, layout), mode, observed=self.split)
        self.ahead = epochs * -(-data.n // data.size)

    def __call__(self, history: History) -> Tensor | None:
        """Add the bound of the data to a history; and rate and distortion, if weights are per data point.

        Returns:
            The bound of each data point [N], if weights are per data point.
        """
        weights, data = self.weights, self.data
        parts = -(-data.n // self.rows)
        own = processes.own_share(parts)
        sums: list[tuple[float, float, float, Tensor | None]] = []
        weights.forget()
        with running(weights.pair.model, weights.pair.guide, "validation", seed=0, device=data.device):
            batches = data.in_order(self.rows, own.start * self.rows, min(data.n, own.stop * self.rows))
            for part in own:
                first = part * self.rows
                torch.manual_seed(derived_seed(0, "validation", "data", first))  # of transforms, and of loaders
                batch = next(batches)
                torch.manual_seed(derived_seed(0, "validation", first))
                if weights.pair.way_for(batch, self.particles) is None:
                    with forked_rng():  # find the final route first: so a resumed run equals an uninterrupted one
                        weights.parts(batch, self.particles, self.ahead)
                drawn = weights.parts(batch, self.particles, self.ahead)
                observed = 0.0 if drawn.observed is None else float(drawn.observed.mean(0).sum())
                elbo = float(drawn.elbo.mean(0).sum())
                groups = (drawn.log_weights if self.power else drawn.elbo).unflatten(0, (self.groups, -1))
                each = power_mean(groups.movedim(1, 0), self.power).mean(0)
                sums.append((float(each.sum()), elbo, observed, each.cpu() if self.split else None))
        bounds, elbos, distortions, rows = zip(*processes.in_order(sums, parts), strict=True)
        history.validation.append(sum(bounds) / self.count)
        if self.split:
            history.distortion.append(-sum(distortions) / self.count)
            history.rate.append((sum(distortions) - sum(elbos)) / self.count)
        return torch.cat(rows) if self.split else None
