r"""How many particles: the same number for every datum, or as many as each needs for an error asked for.

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

__all__ = ["PILOT", "as_needed", "block_of", "check_settings", "equally", "in_parts"]

import math
from collections.abc import Callable

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from jensen.kernel.weights import Program, check_pair

from .diagnostics import RunningWeights

PILOT = 256  # draws per datum that decide how many are needed: the fit of k-hat has 48 weights
_REDUCED = 2**15  # log weights that are reduced at once
Draw = Callable[[Tensor | None, int], Tensor]  # positions of data (None: all), and k: log weights [k, N]


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


def in_parts(model: Program, guide: Program, batch: tuple[Tensor, ...], proven: bool) -> bool:
    """Whether a pair with weights per datum runs on some of these data alone.

    Args:
        model: the model.
        guide: its guide; an AutoGuide, or one with parameters for each datum, runs on all or none.
        batch: the data.
        proven: whether the batch is itself a part of the data.
    """
    half = len(batch[0]) // 2
    if isinstance(guide, AutoGuide):
        return False
    if proven or not half:
        return True
    try:
        return check_pair(model, guide, *(x[:half] for x in batch)).sizes == (half,)
    except (RuntimeError, ValueError):
        return False


def block_of(particles: int, most: int) -> int:
    """How many particles to draw at once, at most so many: a divisor of K if one is near; then all blocks are alike."""
    most = max(1, min(particles, most))
    return next((k for k in range(most, most // 2, -1) if particles % k == 0), most)


def equally(draw: Draw, particles: int, block: int, rows: Tensor) -> dict[str, Tensor]:
    """The same K for every datum, in blocks: what :meth:`RunningWeights.results` says, and ``spent``."""
    weights = RunningWeights(particles, rows)
    _fill(weights, draw, None, particles, block)
    found = weights.results()
    return {**found, "spent": torch.full_like(found["zero_weights"], particles)}


def as_needed(
    draw: Draw, tolerance: float, max_particles: int, chunk: int, rows: Tensor, divisible: bool
) -> dict[str, Tensor]:
    """As many particles as each datum needs.

    Args:
        draw: runs the pair.
        tolerance: the Monte Carlo error of log p(x) to reach, in nats.
        max_particles: the most draws of a datum, the pilot's among them.
        chunk: how many (datum, particle) pairs are run at once.
        rows: the number of each datum in the user's data.
        divisible: whether some of the data can be drawn for alone; if not, all go on until all are done.

    Returns:
        What :meth:`RunningWeights.results` says of the fresh draws, ``spent`` and ``converged``: [N] each.
    """
    n, most = len(rows), max_particles - PILOT
    active = torch.arange(n)
    pilot = RunningWeights(PILOT, rows)
    _fill(pilot, draw, None, PILOT, max(1, chunk // n))
    need = _needed(pilot, tolerance)  # [N], never falls
    weights = RunningWeights(most, rows)
    found: dict[str, Tensor] = {}
    while True:
        target = min(most, max(PILOT, 2 * weights.seen))
        positions = active if divisible else None
        _fill(weights, draw, positions, target - weights.seen, max(1, chunk // len(active)))
        asked = need[active] <= target
        need[active] = torch.where(asked, torch.maximum(need[active], _needed(weights, tolerance)), need[active])
        met = need[active] <= target
        done = met | (target == most)
        if not divisible:
            done = done.all().expand_as(done)
        if done.any():
            now = {**weights.results(), "spent": torch.full_like(weights.zero_weights, target + PILOT)}
            for name, values in {**now, "converged": met}.items():
                found.setdefault(name, values.new_zeros(n, device="cpu"))[active[done]] = values.cpu()[done]
            if done.all():
                return found
            weights.select((~done).nonzero().flatten())
            active = active[~done]


def _needed(weights: RunningWeights, tolerance: float) -> Tensor:
    """How many draws the tolerance takes, as far as these can tell: [N], on the CPU; twice as many if they cannot."""
    guard = 1 + 5 * (weights.pareto_k.clamp(0.5, 1.5) - 0.5)
    needed = weights.seen * (guard * weights.jackknife[1] / tolerance).square()
    return needed.nan_to_num(nan=2.0 * weights.seen, posinf=math.inf).cpu()


def _fill(weights: RunningWeights, draw: Draw, positions: Tensor | None, particles: int, block: int) -> None:
    """Draw block after block; reduce them several at a time, which sorts the largest less often."""
    waiting: list[Tensor] = []
    for first in range(0, particles, block):
        waiting.append(draw(positions, min(block, particles - first)))
        if first + block >= particles or len(waiting) * waiting[0].numel() >= _REDUCED:
            weights.update(torch.cat(waiting))
            waiting.clear()
