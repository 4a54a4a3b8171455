"""``jensen train``: train a model and a guide, and save them in a run folder."""

from __future__ import annotations

__all__ = ["run"]

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jensen import processes
from jensen.datasets import Dataset
from jensen.inference import Callback, History, fit, likely_reason
from jensen.kernel.batches import placed
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program
from jensen.progress import named

from .memory import memory_told, training_memory
from .page import about, page_of, shown_by
from .pairs import DENSITIES, MODELS, Design, objective_of
from .report import carried, draw_run
from .runs import RunFolder
from .sources import OWN, batch_transform, facts, flat, holds_bits, pick, reopen, settle
from .streams import count, holed, rows_in, values_of
from .terminal import command, report, say, versions
from .terminal import progress as progress_line

_LATER = ("clip", "weight_decay", "average", "tolerance")  # absent from the folders of earlier versions
_TRAINING = (
    "objective",
    "particles",
    "gradient",
    "alpha",
    "beta",
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "patience",
    "seed",
    *_LATER,
)


def run(options: argparse.Namespace, progress: bool) -> None:
    """Train a model and guide, or continue the training of a run folder; with --seeds, several of them."""
    _check_device(options.device)
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, but got {options.seeds}")
    if options.seeds == 1:
        text, document = _one(options, progress)
        if processes.rank():
            return
        report(f"{text}\nmeasure it with: {command('evaluate', options.run)}", document, options.json)
        return
    if (options.run / "configuration.json").is_file():
        raise ValueError(f"{options.run} holds a single run, so --seeds cannot use it: use another --run DIR")
    made = {}
    for seed in range(options.seed, options.seed + options.seeds):
        folder = options.run / f"seed-{seed}"
        own = {"seed": seed, "run": folder, "given": options.given - {"seed", "seeds"}, "whole": options}
        with named(f"seed {seed}"):
            made[folder.name] = _one(argparse.Namespace(**{**vars(options), **own}), progress)
    if processes.rank():
        return
    text = "\n".join(f"{name}: {text.splitlines()[0]}" for name, (text, _) in made.items())
    documents = {"runs": {name: document for name, (_, document) in made.items()}}
    report(f"{text}\nmeasure them with: {command('evaluate', options.run)}", documents, options.json)


def _one(options: argparse.Namespace, progress: bool) -> tuple[str, dict[str, Any]]:
    """Train one run; returns the text to print and the JSON document.

    Several processes train together; process 0 alone writes the folder, and prints.
    """
    with ExitStack() as stack:
        begin = _begin
        begun = (options.run / "configuration.json").is_file()
        if begun and processes.restarted():
            options.resume, options.overwrite = True, False
        if options.resume:
            begin = _again if options.seeds == 1 or begun else _begin_alike
        opened = None if processes.rank() else begin(options, stack)
        configuration = processes.of_first(lambda: None if opened is None else opened[0].configuration)
        if opened is None:
            settings = configuration or {}
            opened = RunFolder(options.run, settings), reopen(settings["data"], streams=True), False
        return _train(options, *opened, progress)


def _train(
    options: argparse.Namespace, folder: RunFolder, data: Dataset, new: bool, progress: bool
) -> tuple[str, dict[str, Any]]:
    """Train, save and draw the results; if training stops early, keep the completed epochs."""
    if processes.rank():
        _fit(folder, data, options.device, progress=False)
        return "", {}
    training = folder.configuration["training"]
    pair = Design.of(folder.configuration["pair"])
    progress_line(f"training {pair.model} with the guide {pair.guide} on {data.name}: {training['epochs']} epochs")
    try:
        with memory_told():
            history = _fit(folder, data, options.device, progress)
    except KeyboardInterrupt:
        epochs = folder.keep_history()
        raise KeyboardInterrupt(
            f"{folder.path} holds epoch {epochs} of {training['epochs']}; continue with: {_go_on(options)}"
        ) from None
    except FloatingPointError as error:
        if not folder.keep_history():
            folder.discard()
            raise
        raise FloatingPointError(
            f"{error}. {folder.path} keeps the earlier epochs; start again with a lower --lr and --overwrite"
        ) from error
    except processes.PeerError as error:
        if new and not folder.checkpoint.is_file():
            folder.discard()
            raise
        epochs = folder.keep_history()
        raise processes.PeerError(
            f"{error}; {folder.path} holds epoch {epochs} of {training['epochs']}; continue with: {_go_on(options)}"
        ) from error
    except (OSError, MemoryError) as error:
        if new and not folder.checkpoint.is_file():
            with suppress(OSError):
                folder.discard()
            raise
        if isinstance(error, MemoryError):
            raise MemoryError(f"{error}; {folder.path} keeps the earlier epochs") from error
        raise OSError(error.errno, f"{error.strerror}; continue with: {_go_on(options)}") from error
    except (ValueError, TypeError, NotImplementedError):
        if new:
            folder.discard()
        raise
    with processes.apart():
        return _finished(options, folder, data, history)


def _finished(
    options: argparse.Namespace, folder: RunFolder, data: Dataset, history: History
) -> tuple[str, dict[str, Any]]:
    """Save and draw the results of a finished run; returns the text to print and the JSON document."""
    training = folder.configuration["training"]
    history.to_json(folder.path / "history.json")
    model, guide, _ = folder.trained()
    x, labels = _some(folder, data, 1000)
    seed = training["seed"]
    active = carried(model, guide, x, seed)
    pictures = []
    if not options.no_pictures:
        settings = folder.configuration["facts"]
        pictures = draw_run(folder.path, settings, (model, guide), history, x, labels, data.classes, seed)
        _write_page(folder, data, (model, guide, history), x, active, options.words)
    document = {
        "run": str(folder.path),
        "configuration": folder.configuration,
        "history": history.to_dict(),
        "active_units": active,
        "pictures": pictures,
    }
    return str(history), document


def _write_page(
    folder: RunFolder,
    data: Dataset,
    trained: tuple[torch.nn.Module, torch.nn.Module, History],
    x: Tensor,
    active: dict[str, str],
    words: Sequence[str],
) -> None:
    """Write report.html: how training went, and what the model and the guide make of data points."""
    model, guide, history = trained
    of, settings = folder.configuration["pair"], folder.configuration
    page = page_of(f"{folder.path.name}: {of['model']} with the guide {of['guide']}, on {data.name}", data, x)
    page.add(history).find(
        *(f"{count} units of {site} carry information about the data." for site, count in active.items()),
        f"Log p(x) is not measured yet: {command('evaluate', folder.path)} does that, and replaces this page.",
    )
    shown_by(page, model, guide, x, None, settings["training"]["seed"])
    about(page, words, settings, data.citation)
    page.write(folder.path / "report.html")


def _go_on(options: argparse.Namespace) -> str:
    """The command that continues a run, or all runs of --seeds."""
    if options.seeds == 1:
        return command("train", "--run", options.run, "--resume")
    whole = options.whole
    first = ["--seed", whole.seed] if whole.seed else []
    return command("train", "--run", whole.run, *first, "--seeds", whole.seeds, "--resume")


def _fit(folder: RunFolder, data: Dataset, device: str, progress: bool) -> History:
    training = folder.configuration["training"]
    by_epochs = training["schedule"] == "cosine"  # as in the checkpoints of earlier versions
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=training["epochs"])
    model, guide = folder.pair()
    return fit(
        model,
        guide,
        rows_in(data, "train"),
        objective_of(training),
        epochs=training["epochs"],
        batch_size=training["batch_size"],
        lr=training["lr"],
        scheduler=cosine if by_epochs else None,
        schedule="constant" if by_epochs else training["schedule"],
        validation=rows_in(data, "validation") if count(data, "validation") else None,
        patience=training["patience"],
        **{name: training.get(name) for name in _LATER},
        seed=training["seed"],
        device=device,
        checkpoint=folder.checkpoint,
        resume=True,
        batch_transform=batch_transform(folder.configuration["data"]),
        callbacks=[] if progress else [_Lines(training["epochs"])],
        progress=progress,
    )


class _Lines(Callback):
    """Progress as plain lines, for logs: about twenty per run, and at least one per minute."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._every, self._printed = epochs, -(-epochs // 20), time.monotonic()

    def after_epoch(self, history: History, model: Program, guide: Program) -> None:
        epoch = len(history.elbo)
        if epoch % self._every and epoch < self._epochs and time.monotonic() < self._printed + 60:
            return
        self._printed = time.monotonic()
        held_out = f", validation {history.validation[-1]:.3f}" if history.validation else ""
        progress_line(
            f"epoch {epoch} of {self._epochs}: bound {history.elbo[-1]:.3f}{held_out}, {history.seconds:.0f} s"
        )


def _some(folder: RunFolder, data: Dataset, size: int) -> tuple[Tensor, Tensor | None]:
    """At most ``size`` test points (without any, training points), prepared like batches; and their classes, if any."""
    settings, seed = folder.configuration, folder.configuration["training"]["seed"]
    split = "test" if len(data.test) else "train"
    x: Tensor = getattr(data, split)
    rows, transform = pick(len(x), size, seed), batch_transform(settings["data"])
    labels = data.labels[split][rows] if data.labels else None
    with private_randomness(seed, "train", "pictures"):
        return placed((x[rows],), None, transform)[0], labels


def _begin(options: argparse.Namespace, stack: ExitStack) -> tuple[RunFolder, Dataset, bool]:
    _check_numbers(options)
    kind = MODELS[options.model]
    likelihood = None if options.likelihood == "auto" else options.likelihood
    design = Design(options.model, options.guide, options.latent, options.hidden, likelihood, options.components)
    settings = {
        "source": options.data,
        "binarize": None if options.binarize == "none" else options.binarize,
        "dequantize": options.dequantize,
        "seed": options.data_seed,
        **{name: getattr(options, name) for name in OWN},
    }
    density = (likelihood is None and settings["binarize"] is None) or likelihood in DENSITIES
    settings, data, indexed = settle(settings, density, streams=True)
    binary = data.levels == 2 or settings["binarize"] is not None
    flat(data, "train")
    if kind.observes and likelihood is None:
        bits = holds_bits(data)
        if bits and not binary:
            say(f"{data.name}: every value is 0 or 1, so the likelihood is bernoulli (--likelihood sets another)")
        design = replace(design, likelihood="bernoulli" if binary or bits else "gaussian")
    if kind.mixes and options.components is None:
        design = replace(design, components=10)
    _check_support(design, data, binary)
    design = replace(design, masked=holed(data))
    training = {name: getattr(options, name) for name in _TRAINING}
    if training["particles"] is None:
        training["particles"] = 1 if options.objective == "elbo" else 10
    objective_of(training)
    if (design.likelihood or "gaussian") in DENSITIES and (doubt := likely_reason(data.train, not indexed)):
        say(f"{data.name}: {doubt}")
    _check_memory(design, data.train[0].numel())
    configuration = {"data": settings, "facts": facts(data), "pair": design.to_dict(), "training": training}
    return RunFolder.begin(options.run, configuration, options.overwrite, stack), data, True


def _again(options: argparse.Namespace, stack: ExitStack) -> tuple[RunFolder, Dataset, bool]:
    """Open a run to continue: each given option must equal the setting of the run; only epochs may differ."""
    folder = RunFolder.open(options.run)
    _check_again(options, folder)
    stack.enter_context(folder.alone())
    data = _data_now(options, folder)
    opened = reopen(data, streams=True)
    if data != folder.configuration["data"]:
        folder.configuration["data"] = data
        folder.write()
    _take_epochs(folder, options)
    changed = {
        name: (now, then)
        for name, now in versions().items()
        if now != (then := folder.configuration["versions"].get(name))
    }
    for name, (now, then) in changed.items():
        say(f"the run was started with {name} {then} and continues with {now}: its numbers may differ slightly")
    folder.tidy()
    return folder, opened, False


def _begin_alike(options: argparse.Namespace, stack: ExitStack) -> tuple[RunFolder, Dataset, bool]:
    """Start a missing run of --seeds under --resume, with the settings of the existing runs."""
    whole = options.whole.run
    others = sorted(whole.glob("seed-*/configuration.json"))
    if not others:
        raise ValueError(f"{whole} holds no run of --seeds to continue: omit --resume")
    other = RunFolder.open(others[0].parent)
    _check_again(options, other)
    data = _data_now(options, other)
    training = {**other.configuration["training"], "seed": options.seed}
    if "epochs" in options.given:
        training["epochs"] = options.epochs
    configuration = {**other.configuration, "data": data, "training": training}
    return RunFolder.begin(options.run, configuration, False, stack), reopen(data, streams=True), True


def _check_again(options: argparse.Namespace, folder: RunFolder) -> None:
    """Raise an error for options that --resume cannot change; options newer than the run count as not given."""
    if options.overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: use only one of them")
    training, data = folder.configuration["training"], folder.configuration["data"]
    pair = Design.of(folder.configuration["pair"])
    begun = {
        **dict.fromkeys((*OWN, *_LATER)),
        **vars(pair),
        **training,
        **data,
        "data": data["source"],
        "data_seed": data["seed"],
    }
    begun["seed"] = training["seed"]
    begun["image_shape"] = tuple(data["image_shape"] or ()) or None
    for name in sorted(options.given & set(begun) - {"epochs"}):
        value = getattr(options, name)
        if name == "data" and data.get("sha256") is not None:  # reopen compares its contents
            continue
        if value not in ("auto", begun[name]) and not (value == "none" and begun[name] is None):
            then = "not given" if begun[name] is None else begun[name]
            raise ValueError(
                f"--{name.replace('_', '-')} was {then} when {folder.path} was started, and cannot be {value} now: "
                "omit it, or use another folder"
            )


def _data_now(options: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
    """The settings of the data of a run; --data gives the current path of its file."""
    data: dict[str, Any] = folder.configuration["data"]
    if data.get("sha256") is not None and "data" in options.given:
        return folder.data_settings(Path(options.data))
    return data


def _take_epochs(folder: RunFolder, options: argparse.Namespace) -> None:
    """Increase the number of epochs of the run, if --epochs is larger."""
    training = folder.configuration["training"]
    if "epochs" not in options.given or options.epochs == training["epochs"]:
        return
    if training["schedule"] != "constant":
        raise ValueError(
            f"--epochs cannot be {options.epochs} now, because the learning rate follows a schedule "
            f"({training['schedule']}) over {training['epochs']} epochs: omit it, or use another folder"
        )
    done = folder.keep_history()
    if options.epochs < max(1, done):
        raise ValueError(f"--epochs is {options.epochs}, but {folder.path} holds {done} epochs: give a larger number")
    training["epochs"] = options.epochs
    folder.write()


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("particles", "epochs", "batch_size", "patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but got {value}")
    for name in ("seed", "data_seed"):
        if not 0 <= getattr(options, name) < 2**32:
            option, value = name.replace("_", "-"), getattr(options, name)
            raise ValueError(f"--{option} must be between 0 and 2^32 - 1, but got {value}")
    for name in ("lr", "clip", "tolerance"):
        value = getattr(options, name)
        if value is not None and not 0 < value < inf:
            raise ValueError(f"--{name} must be a positive number, but got {value:g}")
    if options.weight_decay is not None and not 0 <= options.weight_decay < inf:
        raise ValueError(f"--weight-decay must be 0 or a positive number, but got {options.weight_decay:g}")
    if options.tolerance is not None and options.patience is not None:
        raise ValueError(
            "--tolerance keeps the averaged parameters at convergence, --patience those of the best epoch: use only one"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); use --device cpu") from error


def _check_memory(design: Design, features: int) -> None:
    """Raise an error for a model and guide too large for this machine, before anything is written."""
    latent, widths = (",".join(map(str, numbers)) for numbers in (design.latent, design.hidden[0]))
    mixed = f", --components {design.components}" if design.components else ""
    what = f"--latent {latent}, --hidden {widths}{mixed} and {features} features"
    with private_randomness(0), training_memory(what):
        design.build(features)


def _check_support(design: Design, data: Dataset, binary: bool) -> None:
    """Raise an error if likelihood and data do not fit together, before anything is written."""
    likelihood = design.likelihood if MODELS[design.model].observes else "gaussian"
    if binary and likelihood in DENSITIES:
        what = f"--likelihood {likelihood}" if MODELS[design.model].observes else f"--model {design.model}"
        raise ValueError(
            f"{what} is a density of real numbers, which is unbounded on binary data such as {data.name}: use --model "
            "vae --likelihood bernoulli"
        )
    values = values_of(data)
    if likelihood == "bernoulli" and not binary and not values.bits:
        raise ValueError(
            f"--likelihood bernoulli needs zeros and ones, but {data.name} holds values from {values.low:g} to "
            f"{values.high:g}: binarize them (--binarize threshold, sample or dynamic), or use --likelihood gaussian"
        )
    if design.likelihood in ("poisson", "negative-binomial") and not (values.low >= 0 and values.whole):
        raise ValueError(
            f"--likelihood {design.likelihood} needs counts 0, 1, 2, ..., but {data.name} holds other values: use "
            "--likelihood gaussian"
        )
