"""Guides over several sites, constrained sites and discrete ones, against hand computation and known answers."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from hierarchies import (
    CONJUGATE,
    DISCRETE_LATENTS,
    DirichletCounts,
    Discrete,
    DiscreteThenNormal,
    GammaPoisson,
    Levels,
    TwoLevels,
    best_mean_field_gap,
)
from members import NO_INVERSE, POSTERIORS
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from jensen.families import Delta, FullCovariance, MeanField
from jensen.families.base import raw_of
from jensen.guides import Amortized, Constrained, Joint, Laplace, Through, amortize
from jensen.guides.members import site_transform
from jensen.inference import evaluate as with_refined
from jensen.inference import fit, log_joint, log_weights, terms
from jensen.kernel.weights import Pair
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

N, K, H = 6, 5, 8


def simulated(model, n=N):
    with torch.no_grad():
        return model(n=n)


# chains


def _chain(model):
    """Sampled from the bottom up, in the opposite order of the model."""
    families = {"low": FullCovariance(3, H), "top": Through(mlp(H + 3, [7]), MeanField(2, 7))}
    return Amortized(mlp(4, [H]), families)


def test_the_log_weights_of_a_chain_are_those_computed_by_hand(float64):
    model = TwoLevels()
    x, guide = simulated(model), _chain(model)
    t = terms(model, guide, x, particles=K)
    low, top = t.values["low"], t.values["top"]
    assert (low.shape, top.shape) == ((K, N, 3), (K, N, 2))

    h = guide.encoder(x)
    own = guide.families["top"]
    parameters = own.family.affine(own.network(torch.cat([h.expand(K, N, H), low], -1)))
    loc, scale = parameters[..., :2], nn.functional.softplus(parameters[..., 2:] + math.log(math.e - 1)) + 1e-6
    q_low = guide.families["low"](h)
    q_low = dist.MultivariateNormal(q_low.loc, q_low.covariance_matrix)
    log_q = q_low.log_prob(low) + torch.distributions.Normal(loc, scale).log_prob(top).sum(-1)
    mean, cov = model.prior()
    log_p = dist.MultivariateNormal(mean, cov).log_prob(torch.cat([top, low], -1))
    log_p = log_p + torch.distributions.Normal(low @ model.B.T + model.b, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(t.log_weights, log_p - log_q)
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=K)
    torch.manual_seed(1)
    torch.testing.assert_close(log_w, terms(model, guide, x, particles=K).log_weights)


def test_a_chain_draws_its_sites_in_the_given_order_and_runs_its_encoder_once(float64):
    model = TwoLevels()
    x, guide = simulated(model), _chain(model)
    seen = []
    for part in (guide.encoder, *guide.families.values()):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    sites = poutine.trace(guide).get_trace(x).stochastic_nodes
    assert sites == ["data", "low", "top"]
    assert seen == [(N, 4), (N, H), (N, H + 3)]
    proved = Pair(model, guide, 1)
    proved.log_weights((x,), K)  # also runs single particles, to check the way of running many
    del seen[:]
    proved.log_weights((x,), K)
    assert seen == [(N, 4), (N, H), (K, N, H + 3)]


def test_later_sites_read_the_values_drawn(float64):
    """The site top depends on low, not only on the encoder's output."""
    model = TwoLevels()
    x, guide = simulated(model), _chain(model)
    means = []
    for shift in (0.0, 1.0):
        at = poutine.condition(guide, data={"low": torch.full((N, 3), shift)})
        means.append(poutine.trace(at).get_trace(x).nodes["top"]["fn"].mean)
    assert ((means[0] - means[1]).abs() > 1e-3).all()


@pytest.mark.parametrize("family", [MeanField, FullCovariance])
def test_amortize_serves_scalars_matrices_and_vectors(family, float64):
    model = Levels()
    x = simulated(model)
    guide = amortize(model, mlp(4, [H]), family, context=H)
    t = terms(model, guide, x, particles=K)
    s, m, v = (t.values[site] for site in ("s", "m", "v"))
    assert [value.shape for value in (s, m, v)] == [(K, N), (K, N, 2, 3), (K, N, 4)]
    h = guide.encoder(x).expand(K, N, H)
    contexts = {"s": h, "m": torch.cat([h, s.unsqueeze(-1)], -1)}
    contexts["v"] = torch.cat([contexts["m"], m.flatten(-2)], -1)
    flat = {"s": s.unsqueeze(-1), "m": m.flatten(-2), "v": v}
    for site, member in guide.families.items():
        plain = member if site == "v" else member.family
        torch.testing.assert_close(t.log_q[site], plain(contexts[site]).log_prob(flat[site].clone()))
    torch.testing.assert_close(log_joint(model, {"s": s, "m": m, "v": v}, x), sum(t.log_p.values()))


def test_a_network_may_stand_inside_or_outside_of_a_constraint(float64):
    h = torch.randn(N, H)
    network, family = mlp(H, [7]), MeanField(2, 7)
    inside = Constrained(Through(network, family), constraints.positive)
    outside = Through(network, Constrained(family, constraints.positive))
    z = inside(h).rsample()
    torch.testing.assert_close(inside(h).log_prob(z), outside(h).log_prob(z))
    model = TwoLevels()
    guide = Joint(mlp(4, [H]), Through(mlp(H, [7]), FullCovariance(5, 7)), model.latents)
    assert log_weights(model, guide, simulated(model), particles=K).isfinite().all()


# joint guides


class Exact(nn.Module):
    """An encoder that returns the exact posterior's parameters."""

    def __init__(self, model, family):
        super().__init__()
        self.model, self.family = (model,), family

    def forward(self, x):
        mean, precision = self.model[0].posterior(x)
        return self.family.parameters_of(mean, torch.linalg.cholesky(precision.inverse()).expand(len(x), 5, 5))


def test_a_joint_gaussian_reaches_the_exact_posterior_of_two_levels(float64):
    model = TwoLevels()
    x = simulated(model)
    family = FullCovariance(5, None)
    guide = Joint(Exact(model, family), family, model.latents)
    log_w = log_weights(model, guide, x, particles=50)
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(50, N), rtol=0, atol=1e-10)


def test_a_mean_field_chain_loses_exactly_what_its_levels_correlate(float64):
    """The chain's optimum is known: means of the exact conditionals, diagonals of their precisions."""
    model = TwoLevels()
    x = simulated(model)
    with torch.no_grad():
        guide = Amortized(nn.Identity(), {"low": MeanField(3, 4), "top": MeanField(2, 7)})
        _, precision = model.posterior(x)
        of_low = precision.inverse()[2:, 2:].inverse()  # of p(low | x)
        of_top = precision[:2, :2]  # of p(top | low, x)
        low, top = guide.families["low"].affine, guide.families["top"].affine
        for layer in (low, top):
            layer.weight.zero_()
        origin = model.posterior(torch.zeros(1, 4))[0][0]
        low.bias.copy_(torch.cat([origin[2:], raw_of(of_low.diagonal().rsqrt())]))
        low.weight[:3] = (model.posterior(torch.eye(4))[0] - origin)[:, 2:].T
        gain = torch.linalg.solve(of_top, -precision[:2, 2:])  # E[top | low] is affine in low
        top.weight[:2, 4:] = gain
        top.bias.copy_(torch.cat([-gain @ model.a, raw_of(of_top.diagonal().rsqrt())]))
    gap = best_mean_field_gap(of_low) + best_mean_field_gap(of_top)
    assert gap > 0.1
    evidence = evaluate(model, guide, x, 4000, seed=0, progress=False)
    torch.testing.assert_close(evidence.exact, model.log_evidence(x))
    assert ((evidence.gap - gap).abs() < 4 * evidence.elbo_error).all()


def test_a_joint_guide_is_the_density_of_its_pieces(float64):
    """The weights are those of a distribution over the sites: log q(joint) minus the log-determinants of the maps."""
    model = DirichletCounts()
    x = simulated(model)
    guide = amortize(model, mlp(3, [H]), FullCovariance, H, constraints=model.constraints, joint=True)
    t = terms(model, guide, x, particles=K)
    assert set(t.log_q) == {"joint", "z"}
    chain = Constrained(guide.family, constraints.simplex, (3,))
    expected = chain(guide.encoder(x)).log_prob(t.values["z"].clone())
    torch.testing.assert_close(sum(t.log_q.values()), expected)
    torch.testing.assert_close(t.log_weights, sum(t.log_p.values()) - expected)


def test_what_makes_no_sense_is_named():
    model = TwoLevels()
    with pytest.raises(ValueError, match=r"the sites \['top', 'low'\] have 5 unconstrained .* family has 4 features"):
        Joint(mlp(4, [H]), FullCovariance(4, H), model.latents)
    for joint in (False, True):
        with pytest.raises(ValueError, match=r"which are \['top', 'low'\], but got \['lwo'\]"):
            amortize(model, mlp(4, [H]), MeanField, H, constraints={"lwo": constraints.positive}, joint=joint)
    with pytest.raises(ValueError, match=r"constraints must name latent sites, .* got \['z'\]"):
        Laplace(model, constraints={"z": constraints.positive})
    with pytest.raises(ValueError, match=r"event shape \[3\] under Simplex\(\) has 2 .* the family has 3 features"):
        Constrained(MeanField(3, H), constraints.simplex)
    with pytest.raises(ValueError, match="needs at least one latent site"):
        Amortized(mlp(4, [H]), {})
    with pytest.raises(TypeError, match=r"but Linear has no attribute latents: .* self\.latents = \{'z': \(8,\)\}"):
        amortize(nn.Linear(4, 4), mlp(4, [H]), MeanField, H)


# constrained sites

SUPPORTS = {
    "positive": (constraints.positive, (1,)),
    "interval": (constraints.interval(-1.0, 2.0), (1,)),
    "simplex of two": (constraints.simplex, (2,)),
    "scalar": (constraints.positive, ()),
    "positive pair": (constraints.positive, (2,)),
    "simplex of three": (constraints.simplex, (3,)),
    "matrix": (constraints.greater_than(0.5), (2, 1)),
}
each_support = pytest.mark.parametrize(("support", "shape"), SUPPORTS.values(), ids=SUPPORTS.keys())
INVERTIBLE = {name: family for name, family in POSTERIORS.items() if name not in NO_INVERSE}


def _constrained(family, support, shape, context=H):
    features = site_transform(shape, support).inverse_shape(torch.Size(shape)).numel()
    return Constrained(family(features, context), support, shape)


def _grid(support, shape):
    """Points of the support [P, *shape], and the volume of each (in a simplex's first coordinates)."""
    if support is constraints.simplex:
        t = torch.linspace(-14.0, 14.0, 500 if shape == (3,) else 3000)
        axes, width = t.sigmoid(), t.sigmoid() * (-t).sigmoid() * (t[1] - t[0])
        if shape == (2,):
            return torch.stack([axes, 1 - axes], -1), width
        one, two = torch.meshgrid(axes, axes, indexing="ij")  # a first part, then a share of the rest
        volume = torch.outer(width, width) * (1 - one)
        return torch.stack([one, (1 - one) * two, (1 - one) * (1 - two)], -1).reshape(-1, 3), volume.flatten()
    t = torch.linspace(-14.0, 14.0, 400 if math.prod(shape) == 2 else 3000)
    if support is SUPPORTS["interval"][0]:
        axis, width = -1 + 3 * t.sigmoid(), 3 * t.sigmoid() * (-t).sigmoid()
    else:
        axis, width = t.exp() + (0.5 if shape == (2, 1) else 0.0), t.exp()
    points = torch.cartesian_prod(*[axis] * math.prod(shape))
    volume = torch.cartesian_prod(*[width * (t[1] - t[0])] * math.prod(shape))
    return points.reshape(-1, *shape), volume.reshape(len(points), -1).prod(-1)


@each_support
@pytest.mark.parametrize("family", ["MeanField", "FullCovariance", "Mixture", "IAF"])
@torch.no_grad()
def test_constrained_densities_integrate_to_one(family, support, shape, float64):
    q = _constrained(POSTERIORS[family], support, shape)(torch.randn(3, H))
    points, volume = _grid(support, shape)
    mass = (q.log_prob(points.unsqueeze(1)).exp() * volume.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(mass, torch.ones(3), atol=2e-3, rtol=0)


@each_support
@pytest.mark.parametrize("family", POSTERIORS.values(), ids=POSTERIORS.keys())
def test_constrained_draws_lie_in_the_support_and_reach_every_parameter(family, support, shape):
    member = _constrained(family, support, shape)
    q = member(torch.randn(N, H)).expand([K, N])
    z = q.rsample()
    assert (z.shape, q.batch_shape, q.event_shape) == ((K, N, *shape), (K, N), shape)
    assert support.check(z).all()
    assert q.log_prob(z).shape == (K, N)
    (q.log_prob(z).square().sum() + z.square().sum()).backward()
    features = member.features
    for name, p in member.named_parameters():
        if features > 1 or "networks" not in name:  # a single feature has no preceding features
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@each_support
@pytest.mark.parametrize("family", INVERTIBLE.values(), ids=INVERTIBLE.keys())
def test_constrained_log_q_of_a_draw_is_that_of_a_stranger_and_of_a_change_of_variables(
    family, support, shape, float64
):
    member = _constrained(family, support, shape)
    parameters = member.project(torch.randn(N, H))
    base, q = member.family.distribution(parameters), member.distribution(parameters)
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    transform = site_transform(shape, support)
    u = transform.inv(z.detach())
    free = len(u[0])
    for n in range(N):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v).flatten()[:free], u[n].clone())
        expected = base.log_prob(u)[n] - jacobian.det().abs().log()
        torch.testing.assert_close(q.log_prob(z.clone())[n], expected)


@pytest.mark.parametrize("make", CONJUGATE.values(), ids=CONJUGATE.keys())
@pytest.mark.parametrize("kind", ["chain", "joint", "Laplace"])
def test_evidence_of_conjugate_models(make, kind, float64):
    model = make()
    x = simulated(model, 12)
    if kind == "Laplace":
        guide = Laplace(model, constraints=model.constraints)
    else:
        encoder = mlp(x.shape[1], [H])
        guide = amortize(model, encoder, FullCovariance, H, constraints=model.constraints, joint=kind == "joint")
        fit(model, guide, x, epochs=80, lr=3e-2, seed=0, progress=False)
    evidence = evaluate(model, guide, x, 4000, seed=0, progress=False)
    torch.testing.assert_close(evidence.exact, model.log_evidence(x))
    assert ((evidence.log_evidence - evidence.exact).abs() < 4 * evidence.standard_error).all()
    assert evidence.standard_error.median() < 0.05
    assert (evidence.elbo < evidence.exact + 4 * evidence.elbo_error).all()


@pytest.mark.parametrize("make", CONJUGATE.values(), ids=CONJUGATE.keys())
@pytest.mark.parametrize("joint", [False, True])
def test_a_forgotten_constraint_is_named(make, joint):
    model = make()
    x = simulated(model, 12)
    guide = amortize(model, mlp(x.shape[1], [H]), MeanField, H, joint=joint)
    for run in (log_weights, partial(fit, epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"samples site 'z' from .*constraints=\{'z': \.\.\.\}"):
            run(model, guide, x)


def test_an_error_of_the_model_itself_keeps_its_own_words():
    model = GammaPoisson()
    model.likelihood = lambda z: dist.Poisson(-z.unsqueeze(-1).expand(*z.shape, 2)).to_event(1)
    guide = amortize(model, mlp(2, [H]), MeanField, H, constraints=model.constraints)
    with pytest.raises(ValueError, match="Expected parameter rate"):
        log_weights(model, guide, torch.ones(3, 2))


# Pyro's own guides


def test_auto_guides_are_guides_of_two_levels(float64):
    model = TwoLevels()
    x = simulated(model)
    normal, full = AutoNormal(model), AutoMultivariateNormal(model)
    for guide in (normal, full):
        fit(model, guide, x, epochs=200, lr=5e-2, freeze=model, seed=0, progress=False)
    exact = model.log_evidence(x)
    evidence = evaluate(model, normal, x, 4000, seed=0, progress=False)
    excess = evidence.gap - best_mean_field_gap(model.posterior(x)[1])
    assert (excess > -4 * evidence.elbo_error).all()
    assert excess.max() < 1  # Adam's noise
    joint = evaluate(model, full, x, 2000, seed=0, progress=False)
    assert joint.joint
    torch.testing.assert_close(joint.exact, exact.sum().unsqueeze(0))
    assert ((joint.elbo - joint.exact) < 4 * joint.elbo_error).all()
    with pytest.raises(ValueError, match=r"a point estimate at \['top', 'low'\]"):
        evaluate(model, AutoDelta(model), x, 10, progress=False)


# discrete sites


def _all_states(model, x):
    """Every state and its log p(x, z): [S, N]."""
    states = model.family(model.logits).enumerate_support()
    return states, log_joint(model, {"z": states.unsqueeze(1).expand(-1, len(x), -1)}, x)


@pytest.mark.parametrize("family", DISCRETE_LATENTS.values(), ids=DISCRETE_LATENTS.keys())
def test_enumerated_guides_sum_over_all_states(family, float64):
    model = Discrete(family)
    x = simulated(model)
    guide = amortize(model, mlp(4, [H]), family, context=H)
    states, log_p = _all_states(model, x)
    assert len(states) == (8 if family is DISCRETE_LATENTS["BinaryVector"] else 3)
    log_q = guide.families["z"](guide.encoder(x)).log_prob(states.unsqueeze(1))  # [S, N]
    elbo = (log_q.exp() * (log_p - log_q)).sum(0)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide), x)
    assert loss == pytest.approx(-elbo.sum().item(), rel=1e-12)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), lambda x: None, x)
    assert loss == pytest.approx(-log_p.logsumexp(0).sum().item(), rel=1e-12)
    evidence = evaluate(model, guide, x, 8000, seed=0, progress=False)
    assert ((evidence.elbo - elbo).abs() < 4 * evidence.elbo_error).all()
    assert ((evidence.log_evidence - log_p.logsumexp(0)).abs() < 4 * evidence.standard_error).all()


@pytest.mark.parametrize("family", DISCRETE_LATENTS.values(), ids=DISCRETE_LATENTS.keys())
def test_training_by_enumeration_reaches_the_best_of_the_family(family, float64):
    """One of three can be any distribution over its states, so the bound becomes log p(x). Independent bits cannot."""
    model = Discrete(family)
    x = simulated(model)
    guide = amortize(model, mlp(4, [64]), family, context=64)
    frozen, objective = poutine.block(model, hide_types=["param"]), TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(frozen, config_enumerate(guide), Adam({"lr": 0.03}), objective)
    for _ in range(400):
        loss = svi.step(x)
    gap = loss + _all_states(model, x)[1].logsumexp(0).sum().item()
    assert gap > -1e-9
    if family is DISCRETE_LATENTS["OneHotCategorical"]:
        assert gap < 5e-2


def test_a_continuous_site_follows_an_enumerated_one(float64):
    model = DiscreteThenNormal()
    x = simulated(model)
    families = {"c": DISCRETE_LATENTS["OneHotCategorical"](3, H), "z": MeanField(2, H + 3)}
    guide = Amortized(mlp(2, [H]), families)
    enumerated = TraceEnum_ELBO(max_plate_nesting=1, num_particles=400, vectorize_particles=True)
    with torch.no_grad():
        losses = torch.tensor([enumerated.loss(model, config_enumerate(guide), x) for _ in range(10)])
        sums = log_weights(model, guide, x, particles=20_000).sum(-1)
    error = math.hypot(float(losses.std()) / math.sqrt(10), float(sums.std()) / math.sqrt(20_000))
    assert abs(float(losses.mean() + sums.mean())) < 4 * error


def test_a_point_beside_a_density_is_refused(float64):
    torch.manual_seed(0)
    model = TwoLevels()
    guide = Amortized(mlp(4, [8]), {"top": Delta(2, 8), "low": FullCovariance(3, 10)})
    with pytest.raises(ValueError, match=r"point estimate at \['top'\]"):
        evaluate(model, guide, torch.randn(3, 4), progress=False)


def test_far_draws_of_a_positive_site_stay_in_range():
    u = torch.tensor([[-500.0], [0.0], [500.0]])
    z = site_transform((), constraints.positive)(u)
    assert z.isfinite().all()
    assert (z > 0).all()


def test_one_datum_without_its_first_dimension_is_refused():
    torch.manual_seed(0)
    model = TwoLevels()
    for joint in (False, True):
        guide = amortize(model, mlp(4, [8]), MeanField, context=8, joint=joint)
        with pytest.raises(ValueError, match=r"x\[i : i \+ 1\] for one point"):
            guide(torch.randn(4))
