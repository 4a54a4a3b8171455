"""Unusual but legal data and plates, and errors for the others: missing values, sizes, dimensions."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from jensen.inference import evaluate, exact_log_evidence, fit, log_weights
from jensen.kernel import check_pair

NAN = math.nan
HOLES = torch.tensor([[0.1, 0.2, 3.4], [0.5, 0.1, NAN], [0.6, NAN, NAN], [NAN, NAN, NAN]])


def _masked(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z.unsqueeze(-1).expand(*z.shape, 3)), obs=x)

    return model


def _of_what_is_seen(x):
    seen = x.isfinite().sum(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.nan_to_num().sum(-1) / (1 + seen), (1 / (1 + seen)) ** 0.5))


def _exact(x):
    """Log p of the observed part of each row."""
    parts = [row[row.isfinite()] for row in x]
    logs = [
        dist.MultivariateNormal(torch.zeros(len(part)), torch.eye(len(part)) + 1.0).log_prob(part)
        if len(part)
        else x.new_zeros(())
        for part in parts
    ]
    return torch.stack(logs)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda loc: dist.NanMaskedNormal(loc, 1.0).to_event(1),
        lambda loc: dist.NanMaskedMultivariateNormal(loc, torch.eye(3).to(loc)),
    ],
    ids=["Normal", "MultivariateNormal"],
)
def test_missing_values_are_left_to_a_likelihood_that_knows_them(likelihood, float64):
    x = HOLES.double()
    model = _masked(likelihood)
    evidence = evaluate(model, _of_what_is_seen, x, 20, progress=False)
    torch.testing.assert_close(evidence.log_evidence, _exact(x))
    torch.testing.assert_close(exact_log_evidence(model, x, progress=False).log_evidence, _exact(x), atol=1e-4, rtol=0)
    guide_of_one = nn.Parameter(torch.tensor(0.5))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num().sum(-1) * pyro.param("slope", guide_of_one), 0.7))

    history = fit(model, guide, x, epochs=3, progress=False)
    assert all(math.isfinite(elbo) for elbo in history.elbo)


def test_missing_values_elsewhere_are_refused():
    model = _masked(lambda loc: dist.Normal(loc, 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"data\[0\] holds 6 NaN, the first at index \[1, 2\], and .* missing='nan'"):
        evaluate(model, _of_what_is_seen, HOLES, 20, progress=False)
    model = _masked(lambda loc: dist.NanMaskedNormal(loc, 1.0).to_event(1))

    def guide(x):  # whose encoder does not handle missing values
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1), 1.0))

    with pytest.raises(
        ValueError, match=r"a guide that reads NaN, .* remove or fill these rows \(the error: the guide"
    ):
        evaluate(model, guide, HOLES, 20, progress=False)


def test_infinity_is_refused_though_a_likelihood_leaves_it_out():
    x = HOLES.nan_to_num(nan=math.inf)
    model = _masked(lambda loc: dist.NanMaskedNormal(loc, 1.0).to_event(1))
    with pytest.raises(ValueError, match="holds 6 values that are NaN or infinite"):
        evaluate(model, _of_what_is_seen, x, 20, progress=False)


def _plate(x, sized):
    return pyro.plate("data", len(x)) if sized else pyro.plate("data")


@pytest.mark.filterwarnings("ignore:Found plate statements in guide")  # Pyro's own
@pytest.mark.parametrize("sized", [(False, False), (True, False), (False, True)])
def test_a_plate_without_a_size_has_that_of_its_sites(sized, float64):
    """The model's first, then the guide's: the weights are those of plates with a size."""
    decoder, encoder, x = nn.Linear(2, 5), nn.Linear(5, 4), torch.randn(150, 5)

    def pair_of(of_model, of_guide):
        def model(x):
            with _plate(x, of_model):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x):
            with _plate(x, of_guide):
                loc, raw = encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

        return model, guide

    assert check_pair(*pair_of(*sized), x).sizes == (150,)
    right, got = (evaluate(*pair_of(*of), x, 50, seed=0, progress=False) for of in ((True, True), sized))
    torch.testing.assert_close(got.elbo, right.elbo)
    torch.testing.assert_close(got.log_evidence, right.log_evidence)
    modules = pyro.nn.PyroModule[nn.ModuleList]([decoder, encoder])
    modules.requires_grad_(True)

    def trained(of):
        model, guide = pair_of(*of)

        def with_parameters(x):
            pyro.module("pair", modules)
            return model(x)

        return fit(with_parameters, guide, x, epochs=2, lr=1e-9, batch_size=60, seed=0, progress=False).elbo

    assert trained(sized) == pytest.approx(trained((True, True)), abs=1e-6)


def test_a_site_drawn_once_in_a_plate_without_a_size_is_global(float64):
    """As in Pyro: without expansion one sample is shared by all data points, and counts once."""
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data"):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("mu", dist.Normal(x.sum() / 7, 7**-0.5))

    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1.0).log_prob(x)
    torch.testing.assert_close(log_weights(model, guide, x, particles=5), exact.expand(5))
    assert evaluate(model, guide, x, 5, progress=False).joint


def test_exact_values_of_a_plate_without_a_size(float64):
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = exact_log_evidence(model, x, progress=False).log_evidence
    torch.testing.assert_close(exact, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-4, rtol=0)


def test_the_plate_over_another_dimension_is_named(float64):
    def model(x):  # [T, N]
        with pyro.plate("series", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, len(x)]).to_event(1), obs=x.T)

    def guide(x):
        with pyro.plate("series", x.shape[1]):
            pyro.sample("z", dist.Normal(x.sum(0) / (1 + len(x)), (1 + len(x)) ** -0.5))

    x = torch.randn(4, 9)
    with pytest.raises(
        ValueError, match=r"sizes \(9,\), but the model was given 4 data points: .*Give x.transpose\(0, 1\)"
    ):
        evaluate(model, guide, x, 10, progress=False)
    evidence = evaluate(lambda x: model(x.transpose(0, 1)), lambda x: guide(x.transpose(0, 1)), x.T, 10, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(x.T)
    torch.testing.assert_close(evidence.log_evidence, exact)


def test_training_in_batches_of_another_dimension_is_refused():
    """Batches of time steps, each from whole series."""

    def model(x):  # [T, N]
        with pyro.plate("series", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, len(x)]).to_event(1), obs=x.T)

    def guide(x):
        with pyro.plate("series", x.shape[1]):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x.mean(0), 0.5))

    x = torch.randn(30, 9)
    with pytest.raises(
        ValueError, match=r"sizes \(9,\), but the model was given 10 data points: .*Give x.transpose\(0, 1\)"
    ):
        fit(model, guide, x, epochs=1, batch_size=10, progress=False)
    assert fit(model, guide, x, epochs=1, progress=False).steps == 1


def test_two_plates_around_every_site_are_refused():
    def model(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(
        ValueError, match=r"sizes \(4, 9\), but the model was given 4 data points: every site must be inside one plate"
    ):
        evaluate(model, guide, torch.randn(4, 9), 10, progress=False)


_COUNTS = torch.tensor([0, 1, 200, 255])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "likelihood",
    [
        lambda z: dist.Poisson(z.exp()),
        lambda z: dist.Geometric(logits=z),
        lambda z: dist.Binomial(255, logits=z),
        lambda z: dist.Bernoulli(logits=z),
        lambda z: dist.Normal(z, 1.0),
    ],
    ids=["Poisson", "Geometric", "Binomial", "Bernoulli", "Normal"],
)
def test_whole_numbers_have_the_density_of_real_ones_or_are_refused(likelihood, dtype):
    """In bytes 255 + 1 is 0: a geometric likelihood of them was above 1."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    name = type(likelihood(torch.tensor(0.0))).__name__
    x = (_COUNTS % 2 if dtype is torch.bool or name == "Bernoulli" else _COUNTS).to(dtype)
    right = _evaluated(model, guide, x.float())
    if dtype in (torch.uint8, torch.int16) or name == "Bernoulli" or (dtype is torch.bool and name != "Poisson"):
        message = rf"observed at site 'x' of {name} are {dtype}, .*: convert them \(x.float\(\)\)"
        with pytest.raises(ValueError, match=message):
            _evaluated(model, guide, x)
        with pytest.raises(ValueError, match=message):
            fit(model, guide, x, epochs=1, progress=False)
    else:
        assert torch.equal(_evaluated(model, guide, x), right)


def _evaluated(model, guide, x):
    return evaluate(model, guide, x, 20, seed=0, refine=False, progress=False).log_evidence


def test_classes_may_be_bytes():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Categorical(logits=torch.stack([z, -z], -1)), obs=x)

    x = torch.tensor([0, 1, 1], dtype=torch.uint8)
    ours = [log_weights(model, _of_nothing, data, particles=3) for data in (x, x.long()) if torch.manual_seed(0)]
    assert torch.equal(*ours)


def _of_nothing(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
