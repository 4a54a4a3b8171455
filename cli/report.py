"""The pictures of a report."""

from __future__ import annotations

__all__ = ["draw"]

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from jensen.datasets import Dataset
from jensen.guides import PriorGuide
from jensen.inference import bounds, terms
from jensen.plots import plot_bounds, plot_images, plot_latent

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]


@torch.no_grad()
def draw(
    out: Path,
    data: Dataset,
    test: Tensor,
    block: str,
    *,
    bounds_of: Pairs | None = None,
    pictures_of: Pairs | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> list[str]:
    """Draw the bounds of one block's pairs, or latent map, samples and reconstructions of pairs; the files' names."""
    drawn = []
    if bounds_of:
        few = test[:200]
        curves = {
            name: bounds(model, guide, few, particles=1024, seed=seed, progress=False)
            for name, (model, guide) in bounds_of.items()
        }
        low, high = _window([curve.mean for curve in curves.values()])
        hidden = {name for name, curve in curves.items() if float(curve.mean[-1]) < low}
        ax = plot_bounds({f"{name} (below)" if name in hidden else name: curve for name, curve in curves.items()})
        ax.set_ylim(low, high)
        ax.set_title(f"{data.name}: bounds rise to log p(x) ({len(few)} test data)", fontsize="medium")
        drawn.append(_save(ax.figure, out / f"bounds-{block}.png"))  # type: ignore[arg-type]
    if pictures_of:
        drawn.append(_save(_latent_maps(pictures_of, test, labels, seed), out / "latent-map.png"))
        if data.image_shape is not None:
            drawn.append(_save(_samples(pictures_of, data, test, seed), out / "samples.png"))
            drawn.append(_save(_reconstructions(pictures_of, data, test, seed), out / "reconstructions.png"))
    return drawn


def _latent_maps(pairs: Pairs, test: Tensor, labels: Tensor | None, seed: int) -> Figure:
    figure = Figure(figsize=(3.9 * len(pairs), 3.5), layout="constrained")
    for ax, (name, (model, guide)) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        torch.manual_seed(seed)
        z = terms(model, guide, test, particles=32).values["z"].mean(0)  # [N, D]
        if z.shape[1] < 2:
            z = torch.cat([z, torch.zeros_like(z)], dim=1)
        plot_latent(z, labels, title=f"{name}: posterior means", ax=ax)
        if ax.get_legend() is not None and ax.get_subplotspec().colspan.stop < len(pairs):
            ax.get_legend().remove()  # one legend, at the right
    return figure


def _samples(pairs: Pairs, data: Dataset, test: Tensor, seed: int) -> Figure:
    assert data.image_shape is not None
    assert data.value_range is not None
    panels = {"test data": test[:30]}
    for name, (model, _) in pairs.items():
        torch.manual_seed(seed)
        means = terms(model, PriorGuide(model), test[:30]).p["x"].mean[0]
        panels[f"{name}: E[x | z], z ~ p(z)"] = means
    figure = Figure(figsize=(3.2 * len(panels), 3.0))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.08)
    for ax, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        plot_images(images, data.image_shape, columns=6, value_range=data.value_range, title=title, ax=ax)
    return figure


def _reconstructions(pairs: Pairs, data: Dataset, test: Tensor, seed: int) -> Figure:
    assert data.image_shape is not None
    assert data.value_range is not None
    x = test[:12]
    rows = {"data": x}
    for name, (model, guide) in pairs.items():
        torch.manual_seed(seed)
        rows[name] = terms(model, guide, x, particles=32).p["x"].mean.mean(0)
    figure = Figure(figsize=(7.5, 0.35 + 0.53 * len(rows)), layout="constrained")
    plot_images(
        torch.cat(list(rows.values())),
        data.image_shape,
        columns=len(x),
        value_range=data.value_range,
        row_labels=tuple(rows),
        title="posterior mean of the reconstruction",
        ax=figure.subplots(),
    )
    return figure


def _window(curves: list[Tensor]) -> tuple[float, float]:
    """Limits that hold all curves, but the lowest of several: naive Monte Carlo starts far below the others."""
    starts = sorted(float(curve[0]) for curve in curves)
    top = max(float(curve[-1]) for curve in curves)
    low = starts[1 if len(starts) > 2 else 0]
    margin = 0.08 * (top - low) + 1e-3
    return low - margin, top + margin


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=150)
    return path.name
