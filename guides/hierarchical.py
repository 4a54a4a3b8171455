r"""Guides for hierarchical models with sites ``"z_1"`` (the layer next to the data) to ``"z_L"`` (the top layer).

| guide | q(z given x) | sampling order | | --- | --- | --- | | BottomUp | q(z_1 given x) q(z_2 given z_1) ...
q(z_L given z_{L-1}) | from the data up | | Ladder | q(z_L given x) q(z_{L-1} given x, z_L) ... q(z_1 given x, z_2) |
from the top down, like the model |

``amortize(model, encoder, family, context)`` makes a top-down guide of any family. It conditions on x and all layers
above, without the model's networks.
"""

from __future__ import annotations

__all__ = ["BottomUp", "Ladder"]

from collections.abc import Callable, Sequence
from typing import Protocol

import pyro
import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families import MeanField
from jensen.families.base import raw_of
from jensen.module import UniqueModule
from jensen.networks import mlp

from .amortized import Amortized
from .local import Constant, PerDatum
from .members import Member, Through, check_context, data_plate, made_by

Layers = Sequence[tuple[nn.Module, Member]]


class BottomUp(Amortized):
    r"""A Markov chain from the data up: each layer depends only on the layer below.

    .. math:: q(z \mid x) = q(z_1 \mid x) \, q(z_2 \mid z_1) \cdots q(z_L \mid z_{L-1})

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519

    Args:
        layers: for l = 1, ..., L a network from x or z_{l-1} to [..., H_l], and the family of z_l with context H_l.

    Raises:
        ValueError: without layers.

    Example:
        >>> low = mlp(64, [32]), MeanField(4, 32)  # q(z_1 | x)
        >>> high = mlp(4, [16]), MeanField(2, 16)  # q(z_2 | z_1)
        >>> values = BottomUp([low, high])(torch.zeros(5, 64))
        >>> values["z_1"].shape, values["z_2"].shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """

    @checked
    def __init__(self, layers: Layers) -> None:
        if not layers:
            raise ValueError("BottomUp needs at least one layer of latents: layers is empty")
        (encoder, lowest), *higher = layers
        families: dict[str, Member | PerDatum] = {"z_1": lowest}
        width = lowest.features
        for level, (network, family) in enumerate(higher, start=2):
            families[f"z_{level}"] = Through(nn.Sequential(_Last(width), network), family)
            width = family.features
        super().__init__(encoder, families)

    @classmethod
    def of_widths(
        cls,
        features: int,
        latents: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        family: Callable[[int, int], Member] = MeanField,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> BottomUp:
        """Build a guide of multilayer perceptrons from the widths of its layers, from the data up.

        The defaults are the two-layer network of Burda et al. (2016), for
        :meth:`jensen.models.Hierarchical.of_widths`.

        Args:
            features: the number X of features of a data point.
            latents: the number of latent features of each layer.
            hidden: the widths of the deterministic layers below each layer of latents.
            family: called as ``family(features, context)`` for each layer.
            activation: constructor of the activation of the deterministic layers.

        Raises:
            ValueError: unless ``latents`` and ``hidden`` have the same length.

        Example:
            >>> sum(p.numel() for p in BottomUp.of_widths(784).parameters())
            267700
        """
        if len(latents) != len(hidden):
            raise ValueError(
                f"latents and hidden must have the same length, one entry for each layer, but got {len(latents)} and "
                f"{len(hidden)}"
            )
        inputs = [features, *latents]
        return cls(
            [
                (mlp(below, widths, activation), made_by(family, latent, widths[-1]))
                for below, latent, widths in zip(inputs, latents, hidden, strict=False)
            ]
        )


class _Last(nn.Module):
    """The last features of a context: the value sampled just before."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, context: Tensor) -> Tensor:
        return context[..., -self.features :]

    def extra_repr(self) -> str:
        return str(self.features)


class _Conditionals(Protocol):
    latents: dict[str, Size]

    def conditional(self, level: int, above: Tensor, /) -> TorchDistribution: ...


class Ladder(UniqueModule):
    r"""The guide of a ladder VAE: each layer combines a Gaussian from the data with the model's conditional prior.

    A deterministic pass from the data up, d_l = g_l(d_{l-1}) with d_0 = x, gives a Gaussian for every layer. From the
    top down, each is multiplied by the model's p(z_l | z_{l+1}), so that the precisions add:

    .. math::
        q(z_L \mid x) &= \mathcal{N}(\hat\mu_L, \hat\sigma_L^2) \\
        q(z_l \mid x, z_{l+1}) &\propto \mathcal{N}(z_l; \hat\mu_l, \hat\sigma_l^2) \, p(z_l \mid z_{l+1}), \qquad
        \sigma^{-2} = \hat\sigma_l^{-2} + \sigma_p^{-2}

    The guide therefore uses the model's networks with their current parameters; it holds the model without registering
    it again. Objectives that need separate parameters (``gradient="dreg"``) raise an error.

    It collapses easily: if the Gaussian from the data is wide, the product still makes q narrower than
    p(z_l | z_{l+1}), p is fitted to q, and both shrink until q equals p. A small initial hat sigma helps, and so does a
    beta that grows from near 0 (``ELBO(beta=LinearAnnealing(...))``, as in the paper). ``rate_distortion`` detects the
    collapse.

    References:
        Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), Ladder Variational Autoencoders.
        https://arxiv.org/abs/1602.02282

    Args:
        model: a model with sites ``"z_L"``, ..., ``"z_1"`` and ``conditional(level, above)``, a diagonal Gaussian
            for level > 1: :class:`jensen.models.Hierarchical`.
        layers: for l = 1, ..., L a network g_l from d_{l-1} to d_l, [N, H_l], and a
            :class:`~jensen.families.MeanField` over z_l with context H_l.

    Raises:
        ValueError: if the layers do not match the model's latents; when called, if a layer is not a diagonal Gaussian.

    Example:
        >>> from jensen.families import Gaussian
        >>> from jensen.models import Hierarchical
        >>> model = Hierarchical([(mlp(4, [32]), Gaussian(64, 32)), (mlp(2, [16]), MeanField(4, 16))], latent=2)
        >>> guide = Ladder(model, [(mlp(64, [32]), MeanField(4, 32)), (mlp(32, [16]), MeanField(2, 16))])
        >>> list(guide(model(n=5)))
        ['z_2', 'z_1']
    """

    @checked
    def __init__(self, model: _Conditionals, layers: Layers) -> None:
        super().__init__()
        expected = [shape.numel() for shape in reversed(model.latents.values())]
        if (features := [family.features for _, family in layers]) != expected:
            raise ValueError(
                f"the model's layers have {expected} latent features, from the data up, but the guide's layers have "
                f"{features}"
            )
        self._model = (model,)  # in a tuple: not registered, so saved and optimised once, with the model
        self.networks = nn.ModuleList(network for network, _ in layers)
        self.families = nn.ModuleList(family for _, family in layers)  # type: ignore[misc]

    @classmethod
    def of_widths(
        cls,
        model: _Conditionals,
        features: int,
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        activation: Callable[[], nn.Module] = nn.Tanh,
        scale: float = 0.01,
    ) -> Ladder:
        """Build a guide of multilayer perceptrons for a model from its deterministic widths, from the data up.

        Args:
            model: as for the class.
            features: the number X of features of a data point.
            hidden: the widths of the deterministic layers below each layer of latents.
            activation: constructor of their activation.
            scale: the initial hat sigma of every layer: small, so that the data determine q at first.

        Raises:
            ValueError: unless ``hidden`` has one entry for each of the model's layers, and ``scale`` is above 1e-6.

        Example:
            >>> from jensen.models import Hierarchical
            >>> guide = Ladder.of_widths(Hierarchical.of_widths(784), 784)
        """
        latents = [shape.numel() for shape in reversed(model.latents.values())]
        if len(latents) != len(hidden):
            raise ValueError(
                f"the model has {len(latents)} layers of latents, but hidden has {len(hidden)} entries: give one for "
                "each layer"
            )
        if not 1e-6 < scale < float("inf"):
            raise ValueError(f"scale must be a standard deviation above 1e-6, but got {scale}")
        layers: list[tuple[nn.Module, Member]] = []
        below = features
        for latent, widths in zip(latents, hidden, strict=True):
            family = MeanField(latent, widths[-1])
            with torch.no_grad():
                family.affine.bias[latent:] = raw_of(torch.tensor(scale))  # type: ignore[operator]
            layers.append((mlp(below, widths, activation), family))
            below = widths[-1]
        return cls(model, layers)

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: samples every site for the rows of ``x`` from the top down; returns the values by site."""
        (model,) = self._model
        bottom_up = [family(d) for d, family in zip(self._up(x, *covariates), self.families, strict=True)]
        values: dict[str, Tensor] = {}
        q, L = bottom_up[-1], len(bottom_up)
        with data_plate(len(x)):
            for level in range(L, 0, -1):
                z = values[f"z_{level}"] = pyro.sample(f"z_{level}", q)  # [K, N, D_l]
                if level > 1:
                    q = _product(bottom_up[level - 2], model.conditional(level, z), level - 1)
        return values

    def local(self, *data: Tensor) -> Ladder:
        """The same guide with free Gaussians for each of these data points, starting at the networks' outputs."""
        (model,) = self._model
        with torch.no_grad():
            passed = self._up(*data)
        inputs: list[tuple[Tensor, ...]] = [data, *((d,) for d in passed)]
        layers = [
            (Constant(d, below), PerDatum(family, d, first=True))
            for d, below, family in zip(passed, inputs, self.families, strict=False)
        ]
        return Ladder(model, layers)  # type: ignore[arg-type]

    def _up(self, *data: Tensor) -> list[Tensor]:
        """The deterministic pass: d_1, ..., d_L, each [N, H_l]."""
        passed: list[Tensor] = []
        for network in self.networks:
            data = (network(*data),)
            check_context(data[0])
            passed.append(data[0])
        return passed


def _product(one: TorchDistribution, other: TorchDistribution, level: int) -> TorchDistribution:
    """The normalized product of two diagonal Gaussians."""
    for q in (one, other):
        if not (isinstance(q, Independent) and isinstance(q.base_dist, Normal)):
            raise ValueError(
                f"Ladder multiplies diagonal Gaussians, but site 'z_{level}' has a {type(q).__name__}: use MeanField "
                "in the model and in the guide, or another guide (BottomUp, amortize)"
            )
    a, b = one.base_dist, other.base_dist
    weight, other_weight = a.scale**-2, b.scale**-2  # precisions, [K, N, D]
    total = weight + other_weight
    loc = (weight * a.loc + other_weight * b.loc) / total
    return Independent(Normal(loc, total.rsqrt()), 1)
