"""The losses of a learning-rate range test against the rate."""

from __future__ import annotations

__all__ = ["plot_learning_rates"]

from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import LearningRates

from .axes import COLOURS, own_axes, styled, text_size


@checked
@styled
def plot_learning_rates(result: LearningRates, ax: Axes | None = None) -> Axes:
    """Draw the loss of each step against its learning rate, and the smoothed loss; a vertical line is the suggestion.

    The y axis covers the smoothed losses; single losses may lie outside.

    Args:
        result: what :func:`jensen.inference.learning_rates` returned.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: the learning rate to the right, logarithmic; nats per data point (or in all) upwards.

    References:
        Smith (2017), Cyclical Learning Rates for Training Neural Networks. https://arxiv.org/abs/1506.01186

    Example:
        >>> import torch
        >>> from jensen.inference import LearningRates
        >>> rates = torch.logspace(-4, 0, 41).double()
        >>> ax = plot_learning_rates(LearningRates(rates, (rates.log10() + 1.5).square(), steps=41, data=128))
        >>> [line.get_label() for line in ax.get_lines()]
        ['of one batch', 'smoothed', 'suggestion 0.0063']
    """
    ax = own_axes(ax, height=2.2)
    rates, smoothed = result.rates.tolist(), result.smoothed
    ax.plot(rates, result.losses.tolist(), color=COLOURS[0], linewidth=0.8, alpha=0.5, label="of one batch")
    ax.plot(rates, smoothed.tolist(), color=COLOURS[1], linestyle="--", linewidth=1.2, label="smoothed")
    if result.suggestion is not None:
        label = f"suggestion {result.suggestion:.2g}"
        ax.axvline(result.suggestion, color="0.4", linewidth=0.8, linestyle=":", label=label)
    low, high = float(smoothed.min()), float(smoothed.max())
    margin = 0.1 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel(f"minus the bound\n({result.unit})")
    ax.legend(fontsize=text_size(ax))
    return ax
