"""The learning-rate range test: rates that grow, losses of the steps, and nothing left changed."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jensen.families import FullCovariance
from jensen.guides import ExactPosterior, amortize
from jensen.inference import LearningRates, fit, learning_rates
from jensen.inference.training.seconds import seconds_of
from jensen.models import PPCA

QUIET = {"seed": 0, "progress": False}


def _data(n=300):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=generator) @ torch.randn(2, 5, generator=generator) + 0.3


def _pair():
    torch.manual_seed(0)
    model = PPCA(5, latent=2)
    return model, amortize(model, nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), FullCovariance, context=8)


def _state(*modules):
    return [copy.deepcopy(module.state_dict()) for module in modules]


def _same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_the_rates_grow_geometrically_and_the_losses_are_those_of_fit():
    x, pair = _data(60), _pair()
    found = learning_rates(*pair, x, least=1e-4, most=1e-2, steps=20, batch_size=60, **QUIET)
    assert found.rates.tolist() == pytest.approx([1e-4 * 100 ** (t / 19) for t in range(20)])
    model, _ = pair
    exact = learning_rates(model, ExactPosterior(model), x, least=1e-12, most=2e-12, steps=10, batch_size=60, **QUIET)
    with torch.no_grad():  # the log weights of the exact posterior are constant
        assert exact.losses.tolist() == pytest.approx([-float(model.log_evidence(x).mean())] * 10, rel=1e-5)


def test_nothing_is_left_changed():
    pair, x = _pair(), _data()
    pyro.clear_param_store()
    pyro.param("other", torch.ones(3))
    before, stream, mode = _state(*pair), torch.get_rng_state(), [module.training for module in pair]
    learning_rates(*pair, x, steps=20, batch_size=50, **QUIET)
    assert _same(before, _state(*pair))
    assert torch.equal(stream, torch.get_rng_state())
    assert [module.training for module in pair] == mode
    assert list(pyro.get_param_store()) == ["other"]
    assert seconds_of(pair[1]) == 0.0
    learning_rates(*pair, x, steps=20, batch_size=50, progress=False)  # also without a seed
    assert torch.equal(stream, torch.get_rng_state())


def test_the_store_of_a_functional_pair_is_restored():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z * pyro.param("slope", torch.ones(())), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x * pyro.param("gain", torch.zeros(())), 1.0))

    pyro.clear_param_store()
    pyro.param("slope", torch.tensor(2.0))
    learning_rates(model, guide, torch.randn(40), steps=20, batch_size=10, **QUIET)
    assert list(pyro.get_param_store()) == ["slope"]
    assert pyro.param("slope").item() == 2.0


def test_an_autoguide_starts_where_it_would_have():
    model = PPCA(5, latent=2)
    guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.zeros(30, 2)}))
    learning_rates(model, guide, _data(30), steps=20, **QUIET)
    assert all(torch.equal(p, p.flatten()[0].expand_as(p)) for p in guide.parameters() if p.shape == (30, 2))


def test_divergence_ends_the_sweep():
    found = learning_rates(*_pair(), _data(), least=1e-3, most=1e6, steps=40, optimizer=torch.optim.SGD, **QUIET)
    assert len(found.rates) < 40
    assert bool(found.losses.isfinite().all())
    assert 1e-4 < found.suggestion < 0.1
    assert f"Training diverged after step {len(found.rates)} of 40." in str(found)


def test_data_without_a_finite_loss_are_an_error_and_leave_nothing():
    pair = _pair()
    before = _state(*pair)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        learning_rates(*pair, 1e30 * _data(), **QUIET)
    assert _same(before, _state(*pair))


def test_data_that_are_read_by_the_batch():
    pair, x = _pair(), _data(1).expand(110, 5).contiguous()
    loader = DataLoader(TensorDataset(x), batch_size=20, shuffle=True)  # the last batch of a pass has 10 rows
    found = learning_rates(*pair, loader, steps=25, most=1e-2, **QUIET)
    assert len(found.losses) == 25
    assert found.data == 20
    level = float(found.losses[:5].mean())
    assert 0.7 * level < float(found.losses.min())  # none counts 10 rows as 20
    again = learning_rates(*pair, loader, steps=25, most=1e-2, **QUIET)
    assert torch.equal(found.losses, again.losses)


def test_smoothing_does_not_reach_back_from_a_divergence():
    rates = torch.logspace(-4, 0, 50).double()
    losses = torch.cat([torch.linspace(3, 1, 40), torch.logspace(1, 30, 10)]).double()
    found = LearningRates(rates, losses, 50, 128)
    assert float(found.smoothed.max()) <= 3
    assert found.suggestion == pytest.approx(float(rates[39]) / 5, rel=0.4)  # the clamped losses are smoothed


def test_losses_that_do_not_fall_give_no_suggestion():
    rates, noise = torch.logspace(-4, 0, 200).double(), torch.randn(200).double()
    found = LearningRates(rates, noise, 200, 128)
    assert found.suggestion is None
    assert "no suggestion" in str(found)
    falling = LearningRates(rates, noise - torch.linspace(0, 50, 200), 200, 128)
    assert "give a larger most" in str(falling)


@pytest.mark.slow
def test_the_suggestion_trains_well():
    x = _data(600) + 0.5 * torch.randn(600, 5, generator=torch.Generator().manual_seed(1))
    best = float(PPCA(5, latent=2).fit_closed_form(x).log_evidence(x).mean().detach())

    def missed(lr):
        model, guide = _pair()
        fit(model, guide, x, lr=lr, epochs=60, **QUIET)
        return best - float(model.log_evidence(x).mean().detach())

    found = learning_rates(*_pair(), x, **QUIET).suggestion
    assert missed(found) < 1.5 * min(missed(lr) for lr in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)) + 0.05


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"least": 0.0}, "learning rates grow from least to most, both above 0"),
        ({"least": 1.0, "most": 0.5}, "learning rates grow from least to most"),
        ({"most": math.inf}, "learning rates grow|most must be"),
        ({"steps": 9}, "steps is the number of learning rates, at least 10, but got 9"),
    ],
)
def test_impossible_settings_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        learning_rates(*_pair(), _data(), **how, **QUIET)
