r"""Exact posterior and evidence of linear-Gaussian models, in units of the noise.

.. math::
    z \sim \mathcal{N}(0, I), \quad y = V z + \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)
    \quad\Rightarrow\quad z \mid y \sim \mathcal{N}(M^{-1} V^\top y, M^{-1}), \qquad M = V^\top V + I
"""

from __future__ import annotations

__all__ = ["Conditioned", "condition"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jensen.families.base import inverse_root, matvec


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


def condition(y: Tensor, weight: Tensor) -> Conditioned:
    """Condition z ~ N(0, I) on y = V z + noise with noise N(0, I).

    Args:
        y: [..., X].
        weight: V, [..., X, D].
    """
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    root = inverse_root(weight.mT @ weight + eye)
    mean = matvec(root, matvec(root.mT, matvec(weight.mT, y)))  # [..., D]
    distance = (y - matvec(weight, mean)).square().sum(-1) + mean.square().sum(-1)
    log_det = -2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # of M
    return Conditioned(mean, root, -0.5 * (distance + log_det + y.shape[-1] * math.log(2 * math.pi)))
