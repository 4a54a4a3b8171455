"""The folder of a run: its settings, its history, its parameters and what was measured.

| file | what it holds |
| --- | --- |
| configuration.json | data, pair and training in names and numbers, facts of the data, versions |
| checkpoint.pt | parameters, optimizer, random state and position, after every whole epoch |
| history.json | the bound, epoch by epoch: ``History.from_json`` reads it |
| report.json | what ``jensen evaluate`` measured |
| training.png, samples.png, ... | pictures, each a PDF too |

Every file but the pictures holds its schema version; files of a newer one are refused.
"""

from __future__ import annotations

__all__ = ["RunFolder"]

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from jensen.inference import History, restore
from jensen.kernel.randomness import private_randomness
from jensen.results.files import check_schema

from .pairs import Design
from .terminal import say, versions, write_json

FORMAT = 1
_FILES = ("configuration.json", "checkpoint.pt", "history.json", "report.json")
_PICTURES = ("training", "samples", "reconstructions", "latent-map")


class RunFolder:
    """A run folder, read or begun.

    Args:
        path: the folder.
        configuration: what configuration.json holds.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self.path, self.configuration = path, configuration
        self.checkpoint = path / "checkpoint.pt"

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            ValueError: if it is none, or its configuration is torn, of something else, or of a newer schema version.
        """
        file = path / "configuration.json"
        if not file.is_file():
            others = [folder.parent.name for folder in path.resolve().parent.glob("*/configuration.json")]
            close = get_close_matches(path.name, others, n=1)
            hint = f"did you mean {path.parent / close[0]}?" if close else "jensen train --run DIR makes one"
            raise ValueError(f"{path} is not a run folder: there is no configuration.json in it; {hint}")
        try:
            configuration = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); put the file back, or train again") from error
        schema = configuration.get("jensen_run") if isinstance(configuration, dict) else None
        if not isinstance(schema, int):
            raise ValueError(f"{file} is not the configuration of a run; train again")
        check_schema(schema, FORMAT, file)
        return cls(path, configuration)

    @classmethod
    def begin(cls, path: Path, configuration: dict[str, Any], overwrite: bool) -> RunFolder:
        """A folder for a new run, with its configuration written.

        Raises:
            ValueError: if the folder holds a run and may not be overwritten, or holds something else.
        """
        folder = cls(path, {"jensen_run": FORMAT, **configuration, "versions": versions()})
        holds = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if "configuration.json" in holds and not overwrite:
            raise ValueError(
                f"{path} holds a run: --resume goes on with it, --overwrite begins it anew, --run DIR takes another "
                "folder"
            )
        if (holds and "configuration.json" not in holds) or path.is_file():
            raise ValueError(f"{path} is there and is no run folder: take another with --run DIR")
        folder.clear()
        path.mkdir(parents=True, exist_ok=True)
        folder.write()
        return folder

    def write(self) -> None:
        """Write configuration.json."""
        write_json(self.path / "configuration.json", self.configuration)

    def clear(self) -> None:
        """Remove the files of a run, and nothing else."""
        names = [*_FILES, *(f"{name}.{kind}" for name in _PICTURES for kind in ("png", "pdf"))]
        for file in [*(self.path / name for name in names), *self.path.glob("*.partial")]:
            file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a run that never began, and its folder where nothing else is in it."""
        self.clear()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def tidy(self) -> None:
        """Remove what a run that was killed left half-written, and what an earlier state of the run was measured as."""
        for file in [*self.path.glob("*.partial"), self.path / "report.json"]:
            file.unlink(missing_ok=True)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The pair as the run began with it."""
        with private_randomness(self.configuration["training"]["seed"]):
            return Design.of(self.configuration["pair"]).build(self.configuration["facts"]["features"])

    def trained(self) -> tuple[nn.Module, nn.Module, History]:
        """The pair as its checkpoint has it, and its history.

        Raises:
            ValueError: if no epoch was completed.
        """
        if not self.checkpoint.is_file():
            raise ValueError(
                f"{self.path} has no checkpoint: no epoch was completed; jensen train --run {self.path} --resume "
                "trains it"
            )
        model, guide = self.pair()
        history = restore(model, guide, self.checkpoint)
        epochs = self.configuration["training"]["epochs"]
        if len(history.elbo) < epochs and history.best_epoch is None:
            say(f"{self.path}: training stopped after epoch {len(history.elbo)} of {epochs}")
        return model, guide, history

    def keep_history(self) -> int:
        """Write history.json from the checkpoint, where there is one; the number of whole epochs."""
        if not self.checkpoint.is_file():
            return 0
        history = History.from_checkpoint(self.checkpoint)
        history.to_json(self.path / "history.json")
        return len(history.elbo)
