"""Bounds from both sides: upper bounds on data with known latents, against exact values and manual computation."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from foreign import EXAMPLE, Images
from members import NO_INVERSE, amortized, pair
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn

from jensen.families import FullCovariance, MeanField
from jensen.guides import ExactPosterior, Laplace, PriorGuide, amortize
from jensen.inference import bounds, fit, log_joint, log_weights, simulate
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA, Ring

X, D = 5, 2


def _ppca():
    model = PPCA(X, D).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(X, D).double()).Q * torch.tensor([3.0, 1.0]))
    return model.rotated(seed=0)


def _trained(family, epochs):
    """A guide of a rotated PPCA, near its optimum."""
    model = _ppca()
    guide = amortize(model, nn.Identity(), family, context=X).double()
    data = model(n=500).detach()
    fit(model, guide, data, epochs=epochs, batch_size=100, lr=2e-2, freeze=model, seed=0, progress=False)
    return model, guide


def test_with_the_exact_posterior_both_sides_are_exact():
    model = _ppca()
    latents, x = simulate(model, 50)
    b = bounds(model, ExactPosterior(model), x, 16, latents=latents, progress=False)
    exact = torch.full((5,), b.exact, dtype=torch.float64)
    torch.testing.assert_close(b.mean, exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(b.upper, exact, rtol=0, atol=1e-8)
    assert (b.upper_error < 1e-8).all()


@pytest.mark.parametrize(("family", "epochs"), [(MeanField, 20), (FullCovariance, 5)])
def test_the_exact_value_lies_between_and_they_close(family, epochs):
    model, guide = _trained(family, epochs)
    latents, x = simulate(model, 2000)
    b = bounds(model, guide, x, 256, latents=latents, seed=0, progress=False)
    assert (b.mean - 4 * b.error < b.exact).all()
    assert (b.upper + 4 * b.upper_error > b.exact).all()
    gap = b.upper - b.mean
    assert gap[0] > 0.05
    assert (gap.diff() < 0).all()
    assert (b.upper.diff() < 0).all()
    assert gap[-1] < 0.25 * gap[0]


def test_the_latents_of_a_model_of_any_style():
    pair = Images(scale=1.3)
    latents, x = simulate(pair.model, 2000, data=EXAMPLE)
    b = bounds(pair.model, pair.guide, x, 256, latents=latents, seed=0, progress=False)
    exact = float(pair.log_evidence(x).mean())
    assert (b.mean - 4 * b.error < exact).all()
    assert (b.upper + 4 * b.upper_error > exact).all()
    assert b.upper[0] - b.mean[0] > 0.05
    assert b.upper[-1] - b.mean[-1] < 0.02


def test_one_particle_is_the_true_latents_own_weight():
    model, guide = _trained(MeanField, 5)
    latents, x = simulate(model, 300)
    b = bounds(model, guide, x, 1, latents=latents, progress=False)
    q = dist.Normal(*_moments(guide, x)).to_event(1)
    log_p = log_joint(model, {"z": latents["z"].unsqueeze(0)}, x)[0]
    assert b.upper.item() == pytest.approx((log_p - q.log_prob(latents["z"])).mean().item(), abs=1e-10)


def _moments(guide, x):
    q = guide.families["z"](guide.encoder(x))
    return q.mean.detach(), q.variance.sqrt().detach()


def test_k_particles_are_the_true_one_and_the_others_of_its_block():
    model, guide = _trained(MeanField, 5)
    latents, x = simulate(model, 40)
    b = bounds(model, guide, x, 4, latents=latents, seed=7, progress=False)
    torch.manual_seed(derived_seed(7, "bounds", 0))
    w = log_weights(model, guide, x, particles=4).detach()  # the same draw
    true = log_joint(model, {"z": latents["z"].unsqueeze(0)}, x)[0]
    true = true - dist.Normal(*_moments(guide, x)).to_event(1).log_prob(latents["z"])
    pairs = torch.stack([torch.logaddexp(true, w[1]), torch.logaddexp(true, w[3])]).mean(0) - math.log(2)
    four = torch.stack([true, w[1], w[2], w[3]]).logsumexp(0) - math.log(4)
    expected = torch.stack([true, pairs, four]).mean(1)
    torch.testing.assert_close(b.upper, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_error_from_above_covers_the_exact_value_of_a_tight_guide():
    """Over 200 data sets, U_K minus the exact mean in standard errors: not too low, and rarely too high."""
    model, guide = _trained(FullCovariance, 40)
    scores = []
    for _ in range(200):
        latents, x = simulate(model, 50)
        b = bounds(model, guide, x, 64, latents=latents, progress=False)
        scores.append((b.upper[-1] - b.exact) / b.upper_error[-1])
    scores = torch.stack(scores)
    assert 0.7 < scores.std() < 1.3
    assert scores.mean() > -4 * scores.std() / math.sqrt(200)


def test_a_missed_mode_leaves_the_upper_bound_far_away():
    """The weights from one of two modes are constant and log 2 too low; only the true latents reach the other."""

    def one_mode(x):
        with pyro.plate("data", len(x), dim=-1):
            centre = x.clamp_min(0.5).sqrt()
            pyro.sample("z", dist.Normal(centre, 0.2 / (2 * centre)).to_event(1))

    model = Ring(noise=0.2, latent=1).double()
    latents, x = simulate(model, 4000)
    away = x.squeeze(-1) > 2
    x, latents = x[away], {"z": latents["z"][away]}
    b = bounds(model, one_mode, x, 256, latents=latents, seed=0, progress=False)
    assert b.mean[-1] == pytest.approx(b.exact - math.log(2), abs=0.02)
    assert b.upper[-1] > b.exact + 100


def test_sites_drawn_one_after_the_other_are_scored_given_each_other(float64):
    def model(x=None, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            return pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):  # the exact posterior: b given x, then a given b
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Normal(2 * x / 3, math.sqrt(2 / 3)))
            pyro.sample("a", dist.Normal(b / 2, math.sqrt(1 / 2)))

    latents, x = simulate(model, 30)
    found = bounds(model, guide, x, 4, latents=latents, progress=False)
    expected = dist.Normal(0.0, math.sqrt(3)).log_prob(x).mean().item()
    assert found.upper.tolist() == pytest.approx([expected] * 3, abs=1e-10)
    assert found.mean.tolist() == pytest.approx([expected] * 3, abs=1e-10)


def test_batches_and_the_draws_from_below_are_the_same_with_latents():
    model, guide = _trained(MeanField, 5)
    latents, x = simulate(model, 100)
    alone = bounds(model, guide, x, 1024, seed=0, progress=False)  # batches of 32
    both = bounds(model, guide, x, 1024, latents=latents, seed=0, progress=False)
    assert alone.upper is None
    assert alone.upper_error is None
    assert torch.equal(alone.mean, both.mean)
    assert torch.equal(alone.error, both.error)
    alone = bounds(model, PriorGuide(model), x[:1], 2, latents={"z": latents["z"][:1]}, progress=False)
    assert alone.upper_error.isnan().all()


@pytest.mark.parametrize("make", [Laplace, lambda model: amortized(model, FullCovariance, joint=True)])
def test_an_auxiliary_site_has_no_true_value(make):
    model = PPCA(X, D)
    latents, x = simulate(model, 10)
    with pytest.raises(ValueError, match=r"the guide samples \['joint'\].*an auxiliary site .* has no true value"):
        bounds(model, make(model), x, 4, latents=latents, progress=False)


def test_an_autoguide_over_all_sites_has_joint_weights():
    model = PPCA(X, D)
    latents, x = simulate(model, 10)
    with pytest.raises(
        ValueError, match=r"bounds needs one value per data point.*single site of an AutoMultivariateNormal"
    ):
        bounds(model, AutoMultivariateNormal(model), x, 4, latents=latents, progress=False)


@pytest.mark.parametrize("name", NO_INVERSE)
def test_a_guide_without_log_q_of_a_given_value_is_named(name):
    model, guide, _ = pair("PPCA", name)
    latents, x = simulate(model, 10)
    with pytest.raises(NotImplementedError, match=r"needs log q\(z \| x\) at the latents .*its own samples only"):
        bounds(model, guide, x, 4, latents=latents, progress=False)


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        ({"z": torch.zeros(9, D)}, {}, r"one row per data point \(10\).*\{'z': 9\}.*simulate"),
        ({}, {}, r"one row per data point \(10\)"),
        ({"z": torch.zeros(10, D)}, {"batch_transform": torch.exp}, "omit batch_transform"),
        ({"y": torch.zeros(10, D)}, {}, r"the guide samples \['z'\], but latents hold values only for \['y'\]"),
        (
            {"z": torch.zeros(10, D), "y": torch.zeros(10)},
            {},
            r"for \['y'\], but the guide samples only \['z'\]",
        ),
        ({"z": torch.zeros(10, D + 1)}, {}, r"values of shape \[K, 10, 2\] at site 'z', but got \[1, 10, 3\]"),
    ],
)
def test_latents_that_cannot_be_are_named(latents, options, message):
    model = PPCA(X, D)
    with pytest.raises(ValueError, match=message):
        bounds(model, PriorGuide(model), torch.zeros(10, X), 4, latents=latents, progress=False, **options)
