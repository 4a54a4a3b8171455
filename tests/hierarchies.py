"""Hand-written models with known answers: two Gaussian levels, counts, coins and discrete states."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Size, nn
from torch.distributions import constraints

from jensen.families import BinaryVector, OneHotCategorical
from jensen.module import UniqueModule


class TwoLevels(UniqueModule):
    """top ~ N(0, I), low ~ N(A top + a, 0.6^2 I), x ~ N(B low + b, 0.5^2 I): everything is Gaussian and known."""

    def __init__(self, features=4, low=3, top=2):
        super().__init__()
        self.A, self.a = nn.Parameter(torch.randn(low, top)), nn.Parameter(torch.randn(low))
        self.B, self.b = nn.Parameter(torch.randn(features, low)), nn.Parameter(torch.randn(features))
        self.latents = {"top": Size((top,)), "low": Size((low,))}
        self.event_shape = Size((features,))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(self.a.new_zeros(self.A.shape[1]), 1.0).to_event(1))
            low = pyro.sample("low", dist.Normal(top @ self.A.T + self.a, 0.6).to_event(1))
            return pyro.sample("x", dist.Normal(low @ self.B.T + self.b, 0.5).to_event(1), obs=x)

    def prior(self):
        """Mean and covariance of (top, low)."""
        low, top = self.A.shape
        mean = torch.cat([self.a.new_zeros(top), self.a])
        root = torch.cat([torch.eye(top).to(self.A), self.A])  # (top, low) = mean + root eps + 0.6 noise of low
        noise = torch.cat([self.a.new_zeros(top), self.a.new_full((low,), 0.36)])
        return mean, root @ root.T + noise.diag()

    def log_evidence(self, x):
        mean, cov = self.prior()
        C = self.seen()
        marginal = C @ cov @ C.T + 0.25 * torch.eye(len(C)).to(C)
        return dist.MultivariateNormal(C @ mean + self.b, marginal).log_prob(x)

    def seen(self):
        """The C of x = C (top, low) + b + noise."""
        return torch.cat([self.B.new_zeros(len(self.B), self.A.shape[1]), self.B], -1)

    def posterior(self, x):
        """Mean [N, D] and precision [D, D] of (top, low) given x."""
        mean, cov = self.prior()
        C, precision = self.seen(), cov.inverse()
        posterior = precision + C.T @ C / 0.25
        return torch.linalg.solve(
            posterior, (precision @ mean).unsqueeze(-1) + C.T @ (x - self.b).T / 0.25
        ).T, posterior


class Levels(UniqueModule):
    """Three sites of different shapes: a scalar, a matrix, a vector."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.latents = {"s": Size(()), "m": Size((2, 3)), "v": Size((4,))}
        self.event_shape = Size((4,))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            s = pyro.sample("s", dist.Normal(self.weight.new_zeros(()), 1.0))
            m = pyro.sample("m", dist.Normal(s[..., None, None] * self.weight.new_ones(2, 3), 1.0).to_event(2))
            v = pyro.sample("v", dist.Normal(torch.tanh(m.flatten(-2)) @ self.weight, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(v * s.unsqueeze(-1), 0.5).to_event(1), obs=x)


class Conjugate(UniqueModule):
    """One site with constrained support, and the evidence in closed form."""

    def __init__(self, shape, support, features):
        super().__init__()
        self.latents, self.constraints = {"z": Size(shape)}, {"z": support}
        self.event_shape = Size((features,))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            return pyro.sample("x", self.likelihood(pyro.sample("z", self.prior())), obs=x)


class GammaPoisson(Conjugate):
    """z ~ Gamma(3, 1.5), x_d ~ Poisson(z), d = 1, 2."""

    def __init__(self):
        super().__init__((), constraints.positive, 2)

    def prior(self):
        return dist.Gamma(3.0, 1.5)

    def likelihood(self, z):
        return dist.Poisson(z.unsqueeze(-1).expand(*z.shape, 2)).to_event(1)

    def log_evidence(self, x):
        total = x.sum(-1)
        known = 3 * math.log(1.5) - math.lgamma(3.0) - torch.lgamma(x + 1).sum(-1)
        return known + torch.lgamma(3 + total) - (3 + total) * math.log(3.5)


class BetaBernoulli(Conjugate):
    """z_d ~ Beta(2, 3) for two coins, each thrown four times."""

    def __init__(self):
        super().__init__((2,), constraints.unit_interval, 8)

    def prior(self):
        return dist.Beta(torch.tensor([2.0, 2.0]), 3.0).to_event(1)

    def likelihood(self, z):
        return dist.Bernoulli(z.repeat_interleave(4, -1)).to_event(1)

    def log_evidence(self, x):
        heads = x.unflatten(-1, (2, 4)).sum(-1)

        def log_beta(a, b):
            return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

        two, three = torch.tensor(2.0), torch.tensor(3.0)
        return (log_beta(2 + heads, 3 + 4 - heads) - log_beta(two, three)).sum(-1)


class DirichletCounts(Conjugate):
    """z ~ Dirichlet(2, 3, 4), x ~ Multinomial(5, z)."""

    def __init__(self):
        super().__init__((3,), constraints.simplex, 3)

    def prior(self):
        return dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))

    def likelihood(self, z):
        return dist.Multinomial(5, probs=z)

    def log_evidence(self, x):
        alpha = torch.tensor([2.0, 3.0, 4.0])
        ways = math.lgamma(6.0) - torch.lgamma(x + 1).sum(-1)
        return ways + math.lgamma(9.0) - math.lgamma(14.0) + (torch.lgamma(alpha + x) - torch.lgamma(alpha)).sum(-1)


class Discrete(UniqueModule):
    """z ~ a discrete vector of three features, x ~ N(W z, 1)."""

    def __init__(self, family):
        super().__init__()
        self.latents, self.event_shape = {"z": Size((3,))}, Size((4,))
        self.family, self.logits = family(3, None), nn.Parameter(torch.randn(3))
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.family(self.logits))
            return pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)


class DiscreteThenNormal(UniqueModule):
    """c ~ one of three, z ~ N(mu_c, I), x ~ N(z, 0.5^2 I)."""

    def __init__(self):
        super().__init__()
        self.latents, self.event_shape = {"c": Size((3,)), "z": Size((2,))}, Size((2,))
        self.family, self.logits = OneHotCategorical(3, None), nn.Parameter(torch.randn(3))
        self.mu = nn.Parameter(3 * torch.randn(3, 2))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            c = pyro.sample("c", self.family(self.logits))
            z = pyro.sample("z", dist.Normal(c @ self.mu, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


CONJUGATE = {"Gamma-Poisson": GammaPoisson, "Beta-Bernoulli": BetaBernoulli, "Dirichlet-counts": DirichletCounts}
DISCRETE_LATENTS = {"BinaryVector": BinaryVector, "OneHotCategorical": OneHotCategorical}


def best_mean_field_gap(precision):
    """Log p(x) minus the ELBO of the best diagonal Gaussian for a Gaussian posterior of this precision."""
    return (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision)) / 2
