"""The measurement: exact streaming, correct errors, flags of unreliable estimates."""

import math
import os
import subprocess
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from members import pair
from one_of_each import some_evidence
from pyro import poutine
from torch import nn

from jensen.families import MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import Evidence, bounds, fit, pareto_k
from jensen.inference import evaluate as with_refined
from jensen.inference.measure.diagnostics import RunningWeights, tail_length
from jensen.models import PPCA, LinearGaussianSSM

evaluate = partial(with_refined, refine=False)  # from samples of the guide; refined evidence has its own tests


def _arviz_k(log_w):
    """k-hat of ArviZ's PSIS, which takes minus the log weights."""
    return torch.as_tensor(array_stats.psislw(-log_w.T.numpy())[1])


@pytest.mark.parametrize("particles", [25, 26, 100, 225, 226, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_pareto_k_agrees_with_arviz(particles, scale, float64):
    log_w = scale * torch.randn(particles, 6) - 70
    torch.testing.assert_close(pareto_k(log_w), _arviz_k(log_w), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9, 1.3])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(shape, float64):
    log_w = -shape * torch.rand(20_000, 50).log()
    k = pareto_k(log_w)
    assert abs(k.mean() - shape) < 4 * k.std() / 50**0.5 + 0.02  # the weak prior at 0.5 has a small effect


def test_constant_weights_are_reliable(float64):
    assert pareto_k(torch.full((1000, 3), -70.0)).tolist() == [0, 0, 0]
    rounding = -70.0 + 1e-14 * torch.randn(1000, 3)
    assert (pareto_k(rounding) == 0).all()
    assert (pareto_k((-70.0 + 1e-5 * torch.randn(1000, 3)).float()) == 0).all()


def test_discrete_weights_have_a_finite_k(float64):
    """Ties at the threshold of the tail: a latent with few states."""
    log_w = torch.randint(0, 3, (1000, 3)).double() * torch.tensor([0.0, 1.0, 5.0])
    log_w[:20] += 1.0
    assert pareto_k(log_w).isfinite().all()


def test_too_few_particles_have_no_k():
    assert tail_length(24) == 0
    assert pareto_k(torch.randn(24, 2)).isnan().all()
    assert tail_length(25) == 5


@pytest.mark.parametrize("blocks", [[1000], [1, 999], [333, 333, 334], [7] * 142 + [6], [1] * 1000])
def test_streaming_equals_the_formulas_on_all_weights_at_once(blocks, float64):
    log_w = 3 * torch.randn(1000, 4) - 500
    running = RunningWeights(1000)
    for block in log_w.split(blocks):
        running.update(block)
    w = (log_w + 500).exp()
    torch.testing.assert_close(running.elbo, log_w.mean(0))
    torch.testing.assert_close(running.elbo_error, log_w.std(0) / math.sqrt(1000))
    torch.testing.assert_close(running.log_evidence, log_w.logsumexp(0) - math.log(1000))
    torch.testing.assert_close(running.standard_error, w.std(0) / w.mean(0) / math.sqrt(1000))
    torch.testing.assert_close(running.ess, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(running.pareto_k, pareto_k(log_w))


def test_weights_of_zero_are_weights_of_zero(float64):
    log_w = torch.randn(100, 2)
    log_w[:60, 0] = -math.inf
    running = RunningWeights(100)
    for block in log_w.split(30):
        running.update(block)
    torch.testing.assert_close(running.log_evidence, log_w.logsumexp(0) - math.log(100))
    assert running.elbo[0] == -math.inf
    assert running.elbo[1].isfinite()


class Counting(nn.Module):
    """A decoder that counts its decoded rows under particles; checks run without particles."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, z):
        self.rows += z.shape[:-1].numel() if z.dim() == 3 else 0
        return self.inner(z)


@pytest.mark.parametrize("particles", [2, 63, 64, 65, 1000])
@pytest.mark.parametrize("chunk_size", [50, 333, 4096])
def test_exactly_k_particles_are_drawn(particles, chunk_size):
    model, guide, x = pair("VAE, shared scale", "MeanField")
    model.decoder = Counting(model.decoder)
    evidence = evaluate(model, guide, x, particles, chunk_size=chunk_size, compile=False, progress=False)
    assert evidence.particles == particles
    assert model.decoder.rows == particles * len(x)


def test_a_seed_repeats_the_measurement_and_leaves_the_stream_alone():
    model, guide, x = pair("VAE, shared scale", "MeanField")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = evaluate(model, guide, x, 100, seed=3, progress=False)
    assert torch.equal(torch.rand(1), expected)
    two = evaluate(model, guide, x, 100, seed=3, progress=False)
    assert torch.equal(one.log_evidence, two.log_evidence)
    assert not torch.equal(one.log_evidence, evaluate(model, guide, x, 100, seed=4, progress=False).log_evidence)


def test_one_particle_is_enough_with_the_exact_posterior(digits):
    model = PPCA(64, 8).double().fit_closed_form(digits.train).rotated(seed=0)
    evidence = evaluate(model, ExactPosterior(model), digits.test, particles=1, progress=False)
    assert (evidence.log_evidence - evidence.exact).abs().max() < 1e-10
    assert (evidence.gap.abs() < 1e-10).all()
    assert evidence.standard_error.isnan().all()
    assert evidence.summary()["unreliable"] is None
    assert "log p(x), exact" in str(evidence)


@pytest.mark.slow
def test_elbo_error_is_the_spread_of_the_elbo():
    """Over 400 repeats the spread of the mean log weight matches its error, around one value."""
    model, guide, x = pair("PPCA", "MeanField")
    runs = [evaluate(model, guide, x[:1], 50, seed=s, progress=False) for s in range(400)]
    elbos = torch.stack([r.elbo for r in runs]).squeeze()
    errors = torch.stack([r.elbo_error for r in runs]).squeeze()
    ratio = elbos.std() / errors.square().mean().sqrt()
    assert abs(ratio - 1) < 4 / math.sqrt(2 * 400)


@pytest.fixture(scope="module")
def rotated_with_mean_field(digits):
    """PPCA on digits, D = 8, rotated, and a mean-field guide trained on it."""
    torch.manual_seed(0)
    model = PPCA(64, 8).double().fit_closed_form(digits.train).rotated(seed=0)
    guide = amortize(model, nn.Identity(), MeanField, context=64).double()
    schedule = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    fit(
        model,
        guide,
        digits.train,
        epochs=800,
        batch_size=300,
        lr=5e-2,
        scheduler=schedule,
        freeze=model,
        seed=0,
        progress=False,
    )
    return model, guide


def test_the_monte_carlo_error_is_honest(digits, rotated_with_mean_field):
    model, guide = rotated_with_mean_field
    x = torch.cat([digits.validation, digits.test])
    evidence = evaluate(model, guide, x, particles=4000, seed=1, progress=False)
    assert evidence.gap.mean() >= 0.3
    reliable = evidence.pareto_k < 0.7
    assert reliable.double().mean() >= 0.8
    inside = (evidence.log_evidence - evidence.exact).abs() <= 2 * evidence.standard_error
    assert 0.88 <= inside[reliable].double().mean() <= 0.99


def test_bounds_rise_to_the_exact_value(digits, rotated_with_mean_field):
    model, guide = rotated_with_mean_field
    b = bounds(model, guide, digits.test[:100], particles=1024, seed=0, progress=False)
    assert (b.mean.diff() > 0).all()
    assert b.mean[0] < b.exact - 0.3
    assert abs(b.mean[-1] - b.exact) < 4 * b.error[-1] + 0.02
    elbo = evaluate(model, guide, digits.test[:100], particles=1024, seed=7, progress=False)
    error = math.hypot(b.error[0], float(elbo.elbo_error.square().sum().sqrt()) / 100)
    assert abs(b.mean[0] - elbo.elbo.mean()) < 4 * error


@pytest.mark.slow
def test_the_error_of_the_bounds_is_their_spread_over_repeats():
    model, guide, x = pair("VAE, shared scale", "MeanField")
    runs = [bounds(model, guide, x, particles=16, seed=s, progress=False) for s in range(300)]
    spread = torch.stack([b.mean for b in runs]).std(0)
    error = torch.stack([b.error for b in runs]).square().mean(0).sqrt()
    assert ((spread[:-1] / error[:-1] - 1).abs() < 4 / math.sqrt(2 * 300)).all()
    assert abs(spread[-1] / error[-1] - 1) < 0.25  # one block: the delta method, at 16 particles
    assert bounds(model, guide, x, particles=1, progress=False).error.isnan().all()


def test_weights_that_underflow_are_the_worst_not_the_best(float64):
    """One weight dominates: a tail of thousands of nats."""
    assert pareto_k(1e4 * torch.randn(5000, 3)).tolist() == [math.inf] * 3
    few = torch.full((5000, 1), -math.inf)
    few[:3] = torch.randn(3, 1)
    assert pareto_k(few).tolist() == [math.inf]
    assert pareto_k(torch.full((5000, 1), -math.inf)).isnan().all()
    bounded = torch.zeros(1000, 1)
    bounded[:3] = math.log(1.1)
    assert pareto_k(bounded).tolist() == [0]


def test_weights_of_plus_infinity_are_refused(float64):
    running = RunningWeights(100)
    log_w = torch.randn(100, 3)
    log_w[7, 1] = math.inf
    with pytest.raises(FloatingPointError, match=r"of 1 data points of this batch are NaN or .*, the first at row 1"):
        running.update(log_w)


def test_the_prior_fails_and_the_flags_say_so(digits):
    model = PPCA(64, 8).double().fit_closed_form(digits.train)
    evidence = evaluate(model, PriorGuide(model), digits.test[:50], particles=1000, seed=0, progress=False)
    assert evidence.summary()["unreliable"] > 0.95
    assert evidence.ess.mean() < 5


def test_evaluation_leaves_modes_and_gradients_alone():
    model, guide, x = pair("VAE, shared scale", "MeanField")
    guide.eval()
    evaluate(model, guide, x, 10, progress=False)
    assert model.training
    assert not guide.training
    assert all(p.grad is None for p in model.parameters())


def test_bits_per_dimension():
    model, guide, x = pair("PPCA", "MeanField")
    evidence = evaluate(model, guide, x, 10, progress=False)
    nats = evidence.exact.mean().item()
    assert evidence.bits_per_dimension(offset=math.log2(17)) == pytest.approx(-nats / (5 * math.log(2)) + math.log2(17))


def test_results_print_and_convert():
    model, guide, x = pair("PPCA", "MeanField")
    evidence = evaluate(model, guide, x, 100, seed=0, progress=False)
    text = str(evidence)
    assert text.startswith("7 data points, 100 particles each, nats per data point")
    assert f"{evidence.elbo.mean():.2f}" in text
    assert "-0.000" not in text
    stored = evidence.to_dict()
    assert stored["per_datum"]["elbo"] == evidence.elbo.tolist()
    assert stored["summary"]["gap"] == pytest.approx((evidence.exact - evidence.elbo).mean().item())


_PEAK = """
import sys, torch
from jensen.families import Bernoulli, MeanField
from jensen.guides import amortize
from jensen.inference import evaluate
from jensen.models import VAE
from jensen.networks import mlp
torch.manual_seed(0)
model = VAE(mlp(50, [200, 200]), Bernoulli(784, 200), 50)
guide = amortize(model, mlp(784, [200, 200]), MeanField, context=200)
x = (torch.rand(16, 784) > 0.5).float()
particles, compiled = int(sys.argv[1]), sys.argv[2] == "True"
evaluate(model, guide, x, particles if compiled else 200, compile=compiled, progress=False)  # loads, and compiles
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts anew at what is resident now
before = status("VmRSS")
evaluate(model, guide, x, particles, refine=False, compile=compiled, progress=False)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells the peak of a span: /proc")
def test_memory_does_not_grow_with_the_particles(compile):
    # glibc returns freed memory at once; otherwise memory differs by a quarter between runs
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

    def peak(particles):
        command = [sys.executable, "-c", _PEAK, str(particles), str(compile)]
        return int(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)

    few, many = peak(4_000), peak(100_000)  # both in blocks of 160
    print(f"memory above the loaded process: K = 4,000: {few} KiB, K = 100,000: {many} KiB")
    assert many <= 1.25 * few  # storing all weights would take half as much again


def _held(n, **plate):
    """A model with n numbers, and its posterior."""
    x = torch.linspace(-2, 2, n)

    def model():
        with pyro.plate("data", n, **plate) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide():
        with pyro.plate("data", n, **plate) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    return model, guide, dist.Normal(0.0, 2**0.5).log_prob(x).double()


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 7}, {"compile": True}, {"max_plate_nesting": 3}])
def test_a_pair_that_holds_its_data_is_measured_per_datum_of_its_plate(settings):
    model, guide, log_p = _held(30)
    evidence = evaluate(model, guide, (), 50, seed=0, progress=False, **settings)
    assert not evidence.joint
    assert evidence.features == 1
    torch.testing.assert_close(evidence.elbo, log_p, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(evidence.log_evidence, log_p, atol=1e-5, rtol=1e-5)


def test_a_pair_that_holds_its_data_reaches_a_tolerance_for_all_of_them():
    model, _, log_p = _held(30)

    def prior():
        with pyro.plate("data", 30):
            pyro.sample("z", dist.Normal(0.0, 1.2))

    evidence = evaluate(model, prior, (), tolerance=0.02, seed=0, progress=False)
    assert bool(evidence.converged.all())
    assert ((evidence.log_evidence - log_p).abs() < 5 * evidence.standard_error).all()


def test_a_pair_that_holds_its_data_and_takes_some_at_random_is_refused():
    model, guide, _ = _held(30, subsample_size=10)
    with pytest.raises(ValueError, match=r"holds 30 data points and takes a random 10 of them in every run"):
        evaluate(model, guide, (), 50, progress=False)


def test_joint_weights_of_a_pair_that_holds_its_data():
    x = torch.linspace(-1, 1, 12).double()

    def model():
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 12):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide():
        pyro.sample("mean", dist.Normal(x.sum() / 13, (1 / 13) ** 0.5))

    evidence = evaluate(model, guide, (), 50, progress=False)
    covariance = torch.eye(12).double() + 1
    exact = dist.MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(x)
    assert evidence.joint
    assert evidence.features == 12
    torch.testing.assert_close(evidence.elbo, exact.unsqueeze(0))
    assert evidence.bits_per_dimension() == pytest.approx(-exact.item() / (12 * math.log(2)))


def test_there_is_nothing_to_transform_without_data():
    model, guide, _ = _held(30)
    with pytest.raises(ValueError, match=r"batch_transform is applied to the first tensor of the data, but data is"):
        evaluate(model, guide, (), 50, batch_transform=torch.bernoulli, progress=False)


def test_room_for_plates_is_at_least_what_they_take():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"max_plate_nesting=0, but the plates of model and guide take 1 dimensions"):
        evaluate(model, guide, x, 10, max_plate_nesting=0, progress=False)
    wide = evaluate(model, guide, x, 10, max_plate_nesting=3, seed=0, progress=False)
    torch.testing.assert_close(wide.elbo, evaluate(model, guide, x, 10, seed=0, progress=False).elbo)


@pytest.mark.parametrize("style", ["handler", "distribution", "event"])
def test_bits_are_of_numbers_that_were_observed(style, float64):
    """Three of six numbers are under a mask, in each of the ways to write one; the guide is the exact posterior."""
    x = torch.randn(50, 6)
    mask = torch.tensor([True, False, True, False, True, False]).expand(50, 6)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if style == "handler":
                for d in range(6):
                    with poutine.mask(mask=mask[:, d]):
                        pyro.sample(f"x_{d}", dist.Normal(z, 1.0), obs=x[:, d])
            elif style == "distribution":
                pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 6), 1.0).mask(mask).to_event(1), obs=x)
            else:  # rows of two numbers
                loc = z[..., None, None].expand(*z.shape, 3, 2)
                rows = dist.Normal(loc, 1.0).to_event(1).mask(mask[:, :3]).to_event(1)
                pyro.sample("x", rows, obs=x.unflatten(-1, (3, 2)))

    seen = x[:, ::2] if style != "event" else x[:, [0, 1, 4, 5]]
    k = seen.shape[1]

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(seen.sum(-1) / (k + 1), (k + 1) ** -0.5))

    evidence = evaluate(model, guide, x, 50, seed=0, progress=False, compile=False)
    covariance = torch.eye(k) + torch.ones(k, k)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(k), covariance).log_prob(seen)
    assert evidence.features == k
    assert evidence.bits_per_dimension() == pytest.approx(-float(log_p.sum()) / (50 * k) / math.log(2))


def test_bits_of_sequences_are_per_number_up_to_their_lengths(float64):
    model = LinearGaussianSSM(2, 1, 10)
    lengths = torch.randint(1, 11, (300,))
    with torch.no_grad():
        x = model(None, lengths, n=300)
    evidence = evaluate(model, ExactPosterior(model), (x, lengths), 20, chunk_size=1000, seed=0, progress=False)
    total = 2 * int(lengths.sum())
    assert evidence.features == pytest.approx(total / 300)
    assert evidence.bits_per_dimension() == pytest.approx(-float(evidence.exact.sum()) / total / math.log(2))
    assert Evidence.from_json(evidence.to_json()).features == evidence.features


def test_an_exact_value_below_the_weights_is_doubted(float64):
    """Mass found by importance weighting but not by the exact column, such as a peak missed by quadrature."""
    model = Understated(5, 2)
    x = model(n=30).detach()
    with pytest.warns(UserWarning, match=r"is 0\.4\d* nats above the exact log p\(x\)"):
        evidence = evaluate(model, PriorGuide(model), x, 5000, seed=0, progress=False)
    assert evidence.exact is None and "exact log p(x) omitted" in str(evidence)
    assert evidence.doubt.startswith("the weights are 0.4") and evidence.doubt in str(evidence)
    assert torch.equal(evidence.best, evidence.log_evidence)
    assert evidence.summary()["exact"] is None
    again = Evidence.from_json(evidence.to_json())
    assert again.doubt == evidence.doubt and again.exact is None


def test_one_datum_whose_exact_value_is_too_low_is_enough_to_leave_the_column_out(float64):
    model = OneTooLow(5, 2)
    x = model(n=30).detach()
    with pytest.warns(UserWarning, match=r"is 0\.\d* nats above the exact log p\(x\) at row 7"):
        evidence = evaluate(model, ExactPosterior(model), x, 50, seed=0, progress=False)
    assert evidence.exact is None and evidence.doubt.endswith("above it at row 7")


class OneTooLow(PPCA):
    def log_evidence(self, x):
        return super().log_evidence(x) - 0.02 * (torch.arange(len(x)) == 7)


class Understated(PPCA):
    def log_evidence(self, x):
        return super().log_evidence(x) - 0.41


def test_one_draw_tells_no_gap(float64):
    model = PPCA(5, 2)
    x = torch.randn(20, 5)
    alone = evaluate(model.forward, PriorGuide(model), x, particles=1, seed=0, progress=False)
    assert alone.exact is None and bool(alone.gap.isnan().all())
    assert next(line for line in str(alone).splitlines() if line.startswith("gap")).split()[6:] == ["-", "-"]
    assert bool((evaluate(model.forward, PriorGuide(model), x, particles=2, seed=0, progress=False).gap > 0).all())
    known = evaluate(model, PriorGuide(model), x, particles=1, seed=0, progress=False)
    torch.testing.assert_close(known.gap, model.log_evidence(x) - known.elbo)


def test_an_estimate_below_the_elbo_and_a_high_k_hat_of_joint_weights_are_said_in_the_table():
    evidence = some_evidence(
        1,
        joint=True,
        pareto_k=torch.tensor([2.65]).double(),
        elbo=torch.tensor([-3.0]).double(),
        elbo_error=torch.zeros(1),
    )  # log p(x) is -5 +- 0.1
    assert evidence.too_low == "by 2.00 nats in total, which is impossible: the estimate of log p(x) is too low"
    assert "below the ELBO" in str(evidence)
    assert "2.65, above 0.7: log p(x) is unreliable; use more evaluations, such as particles=20_000" in str(evidence)
    assert "below the ELBO" not in str(some_evidence(4))
    assert not some_evidence(1, elbo=torch.tensor([-4.8]).double(), elbo_error=torch.zeros(1)).too_low  # two errors
