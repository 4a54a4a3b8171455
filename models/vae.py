r"""The generative model of a variational autoencoder: a prior, a decoder network, a likelihood.

.. math:: p(x, z) = p(z)\, p(x \mid f(z))
"""

from __future__ import annotations

__all__ = ["VAE"]

import pyro
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked, shown
from jensen.families import Family
from jensen.module import UniqueModule

from .base import data_plate
from .priors import StandardNormal


class VAE(UniqueModule):
    r"""A deep latent Gaussian model: z from the prior, x from a family whose context is a network of z.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid f(z))

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114
        Rezende, Mohamed and Wierstra (2014), Stochastic Backpropagation and Approximate Inference.
        https://arxiv.org/abs/1401.4082

    Args:
        decoder: a network from [..., latent] to [..., H].
        likelihood: the family of p(x | z), with context H.
        latent: the number D of latent features.
        prior: a module without input that returns the distribution of z, of event shape [D]: :class:`LearnedPrior`,
            :class:`VampPrior`; standard normal if None.

    Raises:
        ValueError: if the prior has another event shape than [D].

    Example:
        >>> from jensen.families import Gaussian
        >>> from jensen.networks import mlp
        >>> model = VAE(mlp(8, [128]), Gaussian(64, 128, scale="shared"), latent=8)
        >>> model(n=5).shape
        torch.Size([5, 64])
    """

    @checked
    def __init__(self, decoder: nn.Module, likelihood: Family, latent: int, prior: nn.Module | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = StandardNormal(latent) if prior is None else prior
        self.latents = {"z": Size((latent,))}
        self.event_shape = likelihood.event_shape
        try:
            shape = self.prior().event_shape
        except (AttributeError, TypeError) as error:
            raise TypeError(
                "prior must be a module that is called without arguments and returns a distribution, such as "
                f"StandardNormal({latent}), but got {shown(prior)} ({error})"
            ) from error
        if shape != (latent,):
            raise ValueError(
                f"VAE has {latent} latent features, but its prior has event shape {tuple(shape)}: use a prior of "
                f"event shape ({latent},)"
            )

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, *event_shape], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, "VAE"):
            prior: TorchDistribution = self.prior()
            z = pyro.sample("z", prior)  # [N, D]
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)  # [N, *event_shape]
