r"""How many particles: the same number for every datum, or as many as each needs for a given error.

With a tolerance, a pilot of P draws per datum, 256 to begin with, says how many it needs,

.. math:: K_n = P \, (c_n \, \text{error}_n / \text{tolerance})^2, \qquad
    c_n = 1 + 5 \, (\hat k_n - 1/2) \;\text{for}\; 1/2 < \hat k_n < 3/2

and constant outside: below 1/2 the variance of the weights is finite and the error can be believed. Where that is more
than twice P, the pilot is doubled and asked again; what was needed once is never forgotten. Then the pilot is laid
aside, and K_n fresh draws (rounded up to a power of two times 256) make the estimate (Stein 1945). Nobody looks at
them before they are all there, nor decides by them whether the tolerance was reached: a rule that stops when the error
of the estimate itself is small keeps those that missed their largest weights, which are too low and say too small an
error. The error of the pilot is the jackknife's: that of the delta method never exceeds 1, however few weights are all
there is.
"""

from __future__ import annotations

__all__ = ["PILOT", "as_needed", "check_settings", "equally"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jensen.kernel.batches import Part, chunks_of

from .diagnostics import RunningWeights, tail_guard

PILOT = 256  # draws per datum that decide how many are needed: the fit of k-hat has 48 weights
_EXTRAPOLATED = 2  # how many times its own size a pilot may ask for
_REDUCED = 2**15  # log weights that are reduced at once
Draw = Callable[[Tensor | None, int], tuple[Tensor, ...]]  # positions of data (None: all), and k: [k, N] each


def check_settings(particles: int, tolerance: float | None, max_particles: int) -> None:
    """Raise ValueError for numbers of particles, or a tolerance, that make no sense."""
    if particles < 1:
        raise ValueError(f"particles is the number of draws from the guide, at least 1, but got {particles}")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is a Monte Carlo error of log p(x) in nats, above 0, but got {tolerance}")
    if tolerance is not None and max_particles < 2 * PILOT:
        raise ValueError(
            f"max_particles is the most draws that a datum gets, its pilot of {PILOT} and as many more at least, but "
            f"got {max_particles}: take at least {2 * PILOT}, or particles={max_particles} without a tolerance"
        )


def equally(draw: Draw, part: Part, particles: int) -> dict[str, Tensor]:
    """The same K for every datum of a part: what :meth:`RunningWeights.results` says, and ``spent``."""
    weights = RunningWeights(particles, _numbers(part))
    _fill(weights, draw, None, part.chunks(particles))
    reduced = weights.results()
    return {**reduced, "spent": torch.full_like(reduced["zero_weights"], particles)}


def as_needed(draw: Draw, part: Part, tolerance: float, max_particles: int) -> dict[str, Tensor]:
    """As many particles as each datum of a part needs; as many as any needs where the pair runs on all only.

    Args:
        draw: runs the pair.
        part: the data.
        tolerance: the Monte Carlo error of log p(x) to reach, in nats.
        max_particles: the most draws of a datum, those of the pilot among them.

    Returns:
        What :meth:`RunningWeights.results` says of the fresh draws, ``spent`` and ``converged``: [N] each.
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
    """How many fresh draws each datum needs, and how many its pilot took: [N] each, on the CPU."""
    active = torch.arange(len(rows))
    weights = RunningWeights(max_particles // _EXTRAPOLATED, rows)
    need = torch.zeros(len(rows), dtype=torch.float64)  # never falls
    taken = torch.zeros(len(rows), dtype=torch.long)
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
    """The numbers of the data that the weights of a part are of; joint weights count as one datum, the first."""
    return torch.zeros(1).long() if part.joint else torch.arange(part.first, part.first + len(part))


def _needed(weights: RunningWeights, tolerance: float) -> Tensor:
    """How many draws the tolerance takes, as far as these can tell: [N], on the CPU; NaN where they cannot."""
    needed = weights.seen * (tail_guard(weights.pareto_k) * weights.jackknife[1] / tolerance).square()
    return needed.cpu()


def _fill(weights: RunningWeights, draw: Draw, positions: Tensor | None, chunks: list[int]) -> None:
    """Draw chunk after chunk; reduce them several at a time, which sorts the largest less often."""
    waiting: list[tuple[Tensor, ...]] = []  # log weights, and what averages to the ELBO where they do not
    for i, k in enumerate(chunks):
        waiting.append(draw(positions, k))
        if i + 1 == len(chunks) or len(waiting) * waiting[0][0].numel() >= _REDUCED:
            weights.update(*map(torch.cat, zip(*waiting, strict=True)))
            waiting.clear()
