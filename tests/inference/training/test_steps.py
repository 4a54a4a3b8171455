"""Steps of a model and guide whose Python state changes in training: every route equals the eager one."""

import copy
import sys
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from jensen.families import MeanField
from jensen.guides import SemiAmortized, amortize
from jensen.inference import Callback, Objective, fit
from jensen.models import PPCA
from jensen.networks import mlp

stepping = sys.modules["jensen.inference.training.steps"]


class Relaxed(nn.Module):
    """A relaxed one-hot latent, in the style of Pyro's examples, with a temperature and a weight of its KL."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder, self.temperature = nn.Linear(3, 3), nn.Linear(3, 3), 5.0
        self.register_buffer("sharpness", torch.tensor(1.0))
        self.dropped, self.options = nn.Dropout(0.5), {"beta": 1.0}
        self.calls, self.counted = 0, False

    def model(self, x):
        pyro.module("decoder", self.decoder)
        self.calls += self.counted
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=self.options["beta"]):
                prior = dist.RelaxedOneHotCategorical(x.new_tensor(self.temperature), logits=x.new_zeros(len(x), 3))
                z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(self.decoder(z), 0.3 + 0.01 * self.calls).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        logits = self.sharpness * self.encoder(self.dropped(x))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=self.options["beta"]):
            pyro.sample("z", dist.RelaxedOneHotCategorical(x.new_tensor(self.temperature), logits=logits))


class Change(Callback):
    """Calls a function with the epoch number, model and guide."""

    def __init__(self, change):
        self.change, self.routes = change, []

    def after_epoch(self, history, model, guide):
        self.change(len(history.elbo), getattr(model, "__self__", model))


def _thaw(epoch, pair):
    pair.encoder.requires_grad_(epoch >= 2)


def _freeze(epoch, pair):
    pair.encoder.requires_grad_(not 2 <= epoch < 4)


def _replace(epoch, pair):
    if epoch == 2:
        torch.manual_seed(7)
        pair.decoder = nn.Linear(3, 3)


def _lose(epoch, pair):
    if epoch == 3:
        pair.dropped = nn.Identity()


def _sharpen(epoch, pair):
    if epoch % 3 == 0:
        pair.sharpness = torch.tensor(0.5 * epoch)


CHANGES = {
    "temperature": lambda epoch, pair: setattr(pair, "temperature", 5.0 / (1 + epoch // 2)),
    "weight of the KL": lambda epoch, pair: pair.options.update(beta=0.5 + epoch // 3),
    "thawed": _thaw,
    "frozen for a while": _freeze,
    "replaced": _replace,
    "without dropout": _lose,
    "other memory": lambda epoch, pair: setattr(pair.decoder.weight, "data", pair.decoder.weight.data.clamp(-0.5, 0.5)),
    "buffer in place": lambda epoch, pair: pair.sharpness.fill_(epoch),
    "another buffer": _sharpen,
}
ROUTES = {"captured": "auto", "compiled": True}
PLACES = ("encoder", "decoder")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(stepping, "compiled", lambda graph, *inputs: graph)
    monkeypatch.setattr("jensen.graphs.routes.compiled", lambda graph, *inputs: graph)


@pytest.fixture
def captured_once(monkeypatch):
    """Any amount of work gets a graph; counts them."""
    made = []
    monkeypatch.setattr(stepping, "_LEAST", 1)

    def counting(*args):
        made.append(1)
        return capture_loss(*args)

    capture_loss = stepping.capture_loss
    monkeypatch.setattr(stepping, "capture_loss", counting)
    return made


def _data(n=32):
    torch.manual_seed(1)
    return torch.eye(3)[torch.randint(3, (n,))].to(torch.get_default_dtype()) + 0.1 * torch.randn(n, 3)


def _trained(change, compile, before=lambda pair: None, **options):
    """A model and guide after a run in which a callback changes them, and the run's history."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair = Relaxed()
    before(pair)
    options = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "seed": 0, "progress": False, **options}
    history = fit(pair.model, pair.guide, _data(), compile=compile, callbacks=Change(change), **options)
    return pair, history


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
@pytest.mark.filterwarnings("ignore:.*poutine.scale")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_graph_takes_the_steps_of_a_pair_that_callbacks_change(kind, route, float64, no_compiler, captured_once):
    def before(pair):
        pair.encoder.requires_grad_(kind != "thawed")

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    expected, eager = _trained(CHANGES[kind], False, before, scheduler=scheduler)
    fast, history = _trained(CHANGES[kind], ROUTES[route], before, scheduler=scheduler)
    assert history.route.startswith("traced and compiled" if route == "compiled" else "traced: ")
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-9)
    for name, value in expected.state_dict().items():
        found = fast.state_dict()[name]
        if route == "captured":
            assert torch.equal(found, value), f"{name} moved otherwise"
        else:
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=f"{name} moved otherwise")


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
@pytest.mark.parametrize("compile", ["auto", pytest.param(True, marks=pytest.mark.slow), False])
def test_what_is_frozen_stays_what_is_thawed_moves_and_what_is_new_is_trained(compile, no_compiler, captured_once):
    seen = []

    def look(change):
        def changed(epoch, pair):
            seen.append({name: p.detach().clone() for name, p in pair.named_parameters()})
            change(epoch, pair)

        return changed

    def moved(name):
        return [not torch.equal(one[name], other[name]) for one, other in pairwise(seen)]

    _trained(look(_freeze), compile)
    assert moved("encoder.weight") == [True, False, False, True, True]
    assert moved("decoder.weight") == [True] * 5
    seen.clear()
    _trained(look(_thaw), compile, lambda pair: pair.encoder.requires_grad_(False))
    assert moved("encoder.bias") == [False, True, True, True, True]
    seen.clear()
    _trained(look(_replace), compile)
    assert moved("decoder.weight") == [True] * 5


def test_parameters_that_join_later_are_trained_by_adam_at_the_scheduled_rate(float64):
    """Against plain Adam: the encoder's first step is the sign of its gradient times the epoch's learning rate."""

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)

    seen = []

    def change(epoch, pair):
        pair.encoder.requires_grad_(True)
        seen.append(pair.encoder.weight.detach().clone())

    options = {"epochs": 2, "batch_size": 32, "scheduler": scheduler}
    with pytest.warns(UserWarning, match="requires_grad=False"):
        _trained(change, False, lambda pair: pair.encoder.requires_grad_(False), **options)
    sizes = (seen[1] - seen[0]).abs()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 1e-3), rtol=1e-4, atol=0.0)


def test_states_that_take_turns_are_captured_once_each(captured_once):
    _, history = _trained(lambda epoch, pair: setattr(pair, "temperature", 5.0 - epoch % 2), "auto", epochs=12)
    assert len(captured_once) == 2
    assert history.route.startswith("traced: compiling would not pay")


def test_what_changes_again_and_again_is_no_longer_captured_until_it_stays(captured_once, monkeypatch):
    monkeypatch.setattr(stepping, "_LEAST", 3)

    def cool(epoch, pair):
        pair.temperature = max(1.0, 5.0 - 0.5 * epoch)

    routes = []
    expected, _ = _trained(cool, False, epochs=14)

    class Look(Change):
        def after_epoch(self, history, model, guide):
            super().after_epoch(history, model, guide)
            routes.append(len(captured_once))

    pyro.clear_param_store()
    torch.manual_seed(0)
    pair = Relaxed()
    options = {"epochs": 14, "batch_size": 16, "lr": 1e-2, "seed": 0, "progress": False}
    history = fit(pair.model, pair.guide, _data(), callbacks=Look(cool), **options)
    assert routes == [1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert history.route == (
        "traced: the attribute 'temperature' of Relaxed changes repeatedly, but a graph holds one value of it: "
        "keep it in a buffer (register_buffer, then fill_), or make it a knob of an Objective"
    )
    assert all(map(torch.equal, pair.parameters(), expected.parameters()))


def test_compile_true_compiles_few_values_and_says_so(no_compiler, monkeypatch):
    compiled = []
    monkeypatch.setattr(stepping, "compiled", lambda graph, *inputs: compiled.append(1) or graph)
    with pytest.warns(UserWarning, match="they run eager: the attribute 'temperature' of Relaxed") as caught:
        _, history = _trained(lambda epoch, pair: setattr(pair, "temperature", 5.0 - 0.5 * epoch), True, epochs=8)
    assert len(compiled) == 4
    assert len([w for w in caught if "they run" in str(w.message)]) == 1
    assert history.route.startswith("eager: the attribute 'temperature' of Relaxed changes repeatedly")
    assert not history.compiled


@pytest.mark.parametrize("compile", ["auto", True])
def test_a_pair_that_counts_its_runs_is_not_captured(compile, captured_once, recwarn):
    def count(pair):
        pair.counted = True

    expected, _ = _trained(lambda epoch, pair: None, False, count)
    pair, history = _trained(lambda epoch, pair: None, compile, count)
    assert history.route == "eager: each run of model and guide changes the attribute 'calls' of Relaxed"
    assert len(captured_once) == 1
    assert pair.calls == expected.calls
    assert all(map(torch.equal, pair.parameters(), expected.parameters()))
    assert len([w for w in recwarn if "they run eager" in str(w.message)]) == (compile is True)


class Weighted(Objective):
    """A user's objective with a plain number in it."""

    def __init__(self):
        super().__init__(2)
        self.weight = 1.0

    def value(self, terms, knobs):
        elbo = terms.log_weights.mean(0).sum()
        return -self.weight * elbo, elbo


@pytest.mark.parametrize("compile", ["auto", True])
def test_a_number_of_an_objective_and_one_of_a_closure_are_noticed(compile, float64, no_compiler, captured_once):
    x = _data()

    def run(compile):
        pyro.clear_param_store()
        torch.manual_seed(0)
        half, objective, shift = PPCA(3, 2), Weighted(), 0.0
        guide = amortize(half, mlp(3, [8]), MeanField, context=8)
        start = copy.deepcopy(half.state_dict())

        class Shifted(PPCA):
            def forward(self, x=None, *, n=1):
                return super().forward(x - shift, n=n)

        model = Shifted(3, 2)
        model.load_state_dict(start)

        def change(epoch, pair):
            nonlocal shift
            objective.weight, shift = 1.0 + epoch // 2, float(epoch // 3)

        options = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "seed": 0, "progress": False}
        history = fit(model, guide, x, objective, compile=compile, callbacks=Change(change), **options)
        return history, [*model.parameters(), *guide.parameters()]

    eager, expected = run(False)
    history, found = run(compile)
    assert history.route.startswith("traced")
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-9)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_validation_curve_is_that_of_the_pair_as_it_is(float64, monkeypatch):
    """Traced samples of the validation, while temperature and decoder change between the epochs."""
    monkeypatch.setattr("jensen.graphs.draws._LEAST", 1)

    def change(epoch, pair):
        pair.temperature = 5.0 - epoch // 2
        _replace(epoch, pair)

    curves = [_trained(change, compile, validation=_data(40))[1].validation for compile in ("auto", False)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


def test_a_search_around_a_model_that_changes_goes_on_from_what_it_is(float64, captured_once):
    x = _data()

    class Warm(PPCA):
        heat = 1.0

        def forward(self, x=None, *, n=1):
            with pyro.poutine.scale(scale=1.0), pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), self.heat).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    def run(compile):
        torch.manual_seed(0)
        model = Warm(3, 2)
        guide = SemiAmortized(amortize(model, mlp(3, [8]), MeanField, context=8), model, steps=3, compile=compile)

        def change(epoch, _):
            model.heat = 1.0 + epoch // 2

        options = {"epochs": 5, "batch_size": 16, "lr": 1e-2, "seed": 0, "progress": False}
        return fit(model, guide, x, Trace_ELBO(), compile=compile, callbacks=Change(change), **options)

    eager, fast = run(False), run("auto")
    assert fast.route.startswith("traced")
    assert fast.elbo == pytest.approx(eager.elbo, rel=1e-6)
