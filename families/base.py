"""The contract of a family, and what its members share.

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

    reaches: Literal["", "near", "diagonal", "full"] = ""
    """Which Gaussians ``parameters_of`` reaches: none; one near each; those with a diagonal covariance; all."""

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, size: int) -> None:
        super().__init__()
        self.event_shape = Size((features,) if isinstance(features, int) else features)
        self.features = self.event_shape.numel()
        if self.features < 1 or (context is not None and context < 1):
            raise ValueError(
                f"{type(self).__name__} needs features and context of at least 1, got features={features}, "
                f"context={context}"
            )
        if size < 1:
            raise ValueError(
                f"{type(self).__name__} has no parameters with these settings: numbers such as layers, components and "
                f"reads are at least 1; features are {features}, context is {context}"
            )
        self.context = context
        self.size = size
        self.affine: nn.Module = nn.Identity() if context is None else nn.Linear(context, size)

    def project(self, h: Tensor) -> Tensor:
        """The first half: contexts [..., H] to parameters [..., P]."""
        check_features(h, "h", getattr(self.affine, "weight", None))
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

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of a member near a Gaussian of mean [..., D] and Cholesky factor [..., D, D].

        Raises:
            NotImplementedError: where the family :attr:`reaches` none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which of its members is near a given Gaussian")

    def forward(self, h: Tensor) -> TorchDistribution:
        """Contexts [..., H] to a distribution of batch shape [...] and the family's event shape."""
        return self.distribution(self.project(h))

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that the second half reads beside lambda, by name: a flow's networks, a shared scale."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("affine.")}

    def extra_repr(self) -> str:
        """What the printed module shows beside its layers."""
        return f"features={tuple(self.event_shape)}, context={self.context}"


def positive(raw: Tensor) -> Tensor:
    """A positive number from any real one: softplus, shifted so that 0 goes to 1 and floored at 1e-6."""
    return F.softplus(raw + _ONE) + 1e-6


def raw_of(value: Tensor) -> Tensor:
    """The number that :func:`positive` turns into this one, which is above 1e-6."""
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
    r"""A distribution that knows the log-density of its own last draw from the noise that made it.

    .. math:: z = f(\epsilon), \qquad \log q(z) = \log p(\epsilon) - \log |\det f'(\epsilon)|

    No inverse of f is needed for it, and none of its rounding reaches log q: in float32 an ill-conditioned inverse
    loses all digits, and SVI learns to exploit that. Parameters keep their own batch shape, however the distribution
    is expanded; they are broadcast.

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
        """A draw [*shape], and its log-density."""

    @abstractmethod
    def density(self, value: Tensor) -> Tensor:
        """The log-density of any value."""

    def expand(self, batch_shape: _size, _instance: object = None) -> Drawn:
        """The same distribution under another batch shape."""
        new = copy.copy(self)
        new._batch_shape, new._last = Size(batch_shape), None
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized draw."""
        z, log_q = self.draw(self._extended_shape(Size(sample_shape)))
        self._last = (z, log_q, torch.is_grad_enabled())
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density: of the last draw from its noise, of any other value from the inverse.

        A value drawn without gradient (``sample``) is any other value once gradients are asked for: log q at a fixed z
        has another derivative than log q along a draw.
        """
        if self._last is not None and value is self._last[0] and self._last[2] >= torch.is_grad_enabled():
            return self._last[1]
        return self.density(value)
