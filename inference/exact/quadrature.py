r"""Adaptive integration in one to three dimensions, of positive functions known by their logarithm.

A box about the centre is cut into a few cells. Those that may hold a share of the integral that is not known well
enough (:mod:`~jensen.inference.exact.cells` says what may be in them) are halved, across the dimension that is to
blame, until what all of them leave open is below the tolerance. Where the integrand does not die off towards the edge,
the box grows. Nothing is assumed of the place, the number or the shape of the peaks. Data go side by side, each with
its own cells.
"""

from __future__ import annotations

__all__ = ["LogDensity", "first_evaluations", "integrate"]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import NODES, Cells, Rule, apply, join, measure, on_faces, rule_of

LogDensity = Callable[[Tensor, Tensor], Tensor]
_GRID = {1: 8, 2: 3, 3: 2}  # cells per dimension to begin with
_BEHIND = 15.0  # nats by which a cell's error may lie behind the largest for it to be halved in the same round
_WIDTH = 6.0  # of the first box, either side of its centre
_GROWTH = 40  # times that a box may grow, each time by its own width
_CELLS = 2**16  # per datum: what memory is given to
_SHARE = 0.2  # of the tolerance: what a polynomial may be off for its cell not to be evaluated again
_ROUNDING = 32.0  # in units of eps log f: what is taken for rounding, and not pursued


class Integral(NamedTuple):
    """Log integrals [N], their errors in nats [N], and how often log f was evaluated for each [N]."""

    value: Tensor
    error: Tensor
    evaluations: Tensor


def first_evaluations(dimension: int) -> int:
    """How many evaluations per datum the first cells take."""
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
    r"""Log of the integral of f over R^D, for N data at once.

    Args:
        log_density: called with the data's indices [M] and points [K, M, D]; log f of each in float64, [K, M]. The
            points should be such that the bulk of f, or of what it is a factor of, lies about the origin, at scale 1.
        n: the number N of data.
        dimension: D, from 1 to 3.
        tolerance: what the logarithm of the integral may be off, in nats.
        max_evaluations: per datum.
        eps: the precision of log f.
        device: where points are made.

    Returns:
        The :class:`Integral`. Its error is infinite where the integrand does not die off.
    """
    rule = rule_of(dimension, torch.device("cpu") if device is None else torch.device(device))
    run = _Run(log_density, n, dimension, rule, tolerance, eps, max_evaluations)
    while len(run.cells):
        run.round()
    return Integral(run.value, run.error, run.evaluations)


class _Run:
    """The state of one integration: the cells of the data that are not done yet, and the results of the others."""

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
        """New cells, at whose nodes log f is evaluated."""
        nodes = torch.cartesian_prod(*[self.rule.nodes] * self.D).reshape(-1, self.D)  # [n^D, D]
        points = centre + half * nodes.unsqueeze(1)  # [n^D, M, D]
        found = self.log_density(row, points).T  # [M, n^D]
        found = found.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        if found.isposinf().any():
            raise FloatingPointError("the density is infinite at a point of the integration: it has no bound there")
        self.evaluations.index_add_(0, row, torch.full_like(row, len(nodes)))
        self.best.scatter_reduce_(0, row, found.amax(1), "amax")
        rounding = _ROUNDING * self.eps * (1 + self.best.abs()).nan_to_num(posinf=0.0)
        self.tolerance = torch.maximum(self.tolerance, rounding)
        return self._measured(row, centre, half, face, found.unflatten(1, [len(self.rule.nodes)] * self.D))

    def _measured(
        self, row: Tensor, centre: Tensor, half: Tensor, face: Tensor, values: Tensor, slack: Tensor | None = None
    ) -> Cells:
        self.measured.index_add_(0, row, torch.ones_like(row))
        return Cells(row, centre, half, face, values, *measure(values, half, slack, self.rule))

    def round(self) -> None:
        """Finish the data that are done; let boxes grow; halve cells."""
        cells = self.cells
        value, error = self._total(cells.row, cells.log_mass), self._total(cells.row, cells.log_error)
        tail, grow = self._edges(value)
        aim = self.tolerance.log() - math.log(2) + value  # [N]; the other half is for what lies beyond the box
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
        done |= idle  # nothing is left that could be halved

        self.value = torch.where(done, value, self.value)
        rest = torch.logaddexp(error, tail) - value
        rounding = self.eps * 8 * (1 + value.abs())
        self.error = torch.where(done, rest.exp() + rounding, self.error)
        kept = ~done[cells.row]
        parts = [cells[kept & ~chosen], *self._halved(cells[kept & chosen])]
        self.cells = join([*parts, *self._grown(parts, growing.nonzero().flatten(), grow)])

    def _total(self, row: Tensor, logs: Tensor) -> Tensor:
        """Log of the sum of exponentials over the cells of each datum: [N]."""
        top = torch.full_like(self.value, -math.inf).scatter_reduce(0, row, logs, "amax")
        top = top.nan_to_num(neginf=0.0, posinf=math.inf)
        return torch.zeros_like(top).index_add(0, row, (logs - top[row]).exp()).log() + top

    def _edges(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log of what may lie beyond the box, [N], and the face 2 d + side at which it is to grow, or -1, [N]."""
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
        """Both halves of each of these cells: by the polynomial where it is good enough, else evaluated anew."""
        if not len(cells):
            return []
        known = cells.doubt <= _SHARE * self.tolerance[cells.row]
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
                    part = (cells.row[old], centre[old], half[old], face[old], values, cells.doubt[old])
                    result.append(self._measured(*part))
        return result

    def _grown(self, parts: list[Cells], rows: Tensor, grow: Tensor) -> list[Cells]:
        """A new cell beyond one face of each of these boxes, as wide as the box."""
        if not len(rows):
            return []
        d, side = grow[rows] // 2, grow[rows] % 2
        for part in parts:  # what was on that face is inside now
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
