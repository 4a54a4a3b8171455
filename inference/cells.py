r"""Cells of adaptive integration: a polynomial through log f in each, the integral of its exponential, what it may miss.

The logarithm, not the function, is approximated: by a polynomial P through the Chebyshev nodes of a cell, whose exponential
a Gauss-Legendre rule integrates at no further evaluation. A posterior of width 0.01 is a needle, but its logarithm is
nearly a parabola, which a few nodes see from far away. With Q the same polynomial less its two highest degrees,

.. math::
    \int_c f \approx \int_c e^P, \qquad
    \epsilon_c = \int_c \big| e^P - e^Q \big| + \Big| \int_c e^P - \widetilde{\int_c} e^P \Big|,

where the second integral of the last term is by a lower rule. Where P and Q differ by nats, or P rises by nats from one
point of the rule to the next, the error is what that leaves possible at the most: mass that nobody has seen yet.
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

NODES = {1: 13, 2: 9, 3: 7}  # per dimension of a cell
_FINE = {1: (24, 17), 2: (16, 12), 3: (12, 9)}  # per dimension, of the rule and of the one it is compared with
_CAUTION = 3.0  # how many times the difference of P and Q the logarithm may be off, where they differ much
_STEP = 2.5  # nats from a point of the rule to the next, beyond which the rule may miss a peak
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
        slack: what the values may be off themselves, in nats, [M].
        log_mass: [M].
        log_error: [M].
        doubt: the largest difference of P and Q in the cell, and the slack, [M].
        split: the dimension in which the cell is to be halved, [M].
    """

    row: Tensor
    centre: Tensor
    half: Tensor
    face: Tensor
    values: Tensor
    slack: Tensor
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
    check: Tensor  # [m', n], P at the points of the lower rule
    halves: Tensor  # [2, n, n], P at the nodes of the lower and of the upper half
    ends: Tensor  # [2, 1, n], P at -1 and at 1
    log_weights: Tensor  # [m, ..., m]
    check_log_weights: Tensor  # [m', ..., m']
    face_log_weights: Tensor  # [m, ..., m], in one dimension less


@cache
def rule_of(dimension: int, device: torch.device) -> Rule:
    """The rule of cells of so many dimensions."""
    n, (m, m_check) = NODES[dimension], _FINE[dimension]
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
    rough, rough_weights = np.polynomial.legendre.leggauss(m_check)
    return Rule(
        torch.as_tensor(nodes, device=device),
        at(fine),
        at(fine, n - 2),
        at(rough),
        torch.stack([at((nodes - 1) / 2), at((nodes + 1) / 2)]),
        at(np.array([-1.0, 1.0])).unsqueeze(1),
        product(weights, dimension),
        product(rough_weights, dimension),
        product(weights, dimension - 1),
    )


def apply(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """One matrix for each dimension: [M, n, ..., n] to [M, m, ..., m]."""
    for matrix in matrices:
        values = torch.tensordot(values, matrix, dims=([1], [1]))  # the new dimension goes last: they come round
    return values


def measure(values: Tensor, half: Tensor, slack: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mass, log error, doubt and the dimension to halve, [M] each, of cells with values [M, n, ..., n]."""
    size = max(1, _AT_ONCE // rule.log_weights.numel())
    parts = [
        _measure(*part, rule) for part in zip(values.split(size), half.split(size), slack.split(size), strict=True)
    ]
    mass, error, doubt, split = (torch.cat(column) for column in zip(*parts, strict=True))
    return mass, error, doubt, split


def _measure(values: Tensor, half: Tensor, slack: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = half.shape[1]
    broken = values.isinf()  # log f = -inf at a node, or NaN, which arrives as -inf
    smooth = values.masked_fill(broken, 0.0) if (any_broken := bool(broken.any())) else values
    full = apply(smooth, [rule.full] * D)  # [M, m, ..., m]
    low = apply(smooth, [rule.low] * D)
    spread = slack.reshape(-1, *[1] * D)
    gap = (full - low).abs() + spread
    doubt = gap.flatten(1).amax(1)
    high = torch.maximum(full, low)
    log_volume = half.log().sum(1)

    def log_sum(terms: Tensor) -> Tensor:
        return terms.flatten(1).logsumexp(1)

    possible = high + _log_expm1(_CAUTION * gap) - math.log(_CAUTION) + rule.log_weights
    by_gap = log_sum(possible)
    steps = [_steps(full, d) for d in range(1, D + 1)]
    step = torch.stack(steps).sum(0)
    ahead = torch.where(step > _STEP, full + step, -math.inf) + rule.log_weights
    mass = log_sum(full + rule.log_weights)
    other = log_sum(apply(smooth, [rule.check] * D) + rule.check_log_weights)
    by_rule = torch.logaddexp(log_sum(ahead), _log_difference(mass, other))

    of_gap, of_rule = possible.flatten(1).softmax(1), (full + step + rule.log_weights).flatten(1).softmax(1)
    scores = []
    for d in range(D):
        truncated = apply(smooth, [rule.low if e == d else rule.full for e in range(D)])
        scores.append(
            torch.where(
                by_gap > by_rule,
                ((full - truncated).abs().flatten(1) * of_gap).sum(1),
                (steps[d].flatten(1) * of_rule).sum(1),
            )
        )
    split = torch.stack(scores, 1).argmax(1)
    mass, error = mass + log_volume, torch.logaddexp(by_gap, by_rule) + log_volume
    if any_broken:
        some = broken.flatten(1).any(1)
        rough = log_sum(values) + log_volume + D * math.log(2) - math.log(values[0].numel())
        worst = values.flatten(1).amax(1) + log_volume + D * math.log(2) + 1
        mass, error = torch.where(some, rough, mass), torch.where(some, worst, error)
        split = torch.where(some, half.argmax(1), split)
        doubt = doubt.masked_fill(some, math.inf)
    return mass, error, doubt, split


def _steps(values: Tensor, dim: int) -> Tensor:
    """The larger of the two differences of each point to its neighbours along a dimension."""
    difference = values.diff(dim=dim).abs()
    pad = torch.zeros_like(difference.narrow(dim, 0, 1))
    return torch.maximum(torch.cat([difference, pad], dim), torch.cat([pad, difference], dim))


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
