"""Banana and ring against sums over a grid, special functions, and their own samples."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, special

from jensen.families import FullCovariance
from jensen.guides import PriorGuide, amortize
from jensen.inference import HasEvidence, fit, log_joint, log_weights
from jensen.inference import evaluate as with_refined
from jensen.models import Banana, Ring
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide

MODELS = {
    "Banana": Banana,
    "Banana, sharp": lambda: Banana(curvature=-2.0, noise=0.3),
    "Banana, straight": lambda: Banana(curvature=0.0, noise=0.5),
    "Ring": Ring,
    "Ring, thin": lambda: Ring(noise=0.1),
    "Ring, thick": lambda: Ring(noise=3.0),
    "Ring, two points": lambda: Ring(latent=1),
    "Ring, two points, thin": lambda: Ring(noise=0.2, latent=1),
    "Ring, sphere": lambda: Ring(latent=3),
    "Ring, many": lambda: Ring(noise=0.8, latent=12),
}
each_model = pytest.mark.parametrize("model", [pytest.param(make, id=name) for name, make in MODELS.items()])


def _simulated(model, n):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(n=n)


@pytest.mark.parametrize("name", [name for name, make in MODELS.items() if make().latents["z"] == (2,)])
def test_log_evidence_equals_the_sum_over_a_grid_in_the_plane(name, float64):
    model = MODELS[name]()
    x = _simulated(model, 5)
    side = torch.linspace(-7, 7, 1201)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).flatten(0, 1)  # [K, 2]
    parts = []
    for z in grid.split(2**18):
        density = log_joint(model, {"z": z.unsqueeze(1).expand(-1, len(x), 2)}, x)  # [K, N]
        parts.append(density.logsumexp(0))
    brute = torch.stack(parts).logsumexp(0) + 2 * math.log(side[1] - side[0])
    torch.testing.assert_close(model.log_evidence(x), brute, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("latent", "points", "noise"),
    [(1, 20_001, 0.5), (1, 20_001, 3.0), (3, 141, 0.5), pytest.param(3, 141, 3.0, marks=pytest.mark.slow)],
)
def test_rings_evidence_equals_the_sum_over_a_grid_on_the_line_and_in_space(latent, points, noise, float64):
    model = Ring(noise, latent)
    x = torch.tensor([[-1.0], [0.0], [2.0], [4.0]])
    side = torch.linspace(-7, 7, points)
    grid = torch.cartesian_prod(*[side] * latent).reshape(-1, latent)  # [K, D]
    total = torch.full((len(x),), -math.inf)
    for z in grid.split(2**18):
        density = log_joint(model, {"z": z.unsqueeze(1).expand(-1, len(x), latent)}, x)  # [K, N]
        total = torch.logaddexp(total, density.logsumexp(0))
    brute = total + latent * math.log(side[1] - side[0])
    torch.testing.assert_close(model.log_evidence(x), brute, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, 3.0, 30.0])
def test_the_radial_quadrature_equals_the_closed_form_of_two_features(noise, float64):
    model = Ring(noise)
    x = torch.linspace(-20, 60, 801).unsqueeze(-1)
    torch.testing.assert_close(model._integral(x), model.log_evidence(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [0.01, 0.5, 30.0])
@pytest.mark.parametrize("latent", [1, 3, 50])
def test_half_the_radii_give_the_same_digits(noise, latent, float64, monkeypatch):
    model = Ring(noise, latent)
    x = torch.cat([torch.linspace(-20, 80, 501), torch.tensor([-1e5, 1e5])]).unsqueeze(-1)
    found = model.log_evidence(x)
    monkeypatch.setattr("jensen.models.curved._RADII", 600)
    torch.testing.assert_close(model.log_evidence(x), found, rtol=1e-11, atol=1e-11)


def test_a_guide_on_one_of_two_points_loses_log_two(float64):
    """The posterior of one feature, cut to one side and normalised: every weight is p(x) / 2."""
    model, x = Ring(noise=0.2, latent=1), torch.linspace(2, 4, 5).unsqueeze(-1)
    z = torch.linspace(1e-4, 6, 60_001)
    side = log_joint(model, {"z": z.reshape(-1, 1, 1).expand(-1, 5, 1)}, x).logsumexp(0) + math.log(z[1] - z[0])
    torch.testing.assert_close(model.log_evidence(x) - side, torch.full((5,), math.log(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("curvature", "noise"), [(0.5, 0.25), (3.0, 0.01), (0.05, 1.0)])
def test_bananas_evidence_equals_the_bessel_functions(curvature, noise):
    """The integral of exp(-a (z^2 - w)^2) over z is one of Bessel functions of order 1/4."""
    x = np.linspace(-30.0, 60.0, 501)
    variance = 1 + noise**2
    a, w = curvature**2 / (2 * variance), x / curvature - variance / (2 * curvature**2)
    y = a * w**2 / 2
    two_peaks = np.pi / 2 * np.sqrt(np.abs(w)) * (special.ive(-0.25, y) + special.ive(0.25, y))
    one_peak = np.sqrt(np.abs(w) / 2) * special.kve(0.25, y)
    log_integral = np.where(w > 0, np.log(two_peaks), np.log(one_peak) - 2 * y)
    expected = log_integral + a * w**2 - x**2 / (2 * variance) - math.log(2 * math.pi) - math.log(variance) / 2
    model = Banana(curvature, noise).double()
    ours = model.log_evidence(torch.as_tensor(x).unsqueeze(-1)).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)


def test_a_straight_banana_is_gaussian(float64):
    x = torch.linspace(-50, 50, 101).unsqueeze(-1)
    expected = torch.distributions.Normal(0.0, math.sqrt(1.25)).log_prob(x).squeeze(-1)
    torch.testing.assert_close(Banana(0.0, 0.5).log_evidence(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("x", [-1.5, 0.1, 2.0, 9.0])
def test_rings_evidence_equals_the_integral_over_the_radius(noise, x):
    def density(r):
        return r * math.exp(-(r**2) / 2 - ((x - r**2) / noise) ** 2 / 2) / (noise * math.sqrt(2 * math.pi))

    ends = [math.sqrt(max(0.0, x + k * noise)) for k in range(-12, 21)]
    pieces = [integrate.quad(density, *pair, epsabs=0, epsrel=1e-12)[0] for pair in pairwise(ends)]
    ours = Ring(noise).log_evidence(torch.tensor([[x]], dtype=torch.float64)).item()
    assert ours == pytest.approx(math.log(sum(pieces)), abs=1e-9)


@each_model
def test_the_evidence_is_a_density_with_the_moments_it_says(model, float64):
    model = model()
    x = torch.linspace(-150, 150, 60_001)
    p = model.log_evidence(x.unsqueeze(-1)).exp()
    moments = [torch.trapezoid(p * x**power, x).item() for power in (0, 1, 2)]
    mean, variance = _moments(model)
    assert moments == pytest.approx([1.0, mean, variance + mean**2], abs=1e-8)


@each_model
def test_samples_have_the_moments_of_the_evidence(model, float64):
    model, n = model(), 200_000
    x = _simulated(model, n).squeeze(-1)
    mean, variance = _moments(model)
    squares = (x - mean).square()
    assert abs(x.mean() - mean) < 5 * x.std() / math.sqrt(n)
    assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(n)


def _moments(model):
    if isinstance(model, Ring):
        return float(model.latent), 2 * model.latent + model.noise**2
    return model.curvature, 1 + 2 * model.curvature**2 + model.noise**2


@pytest.mark.parametrize("make", [Banana, Ring, lambda: Ring(latent=1), lambda: Ring(latent=3)])
def test_importance_weights_estimate_it(make, float64):
    model = make()
    x = _simulated(model, 100)
    evidence = evaluate(model, PriorGuide(model), x, particles=20_000, seed=0, progress=False)
    assert torch.equal(evidence.exact, model.log_evidence(x))
    trusted = evidence.pareto_k < 0.7
    error = (evidence.log_evidence - evidence.exact).abs() / evidence.standard_error
    assert trusted.double().mean() > 0.9
    assert (error[trusted] < 4).double().mean() > 0.95


@pytest.mark.parametrize("make", [Banana, Ring])
def test_no_gaussian_reaches_it(make, float64):
    """An amortized Gaussian guide keeps a gap that is many times its error."""
    model = make()
    x = _simulated(model, 500)
    guide = amortize(model, mlp(1, [16]), FullCovariance, context=16)
    fit(model, guide, x, epochs=40, batch_size=100, lr=1e-2, freeze=model, seed=0, progress=False)
    s = evaluate(model, guide, x, particles=200, seed=0, progress=False).summary()
    assert s["gap"] > 0.3 + 4 * s["gap_data_error"]


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_keeps_the_models_precision(model, dtype):
    model = model().to(dtype)
    x = _simulated(model, 7)
    log_w = log_weights(model, PriorGuide(model), x, particles=6)
    assert (x.shape, log_w.shape, model.log_evidence(x).shape) == ((7, 1), (6, 7), (7,))
    assert {x.dtype, log_w.dtype, model.log_evidence(x).dtype} == {dtype}
    assert isinstance(model, HasEvidence)
    assert list(model.parameters()) == []


@each_model
def test_outliers_have_a_finite_evidence(model):
    x = torch.tensor([[-1e5], [-100.0], [100.0], [1e5]])
    assert model().log_evidence(x).isfinite().all()


def test_data_beyond_one_chunk_are_the_same(float64):
    x = torch.linspace(-3, 5, 2**14 + 10).unsqueeze(-1)
    assert torch.equal(Banana().log_evidence(x)[-20:], Banana().log_evidence(x[-20:]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Banana(noise=0.0), "noise is a positive standard deviation, but got 0.0"),
        (lambda: Ring(noise=-1.0), "noise is a positive standard deviation, but got -1.0"),
        (lambda: Ring(noise=math.nan), "noise must be a number other than NaN, but got nan"),
        (lambda: Ring(latent=0), "latent is the number of latent features, at least 1, but got 0"),
        (lambda: Banana(curvature=math.inf), "curvature is a finite number, but got inf"),
        (lambda: Ring().log_evidence(torch.zeros(3)), r"Ring expects data x of shape \[N, 1\], but got \[3\]"),
        (lambda: Banana()(torch.zeros(3, 2)), r"Banana expects data x of shape \[N, 1\], but got \[3, 2\]"),
        (lambda: Banana()(n=0), "Banana needs at least one data point, but got 0"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
