r"""Members of a guide: a family, optionally with a network before it or a map onto a constrained support.

All have the two steps of a family, context to parameters and parameters to distribution. Guides treat them alike and
can refine the parameters between the steps.
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
    """The two steps of a family."""

    features: int
    size: int

    @property
    def reaches(self) -> str:
        """Which Gaussians ``parameters_of`` can represent: see :class:`~jensen.families.base.Family`."""
        ...

    def project(self, h: Tensor) -> Tensor:
        """Contexts [..., H] to parameters [..., P]."""
        ...

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P] to a distribution of batch shape [...]."""
        ...

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of a member near a Gaussian, for the Gaussians of ``reaches``."""
        ...

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters of the second step other than lambda, by name."""
        ...


class _Wrapped(nn.Module):
    """A wrapper that shares the second step of its family."""

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
        """The parameters [..., P] of the family near a Gaussian, before the map onto the support."""
        return self.family.parameters_of(loc, scale_tril)

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters of the second step other than lambda, by name."""
        return {f"family.{name}": value for name, value in self.family.own_weights().items()}

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to a distribution of batch shape [...]."""
        return self.distribution(self.project(h))


class Through(_Wrapped):
    """A family with a network applied to its context.

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
        family: a family whose features are the unconstrained coordinates (2 for a simplex of 3 numbers).
        constraint: the support, as in ``torch.distributions.constraints``.
        event_shape: the event shape of the site; if None, a vector of the family's features. ``()`` for a scalar.

    Raises:
        ValueError: unless the family's features match the unconstrained coordinates.

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
                f"coordinates, but the family has {self.features} features: build it with {expected}"
            )

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P] to a distribution on the support."""
        transform = site_transform(self.event_shape, self.constraint)
        mapped: TorchDistribution = TransformedDistribution(self.family.distribution(parameters), [transform])
        return mapped

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{self.constraint}, event_shape={tuple(self.event_shape)}"


def site_transform(
    event_shape: Sequence[int], constraint: Constraint = constraints.real, inner: Size | None = None
) -> Transform:
    """The bijection from a vector of unconstrained coordinates onto the support of a site.

    ``inner`` is the event shape of the coordinates, needed for bounds with batch dimensions. The transform caches its
    last value, so that the inverse returns exactly the coordinates that produced it.
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
    """exp clamped to the range of its precision: extreme samples become very large or small, not infinite or zero."""

    def _call(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return x.exp().clamp(limits.tiny, limits.max)


def check_context(context: Tensor) -> None:
    """Raise ValueError unless the encoder's output has one row for each data point."""
    if context.dim() != 2:
        raise ValueError(
            "the encoder's output must be a context [N, H], one row for each data point, but has shape "
            f"{list(context.shape)}: give data with a first dimension N (x[i : i + 1] for one point), and an encoder "
            "that flattens images"
        )


def made_by(family: Callable[[int, Any], M], features: int, context: int | None) -> M:
    """Call a family with features and context. Raises TypeError if it does not accept them."""
    try:
        return family(features, context)
    except TypeError as error:
        raise TypeError(
            "family must be callable as family(features, context), like the classes of jensen.families, but the call "
            f"failed: {error}"
        ) from error


def data_plate(n: int) -> pyro.plate:
    """The plate of a guide over n data points; ValueError for none."""
    if n < 1:
        raise ValueError("data must have a first dimension N of at least 1, but have no rows")
    return pyro.plate("data", n, dim=-1)


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate contexts [..., H], [..., D], ... along the last dimension; leading dimensions are broadcast."""
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, -1) for part in parts], dim=-1)
