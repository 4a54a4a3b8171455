"""Guides for programs without an attribute ``latents``, against exact results and the programs' sites."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import nn
from torch.distributions import biject_to, constraints

from jensen.families import Delta, FullCovariance, OneHotCategorical
from jensen.families.base import raw_of
from jensen.guides import amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import fit, gaps, log_weights
from jensen.models import PPCA
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

GROUPS = 4


def means(x):
    """Normal means with an unknown common mean: log p(x) is that of one Gaussian."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)


def uniform(x):
    """A local site with a global site as the upper end of its support."""
    end = pyro.sample("end", dist.Gamma(x.new_tensor(3.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, end))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def grouped(x, group, y):
    """Group effects, and a local value for each row around the effect of its group."""
    tau = pyro.sample("tau", dist.HalfNormal(x.new_tensor(1.0)))
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(a[group], 1.0))
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


def effects(y, group):
    """Many groups, without local sites."""
    tau = pyro.sample("tau", dist.HalfNormal(y.new_tensor(1.0)))
    with pyro.plate("groups", 300):
        a = pyro.sample("a", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)


def nested(x):
    """Sites of many shapes: a Cholesky factor, positive vectors, a simplex in a plate inside that of the data."""
    root = pyro.sample("root", dist.LKJCholesky(3, x.new_tensor(1.0)))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-2):
        s = pyro.sample("s", dist.Beta(x.new_tensor(2.0), 2.0))
        with pyro.plate("words", 4, dim=-1):
            p = pyro.sample("p", dist.Dirichlet(x.new_ones(3)))
            tril = scale.unsqueeze(-1) * root
            pyro.sample("x", dist.MultivariateNormal(p * s.unsqueeze(-1), scale_tril=tril), obs=x)


@config_enumerate
def mixture(x):
    """A mixture whose assignments are summed out."""
    with pyro.plate("clusters", 3):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 3.0))
    share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(share))
        pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)


def autoencoder(features=5):
    decoder = nn.Linear(2, features)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("pixels", dist.Normal(decoder.to(x)(z), 1.0).to_event(1), obs=x)

    return model


def grouped_data(n=30):
    return torch.randn(n), torch.arange(n) % GROUPS, torch.randn(n)


PROGRAMS = {
    "means": (means, lambda: (torch.randn(8),)),
    "uniform": (uniform, lambda: (torch.rand(8),)),
    "grouped": (grouped, grouped_data),
    "effects": (effects, lambda: (torch.randn(600), torch.arange(600) % 300)),
    "nested": (nested, lambda: (torch.randn(6, 4, 3),)),
    "mixture": (mixture, lambda: (torch.randn(8),)),
    "autoencoder": (autoencoder(), lambda: (torch.randn(8, 5),)),
}
each_program = pytest.mark.parametrize(("model", "data"), PROGRAMS.values(), ids=PROGRAMS.keys())
STRUCTURE = {
    "means": "mu | z given its row of the data",
    "uniform": "end | z given its row of the data",
    "grouped": "tau | a | z given its row of the data",
    "effects": "tau | a given its rows of the data",
    "nested": "root, scale | s, p given its row of the data",
    "mixture": "share | loc | c enumerated",
    "autoencoder": "z given its row of the data",
}


def traced(model, guide, *data):
    """The traces of guide and model in one run without particles."""
    q = poutine.trace(guide).get_trace(*data)
    return q, poutine.trace(poutine.replay(model, trace=q)).get_trace(*data)


def losses(model, guide, data, draws):
    with torch.no_grad():
        return torch.tensor([Trace_ELBO().loss(model, guide, *data) for _ in range(draws)])


# what is read from one run


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_run_tells_the_structure(name):
    model, data = PROGRAMS[name]
    assert repr(amortize(model, data=data())) == f"Structured: {STRUCTURE[name]}"


@each_program
@pytest.mark.parametrize("family", ["MeanField", "FullCovariance", "IAF"])
def test_every_continuous_site_is_drawn_as_the_model_has_it(model, data, family):
    data = data()
    guide = amortize(model, family=family, data=data)
    q, p = traced(model, guide, *data)
    latent = {n for n, s in p.nodes.items() if s["type"] == "sample" and not s["is_observed"] and "subsample" not in n}
    for name in latent - set(guide.enumerated) - {"groups", "rows", "data", "words", "batch", "clusters"}:
        mine, theirs = q.nodes[name], p.nodes[name]
        assert theirs["value"] is mine["value"], name
        assert {f.name for f in mine["cond_indep_stack"]} == {f.name for f in theirs["cond_indep_stack"]}, name
        assert bool(theirs["fn"].support.check(mine["value"]).all()), name
        assert (mine["fn"].batch_shape, mine["fn"].event_shape) == (theirs["fn"].batch_shape, theirs["fn"].event_shape)


@each_program
def test_log_q_is_that_of_the_coordinates_less_the_log_determinants(model, data, float64):
    """The density of the sites by Pyro's maps, for a level of one vector and for a single site."""
    data = data()
    guide = amortize(model, family="FullCovariance", data=data)
    q, p = traced(model, guide, *data)
    total, expected = q.log_prob_sum(), 0.0
    for name, site in q.nodes.items():
        if site["type"] != "sample" or name in ("groups", "rows", "data", "words", "batch", "clusters"):
            continue
        if site["infer"].get("is_auxiliary"):
            expected = expected + site["fn"].log_prob(site["value"].clone()).sum()
            continue
        onto = biject_to(p.nodes[name]["fn"].support)
        u = onto.inv(site["value"].clone())
        if isinstance(site["fn"].base_dist if hasattr(site["fn"], "base_dist") else site["fn"], dist.Delta):
            expected = expected - onto.log_abs_det_jacobian(u, site["value"]).sum()
        else:
            expected = expected + site["fn"].log_prob(site["value"].clone()).sum()
    torch.testing.assert_close(total, expected)


@each_program
def test_the_gradient_reaches_every_parameter(model, data):
    data = data()
    guide = amortize(model, family="FullCovariance", data=data)
    with torch.no_grad():  # a layer that starts at zero blocks the gradient of earlier layers
        for p in guide.parameters():
            p.add_(0.01 * torch.randn_like(p))
    loss = TraceEnum_ELBO(max_plate_nesting=2) if guide.enumerated else Trace_ELBO()
    loss.differentiable_loss(model, guide, *data).backward()
    for name, p in guide.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


# exact answers


def test_a_structured_gaussian_reaches_the_exact_posterior_of_rows_under_a_global_mean(float64):
    x = torch.randn(6)
    guide = amortize(means, nn.Unflatten(0, (-1, 1)), FullCovariance, context=1, data=x)
    precision = 1 + len(x) / 2
    with torch.no_grad():
        top, local = guide.levels["global"], guide.levels["local"]
        top.loc.fill_(x.sum() / 2 / precision)
        top.log_scale.fill_(-math.log(precision) / 2)
        top.free.copy_(torch.tensor([0.0, raw_of(torch.tensor(1.0))]))
        local.loc.copy_(top.loc / 2)
        local.location.weight.fill_(0.5)
        local.slopes.bias.copy_(top.log_scale.exp() / 2)
        local.log_scale.fill_(-math.log(2) / 2)
        local.family.affine.weight.zero_()
        local.family.affine.bias.copy_(top.free)
    exact = dist.MultivariateNormal(torch.zeros(6), 2 * torch.eye(6) + 1).log_prob(x)
    torch.testing.assert_close(-losses(means, guide, (x,), 20), exact.expand(20), rtol=0, atol=1e-5)


def test_a_support_that_moves_is_that_at_the_values_drawn(float64):
    """The evidence by importance sampling, against a grid over the end and the closed integral over each row."""
    x = torch.tensor([0.3, 1.7])
    guide = amortize(uniform, data=x)
    with torch.no_grad():
        guide.levels["global"].log_scale.fill_(-0.5)
        guide.levels["local"].log_scale.fill_(0.5)
    for _ in range(30):
        values = guide(x)
        assert bool((values["z"] < values["end"]).all())
    with torch.no_grad():
        log_w = log_weights(uniform, guide, x, particles=3000)
    weights = (log_w - log_w.max()).exp()
    estimate = log_w.max() + weights.mean().log()
    error = weights.std() / weights.mean() / 3000**0.5
    end = torch.linspace(1e-4, 40, 200_001)
    normal = torch.distributions.Normal(x, 0.5)
    mass = (normal.cdf(end.unsqueeze(-1)) - normal.cdf(torch.zeros(2))) / end.unsqueeze(-1)
    density = dist.Gamma(3.0, 1.0).log_prob(end).exp() * mass.prod(-1)
    assert error < 0.1
    assert abs(estimate - torch.trapezoid(density, end).log()) < 4 * error


def test_a_bound_of_the_data_follows_new_data():
    def model(x, top):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = amortize(model, data=(torch.rand(5), torch.arange(1.0, 6.0)))
    top = torch.full((3,), 1e-3)
    assert bool((guide(torch.rand(3), top)["z"] <= top).all())


# other data


def test_new_data_go_through_the_encoder():
    model, x = autoencoder(), torch.randn(40, 5)
    guide = amortize(model, data=x)
    fit(model, guide, x, epochs=2, batch_size=20, progress=False)
    evidence = evaluate(model, guide, torch.randn(7, 5), particles=20, progress=False)
    assert not evidence.joint and evidence.elbo.shape == (7,)
    drawn = []
    for row in (torch.zeros(1, 5), torch.ones(1, 5)):
        torch.manual_seed(1)
        drawn.append(guide(row)["z"])
    assert not torch.allclose(*drawn)


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=x[index])


def test_the_guide_draws_the_rows_that_the_model_sees():
    x = torch.arange(20.0)
    guide = amortize(subsampled, data=x)
    seen = []
    guide.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for n in (20, 12):
        q, p = traced(subsampled, guide, x[:n])
        index = q.nodes["rows"]["value"]
        assert torch.equal(p.nodes["rows"]["value"], index) and index.shape == (5,)
        assert torch.equal(seen.pop(), x[index])
        assert (q.nodes["z"]["scale"], p.nodes["z"]["scale"]) == (n / 5, n / 5)
        assert q.nodes["z"]["value"].shape == (5,)


def test_rows_chosen_outside_of_the_model_are_all_read():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=x)

    guide = amortize(model, data=torch.randn(20))
    q, p = traced(model, guide, torch.randn(8))
    assert "rows" not in q.nodes  # the model keeps its parameters
    assert q.nodes["z"]["value"].shape == (8,) and q.nodes["z"]["scale"] == p.nodes["z"]["scale"] == 125


def test_a_plate_without_a_size_is_that_of_the_rows():
    def model(x):
        with pyro.plate("rows"):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    guide = amortize(model, data=torch.randn(6))
    assert guide(torch.randn(4))["z"].shape == (4,)


# groups


def test_rows_read_the_values_of_their_own_group():
    data = grouped_data()
    guide = amortize(grouped, data=data)
    with torch.no_grad():
        for p in guide.levels["local"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    values = {"tau": torch.tensor(1.0), "a": torch.zeros(GROUPS)}
    placed = []
    for a in (values["a"], torch.tensor([0.0, 1.0, 0.0, 0.0])):
        torch.manual_seed(0)
        auxiliary = poutine.condition(guide, data={"joint_groups": a, "tau": values["tau"], "a": a})
        placed.append(poutine.trace(auxiliary).get_trace(*data).nodes["z"]["value"])
    moved = (placed[0] - placed[1]).abs() > 1e-6
    assert torch.equal(moved, data[1] == 1)


def test_a_column_of_outcomes_is_not_taken_for_the_groups():
    group, outcome = torch.tensor([1, 0, 1, 1, 0, 0]), torch.tensor([0, 1, 0, 0, 0, 1])

    def model(y, group):
        with pyro.plate("groups", 2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a[group]), obs=y.float())

    guide = amortize(model, data=(outcome, group))
    assert guide._columns["groups"].tensor == 1


def test_many_groups_are_pooled_from_their_rows():
    """A group's distribution depends on its own rows only."""
    y, group = torch.randn(600), torch.arange(600) % 300
    guide = amortize(effects, data=(y, group))
    with torch.no_grad():
        guide.levels["plate_0"].location.weight.add_(torch.randn_like(guide.levels["plate_0"].location.weight))
    drawn = []
    for shift in (0.0, 1.0):
        torch.manual_seed(0)
        moved = torch.where(group == 7, y + shift, y)
        drawn.append(guide(moved, group)["a"])
    assert torch.equal(((drawn[0] - drawn[1]).abs() > 1e-6).nonzero().flatten(), torch.tensor([7]))


def test_groups_that_nothing_in_the_data_tells_have_free_numbers():
    group = torch.arange(600) % 300
    guide = amortize(lambda y: effects(y, group), data=torch.randn(600))
    assert guide.encoder is None and guide.levels["plate_0"].loc.shape == (300, 1)
    assert guide(torch.randn(600))["a"].shape == (300,)


# enumeration, copies, names


@pytest.mark.parametrize("family", ["FullCovariance", pytest.param("IAF", marks=pytest.mark.slow)])
def test_rows_with_parameters_of_their_own_leave_what_the_encoder_costs(family):
    """The posterior of a linear model is Gaussian: the gap is an amortization gap, and log p(x) is exact."""
    torch.manual_seed(0)
    weight = torch.randn(5, 2)

    def model(y):
        with pyro.plate("rows", len(y)):
            code = pyro.sample("code", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            pyro.sample("answer", dist.Normal(code @ weight.T, 1.0).to_event(1), obs=y)

    y = dist.MultivariateNormal(torch.zeros(5), weight @ weight.T + torch.eye(5)).sample((6,))
    guide = amortize(model, data=y, family=family)
    exact = dist.MultivariateNormal(torch.zeros(5), weight @ weight.T + torch.eye(5)).log_prob(y).double()
    split = gaps(model, guide, y, particles=400, rounds=4, seed=0, progress=False)
    torch.testing.assert_close(split.local.elbo, exact, atol=0.02, rtol=0)
    assert (exact - split.evidence.elbo > 0.1).all()

    local = guide.local(y, offsets={"code": torch.zeros(6, guide.levels["local"].family.size + 4)})
    sites = [poutine.trace(one).get_trace(y).nodes["code"]["fn"] for one in (guide, local)]
    value = torch.randn(6, 2)
    torch.testing.assert_close(*(fn.log_prob(value) for fn in sites))


def test_rows_beside_a_global_site_have_no_parameters_of_their_own():
    def model(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0), obs=x)

    x = torch.randn(20)
    with pytest.raises(ValueError, match="cannot have separate parameters"):
        amortize(model, data=x).local(x)


def test_discrete_sites_are_left_to_be_enumerated():
    x = torch.cat([torch.randn(20) - 4, torch.randn(20) + 4])
    guide = amortize(mixture, data=x)
    assert guide.enumerated == ("c",)
    q, _ = traced(mixture, guide, x)
    assert "c" not in q.nodes
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        values = guide(x)
        conditioned = poutine.condition(mixture, data=values)
        expected = dist.MixtureSameFamily(dist.Categorical(values["share"]), dist.Normal(values["loc"], 1.0)).log_prob(
            x
        )
        got = -elbo.loss(conditioned, lambda x: None, x)
    prior = dist.Normal(0.0, 3.0).log_prob(values["loc"]).sum() + dist.Dirichlet(torch.ones(3)).log_prob(
        values["share"]
    )
    assert got == pytest.approx(float(expected.sum() + prior), rel=1e-5)


@each_program
def test_a_copy_is_another_guide_with_the_same_numbers(model, data):
    data = data()
    guide = amortize(model, data=data)
    other = copy.deepcopy(guide)
    assert other._pyro_name != guide._pyro_name
    loaded = amortize(model, data=data)
    loaded.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    first = guide(*data)
    for twin in (other, loaded):
        torch.manual_seed(1)
        second = twin(*data)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_family_has_a_name():
    model = PPCA(5, latent=2)
    made = []
    for family in (FullCovariance, "FullCovariance", "full-covariance"):
        torch.manual_seed(0)
        made.append(amortize(model, mlp(5, [8]), family, context=8).state_dict())
    for other in made[1:]:
        assert made[0].keys() == other.keys()
        assert all(torch.equal(made[0][key], other[key]) for key in made[0])
    with pytest.raises(TypeError, match=r"got 'mean-feild'; did you mean MeanField\? jensen\.families has \['Bernou"):
        amortize(model, mlp(5, [8]), "mean-feild", context=8)
    with pytest.raises(TypeError, match="family must be a class such as FullCovariance, but got an instance"):
        amortize(model, mlp(5, [8]), FullCovariance(2, 8), context=8)


def test_a_model_that_says_its_latents_can_do_without_encoder_and_width():
    model, x = PPCA(5, latent=2), torch.randn(20, 5)
    assert amortize(model, data=x)(x)["z"].shape == (20, 2)
    assert amortize(model, mlp(5, [8]), data=x)(x)["z"].shape == (20, 2)
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    before = {name: value.clone() for name, value in normed.state_dict().items()}
    amortize(model, normed)
    assert normed.training and all(torch.equal(value, before[name]) for name, value in normed.state_dict().items())
    assert amortize(model, normed)(x)["z"].shape == (20, 2)  # the width is found on samples of the model
    stream = torch.get_rng_state()
    after = amortize(model, nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()))
    torch.set_rng_state(stream)
    told = amortize(model, nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()), context=8)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), told.parameters(), strict=True))
    with pytest.raises(ValueError, match="width of the encoder's output, 8, but got 16: omit it"):
        amortize(model, mlp(5, [8]), context=16)
    with pytest.raises(TypeError, match="pass data=x, or both encoder and context"):
        amortize(model, mlp(7, [8]))


def test_what_makes_no_sense_is_named():
    x = torch.randn(6)
    with pytest.raises(TypeError, match=r"but means has no attribute latents: .*data=x"):
        amortize(means)
    with pytest.raises(ValueError, match=r"read from the model, but got constraints for \['z'\]"):
        amortize(means, data=x, constraints={"z": constraints.positive})
    for family, words in ((Delta, "samples points"), (OneHotCategorical, "samples no real vectors")):
        with pytest.raises(TypeError, match=words):
            amortize(means, family=family, data=x)

    def counts(x):
        rate = pyro.sample("n", dist.Poisson(3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def only(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    for model, words in ((counts, "infinitely many"), (masked, "under a mask"), (only, "a continuous latent site")):
        with pytest.raises(ValueError, match=words):
            amortize(model, data=x)


# what it is for


@pytest.mark.slow
def test_eight_schools_are_nearer_than_by_autonormal():
    def model(y, error):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(effect, error), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    data = (y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]))
    found = []
    for guide in (amortize(model, data=data), AutoNormal(model)):
        pyro.clear_param_store()
        loss = Trace_ELBO(8, max_plate_nesting=1, vectorize_particles=True)
        svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.997}), loss)
        for _ in range(800):
            svi.step(*data)
        found.append(-losses(model, guide, data, 1000))
    difference = found[0].mean() - found[1].mean()
    assert difference > 3 + 4 * (found[0].var() / 1000 + found[1].var() / 1000).sqrt()
