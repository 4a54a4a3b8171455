"""What each guide costs, as bars: the family's part and the encoder's part of the gap."""

from __future__ import annotations

__all__ = ["plot_gaps"]

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import Gaps

from .axes import COLOURS, by_name, own_axes, styled, text_size


@checked
@styled
def plot_gaps(results: Mapping[str, Gaps | None], ax: Axes | None = None) -> Axes:
    """Stacked bars, one a guide: approximation gap, then amortization gap; whiskers are two standard errors.

    The whisker at the boundary is the approximation gap's, that at the end the whole gap's, both over the data.

    Args:
        results: what :func:`jensen.inference.gaps` returned, by name, from the top; None is left out.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: nats per datum to the right, one row a guide.

    Raises:
        ValueError: without results.
        TypeError: if they have no names.

    Example:
        >>> import torch
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import gaps
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> result = gaps(model, PriorGuide(model), torch.randn(20, 5), particles=50, progress=False)
        >>> plot_gaps({"prior": result}).get_xlabel()
        'log p(x) - ELBO (nats per datum)'
    """
    by_name(results, "plot_gaps", "gaps(...)")
    shown = {name: result for name, result in results.items() if result is not None}
    if not shown:
        raise ValueError("results are all None: plot_gaps needs at least one that is not")
    ax = own_axes(ax, height=1.1 + 0.35 * len(shown))
    summaries = [result.summary() for result in shown.values()]
    columns = ("approximation", "amortization", "gap", "approximation_data_error", "gap_data_error")
    value = {name: np.array([summary[name] for summary in summaries], dtype=float) for name in columns}
    y = np.arange(len(shown))
    ax.barh(y, value["approximation"], color=COLOURS[0], label="approximation: the family")
    ax.barh(y, value["amortization"], left=value["approximation"], color=COLOURS[4], label="amortization: the encoder")
    for name, at, colour in (("approximation", y - 0.12, "#555555"), ("gap", y + 0.12, "black")):
        error = 2 * np.nan_to_num(value[f"{name}_data_error"])
        ax.errorbar(value[name], at, xerr=error, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    ax.set_yticks(y, labels=list(shown))
    ax.set_ylim(len(shown) + 0.65, -0.5)  # from the top, with room for the legend below the bars
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("log p(x) - ELBO (nats per datum)")
    ax.legend(fontsize=text_size(ax), loc="lower right")
    return ax
