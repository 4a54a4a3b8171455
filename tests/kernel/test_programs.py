"""Programs in styles other than jensen's, against single runs.

Every program is measured with many particles, and run alone equally often: both averages of log w must agree with each
other, and with log p(x) if it is known. The way of running particles is also tested.
"""

import functools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn

from jensen.inference import evaluate
from jensen.kernel.lifts import LOOP, PLATE, VMAP

N = 6
PROGRAMS = {}


def program(way, *, joint=False, exact=None):
    """Register a function that makes (model, guide, data)."""

    def register(make):
        PROGRAMS[make.__name__.replace("_", " ")] = make, way, joint, exact
        return make

    return register


def gauss_guide(x, width=2, plate="data"):
    """A guide for one vector per data point."""
    with pyro.plate(plate, len(x)):
        pyro.sample("z", dist.Normal(0.3 * x[:, :1].expand(-1, width), 0.7).to_event(1))


def latent(x, width=2):
    return pyro.sample("z", dist.Normal(torch.zeros(len(x), width), 1.0).to_event(1))


def decoded(decode, width=2, features=3, guide=gauss_guide):
    """A model with a given decoder, and its guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(decode(latent(x, width)), 0.8).to_event(1), obs=x)

    return model, functools.partial(guide, width=width), (torch.randn(N, features),)


# ------------------------------------------------------------------ dimensions that are counted from the left


@program(VMAP)
def softmax_over_dim_one():
    w = torch.randn(2, 3)
    return decoded(lambda z: torch.softmax(z @ w, dim=1))


@program(PLATE)
def traced_by_torchscript():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        return decoded(torch.jit.trace(network, torch.randn(N, 2).double()))


@program(VMAP)
def first_column():
    return decoded(lambda z: z[:, 0].unsqueeze(-1) * torch.tensor([1.0, 2.0, 3.0]))


@program(VMAP)
def columns_by_index():
    return decoded(lambda z: torch.stack([z[:, 0], z[:, 1], z[:, 0] * z[:, 1]], 1))


@program(VMAP)
def default_dim_of_normalize():
    w = torch.randn(2, 3)
    return decoded(lambda z: nn.functional.normalize(z @ w))


@program(VMAP)
def reshaped_to_rows():
    w = torch.randn(2, 3)
    return decoded(lambda z: (z @ w).view(-1, 3))


@program(VMAP)
def flattened_from_dim_one():
    w = torch.randn(2, 3)
    return decoded(lambda z: (z.unsqueeze(2) * w.unsqueeze(0)).sum(1).flatten(1))


@program(VMAP)
def centred_over_the_batch():
    w = torch.randn(2, 3)
    return decoded(lambda z: (z - z.mean(0)) @ w)


@program(VMAP)
def cumulated_along_dim_one():
    return decoded(lambda z: z.cumsum(1), width=3)


@program(VMAP)
def transposed():
    w = torch.randn(3, 2)
    return decoded(lambda z: (w @ z.t()).t())


@program(VMAP)
def concatenated_with_a_covariate():
    decoder = nn.Linear(2 + 4, 3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(decoder(torch.cat((latent(x), y), 1)), 1.0).to_event(1), obs=x)

    return model, lambda x, y: gauss_guide(x), (torch.randn(N, 3), torch.eye(4)[torch.randint(4, (N,))])


@program(VMAP)
def squeezed():
    w = torch.randn(2, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((latent(x) @ w).squeeze(1), 1.0), obs=x[:, 0])

    return model, gauss_guide, (torch.randn(N, 1),)


@program(VMAP)
def quadratic_form_by_bmm():
    a = torch.randn(2, 2)

    def decode(z):
        form = torch.bmm(z.unsqueeze(1), (z @ a).unsqueeze(2)).squeeze(2)  # [N, 1]
        return torch.cat([form, z], 1)

    return decoded(decode)


@program(VMAP)
def letters_for_the_data():
    w = torch.randn(2, 3)
    return decoded(lambda z: torch.einsum("nd,df->nf", z, w))


# ------------------------------------------------------------------ networks


@program(VMAP)
def transposed_convolution():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2, stride=2))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=decoder(latent(x))).to_event(3), obs=x)

    def guide(x):
        gauss_guide(x.flatten(1))

    return model, guide, (torch.rand(N, 1, 4, 4).round(),)


@program(PLATE)
def a_network_of_linear_layers():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    return decoded(decoder)


@program(VMAP)
def batch_norm_of_latents():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    decoder(torch.randn(50, 2))  # moves its running means
    decoder.eval()
    return decoded(decoder)


@program(VMAP)
def recurrent_cell():
    cell, out = nn.GRUCell(2, 4), nn.Linear(4, 3)

    def decode(z):
        h = torch.zeros(len(z), 4)
        for _ in range(3):
            h = cell(z, h)
        return out(h)

    return decoded(decode)


@program(VMAP)
def recurrent_network_over_latents():
    network, out = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)
    return decoded(lambda z: out(network(z.unsqueeze(-1))[0][:, -1]))


@program(VMAP)
def self_attention_over_latents():
    attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def decode(z):
        z = torch.stack([z, 2 * z, z.square()], 1)  # [N, 3, 2]
        return attention(z, z, z, need_weights=False)[0].mean(2)

    return decoded(decode)


@program(PLATE)
def embedded_classes():
    table = torch.randn(4, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal(nn.functional.embedding(c, table), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=x @ table.T))

    return model, guide, (torch.randn(N, 3),)


# ------------------------------------------------------------------ what no dimension can be added to


@program(LOOP)
def a_number_read_off():
    return decoded(lambda z: z + z[0, 0].item(), width=3)


@program(LOOP)
def a_branch_on_a_value():
    return decoded(lambda z: z if z.sum() > 0 else 2 * z, width=3)


@program(LOOP)
def a_choice_of_entries():
    return decoded(lambda z: z + z[z > 0].sum() / z.numel(), width=3)


@program(VMAP)
def a_tensor_that_is_filled():
    def decode(z):
        out = torch.zeros(len(z), 3)
        for i in range(3):
            out[:, i] = z[:, 0] * i
        return out

    return decoded(decode)


@program(VMAP)
def a_latent_angle():
    def model(x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", dist.VonMises(torch.zeros(len(x)), 2.0))
            pyro.sample("x", dist.Normal(torch.stack([angle.cos(), angle.sin()], 1), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.VonMises(torch.atan2(x[:, 1], x[:, 0]), 3.0))

    return model, guide, (nn.functional.normalize(torch.randn(N, 2)),)


# ------------------------------------------------------------------ regressions, groups, indices


X = torch.linspace(-1.0, 1.0, 3 * N).reshape(N, 3)
Y = X[:, 0] - X[:, 1] + torch.tensor([0.1, -0.3, 0.2, 0.5, -0.1, 0.0])


def _evidence_of_regression(x, y):
    return dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x)) + x @ x.T).log_prob(y)


@program(VMAP, joint=True, exact=_evidence_of_regression)
def a_regression():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    return model, AutoMultivariateNormal(model, init_scale=0.5), (X, Y)


@program(VMAP, joint=True)
def a_regression_with_a_plate_of_features():
    def model(x, y):
        with pyro.plate("features", 3):
            w = pyro.sample("w", dist.Laplace(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x.mv(w), sigma), obs=y)

    return model, AutoNormal(model, init_scale=0.1), (X, Y)


@program(VMAP, joint=True)
def a_linear_layer_with_random_weights():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 5.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.1, 5.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    model = Regression()
    return model, AutoDiagonalNormal(model, init_scale=0.1), (X, Y)


@program(VMAP, joint=True)
def a_bayesian_network():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.first = PyroModule[nn.Linear](3, 4)
            self.second = PyroModule[nn.Linear](4, 1)
            for layer in (self.first, self.second):
                for name, value in list(layer.named_parameters()):
                    prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                    setattr(layer, name, PyroSample(prior))

        def forward(self, x, y=None):
            mean = self.second(self.first(x).tanh()).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    model = Network()
    return model, AutoLowRankMultivariateNormal(model, rank=2, init_scale=0.1), (X, Y)


GROUP = torch.tensor([0, 0, 1, 2, 2, 1])


@program(VMAP, joint=True)
def effects_of_groups():
    def model(group, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 3):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[group], 0.5), obs=y)

    return model, AutoNormal(model, init_scale=0.1), (GROUP, Y)


@program(VMAP, joint=True)
def slopes_of_groups_in_a_logistic_regression():
    def model(x, group, y):
        with pyro.plate("groups", 3):
            b = pyro.sample("b", dist.Normal(torch.zeros(3, 3), 1.0).to_event(1))  # [groups, features]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(b[group] * x).sum(1)), obs=y)

    return model, AutoNormal(model, init_scale=0.1), (X, GROUP, (Y > 0).float().to(torch.get_default_dtype()))


@program(VMAP, joint=True)
def abilities_and_difficulties():
    person, item = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1])

    def model(y):
        with pyro.plate("people", 3):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 2):
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=ability[person] - difficulty[item]), obs=y)

    return model, AutoNormal(model, init_scale=0.3), ((Y > 0).to(torch.get_default_dtype()),)


@program(VMAP, joint=True)
def a_factorized_matrix():
    def model(y):
        u = pyro.sample("u", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(u @ v.t(), 0.5).to_event(2), obs=y)

    return model, AutoNormal(model, init_scale=0.2), (torch.randn(3, 4),)


@program(VMAP, joint=True)
def a_mixture_by_index():
    def model(x):
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    centres = torch.tensor([-4.0, 0.0, 4.0])

    def guide(x):
        with pyro.plate("components", 3):
            pyro.sample("locs", dist.Normal(centres, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=-0.5 * (x.unsqueeze(-1) - centres) ** 2))

    return model, guide, (torch.tensor([-4.2, -3.8, 0.1, -0.2, 3.9, 4.3]),)


@program(VMAP, joint=True)
def sticks_that_are_broken():
    def model(x):
        with pyro.plate("sticks", 3):
            beta = pyro.sample("beta", dist.Beta(1.0, 2.0))
        with pyro.plate("components", 4):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        rest = (1 - beta).cumprod(0)
        weights = torch.cat([beta, torch.ones(1)]) * torch.cat([torch.ones(1), rest])
        with pyro.plate("data", len(x)):
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))
            pyro.sample("x", mixture, obs=x)

    return model, AutoNormal(model, init_scale=0.1), (torch.tensor([-4.2, -3.8, 0.1, -0.2, 3.9, 4.3]),)


# ------------------------------------------------------------------ other distributions, series, matrices


@program(VMAP)
def a_topic_model():
    topics = torch.randn(3, 5)

    def model(docs):
        with pyro.plate("documents", len(docs)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((len(docs), 3), 0.7)))
            words = torch.softmax(theta @ topics, dim=1)
            pyro.sample("words", dist.Multinomial(12, words), obs=docs)

    def guide(docs):
        with pyro.plate("documents", len(docs)):
            pyro.sample("theta", dist.Dirichlet(1 + docs[:, :3] / 4))

    return model, guide, (dist.Multinomial(12, torch.ones(5)).sample((N,)),)


@program(VMAP)
def a_topic_model_of_logits():
    topics = nn.Linear(3, 5, bias=False)

    def model(docs):
        with pyro.plate("documents", docs.shape[0]):
            theta = nn.functional.softmax(latent(docs, 3), -1)
            words = nn.functional.softmax(topics(theta), dim=1)
            pyro.sample("words", dist.Multinomial(12, words), obs=docs)

    return (
        model,
        functools.partial(gauss_guide, width=3, plate="documents"),
        (dist.Multinomial(12, torch.ones(5)).sample((N,)),),
    )


@program(PLATE, joint=True)
def batting_averages():
    at_bats, hits = torch.full((N,), 45.0), torch.tensor([18.0, 17.0, 16.0, 15.0, 14.0, 10.0])

    def model(at_bats, hits):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(hits)):
            p = pyro.sample("p", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, p), obs=hits)

    return model, AutoNormal(model, init_scale=0.1), (at_bats.double(), hits.double())


@program(PLATE, joint=True)
def eight_schools():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model, AutoNormal(model, init_scale=0.3), (sigma.double(), y.double())


@program(VMAP, joint=True)
def correlations():
    def model(x):
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag(scales) @ root), obs=x)

    return model, AutoMultivariateNormal(model, init_scale=0.1), (torch.randn(N, 3),)


@program(PLATE)
def counts_with_gamma_rates():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 1.4))

    return model, guide, (torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 2.0]).double(),)


@program(VMAP)
def relaxed_classes():
    table = torch.randn(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.RelaxedOneHotCategorical(torch.tensor(0.9), logits=torch.zeros(len(x), 3)))
            pyro.sample("x", dist.Normal(torch.mm(c, table), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.RelaxedOneHotCategorical(torch.tensor(0.9), logits=x @ table.T))

    return model, guide, (torch.randn(N, 2),)


@program(PLATE, joint=True)
def a_random_walk_site_by_site():
    def model(y):
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        z = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Normal(z, drift))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[t])

    return model, AutoNormal(model, init_scale=0.1), (Y,)


@program(VMAP, joint=True)
def a_random_walk_by_differences():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 2.0).to_event(1))
        pyro.sample("steps", dist.Normal(torch.zeros(len(y) - 1), scale).to_event(1), obs=z[1:] - z[:-1])
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    return model, AutoNormal(model, init_scale=0.1), (Y,)


@program(VMAP, joint=True)
def a_gaussian_process():
    def model(x, y):
        length = pyro.sample("length", dist.LogNormal(0.0, 0.3))
        f = pyro.sample("f", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        cov = torch.exp(-0.5 * ((x.unsqueeze(0) - x.unsqueeze(1)) / length).square()) + 1e-4 * torch.eye(len(x))
        pyro.sample("y", dist.Normal(torch.linalg.cholesky(cov) @ f, 0.3).to_event(1), obs=y)

    return model, AutoNormal(model, init_scale=0.1), (X[:, 0], Y)


@program(PLATE)
def lengths_of_sequences():
    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x[:, 0], 0.7))

    return model, guide, (torch.randn(N, 3), torch.tensor([1, 2, 3, 3, 1, 2]))


@program(VMAP)
def a_penalty_in_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.factor("penalty", -z[:, 0].square())
            pyro.sample("x", dist.Normal(z.sum(1, keepdim=True), 1.0).to_event(1), obs=x)

    return model, gauss_guide, (torch.randn(N, 1),)


@program(VMAP)
def pixels_in_a_plate_of_their_own():
    w = torch.randn(2, 4)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = latent(x)
            with pyro.plate("pixels", 4, dim=-2):
                pyro.sample("x", dist.Normal((z @ w).t(), 1.0), obs=x.t())

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x[:, :2], 0.7).to_event(1))

    return model, guide, (torch.randn(N, 4),)


# ------------------------------------------------------------------ guides


@program(VMAP, joint=True)
def a_list_of_guides():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["w"]), init_scale=0.2))
    guide.append(AutoNormal(poutine.block(model, expose=["sigma"]), init_scale=0.2))
    return model, guide, (X, Y)


@program(VMAP, joint=True)
def a_flow_for_a_guide():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    return model, AutoIAFNormal(model, hidden_dim=[8]), (X, Y)


@program(VMAP)
def an_encoder_that_chunks():
    encoder, w = nn.Linear(3, 4), torch.randn(2, 3)

    def guide(x):
        with pyro.plate("data", x.size(0)):
            loc, raw = torch.chunk(encoder(x), 2, 1)
            pyro.sample("z", dist.Normal(loc, torch.exp(0.3 * raw)).to_event(1))

    model, _, data = decoded(lambda z: torch.tanh(z @ w) * z[:, :1])
    return model, guide, data


@program(VMAP)
def a_second_site_given_the_first():
    w = torch.randn(1, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Normal(a.view(-1, 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b.mm(w), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x[:, 0], 0.8))
            pyro.sample("b", dist.Normal(a.view(-1, 1) + 0.1 * x[:, 1:2], 0.8).to_event(1))

    return model, guide, (torch.randn(N, 3),)


@program(VMAP, joint=True)
def as_many_particles_as_data():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def guide(x, y):
        pyro.sample("w", dist.Normal(torch.ones(1), 0.3).to_event(1))

    x = torch.randn(300, 1)
    return model, guide, (x, x[:, 0] + 0.3 * torch.randn(300))


@program(VMAP)
def one_datum_that_is_squeezed():
    w = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(((latent(x) @ w).squeeze() * 2).reshape(-1, 3), 1.0).to_event(1), obs=x)

    return model, gauss_guide, (torch.randn(1, 3),)


# ------------------------------------------------------------------ the tests


def single_runs(model, guide, data, runs, joint):
    """Log weights of runs one after the other: [runs, N], or [runs] where they are joint."""
    rows = []
    with torch.no_grad():
        for _ in range(runs):
            q = poutine.trace(guide).get_trace(*data)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*data)
            total = 0.0
            for trace, sign in ((p, 1), (q, -1)):
                trace.compute_log_prob()
                for site in trace.nodes.values():
                    if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                        log_prob = site["log_prob"]  # masked; nothing here is scaled
                        kept = log_prob.sum() if joint else log_prob.reshape(-1, log_prob.shape[-1]).sum(0)
                        total = total + sign * kept
            rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_measured_as_its_author_wrote_it(name, float64):
    make, way, joint, exact = PROGRAMS[name]
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide, data = make()
    data = tuple(x.double() if x.is_floating_point() else x for x in data)
    K = 300
    with pytest.warns(UserWarning, match="one particle after the other") if way == LOOP else nullcontext():
        evidence = evaluate(model, guide, data, K, seed=1, progress=False)
    assert evidence.route.startswith(way)
    assert evidence.joint is joint
    alone = single_runs(model, guide, data, K, joint)  # [K, N]
    expected, spread = alone.mean(0), alone.std(0) / math.sqrt(K)
    error = torch.hypot(evidence.elbo_error, spread)
    assert ((evidence.elbo - expected).abs() < 4.5 * error + 1e-9).all()
    if exact is not None:
        assert ((evidence.log_evidence - exact(*data)).abs() < 4 * evidence.standard_error).all()
