"""Guides with free parameters per data point: they start at the amortized guide, and are optimised independently."""

import copy
from functools import partial

import pytest
import torch
from hierarchies import CONJUGATE, DiscreteThenNormal, TwoLevels, best_mean_field_gap
from members import NO_INVERSE, POSTERIORS, amortized
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from jensen.families import FullCovariance, MeanField, OneHotCategorical
from jensen.guides import Amortized, Joint, Laplace, SemiAmortized, Through, amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import fit, log_weights, terms
from jensen.models import PPCA, Banana
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

N, K, H = 5, 3, 8
MANY = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)

GUIDES = {
    "one site": lambda model, family: amortized(_Top(model), family),
    "chain": lambda model, family: amortized(model, family),
    "chain through networks": lambda model, family: Amortized(
        mlp(4, [H]), {"low": Through(mlp(H, [7]), family(3, 7)), "top": Through(mlp(H + 3, [7]), family(2, 7))}
    ),
    "joint": lambda model, family: amortized(model, family, joint=True),
    "semi-amortized": lambda model, family: SemiAmortized(amortized(model, family), model, steps=2),
}
each_guide = pytest.mark.parametrize("kind", [name for name in GUIDES if name != "one site"])
each_family = pytest.mark.parametrize("family", POSTERIORS)


class _Top:
    """A guide of the top level's site only."""

    def __init__(self, model):
        self.latents, self.event_shape = {"top": model.latents["top"]}, model.event_shape


def made(kind, family):
    """Model, guide with perturbed weights, data."""
    model = TwoLevels()
    guide = GUIDES[kind](model, POSTERIORS[family])
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.05 * torch.randn_like(p))  # larger values make splines too steep to invert
        x = model(n=N)
    return model, guide, x


def log_q(guide, values, x):
    """The log-density of given values under a guide, summed over its sites: [K, N]."""
    with torch.no_grad():
        if isinstance(guide, SemiAmortized):
            offsets = guide._offsets(guide.guide.encoder(x), (x,))
            guide = guide.guide
        else:
            offsets = {}

        def given(*_):
            guide.draw(guide.encoder(x), offsets)

        trace = poutine.trace(poutine.condition(given, data=values)).get_trace()
        sites = [trace.nodes[name] for name in values]
        return sum(site["fn"].log_prob(values[site["name"]].clone()) for site in sites)


@each_guide
@pytest.mark.parametrize("family", [name for name in POSTERIORS if name not in NO_INVERSE])
def test_it_starts_at_the_guides_own_density(kind, family, float64):
    model, guide, x = made(kind, family)
    local = guide.local(x)
    t = terms(model, local, x, particles=K)
    values = {site: t.values[site] for site in t.log_q}
    if kind == "joint":
        values = {"joint": values["joint"]}
    for half in (guide, local):
        torch.testing.assert_close(log_q(half, values, x), sum(t.log_q.values()), rtol=1e-8, atol=1e-8)


@each_guide
@pytest.mark.parametrize("family", NO_INVERSE)
def test_it_starts_at_the_guides_own_draws(kind, family, float64):
    """Flows without an inverse: one sample per data point uses the same noise in the same order."""
    model, guide, x = made(kind, family)
    found = []
    for half in (guide, guide.local(x)):
        torch.manual_seed(5)
        found.append(terms(model, half, x, particles=1))
    for site, value in found[0].values.items():
        torch.testing.assert_close(value, found[1].values[site])
    for site, log_density in found[0].log_q.items():
        torch.testing.assert_close(log_density, found[1].log_q[site])


@each_family
@each_guide
def test_each_datum_reaches_every_parameter_of_its_own_and_no_other(kind, family, float64):
    model, guide, x = made(kind, family)
    local = guide.local(x)
    named = dict(local.named_parameters())
    assert named and all(len(p) == N for p in named.values())
    slopes = torch.autograd.grad(log_weights(model, local, x, particles=K)[:, 3].sum(), list(named.values()))
    for name, slope in zip(named, slopes, strict=True):
        assert slope.isfinite().all(), name
        assert slope.flatten(1).abs().sum(-1).nonzero().flatten().tolist() == [3], name


@each_family
def test_weights_that_are_not_read_from_the_context_become_one_for_each_datum(family):
    """For a single site the parameters lambda are free, so the layer of the context needs no copies."""
    _, guide, x = made("one site", family)
    own = guide.families["top"].own_weights()
    local = guide.local(x)
    names = [name for name, _ in local.named_parameters()]
    assert names == ["families.top.offset", *(f"families.top.copies.{i}" for i in range(len(own)))]
    assert local.families["top"].offset.shape == (N, guide.families["top"].size)
    if not own:
        assert local.families["top"].offset.abs().sum() == 0


@each_family
def test_later_sites_of_a_chain_have_copies_of_all_their_weights(family):
    """The dependence of a site on earlier sites is also separate for each data point."""
    _, guide, x = made("chain", family)
    local = guide.local(x)
    assert len(local.families["top"].copies) == len(guide.families["top"].own_weights())
    assert len(local.families["low"].copies) == len(list(guide.families["low"].parameters()))


@pytest.mark.filterwarnings("ignore:training diverged")  # with large steps, so that parameters change
@each_guide
@pytest.mark.parametrize("family", ["MeanField", "IAF", "zuko"])
def test_the_guide_itself_is_left_as_it_is(kind, family):
    model, guide, x = made(kind, family)
    before = copy.deepcopy(guide.state_dict())
    modes = {name: p.requires_grad for name, p in guide.named_parameters()}
    local = guide.local(x)
    shared = {t.data_ptr() for t in guide.parameters()} & {t.data_ptr() for t in local.state_dict().values()}
    assert not shared - {0}
    fit(model, local, x, epochs=2, lr=0.1, freeze=model, progress=False)
    assert local.state_dict().keys()
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert modes == {name: p.requires_grad for name, p in guide.named_parameters()}
    fit(model, guide, x, epochs=1, freeze=model, progress=False)


@pytest.mark.parametrize("family", ["MeanField", "IAF"])
@pytest.mark.parametrize("kind", ["chain", "joint", "semi-amortized", "Laplace"])
def test_other_data_are_refused(kind, family):
    model, guide, x = made("chain" if kind == "Laplace" else kind, family)
    local = (Laplace(model) if kind == "Laplace" else guide).local(x)
    for other in (x + 0.1, x[:3], x.flip(0), torch.cat([x, x])):
        with pytest.raises(ValueError, match=r"parameters for 5 data points|a value for each of 5 data"):
            log_weights(model, local, other)
        refusal = "other data points" if len(other) == 5 else "other data points|a value for each of 5 data"
        with pytest.raises(ValueError, match=refusal):
            fit(model, local, other, epochs=1, progress=False)
        with pytest.raises(ValueError, match=refusal):
            evaluate(model, local, other, 10, progress=False)
    with pytest.raises(ValueError, match=r"other data points|a value for each of 5 data"):
        fit(model, local, x, epochs=1, batch_size=2, progress=False)
    evaluate(model, local, x.clone(), 10, progress=False)
    x += 1  # in place: these are other data now
    with pytest.raises(ValueError, match="other data points"):
        log_weights(model, local, x)


@pytest.mark.parametrize("kind", ["chain", "chain through networks", "joint", "semi-amortized"])
@pytest.mark.parametrize("family", ["MeanField", "IAF", "StudentT", "zuko"])
def test_it_changes_its_precision_and_is_copied_and_saved_as_a_whole(kind, family):
    model, guide, x = made(kind, family)
    local = guide.local(x)
    with torch.no_grad():
        for p in local.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model, local, x = model.double(), local.double(), x.double()
    copied = copy.deepcopy(local)
    _, other, _ = made(kind, family)
    saved = other.local(x.float()).double()
    saved.load_state_dict(local.state_dict())
    found = []
    for half in (local, copied, saved):
        torch.manual_seed(2)
        found.append(log_weights(model, half, x, particles=K))
    assert found[0].dtype == torch.float64
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("model", [Banana(), PPCA(5, 2)], ids=["without parameters", "with parameters"])
def test_everything_is_of_the_datas_precision(model):
    model, x = copy.deepcopy(model).double(), torch.zeros(3, model.event_shape[0]).double()
    identity = amortize(model, nn.Linear(model.event_shape[0], 5).double(), MeanField, 5).double()
    bare = Amortized(nn.Linear(model.event_shape[0], 4).double(), {"z": MeanField(2, None)})
    for guide in (Laplace(model), identity, bare):
        local = guide.local(x)
        assert {p.dtype for p in local.parameters()} == {torch.float64}
        assert log_weights(model, local, x).dtype == torch.float64
        fit(model, local, x, epochs=1, freeze=model, progress=False)


# what it is for


def test_mean_field_parameters_of_their_own_reach_the_known_optimum(float64):
    """The encoder gets no information, so the offsets must learn everything."""
    model = PPCA(5, 2).rotated(0)
    with torch.no_grad():
        x = model(n=20)
    guide = amortize(model, mlp(5, [1]), MeanField, context=1)
    local = guide.local(x)
    fit(model, local, x, epochs=600, lr=0.02, freeze=model, seed=0, progress=False)
    posterior = model.posterior(x)
    best = best_mean_field_gap(posterior.precision_matrix)
    before, after = (evaluate(model, half, x, 2000, seed=0, progress=False) for half in (guide, local))
    assert ((after.gap - best) > -4 * after.elbo_error).all()
    assert (after.gap - best).mean() < 0.05
    assert before.gap.mean() > after.gap.mean() + 0.2


@pytest.mark.slow
def test_a_chain_of_their_own_follows_its_own_levels(float64):
    model, guide, x = made("chain", "MeanField")
    local = guide.local(x)
    before = evaluate(model, guide, x, 500, seed=0, progress=False)
    fit(model, local, x, MANY, epochs=400, lr=0.1, freeze=model, seed=0, progress=False)
    fit(model, local, x, MANY, epochs=200, lr=0.01, freeze=model, seed=0, progress=False)
    _, precision = model.posterior(x)
    of_top = precision.inverse()[:2, :2].inverse()  # of p(top | x)
    best = best_mean_field_gap(of_top) + best_mean_field_gap(precision[2:, 2:])  # and of p(low | top, x)
    after = evaluate(model, local, x, 2000, seed=0, progress=False)
    assert ((after.gap - best) > -4 * after.elbo_error).all()
    assert (after.gap - best).mean() < 0.1 * (before.gap - best).mean()


@pytest.mark.parametrize("joint", [False, True])
def test_the_refined_answer_is_where_it_starts(joint, float64):
    model = TwoLevels()
    x = model(n=N).detach()
    plain = amortized(model, FullCovariance, joint=joint)
    guide = SemiAmortized(plain, model, steps=60, lr=0.05)
    elbos = []
    for half in (plain, guide, guide.local(x)):
        torch.manual_seed(0)
        elbos.append(log_weights(model, half, x, particles=500).mean(0))
    assert (elbos[1] > elbos[0] + 0.3).all()
    if joint:
        torch.testing.assert_close(elbos[2], elbos[1])  # the same noise in the same order
    assert (elbos[2] > elbos[0] + 0.3).all()


@pytest.mark.parametrize("make", CONJUGATE.values(), ids=CONJUGATE.keys())
def test_modes_and_curvatures_are_where_it_starts(make, float64):
    model = make()
    x = model(n=N)
    guide = Laplace(model, constraints=model.constraints)
    found = []
    for half in (guide, guide.local(x)):
        torch.manual_seed(0)
        found.append(log_weights(model, half, x, particles=50))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
    local = guide.local(x)
    fit(model, local, x, MANY, epochs=200, lr=5e-3, seed=0, progress=False)
    before, after = (evaluate(model, half, x, 4000, seed=0, progress=False) for half in (guide, local))
    assert (after.elbo > before.elbo - 4 * (after.elbo_error + before.elbo_error)).all()
    assert after.gap.mean() < before.gap.mean()


def test_constrained_guides_have_local_ones(float64):
    model = CONJUGATE["Dirichlet-counts"]()
    x = model(n=N)
    for joint in (False, True):
        guide = amortize(model, mlp(3, [H]), FullCovariance, H, constraints=model.constraints, joint=joint)
        found = []
        for half in (guide, guide.local(x)):
            torch.manual_seed(0)
            found.append(log_weights(model, half, x, particles=50))
        torch.testing.assert_close(*found)


def test_discrete_sites_of_a_chain(float64):
    model = DiscreteThenNormal()
    x = model(n=N).detach()
    families = {"z": MeanField(2, H), "c": OneHotCategorical(3, H + 2)}
    guide = Amortized(mlp(2, [H]), families)
    local = guide.local(x)
    t = terms(model, local, x, particles=2000)
    values = {site: t.values[site] for site in ("z", "c")}
    torch.testing.assert_close(log_q(guide, values, x), sum(t.log_q.values()))
    assert not t.q["c"].has_rsample
    expected = guide.families["c"](torch.cat([guide.encoder(x).expand(2000, N, H), values["z"]], -1)).probs.mean(0)
    assert ((values["c"].mean(0) - expected).abs() < 4 * 0.5 / 2000**0.5).all()


def test_covariates_belong_to_the_data():
    class Encoder(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y], -1)

    model = TwoLevels()
    guide = Joint(Encoder(), FullCovariance(5, 6), model.latents)
    x, y = torch.randn(N, 4), torch.randn(N, 2)
    local = guide.local(x, y)
    assert local(x, y)["low"].shape == (N, 3)
    with pytest.raises(ValueError, match="other data points"):
        local(x, y + 1)
