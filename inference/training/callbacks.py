"""Callbacks of a training run: the protocol, and two loggers.

:func:`~jensen.inference.fit` calls each callback after every epoch, with the history so far, and closes all of them
at the end, also after an error or Ctrl-C.
"""

from __future__ import annotations

__all__ = ["CSVLogger", "Callback", "TensorBoardLogger", "watched"]

import csv
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from jensen import processes
from jensen.checked import checked
from jensen.kernel.modes import modes_kept
from jensen.kernel.parameters import owners_of
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Program

from .history import History


@runtime_checkable
class Callback(Protocol):
    """The protocol of ``fit(..., callbacks=[...])``: any object with these two methods.

    It may use random numbers and change the mode of modules: neither affects the run. If a run is resumed, it sees the
    epochs of the new part, with the history of all parts.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import fit
        >>> from jensen.models import PPCA
        >>> class Counter(Callback):
        ...     def after_epoch(self, history, model, guide):
        ...         print(len(history.elbo), "of 2 epochs")
        >>> model = PPCA(5, latent=2)
        >>> _ = fit(model, PriorGuide(model), torch.randn(20, 5), epochs=2, callbacks=[Counter()], progress=False)
        1 of 2 epochs
        2 of 2 epochs
    """

    @abstractmethod
    def after_epoch(self, history: History, model: Program, guide: Program) -> None:
        """Called after an epoch, whose number is ``len(history.elbo)``; the checkpoint is already written.

        Args:
            history: the history so far; ``history.per_epoch()`` returns it as columns.
            model: the current model.
            guide: the current guide.
        """

    def close(self) -> None:
        """Called once at the end of each ``fit`` whose settings are valid, also after an error or Ctrl-C."""
        return


class _Logger(Callback):
    """Writes each epoch of a run once, including those before a resumption, from the history; process 0 alone does."""

    def __init__(self) -> None:
        self._written = 0

    def after_epoch(self, history: History, model: Program, guide: Program) -> None:
        if processes.rank():
            return
        columns = history.per_epoch()
        n = len(columns["epoch"])
        rows = [{name: values[i] for name, values in columns.items()} for i in range(self._written, n)]
        self._write(rows, first=not self._written)
        self._written = n

    def close(self) -> None:
        self._written = 0

    @abstractmethod
    def _write(self, rows: list[dict[str, Any]], first: bool) -> None:
        """Write rows; the first rows begin the log."""


class CSVLogger(_Logger):
    """Writes a line per epoch into a CSV file, as soon as the epoch is done.

    The columns are those of :meth:`History.per_epoch`: ``epoch``, ``elbo``, ``learning_rate``, ``seconds``, and
    ``shaped``, ``validation``, ``rate`` and ``distortion`` if present; numbers in full precision, empty cells for NaN.
    A resumed run continues the file; a new run replaces it.

    Args:
        path: the file; missing folders are created.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "log.csv"
        >>> logger = CSVLogger(path)
        >>> logger.after_epoch(History(elbo=[-3.5, -2.5], elapsed=[0.5, 1.0]), model=None, guide=None)
        >>> logger.close()
        >>> print(path.read_text())
        epoch,elbo,seconds
        1,-3.5,0.5
        2,-2.5,1.0
    """

    @checked
    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._file: TextIO | None = None

    def _write(self, rows: list[dict[str, Any]], first: bool) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", newline="")
        lines = csv.writer(self._file, lineterminator="\n")
        if first:
            lines.writerow(rows[0])
        lines.writerows(["" if math.isnan(value) else value for value in row.values()] for row in rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardLogger(_Logger):
    """Writes the curves of a run for TensorBoard: ``tensorboard --logdir FOLDER`` shows them during the run.

    Scalars by epoch: ``bound/elbo``, ``bound/shaped``, ``bound/validation``, ``latents/rate``,
    ``latents/distortion`` (nats per data point) and ``optimizer/learning_rate``, if present. A run resumed in the same
    folder continues its curves. Give each run its own folder: a new run replaces the old curves.

    Args:
        folder: the folder of the event files.

    Raises:
        ImportError: without the package ``tensorboard``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> logger = TensorBoardLogger(tempfile.mkdtemp())
        >>> logger.after_epoch(History(elbo=[-3.5]), model=None, guide=None)
        >>> logger.close()
        >>> len(list(Path(logger.folder).glob("events*")))
        1
    """

    @checked
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.folder = os.fspath(folder)
        self._make = _summary_writer()
        self._writer: Any = None

    def _write(self, rows: list[dict[str, Any]], first: bool) -> None:
        if self._writer is None:
            self._writer = self._make(self.folder, purge_step=rows[0]["epoch"])
        now, last = time.time(), rows[-1].get("seconds", 0.0)
        for row in rows:
            when = now - last + row.get("seconds", 0.0)
            for name, group in _GROUPS.items():
                if name in row and not math.isnan(row[name]):
                    self._writer.add_scalar(f"{group}/{name}", row[name], row["epoch"], walltime=when)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        super().close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


_GROUPS = {"elbo": "bound", "shaped": "bound", "validation": "bound", "rate": "latents", "distortion": "latents"}
_GROUPS |= {"learning_rate": "optimizer"}


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLogger needs the package tensorboard, which is not installed: pip install tensorboard, or use "
            "CSVLogger"
        ) from error
    return SummaryWriter


@contextmanager
def watched(
    callbacks: Callback | Iterable[Callback], model: Program, guide: Program
) -> Iterator[Callable[[History], None]]:
    """Yield a function that calls all callbacks and isolates their side effects; at the end close each of them.

    Raises:
        TypeError: for an object that is not a callback.
    """
    watching = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    for callback in watching:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"a callback needs the methods after_epoch(history, model, guide) and close(), but got {callback!r}; "
                "derive it from jensen.inference.Callback"
            )
    modules = owners_of(model, guide)

    def call(history: History) -> None:
        for callback in watching:
            with forked_rng(), modes_kept(modules):
                callback.after_epoch(history, model, guide)

    with ExitStack() as stack:
        for callback in reversed(watching):
            stack.callback(callback.close)
        yield call
