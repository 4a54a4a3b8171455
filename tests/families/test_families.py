"""The contract of every family, without a model."""

import itertools
import math

import pytest
import torch
from members import DENSITIES, DISCRETE, FAMILIES, FLOWS, NO_INVERSE
from torch.func import jacrev, vmap

from jensen.families import (
    IAF,
    Bernoulli,
    BinaryVector,
    FullCovariance,
    Gaussian,
    LowRank,
    MeanField,
    Mixture,
    NeuralSpline,
    StudentT,
    Sylvester,
)
from jensen.families.mixture import _Mixture
from jensen.families.splines import rational_quadratic


def _each(families):
    return pytest.mark.parametrize("family", families.values(), ids=families.keys())


each_family = _each(FAMILIES)
each_density = _each(DENSITIES)
each_flow = _each(FLOWS)
each_with_any_log_q = _each({name: f for name, f in DENSITIES.items() if name not in NO_INVERSE})


def draw(q, seed=0):
    torch.manual_seed(seed)
    return q.rsample() if q.has_rsample else q.sample()


@each_family
@pytest.mark.parametrize("leading", [(), (7,), (3, 7)])
def test_shapes(family, leading):
    q = family(3, 8)(torch.randn(*leading, 8))
    assert q.batch_shape == leading
    assert q.event_shape == (3,)
    assert q.log_prob(draw(q)).shape == leading


@each_family
def test_an_expanded_one_is_the_same(family, float64):
    q = family(3, 8)(torch.randn(7, 8))
    wide = q.expand([5, 7])
    y = draw(wide)
    assert (wide.batch_shape, y.shape, wide.log_prob(y).shape) == ((5, 7), (5, 7, 3), (5, 7))
    if family not in NO_INVERSE.values():
        torch.testing.assert_close(wide.log_prob(y), q.log_prob(y))


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
    other = without(with_context.project(h))
    torch.testing.assert_close(other.log_prob(draw(other)), q.log_prob(draw(q)))


@each_with_any_log_q
@torch.no_grad()
def test_integrates_to_one(family, float64):
    q = family(2, 4)(torch.randn(3, 4))
    t = torch.linspace(-7.0, 7.0, 240)
    axis, weight = t.sinh(), t.cosh() * (t[1] - t[0])  # dense in the middle, and wide enough for Student's tails
    grid = torch.cartesian_prod(axis, axis)  # [n^2, 2]
    mass = (q.log_prob(grid.unsqueeze(1)).exp() * torch.cartesian_prod(weight, weight).prod(-1, keepdim=True)).sum(0)
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-3, rtol=0)


@_each(NO_INVERSE)
def test_log_q_of_a_foreign_value_is_refused_where_there_is_none(family):
    q = family(2, 4)(torch.randn(3, 4))
    with pytest.raises(NotImplementedError, match="its own samples"):
        q.log_prob(torch.zeros(3, 2))
    with torch.no_grad():
        z = q.rsample()
    with pytest.raises(NotImplementedError, match="rsample"):  # the derivative at a fixed z is that of any value
        q.log_prob(z)


@each_flow
def test_the_declared_log_determinant_is_that_of_autograds_jacobian(family, float64):
    for features in (2, 5):
        q = family(features, 4)(torch.randn(1, 4)[0])
        noise = torch.cat([2 * torch.randn(50, features), 30 * torch.randn(2, features)])
        jacobian = vmap(jacrev(lambda e, q=q: q.push(e)[0]))(noise)
        torch.testing.assert_close(q.push(noise)[1], jacobian.det().abs().log(), atol=1e-8, rtol=0)


@each_flow
def test_log_q_of_a_draw_is_that_of_its_noise_minus_the_log_determinant(family, float64):
    q = family(3, 4)(torch.randn(7, 4)).expand([5, 7])
    z = draw(q)
    torch.manual_seed(0)
    noise = torch.randn(5, 7, 3)
    expected, log_det = q.push(noise)
    torch.testing.assert_close(z, expected)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    torch.testing.assert_close(q.log_prob(z), standard - log_det)


@each_with_any_log_q
def test_log_q_of_a_draw_is_that_of_the_same_value_as_a_stranger(family, float64):
    q = family(4, 8)(torch.randn(7, 8)).expand([5, 7])
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


@each_with_any_log_q
def test_the_gradient_of_log_q_at_a_value_that_was_sampled_is_the_score(family, float64):
    built = family(3, 8)
    q = built(torch.randn(7, 8))
    z = q.sample()
    slopes = [torch.autograd.grad(q.log_prob(y).sum(), built.parameters(), retain_graph=True) for y in (z, z.clone())]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("features", [1, 3])
@each_with_any_log_q
def test_pathwise_gradients_are_those_of_the_expectation(family, features, float64):
    """d/dlambda E[f(z)], by pathwise draws and by the score function, agree within their errors."""
    built = family(features, None)
    many = 10_000
    parameters = torch.randn(built.size).expand(many, -1).clone().requires_grad_()

    def f(z):
        return (torch.sin(z) + 0.3 * z).sum(-1)

    q = built.distribution(parameters)
    (pathwise,) = torch.autograd.grad(f(q.rsample()).sum(), parameters)  # [many, P]
    q = built.distribution(parameters)
    z = q.sample()
    (score,) = torch.autograd.grad(((f(z) - f(z).mean()) * q.log_prob(z)).sum(), parameters)
    difference = pathwise.mean(0) - score.mean(0)
    error = ((pathwise.var(0) + score.var(0)) / many).sqrt()
    assert (difference.abs() <= 5 * error + 1e-9).all()


@_each(DISCRETE)
def test_discrete_families_sum_to_one(family, float64):
    q = family(5, 4)(torch.randn(3, 4))
    states = torch.eye(5) if q.support.event_dim and "OneHot" in type(q).__name__ else _binary(5)
    torch.testing.assert_close(q.log_prob(states.unsqueeze(1)).exp().sum(0), torch.ones(3))


def _binary(features):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=features)))


@pytest.mark.parametrize("name", ["BinaryVector", "OneHotCategorical"])
def test_states_are_enumerated(name, float64):
    q = DISCRETE[name](4, 8)(torch.randn(7, 8))
    states = q.enumerate_support()
    assert states.shape == ((16, 7, 4) if name == "BinaryVector" else (4, 7, 4))
    assert q.enumerate_support(expand=False).shape == (len(states), 1, 4)
    torch.testing.assert_close(q.log_prob(states).exp().sum(0), torch.ones(7))
    assert q.expand([3, 7]).has_enumerate_support


def test_too_many_binary_features_are_not_enumerated():
    q = BinaryVector(17, None)(torch.zeros(17))
    with pytest.raises(NotImplementedError, match="at most 16"):
        q.enumerate_support()


@each_family
def test_a_context_row_moves_its_own_row_only(family, float64):
    built = family(3, 8)
    h = torch.randn(7, 8)
    other = h.clone()
    other[2] += 1.0
    y = draw(built(h)).detach().clone()
    drawn = []
    for context in (h, other):
        q = built(context)
        if family in NO_INVERSE.values():
            z = draw(q)
            drawn.append(torch.cat([z, q.log_prob(z).unsqueeze(-1)], -1))
        else:
            drawn.append(q.log_prob(y).unsqueeze(-1))
    assert (drawn[0] != drawn[1]).any(-1).tolist() == [n == 2 for n in range(7)]


@each_family
def test_the_gradient_reaches_every_parameter(family):
    built = family(3, 8)
    h = torch.randn(7, 8)
    q = built(h)
    z = draw(q)
    (q.log_prob(z).sum() + z.square().sum()).backward()
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
    y = draw(q)
    assert y.dtype == q.log_prob(y).dtype == dtype
    assert q.log_prob(y).isfinite().all()


@each_with_any_log_q
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_large_contexts_and_strangers(family, dtype):
    q = family(3, 8).to(dtype)(1e3 * torch.randn(100, 8, dtype=dtype))
    assert q.log_prob(draw(q).clone()).isfinite().all()


@each_family
def test_state_dict_round_trip(family):
    one, two = family(3, 8), family(3, 8)
    two.load_state_dict(one.state_dict())
    h = torch.randn(7, 8)
    a, b = one(h), two(h)
    assert torch.equal(a.log_prob(draw(a)), b.log_prob(draw(b)))


def test_full_covariance_reaches_any_gaussian(float64):
    target = torch.distributions.MultivariateNormal(torch.randn(3), torch.eye(3) + 0.5)
    family = FullCovariance(3, None)
    q = family(family.parameters_of(target.loc, target.scale_tril))
    y = target.sample((10,))
    torch.testing.assert_close(q.log_prob(y), target.log_prob(y))


@pytest.mark.parametrize("family", [MeanField(3, None), LowRank(3, None, rank=2), LowRank(3, None, rank=5)])
def test_a_member_near_a_gaussian_is_the_best_or_a_good_one(family, float64):
    """Slopes of KL(q || target) vanish for a diagonal one; one of low rank has less than half of that KL."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.5, 0.3, 1.5]])
    target = torch.distributions.MultivariateNormal(torch.randn(3), scale_tril=root)
    parameters = family.parameters_of(target.loc, target.scale_tril).requires_grad_()
    q = family(parameters)
    covariance = torch.diag(q.variance) if isinstance(family, MeanField) else _covariance(q)
    loc = q.mean if isinstance(family, MeanField) else q.loc
    kl = torch.distributions.kl_divergence(torch.distributions.MultivariateNormal(loc, covariance), target)
    if isinstance(family, MeanField):
        assert torch.autograd.grad(kl, parameters)[0].abs().max() < 1e-5
    else:
        assert float(kl.detach()) < 0.5 * float(_kl_of_mean_field(target))


def _covariance(q):
    scaled = q.scale.unsqueeze(-1) * q.factor
    return torch.diag(q.scale.square()) + scaled @ scaled.mT


def _kl_of_mean_field(target):
    q = MeanField(3, None)
    q = q(q.parameters_of(target.loc, target.scale_tril))
    return torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(q.mean, torch.diag(q.variance)), target
    )


def test_students_t_starts_at_the_diagonal_gaussian(float64):
    loc, root = torch.randn(3), torch.diag(torch.tensor([0.5, 1.0, 2.0]))
    family = StudentT(3, None)
    q = family(family.parameters_of(loc, root)).base_dist
    torch.testing.assert_close(q.loc, loc)
    torch.testing.assert_close(q.scale, root.diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(q.df, torch.full((3,), 30.0), rtol=1e-4, atol=0)
    assert StudentT(3, None, scale=0.7).reaches == "" and MeanField(3, None).reaches == "diagonal"
    with pytest.raises(NotImplementedError, match="IAF has no parameters_of"):
        IAF(3, None).parameters_of(loc, root)


def test_mean_field_is_a_diagonal_gaussian(float64):
    q = MeanField(2, None)(torch.tensor([1.0, -2.0, 0.0, 0.0]))  # raw scale 0 is scale 1
    torch.testing.assert_close(q.mean, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(q.stddev, torch.ones(2), atol=1e-5, rtol=0)


def _raw(scale):
    """The inverse of the shifted, floored softplus."""
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


def test_low_rank_is_the_gaussian_that_it_says(float64):
    family = LowRank(4, None, rank=2)
    parameters = torch.randn(7, family.size)
    q = family(parameters)
    loc, _, columns = parameters.split([4, 4, 8], -1)
    factor = columns.unflatten(-1, (2, 4)).mT
    inner = torch.eye(4) + factor @ factor.mT
    covariance = q.scale.unsqueeze(-1) * inner * q.scale.unsqueeze(-2)
    target = torch.distributions.MultivariateNormal(loc, covariance)
    z = q.expand([5, 7]).rsample()
    torch.testing.assert_close(q.log_prob(z), target.log_prob(z))
    many = q.rsample((200_000,))
    torch.testing.assert_close(many.mean(0), loc, atol=0.05, rtol=0.05)
    moments = torch.einsum("kni,knj->nij", many - loc, many - loc) / len(many)
    torch.testing.assert_close(moments, covariance, atol=0.2, rtol=0.05)


def test_low_rank_keeps_its_digits_in_float32():
    """Columns a million times the diagonal: the Woodbury form loses all digits, the sum of squares does not."""
    family = LowRank(8, None, rank=4)
    parameters = torch.randn(7, family.size, dtype=torch.float64)
    parameters[:, 16:] *= 1e6
    noise_sized = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        noise = torch.randn(7, 12, dtype=torch.float32)
        q = family.distribution(parameters.to(dtype))
        one, two = noise.to(dtype).split([8, 4], -1)
        noise_sized.append(q._log_density(torch.cat([one, -two], -1)).double())
    torch.testing.assert_close(*noise_sized, atol=1e-3, rtol=1e-5)


def test_student_t_is_torchs(float64):
    family = StudentT(3, None)
    parameters = torch.randn(7, 9)
    q = family(parameters)
    target = torch.distributions.StudentT(q.base_dist.df, parameters[:, :3], q.base_dist.scale)
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), target.log_prob(z).sum(-1))
    assert (q.base_dist.df > 1).all()
    torch.testing.assert_close(StudentT(2, None)(torch.zeros(6)).base_dist.df, torch.full((2,), 2.0), atol=1e-5, rtol=0)


def test_a_mixture_is_torchs(float64):
    for features in (1, 3):
        family = Mixture(features, None, components=4)
        parameters = torch.randn(7, family.size)
        q = family(parameters)
        logits, loc, _ = parameters.split([4, 4 * features, 4 * features], -1)
        components = torch.distributions.Normal(loc.unflatten(-1, (4, features)), q.scale)
        target = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits), torch.distributions.Independent(components, 1)
        )
        z = q.rsample((5,))
        torch.testing.assert_close(q.log_prob(z), target.log_prob(z))
        many = q.rsample((100_000,))
        assert ((many.mean(0) - target.mean).abs() < 5 * (target.variance / 100_000).sqrt()).all()


def test_a_spline_is_monotone_and_onto_its_box(float64):
    x = torch.linspace(-5, 5, 4001)
    y, log_slope = rational_quadratic(x, 3 * torch.randn(23).expand(4001, -1), bound=4.0)
    assert (y.diff() > 0).all()
    torch.testing.assert_close(y[x.abs() >= 4], x[x.abs() >= 4])
    rise = y.diff().log() - x.diff().log()
    middle = (log_slope[1:] + log_slope[:-1]) / 2
    assert (rise - middle)[1:-1].abs().median() < 1e-3


def test_a_flow_starts_close_to_its_gaussian(float64):
    for family in (IAF(4, 8), NeuralSpline(4, 8), NeuralSpline(4, 8, coupling=True)):
        q = family(torch.randn(7, 8))
        noise = torch.randn(50, 7, 4)
        y, _ = family.bend(noise, q.g)
        layers = len(family.networks)
        assert (y - (noise.flip(-1) if layers % 2 else noise)).abs().mean() < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(3, 8, rank=0), "rank of at least 1"),
        (lambda: StudentT(3, 8, df=-1.0), "df must be a positive number"),
        (lambda: Mixture(3, 8, components=0), "at least 1 component"),
        (lambda: NeuralSpline(3, 8, bins=1), "between 2 and 500 bins"),
        (lambda: Sylvester(3, 8, kind="diagonal"), "kind must be 'orthogonal'"),
        (lambda: Sylvester(3, 8, rank=4), "rank must lie between 1 and"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", DENSITIES)
def test_an_expanded_distribution_draws_anew_for_each(name):
    torch.manual_seed(0)
    q = DENSITIES[name](2, 16)(torch.zeros(1, 16)).expand((6,))
    z = q.rsample()
    assert z.shape == (6, 2)
    assert len(z.unique(dim=0)) == 6
    assert q.log_prob(z).shape == (6,)


def test_a_mixtures_gradient_survives_float32_where_components_are_far_apart():
    z, found = torch.tensor([1e-3, 5.002]), []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([0.3, -0.2], dtype=dtype, requires_grad=True)
        loc = torch.tensor([[0.0, 0.0], [2e-3, 5.0]], dtype=dtype)
        q = _Mixture(logits, loc, torch.full((2, 2), 1e-3, dtype=dtype))
        found.append(torch.autograd.grad(q._attached(z.to(dtype))[0], logits)[0].double())
    assert torch.allclose(*found, rtol=1e-3)
    assert found[1].abs().min() > 1e-5
