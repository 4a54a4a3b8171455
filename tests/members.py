"""The lists of the contract suite: a new member is one entry here."""

from functools import partial

import torch

from jensen.families import Bernoulli, FullCovariance, Gaussian, MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.models import PPCA, VAE
from jensen.networks import mlp

X, D, H = 5, 2, 16  # features, latents, context of every member below


def _vae(likelihood):
    return VAE(mlp(D, [H]), likelihood(X, H), D)


MODELS = {
    "PPCA": lambda: PPCA(X, D),
    "PPCA, wide prior": lambda: PPCA(X, D, prior_scale=2.5),
    "VAE, fixed scale": lambda: _vae(partial(Gaussian, scale=0.5)),
    "VAE, shared scale": lambda: _vae(partial(Gaussian, scale="shared")),
    "VAE, diagonal scale": lambda: _vae(partial(Gaussian, scale="diagonal")),
    "VAE, context scale": lambda: _vae(partial(Gaussian, scale="context")),
    "VAE, Bernoulli": lambda: _vae(Bernoulli),
}

POSTERIORS = {"MeanField": MeanField, "FullCovariance": FullCovariance}

GUIDES = {
    **{
        name: (lambda model, family=family: amortize(model, mlp(X, [H]), family, context=H))
        for name, family in POSTERIORS.items()
    },
    "PriorGuide": PriorGuide,
    "ExactPosterior": ExactPosterior,
}

EXCLUSIONS = {
    (name, "ExactPosterior"): "the posterior of a network's model has no closed form"
    for name in MODELS
    if name.startswith("VAE")
}

CASES = [(m, g) for m in MODELS for g in GUIDES if (m, g) not in EXCLUSIONS]

OBSERVATIONS = {
    "Gaussian, fixed": partial(Gaussian, scale=0.5),
    "Gaussian, shared": partial(Gaussian, scale="shared"),
    "Gaussian, diagonal": partial(Gaussian, scale="diagonal"),
    "Gaussian, context": partial(Gaussian, scale="context"),
}

DENSITIES = {**POSTERIORS, **OBSERVATIONS}

FAMILIES = {**DENSITIES, "Bernoulli": Bernoulli}


def pair(model_name, guide_name):
    """A fresh pair and seven data drawn from the model."""
    model = MODELS[model_name]()
    guide = GUIDES[guide_name](model)
    with torch.no_grad():
        x = model(n=7)
    return model, guide, x
