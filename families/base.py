"""The contract of a family, and what its members share.

| symbol | meaning |
| --- | --- |
| h | context, [..., H] |
| P | number of parameters of one distribution |
| lambda | parameters, [..., P], an affine function of h |
"""

from __future__ import annotations

__all__ = ["Family", "positive"]

import math
from abc import ABC, abstractmethod

from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.nn import functional as F

_ONE = math.log(math.e - 1.0)  # softplus(_ONE) == 1


class Family(nn.Module, ABC):
    r"""A conditional distribution p(y | h), in two halves: h to parameters, parameters to distribution.

    .. math:: \lambda = A h + b, \qquad p(y \mid h) = p(y; \lambda)

    The affine map is the family's own. A member says how many parameters it needs and what they mean.

    Args:
        features: the number of features of y, or a tuple: its event shape.
        context: the width H of the context, or None: h already holds the parameters.
        size: the number P of parameters.

    Raises:
        ValueError: if ``features`` or ``context`` is not positive.

    Example:
        >>> import torch
        >>> from jensen.families import MeanField
        >>> family = MeanField(3, context=16)
        >>> q = family(torch.zeros(5, 16))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
        >>> family.project(torch.zeros(5, 16)).shape
        torch.Size([5, 6])
    """

    def __init__(self, features: int | tuple[int, ...], context: int | None, size: int) -> None:
        super().__init__()
        self.event_shape = Size((features,) if isinstance(features, int) else features)
        self.features = self.event_shape.numel()
        if self.features < 1 or (context is not None and context < 1):
            raise ValueError(
                f"{type(self).__name__} needs features and context of at least 1, got features={features}, "
                f"context={context}"
            )
        self.context = context
        self.size = size
        self.affine: nn.Module = nn.Identity() if context is None else nn.Linear(context, size)

    def project(self, h: Tensor) -> Tensor:
        """The first half: contexts [..., H] to parameters [..., P]."""
        width = self.size if self.context is None else self.context
        if h.shape[-1:] != (width,):
            raise ValueError(
                f"{type(self).__name__} reads a context of width {width}, but got shape {tuple(h.shape)}; build it "
                f"with context={h.shape[-1] if h.dim() else 'the width of its input'}"
            )
        parameters: Tensor = self.affine(h)
        return parameters

    @abstractmethod
    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """The second half: parameters [..., P] to a distribution of batch shape [...] and the family's event shape."""

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to a distribution of batch shape [...] and the family's event shape."""
        return self.distribution(self.project(h))

    def extra_repr(self) -> str:
        """What the printed module shows beside its layers."""
        return f"features={tuple(self.event_shape)}, context={self.context}"


def positive(raw: Tensor) -> Tensor:
    """A positive number from any real one: softplus, shifted so that 0 goes to 1 and floored at 1e-6."""
    return F.softplus(raw + _ONE) + 1e-6
