"""Rate against distortion: what a sweep of beta, or of guides, trades for what."""

from __future__ import annotations

__all__ = ["plot_rate_distortion"]

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import RateDistortion

from .axes import COLOURS, by_name, own_axes, styled, text_size


@checked
@styled
def plot_rate_distortion(results: Mapping[str, RateDistortion], ax: Axes | None = None) -> Axes:
    """Draw the plane of rate and distortion, a point for each result, with lines of equal ELBO.

    Whiskers are two standard errors over the data.

    Args:
        results: what :func:`jensen.inference.rate_distortion` returned, by name, in the order of the sweep.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: rate to the right, distortion upwards, both in bits per datum.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> import torch
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import rate_distortion
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> result = rate_distortion(model, ExactPosterior(model), torch.randn(50, 5), progress=False)
        >>> plot_rate_distortion({"exact": result}).get_xlabel()
        'rate KL(q(z|x) ‖ p(z)) (bits per datum)'
    """
    by_name(results, "plot_rate_distortion", "rate_distortion(...)")
    ax = own_axes(ax)
    summaries = [result.summary() for result in results.values()]
    rate, distortion = (np.array([s[name] for s in summaries]) for name in ("rate", "distortion"))
    ax.plot(rate, distortion, color=COLOURS[0], linewidth=1, zorder=1)
    for name, s in zip(results, summaries, strict=True):
        across, up = (2 * np.nan_to_num(s[f"{axis}_data_error"]) for axis in ("rate", "distortion"))
        ax.errorbar(s["rate"], s["distortion"], up, across, fmt="o", color=COLOURS[0], markersize=4, elinewidth=1)
        ax.annotate(
            name, (s["rate"], s["distortion"]), xytext=(5, 5), textcoords="offset points", fontsize=text_size(ax)
        )
    ax.margins(0.2)
    view = ax.axis()
    for total in np.unique(np.round(rate + distortion, 6)):  # -ELBO is constant along these
        ax.axline((0, total), slope=-1, color="grey", linewidth=0.6, linestyle=":", zorder=0)
    ax.axis(view)
    ax.set_xlim(left=max(view[0], 0.0))
    ax.set_xlabel("rate KL(q(z|x) ‖ p(z)) (bits per datum)")
    ax.set_ylabel("distortion -E log p(x|z) (bits per datum)")
    return ax
