"""The folder of a run: its settings, its history, its parameters and its measurements.

| file | contents |
| --- | --- |
| configuration.json | data, model, guide and training as names and numbers, facts of the data, versions |
| checkpoint.pt | parameters, optimizer, random state and position, saved after every complete epoch |
| history.json | the bound after each epoch: ``History.from_json`` reads it |
| report.json | the results of ``jensen evaluate`` |
| report.html | the results as one page |
| training.png, samples.png, ... | figures, also as PDF |

Every JSON file and checkpoint holds its schema version; files of a newer version raise an error. configuration.json,
the checkpoint and results hold a digest of their contents: a file that was changed after writing raises an error.
"""

from __future__ import annotations

__all__ = ["RunFolder"]

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from torch import nn

from jensen.inference import History, restore
from jensen.kernel.randomness import private_randomness
from jensen.results.files import check_schema, partials
from jensen.results.schema import DIGEST, check_digest, decoded, digest_of

from .pairs import Design, objective_of
from .terminal import command, finite, say, versions, write_json

FORMAT = 1
_FILES = ("configuration.json", "checkpoint.pt", "history.json", "report.json", "report.html")
_LOCKS: Any = import_module("fcntl") if find_spec("fcntl") else None  # of POSIX
_PICTURES = ("training", "samples", "reconstructions", "latent-map")


class _Data(TypedDict):
    """The source and the preparation of the data of a run."""

    source: str
    binarize: str | None
    dequantize: bool | None
    seed: int
    label: str | int | None
    header: NotRequired[bool | None]
    drop: NotRequired[list[str] | None]
    only: NotRequired[list[str] | None]
    missing: NotRequired[list[str] | None]
    member: NotRequired[str | None]
    levels: int | None
    image_shape: list[int] | None
    standardize: bool
    sha256: NotRequired[str]
    streamed: NotRequired[bool]


class _Facts(TypedDict):
    """Facts of the data that a run stores."""

    name: str
    features: int
    train: int
    validation: int
    test: int
    image_shape: list[int] | None
    channels: int
    value_range: tuple[float, float] | None
    levels: int | None
    bits_offset: float
    licence: str
    citation: str


class _Pair(TypedDict):
    """Model and guide as names and numbers."""

    model: str
    guide: str
    latent: list[int]
    hidden: list[list[int]]
    likelihood: str | None
    components: int | None
    masked: NotRequired[bool]


class _Training(TypedDict):
    """The settings of training."""

    objective: str
    particles: int
    gradient: str
    alpha: float | None
    beta: float | None
    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["constant", "cosine", "warmup", "warmup-cosine"]
    patience: int | None
    seed: int
    clip: NotRequired[float | None]
    weight_decay: NotRequired[float | None]
    average: NotRequired[Literal["ema", "polyak"] | None]
    tolerance: NotRequired[float | None]


class _Configuration(TypedDict):
    """The schema of configuration.json."""

    jensen_run: int
    data: _Data
    facts: _Facts
    pair: _Pair
    training: _Training
    versions: dict[str, str]
    sha256: NotRequired[str]


def _check(configuration: dict[str, Any]) -> None:
    """Raise a ValueError unless jensen train could have written this configuration."""
    check_digest(configuration)
    decoded(_Configuration, configuration, "configuration")
    facts, training = configuration["facts"], configuration["training"]
    counts = {name: facts[name] for name in ("features", "train", "channels")}
    counts |= {name: training[name] for name in ("particles", "epochs", "batch_size")}
    if wrong := {name: value for name, value in counts.items() if value < 1}:
        raise ValueError(f"these numbers must be at least 1: {wrong}")
    if not 0 <= training["seed"] < 2**32 or not 0 < training["lr"] < float("inf"):
        raise ValueError(f"seed must be below 2^32 and lr positive, but got {training['seed']} and {training['lr']}")
    if facts["image_shape"] is not None and (
        len(facts["image_shape"]) != 2 or prod(facts["image_shape"]) * facts["channels"] != facts["features"]
    ):
        raise ValueError(f"images of shape {facts['image_shape']} cannot have {facts['features']} features")
    Design.of(configuration["pair"])
    objective_of(training)


def _locked(path: Path) -> int | None:
    """A handle that locks a folder until it is closed; None if the system has no such locks."""
    if _LOCKS is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        _LOCKS.flock(handle, _LOCKS.LOCK_EX | _LOCKS.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"another process is training in {path}: wait for it, or use another folder with --run DIR"
        ) from None
    except OSError:  # some network file systems have no locks
        pass
    return handle


class RunFolder:
    """A run folder, opened or new.

    Args:
        path: the folder.
        configuration: the contents of configuration.json.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self.path, self.configuration = path, configuration
        self.checkpoint = path / "checkpoint.pt"

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run.

        Raises:
            ValueError: if it is not a run folder, or if its configuration is damaged or has a newer schema version.
        """
        file = path / "configuration.json"
        if not file.is_file():
            others = [folder.parent.name for folder in path.resolve().parent.glob("*/configuration.json")]
            close = get_close_matches(path.name, others, n=1)
            hint = f"did you mean {path.parent / close[0]}?" if close else "jensen train --run DIR creates one"
            if inside := sorted(file.parent.name for file in path.glob("seed-*/configuration.json")):
                hint = (
                    f"it holds the runs of --seeds {len(inside)}: give one of them, such as {path / inside[0]}, or add "
                    f"--seeds {len(inside)} to jensen train --resume"
                )
            raise ValueError(f"{path} is not a run folder, because it has no configuration.json; {hint}")
        try:
            configuration = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON ({error}); restore the file, or train again") from error
        schema = configuration.get("jensen_run") if isinstance(configuration, dict) else None
        if type(schema) is not int:
            raise ValueError(f"{file} is not the configuration of a run; train again")
        check_schema(schema, FORMAT, file)
        try:
            _check(configuration)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}); restore the file, or train again") from error
        configuration.pop(DIGEST, None)
        return cls(path, configuration)

    @classmethod
    def begin(cls, path: Path, configuration: dict[str, Any], overwrite: bool, stack: ExitStack) -> RunFolder:
        """Create the folder of a new run with its configuration, locked by this process until ``stack`` is closed.

        Raises:
            ValueError: if the folder holds a run that must not be overwritten, or other files.
        """
        folder = cls(path, {"jensen_run": FORMAT, **configuration, "versions": versions()})
        holds = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if "configuration.json" in holds and not overwrite:
            raise ValueError(
                f"{path} already holds a run: continue it with --resume, replace it with --overwrite, or use another "
                "folder with --run DIR"
            )
        if (holds and "configuration.json" not in holds) or path.is_file():
            raise ValueError(f"{path} exists and is not a run folder: use another folder with --run DIR")
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(folder.alone())
        folder.clear()
        folder.write()
        return folder

    def data_settings(self, moved: Path | None) -> dict[str, Any]:
        """The settings of the data of the run, with the current path of its file.

        Raises:
            ValueError: if the data do not come from a file of the user.
            FileNotFoundError: if there is no such file.
        """
        settings: dict[str, Any] = self.configuration["data"]
        if moved is None:
            return settings
        if settings.get("sha256") is None:
            raise ValueError(
                f"--data is only for a file of your own, but {self.path} was trained on {settings['source']}: omit it"
            )
        if not moved.exists():
            raise FileNotFoundError(f"--data {moved}: there is no such file")
        return {**settings, "source": str(moved.resolve())}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block in which no other process can train in this folder; the lock ends with the process.

        Raises:
            ValueError: if another process is training in it.
        """
        handle = _locked(self.path)
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def write(self) -> None:
        """Write configuration.json."""
        document = finite(self.configuration)
        write_json(self.path / "configuration.json", {**document, DIGEST: digest_of(document)})

    def clear(self) -> None:
        """Remove the files of a run, and nothing else."""
        names = [*_FILES, *(f"{name}.{kind}" for name in _PICTURES for kind in ("png", "pdf"))]
        for file in [*(self.path / name for name in names), *partials(self.path)]:
            file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a run without any epoch, and its folder if nothing else is in it."""
        self.clear()
        with suppress(OSError):  # something else is in it, or it is gone
            self.path.rmdir()

    def tidy(self) -> None:
        """Remove partial files of a killed run, and the reports on an earlier state of the run."""
        for file in [*partials(self.path), self.path / "report.json", self.path / "report.html"]:
            file.unlink(missing_ok=True)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The model and guide with the initial parameters of the run."""
        with private_randomness(self.configuration["training"]["seed"]):
            return Design.of(self.configuration["pair"]).build(self.configuration["facts"]["features"])

    def trained(self) -> tuple[nn.Module, nn.Module, History]:
        """The model and guide with the parameters of the checkpoint, and the history.

        Raises:
            ValueError: if no epoch is complete.
        """
        if not self.checkpoint.is_file():
            raise ValueError(
                f"{self.path} has no checkpoint, because no epoch was completed: train it with "
                f"{command('train', '--run', self.path, '--resume')}"
            )
        model, guide = self.pair()
        history = restore(model, guide, self.checkpoint)
        epochs = self.configuration["training"]["epochs"]
        if len(history.elbo) < epochs and history.best_epoch is None:
            say(f"{self.path}: training stopped after epoch {len(history.elbo)} of {epochs}")
        return model, guide, history

    def keep_history(self) -> int:
        """Write history.json from the checkpoint, if there is one; returns the number of complete epochs."""
        if not self.checkpoint.is_file():
            return 0
        history = History.from_checkpoint(self.checkpoint)
        try:
            history.to_json(self.path / "history.json")
        except OSError as error:
            say(f"{error}; the checkpoint holds the same history")
        return len(history.elbo)
