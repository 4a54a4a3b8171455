"""Refined evidence against exact values: coverage of its errors, with modes that the guide never samples."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from jensen.families import MeanField, Sylvester
from jensen.guides import amortize
from jensen.inference import Evidence, evaluate, exact_log_evidence, fit, sandwich, simulate
from jensen.inference.measure.plan import Plan
from jensen.inference.measure.proposals import Mode, Proposal, propose
from jensen.inference.measure.refined import Strata
from jensen.inference.measure.target import Target
from jensen.models import PPCA, Banana, LinearGaussianSSM, Ring
from jensen.networks import mlp, recurrent

QUIET = {"progress": False, "seed": 0}


def covered(evidence, exact):
    """The share of data points within two standard errors."""
    return float(((evidence.log_evidence - exact).abs() <= 2 * evidence.standard_error).double().mean())


def made(model, n):
    torch.manual_seed(1)
    x = simulate(model, n)[1]
    return x, amortize(model, mlp(x.shape[1], [16]), context=16).double()


def test_a_linear_model_is_exact_within_its_errors_where_the_guide_is_untrained():
    model = PPCA(20, latent=5).double()
    x, guide = made(model, 100)
    exact = exact_log_evidence(model, x).log_evidence
    plain = evaluate(model, guide, x, 2000, refine=False, **QUIET)
    evidence = evaluate(model, guide, x, 2000, refine=True, **QUIET)
    assert evidence.method == "refined"
    for name in ("elbo", "log_evidence", "ess", "pareto_k", "standard_error"):
        assert torch.equal(getattr(evidence.by_guide, name), getattr(plain, name))
    assert torch.equal(evidence.elbo, plain.elbo)
    assert (evidence.log_evidence - exact).abs().max() < 0.05
    assert 0.9 <= covered(evidence, exact) <= 1
    assert evidence.unreliable == 0
    assert (evidence.evaluations <= 2000).all()
    assert (evidence.modes == 1).all()


def test_a_banana_is_covered():
    model = Banana().double()
    x, guide = made(model, 200)
    exact = exact_log_evidence(model, x).log_evidence
    evidence = evaluate(model, guide, x, 4000, refine=True, **QUIET)
    assert covered(evidence, exact) >= 0.9
    assert abs(float((evidence.log_evidence - exact).mean())) < 0.01


def test_a_chain_of_many_states_is_exact_within_its_errors():
    """Smooth directions of a chain have a larger prior width than any of its states."""
    torch.manual_seed(0)
    model = LinearGaussianSSM(features=2, latent=2, steps=60).double()
    with torch.no_grad():
        model.transition.copy_(torch.tensor([[0.95, 0.2], [-0.2, 0.95]]))
        model.transition_log_scale.fill_(-1.5)
        model.log_noise.fill_(1.0)
        x = simulate(model, 24)[1]
        exact = model.log_evidence(x)
    guide = amortize(model, recurrent(2, 4, output="flat"), MeanField, 240).double()
    evidence = evaluate(model, guide, x, 64, refine=2000, **QUIET)
    assert evidence.method == "refined"
    assert evidence.unreliable == 0
    assert evidence.standard_error.max() < 0.1
    assert covered(evidence, exact) >= 0.85


def test_guides_with_a_value_for_each_datum_give_starts():
    torch.manual_seed(0)
    model = PPCA(6, latent=2).double()
    x = simulate(model, 150)[1]
    exact = model.log_evidence(x)
    loc = torch.zeros(150, 2, dtype=torch.float64)

    def own(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0).to_event(1))

    for guide in (AutoNormal(model), own):
        guide(x)
        evidence = evaluate(model, guide, x, 100, refine=1500, **QUIET)
        assert evidence.method == "refined"
        assert covered(evidence, exact) >= 0.88
        assert (evidence.log_evidence - exact).abs().max() < 0.1

    def of_these(x):
        with pyro.plate("data", 150):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ x.new_ones(2, 6), 1.0).to_event(1), obs=x)

    guide = AutoNormal(of_these)
    guide(x)
    assert "all data only" in evaluate(of_these, guide, x, 300, **QUIET).method


def test_a_hierarchy_is_measured_without_its_funnel():
    """Values that depend nonlinearly on another one, against a grid over it; they are integrated out exactly."""
    bend, turn = torch.tensor([2.0, 1.5, 1.0, 2.0]).double(), torch.tensor([0.0, 1.0, 2.0, 3.0]).double()

    def below(top):
        return bend * torch.sin(2 * top.unsqueeze(-1) + turn), (1.5 * top.unsqueeze(-1) - 3).exp().expand(*top.shape, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_tensor(0.0), 1.0))
            low = pyro.sample("low", dist.Normal(*below(top)).to_event(1))
            pyro.sample("x", dist.Normal(low, 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_tensor(0.0), 1.0).expand([len(x)]))
            pyro.sample("low", dist.Normal(below(top)[0], 0.3).to_event(1))

    torch.manual_seed(0)
    low = dist.Normal(*below(torch.randn(60, dtype=torch.float64))).sample()
    x = low + 0.7 * torch.randn_like(low)
    top = torch.linspace(-7, 7, 20_001, dtype=torch.float64)
    loc, scale = below(top)
    log_p = dist.Normal(loc, scale.square().add(0.49).sqrt()).log_prob(x.unsqueeze(1)).sum(-1)
    exact = (log_p + dist.Normal(0.0, 1.0).log_prob(top)).logsumexp(-1) + math.log(14 / 20_000)
    evidence = evaluate(model, guide, x, 100, refine=3000, **QUIET)
    assert evidence.method == "refined"
    assert evidence.unreliable <= 0.1
    assert covered(evidence, exact) >= 0.85
    assert abs(float((evidence.log_evidence - exact).mean())) < 0.02


def test_the_mode_that_the_guide_never_draws_is_found():
    """|z| observed: two modes; a guide on one of them misses log 2 without any sign of it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.01, 0.0995))

    x = torch.linspace(0.6, 2.0, 60, dtype=torch.float64)
    z = torch.linspace(-6, 6, 200_001, dtype=torch.float64)[:, None]
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.abs(), 0.1).log_prob(x)
    exact = log_p.logsumexp(0) + math.log(12 / 200_000)
    evidence = evaluate(model, guide, x, 2000, refine=True, **QUIET)
    assert evidence.by_guide.unreliable == 0
    assert ((exact - evidence.by_guide.log_evidence) - math.log(2)).abs().max() < 0.02
    assert ((evidence.log_evidence - exact).abs() < 0.1).double().mean() >= 0.95
    assert (evidence.modes == 2).double().mean() >= 0.95


def test_a_ring_of_one_dimension_holds_two_modes():
    model = Ring(noise=0.1, latent=1).double()
    x, guide = made(model, 100)
    fit(model, guide, x, epochs=30, **QUIET)
    x = x[x.flatten() > 0.4]
    exact = exact_log_evidence(model, x).log_evidence
    evidence = evaluate(model, guide, x, 3000, refine=True, **QUIET)
    assert ((evidence.log_evidence - exact).abs() < 0.1).double().mean() >= 0.95


def test_positive_latents_and_two_sites():
    """Counts of a Gamma rate, scaled by a separate log-normal: the rate is integrated out analytically."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.5))
            pyro.sample("x", dist.Poisson(rate * scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.5))
            pyro.sample("rate", dist.Gamma(x + 2.0, 2.0))

    x = torch.arange(30, dtype=torch.float64)
    u = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    scale = (u / 2).exp()  # [S, 1]
    odds = scale / (1 + scale)
    log_p = dist.NegativeBinomial(2.0, probs=odds).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(u)
    exact = log_p.logsumexp(0) + math.log(16 / 20_000)
    evidence = evaluate(model, guide, x, 2000, refine=True, **QUIET)
    assert evidence.method == "refined"
    assert (evidence.log_evidence - exact).abs().max() < 0.05
    assert covered(evidence, exact) >= 0.85


def test_a_guide_whose_log_q_is_unknown_is_left_out_of_the_mixture():
    model = PPCA(6, latent=2).double()
    torch.manual_seed(1)
    x = simulate(model, 40)[1]
    guide = amortize(model, mlp(6, [16]), Sylvester, context=16).double()
    evidence = evaluate(model, guide, x, 1500, refine=True, **QUIET)
    exact = exact_log_evidence(model, x).log_evidence
    assert evidence.method == "refined"
    assert covered(evidence, exact) >= 0.85
    assert (evidence.log_evidence - exact).abs().max() < 0.1


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0, 0.0), (0.3, 0.3, 0.2, 0.2)])
def test_the_mixture_is_a_density(shares):
    """For a target equal to the prior the weights average to one, the integral of the prior."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0 * x, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(4.0, x.new_zeros(2), 2.0).to_event(1))

    x = torch.zeros(3, dtype=torch.float64)
    torch.manual_seed(0)
    target = Target(model, guide, (x,), 1)
    loc = torch.randn(2, 3, 2, dtype=torch.float64)
    lower = torch.linalg.cholesky(torch.eye(2).double() + 0.5 * torch.ones(2, 2).double()).repeat(2, 3, 1, 1)
    log_weights = torch.tensor([[0.3, 0.6, 1.0], [0.7, 0.4, 0.0]], dtype=torch.float64).log()
    proposal = Proposal(Mode(loc, lower, log_weights), log_weights, shares, 1.1)
    (block,) = target.blocks_of(target.rows)
    found = proposal.log_joint_weights(target, block, 40_000)
    assert len(found) == 40_000
    ratio = (found - dist.Normal(0.0, 1.0).log_prob(x)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / 200).all()


def test_moments_of_strata_do_not_depend_on_the_pieces_they_come_in():
    torch.manual_seed(0)
    counts = [70, 30, 0, 11]
    log_w = 3 * torch.randn(111, 4, dtype=torch.float64) - 700
    log_w[:70, 0] = -math.inf
    log_w[50:, 1] += 30
    means = [part.exp().mean(0) for part in (log_w + 700).split([70, 30, 11])]
    variances = [part.exp().var(0) for part in (log_w + 700).split([70, 30, 11])]
    parts = list(zip((70, 30, 11), means, variances, strict=True))
    mean = sum(k * m for k, m, _ in parts) / 111
    error = sum(k * v for k, _, v in parts).sqrt() / 111 / mean
    for size in (1, 7, 70, 111):
        strata = Strata(counts, log_w)
        for piece in log_w.split(size):
            strata.update(piece)
        found, noise = strata.results()
        torch.testing.assert_close(noise, error, rtol=1e-9, atol=0)
        torch.testing.assert_close(found, mean.log() - 700 + error**2 / 2, rtol=1e-12, atol=0)


def test_draws_in_pieces_are_stratified_as_a_whole():
    """Two distant modes get samples in proportion to their shares, up to one, for any pieces."""
    model = Banana().double()
    x, guide = made(model, 5)
    target = Target(model, guide, (x,), 1)
    (block,) = target.blocks_of(target.rows)
    loc = torch.tensor([-1e6, 1e6], dtype=torch.float64)[:, None, None].expand(2, 5, 2)
    log_weights = torch.tensor([0.3, 0.7], dtype=torch.float64).log()[:, None].expand(2, 5)
    lower = torch.eye(2, dtype=torch.float64).expand(2, 5, 2, 2)
    proposal = Proposal(Mode(loc, lower, log_weights), log_weights, (0.45, 0.55, 0.0, 0.0), 1.1)
    torch.manual_seed(0)
    for most in (0, 64, 7):
        pieces = list(proposal.draw(target, block, [135, 165, 0, 0], most))
        assert max(map(len, pieces)) == (most or 300)
        normal, student = torch.cat(pieces).split([135, 165])
        for u, share in ((normal, 0.3 * 135), (student, 0.3 * 165)):
            assert ((u[..., 0] < 0).sum(0) - share).abs().max() < 1


def test_no_draw_that_chose_the_proposal_makes_the_estimate():
    """Repeated estimates from one proposal average to p(x)."""
    model = Banana().double()
    x, guide = made(model, 20)
    exact = exact_log_evidence(model, x).log_evidence
    target = Target(model, guide, (x,), 1)
    torch.manual_seed(0)
    proposal, _ = propose(target, Plan.of(2000, 2))
    (block,) = target.blocks_of(target.rows)
    ratios = torch.stack([(proposal.log_joint_weights(target, block, 300) - exact).exp().mean(0) for _ in range(200)])
    z = (ratios.mean(0) - 1) / (ratios.std(0) / math.sqrt(200))
    assert z.abs().max() < 4.5
    assert abs(float(z.mean())) < 4 / math.sqrt(20)


@pytest.mark.parametrize("name", ["PPCA", "Banana", "Ring"])
def test_bounds_from_both_sides_of_simulated_data_meet(name):
    """The upper bound of refined proposals is valid, and near the lower bound where that of the guide is far."""
    model, least = {"PPCA": (PPCA(10, latent=3), 0.002), "Banana": (Banana(), 0.02), "Ring": (Ring(), 0.1)}[name]
    model = model.double()
    guide = made(model, 10)[1]
    both = sandwich(model, guide, n=300, particles=1500, temperatures=5, chains=2, pilot=2, **QUIET)
    assert both.contradictions() == []
    s = both.summary()
    assert -0.001 < s["refined"]["width"] < least < s["weighted"]["width"]
    excess = both.refined.upper - both.exact
    assert float(excess.mean()) > -4 * float(excess.std()) / math.sqrt(300)
    assert float((both.refined.lower - both.exact).mean()) < 4 * float(both.refined.lower_error.norm()) / 300
    assert "refined, own proposals" in str(both)


def test_what_cannot_be_refined_says_why():
    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.warns(UserWarning, match="estimated from the guide's samples only: the model has no continuous"):
        evidence = evaluate(discrete, guide, torch.randn(5), 300, refine=True, **QUIET)
    assert evidence.by_guide is None
    assert "no continuous latent" in evidence.method
    assert "not refined" in str(evidence)

    model = PPCA(6, latent=5)
    with pytest.warns(UserWarning, match="needs? a budget of"):
        evaluate(model, amortize(model, mlp(6, [8]), context=8), torch.randn(5, 6), 50, refine=True, **QUIET)


def test_a_global_latent_is_one_datum():
    """Bayesian regression: log p(y) is Gaussian; an untrained AutoGuide is hundreds of nats low."""
    torch.manual_seed(0)
    x = torch.randn(60, 3, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.5 * torch.randn(60).double()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.5), obs=y)

    exact = dist.MultivariateNormal(y.new_zeros(60), x @ x.T + 0.25 * torch.eye(60).double()).log_prob(y)
    for guide in (AutoNormal(model), AutoMultivariateNormal(model)):
        evidence = evaluate(model, guide, (x, y), 1500, **QUIET)
        assert evidence.joint
        assert evidence.method == "refined"
        assert float((exact - evidence.by_guide.log_evidence).abs()) > 20
        assert float((exact - evidence.log_evidence).abs()) < 4 * float(evidence.standard_error) < 0.1


def test_states_of_discrete_sites_are_summed_out():
    """A mixture of Gaussians with its component as a latent site: log p(x) is the mixture's density."""
    share = torch.tensor([0.5, 0.3, 0.2]).double()
    means = torch.tensor([[3.0, 0.0], [-2.0, 2.0], [0.0, -3.0]]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(share))
            z = pyro.sample("z", dist.Normal(means[c], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3).double()))
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    torch.manual_seed(0)
    x = 2 * torch.randn(100, 2, dtype=torch.float64)
    exact = (share.log() + dist.Normal(means, math.sqrt(1.25)).to_event(1).log_prob(x[:, None])).logsumexp(1)
    evidence = evaluate(model, guide, x, 3000, **QUIET)
    assert evidence.method == "refined"
    assert (evidence.evaluations <= 3000).all()
    assert covered(evidence, exact) >= 0.88
    assert (evidence.log_evidence - exact).abs().max() < 0.1
    assert (evidence.log_evidence - exact).abs().mean() < 0.5 * (evidence.by_guide.log_evidence - exact).abs().mean()


def two_modes(latent, share, n):
    """A prior of two Gaussians six standard deviations apart, a guide on one of them; data, and their exact values."""
    loc = torch.zeros(2, latent).double()
    loc[:, 0] = torch.tensor([-3.0, 3.0])
    weights = torch.tensor([1 - share, share]).double()

    def model(x):
        prior = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.1 * z[..., 1], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[0], 1.0).to_event(1))

    torch.manual_seed(0)
    x = torch.randn(n, dtype=torch.float64)
    return model, guide, x, dist.Normal(0.0, math.sqrt(1.01)).log_prob(x)


@pytest.mark.parametrize(("latent", "share"), [(2, 0.5), (2, 0.1), (10, 0.5), (10, 0.1)])
def test_the_second_of_two_modes_is_found(latent, share):
    model, guide, x, exact = two_modes(latent, share, 60)
    evidence = evaluate(model, guide, x, 2500, **QUIET)
    found = evidence.log_evidence - exact > math.log(1 - share) / 2
    assert found.double().mean() >= 0.95
    assert covered(evidence, exact) >= 0.85


def test_chains_from_the_prior_bear_witness_of_a_mode_that_the_search_missed(monkeypatch):
    model, guide, x, exact = two_modes(20, 0.5, 40)
    evidence = evaluate(model, guide, x, 5000, **QUIET)
    found = evidence.log_evidence - exact > -math.log(2) / 2
    assert (found | evidence.missed).double().mean() >= 0.95
    monkeypatch.setattr("jensen.inference.measure.proposals._MODES", 1)
    evidence = evaluate(model, guide, x, 5000, **QUIET)
    found = evidence.log_evidence - exact > -math.log(2) / 2
    assert found.double().mean() < 0.5
    assert evidence.missed[~found].double().mean() >= 0.8
    assert "modes missed" in str(evidence)


def test_a_result_is_saved_and_printed():
    model = PPCA(6, latent=2)
    x = torch.randn(7, 6)
    evidence = evaluate(model, amortize(model, mlp(6, [8]), context=8), x, 500, refine=True, **QUIET)
    again = Evidence.from_json(evidence.to_json())
    assert torch.equal(again.by_guide.log_evidence, evidence.by_guide.log_evidence)
    assert torch.equal(again.evaluations, evidence.evaluations)
    text = str(evidence)
    assert "log p(x), refined" in text
    assert "guide samples only, K = 500" in text
    assert evidence.summary()["log_evidence_by_guide"] == pytest.approx(float(evidence.by_guide.log_evidence.mean()))
    assert {"modes", "evaluations"} <= set(evidence.to_frame().columns)
    assert evidence.gap.equal(evidence.best - evidence.by_guide.elbo)
