"""Captured and compiled pairs against eager ones: the same numbers, fresh noise, nothing stale, honest refusals."""

import copy

import pytest
import torch
from members import GUIDES, MODELS, NO_INVERSE, TRAINED_CASES, pair
from pyro.infer import Trace_ELBO
from torch import nn

from jensen.families import FullCovariance, MeanField
from jensen.guides import amortize
from jensen.inference import ELBO, IWAE, CyclicalAnnealing, Renyi, evaluate, fit, log_weights
from jensen.inference import steps as stepping
from jensen.inference.capture import capture, split_draws
from jensen.inference.checkpoint import Run
from jensen.inference.draws import LogWeights
from jensen.inference.gradients import capture_loss, knobs_of, obstacle
from jensen.inference.history import History
from jensen.inference.weights import check_pair, parameters_of
from jensen.models import PPCA, VAE
from jensen.networks import mlp

SEARCHES = ("SemiAmortized", "Laplace")  # they search for each datum until they have found: a loop on values
OBJECTIVES = {
    "Trace_ELBO, vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "Trace_ELBO, one by one": lambda: Trace_ELBO(num_particles=2),
    "ELBO": lambda: ELBO(2),
    "ELBO, analytic KL": lambda: ELBO(analytic_kl=True),
    "ELBO, beta": lambda: ELBO(2, beta=CyclicalAnnealing(10)),
    "ELBO, free bits": lambda: ELBO(2, free_bits=0.3),
    "ELBO, sticking the landing": lambda: ELBO(2, "stl"),
    "IWAE": lambda: IWAE(3),
    "IWAE, sticking the landing": lambda: IWAE(3, "stl"),
    "IWAE, doubly reparameterized": lambda: IWAE(3, "dreg"),
    "Renyi": lambda: Renyi(0.5, 3, "dreg"),
}
PATHWISE = ("ELBO, sticking the landing", "IWAE, sticking the landing", "IWAE, doubly reparameterized", "Renyi")
REFUSED = {(o, g) for o in PATHWISE for g in NO_INVERSE} | {(o, "ExactPosterior") for o in PATHWISE[2:]}


def _captured(model, guide, x, objective):
    """A run, its layout and its loss graph."""
    layout = check_pair(model, guide, x)
    trained = [p for half in parameters_of(model, guide, x) for p in half]
    run = Run(model, guide, trained, torch.optim.Adam(trained), None, History())
    assert not obstacle(run, objective, layout)
    return run, layout, capture_loss(run, objective, layout, (x,))


def _is_that_of_the_objective(model, guide, x, objective):
    """Loss and every gradient of the graph, on other data than it was captured on, against the objective's own."""
    _, _, found = _captured(model, guide, x, objective)
    other = x[torch.randperm(len(x))]
    torch.manual_seed(3)
    loss, bound, *slopes = found.graph(*found.trained, *found.held, knobs_of(objective, (other,)), other)
    torch.manual_seed(3)
    expected = objective.differentiable_loss(model, guide, other)
    torch.testing.assert_close(loss.reshape(()), expected.detach().reshape(()), rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.grad(expected, found.trained, allow_unused=True)
    assert {p for p, g in zip(found.trained, gradient, strict=True) if g is not None} == set(found.moved)
    for slope, theirs in zip(slopes, [g for g in gradient if g is not None], strict=True):
        torch.testing.assert_close(slope, theirs, rtol=1e-8, atol=1e-9)
    if not isinstance(objective, Trace_ELBO):
        torch.testing.assert_close(bound, objective.bound)


@pytest.mark.parametrize(("model_name", "guide_name"), [c for c in TRAINED_CASES if c[1] not in SEARCHES])
def test_the_graph_of_every_pair_is_its_trace_elbo(model_name, guide_name, float64):
    model, guide, x = pair(model_name, guide_name)
    _is_that_of_the_objective(model, guide, x, Trace_ELBO())


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
    with pytest.warns(UserWarning, match="does not compile this pair"):
        history = fit(model, guide, x, epochs=1, compile=True, progress=False)
    assert not history.compiled
    assert history.route.startswith("eager: ")


def uncompiled(graph, *inputs):
    """In the place of the compiler: the graph as it was captured. What surrounds it is tested without waiting."""
    return graph


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(stepping, "compiled", uncompiled)
    monkeypatch.setattr("jensen.inference.draws.compiled", uncompiled)


def _small(dropout=False):
    """A pair without a known posterior, and 60 data."""
    decoder = nn.Sequential(mlp(2, [16]), nn.Dropout(0.5)) if dropout else mlp(2, [16])
    model = PPCA(5, 2) if not dropout else VAE(decoder, GAUSSIAN(), 2)
    guide = amortize(model, mlp(5, [16]), MeanField, context=16)
    return model, guide, model(n=60).detach()


def GAUSSIAN():
    from jensen.families import Gaussian

    return Gaussian(5, 16, scale="shared")


def _fitted(model, guide, x, compile, **options):
    """Parameters and history of a fit to copies of a pair."""
    model, guide = copy.deepcopy((model, guide))
    options = {"epochs": 3, "batch_size": 16, "seed": 0, "progress": False, **options}
    history = fit(model, guide, x, compile=compile, **options)
    return {**model.state_dict(), **guide.state_dict()}, history


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
    """Full batches are moved by the graph, the last of each epoch by the optimizer: each goes on from the other."""
    kind, options = OPTIMIZERS[optimizer]

    def make(parameters, lr):
        return kind(parameters, lr=lr, **options)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, guide, x = _small()
    settings = {"optimizer": make, "scheduler": scheduler, "lr": 1e-3}
    expected, _ = _fitted(model, guide, x, compile=False, **settings)
    found, history = _fitted(model, guide, x, compile=True, **settings)
    assert history.route == "captured and compiled"
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
    """The pair of the README, really compiled, with a smaller last batch, in half the precision of the data."""
    x = digits.train[:300].float()
    model = VAE(mlp(8, [128]), GAUSSIAN64(), latent=8)
    guide = amortize(model, mlp(64, [128]), FullCovariance, context=128)
    options = {"lr": 5e-3, "batch_size": 128, "epochs": 2}
    expected, eager = _fitted(model, guide, x, compile=False, **options)
    found, history = _fitted(model, guide, x, compile=True, **options)
    assert history.compiled
    assert history.route == "captured and compiled"
    assert not eager.compiled
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4, msg=f"{name} moved otherwise")


def GAUSSIAN64():
    from jensen.families import Gaussian

    return Gaussian(64, 128, scale="shared")


def test_captured_steps_are_eager_ones_bit_by_bit(monkeypatch):
    model, guide, x = _small()
    expected, eager = _fitted(model, guide, x, compile="auto")
    assert eager.route == "eager: a graph would not pay for 9 steps"
    monkeypatch.setattr(stepping, "_WORTH_CAPTURE", 1)
    found, history = _fitted(model, guide, x, compile="auto")
    assert history.route == "captured: compiling would not pay for 9 steps"
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-6)  # Pyro adds sites up in Python, in double precision
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_noise_is_fresh_at_every_step(no_compiler):
    model, guide, x = _small()
    _, history = _fitted(model, guide, x, compile=True, optimizer=torch.optim.SGD, lr=1e-30, batch_size=60, epochs=5)
    assert history.compiled
    assert len(set(history.elbo)) == 5


def test_draws_that_are_no_sites_are_fresh_too_and_gone_in_evaluation(float64, no_compiler):
    """Dropout: random in training, absent when the pair is measured."""
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
        fast = LogWeights(model, guide, 1, True)
        with torch.no_grad():
            torch.manual_seed(0)
            weights.append(fast((x,), 50))
            torch.manual_seed(0)
            expected = log_weights(model, guide, x, particles=50)
        assert fast.route == "captured and compiled"
        torch.testing.assert_close(weights[-1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*weights)


@pytest.mark.parametrize("guide_name", [g for g in GUIDES if g not in SEARCHES])
@pytest.mark.parametrize("model_name", ["VAE, Bernoulli", "Ring"])
def test_weights_from_a_graph_are_the_pairs_own(model_name, guide_name, no_compiler):
    if (model_name, guide_name) not in {(m, g) for m in MODELS for g in GUIDES if g != "ExactPosterior"}:
        return  # it has none
    model, guide, x = pair(model_name, guide_name)
    fast = LogWeights(model, guide, 1, True)
    with torch.no_grad():
        for batch, particles in (((x,), 4), ((x,), 4), ((x.flip(0),), 4), ((x[:3],), 6)):
            torch.manual_seed(2)
            found = fast(batch, particles)
            torch.manual_seed(2)
            assert torch.equal(found, log_weights(model, guide, *batch, particles=particles))
        assert fast.route == "captured and compiled"
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
