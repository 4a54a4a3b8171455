"""Corruption of a network's input while it is trained: what a denoising autoencoder undoes."""

from __future__ import annotations

__all__ = ["GaussianNoise", "MaskingNoise"]

import math

import torch
from torch import Tensor, nn

from jensen.checked import checked


class GaussianNoise(nn.Module):
    r"""Adds Gaussian noise, fresh at every call, in training mode; in evaluation mode it passes x on.

    .. math:: \tilde x = x + s \epsilon, \qquad \epsilon \sim \mathcal{N}(0, I)

    Before an encoder, ``nn.Sequential(GaussianNoise(0.1), encoder)``, it makes the guide that of a denoising
    autoencoder. The noise is no site and is not scored: given it, the guide is a guide like any other, and its ELBO a
    bound.

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
            raise ValueError(f"scale is the positive standard deviation of the noise, but got {scale}")
        super().__init__()
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """X with noise, of the same shape."""
        return x + self.scale * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"scale={self.scale}"


class MaskingNoise(nn.Module):
    """Sets a share of the features to 0, other ones at every call, in training mode; otherwise passes x on.

    Unlike dropout it does not scale up what it leaves.

    References:
        Vincent, Larochelle, Bengio and Manzagol (2008), Extracting and Composing Robust Features with Denoising
        Autoencoders.

    Args:
        share: the probability of each feature to be set to 0.

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
            raise ValueError(f"share is a probability, but got {share}")
        super().__init__()
        self.share = float(share)

    def forward(self, x: Tensor) -> Tensor:
        """X with features set to 0, of the same shape."""
        return torch.where(torch.rand_like(x) < self.share, 0.0, x) if self.training else x

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"share={self.share}"
