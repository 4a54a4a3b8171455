"""The report.html of a command: what it measured, on one page that opens from a disk."""

from __future__ import annotations

__all__ = ["about", "curves_of", "page_of", "shown_by"]

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import jensen
from jensen.datasets import Dataset
from jensen.inference import Bounds, Evidence, bounds, calibrate, decode, evaluate, reconstruct, simulate
from jensen.kernel.randomness import private_randomness
from jensen.reports import Report
from jensen.reports.page import Code, Grid, Text
from jensen.reports.references import references

from .terminal import command, notices, versions

_FEW = 200  # data points that calibration simulates
_SHOWN = 12  # images
_FEATURES = 8  # of a row


def page_of(title: str, data: Dataset, x: Tensor) -> Report:
    """A report on data points [N, ...] of a data set, which are shown as images where they are images."""
    return Report(title, data=x, image_shape=data.image_shape, value_range=data.value_range, columns=data.columns)


def curves_of(pairs: Mapping[str, tuple[nn.Module, nn.Module]], x: Tensor, seed: int) -> dict[str, Bounds]:
    """Bounds on log p(x) by name, without those of joint weights and of guides without a density."""
    found = {}
    for name, (model, guide) in pairs.items():
        with suppress(ValueError, NotImplementedError):
            found[name] = bounds(model, guide, x, particles=1024, seed=seed, progress=False)
    return found


def shown_by(
    page: Report, model: nn.Module, guide: nn.Module, x: Tensor, evidence: Evidence | None, seed: int, name: str = ""
) -> None:
    """Add what a model and a guide make of data points: calibration, samples, reconstructions; under a name."""
    of = f" of {name}" if name else ""
    try:
        ranks = calibrate(model, guide, _FEW, seed=seed, progress=False)
    except (ValueError, NotImplementedError, TypeError) as error:
        page.section(f"Calibration{of}", Text(f"Not measured: {error}."))
    else:
        page.add(ranks, name)
    with private_randomness(seed, "pictures"), torch.no_grad():
        latents, drawn = simulate(model, _SHOWN)
        means = decode(model, latents)
    again = reconstruct(model, guide, x[:_SHOWN], seed=seed)
    if isinstance(again, dict):  # of several sites
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a few data points that the model made itself
        made = evaluate(model, guide, drawn, 500, seed=seed, progress=False)
    if page.material.images is not None:
        shown = [([mean], f"log p(x) {value:.1f}") for mean, value in zip(means, made.best.tolist(), strict=True)]
        page.images(
            f"Samples{of}", shown, "E[x | z] for z from the prior; below it log p(x) of an x drawn from p(x | z)."
        )
        numbers = (
            [""] * _SHOWN
            if evidence is None
            else [f"#{n}: log p(x) {evidence.best[n]:.1f}, ELBO {evidence.elbo[n]:.1f}" for n in range(len(again))]
        )
        shown = [([x[n], image], numbers[n]) for n, image in enumerate(again)]
        page.images(
            f"Reconstructions{of}", shown, "Left the data point, right its mean E[x | z] over samples from the guide."
        )
        return
    names = page.material.columns or [f"[{i}]" for i in range(drawn[0].numel())]
    columns = [("", ""), *((name, "") for name in names[:_FEATURES])]
    rows: list[tuple[str, str, list[str], None]] = []
    rows += [(f"sample {n}", "", _cells(row), None) for n, row in enumerate(drawn)]
    page.section(f"Samples{of}", Grid(columns, rows))
    rows = []
    for n, row in enumerate(again):
        rows += [(f"#{n}", "", _cells(x[n]), None), ("reconstruction", "", _cells(row), None)]
    page.section(f"Reconstructions{of}", Grid(columns, rows), note="E[x | z] averaged over samples from the guide.")


def _cells(row: Tensor) -> list[str]:
    return [f"{value:.4g}" for value in row.flatten()[:_FEATURES].tolist()]


def about(page: Report, words: Sequence[str], settings: Mapping[str, Any], citation: str) -> None:
    """Add what the command said, how to repeat it, and whom to cite."""
    if lines := notices():
        page.section("Messages", Code("\n".join(lines)))
    page.made_by(command(*words), settings, versions())
    sources = [f"jensen {jensen.__version__}: latent-variable models for Pyro whose likelihoods can be trusted"]
    sources += [citation] if citation else []
    sources += references(inspect.getdoc(evaluate) or "")
    page.section("What to cite", *(Text(source) for source in sources))
