"""Bounds from both sides: around exact values, converging, and with errors for impossible results."""

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from foreign import EXAMPLE, Images
from hierarchies import GammaPoisson
from members import NO_INVERSE, amortized, pair
from torch import Size, nn
from torch.distributions import constraints

from jensen.datasets import load
from jensen.families import FullCovariance, Gaussian, MeanField
from jensen.guides import ExactPosterior, Laplace, PriorGuide, amortize
from jensen.inference import Bracket, Sandwich, bounds, fit, log_weights, simulate
from jensen.inference import sandwich as with_refined
from jensen.inference.annealing.ais import Path
from jensen.inference.annealing.rejection import posterior_draws
from jensen.inference.annealing.sandwich import _weighted
from jensen.inference.measure.bounds import log_weight_of
from jensen.kernel.batches import stream
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA, VAE, Banana, Ring
from jensen.module import UniqueModule
from jensen.networks import mlp

sandwich = partial(with_refined, refine=False)  # refined bounds have separate tests

X, D = 5, 2


def _ordered(found):
    """Lower bound, exact value and upper bound are ordered on average, within four paired standard errors."""
    for b in (found.weighted, found.annealed):
        for gap in (found.exact - b.lower, b.upper - found.exact, b.width):
            assert gap.mean() > -4 * gap.std() / math.sqrt(len(gap))


@pytest.fixture(scope="module")
def linear():
    """PPCA on digits, rotated, and a mean-field guide after a little training: its gap is about half a nat."""
    torch.manual_seed(0)
    data = load("digits", dtype=torch.float64).train
    model = PPCA(64, latent=8).double().fit_closed_form(data).rotated(seed=0)
    guide = amortize(model, nn.Linear(64, 32).double(), MeanField, context=32).double()
    fit(model, guide, data, epochs=10, lr=5e-3, freeze=model, seed=0, progress=False)
    return model, guide


@pytest.fixture(scope="module")
def deep():
    """A small VAE on digits."""
    torch.manual_seed(0)
    data = load("digits").train
    model = VAE(mlp(8, [64]), Gaussian(64, 64, scale="shared"), latent=8)
    guide = amortize(model, mlp(64, [64]), FullCovariance, context=64)
    fit(model, guide, data, epochs=60, lr=5e-3, seed=0, progress=False)
    return model, guide


@pytest.mark.parametrize(("start", "temperatures"), [("guide", 60), pytest.param("prior", 300, marks=pytest.mark.slow)])
def test_the_bounds_of_a_linear_model_meet_around_its_evidence(linear, start, temperatures):
    model, guide = linear
    found = sandwich(model, guide, 100, start=start, temperatures=temperatures, seed=0, progress=False)
    _ordered(found)
    assert abs(found.annealed.width.mean()) < 0.1
    assert (found.annealed.lower - found.exact).mean().abs() < 0.06
    assert (found.annealed.upper - found.exact).mean().abs() < 0.06
    assert found.contradictions() == []


@pytest.mark.slow
def test_the_bounds_of_a_trained_vae_meet(deep):
    model, guide = deep
    found = sandwich(model, guide, 80, start="guide", temperatures=150, particles=500, seed=0, progress=False)
    width = found.annealed.width
    assert width.mean() > -4 * width.std() / math.sqrt(80)
    assert width.mean() < 0.1
    assert found.weighted.width.mean() > 3 * width.mean()
    assert found.exact is None
    assert found.contradictions() == []


@pytest.mark.slow
def test_more_temperatures_close_the_bounds(linear):
    model, guide = linear
    widths = [
        sandwich(model, guide, 60, temperatures=t, seed=0, progress=False).annealed.width.mean() for t in (20, 60, 180)
    ]
    assert widths[0] > 2 * widths[1] > 4 * widths[2] > 0


def test_weighted_bounds_are_those_of_bounds(linear):
    model, guide = linear
    found = sandwich(model, guide, 200, temperatures=1, particles=256, seed=0, progress=False)
    torch.manual_seed(derived_seed(0, "sandwich"))
    latents, x = simulate(model, 200)
    torch.testing.assert_close(found.exact, model.log_evidence(x).detach())
    b = bounds(model, guide, x, 256, latents=latents, seed=1, progress=False)
    summary = found.summary()["weighted"]
    assert summary["lower"] == pytest.approx(b.mean[-1].item(), abs=4 * math.sqrt(2) * b.error[-1].item())
    assert summary["upper"] == pytest.approx(b.upper[-1].item(), abs=4 * math.sqrt(2) * b.error[-1].item())


@pytest.mark.parametrize(("scale", "temperatures"), [(1.0, 10), (1.3, 100)])
def test_a_model_of_any_style_through_the_latents_that_made_its_data(scale, temperatures):
    pair = Images(scale)
    latents, x = simulate(pair.model, 100, data=EXAMPLE)
    assert x.shape == (100, 2, 3)
    settings = {"particles": 200, "temperatures": temperatures, "start": "guide", "seed": 0, "progress": False}
    found = sandwich(pair.model, pair.guide, data=x, latents=latents, **settings)
    assert found.drawn
    if scale != 1:
        _ordered(replace(found, exact=pair.log_evidence(x)))
        moved = sandwich(pair.model, pair.guide, data=x, latents={"code": latents["code"] + 3}, **settings)
        assert moved.contradictions()  # latents that made other data
    else:
        for side in (found.weighted.lower, found.weighted.upper, found.annealed.lower, found.annealed.upper):
            torch.testing.assert_close(side, pair.log_evidence(x), rtol=0, atol=1e-9)


def test_a_model_that_needs_an_example_is_told_where_to_give_it():
    pair = Images()
    with pytest.raises(TypeError, match=r"of its data, simulate\(model, n, data=\.\.\.\)"):
        sandwich(pair.model, pair.guide, 10, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": {"code": torch.zeros(5, 2)}}, "give both, data and latents"),
        ({"data": EXAMPLE, "latents": {"code": torch.zeros(4, 2)}}, r"one row per data point \(5\).*\{'code': 4\}"),
        ({"data": EXAMPLE, "latents": {"z": torch.zeros(5, 2)}}, r"samples \['code'\], but latents hold values only"),
    ],
)
def test_latents_that_do_not_fit_the_data(settings, message):
    pair = Images()
    with pytest.raises(ValueError, match=message):
        sandwich(pair.model, pair.guide, **settings, temperatures=1, progress=False)


def test_with_the_exact_posterior_every_bound_is_exact():
    model = PPCA(X, D).double()
    found = sandwich(model, ExactPosterior(model), 30, start="guide", temperatures=5, chunk_size=160, progress=False)
    for b in (found.weighted, found.annealed):
        torch.testing.assert_close(b.lower, found.exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(b.upper, found.exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", [1, 5, 16])
def test_weighted_bounds_by_hand(linear, block):
    """The true weight replaces that of the first sample, for any number of samples at once."""
    model, guide = linear
    latents, x = simulate(model, 6)
    (part,) = stream(model, guide, (x,), "test", at_once=6 * block, most=6, progress=False)
    torch.manual_seed(1)
    found = _weighted(part, latents, 16)
    torch.manual_seed(1)
    w = torch.cat([log_weights(model, guide, x, particles=k).detach() for k in part.chunks(16)])
    true = log_weight_of(model, guide, latents, (x,)).detach()
    every = torch.stack([true, *w[1:]])
    torch.testing.assert_close(found.lower, w.logsumexp(0) - math.log(16), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.upper, every.logsumexp(0) - math.log(16), rtol=0, atol=1e-10)
    others = (every - every.logsumexp(0)).exp()[1:]  # their share of the mean weight
    torch.testing.assert_close(found.upper_error, others.std(0) * math.sqrt(15), rtol=1e-8, atol=0)


class _Simulated(UniqueModule):
    """z ~ N(0, I), x ~ N(z, noise^2 I) where it is scored; ``drawn`` is the noise where it is drawn."""

    def __init__(self, noise=0.5, drawn=0.5, known=False):
        super().__init__()
        self.noise, self.drawn = noise, drawn
        self.latents, self.event_shape = {"z": Size((D,))}, Size((D,))
        if known:
            self.log_evidence = lambda x: dist.Normal(0.0, math.sqrt(1 + noise**2)).log_prob(x).sum(-1)

    def forward(self, x=None, *, n=1):
        noise = self.drawn if x is None else self.noise
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)


class _Shifted(dist.Normal):
    """Samples narrower than the scored density: nearer to the mode, where weights are large."""

    def rsample(self, sample_shape=()):
        return self.loc + 0.7 * (super().rsample(sample_shape) - self.loc)

    sample = rsample

    def expand(self, batch_shape, _instance=None):
        return _Shifted(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def _guide(kind):
    def guide(x):  # the exact posterior of _Simulated, slightly wider
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", kind(0.8 * x, 1.3 * math.sqrt(0.2)).to_event(1))

    return guide


@pytest.mark.parametrize("known", [True, False])
def test_an_honest_pair_is_in_order(known, float64):
    found = sandwich(_Simulated(known=known), _guide(dist.Normal), 300, temperatures=30, seed=0, progress=False)
    assert found.contradictions() == []
    assert found.verdict() == "The bounds are in order."
    lines = str(found).splitlines()
    assert lines[0].startswith("300 data points sampled from the model, nats per data point")
    assert set(lines[2]) == {"-"} and max(map(len, lines[1:])) == len(lines[2])
    assert len(lines) == 5 + known


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_does_not_draw_what_it_scores_is_the_suspect(known, float64):
    """The true latents are farther from their data than the scored posterior: upper bounds are too low."""
    model = _Simulated(drawn=2.0, known=known)
    found = sandwich(model, _guide(dist.Normal), 300, temperatures=3, seed=0, progress=False)
    pairs = {(c.above, c.below) for c in found.contradictions()}
    assert ("annealed lower bound", "annealed upper bound") in pairs
    assert (("exact log p(x)", "annealed upper bound") in pairs) == known
    text = str(found)
    assert "Suspect: the model: its samples do not follow its density" in text
    assert "importance-weighted, K" not in text  # no table
    assert ("log_evidence" in text) == known


def test_a_guide_that_does_not_score_what_it_draws_is_the_suspect(float64):
    found = sandwich(_Simulated(), _guide(_Shifted), 300, temperatures=30, seed=0, progress=False)
    assert {c.above for c in found.contradictions()} == {"importance-weighted lower bound"}
    assert "Suspect: the guide: its log q(z | x) is not the density of its samples" in str(found)
    blind = sandwich(_Simulated(), _guide(_Shifted), 300, start="guide", temperatures=3, seed=0, progress=False)
    assert "either the guide" in blind.verdict()
    assert "Annealing from the prior shows which" in blind.verdict()


def test_an_evidence_that_is_not_the_models_is_named(float64):
    model = _Simulated(known=True)
    honest = model.log_evidence
    model.log_evidence = lambda x: honest(x) - 0.5
    found = sandwich(model, _guide(dist.Normal), 300, temperatures=30, seed=0, progress=False)
    assert "its log_evidence is that of another model" in found.verdict()
    assert found.contradictions()[0].excess == pytest.approx(0.5, abs=0.05)


def test_chance_is_no_contradiction():
    torch.manual_seed(3)
    noise, none = torch.randn(100).double(), torch.zeros(100).double()
    crossing = Bracket(noise.clamp(-1, 1) * 0.1, none, none, none)
    found = Sandwich(crossing, crossing, None, 10, 10, 10, "prior")
    assert found.contradictions() == []
    worse = Bracket(crossing.lower + 0.1, none, none, none)
    named = Sandwich(worse, crossing, None, 10, 10, 10, "prior").contradictions()
    assert {(c.above, c.below) for c in named} == {
        ("importance-weighted lower bound", "importance-weighted upper bound"),
        ("importance-weighted lower bound", "annealed upper bound"),
    }
    assert named[0].excess / named[0].error > 4


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_few_data_do_not_accuse(n, float64):
    """Bounds that agree up to normal noise, 2,000 times; at n = 2, 8 % of means are beyond four standard errors."""
    none, accused = torch.zeros(n), 0
    for _ in range(2000):
        a, b = (Bracket(torch.randn(n), none, torch.randn(n), none) for _ in range(2))
        accused += bool(Sandwich(a, b, None, 10, 10, 10, "prior").contradictions())
    assert accused <= 3  # four pairs of numbers each, 3e-5 for each of them
    sure = Bracket(torch.randn(n) + 1e6, none, torch.randn(n), none)
    assert Sandwich(sure, sure, None, 10, 10, 10, "prior").contradictions()


def test_known_monte_carlo_errors_count():
    """Four data points that agree to 0.01 by chance, with bounds of error 1 nat each."""
    spread = 0.01 * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    for noise, wrong in ((0.0, True), (1.0, False)):
        errors = torch.full((4,), noise)
        low = Bracket(spread + 2, errors, spread.flip(0) + 3, errors)
        high = Bracket(spread, errors, spread.flip(0) + 1, errors)
        assert bool(Sandwich(low, high, None, 10, 10, 10, "prior").contradictions()) == wrong


def test_a_missed_mode_keeps_the_weighted_bounds_apart_and_annealing_from_the_prior_closes_them():
    """One of two points of a Ring in one dimension: samples of the guide do not reach the other."""

    def one_mode(x):
        with pyro.plate("data", len(x), dim=-1):
            centre = x.clamp_min(0.5).sqrt()
            pyro.sample("z", dist.Normal(centre, 0.2 / (2 * centre)).to_event(1))

    model = Ring(noise=0.2, latent=1).double()
    x = model(n=300).detach()
    x = x[x[:, 0] > 1.5]
    found = sandwich(model, one_mode, data=x, temperatures=200, seed=0, progress=False)
    missed = found.exact - found.weighted.lower
    assert missed.median() == pytest.approx(math.log(2), abs=0.02)
    assert found.weighted.width.mean() > 20
    assert found.annealed.width.mean().abs() < 0.1
    assert (found.annealed.lower - found.exact).mean().abs() < 0.05


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (Banana, "prior"),
        (partial(Ring, noise=0.4), "prior"),
        (partial(Ring, latent=1), "prior"),
        (GammaPoisson, "prior"),
    ],
    ids=["Banana", "Ring", "two points", "positive"],
)
def test_given_data_are_sandwiched_too(make, start, float64):
    model = make()
    x = model(n=60).detach()
    found = sandwich(model, PriorGuide(model), data=x, start=start, particles=3000, seed=0, progress=False)
    _ordered(found)
    assert found.above == 0
    assert found.annealed.width.mean().abs() < 0.1
    assert "given, latents by rejection" in str(found)


def _drawn(model, x, seed):
    torch.manual_seed(seed)
    path = Path(model, None, (x,), 1)
    found = posterior_draws(path.draw(4096), path.log_joint)
    assert not found.above.any()
    return found.u[0]


def test_rejection_draws_from_the_posterior(float64):
    """A Gaussian with known mean, covariance and tails."""
    model = PPCA(X, D)
    with torch.no_grad():
        model.weight.mul_(2)
    x = model(n=1).detach().expand(200, X)
    z = torch.cat([_drawn(model, x, seed) for seed in range(2)])
    p = model.posterior(x[:1])
    white = torch.linalg.solve_triangular(p.scale_tril[0], (z - p.mean).T, upper=False)  # [D, 400]
    n = white.shape[1]
    assert (white.mean(1).abs() < 4 / math.sqrt(n)).all()
    assert ((white.var(1) - 1).abs() < 4 * math.sqrt(2 / n)).all()
    assert (white[0] * white[1]).mean().abs() < 4 / math.sqrt(n)
    outside = (white.abs() > 2.5).double().mean()
    expected = 2 * dist.Normal(0.0, 1.0).cdf(torch.tensor(-2.5))
    assert (outside - expected).abs() < 4 * (expected / (2 * n)).sqrt()


def test_rejection_finds_both_points_alike(float64):
    model = Ring(noise=0.1, latent=1)
    z = _drawn(model, torch.full((500, 1), 2.0), 0)
    assert ((z.abs() - math.sqrt(2)).abs() < 0.3).all()
    assert abs((z > 0).double().mean() - 0.5) < 4 * math.sqrt(0.25 / 500)


def test_an_envelope_that_is_too_low_is_reported(monkeypatch, float64):
    monkeypatch.setattr("jensen.inference.annealing.rejection._SAFETY", -1.0)
    model = PPCA(X, D)
    found = sandwich(model, PriorGuide(model), data=model(n=5).detach(), temperatures=5, seed=0, progress=False)
    assert found.above > 0.1
    assert "envelope of the rejection sampling was too low" in str(found)


def test_a_large_latent_space_needs_data_of_the_models_own(linear):
    model, guide = linear
    with pytest.raises(ValueError, match=r"one or two latent coordinates, but this model has 8: omit data"):
        sandwich(model, guide, data=model(n=3).detach(), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 1}, "particles .* at least 2, but got 1"),
        ({"chains": 1}, "chains is at least 2"),
        ({"n": 0}, "n is the number of data points to sample"),
        ({"data": torch.zeros(3, X), "covariates": (torch.zeros(3),)}, r"give data as a tuple \(x, \*covariates\)"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    model = PPCA(X, D)
    with pytest.raises(ValueError, match=message):
        sandwich(model, PriorGuide(model), progress=False, **options)


@pytest.mark.filterwarnings("ignore:Laplace")
def test_guides_without_log_q_of_the_true_latents_are_named():
    model, guide, _ = pair("PPCA", next(iter(NO_INVERSE)))
    with pytest.raises(NotImplementedError, match="its own samples only"):
        sandwich(model, guide, 5, temperatures=2, progress=False)
    for make in (Laplace, lambda model: amortized(model, FullCovariance, joint=True)):
        with pytest.raises(ValueError, match=r"the guide samples \['joint'\].*auxiliary site"):
            sandwich(model, make(model), 5, temperatures=2, progress=False)


def test_a_seed_repeats_everything_and_the_report_is_plain():
    model = PPCA(X, D)
    state = torch.get_rng_state()
    twice = [sandwich(model, PriorGuide(model), 8, temperatures=4, seed=2, progress=False) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert twice[0].to_dict() == twice[1].to_dict()
    found = twice[0].to_dict()
    assert set(found) == {"summary", "verdict", "per_datum"}
    assert len(found["per_datum"]["annealed"]["upper_error"]) == 8
    assert twice[0]._repr_html_() == twice[1]._repr_html_()


def test_covariates_and_constrained_sites(float64):
    class Rates(UniqueModule):
        """rate ~ Gamma, counts ~ Poisson(rate * exposure): the exposure is a covariate."""

        latents, constraints = {"z": Size(())}, {"z": constraints.positive}

        def forward(self, x=None, exposure=None, *, n=1):
            with pyro.plate("data", n if x is None else len(x), dim=-1):
                z = pyro.sample("z", dist.Gamma(3.0, 1.5))
                return pyro.sample("x", dist.Poisson(z * exposure), obs=x)

    model = Rates()
    exposure = torch.linspace(1, 5, 100)
    found = sandwich(model, PriorGuide(model), 100, covariates=(exposure,), seed=0, progress=False)
    assert found.annealed.width.mean().abs() < 0.05
    torch.manual_seed(derived_seed(0, "sandwich"))
    _, x = simulate(model, 100, exposure)
    p = 1.5 / (1.5 + exposure)
    exact = dist.NegativeBinomial(3.0, probs=1 - p).log_prob(x)
    assert (found.annealed.lower - exact).mean().abs() < 0.05
