r"""Amortized guides: one encoder, then a chain of families over the latent sites.

.. math:: q(z_1, \dots, z_L \mid x) = \prod_l q(z_l \mid h, z_{<l}), \qquad h = \text{encoder}(x)
"""

from __future__ import annotations

__all__ = ["Amortized", "Through", "amortize"]

from collections.abc import Callable, Mapping
from typing import Protocol

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from jensen.families import Family
from jensen.module import UniqueModule


class Through(nn.Module):
    """A family that reads its context through a network of its own.

    Args:
        network: a network from [..., H] to [..., G].
        family: a family with context G.

    Example:
        >>> import torch
        >>> from jensen.families import MeanField
        >>> from jensen.networks import mlp
        >>> Through(mlp(16, [32]), MeanField(2, context=32))(torch.zeros(5, 16)).batch_shape
        torch.Size([5])
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network = network
        self.family = family

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to the family's distribution of batch shape [...]."""
        distribution: TorchDistribution = self.family(self.network(h))
        return distribution


class Amortized(UniqueModule):
    r"""An amortized guide: the encoder reads the data once, the sites are drawn one after the other.

    The context of the first site is ``encoder(*data)``, [N, H]; that of the next is the concatenation of the context
    and the value just drawn, leading dimensions broadcast. The encoder runs once, whatever the number of particles.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.

    Args:
        encoder: a network from the data [N, X] to the context [N, H].
        families: for each latent site, in the order of drawing, a family (or :class:`Through`) whose context has the
            width H plus the widths of the sites drawn before.

    Raises:
        ValueError: without sites.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance
        >>> from jensen.networks import mlp
        >>> guide = Amortized(mlp(64, [128]), {"z": FullCovariance(8, context=128)})
        >>> guide(torch.zeros(5, 64))["z"].shape
        torch.Size([5, 8])
    """

    def __init__(self, encoder: nn.Module, families: Mapping[str, Family | Through]) -> None:
        if not families:
            raise ValueError("Amortized needs at least one latent site: families is empty")
        super().__init__()
        self.encoder = encoder
        self.families = nn.ModuleDict(dict(families))

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: draws every site for the rows of ``x``; returns the values by site."""
        parts = [self.encoder(x, *covariates)]  # [N, H], then a [K, N, D] for each site drawn
        values: dict[str, Tensor] = {}
        with pyro.plate("data", len(x), dim=-1):
            for site, family in self.families.items():
                q: TorchDistribution = family(_join(parts))
                z = values[site] = pyro.sample(site, q)  # [K, N, *event]
                parts.append(z.flatten(z.dim() - q.event_dim) if q.event_dim else z.unsqueeze(-1))
        return values


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate contexts [..., H], [..., D], ... along their last dimension, leading ones broadcast."""
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, -1) for part in parts], dim=-1)


class _HasLatents(Protocol):
    latents: dict[str, Size]


def amortize(
    model: _HasLatents,
    encoder: nn.Module,
    family: Callable[[int, int], Family],
    context: int,
) -> Amortized:
    """An amortized guide for all latent sites of a model, every one in the same family.

    Args:
        model: a model that says its ``latents``.
        encoder: a network from the data to a context [N, context].
        family: the family, called as ``family(features, context)``: a class, or a ``functools.partial`` of one.
        context: the width of the encoder's output.

    Returns:
        An :class:`Amortized` guide that draws the sites in the model's order, each given those before it.

    Raises:
        ValueError: for a site whose event is not a vector.

    Example:
        >>> from jensen.families import FullCovariance, MeanField
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(64, latent=8)
        >>> guide = amortize(model, mlp(64, [128]), MeanField, context=128)
        >>> guide = amortize(model, mlp(64, [128]), FullCovariance, context=128)  # one word swaps the family
    """
    families: dict[str, Family | Through] = {}
    for site, event_shape in model.latents.items():
        event_shape = Size(event_shape)
        if len(event_shape) != 1:
            raise ValueError(
                f"amortize draws vectors, but site '{site}' has event shape {list(event_shape)}: build its family "
                "yourself and give it to Amortized"
            )
        families[site] = family(event_shape.numel(), context)
        context += event_shape.numel()
    return Amortized(encoder, families)
