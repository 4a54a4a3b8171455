"""Rate, distortion and active units against closed forms."""

import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from torch.distributions import Independent, Normal, kl_divergence

from jensen.families import Gaussian, MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import ELBO, PosteriorCollapseWarning, RateDistortion, evaluate, fit, rate_distortion
from jensen.kernel.randomness import derived_seed, private_randomness
from jensen.models import PPCA, VAE
from jensen.networks import mlp
from jensen.plots import plot_rate_distortion

pytestmark = pytest.mark.usefixtures("float64")


def test_rate_and_distortion_are_the_closed_forms_within_their_errors():
    torch.manual_seed(0)
    model, guide, x = pair("PPCA", "MeanField")
    found = rate_distortion(model, guide, x, 4000, seed=0, progress=False)
    with torch.no_grad():
        q = guide.families["z"](guide.encoder(x))
        rate = kl_divergence(q, Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
        mean, noise = q.mean @ model.weight.T + model.mean, model.noise
        spread = (q.variance.unsqueeze(1) * model.weight.square()).sum(-1)  # of each feature
        distortion = 0.5 * (((x - mean).square() + spread) / noise**2 + math.log(2 * math.pi)).sum(-1)
        distortion = distortion + x.shape[1] * noise.log()
    assert ((found.rate - rate).abs() < 4.5 * found.rate_error).all()
    assert ((found.distortion - distortion).abs() < 4.5 * found.distortion_error).all()
    s = found.summary()
    assert s["rate"] == pytest.approx(found.rate.mean().item() / math.log(2))
    assert s["distortion_mc_error"] == pytest.approx(
        found.distortion_error.square().sum().sqrt().item() / len(x) / math.log(2)
    )


def test_together_they_are_minus_the_elbo():
    model, guide, x = pair("VAE, Bernoulli", "Joint")
    found = rate_distortion(model, guide, x, 64, seed=3, progress=False)
    with private_randomness(derived_seed(3, "rate", 0)):
        elbo = evaluate(model, guide, x, 64, progress=False).elbo
    assert torch.allclose(-found.rate - found.distortion, elbo, rtol=1e-10)


def test_without_sampled_latents_the_rate_is_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    x = torch.randn(5)
    result = rate_distortion(model, lambda x: None, x, 2, progress=False)
    exact = torch.stack([dist.Normal(float(k), 1.0).log_prob(x) for k in (0, 1)]).logsumexp(0) - math.log(2)
    assert (result.rate == 0).all()
    torch.testing.assert_close(result.distortion, -exact.double(), rtol=1e-5, atol=1e-5)
    assert not result.activity


def test_states_that_the_guide_enumerates_have_a_rate(float64):
    probs = torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-x, x], -1)), infer={"enumerate": "parallel"})

    x = torch.tensor([-1.0, 0.2, 1.0])
    result = rate_distortion(model, guide, x, 2000, seed=0, progress=False)
    q = dist.Categorical(logits=torch.stack([-x, x], -1))
    expected = kl_divergence(q, dist.Categorical(probs.expand(3, 2)))
    assert ((result.rate - expected).abs() < 4 * result.rate_error).all()
    together = -(result.rate + result.distortion)
    assert ((together - evaluate(model, guide, x, 10, progress=False).elbo).abs() < 0.2).all()


def test_active_units_are_those_whose_posterior_mean_varies():
    torch.manual_seed(0)
    model = PPCA(5, latent=3)
    with torch.no_grad():
        model.weight[:, 1] = 0.0  # an unused unit
        x = model(n=3000)
        known = model.posterior(x).mean.var(0)
    found = rate_distortion(model, ExactPosterior(model), x, particles=8, seed=0, progress=False)
    assert ((found.activity["z"] - known).abs() < 4.5 * found.activity_error["z"] / math.sqrt(8) + 5e-3).all()
    assert found.active_units == {"z": 2}
    assert found.collapsed == []
    assert "active units of z" in str(found)


def test_collapse_is_named():
    torch.manual_seed(0)
    model = PPCA(5, latent=2)
    with pytest.warns(PosteriorCollapseWarning, match=r"posterior collapse at \['z'\].*free bits"):
        found = rate_distortion(model, PriorGuide(model), torch.randn(500, 5), seed=0, progress=False)
    assert found.active_units == {"z": 0}
    assert found.rate.abs().max() < 1e-10


def test_beta_trades_rate_for_distortion(digits, tmp_path):
    x, swept = digits.train[:600], {}
    for beta in (0.2, 1.0, 5.0):
        torch.manual_seed(0)
        model = VAE(mlp(4, [32]), Gaussian(64, 32, scale=0.2), latent=4)
        guide = amortize(model, mlp(64, [32]), MeanField, context=32)
        fit(model, guide, x, ELBO(beta=beta), epochs=15, lr=3e-3, seed=0, progress=False)
        swept[f"β = {beta}"] = rate_distortion(model, guide, x[:200], seed=0, progress=False)
    rates, distortions = ([s.summary()[name] for s in swept.values()] for name in ("rate", "distortion"))
    assert rates == sorted(rates, reverse=True)
    assert distortions == sorted(distortions)
    ax = plot_rate_distortion(swept)
    assert [t.get_text() for t in ax.texts] == list(swept)
    assert ax.lines[0].get_xdata().tolist() == pytest.approx(rates)
    assert ax.lines[0].get_ydata().tolist() == pytest.approx(distortions)
    assert "bits" in ax.get_ylabel()
    ax.figure.savefig(tmp_path / "plane.png")
    plt.close(ax.figure)


def test_what_makes_no_sense_is_refused():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="at least 2, but got 1"):
        rate_distortion(model, guide, x, 1)
    with pytest.raises(ValueError, match="results is empty"):
        plot_rate_distortion({})


def test_everything_is_kept():
    found = rate_distortion(*pair("PPCA", "MeanField"), seed=0, progress=False)
    stored = found.to_dict()
    assert stored["per_datum"]["rate"] == found.rate.tolist()
    assert stored["summary"]["active_units"] == found.active_units
    assert isinstance(found, RateDistortion)
