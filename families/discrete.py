r"""Discrete families: binary observations, and discrete latent vectors that can be enumerated.

.. math:: \log p(x \mid h) = \sum_d x_d \log \pi_d(h) + (1 - x_d) \log (1 - \pi_d(h)), \qquad x_d \in \{0, 1\}

| family | states |
| --- | --- |
| Bernoulli | D independent features, for observations: not enumerable |
| BinaryVector | the 2^D vectors of D independent binary features |
| OneHotCategorical | the D vectors with a single one |
"""

from __future__ import annotations

__all__ = ["Bernoulli", "BinaryVector", "OneHotCategorical"]

import itertools

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.types import _size

from jensen.checked import checked

from .base import Family


class Bernoulli(Family):
    r"""Independent binary features, given by their logits.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, appendix C.1. https://arxiv.org/abs/1312.6114

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

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None) -> None:
        size = torch.Size((features,) if isinstance(features, int) else features).numel()
        super().__init__(features, context, size=size)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to independent Bernoulli features."""
        logits = parameters.unflatten(-1, self.event_shape)
        return dist.Independent(dist.Bernoulli(logits=logits), len(self.event_shape))


class BinaryVector(Family):
    r"""A vector of D independent binary features as one discrete variable with 2^D enumerable states.

    With ``pyro.infer.config_enumerate``, a latent site of this family is summed out exactly.

    References:
        Saul, Jaakkola and Jordan (1996), Mean Field Theory for Sigmoid Belief Networks.
        https://arxiv.org/abs/cs/9603102

    Args:
        features: the number D of features, at most 16 if states are enumerated.
        context: the width H of the context, or None: h already holds the D logits.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> q = BinaryVector(3, context=8)(torch.zeros(5, 8))
        >>> q.enumerate_support().shape, q.enumerate_support(expand=False).shape
        (torch.Size([8, 5, 3]), torch.Size([8, 1, 3]))
    """

    @checked
    def __init__(self, features: int, context: int | None) -> None:
        super().__init__(features, context, size=features)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to a binary vector."""
        return _BinaryVector(dist.Bernoulli(logits=parameters), 1)


class _BinaryVector(dist.Independent):
    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All states, [2^D, *batch_shape, D], or [2^D, 1, ..., D] without expanding."""
        (D,) = self.event_shape
        if D > 16:
            raise NotImplementedError(
                f"{D} binary features have 2^{D} states, but at most 16 features can be enumerated: use fewer features"
            )
        logits = self.base_dist.logits
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=D)), dtype=logits.dtype, device=logits.device)
        states = states.reshape(-1, *(1,) * len(self.batch_shape), D)
        return states.expand(-1, *self.batch_shape, -1) if expand else states

    def expand(self, batch_shape: _size, _instance: object = None) -> _BinaryVector:
        base = self.base_dist.expand(torch.Size(batch_shape) + self.event_shape)
        return _BinaryVector(base, 1)


class OneHotCategorical(Family):
    r"""One of D categories as a one-hot vector.

    .. math:: q(z = e_d \mid h) = \operatorname{softmax}(l(h))_d

    References:
        Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised Learning with Deep Generative Models.
        https://arxiv.org/abs/1406.5298

    Args:
        features: the number D of categories.
        context: the width H of the context, or None: h already holds the D logits.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> q = OneHotCategorical(3, context=8)(torch.zeros(5, 8))
        >>> q.sample().sum(-1)
        tensor([1., 1., 1., 1., 1.])
    """

    @checked
    def __init__(self, features: int, context: int | None) -> None:
        super().__init__(features, context, size=features)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to a one-hot vector."""
        return dist.OneHotCategorical(logits=parameters)
