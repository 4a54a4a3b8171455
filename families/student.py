r"""Student's t: a Gaussian's shape with heavier tails.

.. math:: \log t(y; \nu, \mu, s) = \log \Gamma(\tfrac{\nu + 1}{2}) - \log \Gamma(\tfrac{\nu}{2})
          - \tfrac12 \log (\nu \pi) - \log s - \tfrac{\nu + 1}{2} \log (1 + ((y - \mu) / s)^2 / \nu)
"""

from __future__ import annotations

__all__ = ["StudentT"]

from typing import Literal

import torch
from pyro.distributions import Independent, TorchDistribution
from pyro.distributions import StudentT as Univariate
from torch import Tensor
from torch.types import _size

from .base import Family, positive


class StudentT(Family):
    r"""Independent Student's t: importance weights whose variance stays finite where a Gaussian's tails are too thin.

    .. math:: q(z \mid h) = \prod_d t(z_d; \nu, \mu_d(h), s_d(h))

    References:
        Geweke (1989), Bayesian Inference in Econometric Models Using Monte Carlo Integration.

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        df: nu, the degrees of freedom: a number above 0, or ``"context"``: above 1, one per feature, read from the
            context (2 where its parameter is 0).

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``df`` is neither a positive number nor ``"context"``.

    Example:
        >>> import torch
        >>> StudentT(2, context=8, df=5.0)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    def __init__(self, features: int, context: int | None, df: float | Literal["context"] = "context") -> None:
        if not (df == "context" or (isinstance(df, int | float) and df > 0)):
            raise ValueError(f'df is a positive number or "context", but got {df!r}')
        super().__init__(features, context, size=(3 if df == "context" else 2) * features)
        self.df = df

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., 2 D] or [..., 3 D], locations, scales, degrees of freedom, to independent Student's t."""
        loc, raw, *rest = parameters.split(self.features, dim=-1)  # [..., D]
        df = 1 + positive(rest[0]).square() if isinstance(self.df, str) else loc.new_full((), self.df)
        return Independent(_StudentT(df, loc, positive(raw)), 1)

    def extra_repr(self) -> str:
        """What the printed module shows beside its layers."""
        return f"{super().extra_repr()}, df={self.df!r}"


class _StudentT(Univariate):  # type: ignore[misc]
    """Draws without writing in place, so that the family can be mapped over data (``torch.func.vmap``)."""

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        half = (self.df / 2 + torch.zeros_like(self.loc)).expand(shape)
        gamma = torch._standard_gamma(half)
        noise = torch.randn(shape, dtype=half.dtype, device=half.device)
        z: Tensor = self.loc + self.scale * noise * torch.rsqrt(gamma / half)
        return z
