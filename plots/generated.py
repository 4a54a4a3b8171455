"""Samples of a model, and data above their reconstructions."""

from __future__ import annotations

__all__ = ["plot_reconstructions", "plot_samples"]

from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import checked
from jensen.inference import decode, reconstruct, simulate
from jensen.kernel.batches import Data, as_tensors
from jensen.kernel.modes import running
from jensen.kernel.weights import Program

from .axes import styled
from .images import Shape, draw_rows, plot_images
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
    """Samples of a model: the mean of p(x | z) at latents sampled from the prior, or samples of x.

    Args:
        model: a model called as ``model(None, *covariates, n=n)``; with ``data``, any Pyro model, called as
            ``model(*data)``, that observes its first argument.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        n: the number of samples.
        columns: images per row.
        noise: False shows E[x | z], True samples of x, with the noise of the observation model.
        covariates: the model's other arguments, tensors of n rows: the classes of a conditional model.
        data: an example of the data, as for :func:`~jensen.inference.simulate`, covariates included.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        seed: makes the samples repeatable and leaves the global random stream alone; None samples from that stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, as of :func:`~jensen.plots.plot_images`.

    Raises:
        ValueError: for images that do not have ``shape``, and on what :func:`~jensen.inference.simulate` names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=16).fit_closed_form(data.train)
        >>> ax = plot_samples(model, data.image_shape, seed=0)
        >>> ax.get_images()[0].get_array().shape  # five rows of ten, a pixel between them
        (44, 89)
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
    """Each data point above its reconstruction: the mean of p(x | z), averaged over samples of the guide.

    Args:
        model: any Pyro model, called as ``model(*data)``, that observes its first argument, at one site.
        guide: its guide, called with the same data.
        data: the data to show, a tensor [N, ...] or a tuple of tensors: ``data.test[:20]``.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        columns: data points per row.
        particles: the number of samples of the guide that a reconstruction is averaged over.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        seed: makes the samples repeatable and leaves the global random stream alone; None samples from that stream.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, as of :func:`~jensen.plots.plot_images`: rows of data and rows of reconstructions alternate.

    Raises:
        ValueError: for data that do not have ``shape``, a model that observes several sites, and on what
            :func:`~jensen.inference.reconstruct` names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=8).fit_closed_form(data.train)
        >>> ax = plot_reconstructions(model, ExactPosterior(model), data.test[:10], data.image_shape, seed=0)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['x', 'E[x | z]']
    """
    x = as_tensors(data)[0]
    again = reconstruct(model, guide, data, particles, seed=seed)
    if isinstance(again, dict):
        raise ValueError(f"plot_reconstructions shows one observed site, but the model observes {list(again)}")
    if again.numel() != x.numel():
        raise ValueError(
            f"plot_reconstructions shows the first argument, of shape {list(x.shape)}, but the model observes "
            f"{list(again.shape)}"
        )
    rows = {"x": x, "E[x | z]": again.reshape(x.shape)}
    return draw_rows(rows, shape, columns, value_range, cmap, ax, "plot_reconstructions")
