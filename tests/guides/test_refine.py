"""Guides with searches: against known optima, and as functions of their data without side effects."""

import copy
import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import Discrete, GammaPoisson, TwoLevels, best_mean_field_gap
from members import amortized, pair
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from pyro_pairs import PyroVAE
from scipy.optimize import minimize_scalar
from torch import Size, nn
from torch.distributions import kl_divergence

from jensen.families import BinaryVector, FullCovariance, MeanField
from jensen.graphs.capture import CannotCapture, capture
from jensen.guides import Amortized, Joint, Laplace, SemiAmortized, amortize
from jensen.inference import bounds, calibrate, compare, fit, log_weights
from jensen.inference import evaluate as with_refined
from jensen.models import PPCA, Banana, Ring
from jensen.module import UniqueModule
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide


def rotated(n=6):
    """A linear model whose posterior is correlated, data, and a plain guide."""
    model = PPCA(5, 2)
    with torch.no_grad():
        model.weight.copy_(torch.randn(5, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]))
        x = model(n=n)
    return model, amortized(model, MeanField), x


def q_of(guide, *data, site="z"):
    """The guide's distribution of a site."""
    with torch.no_grad():
        return poutine.trace(guide).get_trace(*data).nodes[site]["fn"]


def searches(guide):
    """A list that grows with every search of the guide."""
    name, calls = ("_refine", "_search")[isinstance(guide, Laplace)], []
    search = getattr(guide, name)
    object.__setattr__(guide, name, lambda *data: calls.append(1) or search(*data))
    return calls


# semi-amortized: results


def test_steps_approach_the_best_of_the_family(float64):
    """A diagonal Gaussian for a correlated one: the posterior's mean, and the diagonal of its precision."""
    model, plain, x = rotated()
    posterior = model.posterior(x)
    best = best_mean_field_gap(posterior.precision_matrix).mean()
    assert best > 0.1
    gaps = [_kl(q_of(plain, x), posterior)]
    for steps in (20, 100, 500):
        gaps.append(_kl(q_of(SemiAmortized(plain, model, steps=steps, lr=0.03, particles=16), x), posterior))
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] - 1e-3
    assert gaps[1] < gaps[0] - 0.2
    assert best < gaps[3] < best + 0.02
    found = q_of(SemiAmortized(plain, model, steps=500, lr=0.03, particles=16), x).base_dist
    torch.testing.assert_close(found.loc, posterior.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(
        found.scale.log(), -0.5 * posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).log(), atol=0.1, rtol=0
    )


def _kl(q, posterior):
    q = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    return kl_divergence(q, dist.MultivariateNormal(posterior.mean, posterior.covariance_matrix)).mean()


@pytest.mark.parametrize("joint", [False, True])
def test_refinement_gains_over_two_levels(joint, float64):
    model = TwoLevels()
    x = model(n=6).detach()
    plain = amortized(model, FullCovariance, joint=joint)
    refined = SemiAmortized(plain, model, steps=400, lr=0.03, particles=8)
    before, after = (evaluate(model, guide, x, 500, seed=0, progress=False) for guide in (plain, refined))
    assert (after.elbo - before.elbo > 6 * (after.elbo_error + before.elbo_error)).all()
    assert (after.gap > -4 * after.elbo_error).all()
    if joint:  # which can be exact
        assert after.gap.mean() < before.gap.mean() / 3
    torch.testing.assert_close(after.exact, model.log_evidence(x))


def test_refined_parameters_are_the_encoders_plus_what_was_found(float64):
    model, plain, x = rotated()
    guide = SemiAmortized(plain, model, steps=3)
    family, context = plain.families["z"], plain.encoder(x)
    offsets = guide._offsets(context, (x,))
    assert offsets["z"].shape == (6, 4) and offsets["z"].abs().sum() > 0
    torch.testing.assert_close(q_of(guide, x).mean, family.distribution(family.project(context) + offsets["z"]).mean)


# semi-amortized: a function of its data only


def test_q_is_the_same_at_every_call_inside_and_outside_of_plates(float64):
    model, plain, x = rotated()
    guide = SemiAmortized(plain, model, steps=5)
    first = q_of(guide, x)
    for other in (q_of(guide, x), q_of(copy.deepcopy(guide), x), q_of(SemiAmortized(plain, model, steps=5), x)):
        assert torch.equal(other.mean, first.mean) and torch.equal(other.variance, first.variance)
    torch.manual_seed(9)
    fresh = SemiAmortized(plain, model, steps=5)
    with pyro.plate("jensen_particles", 11, dim=-2), poutine.scale(scale=0.1), poutine.mask(mask=False):
        trace = poutine.trace(poutine.condition(fresh, data={"x": x + 1})).get_trace(x)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == {"data", "z"}
    assert trace.nodes["z"]["fn"].batch_shape == (11, 6)
    assert torch.equal(trace.nodes["z"]["fn"].mean[3], first.mean)
    assert not poutine.runtime._PYRO_STACK and not poutine.runtime._DIM_ALLOCATOR._stack


@pytest.mark.parametrize("make", [lambda model, plain: SemiAmortized(plain, model, 5), lambda model, _: Laplace(model)])
def test_a_search_leaves_the_users_random_stream_alone(make, float64):
    model, plain, x = rotated()
    guide = make(model, plain)
    draws = []
    for _ in range(2):  # searched and cached
        torch.manual_seed(3)
        draws.append((guide(x)["z"], torch.randn(3)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


@pytest.mark.parametrize("make", [lambda model, plain: SemiAmortized(plain, model, 5), lambda model, _: Laplace(model)])
def test_a_search_inside_inference_mode(make, float64):
    model, plain, x = rotated()
    expected = q_of(make(model, plain), x, site="z" if make(model, plain)._get_name() == "SemiAmortized" else "joint")
    with torch.inference_mode():
        log_w = log_weights(model, make(model, plain), x.clone(), particles=3)
        guide = make(model, plain)
        trace = poutine.trace(guide).get_trace(x * 1)
    found = trace.nodes["z" if "joint" not in trace.nodes else "joint"]["fn"]
    torch.testing.assert_close(found.mean, expected.mean)
    assert log_w.isfinite().all()


def test_a_failing_search_gives_the_handlers_back():
    model, plain, x = rotated()
    guide = SemiAmortized(plain, model, steps=5)
    with pyro.plate("outer", 2, dim=-3), pytest.raises(ValueError, match="holds 30 NaN"):
        guide(x * float("nan"))
    with pyro.plate("outer", 2, dim=-3):
        assert len(poutine.runtime._PYRO_STACK) == 1
    assert not poutine.runtime._PYRO_STACK
    assert guide(x)["z"].isfinite().all()


def test_draws_without_a_gradient_are_refused():
    model = Discrete(BinaryVector)
    guide = SemiAmortized(amortized(model, BinaryVector), model, steps=2)
    with pytest.raises(ValueError, match=r"samples of \['z'\] have no gradient"):
        guide(torch.randn(3, 4))
    with pytest.raises(ValueError, match="steps and particles of at least 1, but got 0 and 4"):
        SemiAmortized(amortized(model, MeanField), model, steps=0)


def test_pyros_store_does_not_grow(float64):
    model, plain, x = rotated()
    guide = SemiAmortized(plain, model, steps=3)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    names = set(pyro.get_param_store().keys())
    assert len(names) == len(list(model.parameters())) + len(list(guide.parameters()))
    for _ in range(3):
        svi.step(x)
        log_weights(model, guide, x, particles=2)
    assert set(pyro.get_param_store().keys()) == names


def test_training_moves_encoder_and_model_towards_the_refined_bound(float64):
    model, plain, x = rotated(40)
    guide = SemiAmortized(plain, model, steps=3)
    before = [p.detach().clone() for p in (*model.parameters(), *plain.parameters())]
    start = evaluate(model, guide, x, 100, seed=0, progress=False)
    fit(model, guide, x, epochs=30, batch_size=20, lr=1e-2, seed=0, progress=False)
    for p, old in zip((*model.parameters(), *plain.parameters()), before, strict=True):
        assert not torch.equal(p, old)
    assert evaluate(model, guide, x, 100, seed=0, progress=False).elbo.mean() > start.elbo.mean() + 0.5


def test_every_measurement_takes_it(float64):
    model, plain, x = rotated(20)
    guide = SemiAmortized(plain, model, steps=60, lr=0.1)
    table = compare({"plain": (model, plain), "refined": (model, guide)}, x, 400, seed=0, progress=False)
    plain_row, refined = (table.rows[name].evidence for name in ("plain", "refined"))
    assert refined.gap.mean() < plain_row.gap.mean() - 0.2
    torch.testing.assert_close(refined.elbo, evaluate(model, guide, x, 400, seed=0, progress=False).elbo)
    found = bounds(model, guide, x, 64, seed=0, progress=False)
    assert found is not None
    assert calibrate(model, guide, n=100, draws=19, seed=0, progress=False) is not None


class Sub(UniqueModule):
    """A model with another plate inside the data plate."""

    def __init__(self):
        super().__init__()
        self.w, self.latents, self.event_shape = nn.Parameter(torch.ones(2)), {"z": Size((2,))}, Size((3,))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.w.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("x", dist.Normal(z @ self.w, 1.0), obs=x.T)


def test_models_with_plates_of_their_own(float64):
    model, x = Sub(), torch.randn(5, 3)
    guide = SemiAmortized(amortize(model, mlp(3, [8]), FullCovariance, 8), model, steps=100)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 2.0).log_prob(x)
    for q in (guide, Laplace(model)):
        log_w = log_weights(model, q, x, particles=1000)
        error = 4 * log_w.std(0) / 1000**0.5 + 1e-9
        assert (log_w.mean(0) < exact + error).all() and (log_w.mean(0) > exact - 0.3).all()


@pytest.mark.parametrize("how", ["bound method", "function"])
def test_models_that_are_functions(how):
    vae, x = PyroVAE(), torch.rand(9, 8).round()
    model = vae.model if how == "bound method" else lambda x: vae.model(x)
    plain = Amortized(mlp(8, [16]), {"latent": MeanField(3, 16)})
    guide = SemiAmortized(plain, model, steps=30, lr=0.1)
    calls = searches(guide)
    vae.eval()  # a search is cached for one mode
    guide.eval()
    with torch.no_grad():
        before, after = (log_weights(vae.model, g, x, particles=200).mean() for g in (plain, guide))
    assert after > before + 0.05
    assert len(calls) == 1 if how == "bound method" else len(calls) > 1  # unknown parameters: not cached


# graphs


@pytest.mark.parametrize("kind", ["Amortized", "Joint", "Laplace"])
def test_steps_from_a_graph_find_the_same(kind, float64, monkeypatch):
    """The graph has the same operations: bitwise identical to eager steps, also after parameters have changed."""
    monkeypatch.setattr("jensen.guides.refine._LEAST", 1)
    model, _, x = _remembering(kind)
    plain = amortized(model, FullCovariance, joint=kind == "Joint")
    make = (
        (lambda c: Laplace(model, compile=c))
        if kind == "Laplace"
        else lambda c: SemiAmortized(plain, model, 5, compile=c)
    )
    site = "z" if kind == "Amortized" else "joint"
    eager, fast = make(False), make("auto")
    q_of(fast, x, site=site)
    assert fast.route == "eager: tracing would not pay"  # the first search of this size
    for moved in range(3):
        with torch.no_grad():
            for p in (*model.parameters(), *plain.parameters()):
                p.add_(0.1 * moved)
        refined, expected = (q_of(guide, x + moved, site=site) for guide in (fast, eager))
        for name in ("mean", "covariance_matrix"):
            assert torch.equal(getattr(refined, name), getattr(expected, name)), name
    assert fast.route == "traced: compiling would not pay"
    assert eager.route == "eager: compile=False"


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_graph_does_not_outlive_the_numbers_it_was_made_with(kind, float64, monkeypatch):
    monkeypatch.setattr("jensen.guides.refine._LEAST", 1)
    model, x = Banana(), torch.full((3, 1), 0.4)  # at 1, the curvature is zero
    guide = Laplace(model)
    kept = [kind(noise) for noise in (1.0, 2.0, 3.0)]
    for model.noise in (kept[0], kept[1], kept[0], kept[2]):
        for shift in (0.0, 1.0):
            refined, expected = (q_of(g, x + shift, site="joint").mean for g in (guide, Laplace(model, compile=False)))
            assert torch.equal(refined, expected)
    assert guide.route.startswith("traced")


def test_a_model_that_is_a_function_is_not_traced(float64):
    model, plain, x = rotated()
    guide = SemiAmortized(plain, lambda x: model(x), 2, compile=True)
    with pytest.warns(UserWarning, match="does not compile its search; its steps are eager: the model is a function"):
        guide(x)


class Coin(UniqueModule):
    """A model that samples with a probability that is a parameter."""

    def __init__(self):
        super().__init__()
        self.w, self.latents, self.event_shape = nn.Parameter(torch.tensor(0.2)), {"z": Size((2,))}, Size((3,))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.w.new_zeros(2), 1.0).to_event(1))
            coin = torch.bernoulli(self.w.sigmoid().expand(len(x)))
            pyro.sample(
                "x", dist.Normal((z.sum(-1) + coin).unsqueeze(-1), 1.0).expand((*z.shape[:-1], 3)).to_event(1), obs=x
            )


def test_draws_that_depend_on_parameters_are_no_constants_of_a_graph(float64):
    model, x = Coin(), torch.randn(5, 3)
    guide = SemiAmortized(amortize(model, mlp(3, [8]), MeanField, 8), model, steps=2)
    log_weights(model, guide, x)
    with pytest.raises(CannotCapture, match=r"the search samples with aten.bernoulli.default, whose samples depend"):
        capture(lambda x: (log_weights(model, guide, x, max_plate_nesting=1),), x)


# memory


def _remembering(kind):
    model, plain, x = rotated()
    if kind == "Joint":
        plain = amortized(model, FullCovariance, joint=True)
    guide = Laplace(model) if kind == "Laplace" else SemiAmortized(plain, model, steps=2)
    return model, guide, x


each_kind = pytest.mark.parametrize("kind", ["Amortized", "Joint", "Laplace"])


@each_kind
def test_the_same_question_is_answered_once(kind, float64):
    model, guide, x = _remembering(kind)
    calls = searches(guide)
    for data in (x, x, x.clone()):
        log_weights(model, guide, data, particles=3)
    assert len(calls) == 1
    evaluate(model, guide, x, 5000, seed=0, progress=False)
    assert len(calls) == 2  # evaluation mode has a separate cache entry


def _write_data(model, guide, x):
    next(model.parameters()).data.add_(0.5)


def _step(model, guide, x):
    with torch.no_grad():
        next(model.parameters()).add_(0.5)


def _replace(model, guide, x):
    p = next(model.parameters())
    p.data = p.data + 0.5


def _load(model, guide, x):
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def _move_datum(model, guide, x):
    x[0] += 1


def _move_datum_quietly(model, guide, x):
    x.data[0] += 1


def _train(model, guide, x):
    fit(model, guide, x, epochs=1, lr=1e-1, progress=False)


CHANGES = [_write_data, _step, _replace, _load, _move_datum, _move_datum_quietly, _train]


@each_kind
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.strip("_") for change in CHANGES])
def test_what_changes_is_searched_again(kind, change, float64):
    model, guide, x = _remembering(kind)
    site = "z" if kind == "Amortized" else "joint"
    before = q_of(guide, x, site=site)
    change(model, guide, x)
    after = q_of(guide, x, site=site)
    fresh = copy.deepcopy(guide)
    assert not torch.equal(before.mean, after.mean)
    assert torch.equal(after.mean, q_of(fresh, x, site=site).mean)


def test_the_guides_own_parameters_are_looked_at_too(float64):
    _, guide, x = _remembering("Amortized")
    calls = searches(guide)
    for p in guide.parameters():
        guide(x)
        known = len(calls)
        p.data.add_(0.1)
        guide(x)
        assert len(calls) == known + 1


def test_plain_numbers_and_modes_are_looked_at_too(float64):
    model, x = Banana(), torch.ones(3, 1)
    guide = Laplace(model)
    before = q_of(guide, x, site="joint").mean
    model.noise = 2.0
    after = q_of(guide, x, site="joint").mean
    assert not torch.allclose(before, after)
    assert torch.equal(after, q_of(Laplace(model), x, site="joint").mean)
    noisy = nn.Sequential(mlp(5, [8]), nn.Dropout(0.5))
    model, _, x = rotated()
    guide = SemiAmortized(amortize(model, noisy, MeanField, 8), model, steps=2)
    guide(x)
    guide.eval()
    assert torch.equal(q_of(guide, x).mean, q_of(copy.deepcopy(guide), x).mean)


@each_kind
def test_copies_search_for_themselves(kind, float64):
    model, guide, x = _remembering(kind)
    site = "z" if kind == "Amortized" else "joint"
    before = q_of(guide, x, site=site).mean
    other_model, other = copy.deepcopy((model, guide))
    with torch.no_grad():
        for p in (*other_model.parameters(), *other.parameters()):
            p.add_(0.3)
    assert not torch.equal(q_of(other, x, site=site).mean, before)
    assert torch.equal(q_of(guide, x, site=site).mean, before)
    revived = pickle.loads(pickle.dumps(guide))
    assert not revived._memory.known
    assert torch.equal(q_of(revived, x, site=site).mean, before)


# Laplace


def test_it_is_exact_where_the_posterior_is_gaussian(float64):
    for prior_scale in (1.0, 2.5):
        model = PPCA(5, 2, prior_scale=prior_scale).rotated(0)
        x = model(n=20).detach() * 3
        log_w = log_weights(model, Laplace(model), x, particles=50)
        torch.testing.assert_close(log_w, model.log_evidence(x).expand(50, 20), rtol=0, atol=1e-8)
    model = TwoLevels()
    x = model(n=20).detach()
    log_w = log_weights(model, Laplace(model), x, particles=50)
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(50, 20), rtol=0, atol=1e-8)
    mean, precision = model.posterior(x)
    q = q_of(Laplace(model), x, site="joint")
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.precision_matrix, precision.expand(20, 5, 5))


def test_it_is_exact_in_float32_too(digits):
    model = PPCA(64, 8).fit_closed_form(digits.train).rotated(seed=0).float()
    x = digits.test[:50].float()
    log_w = log_weights(model, Laplace(model), x, particles=10)
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(10, 50), rtol=0, atol=2e-3)


class OneDimension(UniqueModule):
    """z ~ N(0, 1), six observations of x given 1.5 z + 0.5 as logit, or as logarithm of the rate."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood, self.latents, self.event_shape = likelihood, {"z": Size(())}, Size((6,))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            eta = (1.5 * z + 0.5).unsqueeze(-1).expand(*z.shape, 6)
            return pyro.sample("x", self.likelihood(eta).to_event(1), obs=x)


LIKELIHOODS = {
    "Bernoulli": (lambda eta: dist.Bernoulli(logits=eta), lambda e: np.log1p(np.exp(e)), lambda p: p * (1 - p)),
    "Poisson": (lambda eta: dist.Poisson(eta.exp()), np.exp, lambda rate: rate),
}


@pytest.mark.parametrize(("likelihood", "normaliser", "variance"), LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_mode_and_curvature_are_those_of_a_search_by_scipy(likelihood, normaliser, variance, float64):
    model = OneDimension(likelihood)
    with torch.no_grad():
        x = model(n=12)
    x[0], x[1] = 0.0, 1.0
    q = q_of(Laplace(model), x, site="joint")
    for n, total in enumerate(x.sum(-1).tolist()):

        def energy(z, total=total):  # minus the log-density, up to a constant
            return z * z / 2 - total * (1.5 * z + 0.5) + 6 * normaliser(1.5 * z + 0.5)

        mode = minimize_scalar(energy, bounds=(-20, 20), method="bounded", options={"xatol": 1e-12}).x
        eta = 1.5 * mode + 0.5
        mean = 1 / (1 + np.exp(-eta)) if normaliser is not np.exp else np.exp(eta)
        assert q.mean[n].item() == pytest.approx(mode, abs=1e-6)
        assert q.precision_matrix[n].item() == pytest.approx(1 + 6 * 2.25 * variance(mean), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_constrained_site_has_its_mode_in_unconstrained_coordinates(dtype, float64):
    """A Gamma posterior of shape a and rate b: log z has its mode at log(a / b), with curvature a."""
    model = GammaPoisson()
    x = torch.cat([model(n=10), torch.tensor([[0.0, 0.0], [1e4, 2e4]])])
    q = q_of(Laplace(model, constraints=model.constraints), x.to(dtype), site="joint")
    shape = 3 + x.sum(-1, keepdim=True)
    torch.testing.assert_close(q.mean, (shape / 3.5).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(q.precision_matrix, shape.unsqueeze(-1), rtol=1e-6, atol=0)


def test_a_flat_direction_is_warned_about_and_stays_finite(float64):
    model, x = Ring(), torch.tensor([[4.0], [9.0], [2.0]])
    with pytest.warns(UserWarning, match="Laplace: of 3 data points, 0 did not converge .* 3 ended at a point"):
        log_w = log_weights(model, Laplace(model), x, particles=500)
    assert log_w.isfinite().all()
    assert (log_w.mean(0) < model.log_evidence(x)).all()


def test_a_search_that_is_cut_short_is_warned_about(float64):
    model = OneDimension(LIKELIHOODS["Poisson"][0])
    with pytest.warns(UserWarning, match="of 2 data points, 2 did not converge in 1 steps, and 0 ended"):
        Laplace(model, iterations=1)(torch.full((2, 6), 1e9))


class Spike(UniqueModule):
    """A scale with a density that rises without bound towards zero: there is no mode."""

    def __init__(self):
        super().__init__()
        self.latents, self.event_shape = {"s": Size(()), "m": Size((2,))}, Size((2,))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.HalfCauchy(torch.tensor(1.0)))
            m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(m, s.unsqueeze(-1)).to_event(1), obs=x)


def test_where_there_is_no_mode_the_search_says_so_and_ends():
    guide = Laplace(Spike(), constraints={"s": dist.constraints.positive})
    with pytest.warns(UserWarning, match="did not converge"):
        loc, scale_tril = guide._search(torch.zeros(3, 2))
    assert loc.isfinite().all() and scale_tril.isfinite().all()


class Steep(UniqueModule):
    """Z ~ N(0, 1), and x given z from a distribution whose parameters easily overflow float32."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood, self.latents, self.event_shape = likelihood, {"z": Size(())}, Size(())

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", self.likelihood(z), obs=x)


def test_steps_that_go_too_far_are_taken_back():
    """The first step makes the scale 0; the mode lies where the scale is that of the data."""
    model = Steep(lambda z: dist.Normal(0.0, (40 * z).exp()))
    x = torch.full((4,), 1e-3)
    q = q_of(Laplace(model), x, site="joint")
    mode = minimize_scalar(lambda z: z * z / 2 + 40 * z + 5e-7 * np.exp(-80 * z), bounds=(-1, 1), method="bounded").x
    torch.testing.assert_close(q.mean.flatten(), torch.full((4,), float(mode)), atol=1e-4, rtol=0)


def test_curvatures_that_are_not_finite_are_warned_about():
    model = Steep(lambda z: dist.Poisson((850 * z).exp()))
    with pytest.warns(UserWarning, match="q is poor there"):
        loc, scale_tril = Laplace(model)._search(torch.zeros(20))
    assert loc.isfinite().all() and scale_tril.isfinite().all()


def test_counts_are_met_in_the_precision_of_the_model():
    model = TwoLevels().double()
    x = torch.tensor([[1, 0, 2, 0], [0, 0, 1, 3]])
    q = q_of(Laplace(model), x, site="joint")
    assert q.mean.dtype == torch.float64
    torch.testing.assert_close(q.mean, model.posterior(x.double())[0])


def test_a_datum_finds_the_same_mode_in_any_company(float64):
    model = OneDimension(LIKELIHOODS["Poisson"][0])
    guide = Laplace(model)
    x = torch.poisson(torch.full((5, 6), 3.0))
    far = torch.cat([x, torch.full((1, 6), 1e5)])
    alone, together = (q_of(guide, data, site="joint") for data in (x, far))
    torch.testing.assert_close(together.mean[:5], alone.mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["guide", "function"])
def test_the_search_starts_where_it_is_told_to(kind, float64):
    """A banana has two modes, at opposite first coordinates; z lies on a positive half-line in another model."""
    model, x = Banana(), torch.full((6, 1), 9.0)
    for side in (-1.0, 1.0):
        start = lambda x, side=side: {"z": torch.tensor([3.0 * side, 0.5]).expand(len(x), 2)}
        if kind == "guide":
            start = amortize(model, mlp(1, [4]), MeanField, context=4)
            with torch.no_grad():
                start.families["z"].affine.weight.zero_()
                start.families["z"].affine.bias.copy_(torch.tensor([3.0 * side, 0.5, -9.0, -9.0]))
        guide = Laplace(model, start=start)
        mean = q_of(guide, x, site="joint").mean
        assert (mean[:, 0] * side > 2).all()
        assert not list(guide.parameters())  # the guide used as the start is not trained
    model = GammaPoisson()
    x = model(n=4)
    near = Laplace(model, constraints=model.constraints, start=lambda x: {"z": torch.full((len(x),), 30.0)})
    found, expected = (q_of(g, x, site="joint").mean for g in (near, Laplace(model, constraints=model.constraints)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_start_that_does_not_fit_is_refused():
    model, x = Banana(), torch.ones(3, 1)
    for start, match in (
        (lambda x: {"u": x}, r"for each of the sites \['z'\], but it returned \['u'\]"),
        (lambda x: x, "but it returned Tensor"),
        (lambda x: {"z": x}, r"of shape \[3, 2\] for the site 'z', but it returned shape \[3, 1\]"),
        (lambda x: {"z": torch.full((3, 2), torch.nan)}, "at its edge or outside"),
    ):
        with pytest.raises(ValueError, match=match):
            Laplace(model, start=start)(x)


def test_a_start_whose_parameters_move_is_asked_again(float64):
    model, plain, x = rotated()
    guide = Laplace(model, start=plain)
    calls = searches(guide)
    q_of(guide, x, site="joint")
    q_of(guide, x, site="joint")
    assert len(calls) == 1
    with torch.no_grad():
        next(plain.parameters()).add_(0.1)
    q_of(guide, x, site="joint")
    assert len(calls) == 2


def test_laplace_trains_a_model_as_its_exact_posterior_does(float64):
    model, _, x = pair("PPCA", "MeanField")
    guide = Laplace(model)
    assert not list(guide.parameters())
    loss = -log_weights(model, guide, x).sum()
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(-model.log_evidence(x).sum(), list(model.parameters()))
    draws = torch.stack([torch.autograd.grad(-log_weights(model, guide, x).sum(), model.weight)[0] for _ in range(400)])
    error = draws.std(0) / 400**0.5
    assert (
        (draws.mean(0) - expected[[n for n, _ in model.named_parameters()].index("weight")]).abs() < 5 * error
    ).all()
    assert len(slopes) == len(expected)


def test_joint_and_laplace_draw_the_same_sites(float64):
    model = TwoLevels()
    x = model(n=3).detach()
    for guide in (Laplace(model), Joint(mlp(4, [8]), FullCovariance(5, 8), model.latents)):
        values = guide(x)
        assert {site: tuple(z.shape) for site, z in values.items()} == {"top": (3, 2), "low": (3, 3)}
