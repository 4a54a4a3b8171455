"""The latent map: where the data and the prior lie in latent space."""

from __future__ import annotations

__all__ = ["plot_latent"]

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import checked

from .axes import COLOURS, MARKERS, own_axes, styled, text_size
from .density import mass_contours

_MASS = (0.9, 0.5)
_DASHES = ("--", "-")


@checked
@styled
def plot_latent(
    z: Tensor,
    labels: Tensor | None = None,
    *,
    prior: Tensor | None = None,
    classes: Sequence[str] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Latent positions in two dimensions, coloured by class, with curves that enclose 50 and 90 % of the prior.

    For more than ten classes a colour bar beside the map replaces the legend.

    More than two latent dimensions are projected on the two principal components of ``z``; the labels of the axes say
    so, and the prior is projected in the same way.

    Args:
        z: one position for each data point, [N, D] with D at least 2: ``encode(model, guide, x)["z"]`` of
            :func:`~jensen.inference.encode`.
        labels: the class of each data point, int64 [N]; one colour for all if None.
        prior: samples of the prior, [M, D]: ``simulate(model, 10_000)[0]["z"]`` of :func:`~jensen.inference.simulate`.
            The curves are those of a kernel density estimate, with Scott's bandwidth. None draws no curves.
        classes: the name of every class, by its number: ``data.classes``; empty shows the numbers.
        title: above the map.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, with equal units in both directions.

    Raises:
        ValueError: for fewer than two dimensions, labels of another length, fewer ``classes`` than
            labels, or a prior of other dimensions.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=2).fit_closed_form(data.train)
        >>> z = model.posterior(data.test).mean
        >>> ax = plot_latent(z, data.labels["test"], prior=torch.randn(5000, 2))
        >>> ax.get_xlabel()
        '$z_1$'
    """
    if z.dim() != 2 or z.shape[1] < 2:
        raise ValueError(f"plot_latent needs z of shape [N, D] with D at least 2, but got {list(z.shape)}")
    if not (z.isfinite().all() and (prior is None or prior.isfinite().all())):
        raise ValueError("plot_latent needs finite numbers, but z or prior holds NaN or infinity: leave those rows out")
    if labels is not None and labels.shape != (len(z),):
        raise ValueError(f"labels needs one for each of the {len(z)} data points, but has shape {list(labels.shape)}")
    if labels is not None and classes and int(labels.max()) >= len(classes):
        raise ValueError(f"classes names {len(classes)} classes, but labels holds {int(labels.max())}")
    D = z.shape[1]
    if prior is not None and (prior.dim() != 2 or prior.shape[1] != D or len(prior) < 3):
        raise ValueError(f"prior needs three samples or more, of shape [M, {D}], but got {list(prior.shape)}")
    z, drawn = z.detach().cpu().double(), None if prior is None else prior.detach().cpu().double()
    if D > 2:
        centre = z.mean(0)
        plane = torch.linalg.eigh((z - centre).T @ (z - centre)).eigenvectors.flip(1)[:, :2]  # [D, 2]
        z, drawn = (z - centre) @ plane, None if drawn is None else (drawn - centre) @ plane
    ax = own_axes(ax, height=2.7)
    if drawn is not None:
        mass_contours(ax, drawn, _MASS, colors="0.25", linewidths=1.0, linestyles=_DASHES, zorder=3)
    numbers = [] if labels is None else labels.unique().tolist()
    names = [_short(classes[number]) if classes else str(number) for number in numbers]
    if labels is None:
        ax.scatter(z[:, 0], z[:, 1], s=8, color=COLOURS[0], linewidths=0)
    elif len(numbers) > len(COLOURS):
        _scale_of_classes(ax, z, labels, numbers, names)
    else:
        for number, name, colour, marker in zip(numbers, names, COLOURS, MARKERS, strict=False):
            here = labels.cpu() == number
            style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
            ax.scatter(z[here, 0], z[here, 1], s=10, linewidths=0.2, edgecolors="0.2", **style)
    if drawn is not None:
        for mass, dashes in zip(reversed(_MASS), reversed(_DASHES), strict=True):
            ax.plot([], [], color="0.25", linewidth=1.0, linestyle=dashes, label=f"prior, {100 * mass:.0f} %")
    small, listed = text_size(ax), 0 < len(numbers) <= len(COLOURS)
    text: dict[str, Any] = {"title": "class" if listed else None, "fontsize": small, "title_fontsize": small}
    if len(numbers) > len(COLOURS) and drawn is not None:
        ax.legend(**text)  # beside the map stands the scale
    elif listed or drawn is not None:
        ax.legend(**text, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("$z_1$" if D == 2 else f"1st principal direction of {D} latents")
    ax.set_ylabel("$z_2$" if D == 2 else f"2nd principal direction of {D} latents")
    if title:
        ax.set_title(title, fontsize=text_size(ax, 1.0))
    return ax


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _scale_of_classes(ax: Axes, z: Tensor, labels: Tensor, numbers: list[int], names: list[str]) -> None:
    """A scatter with a colour bar: a legend cannot tell apart more classes than there are colours."""
    place = torch.searchsorted(torch.tensor(numbers), labels.cpu())
    points = ax.scatter(z[:, 0], z[:, 1], s=8, c=place, cmap="turbo", linewidths=0)
    ticks = sorted({round(i * (len(numbers) - 1) / (len(COLOURS) - 1)) for i in range(len(COLOURS))})
    scale = ax.figure.colorbar(points, ax=ax)
    scale.set_ticks(ticks, labels=[names[i] for i in ticks])
    scale.ax.tick_params(labelsize=text_size(ax))
    scale.set_label(f"class, one of {len(numbers)}", fontsize=text_size(ax))


_LONGEST = 20  # characters of a class's name
