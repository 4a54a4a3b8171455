"""The picture of a posterior: its bands hold the mass they say, its window finds the density, its points are draws."""

import math

import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from jensen.guides import ExactPosterior, PriorGuide
from jensen.inference import log_joint, terms
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA, Banana, Ring
from jensen.plots import plot_posterior

X = torch.tensor([[2.0]])


def _levels(ax):
    return ax.collections[0].levels


def _gaussian(loc, scale):
    """A model whose posterior lies near ``loc`` / 10, with a standard deviation near ``scale`` / 10."""
    model = PPCA(5, 2, prior_scale=1e4).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(5, 2).double() * 10)
        model.log_noise.fill_(math.log(scale))
    return model, (torch.tensor([[loc, -loc]]).double() / 10) @ model.weight.T


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (3.0, 0.01), (5000.0, 30.0)])
def test_a_gaussians_levels_are_shares_of_its_peak(loc, scale):
    """In two dimensions the density falls to 1 - m of its peak where it encloses the mass m."""
    model, x = _gaussian(loc, scale)
    posterior = model.posterior(x)
    peak = posterior.log_prob(posterior.mean).exp().item()
    levels = _levels(plot_posterior(model, None, x))
    assert levels.tolist() == pytest.approx([peak * share for share in (0.01, 0.1, 0.5, 1.0)], rel=0.02)


@pytest.mark.parametrize(("model", "x"), [(Banana(), -1.0), (Banana(), 4.0), (Ring(), 0.0), (Ring(0.2), 6.0)])
def test_the_bands_hold_the_mass_they_say(model, x, float64):
    """By the model's own evidence, on another grid."""
    x = torch.tensor([[x]])
    levels = _levels(plot_posterior(model.double(), None, x))
    side = torch.linspace(-6, 6, 1201)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 1, 2)
    density = (log_joint(model, {"z": grid}, x) - model.log_evidence(x)).exp()
    mass = [(density[density > level].sum() * (side[1] - side[0]) ** 2).item() for level in levels]
    assert mass == pytest.approx([0.99, 0.9, 0.5, 0.0], abs=0.015)


def test_the_window_holds_the_posterior_closely():
    ax = plot_posterior(Ring(), None, torch.tensor([[3.0]]))
    for low, high in (ax.get_xlim(), ax.get_ylim()):
        assert low == pytest.approx(-high, abs=0.05)
        assert 1.8 < high < 2.5


def test_a_ridge_thinner_than_the_first_grid_is_found_whole():
    ax = plot_posterior(Ring(noise=0.02).double(), None, X.double())
    radius = math.sqrt(2)
    for low, high in (ax.get_xlim(), ax.get_ylim()):
        assert -1.2 * radius < low < -radius < radius < high < 1.2 * radius


def test_the_window_holds_a_guides_draws():
    x = torch.tensor([[-1.0]])
    alone, both = (plot_posterior(Ring(), guide, x, seed=0) for guide in (None, PriorGuide(Ring())))
    assert alone.get_xlim()[1] < 1.6
    assert both.get_xlim()[1] > 2.3


def test_the_points_are_the_guides_draws():
    model = Ring()
    guide = PriorGuide(model)
    ax = plot_posterior(model, guide, X, draws=50, seed=3)
    torch.manual_seed(derived_seed(3, "plot_posterior"))
    drawn = terms(model, guide, X, particles=50).values["z"].squeeze(1)
    torch.testing.assert_close(torch.as_tensor(ax.collections[1].get_offsets().data), drawn.double())


def test_labels_and_legend():
    model = Banana()
    ax = plot_posterior(model, PriorGuide(model), X, draws=10, title="banana")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("$z_1$", "$z_2$", "banana")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["50 %", "90 %", "99 %", "guide"]
    assert ax.get_aspect() == 1.0
    alone = plot_posterior(model, None, X)
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["50 %", "90 %", "99 %"]
    assert len(alone.collections) == 1


def test_a_seed_repeats_the_draws_and_leaves_the_random_stream():
    model = Ring()
    before = torch.get_rng_state()
    one, two = (plot_posterior(model, PriorGuide(model), X, draws=10, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (one.collections[1].get_offsets() == two.collections[1].get_offsets()).all()


def test_a_datum_without_its_first_dimension_will_do():
    model = PPCA(5, latent=2)
    x = torch.randn(5)
    one, two = (plot_posterior(model, ExactPosterior(model), datum, seed=0) for datum in (x, x.unsqueeze(0)))
    assert (_levels(one) == _levels(two)).all()


def test_given_axes_are_drawn_on():
    ax = Figure().add_subplot()
    assert plot_posterior(Ring(), None, X, ax=ax) is ax
    assert Gcf.get_all_fig_managers() == []


def test_a_density_that_is_nowhere_finite_is_named():
    model = Ring()
    model.prior.loc.fill_(math.inf)
    with pytest.raises(ValueError, match=r"not finite anywhere between \[-10.0, -10.0\]"):
        plot_posterior(model, None, X)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_posterior(PPCA(5, 3), None, torch.zeros(1, 5)), r"one latent site .* has \{'z': \[3\]\}"),
        (lambda: plot_posterior(Ring(), None, torch.zeros(4, 1)), r"one data point, .* but got \[4, 1\]: take x\[i"),
        (lambda: plot_posterior(Ring(), None, torch.tensor(1.0)), r"one data point, .* but got \[\]"),
        (lambda: plot_posterior(Ring(), None, X, points=5), "at least 16, but got 5"),
        (lambda: plot_posterior(Ring(), PriorGuide(Ring()), X, draws=0), "at least 1, but got 0"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
