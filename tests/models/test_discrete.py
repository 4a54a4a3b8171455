"""Discrete latents: exact sums, training by enumeration, training by score."""

import itertools
import math
from functools import partial

import pytest
import torch
from model_members import bernoulli, nudged
from pyro.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

from jensen.families import Bernoulli, BinaryVector, Delta, Gaussian
from jensen.families.base import positive
from jensen.guides import Amortized, amortize
from jensen.inference import ELBO, IWAE, exact_log_evidence, fit, log_joint
from jensen.inference import evaluate as with_refined
from jensen.models import BinaryLatentVAE, GaussianMixtureVAE, discrete
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide


def states_of(features):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=features)))


def no_guide(x):
    """The guide has no sites if every latent is enumerated."""


@pytest.mark.parametrize("limits", [(4096, 2**20), (3, 7), (8, 1)])
def test_log_evidence_is_the_sum_over_states_whatever_the_chunks(limits, float64, monkeypatch):
    monkeypatch.setattr(discrete, "_STATES", limits[0])
    monkeypatch.setattr(discrete, "_NUMBERS", limits[1])
    model = nudged(BinaryLatentVAE(mlp(4, [8]), Bernoulli((2, 3), 8), 4))
    x = model(n=9)
    total = 0.0
    for z in states_of(4):
        logits = model.likelihood.affine(model.decoder(z))
        total = total + (bernoulli(z, model.logits) + bernoulli(x.flatten(1), logits)).exp()
    torch.testing.assert_close(model.log_evidence(x), total.log(), rtol=1e-10, atol=1e-10)


def test_sixteen_latents_are_summed_in_modest_memory():
    model = BinaryLatentVAE(mlp(16, [8]), Bernoulli(4, 8), 16)
    with torch.no_grad():
        x = states_of(4)
        torch.testing.assert_close(model.log_evidence(x).exp().sum(), torch.tensor(1.0))


def test_more_latents_have_no_exact_value_and_are_measured_all_the_same():
    model = BinaryLatentVAE(mlp(17, [8]), Bernoulli(4, 8), 17)
    guide = amortize(model, mlp(4, [8]), BinaryVector, context=8)
    x = model(n=3)
    with pytest.raises(NotImplementedError, match=r"17 binary latents have 2\^17 states"):
        model.log_evidence(x)
    assert evaluate(model, guide, x, 10, progress=False).exact is None


def test_the_enumerated_loss_without_a_guide_is_minus_log_p(float64):
    model = nudged(BinaryLatentVAE(mlp(3, [8]), Bernoulli(5, 8), 3))
    x = model(n=7)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), no_guide, x)
    assert loss == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-10)


def test_training_by_enumeration_reaches_the_optimum_of_the_likelihood(float64):
    """Two bits and one latent can represent every distribution of four patterns: the optimum is minus the entropy."""
    share = torch.tensor([0.4, 0.1, 0.15, 0.35])
    x = states_of(2).repeat_interleave((40 * share).round().long(), 0)
    optimum = (share * share.log()).sum()
    model = BinaryLatentVAE(nn.Identity(), Bernoulli(2, 1), 1)
    adam = Adam({"lr": 0.05})
    svi = SVI(config_enumerate(model), no_guide, adam, TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(400):
        svi.step(x)
    reached = model.log_evidence(x).mean()
    independent = (x.mean(0).log() * x.mean(0) + (1 - x.mean(0)).log() * (1 - x.mean(0))).sum()
    assert independent < optimum - 0.1
    torch.testing.assert_close(reached, optimum, atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", [pytest.param(ELBO(8), marks=pytest.mark.slow), IWAE(2)], ids=["ELBO", "IWAE"])
def test_training_by_score_reaches_the_optimum_of_the_enumerated_bound(objective, float64):
    model = BinaryLatentVAE(nn.Identity(), Gaussian(3, 2, scale=0.6), 2)
    with torch.no_grad():
        model.likelihood.affine.weight.copy_(torch.tensor([[1.0, 0.8], [0.8, 1.0], [0.5, -0.5]]))
        x = model(n=8)
    draws = 2 if isinstance(objective, IWAE) else 1
    states = states_of(2)
    log_p = log_joint(model, {"z": states.unsqueeze(1).expand(4, 8, 2)}, x).detach()  # [S, N]

    def enumerated(logits):
        """The bound in closed form, per data point, from the guide's logits [N, D]."""
        log_q = bernoulli(states.unsqueeze(1), logits)  # [S, N]
        total = 0.0
        for which in itertools.product(range(4), repeat=draws):
            bound = torch.stack([log_p[s] - log_q[s] for s in which]).logsumexp(0) - math.log(draws)
            total = total + sum(log_q[s] for s in which).exp() * bound
        return total

    best = torch.full((8,), -math.inf)
    for _ in range(4):  # from several starts: the bound may have more than one optimum
        logits = torch.randn(8, 2).requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def loss(logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            value = -enumerated(logits).sum()
            value.backward()
            return value

        optimizer.step(loss)
        best = torch.maximum(best, enumerated(logits.detach()))

    guide = amortize(model, mlp(3, [8]), BinaryVector, context=8).local(x)
    before = enumerated(guide.families["z"](guide.encoder(x)).base_dist.logits.detach())

    def decay(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.993)

    fit(model, guide, x, objective, epochs=700, batch_size=8, lr=0.15, scheduler=decay, freeze=model, progress=False)
    after = enumerated(guide.families["z"](guide.encoder(x)).base_dist.logits.detach())
    assert (best - before).mean() > 0.1
    assert (after <= best + 1e-6).all()
    assert (best - after).mean() < 0.015


def linear_mixture():
    """A mixture VAE with a linear decoder, whose p(x) is a mixture of Gaussians, and that mixture."""
    model = nudged(GaussianMixtureVAE(nn.Identity(), Gaussian(4, 2, scale=0.5), 2, components=3))
    W, b = model.likelihood.affine.weight, model.likelihood.affine.bias
    covariance = W * positive(model.raw_scale).square().unsqueeze(1) @ W.T + 0.25 * torch.eye(4)
    marginal = MultivariateNormal(model.loc @ W.T + b, covariance)
    return model, MixtureSameFamily(Categorical(logits=model.logits), marginal)


def test_a_linear_mixture_vae_is_a_mixture_of_gaussians(float64):
    model, marginal = linear_mixture()
    with torch.no_grad():
        x = model(n=5)
        found = exact_log_evidence(model, x, progress=False).log_evidence
        torch.testing.assert_close(found, marginal.log_prob(x), atol=1e-5, rtol=0)
        far = model(n=20_000)
        error = far.std(0) / math.sqrt(len(far))
        assert ((far.mean(0) - marginal.mean).abs() < 4 * error).all()


def test_the_choice_is_summed_out_by_enumeration(float64):
    model, _ = linear_mixture()
    x = model(n=7).detach()
    guide = Amortized(mlp(4, [8]), {"z": Delta(2, 8)})
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), guide, x)
    z = guide(x)["z"]
    components = Independent(Normal(model.loc, positive(model.raw_scale)), 1)
    prior = MixtureSameFamily(Categorical(logits=model.logits), components)
    by_hand = prior.log_prob(z).sum() + model.likelihood(z).log_prob(x).sum()
    assert loss == pytest.approx(-by_hand.item(), abs=1e-10)
