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
    """Histograms of the ranks of true values among samples of the guide: flat for a calibrated guide.

    A thin line is one feature, the thick line the mean over features. The band holds for one feature: 99 % of the
    histograms of uniform ranks lie within it in every bin (binomial, Bonferroni over the bins). A U shape means that
    the guide is too narrow, a hump that it is too wide, a slope that it is biased.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration.

    Args:
        calibration: what :func:`jensen.inference.calibrate` returned.
        site: whose features are shown; None: those of all sites.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: ranks from 0 to L to the right; upwards the frequency of a bin, which is 1 for uniform ranks.

    Raises:
        ValueError: for a site that was not calibrated.

    Example:
        >>> from jensen.guides import amortize
        >>> from jensen.inference import calibrate, fit
        >>> from jensen.models import Banana
        >>> from jensen.networks import mlp
        >>> model = Banana()
        >>> guide = amortize(model, mlp(1, [16]), "mean-field", context=16)
        >>> history = fit(model, guide, model(n=500).detach(), epochs=40, lr=0.02, seed=0, progress=False)
        >>> ax = plot_ranks(calibrate(model, guide, seed=0, progress=False))
        >>> ax.get_xlabel()
        'rank of the true value among 99 samples'
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
            label = "one feature" if d == 0 else None
            ax.stairs(heights[:, d], edges, baseline=None, color=COLOURS[5], linewidth=0.7, label=label)
    name = "the feature" if F == 1 else f"mean of {F} features"
    ax.stairs(heights.mean(1), edges, baseline=None, color=COLOURS[0], linewidth=2, label=name)
    ax.set_xlim(-0.5, shown.draws + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"rank of the true value among {shown.draws} samples")
    ax.set_ylabel("frequency (uniform = 1)")
    ax.legend(fontsize=text_size(ax))
    return ax
