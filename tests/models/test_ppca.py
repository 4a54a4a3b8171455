"""Probabilistic PCA against scikit-learn, and its closed forms against each other."""

import math
from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO
from sklearn.decomposition import PCA
from torch import nn

from jensen.datasets import load
from jensen.families import FullCovariance, MeanField
from jensen.guides import ExactPosterior, amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import fit, log_weights
from jensen.models import PPCA

evaluate = partial(with_refined, refine=False)  # from samples of the guide


def _oil_flow():
    return load("oil_flow", dtype=torch.float64).train


def _from_sklearn(x, latent, prior_scale=1.0):
    """Our model at scikit-learn's parameters, and scikit-learn's log-likelihood of every data point."""
    pca = PCA(latent, svd_solver="full").fit(x.numpy())
    model = PPCA(x.shape[1], latent, prior_scale).double()
    excess = torch.as_tensor(pca.explained_variance_ - pca.noise_variance_).sqrt()
    with torch.no_grad():
        model.mean.copy_(torch.as_tensor(pca.mean_))
        model.weight.copy_(torch.as_tensor(pca.components_).T * excess / prior_scale)
        model.log_noise.copy_(torch.tensor(math.log(pca.noise_variance_) / 2, dtype=torch.float64))
    return model, torch.as_tensor(pca.score_samples(x.numpy()))


def _mean_field_kl(model):
    """KL of the best diagonal Gaussian to the posterior: half of sum log P_dd - log det P, P its precision."""
    precision = model.posterior(model.mean.unsqueeze(0)).precision_matrix[0]
    return 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()


@pytest.mark.parametrize("prior_scale", [1.0, 2.5])
def test_log_evidence_equals_scikit_learn_on_digits(digits, prior_scale):
    model, expected = _from_sklearn(digits.train, 8, prior_scale)
    assert (model.log_evidence(digits.train) - expected).abs().max() < 1e-8


@pytest.mark.data("oil_flow")
def test_log_evidence_equals_scikit_learn_on_oil_flow():
    x = _oil_flow()
    model, expected = _from_sklearn(x, 2)
    assert (model.log_evidence(x) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("prior_scale", [1.0, 2.5])
def test_closed_form_is_the_maximum(digits, prior_scale):
    """The gradient of the exact log p(x) vanishes there, and scikit-learn's N - 1 is a little worse."""
    x = digits.train
    model = PPCA(64, 8, prior_scale).double().fit_closed_form(x)
    best = model.log_evidence(x).mean()
    for name, gradient in zip(
        ("mean", "weight", "noise"), torch.autograd.grad(best, list(model.parameters())), strict=True
    ):
        assert gradient.abs().max() < 1e-9, name
    assert 0 < best.item() - _from_sklearn(x, 8)[1].mean().item() < 1e-4


def test_evidence_and_posterior_are_those_of_the_full_covariance(float64):
    model = PPCA(5, 2, prior_scale=1.7)
    x = torch.randn(10, 5)
    w, s, nu = model.weight.detach(), model.noise.detach(), 1.7
    covariance = nu**2 * w @ w.T + s**2 * torch.eye(5)
    marginal = torch.distributions.MultivariateNormal(model.mean.detach(), covariance)
    torch.testing.assert_close(model.log_evidence(x), marginal.log_prob(x))
    gain = nu**2 * w.T @ torch.linalg.inv(covariance)  # conditioning the joint Gaussian
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean, x @ gain.T)
    conditional = nu**2 * torch.eye(2) - nu**2 * gain @ w
    torch.testing.assert_close(posterior.covariance_matrix, conditional.expand(10, 2, 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("method", "tolerance"), [("fit_em", 1e-6), ("fit_gradient", 1e-4)])
def test_em_and_gradient_reach_the_closed_form_on_digits(digits, method, tolerance, seed):
    x = digits.train
    best = PPCA(64, 8, 1.7).double().fit_closed_form(x).log_evidence(x).mean()
    torch.manual_seed(seed)
    model = getattr(PPCA(64, 8, 1.7).double(), method)(x)
    assert 0 <= (best - model.log_evidence(x).mean()).item() + 1e-12 < tolerance


def test_log_evidence_keeps_its_digits_in_float32():
    """Data a thousand times larger than the noise."""
    x = 1000 * torch.randn(500, 3) @ torch.randn(3, 20) + torch.randn(500, 20)
    model = PPCA(20, 3).fit_closed_form(x)
    single = model.log_evidence(x)
    double = model.double().log_evidence(x.double())
    assert (single - double).abs().max() < 0.05


@pytest.mark.data("oil_flow")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("method", "tolerance"), [("fit_em", 1e-6), ("fit_gradient", 1e-4)])
def test_em_and_gradient_reach_the_closed_form_on_oil_flow(method, tolerance, seed):
    x = _oil_flow()
    best = PPCA(12, 2, 1.7).double().fit_closed_form(x).log_evidence(x).mean()
    torch.manual_seed(seed)
    model = getattr(PPCA(12, 2, 1.7).double(), method)(x)
    assert 0 <= (best - model.log_evidence(x).mean()).item() + 1e-12 < tolerance


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_svi_reaches_the_closed_form(digits, seed):
    """From random W, with a full-covariance guide that learns too, on the middle of the images."""
    x = digits.train[:, 24:40]
    best = PPCA(16, 4).double().fit_closed_form(x).log_evidence(x).mean()
    torch.manual_seed(seed)
    model = PPCA(16, 4).double()
    guide = amortize(model, nn.Identity(), FullCovariance, context=16).double()
    _train(model, guide, x, epochs=300, lr=2e-2, seed=seed)
    assert 0 <= (best - model.log_evidence(x).mean()).item() < 0.01


def _train(model, guide, x, *, epochs, lr, **options):
    schedule = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    fit(model, guide, x, epochs=epochs, lr=lr, batch_size=300, scheduler=schedule, progress=False, **options)


def test_exact_posterior_has_constant_weights(digits):
    model = PPCA(64, 8).double().fit_closed_form(digits.train).rotated(seed=3)
    with torch.no_grad():
        log_w = log_weights(model, ExactPosterior(model), digits.test, particles=100)
        assert (log_w - model.log_evidence(digits.test)).abs().max() < 1e-10


def test_training_with_the_exact_posterior_follows_the_gradient_of_log_p(digits):
    model, x = PPCA(64, 8).double(), digits.train[:100]
    parameters = list(model.parameters())
    loss = Trace_ELBO().differentiable_loss(model, ExactPosterior(model), x)
    ours = torch.autograd.grad(loss, parameters)
    exact = torch.autograd.grad(-model.log_evidence(x).sum(), parameters)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_rotation_keeps_the_marginal_and_costs_the_mean_field_guide(digits):
    model = PPCA(64, 8).double().fit_closed_form(digits.train)
    turned = model.rotated(seed=0)
    torch.testing.assert_close(turned.log_evidence(digits.test), model.log_evidence(digits.test), rtol=0, atol=1e-9)
    assert _mean_field_kl(model) == pytest.approx(0, abs=1e-9)  # orthogonal columns
    assert _mean_field_kl(turned) > 0.3
    assert torch.equal(turned.weight, model.rotated(seed=0).weight)
    assert not torch.equal(turned.weight, model.rotated(seed=1).weight)


@pytest.mark.parametrize(
    ("rotate", "family"),
    [
        pytest.param(True, MeanField, marks=pytest.mark.slow),
        pytest.param(True, FullCovariance, marks=pytest.mark.slow),
        pytest.param(False, MeanField, marks=pytest.mark.slow),
    ],
)
def test_guides_stop_at_their_known_kl(digits, rotate, family):
    model = PPCA(64, 8).double().fit_closed_form(digits.train)
    model = model.rotated(seed=0) if rotate else model
    known = _mean_field_kl(model) if family is MeanField else 0.0
    guide = amortize(model, nn.Identity(), family, context=64).double()
    _train(model, guide, digits.train, epochs=1600, lr=5e-2, freeze=model, seed=0)
    evidence = evaluate(model, guide, digits.train, particles=200, seed=0, progress=False)
    assert evidence.gap.mean().item() == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 5), "1 <= latent < features, but got latent=5, features=5"),
        ((5, 0), "1 <= latent < features"),
        ((5, 2, 0.0), "prior_scale is a positive standard deviation, but got 0.0"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PPCA(*arguments)


def test_data_without_noise_are_refused(float64):
    x = torch.randn(50, 2) @ torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"no variance outside 2 directions, so the noise would be 0"):
        PPCA(5, 2).fit_closed_form(x)


@pytest.mark.parametrize(
    ("x", "latent", "remedy"),
    [
        (torch.randn(50, 2) @ torch.randn(2, 5), 2, r"use latent=1 or less, or add noise \(dequantize\)$"),
        (
            torch.randn(2, 3),
            1,
            r"outside 1 direction, .*: use more data points \(2 of them span at most 1 direction\)$",
        ),
        (torch.cat([torch.randn(50, 2), torch.ones(50, 1)], 1), 2, r"; constant features: \[2\]$"),
        (torch.ones(5, 3), 1, "every feature of the data is constant"),
    ],
)
def test_what_to_do_about_data_without_noise_can_be_done(x, latent, remedy):
    with pytest.raises(ValueError, match=remedy):
        PPCA(x.shape[1], latent).fit_closed_form(x.double())
