"""The ELBO of every family on a rotated PPCA with a known log p(x)."""

from functools import partial

import pytest
import torch
from torch import nn

from jensen.families import IAF, FullCovariance, LowRank, MeanField, NeuralSpline, Sylvester
from jensen.guides import amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import fit
from jensen.models import PPCA

evaluate = partial(with_refined, refine=False)  # from samples of the guide

REACH = {"full covariance": (FullCovariance, 300, 2e-2)}  # family, epochs, learning rate
SLOWLY = {
    "low rank, full rank": (partial(LowRank, rank=8), 900, 3e-2),
    "IAF": (IAF, 300, 2e-2),
    "spline, autoregressive": (partial(NeuralSpline, hidden=[32]), 500, 4e-2),
    "spline, coupling": (partial(NeuralSpline, coupling=True, hidden=[32]), 500, 3e-2),
    "Sylvester, orthogonal": (partial(Sylvester, layers=2), 900, 2e-2),
    "Sylvester, Householder": (partial(Sylvester, kind="householder", layers=2), 900, 2e-2),
    "Sylvester, triangular": (partial(Sylvester, kind="triangular", layers=2), 900, 2e-2),
}


@pytest.fixture(scope="module")
def model(digits):
    return PPCA(64, 8).double().fit_closed_form(digits.train).rotated(seed=0).float()


def latent_encoder(model):
    """The posterior mean of PPCA as a frozen encoder: only the family is learned."""
    with torch.no_grad():
        inner = model.weight.T @ model.weight + model.noise.square() * torch.eye(8)
        gain = torch.linalg.solve(inner, model.weight.T)
        encoder = nn.Linear(64, 8)
        encoder.weight.copy_(gain)
        encoder.bias.copy_(-gain @ model.mean)
    return encoder.requires_grad_(False)


def measured(model, digits, family, epochs, lr):
    """The family trained by plain SVI, and measured on the test data."""
    encoder = latent_encoder(model)
    torch.manual_seed(0)
    guide = amortize(model, encoder, family, context=8)
    fit(
        model,
        guide,
        digits.train.float(),
        epochs=epochs,
        batch_size=400,
        lr=lr,
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        freeze=[model, encoder],
        seed=0,
        progress=False,
    )
    return evaluate(model, guide, digits.test.float(), particles=500, seed=0, progress=False)


def within_its_error(evidence):
    """The mean estimate of log p(x) lies within four of its Monte Carlo errors, and rounding, of the exact one."""
    difference = float((evidence.log_evidence - evidence.exact).mean())
    return abs(difference) < 4 * evidence.summary()["log_evidence_mc_error"] + 1e-4


@pytest.mark.parametrize("name", REACH)
def test_families_that_hold_the_posterior_reach_it(model, digits, name):
    evidence = measured(model, digits, *REACH[name])
    assert 0 < evidence.gap.mean() + 1e-3 < 0.021
    assert within_its_error(evidence)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOWLY)
def test_flows_reach_the_posterior(model, digits, name):
    evidence = measured(model, digits, *SLOWLY[name])
    assert 0 < evidence.gap.mean() + 1e-3 < 0.021
    assert within_its_error(evidence)


def test_a_mean_field_guide_stops_at_its_known_kl(model, digits):
    evidence = measured(model, digits, MeanField, 300, 2e-2)
    covariance = model.posterior(torch.zeros(1, 64)).covariance_matrix[0].detach().double()
    precision = torch.linalg.inv(covariance)
    kl = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    error = float(evidence.elbo_error.square().sum().sqrt()) / len(evidence.elbo)
    assert float(evidence.gap.mean()) == pytest.approx(kl, abs=4 * error + 5e-3)
