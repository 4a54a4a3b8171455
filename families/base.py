"""The abstract base class of families, and helpers that they share.

| symbol | meaning |
| --- | --- |
| h | context, [..., H] |
| P | number of parameters of one distribution |
| lambda | parameters, [..., P], an affine function of h |
"""

from __future__ import annotations

__all__ = ["Drawn", "Family", "inverse_root", "lower_triangle", "matvec", "positive", "raw_of"]

import copy
import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.types import _size

from jensen.checked import check_features, checked

_ONE = math.log(math.e - 1.0)  # softplus(_ONE) == 1


class Family(nn.Module, ABC):
    r"""A conditional distribution p(y | h), in two steps: h to parameters, parameters to distribution.

    .. math:: \lambda = A h + b, \qquad p(y \mid h) = p(y; \lambda)

    The base class has the affine map. A subclass defines the number of parameters and their meaning.

    Args:
        features: the number of features of y, or its event shape as a tuple.
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

    reaches: Literal["", "near", "diagonal", "full"] = ""
    """The Gaussians that ``parameters_of`` can represent: none; one near each; diagonal ones; all."""

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, size: int) -> None:
        super().__init__()
        self.event_shape = Size((features,) if isinstance(features, int) else features)
        self.features = self.event_shape.numel()
        if self.features < 1 or (context is not None and context < 1):
            raise ValueError(
                f"{type(self).__name__} needs features and context of at least 1, but got features={features}, "
                f"context={context}"
            )
        if size < 1:
            raise ValueError(
                f"{type(self).__name__} has no parameters with these settings (features={features}, "
                f"context={context}): layers, components, reads and the like must be at least 1"
            )
        self.context = context
        self.size = size
        self.affine: nn.Module = nn.Identity() if context is None else nn.Linear(context, size)

    def project(self, h: Tensor) -> Tensor:
        """The first step: contexts [..., H] to parameters [..., P]."""
        check_features(h, "h", getattr(self.affine, "weight", None))
        width = self.size if self.context is None else self.context
        if h.shape[-1:] != (width,):
            raise ValueError(
                f"{type(self).__name__} expects a context of width {width}, but got shape {tuple(h.shape)}: build it "
                f"with context={h.shape[-1] if h.dim() else 'the width of its input'}"
            )
        parameters: Tensor = self.affine(h)
        return parameters

    @abstractmethod
    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """The second step: parameters [..., P] to a distribution of batch shape [...] and the family's event shape."""

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of a member near a Gaussian of mean [..., D] and Cholesky factor [..., D, D].

        Raises:
            NotImplementedError: if the family :attr:`reaches` none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no parameters_of: its member near a given Gaussian is not known"
        )

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to a distribution of batch shape [...] and the family's event shape."""
        return self.distribution(self.project(h))

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters of the second step other than lambda, by name: a flow's networks, a shared scale."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("affine.")}

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"features={tuple(self.event_shape)}, context={self.context}"


def positive(raw: Tensor) -> Tensor:
    """Map any real number to a positive one: softplus, shifted so that 0 maps to 1, at least 1e-6."""
    return F.softplus(raw + _ONE) + 1e-6


def raw_of(value: Tensor) -> Tensor:
    """The inverse of :func:`positive`, for values above 1e-6."""
    value = (value - 1e-6).clamp_min(1e-12)
    return value + torch.log(-torch.expm1(-value)) - _ONE


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """[*batch, I, J] times [*sample, *batch, J]: [*sample, *batch, I], without a copy of the matrix per sample."""
    product: Tensor = torch.einsum("...ij,...j->...i", matrix, vector)
    return product


def inverse_root(matrix: Tensor) -> Tensor:
    """A, lower triangular with A A^T = M^{-1}, of M [..., D, D]. From M = U U^T with U upper triangular, A = U^{-T}."""
    upper = torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    root: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True).mT
    return root


def lower_triangle(entries: Tensor, size: int) -> Tensor:
    """Entries [..., size (size - 1) / 2] to strictly lower triangular matrices [..., size, size], row by row."""
    rows, columns = torch.tril_indices(size, size, offset=-1, device=entries.device)
    places = rows * size + columns
    flat = entries.new_zeros(*entries.shape[:-1], size * size).index_copy(-1, places, entries)
    matrices: Tensor = flat.unflatten(-1, (size, size))
    return matrices


class Drawn(TorchDistribution):
    r"""A distribution that computes the log-density of its last sample from the sample's noise.

    .. math:: z = f(\epsilon), \qquad \log q(z) = \log p(\epsilon) - \log |\det f'(\epsilon)|

    This needs no inverse of f, so log q has no rounding error of an inverse: in float32 an ill-conditioned inverse
    loses all digits, and SVI exploits such errors. Parameters keep their batch shape and are broadcast when the
    distribution is expanded.

    Args:
        batch_shape: the batch shape.
        event_shape: the event shape.
    """

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, batch_shape: _size, event_shape: _size) -> None:
        super().__init__(Size(batch_shape), Size(event_shape), validate_args=False)
        self._last: tuple[Tensor, Tensor, bool] | None = None

    @abstractmethod
    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """A sample [*shape], and its log-density."""

    @abstractmethod
    def density(self, value: Tensor) -> Tensor:
        """The log-density of any value."""

    def expand(self, batch_shape: _size, _instance: object = None) -> Drawn:
        """The same distribution with another batch shape."""
        new = copy.copy(self)
        new._batch_shape, new._last = Size(batch_shape), None
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized sample."""
        z, log_q = self.draw(self._extended_shape(Size(sample_shape)))
        self._last = (z, log_q, torch.is_grad_enabled())
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density: of the last sample from its noise, of any other value from the inverse.

        A value from ``sample`` (without gradient) counts as any other value if gradients are needed: the derivative of
        log q at a fixed z differs from that along a reparameterized sample.
        """
        if self._last is not None and value is self._last[0] and self._last[2] >= torch.is_grad_enabled():
            return self._last[1]
        return self.density(value)
