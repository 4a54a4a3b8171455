"""Log p(x) by a separate proposal for each data point: blocks of data, their budgets, and fresh samples.

:mod:`~jensen.inference.measure.proposals` describes how proposals are found. The estimate uses no sample that chose a
proposal.
"""

from __future__ import annotations

__all__ = ["Refined", "Strata", "bounds_of", "refine", "target_of"]

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jensen import processes
from jensen.graphs.compile import Compile
from jensen.kernel.arguments import in_a_line
from jensen.kernel.batches import Batch, Part, stream
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Program
from jensen.sources import Source

from .diagnostics import RunningWeights
from .plan import FRESH, STARTS, Plan
from .proposals import propose
from .starts import drawn, without_funnels
from .target import STATES, Block, Target
from .witness import missed

_BLOCK = 2**7  # data points refined at once
_MOST = 256  # coordinates
_ALIKE = 32  # numbers of samples are multiples of this
_NUMBERS = 2**22  # coordinates of samples held at once


Look = Callable[[Terms, Tensor, Tensor, int], None]


class Refined(NamedTuple):
    """The result of fresh samples from the proposals, [N] each.

    Attributes:
        log_evidence: log p(x): the log of the mean weight, corrected for its bias by half its squared error.
        standard_error: its Monte Carlo error, within strata.
        ess: effective sample size of the samples.
        pareto_k: k-hat of their weights.
        modes: the number of modes of a proposal.
        evaluations: of log p(x, z) for each data point, in total; a gradient counts three.
        draws: the number of fresh samples.
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
    data: Batch | Source,
    budget: int,
    *,
    seed: int | None = None,
    max_plate_nesting: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
    look: Look | None = None,
) -> Refined | str:
    """Log p(x) by a separate proposal for each data point; or the reason why there is none.

    Args:
        model: the model.
        guide: its guide.
        data: the data, or a source of them.
        budget: the maximal number of evaluations of log p(x, z) per data point, at least a quarter for fresh samples.
        seed: as for :func:`~jensen.inference.evaluate`.
        max_plate_nesting: as for :func:`~jensen.inference.evaluate`.
        compile: as for :func:`~jensen.inference.evaluate`.
        progress: whether to show a progress bar.
        look: called with the model's terms at the fresh samples of some data points, their log weights [K, n], the
            indices of these data points [n], and the number of them that are not padding; only without discrete sites.
    """
    if (least := Plan.of(budget, 1).least(1)) > budget:
        return f"a data point needs a budget of at least {least} evaluations, not {budget}"
    how: Any = {"weights": "any", "max_plate_nesting": max_plate_nesting, "progress": progress, "seed": seed}
    parts = stream(model, guide, data, "refine", at_once=_BLOCK, shared=look is None, **how)
    found = _refined_parts(parts, budget, compile, look)
    if look is None:
        reasons = processes.gathered(found if isinstance(found, str) else None)
        found = next(filter(None, reasons), found)
    if isinstance(found, str):
        return found
    results, of = found
    whole = processes.in_order(results, of) if look is None else results
    return Refined(*(torch.cat(values) for values in zip(*whole, strict=True)))


def _refined_parts(
    parts: Iterator[Part], budget: int, compile: Compile, look: Look | None
) -> tuple[list[Refined], int] | str:
    """The results of parts of the data, and how many parts all data have; or the reason why there are none."""
    results: list[Refined] = []
    target: Target | None = None
    for part in parts:
        if target is None:
            program, funnels = without_funnels(part.pair.model, *part.data)
        blocks = _blocks(part, program, funnels)
        if isinstance(blocks, str):
            return blocks
        first, found = part.first, []
        for block, given in blocks:
            if target is None:
                made = target_of(part, budget, False if funnels else compile, program, block, given)
                if isinstance(made, str):
                    return made
                target, plan = made
                if look is not None and target.states > 1:
                    return "the model has discrete sites, whose states are summed out"
            else:
                target.move_to(block, given)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*runs one particle after the other")
                found.append(_refined(target, plan, look, first))
            first += len(target)
        results.append(Refined(*(torch.cat(values).cpu() for values in zip(*found, strict=True))))
    return results, part.of


def _blocks(part: Part, program: Program, funnels: list[str]) -> list[tuple[tuple[Tensor, ...], Tensor | None]] | str:
    """The part's data in blocks, with samples of the guide if its density is not used; or why there are none.

    Its density is not used if the guide runs on all data only, or if the model's coordinates are transformed.
    """
    apart = bool(part.data) and not (part.joint or part.divisible)
    if not (apart or funnels):
        return [(part.data, None)]
    n = len(part)
    rows = torch.arange(n).split(-(-n // -(-n // _BLOCK)) if apart else max(1, n))  # of about equal size
    blocks = [tuple(x[some.to(x.device)] for x in part.data) for some in rows] if apart else [part.data]
    try:
        coordinates = Coordinates(program, *part.data, joint=part.joint, most=STATES)
        if apart and Coordinates(program, *blocks[-1], most=STATES).rows != len(rows[-1]):
            raise ValueError("its plate has another size")
    except (ValueError, RuntimeError, IndexError) as error:
        return f"model and guide run on all data only, but proposals are found for blocks ({in_a_line(error)})"
    given = drawn(part.pair.model, part.pair.guide, part.data, funnels, coordinates, STARTS)
    return (
        [(block, given[:, some]) for block, some in zip(blocks, rows, strict=True)] if apart else [(part.data, given)]
    )


def target_of(
    part: Part,
    budget: int,
    compile: Compile = False,
    program: Program | None = None,
    data: tuple[Tensor, ...] | None = None,
    given: Tensor | None = None,
) -> tuple[Target, Plan] | str:
    """The target of this part of the data and the later ones, and the plan; or the reason why there is none.

    Args:
        part: the part.
        budget: the maximal number of evaluations per data point.
        compile: as for :func:`~jensen.inference.evaluate`.
        program: the model in other coordinates; None: the original model.
        data: the first block of the part; None: all of it.
        given: samples of a guide whose density is not needed, [C, N, F].
    """
    if not (part.data or part.joint):
        return "models that hold their data, with a latent per data point, are not refined"
    if not (part.joint or part.divisible or given is not None):
        return "the guide holds a value for each of these data points, but proposals are found for blocks of them"
    pair, data = part.pair, part.data if data is None else data
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*runs one particle after the other")  # known, or part of the reason
            nesting, ahead = part.layout.nesting, part.ahead
            target = Target(program or pair.model, pair.guide, data, nesting, compile, ahead, part.joint, given)
    except ValueError as error:
        return str(error)
    if target.features > _MOST:
        return f"a data point has {target.features} coordinates, but curvatures are limited to {_MOST}"
    plan = Plan.of(budget // target.states, target.features)
    if (least := plan.least(target.features) * target.states) > budget:
        many = f", with {target.states} states of discrete sites," if target.states > 1 else ""
        return f"{target.features} coordinates of a data point{many} need a budget of {least} evaluations, not {budget}"
    return target, plan


def _refined(target: Target, plan: Plan, look: Look | None, first: int) -> Refined:
    """The estimates of a block, whose first data point has the index ``first``."""
    proposal, modes = propose(target, plan)
    full = torch.zeros(len(target), dtype=torch.float64, device=target.spent.device)
    numbers = [full.clone() for _ in range(4)]
    draws = full.long()
    doubts = missed(target, proposal) if plan.witness else full.bool()
    left = (plan.budget - target.spent).clamp_min(FRESH) // _ALIKE * _ALIKE  # decided before sampling
    for count in left.unique().tolist():
        rows = (left == count).nonzero().flatten()
        for block in target.blocks_of(rows):
            own = proposal.of(block.rows)
            counts = own.counts(count)
            strata, weights = Strata(counts, target.spent), RunningWeights(count)
            seen: list[tuple[Tensor, Tensor]] = []
            for u in own.draw(target, block, counts, _piece(target, block)):
                found = own.log_weights_at(target, block, u, counts, target.blocks)
                strata.update(found)
                weights.update(found)
                if look is not None:
                    seen.append((u, found))
            if look is not None:
                points, log_w = map(torch.cat, zip(*seen, strict=True))
                look(target.terms(block, points), log_w, first + block.rows, block.real)
            log_evidence, noise = strata.results()
            reduced = weights.results()
            values = (log_evidence, noise, reduced["ess"], reduced["pareto_k"])
            for kept, value in zip(numbers, values, strict=True):
                kept[block.rows[: block.real]] = value[: block.real]
            draws[block.rows[: block.real]] = count
    return Refined(numbers[0], numbers[1], numbers[2], numbers[3], modes, target.spent * target.states, draws, doubts)


def bounds_of(target: Target, plan: Plan, true: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower bounds of log p(x), their errors, upper bounds and their errors given the true values: [N] each, float64.

    Args:
        target: the block.
        plan: the use of evaluations.
        true: a sample from the posterior of each data point, [N, F]. If it replaces one sample of the proposal, the
            log of the mean weight is above log p(x) in expectation.
    """
    proposal, _ = propose(target, plan)
    made = torch.zeros(4, len(target), dtype=torch.float64, device=target.spent.device)
    count = int((plan.budget - target.spent).amin().clamp_min(FRESH))
    for block in target.blocks_of(target.rows):
        own = proposal.of(block.rows)
        counts = own.counts(count)
        log_w, slot = own.slot_of(target, block, true[block.rows], counts)
        lower, upper = Strata(counts, target.spent), Strata(counts, target.spent)
        for u in own.draw(target, block, counts, _piece(target, block)):
            found = own.log_weights_at(target, block, u, counts)
            here = torch.arange(lower.seen, lower.seen + len(found), device=slot.device)[:, None] == slot
            lower.update(found)
            upper.update(torch.where(here, log_w, found))
        for i, strata in ((0, lower), (2, upper)):
            mean, noise = strata.results()
            made[i, block.rows[: block.real]] = (mean - noise.square() / 2)[: block.real]
            made[i + 1, block.rows[: block.real]] = noise[: block.real]
    return made[0], made[1], made[2], made[3]


def _piece(target: Target, block: Block) -> int:
    """The number of samples of a block held at once: memory does not grow with the total number."""
    return max(1, _NUMBERS // (len(block.rows) * target.features) // target.at_once) * target.at_once


class Strata:
    """The log of the mean of stratified weights, bias-corrected, and its error within strata, in pieces.

    Args:
        counts: the number of weights in each stratum; strata come one after the other.
        like: a tensor on their device.
    """

    def __init__(self, counts: list[int], like: Tensor) -> None:
        self.seen = 0
        self._counts = torch.tensor(counts, device=like.device)
        self._moments: Tensor | None = None

    def update(self, log_w: Tensor) -> None:
        """Add log weights [k, N]."""
        log_w = log_w.double()
        if self._moments is None:
            self._top = torch.full_like(log_w[0], -math.inf)
            self._moments = log_w.new_zeros(2, len(self._counts), log_w.shape[1])
        top = torch.maximum(self._top, log_w.amax(0))
        shift = top.nan_to_num(neginf=0.0)
        old = (self._top - shift).exp()
        means, squares = self._moments[0] * old, self._moments[1] * old**2  # [strata, N]: mean, squared deviations
        edges = self._counts.cumsum(0)
        for i, (end, number) in enumerate(zip(edges.tolist(), self._counts.tolist(), strict=True)):
            first, known = max(end - number, self.seen), max(0, self.seen - (end - number))
            new = (log_w[first - self.seen : max(0, end - self.seen)] - shift).exp()
            if not len(new):
                continue
            mean = new.mean(0)
            delta, total = mean - means[i], known + len(new)
            squares[i] += (new - mean).square().sum(0) + delta.square() * known * len(new) / total
            means[i] += delta * len(new) / total
        self._moments, self._top = torch.stack([means, squares]), top
        self.seen += len(log_w)

    def results(self) -> tuple[Tensor, Tensor]:
        """The log of the mean plus half its squared error, and its error: [N] each."""
        assert self._moments is not None
        counts = self._counts[:, None].double()
        mean = (self._moments[0] * counts).sum(0) / self.seen
        variance = self._moments[1] * counts / (counts - 1).clamp_min(1)  # of the sum over a stratum
        noise = variance.sum(0).sqrt() / self.seen / mean
        return mean.log() + self._top.nan_to_num(neginf=0.0) + noise.nan_to_num(0.0).square() / 2, noise
