"""Annealed importance sampling: unbiased against exact values, and correct where importance sampling fails."""

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import CONJUGATE, DiscreteThenNormal, TwoLevels
from members import NO_INVERSE, amortized, pair
from pyro.infer.autoguide import AutoNormal
from torch import nn

from jensen.families import FullCovariance, MeanField
from jensen.guides import Laplace, PriorGuide, amortize
from jensen.inference import ais, fit, log_joint, pareto_k, simulate
from jensen.inference import evaluate as with_refined
from jensen.inference.annealing.ais import Path, Tuning, anneal, temperatures_of
from jensen.inference.measure.hmc import Point, move
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.weights import densities
from jensen.models import PPCA, Banana, Ring

evaluate = partial(with_refined, refine=False)  # from samples of the guide; refined evidence has its own tests

X, D = 5, 2


def _ppca():
    model = PPCA(X, D).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(X, D).double()).Q * torch.tensor([3.0, 1.0]))
    return model.rotated(seed=0)


def _trained(epochs=10):
    model = _ppca()
    guide = amortize(model, nn.Identity(), MeanField, context=X).double()
    fit(
        model,
        guide,
        model(n=500).detach(),
        epochs=epochs,
        batch_size=100,
        lr=2e-2,
        freeze=model,
        seed=0,
        progress=False,
    )
    return model, guide


def _mean_is_one(log_w, exact):
    """Mean of w / p(x) over chains and data minus one, in standard errors; chains are independent per data point."""
    w = (log_w - exact).exp().flatten()
    return (w.mean() - 1) / (w.std() / math.sqrt(len(w)))


def _gaussian(u):
    """The standard normal at every temperature."""
    flat = torch.zeros_like(u)
    return Point(u, -u.square().sum(-1) / 2, flat[..., 0], -u, flat)


def test_moves_leave_a_gaussian_as_it_is(float64):
    """Chains that start in it stay in it, for large steps with many rejections, and for small ones."""
    point = _gaussian(torch.randn(4000, 3, 4))
    step, scale = torch.tensor([1.5, 1.2, 0.1]), torch.ones(3, 4)
    shares = []
    for _ in range(20):
        point, _, accepted = move(_gaussian, point, 1.0, step, scale, 3)
        shares.append(accepted.double().mean(0))
    share = torch.stack(shares).mean(0)
    assert share[0] < 0.8
    squares = point.u.square().mean((0, 2))
    assert ((squares - 1).abs() < 4 * math.sqrt(2 / 16000)).all()
    assert (point.u.mean((0, 2)).abs() < 4 * math.sqrt(1 / 16000)).all()
    kurtosis = point.u.pow(4).mean((0, 2))
    assert ((kurtosis - 3).abs() < 4 * math.sqrt(96 / 16000)).all()


def test_small_steps_are_always_accepted_and_at_second_order(float64):
    refused = []
    for leapfrog in (100, 50, 5):  # orbits of length 1
        point = _gaussian(torch.randn(20000, 1, 4))
        _, chance, _ = move(_gaussian, point, 1.0, torch.tensor([1 / leapfrog]), torch.ones(1, 4), leapfrog)
        refused.append((1 - chance).mean().item())
    assert 0 < refused[0] < 1e-4
    assert refused[1] / refused[0] == pytest.approx(4, rel=0.1)  # the energy error of leapfrog is of second order
    assert refused[2] / refused[0] == pytest.approx(400, rel=0.1)


def test_moves_go_where_the_target_is_at_each_temperature(float64):
    """From N(0, 1) to N(3, 0.5^2): an equilibrated chain at b has the mean and variance of the geometric path."""

    def path(u):
        base, end = -u.square().sum(-1) / 2, -2 * (u - 3).square().sum(-1)
        return Point(u, base, end - base, -u, -4 * (u - 3) + u)

    for b in (0.25, 1.0):
        point = path(torch.randn(20000, 1, 1))
        for _ in range(40):
            point, _, _ = move(path, point, b, torch.tensor([0.25]), torch.ones(1, 1), 5)
        precision = (1 - b) + 4 * b
        assert (point.u.mean() - b * 12 / precision).abs() < 4 * math.sqrt(1 / precision / 20000)
        assert (point.u.var() * precision - 1).abs() < 4 * math.sqrt(2 / 20000)


def test_a_move_into_nowhere_is_refused(float64):
    def half(u):
        base = (-u.square().sum(-1) / 2).masked_fill((u < 0).any(-1), -math.inf)
        return Point(u, base, torch.zeros_like(base), torch.where(u < 0, math.nan, -u), torch.zeros_like(u))

    point = half(torch.randn(20000, 1, 1).abs())
    for _ in range(20):
        point, _, _ = move(half, point, 1.0, torch.tensor([0.4]), torch.ones(1, 1), 3)
    assert (point.u >= 0).all()
    assert (point.u.square().mean() - 1).abs() < 4 * math.sqrt(2 / 20000)
    assert (point.u.mean() - math.sqrt(2 / math.pi)).abs() < 4 * math.sqrt((1 - 2 / math.pi) / 20000)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_mean_weight_is_the_evidence(start):
    model, guide = _trained()
    x = model(n=200).detach()
    found = ais(model, guide, x, chains=100, temperatures=15, start=start, seed=0, progress=False)
    assert (found.log_weights - found.exact).std() > 0.2  # few temperatures: weights vary, and still average to p(x)
    assert abs(_mean_is_one(found.log_weights, found.exact)) < 4
    z = (found.log_evidence - found.exact) / found.standard_error
    assert z.abs().median() < 1.2
    assert found.ess.mean() > 20


def test_one_step_is_importance_sampling():
    model, guide = _trained()
    x = model(n=20).detach()
    found = ais(model, guide, x, chains=2000, temperatures=1, start="guide", seed=0, progress=False)
    once = evaluate(model, guide, x, 2000, seed=1, progress=False)
    error = torch.hypot(found.standard_error, once.standard_error)
    assert ((found.log_evidence - once.log_evidence).abs() < 4 * error).all()
    assert found.acceptance.isnan().all()


def test_more_temperatures_lower_the_variance():
    model, guide = _trained()
    x = model(n=50).detach()
    spread = [
        ais(model, guide, x, temperatures=t, start="prior", seed=0, progress=False).log_weights.var(0).mean()
        for t in (20, 80)
    ]
    assert spread[1] < spread[0] / 2.5  # about 1 / T


def test_the_pilot_run_finds_the_acceptance_aimed_at():
    model = PPCA(20, 10).double()
    with torch.no_grad():
        model.weight.mul_(torch.linspace(0.5, 5, 10))
    x = model(n=50).detach()
    found = ais(model, None, x, temperatures=100, start="prior", seed=0, progress=False)
    assert found.acceptance.mean() == pytest.approx(0.65, abs=0.05)
    assert found.step_sizes.shape == (99, 50)


def test_evaluations_are_counted(monkeypatch):
    model, guide = _trained(1)
    x = model(n=3).detach()
    points = []
    monkeypatch.setattr(Path, "__call__", lambda self, u, call=Path.__call__: points.append(len(u)) or call(self, u))
    options = {"chains": 7, "temperatures": 80, "leapfrog": 3, "pilot": 4, "progress": False}
    found = ais(model, guide, x, start="guide", **options)
    assert found.evaluations == 2 * sum(points) == 2 * (7 + 4) * (1 + 79 * 3)  # a value and a gradient at each
    assert ais(model, guide, x, start="prior", **options).evaluations == found.evaluations + 11


def test_constrained_sites_are_annealed_without_their_constraints(float64):
    for make in CONJUGATE.values():
        model = make()
        x = model(n=30)
        found = ais(model, None, x, chains=100, temperatures=20, seed=0, progress=False)
        assert abs(_mean_is_one(found.log_weights, found.exact)) < 4, make
        assert ((found.log_evidence - found.exact).abs() < 4.5 * found.standard_error).all(), make
        guide = amortize(model, nn.Linear(len(x[0]), 8), FullCovariance, context=8, constraints=model.constraints)
        found = ais(model, guide, x, chains=100, temperatures=40, start="guide", seed=0, progress=False)
        assert abs(_mean_is_one(found.log_weights, found.exact)) < 4, make


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_sites_that_depend_on_each_other(start, float64):
    model = TwoLevels()
    x = model(n=20).detach()
    guide = amortize(model, nn.Identity(), MeanField, context=4)
    fit(model, guide, model(n=500).detach(), epochs=20, batch_size=100, lr=2e-2, freeze=model, seed=0, progress=False)
    found = ais(model, guide, x, chains=200, temperatures=100, start=start, seed=0, progress=False)
    assert abs(_mean_is_one(found.log_weights, found.exact)) < 4
    assert (found.log_evidence - found.exact).abs().mean() < 0.3


def test_densities_are_the_log_joint_site_by_site(float64):
    model = TwoLevels()
    x = model(n=4).detach()
    values = {"top": torch.randn(3, 4, 2), "low": torch.randn(3, 4, 3)}
    found = densities(model, x)(values)
    assert set(found) == {"top", "low", "x"}
    torch.testing.assert_close(found["top"], dist.Normal(0.0, 1.0).log_prob(values["top"]).sum(-1))
    torch.testing.assert_close(sum(found.values()), log_joint(model, values, x))


def test_plates_inside_the_data_and_maps_between_coordinates(float64):
    """A site with a separate plate, and one on the simplex: coordinates map back and forth with the correct density."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Gamma(2.0, 1.0))  # [N]
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
            with pyro.plate("parts", 4, dim=-2):
                part = pyro.sample("part", dist.Normal(top, 1.0))  # [4, N]
                pyro.sample("x", dist.Normal(part, p[..., 0] + 0.5), obs=x.T)

    x = torch.randn(6, 4)
    coordinates = Coordinates(model, x)
    assert coordinates.features == 1 + 2 + 4
    u = torch.randn(5, 6, 7)
    values, log_det = coordinates.values(u)
    assert {name: tuple(z.shape) for name, z in values.items()} == {"top": (5, 6), "p": (5, 6, 3), "part": (5, 4, 6)}
    torch.testing.assert_close(coordinates.free(values), u)

    def outer(v):
        z, _ = coordinates.values(v.expand(1, 6, 7))
        return torch.cat([z["top"][0, :1], z["p"][0, 0, :2], z["part"][0, :, 0]])

    jacobian = torch.autograd.functional.jacobian(outer, u[0, 0])
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(log_det[0, 0].item(), abs=1e-10)
    found = ais(model, None, x, chains=50, temperatures=200, start="prior", seed=0, progress=False)
    once = evaluate(model, PriorGuide(model), x, 100_000, seed=1, progress=False)
    error = torch.hypot(found.standard_error, once.standard_error)
    assert ((found.log_evidence - once.log_evidence).abs() < 4.5 * error).all()


def test_forwards_and_backwards_meet_with_the_same_frozen_steps(monkeypatch):
    model, guide = _trained()
    latents, x = simulate(model, 100)
    path = Path(model, guide, (x,), 1)
    betas = temperatures_of(10, "sigmoid")
    tuning = Tuning(0.2 + 0.5 * torch.rand(9, 100).double(), torch.randn(9, 100, D, D).double())
    used = []
    monkeypatch.setattr(
        "jensen.inference.annealing.ais.move",
        lambda path, point, *rest: used.append(rest) or move(path, point, *rest),
    )
    forth, _ = anneal(path, path.draw(50), betas, tuning, 3)
    back, _ = anneal(path, path.at(latents, 50), betas, tuning, 3, backwards=True)
    for there, here in zip(used[:9], reversed(used[9:]), strict=True):
        assert there[0] == here[0]
        assert there[1] is not here[1] and torch.equal(there[1], here[1]) and torch.equal(there[2], here[2])
    assert [rest[0] for rest in used[:9]] == betas[1:-1]
    exact = model.log_evidence(x).detach()
    assert abs(_mean_is_one(forth, exact)) < 4
    inverse = (exact - back).exp().mean(0)  # its mean over the chains of a datum, which share z*, averages to one
    assert abs(inverse.mean() - 1) < 4 * inverse.std() / math.sqrt(100)
    assert forth.mean() < exact.mean() < back.mean()


def _two_modes(n, noise=0.5):
    """A model x = (|z_1|, z_2, ..., z_10) + noise, and as a guide its exact posterior except for the sign of z_1.

    The modes are 4 apart, so each has half of the posterior mass, and p(x) is Gaussian up to a factor 2 Phi(posterior
    mean of z_1 / its standard deviation).
    """

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
            loc = torch.cat([z[..., :1].abs(), z[..., 1:]], -1)
            pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)

    shrink = 1 / (1 + noise**2)
    sd = noise * math.sqrt(shrink)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x * shrink, sd).to_event(1))

    z = torch.randn(n, 10)
    z[:, 0] = z[:, 0].sign() * (2.5 + z[:, 0].abs() / 10)
    x = torch.cat([z[:, :1].abs(), z[:, 1:]], -1) + noise * torch.randn(n, 10)
    inside = torch.special.log_ndtr(x[:, 0] * shrink / sd)
    exact = dist.Normal(0.0, math.sqrt(1 + noise**2)).log_prob(x).sum(-1) + math.log(2) + inside
    return model, guide, x, exact


def test_annealing_from_the_prior_finds_the_mode_that_the_guide_misses(float64):
    """With the cost of 5,000 samples from the guide; each guide estimate is log 2 too low and looks perfect."""
    model, guide, x, exact = _two_modes(100)
    options = {"chains": 10, "temperatures": 90, "leapfrog": 2, "pilot": 3, "progress": False}
    found = ais(model, None, x, start="prior", seed=0, **options)
    assert found.evaluations <= 5000
    once = evaluate(model, guide, x, 5000, seed=0, progress=False)
    off, missed = found.log_evidence - exact, once.log_evidence - exact
    assert missed.median() == pytest.approx(-math.log(2), abs=0.01)
    assert (once.standard_error.median(), once.ess.median()) < (0.01, 4900)
    assert off.abs().mean() < 0.75 * missed.abs().mean()
    assert abs(off.mean()) < 0.4 * abs(missed.mean())


def test_where_the_guide_is_good_draws_from_it_say_more_than_chains_from_the_prior():
    model, guide = _trained(40)
    x = model(n=50).detach()
    options = {"chains": 8, "temperatures": 100, "leapfrog": 2, "pilot": 4, "progress": False}
    found = ais(model, None, x, start="prior", seed=0, **options)
    once = evaluate(model, guide, x, found.evaluations, seed=0, progress=False)
    errors = [(each.log_evidence - each.exact).abs().mean() for each in (once, found)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", NO_INVERSE)
def test_a_guide_without_log_q_of_a_given_value_is_named(name):
    model, guide, x = pair("PPCA", name)
    with pytest.raises(NotImplementedError, match=r"its own samples only .*start='prior'"):
        ais(model, guide, x, start="guide", progress=False)
    assert ais(model, guide, x, temperatures=3, progress=False).log_weights.isfinite().all()


@pytest.mark.parametrize("make", [Laplace, AutoNormal, lambda model: amortized(model, FullCovariance, joint=True)])
@pytest.mark.filterwarnings("ignore:Laplace")
def test_an_auxiliary_site_is_named(make):
    model = PPCA(X, D)
    with pytest.raises(
        ValueError, match=r"samples \['(joint|z_unc.*)'\] beside the model's sites \['z'\].*start='prior'"
    ):
        ais(model, make(model), model(n=7).detach(), start="guide", progress=False)


def test_discrete_latents_are_named():
    model = DiscreteThenNormal()
    with pytest.raises(ValueError, match=r"latent site 'c' is discrete.*sum the site"):
        ais(model, None, model(n=4).detach(), start="prior", progress=False)


def test_joint_weights_are_named():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.raises(ValueError, match="weights of this model and guide are joint"):
        ais(model, None, torch.zeros(4), start="prior", progress=False)


def test_a_support_that_moves_is_named():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            low = pyro.sample("low", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(low, low + 1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="support of latent site 'z' depends"):
        ais(model, None, torch.zeros(4), start="prior", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 1}, "chains is at least 2, but got 1"),
        ({"leapfrog": 0}, "leapfrog is at least 1"),
        ({"pilot": 1}, "pilot is at least 2"),
        ({"start": "posterior"}, "start must be 'guide' or 'prior'"),
        ({"guide": None, "start": "guide"}, "start='guide' needs a guide.*start='prior'"),
        ({"temperatures": 0}, "temperatures is the number of steps"),
        ({"temperatures": [0.0, 0.5]}, "increase from exactly 0 to exactly 1"),
        ({"schedule": "cosine"}, "schedule is 'sigmoid' or 'linear'"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    model = PPCA(X, D)
    options = {"guide": None, **options}
    with pytest.raises(ValueError, match=message):
        ais(model, data=torch.zeros(3, X), progress=False, **options)


def test_a_seed_repeats_everything_and_leaves_the_users_stream_alone():
    model, guide = _trained(1)
    x = model(n=30).detach()
    state = torch.get_rng_state()
    twice = [ais(model, guide, x, temperatures=5, start="guide", seed=3, progress=False).log_weights for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.get_rng_state(), state)
    few = ais(
        model, guide, x, chains=4, temperatures=[0, 0.5, 1], start="guide", chunk_size=40, seed=3, progress=False
    )  # 3 batches
    assert few.step_sizes.shape == (1, 30)
    assert "30 data points, 4 chains each, 2 temperatures from the guide" in str(few)
    assert few.to_dict()["summary"]["exact"] == few.exact.mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "seed"), [(Banana, 1), (partial(Ring, noise=0.5), 2)], ids=["Banana", "Ring"])
def test_intervals_cover_the_exact_value(make, seed):
    """The coverage of 95 % intervals of 50 chains on 400 data points, from the prior, with enough temperatures."""
    model = make().double()
    x = model(n=400).detach()
    found = ais(model, None, x, chains=50, temperatures=150, seed=seed, progress=False)
    scores = (found.log_evidence - found.exact) / found.standard_error
    assert 0.92 <= (scores.abs() < 1.96).double().mean() <= 0.98
    assert abs(scores.mean()) < 4 / math.sqrt(400) + 0.1  # half the squared error below, as every lower bound


def test_chains_from_a_guide_that_is_too_narrow_do_not_know_it():
    """Why the prior is the default: the weights look equal, but the intervals of every second data point are wrong."""
    model = Ring(noise=0.5).double()
    x = model(n=200).detach()
    x = x[x[:, 0] > 1]

    def narrow(x):  # one side of the ring
        with pyro.plate("data", len(x), dim=-1):
            centre = torch.cat([x.sqrt(), torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(centre, 0.2).to_event(1))

    found = ais(model, narrow, x, start="guide", temperatures=50, seed=0, progress=False)
    scores = (found.log_evidence - found.exact) / found.standard_error
    assert (scores.abs() < 1.96).double().mean() < 0.7
    fine = ais(model, None, x, temperatures=50, seed=0, progress=False)
    assert (fine.log_evidence - fine.exact).abs().mean() < 0.3 * (found.log_evidence - fine.exact).abs().mean()


@pytest.mark.parametrize(("temperatures", "reliable"), [(3, False), (10, False), (100, True)])
def test_few_temperatures_are_flagged_and_their_errors_cover(temperatures, reliable):
    """Chains of the prior against PPCA's exact log p(x); two errors of the delta method covered 0.66 at T = 3."""
    model = PPCA(8, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 2))
        model.log_noise.fill_(math.log(0.3))
        x = model(n=200)
    found = ais(model, None, x, temperatures=temperatures, seed=1, progress=False)
    away = found.log_evidence - found.exact
    assert found.reliable is reliable
    assert ("reliable" in str(found)) is not reliable
    assert (away.abs() <= 2 * found.standard_error).double().mean() > 0.87
    assert abs(float(away.mean())) < 2 * found.error
    summary = found.summary()
    assert summary["log_evidence_mc_error"] == found.error
    assert summary["reliable"] is reliable


def test_the_error_of_a_run_is_the_guarded_jackknife():
    log_w = torch.randn(50, 3).double() * torch.tensor([0.1, 1.0, 3.0])
    model = PPCA(5, 2)
    some = ais(model, None, torch.randn(3, 5), chains=2, temperatures=2, progress=False)
    found = replace(some, log_weights=log_w)
    left = torch.stack([torch.cat([log_w[:c], log_w[c + 1 :]]).logsumexp(0) - math.log(49) for c in range(50)])
    jackknife = (49 / 50 * (left - left.mean(0)).square().sum(0)).sqrt()
    guard = 1 + 5 * (pareto_k(log_w).clamp(0.5, 1.5) - 0.5)
    torch.testing.assert_close(found.standard_error, jackknife * guard, rtol=1e-6, atol=1e-8)
