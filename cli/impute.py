"""``jensen impute``: fill in the missing values of a table with the model and guide of a run."""

from __future__ import annotations

__all__ = ["run"]

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jensen.datasets import Dataset
from jensen.datasets.preparation import draw_split
from jensen.inference import Imputation, impute
from jensen.results.files import whole

from .names import suggestion
from .runs import RunFolder
from .sources import reopen
from .terminal import report, say


def run(options: argparse.Namespace, progress: bool) -> None:
    """Impute a table, write the files, and print the numbers of missing values and the reliability of each feature."""
    ending = options.out.suffix.lower()
    if ending not in _WRITERS:
        raise ValueError(f"--out {options.out}: there is no format {ending!r}: {suggestion(ending, _WRITERS)}")
    if options.particles < 1 or options.draws < 0:
        raise ValueError(
            f"--particles must be at least 1 and --draws at least 0, but got {options.particles} and {options.draws}"
        )
    folder = RunFolder.open(options.run)
    settings = folder.configuration["data"]
    if settings["binarize"] is not None or settings["dequantize"]:
        raise ValueError(
            f"{folder.path} was trained on binarized or dequantized data, whose values are not those of a table: "
            "use jensen.inference.impute in Python"
        )
    model, guide, _ = folder.trained()
    own = reopen(settings)
    path = options.data or Path(settings["source"])
    if options.data is not None and not path.is_file():
        raise FileNotFoundError(f"--data {path}: there is no such file")
    table = reopen({**settings, "source": str(path), "sha256": None, "standardize": False}, split=(1.0, 0.0, 0.0))
    x = _in_order(table, settings["seed"])
    if x.shape[1:] != own.train.shape[1:] or (own.columns and table.columns and own.columns != table.columns):
        raise ValueError(
            f"{path} has the features {_named(table)}, but {folder.path} was trained on {_named(own)}: give a table "
            "with the same columns"
        )
    grey = (own.levels - 1) if own.levels is not None and own.levels > 2 else 1
    standard = x if own.location is None or own.scale is None else ((x.double() - own.location) / own.scale).to(x)
    how: dict[str, Any] = {"draws": max(1, options.draws), "columns": table.columns, "seed": options.seed}
    found = impute(model, guide, standard, options.particles, progress=progress, **how)
    if own.location is not None and own.scale is not None:
        found = replace(found.in_units(own.location, own.scale), x=x)
    files = [options.out]
    fill = _WRITERS[ending]
    fill(options.out, path, found, _whole(found.mean, x) * grey, table)
    for m, values in enumerate(found.draws[: options.draws], 1):
        files.append(options.out.with_stem(f"{options.out.stem}-{m}"))
        fill(files[-1], path, found, _whole(values, x) * grey, table)
    if found.unreliable > 0:
        share = f"{100 * found.unreliable:.2g} %"
        say(f"k-hat is above 0.7 for {share} of the rows with missing values: use more --particles, or a better guide")
    missing = int(found.missing.sum())
    document = {
        "run": str(folder.path),
        "out": [str(file) for file in files],
        "missing": missing,
        "values": found.missing.numel(),
        "unreliable": found.unreliable,
        "seed": options.seed,
    }
    kind = "the mean of each missing value" if not options.draws else "means, and samples of complete rows"
    report(f"{', '.join(map(str, files))}: {kind}\n\n{found}", document, options.json)


def _in_order(table: Dataset, seed: int) -> Tensor:
    """The rows in the order of the file."""
    order = draw_split(len(table.train), (1.0, 0.0, 0.0), seed)["train"]
    x = torch.empty_like(table.train)
    x[torch.from_numpy(order)] = table.train
    return x


def _named(data: Dataset) -> str:
    names = list(data.columns)
    shown = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    return shown or f"of shape {list(data.train.shape[1:])} without names"


def _whole(values: Tensor, x: Tensor) -> Tensor:
    """The values, with the observed ones unchanged."""
    return torch.where(x.isnan(), values, x)


def _npy(out: Path, path: Path, found: Imputation, values: Tensor, table: Dataset) -> None:
    with whole(out) as partial, partial.open("wb") as file:
        np.save(file, values.numpy(), allow_pickle=False)


def _frame(path: Path, found: Imputation, values: Tensor) -> Any:
    """The whole table of the file, with missing cells filled; else the features alone."""
    import pandas

    features = found.frame_of(values)
    if path.suffix.lower() == ".parquet":
        frame = pandas.read_parquet(path)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
        named = bool(found.columns) and not all(name.isdigit() for name in found.columns)
        how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "skipinitialspace": True}
        frame = pandas.read_csv(path, sep=None, engine="python", header=0 if named else None, **how)
    else:
        return features
    names = {str(name).strip(): name for name in frame.columns}
    if len(frame) != len(features) or not set(features) <= set(names):
        return features
    out = found.missing.flatten(1).numpy()
    for j, name in enumerate(features):
        column = frame[names[name]].astype(object)
        text = isinstance(column.iloc[0], str)
        filled = features[name][out[:, j]]
        column[out[:, j]] = [f"{value:.6g}" for value in filled] if text else filled.tolist()
        frame[names[name]] = column
    return frame


def _text(separator: str) -> Callable[..., None]:
    def write(out: Path, path: Path, found: Imputation, values: Tensor, table: Dataset) -> None:
        frame = _frame(path, found, values)
        with whole(out) as partial:
            frame.to_csv(partial, sep=separator, index=False, float_format="%.6g")

    return write


def _parquet(out: Path, path: Path, found: Imputation, values: Tensor, table: Dataset) -> None:
    frame = _frame(path, found, values)
    with whole(out) as partial:
        frame.to_parquet(partial, index=False)


_WRITERS: dict[str, Callable[..., None]] = {
    ".csv": _text(","),
    ".tsv": _text("\t"),
    ".parquet": _parquet,
    ".npy": _npy,
}
