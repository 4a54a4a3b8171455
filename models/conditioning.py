r"""Exact posterior and evidence of linear-Gaussian models, in units of the noise.

.. math::
    z \sim \mathcal{N}(0, I), \quad y = V z + \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)
    \quad\Rightarrow\quad z \mid y \sim \mathcal{N}(M^{-1} V^\top y, M^{-1}), \qquad M = V^\top V + I

Where features are missing, only the rows of V that were observed count. With o_n the mask of data point n (1:
observed) and v_i the rows of V:

.. math:: M_n = I + V^\top \operatorname{diag}(o_n) V = I + \sum_i o_{ni} \, v_i v_i^\top

so that one product of the masks [N, X] and the outer products [X, D D] gives all M_n, whatever the patterns are.
"""

from __future__ import annotations

__all__ = [
    "Conditioned",
    "beside",
    "by_blocks",
    "condition",
    "condition_observed",
    "condition_values",
    "fill",
    "in_blocks",
    "predict",
    "split_observed",
]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jensen.families.base import inverse_root, matvec

_BLOCK = 2**18  # numbers of one temporary array: small enough for the cache of a processor


class Conditioned(NamedTuple):
    """The posterior of z, and the evidence, for y = V z + noise with a standard normal prior and noise.

    Attributes:
        mean: of the posterior, [..., D].
        root: A with A A^T its covariance, [..., D, D].
        log_density: log p(y), [...].
    """

    mean: Tensor
    root: Tensor
    log_density: Tensor


def condition(y: Tensor, weight: Tensor, observed: Tensor | None = None) -> Conditioned:
    """Condition z ~ N(0, I) on y = V z + noise with noise N(0, I).

    Args:
        y: [..., X]; with ``observed``, [N, ..., X], and 0 where it is missing.
        weight: V, [..., X, D].
        observed: 1 where y is observed, 0 where it is missing, [N, X]; None: all of it is observed.
    """
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    if observed is None:
        root = inverse_root(weight.mT @ weight + eye)
    else:
        outer = weight.unsqueeze(-1) * weight.unsqueeze(-2)  # [..., X, D, D]
        root = inverse_root(torch.tensordot(observed, outer, dims=([-1], [-3])) + eye)
    mean = matvec(root, matvec(root.mT, matvec(weight.mT, y)))  # [..., D]
    residual, count = y - matvec(weight, mean), y.shape[-1]  # type: Tensor, int | Tensor
    if observed is not None:
        known = beside(observed, y.dim())
        residual, count = residual * known, known.sum(-1)
    distance = residual.square().sum(-1) + mean.square().sum(-1)
    log_det = -2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # of M
    return Conditioned(mean, root, -0.5 * (distance + log_det + count * math.log(2 * math.pi)))


def condition_observed(x: Tensor, mean: Tensor, weight: Tensor, log_noise: Tensor) -> Conditioned:
    """Condition z ~ N(0, I) on the observed values of x = mu + W z + noise of scale s.

    Args:
        x: [N, X], NaN where it is missing.
        mean: mu, [..., X].
        weight: W, [..., X, D].
        log_noise: log s, [..., X].

    Returns:
        The posterior, and the log-density of the observed values in the units of x: of batch shape [N, ...].
    """

    def block(x: Tensor) -> Conditioned:
        return condition_values(*split_observed(x.to(weight.dtype)), mean, weight, log_noise)

    return Conditioned(*by_blocks(block, x, mean[..., 0].numel() * weight.shape[-1] ** 2))


def condition_values(values: Tensor, observed: Tensor, mean: Tensor, weight: Tensor, log_noise: Tensor) -> Conditioned:
    """The same as :func:`condition_observed`, of the two parts of x."""
    dims, noise = mean.dim() + 1, log_noise.exp()
    y = (beside(values, dims) - mean) * beside(observed, dims) / noise  # [N, ..., X]
    given = condition(y, weight / noise.unsqueeze(-1), observed)
    return given._replace(log_density=given.log_density - torch.tensordot(observed, log_noise, ([-1], [-1])))


def split_observed(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with 0 where it is NaN, and a mask of its type: 1 where it is observed, 0 where it is NaN."""
    return x.nan_to_num(0.0, math.inf, -math.inf), (~x.isnan()).to(x.dtype)


def predict(given: Conditioned, mean: Tensor, weight: Tensor, log_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x = mu + W z + noise of scale s given the posterior of z, feature by feature: [..., X]."""
    variance = (weight @ given.root).square().sum(-1) + (2 * log_noise).exp()
    return mean + matvec(weight, given.mean), variance


def fill(x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with ``mean`` where it is missing, and ``variance`` there, 0 elsewhere."""
    missing = x.isnan()
    return torch.where(missing, mean, x), torch.where(missing, variance, 0.0)


def by_blocks(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, width: int) -> tuple[Tensor, ...]:
    """``function`` of the rows of ``x``, in blocks: it makes temporary tensors of ``width`` numbers for each row."""
    parts = [function(rows) for rows in in_blocks(x, width)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def in_blocks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """``x`` in blocks of rows, small enough for tensors of ``width`` numbers for each row."""
    blocks: tuple[Tensor, ...] = x.split(max(1, _BLOCK // max(width, x[0].numel())))
    return blocks


def beside(x: Tensor, dims: int) -> Tensor:
    """[N, X] to [N, 1, ..., 1, X] of ``dims`` dimensions."""
    return x.reshape(len(x), *[1] * (dims - 2), x.shape[-1])
