r"""Hierarchical models with several stochastic layers.

.. math:: p(x, z) = p(z_L) \, p(z_{L-1} \mid z_L) \cdots p(z_1 \mid z_2) \, p(x \mid z_1)

Layers are numbered from the data up; the sites ``"z_L"``, ..., ``"z_1"`` are sampled from the top down.
"""

from __future__ import annotations

__all__ = ["Hierarchical"]

from collections.abc import Callable, Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families import Bernoulli, Family, MeanField
from jensen.module import UniqueModule
from jensen.networks import mlp

from .base import data_plate
from .priors import StandardNormal


class Hierarchical(UniqueModule):
    r"""A deep latent Gaussian model: L layers of latents, each the context of the layer below.

    .. math::
        z_L \sim p(z_L), \qquad z_{l-1} \sim p(z_{l-1} \mid f_l(z_l)), \qquad x \sim p(x \mid f_1(z_1))

    Layer l is a network f_l of z_l and the family of the variable below: x for l = 1, z_{l-1} otherwise. With one layer
    the model is a :class:`VAE`.

    References:
        Rezende, Mohamed and Wierstra (2014), Stochastic Backpropagation and Approximate Inference.
        https://arxiv.org/abs/1401.4082
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519

    Args:
        layers: for l = 1, ..., L the network from [..., D_l] to [..., H_l] and the family with context H_l.
        latent: the number D_L of features of the top layer.
        prior: a module without input that returns the distribution of z_L; standard normal if None.

    Raises:
        ValueError: without layers.

    Example:
        >>> low = mlp(4, [32]), Bernoulli(64, 32)  # p(x | z_1)
        >>> high = mlp(2, [16]), MeanField(4, 16)  # p(z_1 | z_2)
        >>> model = Hierarchical([low, high], latent=2)
        >>> model.latents
        {'z_2': torch.Size([2]), 'z_1': torch.Size([4])}
        >>> model(n=5).shape
        torch.Size([5, 64])
    """

    @checked
    def __init__(self, layers: Sequence[tuple[nn.Module, Family]], latent: int, prior: nn.Module | None = None) -> None:
        if not layers:
            raise ValueError("Hierarchical needs at least one layer of latents: layers is empty")
        super().__init__()
        self.networks = nn.ModuleList(network for network, _ in layers)
        self.families = nn.ModuleList(family for _, family in layers)
        self.prior = StandardNormal(latent) if prior is None else prior
        shapes = [family.event_shape for _, family in layers]  # of x, z_1, ..., z_{L-1}
        self.event_shape = shapes[0]
        above = [*shapes[1:], Size((latent,))]
        self.latents = {f"z_{level}": above[level - 1] for level in range(len(layers), 0, -1)}

    @classmethod
    def of_widths(
        cls,
        features: int,
        latents: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        likelihood: Callable[[int, int], Family] = Bernoulli,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> Hierarchical:
        """Build a model of multilayer perceptrons and diagonal Gaussians from the widths of its layers.

        The widths go from the data up. The defaults are the two-layer network of Burda et al. (2016): 200-200 units
        between x and 100 latents, 100-100 between these and 50 more, with tanh. The matching guide is
        :meth:`jensen.guides.BottomUp.of_widths`.

        Args:
            features: the number X of features of a data point.
            latents: the number of latent features of each layer.
            hidden: the widths of the deterministic layers below each layer of latents, in the order of the guide's
                pass from the data up; the model goes through them in the reverse order.
            likelihood: called as ``likelihood(features, context)``.
            activation: constructor of the activation of the deterministic layers.

        Raises:
            ValueError: unless ``latents`` and ``hidden`` have the same length, at least 1.

        Example:
            >>> sum(p.numel() for p in Hierarchical.of_widths(784).parameters())
            253384
        """
        if len(latents) != len(hidden) or not latents:
            raise ValueError(
                "latents and hidden must have the same length, one entry for each layer and at least one, but got "
                f"{len(latents)} and {len(hidden)}"
            )
        layers: list[tuple[nn.Module, Family]] = []
        below: int = features
        for latent, widths in zip(latents, hidden, strict=True):
            family = MeanField(below, widths[0]) if layers else likelihood(below, widths[0])
            layers.append((mlp(latent, widths[::-1], activation), family))
            below = latent
        return cls(layers, latents[-1])

    def conditional(self, level: int, above: Tensor) -> TorchDistribution:
        """p(z_{l-1} | z_l), or p(x | z_1) for l = 1, at values of z_l, [..., D_l]: batch shape [...].

        Args:
            level: l, from 1 to L.
            above: the values of z_l.
        """
        below: TorchDistribution = self.families[level - 1](self.networks[level - 1](above))
        return below

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, *event_shape], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, "Hierarchical"):
            L = len(self.families)
            z = pyro.sample(f"z_{L}", self.prior())  # [N, D_L]
            for level in range(L, 1, -1):
                z = pyro.sample(f"z_{level - 1}", self.conditional(level, z))  # [N, D_{l-1}]
            return pyro.sample("x", self.conditional(1, z), obs=x)  # [N, *event_shape]
