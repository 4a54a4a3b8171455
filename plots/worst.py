"""The data points with the least reliable or the worst results, as images: what do they have in common?"""

from __future__ import annotations

__all__ = ["plot_worst"]

import math
from typing import Literal, get_args

from matplotlib.axes import Axes

from jensen.checked import checked
from jensen.inference import Evidence
from jensen.kernel.batches import Data, as_tensors

from .axes import number, styled, text_size
from .images import Shape, draw_grid, gap_of

By = Literal["pareto_k", "ess", "log_evidence", "elbo", "gap"]

_LABELS = {
    "pareto_k": "highest Pareto k-hat of the weights",
    "ess": "lowest effective sample size (samples)",
    "log_evidence": "lowest log p(x) (nats)",
    "elbo": "lowest ELBO (nats)",
    "gap": "highest log p(x) - ELBO (nats)",
}
_CAPTION = 0.2  # inches in a column of a paper, for a line between rows of images


@checked
@styled
def plot_worst(
    evidence: Evidence,
    data: Data,
    shape: Shape,
    *,
    by: By = "pareto_k",
    n: int = 10,
    columns: int = 5,
    value_range: tuple[float, float] = (0.0, 1.0),
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Axes:
    """The worst data points as images, each with its number and its value.

    Args:
        evidence: what :func:`jensen.inference.evaluate` returned for these data.
        data: the same data, a tensor [N, ...] or a tuple of tensors.
        shape: height and width of an image in pixels: ``data.image_shape``; see :func:`~jensen.plots.plot_images`.
        by: the criterion: a high ``"pareto_k"`` (the estimate is unreliable), a low ``"ess"``, a low
            ``"log_evidence"`` (the exact one where it is known) or ``"elbo"`` (unlikely under the model), a high
            ``"gap"`` (the guide is a poor approximation).
        n: how many data points; all of them if there are fewer.
        columns: images per row.
        value_range: the values that are drawn white and black: ``data.value_range``.
        cmap: the colour map of grey values; ``"gray"`` draws light on black.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: the worst data point first; "#i" is ``data[i]``.

    Raises:
        ValueError: if ``evidence`` is of other data, or the data do not have ``shape``; for an unknown ``by``; for
            k-hat with fewer than 25 particles.

    Example:
        >>> from jensen.datasets import load
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> data = load("digits")
        >>> model = PPCA(64, latent=8).fit_closed_form(data.train)
        >>> evidence = evaluate(model, ExactPosterior(model), data.test, particles=100, seed=0, progress=False)
        >>> ax = plot_worst(evidence, data.test, data.image_shape, by="log_evidence")
        >>> ax.get_xlabel()
        'lowest log p(x) (nats)'
    """
    if by not in get_args(By):
        raise ValueError(f"by is one of {list(get_args(By))}, but got {by!r}")
    x = as_tensors(data)[0]
    values = (evidence.best if by == "log_evidence" else getattr(evidence, by)).double().cpu()  # [N]
    if len(values) != len(x):
        raise ValueError(f"evidence is of {len(values)} data points, but got {len(x)}: give the measured data")
    if by == "pareto_k" and evidence.particles < 25:
        raise ValueError(
            f"k-hat takes at least 25 particles, but evidence has {evidence.particles}: evaluate with more"
        )
    high = by in ("pareto_k", "gap")
    badness = (values if high else -values).nan_to_num(math.inf, math.inf, -math.inf)
    worst = badness.argsort(descending=True, stable=True)[: max(1, n)]
    columns = min(columns, len(worst))
    height, width = shape[:2]
    across = gap_of(shape)
    down = max(across, math.ceil(_CAPTION * columns * (width + across) / 3.2))
    ax = draw_grid(
        x[worst.to(x.device)], shape, columns, value_range, cmap, ax, "plot_worst", gaps=(down, across), room=(0.0, 0.4)
    )
    for place, i in enumerate(worst.tolist()):
        row, column = divmod(place, columns)
        at = column * (width + across) + (width - 1) / 2, row * (height + down) + height + 0.1 * down
        text = f"#{i}: {number(float(values[i]), '.3g')}"
        ax.text(*at, text, ha="center", va="top", fontsize=text_size(ax, 0.75))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_ylim(-(-len(worst) // columns) * (height + down) - 0.5, -0.5)  # with the last captions
    ax.set_xlabel(_LABELS[by])
    return ax
