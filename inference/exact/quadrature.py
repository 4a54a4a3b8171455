r"""Adaptive integration in one to three dimensions, of positive functions given by their logarithm.

A box around the centre is divided into a few cells. Cells whose error may be too large are halved, across the dimension
that causes it, until the total error is below the tolerance. If the integrand does not decay towards the edge, the box
grows. Nothing is assumed about the place, the number or the shape of the peaks. Data points are integrated in parallel,
each with its own cells.

In a cell the logarithm, not the function, is approximated: by a polynomial P through the Chebyshev nodes, whose
exponential a Gauss-Legendre rule integrates without further evaluations. A posterior of width 0.01 is a narrow peak,
but its logarithm is nearly a parabola, which a few nodes detect from far away. With Q the same polynomial without its
two highest degrees, and r <= 1 the ratio by which such differences decrease from two degrees to the next two,

.. math::
    \int_c f \approx \int_c e^P, \qquad
    \epsilon_c = r \int_c \big| e^P - e^Q \big| + \sum_{i=1}^2 \Big| \int_c e^P - {\textstyle\int_c^{(i)}} e^P \Big|,

where the integrals of the sum use two lower rules. If P and Q differ by nats, or P bends by nats from one point
of the rule to the next, the error is the largest possible value: the mass may be unseen.

References:
    Trefethen (2019), Approximation Theory and Approximation Practice, chapters 8 and 19.
"""

from __future__ import annotations

__all__ = [
    "NODES",
    "Cells",
    "LogDensity",
    "Rule",
    "apply",
    "first_evaluations",
    "integrate",
    "join",
    "measure",
    "on_faces",
    "rule_of",
]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NODES = {1: 13, 2: 11, 3: 9}  # per dimension of a cell
_FINE = {1: (24, 22, 21), 2: (16, 14, 13), 3: (12, 10, 9)}  # per dimension, of the rule and of two for comparison
_CAUTION = 3.0  # possible error of the logarithm relative to the difference of P and Q, if this is large
_DECAY = 0.1  # minimal ratio of the error of P to the difference of P and Q
_BEND = 2.0  # nats of second difference between points of the rule, above which it may miss a peak
_INTERPOLATION = 1e-15  # possible error of interpolation in float64, in units of the largest value
_AT_ONCE = 2**20  # points of the rule processed at once


@dataclass
class Cells:
    """Cells of many data points together: M cells, n nodes per dimension, boxes in units of their data point's scales.

    Attributes:
        row: the data point of each, [M].
        centre: [M, D].
        half: half the widths, [M, D].
        face: whether the lower and the upper end are on the edge of the data point's box, [M, D, 2].
        values: log f at the nodes, [M, n, ..., n].
        log_mass: [M].
        log_error: [M].
        mismatch: the largest difference of P and Q in the cell, in nats, [M].
        split: the dimension in which the cell is to be halved, [M].
    """

    row: Tensor
    centre: Tensor
    half: Tensor
    face: Tensor
    values: Tensor
    log_mass: Tensor
    log_error: Tensor
    mismatch: Tensor
    split: Tensor

    def __getitem__(self, index: Tensor) -> Cells:
        return Cells(*(getattr(self, f.name)[index] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.row)


def join(parts: Sequence[Cells]) -> Cells:
    """Concatenated cells."""
    return Cells(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Cells)))


@dataclass(frozen=True, eq=False)
class Rule:
    """Matrices of one dimension, which act on the n values at the nodes in [-1, 1], and weights of D dimensions."""

    nodes: Tensor  # [n]
    full: Tensor  # [m, n], P at the points of the rule
    low: Tensor  # [m, n], Q there
    lower: Tensor  # [m, n], Q without two more degrees
    checks: tuple[tuple[Tensor, Tensor], ...]  # [m', n], P at the points of a lower rule, and its weights [m', ..., m']
    halves: Tensor  # [2, n, n], P at the nodes of the lower and of the upper half
    ends: Tensor  # [2, 1, n], P at -1 and at 1
    log_weights: Tensor  # [m, ..., m]
    face_log_weights: Tensor  # [m, ..., m], in one dimension less


@cache
def rule_of(dimension: int, device: torch.device) -> Rule:
    """The rule for cells of this dimension."""
    n, (m, *fewer) = NODES[dimension], _FINE[dimension]
    nodes = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    scale = np.where(np.arange(n) > 0, 2, 1)[:, None] / n
    to_coefficients = np.polynomial.chebyshev.chebvander(nodes, n - 1).T * scale  # [n, n]

    def at(points: np.ndarray, kept: int = n) -> Tensor:  # [len(points), n]
        matrix = np.polynomial.chebyshev.chebvander(points, n - 1)[:, :kept] @ to_coefficients[:kept]
        return torch.as_tensor(matrix, device=device)

    def product(weights: np.ndarray, times: int) -> Tensor:
        one = torch.as_tensor(np.log(weights), device=device)
        total = one.new_zeros(())
        for _ in range(times):
            total = total.unsqueeze(-1) + one
        return total

    fine, weights = np.polynomial.legendre.leggauss(m)
    lower = [np.polynomial.legendre.leggauss(k) for k in fewer]
    return Rule(
        torch.as_tensor(nodes, device=device),
        at(fine),
        at(fine, n - 2),
        at(fine, n - 4),
        tuple((at(points), product(w, dimension)) for points, w in lower),
        torch.stack([at((nodes - 1) / 2), at((nodes + 1) / 2)]),
        at(np.array([-1.0, 1.0])).unsqueeze(1),
        product(weights, dimension),
        product(weights, dimension - 1),
    )


def apply(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """One matrix for each dimension: [M, n, ..., n] to [M, m, ..., m]."""
    for matrix in matrices:
        values = torch.tensordot(values, matrix, dims=([1], [1]))  # the new dimension becomes the last one
    return values


def measure(values: Tensor, half: Tensor, slack: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mass, log error, mismatch and the dimension to halve, [M] each, of cells with values [M, n, ..., n].

    With ``slack`` [M] the polynomial is that of a larger cell with this error, which the values cannot reveal.
    """
    size = max(1, _AT_ONCE // rule.log_weights.numel())
    slacks = [None] * len(values) if slack is None else slack.split(size)
    parts = [_measure(*part, rule) for part in zip(values.split(size), half.split(size), slacks, strict=False)]
    mass, error, mismatch, split = (torch.cat(column) for column in zip(*parts, strict=True))
    return mass, error, mismatch, split


def _measure(values: Tensor, half: Tensor, slack: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = half.shape[1]
    broken = values.isinf()  # log f = -inf at a node, or NaN, which arrives as -inf
    smooth = values.masked_fill(broken, 0.0) if (any_broken := bool(broken.any())) else values
    full = apply(smooth, [rule.full] * D)  # [M, m, ..., m]
    log_volume = half.log().sum(1)
    mass = _log_sum(full + rule.log_weights)
    bends = [_bend(full, d) for d in range(1, D + 1)]
    by_rule, split = _of_the_rule(full, bends, rule)
    for matrix, log_weights in rule.checks:  # two, since one may agree by chance
        by_rule = torch.logaddexp(by_rule, _log_difference(mass, _log_sum(apply(smooth, [matrix] * D) + log_weights)))
    if slack is None:
        by_gap, mismatch, split_by_gap = _of_the_polynomial(smooth, full, rule)
        split = torch.where(by_gap > by_rule, split_by_gap, split)
    else:
        by_gap, mismatch = mass + _log_expm1(slack), slack
    mass, error = mass + log_volume, torch.logaddexp(by_gap, by_rule) + log_volume
    if any_broken:  # no polynomial: the mean and the largest of the values
        some = broken.flatten(1).any(1)
        rough = _log_sum(values) + log_volume + D * math.log(2) - math.log(values[0].numel())
        worst = values.flatten(1).amax(1) + log_volume + D * math.log(2) + 1
        mass, error = torch.where(some, rough, mass), torch.where(some, worst, error)
        split = torch.where(some, half.argmax(1), split)
        mismatch = mismatch.masked_fill(some, math.inf)
    return mass, error, mismatch, split


def _of_the_polynomial(values: Tensor, full: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the integral of the difference of P and Q, their largest difference, the responsible dimension: [M]."""
    D = values.dim() - 1
    low = apply(values, [rule.low] * D)
    lower = apply(values, [rule.lower] * D)
    gap, before = (full - low).abs(), (low - lower).abs()
    decay = (gap.flatten(1).amax(1) / before.flatten(1).amax(1)).nan_to_num(nan=1.0).clamp(_DECAY, 1.0)
    rounding = _INTERPOLATION * values.flatten(1).abs().amax(1)
    gap = gap * decay.reshape(-1, *[1] * D) + rounding.reshape(-1, *[1] * D)
    possible = torch.maximum(full, low) + _log_expm1(_CAUTION * gap) - math.log(_CAUTION) + rule.log_weights
    weights = possible.flatten(1).softmax(1)
    scores = []
    for d in range(D):
        truncated = apply(values, [rule.low if e == d else rule.full for e in range(D)])
        scores.append(((full - truncated).abs().flatten(1) * weights).sum(1))
    return _log_sum(possible), gap.flatten(1).amax(1), torch.stack(scores, 1).argmax(1)


def _of_the_rule(full: Tensor, bends: list[Tensor], rule: Rule) -> tuple[Tensor, Tensor]:
    """Log of the integral of possible peaks of P between distant points, the responsible dimension: [M]."""
    bend = torch.stack(bends).sum(0) if len(bends) > 1 else bends[0]
    ahead = full + bend / 2 + rule.log_weights  # a parabola with its top between two points rises by an eighth
    top = ahead.flatten(1).amax(1).reshape(-1, *[1] * len(bends))
    weights = (ahead - top).exp()
    scores = torch.stack([(weights * b).flatten(1).sum(1) for b in bends], 1)
    hidden = (weights * (bend > _BEND)).flatten(1).sum(1).log() + top.flatten()
    return hidden, scores.argmax(1)


def _log_sum(terms: Tensor) -> Tensor:
    return terms.flatten(1).logsumexp(1)


def _bend(values: Tensor, dim: int) -> Tensor:
    """The absolute second difference at each point along a dimension; at the ends that of the neighbour."""
    second = values.diff(n=2, dim=dim).abs()
    m = second.shape[dim]
    return torch.cat([second.narrow(dim, 0, 1), second, second.narrow(dim, m - 1, 1)], dim)


def _log_expm1(x: Tensor) -> Tensor:
    """Log(e^x - 1) of x >= 0; it does not overflow."""
    return torch.where(x > 30, x, x.clamp_max(30).expm1().log())


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """Log |e^a - e^b|."""
    return torch.maximum(a, b) + (-(-(a - b).abs()).expm1()).log()


def on_faces(cells: Cells, rule: Rule) -> Tensor:
    """Log of the integral of e^P over each face of each cell that is on the edge of a box; else -inf: [M, D, 2]."""
    M, D = cells.half.shape
    log_integrals = cells.half.new_full((M, D, 2), -math.inf)
    for d in range(D):
        for side in range(2):
            (at,) = (cells.face[:, d, side] & cells.mismatch.isfinite()).nonzero(as_tuple=True)
            if len(at):
                matrices = [rule.ends[side] if e == d else rule.full for e in range(D)]
                terms = apply(cells.values[at], matrices).squeeze(d + 1) + rule.face_log_weights
                area = cells.half[at].log().sum(1) - cells.half[at, d].log()
                log_integrals[at, d, side] = terms.reshape(len(at), -1).logsumexp(1) + area
    return log_integrals


LogDensity = Callable[[Tensor, Tensor], Tensor]
_GRID = {1: 8, 2: 3, 3: 2}  # initial cells per dimension
_BEHIND = 15.0  # nats: cells whose error is within this distance of the largest are halved in the same round
_WIDTH = 6.0  # of the first box, on either side of its centre
_GROWTH = 40  # maximal number of times that a box grows, each time by its own width
_CELLS = 2**16  # per data point: a limit of memory
_SHARE = 0.2  # of the tolerance: allowed error of a polynomial whose cell is not evaluated again
_ROUNDING = 32.0  # in units of eps log f: smaller errors are attributed to rounding


class Integral(NamedTuple):
    """Log integrals [N], their errors in nats [N], and the number of evaluations of log f for each [N]."""

    value: Tensor
    error: Tensor
    evaluations: Tensor


def first_evaluations(dimension: int) -> int:
    """The number of evaluations per data point for the first cells."""
    return int((_GRID[dimension] * NODES[dimension]) ** dimension)


def integrate(
    log_density: LogDensity,
    n: int,
    dimension: int,
    *,
    tolerance: float,
    max_evaluations: int,
    eps: float = torch.finfo(torch.float64).eps,
    device: torch.device | None = None,
) -> Integral:
    r"""Log of the integral of f over R^D, for N data points at once.

    Args:
        log_density: called with the indices of data points [M] and points [K, M, D]; log f of each in float64, [K, M].
            The bulk of f, or of the prior in it, should be around the origin, at scale 1.
        n: the number N of data points.
        dimension: D, from 1 to 3.
        tolerance: the allowed error of the log integral, in nats.
        max_evaluations: per data point.
        eps: the precision of log f.
        device: where points are created.

    Returns:
        The :class:`Integral`. Its error is infinite if the integrand does not decay.
    """
    rule = rule_of(dimension, torch.device("cpu") if device is None else torch.device(device))
    run = _Run(log_density, n, dimension, rule, tolerance, eps, max_evaluations)
    while len(run.cells):
        run.round()
    return Integral(run.value, run.error, run.evaluations)


class _Run:
    """The state of one integration: the cells of unfinished data points, and the results of the others."""

    def __init__(
        self, log_density: LogDensity, n: int, D: int, rule: Rule, tolerance: float, eps: float, max_evaluations: int
    ) -> None:
        self.log_density, self.D, self.rule, self.eps = log_density, D, rule, eps
        self.max_evaluations = max_evaluations
        like = rule.nodes
        self.value, self.error = like.new_full((n,), -math.inf), like.new_full((n,), math.inf)
        self.evaluations = torch.zeros(n, dtype=torch.long, device=like.device)
        self.tolerance = like.new_full((n,), tolerance)
        self.best = like.new_full((n,), -math.inf)
        self.low, self.high = like.new_full((n, D), -_WIDTH), like.new_full((n, D), _WIDTH)
        self.grown, self.measured = torch.zeros_like(self.evaluations), torch.zeros_like(self.evaluations)
        self.cells = self._first(n)

    def _first(self, n: int) -> Cells:
        side, like = _GRID[self.D], self.rule.nodes
        ticks = torch.arange(side, device=like.device)
        index = torch.cartesian_prod(*[ticks] * self.D).reshape(-1, self.D).repeat(n, 1)  # [n side^D, D]
        row = torch.arange(n, device=like.device).repeat_interleave(side**self.D)
        half = like.new_full(index.shape, _WIDTH / side)
        centre = (2 * index + 1 - side) * half
        face = torch.stack([index == 0, index == side - 1], -1)
        return self._evaluated(row, centre, half, face)

    def _evaluated(self, row: Tensor, centre: Tensor, half: Tensor, face: Tensor) -> Cells:
        """New cells, with log f evaluated at their nodes."""
        nodes = torch.cartesian_prod(*[self.rule.nodes] * self.D).reshape(-1, self.D)  # [n^D, D]
        points = centre + half * nodes.unsqueeze(1)  # [n^D, M, D]
        log_f = self.log_density(row, points).T  # [M, n^D]
        log_f = log_f.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        if log_f.isposinf().any():
            raise FloatingPointError("the density is infinite at a point of the integration: it is unbounded there")
        self.evaluations.index_add_(0, row, torch.full_like(row, len(nodes)))
        self.best.scatter_reduce_(0, row, log_f.amax(1), "amax")
        rounding = _ROUNDING * self.eps * (1 + self.best.abs()).nan_to_num(posinf=0.0)
        self.tolerance = torch.maximum(self.tolerance, rounding)
        return self._measured(row, centre, half, face, log_f.unflatten(1, [len(self.rule.nodes)] * self.D))

    def _measured(
        self, row: Tensor, centre: Tensor, half: Tensor, face: Tensor, values: Tensor, slack: Tensor | None = None
    ) -> Cells:
        self.measured.index_add_(0, row, torch.ones_like(row))
        return Cells(row, centre, half, face, values, *measure(values, half, slack, self.rule))

    def round(self) -> None:
        """Finish converged data points; enlarge boxes; halve cells."""
        cells = self.cells
        value, error = self._total(cells.row, cells.log_mass), self._total(cells.row, cells.log_error)
        tail, grow = self._edges(value)
        aim = self.tolerance.log() - math.log(2) + value  # [N]; the other half is for mass beyond the box
        spent = (self.evaluations >= self.max_evaluations) | (self.measured >= _CELLS)
        present = torch.zeros_like(spent)
        present[cells.row] = True
        growing = present & (grow >= 0) & (self.grown < _GROWTH) & ~spent
        done = present & ~growing & ((error <= aim) | spent | (self.grown >= _GROWTH))

        count = torch.bincount(cells.row, minlength=len(value))
        worst = torch.full_like(value, -math.inf).scatter_reduce(0, cells.row, cells.log_error, "amax")
        least = torch.maximum(aim - math.log(4) - count.clamp_min(1).log(), worst - _BEHIND)
        chosen = (cells.log_error > least[cells.row]) & (error > aim)[cells.row] & ~(done | growing)[cells.row]
        tiny = (cells.half < 1e-13 * (1 + cells.centre.abs())).any(1)
        chosen &= ~tiny
        idle = present & ~growing & ~done
        idle[cells.row[chosen]] = False
        done |= idle  # no cell can be halved

        self.value = torch.where(done, value, self.value)
        rest = torch.logaddexp(error, tail) - value
        rounding = self.eps * 8 * (1 + value.abs())
        self.error = torch.where(done, rest.exp() + rounding, self.error)
        kept = ~done[cells.row]
        parts = [cells[kept & ~chosen], *self._halved(cells[kept & chosen])]
        self.cells = join([*parts, *self._grown(parts, growing.nonzero().flatten(), grow)])

    def _total(self, row: Tensor, logs: Tensor) -> Tensor:
        """Log of the sum of exponentials over the cells of each data point: [N]."""
        top = torch.full_like(self.value, -math.inf).scatter_reduce(0, row, logs, "amax")
        top = top.nan_to_num(neginf=0.0, posinf=math.inf)
        return torch.zeros_like(top).index_add(0, row, (logs - top[row]).exp()).log() + top

    def _edges(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the possible mass beyond the box, [N], and the face 2 d + side where it must grow, or -1, [N]."""
        cells = self.cells
        flux = on_faces(cells, self.rule) + (self.high - self.low).log()[cells.row].unsqueeze(-1)  # [M, D, 2]
        sums = [self._total(cells.row, flux[:, d, side]) for d in range(self.D) for side in range(2)]
        sure = cells.log_error < cells.log_mass
        flux = flux.masked_fill(~sure[:, None, None], -math.inf)
        trusted = [self._total(cells.row, flux[:, d, side]) for d in range(self.D) for side in range(2)]
        largest, where = torch.stack(trusted, 1).max(1)  # [N]
        open_end = largest - value > self.tolerance.log() - math.log(4 * len(sums))
        return torch.stack(sums, 1).logsumexp(1), torch.where(open_end, where, -1)

    def _halved(self, cells: Cells) -> list[Cells]:
        """Both halves of each of these cells: by the polynomial if it is accurate enough, else evaluated again."""
        if not len(cells):
            return []
        known = cells.mismatch <= _SHARE * self.tolerance[cells.row]
        result = []
        for upper in range(2):
            at = torch.arange(len(cells), device=cells.row.device)
            half, centre, face = cells.half.clone(), cells.centre.clone(), cells.face.clone()
            half[at, cells.split] /= 2
            centre[at, cells.split] += (2 * upper - 1) * half[at, cells.split]
            face[at, cells.split, 1 - upper] = False
            new = ~known
            if new.any():
                result.append(self._evaluated(cells.row[new], centre[new], half[new], face[new]))
            for d in range(self.D):
                (old,) = (known & (cells.split == d)).nonzero(as_tuple=True)
                if len(old):
                    same = torch.eye(len(self.rule.nodes), dtype=half.dtype, device=half.device)
                    matrices = [self.rule.halves[upper] if e == d else same for e in range(self.D)]
                    values = apply(cells.values[old], matrices)
                    part = (cells.row[old], centre[old], half[old], face[old], values, cells.mismatch[old])
                    result.append(self._measured(*part))
        return result

    def _grown(self, parts: list[Cells], rows: Tensor, grow: Tensor) -> list[Cells]:
        """A new cell beyond one face of each of these boxes, as wide as the box."""
        if not len(rows):
            return []
        d, side = grow[rows] // 2, grow[rows] % 2
        for part in parts:  # cells on that face are inside now
            inner = torch.isin(part.row, rows)
            at = inner.nonzero().flatten()
            part.face[at, grow[part.row[at]] // 2, grow[part.row[at]] % 2] = False
        low, high = self.low[rows].clone(), self.high[rows].clone()
        at = torch.arange(len(rows), device=rows.device)
        width = high[at, d] - low[at, d]
        ends = torch.where(side == 1, high[at, d], low[at, d] - width)
        low[at, d], high[at, d] = ends, ends + width
        self.low[rows], self.high[rows] = torch.minimum(self.low[rows], low), torch.maximum(self.high[rows], high)
        self.grown[rows] += 1
        face = torch.ones(len(rows), self.D, 2, dtype=torch.bool, device=rows.device)
        face[at, d, 1 - side] = False
        return [self._evaluated(rows, (low + high) / 2, (high - low) / 2, face)]
