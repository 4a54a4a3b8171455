r"""Models of x given covariates y: class labels, or any vector.

.. math:: p(x, z \mid y) = p(z \mid y) \, p(x \mid f(z, y))
"""

from __future__ import annotations

__all__ = ["ConditionalVAE"]

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families import Family
from jensen.module import UniqueModule
from jensen.networks.conditioned import as_vectors, join_covariates

from .base import data_plate
from .priors import StandardNormal


class ConditionalVAE(UniqueModule):
    r"""A VAE of x given y: the decoder takes z and y concatenated.

    .. math:: z \sim p(z \mid y), \qquad x \sim p(x \mid f([z, y]))

    The data are ``(x, y)``: y holds class indices, int64 [N], which become one-hot vectors of width Y, or vectors
    [N, Y] of the same precision as x. ``model(None, y)`` samples one data point for each row of y. The evidence is log
    p(x | y). The guide is also called with ``(x, y)``; :class:`jensen.networks.Conditioned` turns a network into an
    encoder of both.

    References:
        Sohn, Lee and Yan (2015), Learning Structured Output Representation Using Deep Conditional Generative Models.
        https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html
        Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised Learning with Deep Generative Models.
        https://arxiv.org/abs/1406.5298

    Args:
        decoder: a network from [..., latent + covariates] to [..., H].
        likelihood: the family of p(x | z, y), with context H.
        latent: the number D of latent features.
        covariates: the width Y of y: the number of classes.
        prior: p(z | y), a module from [N, Y] to a distribution of event shape [D]: a family with context Y, or
            ``nn.Sequential(network, family)``. If None, standard normal for every y.

    Raises:
        ValueError: if ``covariates`` is less than 1; when called without y, with y of another length than x, and for
            classes outside 0, ..., Y - 1.

    Example:
        >>> import torch
        >>> from jensen.families import Gaussian, MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.networks import Conditioned, mlp
        >>> model = ConditionalVAE(mlp(8 + 10, [128]), Gaussian(64, 128), latent=8, covariates=10)
        >>> threes = model(None, torch.full((5,), 3))
        >>> threes.shape
        torch.Size([5, 64])
        >>> guide = amortize(model, Conditioned(mlp(64 + 10, [128]), 10), MeanField, context=128)
        >>> guide(threes, torch.full((5,), 3))["z"].shape
        torch.Size([5, 8])
    """

    @checked
    def __init__(
        self, decoder: nn.Module, likelihood: Family, latent: int, covariates: int, prior: nn.Module | None = None
    ) -> None:
        if covariates < 1:
            raise ValueError(
                f"covariates is the width of y (the number of classes) and must be at least 1, but got {covariates}"
            )
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.covariates = covariates
        self.prior = _Unconditional(StandardNormal(latent)) if prior is None else prior
        self.latents = {"z": Size((latent,))}
        self.event_shape = likelihood.event_shape

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, n: int | None = None) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, *event_shape] at ``y``, or samples one x for each row of y."""
        if y is None:
            raise ValueError(
                "ConditionalVAE is a model of x given y: call it with (x, y), or with (None, y) to sample x"
            )
        n = len(y) if n is None else n
        if (rows := n if x is None else len(x)) != len(y):
            raise ValueError(
                f"y must have one row for each data point, but it has {len(y)} rows for {rows} data points"
            )
        dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
        with data_plate(x, self.event_shape, len(y), "ConditionalVAE"):
            z = pyro.sample("z", self.prior(as_vectors(y, self.covariates).to(dtype)))  # [N, D]
            h = self.decoder(join_covariates(z, y, self.covariates))  # [N, H]
            return pyro.sample("x", self.likelihood(h), obs=x)  # [N, *event_shape]


class _Unconditional(nn.Module):
    """A prior that does not read y."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, y: Tensor) -> TorchDistribution:
        p: TorchDistribution = self.prior()
        return p
