"""The kernel against Pyro where Pyro is correct, and against exact results where it is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import POSTERIORS, pair
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro_pairs import PyroVAE
from torch import nn

from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import evaluate, log_joint, log_weights, terms
from jensen.kernel.weights import Pair
from jensen.models import PPCA


def _log_mean_exp(log_w):
    return log_w.logsumexp(0) - math.log(len(log_w))


def test_logsumexp_is_pyros_renyi_bound_where_that_is_right(float64):
    model, guide, x = pair("VAE, shared scale", "FullCovariance")
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=20)
    torch.manual_seed(1)
    renyi = RenyiELBO(alpha=0, num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    assert _log_mean_exp(log_w).sum().item() == pytest.approx(-renyi.loss(model, guide, x), rel=1e-12)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_scale_of_the_users_own_changes_nothing_and_is_warned_about(scale, float64):
    model, guide, x = pair("PPCA", "MeanField")
    torch.manual_seed(1)
    plain = log_weights(model, guide, x, particles=5)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"under a poutine.scale: 'z' \("):
        scaled = log_weights(poutine.scale(model, scale), poutine.scale(guide, scale), x, particles=5)
    assert torch.equal(scaled, plain)


class Subsampled:
    """A linear model over 1000 data points, a few of them in each call: p(z) = N(0, 1), p(x | z) = N(z, 1)."""

    def __init__(self, x, size):
        self.x, self.size = x, size

    def model(self):
        with pyro.plate("data", len(self.x), subsample_size=self.size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[rows])
            self.rows = rows

    def guide(self):
        with pyro.plate("data", len(self.x), subsample_size=self.size) as rows:
            pyro.sample("z", dist.Normal(self.x[rows] / 2, math.sqrt(0.5)))  # the exact posterior

    def exact(self):
        return dist.Normal(0.0, math.sqrt(2.0)).log_prob(self.x)


def test_subsampling_leaves_the_weights_of_the_data_seen(float64):
    pair = Subsampled(torch.randn(1000), 20)
    log_w = log_weights(pair.model, pair.guide, particles=3)
    torch.testing.assert_close(log_w, pair.exact()[pair.rows].expand(3, 20))


def test_pyros_renyi_bound_is_above_log_p_under_subsampling_and_ours_is_not(float64):
    pair = Subsampled(torch.randn(1000), 20)
    broad = lambda: poutine.block(pair.model, hide=["x"])()  # the prior as guide: a considerable gap
    renyi = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    pyros = -renyi.loss(pair.model, broad)
    target = 50 * pair.exact()[pair.rows].sum().item()
    log_w = log_weights(pair.model, broad, particles=50)
    ours = 50 * _log_mean_exp(log_w).sum().item()
    now = 50 * pair.exact()[pair.rows].sum().item()
    error = 50 * (log_w.exp().var(0) / 50 / log_w.exp().mean(0) ** 2).sum().sqrt().item()
    assert abs(ours - now) < 4 * error
    assert pyros - target > 10 * error  # a lower bound on log p(x) that lies far above it


def test_a_mask_is_kept(float64):
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    seen = torch.tensor([True, True, False, True, False, True, True])
    torch.manual_seed(1)
    plain = log_weights(model, guide, x, particles=5)
    torch.manual_seed(1)
    masked = log_weights(poutine.mask(model, mask=seen), poutine.mask(guide, mask=seen), x, particles=5)
    torch.testing.assert_close(masked, torch.where(seen, plain, torch.zeros(())))


def test_deterministic_sites_do_not_count_and_do_not_merge_the_data(float64):
    model, guide, x = pair("PPCA", "MeanField")

    def with_deterministic(x):
        pyro.deterministic("noise", model.noise)  # outside every plate
        return model(x)

    torch.manual_seed(1)
    plain = log_weights(model, guide, x, particles=5)
    torch.manual_seed(1)
    assert torch.equal(log_weights(with_deterministic, guide, x, particles=5), plain)


def test_auxiliary_factor_of_a_guide_counts(float64):
    model, _, x = pair("PPCA", "MeanField")

    def guide(x, factor=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            if factor is not None:
                pyro.factor("extra", torch.full((len(x),), factor), has_rsample=True)

    torch.manual_seed(1)
    plain = log_weights(model, guide, x, particles=5)
    torch.manual_seed(1)
    with_factor = log_weights(model, lambda x: guide(x, factor=0.5), x, particles=5)
    torch.testing.assert_close(with_factor, plain - 0.5)


def test_pyros_vae_example_written_as_bound_methods(float64):
    vae, x = PyroVAE(), torch.rand(9, 8).round()
    torch.manual_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, particles=11)
    torch.manual_seed(1)
    elbo = Trace_ELBO(num_particles=11, vectorize_particles=True, max_plate_nesting=1)
    assert log_w.shape == (11, 9)
    assert -log_w.mean(0).sum().item() == pytest.approx(elbo.loss(vae.model, vae.guide, x), rel=1e-12)


def test_auto_normal_keeps_the_data_apart(float64):
    model, _, x = pair("PPCA", "MeanField")
    guide = AutoNormal(model)
    log_w = log_weights(model, guide, x, particles=11)
    assert log_w.shape == (11, 7)
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=11)
    torch.manual_seed(1)
    elbo = Trace_ELBO(num_particles=11, vectorize_particles=True, max_plate_nesting=1)
    assert -log_w.mean(0).sum().item() == pytest.approx(elbo.loss(model, guide, x), rel=1e-12)


def test_auto_multivariate_normal_gives_joint_weights(float64):
    model, _, x = pair("PPCA", "MeanField")
    guide = AutoMultivariateNormal(model)
    log_weights(model, guide, x)  # makes its parameters
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=11)
    torch.manual_seed(1)
    elbo = Trace_ELBO(num_particles=11, vectorize_particles=True, max_plate_nesting=1)
    assert log_w.shape == (11,)
    assert -log_w.mean().item() == pytest.approx(elbo.loss(model, guide, x), rel=1e-12)


class GlobalMean:
    """mu ~ N(0, 1) outside the plate, x_n ~ N(mu, 1): log p(x) is that of a Gaussian with covariance I + 1."""

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))

    def exact(self, x):
        return dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x)) + 1.0).log_prob(x)


def test_a_global_latent_gives_joint_weights(float64):
    pair, x = GlobalMean(), torch.randn(6)
    log_w = log_weights(pair.model, pair.guide, x, particles=5)
    torch.testing.assert_close(log_w, pair.exact(x).expand(5))
    evidence = evaluate(pair.model, pair.guide, x, particles=50, chunk_size=16, progress=False)
    torch.testing.assert_close(evidence.log_evidence, pair.exact(x).unsqueeze(0))


def test_a_subsampled_plate_scales_its_own_sites_in_joint_weights(float64):
    x = torch.randn(6)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample=torch.tensor([0, 2])) as rows:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])

    def guide():
        pyro.sample("mu", dist.Normal(0.0, 2.0))

    t = terms(model, guide, particles=4)
    mu = t.values["mu"].flatten()
    by_hand = dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(x[[0, 2]]).sum(-1) * 3
    torch.testing.assert_close(t.log_p["x"], by_hand)
    assert t.log_weights.shape == (4,)


def test_log_joint_equals_the_density_written_by_hand(float64):
    model, _, x = pair("PPCA, wide prior", "MeanField")
    z = torch.randn(4, 7, 2)
    by_hand = dist.Normal(0.0, 2.5).log_prob(z).sum(-1)
    by_hand = by_hand + dist.Normal(model.mean + z @ model.weight.T, model.noise).log_prob(x).sum(-1)
    torch.testing.assert_close(log_joint(model, {"z": z}, x), by_hand)


def test_log_joint_of_a_global_latent(float64):
    pair, x = GlobalMean(), torch.randn(6)
    mu = torch.randn(4)
    by_hand = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(log_joint(pair.model, {"mu": mu.unsqueeze(-1)}, x), by_hand)


def test_sticking_the_landing_has_no_gradient_at_the_exact_posterior(float64):
    """Log p - log q with detached parameters of q is constant there: the gradient is zero for every sample."""
    model, _, x = pair("PPCA", "MeanField")
    posterior = ExactPosterior(model)
    loc = nn.Parameter(model.posterior(x).loc.detach())
    scale_tril = nn.Parameter(model.posterior(x).scale_tril.detach())

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    t = terms(model, guide, x, particles=5, stopped=True)
    torch.testing.assert_close(t.log_q_stopped["z"], t.log_q["z"])
    stopped = sum(t.log_p.values()) - t.log_q_stopped["z"]
    for p, grad in zip(
        (loc, scale_tril),
        torch.autograd.grad(stopped.sum(), (loc, scale_tril), retain_graph=True),
        strict=True,
    ):
        assert grad.abs().max() < 1e-10, p.shape
    plain = torch.autograd.grad(t.log_weights.sum(), (loc, scale_tril))
    assert min(grad.abs().max() for grad in plain) > 0.1
    torch.testing.assert_close(log_weights(model, posterior, x), model.log_evidence(x).unsqueeze(0))


def test_stopped_gradient_is_the_gradient_through_the_draws(float64):
    """Against autograd on the density written by hand with detached parameters, for a chain of two sites."""
    a, b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.7))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(a * x, (0.5 * a).exp()))
            pyro.sample("v", dist.Normal(b * u, 0.5))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(v, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    x = torch.randn(3)
    t = terms(model, guide, x, particles=4, stopped=True)
    u, v = t.values["u"], t.values["v"]
    by_hand = {
        "u": dist.Normal(a.detach() * x, (0.5 * a.detach()).exp()).log_prob(u),
        "v": dist.Normal(b.detach() * u, 0.5).log_prob(v),
    }
    for site, expected in by_hand.items():
        torch.testing.assert_close(t.log_q_stopped[site], expected)
        ours = torch.autograd.grad(t.log_q_stopped[site].sum(), (a, b), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected.sum(), (a, b), retain_graph=True, allow_unused=True)
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                one if one is not None else torch.zeros(()), two if two is not None else torch.zeros(())
            )


def test_nested_plates_are_summed_inside_the_data(float64):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 4, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    x = torch.randn(3, 4)
    log_w = log_weights(model, PriorGuide(model), x, particles=5)
    assert log_w.shape == (5, 3)
    t = terms(model, PriorGuide(model), x, particles=5)
    z = t.values["z"].squeeze(1)  # [K, 1, N] to [K, N]
    torch.testing.assert_close(t.log_p["x"], dist.Normal(z.unsqueeze(-1), 1.0).log_prob(x).sum(-1))


def test_a_site_to_enumerate_is_drawn_from_its_prior(float64):
    """p(x) = sum_c p(c) N(x; c, 1): estimated, because c is sampled from the prior."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(3)
    exact = (0.7 * dist.Normal(0.0, 2**0.5).log_prob(x).exp() + 0.3 * dist.Normal(1.0, 2**0.5).log_prob(x).exp()).log()
    evidence = evaluate(model, guide, x, particles=20_000, progress=False)
    assert ((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error).all()


@pytest.mark.parametrize("family", POSTERIORS.values(), ids=POSTERIORS.keys())
def test_the_encoder_runs_once_whatever_the_number_of_particles(family):
    model = PPCA(5, 2)
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.shape)
            return x

    guide = amortize(model, Spy(), family, context=5)
    proved, x = Pair(model, guide, 1), torch.randn(7, 5)
    proved.log_weights((x,), 100)
    seen.clear()
    proved.log_weights((x,), 100)
    assert seen == [(7, 5)]


def test_the_users_random_stream_is_drawn_from_once(float64):
    """The check of model and guide uses no random numbers: the same seed gives the same weights with and without it."""
    model, guide, x = pair("PPCA", "MeanField")
    torch.manual_seed(1)
    checked = log_weights(model, guide, x, particles=5)
    torch.manual_seed(1)
    assert torch.equal(log_weights(model, guide, x, particles=5, max_plate_nesting=1), checked)
