"""Images that a model decodes from a grid over two of its latents."""

from __future__ import annotations

__all__ = ["plot_manifold"]

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import checked
from jensen.inference import decode
from jensen.kernel.batches import Data, as_tensors
from jensen.kernel.simulation import prior_quantiles

from .axes import number, styled
from .images import Shape, cell_centres, draw_grid
from .walks import decoded, pick_site, spread_levels

_LOWEST = 0.01


@checked
@styled
def plot_manifold(
    model: Callable[..., Any],
    shape: Shape,
    *,
    site: str | None = None,
    latents: tuple[int, int] = (0, 1),
    points: int = 15,
    covariates: tuple[Tensor, ...] = (),
    data: Data | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Axes:
    r"""The manifold of a model: the mean of p(x | z) on a grid over two latents, from quantiles of their prior.

    .. math:: \mathbb{E}[x \mid z_{ij}], \qquad z_{ij} = (F_1^{-1}(u_i), F_2^{-1}(u_j), \ldots)

    F are the distribution functions of the latents under the prior, and u goes from 1 to 99 %, spaced so that a normal
    prior gives an even grid. The other latents of the site stay at their median, those of other sites at their mean.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, figure 4.

    Args:
        model: a model called as ``model(None, *covariates, n=n)``; with ``data``, any Pyro model, called as
            ``model(*data)``.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        site: the latent site, a vector; the first continuous one with two features if None.
        latents: which two of its features vary, counted from 0: the first to the right, the second upwards.
        points: images along each side, at least 2.
        covariates: the model's other arguments, tensors of one row: the class of a conditional model.
        data: an example of the data, of one row, as for :func:`~jensen.inference.simulate`, covariates included.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: the values of both latents below and left of the grid.

    Raises:
        ValueError: for a site or latents that the model does not have, fewer than two points, a model that does not
            decode images of ``shape``, and on what :func:`~jensen.inference.simulate` names.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=2).fit_closed_form(data.train)
        >>> ax = plot_manifold(model, data.image_shape, points=11)
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['−2.33', '0.00', '2.33']
    """
    if points < 2:
        raise ValueError(f"points is the number of images along each side, at least 2, but got {points}")
    quantiles = prior_quantiles(model, spread_levels(points, _LOWEST), *covariates, data=data)  # [P, *event]
    site = pick_site(site, quantiles, 2)
    q = quantiles[site]  # [P, D]
    i, j = latents
    if i == j or not {i, j} <= set(range(q.shape[1])):
        raise ValueError(f"latents are two features of site '{site}', from 0 to {q.shape[1] - 1}, but got {latents}")
    z = q.median(0).values.expand(points, points, -1).clone()  # [rows, columns, D]
    z[..., i] = q[:, i]
    z[..., j] = q[:, j].flip(0).unsqueeze(1)  # upwards
    m = points * points
    if data is None:
        images = decode(model, {site: z.flatten(0, 1)}, *(y.expand(m, *y.shape[1:]) for y in covariates))
    else:
        images = decoded(model, {site: z.flatten(0, 1)}, as_tensors(data))
    ax = draw_grid(images, shape, points, value_range, cmap, ax, "plot_manifold", gaps=(1, 1), room=(0.55, 0.4))
    shown = sorted({0, (points - 1) // 2, points - 1})
    for d, axis, size in ((i, ax.xaxis, shape[1]), (j, ax.yaxis, shape[0])):
        centres = cell_centres(points, size, 1)
        places = centres if axis is ax.xaxis else centres[::-1]
        axis.set_ticks([places[k] for k in shown], labels=[number(float(q[k, d]), ".2f") for k in shown])
        axis.set_label_text(f"$z_{{{d + 1}}}$")
    return ax
