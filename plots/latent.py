"""The latent map: where the data lie in latent space."""

from __future__ import annotations

__all__ = ["plot_latent"]

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .axes import COLOURS, own_axes


def plot_latent(z: Tensor, labels: Tensor | None = None, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """A scatter of latent positions in two dimensions, coloured by class.

    More than two latent dimensions are projected on the two principal components of ``z``; the axes say so.

    Args:
        z: one position per datum, [N, D] with D at least 2: posterior means, say.
        labels: class of each datum, int64 [N]; one colour for all if None.
        title: above the map.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, with equal units in both directions.

    Raises:
        ValueError: for fewer than two dimensions, or labels of another length.

    Example:
        >>> z, labels = torch.randn(100, 8), torch.arange(100) % 10
        >>> plot_latent(z, labels).get_xlabel()
        '1st principal direction of 8 latents'
    """
    if z.dim() != 2 or z.shape[1] < 2:
        raise ValueError(f"plot_latent needs positions of shape [N, D] with D at least 2, but got {list(z.shape)}")
    if labels is not None and len(labels) != len(z):
        raise ValueError(f"plot_latent needs a label for each of the {len(z)} data, but got {len(labels)}")
    z = z.detach().cpu().double()
    D = z.shape[1]
    if D > 2:
        z = z - z.mean(0)
        z = z @ torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, :2]  # [N, 2]
    ax = own_axes(ax, width=4.4, height=3.6)
    if labels is None:
        ax.scatter(z[:, 0], z[:, 1], s=8, color=COLOURS[0], linewidths=0)
    else:
        for i, label in enumerate(labels.unique().tolist()):
            here = labels == label
            ax.scatter(z[here, 0], z[here, 1], s=10, color=COLOURS[i % len(COLOURS)], linewidths=0, label=str(label))
        ax.legend(title="class", fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("$z_1$" if D == 2 else f"1st principal direction of {D} latents")
    ax.set_ylabel("$z_2$" if D == 2 else f"2nd principal direction of {D} latents")
    if title:
        ax.set_title(title, fontsize="medium")
    return ax
