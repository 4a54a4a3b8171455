"""Simulation of data like an example: models of any style against known densities, and models without simulation."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from jensen.families import Gaussian, MeanField
from jensen.inference import decode, simulate
from jensen.kernel.simulation import OnExample, prior_quantiles
from jensen.models import PPCA, VAE, ConditionalVAE, FlatPrior, Hierarchical, LinearGaussianSSM, MixtureOfPPCA
from jensen.networks import mlp

PRIOR = torch.tensor([0.2, 0.3, 0.5])


def _assert_mean(values, expected, sd, errors=4):
    assert abs(float(values.double().mean()) - expected) < errors * sd / math.sqrt(values.numel())


def _plain(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("code", dist.Normal(1.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_model_of_ours_draws_the_same_either_way(rows):
    mixture = MixtureOfPPCA(5, latent=2, components=3)
    for model, example in ((PPCA(5, latent=2), torch.full((rows, 5), 9.0)), (mixture, torch.full((rows, 5), 9.0))):
        torch.manual_seed(1)
        latents, x = simulate(model, 7)
        after = torch.rand(())
        torch.manual_seed(1)
        again, y = simulate(model, 7, data=example)
        assert torch.equal(x, y)
        assert list(latents) == list(again) == list(model.latents)
        assert all(torch.equal(latents[name], again[name]) for name in latents)
        assert torch.equal(torch.rand(()), after)  # the random stream advances by one run


def test_draws_do_not_depend_on_the_example():
    far = torch.randn(80).exp()
    torch.manual_seed(3)
    one = simulate(_plain, 50, data=torch.zeros(1))
    torch.manual_seed(3)
    other = simulate(_plain, 50, data=far)
    assert torch.equal(one[1], other[1])
    assert torch.equal(one[0]["code"], other[0]["code"])


def test_the_example_and_the_models_mode_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(1), nn.Dropout(0.5)

        def model(self, x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
                pyro.sample("obs", dist.Normal(self.drop(self.norm(z)), 1e-6).to_event(1), obs=x)

    module, x = Model(), torch.zeros(4, 1)
    values, drawn = simulate(module.model, 20, data=x)
    torch.testing.assert_close(drawn, values["z"] / math.sqrt(1 + 1e-5), atol=1e-4, rtol=0)  # neither drops nor centres
    assert module.drop.training
    assert not module.norm.running_mean.any()
    assert not x.any()


def test_covariates_stay_and_follow_their_rows():
    def regression(features, scale, y=None):
        with pyro.plate("rows", len(features)):
            slope = pyro.sample("slope", dist.Normal(2.0, 0.1))
            pyro.sample("y", dist.Normal(slope * features, scale), obs=y)

    features, scale = torch.tensor([1.0, -3.0]), torch.tensor([1e-3, 2e-3])
    values, (f, s, y) = simulate(regression, 5, data=(features, scale, torch.zeros(2)))
    assert f.tolist() == [1, -3, 1, -3, 1]
    torch.testing.assert_close(s, scale[[0, 1, 0, 1, 0]])
    assert ((y - values["slope"] * f).abs() < 6 * s).all()
    latents, drawn = simulate(lambda y: regression(features, scale, y), 2, data=torch.zeros(2))  # closed over
    assert set(latents) == {"slope"}
    assert ((drawn - latents["slope"] * features).abs() < 6 * scale).all()


def _labelled(returned):
    def model(x, y=None):
        with pyro.plate("rows", len(x)):
            drawn = pyro.sample("label", dist.Categorical(PRIOR), obs=y)
            y = drawn if returned or y is None else y
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z + 10.0 * y, 0.1), obs=x)

    return model


@pytest.mark.parametrize("returned", [True, False])
def test_labels_are_drawn_and_what_reads_them_follows(returned):
    values, (x, y) = simulate(_labelled(returned), 4000, data=(torch.zeros(2), torch.tensor([1, 2])))
    assert set(values) == {"z"}
    assert y.dtype == torch.long
    for label, p in enumerate(PRIOR.tolist()):
        _assert_mean(y == label, p, math.sqrt(p * (1 - p)))
    noise = x - 10 * y - values["z"]
    _assert_mean(noise, 0.0, 0.1)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.06)
    values, x = simulate(_labelled(returned), 10, data=torch.zeros(2))  # a label that is not given is a latent
    assert set(values) == {"label", "z"}


def _steps(x, a=0.9):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        before = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            pyro.sample(f"obs_{t}", dist.Normal(a * before + z, 0.1), obs=x[:, t])
            before = x[:, t]


def test_sites_that_read_earlier_data_get_those_drawn():
    values, x = simulate(_steps, 2000, data=100 * torch.randn(3, 6))
    before = torch.cat([torch.zeros(2000, 1), x[:, :-1]], 1)
    noise = x - 0.9 * before - values["z"].unsqueeze(1)
    _assert_mean(noise, 0.0, 0.1)
    _assert_mean(noise.square() / 0.01, 1.0, math.sqrt(2))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1, 12),
        lambda x: x.reshape(len(x), -1).contiguous(),
        lambda x: x.flatten(1).double().float(),
        lambda x: x.flatten(1)[torch.arange(len(x))],
    ],
)
def test_reshaped_data_come_back_in_their_own_shape(view):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 12), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1e-3).to_event(1), obs=view(x))

    values, x = simulate(model, 5, data=torch.randn(2, 3, 4))
    assert x.shape == (5, 3, 4)
    torch.testing.assert_close(x, values["z"].view(5, 3, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "columns",
    [
        lambda x: x.unbind(-1),
        lambda x: [x[:, 0].clone(), x[:, 1].float(), x[torch.arange(len(x)), 2]],
        lambda x: [x.T[0], x[..., 1:2].squeeze(-1), x.T.contiguous()[2]],
    ],
)
def test_slices_come_back_in_their_places(columns):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i, column in enumerate(columns(x)):
                pyro.sample(f"x_{i}", dist.Normal(z + 10.0 * i, 1e-3), obs=column)

    values, x = simulate(model, 5, data=torch.randn(4, 3))
    expected = values["z"].unsqueeze(1) + torch.tensor([0.0, 10.0, 20.0])
    torch.testing.assert_close(x, expected, atol=1e-2, rtol=0)


def test_types_of_the_example_are_kept():
    def counts(x, seen):
        with pyro.plate("rows", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
            pyro.sample("obs", dist.Poisson(rate), obs=x.float())
            pyro.sample("seen", dist.Bernoulli(torch.full((len(x),), 0.25)), obs=seen.float())

    values, (x, seen) = simulate(counts, 4000, data=(torch.tensor([0, 7]), torch.tensor([True, False])))
    assert (x.dtype, seen.dtype) == (torch.long, torch.bool)
    _assert_mean(x - values["rate"], 0.0, math.sqrt(3))
    _assert_mean(seen, 0.25, math.sqrt(3) / 4)


@pytest.mark.parametrize("dim", [-2, -1])
def test_plates_inside_that_of_the_data(dim):
    def model(x):  # pixels to the right of the data, or to their left
        with pyro.plate("rows", len(x), dim=dim):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-3 - dim):
                pyro.sample("obs", dist.Normal(z, 1e-3), obs=x if dim == -2 else x.T)

    values, x = simulate(model, 6, data=torch.zeros(4, 3))
    assert values["z"].shape == ((6, 1) if dim == -2 else (6,))
    torch.testing.assert_close(x, values["z"].reshape(6, 1).expand(6, 3), atol=1e-2, rtol=0)


def test_a_plate_without_a_size():
    def model(x):
        with pyro.plate("rows"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("obs", dist.Normal(z, 1e-3), obs=x)

    values, x = simulate(model, 6, data=torch.zeros(4))
    torch.testing.assert_close(x, values["z"], atol=1e-2, rtol=0)


@pytest.mark.parametrize("where", ["site", "distribution", "obs_mask"])
def test_where_a_mask_leaves_an_observation_out_the_example_stays(where):
    def model(x):
        there = ~x.isnan()
        filled = torch.where(there, x, 0.0)
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(5.0, 1.0))
            if where == "obs_mask":
                pyro.sample("obs", dist.Normal(z, 1e-3), obs=filled, obs_mask=there)
            elif where == "site":
                with poutine.mask(mask=there):
                    pyro.sample("obs", dist.Normal(z, 1e-3), obs=filled)
            else:
                pyro.sample("obs", dist.Normal(z, 1e-3).mask(there), obs=filled)

    example = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    values, x = simulate(model, 5, data=example)
    there = ~x.isnan()
    assert there.tolist() == [[True, False], [True, True]] * 2 + [[True, False]]
    torch.testing.assert_close(x[there], values["z"][there], atol=1e-2, rtol=0)


def test_padding_stays_and_lengths_are_covariates():
    model = LinearGaussianSSM(3, latent=2, steps=4)
    lengths = torch.tensor([4, 1])
    values, (x, n) = simulate(model, 6, data=(torch.full((2, 4, 3), -7.0), lengths))
    assert n.tolist() == [4, 1] * 3
    assert values["z"].shape == (6, 4, 2)
    padding = torch.arange(4) >= n.unsqueeze(1)
    assert (x[padding] == -7.0).all()
    assert (x[~padding] != -7.0).all()


def test_a_site_to_enumerate_is_drawn():
    def hmm(x, stay):
        with pyro.plate("rows", len(x)):
            z = torch.ones(len(x))
            for t in pyro.markov(range(x.shape[1])):
                up = torch.where(z == 1, stay, 1 - stay)
                z = pyro.sample(f"z_{t}", dist.Bernoulli(up), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(10.0 * z, 1.0), obs=x[:, t])

    values, (x, _) = simulate(hmm, 4000, data=(torch.zeros(2, 3), torch.full((2,), 0.9)))
    _assert_mean(values["z_0"], 0.9, 0.3)
    _assert_mean(values["z_1"] == values["z_0"], 0.9, 0.3)
    _assert_mean(x[:, 2] - 10 * values["z_2"], 0.0, 1.0)


def test_what_a_function_holds_is_fixed_by_partial():
    def model(options, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(options["loc"], 1e-3))
            pyro.sample("obs", dist.Normal(z, 1e-3), obs=x)

    _, x = simulate(functools.partial(model, {"loc": 4.0}), 5, data=torch.zeros(2))
    torch.testing.assert_close(x, torch.full((5,), 4.0), atol=0.02, rtol=0)


def _of_mean(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)


def _of_label(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("c", dist.Bernoulli(torch.sigmoid(y)))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)
        pyro.sample("label", dist.Normal(z, 1.0), obs=y)


def _of_itself(x):
    with pyro.plate("rows", len(x)):
        before = torch.cat([x.new_zeros(len(x), 1), x[:, :-1]], 1)
        pyro.sample("obs", dist.Normal(before, 1.0).to_event(1), obs=x)


def _transformed(f):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=f(x))

    return model


def _of_fixed_size(x):
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)


def _subsampled(x):
    with pyro.plate("rows", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x[rows])


def _first_column(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:, 0])


def _observed_twice(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("one", dist.Normal(z, 1.0), obs=x)
        pyro.sample("two", dist.Normal(z, 1.0), obs=x)


def _penalized(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -z.square())
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)


def _of_a_global(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)


def _improper(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x)


VECTOR, MATRIX = torch.tensor([0.1, 0.9, 0.4, 0.6]), torch.rand(4, 3)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (_of_mean, VECTOR, "site 'z' depends on values observed at that site or later"),
        (_of_label, (VECTOR, VECTOR + 1), "site 'c' depends on values observed"),
        (_of_itself, MATRIX, "site 'obs' depends on values observed at that site"),
        (_transformed(lambda x: x / 255), VECTOR, "observed at site 'obs' is neither an argument of the model nor"),
        (_transformed(lambda x: x.clamp(0, 1)), VECTOR, r"other values at site 'obs' than the samples.*data\[0\]"),
        (_transformed(lambda x: x.float()), VECTOR.round().long(), r"data\[0\] \(torch.int64\): it rounds"),
        (_transformed(lambda x: x), VECTOR.round().long(), r"data\[0\] \(torch.int64\): it rounds"),
        (_transformed(lambda x: torch.zeros(len(x))), VECTOR, "observed at site 'obs' is neither an argument"),
        (_of_fixed_size, VECTOR, r"shape \[6\], but sampled values have \[4\].*the size of the plate as n"),
        (_subsampled, VECTOR, "plate 'rows' around site 'obs' takes 2 of 6 data points; .*no subsample_size"),
        (
            _first_column,
            MATRIX,
            r"observes 6 of the 18 numbers of data\[0\], at \['obs'\], and does not sample",
        ),
        (_observed_twice, VECTOR, r"numbers of data\[0\] repeatedly, at \['one', 'two'\]"),
        (_penalized, VECTOR, "site 'penalty' is a factor"),
        (_of_a_global, VECTOR, r"site 'z' is sampled with batch shape \(\), but 6 data points need \(6,\)"),
        (poutine.uncondition(_plain), VECTOR, r"observes nothing in a run on data, whose sites are \['code', 'obs'\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(model, data, message):
    with pytest.raises(ValueError, match=message):
        simulate(model, 6, data=data)


def test_a_distribution_that_is_not_drawn_from_is_named():
    with pytest.raises(NotImplementedError, match="one of its distributions has no sample"):
        simulate(_improper, 6, data=VECTOR)
    flat = VAE(mlp(2, [8]), Gaussian(6, 8), latent=2, prior=FlatPrior(2))
    z = torch.randn(3, 2)
    torch.testing.assert_close(decode(flat, {"z": z}, data=torch.zeros(1, 6)), decode(flat, {"z": z}))


def test_a_model_that_runs_on_its_own_data_only():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(VECTOR, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    assert simulate(model, 4, data=VECTOR)[1].shape == (4,)
    with pytest.raises(ValueError, match=r"does not run on n=6 data points made of the 4 rows .*use n=4"):
        simulate(model, 6, data=VECTOR)


def test_covariates_beside_an_example():
    with pytest.raises(ValueError, match="covariates are part of an example"):
        simulate(_plain, 6, VECTOR, data=VECTOR)


def test_sites_observed_or_weighed_in_a_run_without_data():
    def observes(x=None, y=None, *, n=1):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' is observed in the run that samples data.*example of all data"):
        simulate(observes, 4, VECTOR)
    assert set(simulate(lambda x, y: observes(x, y, n=len(x)), 4, data=(VECTOR, VECTOR))[0]) == {"z"}


def test_an_argument_that_nobody_reads_is_warned_of():
    def model(x, backwards, mask):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    mask = torch.tensor([True, True, False, True])
    with pytest.warns(UserWarning, match=r"neither observes nor reads data\[1\], which stays") as caught:
        simulate(model, 4, data=(VECTOR, VECTOR.flip(0), mask))
    assert len(caught) == 1


def test_several_sites_are_decoded_by_name():
    values, label = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0, 1, 2])
    example = torch.randn(3), torch.zeros(3).long()
    for model in (_labelled(True), _labelled(False)):
        found = decode(model, {"z": values, "label": label}, data=example)
        torch.testing.assert_close(found, values + 10 * label)
        found = decode(model, {"z": values}, data=example)
        assert list(found) == ["label", "obs"]
        torch.testing.assert_close(found["obs"], values + 20)  # at the most likely label
        assert (found["label"] - 1.3).abs().max() < 4 * 0.78 / 10  # mean of 100 samples
    found = decode(_steps, {"z": values}, data=100 * torch.randn(1, 3))
    torch.testing.assert_close(torch.stack(list(found.values()), 1), values.unsqueeze(1) * torch.tensor([1, 1.9, 2.71]))
    with pytest.raises(ValueError, match=r"values of all sites of data, \['label', 'obs'\]"):
        decode(_labelled(True), {"z": values, "label": label, "obs": values}, data=example)


def test_an_example_decodes_like_a_run_without_data():
    model = Hierarchical([(mlp(4, [8]), Gaussian(6, 8)), (mlp(2, [8]), MeanField(4, 8))], latent=2)
    z = torch.randn(3, 2)
    torch.testing.assert_close(decode(model, {"z_2": z}, data=torch.zeros(1, 6)), decode(model, {"z_2": z}))
    model = ConditionalVAE(mlp(2 + 3, [8]), Gaussian(6, 8), latent=2, covariates=3)
    classes = torch.tensor([2, 0, 1])
    expected = decode(model, {"z": z}, classes)
    torch.testing.assert_close(decode(model, {"z": z}, data=(torch.zeros(3, 6), classes)), expected)


def test_quantiles_of_the_prior_on_an_example():
    levels = torch.tensor([0.1, 0.5, 0.975])
    expected = 1 + torch.special.ndtri(levels)
    torch.testing.assert_close(prior_quantiles(_plain, levels, data=VECTOR)["code"], expected)

    def scaled(x, scale):
        with pyro.plate("rows", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, scale))
            z = pyro.sample("z", dist.Normal(top, scale))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    found = prior_quantiles(scaled, levels, data=(VECTOR[:1], torch.tensor([3.0])))
    torch.testing.assert_close(found["top"], 3 * torch.special.ndtri(levels))
    torch.testing.assert_close(found["z"], 3 * math.sqrt(2) * torch.special.ndtri(levels), atol=0.35, rtol=0)


def test_the_example_of_one_argument_in_a_tuple():
    _, data = simulate(_plain, 3, data=(VECTOR,))
    assert isinstance(data, tuple)
    source = OnExample(_plain, 3, VECTOR)
    assert source.observed == ("obs",)
