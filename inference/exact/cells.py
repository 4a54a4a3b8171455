r"""Cells of adaptive integration: a polynomial through log f in each, its exponential's integral, what it may miss.

The logarithm, not the function, is approximated: by a polynomial P through the Chebyshev nodes of a cell, whose
exponential a Gauss-Legendre rule integrates at no further evaluation. A posterior of width 0.01 is a needle, but its
logarithm is nearly a parabola, which a few nodes see from far away. With Q the same polynomial less its two highest
degrees, and r <= 1 the ratio by which such differences fall from two degrees to the next two,

.. math::
    \int_c f \approx \int_c e^P, \qquad
    \epsilon_c = r \int_c \big| e^P - e^Q \big| + \sum_{i=1}^2 \Big| \int_c e^P - {\textstyle\int_c^{(i)}} e^P \Big|,

where the integrals of the sum are by two lower rules. Where P and Q differ by nats, or P bends by nats from one point
of the rule to the next, the error is what that leaves possible at the most: mass that nobody has seen yet.

References:
    Trefethen (2019), Approximation Theory and Approximation Practice, chapters 8 and 19.
"""

from __future__ import annotations

__all__ = ["NODES", "Cells", "Rule", "apply", "join", "measure", "on_faces", "rule_of"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

NODES = {1: 13, 2: 11, 3: 9}  # per dimension of a cell
_FINE = {1: (24, 22, 21), 2: (16, 14, 13), 3: (12, 10, 9)}  # per dimension, of the rule and of two to compare with
_CAUTION = 3.0  # how many times the difference of P and Q the logarithm may be off, where they differ much
_DECAY = 0.1  # by how much the difference of P to the function is less than that of P and Q, at the most
_BEND = 2.0  # nats of second difference between points of the rule, beyond which it may miss a peak
_ROUNDING = 1e-15  # what interpolation in float64 may be off, in units of the largest value
_AT_ONCE = 2**20  # points of the rule worked on at once


@dataclass
class Cells:
    """Cells of many data, side by side: M cells, n nodes per dimension, boxes in units of their data's scales.

    Attributes:
        row: the datum of each, [M].
        centre: [M, D].
        half: half the widths, [M, D].
        face: whether the lower and the upper end lie on the edge of the datum's box, [M, D, 2].
        values: log f at the nodes, [M, n, ..., n].
        log_mass: [M].
        log_error: [M].
        doubt: the largest difference of P and Q in the cell, in nats, [M].
        split: the dimension in which the cell is to be halved, [M].
    """

    row: Tensor
    centre: Tensor
    half: Tensor
    face: Tensor
    values: Tensor
    log_mass: Tensor
    log_error: Tensor
    doubt: Tensor
    split: Tensor

    def __getitem__(self, index: Tensor) -> Cells:
        return Cells(*(getattr(self, f.name)[index] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.row)


def join(parts: Sequence[Cells]) -> Cells:
    """Cells one after the other."""
    return Cells(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Cells)))


@dataclass(frozen=True, eq=False)
class Rule:
    """Matrices of one dimension, which act on the n values at the nodes in [-1, 1], and weights of D dimensions."""

    nodes: Tensor  # [n]
    full: Tensor  # [m, n], P at the points of the rule
    low: Tensor  # [m, n], Q there
    lower: Tensor  # [m, n], Q less two degrees more
    checks: tuple[tuple[Tensor, Tensor], ...]  # [m', n], P at the points of a lower rule, and its weights [m', ..., m']
    halves: Tensor  # [2, n, n], P at the nodes of the lower and of the upper half
    ends: Tensor  # [2, 1, n], P at -1 and at 1
    log_weights: Tensor  # [m, ..., m]
    face_log_weights: Tensor  # [m, ..., m], in one dimension less


@cache
def rule_of(dimension: int, device: torch.device) -> Rule:
    """The rule of cells of so many dimensions."""
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
        values = torch.tensordot(values, matrix, dims=([1], [1]))  # the new dimension goes last: they come round
    return values


def measure(values: Tensor, half: Tensor, slack: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mass, log error, doubt and the dimension to halve, [M] each, of cells with values [M, n, ..., n].

    With ``slack`` [M] the polynomial is that of a larger cell, off by so much: the values tell no more of its error.
    """
    size = max(1, _AT_ONCE // rule.log_weights.numel())
    slacks = [None] * len(values) if slack is None else slack.split(size)
    parts = [_measure(*part, rule) for part in zip(values.split(size), half.split(size), slacks, strict=False)]
    mass, error, doubt, split = (torch.cat(column) for column in zip(*parts, strict=True))
    return mass, error, doubt, split


def _measure(values: Tensor, half: Tensor, slack: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = half.shape[1]
    broken = values.isinf()  # log f = -inf at a node, or NaN, which arrives as -inf
    smooth = values.masked_fill(broken, 0.0) if (any_broken := bool(broken.any())) else values
    full = apply(smooth, [rule.full] * D)  # [M, m, ..., m]
    log_volume = half.log().sum(1)
    mass = _log_sum(full + rule.log_weights)
    bends = [_bend(full, d) for d in range(1, D + 1)]
    by_rule, split = _of_the_rule(full, bends, rule)
    for matrix, log_weights in rule.checks:  # two, since by chance one may agree
        by_rule = torch.logaddexp(by_rule, _log_difference(mass, _log_sum(apply(smooth, [matrix] * D) + log_weights)))
    if slack is None:
        by_gap, doubt, split_by_gap = _of_the_polynomial(smooth, full, rule)
        split = torch.where(by_gap > by_rule, split_by_gap, split)
    else:
        by_gap, doubt = mass + _log_expm1(slack), slack
    mass, error = mass + log_volume, torch.logaddexp(by_gap, by_rule) + log_volume
    if any_broken:  # no polynomial: the mean and the largest of the values
        some = broken.flatten(1).any(1)
        rough = _log_sum(values) + log_volume + D * math.log(2) - math.log(values[0].numel())
        worst = values.flatten(1).amax(1) + log_volume + D * math.log(2) + 1
        mass, error = torch.where(some, rough, mass), torch.where(some, worst, error)
        split = torch.where(some, half.argmax(1), split)
        doubt = doubt.masked_fill(some, math.inf)
    return mass, error, doubt, split


def _of_the_polynomial(values: Tensor, full: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the integral that P and Q differ by, their largest difference, the dimension that it comes from: [M]."""
    D = values.dim() - 1
    low = apply(values, [rule.low] * D)
    lower = apply(values, [rule.lower] * D)
    gap, before = (full - low).abs(), (low - lower).abs()
    decay = (gap.flatten(1).amax(1) / before.flatten(1).amax(1)).nan_to_num(nan=1.0).clamp(_DECAY, 1.0)
    rounding = _ROUNDING * values.flatten(1).abs().amax(1)
    gap = gap * decay.reshape(-1, *[1] * D) + rounding.reshape(-1, *[1] * D)
    possible = torch.maximum(full, low) + _log_expm1(_CAUTION * gap) - math.log(_CAUTION) + rule.log_weights
    weights = possible.flatten(1).softmax(1)
    scores = []
    for d in range(D):
        truncated = apply(values, [rule.low if e == d else rule.full for e in range(D)])
        scores.append(((full - truncated).abs().flatten(1) * weights).sum(1))
    return _log_sum(possible), gap.flatten(1).amax(1), torch.stack(scores, 1).argmax(1)


def _of_the_rule(full: Tensor, bends: list[Tensor], rule: Rule) -> tuple[Tensor, Tensor]:
    """Log of the integral of what P may rise to between points that lie too far apart, the dimension to blame: [M]."""
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
    """The second difference at each point along a dimension, without sign; at the ends that of the neighbour."""
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
    """Log of the integral of e^P over each face of each cell that lies on the edge of a box; else -inf: [M, D, 2]."""
    M, D = cells.half.shape
    found = cells.half.new_full((M, D, 2), -math.inf)
    for d in range(D):
        for side in range(2):
            (at,) = (cells.face[:, d, side] & cells.doubt.isfinite()).nonzero(as_tuple=True)
            if len(at):
                matrices = [rule.ends[side] if e == d else rule.full for e in range(D)]
                terms = apply(cells.values[at], matrices).squeeze(d + 1) + rule.face_log_weights
                area = cells.half[at].log().sum(1) - cells.half[at, d].log()
                found[at, d, side] = terms.reshape(len(at), -1).logsumexp(1) + area
    return found
