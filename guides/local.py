r"""Parameters of their own for each datum: what a family can do when no encoder has to find them.

.. math:: \lambda_n = \lambda(h_n) + \delta_n

with a free offset for each datum. Weights that the distribution reads beside lambda (a flow's networks) become one copy
for each datum, and the family is mapped over the data.
"""

from __future__ import annotations

__all__ = ["Constant", "PerDatum"]

import copy
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.func import functional_call, vmap

from jensen.families.base import Drawn


class Constant(nn.Module):
    """An encoder that remembers its answer for N data."""

    context: Tensor

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.register_buffer("context", context)

    def forward(self, x: Tensor, *covariates: Tensor) -> Tensor:
        """The remembered contexts, [N, H]."""
        if len(x) != len(self.context):
            raise ValueError(
                f"this guide holds parameters for each of {len(self.context)} data, but got {len(x)}: give it these "
                "data, in their order"
            )
        return self.context


class PerDatum(nn.Module):
    """A family, or what wraps one, with parameters of their own for each datum.

    Args:
        member: the family; it is copied, and its own parameters are frozen.
        n: the number N of data.
        first: whether its context depends on x alone, so that offsets alone are all of the first half's freedom.
    """

    def __init__(self, member: Any, n: int, first: bool) -> None:
        super().__init__()
        frozen = copy.deepcopy(member).requires_grad_(False)
        self._member = (frozen,)  # in a tuple: Pyro would register its frozen weights
        self.size, self.features = member.size, getattr(member, "features", None)
        weights = frozen.own_weights() if first else dict(frozen.named_parameters())
        like = next(iter(frozen.parameters()), torch.zeros(()))
        self.offset = nn.Parameter(like.new_zeros(n, self.size))
        self.names = list(weights)
        self.copies = nn.ParameterList(w.detach().expand(n, *w.shape).clone() for w in weights.values())

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., N, H] to a distribution of batch shape [..., N]."""
        if not self.names:
            (member,) = self._member
            q: TorchDistribution = member.distribution(member.project(h) + self.offset)
            return q
        return _Mapped(self, h)


class _Mapped(Drawn):
    """The distribution of N data, each with weights of its own: the family's, mapped over the data."""

    def __init__(self, owner: PerDatum, h: Tensor) -> None:
        (member,) = owner._member
        with torch.no_grad():
            one = member(h)
        super().__init__(h.shape[:-1], one.event_shape)
        self._support = one.support
        self.law = _Law(member)
        self.weights = {f"member.{name}": w for name, w in zip(owner.names, owner.copies, strict=True)}
        self.offset, self.h = owner.offset, h  # [N, P], [..., N, H]

    @property
    def support(self) -> Any:  # type: ignore[override]
        return self._support

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        sample_shape = shape[: len(shape) - len(self.event_shape) - self.h.dim() + 1]
        return self._over_data(sample_shape, None)

    def density(self, value: Tensor) -> Tensor:
        return self._over_data(Size(), value)[1]

    def _over_data(self, sample_shape: Size, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw, or score a value, datum by datum: N stands before the event in z, and last in log q."""
        z_dim = -1 - len(self.event_shape)

        def one(weights: dict[str, Tensor], h: Tensor, offset: Tensor, value: Tensor | None) -> Any:
            return functional_call(self.law, weights, (h, offset, sample_shape, value))

        with pyro.distributions.validation_enabled(False):
            found: tuple[Tensor, Tensor] = vmap(
                one,
                in_dims=(0, -2, 0, None if value is None else z_dim),
                out_dims=(z_dim, -1),
                randomness="different",
            )(self.weights, self.h, self.offset, value)
        return found


class _Law(nn.Module):
    """One datum's draw and its log-density, as a module, so that its weights can be replaced."""

    def __init__(self, member: Any) -> None:
        super().__init__()
        self.member = member

    def forward(self, h: Tensor, offset: Tensor, sample_shape: Size, value: Tensor | None) -> tuple[Tensor, Tensor]:
        q = self.member.distribution(self.member.project(h) + offset)
        z = q.rsample(sample_shape) if value is None else value
        return z, q.log_prob(z)
