r"""KL divergences of Gaussians in closed form, registered for ``torch.distributions.kl_divergence``.

.. math::
    \text{KL}(\mathcal{N}(\mu, \Sigma) \,\|\, \mathcal{N}(m, \text{diag}(s^2))) = \frac{1}{2} \Big(
    \sum_d \frac{\Sigma_{dd} + (\mu_d - m_d)^2}{s_d^2} - D + \sum_d \log s_d^2 - \log |\Sigma| \Big)

PyTorch has the KL between two full-covariance Gaussians and between two factorized ones. This module adds the KL from a
full and from a low-rank covariance to a factorized Gaussian, such as a standard normal prior.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, appendix A.5.
"""

from __future__ import annotations

__all__: list[str] = []

from typing import Any

from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl

from .gaussian import LowRankGaussian


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_full_factorized(q: MultivariateNormal, p: Any) -> Tensor:
    lower = q._unbroadcasted_scale_tril
    log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _kl(q.loc, lower.square().sum(-1), log_det, p)


@register_kl(LowRankGaussian, Independent)  # type: ignore[untyped-decorator]
def _kl_low_rank_factorized(q: LowRankGaussian, p: Any) -> Tensor:
    return _kl(q.loc, q.scale.square() * (1 + q.factor.square().sum(-1)), 2 * q.log_det, p)


def _kl(loc: Tensor, variance: Tensor, log_det: Tensor, p: Any) -> Tensor:
    """From mean and variances [..., D] and log |Sigma| [...] to the KL [...]."""
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError(f"the KL of a Gaussian to {type(base).__name__} has no closed form here")
    scaled = (variance + (loc - base.loc).square()) / base.scale.square()
    kl: Tensor = 0.5 * ((scaled - 1 + 2 * base.scale.log()).sum(-1) - log_det)
    return kl
