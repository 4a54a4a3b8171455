"""Bias of log p(x): the corrections against brute force, ArviZ and known results; zero weights are counted."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from members import pair

from jensen.guides import ExactPosterior
from jensen.inference import evaluate as with_refined
from jensen.inference.measure.diagnostics import CORRECTIONS, RunningWeights
from jensen.models import PPCA

evaluate = partial(with_refined, refine=False)  # from samples of the guide; refined evidence has its own tests


def _streamed(log_w, block=37):
    running = RunningWeights(len(log_w))
    for part in log_w.split(block):
        running.update(part)
    return running


def _left_out(log_w):
    """Log mean weight with each one left out: [K, N]."""
    rows = [torch.cat([log_w[:j], log_w[j + 1 :]]).logsumexp(0) for j in range(len(log_w))]
    return torch.stack(rows) - math.log(len(log_w) - 1)


@pytest.mark.parametrize("particles", [2, 3, 10, 32, 33, 34, 100, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
def test_the_streamed_jackknife_is_that_of_brute_force(particles, scale, float64):
    log_w = scale * torch.randn(particles, 4) - 700
    value, error = _streamed(log_w).jackknife
    left_out = _left_out(log_w)
    plain = log_w.logsumexp(0) - math.log(particles)
    torch.testing.assert_close(value, particles * plain - (particles - 1) * left_out.mean(0), rtol=0, atol=1e-8)
    expected = ((particles - 1) / particles * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-8)


def test_a_weight_that_is_all_has_a_finite_jackknife(float64):
    log_w = torch.randn(100, 2)
    log_w[3, 0] += 60.0  # the others are below the precision of the sum
    log_w[0, 1] += 900.0  # and here they vanish completely
    value, _ = _streamed(log_w).jackknife
    expected = 100 * (log_w.logsumexp(0) - math.log(100)) - 99 * _left_out(log_w).mean(0)
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0)  # the sum of the others loses all digits


def test_the_jackknife_is_the_same_however_many_weights_are_kept(float64):
    log_w = 2 * torch.randn(200, 3)
    long = RunningWeights(100_000)
    long.update(log_w)
    for mine, other in zip(long.jackknife, _streamed(log_w).jackknife, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("particles", [25, 100, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 12.0, 40.0])
def test_smoothed_weights_are_those_of_arviz(particles, scale, float64):
    log_w = scale * torch.randn(particles, 5) - 70
    value, error = _streamed(log_w).smoothed
    for n in range(5):
        normalised = torch.as_tensor(array_stats.psislw(-log_w[:, n].numpy())[0])
        least = log_w[:, n].argmin()  # not of the tail: what was subtracted is the log of the sum
        assert value[n].item() == pytest.approx((log_w[least, n] - normalised[least]).item() - math.log(particles))
        w = normalised.exp() * particles
        assert error[n].item() == pytest.approx((w.std() / math.sqrt(particles)).item(), rel=1e-6)


def test_weights_without_a_tail_are_not_smoothed(float64):
    constant = torch.full((100, 1), -70.0)
    few = torch.full((1000, 1), -math.inf)
    few[:3] = torch.randn(3, 1)
    for log_w in (constant, few):
        running = _streamed(log_w)
        torch.testing.assert_close(running.smoothed[0], running.log_evidence)
    assert _streamed(torch.randn(24, 2)).smoothed[0].isnan().all()


def test_the_delta_correction_is_its_formula_and_its_error_the_spread(float64):
    log_w = torch.randn(50, 20_000)
    running = _streamed(log_w)
    value, error = running.delta
    w = log_w.exp()
    torch.testing.assert_close(value, running.log_evidence + w.var(0) / (2 * 50 * w.mean(0) ** 2))
    torch.testing.assert_close(error.square().mean().sqrt(), value.std(), rtol=0.1, atol=0)  # K is only 50


def test_one_particle_has_no_correction():
    running = _streamed(torch.zeros(1, 3))
    assert all(part.isnan().all() for name in CORRECTIONS for part in getattr(running, name))


def test_corrections_cut_the_bias_of_100_log_normal_weights(float64):
    """Log w is N(-1/2, 1), so the mean weight is 1: 200,000 repeats of IW-100."""
    found = {"plain": [], "delta": [], "jackknife": []}
    for _ in range(10):
        running = RunningWeights(100)
        running.update(torch.randn(100, 20_000) - 0.5)
        found["plain"].append(running.log_evidence)
        found["delta"].append(running.delta[0])
        found["jackknife"].append(running.jackknife[0])
    _cut_threefold({name: torch.cat(parts) for name, parts in found.items()})


def test_smoothing_trades_bias_for_variance(float64):
    """Log w is N(-2, 4), so the mean weight is 1: 6,000 repeats of K = 1000."""
    plain, smoothed = [], []
    for _ in range(6):
        running = RunningWeights(1000)
        running.update(2 * torch.randn(1000, 1000) - 2)
        plain.append(running.log_evidence)
        smoothed.append(running.smoothed[0])
    a, b = torch.cat(plain), torch.cat(smoothed)
    assert b.mean() < 2 * a.mean() < 0
    assert b.std() < 0.9 * a.std()


def test_a_weight_that_is_nearly_all_has_a_smoothed_mean(float64):
    """One weight is e^40 times the next: after it is smoothed, the rest of the sum is below its precision."""
    log_w = torch.randn(50, 300) - 5000
    log_w[7] += 40 + 20 * torch.rand(300)
    value, error = _streamed(log_w, 13).smoothed
    assert value.isfinite().all() and error.isfinite().all()
    rest = log_w.sort(0).values[:40].logsumexp(0) - math.log(50)  # 10 of 50 are the tail
    assert (value > rest).all() and (value <= log_w.amax(0)).all()
    whole = RunningWeights(5000)  # another number of weights kept, and one block
    whole.update(log_w)
    for mine, other in zip((value, error), whole.smoothed, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def _cut_threefold(found):
    bias = {name: values.mean().item() for name, values in found.items()}
    error = {name: values.std().item() / math.sqrt(len(values)) for name, values in found.items()}
    print({name: f"{bias[name]:.5f} ± {error[name]:.5f}" for name in found})
    assert bias["plain"] < 0
    assert max(error.values()) < abs(bias["plain"]) / 10
    for name in ("delta", "jackknife"):
        assert abs(bias[name]) < abs(bias["plain"]) / 3


def _wide(model, scale):
    """The exact posterior of PPCA, widened by a factor: bounded weights."""

    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=scale * posterior.scale_tril))

    return guide


def test_corrections_cut_the_bias_of_100_weights_of_a_pair(float64):
    model = PPCA(6, 4)
    x = model(n=1).detach().expand(20_000, 6)
    evidence = evaluate(model, _wide(model, 2.0), x, 100, seed=0, chunk_size=100_000, progress=False)
    values = {"plain": evidence.log_evidence, **evidence.corrected}
    _cut_threefold({name: v - evidence.exact for name, v in values.items() if name != "smoothed"})


def test_the_report_has_a_row_for_each_correction():
    model, guide, x = pair("PPCA", "MeanField")
    evidence = evaluate(model, guide, x, 200, seed=0, progress=False)
    text, stored = str(evidence), evidence.to_dict()
    for name, label in (("delta", "delta-corrected"), ("jackknife", "jackknifed"), ("smoothed", "Pareto-smoothed")):
        (row,) = [line for line in text.splitlines() if label in line]
        mean, error = evidence.corrected[name].mean(), evidence.corrected_error[name].square().sum().sqrt() / 7
        assert f"{mean:.3f}" in row and f"{error:.3f}" in row
        assert stored["per_datum"][f"log_evidence_{name}"] == evidence.corrected[name].tolist()
        assert stored["summary"][f"log_evidence_{name}_mc_error"] == pytest.approx(error.item())
    assert "weights of zero" not in text
    assert evidence.zero_weights.tolist() == [0] * 7
    assert evidence.spent.tolist() == [200] * 7
    assert evidence.converged is None


def test_draws_without_density_are_counted_and_shown():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("inside", torch.where((z > 0) & (z < 1), 0.0, -math.inf))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.where(x > 0, 0.0, 0.5), torch.where(x > 0, 1.0, 1e-3)))

    x = torch.tensor([1.0, -1.0, 1.0])
    evidence = evaluate(model, guide, x, 1000, seed=0, chunk_size=300, progress=False)
    share = 1.5 - dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item()  # outside of [0, 1]
    spread = math.sqrt(1000 * share * (1 - share))
    assert evidence.zero_weights[1] == 0
    assert ((evidence.zero_weights[[0, 2]] - 1000 * share).abs() < 4 * spread).all()
    assert evidence.elbo.isneginf().tolist() == [True, False, True]
    expected = dist.Normal(0.0, 1.0).log_prob(x[[0, 2]]).double() + math.log(1 - share)
    assert ((evidence.log_evidence[[0, 2]] - expected).abs() < 4 * evidence.standard_error[[0, 2]]).all()
    total = int(evidence.zero_weights.sum())
    assert evidence.summary()["zero_weights"] == total
    (row,) = [line for line in str(evidence).splitlines() if line.startswith("weights of zero")]
    assert f"{total:,}" in row and "in 2 data" in row


def test_weights_that_are_no_numbers_name_how_many_and_the_row_in_the_users_data():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("bad", torch.where((x > 5) & (z > -9), math.inf, 0.0))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.zeros(200)
    x[[150, 160]] = 6.0
    message = r"of 2 data points of this batch are .*\(0 NaN, 20 infinite, of 10 particles each\), the first at row 150"
    with pytest.raises(FloatingPointError, match=message):
        evaluate(model, guide, x, 10, progress=False)


def test_with_the_exact_posterior_every_estimate_is_exact(float64):
    model = PPCA(5, 2)
    evidence = evaluate(model, ExactPosterior(model), model(n=20).detach(), 100, progress=False)
    for name in CORRECTIONS:
        torch.testing.assert_close(evidence.corrected[name], evidence.exact, rtol=0, atol=1e-10)
        assert (evidence.corrected_error[name] < 1e-6).all()


def test_one_weight_that_is_not_zero_leaves_no_jackknife(float64):
    """Without it there is nothing to take the logarithm of: NaN, and a dash instead of an infinite mean."""
    weights = RunningWeights(100)
    weights.update(torch.cat([torch.full((99, 2), -math.inf), torch.tensor([[1.0, -4.0]])]))
    value, error = weights.jackknife
    assert value.isnan().all()
    assert error.isnan().all()
    assert weights.log_evidence.tolist() == pytest.approx([1.0 - math.log(100), -4.0 - math.log(100)])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(x)), 1.0))
            pyro.factor("hard", torch.where(z < 0.05, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x)), 1.0))

    pyro.set_rng_seed(3)
    found = evaluate(model, guide, torch.zeros(40), particles=50, compile=False, progress=False)
    assert (found.zero_weights == 49).any()
    assert not found.corrected["jackknife"].isposinf().any()
    assert next(line for line in str(found).splitlines() if "jackknifed" in line).split()[1] == "-"
