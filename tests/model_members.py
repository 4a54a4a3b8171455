"""The models of ``jensen.models`` for the contract tests: a new model needs one entry here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from jensen.families import (
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
    Laplace,
    MeanField,
    Mixture,
    NegativeBinomial,
    NeuralSpline,
    OneHotCategorical,
    Poisson,
    StudentT,
)
from jensen.guides import Amortized, BottomUp, Contractive, Ladder, amortize
from jensen.models import (
    PPCA,
    VAE,
    BinaryLatentVAE,
    ConditionalVAE,
    FactorAnalysis,
    FlatPrior,
    GaussianMixtureVAE,
    Hierarchical,
    LaplacePrior,
    LearnedPrior,
    LinearGaussian,
    LinearGaussianSSM,
    MixtureOfPPCA,
    VampPrior,
)
from jensen.networks import Conditioned, conv_decoder, conv_encoder, mlp, recurrent


@dataclass(frozen=True)
class Member:
    """A small model with its known properties.

    Attributes:
        make: a fresh model, small, in the default precision.
        by_hand: ``by_hand(model, z, *data)``: log p(x, z), [N], at one value per site and data point, in plain torch.
        guide: ``guide(model)``: a guide that fits its sites.
        data: ``data(model, n)``: n data points as a tuple of tensors; by default samples of the model.
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
    """The model with all parameters perturbed from their initial values."""
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


def observed_as(family, log_density):
    """A VAE with an observation family of five features, given the log-density of its parameters, by hand."""

    def by_hand(model, z, x):
        parameters = model.likelihood.affine(model.decoder(z["z"]))
        return normal(z["z"], 0.0, 1.0) + log_density(x, *parameters.split(5, -1), model.likelihood).sum(-1)

    return Member(lambda: VAE(mlp(2, [16]), family(5, 16), 2), by_hand, full(5))


def plus(raw):
    """A family's map from a parameter to a positive number."""
    return torch.log1p(torch.exp(raw + math.log(math.e - 1))) + 1e-6


def _diagonal(x, loc, f):
    scale = plus(f.raw_scale)
    return -(((x - loc) / scale) ** 2) / 2 - torch.log(scale * math.sqrt(2 * math.pi))


def _student(x, loc, raw, raw_df, _):
    df, y = 1 + plus(raw_df) ** 2, (x - loc) / plus(raw)
    gammas = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2)
    return gammas - torch.log(math.pi * df) / 2 - torch.log(plus(raw)) - (df + 1) / 2 * torch.log(1 + y**2 / df)


def _poisson(x, raw, _):
    return x * plus(raw).log() - plus(raw) - torch.lgamma(x + 1)


def _negative_binomial(x, raw, f):
    mean, r = plus(raw), plus(f.raw_scale)
    gammas = torch.lgamma(x + r) - torch.lgamma(x + 1) - torch.lgamma(r)
    return gammas + r * torch.log(r / (r + mean)) + x * torch.log(mean / (r + mean))


def _binomial(x, logits, _):
    ways = math.lgamma(8) - torch.lgamma(x + 1) - torch.lgamma(8 - x)
    return ways + x * torch.log(torch.sigmoid(logits)) + (7 - x) * torch.log(torch.sigmoid(-logits))


def _categorical(x, one, two, three, _):
    logits = torch.stack([one, two, three])
    return logits.gather(0, x.long().unsqueeze(0)).squeeze(0) - logits.exp().sum(0).log()


def _logistic(x, one, two, loc_one, loc_two, raw_one, raw_two, _):
    weights = torch.stack([one, two]).softmax(0)
    total = 0.0
    for weight, loc, raw in ((weights[0], loc_one, raw_one), (weights[1], loc_two, raw_two)):
        mean, scale = 3.5 * (1 + loc), 3.5 * plus(raw) / 4
        above = torch.where(x == 7, 1.0, torch.sigmoid((x + 0.5 - mean) / scale))
        below = torch.where(x == 0, 0.0, torch.sigmoid((x - 0.5 - mean) / scale))
        total = total + weight * (above - below)
    return total.log()


OBSERVED = {
    "DiscretizedLogistic": (lambda f, c: DiscretizedLogistic(f, c, levels=8, components=2), _logistic),
    "diagonal Gaussian": (lambda f, c: Gaussian(f, c, scale="diagonal"), _diagonal),
    "Laplace": (
        lambda f, c: Laplace(f, c, scale="context"),
        lambda x, loc, raw, _: -(x - loc).abs() / plus(raw) - torch.log(2 * plus(raw)),
    ),
    "StudentT": (StudentT, _student),
    "ContinuousBernoulli": (ContinuousBernoulli, lambda x, a, _: a * x + torch.log(a / (torch.exp(a) - 1))),
    "Poisson": (Poisson, _poisson),
    "NegativeBinomial": (NegativeBinomial, _negative_binomial),
    "Binomial": (lambda f, c: Binomial(f, c, trials=7), _binomial),
    "Categorical": (lambda f, c: Categorical(f, c, levels=3), _categorical),
}


def _vae_full(model, z, x):
    loc, raw, below = model.likelihood.affine(model.decoder(z["z"])).split([5, 5, 10], -1)
    factor = torch.zeros(len(x), 5, 5, dtype=x.dtype)
    rows, columns = torch.tril_indices(5, 5, -1)
    factor[:, rows, columns] = below * plus(raw)[:, rows]
    factor += torch.diag_embed(plus(raw))
    covariance = factor @ factor.mT
    r = (x - loc).unsqueeze(-1)
    distance = (r.mT @ torch.linalg.inv(covariance) @ r).flatten()
    log_density = -(distance + torch.logdet(covariance) + 5 * math.log(2 * math.pi)) / 2
    return normal(z["z"], 0.0, 1.0) + log_density


def with_prior(make, log_prior, guide=None):
    """A VAE with another prior than the standard normal, whose log-density is given by hand."""

    def by_hand(model, z, x):
        return log_prior(model.prior, z["z"]) + normal(x, model.likelihood.affine(model.decoder(z["z"])), 0.5)

    likelihood = lambda: Gaussian(5, 16, scale=0.5)
    return Member(lambda: VAE(mlp(2, [16]), likelihood(), 2, prior=make()), by_hand, guide or full(5))


def _mixture_prior(prior, z):
    logits, loc, raw = prior.value.split([3, 6, 6])
    densities = [normal(z, loc.view(3, 2)[c], plus(raw).view(3, 2)[c]) for c in range(3)]
    return (torch.stack(densities, -1) + logits.log_softmax(-1)).exp().sum(-1).log()


def _flow_prior(prior, z):
    """By autograd's Jacobian of the map from noise to z."""
    q = prior()
    rows = []
    for value in z:
        y = (value - q.loc) / q.scale
        if q.below is not None:
            y = torch.linalg.solve(torch.eye(2) + q.below, y)
        noise, _ = prior.family.straighten(y, q.g)
        jacobian = torch.autograd.functional.jacobian(lambda e: q.push(e)[0], noise.detach())
        rows.append(normal(noise, 0.0, 1.0) - jacobian.det().abs().log())
    return torch.stack(rows)


def _vamp_prior(prior, z):
    loc, raw = prior.posterior[1].affine(prior.posterior[0](prior.pseudo_inputs)).split(2, -1)
    densities = [normal(z, loc[c], plus(raw)[c]) for c in range(len(loc))]
    return (torch.stack(densities, -1).exp().mean(-1)).log()


def vamp():
    """A VampPrior of four pseudo-inputs, five features, two latent features."""
    return VampPrior(nn.Sequential(encoder(5), MeanField(2, context=16)), torch.randn(4, 5))


def same_posterior(model):
    """The guide that a VampPrior averages: it holds the same modules."""
    network, family = model.prior.posterior
    return Amortized(network, {"z": family})


def _vae_images(model, z, x):
    return normal(z["z"], 0.0, 1.0) + bernoulli(x.flatten(1), model.decoder(z["z"]))


IMAGE = (2, 4, 4)


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
    "FactorAnalysis": Member(lambda: FactorAnalysis(5, 2), _factor_analysis, full(5)),
    "LinearGaussian": Member(lambda: LinearGaussian(5, 2), _linear_gaussian, full(5)),
    "MixtureOfPPCA": Member(lambda: MixtureOfPPCA(5, 2, 3), _mixture_of_ppca, _component_then_plane),
    "LinearGaussianSSM": Member(lambda: LinearGaussianSSM(2, 2, 2), _state_space, _markov, _sequences),
    "VAE, Gaussian": Member(lambda: VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), 2), _vae_gaussian, full(5)),
    "VAE, Bernoulli": Member(lambda: VAE(mlp(2, [16]), Bernoulli(5, 16), 2), _vae_bernoulli, full(5)),
    "VAE, full covariance": Member(lambda: VAE(mlp(2, [16]), FullCovariance(5, 16), 2), _vae_full, full(5)),
    "VAE, images": Member(
        lambda: VAE(conv_decoder(2, IMAGE, [4, 3], parameters=1), Bernoulli(IMAGE, None), 2),
        _vae_images,
        lambda model: amortize(model, conv_encoder(IMAGE, [3], 16), MeanField, context=16),
    ),
    **{f"VAE, {name}": observed_as(*of) for name, of in OBSERVED.items()},
    "VAE, learned Gaussian prior": with_prior(
        lambda: LearnedPrior(MeanField(2, None)), lambda prior, z: normal(z, prior.value[:2], plus(prior.value[2:]))
    ),
    "VAE, mixture prior": with_prior(lambda: LearnedPrior(Mixture(2, None, components=3)), _mixture_prior),
    "VAE, MAF prior": with_prior(lambda: LearnedPrior(MAF(2, None, hidden=[16])), _flow_prior),
    "VAE, spline prior": with_prior(
        lambda: LearnedPrior(NeuralSpline(2, None, coupling=True, hidden=[16])), _flow_prior
    ),
    "VAE, VampPrior": with_prior(vamp, _vamp_prior, same_posterior),
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
