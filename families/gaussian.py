r"""Gaussian families: diagonal, low-rank and full covariance, and the Gaussian observation model.

.. math:: \log \mathcal{N}(y; \mu, \Sigma) = -\tfrac12 (y - \mu)^\top \Sigma^{-1} (y - \mu)
          - \tfrac12 \log\det \Sigma - \tfrac{D}{2} \log 2\pi

| family | Sigma | parameters per distribution |
| --- | --- | --- |
| MeanField | diag(s)^2 | 2 D |
| LowRank | diag(s) (I + U U^T) diag(s), U of R columns | 2 D + D R |
| FullCovariance | L L^T, L lower triangular | D + D (D + 1) / 2 |
| Gaussian | s^2 I or diag(s)^2, fixed, learned or a function of the context | D or 2 D |
"""

from __future__ import annotations

__all__ = [
    "FullCovariance",
    "Gaussian",
    "LowRank",
    "LowRankGaussian",
    "MeanField",
    "RememberingNormal",
    "conditional_scale",
]

import math
from typing import Literal

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal, TorchDistribution
from torch import Tensor
from torch.types import _size

from jensen.checked import checked

from .base import Drawn, Family, lower_triangle, matvec, positive, raw_of
from .scaled import Scale, Scaled


class MeanField(Family):
    r"""Diagonal Gaussian: the features are independent given the context.

    .. math:: q(z \mid h) = \prod_d \mathcal{N}(z_d; \mu_d(h), s_d(h)^2)

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the 2 D parameters.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> MeanField(2, context=8)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    reaches: Literal["", "near", "diagonal", "full"] = "diagonal"

    @checked
    def __init__(self, features: int, context: int | None) -> None:
        super().__init__(features, context, size=2 * features)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., 2 D], locations before scales, to a diagonal Gaussian."""
        loc, raw = parameters.chunk(2, dim=-1)  # [..., D]
        return Independent(_Normal(loc, positive(raw)), 1)

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of the diagonal Gaussian q that minimises KL(q || p), p the given Gaussian."""
        return torch.cat([loc, raw_of(conditional_scale(scale_tril))], dim=-1)


def conditional_scale(scale_tril: Tensor) -> Tensor:
    """The standard deviation of each feature given all others, [..., D], from the Cholesky factor."""
    eye = torch.eye(scale_tril.shape[-1], dtype=scale_tril.dtype, device=scale_tril.device)
    root = torch.linalg.solve_triangular(scale_tril, eye, upper=False)  # precision = root^T root
    scale: Tensor = root.square().sum(-2).rsqrt()
    return scale


class _Normal(Normal):
    """Samples without in-place writes, so that a family can be mapped over data points (``torch.func.vmap``)."""

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        z: Tensor = self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return z


class LowRank(Family):
    r"""Gaussian whose covariance is diagonal plus a matrix of low rank R.

    .. math:: q(z \mid h) = \mathcal{N}(z; \mu, \operatorname{diag}(s) (I + U U^\top) \operatorname{diag}(s)), \qquad
              z = \mu + s \odot (\epsilon_1 + U \epsilon_2)

    With rank D it covers every Gaussian except for limit cases. With Q R the QR decomposition of U stacked on the
    identity, and e that of :math:`\epsilon_1` on :math:`-\epsilon_2`,

    .. math:: \log\det(I + U U^\top) = 2 \log |\det R|, \qquad
              (z - \mu)^\top \Sigma^{-1} (z - \mu) = |e - Q Q^\top e|^2

    a sum of squares, which is accurate where the difference of the Woodbury form suffers from cancellation.

    References:
        Ong, Nott and Smith (2018), Gaussian Variational Approximation with a Factor Covariance Structure.
        https://arxiv.org/abs/1701.03208

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the 2 D + D R parameters.
        rank: the number R of columns of U.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``rank`` is less than 1.

    Example:
        >>> import torch
        >>> LowRank(10, context=8, rank=2)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 10])
    """

    reaches: Literal["", "near", "diagonal", "full"] = "near"

    @checked
    def __init__(self, features: int, context: int | None, rank: int = 1) -> None:
        if rank < 1:
            raise ValueError(f"LowRank needs a rank of at least 1, but got {rank}; MeanField has rank 0")
        super().__init__(features, context, size=(2 + rank) * features)
        self.rank = rank

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P], locations before scales before U column by column, to a Gaussian."""
        D = self.features
        loc, raw, columns = parameters.split([D, D, self.rank * D], dim=-1)
        return LowRankGaussian(loc, positive(raw), columns.unflatten(-1, (self.rank, D)).transpose(-1, -2))

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Parameters [..., P] near this mean [..., D] and Cholesky factor [..., D, D], with its largest R directions.

        The directions are in units of s, the conditional standard deviation of each feature given all others.
        """
        scale = conditional_scale(scale_tril)  # [..., D]
        directions, sizes, _ = torch.linalg.svd(scale_tril / scale.unsqueeze(-1))
        wider = (sizes.square() - 1).clamp_min(0.0).sqrt()[..., : self.rank]
        columns = directions[..., : self.rank] * wider.unsqueeze(-2)  # [..., D, R]
        missing = columns.new_zeros(*columns.shape[:-1], self.rank - columns.shape[-1])
        columns = torch.cat([columns, missing], dim=-1)
        return torch.cat([loc, raw_of(scale), columns.transpose(-1, -2).flatten(-2)], dim=-1)

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, rank={self.rank}"


class LowRankGaussian(Drawn):
    """A Gaussian with covariance diag(s) (I + U U^T) diag(s)."""

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.loc, self.scale, self.factor = loc, scale, factor  # [..., D], [..., D], [..., D, R]
        rank = factor.shape[-1]
        eye = torch.eye(rank, dtype=factor.dtype, device=factor.device).expand(*factor.shape[:-2], rank, rank)
        self.basis, root = torch.linalg.qr(torch.cat([factor, eye], -2))  # [..., D + R, R], [..., R, R]
        self.log_det = scale.log().sum(-1) + root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean, [..., D]."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """diag(s) (I + U U^T) diag(s), [..., D, D]."""
        root = self.scale.unsqueeze(-1) * self.factor
        return root @ root.mT + torch.diag_embed(self.scale.square())

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A sample, and its log-density from the noise."""
        D, rank = self.factor.shape[-2:]
        noise = torch.randn(*shape[:-1], D + rank, dtype=self.loc.dtype, device=self.loc.device)
        one, two = noise.split([D, rank], -1)
        z = self.loc + self.scale * (one + matvec(self.factor, two))
        return z, self._log_density(torch.cat([one, -two], -1))

    def density(self, value: Tensor) -> Tensor:
        """Log-density of any value."""
        rank = self.factor.shape[-1]
        y = (value - self.loc) / self.scale
        return self._log_density(torch.cat([y, y.new_zeros(*y.shape[:-1], rank)], -1))

    def _log_density(self, e: Tensor) -> Tensor:
        """Log-density from e [..., D + R], which equals (y, 0) up to a combination of the columns of U over I."""
        rest = e - matvec(self.basis, matvec(self.basis.transpose(-1, -2), e))
        log_density: Tensor = -0.5 * (rest.square().sum(-1) + self.loc.shape[-1] * math.log(2 * math.pi)) - self.log_det
        return log_density


class FullCovariance(Family):
    r"""Gaussian with a full covariance, given by its Cholesky factor.

    .. math:: q(z \mid h) = \mathcal{N}(z; \mu(h), L L^\top), \qquad L = \operatorname{diag}(s)\,(I + U)

    with s > 0 and U strictly lower triangular: row d is in units of s_d. It is used for posteriors, and as an
    observation model p(x | z) with correlated features: ``VAE(decoder, FullCovariance(features, context), latent)``.

    References:
        Kingma and Welling (2019), An Introduction to Variational Autoencoders, section 2.5.1.
        https://arxiv.org/abs/1906.02691

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the D + D (D + 1) / 2 parameters.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> FullCovariance(3, context=8)(torch.zeros(5, 8)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    reaches: Literal["", "near", "diagonal", "full"] = "full"

    @checked
    def __init__(self, features: int, context: int | None) -> None:
        super().__init__(features, context, size=2 * features + features * (features - 1) // 2)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P]: locations, diagonal, then the strict lower triangle row by row."""
        D = self.features
        loc, raw, below = parameters.split([D, D, self.size - 2 * D], dim=-1)
        scale = positive(raw)  # [..., D]
        scale_tril = torch.diag_embed(scale) + scale.unsqueeze(-1) * lower_triangle(below, D)  # [..., D, D]
        return RememberingNormal(loc, scale_tril=scale_tril)

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] of the Gaussian with this mean [..., D] and Cholesky factor [..., D, D]."""
        rows, columns = torch.tril_indices(self.features, self.features, offset=-1, device=loc.device)
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)  # [..., D]
        below = (scale_tril / scale.unsqueeze(-1))[..., rows, columns]
        return torch.cat([loc, raw_of(scale), below], dim=-1)


class RememberingNormal(MultivariateNormal):
    """A Gaussian that stores the noise of its last sample, so that its log-density needs no triangular solve.

    For an ill-conditioned L the solve loses all digits in float32: log q is far too low and the ELBO exceeds log p(x),
    an error that training exploits.
    """

    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized sample, with its noise stored."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z: Tensor = self.loc + matvec(self._unbroadcasted_scale_tril, noise)
        self._drawn = (z, noise)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density: of the last sample from its noise, of any other value by a triangular solve."""
        if self._drawn is None or value is not self._drawn[0]:
            log_density: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
            return log_density
        noise, lower = self._drawn[1], self._unbroadcasted_scale_tril
        if torch.is_grad_enabled():  # add zero, with the derivative of L^{-1} (z - mu) in z, mu and L
            change = (value - value.detach()) - (self.loc - self.loc.detach())
            change = change - matvec(lower - lower.detach(), noise)
            noise = noise + torch.linalg.solve_triangular(lower.detach(), change.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_det


class Gaussian(Scaled):
    r"""The Gaussian observation model, with four kinds of scale.

    .. math:: p(x \mid h) = \prod_d \mathcal{N}(x_d; \mu_d(h), s_d^2)

    For a full covariance that depends on the context use :class:`FullCovariance`.

    References:
        Rybkin, Daniilidis and Levine (2021), Simple and Effective VAE Training with Calibrated Decoders.
        https://arxiv.org/abs/2006.13202

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        scale: a number: a fixed scale in the units of x; ``"shared"``: one learned scale; ``"diagonal"``: one learned
            scale per feature; ``"context"``: scales as a function of the context.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``scale`` is not one of these, or a number that is not positive.

    Example:
        >>> import torch
        >>> Gaussian(64, context=8, scale="shared")(torch.zeros(5, 8)).log_prob(torch.zeros(5, 64)).shape
        torch.Size([5])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, scale: Scale = "shared") -> None:
        super().__init__(features, context, scale)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., D], or [..., 2 D] with locations before scales, to a Gaussian of the family's scale."""
        loc, scale = self.split(parameters)
        return Independent(Normal(loc, scale), len(self.event_shape))
