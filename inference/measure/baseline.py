r"""A trivial baseline: independent distributions, one per feature, fitted in closed form.

.. math:: \log p_0(x_n) = \sum_i \log f(x_{ni}; \hat\theta_i)

| likelihood of the model | f | fit |
| --- | --- | --- |
| a density | Gaussian | mean and variance (divided by N) |
| of zeros and ones | Bernoulli | (ones + 1/2) / (N + 1) |
| of counts | Poisson | (sum + 1/2) / (N + 1) |

Missing values (NaN) are left out of the fit and of the sum. A feature that is constant in the fit has no largest
Gaussian density: its variance is set to 1 / (2 pi), so that its log-density is 0 at that constant. The halves come from
Jeffreys' prior: values that are absent from the fit keep a positive probability. If a model's log p(x) is below the
baseline, it has learned nothing, or something is wrong with the data or the training.
"""

from __future__ import annotations

__all__ = ["Baseline", "Kind", "baseline", "kind_of", "likely_reason"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pyro.distributions import constraints
from torch import Tensor

from jensen.checked import check_data, checked
from jensen.kernel.sites import base_of
from jensen.kernel.weights import Program, observed_sites
from jensen.missing import has_holes
from jensen.sources import Source

Kind = Literal["Gaussian", "Bernoulli", "Poisson"]


@dataclass(frozen=True)
class Baseline:
    """The baseline's log-densities of data.

    Attributes:
        kind: the distribution.
        log_prob: of each data point, [N], float64, nats.
        own: whether it was fitted to the measured data.
        favour: the expected bias, in nats per data point, of a fit to the measured data themselves.

    Example:
        >>> Baseline("Poisson", torch.tensor([-1.0, -2.0]).double(), own=True).kind
        'Poisson'
    """

    kind: Kind
    log_prob: Tensor
    own: bool
    favour: float = 0.0


def kind_of(model: Program, guide: Program, data: tuple[Tensor, ...]) -> Kind | None:
    """The distribution comparable with a model's likelihood, if it observes the whole first tensor without a mask."""
    if not data:
        return None
    seen = observed_sites(model, guide, data)
    if len(seen) != 1 or seen[0]["mask"] is not None:
        return None
    fn, value = seen[0]["fn"], seen[0]["value"]
    if value.numel() != data[0].numel():
        return None
    if not torch.allclose(value.reshape(data[0].shape).to(data[0]), data[0], rtol=0.0, atol=0.0, equal_nan=True):
        return None
    if type(fn).__name__ == "MaskedDistribution" or math.prod(fn.shape()) != value.numel():
        return None
    try:
        support = base_of(fn).support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if not support.is_discrete:
        return "Gaussian" if support.event_dim <= 1 else None
    if support is constraints.boolean:
        return "Bernoulli"
    return "Poisson" if support is constraints.nonnegative_integer else None


@checked
def baseline(kind: Kind, x: Tensor | Source, train: Tensor | Source | None = None) -> Baseline:
    """Fit one distribution per feature to training data, or to the measured data if there are none.

    Args:
        kind: the distribution.
        x: the data to measure, [N, ...], or a source of them.
        train: the data for the fit, with the same features.

    Returns:
        The :class:`Baseline`.

    Raises:
        ValueError: for data that are empty or infinite, and training data with other features.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> found = baseline("Gaussian", x)
        >>> entropy = 0.5 * (2 * math.pi * math.e * x.double().var(0, correction=0)).log().sum()
        >>> torch.allclose(found.log_prob.mean(), -entropy), found.own
        (True, True)
    """
    own = train is None
    fit: _Fit | None = None
    for fitted in _pieces(x if train is None else train, "x" if own else "train"):
        fit = fit or _Fit(kind, fitted.shape[1])
        fit.add(fitted)
    assert fit is not None
    values = []
    for rows in _pieces(x, "x"):
        if rows.shape[1] != len(fit.count):
            raise ValueError(f"x and train need the same features, but got {rows.shape[1]} and {len(fit.count)}")
        values.append(fit.log_prob(rows))
    n, parameters = sum(map(len, values)), len(fit.count) * (2 if kind == "Gaussian" else 1)
    return Baseline(kind, torch.cat(values), own, favour=parameters / n if own else 0.0)


def _pieces(x: Tensor | Source, name: str) -> Iterator[Tensor]:
    """The data in float64, some rows at a time: the same rows for a tensor and a source, so that sums are equal."""
    if isinstance(x, Source):
        return (_rows(batch[0], name) for batch in x.in_order(_PIECE))
    check_data(x, name)
    if not x.numel() or not x.dim():
        _rows(x, name)
    return (_rows(part, name) for part in x.split(_PIECE))


class _Fit:
    """The sums of a fit, over pieces of the data: counts, means and squared deviations (Chan, Golub, LeVeque 1979)."""

    def __init__(self, kind: Kind, features: int) -> None:
        self.kind = kind
        self.count, self.mean, self.squares, self.total = torch.zeros(4, features, dtype=torch.float64, device="cpu")
        self.low, self.high = torch.full_like(self.count, math.inf), torch.full_like(self.count, -math.inf)

    def add(self, x: Tensor) -> None:
        """Add rows [n, X]; NaN is left out."""
        seen = ~x.isnan()
        n, m = self.count, seen.sum(0)
        self.total = self.total + x.nan_to_num(0.0).sum(0)
        mean = x.nan_to_num(0.0).sum(0) / m.clamp_min(1)
        squares = torch.where(seen, x - mean, 0.0).square().sum(0)
        off, both = mean - self.mean, (n + m).clamp_min(1)
        self.squares = self.squares + squares + off.square() * n * m / both
        self.mean = torch.where(n > 0, self.mean + off * m / both, mean)
        self.count = n + m
        self.low = torch.minimum(self.low, torch.where(seen, x, math.inf).amin(0))
        self.high = torch.maximum(self.high, torch.where(seen, x, -math.inf).amax(0))

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of rows [n, X]: [n]."""
        seen, rows = ~x.isnan(), x.nan_to_num(0.0)
        if self.kind == "Gaussian":
            variance = self.squares / self.count.clamp_min(1)
            variance = variance.clamp_min(1e-300).masked_fill(self.low >= self.high, 1 / (2 * math.pi))
            log_f = -0.5 * ((rows - self.mean).square() / variance + (2 * math.pi * variance).log())
        else:
            mean = (self.total + 0.5) / (self.count + 1)
            log_f = rows * mean.log()
            other = (1 - rows) * (-mean).log1p() if self.kind == "Bernoulli" else -mean - torch.lgamma(rows + 1)
            log_f = log_f + other
        return torch.where(seen, log_f, 0.0).sum(1)


_PIECE = 8192  # rows


def _rows(x: Tensor, name: str) -> Tensor:
    """The data in float64, [N, X], NaN where a value is missing.

    Raises:
        ValueError: if they are empty or infinite.
    """
    check_data(x, name)
    if not x.numel() or not x.dim() or bool(x.isinf().any()):
        raise ValueError(f"{name} has data of shape [N, ...] without infinity, but got {list(x.shape)}")
    return x.detach().reshape(len(x), -1).double().cpu()


@checked
def likely_reason(x: Tensor, index: bool = True) -> str:
    """A property of the data that often makes training fail, in words; empty if none is found.

    Args:
        x: the data, [N, ...].
        index: whether to search for a column that numbers the rows.

    Returns:
        The words: grey levels without their number, an index column, features of very different scales, or of scales
        far from 1; each with the remedy.

    Raises:
        ValueError: for data that are empty or infinite.

    Example:
        >>> likely_reason(torch.randn(50, 2) * torch.tensor([1.0, 500.0]))[:35]
        'features differ in scale by a facto'
    """
    rows = _rows(x, "x")
    if has_holes(rows):  # a missing value is taken as the mean of its feature
        rows = torch.where(rows.isnan(), rows.nanmean(0).nan_to_num(0.0), rows)
    low, high = float(rows.min()), float(rows.max())
    if 16 <= high <= 255 and low >= 0 and rows.shape[1] >= 9 and bool((rows == rows.floor()).all()):
        levels = 256 if high > 63 else int(high) + 1
        return (
            f"the values are whole numbers from {low:g} to {high:g}, like grey levels (bytes): give their number, "
            f"levels={levels}, in a shell --levels {levels}"
        )
    spread = rows.std(0, correction=0)
    whole = (rows == rows.floor()).all(0) & (spread > 0)
    for i in whole.nonzero().flatten().tolist() if index and len(rows) >= _LISTED else ():
        steps = rows[:, i].sort().values.diff()
        if float(steps.min()) >= 1 and float(steps.sum()) < 2.5 * len(rows):
            return f"feature {i} counts the rows, like an index (or a part of one): remove it"
    varied = spread[spread > 0]
    if len(varied) and float(varied.max()) > _APART * float(varied.min()):
        ratio, widest = float(varied.max() / varied.min()), int(spread.argmax())
        return (
            f"features differ in scale by a factor of {ratio:.2g} (feature {widest} has a standard deviation of "
            f"{float(spread[widest]):.2g}): standardize=True (of load, from_array), in a shell --standardize"
        )
    centre = rows.mean(0).abs()
    if float(varied.max() if len(varied) else 0.0) > _FAR or float(centre.max()) > _FAR:
        return (
            f"features are far from a scale of 1 (means up to {float(centre.max()):.2g}, standard deviations up to "
            f"{float(spread.max()):.2g}): standardize=True (of load, from_array), in a shell --standardize"
        )
    return ""


_APART, _FAR = 30.0, 30.0
_LISTED = 20  # with at least this many rows, distinct and close whole numbers count as row numbers
