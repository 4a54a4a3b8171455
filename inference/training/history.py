"""What training leaves behind: its curves, its length, its time."""

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
_SHOWN = 10  # epochs that are printed


@dataclass(repr=False)
class History(Record):
    """What happened in :func:`fit`, epoch by epoch.

    A list has one number per epoch. Where an earlier part of a resumed run did not write it down, it is shorter, and
    its last number is that of the last epoch.

    Attributes:
        elbo: the objective's bound on the training data, nats per datum, averaged over the epoch.
        shaped: minus the loss, where an objective (beta, free bits) shapes it to something else than the bound; else
            empty.
        validation: the ELBO of the validation data after each epoch, nats per datum; empty without validation data.
        rate: of the same draws, the mean of log q(z | x) - log p(z), nats per datum; minus the sum of rate and
            distortion is the ELBO. Empty without validation data, for joint weights, and for a guide without a density.
        distortion: of the same draws, the mean of -log p(x | z), nats per datum; empty where ``rate`` is.
        learning_rate: the one that each epoch was taken with (of the optimizer's first group).
        elapsed: wall-clock seconds from the start to the end of each epoch; a break before a resumption is left out.
        best_epoch: with ``patience``, the epoch whose parameters were kept, counted from 1; else None.
        steps: the number of optimizer steps.
        seconds: wall-clock time.
        compiled: whether steps ran in one compiled graph of loss, gradients and update.
        route: how steps ran, and why not faster: ``"captured and compiled"``, ``"captured"``, ``"eager: ..."``; and by
            which way particles ran, where it was not an outer plate.
        data: how many data the bounds of an epoch are divided by: as many as its plate over them has in all (N where it
            subsamples), else the rows of the data. 1 where the pair holds its data and has no plate around them: its
            bounds are those of all data.

    Example:
        >>> history = History(elbo=[-3.0, -2.0], validation=[], steps=20, seconds=0.5)
        >>> print(history)
        2 epochs, 20 steps, 0.5 s: training bound -3.000 -> -2.000 nats per datum
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
            ValueError: if it is torn, not a checkpoint, or of a newer schema version.
        """
        state = read_checkpoint(path)
        try:
            history: Self = decoded(cls, state.get("history"), "history")
        except ValueError as error:
            raise ValueError(f"{path} is a damaged checkpoint: {error}; delete it and start again") from error
        return history

    def check(self) -> None:
        """Raise a ValueError for curves, counts and times that no training run has."""
        super().check()
        if self.steps < 0 or not 0 <= self.seconds < math.inf or (self.data is not None and self.data < 1):
            raise ValueError(
                f"steps, seconds and data are {self.steps}, {self.seconds} and {self.data}: no run has such numbers"
            )
        if self.best_epoch is not None and not 1 <= self.best_epoch <= len(self.validation):
            raise ValueError(f"best_epoch is {self.best_epoch}, but there are {len(self.validation)} validation epochs")

    @property
    def unit(self) -> str:
        """The unit of the bounds, in words."""
        return "nats in all" if self.data == 1 else "nats per datum"

    def per_epoch(self) -> dict[str, list[Any]]:
        """The columns of the curves that there are, by name, all of one length.

        ``epoch`` counts from 1, ``seconds`` is ``elapsed``, bounds, rate and distortion are in nats per datum. What an
        earlier part of a resumed run did not write down is NaN.
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
