"""The trivial baseline of every result: its numbers, its training data, and the warning about a model below it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from jensen.families import Bernoulli, ContinuousBernoulli, Gaussian, NegativeBinomial, Poisson
from jensen.guides import ExactPosterior, PriorGuide
from jensen.inference import Evidence, evaluate
from jensen.inference.measure.baseline import baseline, kind_of, likely_reason
from jensen.models import PPCA, VAE, LinearGaussianSSM
from jensen.networks import mlp

_QUICK = {"particles": 30, "seed": 0, "progress": False}


def _data(kind, n=60):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return {"Gaussian": 3 * x + 1, "Bernoulli": (x > 0.5).float(), "Poisson": (2 * x).abs().floor()}[kind]


@pytest.mark.parametrize("kind", ["Gaussian", "Bernoulli", "Poisson"])
def test_it_is_the_density_of_the_closed_form_fit(kind):
    train, x = _data(kind, 60), _data(kind, 40)
    a, b = train.double().numpy(), x.double().numpy()
    rate = (a.sum(0) + 0.5) / 61
    expected = {
        "Gaussian": lambda: stats.norm(a.mean(0), a.std(0)).logpdf(b),
        "Bernoulli": lambda: stats.bernoulli(rate).logpmf(b),
        "Poisson": lambda: stats.poisson(rate).logpmf(b),
    }[kind]()
    found = baseline(kind, x, train)
    torch.testing.assert_close(found.log_prob, torch.as_tensor(expected.sum(1)))
    assert not found.own and found.favour == 0
    own = baseline(kind, x)
    assert own.own and own.favour == pytest.approx(4 * (2 if kind == "Gaussian" else 1) / 40)


def test_a_value_that_training_data_lack_keeps_a_probability():
    train = torch.zeros(20, 3)
    for kind in ("Bernoulli", "Poisson"):
        assert bool(baseline(kind, torch.ones(2, 3), train).log_prob.isfinite().all())


def test_a_constant_feature_has_a_finite_density():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = 0.1
    found = baseline("Gaussian", x)
    torch.testing.assert_close(found.log_prob, baseline("Gaussian", x[:, ::2]).log_prob)
    x[0, 1] += 1.0  # the feature is constant in the training data
    other = stats.norm(0.1, (2 * math.pi) ** -0.5).logpdf(1.1)
    shifted = baseline("Gaussian", x[:1], x[1:]).log_prob - baseline("Gaussian", x[:1, ::2], x[1:, ::2]).log_prob
    assert float(shifted) == pytest.approx(float(other))


def test_one_datum_is_beside_none_of_its_own():
    model = PPCA(4, 2)
    evidence = evaluate(model, PriorGuide(model), torch.ones(1, 4), **_QUICK)
    assert evidence.baseline is None and not evidence.below
    beside = evaluate(model, PriorGuide(model), torch.ones(1, 4), train=_data("Gaussian"), **_QUICK)
    assert beside.baseline.shape == (1,)


def test_a_small_spread_far_from_zero_is_no_constant():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(baseline("Gaussian", x + 1e6).log_prob, baseline("Gaussian", x).log_prob)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (Gaussian, "Gaussian"),
        (ContinuousBernoulli, "Gaussian"),
        (Bernoulli, "Bernoulli"),
        (Poisson, "Poisson"),
        (NegativeBinomial, "Poisson"),
    ],
)
def test_its_kind_is_that_of_the_likelihood(family, kind):
    model = VAE(mlp(2, [8]), family(4, 8), latent=2)
    x = _data(kind).sigmoid() if family is ContinuousBernoulli else _data(kind)
    evidence = evaluate(model, PriorGuide(model), x, **_QUICK)
    assert evidence.baseline_kind == f"{kind} per feature, fitted here"
    torch.testing.assert_close(evidence.baseline, baseline(kind, x).log_prob)
    assert f"{kind} per feature, fitted here" in str(evidence)
    train = evaluate(model, PriorGuide(model), x, train=x[:30], **_QUICK)
    assert train.baseline_kind == f"{kind} per feature"
    torch.testing.assert_close(train.baseline, baseline(kind, x, x[:30]).log_prob)
    again = Evidence.from_json(train.to_json())
    assert torch.equal(again.baseline, train.baseline) and again.below == train.below


def test_what_does_not_compare_has_none():
    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0), obs=x)

    def half(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(z, 1.0), obs=x[:, 1])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert kind_of(masked, guide, (torch.randn(9),)) is None
    assert kind_of(half, guide, (torch.randn(9, 2),)) is None
    assert evaluate(half, guide, torch.randn(9, 2), **_QUICK).baseline is None
    ssm = LinearGaussianSSM(3, latent=2, steps=4)
    assert kind_of(ssm, PriorGuide(ssm), ()) is None


def test_joint_weights_have_that_of_all_data():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.mean(), 1 / math.sqrt(len(x))))

    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    evidence = evaluate(model, guide, x, **_QUICK)
    assert evidence.joint and evidence.baseline.shape == (1,)
    torch.testing.assert_close(evidence.baseline[0], baseline("Gaussian", x).log_prob.sum())
    assert not evidence.below


def test_a_model_below_it_is_said_to_be_with_the_likely_reason(float64):
    model = PPCA(4, 2)
    scales = torch.tensor([1.0, 1.0, 1.0, 500.0])
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double() * scales
    evidence = evaluate(model, ExactPosterior(model), x, **_QUICK)
    lower = float((evidence.baseline - evidence.exact).mean())
    assert evidence.below.startswith(f"by {lower:.0f}"[:4])
    assert "features differ in scale by a factor of" in evidence.below and "--standardize" in evidence.below
    assert "below the baseline" in str(evidence)


def test_bytes_with_a_constant_margin_are_told_and_counts_are_no_bytes():
    x = torch.randint(0, 256, (80, 9), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 0.0
    model = PPCA(9, 2)
    assert "levels=256" in evaluate(model, PriorGuide(model), x, **_QUICK).below
    counts = VAE(mlp(2, [8]), Poisson(9, 8), latent=2)
    below = evaluate(counts, PriorGuide(counts), x, **_QUICK).below
    assert below.endswith("trained too short, or with too high an lr")


def test_the_maximum_of_likelihood_is_not_below_it(float64):
    for seed in range(20):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).double()
        model = PPCA(6, 1).fit_closed_form(x)
        assert not evaluate(model, ExactPosterior(model), x, **_QUICK).below


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.arange(300.0).remainder(256).repeat(16, 1).T[:, :16], "whole numbers from 0 to 255"),
        (torch.cat([torch.arange(90.0)[:, None], torch.randn(90, 2)], 1), "feature 0 counts the rows"),
        (torch.cat([torch.randn(90, 2), 7 + torch.randperm(150)[:90, None].float()], 1), "feature 2 counts the rows"),
        (torch.cat([torch.randn(90, 2), torch.arange(90.0)[:, None].remainder(45)], 1), ""),
        (torch.randn(90, 2) + 1e4, "far from a scale of 1"),
        (torch.randn(90, 2), ""),
        (torch.zeros(90, 2), ""),
        (torch.randn(1, 2), ""),
    ],
)
def test_likely_reasons(x, reason):
    found = likely_reason(x)
    assert reason in found if reason else not found
