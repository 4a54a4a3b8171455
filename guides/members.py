r"""What a guide draws a site from: a family, read through a network, mapped to a constrained support.

All offer a family's two halves, context to parameters and parameters to distribution, so guides need not tell them
apart, and refine the parameters between the halves.
"""

from __future__ import annotations

__all__ = ["Constrained", "Member", "Through", "check_context", "data_plate", "join", "made_by", "site_transform"]

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import pyro
import torch
from pyro.distributions import TorchDistribution, TransformedDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, ExpTransform, ReshapeTransform, Transform

from jensen.checked import checked

M = TypeVar("M")


class Member(Protocol):
    """The two halves of a family."""

    features: int
    size: int

    @property
    def reaches(self) -> str:
        """Which Gaussians ``parameters_of`` reaches: see :class:`~jensen.families.base.Family`."""
        ...

    def project(self, h: Tensor) -> Tensor:
        """Contexts [..., H] to parameters [..., P]."""
        ...

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P] to a distribution of batch shape [...]."""
        ...

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of a member near a Gaussian, where ``reaches`` says that there is one."""
        ...

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that the second half reads beside lambda, by name."""
        ...


class _Wrapped(nn.Module):
    """What holds a family and hands its second half on."""

    def __init__(self, family: Member) -> None:
        super().__init__()
        self.family = family
        self.features, self.size = family.features, family.size
        self.reaches: str = getattr(family, "reaches", "")

    def project(self, h: Tensor) -> Tensor:
        """Contexts [..., H] to the family's parameters [..., P]."""
        return self.family.project(h)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P] to the distribution."""
        return self.family.distribution(parameters)

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of the family's member near a Gaussian, before it is mapped."""
        return self.family.parameters_of(loc, scale_tril)

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that the second half reads beside lambda, by name."""
        return {f"family.{name}": value for name, value in self.family.own_weights().items()}

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to a distribution of batch shape [...]."""
        return self.distribution(self.project(h))


class Through(_Wrapped):
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

    @checked
    def __init__(self, network: nn.Module, family: Member) -> None:
        super().__init__(family)
        self.network = network

    def project(self, h: Tensor) -> Tensor:
        """Contexts [..., H] to the family's parameters [..., P]."""
        return self.family.project(self.network(h))


class Constrained(_Wrapped):
    r"""A family mapped from all of R^D onto the support of a site: positive, an interval, a simplex, ...

    .. math:: z = t(u), \quad u \sim q(u \mid h), \qquad \log q(z \mid h) = \log q(u \mid h) - \log |\det t'(u)|

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic Differentiation Variational Inference.
        https://arxiv.org/abs/1603.00788

    Args:
        family: a family whose features are the coordinates of the unconstrained space (a simplex of 3 numbers has 2).
        constraint: the support, as in ``torch.distributions.constraints``.
        event_shape: the event shape of the site; a vector of the family's features if None. ``()`` for a scalar.

    Raises:
        ValueError: if the family's features are not those of the unconstrained space.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance
        >>> q = Constrained(FullCovariance(2, context=8), constraints.simplex, event_shape=(3,))(torch.randn(5, 8))
        >>> torch.allclose(q.rsample().sum(-1), torch.ones(5))
        True
    """

    @checked
    def __init__(self, family: Member, constraint: Constraint, event_shape: Sequence[int] | None = None) -> None:
        super().__init__(family)
        self.constraint = constraint
        self.event_shape = Size((self.features,) if event_shape is None else event_shape)
        (expected,) = site_transform(self.event_shape, constraint).inverse_shape(self.event_shape)
        if self.features != expected:
            raise ValueError(
                f"a site of event shape {list(self.event_shape)} under {constraint} has {expected} unconstrained "
                f"coordinates, but the family has {self.features} features"
            )

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P] to a distribution on the support."""
        transform = site_transform(self.event_shape, self.constraint)
        mapped: TorchDistribution = TransformedDistribution(self.family.distribution(parameters), [transform])
        return mapped

    def extra_repr(self) -> str:
        """What the printed module shows beside its parts."""
        return f"{self.constraint}, event_shape={tuple(self.event_shape)}"


def site_transform(
    event_shape: Sequence[int], constraint: Constraint = constraints.real, inner: Size | None = None
) -> Transform:
    """The bijection from a vector of unconstrained coordinates onto the support of a site of this event shape.

    ``inner`` is the event shape of the coordinates, where bounds with batch dimensions do not tell it. It remembers its
    last value, so that the inverse of a value that it made is the very coordinates it came from.
    """
    onto = biject_to(constraint)
    if isinstance(onto, ComposeTransform):
        onto = ComposeTransform([_Exp() if isinstance(part, ExpTransform) else part for part in onto.parts])
    elif isinstance(onto, ExpTransform):
        onto = _Exp()
    inner = Size(onto.inverse_shape(Size(event_shape))) if inner is None else inner
    flat = ReshapeTransform(Size((inner.numel(),)), inner)
    transform: Transform = ComposeTransform([flat, onto]).with_cache(1)
    return transform


class _Exp(ExpTransform):
    """exp within the range of its precision: a far draw is a very large or small number, not infinity or zero."""

    def _call(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return x.exp().clamp(limits.tiny, limits.max)


def check_context(context: Tensor) -> None:
    """Raise ValueError unless the encoder answered with one row for each datum."""
    if context.dim() != 2:
        raise ValueError(
            f"the encoder's output is a context [N, H], one row for each datum, but has shape {list(context.shape)}: "
            "give data with a first dimension N (x[i : i + 1] for one datum), and an encoder that flattens images"
        )


def made_by(family: Callable[[int, Any], M], features: int, context: int | None) -> M:
    """What a family makes. Raises TypeError where it takes no features and context."""
    try:
        return family(features, context)
    except TypeError as error:
        raise TypeError(
            f"family is called as family(features, context) and makes one of jensen.families, but it fails: {error}"
        ) from error


def data_plate(n: int) -> pyro.plate:
    """The plate of a guide over so many data; ValueError for none."""
    if n < 1:
        raise ValueError("data have a first dimension N of at least 1, but there are no rows")
    return pyro.plate("data", n, dim=-1)


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate contexts [..., H], [..., D], ... along their last dimension, leading ones broadcast."""
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, -1) for part in parts], dim=-1)
