"""Subsampled plates with a global latent: all data are measured, or none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from jensen.inference import evaluate, fit
from jensen.kernel import check_pair
from jensen.kernel.measured import in_full

N, B = 30, 10


def _mean(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample_size=B) as rows:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])


def _by_subsample(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample_size=B):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=pyro.subsample(x, event_dim=0))


def _of_parameters(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample_size=B) as rows:
        shift = pyro.param("shift", torch.linspace(0.0, 1.0, N), event_dim=0)
        pyro.sample("x", dist.Normal(mu + shift, 1.0), obs=x[rows] + torch.linspace(0.0, 1.0, N)[rows])


def _one_by_one(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    for i in pyro.plate("data", N, subsample_size=B):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def _by_indices(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample=torch.randint(N, (B,))) as rows:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])


class _Held(PyroModule):
    """A model with events, covariates and a submodule."""

    def __init__(self):
        super().__init__()
        self.ones = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.ones.weight)

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
        with pyro.plate("data", N, subsample_size=B) as rows:
            loc = self.ones(mu.unsqueeze(-1).expand(*mu.shape, 1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[rows].unsqueeze(-1))


def _posterior(x):
    precision = N + 0.01
    pyro.sample("mu", dist.Normal(x.sum() / precision, torch.tensor(precision).to(x).rsqrt()))


def _exact(x):
    return dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + 100.0).log_prob(x).unsqueeze(0)


@pytest.mark.parametrize("model", [_mean, _by_subsample, _of_parameters, _one_by_one, _by_indices, _Held])
def test_a_subsampled_plate_under_a_global_latent_is_run_in_full(model, float64):
    x = torch.randn(N) + 1
    model = model() if isinstance(model, type) else model
    evidence = evaluate(model, _posterior, x, 20, progress=False)
    torch.testing.assert_close(evidence.log_evidence, _exact(x))
    torch.testing.assert_close(evidence.elbo, _exact(x))


def test_local_latents_are_run_in_full(float64):
    """z_n ~ N(mu, 1), x_n ~ N(z_n, 1), with a guide of z given mu that has a value for each data point."""
    x = torch.randn(N) + 1

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N, subsample_size=B) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        precision = N / 2 + 0.01
        mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
        half = pyro.param("half", x / 2)
        with pyro.plate("data", N, subsample_size=B) as rows:
            pyro.sample("z", dist.Normal(mu / 2 + half[rows], 0.5**0.5))

    evidence = evaluate(model, guide, x, 20, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(N), 2 * torch.eye(N) + 100.0).log_prob(x)
    torch.testing.assert_close(evidence.log_evidence, exact.unsqueeze(0))


def test_an_autoguide_is_run_in_full():
    x = torch.randn(N) + 1

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N, subsample_size=B) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoNormal(model, init_scale=0.5)
    fit(model, guide, x, epochs=2, lr=1e-6, compile=False, progress=False)
    locs, scales = guide.locs.z.detach(), guide.scales.z.detach()
    assert len(locs) == N
    evidence = evaluate(model, guide, x, 4000, seed=0, progress=False)
    mu, width = guide.locs.mu.detach(), guide.scales.mu.detach()
    squares = (
        (x - locs).square().sum() + N * scales[0] ** 2 + (locs - mu).square().sum() + N * (scales[0] ** 2 + width**2)
    )
    by_hand = -squares / 2 - 2 * N * torch.log(torch.tensor(2 * torch.pi)) / 2
    by_hand = by_hand + dist.Normal(0.0, 10.0).log_prob(mu) - width**2 / 200
    by_hand = by_hand + sum(dist.Normal(0.0, s).entropy() for s in [*scales, width])
    assert abs(evidence.elbo.item() - by_hand.item()) < 4 * evidence.elbo_error.item()


def test_nothing_is_left_of_it(float64):
    x = torch.randn(N)
    whole, guide = in_full(_mean, _posterior, x)
    assert check_pair(whole, guide, x).subsampled == ()
    assert check_pair(_mean, _posterior, x).subsampled == ("data",)


def _of_its_own(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample_size=B):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def _half_of_it(x):
    """The data are indexed, their covariate is not."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    slope = torch.linspace(0.0, 1.0, N, dtype=x.dtype)
    with pyro.plate("data", N, subsample_size=B) as rows:
        pyro.sample("x", dist.Normal(mu + slope[: len(rows)], 1.0), obs=x[rows])


def _of_ten(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", N, subsample_size=B) as rows:
        pyro.sample("x", dist.Normal(mu + torch.zeros(B), 1.0), obs=x[rows])


_PLATE = pyro.plate("data", N, subsample_size=B)


def _made_before(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with _PLATE as rows:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])


@pytest.mark.parametrize(
    ("model", "rows", "reason"),
    [
        (_of_its_own, B, "site 'x' does not follow its index"),
        (_of_its_own, 1, "site 'x' does not follow its index"),
        (_half_of_it, N, "site 'x' does not follow its index"),
        (_made_before, N, "site 'x' does not follow its index"),
        (_of_ten, N, "model and guide do not run on all of them"),
    ],
)
def test_what_does_not_follow_the_index_is_refused(model, rows, reason, float64):
    with pytest.raises(ValueError, match=rf"subsamples its plate 'data' \(10 of 30\) .*{reason}: .*obs=x\[rows\]"):
        evaluate(model, _posterior, torch.randn(N)[:rows], 20, progress=False)


def test_weights_per_datum_of_a_subsample_stay_as_they_are(float64):
    x = torch.randn(N)

    def model(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = evaluate(model, guide, x, 20, progress=False)
    torch.testing.assert_close(evidence.log_evidence, dist.Normal(0.0, 2**0.5).log_prob(x))


def test_a_subsampled_plate_inside_the_data_is_run_in_full(float64):
    """Three of six features of each data point at a time."""
    x = torch.randn(20, 6)

    def model(x):
        data = pyro.plate("data", len(x), dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with data, pyro.plate("features", 6, subsample_size=3, dim=-1) as some:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, some])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 7, 7**-0.5))

    evidence = evaluate(model, guide, x, 20, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1.0).log_prob(x)
    torch.testing.assert_close(evidence.log_evidence, exact)
