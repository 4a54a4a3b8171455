r"""The mode of each data point's density and its curvature: gradient steps, then Newton's method.

.. math:: \hat u_n = \arg\max_u f_n(u), \qquad H_n = -\nabla^2 f_n(\hat u_n)

A Hessian costs as much as many gradients, so one serves for several steps: each step corrects it from the observed
gradients (BFGS), and steps continue while each promises much less than the last one. The rows of a Hessian are one
batched product (the derivative of a gradient, in D directions at once). Converged data points are no longer
processed; the others run in blocks of one size, which share a graph.

References:
    Nocedal and Wright (2006), Numerical Optimization, second edition, sections 3.4 and 6.1.
"""

from __future__ import annotations

__all__ = ["Modes", "block_rows", "climb", "derivatives", "find_modes", "in_blocks", "newton_step", "raised", "slopes"]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 2048  # (data point, direction) combinations at once
_STEPS = 12  # with one Hessian
_SHRINKS = 1.5  # a step must promise less than the last one by this factor to keep its Hessian

Density = Callable[..., Tensor]  # of points [C, N, D] and data: [C, N]
Function = Callable[..., tuple[Tensor, ...]]


class Modes(NamedTuple):
    """The result of a search: points [N, D], negative Hessians there [N, D, D], whether each has converged [N]."""

    loc: Tensor
    curvature: Tensor
    converged: Tensor


def slopes(log_density: Density, u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density [C, N] and gradient [C, N, D] at points [C, N, D]."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = log_density(u, *data)
        (slope,) = torch.autograd.grad((torch.where(value.isfinite(), value, 0.0) + 0 * u.sum(-1)).sum(), u)
    return value.detach(), slope.nan_to_num(0.0, 0.0, 0.0)


def derivatives(log_density: Density, u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density [N], gradient [N, D] and negative Hessian [N, D, D] at points [N, D]."""
    n, features = u.shape
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = log_density(u.unsqueeze(0), *data)[0]
        (slope,) = torch.autograd.grad(value.sum() + 0 * u.sum(), u, create_graph=True)
        slope = slope + 0 * u  # in case it does not depend on u
        directions = torch.eye(features, dtype=u.dtype, device=u.device).unsqueeze(1).expand(features, n, features)
        try:
            (rows,) = torch.autograd.grad(slope, u, directions, is_grads_batched=True, retain_graph=True)
        except RuntimeError:  # an operation that torch.vmap does not support
            rows = torch.stack([torch.autograd.grad(slope, u, one, retain_graph=True)[0] for one in directions])
    slope, curvature = (t.detach().nan_to_num(0.0, 0.0, 0.0) for t in (slope, -rows.transpose(0, 1)))
    return value.detach(), slope, (curvature + curvature.mT) / 2


def block_rows(n: int, features: int) -> int:
    """The number of the N data points, with D coordinates each, per block: Hessians in flat memory, equal blocks."""
    blocks = math.ceil(n / max(1, _ROWS // features))
    return math.ceil(n / blocks)


def climb(uphill: Function, u: Tensor, data: tuple[Tensor, ...], steps: int, lr: float = 0.3) -> tuple[Tensor, Tensor]:
    """The best points [C, N, D] on an ascent by Adam, and their log-densities [C, N].

    Without steps: the start, with log-densities of minus infinity.

    Args:
        uphill: :func:`slopes` of a density.
        u: the start, [C, N, D].
        data: the data.
        steps: the number of steps.
        lr: the size of the first step, in the units of u; the last one is a tenth of it.
    """
    u = u.detach()
    v = u.clone()
    optimizer = torch.optim.Adam([v], lr=lr, betas=(0.9, 0.95))
    best, at = u.new_full(u.shape[:2], -math.inf), u
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / steps)
        value, slope = uphill(v, *data)
        higher = value > best
        best, at = torch.where(higher, value, best), torch.where(higher.unsqueeze(-1), v, at)
        v.grad = -slope
        optimizer.step()
    return at, best


def find_modes(
    uphill: Function, second: Function, u: Tensor, data: tuple[Tensor, ...], iterations: int, tolerance: float
) -> Modes:
    """Newton's method with a separate damping for each data point.

    Args:
        uphill: :func:`slopes` of a density.
        second: :func:`derivatives` of it. Both are called with blocks of :func:`block_rows` rows, and with all rows.
        u: the start, [N, D].
        data: the data.
        iterations: the maximal number of Hessians per data point, without the one at its end.
        tolerance: a data point has converged when a full step, with the Hessian at its point, promises less.
    """
    size = block_rows(*u.shape)
    u, damping = u.clone(), u.new_zeros(len(u))
    curvature = u.new_zeros(*u.shape, u.shape[-1])
    converged = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    rows = torch.arange(len(u), device=u.device)
    moved = []  # so far that the curvature has changed
    for iteration in range(iterations + 1):
        value, slope, curvature[rows] = in_blocks(second, size, u[rows], data, rows)
        step, promise = newton_step(slope, curvature[rows])
        done = promise < tolerance
        converged[rows[done]] = True
        u[rows[done]] += step[done]
        moved.append(rows[done & (promise > max(1e-4 * tolerance, torch.finfo(u.dtype).eps))])
        rows, value, slope = rows[~done], value[~done], slope[~done]
        if iteration == iterations or not len(rows):
            break
        _with_one_hessian(uphill, size, u, data, rows, value, slope, curvature[rows], damping, tolerance)
    if len(rows := torch.cat(moved)):
        curvature[rows] = in_blocks(second, size, u[rows], data, rows)[2]
    return Modes(u, curvature, converged)


def _with_one_hessian(
    uphill: Function,
    size: int,
    u: Tensor,
    data: tuple[Tensor, ...],
    rows: Tensor,
    value: Tensor,
    slope: Tensor,
    curvature: Tensor,
    damping: Tensor,
    tolerance: float,
) -> None:
    """Move u and damping of some rows, by steps with their current Hessian."""
    rounding = 8 * torch.finfo(u.dtype).eps
    step, promise = newton_step(slope, curvature, damping[rows])
    for _ in range(_STEPS):
        trial, there = (t[0] for t in in_blocks(uphill, size, (u[rows] + step).unsqueeze(0), data, rows, dim=1))
        better = trial.isfinite() & ((trial >= value - rounding * value.abs()) | ~value.isfinite())
        u[rows] = torch.where(better.unsqueeze(-1), u[rows] + step, u[rows])
        curvature = torch.where(better[:, None, None], _corrected(curvature, step, slope - there), curvature)
        value, slope = torch.where(better, trial, value), torch.where(better.unsqueeze(-1), there, slope)
        usual = curvature.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
        raised = torch.maximum(8 * damping[rows], 0.3 * usual).clamp(1e-8, 1e8)
        lowered = torch.where(damping[rows] > 1e-3 * usual, damping[rows] / 8, 0.0)
        damping[rows] = torch.where(better, lowered, raised)
        step, now = newton_step(slope, curvature, damping[rows])
        on = (~better | (now < promise / _SHRINKS)) & (now > 1e-6 * tolerance)
        if not bool(on.any()):
            return
        rows, value, slope, curvature, step, promise = (t[on] for t in (rows, value, slope, curvature, step, now))


def _corrected(curvature: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Negative Hessians [N, D, D], corrected by the change of gradients along usable steps, [N, D] each."""
    met = (curvature @ step.unsqueeze(-1)).squeeze(-1)
    expected, seen = (met * step).sum(-1), (change * step).sum(-1)
    usable = (expected > 0) & (seen > 0.01 * expected) & (seen < 100 * expected)
    update = change.unsqueeze(-1) * change.unsqueeze(-2) / seen[:, None, None]
    update = update - met.unsqueeze(-1) * met.unsqueeze(-2) / expected[:, None, None]
    return torch.where(usable[:, None, None], curvature + update, curvature)


def newton_step(slope: Tensor, curvature: Tensor, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A damped step uphill [N, D], and the gain in nats that the full step promises [N].

    Args:
        slope: the gradient, [N, D].
        curvature: the negative Hessian, [N, D, D]; if not positive, the absolute values of its eigenvalues are used.
        damping: the value added to them, [N].
    """
    damped = (
        curvature
        if damping is None
        else curvature
        + damping[:, None, None] * torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    )
    (whole, good), (lower, _) = _roots(curvature), _roots(damped)
    along = torch.linalg.solve_triangular(whole, slope.unsqueeze(-1), upper=False).squeeze(-1)
    step, promise = torch.cholesky_solve(slope.unsqueeze(-1), lower).squeeze(-1), along.square().sum(-1) / 2
    bad = (~good).nonzero().flatten()
    if len(bad):
        eigenvalues, vectors = torch.linalg.eigh(curvature[bad])
        along = (vectors.mT @ slope[bad].unsqueeze(-1)).squeeze(-1)
        sizes = eigenvalues.abs().clamp_min(1e-6)
        shorter = sizes if damping is None else sizes + damping[bad].unsqueeze(-1)
        step[bad] = (vectors @ (along / shorter).unsqueeze(-1)).squeeze(-1)
        promise[bad] = (along.square() / sizes).sum(-1) / 2
    return step, promise


def raised(curvature: Tensor, least: float = 1e-3) -> tuple[Tensor, int]:
    """Curvatures with eigenvalues of at least ``least`` and 10 roundings; and how many had a smaller one."""
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    rounding = 10 * torch.finfo(curvature.dtype).eps
    floor = (rounding * curvature.abs().sum(-1).amax(-1)).clamp_min(least)  # such a sum bounds every eigenvalue
    _, info = torch.linalg.cholesky_ex(curvature - floor[:, None, None] * eye)
    low = (info != 0).nonzero().flatten()
    if not len(low):
        return curvature, 0
    eigenvalues, vectors = torch.linalg.eigh(curvature[low])
    floor = (rounding * eigenvalues[:, -1:]).clamp_min(least)
    lift = (floor - eigenvalues).clamp_min(0.0)
    higher = curvature.clone()
    higher[low] += (vectors * lift.unsqueeze(-2)) @ vectors.mT
    return higher, int((eigenvalues[:, :1] < floor).sum())


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors [N, D, D]; and whether a matrix is positive, beyond rounding: [N]."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    sizes = lower.diagonal(dim1=-2, dim2=-1).square()  # [N, D]
    good = (
        (info == 0) & (sizes.amin(-1) > 100 * torch.finfo(matrix.dtype).eps * sizes.amax(-1)) & (sizes.amin(-1) > 1e-6)
    )
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(good[:, None, None], lower, eye), good


def in_blocks(
    fn: Function, size: int, u: Tensor, data: tuple[Tensor, ...], rows: Tensor, dim: int = 0
) -> tuple[Tensor, ...]:
    """Run a function on rows of the data (u holds only these) in blocks of one size, the last one padded."""
    n = u.shape[dim]
    parts = []
    for first in range(0, n, size):
        at = torch.arange(first, first + size, device=u.device).clamp_max(n - 1)
        here = rows[at]
        out = fn(u.index_select(dim, at), *(x.index_select(0, here.to(x.device)) for x in data))
        left = min(size, n - first)
        parts.append([t.narrow(dim, 0, left) for t in out])
    return tuple(torch.cat(pieces, dim) for pieces in zip(*parts, strict=True))
