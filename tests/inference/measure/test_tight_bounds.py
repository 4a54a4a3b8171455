"""A nonlinear model whose log p(x) is known to six digits: bounds on the correct side, intervals around the value."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from jensen.families import Gaussian
from jensen.inference import (
    ais,
    bounds,
    evaluate,
    exact_log_evidence,
    log_joint,
    log_weights,
    pareto_k,
    simulate,
)
from jensen.inference.measure.diagnostics import RunningWeights
from jensen.models import VAE

N = 500
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known():
    """A VAE with a tanh decoder, data and latents drawn from it, a guide far too wide, log p(x) by quadrature."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh())
    vae = VAE(decoder, Gaussian(10, 16, scale=0.5), 2)
    with torch.no_grad():
        decoder[0].weight *= 2.0
        latents, x = simulate(vae, N)
        axis = torch.linspace(-5, 5, 81)
        grid = torch.cartesian_prod(axis, axis)  # [81^2, 2]
        log_p = torch.cat(
            [log_joint(vae, {"z": grid.unsqueeze(1).expand(-1, len(part), -1)}, part) for part in x.split(50)], 1
        )
        weights = log_p.softmax(0)  # [81^2, N]
        mean = weights.T @ grid
        apart = grid.unsqueeze(1) - mean
        covariance = torch.einsum("kn,kni,knj->nij", weights, apart, apart)
        # at least 0.7 in every direction: the tail index is 1 minus this (the prior has 1), so below 0.4
        root = torch.linalg.cholesky(2.0 * covariance + 0.7 * torch.eye(2))
    vae.eval().requires_grad_(False)

    def model(x, mean, root):
        return vae(x)

    def guide(x, mean, root):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=root))

    exact = exact_log_evidence(vae, x, tolerance=1e-6, progress=False)
    assert float(exact.error.max()) <= 1e-6
    yield vae, model, guide, (x, mean, root), latents, exact.log_evidence
    torch.set_default_dtype(before)


def covered(value, error, exact):
    return float(((value - exact).abs() < 1.96 * error).double().mean())


def test_bounds_stand_on_their_sides(known):
    _, model, guide, data, latents, exact = known
    found = bounds(model, guide, data, 256, latents=latents, seed=0, progress=False)
    assert float(exact.mean()) - float(found.mean[0]) > 1.0  # the guide's gap
    assert (found.mean.diff() >= 0).all()
    assert (found.upper.diff() <= 4 * found.upper_error[1:]).all()
    assert (found.mean - 4 * found.error.nan_to_num(0.0) < exact.mean()).all()
    assert (found.upper + 4 * found.upper_error > exact.mean()).all()
    assert float(found.upper[-1] - found.mean[-1]) < 0.1


def test_intervals_of_importance_weighting_cover(known):
    _, model, guide, data, _, exact = known
    evidence = evaluate(model, guide, data, 5000, refine=False, seed=0, progress=False)
    assert float((evidence.pareto_k < 0.7).double().mean()) > 0.99
    found = {"plain": covered(evidence.log_evidence, evidence.standard_error, exact)}
    for name in ("jackknife", "smoothed"):
        found[name] = covered(evidence.corrected[name], evidence.corrected_error[name], exact)
    print(found)
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


def test_intervals_of_annealing_cover(known):
    vae, _, _, data, _, exact = known
    found = ais(vae, None, data[0], chains=50, temperatures=100, seed=0, progress=False)
    share = covered(found.log_evidence, found.standard_error, exact)
    print({"ais": share})
    assert 0.92 <= share <= 0.98


def test_the_jackknife_takes_the_bias_of_a_hundred_particles(known):
    _, model, guide, data, _, exact = known
    some = tuple(part[:100].repeat(20, *[1] * (part.dim() - 1)) for part in data)
    truth, repeats = exact[:100].repeat(20), {"plain": [], "jackknife": []}
    torch.manual_seed(0)
    for _ in range(100):  # of 20 repeats each
        running = RunningWeights(100)
        running.update(log_weights(model, guide, *some, particles=100, max_plate_nesting=1))
        for name, value in (("plain", running.log_evidence), ("jackknife", running.jackknife[0])):
            repeats[name].append((value - truth).mean())
    bias, left = (torch.stack(rows) for rows in repeats.values())
    errors = [float(rows.std()) / math.sqrt(len(rows)) for rows in (bias, left)]
    assert float(bias.mean()) < -10 * max(errors)
    assert abs(float(left.mean())) + 2 * errors[1] < abs(float(bias.mean())) / 3


@pytest.mark.parametrize("D", [1, 2, 10])
def test_k_hat_follows_the_tail_index_of_a_narrow_guide(D):
    """Target N(0, I), guide N(0, c I): P(w > t) falls like t^(-1 / (1 - c)), so the index is 1 - c."""
    torch.manual_seed(D)
    flagged = {}
    for c in (0.8, 0.5, 0.2):
        z = math.sqrt(c) * torch.randn(5000, 200, D, dtype=torch.float64)
        k = pareto_k((0.5 * (1 / c - 1) * z.square()).sum(-1))
        flagged[c] = float((k > 0.7).double().mean())
        assert abs(float(k.mean()) - (1 - c)) < 0.3, (c, k.mean())  # 5000 samples do not cover the whole tail
    if D == 10:
        assert flagged[0.2] >= 0.95
        assert flagged[0.8] <= 0.05
