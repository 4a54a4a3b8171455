"""Newton's steps against known modes and Hessians."""

import math

import pytest
import torch

from jensen.kernel.newton import block_rows, climb, derivatives, find_modes, newton_step, slopes


def quadratic(n=7, features=3):
    """A Gaussian density for each data point; its precisions and means."""
    root = torch.randn(n, features, features)
    precision = root @ root.mT + torch.eye(features)
    mean = torch.randn(n, features)

    def log_density(u, precision, mean):
        away = u - mean
        return -0.5 * torch.einsum("cni,nij,cnj->cn", away, precision, away)

    return log_density, precision, mean


def functions(log_density, seen=None):
    """Gradients and derivatives of a density, which record the number of data points."""
    seen = {"slopes": 0, "hessians": 0} if seen is None else seen

    def up(u, *data):
        seen["slopes"] += u.shape[1]
        return slopes(log_density, u, *data)

    def second(u, *data):
        seen["hessians"] += len(u)
        return derivatives(log_density, u, *data)

    return up, second, seen


def test_derivatives_are_those_of_the_density(float64):
    log_density, precision, mean = quadratic()
    u = torch.randn(7, 3)
    value, slope, curvature = derivatives(log_density, u, precision, mean)
    torch.testing.assert_close(value, log_density(u[None], precision, mean)[0])
    torch.testing.assert_close(slope, torch.einsum("nij,nj->ni", precision, mean - u))
    torch.testing.assert_close(curvature, precision)


def test_a_density_that_does_not_depend_on_a_coordinate_has_no_slope_there(float64):
    value, slope, curvature = derivatives(lambda u: -u[..., 0].square() + 0 * u[..., 1].detach(), torch.ones(4, 2))
    assert value.eq(-1).all() and slope[:, 1].eq(0).all()
    torch.testing.assert_close(curvature, torch.diag(torch.tensor([2.0, 0.0])).expand(4, 2, 2))
    _, slope, curvature = derivatives(lambda u: u.sum(-1), torch.ones(4, 2))  # linear: no second derivative at all
    assert slope.eq(1).all() and curvature.eq(0).all()


class Stubborn(torch.autograd.Function):
    """A square that torch.vmap does not support."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u.square()

    @staticmethod
    def backward(ctx, slope):
        (u,) = ctx.saved_tensors
        if torch._C._functorch.is_batchedtensor(slope):
            raise RuntimeError("no batching rule")
        return 2 * u * slope


def test_hessians_without_batched_products_are_made_row_by_row(float64):
    u = torch.randn(4, 3)

    def log_density(u):
        return -(Stubborn.apply(u).sum(-1).square())

    squares = u.square().sum(-1)
    expected = 4 * squares[:, None, None] * torch.eye(3) + 8 * u[:, :, None] * u[:, None, :]
    torch.testing.assert_close(derivatives(log_density, u)[2], expected)


def test_a_gaussian_takes_one_step_and_two_hessians(float64):
    log_density, precision, mean = quadratic()
    up, second, seen = functions(log_density)
    found = find_modes(up, second, torch.zeros(7, 3), (precision, mean), 10, 1e-6)
    assert found.converged.all() and seen["hessians"] == 14
    torch.testing.assert_close(found.loc, mean)
    torch.testing.assert_close(found.curvature, precision)


def test_data_that_have_converged_are_left_alone(float64, monkeypatch):
    """Of 64 data points, one starts far from its mode; the others need two Hessians, as without it."""
    monkeypatch.setattr("jensen.kernel.newton._ROWS", 4)

    def log_density(u, shift):
        return -(1 + (u - shift).square()).log().sum(-1) - 0.01 * (u - shift).square().sum(-1)

    shift = torch.zeros(64, 2)
    up, second, near = functions(log_density)
    find_modes(up, second, torch.full((64, 2), 0.01), (shift,), 50, 1e-6)
    shift[5] = 60.0
    up, second, far = functions(log_density)
    found = find_modes(up, second, torch.full((64, 2), 0.01), (shift,), 50, 1e-6)
    assert found.converged.all()
    torch.testing.assert_close(found.loc, shift, atol=1e-4, rtol=0)
    assert near["hessians"] == 128 and 128 < far["hessians"] < 128 + 64


def test_blocks_are_alike_and_no_larger_than_they_may_be():
    assert [block_rows(n, 50) for n in (1, 40, 41, 250)] == [1, 40, 21, 36]
    assert block_rows(10, 10**6) == 1


def test_steps_away_from_a_saddle_go_uphill(float64):
    curvature = torch.diag(torch.tensor([2.0, -3.0])).expand(1, 2, 2)
    step, promise = newton_step(torch.tensor([[1.0, 1.0]]), curvature)
    torch.testing.assert_close(step, torch.tensor([[0.5, 1 / 3]]))
    assert float(promise) == pytest.approx((1 / 2 + 1 / 3) / 2)
    damped, _ = newton_step(torch.tensor([[1.0, 1.0]]), curvature, torch.ones(1))
    torch.testing.assert_close(damped, torch.tensor([[1 / 3, 1 / 4]]))


def test_a_climb_keeps_the_best_point():
    up, _, seen = functions(lambda u: torch.where(u.abs() < 1, -u.square(), math.nan).sum(-1))
    start = torch.full((1, 3, 1), 0.9)
    found = climb(up, start, (), 20)[0][0]
    assert found.abs().max() < 0.2 and seen["slopes"] == 60
    assert climb(up, start, (), 0)[0].eq(0.9).all()
