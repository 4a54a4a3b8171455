r"""Continuous observation families other than the Gaussian: heavy tails, and values between 0 and 1.

| family | density of one feature | support |
| --- | --- | --- |
| Laplace | exp(-abs(x - mu) / s) / 2 s | all reals |
| ContinuousBernoulli | proportional to exp(l x), l the logit | [0, 1] |
"""

from __future__ import annotations

__all__ = ["ContinuousBernoulli", "Laplace"]


import torch
from pyro.distributions import ContinuousBernoulli as UnivariateBernoulli
from pyro.distributions import Independent, TorchDistribution
from pyro.distributions import Laplace as Univariate
from torch import Size, Tensor
from torch.types import _size

from jensen.checked import checked

from .base import Family
from .scaled import Scale, Scaled


class Laplace(Scaled):
    r"""Independent Laplace features: absolute instead of squared error, so it fits medians instead of means.

    .. math:: p(x \mid h) = \prod_d \frac{1}{2 s_d} \exp(-|x_d - \mu_d(h)| / s_d)

    References:
        Kotz, Kozubowski and Podgorski (2001), The Laplace Distribution and Generalizations.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        scale: s, the mean absolute deviation: a number, ``"shared"``, ``"diagonal"`` or ``"context"``, as for
            :class:`~jensen.families.Gaussian`.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``scale`` is not one of these, or a number that is not positive.

    Example:
        >>> import torch
        >>> Laplace(4, context=8)(torch.zeros(5, 8)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, scale: Scale = "shared") -> None:
        super().__init__(features, context, scale)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., D], or [..., 2 D] with locations before scales, to independent Laplace features."""
        return Independent(_Laplace(*self.split(parameters)), len(self.event_shape))


class _Laplace(Univariate):  # type: ignore[misc]
    """Samples without in-place writes, so that the family can be mapped over data points (``torch.func.vmap``)."""

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        one, two = torch.rand(2, *shape, dtype=self.loc.dtype, device=self.loc.device)  # in [0, 1)
        z: Tensor = self.loc + self.scale * ((-one).log1p() - (-two).log1p())
        return z


class ContinuousBernoulli(Family):
    r"""Independent features between 0 and 1 with logits: the Bernoulli's formula, normalised for grey values.

    .. math:: p(x \mid h) = \prod_d \frac{l_d \, e^{l_d x_d}}{e^{l_d} - 1}, \qquad x_d \in [0, 1], \; l = l(h)

    A logit of 0 gives the uniform density; larger logits move the mass to 1, smaller ones to 0. With a = l / 2,

    .. math:: \log p(x) = l (x - \tfrac12) - \log \frac{\sinh a}{a}, \qquad
              \mathbb{E} x = \tfrac12 + \tfrac12 (\coth a - 1 / a)

    References:
        Loaiza-Ganem and Cunningham (2019), The Continuous Bernoulli: Fixing a Pervasive Error in Variational
        Autoencoders. https://arxiv.org/abs/1907.06845

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the D logits.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> ContinuousBernoulli((1, 28, 28), context=8)(torch.zeros(5, 8)).log_prob(torch.rand(5, 1, 28, 28)).shape
        torch.Size([5])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None) -> None:
        size = Size((features,) if isinstance(features, int) else features).numel()
        super().__init__(features, context, size=size)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to independent features between 0 and 1."""
        logits = parameters.unflatten(-1, self.event_shape)
        return Independent(_ContinuousBernoulli(logits=logits), len(self.event_shape))


class _ContinuousBernoulli(UnivariateBernoulli):  # type: ignore[misc]
    """Computed from the logit, because float32 rounds its sigmoid to 1 at a logit of 17."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        small, large = _apart(self.logits, 0.5)
        t, size = small.square() / 4, large.abs()
        log_sinhc = t / 6 * (1 - t / 30 * (1 - 4 * t / 63 * (1 - 3 * t / 40 * (1 - 8 * t / 99))))
        end = (large > 0).to(large.dtype)  # where the density is largest
        closed = large * (value - end) + size.log() - (-(-size).exp()).log1p()
        return torch.where(self.logits.abs() < 0.5, small * (value - 0.5) - log_sinhc, closed)

    @property
    def mean(self) -> Tensor:
        a = self.logits / 2
        small, large = _apart(a, 0.25)
        t = small.square()
        series = small / 3 * (1 - t / 15 * (1 - 2 * t / 21 * (1 - t / 10 * (1 - 10 * t / 99))))
        return 0.5 + torch.where(a.abs() < 0.25, series, 1 / large.tanh() - 1 / large) / 2

    @property
    def variance(self) -> Tensor:
        small, large = _apart(self.logits, 0.5)
        t, size = small.square() / 4, large.abs()
        series = (1 - t / 5 * (1 - 10 * t / 63 * (1 - 7 * t / 50 * (1 - 10 * t / 77)))) / 12
        closed = 1 / size.square() - (-size).exp() / (-size).expm1().square()
        return torch.where(self.logits.abs() < 0.5, series, closed)

    def entropy(self) -> Tensor:
        """Minus the log-density at the mean, because the log-density is linear."""
        return -self.log_prob(self.mean)

    def cdf(self, value: Tensor) -> Tensor:
        """The probability below a value in [0, 1]."""
        small, large = _apart(self.logits, 1e-3)
        series = value - small / 2 * value * (1 - value) * (1 - small * (1 - 2 * value) / 6)
        depth = torch.where(large > 0, 1 - value, value)  # distance from the end of larger density
        share = (-large.abs() * depth).expm1() / (-large.abs()).expm1()
        return torch.where(self.logits.abs() < 1e-3, series, torch.where(large > 0, 1 - share, share))

    def icdf(self, value: Tensor) -> Tensor:
        """The inverse of the distribution function: it maps a uniform number in [0, 1) to a sample."""
        small, large = _apart(self.logits, 1e-3)
        series = value + small / 2 * value * (1 - value) * (1 + small * (1 - 2 * value) / 3)
        u = torch.where(large > 0, 1 - value, value)  # counted from the end of larger density
        u = u.clamp(max=1 - torch.finfo(u.dtype).eps)
        depth = (u * (-large.abs()).expm1()).log1p() / -large.abs()  # distance from that end
        return torch.where(self.logits.abs() < 1e-3, series, torch.where(large > 0, 1 - depth, depth))


def _apart(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The values below the limit, for a series, and those above it; the others are replaced by a harmless value."""
    below = a.abs() < limit
    return torch.where(below, a, torch.zeros_like(a)), torch.where(below, torch.ones_like(a), a)
