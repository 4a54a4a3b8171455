"""Log p(x) by proposals of each datum's own: which data, at what price, and what fresh draws say.

How proposals are found is in :mod:`~jensen.inference.measure.proposals`. None of the draws that chose a proposal enters
the estimate.
"""

from __future__ import annotations

__all__ = ["Refined", "bounds_of", "estimate", "refine", "target_of"]

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jensen.graphs.compile import Compile
from jensen.kernel.batches import Part, stream
from jensen.kernel.weights import Program

from .diagnostics import RunningWeights
from .plan import FRESH, Plan
from .proposals import propose
from .target import Target
from .witness import missed

_BLOCK = 2**7  # data that are refined at once
_MOST = 256  # coordinates
_ALIKE = 32  # draws, in units of which data have different numbers


class Refined(NamedTuple):
    """What fresh draws from the proposals say, [N] each.

    Attributes:
        log_evidence: log p(x): the log of the mean weight, with half its squared error, its bias, added back.
        standard_error: its Monte Carlo error, within strata.
        ess: effective sample size of the draws.
        pareto_k: k-hat of their weights.
        modes: how many modes a proposal has.
        evaluations: of log p(x, z) for each datum, over all; a gradient counts three.
        draws: how many fresh draws there were.
        missed: whether a few chains from the prior found a part of the posterior that the proposal misses.
    """

    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    modes: Tensor
    evaluations: Tensor
    draws: Tensor
    missed: Tensor


def refine(
    model: Program,
    guide: Program,
    data: tuple[Tensor, ...],
    budget: int,
    *,
    seed: int | None = None,
    max_plate_nesting: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
) -> Refined | str:
    """Log p(x) by a proposal of its own for each datum; or why there is none.

    Args:
        model: the model.
        guide: its guide.
        data: the data.
        budget: the most evaluations of log p(x, z) for a datum, of which a quarter at least are fresh draws.
        seed: as for :func:`~jensen.inference.evaluate`.
        max_plate_nesting: as for :func:`~jensen.inference.evaluate`.
        compile: as for :func:`~jensen.inference.evaluate`.
        progress: whether to show a progress bar.
    """
    if (least := Plan.of(budget, 1).least(1)) > budget:
        return f"a datum takes a budget of at least {least} evaluations, not {budget}"
    parts: list[Refined] = []
    how: Any = {"weights": "any", "max_plate_nesting": max_plate_nesting, "progress": progress, "seed": seed}
    target: Target | None = None
    for part in stream(model, guide, data, "refine", at_once=_BLOCK, **how):
        if target is None:
            made = target_of(part, budget, compile)
            if isinstance(made, str):
                return made
            target, plan = made
        else:
            target.move_to(part.data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*runs one particle after the other")
            parts.append(_refined(target, plan))
    return Refined(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def target_of(part: Part, budget: int, compile: Compile = False) -> tuple[Target, Plan] | str:
    """The target of a part of the data and of those that come after it, and the plan; or why there is none."""
    if not (part.data or part.joint):
        return "pairs that hold their data, with a latent for each, are not refined"
    if not (part.joint or part.divisible):
        return "the guide holds a value for each of these data, and proposals are found for blocks of them"
    pair = part.pair
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*runs one particle after the other")  # known, or said in the reason
            target = Target(pair.model, pair.guide, part.data, part.layout.nesting, compile, part.ahead, part.joint)
    except ValueError as error:
        return str(error)
    if target.features > _MOST:
        return f"a datum has {target.features} coordinates, and the curvature of more than {_MOST} is not worked out"
    plan = Plan.of(budget // target.states, target.features)
    if (least := plan.least(target.features) * target.states) > budget:
        many = f", with {target.states} states of discrete sites," if target.states > 1 else ""
        return f"{target.features} coordinates of a datum{many} take a budget of {least} evaluations, not {budget}"
    return target, plan


def _refined(target: Target, plan: Plan) -> Refined:
    """The estimates of a block."""
    proposal, modes = propose(target, plan)
    full = torch.zeros(len(target), dtype=torch.float64, device=target.spent.device)
    numbers = [full.clone() for _ in range(4)]
    draws, doubts = full.long(), full.bool()
    left = (plan.estimate - target.spent).clamp_min(FRESH) // _ALIKE * _ALIKE  # decided before these draws
    for count in left.unique().tolist():
        rows = (left == count).nonzero().flatten()
        for block in target.blocks_of(rows):
            found, counts = proposal.of(block.rows).log_joint_weights(target, block, count, target.blocks)
            log_evidence, noise = estimate(found, counts)
            weights = RunningWeights(len(found))
            weights.update(found)
            reduced = weights.results()
            values = (log_evidence, noise, reduced["ess"], reduced["pareto_k"])
            for kept, value in zip(numbers, values, strict=True):
                kept[block.rows[: block.real]] = value[: block.real]
            draws[block.rows[: block.real]] = len(found)
            if plan.witness:
                doubts[block.rows[: block.real]] = missed(target, block, proposal.of(block.rows), log_evidence)
    return Refined(numbers[0], numbers[1], numbers[2], numbers[3], modes, target.spent * target.states, draws, doubts)


def bounds_of(target: Target, plan: Plan, true: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower bounds of log p(x), their errors, upper bounds and theirs given the true values: [N] each, float64.

    Args:
        target: the block.
        plan: how evaluations are spent.
        true: a draw from the posterior of each datum, [N, F]. In the place of one draw of the proposal it makes the
            mean weight one whose log is above log p(x) in expectation.
    """
    proposal, _ = propose(target, plan)
    made = torch.zeros(4, len(target), dtype=torch.float64, device=target.spent.device)
    count = int((plan.estimate - target.spent).amin().clamp_min(FRESH))
    for block in target.blocks_of(target.rows):
        own = proposal.of(block.rows)
        u, counts = own.draw(target, block, count)
        found = torch.cat([log_w for log_w, _ in own.weighed(target, block, u, counts)])
        given = [number for number in counts if number]
        log_w, slot = own.slot_of(target, block, true[block.rows], counts)
        with_true = found.scatter(0, slot[None], log_w[None])
        for i, weights in ((0, found), (2, with_true)):
            mean, noise = estimate(weights, given)
            made[i, block.rows[: block.real]] = (mean - noise.square() / 2)[: block.real]
            made[i + 1, block.rows[: block.real]] = noise[: block.real]
    return made[0], made[1], made[2], made[3]


def estimate(log_weights: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Log of the mean of stratified weights [K, N], its bias added back, and its error within strata: [N] each."""
    top = log_weights.amax(0)
    top = torch.where(top.isfinite(), top, 0.0)
    weights = (log_weights - top).exp()
    mean = weights.mean(0)
    total = len(weights)
    variance = torch.as_tensor(sum(len(part) * part.var(0) for part in weights.split(counts))) / total**2
    noise = variance.sqrt() / mean
    return mean.log() + top + noise.nan_to_num(0.0).square() / 2, noise
