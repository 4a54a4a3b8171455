"""Noise on a network's input during training, for denoising autoencoders."""

from __future__ import annotations

__all__ = ["GaussianNoise", "MaskingNoise"]

import math

import torch
from torch import Tensor, nn

from jensen.checked import checked


class GaussianNoise(nn.Module):
    r"""Adds new Gaussian noise at every call in training mode; in evaluation mode it returns x.

    .. math:: \tilde x = x + s \epsilon, \qquad \epsilon \sim \mathcal{N}(0, I)

    Placed before an encoder, ``nn.Sequential(GaussianNoise(0.1), encoder)``, it makes a denoising autoencoder. The
    noise is not a site and has no log-density: given the noise, the guide is a valid guide and its ELBO a bound.

    References:
        Vincent, Larochelle, Lajoie, Bengio and Manzagol (2010), Stacked Denoising Autoencoders.
        Im, Ahn, Memisevic and Bengio (2017), Denoising Criterion for Variational Auto-Encoding Framework.

    Args:
        scale: s, the standard deviation of the noise, in the units of x.

    Raises:
        ValueError: if ``scale`` is not positive and finite.

    Example:
        >>> import torch
        >>> noise, x = GaussianNoise(0.1), torch.zeros(5, 3)
        >>> torch.equal(noise(x), x), torch.equal(noise.eval()(x), x)
        (False, True)
    """

    @checked
    def __init__(self, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive standard deviation of the noise, but got {scale}")
        super().__init__()
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with noise, of the same shape."""
        return x + self.scale * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"scale={self.scale}"


class MaskingNoise(nn.Module):
    """Sets a random share of the features to 0 at every call in training mode; in evaluation mode it returns x.

    Unlike dropout, it does not rescale the other features.

    References:
        Vincent, Larochelle, Bengio and Manzagol (2008), Extracting and Composing Robust Features with Denoising
        Autoencoders.

    Args:
        share: the probability that a feature is set to 0.

    Raises:
        ValueError: if ``share`` is not in [0, 1].

    Example:
        >>> import torch
        >>> MaskingNoise(0.3)(torch.ones(5, 3)).unique().tolist()
        [0.0, 1.0]
    """

    @checked
    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be a probability in [0, 1], but got {share}")
        super().__init__()
        self.share = float(share)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with features set to 0, of the same shape."""
        return torch.where(torch.rand_like(x) < self.share, 0.0, x) if self.training else x

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"share={self.share}"
