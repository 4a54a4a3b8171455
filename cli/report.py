"""The figures of a report."""

from __future__ import annotations

__all__ = ["carried", "draw_bounds", "draw_gaps", "draw_images", "draw_run", "images_of"]

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from jensen.datasets import Dataset
from jensen.guides import PriorGuide
from jensen.inference import (
    Bounds,
    Comparison,
    Evidence,
    History,
    PosteriorCollapseWarning,
    decode,
    encode,
    rate_distortion,
    simulate,
    terms,
)
from jensen.kernel.randomness import derived_seed, private_randomness
from jensen.plots import plot_bounds, plot_gaps, plot_images, plot_latent, plot_reconstructions, plot_training, save
from jensen.plots.axes import house_style, own_figure, settle, without_pyplot

from .terminal import say

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]

_LESS = "train for longer, reduce --beta, or use a weaker decoder (narrower --hidden)"


def carried(
    model: nn.Module, guide: nn.Module, x: Tensor, seed: int, whose: str = "", remedy: str = _LESS
) -> dict[str, str]:
    """The number of active units of each latent site, such as "1 of 8"; prints a line for a collapsed site."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PosteriorCollapseWarning)
            found = rate_distortion(model, guide, x, 50, seed=seed, progress=False)
    except (ValueError, NotImplementedError):  # not defined for joint weights and for guides without a density
        return {}
    for site in found.collapsed if len(x) > 1 else ():
        say(f"{whose}posterior collapse: no unit of {site} carries information about the data; {remedy}")
    return {site: f"{count} of {found.activity[site].numel()}" for site, count in found.active_units.items()}


@torch.no_grad()
@without_pyplot()
@house_style()
def draw_bounds(
    out: Path, data: Dataset, size: int, block: str, curves: Mapping[str, Bounds], evidence: Mapping[str, Evidence]
) -> list[str]:
    """Draw the bounds of one block's guides on so many data points.

    Args:
        out: the folder.
        data: whose name the title has.
        size: how many data points were measured.
        block: the name of the block.
        curves: the bounds of each guide.
        evidence: of each model, where there are several: its log p(x) is marked.

    Returns:
        The name of the file.
    """
    known = [evidence[name].best.mean() for name in curves if name in evidence]
    low, high = _window([curve.mean for curve in curves.values()], known)
    hidden = {name: curve for name, curve in curves.items() if float(curve.mean[0]) < low}
    ax = plot_bounds({name: curve for name, curve in curves.items() if name not in hidden}, evidence=evidence)
    ax.set_ylim(low, high)
    ax.legend(title="bands: 2 Monte Carlo errors")
    title = f"{data.name}, {size} test data points: bounds rise to log p(x)"
    for name, curve in hidden.items():
        title += f"\nbelow the frame: {name}, from {float(curve.mean[0]):.1f} to {float(curve.mean[-1]):.1f}"
    ax.set_title(title)
    return [_keep(ax.figure, out / f"bounds-{block}.png")]  # type: ignore[arg-type]


@without_pyplot()
@house_style()
def draw_gaps(out: Path, block: str, table: Comparison) -> list[str]:
    """Draw the approximation and amortization gaps of one block, if measured; returns the file name."""
    shown = {name: row.gaps for name, row in table.rows.items() if row.gaps is not None}
    shown = {name: gaps for name, gaps in shown.items() if name != "prior"}  # its bar would dwarf the others
    if not shown:
        return []
    ax = plot_gaps(shown)
    ax.set_title("variational gap of each guide" + (" (not shown: prior)" if "prior" in table.rows else ""))
    return [_keep(ax.figure, out / f"gaps-{block}.png")]  # type: ignore[arg-type]


@torch.no_grad()
@without_pyplot()
@house_style()
def draw_images(out: Path, data: Dataset, test: Tensor, pairs: Pairs, labels: Tensor | None, seed: int) -> list[str]:
    """Draw latent map, samples and reconstructions, if the data allow them; returns the file names."""
    drawn = []
    if all(model.latents["z"][0] > 1 for model, _ in pairs.values()):  # type: ignore[index]
        drawn.append(_keep(_latent_maps(pairs, test, labels, data.classes, seed), out / "latent-map.png"))
    if data.image_shape is not None:
        drawn.append(_keep(_samples(pairs, data, test, seed), out / "samples.png"))
        drawn.append(_keep(_reconstructions(pairs, data, test, seed), out / "reconstructions.png"))
    return drawn


@without_pyplot()
@house_style()
def draw_run(
    out: Path,
    facts: Mapping[str, Any],
    pair: tuple[nn.Module, nn.Module],
    history: History,
    test: Tensor,
    labels: Tensor | None,
    classes: Sequence[str],
    seed: int,
) -> list[str]:
    """Draw the figures of a run folder: training curve, samples, reconstructions, latent map; returns the file names.

    Args:
        out: the run folder.
        facts: of the data, from the configuration.
        pair: model and guide.
        history: of the training.
        test: data points, [N, X].
        labels: their classes, [N], if any.
        classes: the names of those classes, if any.
        seed: of the samples.
    """
    model, guide = pair
    drawn = {"training": plot_training(history)}
    with private_randomness(seed, "pictures"):
        latents, _ = simulate(model, 4000)
        if facts["image_shape"] is not None:
            few = test[:20]
            again = plot_reconstructions(
                model, guide, few, tuple(facts["image_shape"]), value_range=_values(facts, few)
            )
            drawn["samples"] = images_of(decode(model, {name: z[:50] for name, z in latents.items()}), facts)
            drawn["reconstructions"] = again
        site = "z" if "z" in latents else "z_1"
        if latents[site].shape[-1] > 1:
            drawn["latent-map"] = plot_latent(
                encode(model, guide, test)[site], labels, prior=latents[site], classes=classes
            )
    return [_keep(ax.figure, out / f"{name}.png") for name, ax in drawn.items()]  # type: ignore[arg-type]


@without_pyplot()
@house_style()
def images_of(x: Tensor, facts: Mapping[str, Any], columns: int = 10) -> Axes:
    """A figure of images [N, X]; the facts of the data give their shape and range."""
    return plot_images(x, tuple(facts["image_shape"]), columns=columns, value_range=_values(facts, x))


def _values(facts: Mapping[str, Any], x: Tensor) -> tuple[float, float]:
    """The values drawn white and black: if none are declared, the range of the images."""
    low, high = facts["value_range"] or (float(x.min()), float(x.max()))
    return low, high


def _latent_maps(pairs: Pairs, test: Tensor, labels: Tensor | None, classes: Sequence[str], seed: int) -> Figure:
    """Posterior means, each model's rotated to those of the first, in one plane and one frame.

    A prior N(0, I) does not change under a rotation, so models that differ by one are the same: only after the rotation
    do maps differ where models do.
    """
    means = {}
    for name, (model, guide) in pairs.items():
        torch.manual_seed(derived_seed(seed, "pictures"))
        means[name] = terms(model, guide, test, particles=32).values["z"].mean(0)  # [N, D]
    maps, shares = aligned(list(means.values()))
    first, reach = next(iter(means)), 1.08 * float(max(z.abs().max() for z in maps))
    figure = own_figure(min(7.0, 1.4 + 2.2 * len(maps)), 3.1)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, name, z, share in zip(axes, means, maps, shares, strict=True):
        title = f"{name}\n" + ("" if name == first else f"R² with {first}: {share:.2f}")
        plot_latent(z, labels, classes=classes, title=title, ax=ax)
        ax.set_aspect("equal", adjustable="box")
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel=f"1st principal direction\nof {first}", ylabel="")
        ax.tick_params(labelleft=ax is axes[0])
        if ax.get_legend() is not None and ax is not axes[-1]:
            ax.get_legend().remove()  # one legend, at the right
    axes[0].set_ylabel(f"2nd principal direction\nof {first}")
    rotated = ", each model's rotated to those of the first (Procrustes)" if len(maps) > 1 else ""
    figure.suptitle(f"means of q(z | x){rotated}")
    settle(figure)
    return figure


def aligned(means: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Positions of the same data points in several latent spaces, on the principal plane of the first.

    Args:
        means: positions [N, D], one tensor for each model.

    Returns:
        Positions [N, 2], centred, after the rotation (or reflection) that is closest to the first, and the share of the
        variance of the first that each explains, up to a scale: 1 for spaces that differ by a rotation.
    """
    centred = [(z - z.mean(0)).double() for z in means]
    target = centred[0]
    plane = torch.linalg.svd(target, full_matrices=False).Vh[:2].T  # [D, 2]
    maps, shares = [], []
    for z in centred:
        u, s, v = torch.linalg.svd(z.T @ target)
        maps.append(z @ u @ v @ plane)
        shares.append(float(s.sum().square() / (z.square().sum() * target.square().sum())))
    return maps, shares


def _range(data: Dataset) -> tuple[float, float]:
    """The values drawn white and black: if none are declared, the range of the data."""
    return data.value_range or (float(data.train.min()), float(data.train.max()))


def _samples(pairs: Pairs, data: Dataset, test: Tensor, seed: int) -> Figure:
    assert data.image_shape is not None
    few = test[:30]
    panels = {"test data\n": few}
    for name, (model, _) in pairs.items():
        torch.manual_seed(derived_seed(seed, "pictures"))
        panels[f"{name}\nE[x | z], z ~ p(z)"] = terms(model, PriorGuide(model), few).mean_p("x")[0]
    figure = own_figure(min(7.0, 1.75 * len(panels)), 0.3 + min(1.75, 7.0 / len(panels)) * 0.85)
    for ax, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        plot_images(images, data.image_shape, columns=6, value_range=_range(data), title=title, ax=ax)
    return figure


def _reconstructions(pairs: Pairs, data: Dataset, test: Tensor, seed: int) -> Figure:
    assert data.image_shape is not None
    x = test[:12]
    rows = {"data": x}
    for name, (model, guide) in pairs.items():
        torch.manual_seed(derived_seed(seed, "pictures"))
        rows[name] = terms(model, guide, x, particles=32).mean_p("x").mean(0)
    figure = own_figure(7.0, 0.35 + 0.5 * len(rows))
    plot_images(
        torch.cat(list(rows.values())),
        data.image_shape,
        columns=len(x),
        value_range=_range(data),
        row_labels=tuple(rows),
        title="E[x | z], averaged over 32 samples from q(z | x)",
        ax=figure.subplots(),
    )
    return figure


def _window(curves: list[Tensor], known: list[Tensor]) -> tuple[float, float]:
    """Axis limits for all curves except the lowest of three or more: naive Monte Carlo starts far below."""
    starts = sorted(float(curve[0]) for curve in curves)
    top = max(float(value) for value in (*(curve[-1] for curve in curves), *known))
    low = starts[1 if len(starts) > 2 else 0]
    margin = 0.08 * (top - low) + 1e-3
    return low - margin, top + margin


def _keep(figure: Figure, path: Path) -> str:
    """Save a figure as PNG and PDF; returns the name of the PNG."""
    return save(figure, path)[0].name
