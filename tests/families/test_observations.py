"""Observation families: against independent formulas, at extreme parameters, and outside their support."""

import itertools
from functools import partial

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from members import COUNTS, OBSERVATIONS
from pyro import poutine

from jensen.families import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Laplace,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from jensen.families.base import positive
from jensen.guides import MeanField, amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import fit, log_weights
from jensen.models import VAE
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

CONTINUOUS = {**OBSERVATIONS, "StudentT": StudentT, "ContinuousBernoulli": ContinuousBernoulli}
ALL = {**CONTINUOUS, **COUNTS, "Bernoulli": Bernoulli}
each_observation = pytest.mark.parametrize("family", ALL.values(), ids=list(ALL))


def one(q, x):
    """Log-probabilities [...] of numbers, by a family of one feature."""
    return q.log_prob(x.unsqueeze(-1))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_sum_to_one(name, float64):
    features = 1 if "25" in name or "mixture" in name else 2
    q = COUNTS[name](features, 4)(torch.randn(3, 4))
    end = getattr(q.base_dist.support, "upper_bound", None)
    axis = torch.arange(400 if end is None else int(torch.as_tensor(end).max()) + 1).double()
    states = torch.tensor(list(itertools.product(axis.tolist(), repeat=features)))
    mass = q.log_prob(states.unsqueeze(1)).exp().sum(0)
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-9, rtol=0)


def test_a_continuous_bernoulli_integrates_to_one(float64):
    for logit in (0.0, 1e-9, 0.3, 0.51, -7.0, 60.0, -800.0):
        ends = torch.linspace(0, 1, 2_000_001) if abs(logit) > 50 else torch.linspace(0, 1, 20_001)
        density = one(ContinuousBernoulli(1, None)(torch.tensor([logit])), ends).exp()
        assert abs(torch.trapezoid(density, ends).item() - 1) < 1e-6, logit


@each_observation
def test_draws_have_the_mean_of_the_distribution(family, float64):
    built = family(3, None)
    q = built(torch.randn(built.size))
    draws = q.sample((40_000,))
    if "levels" in getattr(family, "keywords", {}):
        levels = torch.arange(float(family.keywords["levels"]))
        probs = q.base_dist.log_prob(levels.unsqueeze(-1)).exp().T  # [3, C]
        mean, variance = ((probs * f).sum(-1) for f in (levels, levels**2))
        variance = variance - mean**2
    elif "StudentT" in str(family):
        draws, mean = draws.median(0).values, q.base_dist.loc
        assert ((draws - mean).abs() < 5 * q.base_dist.scale * 1.5 / 40_000**0.5).all()
        return
    else:
        mean, variance = q.mean, q.variance
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / 40_000).sqrt()).all()


@each_observation
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e3])
def test_float32_has_the_digits_of_float64(family, size):
    """At the same parameters, for samples and for values far from them, with gradients."""
    built = family((2, 3), None)
    parameters = size * torch.randn(50, built.size)
    x = built(parameters).sample()
    for value in (x, x.roll(1, 0)):
        found = []
        for dtype in (torch.float32, torch.float64):
            p = parameters.to(dtype).requires_grad_()
            log_p = built.to(dtype)(p).log_prob(value.to(dtype))
            assert log_p.dtype == dtype and log_p.isfinite().all()
            (slope,) = torch.autograd.grad(log_p.sum(), p)
            assert slope.isfinite().all()
            found.append((log_p.detach().double(), slope.double()))
        built.float()
        (single, slope), (double, exact) = found
        sums = 1 + double.abs() + size  # the terms of the sum: a logit times a value
        assert ((single - double).abs() / sums < 5e-6).all()
        assert ((slope - exact).abs() / (1 + exact.abs()) < 2e-3).all()


LOGITS = [0.0, 1e-12, -1e-6, 1e-3, -0.01, 0.1, 0.49, -0.51, 3.0, -17.0, 40.0, 1e3, -1e3]


@pytest.mark.parametrize("logit", LOGITS)
def test_a_continuous_bernoulli_is_its_formula_in_fifty_digits(logit, float64):
    mpmath.mp.dps = 50
    for dtype, rtol, atol in ((torch.float64, 1e-14, 1e-14), (torch.float32, 3e-7, 3e-7)):
        a = mpmath.mpf(torch.tensor(logit, dtype=dtype).item())  # as it is stored
        x = torch.tensor([0.0, 0.2, 0.5, 0.99, 1.0], dtype=dtype)
        expected = [float(a * v + (mpmath.log(a / mpmath.expm1(a)) if a else 0)) for v in x.tolist()]
        mean = float(1 / (1 - mpmath.exp(-a)) - 1 / a) if a else 0.5
        q = ContinuousBernoulli(1, None)(torch.tensor([logit], dtype=dtype))
        torch.testing.assert_close(one(q, x).double(), torch.tensor(expected), rtol=rtol, atol=atol)
        torch.testing.assert_close(q.mean.double(), torch.tensor([mean]), rtol=100 * rtol, atol=100 * atol)


@pytest.mark.parametrize("logit", LOGITS)
def test_a_continuous_bernoullis_moments_entropy_and_distribution_function(logit, float64):
    mpmath.mp.dps = 50
    a = mpmath.mpf(logit)
    x = torch.tensor([0.0, 0.3, 0.9, 1.0])
    variance = float(1 / a**2 - mpmath.exp(a) / mpmath.expm1(a) ** 2) if a else 1 / 12
    below = [float(mpmath.expm1(a * mpmath.mpf(v)) / mpmath.expm1(a)) if a else v for v in x.tolist()]
    mean = 1 / (1 - mpmath.exp(-a)) - 1 / a if a else 0
    entropy = float(-(a * mean + mpmath.log(a / mpmath.expm1(a)))) if a else 0.0
    q = ContinuousBernoulli(1, None)(torch.tensor([logit])).base_dist
    torch.testing.assert_close(q.variance, torch.tensor([variance]), rtol=1e-9, atol=0)
    torch.testing.assert_close(q.cdf(x), torch.tensor(below), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.entropy(), torch.tensor([entropy]), rtol=1e-9, atol=1e-12)
    if abs(logit) < 20:
        torch.testing.assert_close(q.icdf(q.cdf(x)), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_continuous_bernoulli_draws_from_its_own_distribution(logit, dtype):
    q = ContinuousBernoulli(1, None)(torch.full((20_000, 1), logit, dtype=dtype))
    x = q.sample()
    assert ((x >= 0) & (x <= 1)).all()
    a = abs(logit)
    exact = scipy.stats.truncexpon(b=a, scale=1 / a) if a else scipy.stats.uniform()
    values = (1 - x if logit > 0 else x).double().flatten().numpy()
    assert scipy.stats.kstest(values, exact.cdf).pvalue > 1e-4


def test_a_continuous_bernoullis_draws_are_reparameterized(float64):
    logits = torch.tensor(LOGITS).requires_grad_()
    drawn = ContinuousBernoulli(len(LOGITS), None)(logits).rsample((4000,))
    (slope,) = torch.autograd.grad(drawn.mean(0).sum(), logits)
    (expected,) = torch.autograd.grad(ContinuousBernoulli(len(LOGITS), None)(logits).mean.sum(), logits)
    torch.testing.assert_close(slope, expected, atol=5e-3, rtol=0.1)


MEANS = [1e-6, 0.3, 4.0, 900.0, 1e6]


@pytest.mark.parametrize("mean", MEANS)
def test_poisson_is_scipys(mean):
    raw = torch.tensor([mean], dtype=torch.float64) if mean > 100 else _raw(mean)
    m = positive(raw).item()
    x = torch.tensor([0.0, 1.0, 3.0, round(mean), round(mean + 2 * mean**0.5)], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        q = Poisson(1, None)(raw.to(dtype))
        expected = torch.as_tensor(scipy.stats.poisson(q.base_dist.rate.item()).logpmf(x.numpy()))
        torch.testing.assert_close(one(q, x.to(dtype)).double(), expected, rtol=1e-6, atol=1e-7)
    assert abs(m - mean) < 1e-5 * mean + 1.0


def _raw(value):
    return torch.log(torch.expm1(torch.tensor([value], dtype=torch.float64))) - torch.log(torch.expm1(torch.ones(1)))


@pytest.mark.parametrize("total", [1e-3, 0.7, 20.0, 1e4, 1e8])
def test_a_negative_binomial_is_scipys_and_at_last_a_poisson(total):
    mean = 50.0
    x = torch.tensor([0.0, 1.0, 49.0, 50.0, 51.0, 120.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        q = NegativeBinomial(1, None, total_count=total)(torch.tensor([mean - 0.5413248546], dtype=dtype))
        expected = torch.as_tensor(scipy.stats.nbinom(total, total / (total + mean)).logpmf(x.numpy()))
        torch.testing.assert_close(one(q, x.to(dtype)).double(), expected, rtol=2e-5, atol=2e-5)
    if total == 1e8:
        torch.testing.assert_close(expected, torch.as_tensor(scipy.stats.poisson(50).logpmf(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trials", [1, 255, 10**6])
@pytest.mark.parametrize("logit", [0.0, 2.0, -12.0])
def test_a_binomial_is_scipys(trials, logit):
    p = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()
    x = torch.tensor([0, 1, round(trials * p), trials - 1, trials], dtype=torch.float64)
    expected = torch.as_tensor(scipy.stats.binom(trials, p).logpmf(x.numpy()))
    for dtype in (torch.float32, torch.float64):
        q = Binomial(1, None, trials=trials)(torch.tensor([logit], dtype=dtype))
        torch.testing.assert_close(one(q, x.to(dtype)).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("df", [0.5, 3.0, 1e4, 1e7])
def test_students_normalizer_keeps_its_digits(df):
    x = torch.tensor([0.0, 1.0, -4.0, 30.0], dtype=torch.float64)
    expected = torch.as_tensor(scipy.stats.t(df).logpdf(x.numpy()))
    q = StudentT(1, None, df=df, scale=1.0)(torch.zeros(1))
    torch.testing.assert_close(one(q, x.float()).double(), expected, rtol=1e-5, atol=1e-5)


def test_laplace_is_scipys(float64):
    x = torch.linspace(-5, 5, 11)
    q = Laplace(1, None, scale=0.7)(torch.tensor([0.3]))
    torch.testing.assert_close(one(q, x), torch.as_tensor(scipy.stats.laplace(0.3, 0.7).logpdf(x)))


def test_laplace_draws_are_laplace(float64):
    x = Laplace(1, None, scale=0.7)(torch.full((20_000, 1), 0.3)).rsample().flatten()
    assert scipy.stats.kstest(x.numpy(), scipy.stats.laplace(0.3, 0.7).cdf).pvalue > 1e-4


def test_categorical_reads_its_logits_level_by_level(float64):
    logits = torch.randn(3, 2, 4)  # [C, *features]
    q = Categorical((2, 4), None, levels=3)(logits.flatten())
    x = torch.randint(3, (2, 4)).double()
    expected = logits.log_softmax(0).gather(0, x.long().unsqueeze(0)).sum()
    torch.testing.assert_close(q.log_prob(x), expected)


@each_observation
def test_images_keep_their_shape(family):
    q = family((1, 2, 3), 4)(torch.randn(6, 5, 4))
    x = q.sample()
    assert (q.event_shape, x.shape, q.log_prob(x).shape) == ((1, 2, 3), (6, 5, 1, 2, 3), (6, 5))
    assert x.dtype == torch.float32
    assert q.support.check(x).all()


@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_a_discretized_logistic_is_scipys(size):
    for dtype, rtol in ((torch.float32, 2e-5), (torch.float64, 1e-7)):
        family = DiscretizedLogistic(1, None, levels=16, components=2)
        parameters = (size * torch.randn(6)).to(dtype)
        p = family(parameters).base_dist
        weights, loc, scale = (part.flatten().double() for part in (p.log_weights.exp(), p.loc, p.scale))
        x = torch.arange(16.0, dtype=torch.float64)
        expected = torch.zeros(16, dtype=torch.float64)
        for w, m, s in zip(weights.tolist(), loc.tolist(), scale.tolist(), strict=True):
            one_component = scipy.stats.logistic(m, s)
            high, low = one_component.cdf(x.numpy() + 0.5), one_component.cdf(x.numpy() - 0.5)
            high[-1], low[0] = 1.0, 0.0
            expected += w * torch.as_tensor(high - low)
        found = one(family(parameters), x.to(dtype)).double().exp()
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(loc, 7.5 * (1 + parameters[2:4].double()))


OUTSIDE = {
    "DiscretizedLogistic": (DiscretizedLogistic, 256.0, "the support is the whole numbers from 0 to 255: round"),
    "Bernoulli": (Bernoulli, 0.5, "binarize grey images"),
    "Poisson": (Poisson, -1.0, "the support is the whole numbers from 0 on: round"),
    "NegativeBinomial": (NegativeBinomial, 1.5, "the support is the whole numbers from 0 on: round"),
    "Binomial": (partial(Binomial, trials=3), 4.0, "the support is the whole numbers from 0 to 3: round"),
    "Categorical": (partial(Categorical, levels=256), 256.0, "the support is the whole numbers from 0 to 255: round"),
    "ContinuousBernoulli": (ContinuousBernoulli, 1.5, "the support is the numbers from 0 to 1: scale"),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("use", ["log_weights", "fit", "evaluate"])
def test_data_outside_the_support_are_refused_by_name(name, use):
    family, value, remedy = OUTSIDE[name]
    model = VAE(mlp(2, [8]), family(3, 8), 2)
    guide = amortize(model, mlp(3, [8]), MeanField, context=8)
    x = torch.zeros(5, 3)
    x[2, 1] = x[4, 0] = value
    act = {
        "log_weights": lambda: log_weights(model, guide, x),
        "fit": lambda: fit(model, guide, x, epochs=1, progress=False),
        "evaluate": lambda: evaluate(model, guide, x, 5, progress=False),
    }[use]
    message = rf"support of {name} in 2 places \(values from {value:g} to {value:g} there\); {remedy}"
    with pytest.raises(ValueError, match=message):
        act()


def test_masked_data_outside_the_support_are_not_in_the_message():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=torch.tensor([True, False, True])):
                rate = z.exp().unsqueeze(-1).expand(*z.shape, 2)
                pyro.sample("x", dist.Poisson(rate, validate_args=False).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor([[1.0, -2.0], [-7.0, 3.0], [0.0, 4.0]])
    with pytest.raises(ValueError, match=r"support of Poisson in 1 places \(values from -2 to -2 there\)"):
        log_weights(model, guide, x)
    x[0, 1] = 2.0
    assert log_weights(model, guide, x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Binomial(3, 8, trials=0), "trials must be at least 1"),
        (lambda: DiscretizedLogistic(3, 8, components=0), "components at least 1, but got levels=256, components=0"),
        (lambda: Categorical(3, 8, levels=1), "levels must be at least 2"),
        (lambda: NegativeBinomial(3, 8, total_count=-1.0), 'total_count must be a positive number, "shared"'),
        (lambda: Laplace(3, 8, scale="free"), "scale must be a number, 'shared'"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
