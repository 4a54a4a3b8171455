"""The members of ``jensen.models`` for the contract of a model: a new member is one entry here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jensen.families import Bernoulli, FullCovariance, Gaussian, GaussMarkov, OneHotCategorical
from jensen.guides import Amortized, amortize
from jensen.models import PPCA, VAE, FactorAnalysis, LinearGaussian, LinearGaussianSSM, MixtureOfPPCA
from jensen.networks import mlp, recurrent


@dataclass(frozen=True)
class Member:
    """How to make a small model, and what is known of it.

    Attributes:
        make: a fresh model, small, in the default precision.
        by_hand: ``by_hand(model, z, *data)``: log p(x, z), [N], at one value per site and datum, in plain torch.
        guide: ``guide(model)``: a guide that fits its sites.
        data: ``data(model, n)``: n data as a tuple of tensors; drawn from the model unless said otherwise.
    """

    make: Callable
    by_hand: Callable
    guide: Callable
    data: Callable = lambda model, n: (model(n=n),)


def normal(x, loc, scale):
    """Log-density of independent normals, summed over the last dimension."""
    scale = torch.as_tensor(scale, dtype=x.dtype)
    return (-((x - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2).sum(-1)


def bernoulli(x, logits):
    """Log-probability of independent binary features, summed over the last dimension."""
    return (x * logits - torch.nn.functional.softplus(logits)).sum(-1)


def encoder(features):
    """A small encoder of context 16."""
    return mlp(features, [16])


def full(features):
    """The guide of a model of ``features`` features with one continuous site."""
    return lambda model: amortize(model, encoder(features), FullCovariance, context=16)


def _ppca(model, z, x):
    return normal(z["z"], 0.0, 1.0) + normal(x, model.mean + z["z"] @ model.weight.T, model.log_noise.exp())


def _factor_analysis(model, z, x):
    return normal(z["z"], 0.0, 1.0) + normal(x, model.mean + z["z"] @ model.weight.T, model.log_noise.exp())


def _linear_gaussian(model, z, x):
    r = torch.linalg.solve(model.scale_tril, (x - model.mean - z["z"] @ model.weight.T).T).T
    return normal(z["z"], 0.0, 1.0) + normal(r, 0.0, 1.0) - model.log_scale.sum()


def _mixture_of_ppca(model, z, x):
    c = z["c"].argmax(-1)
    loc = model.mean[c] + (model.weight[c] @ z["z"].unsqueeze(-1)).squeeze(-1)
    log_p = model.logits.log_softmax(-1)[c] + normal(z["z"], 0.0, 1.0)
    return log_p + normal(x, loc, model.log_noise.exp()[c].unsqueeze(-1))


def _component_then_plane(model):
    families = {"c": OneHotCategorical(3, 16), "z": FullCovariance(2, 16 + 3)}
    return Amortized(encoder(5), families)


def _state_space(model, z, x, lengths):
    z, total = z["z"], 0.0
    first = torch.linalg.solve(model.initial_scale_tril, (z[:, 0] - model.initial_loc).T).T
    total = normal(first, 0.0, 1.0) - model.initial_log_scale.sum()
    for t in range(z.shape[1]):
        if t:
            total = total + normal(z[:, t], z[:, t - 1] @ model.transition.T, model.transition_log_scale.exp())
        seen = normal(x[:, t], model.mean + z[:, t] @ model.weight.T, model.log_noise.exp())
        total = total + (t < lengths) * seen
    return total


def _sequences(model, n):
    """Sequences of lengths 1, 2, 1, 2, ..."""
    lengths = 1 + torch.arange(n) % 2
    return model(None, lengths, n=n), lengths


def _markov(model):
    encoder = recurrent(2, 8, bidirectional=True, output="flat")
    return Amortized(encoder, {"z": GaussMarkov((2, 2), context=2 * 8, per_step=True)})


def _vae_gaussian(model, z, x):
    return normal(z["z"], 0.0, 1.0) + normal(x, model.likelihood.affine(model.decoder(z["z"])), 0.5)


def _vae_bernoulli(model, z, x):
    return normal(z["z"], 0.0, 1.0) + bernoulli(x, model.likelihood.affine(model.decoder(z["z"])))


MEMBERS = {
    "PPCA": Member(lambda: PPCA(5, 2), _ppca, full(5)),
    "FactorAnalysis": Member(lambda: FactorAnalysis(5, 2), _factor_analysis, full(5)),
    "LinearGaussian": Member(lambda: LinearGaussian(5, 2), _linear_gaussian, full(5)),
    "MixtureOfPPCA": Member(lambda: MixtureOfPPCA(5, 2, 3), _mixture_of_ppca, _component_then_plane),
    "LinearGaussianSSM": Member(lambda: LinearGaussianSSM(2, 2, 2), _state_space, _markov, _sequences),
    "VAE, Gaussian": Member(lambda: VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), 2), _vae_gaussian, full(5)),
    "VAE, Bernoulli": Member(lambda: VAE(mlp(2, [16]), Bernoulli(5, 16), 2), _vae_bernoulli, full(5)),
}
