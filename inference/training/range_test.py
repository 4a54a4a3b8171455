r"""The learning-rate range test: short training with a learning rate that grows from step to step.

.. math:: \eta_t = \eta_0 \, (\eta_1 / \eta_0)^{t / (T - 1)}, \qquad t = 0, \dots, T - 1

The loss stays where it is as long as the rate is too small, falls, and rises once the rate is too large.
"""

from __future__ import annotations

__all__ = ["LearningRates", "learning_rates"]

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from jensen import processes
from jensen.checked import checked
from jensen.kernel.arguments import Given, prepared
from jensen.kernel.batches import Batch, Batches, Device, Transform
from jensen.kernel.looks import look_at
from jensen.kernel.modes import buffers_kept, store_restored, tensors_kept
from jensen.kernel.parameters import owners_of, tensors_of
from jensen.kernel.randomness import derived_seed, forked_rng
from jensen.kernel.weights import Program
from jensen.missing import Missing
from jensen.progress import named
from jensen.results.records import Record
from jensen.results.tables import Table, decimals
from jensen.sources import Order, Some, Source

from .callbacks import Callback
from .fit import MakeOptimizer, fit
from .history import History
from .seconds import add_seconds

_LEAST = 10  # steps
_SHOWN = 10  # printed rates
_SHARE = 0.2  # of the rate at the minimum
_WIDTH = 0.02  # of the kernel, as a part of the sweep


@dataclass(frozen=True, eq=False, repr=False)
class LearningRates(Record):
    """The losses of a learning-rate range test; made by :func:`learning_rates`.

    Attributes:
        rates: the learning rate of each step, [T], growing.
        losses: minus the bound on the batch of each step, nats per data point, [T].
        steps: the number of steps that were asked for; T is smaller if training diverged.
        data: the number of data points of a batch; 1 if the bounds are those of all data.

    Example:
        >>> rates = torch.logspace(-4, 0, 41).double()
        >>> found = LearningRates(rates, (rates.log10() + 1.5).square(), steps=41, data=128)
        >>> print(round(found.suggestion, 4))
        0.0063
    """

    rates: Tensor
    losses: Tensor
    steps: int
    data: int | None = None

    @property
    def smoothed(self) -> Tensor:
        """The losses, smoothed over the steps by a Gaussian kernel with a width of 2 % of the sweep, [T].

        Losses above all of the first tenth count as the largest of these, so that a divergence does not reach back.
        """
        losses = self.losses.clamp(max=self.losses[: max(1, self.steps // 10)].max())
        at = torch.arange(len(losses), dtype=losses.dtype, device=losses.device)
        weights = (-0.5 * ((at - at[:, None]) / max(1.0, _WIDTH * self.steps)).square()).exp()  # [T, T]
        return weights @ losses / weights.sum(1)

    @property
    def suggestion(self) -> float | None:
        """A fifth of the rate at which the smoothed loss is least.

        None if the loss does not fall: by less than the standard deviation of the losses around the smoothed ones.
        """
        smoothed = self.smoothed
        i = int(smoothed.argmin())
        scatter = float((self.losses - smoothed)[: i + 1].square().mean().sqrt())
        return float(self.rates[i]) * _SHARE if float(smoothed[0] - smoothed[i]) > scatter else None

    @property
    def unit(self) -> str:
        """The unit of the losses, in words."""
        return "nats in total" if self.data == 1 else "nats per data point"

    def check(self) -> None:
        """Raise a ValueError for impossible numbers of steps, and rates that do not grow."""
        super().check()
        if not 1 <= len(self.rates) <= self.steps or not bool((self.rates.diff() > 0).all()):
            raise ValueError(f"there are {len(self.rates)} rates of {self.steps} steps: they must grow, one per step")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists, with the smoothed losses and the suggestion."""
        return super().to_dict() | {"smoothed": self.smoothed.tolist(), "suggestion": self.suggestion}

    def __repr__(self) -> str:
        return f"<LearningRates: {self._line()}>"

    def _line(self) -> str:
        swept = f"{len(self.rates)} learning rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
        return f"{swept}: {'no suggestion' if self.suggestion is None else f'suggestion {self.suggestion:.2g}'}"

    def _columns(self) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
        columns = {"learning_rate": self.rates, "loss": self.losses, "smoothed": self.smoothed}
        return "step", range(1, len(self.rates) + 1), columns

    def _table(self) -> Table:
        _, steps, columns = self._columns()
        last, least = len(steps) - 1, int(self.smoothed.argmin())
        shown = sorted({round(k * last / (_SHOWN - 1)) for k in range(_SHOWN)} | {least})
        losses = [[decimals(float(columns[name][i])) for name in ("loss", "smoothed")] for i in shown]
        rows = [[str(steps[i]), f"{self.rates[i]:.3g}", *cells] for i, cells in zip(shown, losses, strict=True)]
        notes = [] if len(steps) == self.steps else [f"Training diverged after step {len(steps)} of {self.steps}."]
        if self.suggestion is None:
            notes.append("The loss does not fall: take more steps, or a larger range.")
        elif least == last == self.steps - 1:
            notes.append("The loss still falls at the largest rate: give a larger most.")
        return Table(self._line(), ("step", "learning rate", "loss", "smoothed"), rows, (), notes)


class _Single(Source):
    """One batch in each pass: the next full batch of shuffled passes over the data."""

    background = False

    def __init__(self, batches: Batches) -> None:
        self.batches, self._first = batches, batches.first()
        self._n = len(self._first[0])
        self._left: Iterator[Some] = iter(())

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows of the first batch."""
        return iter([tuple(x[first:last] for x in self._first)])

    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """The next batch."""
        for _ in range(2):
            for rows, batch in self._left:
                if len(rows) == self._n:  # the last batch of a pass may be smaller
                    return iter([(rows, batch)])
            self._left = self.batches.epoch(Order(generator))
        raise ValueError(f"no batch of data has {self._n} rows, as the first one: give batches of equal size")


class _Seen(Callback):
    """Holds the history of a run, whatever its end."""

    history = History()

    def after_epoch(self, history: History, model: Program, guide: Program) -> None:
        self.history = history


@checked
@processes.together("learning_rates")
def learning_rates(
    model: Program,
    guide: Program,
    data: Given,
    objective: ELBO | None = None,
    *,
    least: float = 1e-6,
    most: float = 1.0,
    steps: int = 200,
    batch_size: int = 128,
    optimizer: MakeOptimizer = torch.optim.Adam,
    seed: int | None = None,
    device: Device = None,
    batch_transform: Transform | None = None,
    freeze: nn.Module | Iterable[nn.Module] = (),
    missing: Missing = None,
    progress: bool = True,
) -> LearningRates:
    """Find a learning rate: train for some steps while the rate grows, and put model and guide back as they were.

    The rate grows geometrically with every step of :func:`~jensen.inference.fit`. The sweep ends early where training
    diverges. Parameters, buffers, Pyro's parameter store and the random stream are restored. Of several processes, the
    first one sweeps, and all get its result.

    The suggestion is a fifth of the rate with the least loss. On the digits, with Adam (PPCA, factor analysis, a VAE),
    the validation ELBO after 150 epochs is above the best of nine fixed rates, or within 0.9 nats of it; after 30
    epochs within 2.8 nats, and twice the rate is better for two of the three. The default range suits Adam; SGD, whose
    steps have the scale of the loss, may need a smaller ``least``.

    References:
        Smith (2017), Cyclical Learning Rates for Training Neural Networks. https://arxiv.org/abs/1506.01186

    Args:
        model: any Pyro model, called as ``model(*batch)``.
        guide: its guide, called with the same batch.
        data: as for :func:`~jensen.inference.fit`. Each step takes the next full batch of shuffled passes.
        objective: as for :func:`~jensen.inference.fit`.
        least: the learning rate of the first step.
        most: that of the last step.
        steps: the number of steps, at least 10.
        batch_size: data points per step; a ``DataLoader`` has its own.
        optimizer: called as ``optimizer(parameters, lr=least)``: a class of ``torch.optim``.
        seed: makes the result reproducible; None uses the state of the user's stream, which does not change.
        device: as for :func:`~jensen.inference.fit`; modules stay there.
        batch_transform: applied to the first tensor of every batch.
        freeze: modules whose parameters do not change.
        missing: as for :func:`~jensen.inference.fit`.
        progress: whether to show a progress bar.

    Returns:
        The :class:`LearningRates`.

    Raises:
        ValueError: for an impossible range of rates, fewer than 10 steps, batches of other sizes than the first, and
            the errors of :func:`~jensen.inference.fit`.
        FloatingPointError: if already the first step gives no finite loss.

    Example:
        >>> from jensen.families import FullCovariance
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), FullCovariance, context=16)
        >>> found = learning_rates(model, guide, torch.randn(500, 5), least=1e-4, steps=60, seed=0, progress=False)
        >>> 0.001 < found.suggestion < 0.2
        True
    """
    if not 0 < least < most < inf:
        raise ValueError(f"learning rates grow from least to most, both above 0, but got {least} and {most}")
    if steps < _LEAST:
        raise ValueError(f"steps is the number of learning rates, at least {_LEAST}, but got {steps}")
    model, data = prepared(model, data, missing)
    growth = (most / least) ** (1 / (steps - 1))

    def sweep() -> LearningRates:
        seen = _Seen()
        with processes.apart(), forked_rng(), store_restored(), named("learning rates"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "training diverged")
            if seed is not None:
                torch.manual_seed(derived_seed(seed, "learning_rates"))
            for owner in owners_of(model, guide) if device is not None else ():
                owner.to(device)
            batches = Batches.of(data, batch_size, device, batch_transform)
            with buffers_kept(model, guide):
                look_at(model, guide, batches.first())  # an AutoGuide makes its parameters
            with tensors_kept(tensors_of(model, guide)):
                try:
                    history = fit(
                        model,
                        guide,
                        data if batches.whole else _Single(batches),
                        objective,
                        epochs=steps,
                        batch_size=batch_size,
                        lr=least,
                        optimizer=optimizer,
                        scheduler=lambda made: torch.optim.lr_scheduler.ExponentialLR(made, growth),
                        device=device,
                        batch_transform=batch_transform if batches.whole else None,
                        freeze=freeze,
                        callbacks=[seen],
                        progress=progress,
                    )
                    add_seconds(guide, -history.seconds, 0.0)
                except FloatingPointError:  # the rate was too large
                    if not seen.history.elbo:
                        raise
        found = seen.history
        losses = -torch.tensor(found.elbo, dtype=torch.float64)
        return LearningRates(torch.tensor(found.learning_rate, dtype=torch.float64), losses, steps, found.data)

    return processes.of_first(sweep)
