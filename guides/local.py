r"""Guides with free parameters for each data point, without an encoder.

.. math:: \lambda_n = \lambda(h_n) + \delta_n

with a free offset delta_n for each data point. Other weights of the distribution (a flow's networks) get one copy for
each data point, and the family is mapped over the data points.
"""

from __future__ import annotations

__all__ = ["Constant", "PerDatum", "same_values"]

import copy
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from jensen.families.base import Drawn
from jensen.missing import equal_values, same_values


class Constant(nn.Module):
    """An encoder that stores its output for N data points and accepts only these.

    Args:
        context: the stored output, [N, H].
        data: the data of this output; N is the first dimension.
    """

    context: Tensor

    def __init__(self, context: Tensor, data: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.register_buffer("context", context)
        self._count = len(data)
        for i, x in enumerate(data):
            self.register_buffer(f"data_{i}", x.detach().clone(), persistent=False)  # not needed in a checkpoint

    def forward(self, *data: Tensor) -> Tensor:
        """The stored contexts, [N, H]."""
        if get_proxy_mode() is None:
            self._check(data)
            return self.context
        pairs = zip(self._known, data, strict=True)
        same = torch.stack([equal_values(own, x).all() for own, x in pairs]).all()
        return torch.where(same, self.context, torch.nan)  # a traced function must not branch on values

    @property
    def _known(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"data_{i}") for i in range(self._count))

    def _check(self, data: tuple[Tensor, ...]) -> None:
        known = tuple(own.to(x) for own, x in zip(self._known, data, strict=True))
        if not all(same_values(own, x) for own, x in zip(known, data, strict=True)):
            raise ValueError(
                f"this guide has parameters for {len(self.context)} data points, but got {len(data[0])} other data "
                "points: pass the data of the guide in the same order, or call guide.local(*data) for other data"
            )


class PerDatum(nn.Module):
    """A family, or a wrapper of one, with free parameters for each data point.

    Args:
        member: the family; it is copied, and its own parameters are frozen.
        context: the encoder's output for the N data points, [N, H].
        first: whether its context depends on x alone, so that offsets can replace the map from context to parameters.
        offset: the initial offsets, [N, P]; zero if None.
    """

    def __init__(self, member: Any, context: Tensor, first: bool, offset: Tensor | None = None) -> None:
        super().__init__()
        n = len(context)
        self.size, self.features = member.size, member.features
        weights = member.own_weights() if first else dict(member.named_parameters())
        self.names = list(weights)
        self.copies = nn.ParameterList(w.detach().expand(n, *w.shape).clone() for w in weights.values())
        self.offset = nn.Parameter(context.new_zeros(n, self.size) if offset is None else offset.detach().clone())
        self.member = _frozen(member)

    @property
    def reaches(self) -> str:
        """Which Gaussians :meth:`move_to` can represent: see :class:`~jensen.families.base.Family`."""
        return "" if self.names else getattr(self.member, "reaches", "")

    @torch.no_grad()
    def move_to(self, h: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the parameters of each data point, with context h, near a Gaussian: [N, H], [N, D], [N, D, D]."""
        self.offset.copy_(self.member.parameters_of(loc, scale_tril) - self.member.project(h))

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., N, H] to a distribution of batch shape [..., N]."""
        if not self.names:
            q: TorchDistribution = self.member.distribution(self.member.project(h) + self.offset)
            return q
        return _Mapped(self, h)


def _frozen(member: Any) -> Any:
    """A copy whose parameters are buffers, so that they are moved and saved but not trained."""
    member = copy.deepcopy(member)
    for part in member.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return member


class _Mapped(Drawn):
    """The distribution for N data points with separate weights: the family's, mapped over the data points."""

    def __init__(self, owner: PerDatum, h: Tensor) -> None:
        with torch.no_grad():
            one = owner.member(h)
        super().__init__(h.shape[:-1], one.event_shape)
        self._support = one.support
        self.has_rsample = one.has_rsample
        self.law = _Law(owner.member)
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
        """Sample, or evaluate a value, per data point: N is before the event in z, and last in log q."""
        z_dim = -1 - len(self.event_shape)

        def one(weights: dict[str, Tensor], h: Tensor, offset: Tensor, value: Tensor | None) -> Any:
            return functional_call(self.law, weights, (h, offset, sample_shape, value))

        with pyro.distributions.validation_enabled(False):
            each = vmap(
                one,
                in_dims=(0, -2, 0, None if value is None else z_dim),
                out_dims=(z_dim, -1),
                randomness="different",
            )
            try:
                drawn: tuple[Tensor, Tensor] = each(self.weights, self.h, self.offset, value)
            except RuntimeError as error:
                if "vmap" not in str(error) and "functorch" not in str(error):
                    raise
                raise NotImplementedError(
                    f"{type(self.law.member).__name__} cannot have separate weights for each data point, because "
                    f"torch.vmap does not support it ({str(error).splitlines()[0]}): use another family"
                ) from error
        return drawn


class _Law(nn.Module):
    """The sample and log-density of one data point, as a module, so that its weights can be replaced."""

    def __init__(self, member: Any) -> None:
        super().__init__()
        self.member = member

    def forward(self, h: Tensor, offset: Tensor, sample_shape: Size, value: Tensor | None) -> tuple[Tensor, Tensor]:
        q = self.member.distribution(self.member.project(h) + offset)
        if value is not None:
            return value, q.log_prob(value)
        z = q.rsample(sample_shape) if q.has_rsample else q.sample(sample_shape)
        return z, q.log_prob(z)
