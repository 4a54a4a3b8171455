"""What every family must do, without a model."""

import itertools

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
def test_two_halves_make_the_whole(family, float64):
    built = family(3, 8)
    h = torch.randn(7, 8)
    direct, halves = built(h), built.distribution(built.project(h))
    y = direct.sample()
    assert torch.equal(direct.log_prob(y), halves.log_prob(y))
    assert built.project(h).shape == (7, built.size)


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


@pytest.mark.parametrize(
    ("scale", "size", "learned"), [(0.3, 3, 0), ("shared", 3, 1), ("diagonal", 3, 3), ("context", 6, 0)]
)
def test_four_scales(scale, size, learned):
    family = Gaussian(3, None, scale=scale)
    assert family.size == size
    assert sum(p.numel() for p in family.parameters()) == learned


def test_images_keep_their_shape():
    for family in (Gaussian((2, 3), 4), Gaussian((2, 3), 4, scale="context"), Bernoulli((2, 3), 4)):
        q = family(torch.randn(5, 4))
        assert q.event_shape == (2, 3)
        assert q.log_prob(q.sample()).shape == (5,)
