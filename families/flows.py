r"""Normalizing flows for posteriors: a flow of standard normal noise, then an affine map given the context.

.. math::
    z = \mu(h) + L(h) \, f_h(\epsilon), \qquad \epsilon \sim \mathcal{N}(0, I), \qquad
    \log q(z \mid h) = \log \mathcal{N}(\epsilon; 0, I) - \log |\det f_h'(\epsilon)| - \log \det L(h)

The affine map comes last, so the flow only transforms a standardized shape and need not learn location and scale. A
sample takes one pass; the log-density of any other value needs the inverse of f, if it exists.

| symbol | meaning |
| --- | --- |
| G | number of parameters of the flow in lambda, beside those of the affine map: [..., G] |
| L | diagonal, or lower triangular with its rows in units of the diagonal |
"""

from __future__ import annotations

__all__ = ["IAF", "MAF", "Flow", "autoregressive", "start_near_zero"]

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Size, Tensor, nn

from jensen.checked import checked

from .base import Drawn, Family, lower_triangle, matvec, positive


class Flow(Family):
    """The base class of flows: the affine map, the noise, and log q from the log-determinant of the subclass.

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        reads: the number G of parameters of f.
        triangular: whether L is triangular, so that the base Gaussian has a full covariance.

    Example:
        >>> import torch
        >>> from jensen.families import IAF
        >>> q = IAF(3, context=8)(torch.randn(5, 8))
        >>> z, log_det = q.push(torch.randn(5, 3))
        >>> z.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    @checked
    def __init__(self, features: int, context: int | None, reads: int, triangular: bool = False) -> None:
        below = features * (features - 1) // 2 if triangular else 0
        super().__init__(features, context, size=2 * features + below + reads)
        self._parts = [features, features, below, reads]

    @abstractmethod
    def bend(self, noise: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """f: noise [*sample, ..., D] and parameters [..., G] to y and log|det f'|."""

    @abstractmethod
    def straighten(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of f: y to noise, and log|det f'| there; NotImplementedError if there is none."""

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P]: locations, scales, lower triangle, and the flow's parameters."""
        loc, raw, below, g = parameters.split(self._parts, dim=-1)
        return _Pushed(self, loc, positive(raw), below if self._parts[2] else None, g)


class _Pushed(Drawn):
    """The distribution of mu + L f(noise)."""

    def __init__(self, flow: Flow, loc: Tensor, scale: Tensor, below: Tensor | None, g: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.flow, self.loc, self.scale, self.g = flow, loc, scale, g
        self.below = None if below is None else lower_triangle(below, loc.shape[-1])  # L = diag(scale) (I + below)
        self.log_scale = scale.log().sum(-1)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Map noise to a value; also the log-determinant of the map's Jacobian."""
        y, log_det = self.flow.bend(noise, self.g)
        if self.below is not None:
            y = y + matvec(self.below, y)
        return self.loc + self.scale * y, log_det + self.log_scale

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z, log_det = self.push(noise)
        return z, _standard_normal(noise) - log_det

    def density(self, value: Tensor) -> Tensor:
        y = (value - self.loc) / self.scale
        if self.below is not None:
            y = torch.linalg.solve_triangular(self.below, y.unsqueeze(-1), upper=False, unitriangular=True).squeeze(-1)
        noise, log_det = self.flow.straighten(y, self.g)
        return _standard_normal(noise) - log_det - self.log_scale


def _standard_normal(noise: Tensor) -> Tensor:
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)


class _Affine(Flow):
    """The common part of the two affine autoregressive flows: their networks, and the maps in both directions."""

    @checked
    def __init__(
        self,
        features: int,
        context: int | None,
        layers: int = 2,
        hidden: Sequence[int] = (64, 64),
        reads: int = 16,
        triangular: bool = False,
    ) -> None:
        super().__init__(features, context, reads, triangular)
        self.networks = nn.ModuleList(autoregressive(features, reads, hidden, 2) for _ in range(layers))

    def at_once(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The map through every layer, one pass of each network, and the log-determinant."""
        log_det = x.new_zeros(())
        for network in self.networks:
            shift, log_scale = _affine(network, x, g)
            x = (shift + log_scale.exp() * x).flip(-1)
            log_det = log_det + log_scale.sum(-1)
        return x, log_det

    def by_feature(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, D passes of each network, and the log-determinant of the forward map."""
        log_det = y.new_zeros(())
        for network in reversed(self.networks):
            y, x = y.flip(-1), torch.zeros_like(y)
            for _ in range(self.features):  # pass d completes feature d
                shift, log_scale = _affine(network, x, g)
                x = (y - shift) * (-log_scale).exp()
            y = x
            log_det = log_det + log_scale.sum(-1)
        return y, log_det


class IAF(_Affine):
    r"""Inverse autoregressive flow: layers that map each feature affinely given the preceding features.

    .. math:: y_d = m_d(\epsilon_{<d}, g) + e^{a_d(\epsilon_{<d}, g)} \epsilon_d, \qquad
              \log |\det f'| = \sum_d a_d, \qquad |a_d| < 3

    The order of the features is reversed from layer to layer. A sample takes one pass of the networks; the log-density
    of any other value takes D passes.

    References:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow.
        https://arxiv.org/abs/1606.04934
        Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        layers: the number of layers.
        hidden: the widths of the hidden layers of each network (at least D).
        reads: the number G of context parameters that are inputs of the networks.
        triangular: whether L is triangular, so that the base Gaussian has a full covariance.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> q = IAF(3, context=8)(torch.randn(5, 8))
        >>> z = q.rsample()
        >>> torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4)
        True
    """

    def bend(self, noise: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [..., D] to y, one pass of each network."""
        return self.at_once(noise, g)

    def straighten(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, D passes of each network."""
        return self.by_feature(y, g)


class MAF(_Affine):
    r"""Masked autoregressive flow: a fast log-density of any value but slow samples, the opposite of :class:`IAF`.

    .. math:: \epsilon_d = m_d(y_{<d}, g) + e^{a_d(y_{<d}, g)} y_d, \qquad
              \log |\det f'| = -\sum_d a_d, \qquad |a_d| < 3

    The log-density of any value takes one pass of the networks, as a prior needs it; a sample takes D passes.

    References:
        Papamakarios, Pavlakou and Murray (2017), Masked Autoregressive Flow for Density Estimation.
        https://arxiv.org/abs/1705.07057
        Chen et al. (2017), Variational Lossy Autoencoder: such a prior.

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        layers: the number of layers.
        hidden: the widths of the hidden layers of each network (at least D).
        reads: the number G of context parameters that are inputs of the networks.
        triangular: whether L is triangular, so that the base Gaussian has a full covariance.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> q = MAF(3, context=8)(torch.randn(5, 8))
        >>> q.log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def bend(self, noise: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [..., D] to y, D passes of each network."""
        y, log_det = self.by_feature(noise, g)
        return y, -log_det

    def straighten(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, one pass of each network."""
        noise, log_det = self.at_once(y, g)
        return noise, -log_det


def _affine(network: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and log-scale of each feature given the preceding features; the log-scale lies within (-3, 3)."""
    shift, raw = network(x, g.tanh())
    return shift, 3 * torch.tanh(raw / 3)


def autoregressive(features: int, reads: int, hidden: Sequence[int], outputs: int) -> nn.Module:
    """A masked network from features [..., D] and g [..., G] to ``outputs`` numbers per feature, near zero at first.

    Output d depends on g and on the features before d: a tuple of [..., D], or [..., outputs, D] for more than two.
    """
    if reads < 1 or not hidden or min(hidden) < 1:
        raise ValueError(
            "hidden (the widths of the layers of a flow's network) and reads (its number of context inputs) must be "
            f"at least 1, but got hidden={list(hidden)} and reads={reads}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ConditionalAutoRegressiveNN input_dim = 1")  # g is then the only input
        network = ConditionalAutoRegressiveNN(
            features,
            reads,
            [max(width, features) for width in hidden],
            param_dims=[1, 1] if outputs == 2 else [outputs],
            permutation=torch.arange(features),  # type: ignore[arg-type]
            skip_connections=True,
            nonlinearity=nn.SiLU(),
        )
    start_near_zero(network.layers[-1], network.skip_layer)
    return network


def start_near_zero(*layers: nn.Module | None) -> None:
    """Shrink a network's last layers, so that a flow starts close to the identity."""
    with torch.no_grad():
        for layer in layers:
            for parameter in () if layer is None else layer.parameters():
                parameter.mul_(0.01)
