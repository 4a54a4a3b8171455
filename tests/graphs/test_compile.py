"""Traced and compiled models and guides against eager ones: equal numbers, new noise, no stale state, clear errors."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import members
import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import Discrete
from members import GUIDES, MODELS, NO_INVERSE, TRAINED_CASES, pair
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from jensen.families import BinaryVector, FullCovariance, Gaussian, MeanField
from jensen.graphs.capture import capture, split_draws
from jensen.graphs.draws import LogWeights
from jensen.graphs.guards import Witnesses
from jensen.graphs.products import is_float32, product_route
from jensen.guides import SemiAmortized, amortize
from jensen.inference import ELBO, IWAE, CyclicalAnnealing, Objective, fit, float32_products, log_weights
from jensen.inference import evaluate as with_refined
from jensen.inference.training.checkpoint import Run
from jensen.inference.training.gradients import capture_loss, knobs_of, obstacle
from jensen.inference.training.history import History
from jensen.kernel.plain import PlainState
from jensen.kernel.weights import Pair, check_pair, parameters_of
from jensen.models import PPCA, VAE
from jensen.module import UniqueModule
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

stepping, products = sys.modules["jensen.inference.training.steps"], sys.modules["jensen.graphs.products"]
compiling = sys.modules["jensen.graphs.compile"]

SEARCHES = ("Laplace",)  # it searches until every data point has converged: a loop on values
OBJECTIVES = {
    "Trace_ELBO, vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "Trace_ELBO, one by one": lambda: Trace_ELBO(num_particles=2),
    **members.OBJECTIVES,
}
PATHWISE = ("ELBO, sticking the landing", "IWAE, sticking the landing", "IWAE, doubly reparameterized", "Renyi")
REFUSED = {(o, g) for o in PATHWISE for g in NO_INVERSE} | {(o, "ExactPosterior") for o in PATHWISE[2:]}


def _captured(model, guide, x, objective):
    """A run, its layout and its loss graph."""
    layout = check_pair(model, guide, x)
    trained = [p for half in parameters_of(model, guide, x) for p in half]
    run = Run(model, guide, trained, torch.optim.Adam(trained), None, History())
    assert not obstacle(run, objective, layout)
    return run, layout, capture_loss(run, objective, layout, (x,), PlainState(model, guide, objective))


def _is_that_of_the_objective(model, guide, x, objective):
    """Loss and every gradient of the graph, on other data than it was traced on, against those of the objective."""
    _, _, found = _captured(model, guide, x, objective)
    other = x[torch.randperm(len(x))]
    torch.manual_seed(3)
    loss, bound, *slopes = found.graph(*found.trained, *found.held, knobs_of(objective, 0, (other,)), other)
    torch.manual_seed(3)
    expected = objective.differentiable_loss(model, guide, other)
    torch.testing.assert_close(loss.reshape(()), expected.detach().reshape(()), rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.grad(expected, found.trained, allow_unused=True)
    assert {p for p, g in zip(found.trained, gradient, strict=True) if g is not None} == set(found.moved)
    for slope, theirs in zip(slopes, [g for g in gradient if g is not None], strict=True):
        torch.testing.assert_close(slope, theirs, rtol=1e-8, atol=1e-9)
    if not isinstance(objective, Trace_ELBO):
        torch.testing.assert_close(bound, objective.bound)


@pytest.mark.slow
@pytest.mark.parametrize(("model_name", "guide_name"), [c for c in TRAINED_CASES if c[1] not in SEARCHES])
def test_the_graph_of_every_pair_is_its_trace_elbo(model_name, guide_name, float64):
    model, guide, x = pair(model_name, guide_name)
    _is_that_of_the_objective(model, guide, x, Trace_ELBO())


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("guide_name", [g for g in GUIDES if g not in SEARCHES])
def test_the_graph_of_every_objective_is_the_objective(guide_name, objective, float64):
    if (objective, guide_name) in REFUSED:
        return  # by the objective itself: tests/test_objectives.py
    model, guide, x = pair("PPCA", guide_name)
    _is_that_of_the_objective(model, guide, x, OBJECTIVES[objective]())


@pytest.mark.parametrize("guide_name", SEARCHES)
def test_searches_are_left_to_python(guide_name):
    model, guide, x = pair("PPCA", guide_name)
    with pytest.warns(UserWarning, match="does not compile the steps"):
        history = fit(model, guide, x, epochs=1, compile=True, progress=False)
    assert not history.compiled
    assert history.route == "eager: Laplace searches until every data point has converged"


def test_a_search_of_few_steps_is_part_of_the_graph_and_one_of_many_is_not(no_compiler, float64):
    """The first steps of Adam are signs of slopes, which rounding may turn: float64 leaves none to turn here."""
    for steps, route in ((3, "traced and compiled"), (21, "eager: 21 steps are too many for a graph around them")):
        model, plain, x = _small()
        runs = []
        for compile in (False, True):
            half = copy.deepcopy((model, plain))
            guide = SemiAmortized(half[1], half[0], steps=steps)
            with pytest.warns(UserWarning, match=route) if compile and steps > 20 else contextlib.nullcontext():
                history = fit(half[0], guide, x, epochs=2, compile=compile, seed=0, progress=False)
            runs.append([*half[0].parameters(), *half[1].parameters()])
        assert history.route.startswith(route)
        for fast, eager in zip(*reversed(runs), strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-9, atol=1e-12)


def uncompiled(graph, *inputs):
    """Replaces the compiler by the traced graph, to test the code around it quickly."""
    return graph


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(stepping, "compiled", uncompiled)
    monkeypatch.setattr("jensen.graphs.routes.compiled", uncompiled)


def _small(dropout=False):
    """A model without a known posterior, its guide, and 60 data points."""
    decoder = nn.Sequential(mlp(2, [16]), nn.Dropout(0.5)) if dropout else mlp(2, [16])
    model = PPCA(5, 2) if not dropout else VAE(decoder, Gaussian(5, 16, scale="shared"), 2)
    guide = amortize(model, mlp(5, [16]), MeanField, context=16)
    return model, guide, model(n=60).detach()


def _fitted(model, guide, x, compile, objective=None, **options):
    """Parameters and history of a fit of copies of a model and guide."""
    model, guide = copy.deepcopy((model, guide))
    options = {"epochs": 3, "batch_size": 16, "seed": 0, "progress": False, **options}
    history = fit(model, guide, x, objective, compile=compile, **options)
    return {**model.state_dict(), **guide.state_dict()}, history


class Warmed(Objective):
    """A user's objective: the mean of two importance-weighted bounds with gradually increasing weights."""

    def __init__(self, steps=6):
        super().__init__(6, knobs=[CyclicalAnnealing(steps, start=0.3), 0.25], shaped=True)

    def value(self, terms, knobs):
        log_w = terms.log_weights.unflatten(0, (2, 3))  # [2, 3, N]
        kl = (terms.log_q["z"] - terms.log_p["z"]).mean(0).sum()
        shaped = knobs[0] * (log_w.logsumexp(1) - math.log(3)).mean(0).sum() - knobs[1] * kl
        return -shaped, (log_w.logsumexp(1) - math.log(3)).mean(0).sum()


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {}),
    "Adam, weight decay": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "Adam, maximize": (torch.optim.Adam, {"maximize": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_those_of_torch(optimizer, float64, no_compiler):
    """Full batches are steps of the graph, the last of each epoch a step of the optimizer; both share their state."""
    kind, options = OPTIMIZERS[optimizer]

    def make(parameters, lr):
        return kind(parameters, lr=lr, **options)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, guide, x = _small()
    settings = {"optimizer": make, "scheduler": scheduler, "lr": 1e-3}
    expected, _ = _fitted(model, guide, x, compile=False, **settings)
    found, history = _fitted(model, guide, x, compile=True, **settings)
    assert history.route == "traced and compiled"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=f"{name} moved otherwise")


def test_groups_of_parameters_keep_their_rates(float64, no_compiler):
    def make(parameters, lr):
        return torch.optim.Adam([{"params": parameters[:2], "lr": lr}, {"params": parameters[2:], "lr": 3 * lr}])

    model, guide, x = _small()
    expected, _ = _fitted(model, guide, x, compile=False, optimizer=make)
    found, _ = _fitted(model, guide, x, compile=True, optimizer=make)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=f"{name} moved otherwise")


def test_compiled_steps_are_eager_ones_but_for_rounding(digits):
    """The model and guide of the README, compiled, with a smaller last batch, in half the precision of the data."""
    x = digits.train[:300].float()
    model = VAE(mlp(8, [128]), Gaussian(64, 128, scale="shared"), latent=8)
    guide = amortize(model, mlp(64, [128]), FullCovariance, context=128)
    options = {"lr": 5e-3, "batch_size": 128, "epochs": 2}
    expected, eager = _fitted(model, guide, x, compile=False, **options)
    found, history = _fitted(model, guide, x, compile=True, **options)
    assert history.compiled
    assert history.route == "traced and compiled"
    assert not eager.compiled
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4, msg=f"{name} moved otherwise")


@pytest.mark.parametrize(
    "make", [lambda: None, *members.OBJECTIVES.values(), Warmed], ids=["none", *members.OBJECTIVES, "own"]
)
def test_captured_steps_are_eager_ones_bit_by_bit(make, monkeypatch):
    model, guide, x = _small()
    expected, eager = _fitted(model, guide, x, compile="auto", objective=make())
    assert eager.route == "eager: tracing would not pay for 9 steps"
    monkeypatch.setattr(stepping, "_LEAST", 1)
    found, history = _fitted(model, guide, x, compile="auto", objective=make())
    assert history.route == "traced: compiling would not pay for 9 steps"
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-6)  # Pyro adds sites up in Python, in double precision
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_noise_is_fresh_at_every_step(no_compiler):
    model, guide, x = _small()
    _, history = _fitted(model, guide, x, compile=True, optimizer=torch.optim.SGD, lr=1e-30, batch_size=60, epochs=5)
    assert history.compiled
    assert len(set(history.elbo)) == 5


def test_draws_that_are_no_sites_are_fresh_too_and_gone_in_evaluation(float64, no_compiler):
    """Dropout: random in training, absent in measurements."""
    model, guide, x = _small(dropout=True)
    expected, eager = _fitted(model, guide, x, compile=False)
    found, history = _fitted(model, guide, x, compile=True)
    assert history.compiled
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-10)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    measured = [evaluate(model, guide, x, 64, seed=0, compile=c, progress=False) for c in (True, False)]
    torch.testing.assert_close(measured[0].elbo, measured[1].elbo)


def test_running_means_move_once_a_step(float64, no_compiler):
    model, _, x = _small()
    guide = amortize(model, nn.Sequential(mlp(5, [16]), nn.BatchNorm1d(16)), MeanField, context=16)
    moved = [_fitted(model, guide, x, compile=c)[0] for c in (True, False)]
    assert moved[0]["encoder.1.num_batches_tracked"] == moved[1]["encoder.1.num_batches_tracked"] == 12
    torch.testing.assert_close(moved[0]["encoder.1.running_mean"], moved[1]["encoder.1.running_mean"])


def test_frozen_parameters_stay_and_are_read_where_they_are(float64, no_compiler):
    model, guide, x = _small()
    found = fit(model, guide, x, epochs=1, compile=True, freeze=model, seed=0, progress=False)
    assert found.compiled
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight.mul_(2)
    assert not torch.equal(before["weight"], model.weight)


def test_two_pairs_share_what_was_compiled_but_no_parameter():
    pairs = [pair("PPCA", "MeanField") for _ in range(2)]
    weights = []
    for model, guide, x in pairs:
        fast = LogWeights(Pair(model, guide, 1), True)
        with torch.no_grad():
            torch.manual_seed(0)
            weights.append(fast((x,), 50))
            torch.manual_seed(0)
            expected = log_weights(model, guide, x, particles=50)
        assert fast.route == "traced and compiled"
        torch.testing.assert_close(weights[-1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*weights)


@pytest.mark.parametrize("guide_name", [g for g in GUIDES if g not in SEARCHES])
@pytest.mark.parametrize("model_name", ["VAE, Bernoulli", "Ring"])
def test_weights_from_a_graph_are_the_pairs_own(model_name, guide_name, no_compiler):
    if (model_name, guide_name) not in {(m, g) for m in MODELS for g in GUIDES if g != "ExactPosterior"}:
        return  # it has none
    model, guide, x = pair(model_name, guide_name)
    fast = LogWeights(Pair(model, guide, 1), True)
    with torch.no_grad():
        for batch, particles in (((x,), 4), ((x,), 4), ((x.flip(0),), 4), ((x[:3],), 6)):
            torch.manual_seed(2)
            found = fast(batch, particles)
            torch.manual_seed(2)
            assert torch.equal(found, log_weights(model, guide, *batch, particles=particles))
        assert fast.route == "traced and compiled"
        for p in guide.parameters():
            p.add_(0.1)
        fast.forget()
        torch.manual_seed(2)
        found = fast((x,), 4)
        torch.manual_seed(2)
        assert torch.equal(found, log_weights(model, guide, x, particles=4))


def test_evaluate_gives_the_same_numbers_compiled():
    model, guide, x = _small()
    eager, fast = (evaluate(model, guide, x, 500, seed=0, compile=c, progress=False) for c in (False, True))
    torch.testing.assert_close(fast.log_evidence, eager.log_evidence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.elbo, eager.elbo, rtol=1e-5, atol=1e-5)


def test_the_encoder_runs_once_for_a_batch(float64):
    model, guide, x = _small()
    graph = capture(lambda x: (log_weights(model, guide, x, particles=8, max_plate_nesting=1).detach(),), x)
    once, again = split_draws(graph)

    def products(g):
        return sum("mm" in str(node.target) for node in g.module.graph.nodes)

    assert products(graph) == products(once) + products(again)
    assert products(once) == 2  # the encoder's layer and the family's
    inputs = (x, *graph.constants)
    torch.manual_seed(1)
    (whole,) = graph(*inputs[:1])
    torch.manual_seed(1)
    (parts,) = again(*inputs, *once(*inputs))
    assert torch.equal(whole, parts)


def test_what_is_written_in_place_is_not_split(float64):
    def fn(x):
        fixed = torch.zeros(3, dtype=x.dtype)
        view = fixed[:2]
        noise = torch.empty(2, dtype=x.dtype).normal_()
        view.copy_(noise)
        return (fixed.exp() + x.exp(),)

    graph = capture(fn, torch.zeros(3))
    once, again = split_draws(graph)
    inputs = (torch.ones(3), *graph.constants)
    known = once(*inputs)
    torch.manual_seed(4)
    (whole,) = graph(*inputs[:1])
    torch.manual_seed(4)
    (parts,) = again(*inputs, *known)
    assert torch.equal(whole, parts)
    assert not torch.equal(again(*inputs, *known)[0], parts)


class Poisoned(PPCA):
    """A data point with a first feature above 100 makes the loss infinite."""

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean + z @ self.weight.T, self.noise).to_event(1), obs=x)
            pyro.factor("poison", torch.where(x[:, 0] > 100, -math.inf, 0.0))


@pytest.mark.parametrize("compile", [True, False])
def test_a_step_that_is_not_finite_moves_nothing_and_is_named(compile, no_compiler):
    model = Poisoned(5, 2)
    guide = amortize(model, mlp(5, [16]), MeanField, context=16)
    x = torch.randn(640, 5)
    x[17, 0] = 101.0
    torch.manual_seed(0)
    bad_step = [17 in rows for rows in torch.randperm(640).split(64)].index(True) + 1
    before = copy.deepcopy({**model.state_dict(), **guide.state_dict()})
    with pytest.raises(FloatingPointError, match=rf"at or after step {bad_step} \(epoch 1\)"):
        fit(model, guide, x, epochs=3, batch_size=64, seed=0, compile=compile, progress=False)
    for name, value in {**model.state_dict(), **guide.state_dict()}.items():
        assert torch.equal(value, before[name]), f"{name} is not what it was"


def test_the_graph_of_a_step_guards_its_update():
    model = Poisoned(5, 2)
    guide = amortize(model, mlp(5, [16]), MeanField, context=16)
    x = torch.randn(30, 5)
    run, _, found = _captured(model, guide, x, Trace_ELBO())
    update = stepping.update_of(run.optimizer, list(found.moved))
    averages = [torch.zeros_like(p) for p in found.moved]
    states = [[*moments, mean] for moments, mean in zip(update.moments, averages, strict=True)]
    moving = [*(p.detach().clone() for p in found.trained), *(m for state in states for m in state)]
    held = (*found.held, knobs_of(Trace_ELBO(), 0, (x,)))
    hyper = torch.cat([update.hyper(1), torch.full((1, 1), 0.5, dtype=torch.float64)], 1)  # with the average's weight
    example = (*(m.clone() for m in moving), hyper, *held, x)
    whole = stepping._with_update(found, update, [len(state) for state in states], 10.0, example)
    before = [m.clone() for m in moving]
    loss, _ = whole(*moving, hyper, *held, x.index_fill(1, torch.tensor([0]), 101.0))
    assert loss.isnan()
    assert all(map(torch.equal, moving, before))
    loss, _ = whole(*moving, hyper, *held, x)
    assert loss.isfinite()
    assert not any(map(torch.equal, moving, before))


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", ["slope", "input"])
@pytest.mark.parametrize("rows", [3, 500])
def test_witnesses_see_what_is_not_finite(bad, place, rows):
    """With 3 rows the factors of a gradient are looked at, with 500 the gradient itself."""
    slope, x = torch.randn(rows, 30), torch.randn(rows, 40)
    graph = capture(lambda slope, x: (slope.sum(), (slope.t() @ x), slope.sum(0)), slope, x)
    witnesses = Witnesses(graph, first=1)
    if bad is not None:
        {"slope": slope, "input": x}[place][1, 2] = bad
        if bad == 1e30:
            {"slope": x, "input": slope}[place][1, 3] = 1e30
    outputs = witnesses.graph(slope, x)
    assert bool(witnesses.finite(outputs[3:])) == (bad is None)
    assert (sum(o.numel() for o in outputs[3:5]) < 1200) == (rows == 3)


def _global_scale():
    """Parameters by a bare pyro.param."""

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide, torch.randn(20, 1)


class Directions(nn.Module):
    """A rejection sampler: a von Mises angle for each data point."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.VonMises(z * self.weight[0], 2.0), obs=x)

    def guide(self, x):
        angle = dist.VonMises(torch.zeros(len(x)), 2.0).sample()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.weight[1] + 0 * angle, 1.0))


class Counting(PPCA):
    """Python counts the calls; a graph would not."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.calls * z @ self.weight.T, self.noise).to_event(1), obs=x)


def _scored():
    model = Discrete(BinaryVector)
    return model, amortize(model, mlp(4, [16]), BinaryVector, context=16), model(n=20).detach()


def _counting():
    model = Counting(5, 2)
    return model, amortize(model, mlp(5, [16]), MeanField, context=16), torch.randn(20, 5)


def _directions():
    pair = Directions()
    return pair.model, pair.guide, torch.randn(20)


EAGER = {
    "score function": (_scored, Trace_ELBO, "have no rsample"),
    "our score function": (_scored, IWAE, "have no rsample"),
    "pyro.param": (_global_scale, Trace_ELBO, "pyro.param or pyro.module makes parameters"),
    "rejection sampler": (_directions, Trace_ELBO, "eager: "),
    "Pyro's other losses": (_small, TraceMeanField_ELBO, "TraceMeanField_ELBO reads values"),
    "what Python remembers": (
        _counting,
        Trace_ELBO,
        "each run of model and guide changes the attribute 'calls' of Counting",
    ),
}


@pytest.mark.parametrize("kind", EAGER)
def test_what_cannot_be_captured_runs_eagerly_and_says_so(kind):
    make, objective, reason = EAGER[kind]
    model, guide, x = make()
    with pytest.warns(UserWarning, match="does not compile the steps; they run eager"):
        history = fit(model, guide, x, objective(), epochs=2, compile=True, progress=False)
    assert not history.compiled
    assert reason in history.route
    assert history.steps == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(model, guide, x, objective(), epochs=2, progress=False).route.startswith("eager")


def test_enumeration_runs_eagerly():
    model = Discrete(BinaryVector)

    class Empty(PPCA):
        def forward(self, x=None, *, n=1):
            pass

    guide = Empty(5, 2)
    x = model(n=20).detach()
    enumerated = pyro.infer.config_enumerate(model, "parallel")
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.warns(UserWarning, match="TraceEnum_ELBO reads values"):
        history = fit(enumerated, guide, x, objective, epochs=2, compile=True, progress=False)
    assert not history.compiled


def test_autoguides_are_captured(float64, no_compiler):
    results = []
    for compile in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, _, x = _small()
        guide = AutoNormal(model)
        history = fit(model, guide, x, epochs=3, batch_size=60, compile=compile, seed=0, progress=False)
        results.append((history, [*model.parameters(), *guide.parameters()]))
    (fast, found), (_, expected) = results
    assert fast.compiled
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


_NO_COMPILER = """
import warnings, torch, torch._inductor.config
from jensen.families import Gaussian, MeanField
from jensen.guides import amortize
from jensen.inference import fit
from jensen.models import VAE
from jensen.networks import mlp
torch._inductor.config.cpp.cxx = ("no-such-compiler",)
model = VAE(mlp(3, [7]), Gaussian(5, 7, scale="shared"), 3)
guide = amortize(model, mlp(5, [7]), MeanField, context=7)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    history = fit(model, guide, torch.randn(33, 5), epochs=2, batch_size=11, compile=True, progress=False)
assert any("they run traced: " in str(w.message) for w in said), said
assert not history.compiled
assert history.steps == 6
"""


@pytest.mark.slow
def test_without_a_compiler_the_graph_runs_as_it_is(tmp_path):
    """In a separate process, because Inductor caches that it found no compiler."""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _NO_COMPILER], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_smaller_batches_cost_no_second_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(stepping, "compiled", lambda graph, *inputs: asked.append(1) or graph)
    monkeypatch.setattr(stepping, "_LEAST", 2)
    model, guide, x = _small()
    history = fit(model, guide, x, epochs=4, batch_size=16, compile=True, progress=False)
    assert history.steps == 16
    assert len(asked) == 1


def test_a_resumed_run_takes_the_route_it_was_begun_with(tmp_path, no_compiler, float64):
    model, guide, x = _small()
    options = {"batch_size": 16, "seed": 0, "progress": False}
    whole, parts = copy.deepcopy((model, guide)), copy.deepcopy((model, guide))
    fit(*whole, x, epochs=4, compile=True, **options)
    fit(*parts, x, epochs=2, compile=True, checkpoint=tmp_path / "run", **options)
    history = fit(*parts, x, epochs=4, checkpoint=tmp_path / "run", resume=True, **options)
    assert history.compiled
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), f"{name} differs"


def test_a_schedule_inside_the_loss_goes_on(float64, no_compiler):
    model, guide, x = _small()
    runs = [
        _fitted(model, guide, x, c, objective=ELBO(beta=CyclicalAnnealing(6)), batch_size=60, epochs=7)[1]
        for c in (False, True)
    ]
    assert runs[1].compiled
    assert runs[1].shaped == pytest.approx(runs[0].shaped, rel=1e-9)
    assert runs[1].elbo == pytest.approx(runs[0].elbo, rel=1e-9)


class Subsampled(PPCA):
    """The model subsamples the data, with new batches at every step."""

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", len(x), subsample_size=10, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x[rows])


class Following(UniqueModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)

    def forward(self, x):
        with pyro.plate("data", len(x), subsample_size=10, dim=-1) as rows:
            pyro.sample("z", dist.Normal(self.net(x[rows]), 1.0).to_event(1))


@pytest.mark.parametrize("objective", [Trace_ELBO, ELBO, IWAE])
def test_subsampling_in_the_model_is_captured(objective, float64, no_compiler):
    model, guide = Subsampled(5, 2), Following()
    x = torch.randn(40, 5)
    runs = [_fitted(model, guide, x, c, objective=objective(), batch_size=40, epochs=4)[1] for c in (False, True)]
    assert runs[1].route == "traced and compiled"
    assert len(set(runs[1].elbo)) == 4
    assert runs[1].elbo == pytest.approx(runs[0].elbo, rel=1e-9)


def test_products_take_the_faster_route_only_where_it_is_float32():
    a, b = torch.randn(64, 784), torch.randn(784, 100)
    exact = a.double() @ b.double()
    assert is_float32((a @ b - exact).abs().max().item(), 784)
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert not is_float32((rounded - exact).abs().max().item(), 784)


@pytest.mark.parametrize("pays", [True, False])
def test_the_users_setting_of_products_is_kept(pays, monkeypatch):
    monkeypatch.setattr(products, "_pays", lambda: pays)
    cpu = torch.device("cpu")
    with product_route(cpu) as taken:
        assert taken == ("onednn" if pays else "default")
        assert torch.get_float32_matmul_precision() == ("medium" if pays else "highest")
    assert torch.get_float32_matmul_precision() == "highest"
    with product_route(cpu, "default") as taken:
        assert taken == "default"
        assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    try:
        with product_route(cpu) as taken:
            assert taken == "default"
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    float32_products("default")
    try:
        with product_route(cpu) as taken:
            assert taken == "default"
    finally:
        float32_products("auto")
    with pytest.raises(ValueError, match="'auto' or 'default'"):
        float32_products("fast")


def test_a_call_inside_a_run_has_products_of_its_own(monkeypatch):
    monkeypatch.setattr(products, "_pays", lambda: True)
    monkeypatch.setattr(products, "_is_accurate", lambda: True)
    cpu, setting = torch.device("cpu"), torch.get_float32_matmul_precision
    with product_route(cpu):
        for begun, expected in ((None, "onednn"), ("onednn", "onednn"), ("default", "default")):
            with product_route(cpu, begun) as taken:
                assert taken == expected
                assert setting() == ("medium" if expected == "onednn" else "highest")
                with product_route(cpu) as third:
                    assert (third, setting()) == ("onednn", "medium")
            assert setting() == "medium"
        with product_route(torch.device("cuda")) as taken:  # where "medium" would round to TF32
            assert (taken, setting()) == ("default", "highest")
        assert setting() == "medium"
    assert setting() == "highest"
    torch.set_float32_matmul_precision("medium")  # by the user
    try:
        with product_route(cpu) as outer, product_route(cpu) as inner:
            assert (outer, inner, setting()) == ("default", "default", "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_of_a_run_that_goes_on_are_not_timed_again(monkeypatch):
    def timed():
        raise AssertionError("timed")

    monkeypatch.setattr(products, "_pays", timed)
    monkeypatch.setattr(products, "_is_accurate", lambda: True)
    cpu = torch.device("cpu")
    for begun in ("onednn", "default"):
        with product_route(cpu, begun) as taken:
            assert taken == begun
    monkeypatch.setattr(products, "_is_accurate", lambda: False)
    with (
        pytest.warns(UserWarning, match="started with the float32 products of oneDNN, which are not available here"),
        product_route(cpu, "onednn") as taken,
    ):
        assert taken == "default"


def test_products_of_a_checkpoint_are_those_of_the_resumed_run(tmp_path, monkeypatch):
    model, guide, x = _small()
    taken = []
    monkeypatch.setattr(products, "_is_accurate", lambda: True)
    for epochs, pays in ((1, True), (2, False)):  # the trial would decide differently the second time
        monkeypatch.setattr(products, "_pays", lambda pays=pays: pays)
        fit(model, guide, x, epochs=epochs, checkpoint=tmp_path / "c.pt", resume=True, progress=False)
        taken.append(torch.load(tmp_path / "c.pt", weights_only=True)["settings"]["products"])
    assert taken == ["onednn", "onednn"]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/cache")
    compiling.ensure_cache.cache_clear()
    with pytest.warns(UserWarning, match="TORCHINDUCTOR_CACHE_DIR=/dev/null/cache, is not"):
        compiling.ensure_cache()
    assert os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    compiling.ensure_cache.cache_clear()
    compiling.ensure_cache()  # no warning for a writable one
    compiling.ensure_cache.cache_clear()


@pytest.mark.parametrize("call", [fit, evaluate])
def test_compile_is_one_of_three(call):
    model, guide, x = _small()
    with pytest.raises(ValueError, match="compile must be 'auto' or True or False, but got 'yes'"):
        call(model, guide, x, compile="yes", progress=False)


def test_all_data_at_every_step_are_captured_too():
    model, guide, x = _small()
    history = fit(model, guide, x, epochs=250, seed=0, progress=False)
    assert history.route == "traced: compiling would not pay for 250 steps"


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", members.OBJECTIVES)
def test_fit_leaves_an_objective_as_it_was(name, compile, no_compiler, float64):
    model, guide, x = _small()
    objective = members.OBJECTIVES[name]()
    before = dict(vars(objective))
    history = fit(model, guide, x, objective, epochs=3, compile=compile, seed=0, progress=False)
    assert history.compiled == compile
    assert all(vars(objective)[key] is value for key, value in before.items())
    assert set(vars(objective)) == set(before)
    assert objective.step == 0
    assert objective.bound.isnan()


@pytest.mark.parametrize("compile", [True, False])
def test_a_history_holds_the_bound_of_its_steps_beside_the_shaped_loss(compile, no_compiler, float64):
    model, guide, x = _small()
    twins, objective = copy.deepcopy((model, guide)), ELBO(beta=0.5)
    optimizer = torch.optim.SGD([p for half in twins for p in half.parameters()], lr=1e-3)
    options = {"epochs": 3, "batch_size": 60, "optimizer": torch.optim.SGD, "seed": 0, "progress": False}
    history = fit(model, guide, x, objective, compile=compile, **options)
    torch.manual_seed(0)
    for step in range(3):
        optimizer.zero_grad()
        loss = objective.loss_and_grads(*twins, x)
        optimizer.step()
        assert objective.bound.item() / 60 == pytest.approx(history.elbo[step], rel=1e-9)
        assert -loss / 60 == pytest.approx(history.shaped[step], rel=1e-9)
    assert history.shaped[-1] > history.elbo[-1]


def test_an_objective_of_ones_own_is_captured_and_compiled(float64, no_compiler):
    model, guide, x = _small()
    _is_that_of_the_objective(model, guide, x, Warmed())
    expected, eager = _fitted(model, guide, x, compile=False, objective=Warmed(), epochs=4)
    found, history = _fitted(model, guide, x, compile=True, objective=Warmed(), epochs=4)
    assert eager.route == "eager: compile=False"
    assert history.route == "traced and compiled"
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-9)
    assert history.shaped == pytest.approx(eager.shaped, rel=1e-9)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=f"{name} moved otherwise")
    fixed, _ = _fitted(model, guide, x, compile=True, objective=Warmed(10**9), epochs=4)
    assert not any(
        torch.equal(found[name], value) for name, value in fixed.items()
    )  # the changed settings continue in the graph


def test_an_objective_of_ones_own_is_really_compiled():
    model, guide, x = _small()
    options = {"objective": Warmed(), "lr": 1e-2, "optimizer": torch.optim.SGD}
    expected, _ = _fitted(model, guide, x, compile=False, **options)
    found, history = _fitted(model, guide, x, compile=True, **options)
    assert history.compiled
    assert history.route == "traced and compiled"
    start = {**model.state_dict(), **guide.state_dict()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=f"{name} moved otherwise")
        assert not torch.equal(start[name], value), f"{name} did not move"


def test_an_objective_that_reads_values_runs_eagerly():
    class Cautious(Objective):
        def value(self, terms, knobs):
            bound = terms.log_weights.mean(0).sum()
            return -bound if bool(bound.detach() > -1e9) else -2 * bound, bound

    model, guide, x = _small()
    with pytest.warns(UserWarning, match="does not compile the steps; they run eager"):
        history = fit(model, guide, x, Cautious(), epochs=2, compile=True, progress=False)
    assert history.steps == 2
    assert len(history.elbo) == 2
