r"""Guides with a penalty on the encoder: contractive autoencoders.

.. math:: \log q(z \mid x) = \log q_0(z \mid x) + \lambda \left\| \partial g(x) / \partial x \right\|_F^2
"""

from __future__ import annotations

__all__ = ["Contractive"]

import pyro
import torch
from torch import Tensor

from jensen.checked import checked
from jensen.module import UniqueModule

from .amortized import Amortized
from .members import data_plate


class Contractive(UniqueModule):
    r"""A guide with a penalty on the squared Jacobian of its encoder's parameters: a contractive autoencoder.

    .. math:: \text{loss}(x) = -\text{ELBO}(x) + \lambda \sum_{i, j} \left(\partial g_i(x) / \partial x_j\right)^2

    g are the parameters of the site's family: with the family ``Delta``, z itself. In training mode the penalty is a
    ``pyro.factor`` in the guide and part of log q, so the loss is not a bound. In evaluation mode there is no penalty.

    References:
        Rifai, Vincent, Muller, Glorot and Bengio (2011), Contractive Auto-Encoders.
        https://icml.cc/2011/papers/455_icmlpaper.pdf

    Args:
        guide: an amortized guide with one latent site.
        weight: lambda, in nats per unit of the squared Jacobian.

    Raises:
        ValueError: if the guide has more than one latent site, or ``weight`` is negative or not finite.

    Example:
        >>> from jensen.families import Delta, Gaussian
        >>> from jensen.guides import amortize
        >>> from jensen.models import VAE, FlatPrior
        >>> from jensen.networks import mlp
        >>> model = VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.1), latent=2, prior=FlatPrior(2))
        >>> guide = Contractive(amortize(model, mlp(5, [16]), Delta, context=16), weight=0.1)
        >>> guide.penalty(torch.zeros(7, 5)).shape
        torch.Size([7])
    """

    @checked
    def __init__(self, guide: Amortized, weight: float) -> None:
        if len(guide.families) != 1:
            raise ValueError(f"Contractive needs a guide with one latent site, but got one with {list(guide.families)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, but got {weight}")
        super().__init__()
        self.guide = guide
        self.weight = float(weight)

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: samples the site for the rows of ``x`` with the penalty; returns the values by site."""
        if not self.training:
            return self.guide(x, *covariates)  # type: ignore[no-any-return]
        context, squared = self._look(x, covariates)
        with data_plate(len(x)):
            pyro.factor("contraction", self.weight * squared, has_rsample=True)
            return {site: pyro.sample(site, family(context)) for site, family in self.guide.families.items()}

    def penalty(self, x: Tensor, *covariates: Tensor) -> Tensor:
        """The squared Frobenius norm of the Jacobian of g at each row of ``x``: [N]."""
        return self._look(x, covariates)[1]

    def _look(self, x: Tensor, covariates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The encoder's output, [N, H], and the squared Jacobian, [N]."""
        (family,) = self.guide.families.values()
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            context = self.guide.encoder(x, *covariates)
            g = family.project(context)  # type: ignore[operator]  # [N, P]
            squared = x.new_zeros(len(x))
            for column in g.unbind(-1):
                (slope,) = torch.autograd.grad(column.sum(), x, create_graph=trained, retain_graph=True)
                squared = squared + slope.flatten(1).square().sum(-1)
        return (context, squared) if trained else (context.detach(), squared.detach())
