"""Supports that depend on a latent: zero density outside; for a fixed support, data outside are an error."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform

from jensen.inference import evaluate, exact_log_evidence, log_joint, log_weights
from jensen.kernel.supports import bounds_of, inside_of, log_density

X = torch.tensor([3.0, 5.0, 2.0, 7.0])


def _site(fn, value):
    return {"fn": fn, "value": value, "args": (), "kwargs": {}, "name": "x"}


@pytest.mark.parametrize(
    "fn",
    [
        dist.Uniform(0.0, torch.tensor([4.0, 6.0, 8.0])),
        dist.Pareto(torch.tensor([4.0, 6.0, 8.0]), 2.0),
        dist.Uniform(0.0, torch.tensor([4.0, 6.0, 8.0]).unsqueeze(-1)).expand([3, 2]).to_event(1),
        dist.TransformedDistribution(
            dist.Exponential(torch.ones(3)), [AffineTransform(torch.tensor([4.0, 6.0, 8.0]), 1.0)]
        ),
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0),
            [ExpTransform(), AffineTransform(torch.tensor([[4.0], [6.0], [8.0]]), torch.ones(3, 2))],
        ).to_event(1),
        dist.Binomial(torch.tensor([4.0, 6.0, 8.0]), 0.5),
    ],
    ids=["Uniform", "Pareto", "events", "shifted Exponential", "shifted LogNormal", "Binomial"],
)
def test_outside_of_a_moving_support_a_density_is_zero(fn):
    value = torch.full(fn.shape(), 5.0)
    inside = inside_of(fn, value)
    density = log_density(_site(fn, value))
    assert torch.equal(density.isfinite(), inside)
    assert inside.any() and not inside.all()
    assert (density[~inside] == -math.inf).all()
    with pytest.raises(ValueError, match="support"):  # its validation setting is unchanged
        fn.log_prob(value)


def test_inside_it_is_what_the_distribution_says():
    fn = dist.Pareto(torch.tensor([1.0, 2.0]), 2.0)
    assert torch.equal(log_density(_site(fn, torch.tensor([3.0, 3.0]))), fn.log_prob(torch.tensor([3.0, 3.0])))
    assert bounds_of(dist.Normal(torch.zeros(3), 1.0).to_event(1)) == []


def _tanks(x):
    theta = pyro.sample("theta", dist.Gamma(2.0, 0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(0.0, theta), obs=x)


def _gamma(x):
    pyro.sample("theta", dist.Gamma(20.0, 2.0))


def _exact(low):
    """Log of the integral of p(theta) theta^-4 above ``low``, by a sum."""
    theta = torch.linspace(low, 400.0, 400_001).double()
    log_p = dist.Gamma(2.0, 0.2).log_prob(theta) - 4 * theta.log()
    return float(log_p.logsumexp(0) + (theta[1] - theta[0]).log())


def test_a_draw_outside_the_support_has_weight_zero():
    evidence = evaluate(_tanks, _gamma, X, 20_000, seed=0, progress=False)
    assert abs(evidence.log_evidence - _exact(7.0)).item() < 4 * evidence.standard_error.item()
    assert evidence.elbo.item() == -math.inf
    assert evidence.zero_weights.item() > 0


def test_without_validation_nothing_is_extrapolated():
    """Pareto.log_prob is finite below the scale where it does not check its value, as in a traced graph."""

    def model(x):
        theta = pyro.sample("theta", dist.Uniform(0.0, 4.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Pareto(theta, 2.0), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Uniform(0.0, 4.0))

    with pyro.validation_enabled(False):
        log_w = log_weights(model, guide, X, particles=4000)
    theta = (torch.arange(2000).double() + 0.5) / 1000  # up to the smallest data point, 2
    exact = (4 * math.log(2) + 8 * theta.log() - 3 * X.log().sum()).logsumexp(0) - math.log(4000)
    ratio = (log_w - exact).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4000**0.5


def test_log_joint_is_minus_infinity_outside():
    values = {"theta": torch.tensor([6.0, 8.0])}
    assert log_joint(_tanks, values, X).isfinite().tolist() == [False, True]


def test_a_latent_outside_of_a_support_that_moves_with_another(float64):
    """Latent z ~ U(0, theta) with a guide that samples z up to 2: log p(x) is still that of the model."""
    x = torch.randn(5) + 1

    def model(x):
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Uniform(0.0, 2.0))
            z = pyro.sample("z", dist.Uniform(0.0, theta))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Uniform(0.0, 2.0))
            pyro.sample("z", dist.Uniform(0.0, 2.0))

    evidence = evaluate(model, guide, x, 40_000, seed=0, progress=False)
    theta, z = torch.meshgrid(*[(torch.arange(1000) + 0.5) / 500] * 2, indexing="ij")
    inside = z < theta
    log_p = (-2 * math.log(500) - math.log(2) - theta.log())[inside] + dist.Normal(z[inside], 1.0).log_prob(x[:, None])
    assert ((evidence.log_evidence - log_p.logsumexp(1)).abs() < 4 * evidence.standard_error + 1e-3).all()


def test_data_outside_of_every_draws_support_have_no_evidence():
    def low(x):
        pyro.sample("theta", dist.Uniform(0.1, 0.2))

    log_w = log_weights(_tanks, low, X, particles=10)
    assert (log_w == -math.inf).all()


def test_data_outside_of_a_fixed_support_are_refused():
    def model(x):
        theta = pyro.sample("theta", dist.Gamma(2.0, 0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(0.0, 4.0), obs=x + 0 * theta)

    with pytest.raises(ValueError, match=r"site 'x' lie outside the support of Uniform in 2 places .*from 5 to 7"):
        evaluate(model, _gamma, X, 10, progress=False)


def test_data_outside_of_a_fixed_support_behind_a_transform_are_refused():
    def model(x):
        theta = pyro.sample("theta", dist.Gamma(2.0, 0.2))
        likelihood = dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand([len(x)]), [SigmoidTransform(), AffineTransform(0.0, 4.0)]
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood, obs=x + 0 * theta)

    with pytest.raises(
        ValueError, match=r"site 'x' lie outside the support .* in 2 places \(values from 5 to 7 there\)"
    ):
        evaluate(model, _gamma, X, 10, progress=False)


def test_a_flow_is_left_as_it_is():
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [AffineTransform(torch.ones(3), 2.0)])
    assert bounds_of(flow) == []
    assert bounds_of(dist.Gumbel(torch.zeros(3), 1.0)) == []
    value = torch.randn(3)
    assert torch.equal(log_density(_site(flow, value)), flow.log_prob(value))


def test_a_shift_that_is_a_latent(float64):
    """The minimum of x_n - s ~ Exponential(1) bounds the shift s: log p(x) has a closed form."""
    x = torch.rand(6) + 1

    def model(x):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            base = dist.Exponential(torch.ones(()))
            pyro.sample("x", dist.TransformedDistribution(base, [AffineTransform(s, 1.0)]), obs=x)

    def guide(x):
        pyro.sample("s", dist.Normal(x.min() - 0.2, 0.3))

    evidence = evaluate(model, guide, x, 40_000, seed=0, progress=False)
    exact = len(x) ** 2 / 2 - x.sum() + dist.Normal(0.0, 1.0).cdf(x.min() - len(x)).log()
    assert abs(evidence.log_evidence - exact).item() < 4 * evidence.standard_error.item()
    assert evidence.zero_weights.item() > 0


def test_the_exact_value_under_a_moving_support(float64):
    """Of x ~ U(0, t), t ~ Gamma(2, 1/5): the integral of t exp(-t / 5) / (25 t) above x is exp(-x / 5) / 5."""

    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", dist.Gamma(2.0, 0.2))
            pyro.sample("x", dist.Uniform(0.0, t), obs=x)

    exact = exact_log_evidence(model, X.double(), tolerance=1e-3, progress=False)
    assert (exact.log_evidence - (-X / 5 - math.log(5))).abs().max() < 2e-3
