r"""Diagnosis of estimates: moments and tail of importance weights, per data point, in one pass; and their bias.

| quantity | of the weights w_1 ... w_K of one data point |
| --- | --- |
| effective sample size | (sum w)^2 / sum w^2 |
| Monte Carlo error of log mean w (delta method) | sd(w) / (sqrt(K) mean(w)) |
| Pareto k-hat | shape of a generalized Pareto distribution fitted to the largest min(0.2 K, 3 sqrt K) weights |
| delta | log mean w + var(w) / (2 K mean(w)^2): corrected for its bias of order 1 / K |
| jackknife (JVI-1) | K L_K - (K - 1) times the mean of L_{K-1}, the log mean weight with one weight removed |
| smoothed (PSIS) | log mean w, with tail quantiles of the fitted Pareto distribution: trades bias for variance |

The generalized Pareto distribution of the excess x over the threshold of the tail is

.. math:: F(x) = 1 - (1 + k x / \sigma)^{-1 / k}, \qquad x = w - w_\text{threshold} > 0
"""

from __future__ import annotations

__all__ = [
    "CORRECTIONS",
    "RunningWeights",
    "corrections_of",
    "fit_tail",
    "pareto_k",
    "smoothed_tail",
    "tail_guard",
    "tail_length",
]

import math
from typing import Any

import torch
from torch import Tensor

from jensen.checked import checked


@checked
def pareto_k(log_w: Tensor) -> Tensor:
    r"""Pareto k-hat, the shape of the upper tail of importance weights.

    Below 0.7 (with fewer than 2,154 particles, below 1 - 1 / log10 K) the estimate of log p(x) and its error are
    usually reliable; above, the variance of the weights is practically infinite and they are not. A small k-hat proves
    nothing about regions that the guide never samples.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.
        https://arxiv.org/abs/1507.02646
        Zhang and Stephens (2009), A New and Efficient Estimation Method for the Generalized Pareto Distribution.

    Args:
        log_w: log weights, [K, N].

    Returns:
        k-hat of each data point, [N]; NaN for K below 25; 0 if the tail is constant up to the square root of the
        dtype's precision (the most reliable weights); infinite if fewer than five weights, each at least a
        hundred times the next one, dominate.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> uniform = torch.rand(100_000, 1, dtype=torch.float64)
        >>> heavy = -0.9 * uniform.log()  # w = u^-0.9 is Pareto with shape 0.9
        >>> bool((pareto_k(heavy) - 0.9).abs() < 0.1)
        True
    """
    if log_w.dim() != 2 or not log_w.is_floating_point():
        raise ValueError(
            f"log_w must be log weights [K, N] of floating-point numbers, but got {log_w.dtype} of shape "
            f"{list(log_w.shape)}"
        )
    tail = tail_length(len(log_w))
    top = log_w.double().topk(min(tail + 1, len(log_w)), dim=0).values
    return fit_tail(top, tail, math.sqrt(torch.finfo(log_w.dtype).eps))[0]


def tail_length(particles: int) -> int:
    """The number of the K weights in the tail: min(0.2 K, 3 sqrt K), rounded down; 0 (no fit) below 5."""
    tail = int(min(particles / 5, 3 * math.sqrt(particles)))
    return tail if tail >= 5 else 0


def tail_guard(pareto_k: Tensor) -> Tensor:
    """The factor for the jackknife's error: 1 up to a k-hat of 0.5, 2 at 0.7, 6 from 1.5 on."""
    return 1 + 5 * (pareto_k.clamp(0.5, 1.5) - 0.5)


def fit_tail(top: Tensor, tail: int, resolution: float) -> tuple[Tensor, Tensor]:
    """k-hat and scale from the tail + 1 largest log weights, descending.

    Args:
        top: the largest log weights, [at least tail + 1, N].
        tail: how many of them form the tail.
        resolution: the maximal range of a constant tail, in nats.

    Returns:
        k-hat, [N], and the scale in units of the largest weight, [N]; NaN where there is no tail.
    """
    if not tail:
        return (nan := top.new_full(top.shape[1:], math.nan)), nan
    top = top[: tail + 1]
    constant = top[0] - top[-1] <= resolution  # NaN (all weights zero) compares as False, and stays NaN
    w = (top - top[0]).exp()  # [tail + 1, N]
    excess = (w[:-1] - w[-1]).flip(0)  # [tail, N], ascending
    k, scale = _fit(excess)
    odd = (excess[0] <= 0) & ~constant & top[0].isfinite()
    for n in odd.nonzero().flatten().tolist():
        above = excess[:, n][excess[:, n] > 0]  # weights far below the largest, or equal to the threshold, are no tail
        if len(above) >= 5:
            k[n] = _fit(above.unsqueeze(-1))[0][0]
        else:  # a few weights dominate, or a few are slightly above many equal ones
            k[n] = math.inf if w[-1, n] < 0.01 else 0.0
    return torch.where(constant, 0.0, k), scale.masked_fill(odd | constant, math.nan)


def smoothed_tail(top: Tensor, tail: int, k: Tensor, scale: Tensor) -> Tensor:
    """The tail's log weights replaced by quantiles of the fit, capped at the largest: [tail, N], descending.

    Where the fit found no tail (its scale is NaN) they are unchanged.

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
    return (n * shape + 10 * 0.5) / (n + 10), -shape / b_mean  # a weak prior at 0.5, which does not affect the scale


CORRECTIONS = ("delta", "jackknife", "smoothed")


def corrections_of(results: dict[str, Tensor]) -> dict[str, Any]:
    """The corrections and their errors, removed from results, under their names in Evidence."""
    return {
        "corrected": {name: results.pop(name) for name in CORRECTIONS},
        "corrected_error": {name: results.pop(f"{name}_error") for name in CORRECTIONS},
    }


_RETAINED = 32  # the minimal number of largest weights kept, so that each of the others is below 1/33 of the sum
_POWERS = 6  # sums of w^m up to this m: the remainder of a series in w / sum(w) is below 1e-9 nats
_LOG = [1 / m for m in range(1, _POWERS + 1)]  # -log(1 - r) = r + r^2 / 2 + ...
_LOG_SQUARED = [0.0, *(2 / m * sum(1 / j for j in range(1, m)) for m in range(2, _POWERS + 1))]  # log(1 - r)^2


class RunningWeights:
    """Streams log weights of N data points, in blocks of particles, in float64.

    It keeps sums of powers, and the 3 sqrt(K) largest weights for the Pareto fit: so the largest K is fixed beforehand.

    Args:
        particles: the maximal number K of particles.
        rows: the row of each data point in the user's data, for error messages; counted from 0 if None.
    """

    def __init__(self, particles: int, rows: Tensor | None = None) -> None:
        self.particles = particles
        self.seen = 0
        self.rows = rows
        self._fitted: tuple[Tensor, Tensor] | None = None
        self._retained = max(tail_length(particles) + 1, _RETAINED)  # the first one below the tail is its threshold

    def update(self, log_w: Tensor, elbo: Tensor | None = None) -> None:
        """Add a block of log weights [k, N], and the values that average to the ELBO if they differ.

        Raises:
            FloatingPointError: if one is NaN or plus infinity.
        """
        resolution = math.sqrt(torch.finfo(log_w.dtype).eps)
        log_w = log_w.detach().double()
        self._check(log_w)
        if not self.seen:
            zeros = log_w.new_zeros(log_w.shape[1])
            self._max = torch.full_like(zeros, -math.inf)
            self._mean, self._spread = zeros, zeros
            self._power = log_w.new_zeros(_POWERS, log_w.shape[1])  # sums of (w / max)^m, m = 1 ...
            self.zero_weights = self._infinite = zeros.long()
            self._top = log_w.new_empty(0, log_w.shape[1])
            self._rest = log_w.new_full((2, log_w.shape[1]), -math.inf)  # log of the sums of w and w^2 not in the top
            self._resolution = resolution
        top = torch.maximum(self._max, log_w.amax(0))
        shift = top.nan_to_num(neginf=0.0)  # all weights are zero so far: any reference works
        old = (self._max - shift).exp()
        new = (log_w - shift).exp()  # [k, N]
        sums, power = [], new
        for _ in range(_POWERS):
            sums.append(power.sum(0))
            power = power * new
        exponents = torch.arange(1.0, _POWERS + 1, dtype=old.dtype, device=old.device).unsqueeze(-1)  # [powers, 1]
        self._power = self._power * old**exponents + torch.stack(sums)
        self._max = top
        count = self.seen + len(log_w)  # Chan, Golub and LeVeque (1983): mean and squared deviations, merged
        zero = log_w.isneginf()
        self.zero_weights = self.zero_weights + zero.sum(0)
        terms = log_w if elbo is None else elbo.detach().double()
        zero = terms.isneginf()
        self._infinite = self._infinite + zero.sum(0)
        finite = terms.masked_fill(zero, 0.0) if zero.any() else terms
        mean = finite.mean(0)
        delta = mean - self._mean
        deviations = (finite - mean).square().sum(0)
        self._spread = self._spread + deviations + delta.square() * self.seen * len(log_w) / count
        self._mean = self._mean + delta * len(log_w) / count
        weights = torch.cat([(self._top - shift).exp(), new])  # [<= retained + k, N]
        self._top = torch.cat([self._top, log_w])
        self._top, kept = self._top.topk(min(self._retained, len(self._top)), dim=0)  # [<= retained, N], descending
        weights.scatter_(0, kept, 0.0)
        left = torch.stack([weights.sum(0).log() + shift, weights.square().sum(0).log() + 2 * shift])
        self._rest = torch.logaddexp(self._rest, left)
        self.seen = count
        self._fitted = None

    def select(self, keep: Tensor) -> None:
        """Continue with some of the data points only.

        Args:
            keep: their positions, [N'].
        """
        self._fitted = None
        for name in ("rows", "_max", "_mean", "_spread", "zero_weights", "_infinite", "_power", "_top", "_rest"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[..., keep.to(values.device)])

    def results(self) -> dict[str, Tensor]:
        """All quantities of :class:`~jensen.inference.Evidence` from the weights, by name: [N] each."""
        by_name: dict[str, Tensor] = {name: getattr(self, name) for name in _RESULTS}
        for name in CORRECTIONS:
            by_name[name], by_name[f"{name}_error"] = getattr(self, name)
        return by_name

    @property
    def elbo(self) -> Tensor:
        """Mean log weight: [N]; minus infinity if any weight is zero."""
        return self._mean.masked_fill(self._infinite > 0, -math.inf)

    @property
    def elbo_error(self) -> Tensor:
        """Monte Carlo standard error of the mean log weight: [N]; NaN for one particle, or if a weight is zero."""
        if self.seen < 2:
            return self._mean * math.nan
        return (self._spread / (self.seen - 1) / self.seen).sqrt().masked_fill(self._infinite > 0, math.nan)

    @property
    def log_evidence(self) -> Tensor:
        """Log of the mean weight: [N]."""
        return self._log_mean(self._power[0])

    @property
    def standard_error(self) -> Tensor:
        """Monte Carlo standard error of the log of the mean weight, by the delta method: [N]; NaN for one particle."""
        return self._delta_method(self._power[0], self._power[1])

    @property
    def ess(self) -> Tensor:
        """Effective sample size, between 1 and K: [N]."""
        return self._power[0].square() / self._power[1]

    @property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of the largest weights: [N]; NaN for fewer than 25 particles."""
        return self._tail()[0]

    @property
    def delta(self) -> tuple[Tensor, Tensor]:
        """Log of the mean weight, bias-corrected by the delta method, and its error: [N] and [N]."""
        if self.seen < 2:
            return self._unknown()
        moments = self._power / self._power[0] ** torch.arange(1.0, _POWERS + 1).to(self._power).unsqueeze(-1)
        m2, m3, m4 = (moments[m - 1] * float(self.seen) ** (m - 1) for m in (2, 3, 4))  # mean of (w / mean w)^m
        value = self.log_evidence + (m2 - 1) / (2 * (self.seen - 1))
        a, b = 1 - m2 / self.seen, 1 / (2 * self.seen)  # the influence of u = w / mean w: a (u - 1) + b (u^2 - m2)
        influence = a**2 * (m2 - 1) + 2 * a * b * (m3 - m2) + b**2 * (m4 - m2**2)
        return value, (influence.clamp_min(0) / (self.seen - 1)).sqrt()

    @property
    def jackknife(self) -> tuple[Tensor, Tensor]:
        r"""The jackknifed log of the mean weight (JVI-1), and the jackknife's error: [N] and [N].

        With r = w / sum w it is L_K + (K - 1) log(1 - 1/K) - (K - 1)/K sum log(1 - r). The largest weights enter
        exactly, the others, all below 1/33, by their power sums. NaN if a single weight is the whole sum: without it
        there is no sum to take the logarithm of.
        """
        k = self.seen
        if k < 2:
            return self._unknown()
        total = self._power[0]
        top = (self._top - self._max.nan_to_num(neginf=0.0)).exp() / total  # [retained, N], ratios r
        below = (1 - top.sum(0)).clamp_min(0.0).minimum((k - len(top)) * top[-1])  # the sum of the others
        exact = torch.log1p(-top)
        others = torch.logaddexp(self._top[1:].logsumexp(0) - self._max, (below * total).log()) - total.log()
        exact[0] = torch.where(top[0] > 0.5, others, exact[0])  # near the whole sum, 1 - r loses all digits
        powers = self._power / total ** torch.arange(1.0, _POWERS + 1).to(total).unsqueeze(-1)
        rest = [powers[m] - (top ** (m + 1)).sum(0) for m in range(_POWERS)]  # power sums of the others
        logs = exact.sum(0) - sum(c * r for c, r in zip(_LOG, rest, strict=True))
        squares = exact.square().sum(0) + sum(c * r for c, r in zip(_LOG_SQUARED, rest, strict=True))
        logs = logs.masked_fill(logs.isneginf(), math.nan)
        value = self.log_evidence + (k - 1) * math.log1p(-1 / k) - (k - 1) / k * logs
        return value, ((k - 1) / k * (squares - logs.square() / k).clamp_min(0)).sqrt()

    @property
    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Log of the mean Pareto-smoothed weight, and its error by the delta method; NaN for fewer than 25 particles.

        Weights without a tail (constant, few values, one dominating weight) are not smoothed.
        """
        tail = tail_length(self.seen)
        if not tail:
            return self._unknown()
        tail_w = smoothed_tail(self._top, tail, *self._tail())  # [tail, N]
        powers = torch.tensor([1.0, 2.0]).to(tail_w)[:, None, None]
        below = torch.logaddexp(
            self._rest, (powers * self._top[tail:]).logsumexp(1)
        )  # not a difference, which would lose digits
        total, square = torch.logaddexp(below, (powers * tail_w).logsumexp(1))  # [N] each
        relative = (self.seen * (square - 2 * total).exp() - 1).clamp_min(0)  # var(w) / mean(w)^2
        return total - math.log(self.seen), (relative / (self.seen - 1)).sqrt()

    def _tail(self) -> tuple[Tensor, Tensor]:
        """The Pareto fit to the largest weights so far: k-hat and scale, [N] and [N]."""
        if self._fitted is None:
            self._fitted = fit_tail(self._top, tail_length(self.seen), self._resolution)
        return self._fitted

    def _log_mean(self, total: Tensor) -> Tensor:
        return self._max.nan_to_num(neginf=0.0) + total.log() - math.log(self.seen)

    def _delta_method(self, total: Tensor, square: Tensor) -> Tensor:
        if self.seen < 2:
            return total * math.nan
        relative = (self.seen * square / total.square() - 1).clamp_min(0)  # var(w) / mean(w)^2
        return (relative / (self.seen - 1)).sqrt()

    def _unknown(self) -> tuple[Tensor, Tensor]:
        return self._mean * math.nan, self._mean * math.nan

    def _check(self, log_w: Tensor) -> None:
        nan, infinite = log_w.isnan(), log_w.isposinf()
        wrong = (nan | infinite).any(0).nonzero().flatten()
        if len(wrong):
            rows = wrong if self.rows is None else self.rows.to(wrong.device)[wrong]
            raise FloatingPointError(
                f"the log weights of {len(wrong)} data points of this batch are NaN or plus infinity ({int(nan.sum())} "
                f"NaN, {int(infinite.sum())} infinite, of {len(log_w)} particles each), the first at row "
                f"{int(rows[0])}: the model or the guide is not finite there"
            )


_RESULTS = ("elbo", "elbo_error", "log_evidence", "standard_error", "ess", "pareto_k", "zero_weights")
