"""Holes for experiments: values of complete data are hidden, at random or depending on other values."""

from __future__ import annotations

__all__ = ["hide"]

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from jensen.checked import check_data, checked
from jensen.missing import as_holes

from .dataset import Dataset
from .places import on_cpu
from .preparation import SPLITS


@overload
def hide(x: Tensor, rate: float, mechanism: Literal["mcar", "mar"] = "mcar", seed: int = 0) -> Tensor: ...
@overload
def hide(x: Dataset, rate: float, mechanism: Literal["mcar", "mar"] = "mcar", seed: int = 0) -> Dataset: ...
@checked
@on_cpu
def hide(
    x: Tensor | Dataset, rate: float, mechanism: Literal["mcar", "mar"] = "mcar", seed: int = 0
) -> Tensor | Dataset:
    r"""Hide values: a copy of the data with NaN in place of some of them.

    ``"mcar"``, missing completely at random: each value is hidden with probability ``rate``, independently.

    ``"mar"``, missing at random: a third of the X features, A (chosen at random), stay observed. Each other feature j
    of row n is hidden with a probability that depends on these,

    .. math:: P(m_{nj} = 1 \mid x_{nA}) = \operatorname{sigmoid}(b_j + s_{nj}), \qquad
              s_{nj} \propto \sum_{a \in A} w_{ja} \frac{x_{na} - \bar x_a}{\sigma_a}, \quad w_{ja} \sim N(0, 1)

    where s has standard deviation 1 and the intercepts :math:`b_j` make the mean probability equal to rate X / (X -
    \|A\|), so that ``rate`` of all values is hidden in expectation. An analysis of the complete rows alone is then
    biased; the likelihood of the observed values is not.

    Values are hidden independently of each other, so under ``"mcar"`` a row may lose all its values (its log p(x) is
    0).

    References:
        Rubin (1976), Inference and Missing Data.
        Muzellec, Josse, Boyer and Cuturi (2020), Missing Data Imputation using Optimal Transport (the logistic model).

    Args:
        x: the data, [N, ...]; NaN stays NaN, and whole numbers become floating point. Or a :class:`Dataset`: all splits
            get holes, by the features A, weights, intercepts and statistics of the training data.
        rate: the share of the values to hide, at least 0 and below 1.
        mechanism: ``"mcar"`` or ``"mar"``.
        seed: fixes which values are hidden.

    Returns:
        Data of the same kind with NaN. A data set has no ``log_density`` then.

    Raises:
        ValueError: if ``rate`` is not in [0, 1), or under ``"mar"`` above the share of the features that may be hidden;
            under ``"mar"`` for data of fewer than two features, or if all complete features are constant; for a data
            set, if a feature has no observed training value left.
        TypeError: for other data.

    Example:
        >>> x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
        >>> hide(x, 0.5).isnan().float().mean()
        tensor(0.5008)
        >>> hide(x, 0.5, "mar").isnan().float().mean(0)
        tensor([0.7390, 0.0000, 0.7530, 0.7470, 0.0000, 0.7430])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, but got {rate:g}")
    generator = torch.Generator().manual_seed(seed)
    splits = {"x": x} if isinstance(x, Tensor) else {part: getattr(x, part) for part in SPLITS}
    for part, values in splits.items():
        check_data(values, part)
        if not values.dim():
            raise ValueError("x must have the shape [N, ...], but got a tensor without dimensions")
    probability = _logistic(list(splits.values()), rate, generator) if mechanism == "mar" else _constant(rate)
    made = {part: _holed(values, probability, generator) for part, values in splits.items()}
    if isinstance(x, Tensor):
        return made["x"]
    unknown = made["train"].isnan().all(0) & ~x.train.isnan().all(0)
    if unknown.any():
        raise ValueError(
            f"rate={rate:g} leaves {int(unknown.sum())} of the {unknown.numel()} features of {x.name} without any "
            f"observed value among its {len(x.train)} training data: choose a smaller rate"
        )
    return replace(x, train=made["train"], validation=made["validation"], test=made["test"], log_density=None)


def _holed(x: Tensor, probability: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """A copy with NaN where values are hidden; ``probability`` maps rows of observed values [n, X] to [n, X]."""
    made = x.detach().clone() if x.is_floating_point() else as_holes(x, torch.zeros_like(x, dtype=torch.bool))
    for part in made.split(_ROWS) if x.numel() else ():
        p = probability(part.reshape(len(part), -1).cpu().double())
        u = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        part.masked_fill_((u < p).view(part.shape).to(x.device), torch.nan)
    return made


def _constant(rate: float) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.full_like(rows, rate)


def _logistic(splits: list[Tensor], rate: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The probabilities that depend on the features A, which are never hidden."""
    train, *_ = splits
    some = torch.randperm(len(train), generator=generator)[:_CALIBRATED].to(train.device)
    rows = train.detach()[some].flatten(1).cpu().double() if train.dim() > 1 else train.new_zeros(0, 1)
    features = rows.shape[1]
    if features < 2:
        raise ValueError(f"mechanism='mar' needs at least two features, but x has the shape {list(train.shape)}")
    varying = (rows != rows[:1]).any(0)
    complete = ~sum((values.isnan().any(0).flatten().cpu() for values in splits), torch.zeros_like(varying))
    kept = torch.nonzero(complete & varying)[:, 0]
    if not len(kept):
        raise ValueError("mechanism='mar' needs a feature without missing values that varies, but x has none")
    kept = kept[torch.randperm(len(kept), generator=generator)][: max(1, features // 3)].sort().values
    hidden = torch.tensor(sorted({*range(features)} - {*kept.tolist()}))
    share = rate * features / len(hidden)
    if share >= 1:
        raise ValueError(
            f"mechanism='mar' keeps {len(kept)} of {features} features observed, so rate must be below "
            f"{len(hidden) / features:.3g}, but got {rate:g}"
        )
    location, scale = rows[:, kept].mean(0), rows[:, kept].std(0, correction=0)
    weight = torch.randn(len(kept), len(hidden), generator=generator, dtype=torch.float64)
    scores = ((rows[:, kept] - location) / scale) @ weight  # [N, hidden]
    weight, scores = weight / scores.std(0, correction=0), scores / scores.std(0, correction=0)
    high = scores.abs().amax(0) + _FAR
    low = -high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = (scores + middle).sigmoid().mean(0) > share
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    intercept = low

    def probability(rows: Tensor) -> Tensor:
        p = torch.zeros_like(rows)
        p[:, hidden] = (((rows[:, kept] - location) / scale) @ weight + intercept).sigmoid()
        return p

    return probability


_CALIBRATED = 10_000  # rows at most that fix the intercepts
_HALVINGS = 40
_FAR = 40.0  # sigmoid(-40) is 4e-18
_ROWS = 4096  # at once
