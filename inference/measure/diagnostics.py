r"""Can the number be trusted? Moments and tail of importance weights, per datum, in one pass; and what their bias is.

| quantity | of the weights w_1 ... w_K of one datum |
| --- | --- |
| effective sample size | (sum w)^2 / sum w^2 |
| Monte Carlo error of log mean w (delta method) | sd(w) / (sqrt(K) mean(w)) |
| Pareto k-hat | shape of a generalized Pareto distribution fitted to the largest min(0.2 K, 3 sqrt K) weights |
| delta | log mean w + var(w) / (2 K mean(w)^2): its bias of order 1 / K added back |
| jackknife (JVI-1) | K L_K - (K - 1) times the mean of L_{K-1}, the log mean weight with one left out |
| smoothed (PSIS) | log mean w with the tail replaced by quantiles of the fitted Pareto distribution |
"""

from __future__ import annotations

__all__ = ["CORRECTIONS", "RunningWeights", "pareto_k", "tail_length"]

import math

import torch
from torch import Tensor

from .pareto import fit_tail, pareto_k, smoothed_tail, tail_length

CORRECTIONS = ("delta", "jackknife", "smoothed")
_RETAINED = 32  # the fewest largest weights that are kept, so that each of the others is below 1/33 of the sum
_POWERS = 6  # sums of w^m up to here: what a series in w / sum(w) leaves out is below 1e-9 nats
_LOG = [1 / m for m in range(1, _POWERS + 1)]  # -log(1 - r) = r + r^2 / 2 + ...
_LOG_SQUARED = [0.0, *(2 / m * sum(1 / j for j in range(1, m)) for m in range(2, _POWERS + 1))]  # log(1 - r)^2


class RunningWeights:
    """Streams log weights of N data, block after block of particles, in float64.

    Kept are sums of powers, and the 3 sqrt(K) largest weights for the Pareto fit: so the largest K is fixed beforehand.

    Args:
        particles: the number K of particles that will come, at most.
        rows: the number of each datum in the user's data, for error messages; counted from 0 if None.
    """

    def __init__(self, particles: int, rows: Tensor | None = None) -> None:
        self.particles = particles
        self.seen = 0
        self.rows = rows
        self._fitted: tuple[Tensor, Tensor] | None = None
        self._retained = max(tail_length(particles) + 1, _RETAINED)  # the first below the tail is its threshold

    def update(self, log_w: Tensor) -> None:
        """Take a block of log weights [k, N].

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
            self.zero_weights = zeros.long()
            self._top = log_w.new_empty(0, log_w.shape[1])
            self._resolution = resolution
        top = torch.maximum(self._max, log_w.amax(0))
        shift = top.nan_to_num(neginf=0.0)  # all weights zero so far: any reference does
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
        finite = log_w.masked_fill(zero, 0.0) if zero.any() else log_w
        mean = finite.mean(0)
        delta = mean - self._mean
        deviations = (finite - mean).square().sum(0)
        self._spread = self._spread + deviations + delta.square() * self.seen * len(log_w) / count
        self._mean = self._mean + delta * len(log_w) / count
        self._top = torch.cat([self._top, log_w])
        self._top = self._top.topk(min(self._retained, len(self._top)), dim=0).values  # [<= retained, N], descending
        self.seen = count
        self._fitted = None

    def select(self, keep: Tensor) -> None:
        """Go on with some of the data only.

        Args:
            keep: their positions, [N'].
        """
        self._fitted = None
        for name in ("rows", "_max", "_mean", "_spread", "zero_weights", "_power", "_top"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[..., keep.to(values.device)])

    def results(self) -> dict[str, Tensor]:
        """Everything :class:`~jensen.inference.Evidence` holds of the weights, by name: [N] each."""
        found: dict[str, Tensor] = {name: getattr(self, name) for name in _RESULTS}
        for name in CORRECTIONS:
            found[name], found[f"{name}_error"] = getattr(self, name)
        return found

    @property
    def elbo(self) -> Tensor:
        """Mean log weight: [N]; minus infinity where any weight is zero."""
        return self._mean.masked_fill(self.zero_weights > 0, -math.inf)

    @property
    def elbo_error(self) -> Tensor:
        """Monte Carlo standard error of the mean log weight: [N]; NaN for one particle, or where a weight is zero."""
        if self.seen < 2:
            return self._mean * math.nan
        return (self._spread / (self.seen - 1) / self.seen).sqrt().masked_fill(self.zero_weights > 0, math.nan)

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
        """Log of the mean weight, its bias added back by the delta method, and its error: [N] and [N]."""
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
        exactly, the others, all below 1/33, by their power sums.
        """
        k = self.seen
        if k < 2:
            return self._unknown()
        total = self._power[0]
        top = (self._top - self._max.nan_to_num(neginf=0.0)).exp() / total  # [retained, N], ratios r
        below = (1 - top.sum(0)).clamp_min(0.0).minimum((k - len(top)) * top[-1])  # what the others add up to
        exact = torch.log1p(-top)
        others = torch.logaddexp(self._top[1:].logsumexp(0) - self._max, (below * total).log()) - total.log()
        exact[0] = torch.where(top[0] > 0.5, others, exact[0])  # a weight near the whole sum: 1 - r has no digits
        powers = self._power / total ** torch.arange(1.0, _POWERS + 1).to(total).unsqueeze(-1)
        rest = [powers[m] - (top ** (m + 1)).sum(0) for m in range(_POWERS)]  # power sums of the others
        logs = exact.sum(0) - sum(c * r for c, r in zip(_LOG, rest, strict=True))
        squares = exact.square().sum(0) + sum(c * r for c, r in zip(_LOG_SQUARED, rest, strict=True))
        value = self.log_evidence + (k - 1) * math.log1p(-1 / k) - (k - 1) / k * logs
        return value, ((k - 1) / k * (squares - logs.square() / k).clamp_min(0)).sqrt()

    @property
    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Log of the mean Pareto-smoothed weight, and its error by the delta method; NaN for fewer than 25 particles.

        Weights without a tail to speak of (constant, few values, one that is all) are not smoothed.
        """
        tail = tail_length(self.seen)
        if not tail:
            return self._unknown()
        k, scale = self._tail()
        shift = self._max.nan_to_num(neginf=0.0)
        raw = (self._top[:tail] - shift).exp()
        smooth = (smoothed_tail(self._top, tail, k, scale) - shift).exp()
        total = self._power[0] + (smooth - raw).sum(0)
        square = self._power[1] + (smooth.square() - raw.square()).sum(0)
        return self._log_mean(total), self._delta_method(total, square)

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
                f"the log weights of {len(wrong)} data of this batch are NaN or plus infinity ({int(nan.sum())} NaN, "
                f"{int(infinite.sum())} infinite, of {len(log_w)} particles each), the first at row {int(rows[0])}: "
                "the model or the guide is not finite there"
            )


_RESULTS = ("elbo", "elbo_error", "log_evidence", "standard_error", "ess", "pareto_k", "zero_weights")
