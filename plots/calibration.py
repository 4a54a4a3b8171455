"""Rank histograms of simulation-based calibration."""

from __future__ import annotations

__all__ = ["plot_ranks"]

import torch
from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import Calibration

from .axes import COLOURS, own_axes, styled, text_size


@checked
@styled
def plot_ranks(calibration: Calibration, site: str | None = None, ax: Axes | None = None) -> Axes:
    """Histograms of the ranks of true values: flat for a calibrated guide.

    A thin line is one feature, the thick one their mean. The band is for one feature: 99 % of the histograms of uniform
    ranks lie within it in every bin (binomial, Bonferroni over the bins). A U says that the guide is too narrow, a hump
    that it is too wide, a slope that it is biased.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration.

    Args:
        calibration: what :func:`jensen.inference.calibrate` returned.
        site: whose features are shown; None: those of all sites.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: ranks from 0 to L, and how many of them a bin holds, in units of what it would if they were uniform.

    Raises:
        ValueError: for a site that was not calibrated.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import calibrate
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> plot_ranks(calibrate(model, ExactPosterior(model), progress=False)).get_xlabel()
        'rank of the true value among 99 draws'
    """
    if site is not None and site not in calibration.ranks:
        raise ValueError(f"site '{site}' was not calibrated, but {sorted(calibration.ranks)}: take one of these")
    shown = calibration if site is None else Calibration({site: calibration.ranks[site]}, calibration.draws)
    n, F = shown.pooled.shape
    expected, edges = shown.expected, shown.edges.numpy() - 0.5  # a bin is drawn around the ranks that it holds
    heights = (shown.counts / expected.unsqueeze(-1)).numpy()  # [B, F]
    tail = 0.01 / len(expected) / 2
    counts = torch.arange(n + 1, dtype=torch.float64).unsqueeze(-1)
    below = torch.distributions.Binomial(n, expected / n).log_prob(counts).exp().cumsum(0)  # [N + 1, B]
    low, high = (((below < level).sum(0) / expected).numpy() for level in (tail, 1 - tail))
    ax = own_axes(ax)
    ax.stairs(high, edges, baseline=low, fill=True, color=COLOURS[9], alpha=0.35, label="99 % of uniform histograms")
    ax.axhline(1.0, color="black", linestyle="--", linewidth=1)
    if F > 1:
        for d in range(F):
            label = "a feature" if d == 0 else None
            ax.stairs(heights[:, d], edges, baseline=None, color=COLOURS[5], linewidth=0.7, label=label)
    name = "the feature" if F == 1 else f"mean of {F} features"
    ax.stairs(heights.mean(1), edges, baseline=None, color=COLOURS[0], linewidth=2, label=name)
    ax.set_xlim(-0.5, shown.draws + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"rank of the true value among {shown.draws} draws")
    ax.set_ylabel("frequency (uniform = 1)")
    ax.legend(fontsize=text_size(ax))
    return ax
