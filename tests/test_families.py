"""What every family must do, without a model."""

import itertools
import math

import pytest
import torch
from members import DENSITIES, FAMILIES

from jensen.families import Bernoulli, FullCovariance, Gaussian, MeanField

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
each_density = pytest.mark.parametrize("family", DENSITIES.values(), ids=DENSITIES.keys())


@each_family
@pytest.mark.parametrize("leading", [(), (7,), (3, 7)])
def test_shapes(family, leading):
    q = family(3, 8)(torch.randn(*leading, 8))
    assert q.batch_shape == leading
    assert q.event_shape == (3,)
    assert q.log_prob(q.sample()).shape == leading


@each_family
def test_parameters_are_affine_in_the_context(family, float64):
    built = family(3, 8)
    h, other = torch.randn(7, 8), torch.randn(7, 8)
    assert built.project(h).shape == (7, built.size)
    between = built.project(0.3 * h + 0.7 * other)
    torch.testing.assert_close(between, 0.3 * built.project(h) + 0.7 * built.project(other))


@each_family
def test_without_context_h_holds_the_parameters(family, float64):
    with_context, without = family(3, 8), family(3, None)
    without.load_state_dict({name: value for name, value in with_context.state_dict().items() if "affine" not in name})
    h = torch.randn(7, 8)
    q = with_context(h)
    y = q.sample()
    torch.testing.assert_close(without(with_context.project(h)).log_prob(y), q.log_prob(y))


@each_density
def test_integrates_to_one(family, float64):
    q = family(2, 4)(torch.randn(3, 4))
    half_width, n = 12.0, 600
    axis = torch.linspace(-half_width, half_width, n)
    grid = torch.cartesian_prod(axis, axis)  # [n^2, 2]
    mass = q.log_prob(grid.unsqueeze(1)).exp().sum(0) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-3, rtol=0)


def test_bernoulli_sums_to_one(float64):
    q = Bernoulli(5, 4)(torch.randn(3, 4))
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    torch.testing.assert_close(q.log_prob(states.unsqueeze(1)).exp().sum(0), torch.ones(3))


@each_family
def test_a_context_row_moves_its_own_row_only(family, float64):
    built = family(3, 8)
    h = torch.randn(7, 8)
    y = built(h).sample()
    other = h.clone()
    other[2] += 1.0
    moved = built(h).log_prob(y) != built(other).log_prob(y)
    assert moved.tolist() == [n == 2 for n in range(7)]


@each_family
def test_the_gradient_reaches_every_parameter(family):
    built = family(3, 8)
    h = torch.randn(7, 8)
    y = built(h).sample()
    built(h).log_prob(y).sum().backward()
    for name, p in built.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@each_density
def test_draws_are_reparameterized(family):
    built = family(3, 8)
    built(torch.randn(7, 8)).rsample().sum().backward()
    assert built.affine.weight.grad.abs().sum() > 0


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_large_contexts(family, dtype):
    q = family(3, 8).to(dtype)(1e3 * torch.randn(100, 8, dtype=dtype))
    y = q.sample()
    assert y.dtype == dtype
    assert q.log_prob(y).isfinite().all()


@each_family
def test_state_dict_round_trip(family):
    one, two = family(3, 8), family(3, 8)
    two.load_state_dict(one.state_dict())
    h = torch.randn(7, 8)
    y = one(h).sample()
    assert torch.equal(one(h).log_prob(y), two(h).log_prob(y))


def test_full_covariance_reaches_any_gaussian(float64):
    target = torch.distributions.MultivariateNormal(torch.randn(3), torch.eye(3) + 0.5)
    family = FullCovariance(3, None)
    scale = target.scale_tril.diagonal()
    lower = target.scale_tril / scale.unsqueeze(-1)
    raw = torch.log(torch.expm1(scale - 1e-6)) - torch.log(torch.expm1(torch.tensor(1.0)))
    below = lower[tuple(torch.tril_indices(3, 3, offset=-1))]
    q = family(torch.cat([target.loc, raw, below]))
    y = target.sample((10,))
    torch.testing.assert_close(q.log_prob(y), target.log_prob(y))


def test_mean_field_is_a_diagonal_gaussian(float64):
    q = MeanField(2, None)(torch.tensor([1.0, -2.0, 0.0, 0.0]))  # raw scale 0 is scale 1
    torch.testing.assert_close(q.mean, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(q.stddev, torch.ones(2), atol=1e-5, rtol=0)


def _raw(scale):
    """What softplus, shifted and floored, turns into this scale."""
    return torch.log(torch.expm1(scale - 1e-6)) - math.log(math.e - 1)


def test_a_fixed_scale_is_that_scale(float64):
    q = Gaussian(3, None, scale=0.3)(torch.randn(7, 3))
    torch.testing.assert_close(q.stddev, torch.full((7, 3), 0.3), rtol=1e-6, atol=0)
    assert list(Gaussian(3, None, scale=0.3).parameters()) == []


def test_a_shared_scale_is_one_learned_number(float64):
    family = Gaussian(3, None, scale="shared")
    torch.nn.init.constant_(family.raw_scale, _raw(torch.tensor(0.2)))
    torch.testing.assert_close(family(torch.randn(7, 3)).stddev, torch.full((7, 3), 0.2))
    assert sum(p.numel() for p in family.parameters()) == 1


def test_a_diagonal_scale_is_a_number_per_feature(float64):
    family = Gaussian(3, None, scale="diagonal")
    scales = torch.tensor([0.1, 1.0, 5.0])
    with torch.no_grad():
        family.raw_scale.copy_(_raw(scales))
    torch.testing.assert_close(family(torch.randn(7, 3)).stddev, scales.expand(7, 3))


def test_a_context_scale_is_read_behind_the_locations(float64):
    scales = torch.rand(7, 3) + 0.1
    loc = torch.randn(7, 3)
    q = Gaussian(3, None, scale="context")(torch.cat([loc, _raw(scales)], -1))
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, scales)


def test_full_covariance_remembers_its_draw_and_solves_for_others(float64):
    q = FullCovariance(4, 8)(torch.randn(7, 8)).expand([5, 7])
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_images_keep_their_shape():
    for family in (Gaussian((2, 3), 4), Gaussian((2, 3), 4, scale="context"), Bernoulli((2, 3), 4)):
        q = family(torch.randn(5, 4))
        assert q.event_shape == (2, 3)
        assert q.log_prob(q.sample()).shape == (5,)
