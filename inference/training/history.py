"""The result of training: its curves, its length, its time."""

from __future__ import annotations

__all__ = ["History"]

import math
import os
from dataclasses import dataclass, field
from typing import Any, Self

from jensen.results.files import read_checkpoint
from jensen.results.records import Record
from jensen.results.schema import decoded
from jensen.results.tables import Table, decimals

_CURVES = ("elbo", "shaped", "validation", "rate", "distortion", "learning_rate")
_SHOWN = 10  # printed epochs


@dataclass(repr=False)
class History(Record):
    """The history of :func:`fit`, epoch by epoch.

    A list has one number per epoch. It is shorter if an earlier part of a resumed run did not record it; its last
    number always belongs to the last epoch.

    Attributes:
        elbo: the objective's bound on the training data, nats per data point, averaged over the epoch.
        shaped: minus the loss, if the objective shapes it (beta, free bits) so that it differs from the bound; else
            empty.
        validation: the objective's bound on the validation data after each epoch, nats per data point; empty without
            such data.
        rate: from the same samples, the mean of log q(z | x) - log p(z), nats per data point; their ELBO is minus the
            sum of rate and distortion. Empty without validation data, for joint weights, and for a guide without a
            density.
        distortion: from the same samples, the mean of -log p(x | z), nats per data point; empty if ``rate`` is.
        learning_rate: that of each epoch (of the optimizer's first group).
        elapsed: wall-clock seconds from the start to the end of each epoch, without breaks before a resumption.
        best_epoch: with ``patience``, the epoch whose parameters were kept, counted from 1; else None.
        steps: the number of optimizer steps.
        seconds: wall-clock time.
        compiled: whether steps ran in one compiled graph of loss, gradients and update.
        route: how steps ran, and why not faster: ``"traced and compiled"``, ``"traced: ..."``, ``"eager: ..."``; and
            the method for particles, if it was not an outer plate.
        data: the number of data points by which the bounds of an epoch are divided: the full size of the plate over
            them (N if it subsamples), else the rows of the data. 1 if model and guide hold their data without a plate:
            the bounds are then those of all data.

    Example:
        >>> history = History(elbo=[-3.0, -2.0], validation=[], steps=20, seconds=0.5)
        >>> print(history)
        2 epochs, 20 steps, 0.5 s: training bound -3.000 -> -2.000 nats per data point
        epoch    elbo
        -------------
        1      -3.000
        2      -2.000
        >>> history.per_epoch()
        {'epoch': [1, 2], 'elbo': [-3.0, -2.0]}
    """

    elbo: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    steps: int = 0
    seconds: float = 0.0
    shaped: list[float] = field(default_factory=list)
    compiled: bool = False
    route: str = ""
    rate: list[float] = field(default_factory=list)
    distortion: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    data: int | None = None

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> Self:
        """The history of a training run so far, from the checkpoint that ``fit(..., checkpoint=path)`` writes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, not a checkpoint, or of a newer schema version.
        """
        state = read_checkpoint(path)
        try:
            history: Self = decoded(cls, state.get("history"), "history")
        except ValueError as error:
            raise ValueError(f"{path} is a damaged checkpoint: {error}; delete it and start again") from error
        return history

    def check(self) -> None:
        """Raise a ValueError for impossible curves, counts and times."""
        super().check()
        if self.steps < 0 or not 0 <= self.seconds < math.inf or (self.data is not None and self.data < 1):
            raise ValueError(
                f"steps, seconds and data are {self.steps}, {self.seconds} and {self.data}: these are impossible values"
            )
        if self.best_epoch is not None and not 1 <= self.best_epoch <= len(self.validation):
            raise ValueError(f"best_epoch is {self.best_epoch}, but there are {len(self.validation)} validation epochs")

    @property
    def unit(self) -> str:
        """The unit of the bounds, in words."""
        return "nats in total" if self.data == 1 else "nats per data point"

    def per_epoch(self) -> dict[str, list[Any]]:
        """The columns of the existing curves, by name, all of one length.

        ``epoch`` counts from 1, ``seconds`` is ``elapsed``, bounds, rate and distortion are in nats per data point.
        Values that an earlier part of a resumed run did not record are NaN.
        """
        n = len(self.elbo)
        columns = {name: getattr(self, name) for name in _CURVES} | {"seconds": self.elapsed}
        padded = {name: [math.nan] * (n - len(values)) + values for name, values in columns.items() if values}
        return {"epoch": list(range(1, n + 1)), **padded}

    def __repr__(self) -> str:
        return f"<History: {self._line()}>"

    def _line(self) -> str:
        text = f"{len(self.elbo)} epochs, {self.steps} steps, {self.seconds:.1f} s"
        if self.elbo:
            text += f": training bound {decimals(self.elbo[0])} -> {decimals(self.elbo[-1])} {self.unit}"
        if self.validation:
            text += f", validation {decimals(self.validation[-1])}"
        if self.best_epoch is not None:
            text += f", kept epoch {self.best_epoch} at {decimals(self.validation[self.best_epoch - 1])}"
        return text

    def _columns(self) -> tuple[str, list[Any], dict[str, Any]]:
        columns = self.per_epoch()
        return "epoch", columns.pop("epoch"), columns

    def _table(self) -> Table:
        _, epochs, columns = self._columns()
        if not columns:
            return Table(self._line())
        last = len(epochs) - 1
        shown = sorted({round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)} | {(self.best_epoch or 1) - 1})
        rows = [[str(epochs[i]), *(_cell(name, values[i]) for name, values in columns.items())] for i in shown]
        return Table(self._line(), ("epoch", *(name.replace("_", " ") for name in columns)), rows)


def _cell(name: str, value: float) -> str:
    return f"{value:.3g}" if name == "learning_rate" else decimals(value, 1 if name == "seconds" else 3)
