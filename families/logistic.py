r"""A family for ordered grey levels: a discretized mixture of logistic distributions.

With sigma the logistic function, mu_c and s_c the mean and scale of component c in levels, and x one of 0 ... L - 1,

.. math:: p(x) = \sum_c \pi_c \Big( \sigma\big(\tfrac{x + 1/2 - \mu_c}{s_c}\big)
          - \sigma\big(\tfrac{x - 1/2 - \mu_c}{s_c}\big) \Big)

where the first sigma is 1 at x = L - 1 and the second one 0 at x = 0, so that the end levels have the tails. The
difference is computed as a product, :math:`\sigma(a) - \sigma(b) = \sigma(a) \, \sigma(-b) \, (1 - e^{b - a})`, without
cancellation.
"""

from __future__ import annotations

__all__ = ["DiscretizedLogistic"]

import torch
from pyro.distributions import Independent, TorchDistribution, constraints
from torch import Size, Tensor
from torch.nn import functional as F
from torch.types import _size

from jensen.checked import checked

from .base import Family, positive


class DiscretizedLogistic(Family):
    r"""Independent grey levels from mixtures of logistics: neighbouring levels have similar probabilities.

    The parameters are logits, means in units of half the range (0 is its middle), and raw scales (0 is a quarter of
    half the range).

    References:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow: one component.
        https://arxiv.org/abs/1606.04934
        Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++: mixtures. https://arxiv.org/abs/1701.05517

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the 3 C D parameters.
        levels: the number L of levels: data are the integers from 0 to L - 1.
        components: the number C of logistics in the mixture.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``levels`` is less than 2 or ``components`` less than 1.

    Example:
        >>> import torch
        >>> p = DiscretizedLogistic(4, context=8, components=5)(torch.zeros(5, 8))
        >>> p.log_prob(torch.full((5, 4), 255.0)).shape
        torch.Size([5])
    """

    @checked
    def __init__(
        self, features: int | tuple[int, ...], context: int | None, levels: int = 256, components: int = 1
    ) -> None:
        if levels < 2 or components < 1:
            raise ValueError(
                f"levels must be at least 2 and components at least 1, but got levels={levels}, components={components}"
            )
        size = Size((features,) if isinstance(features, int) else features).numel()
        super().__init__(features, context, size=3 * components * size)
        self.levels, self.components = levels, components

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., 3 C D], logits, means, scales, component by component, to independent grey levels."""
        parts = parameters.unflatten(-1, (3, self.components, *self.event_shape))
        axis = -1 - len(self.event_shape)
        logits, loc, raw = (part.movedim(axis, -1) for part in parts.unbind(axis - 1))  # [..., *event, C]
        half = (self.levels - 1) / 2
        p = _DiscretizedLogistic(logits.log_softmax(-1), half * (1 + loc), half * positive(raw) / 4, self.levels)
        return Independent(p, len(self.event_shape))

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, levels={self.levels}, components={self.components}"


class _DiscretizedLogistic(TorchDistribution):
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, log_weights: Tensor, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.log_weights, self.loc, self.scale, self.levels = log_weights, loc, scale, levels  # [..., C]
        super().__init__(loc.shape[:-1])

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: _size, _instance: object = None) -> _DiscretizedLogistic:
        shape = (*batch_shape, self.loc.shape[-1])
        log_weights, loc, scale = (part.expand(shape) for part in (self.log_weights, self.loc, self.scale))
        return _DiscretizedLogistic(log_weights, loc, scale, self.levels)

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(Size(sample_shape))
        gumbel = -(-torch.rand((*shape, self.loc.shape[-1]), dtype=self.loc.dtype, device=self.loc.device).log()).log()
        which = (self.log_weights + gumbel).argmax(-1, keepdim=True)
        loc, scale = (part.expand(*shape, -1).gather(-1, which).squeeze(-1) for part in (self.loc, self.scale))
        x = loc + scale * torch.rand_like(loc).logit(eps=torch.finfo(loc.dtype).tiny)
        return x.round().clamp(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x = value.unsqueeze(-1)  # [..., 1]
        above, below = (x + 0.5 - self.loc) / self.scale, (x - 0.5 - self.loc) / self.scale
        inner = F.logsigmoid(above) + F.logsigmoid(-below) + (-(-1 / self.scale).exp()).log1p()
        top, bottom = x == self.levels - 1, x == 0
        log_p = torch.where(top, F.logsigmoid(-below), torch.where(bottom, F.logsigmoid(above), inner))
        return (self.log_weights + log_p).logsumexp(-1)
