r"""Student's t as a family: like a Gaussian with heavier tails.

.. math:: \log t(y; \nu, \mu, s) = \log \Gamma(\tfrac{\nu + 1}{2}) - \log \Gamma(\tfrac{\nu}{2})
          - \tfrac12 \log (\nu \pi) - \log s - \tfrac{\nu + 1}{2} \log (1 + ((y - \mu) / s)^2 / \nu)
"""

from __future__ import annotations

__all__ = ["StudentT"]

import math
from typing import Literal

import torch
from pyro.distributions import Independent, TorchDistribution
from pyro.distributions import StudentT as Univariate
from torch import Tensor
from torch.types import _size

from jensen.checked import checked

from .base import positive, raw_of
from .gaussian import conditional_scale
from .scaled import Scale, Scaled


class StudentT(Scaled):
    r"""Independent Student's t, whose importance weights have finite variance where a Gaussian's tails are too thin.

    .. math:: q(z \mid h) = \prod_d t(z_d; \nu, \mu_d(h), s_d(h))

    As an observation model it is robust: an outlier far from the location has no more influence than a near point.

    References:
        Geweke (1989), Bayesian Inference in Econometric Models Using Monte Carlo Integration.
        https://www.jstor.org/stable/1913710
        Lange, Little and Taylor (1989), Robust Statistical Modeling Using the t Distribution.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        df: nu, the degrees of freedom: a number above 0, or ``"context"``: one per feature, above 1, as a function of
            the context (2 if its parameter is 0).
        scale: s: a number, ``"shared"``, ``"diagonal"`` or ``"context"``, as for :class:`~jensen.families.Gaussian`.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``df`` is neither a positive number nor ``"context"``, or ``scale`` not one of the above.

    Example:
        >>> import torch
        >>> StudentT(2, context=8, df=5.0)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(
        self,
        features: int | tuple[int, ...],
        context: int | None,
        df: float | Literal["context"] = "context",
        scale: Scale = "context",
    ) -> None:
        if not (df == "context" or (isinstance(df, int | float) and df > 0)):
            raise ValueError(f'df must be a positive number or "context", but got {df!r}')
        super().__init__(features, context, scale, more=int(df == "context"))
        self.df = df
        self.reaches = "near" if scale == "context" and len(self.event_shape) == 1 else ""

    def parameters_of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters [..., P] near this mean and Cholesky factor: the best diagonal Gaussian's, with df = 30."""
        many = torch.full_like(loc, 29.0).sqrt()  # df - 1 is a square
        rest = [raw_of(many)] if isinstance(self.df, str) else []
        return torch.cat([loc, raw_of(conditional_scale(scale_tril)), *rest], dim=-1)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P], locations, scales, degrees of freedom, to independent Student's t."""
        loc, scale, *rest = self.split(parameters)  # [..., *event]
        df = 1 + positive(rest[0]).square() if isinstance(self.df, str) else loc.new_full((), self.df)
        return Independent(_StudentT(df, loc, scale), len(self.event_shape))

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, df={self.df!r}"


class _StudentT(Univariate):  # type: ignore[misc]
    """Samples without in-place writes, so that the family can be mapped over data points (``torch.func.vmap``).

    The difference of the two log Gammas is computed in float64: at a million degrees of freedom, float32 loses all its
    digits.
    """

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        half = (self.df / 2 + torch.zeros_like(self.loc)).expand(shape)
        gamma = torch._standard_gamma(half)
        noise = torch.randn(shape, dtype=half.dtype, device=half.device)
        z: Tensor = self.loc + self.scale * noise * torch.rsqrt(gamma / half)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df = self.df.double()
        normalizer = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2
        y = (value - self.loc) / self.scale
        tail = (self.df + 1) / 2 * (y / self.df.sqrt()).square().log1p()
        log_density: Tensor = normalizer.to(y.dtype) - self.scale.log() - tail
        return log_density
