"""Autoencoders as models with a point-estimate guide: their losses against formulas, and known solutions."""

import math
from functools import partial

import pytest
import torch
from model_members import nudged
from pyro.infer import Trace_ELBO
from torch import nn
from torch.func import jacrev, vmap

from jensen.families import Delta, Gaussian, MeanField
from jensen.guides import Amortized, Contractive, PriorGuide, amortize
from jensen.inference import ELBO, fit, simulate
from jensen.inference import evaluate as with_refined
from jensen.models import PPCA, VAE, FlatPrior, LaplacePrior, StandardNormal
from jensen.networks import GaussianNoise, MaskingNoise, Transposed, mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

X, D, SCALE, B, WEIGHT = 4, 2, 0.7, 0.6, 0.3


def autoencoder(prior, decoder=None, encoder=None):
    """A model and guide with linear networks, or the given ones: the decoder ends in X features, the encoder in D."""
    decoder = nn.Linear(D, X) if decoder is None else decoder
    model = VAE(decoder, Gaussian(X, None, scale=SCALE), D, prior)
    encoder = nn.Linear(X, D) if encoder is None else encoder
    return nudged(model), Amortized(encoder, {"z": Delta(D, None)})


def tied():
    layer = nn.Linear(D, X)
    return autoencoder(FlatPrior(D), layer, Transposed(layer))


def deep(prior):
    return autoencoder(prior, nn.Sequential(mlp(D, [8], nn.Tanh), nn.Linear(8, X)), tanh_encoder())


def tanh_encoder():
    return nn.Sequential(mlp(X, [8], nn.Tanh), nn.Linear(8, D))


def denoising(noise):
    return autoencoder(FlatPrior(D), encoder=nn.Sequential(noise, tanh_encoder()))


def contractive():
    model, guide = deep(FlatPrior(D))
    return model, Contractive(guide, WEIGHT)


def distance(model, x, z):
    """|x - f(z)|^2 / (2 sigma^2) + X/2 log(2 pi sigma^2)."""
    return (x - model.decoder(z)).square().sum(-1) / (2 * SCALE**2) + X / 2 * math.log(2 * math.pi * SCALE**2)


def plain_loss(model, guide, x):
    return distance(model, x, guide.encoder(x))


def penalized_loss(model, guide, x):
    z = guide.encoder(x)
    return distance(model, x, z) + z.square().sum(-1) / 2 + D / 2 * math.log(2 * math.pi)


def sparse_loss(model, guide, x):
    z = guide.encoder(x)
    return distance(model, x, z) + z.abs().sum(-1) / B + D * math.log(2 * B)


def tied_loss(model, guide, x):
    weight, bias = model.decoder.weight, model.decoder.bias
    centred = x - bias
    left = centred - centred @ weight @ weight.T
    return left.square().sum(-1) / (2 * SCALE**2) + X / 2 * math.log(2 * math.pi * SCALE**2)


def gaussian_denoising_loss(model, guide, x):
    return distance(model, x, guide.encoder[1](x + 0.2 * torch.randn_like(x)))


def masking_denoising_loss(model, guide, x):
    return distance(model, x, guide.encoder[1](x * (torch.rand_like(x) >= 0.4)))


def contractive_loss(model, guide, x):
    encoder = guide.guide.encoder
    jacobian = vmap(jacrev(lambda row: encoder(row)))(x)  # [N, D, X]
    return distance(model, x, encoder(x)) + WEIGHT * jacobian.square().sum((-2, -1))


PAIRS = {
    "linear": (lambda: autoencoder(FlatPrior(D)), plain_loss),
    "linear, tied": (tied, tied_loss),
    "tanh": (lambda: deep(FlatPrior(D)), plain_loss),
    "penalized": (lambda: deep(StandardNormal(D)), penalized_loss),
    "sparse": (lambda: deep(LaplacePrior(D, B)), sparse_loss),
    "denoising, Gaussian": (lambda: denoising(GaussianNoise(0.2)), gaussian_denoising_loss),
    "denoising, masks": (lambda: denoising(MaskingNoise(0.4)), masking_denoising_loss),
    "contractive": (contractive, contractive_loss),
}
each_pair = pytest.mark.parametrize(("make", "by_the_book"), PAIRS.values(), ids=list(PAIRS))


@each_pair
def test_the_loss_and_its_gradient_are_the_textbooks(make, by_the_book, float64):
    model, guide = make()
    x = torch.randn(6, X)
    parameters = [*model.parameters(), *guide.parameters()]
    found = []
    for loss in (lambda: Trace_ELBO().differentiable_loss(model, guide, x), lambda: by_the_book(model, guide, x).sum()):
        torch.manual_seed(3)
        value = loss()
        found.append([value.detach(), *torch.autograd.grad(value, parameters)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.manual_seed(3)
    assert ELBO().loss(model, guide, x) == pytest.approx(found[1][0].item(), abs=1e-10)


@each_pair
def test_no_log_likelihood_is_made_up(make, by_the_book):
    model, guide = make()
    with pytest.raises(ValueError, match="point"):
        evaluate(model, guide, torch.randn(6, X), 10, progress=False)


def minimize(loss, parameters, iterations=300):
    optimizer = torch.optim.LBFGS(
        list(parameters), max_iter=iterations, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_the_tied_linear_one_spans_the_principal_subspace(float64):
    model, guide = tied()
    assert not list(guide.parameters())  # they are the model's
    x = torch.randn(200, X) @ torch.randn(X, X) + torch.randn(X)
    minimize(lambda: Trace_ELBO().differentiable_loss(model, guide, x) / len(x), model.parameters())
    vectors = torch.linalg.eigh(x.T.cov()).eigenvectors[:, -D:]
    spanned = torch.linalg.qr(model.decoder.weight.detach()).Q
    sine = torch.linalg.matrix_norm(spanned - vectors @ (vectors.T @ spanned), 2)
    assert sine.asin() < 1e-3
    torch.testing.assert_close(model.decoder.weight.T @ model.decoder.weight, torch.eye(D), atol=1e-4, rtol=0)


def test_a_tied_pair_is_trained_by_fit(float64):
    model, guide = tied()
    x = torch.randn(100, X) * torch.tensor([3.0, 2.0, 0.5, 0.5])
    before = plain_loss(model, guide, x).mean()
    fit(model, guide, x, epochs=60, batch_size=50, lr=0.03, progress=False)
    left = x[:, 2:].square().sum(-1).mean() / (2 * SCALE**2) + X / 2 * math.log(2 * math.pi * SCALE**2)
    assert plain_loss(model, guide, x).mean() < before - 1
    assert plain_loss(model, guide, x).mean() < left + 0.1


def test_the_penalized_linear_one_finds_the_posterior_mode(float64):
    """On PPCA the mode is the mean of the exact posterior, which is linear in x."""
    model = nudged(PPCA(X, D))
    with torch.no_grad():
        x = model(n=50)
    guide = Amortized(nn.Linear(X, D), {"z": Delta(D, None)})
    minimize(lambda: Trace_ELBO().differentiable_loss(model, guide, x) / len(x), guide.parameters())
    torch.testing.assert_close(guide(x)["z"], model.posterior(x).mean, atol=1e-5, rtol=0)


def test_the_sparse_one_thresholds(float64):
    """With orthonormal directions the best code is W^T x, soft-thresholded by sigma^2 / b."""
    directions = torch.linalg.qr(torch.randn(X, D)).Q
    model, _ = autoencoder(LaplacePrior(D, B))
    with torch.no_grad():
        model.decoder.weight.copy_(directions)
        model.decoder.bias.zero_()
    x = 2 * torch.randn(20, X)
    along = x @ directions
    best = along.sign() * (along.abs() - SCALE**2 / B).clamp_min(0)
    assert 0 < (best == 0).double().mean() < 1

    def loss(z):
        return Trace_ELBO().loss(model, Amortized(nn.Identity(), {"z": _At(z)}), x)

    for step in (1e-3, 0.1, 1.0):
        for _ in range(20):
            assert loss(best) < loss(best + step * torch.randn(20, D))


class _At(Delta):
    """The same point for every context."""

    def __init__(self, z):
        super().__init__(D, X)
        self.z = z

    def project(self, h):
        return self.z


def score(model, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model.log_evidence(x).sum(), x)[0]


def test_denoising_learns_the_score(float64):
    """On data of a linear model (reconstruction - x) / s^2 is the score of x + noise: that of x up to O(s^2)."""
    truth = PPCA(3, 1)
    with torch.no_grad():
        truth.weight.copy_(torch.tensor([[1.5], [-1.0], [0.5]]))
        truth.log_noise.fill_(math.log(0.8))
        x, at = truth(n=20_000), truth(n=500)
    s = 0.2
    model = VAE(nn.Linear(3, 3), Gaussian(3, None, scale=s), 3, FlatPrior(3))
    guide = Amortized(nn.Sequential(GaussianNoise(s), nn.Linear(3, 3)), {"z": Delta(3, None)})
    with torch.no_grad():
        for layer in (model.decoder, guide.encoder[1]):
            layer.weight.copy_(torch.eye(3) + 0.05 * torch.randn(3, 3))
    decay = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    fit(model, guide, x, epochs=50, batch_size=2000, lr=0.03, scheduler=decay, seed=0, progress=False)
    guide.eval()
    with torch.no_grad():
        learned = (model.decoder(guide(at)["z"]) - at) / s**2
    exact = score(truth, at)
    with torch.no_grad():
        truth.log_noise.fill_(math.log(0.64 + s**2) / 2)
    assert (learned - score(truth, at)).norm() < 0.05 * exact.norm()
    assert (learned - exact).norm() < (0.05 + s**2 / 0.64) * exact.norm()


def test_the_flat_prior_has_no_draws():
    model, _ = autoencoder(FlatPrior(D))
    for draw in (model, lambda: model(n=5), lambda: simulate(model, 5)):
        with pytest.raises(ValueError, match="FlatPrior is improper and cannot be sampled"):
            draw()
    with pytest.raises(ValueError, match="FlatPrior is improper and cannot be sampled"):
        evaluate(model, PriorGuide(model), torch.randn(6, X), 10, progress=False)


def test_the_flat_prior_with_a_proper_guide_is_measured(float64):
    """Its log p(x) is the log of the integral of p(x | z), known where the decoder is linear."""
    model, _ = autoencoder(FlatPrior(D))
    x = torch.randn(5, X)
    W, r = model.decoder.weight, x - model.decoder.bias
    precision = W.T @ W / SCALE**2
    best = torch.linalg.solve(precision, W.T @ r.T / SCALE**2).T
    exact = -distance(model, x, best) + D / 2 * math.log(2 * math.pi) - torch.logdet(precision) / 2
    guide = amortize(model, mlp(X, [8]), MeanField, context=8).local(x)
    fit(model, guide, x, ELBO(8), epochs=150, batch_size=5, lr=0.1, freeze=model, progress=False)
    evidence = evaluate(model, guide, x, 20_000, seed=0, progress=False)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error + 1e-3).all()


@pytest.mark.parametrize("noise", [GaussianNoise(0.5), MaskingNoise(0.3)])
def test_noise_is_fresh_at_every_call_and_absent_in_evaluation(noise):
    x = torch.ones(20_000, 3)
    assert not torch.equal(noise(x), noise(x))
    changed = noise(x) - x
    expected = (0.0, 0.5) if isinstance(noise, GaussianNoise) else (-0.3, math.sqrt(0.21))
    assert changed.mean().item() == pytest.approx(expected[0], abs=0.01)
    assert changed.std().item() == pytest.approx(expected[1], abs=0.01)
    assert torch.equal(noise.eval()(x), x)
    noise.train()


def test_a_contractive_guide_with_a_density_is_measured_without_its_penalty(float64):
    model = nudged(VAE(mlp(D, [8]), Gaussian(X, 8, scale=0.5), D))
    guide = amortize(model, mlp(X, [8]), MeanField, context=8)
    x = model(n=6).detach()
    both = [evaluate(model, g, x, 100, seed=0, progress=False).elbo for g in (guide, Contractive(guide, 10.0))]
    torch.testing.assert_close(*both)
    seeded = []
    for g in (guide, Contractive(guide, 10.0)):
        torch.manual_seed(0)
        seeded.append(Trace_ELBO().loss(model, g, x))
    assert seeded[1] == pytest.approx(seeded[0] + 10 * Contractive(guide, 10.0).penalty(x).sum().item())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="scale is the positive mean"):
        LaplacePrior(2, 0.0)
    with pytest.raises(ValueError, match="scale must be a positive standard deviation"):
        GaussianNoise(-1.0)
    with pytest.raises(ValueError, match="share must be a probability"):
        MaskingNoise(1.5)
    two = Amortized(mlp(X, [8]), {"a": Delta(2, 8), "b": Delta(2, 10)})
    with pytest.raises(ValueError, match=r"one latent site, but got one with \['a', 'b'\]"):
        Contractive(two, 1.0)
    with pytest.raises(ValueError, match="at least 0, but got -1"):
        Contractive(Amortized(mlp(X, [8]), {"a": Delta(2, 8)}), -1.0)
