"""The members of ``jensen.models`` for the contract of a model: a new member is one entry here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jensen.families import Bernoulli, BinaryVector, Delta, FullCovariance, Gaussian, MeanField, OneHotCategorical
from jensen.guides import Amortized, BottomUp, Contractive, Ladder, amortize
from jensen.models import (
    PPCA,
    VAE,
    BinaryLatentVAE,
    ConditionalVAE,
    FlatPrior,
    GaussianMixtureVAE,
    Hierarchical,
    LaplacePrior,
)
from jensen.networks import Conditioned, mlp


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


def nudged(model):
    """The model with every parameter moved off the place where it starts."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn_like(p)
    return model


def encoder(features):
    """A small encoder of context 16."""
    return mlp(features, [16])


def full(features):
    """The guide of a model of ``features`` features with one continuous site."""
    return lambda model: amortize(model, encoder(features), FullCovariance, context=16)


def _ppca(model, z, x):
    return normal(z["z"], 0.0, 1.0) + normal(x, model.mean + z["z"] @ model.weight.T, model.log_noise.exp())


def _vae_gaussian(model, z, x):
    return normal(z["z"], 0.0, 1.0) + normal(x, model.likelihood.affine(model.decoder(z["z"])), 0.5)


def _vae_bernoulli(model, z, x):
    return normal(z["z"], 0.0, 1.0) + bernoulli(x, model.likelihood.affine(model.decoder(z["z"])))


def _binary(model, z, x):
    return bernoulli(z["z"], model.logits) + bernoulli(x, model.likelihood.affine(model.decoder(z["z"])))


def _gaussian_mixture(model, z, x):
    which = z["c"].argmax(-1)
    log_c = model.logits.log_softmax(-1)[which]
    scale = torch.log1p((model.raw_scale[which] + math.log(math.e - 1)).exp()) + 1e-6
    log_z = normal(z["z"], model.loc[which], scale)
    return log_c + log_z + normal(x, model.likelihood.affine(model.decoder(z["z"])), 0.5)


def mean_field(x, family, h):
    """Log-density of a ``MeanField`` family at x, from its context."""
    loc, raw = family.affine(h).chunk(2, -1)
    return normal(x, loc, torch.log1p((raw + math.log(math.e - 1)).exp()) + 1e-6)


def _hierarchical(model, z, x):
    L = len(z)
    total = normal(z[f"z_{L}"], 0.0, 1.0)
    for level in range(L, 1, -1):
        h = model.networks[level - 1](z[f"z_{level}"])
        total = total + mean_field(z[f"z_{level - 1}"], model.families[level - 1], h)
    return total + bernoulli(x, model.families[0].affine(model.networks[0](z["z_1"])))


def _two_layers():
    return nudged(Hierarchical.of_widths(5, (3, 2), ((8, 7), (6, 5))))


def _three_layers():
    return nudged(Hierarchical.of_widths(5, (3, 2, 1), ((8,), (7,), (6,))))


def _conditional(model, z, x, y):
    one_hot = torch.eye(3, dtype=x.dtype)[y] if y.dim() == 1 else y
    log_z = normal(z["z"], 0.0, 1.0) if y.dim() == 1 else mean_field(z["z"], model.prior, one_hot)
    h = model.decoder(torch.cat([z["z"], one_hot], -1))
    return log_z + normal(x, model.likelihood.affine(h), 0.5)


def _conditional_vae(prior=None):
    return nudged(ConditionalVAE(mlp(2 + 3, [16]), Gaussian(5, 16, scale=0.5), 2, 3, prior))


def _with(draw):
    """Data (x, y), with y from ``draw(n)``."""
    return lambda model, n: (lambda y: (model(None, y), y))(draw(n))


def _conditional_guide(model):
    return amortize(model, Conditioned(mlp(5 + 3, [16]), 3), FullCovariance, context=16)


def _autoencoder(prior):
    return nudged(VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), 2, prior))


def _flat(model, z, x):
    return normal(x, model.likelihood.affine(model.decoder(z["z"])), 0.5)


def _sparse(model, z, x):
    return _flat(model, z, x) - (z["z"].abs() / 0.7 + math.log(2 * 0.7)).sum(-1)


def point(model):
    """The point estimate of a model of 5 features."""
    return amortize(model, encoder(5), Delta, context=16)


MEMBERS = {
    "PPCA": Member(lambda: PPCA(5, 2), _ppca, full(5)),
    "VAE, Gaussian": Member(lambda: VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), 2), _vae_gaussian, full(5)),
    "VAE, Bernoulli": Member(lambda: VAE(mlp(2, [16]), Bernoulli(5, 16), 2), _vae_bernoulli, full(5)),
    "BinaryLatentVAE": Member(
        lambda: nudged(BinaryLatentVAE(mlp(3, [16]), Bernoulli(5, 16), 3)),
        _binary,
        lambda model: amortize(model, encoder(5), BinaryVector, context=16),
    ),
    "GaussianMixtureVAE": Member(
        lambda: nudged(GaussianMixtureVAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), 2, components=3)),
        _gaussian_mixture,
        lambda model: Amortized(encoder(5), {"c": OneHotCategorical(3, 16), "z": MeanField(2, 19)}),
    ),
    "Hierarchical, bottom-up guide": Member(
        _two_layers, _hierarchical, lambda model: BottomUp.of_widths(5, (3, 2), ((8, 7), (6, 5)))
    ),
    "Hierarchical, ladder guide": Member(
        _three_layers, _hierarchical, lambda model: Ladder.of_widths(model, 5, ((8,), (7,), (6,)))
    ),
    "Hierarchical, top-down guide": Member(_three_layers, _hierarchical, full(5)),
    "ConditionalVAE, classes": Member(
        _conditional_vae, _conditional, _conditional_guide, _with(lambda n: torch.randint(3, (n,)))
    ),
    "ConditionalVAE, vectors, p(z | y)": Member(
        lambda: _conditional_vae(MeanField(2, 3)),
        _conditional,
        _conditional_guide,
        _with(lambda n: torch.randn(n, 3)),
    ),
    "autoencoder": Member(lambda: _autoencoder(FlatPrior(2)), _flat, point, lambda model, n: (torch.randn(n, 5),)),
    "contractive autoencoder": Member(
        lambda: _autoencoder(FlatPrior(2)),
        _flat,
        lambda model: Contractive(point(model), 0.1),
        lambda model, n: (torch.randn(n, 5),),
    ),
    "sparse autoencoder": Member(lambda: _autoencoder(LaplacePrior(2, 0.7)), _sparse, point),
}
