r"""A family of Gaussian mixtures, for posteriors with more than one mode.

.. math:: q(z \mid h) = \sum_{c=1}^C \pi_c(h) \, \mathcal{N}(z; \mu_c(h), \operatorname{diag}(s_c(h))^2)
"""

from __future__ import annotations

__all__ = ["Mixture"]

import math

import torch
from pyro.distributions import Categorical, Independent, Normal, TorchDistribution
from torch import Size, Tensor
from torch.nn import functional as F

from jensen.checked import checked

from .base import Drawn, Family, positive


class Mixture(Family):
    r"""Mixture of C diagonal Gaussians, with pathwise gradients of its samples.

    A sample has gradients in all parameters, including the weights, by implicit reparameterization. With F_d the
    distribution function of feature d given the preceding features, F(z; lambda) = u is constant,

    .. math:: F_d = \sum_c r_{cd} \, \Phi((z_d - \mu_{cd}) / s_{cd}), \quad
              r_{cd} \propto \pi_c \prod_{j < d} \mathcal{N}(z_j; \mu_{cj}, s_{cj}^2), \qquad
              \frac{dz}{d\lambda} = -\Big(\frac{\partial F}{\partial z}\Big)^{-1} \frac{\partial F}{\partial \lambda}

    References:
        Bishop, Lawrence, Jaakkola and Jordan (1998), Approximating Posterior Distributions in Belief Networks Using
        Mixtures.
        Figurnov, Mohamed and Mnih (2018), Implicit Reparameterization Gradients. https://arxiv.org/abs/1805.08498

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the C (1 + 2 D) parameters.
        components: the number C of components.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``components`` is less than 1.

    Example:
        >>> import torch
        >>> Mixture(2, context=8, components=4)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, features: int, context: int | None, components: int = 4) -> None:
        if components < 1:
            raise ValueError(f"Mixture needs at least 1 component, but got components={components}")
        super().__init__(features, context, size=components * (1 + 2 * features))
        self.components = components

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P], logits, then locations, then scales, component by component, to a mixture."""
        C, D = self.components, self.features
        logits, loc, raw = parameters.split([C, C * D, C * D], dim=-1)
        return _Mixture(logits, loc.unflatten(-1, (C, D)), positive(raw).unflatten(-1, (C, D)))

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, components={self.components}"


class _Mixture(Drawn):
    """The mixture, with gradients of samples from the implicit function F(z; lambda) = u.

    Pyro's ``MixtureOfDiagNormals`` uses another transport field; its gradient in the logits was found to be wrong.
    """

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc.shape[:-2], loc.shape[-1:])
        self.log_weights, self.loc, self.scale = logits.log_softmax(-1), loc, scale  # [..., C], [..., C, D]

    @property
    def mixture_distribution(self) -> Categorical:
        """The distribution of the component."""
        return Categorical(logits=self.log_weights)

    @property
    def component_distribution(self) -> Independent:
        """The distribution of a value given its component: batch shape [..., C], event shape [D]."""
        return Independent(Normal(self.loc, self.scale), 1)

    @property
    def mean(self) -> Tensor:
        """The mean, [..., D]."""
        mean: Tensor = (self.log_weights.exp().unsqueeze(-1) * self.loc).sum(-2)
        return mean.expand(self.batch_shape + self.event_shape)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            weights = self.log_weights.exp().expand(*shape[:-1], -1)
            which = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1).view(*shape[:-1], 1, 1)
            loc, scale = (
                t.expand(*shape[:-1], *t.shape[-2:]).gather(-2, which.expand(*shape[:-1], 1, shape[-1])).squeeze(-2)
                for t in (self.loc, self.scale)
            )
            z = loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)
        if torch.is_grad_enabled() and (self.log_weights.requires_grad or self.loc.requires_grad):
            z = self._attached(z)
        return z, self.density(z)

    def density(self, value: Tensor) -> Tensor:
        return (self.log_weights + self._log_normal(value).sum(-1)).logsumexp(-1)

    def _log_normal(self, z: Tensor) -> Tensor:
        """The log-density of each feature under each component, [..., C, D]."""
        return -0.5 * ((z.unsqueeze(-2) - self.loc) / self.scale).square() - self.scale.log() - _HALF_LOG_TWO_PI

    def _attached(self, z: Tensor) -> Tensor:
        """The same values, with the gradient -(dF/dz)^{-1} dF/dlambda."""
        log_normal = self._log_normal(z)
        before = F.pad(log_normal[..., :-1].cumsum(-1), (1, 0))  # of the features before d
        share = (self.log_weights.unsqueeze(-1) + before).softmax(-2)  # [..., C, D]: r_c given z_{<d}
        below = torch.special.ndtr((z.unsqueeze(-2) - self.loc) / self.scale)
        cdf = (share * below).sum(-2)  # [..., D]: F
        with torch.no_grad():
            slope = -(z.unsqueeze(-2) - self.loc) / self.scale.square()  # d log N / dz, [..., C, D]
            mean_slope = torch.einsum("...cd,...cj->...dj", share, slope)
            jacobian = torch.einsum("...cd,...cj->...dj", share * below, slope) - cdf.unsqueeze(-1) * mean_slope
            jacobian = jacobian.tril(-1) + torch.diag_embed((share * log_normal.exp()).sum(-2))
        step = torch.linalg.solve_triangular(jacobian, (cdf - cdf.detach()).unsqueeze(-1), upper=False).squeeze(-1)
        attached: Tensor = z - step
        return attached


_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
