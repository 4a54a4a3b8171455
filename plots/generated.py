"""What a pair makes: samples of its model, and data above their reconstructions."""

from __future__ import annotations

__all__ = ["plot_reconstructions", "plot_samples"]

import torch
from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import checked
from jensen.inference import decode, reconstruct, simulate
from jensen.kernel.batches import Data, as_tensors
from jensen.kernel.modes import running
from jensen.kernel.weights import Program

from .axes import at_least_one, styled
from .images import Shape, plot_images
from .walks import decoded


@checked
@styled
def plot_samples(
    model: Program,
    shape: Shape,
    *,
    n: int = 50,
    columns: int = 10,
    noise: bool = False,
    covariates: tuple[Tensor, ...] = (),
    data: Data | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    seed: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Data drawn from a model: the mean of p(x | z) at latents drawn from the prior, or x itself.

    Args:
        model: a model called as ``model(None, *covariates, n=n)``; with an example any Pyro model, called as
            ``model(*data)``, that observes its first argument.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        n: how many.
        columns: images per row.
        noise: False shows E[x | z], True the x that were drawn, with the observation model's noise.
        covariates: what the model reads beside x, tensors of n rows: the classes of a conditional model.
        data: an example of the data, as for :func:`~jensen.inference.simulate`, covariates included.
        value_range: the values drawn white and black: ``data.value_range``.
        cmap: the colours of grey values; ``"gray"`` draws light on black.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, as of :func:`~jensen.plots.plot_images`.

    Raises:
        ValueError: for images that do not have ``shape``, and on what :func:`~jensen.inference.simulate` names.

    Example:
        >>> from jensen.models import PPCA
        >>> ax = plot_samples(PPCA(64, latent=2), (8, 8), n=20, seed=0)
        >>> ax.get_images()[0].get_array().shape  # two rows of ten, a pixel between
        (17, 89)
    """
    with running(model, model, "plot_samples", seed=seed):
        if data is None:
            values, x = simulate(model, n, *covariates)
            images = x if noise else decode(model, values, *covariates)
        else:
            values, drawn = simulate(model, n, data=as_tensors(data))
            images = drawn[0] if noise else decoded(model, values, drawn)
    return plot_images(images, shape, columns=columns, value_range=value_range, cmap=cmap, ax=ax)


@checked
@styled
def plot_reconstructions(
    model: Program,
    guide: Program,
    data: Data,
    shape: Shape,
    *,
    columns: int = 10,
    particles: int = 32,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    seed: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Each datum above its reconstruction: the mean of p(x | z), averaged over draws from the guide.

    Args:
        model: any Pyro model, called as ``model(*data)``, that observes its first argument, at one site.
        guide: its guide, called with the same data.
        data: those to show, a tensor [N, ...] or a tuple of tensors: ``data.test[:20]``.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        columns: data per row.
        particles: how many draws from the guide a reconstruction is averaged over.
        value_range: the values drawn white and black: ``data.value_range``.
        cmap: the colours of grey values; ``"gray"`` draws light on black.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, as of :func:`~jensen.plots.plot_images`: rows of data and of reconstructions by turns.

    Raises:
        ValueError: for data that do not have ``shape``, a model that observes several sites, and on what
            :func:`~jensen.inference.reconstruct` names.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(64, latent=2)
        >>> ax = plot_reconstructions(model, ExactPosterior(model), torch.rand(10, 64), (8, 8))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['x', 'E[x | z]']
    """
    x = as_tensors(data)[0]
    again = reconstruct(model, guide, data, particles, seed=seed)
    if isinstance(again, dict):
        raise ValueError(f"a picture shows what one site observes, but the model observes {list(again)}")
    if again.numel() != x.numel():
        raise ValueError(
            f"a picture shows the first argument, of shape {list(x.shape)}, but the model observes {list(again.shape)}"
        )
    columns = min(at_least_one(columns), len(x))
    padding = x.new_full((-len(x) % columns, *x.shape[1:]), torch.nan)
    pairs = (torch.cat([part.reshape(x.shape), padding]).split(columns) for part in (x, again))
    rows = [row for pair in zip(*pairs, strict=True) for row in pair]
    labels = ["x", "E[x | z]"] * (len(rows) // 2)
    return plot_images(
        torch.cat(rows), shape, columns=columns, value_range=value_range, cmap=cmap, row_labels=labels, ax=ax
    )
