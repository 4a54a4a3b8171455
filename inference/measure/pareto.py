r"""The tail of importance weights: a generalized Pareto distribution fitted to the largest of them, and its quantiles.

.. math:: F(x) = 1 - (1 + k x / \sigma)^{-1 / k}, \qquad x = w - w_\text{threshold} > 0
"""

from __future__ import annotations

__all__ = ["fit_tail", "pareto_k", "smoothed_tail", "tail_length"]

import math

import torch
from torch import Tensor


def pareto_k(log_w: Tensor) -> Tensor:
    r"""Pareto k-hat, the shape of the upper tail of importance weights.

    Below 0.7 (with K particles below 1000, below 1 - 1 / log10 K) the estimate of log p(x) and its error can usually be
    trusted; above, the variance of the weights is practically infinite and they cannot. A small k-hat proves nothing
    about regions that the guide never reached.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.
        Zhang and Stephens (2009), A New and Efficient Estimation Method for the Generalized Pareto Distribution.

    Args:
        log_w: log weights, [K, N].

    Returns:
        k-hat of each datum, [N]; NaN for K below 25; 0 where the tail is constant to the square root of the dtype's
        precision (such weights are as reliable as can be); infinite where fewer than five weights, a
        hundred times the next, are all there is.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> uniform = torch.rand(100_000, 1, dtype=torch.float64)
        >>> heavy = -0.9 * uniform.log()  # w = u^-0.9 is Pareto with shape 0.9
        >>> bool((pareto_k(heavy) - 0.9).abs() < 0.1)
        True
    """
    tail = tail_length(len(log_w))
    top = log_w.double().topk(min(tail + 1, len(log_w)), dim=0).values
    return fit_tail(top, tail, math.sqrt(torch.finfo(log_w.dtype).eps))[0]


def tail_length(particles: int) -> int:
    """How many of K weights are the tail: min(0.2 K, 3 sqrt K), rounded down; 0 (no fit) below 5."""
    tail = int(min(particles / 5, 3 * math.sqrt(particles)))
    return tail if tail >= 5 else 0


def fit_tail(top: Tensor, tail: int, resolution: float) -> tuple[Tensor, Tensor]:
    """k-hat and scale from the tail + 1 largest log weights, descending.

    Args:
        top: the largest log weights, [at least tail + 1, N].
        tail: how many of them are the tail.
        resolution: what a constant tail may spread, in nats.

    Returns:
        k-hat, [N], and the scale in units of the largest weight, [N]; NaN where there is no tail to speak of.
    """
    if not tail:
        return (nothing := top.new_full(top.shape[1:], math.nan)), nothing
    top = top[: tail + 1]
    constant = top[0] - top[-1] <= resolution  # NaN (all weights zero) compares as False, and stays NaN
    w = (top - top[0]).exp()  # [tail + 1, N]
    excess = (w[:-1] - w[-1]).flip(0)  # [tail, N], ascending
    k, scale = _fit(excess)
    odd = (excess[0] <= 0) & ~constant & top[0].isfinite()
    for n in odd.nonzero().flatten().tolist():
        above = excess[:, n][excess[:, n] > 0]  # weights far below the largest, or tied with the threshold, are no tail
        if len(above) >= 5:
            k[n] = _fit(above.unsqueeze(-1))[0][0]
        else:  # a few weights are all, or a few stand a little above many equal ones
            k[n] = math.inf if w[-1, n] < 0.01 else 0.0
    return torch.where(constant, 0.0, k), scale.masked_fill(odd | constant, math.nan)


def smoothed_tail(top: Tensor, tail: int, k: Tensor, scale: Tensor) -> Tensor:
    """The tail's log weights replaced by quantiles of the fit, capped at the largest: [tail, N], descending.

    Where the fit found no tail (its scale is NaN) they stay as they are.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling, section 3.
    """
    tail_w = top[:tail]
    p = (torch.arange(tail, dtype=top.dtype, device=top.device) + 0.5) / tail
    stretch = -torch.log1p(-p.flip(0)).unsqueeze(-1)  # [tail, 1]
    near_zero = k.abs() < 1e-12
    quantile = torch.where(near_zero, stretch, torch.expm1(k * stretch) / k.masked_fill(near_zero, 1.0)) * scale
    smooth = top[0] + ((top[tail] - top[0]).exp() + quantile).log().clamp_max(0.0)
    return torch.where(smooth.isfinite(), smooth, tail_w)


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale by Zhang and Stephens' empirical Bayes: ascending x [n, N] to [N] and [N]."""
    n = len(x)
    grid = 30 + int(math.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 - (grid / (torch.arange(1, grid + 1, dtype=x.dtype, device=x.device) - 0.5)).sqrt()  # [grid]
    b = b.unsqueeze(-1) / (3 * quartile) + 1 / x[-1]  # [grid, N]
    k = torch.stack([torch.log1p(-row * x).mean(0) for row in b])  # [grid, N]; one row at a time keeps memory flat
    profile = n * ((-b / k).log() - k - 1)
    weights = profile.softmax(0)
    weights = weights.masked_fill(weights < 10 * torch.finfo(x.dtype).eps, 0.0)
    b_mean = (b * weights).sum(0) / weights.sum(0)
    shape = torch.log1p(-b_mean * x).mean(0)
    return (n * shape + 10 * 0.5) / (n + 10), -shape / b_mean  # a weak prior at 0.5, which the scale does not see
