"""The lists of models and guides of the contract tests: a new member needs one entry here."""

import os
from functools import partial

import torch
import zuko
from torch.distributions import Distribution

from jensen import families
from jensen.families import (
    IAF,
    MAF,
    Bernoulli,
    BinaryVector,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Delta,
    DiscretizedLogistic,
    FullCovariance,
    Gaussian,
    GaussMarkov,
    LowRank,
    MeanField,
    Mixture,
    NegativeBinomial,
    NeuralSpline,
    OneHotCategorical,
    Poisson,
    StudentT,
    Sylvester,
    Zuko,
)
from jensen.guides import ExactPosterior, Laplace, PriorGuide, SemiAmortized, amortize
from jensen.inference import ELBO, IWAE, CyclicalAnnealing, Renyi
from jensen.models import PPCA, VAE, Banana, Ring
from jensen.networks import mlp

Distribution._validate_args = True  # importing zuko turned it off

DEVICE = torch.device(os.environ.get("JENSEN_TEST_DEVICE", "cpu"))  # the option --device of the suite

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
    "Banana": Banana,
    "Ring": Ring,
}

FLOWS = {
    "IAF": partial(IAF, hidden=[16]),
    "MAF": partial(MAF, hidden=[16]),
    "spline, autoregressive": partial(NeuralSpline, hidden=[16]),
    "spline, coupling": partial(NeuralSpline, hidden=[16], coupling=True),
    "Sylvester, orthogonal": partial(Sylvester, kind="orthogonal"),
    "Sylvester, Householder": partial(Sylvester, kind="householder"),
    "Sylvester, triangular": partial(Sylvester, kind="triangular"),
}

NO_INVERSE = {name: family for name, family in FLOWS.items() if name.startswith("Sylvester")}

POSTERIORS = {
    "MeanField": MeanField,
    "LowRank": partial(LowRank, rank=2),
    "FullCovariance": FullCovariance,
    "GaussMarkov": lambda features, context: GaussMarkov(features, context, steps=features),
    "StudentT": StudentT,
    "StudentT, fixed": partial(StudentT, df=5.0),
    "Mixture": partial(Mixture, components=3),
    **FLOWS,
    "zuko": partial(Zuko, flow=partial(zuko.flows.NSF, transforms=1, hidden_features=(16,), passes=2)),
}


def amortized(model, family, **options):
    """The guide of every member: a small encoder, one family."""
    return amortize(model, mlp(model.event_shape.numel(), [H]), family, context=H, **options)


GUIDES = {
    **{name: partial(amortized, family=family) for name, family in POSTERIORS.items()},
    "Joint": partial(amortized, family=FullCovariance, joint=True),
    "SemiAmortized": lambda model: SemiAmortized(amortized(model, FullCovariance), model, steps=2),
    "Laplace": Laplace,
    "PriorGuide": PriorGuide,
    "ExactPosterior": ExactPosterior,
}

EXCLUSIONS = {
    (name, "ExactPosterior"): "the model's posterior has no closed form"
    for name in MODELS
    if not name.startswith("PPCA")
}

NO_PARAMETERS = [(m, g) for m in ("Banana", "Ring") for g in ("PriorGuide", "Laplace")]

CASES = [(m, g) for m in MODELS for g in GUIDES if (m, g) not in EXCLUSIONS]

TRAINED_CASES = [case for case in CASES if case not in NO_PARAMETERS]

OBSERVATIONS = {
    "Gaussian, fixed": partial(Gaussian, scale=0.5),
    "Gaussian, shared": partial(Gaussian, scale="shared"),
    "Gaussian, diagonal": partial(Gaussian, scale="diagonal"),
    "Gaussian, context": partial(Gaussian, scale="context"),
    "Laplace, shared": partial(families.Laplace, scale="shared"),
    "Laplace, context": partial(families.Laplace, scale="context"),
    "StudentT, shared": partial(StudentT, df=3.0, scale="shared"),
}

COUNTS = {
    "Poisson": Poisson,
    "NegativeBinomial, fixed": partial(NegativeBinomial, total_count=2.5),
    "NegativeBinomial, shared": partial(NegativeBinomial, total_count="shared"),
    "NegativeBinomial, diagonal": partial(NegativeBinomial, total_count="diagonal"),
    "NegativeBinomial, context": partial(NegativeBinomial, total_count="context"),
    "Binomial": partial(Binomial, trials=7),
    "Binomial, 255 trials": partial(Binomial, trials=255),
    "DiscretizedLogistic": partial(DiscretizedLogistic, levels=5),
    "DiscretizedLogistic, mixture": partial(DiscretizedLogistic, levels=256, components=3),
    "Categorical": partial(Categorical, levels=3),
    "Categorical, 256 levels": partial(Categorical, levels=256),
}

DENSITIES = {**POSTERIORS, **OBSERVATIONS}

DISCRETE = {"Bernoulli": Bernoulli, "BinaryVector": BinaryVector, "OneHotCategorical": OneHotCategorical}

FAMILIES = {**DENSITIES, **DISCRETE, **COUNTS, "ContinuousBernoulli": ContinuousBernoulli, "Delta": Delta}

OBJECTIVES = {
    "ELBO": lambda: ELBO(2),
    "ELBO, analytic KL": lambda: ELBO(analytic_kl=True),
    "ELBO, beta": lambda: ELBO(2, beta=CyclicalAnnealing(10)),
    "ELBO, free bits": lambda: ELBO(2, free_bits=0.3),
    "ELBO, sticking the landing": lambda: ELBO(2, "stl"),
    "IWAE": lambda: IWAE(3),
    "IWAE, sticking the landing": lambda: IWAE(3, "stl"),
    "IWAE, doubly reparameterized": lambda: IWAE(3, "dreg"),
    "Renyi": lambda: Renyi(0.5, 3, "dreg"),
}


def pair(model_name, guide_name):
    """A new model and guide on the device of the suite, and seven data points sampled from the model."""
    model = MODELS[model_name]()
    guide = GUIDES[guide_name](model)
    model.to(DEVICE), guide.to(DEVICE)
    with torch.no_grad():
        x = model(n=7)
    return model, guide, x
