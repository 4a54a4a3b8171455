"""``jensen evaluate``: measure trained runs from their folders."""

from __future__ import annotations

__all__ = ["run"]

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jensen import processes
from jensen.datasets import Dataset
from jensen.inference import Comparison, Evidence, History, compare, evaluate
from jensen.kernel.batches import placed
from jensen.kernel.randomness import private_randomness
from jensen.sources import Source

from .page import about, curves_of, page_of, shown_by
from .report import carried
from .runs import RunFolder
from .sources import added_bits, batch_transform, pick, reopen
from .streams import count, picked, rows_in
from .terminal import SCHEMA, Unkept, report, say, versions, write_json


def run(options: argparse.Namespace, progress: bool) -> None:
    """Measure runs, print the result, and write report.json and report.html into the folder of each run."""
    groups = _groups(options.runs)
    folders = {run: folder for of in groups.values() for run, folder in of.items()}
    first = next(iter(folders.values()))
    for folder in folders.values():
        ours, theirs = _identity(first), _identity(folder)
        if ours != theirs:
            other = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            listed = ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in other)
            raise ValueError(
                f"{first.path} and {folder.path} were trained on different data, or on data prepared differently "
                f"({listed}), so their numbers cannot be compared: evaluate them one at a time"
            )
    trained = {run: folder.trained() for run, folder in folders.items()}
    data = reopen(first.data_settings(options.data), streams=True)
    x = _rows(data, first.configuration["data"], options)
    how: dict[str, Any] = {"seed": options.seed, "device": options.device, "progress": progress}
    how |= {"tolerance": options.tolerance, "particles": options.particles, "refine": options.refine}
    how["train"] = _fitted_to(data, options)
    head = f"{data.name}: {len(x)} {options.split} points"
    if len(trained) == 1:
        (run, (model, guide, _)) = next(iter(trained.items()))
        measured = {run: evaluate(model, guide, x, **how)}
        table = None
        text = "\n".join([f"{head}; {_describe(folders[run])}", _bits(measured[run], data, x, options.bits)])
    else:
        pairs = {name: [trained[run][:2] for run in of] for name, of in groups.items()}
        histories = {name: [trained[run][2] for run in of] for name, of in groups.items()}
        table = compare(pairs, x, histories=histories, gaps=options.gaps, **how)
        measured = {}
        for name, of in groups.items():
            row = table.rows[name]
            measured |= dict(zip(of, row.runs or [row.evidence], strict=True))
        lines = [f"{name}: {_describe(next(iter(of.values())))}{_runs(of)}" for name, of in groups.items()]
        text = "\n".join([head, *lines, "", _table(table, data, x, options.bits)])
    if not processes.rank():
        with processes.apart():
            _deliver(options, folders, trained, data, x, measured, table, text)


def _deliver(
    options: argparse.Namespace,
    folders: dict[str, RunFolder],
    trained: dict[str, tuple[nn.Module, nn.Module, History]],
    data: Dataset,
    x: Tensor,
    measured: dict[str, Evidence],
    table: Comparison | None,
    text: str,
) -> None:
    """Print the result, and write it into the folders of the runs."""
    active = {run: carried(model, guide, x, options.seed) for run, (model, guide, _) in trained.items()}
    for run, units in active.items():
        of_run = f" of {run}" * (len(active) > 1)
        text += "".join(f"\nactive units{of_run}, {site}: {count}" for site, count in units.items())
    reports = {}
    for run, evidence in measured.items():
        if evidence.below and (fell := _fell(trained[run][2])):
            say(f"{run}: {fell}")
        epochs = len(trained[run][2].elbo)
        reports[run] = _report(folders[run], evidence, data.bits_offset_of(x), options, epochs) | {
            "active_units": active[run]
        }
    document = {"runs": reports, "comparison": None if table is None else table.to_dict()}
    report(text, document, options.json)
    unkept = []
    for name, one in reports.items():
        folder, (model, guide, history) = folders[name], trained[name]
        try:
            write_json(folder.path / "report.json", one)
            if options.no_pictures:
                continue
            page = page_of(f"{name}: {_describe(folder)}, on {data.name}", data, x)
            page.add(measured[name])
            page.bounds(curves_of({"guide": (model, guide)}, x, options.seed), {"guide": measured[name]})
            if table is not None:
                page.add(table, "All runs")
            shown_by(page, model, guide, x, measured[name], options.seed)
            page.add(history)
            about(page, options.words, {**one["measured"], **folder.configuration}, data.citation)
            page.write(folder.path / "report.html")
        except OSError as error:
            unkept.append(str(error))
    if unkept:
        raise Unkept(f"the result is printed above, but could not be saved: {'; '.join(unkept)}")


def _names(paths: list[Path]) -> dict[str, Path]:
    """Short names of folders: the last part of the path, or the whole path if last parts are equal."""
    last = [path.resolve().name for path in paths]
    names = {part if last.count(part) == 1 else str(path): path for part, path in zip(last, paths, strict=True)}
    if len(names) < len(paths):
        raise ValueError(f"each RUN must be given once, but got {', '.join(map(str, paths))}")
    return names


def _groups(paths: list[Path]) -> dict[str, dict[str, RunFolder]]:
    """The run folders of each row of the table: one, or all those of a folder of jensen train --seeds."""
    groups: dict[str, dict[str, RunFolder]] = {}
    for name, path in _names(paths).items():
        inside = sorted(path.glob("seed-*/configuration.json"), key=lambda file: (len(file.parent.name), file))
        if (path / "configuration.json").is_file() or not inside:
            groups[name] = {name: RunFolder.open(path)}
        else:
            groups[name] = {f"{name}/{file.parent.name}": RunFolder.open(file.parent) for file in inside}
            _check_alike(groups[name])
    return groups


def _check_alike(runs: dict[str, RunFolder]) -> None:
    """Raise an error if training runs of one row differ in more than the seed."""
    (first, one), *others = runs.items()
    for name, folder in others:
        for part in ("pair", "training"):
            ours, theirs = one.configuration[part], folder.configuration[part]
            if other := sorted(key for key in ours if key != "seed" and ours[key] != theirs.get(key)):
                listed = ", ".join(f"{key} {ours[key]} and {theirs.get(key)}" for key in other)
                raise ValueError(
                    f"{first} and {name} differ in more than the seed ({listed}), so they cannot share a row: give "
                    "their own folders as RUN"
                )


def _runs(of: dict[str, RunFolder]) -> str:
    return f", {len(of)} training runs" if len(of) > 1 else ""


def _identity(folder: RunFolder) -> dict[str, Any]:
    """The settings that identify the data of a run; a user's file is identified by its contents, not its path."""
    data = folder.configuration["data"]
    own = data.get("sha256") is not None  # its hash identifies it
    left = ("streamed", "source") if own else ("streamed",)
    return {name: value for name, value in data.items() if value is not None and name not in left}


def _rows(data: Dataset, settings: dict[str, Any], options: argparse.Namespace) -> Tensor:
    """The data points to measure: at most ``--test-size`` of the split, binarized if training batches are."""
    for name in ("particles", "test_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but got {getattr(options, name)}")
    n = count(data, options.split)
    if not n:
        raise ValueError(f"--split {options.split} is empty for {data.name}: use another split")
    x = picked(data, options.split, pick(n, options.test_size, options.seed))
    transform = batch_transform(settings)
    with private_randomness(options.seed, "evaluate", "data"):
        return placed((x,), None, transform)[0]


def _fitted_to(data: Dataset, options: argparse.Namespace) -> Tensor | Source | None:
    """The data for the baseline: the training data, unless these are measured themselves."""
    return None if options.split == "train" else rows_in(data, "train")


def _fell(history: History) -> str:
    """A sentence with a remedy, if the training bound fell from the first to the last epoch; else empty."""
    bounds = history.elbo
    if len(bounds) < 2 or not bounds[-1] < bounds[0]:
        return ""
    return f"the training bound fell from {bounds[0]:.4g} to {bounds[-1]:.4g}: train with a lower --lr"


def _describe(folder: RunFolder) -> str:
    pair, training = folder.configuration["pair"], folder.configuration["training"]
    latent = ",".join(map(str, pair["latent"]))
    return f"{pair['model']} with {latent} latents, guide {pair['guide']}, objective {training['objective']}"


def _bits(evidence: Evidence, data: Dataset, x: Tensor, bits: bool) -> str:
    if not bits:
        return str(evidence)
    value = evidence.bits_per_dimension(data.bits_offset_of(x))
    return f"{evidence}\nbits per dimension: {value:.4f}{_offset(data, x)}"


def _table(table: Comparison, data: Dataset, x: Tensor, bits: bool) -> str:
    unit = f"bits per dimension, sign reversed: smaller is better{_offset(data, x)}" if bits else table.unit
    return f"{unit}\n{table.table(bits=bits, offset=data.bits_offset_of(x))}\n\n{table.sentence()}"


def _offset(data: Dataset, x: Tensor) -> str:
    return f" (with {added_bits(data)} added)" if data.bits_offset_of(x) else ""


def _report(
    folder: RunFolder, evidence: Evidence, offset: float, options: argparse.Namespace, epochs: int
) -> dict[str, Any]:
    settings = {
        name: getattr(options, name) for name in ("split", "test_size", "particles", "tolerance", "refine", "seed")
    }
    return {
        "schema": SCHEMA,
        "run": str(folder.path),
        "measured": settings,
        "epochs": epochs,
        "units": evidence.unit,
        "bits_per_dimension": evidence.bits_per_dimension(offset),
        "summary": evidence.summary(),
        "evidence": json.loads(evidence.to_json()),  # Evidence.from_json reads it
        "configuration": folder.configuration,
        "versions": versions(),
    }
