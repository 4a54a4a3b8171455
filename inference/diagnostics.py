r"""Can the number be trusted? Moments and tail of importance weights, per datum, in one pass.

| quantity | of the weights w_1 ... w_K of one datum |
| --- | --- |
| effective sample size | (sum w)^2 / sum w^2 |
| Monte Carlo error of log mean w (delta method) | sd(w) / (sqrt(K) mean(w)) |
| Pareto k-hat | shape of a generalized Pareto distribution fitted to the largest min(0.2 K, 3 sqrt K) weights |
"""

from __future__ import annotations

__all__ = ["RunningWeights", "pareto_k", "tail_length"]

import math

import torch
from torch import Tensor


class RunningWeights:
    """Streams log weights of N data, block after block of particles, in float64.

    Kept are sums, and the 3 sqrt(K) largest weights for the Pareto fit: so K is fixed beforehand.

    Args:
        particles: the number K of particles that will come.
    """

    def __init__(self, particles: int) -> None:
        self.particles = particles
        self.seen = 0
        self._tail = tail_length(particles) + 1  # the first value below the tail is its threshold

    def update(self, log_w: Tensor) -> None:
        """Take a block of log weights [k, N]."""
        resolution = math.sqrt(torch.finfo(log_w.dtype).eps)
        log_w = log_w.detach().double()
        wrong = (log_w.isnan() | log_w.isposinf()).any(0).nonzero().flatten()
        if len(wrong):
            raise FloatingPointError(
                f"the log weights of {len(wrong)} data of this batch are NaN or plus infinity, the first at row "
                f"{int(wrong[0])}: the model or the guide is not finite there"
            )
        if not self.seen:
            zeros = log_w.new_zeros(log_w.shape[1])
            self._max = torch.full_like(zeros, -math.inf)
            self._sum, self._square, self._mean, self._spread = zeros, zeros, zeros, zeros
            self._zero_weights = zeros > 0
            self._top = log_w.new_empty(0, log_w.shape[1])
            self._resolution = resolution
        block = log_w.amax(0)
        top = torch.maximum(self._max, block)
        shift = top.nan_to_num(neginf=0.0)  # all weights zero so far: any reference does
        old = (self._max - shift).exp()
        new = (log_w - shift).exp()  # [k, N]
        self._sum = self._sum * old + new.sum(0)
        self._square = self._square * old**2 + new.square().sum(0)
        self._max = top
        count = self.seen + len(log_w)  # Chan, Golub and LeVeque (1983): mean and squared deviations, merged
        self._zero_weights = self._zero_weights | (block_min := log_w.amin(0)).isneginf()
        finite = log_w.masked_fill(log_w.isneginf(), 0.0) if block_min.isneginf().any() else log_w
        mean = finite.mean(0)
        delta = mean - self._mean
        deviations = (finite - mean).square().sum(0)
        self._spread = self._spread + deviations + delta.square() * self.seen * len(log_w) / count
        self._mean = self._mean + delta * len(log_w) / count
        self._top = torch.cat([self._top, log_w])
        self._top = self._top.topk(min(self._tail, len(self._top)), dim=0).values  # [<= tail, N], descending
        self.seen = count

    @property
    def elbo(self) -> Tensor:
        """Mean log weight: [N]; minus infinity where any weight is zero."""
        return self._mean.masked_fill(self._zero_weights, -math.inf)

    @property
    def elbo_error(self) -> Tensor:
        """Monte Carlo standard error of the mean log weight: [N]; NaN for one particle, or where a weight is zero."""
        if self.seen < 2:
            return self._mean * math.nan
        return (self._spread / (self.seen - 1) / self.seen).sqrt().masked_fill(self._zero_weights, math.nan)

    @property
    def log_evidence(self) -> Tensor:
        """Log of the mean weight: [N]."""
        return self._max.nan_to_num(neginf=0.0) + self._sum.log() - math.log(self.seen)

    @property
    def standard_error(self) -> Tensor:
        """Monte Carlo standard error of the log of the mean weight, by the delta method: [N]; NaN for one particle."""
        if self.seen < 2:
            return self._mean * math.nan
        relative = (self.seen * self._square / self._sum.square() - 1).clamp_min(0)  # var(w) / mean(w)^2
        return (relative / (self.seen - 1)).sqrt()

    @property
    def ess(self) -> Tensor:
        """Effective sample size, between 1 and K: [N]."""
        return self._sum.square() / self._square

    @property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of the largest weights: [N]; NaN for fewer than 25 particles."""
        return _tail_shape(self._top, self._tail - 1, self._resolution)


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
    return _tail_shape(top, tail, math.sqrt(torch.finfo(log_w.dtype).eps))


def tail_length(particles: int) -> int:
    """How many of K weights are the tail: min(0.2 K, 3 sqrt K), rounded down; 0 (no fit) below 5."""
    tail = int(min(particles / 5, 3 * math.sqrt(particles)))
    return tail if tail >= 5 else 0


def _tail_shape(top: Tensor, tail: int, resolution: float) -> Tensor:
    """k-hat from the tail + 1 largest log weights [tail + 1, N], descending: [N]."""
    if not tail:
        return top.new_full(top.shape[1:], math.nan)
    constant = top[0] - top[-1] <= resolution  # NaN (all weights zero) compares as False, and stays NaN
    w = (top - top[0]).exp()  # [tail + 1, N]
    excess = (w[:-1] - w[-1]).flip(0)  # [tail, N], ascending
    k = _pareto_shape(excess)
    for n in ((excess[0] <= 0) & ~constant & top[0].isfinite()).nonzero().flatten().tolist():
        above = excess[:, n][excess[:, n] > 0]  # weights far below the largest, or tied with the threshold, are no tail
        if len(above) >= 5:
            k[n] = _pareto_shape(above.unsqueeze(-1))[0]
        else:  # a few weights are all, or a few stand a little above many equal ones
            k[n] = math.inf if w[-1, n] < 0.01 else 0.0
    return torch.where(constant, torch.zeros_like(k), k)


def _pareto_shape(x: Tensor) -> Tensor:
    """Shape of a generalized Pareto distribution by Zhang and Stephens' empirical Bayes: ascending x [n, N] to [N]."""
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
    return (n * shape + 10 * 0.5) / (n + 10)  # a weak prior at 0.5
