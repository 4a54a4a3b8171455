r"""Priors that turn a :class:`VAE` into an autoencoder when its guide is a point estimate, z = g(x).

If x given z is Gaussian with mean f(z) and scale sigma, and the guide's family is ``Delta``, the negative ELBO of a
data point is

.. math:: \frac{1}{2 \sigma^2} |x - f(g(x))|^2 + R(g(x)) + \tfrac{X}{2} \log 2 \pi \sigma^2 + \text{const}

| prior | R(z) | const | the autoencoder |
| --- | --- | --- | --- |
| FlatPrior | 0 | 0 | plain; principal components where f and g are linear |
| StandardNormal | z^2 / 2, summed over features | D/2 log 2 pi | penalized: the mode of the posterior |
| LaplacePrior, scale b | abs(z) / b, summed over features | D log 2 b | sparse |

If the guide corrupts x before it encodes it, the autoencoder is denoising. :class:`jensen.guides.Contractive` adds the
squared Jacobian of g.
"""

from __future__ import annotations

__all__ = ["FlatPrior", "LaplacePrior"]

import math

import torch
from pyro.distributions import ImproperUniform, Laplace, TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.types import _size

from jensen.checked import checked

from .base import origin


class FlatPrior(nn.Module):
    r"""No preference among latents: the improper prior p(z) = 1 on all of R^D.

    It cannot be sampled, so the model cannot generate data (``x=None``), and log p(x) is defined only up to a constant.

    References:
        Baldi and Hornik (1989), Neural Networks and Principal Component Analysis: linear autoencoders.
        https://doi.org/10.1016/0893-6080(89)90014-2
        Bishop (2006), Pattern Recognition and Machine Learning, section 2.4.3: noninformative priors.

    Args:
        features: the number D of latent features.

    Returns:
        When called, an improper distribution of batch shape [] and event shape [D] with log-density 0.

    Raises:
        ValueError: when it is sampled.

    Example:
        >>> import torch
        >>> FlatPrior(3)().log_prob(torch.randn(5, 3))
        tensor([0., 0., 0., 0., 0.])
    """

    loc: Tensor

    @checked
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", origin(features), persistent=False)

    def forward(self) -> TorchDistribution:
        """The improper distribution, in the module's precision and on its device."""
        return _Flat(self.loc)


class _Flat(ImproperUniform):
    """A density of 1 everywhere."""

    def __init__(self, loc: Tensor, batch_shape: _size = torch.Size()) -> None:  # noqa: B008
        super().__init__(constraints.real_vector, Size(batch_shape), loc.shape)  # type: ignore[no-untyped-call]
        self.loc = loc

    def expand(self, batch_shape: _size, _instance: object = None) -> _Flat:
        return _Flat(self.loc, batch_shape)

    @property
    def mode(self) -> Tensor:
        """Zero; every point is a mode."""
        return self.loc.expand(self.shape())  # type: ignore[no-untyped-call]

    def log_prob(self, value: Tensor) -> Tensor:
        zero: Tensor = (0.0 * value).sum(-1)
        return zero.expand(torch.broadcast_shapes(zero.shape, self.batch_shape))

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        raise ValueError(
            "FlatPrior is improper and cannot be sampled: give the model data x (not x=None) and a guide that "
            "samples the latents, or use a proper prior such as StandardNormal"
        )


class LaplacePrior(nn.Module):
    r"""Independent Laplace features: the prior of sparse codes.

    .. math:: \log p(z) = -\tfrac{1}{b} \textstyle\sum_d |z_d| - D \log 2 b

    References:
        Olshausen and Field (1996), Emergence of Simple-Cell Receptive Field Properties by Learning a Sparse Code.
        https://doi.org/10.1038/381607a0

    Args:
        features: the number D of latent features.
        scale: b, the mean of abs(z_d).

    Returns:
        When called, a distribution of batch shape [] and event shape [D].

    Raises:
        ValueError: if ``scale`` is not positive and finite.

    Example:
        >>> LaplacePrior(3, scale=0.5)().sample().shape
        torch.Size([3])
    """

    loc: Tensor

    @checked
    def __init__(self, features: int, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is the positive mean of abs(z), but got {scale}")
        super().__init__()
        self.scale = float(scale)
        self.register_buffer("loc", origin(features), persistent=False)

    def forward(self) -> TorchDistribution:
        """The distribution, in the module's precision and on its device."""
        prior: TorchDistribution = Laplace(self.loc, self.scale).to_event(1)
        return prior

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"scale={self.scale}"
