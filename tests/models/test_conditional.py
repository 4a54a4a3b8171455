"""Models of x given y: exact results of a linear model, samples per class, checks of y."""

import math
from functools import partial

import pytest
import torch
from model_members import nudged
from pyro.distributions import MultivariateNormal
from torch import nn

from jensen.families import FullCovariance, Gaussian, MeanField
from jensen.families.base import positive
from jensen.guides import amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import exact_log_evidence, fit, simulate
from jensen.models import ConditionalVAE
from jensen.networks import Conditioned, mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide


def linear(x_features=3, classes=4):
    """A linear model whose p(x | y) is Gaussian, and that Gaussian as a function of y [N, Y]."""
    model = ConditionalVAE(
        nn.Identity(), Gaussian(x_features, 2 + classes, scale=0.5), 2, classes, MeanField(2, classes)
    )
    model = nudged(model)

    def marginal(y):
        W, b = model.likelihood.affine.weight, model.likelihood.affine.bias
        loc, raw = model.prior.affine(y).chunk(2, -1)
        spread = W[:, :2] * positive(raw).unsqueeze(-2)  # [N, X, D]
        covariance = spread @ spread.mT + 0.25 * torch.eye(x_features)
        return MultivariateNormal(torch.cat([loc, y], -1) @ W.T + b, covariance)

    return model, marginal


def test_a_linear_one_has_the_known_log_p_of_x_given_y(float64):
    model, marginal = linear()
    y = torch.arange(4).repeat(3)
    with torch.no_grad():
        x = model(None, y)
        exact = marginal(torch.eye(4)[y]).log_prob(x)
        found = exact_log_evidence(model, (x, y), progress=False)
        torch.testing.assert_close(found.log_evidence, exact, atol=1e-5, rtol=0)
        other = marginal(torch.eye(4)[(y + 1) % 4]).log_prob(x)
    guide = amortize(model, Conditioned(mlp(3 + 4, [16]), 4), FullCovariance, context=16)
    evidence = evaluate(model, guide, (x, y), 20_000, seed=0, progress=False)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error.clamp_min(1e-3)).all()
    assert (exact - other).abs().min() > 0.01


def test_samples_of_a_class_have_its_mean_and_covariance(float64):
    model, marginal = linear()
    for c in range(4):
        y = torch.full((20_000,), c)
        with torch.no_grad():
            x = model(None, y)
            truth = marginal(torch.eye(4)[c : c + 1])
        error = x.std(0) / math.sqrt(len(x))
        assert ((x.mean(0) - truth.mean).abs() < 4 * error).all()
        torch.testing.assert_close(x.T.cov(), truth.covariance_matrix[0], rtol=0.1, atol=0.05)


def test_class_indices_are_one_hot_vectors(float64):
    model, _ = linear()
    y = torch.tensor([0, 3, 1])
    drawn = []
    for covariates in (y, torch.eye(4)[y]):
        torch.manual_seed(0)
        drawn.append(model(None, covariates))
    assert torch.equal(*drawn)


def test_training_finds_the_classes():
    """Classes that differ only in their mean: the samples of each class must have it after training."""
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    y = torch.arange(3).repeat(100)
    x = centres[y] + 0.3 * torch.randn(300, 2)
    model = ConditionalVAE(mlp(1 + 3, [16]), Gaussian(2, 16, scale="shared"), 1, 3)
    guide = amortize(model, Conditioned(mlp(2 + 3, [16]), 3), MeanField, context=16)
    fit(model, guide, (x, y), epochs=80, batch_size=100, lr=0.02, seed=0, progress=False)
    for c, centre in enumerate(centres):
        with torch.no_grad():
            drawn = model(None, torch.full((2000,), c))
        assert (drawn.mean(0) - centre).abs().max() < 0.15


def test_simulate_draws_at_the_covariates(float64):
    model, _ = linear()
    y = torch.tensor([0, 3, 1])
    values, x = simulate(model, 3, y)
    assert values["z"].shape == (3, 2) and x.shape == (3, 3)


def test_what_does_not_fit_is_named():
    model = ConditionalVAE(mlp(5, [8]), Gaussian(4, 8), 2, 3)
    x, y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="call it with"):
        model(x)
    with pytest.raises(ValueError, match="5 rows for 6 data points"):
        model(x, y[:5])
    with pytest.raises(ValueError, match="6 rows for 2 data points"):
        model(None, y, n=2)
    with pytest.raises(ValueError, match="classes from 0 to 2, but got 0 to 3"):
        model(None, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"vectors \[N, 3\], but got torch.float32 of shape \[6, 2\]"):
        model(x, torch.zeros(6, 2))
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        ConditionalVAE(mlp(5, [8]), Gaussian(4, 8), 2, 0)
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        Conditioned(mlp(5, [8]), 0)
    with pytest.raises(ValueError, match="expects data x of shape"):
        model(torch.zeros(6, 3), y)
