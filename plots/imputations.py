"""Images with holes beside what a model puts there."""

from __future__ import annotations

__all__ = ["plot_imputations"]

from typing import Protocol

import torch
from matplotlib.axes import Axes
from torch import Tensor

from jensen.checked import check_tensor, checked

from .axes import styled
from .images import Shape, draw_rows


class Imputed(Protocol):
    """Data with missing values, and what a model says of them.

    Attributes:
        x: the data [N, X], NaN where a value is missing.
        mean: the conditional mean of what is missing, [N, X].
        draws: samples of what is missing, [m, N, X].
    """

    @property
    def x(self) -> Tensor: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def draws(self) -> Tensor: ...


@checked
@styled
def plot_imputations(
    imputed: Imputed | tuple[Tensor, Tensor, Tensor],
    shape: Shape,
    *,
    truth: Tensor | None = None,
    draws: int = 3,
    columns: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Images with missing pixels above their imputations: the conditional mean, and samples of what is missing.

    Missing pixels are light blue. Observed pixels are the same in all rows.

    Args:
        imputed: what :func:`jensen.inference.impute` returned, or another object with the attributes ``x`` (the data
            [N, X], NaN where a pixel is missing), ``mean`` [N, X] and ``draws`` (samples [m, N, X]), or a tuple of
            these three tensors.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        truth: the complete images [N, X] where they are known: the first row.
        draws: how many of the samples are shown.
        columns: images per row.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        title: above the grid.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, as of :func:`~jensen.plots.plot_images`: rows of truth, observed pixels, means and samples alternate.

    Raises:
        ValueError: for tensors of other shapes, and for a negative number of samples.
        TypeError: for an object without these attributes.

    Example:
        >>> import torch
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import impute
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=16).fit_closed_form(data.train)
        >>> truth = data.test[:10]
        >>> x = truth.masked_fill(torch.rand(truth.shape) < 0.5, torch.nan)
        >>> imputed = impute(model, ExactPosterior(model), x, seed=0, progress=False)
        >>> ax = plot_imputations(imputed, data.image_shape, truth=truth, value_range=data.value_range)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['truth', 'observed', 'mean', 'sample 1', 'sample 2', 'sample 3']
    """
    x, mean, samples = _parts(imputed)
    if draws < 0:
        raise ValueError(f"draws is the number of samples that are shown, at least 0, but got {draws}")
    n = len(x) if x.dim() else 0
    given = {"mean": mean, **({} if truth is None else {"truth": truth})}
    wrong = {name: list(t.shape) for name, t in given.items() if t.shape[:1] != (n,) or t.numel() != x.numel()}
    if samples.dim() < 2 or samples.shape[1] != n or samples.numel() != len(samples) * x.numel():
        wrong["draws"] = list(samples.shape)
    if wrong:
        sizes = ", ".join(map(str, x.shape))
        raise ValueError(
            f"plot_imputations needs mean and truth of the shape of x, [{sizes}], and draws of shape [m, {sizes}], but "
            f"got {wrong}"
        )
    x = x.detach().cpu()
    holes = x.isnan()
    rows = {} if truth is None else {"truth": truth.detach().cpu().reshape(x.shape)}
    rows["observed"] = x
    filled = {"mean": mean, **{f"sample {i + 1}": z for i, z in enumerate(samples[:draws])}}
    rows |= {name: torch.where(holes, z.detach().cpu().reshape(x.shape), x) for name, z in filled.items()}
    return draw_rows(rows, shape, columns, value_range, cmap, ax, "plot_imputations", title)


def _parts(imputed: Imputed | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Data with missing values, means and samples; TypeError for anything else."""
    try:
        parts = imputed if isinstance(imputed, tuple) else (imputed.x, imputed.mean, imputed.draws)
    except AttributeError as error:
        raise TypeError(
            f"imputed must have the attributes x, mean and draws, or be a tuple of these tensors, but got "
            f"{type(imputed).__name__}"
        ) from error
    for name, part in zip(("x", "mean", "draws"), parts, strict=True):
        check_tensor(part, f"{name} of imputed")
    return parts
