"""Batches in training: the data of the bound, valid sizes, and models that contain their data."""

import functools

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from jensen.inference import ELBO, IWAE, History, evaluate, fit
from jensen.kernel.batches import data_in
from jensen.plots import plot_training


def _posterior(x):
    """Of five observations of z, one in each row."""
    loc = pyro.param("loc_scale", torch.tensor(5 / 6))
    with pyro.plate("data", x.shape[1]):
        pyro.sample("z", dist.Normal(loc * x.mean(0), (1 / 6) ** 0.5))


def _time_first(x):
    with pyro.plate("data", x.shape[1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("time", x.shape[0]):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _exact(x):
    """Mean log p(x) of columns of :func:`_time_first`."""
    n = len(x)
    return dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + 1.0).log_prob(x.T).mean().item()


@pytest.mark.parametrize("objective", [None, ELBO(), IWAE(3)])
def test_bounds_are_divided_by_the_plate_over_the_data(objective):
    x = torch.randn(5, 64)
    history = fit(_time_first, _posterior, x, objective, epochs=1, lr=1e-9, validation=x[:, :30], progress=False)
    assert history.elbo[0] == pytest.approx(_exact(x), abs=1e-3)
    assert history.validation[0] == pytest.approx(_exact(x[:, :30]), abs=1e-3)
    assert history.rate[0] + history.distortion[0] == pytest.approx(-history.validation[0])
    assert history.data == 64


def test_rows_that_are_not_the_data_are_not_split():
    with pytest.raises(ValueError, match=r"sizes \(64,\), but the model was given 2 data points: .*Give x.transpose"):
        fit(_time_first, _posterior, torch.randn(5, 64), epochs=1, batch_size=2, progress=False)


def _global(x, dim=0, full=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", full or x.shape[dim], subsample_size=x.shape[dim]):
        pyro.sample("x", dist.Normal(mean, 1.0).expand([x.shape[dim]]), obs=x if x.dim() == 1 else x[0])


def _prior(x):
    pyro.sample("mean", dist.Normal(0.0 * pyro.param("b", torch.tensor(1.0)), 1.0))


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (_global, torch.randn(20), (20, 20)),
        (functools.partial(_global, full=300), torch.randn(20), (20, 300)),
        (functools.partial(_global, dim=1), torch.randn(1, 64), (64, 64)),
    ],
)
def test_the_data_of_joint_weights_are_those_of_the_plate_around_what_is_observed(model, x, expected):
    assert data_in(model, _prior, (x,)) == expected


def test_a_plate_with_a_latent_inside_is_that_of_the_data():
    def model(x):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            with pyro.plate("time", x.shape[0]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert data_in(model, guide, (torch.randn(5, 64),)) == (64, 64)


def test_a_plate_that_takes_a_part_of_the_data_is_counted_whole():
    x = torch.randn(100)

    def model(x):
        with pyro.plate("data", 100, subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([10]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", 100, subsample_size=10) as rows:
            pyro.sample("z", dist.Normal(a * x[rows], 0.5**0.5))

    history = fit(model, guide, x, epochs=200, lr=1e-9, validation=x, seed=0, progress=False)
    log_p = dist.Normal(0.0, 2**0.5).log_prob(x)
    error = log_p.std().item() / (10 * 200) ** 0.5
    assert sum(history.elbo) / 200 == pytest.approx(log_p.mean().item(), abs=4 * error)
    assert data_in(model, guide, (x,)) == (10, 100)
    assert history.data == 100


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.mark.parametrize(("n", "size", "better"), [(65, 32, 33), (9, 2, 3), (5, 4, 3), (3, 2, 3)])
def test_a_last_batch_of_one_row_is_refused_with_a_size_that_serves(n, size, better):
    pair, x = _Normed(), torch.randn(n, 6)
    with pytest.raises(
        ValueError,
        match=rf"last batch of an epoch has 1 row \({n} data.*one row has none\): give batch_size={better}, ",
    ):
        fit(pair.model, pair.guide, x, epochs=1, batch_size=size, progress=False)
    assert len(fit(pair.model, pair.guide, x, epochs=1, batch_size=better, progress=False).elbo) == 1


def test_batches_of_one_row():
    pair = _Normed()
    with pytest.raises(
        ValueError, match=r"run on 2 rows but not on 1: give batch_size of 2 or more .*one row has none"
    ):
        fit(pair.model, pair.guide, torch.randn(6, 6), epochs=1, batch_size=1, progress=False)


def test_validation_is_measured_in_evaluation_mode_and_looked_at_so():
    pair = _Normed()
    history = fit(
        pair.model, pair.guide, torch.randn(64, 6), epochs=1, batch_size=2, validation=torch.randn(9, 6), progress=False
    )
    assert len(history.validation) == 1
    assert pair.encoder.training


def test_a_pair_written_for_one_number_of_data_is_no_autoguide():
    def guide(x):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x.view(8, 1).squeeze(1), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"run on 8 rows but not on 7 or 9: .*shape '\[8, 1\]' is invalid") as caught:
        fit(model, guide, torch.randn(32), epochs=1, batch_size=8, progress=False)
    assert "AutoGuide" not in str(caught.value)


def test_an_autoguide_of_one_datum_is_not_trained_in_batches_of_one():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"the AutoNormal .* each of 1 data points .*batch_size=5 or more"):
        fit(model, AutoNormal(model), torch.randn(5), epochs=1, batch_size=1, progress=False)


def _process():
    x = torch.linspace(0, 1, 20)
    likelihood = gp.likelihoods.Gaussian()
    return gp.models.VariationalGP(x, torch.sin(6 * x), gp.kernels.RBF(1), likelihood=likelihood, whiten=True)


def test_a_process_that_holds_its_data_trains_and_is_measured():
    process = _process()
    start = evaluate(process.model, process.guide, (), 50, seed=0, progress=False)
    loss = pyro.infer.Trace_ELBO().loss(process.model, process.guide)
    assert start.joint
    assert start.features == 20
    assert start.elbo.item() == pytest.approx(-loss, abs=1e-3)  # its noise starts at the prior: no variance
    history = fit(process.model, process.guide, (), epochs=200, lr=0.02, validation=(), seed=0, progress=False)
    end = evaluate(process.model, process.guide, (), 500, seed=0, progress=False)
    assert history.elbo[0] == pytest.approx(-loss, abs=1e-3)
    assert end.elbo.item() > start.elbo.item() + 5
    assert history.validation[-1] == pytest.approx(end.elbo.item(), abs=5 * 8**-0.5 * 500**0.5 * end.elbo_error.item())
    assert "nats in total" in str(history)
    assert history.steps == 200


@pytest.mark.parametrize("objective", [ELBO(), IWAE(5)])
def test_a_conditioned_model_is_measured_per_datum(objective):
    x = torch.randn(30)

    def joint():
        with pyro.plate("data", 30):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide():
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", 30):
            pyro.sample("z", dist.Normal(a * x, 0.5**0.5))

    model = pyro.condition(joint, data={"x": x})
    log_p = dist.Normal(0.0, 2**0.5).log_prob(x)
    history = fit(model, guide, (), objective, epochs=3, lr=1e-9, progress=False)
    assert history.elbo[0] == pytest.approx(log_p.mean().item(), abs=1e-4)
    assert "nats per data point" in str(history)


def test_the_unit_of_a_history_is_that_of_its_bounds():
    assert "nats in total" in str(History(elbo=[-3.0], data=1))
    assert "(nats in total)" in plot_training(History(elbo=[-3.0, -2.0], data=1)).get_ylabel()
    assert "nats per data point" in str(History(elbo=[-3.0], data=7))
    assert "nats per data point" in str(History(elbo=[-3.0]))


def test_room_for_plates_is_what_the_user_says():
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"max_plate_nesting=1, but the plates of model and guide take 2 dimensions"):
        fit(_time_first, _posterior, x, ELBO(), epochs=1, max_plate_nesting=1, progress=False)
    history = fit(_time_first, _posterior, x, ELBO(3), epochs=1, lr=1e-9, max_plate_nesting=4, progress=False)
    assert history.elbo[0] == pytest.approx(_exact(x), abs=1e-3)
