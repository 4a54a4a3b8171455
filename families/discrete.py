r"""Discrete families.

.. math:: \log p(x \mid h) = \sum_d x_d \log \pi_d(h) + (1 - x_d) \log (1 - \pi_d(h)), \qquad x_d \in \{0, 1\}
"""

from __future__ import annotations

__all__ = ["Bernoulli"]

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from .base import Family


class Bernoulli(Family):
    r"""Independent binary features, given by their logits.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, appendix C.1.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the D logits.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> Bernoulli(4, context=8)(torch.zeros(5, 8)).log_prob(torch.ones(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, features: int | tuple[int, ...], context: int | None) -> None:
        size = torch.Size((features,) if isinstance(features, int) else features).numel()
        super().__init__(features, context, size=size)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to independent Bernoulli features."""
        logits = parameters.unflatten(-1, self.event_shape)
        return dist.Independent(dist.Bernoulli(logits=logits), len(self.event_shape))
