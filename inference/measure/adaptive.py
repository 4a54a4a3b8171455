r"""How many particles: the same number for every datum, or as many as each needs for a given error.

With a tolerance, a pilot of 256 draws per datum says how many it needs,

.. math:: K_n = 256 \, (c_n \, \text{error}_n / \text{tolerance})^2, \qquad
    c_n = 1 + 5 \, (\hat k_n - 1/2) \;\text{for}\; 1/2 < \hat k_n < 3/2

and constant outside: below 1/2 the variance of the weights is finite and the error can be believed. The pilot is
then laid aside: the estimate comes from fresh draws, so no pilot that missed the largest weights and stopped for that
is part of it (Stein 1945). After K_n of them (rounded up to a power of two times 256) the same question is put once
more. A datum that now needs more goes on to the next doubling; what was once needed is never forgotten, so a lucky
moment in a long run of doublings does not stop it either. The error is the jackknife's: that of the delta method never
exceeds 1, however few weights are all there is.
"""

from __future__ import annotations

__all__ = ["PILOT", "as_needed", "check_settings", "equally"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jensen.kernel.batches import Part, chunks_of

from .diagnostics import RunningWeights

PILOT = 256  # draws per datum that decide how many are needed: the fit of k-hat has 48 weights
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
    """As many particles as each datum of a part needs; all go on until all are done where the pair runs on all only.

    Args:
        draw: runs the pair.
        part: the data.
        tolerance: the Monte Carlo error of log p(x) to reach, in nats.
        max_particles: the most draws of a datum, the pilot's among them.

    Returns:
        What :meth:`RunningWeights.results` says of the fresh draws, ``spent`` and ``converged``: [N] each.
    """
    rows = _numbers(part)
    n, most = len(rows), max_particles - PILOT
    active = torch.arange(n)
    pilot = RunningWeights(PILOT, rows)
    _fill(pilot, draw, None, part.chunks(PILOT))
    need = _needed(pilot, tolerance)  # [N], never falls
    weights = RunningWeights(most, rows)
    reduced: dict[str, Tensor] = {}
    while True:
        target = min(most, max(PILOT, 2 * weights.seen))
        positions, rows_run = (active, len(active)) if part.divisible else (None, part.size)
        _fill(weights, draw, positions, chunks_of(target - weights.seen, part.at_once // rows_run))
        assessed = need[active] <= target
        need[active] = torch.where(assessed, torch.maximum(need[active], _needed(weights, tolerance)), need[active])
        met = need[active] <= target
        done = met | (target == most)
        if not part.divisible:
            done = done.all().expand_as(done)
        if done.any():
            now = {**weights.results(), "spent": torch.full_like(weights.zero_weights, target + PILOT)}
            for name, values in {**now, "converged": met}.items():
                reduced.setdefault(name, values.new_zeros(n, device="cpu"))[active[done]] = values.cpu()[done]
            if done.all():
                return reduced
            weights.select((~done).nonzero().flatten())
            active = active[~done]


def _numbers(part: Part) -> Tensor:
    """The numbers of the data that the weights of a part are of; joint weights count as one datum, the first."""
    return torch.zeros(1).long() if part.joint else torch.arange(part.first, part.first + len(part))


def _needed(weights: RunningWeights, tolerance: float) -> Tensor:
    """How many draws the tolerance takes, as far as these can tell: [N], on the CPU; twice as many if they cannot."""
    guard = 1 + 5 * (weights.pareto_k.clamp(0.5, 1.5) - 0.5)
    needed = weights.seen * (guard * weights.jackknife[1] / tolerance).square()
    return needed.nan_to_num(nan=2.0 * weights.seen, posinf=math.inf).cpu()


def _fill(weights: RunningWeights, draw: Draw, positions: Tensor | None, chunks: list[int]) -> None:
    """Draw chunk after chunk; reduce them several at a time, which sorts the largest less often."""
    waiting: list[tuple[Tensor, ...]] = []  # log weights, and what averages to the ELBO where they do not
    for i, k in enumerate(chunks):
        waiting.append(draw(positions, k))
        if i + 1 == len(chunks) or len(waiting) * waiting[0][0].numel() >= _REDUCED:
            weights.update(*map(torch.cat, zip(*waiting, strict=True)))
            waiting.clear()
