"""Pyro's parameter store and modules: which values count, the warnings, and the final state of the store."""

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn

from jensen.graphs.draws import LogWeights
from jensen.inference import IWAE, compare, evaluate, fit, gradient_signal, log_joint, log_weights, terms
from jensen.kernel import simulate
from jensen.kernel.weights import Pair, parameters_of

HELD = "held other values under the names"


def nets():
    return nn.Linear(2, 5), nn.Linear(5, 4)


def functions(dec, enc, update=False):
    """Model and guide functions that register their networks."""

    def model(x=None, n=1):
        pyro.module("dec", dec, update_module_params=update)
        n = n if x is None else len(x)
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(n, 2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(dec(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc, update_module_params=update)
        with pyro.plate("data", len(x)):
            loc, raw = enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


class Wide(PyroModule):
    """A nameless PyroModule with a constrained parameter, a plain one, and a net."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = PyroParam(torch.tensor(scale), constraint=dist.constraints.positive)
        self.shift = nn.Parameter(torch.zeros(3))
        self.net = nn.Linear(3, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), self.scale).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + self.shift, 1.0).to_event(1), obs=x)


def draw(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def stored():
    return dict(pyro.get_param_store()._params)


def reload():
    """The effect of saving the store, a new session, and loading."""
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)


def test_a_second_pair_of_functions_is_trained_and_said():
    x, first, second = torch.randn(30, 5), nets(), nets()
    fit(*functions(*first), x, epochs=2, progress=False)
    older = stored()
    before = [copy.deepcopy(net.state_dict()) for net in (*first, *second)]
    with pytest.warns(UserWarning, match=rf"{HELD} \['dec', 'enc'\]") as said:
        fit(*functions(*second), x, epochs=2, lr=1e-2, progress=False)
    assert len(said) == 1
    for net, values in zip((*first, *second), before, strict=True):
        moved = [not torch.equal(value, values[name]) for name, value in net.state_dict().items()]
        assert all(moved) if net in second else not any(moved)
    now = stored()
    assert now["dec$$$weight"] is second[0].weight
    assert {f"earlier.{name}" for name in older} == set(now) - set(older)
    assert all(now[f"earlier.{name}"] is value for name, value in older.items())


def test_the_older_values_of_the_last_pair_are_kept_and_no_more():
    x = torch.randn(30, 5)
    for i in range(3):
        pair = nets()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            fit(*functions(*pair), x, epochs=1, progress=False)
        assert len(stored()) == (4 if i == 0 else 8)


def test_plain_svi_goes_on_with_the_pair_that_fit_trained():
    x, first, second = torch.randn(30, 5), nets(), nets()
    fit(*functions(*first), x, epochs=1, progress=False)
    with pytest.warns(UserWarning, match=HELD):
        fit(*functions(*second), x, epochs=1, progress=False)
    before = second[0].weight.detach().clone()
    SVI(*functions(*second), Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    assert not torch.equal(second[0].weight, before)


MEASURES = {
    "evaluate": lambda model, guide, x: evaluate(model, guide, x, 20, seed=0, progress=False).elbo,
    "compare": lambda model, guide, x: compare({"a": (model, guide)}, x, 20, progress=False).rows["a"].evidence.elbo,
    "log_weights": lambda model, guide, x: log_weights(model, guide, x, particles=20),
    "terms": lambda model, guide, x: terms(model, guide, x, particles=20).log_weights,
    "log_joint": lambda model, _, x: log_joint(model, {"z": torch.zeros(1, len(x), 2)}, x),
    "simulate": lambda model, _, x: simulate(model, 3)[1],
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_beside_a_loaded_store_is_said_and_changes_nothing(measure):
    x, first = torch.randn(30, 5), nets()
    fit(*functions(*first), x, epochs=1, progress=False)
    reload()
    before, fresh = stored(), nets()
    names = r"\['dec'\]" if measure in ("log_joint", "simulate") else r"\['dec', 'enc'\]"
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=rf"{HELD} {names}.*update_module_params=True") as said:
        got = MEASURES[measure](*functions(*fresh), x)
    assert len({str(each.message) for each in said}) == 1
    assert all(stored()[name] is value for name, value in before.items())
    pyro.clear_param_store()
    torch.manual_seed(1)
    torch.testing.assert_close(MEASURES[measure](*functions(*fresh), x), got)


def test_update_module_params_reads_a_loaded_store_without_a_word():
    x, first, fresh = torch.randn(30, 5), nets(), nets()
    fit(*functions(*first), x, epochs=3, lr=1e-2, progress=False)
    expected = log_joint(functions(*first)[0], {"z": torch.ones(1, 30, 2)}, x)
    reload()
    model, guide = functions(*fresh, update=True)
    torch.testing.assert_close(log_joint(model, {"z": torch.ones(1, 30, 2)}, x), expected)
    before = fresh[0].weight.detach().clone()
    fit(model, guide, x, epochs=1, lr=1e-2, progress=False)
    assert not torch.equal(fresh[0].weight, before)
    assert stored()["dec$$$weight"] is fresh[0].weight
    assert not any(name.startswith("earlier.") for name in stored())


def test_a_pyro_module_beside_a_loaded_store():
    x, trained = torch.randn(20, 3), Wide(2.0)
    fit(trained, draw, x, epochs=1, progress=False)
    reload()
    before, fresh = stored(), Wide(0.5)
    with pytest.warns(UserWarning, match=rf"{HELD} \['net', 'scale', 'shift'\]"):
        evaluate(fresh, draw, x, 20, progress=False)
    assert fresh.scale.item() == pytest.approx(0.5)
    assert all(stored()[name] is value for name, value in before.items())
    draw(x)
    fresh(x)  # as the sentence says: Pyro reads constrained parameters in
    assert fresh.scale.item() == pytest.approx(trained.scale.item())


def test_two_nameless_modules_without_constraints_are_not_worth_a_word():
    x = torch.randn(20, 3)
    for _ in range(2):
        model = Wide()
        del model.scale
        model.scale = torch.tensor(1.0)
        before = model.shift.detach().clone()
        fit(model, draw, x, epochs=1, progress=False)
        assert not torch.equal(model.shift, before)
        assert stored()["shift"] is model.shift
    reload()
    fresh = Wide()
    del fresh.scale
    fresh.scale = torch.tensor(1.0)
    with pytest.warns(UserWarning, match=rf"{HELD} \['net', 'shift'\].*p.data.copy_"):
        evaluate(fresh, draw, x, 10, progress=False)


def test_a_wrapped_pyro_module_counts_as_itself():
    x, a, b = torch.randn(20, 3), Wide(0.5), Wide(3.0)
    expected = log_joint(a, {"z": torch.ones(1, 20, 3)}, x)
    for program in (poutine.scale(b, scale=1.0), lambda x: b(x), functools.partial(b)):
        with pytest.warns(UserWarning, match=HELD):
            log_joint(program, {"z": torch.ones(1, 20, 3)}, x)
        assert b.scale.item() == pytest.approx(3.0)
    torch.testing.assert_close(log_joint(a, {"z": torch.ones(1, 20, 3)}, x), expected)


def test_an_auto_guide_takes_what_was_loaded():
    x = torch.randn(60) + 1
    svi = SVI(mean, AutoNormal(mean), Adam({"lr": 5e-2}), Trace_ELBO())
    for _ in range(300):
        svi.step(x)
    reload()
    before = {name: value.clone() for name, value in stored().items()}
    exact = dist.MultivariateNormal(torch.zeros(60), torch.eye(60) + 1.0).log_prob(x)
    guide = AutoNormal(mean)
    with pytest.warns(UserWarning, match=r"takes the values that .* \['AutoNormal.locs.mu', 'AutoNormal.scales.mu'\]"):
        evidence = evaluate(mean, guide, x, 500, seed=0, progress=False)
    assert (evidence.elbo - exact).abs() < 0.1
    evaluate(mean, guide, x, 10, progress=False)  # nothing more to say
    with pytest.warns(UserWarning, match="takes the values that"):  # the cell once more
        again = evaluate(mean, AutoNormal(mean), x, 500, seed=0, progress=False)
    assert torch.equal(again.elbo, evidence.elbo)
    assert all(torch.equal(value, before[name]) for name, value in stored().items())


def test_measuring_another_auto_guide_leaves_the_first_ones_values_in_the_store():
    x = torch.randn(20)
    first, second = AutoNormal(mean), AutoNormal(mean)
    fit(mean, first, x, epochs=5, lr=0.1, batch_size=20, progress=False)
    before = stored()
    with pytest.warns(UserWarning, match="another AutoNormal"):
        evaluate(mean, second, x, 10, progress=False)
    assert all(stored()[name] is value for name, value in before.items())
    fit(mean, first, x, epochs=1, batch_size=20, progress=False)
    with pytest.warns(UserWarning, match=HELD):
        fit(mean, second, x, epochs=1, batch_size=20, progress=False)
    assert stored()["earlier.AutoNormal.locs.mu"] is first.locs.mu_unconstrained
    assert second.median(x)["mu"] == second.locs.mu_unconstrained


def test_functions_beside_modules_are_trained():
    """A network registered by one function, where the other is a module."""
    x, enc, model = torch.randn(20, 3), nn.Linear(3, 3), Wide()

    def guide(x):
        pyro.module("enc", enc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(enc(x), 1.0).to_event(1))

    before = enc.weight.detach().clone()
    fit(model, guide, x, epochs=1, progress=False)
    assert not torch.equal(enc.weight, before)


def test_nets_of_both_halves_under_one_name_are_both_trained():
    x, dec, enc = torch.randn(20, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def model(x):
        pyro.module("net", dec)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dec(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", enc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(enc(x), 1.0).to_event(1))

    before = [net.weight.detach().clone() for net in (dec, enc)]
    fit(model, guide, x, epochs=1, progress=False)
    for net, weight in zip((dec, enc), before, strict=True):
        assert not torch.equal(net.weight, weight)
    of_model, of_guide = parameters_of(model, guide, x)
    assert of_model == list(dec.parameters())
    assert of_guide == list(enc.parameters())


def test_a_guide_that_closes_over_its_model_has_the_rest():
    x, (dec, enc) = torch.randn(20, 5), nets()
    model, guide = functions(dec, enc)

    def around(x):
        assert model is not None
        guide(x)

    def reads_both(x):
        pyro.module("dec", dec)
        guide(x)

    for half in (around, reads_both, functools.partial(lambda model, x: guide(x), model)):
        of_model, of_guide = parameters_of(model, half, x)
        assert of_model == list(dec.parameters())
        assert of_guide == list(enc.parameters())


def test_what_a_function_names_and_does_not_read_is_not_counted():
    x, (dec, enc), other = torch.randn(20, 5), nets(), nn.Linear(7, 7)
    model, guide = functions(dec, enc)

    def either(x):
        return other(x) if x is None else guide(x)

    table = compare({"a": (model, guide), "b": (model, either)}, x, 10, progress=False)
    assert table.rows["a"].parameters == table.rows["b"].parameters
    before = other.weight.detach().clone()
    fit(model, either, x, epochs=1, progress=False)
    assert torch.equal(other.weight, before)


def test_a_net_that_is_registered_nowhere_is_named():
    x, (dec, enc) = torch.randn(20, 5), nets()
    model, _ = functions(dec, enc)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, raw = enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    before = enc.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"without registering them, so Pyro and fit do not train them: \['Linear'\]"):
        fit(model, guide, x, epochs=1, progress=False)
    assert torch.equal(enc.weight, before)
    with (
        pytest.warns(UserWarning, match="without registering them"),
        pytest.raises(ValueError, match=r"if pyro.module\(name, module\) registers them"),
    ):
        fit(guide, guide, x, epochs=1, progress=False)
    fit(model, guide, x, epochs=1, freeze=enc, progress=False)
    enc.requires_grad_(False)
    fit(model, guide, x, epochs=1, progress=False)


def test_registered_nets_are_trained_in_training_mode_and_the_others_left():
    x, (dec, enc) = torch.randn(20, 5), nets()
    features = nn.Sequential(nn.BatchNorm1d(5)).eval()
    features[0].requires_grad_(False)
    dec, enc = (nn.Sequential(net, nn.Dropout(0.1)).eval() for net in (dec, enc))
    model, guide = functions(dec, enc)

    def around(x):
        return guide(features(x))

    seen = set()
    for net in (dec, enc, features):
        net.register_forward_pre_hook(
            lambda part, _: seen.add((part, part.training)) if torch.is_grad_enabled() else None
        )
    fit(model, around, x, epochs=2, progress=False)
    assert seen == {(dec, True), (enc, True), (features, False)}
    assert not any(part.training for net in (dec, enc, features) for part in net.modules())
    assert features[0].running_mean.tolist() == [0.0] * 5


def test_functions_with_registered_nets_are_captured_where_they_are_measured_only():
    """A function may use a number that changes between steps; a graph would keep the old one."""
    x, (dec, enc) = torch.randn(20, 5), nets()
    model, guide = functions(dec, enc)
    with pytest.warns(UserWarning, match="belong to no module that is the model or the guide"):
        history = fit(model, guide, x, epochs=1, compile=True, progress=False)
    assert history.route.startswith("eager")
    weights = LogWeights(Pair(model, guide, 1), "auto")
    for _ in range(2):
        torch.manual_seed(3)
        fast = weights((x,), 20, ahead=1500)
        torch.manual_seed(3)
        with torch.no_grad():
            torch.testing.assert_close(fast, log_weights(model, guide, x, particles=20, max_plate_nesting=1))
            dec.weight *= 2  # the graph has the new value
        weights.forget()
    assert weights.route.startswith("traced")


def test_the_signal_of_a_second_pair_is_that_of_its_own_nets():
    x, first, second = torch.randn(30, 5), nets(), nets()
    fit(*functions(*first), x, epochs=1, progress=False)
    with pytest.warns(UserWarning, match=HELD):
        signal = gradient_signal(*functions(*second), x, IWAE(2), repeats=5, seed=0)
    assert len(signal.mean) == sum(p.numel() for p in second[1].parameters())
    assert signal.mean.abs().sum() > 0


def test_a_checkpoint_of_functions_holds_the_buffers_of_their_nets(tmp_path):
    x, file = torch.randn(20, 5), tmp_path / "c.pt"

    def pair():
        dec, enc = nets()
        norm = nn.Sequential(nn.BatchNorm1d(5), enc)
        return norm[0], functions(dec, norm)

    norm, (model, guide) = pair()
    fit(model, guide, x, epochs=2, checkpoint=file, progress=False)
    assert norm.running_mean.abs().sum() > 0
    pyro.clear_param_store()
    again, (model, guide) = pair()
    fit(model, guide, x, epochs=2, checkpoint=file, resume=True, progress=False)
    torch.testing.assert_close(again.running_mean, norm.running_mean)
    state = torch.load(file, weights_only=True)
    state["parameters"] = state["parameters"][3:]  # as 0.1.0 wrote it: without buffers
    torch.save(state, file)
    pyro.clear_param_store()
    older, (model, guide) = pair()
    fit(model, guide, x, epochs=2, checkpoint=file, resume=True, progress=False)
    assert older.running_mean.abs().sum() == 0
