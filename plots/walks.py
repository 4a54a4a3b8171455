"""Images along lines in latent space: from one data point to another, and along one latent at a time."""

from __future__ import annotations

__all__ = ["decoded", "pick_site", "plot_interpolations", "plot_traversals", "spread_levels"]

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import checked
from jensen.inference import decode, encode
from jensen.kernel.batches import Data, as_tensors
from jensen.kernel.modes import running
from jensen.kernel.simulation import prior_quantiles
from jensen.kernel.weights import Program, check_pair

from .axes import styled
from .images import Shape, cell_centres, draw_grid, gap_of

_MOST_ROWS = 10  # traversals shown by default
_LOWEST = 0.005  # quantile at which a traversal starts


@checked
@styled
def plot_interpolations(
    model: Program,
    guide: Program,
    start: Data,
    end: Data,
    shape: Shape,
    *,
    steps: int = 7,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    seed: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Images decoded from points between the posterior means of two data points, one pair of data points a row.

    .. math::
        \mathbb{E}[x \mid z_t], \qquad
        z_t = (1 - t) \, \mathbb{E}_{q(z \mid x_0)}[z] + t \, \mathbb{E}_{q(z \mid x_1)}[z]

    The data points themselves are at both ends. A discrete latent has the value of the nearer end.

    Args:
        model: any Pyro model, called as ``model(*data)``, that observes its first argument, at one site.
        guide: its guide, called with the same data.
        start: the data at the left, a tensor [N, ...] or a tuple of tensors; the images between use their covariates.
        end: the data at the right, as many.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        steps: points in a row, both ends included, at least 2.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        seed: makes the guide's samples, where its means need any, repeatable; None takes the global random stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, with t below the columns.

    Raises:
        ValueError: for ``start`` and ``end`` of different length, fewer than two steps, a model without continuous
            latents, and on what :func:`~jensen.inference.encode` and :func:`~jensen.inference.decode` name.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model, x = PPCA(64, latent=16).fit_closed_form(data.train), data.test
        >>> ax = plot_interpolations(model, ExactPosterior(model), x[:4], x[4:8], data.image_shape, steps=5)
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['$x_0$', '0', '0.25', '0.5', '0.75', '1', '$x_1$']
    """
    tensors = as_tensors(start), as_tensors(end)
    first, last = (part[0] for part in tensors)
    if len(first) != len(last):
        raise ValueError(f"start and end need the same number of data points, but got {len(first)} and {len(last)}")
    if steps < 2:
        raise ValueError(f"steps is the number of points in a row, both ends included, at least 2, but got {steps}")
    z, z_end = (encode(model, guide, part, seed=seed) for part in tensors)
    discrete = _discrete(model, guide, tensors[0])
    if not set(z) - discrete:
        raise ValueError(f"discrete latents cannot be interpolated, and the model has no others than {sorted(z)}")
    n, t = len(first), torch.linspace(0, 1, steps)
    between = {site: _each_way(z[site], z_end[site], t.round() if site in discrete else t) for site in z}
    rows = tuple(part.repeat_interleave(steps, 0) for part in tensors[0])
    way = decoded(model, between, rows).reshape(n, steps, *first.shape[1:])
    cells = torch.cat([first.unsqueeze(1).to(way), way, last.unsqueeze(1).to(way)], 1)  # [N, T + 2, ...]
    ax = draw_grid(
        cells.flatten(0, 1), shape, steps + 2, value_range, cmap, ax, "plot_interpolations", room=(0.0, 0.38)
    )
    for column in (0, steps):  # the data on one side, the way on the other
        ax.axvline((column + 1) * (shape[1] + gap_of(shape)) - gap_of(shape) / 2 - 0.5, color="0.4", linewidth=0.8)
    labels = ["$x_0$", *(f"{float(part):.2g}" for part in t), "$x_1$"]
    ax.set_xticks(cell_centres(steps + 2, shape[1], gap_of(shape)), labels=labels)
    ax.set_yticks([])
    ax.set_xlabel("t, from the posterior mean of $x_0$ to that of $x_1$")
    return ax


@checked
@styled
def plot_traversals(
    model: Program,
    guide: Program,
    data: Data,
    shape: Shape,
    *,
    site: str | None = None,
    latents: Sequence[int] | None = None,
    steps: int = 9,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    seed: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Vary one latent at a time from the 0.5 % to the 99.5 % quantile of its prior; the others stay at their mean.

    The mean is that of the guide for one data point. A row that does not change belongs to a latent that the model does
    not use.

    Args:
        model: any Pyro model, called as ``model(*data)``, that observes its first argument, at one site.
        guide: its guide, called with the same data.
        data: one data point, a tensor [1, ...] or a tuple of tensors: ``data.test[:1]``.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        site: the latent site, a vector; the first continuous one if None.
        latents: which of its features, counted from 0; the first ten if None.
        steps: images in a row, evenly spaced in quantiles of a normal distribution, at least 2.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        seed: makes the guide's samples, where its means need any, repeatable; None takes the global random stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: one row for each latent, quantiles of the prior below the columns.

    Raises:
        ValueError: for more than one data point, fewer than two steps, a site or latents that the model does not have,
            and on what :func:`~jensen.inference.encode` and :func:`~jensen.inference.decode` name.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=4).fit_closed_form(data.train)
        >>> ax = plot_traversals(model, ExactPosterior(model), data.test[:1], data.image_shape)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['$z_{1}$', '$z_{2}$', '$z_{3}$', '$z_{4}$']
    """
    tensors = as_tensors(data)
    if len(tensors[0]) != 1:
        n = len(tensors[0])
        raise ValueError(f"a traversal needs one data point, of shape [1, ...], but got {n}: take x[i : i + 1]")
    if steps < 2:
        raise ValueError(f"steps is the number of images in a row, at least 2, but got {steps}")
    z = encode(model, guide, data, seed=seed)
    discrete = _discrete(model, guide, tensors)
    site = pick_site(site, {name: value for name, value in z.items() if name not in discrete}, 1)
    features = z[site].shape[1]
    rows = list(range(min(features, _MOST_ROWS))) if latents is None else list(latents)
    if not rows or min(rows) < 0 or max(rows) >= features:
        raise ValueError(f"latents are features of site '{site}', from 0 to {features - 1}, but got {rows}")
    levels = spread_levels(steps, _LOWEST)
    quantiles = prior_quantiles(model, levels, data=tensors)[site]  # [T, D]
    moved = z[site].expand(len(rows), steps, features).clone()
    for row, d in enumerate(rows):
        moved[row, :, d] = quantiles[:, d]
    m = len(rows) * steps
    above = list(z)[: list(z).index(site)]  # those below follow
    values = {name: z[name].expand(m, *z[name].shape[1:]) for name in above}
    images = decoded(model, values | {site: moved.flatten(0, 1)}, tensors)
    ax = draw_grid(images, shape, steps, value_range, cmap, ax, "plot_traversals", room=(0.2, 0.38))
    shown = sorted({0, steps // 2, steps - 1})
    centres = cell_centres(steps, shape[1], gap_of(shape))
    ax.set_xticks([centres[i] for i in shown], labels=[f"{100 * float(levels[i]):.3g} %" for i in shown])
    ax.set_yticks(cell_centres(len(rows), shape[0], gap_of(shape)), labels=[f"$z_{{{d + 1}}}$" for d in rows])
    ax.set_xlabel("quantile of the latent's prior")
    return ax


def decoded(model: Program, values: Mapping[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
    """The mean of the one site that a model observes, at latents."""
    means = decode(model, values, data=data)
    if isinstance(means, dict):
        raise ValueError(f"a grid of images shows one observed site, but the model observes {list(means)}")
    return means


def _discrete(model: Program, guide: Program, data: tuple[Tensor, ...]) -> set[str]:
    """The latent sites whose values are discrete."""
    with running(model, guide):
        return set(check_pair(model, guide, *data).discrete)


def pick_site(site: str | None, values: Mapping[str, Tensor], least: int) -> str:
    """The given continuous latent site, or the first: a vector of at least so many features.

    Raises:
        ValueError: if there is none.
    """
    vectors = [name for name, value in values.items() if value.dim() == 2 and value.shape[1] >= least]
    if not vectors or (site is not None and site not in vectors):
        wanted = "a latent site" if site is None else f"site {site!r}"
        shapes = {name: list(value.shape[1:]) for name, value in values.items()}
        raise ValueError(
            f"{wanted} must be a continuous vector of at least {least} features, but the model's continuous latents "
            f"have the shapes {shapes}"
        )
    return vectors[0] if site is None else site


def spread_levels(count: int, lowest: float) -> Tensor:
    """Levels between 0 and 1, symmetric, whose quantiles of a normal distribution are evenly spaced: [L]."""
    reach = torch.special.ndtri(torch.tensor(1 - lowest, dtype=torch.float64))
    levels: Tensor = torch.special.ndtr(torch.linspace(-1, 1, count, dtype=torch.float64) * reach)
    return levels


def _each_way(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Points at shares t [T] of the ways from ``start`` to ``end``, both [N, ...]: [N T, ...]."""
    t = t.to(start).reshape(1, -1, *[1] * (start.dim() - 1))
    return (start.unsqueeze(1) * (1 - t) + end.unsqueeze(1) * t).flatten(0, 1)
