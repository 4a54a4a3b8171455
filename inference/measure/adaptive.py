r"""The number of particles: the same for every data point, or as many as each needs for a given error.

With a tolerance, a pilot of P samples per data point, 256 at first, determines how many it needs,

.. math:: K_n = P \, (c_n \, \text{error}_n / \text{tolerance})^2, \qquad
    c_n = 1 + 5 \, (\hat k_n - 1/2) \;\text{for}\; 1/2 < \hat k_n < 3/2

and constant outside: below 1/2 the variance of the weights is finite and the error is reliable. If K_n is more
than twice P, the pilot is doubled and evaluated again; the requirement never decreases. Then the pilot is
discarded, and K_n fresh samples (rounded up to a power of two times 256) make the estimate (Stein 1945). They are not
used to decide whether the tolerance was reached: a rule that stops when the error of the estimate itself is small
selects estimates that missed their largest weights, which are too low and have too small an error. The error of the
pilot is the jackknife's: that of the delta method never exceeds 1, however few weights dominate.
"""

from __future__ import annotations

__all__ = ["PILOT", "as_needed", "check_settings", "equally"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jensen.kernel.batches import Part, chunks_of

from .diagnostics import RunningWeights, tail_guard

PILOT = 256  # samples per data point that decide how many are needed: the fit of k-hat has 48 weights
_EXTRAPOLATED = 2  # a pilot may request this multiple of its own size
_REDUCED = 2**15  # log weights that are reduced together
Draw = Callable[[Tensor | None, int], tuple[Tensor, ...]]  # from positions of data (None: all), and k, to [k, N] each


def check_settings(particles: int, tolerance: float | None, max_particles: int) -> None:
    """Raise ValueError for an invalid number of particles or tolerance."""
    if particles < 1:
        raise ValueError(f"particles is the number of samples from the guide, at least 1, but got {particles}")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is a Monte Carlo error of log p(x) in nats, above 0, but got {tolerance}")
    if tolerance is not None and max_particles < 2 * PILOT:
        raise ValueError(
            f"max_particles is the maximal number of samples per data point, a pilot of {PILOT} and at least as many "
            f"more, but got {max_particles}: use at least {2 * PILOT}, or particles={max_particles} without a tolerance"
        )


def equally(draw: Draw, part: Part, particles: int) -> dict[str, Tensor]:
    """The same K for every data point of a part: :meth:`RunningWeights.results`, and ``spent``."""
    weights = RunningWeights(particles, _numbers(part))
    _fill(weights, draw, None, part.chunks(particles))
    reduced = weights.results()
    return {**reduced, "spent": torch.full_like(reduced["zero_weights"], particles)}


def as_needed(draw: Draw, part: Part, tolerance: float, max_particles: int) -> dict[str, Tensor]:
    """As many particles as each data point of a part needs; the maximum for all if they cannot be run separately.

    Args:
        draw: runs model and guide.
        part: the data.
        tolerance: the Monte Carlo error of log p(x) to reach, in nats.
        max_particles: the maximal number of samples per data point, including the pilot.

    Returns:
        :meth:`RunningWeights.results` of the fresh samples, ``spent`` and ``converged``: [N] each.
    """
    rows = _numbers(part)
    n = len(rows)
    need, piloted = _piloted(draw, part, rows, tolerance, max_particles)
    left = max_particles - piloted  # [N]
    met = need <= left
    doublings = (need.clamp(PILOT, max_particles) / PILOT).log2().ceil()
    sizes = (PILOT * 2**doublings).long().minimum(left)
    if not part.divisible:
        sizes = sizes.amax().expand_as(sizes)
    reduced: dict[str, Tensor] = {}
    for size in sizes.unique().tolist():
        chosen = (sizes == size).nonzero().flatten()
        positions, rows_run = (chosen, len(chosen)) if part.divisible else (None, part.size)
        weights = RunningWeights(size, rows[chosen])
        _fill(weights, draw, positions, chunks_of(size, part.at_once // rows_run))
        for name, values in weights.results().items():
            reduced.setdefault(name, values.new_zeros(n, device="cpu"))[chosen] = values.cpu()
    return {**reduced, "spent": sizes + piloted, "converged": met}


def _piloted(draw: Draw, part: Part, rows: Tensor, tolerance: float, max_particles: int) -> tuple[Tensor, Tensor]:
    """The number of fresh samples that each data point needs, and that its pilot used: [N] each, on the CPU."""
    active = torch.arange(len(rows), device="cpu")
    weights = RunningWeights(max_particles // _EXTRAPOLATED, rows)
    need = torch.zeros(len(rows), dtype=torch.float64, device="cpu")  # never decreases
    taken = torch.zeros(len(rows), dtype=torch.long, device="cpu")
    target = PILOT
    while True:
        positions, rows_run = (active, len(active)) if part.divisible else (None, part.size)
        _fill(weights, draw, positions, chunks_of(target - weights.seen, part.at_once // rows_run))
        now = _needed(weights, tolerance)
        need[active] = torch.maximum(need[active], now.nan_to_num(nan=0.0, posinf=math.inf))
        taken[active] = target
        more = ((need[active] > _EXTRAPOLATED * target) | now.isnan()) & (2 * target * _EXTRAPOLATED <= max_particles)
        if not part.divisible:
            more = more.any().expand_as(more)
        need[active] = torch.where(now.isnan() & ~more, math.inf, need[active])
        if not more.any():
            return need, taken
        weights.select(more.nonzero().flatten())
        active = active[more]
        target *= 2


def _numbers(part: Part) -> Tensor:
    """The row numbers of the weights of a part; joint weights count as one data point, the first."""
    if part.joint:
        return torch.zeros(1, dtype=torch.long, device="cpu")
    return torch.arange(part.first, part.first + len(part), device="cpu")


def _needed(weights: RunningWeights, tolerance: float) -> Tensor:
    """The estimated number of samples for the tolerance: [N], on the CPU; NaN where it is unknown."""
    needed = weights.seen * (tail_guard(weights.pareto_k) * weights.jackknife[1] / tolerance).square()
    return needed.cpu()


def _fill(weights: RunningWeights, draw: Draw, positions: Tensor | None, chunks: list[int]) -> None:
    """Sample chunk after chunk, and reduce several together, so that the largest weights are sorted less often."""
    waiting: list[tuple[Tensor, ...]] = []  # log weights, and the ELBO's values if they differ
    for i, k in enumerate(chunks):
        waiting.append(draw(positions, k))
        if i + 1 == len(chunks) or len(waiting) * waiting[0][0].numel() >= _REDUCED:
            weights.update(*map(torch.cat, zip(*waiting, strict=True)))
            waiting.clear()
