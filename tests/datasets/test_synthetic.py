"""Synthetic data: each density against an independent computation, and the data against the density."""

import itertools
import math

import numpy as np
import pytest
import torch
from pyro.distributions import GaussianHMM
from sklearn.decomposition import PCA
from torch.distributions import MultivariateNormal, Normal

from jensen.datasets import bars, cards, linear_dynamics, linear_gaussian, load, pinwheel

MAKERS = {"linear_gaussian": linear_gaussian, "pinwheel": pinwheel, "bars": bars, "linear_dynamics": linear_dynamics}


def test_linear_gaussian_density_is_that_of_the_marginal_normal():
    data = linear_gaussian(100, features=4, latent=2, noise=1.0, dtype=torch.float64)
    density = data.log_density
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    z = torch.tensor(list(itertools.product(nodes, nodes)))  # an integral over the latents instead of a covariance
    w = torch.tensor([a * b for a, b in itertools.product(weights, weights)]).log() - math.log(2 * math.pi)
    x = data.test[:3]
    inner = Normal(z @ density.weight.T + density.mean, density.noise).log_prob(x[:, None]).sum(-1)
    torch.testing.assert_close(density(x), (inner + w).logsumexp(-1), rtol=1e-7, atol=0)


def test_linear_gaussian_data_are_what_probabilistic_pca_finds():
    data = linear_gaussian(20_000, features=6, latent=2, split=(20_000, 0, 0), dtype=torch.float64)
    fitted = PCA(n_components=2).fit(data.train.numpy())
    assert fitted.noise_variance_ == pytest.approx(0.5**2, rel=0.02)
    ours, theirs = data.log_density(data.train).mean().item(), fitted.score(data.train.numpy())
    assert 0 < theirs - ours < 20 / 20_000  # maximum likelihood gains about half a nat per parameter


def test_pinwheel_density_integrates_to_one():
    density = pinwheel(10, arms=3, radial=0.4, tangential=0.2, rate=0.5).log_density
    side = torch.linspace(-4, 4, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    assert density(grid).exp().sum().item() * 0.01**2 == pytest.approx(1, abs=1e-6)


def test_pinwheel_density_is_that_of_the_data():
    """A histogram of many samples, and the mean over arms of the normal density at the unrotated point, by autograd."""
    data = pinwheel(200_000, arms=5, split=(1.0, 0.0, 0.0), dtype=torch.float64)
    x = data.train
    centre = data.log_density.warp(torch.tensor([1.1, 0.0], dtype=torch.float64), torch.tensor(3))
    inside = ((x - centre).abs() < 0.1).all(1).double().mean().item()
    side = torch.linspace(-0.099, 0.099, 100, dtype=torch.float64)
    cell = torch.cartesian_prod(side, side) + centre
    expected = data.log_density(cell).exp().mean().item() * 0.2**2
    assert expected > 0.005
    assert abs(inside - expected) < 4 * (expected / 200_000) ** 0.5
    u = torch.tensor([1.2, 0.1], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda u: data.log_density.warp(u, torch.tensor(2)), u)
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-12)


def test_pinwheel_labels_are_the_arms():
    data = pinwheel(5000, arms=4, tangential=0.05, dtype=torch.float64)
    density = data.log_density
    u = density.warp(data.train[:, None], torch.arange(4), back=True)
    nearest = ((u - torch.tensor([1.0, 0.0])) / torch.tensor([0.3, 0.05])).norm(dim=-1).argmin(-1)
    assert (nearest == data.labels["train"]).double().mean() > 0.99


def test_bars_probability_is_the_sum_over_all_sets_of_bars():
    density = bars(10, size=3, probability=0.4, flip=0.1).log_density
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9)
    total = torch.zeros(len(every), dtype=torch.float64)
    for chosen in itertools.product([0, 1], repeat=6):
        picture = np.maximum.outer(chosen[:3], chosen[3:]).reshape(-1)
        prior = math.prod(0.4 if bar else 0.6 for bar in chosen)
        same = (every == torch.from_numpy(picture)).sum(1).double()
        total += prior * 0.9**same * 0.1 ** (9 - same)
    torch.testing.assert_close(density(every).exp(), total, rtol=1e-12, atol=0)
    assert total.sum().item() == pytest.approx(1, abs=1e-12)


def test_bars_are_drawn_from_their_probability():
    data = bars(100_000, size=2, split=(1.0, 0.0, 0.0))
    assert data.image_shape == (2, 2) and data.levels == 2 and data.value_range == (0, 1)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    counts = torch.bincount((data.train @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16)
    expected = data.log_density(every).exp() * 100_000
    assert ((counts - expected).square() / expected).sum() < 37.7  # chi-squared of 15 degrees of freedom, p = 0.001


def test_bars_of_many_rows_are_summed_in_little_memory():
    data = bars(300, size=10)
    assert data.log_density(data.train).isfinite().all()
    one = torch.stack([data.log_density(x[None]) for x in data.test]).flatten()
    torch.testing.assert_close(data.log_density(data.test), one)


def _joint(density, steps):
    """The normal distribution of all steps of a sequence at once."""
    a, c, eye = density.transition, density.emission, torch.eye(len(density.transition), dtype=torch.float64)
    powers = [eye]
    for _ in range(steps):
        powers.append(a @ powers[-1])
    marginal = [eye]
    for _ in range(steps):
        marginal.append(a @ marginal[-1] @ a.T + density.drive**2 * eye)
    x = len(c)
    covariance = torch.empty(steps * x, steps * x, dtype=torch.float64)
    for s, t in itertools.product(range(steps), repeat=2):
        block = powers[s - t] @ marginal[t] if s >= t else marginal[s] @ powers[t - s].T
        covariance[s * x : (s + 1) * x, t * x : (t + 1) * x] = c @ block @ c.T
    return covariance + density.noise**2 * torch.eye(steps * x, dtype=torch.float64)


def test_linear_dynamics_density_is_a_big_normal_and_the_kalman_filter_of_pyro():
    data = linear_dynamics(60, steps=7, features=3, latent=2, noise=0.4, dtype=torch.float64)
    density, x = data.log_density, data.train
    joint = MultivariateNormal(torch.zeros(21, dtype=torch.float64), _joint(density, 7))
    torch.testing.assert_close(density(x), joint.log_prob(x.flatten(1)), rtol=1e-10, atol=1e-10)
    eye = torch.eye(2, dtype=torch.float64)
    normal = [
        MultivariateNormal(torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)) for n in (2, 3)
    ]
    hmm = GaussianHMM(  # it makes a transition before the first observation, which leaves N(0, I) unchanged
        normal[0],
        density.transition.T,
        MultivariateNormal(torch.zeros(2, dtype=torch.float64), density.drive**2 * eye),
        density.emission.T,
        MultivariateNormal(torch.zeros(3, dtype=torch.float64), 0.4**2 * normal[1].covariance_matrix),
        duration=7,
    )
    torch.testing.assert_close(density(x), hmm.log_prob(x), rtol=1e-8, atol=1e-8)


def test_linear_dynamics_data_have_that_covariance():
    data = linear_dynamics(50_000, steps=4, features=2, split=(50_000, 0, 0), dtype=torch.float64)
    expected = _joint(data.log_density, 4)
    spread = (expected.diag()[:, None] * expected.diag() + expected**2).sqrt()
    z = (data.train.flatten(1).T.cov() - expected) / spread * 50_000**0.5
    assert z.abs().max() < 4.5  # 36 standard normal scores


@pytest.mark.parametrize("name", MAKERS)
def test_synthetic_sets_are_seeded_have_cards_and_load_by_name(name):
    data, card = load(name, dtype=torch.float64), cards()[name]
    again = MAKERS[name](dtype=torch.float64)
    assert torch.equal(data.train, again.train) and torch.equal(data.test, again.test)
    assert not torch.equal(load(name, seed=1, dtype=torch.float64).train, data.train)
    assert {split: len(getattr(data, split)) for split in card.splits} == card.splits
    shape = (math.prod(card.shape),) if name == "bars" else card.shape
    assert data.test.shape[1:] == shape
    assert (data.levels, data.value_range, data.licence) == (card.levels, card.value_range, card.licence)
    assert len(data.labels.get("test", torch.tensor([])).unique()) == card.classes
    assert data.log_density(data.test).dtype == torch.float64
    assert load(name).train.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear_gaussian", "pinwheel", "linear_dynamics"])
def test_standardized_data_keep_their_density(name):
    """Its mean is the old one plus the log of each feature's scale, at every step."""
    plain, scaled = load(name, dtype=torch.float64), load(name, standardize=True, dtype=torch.float64)
    rows = scaled.train.flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones_like(rows[0]))
    steps = plain.test[0].numel() // len(scaled.scale)
    expected = plain.log_density(plain.test) + steps * scaled.scale.log().sum()
    torch.testing.assert_close(scaled.log_density(scaled.test), expected)
    assert scaled.bits_offset == pytest.approx(scaled.scale.log2().mean().item())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bars(10, size=13), "size must be between 1 and 12, but got 13"),
        (lambda: bars(10, flip=0.5), "flip must be between 0 and 1/2, but got 0.5"),
        (lambda: bars(10, probability=1.0), "probability must be between 0 and 1"),
        (lambda: linear_gaussian(0), "n must be positive, but got 0"),
        (lambda: linear_gaussian(10, noise=-1.0), "noise must be positive"),
        (lambda: linear_dynamics(10, decay=1.0), "decay must be at least 0 and below 1"),
        (lambda: pinwheel(10, split=(0.5, 0.5, 0.5)), "split must be three shares that sum to 1"),
        (lambda: bars(20).log_density(torch.full((2, 16), 0.5)), "zeros and ones"),
        (lambda: pinwheel(20).log_density(torch.zeros(3)), r"x must have the shape \[N, 2\], but got \[3\]"),
        (lambda: load("pinwheel", dequantize=True), "nothing to dequantize"),
        (lambda: load("bars", binarize="sample"), "nothing to binarize"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
