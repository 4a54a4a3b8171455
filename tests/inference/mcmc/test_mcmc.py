"""The posterior of a few data points by MCMC against exact posteriors and quadrature; the distance of a guide."""

import math
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from hierarchies import DirichletCounts, Discrete, GammaPoisson, Levels, TwoLevels
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Size, nn

from jensen.families import BinaryVector, FullCovariance
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import MCMCConvergenceWarning, log_joint, mcmc_posterior
from jensen.inference.mcmc.chains import effective_sample_size, plain_sample_size, r_hat
from jensen.inference.mcmc.distance import energy_coefficient
from jensen.models import PPCA, Banana, Ring
from jensen.module import UniqueModule
from jensen.plots import plot_draws, plot_posterior

LENGTHS = {
    "nuts": {"draws": 300, "warmup": 150},
    "hmc": {"draws": 300, "warmup": 150},
    "random_walk": {"draws": 2000, "warmup": 500},
    "rejection": {"draws": 2000},
}


def _slow(method):
    return pytest.param(method, marks=pytest.mark.slow)


def _drawn(model, x, method="nuts", seed=0, **options):
    """Two chains, without the occasional warning about short chains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MCMCConvergenceWarning)
        options = {"chains": 2, **LENGTHS[method], **options}
        return mcmc_posterior(model, x, method=method, seed=seed, progress=False, **options)


def _means_are(found, statistic, expected, errors=4.0):
    """The mean of a statistic [N, S, ...] of the samples has the expected value within its standard error."""
    chains = statistic.reshape(len(statistic), found.chains, -1, *statistic.shape[2:]).permute(
        1, 2, 0, 3
    )  # [C, S, N, ..]
    ess = plain_sample_size(chains)
    assert (ess > 50).all(), "too few draws to tell"
    error = statistic.std(1) / ess.sqrt()
    away = (statistic.mean(1) - expected).abs()
    assert (away < errors * error).all(), (away / error).max()


def _ar1(phi, shape, steps=500):
    """Chains [C, S, ...] with autocorrelation phi^k and variance 1."""
    e = torch.randn(shape[0], steps, *shape[1:]).double() * math.sqrt(1 - phi**2)
    x = e / math.sqrt(1 - phi**2)
    for t in range(1, steps):
        x[:, t] = phi * x[:, t - 1] + e[:, t]
    return x


def _ppca(latent=2):
    """Coordinates of different scales that are correlated given x."""
    model = PPCA(5, latent).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(5, latent).double()).Q * torch.linspace(3, 0.5, latent))
    model = model.rotated(seed=0)
    return model, model(n=2).detach()


# chains


@pytest.mark.parametrize("phi", [0.0, 0.8, -0.4])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.round(), lambda x: x + torch.arange(4).reshape(4, 1, 1)])
def test_r_hat_is_that_of_arviz(phi, change):
    x = change(_ar1(phi, (4, 2)))
    x = torch.cat([x, 1 / x.clamp_min(0.01)], -1)
    reference = [float(array_stats.rhat(x[..., i].numpy(), chain_axis=0, draw_axis=1)) for i in range(4)]
    assert r_hat(x).tolist() == pytest.approx(reference, abs=1e-10)


@pytest.mark.parametrize("steps", [500, 501])
def test_ess_is_near_that_of_arviz_where_chains_agree(steps):
    x = torch.cat([_ar1(phi, (4, 2), steps) for phi in (0.0, 0.5, 0.8, -0.4)], -1)
    reference = [
        float(array_stats.ess(each.numpy(), chain_axis=0, draw_axis=1, method="bulk")) for each in x.unbind(-1)
    ]
    assert effective_sample_size(x).tolist() == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_ess_of_an_autoregression_is_known(phi):
    x = _ar1(phi, (4, 100))
    known = 2000 * (1 - phi) / (1 + phi)
    for found in (effective_sample_size(x), plain_sample_size(x)):
        assert found.mean().item() == pytest.approx(known, rel=0.1)


def test_chains_of_unlike_scales_are_told_by_folding():
    x = torch.randn(4, 500).double() * torch.tensor([[1.0], [1.0], [1.0], [3.0]]).double()
    assert r_hat(x) > 1.05


def test_chains_that_never_moved_are_worth_nothing():
    x = torch.arange(4.0).unsqueeze(-1).expand(4, 100)
    assert effective_sample_size(x[:1]) == 0
    assert not r_hat(x) <= 1.01


# the posterior


@pytest.mark.parametrize("method", [_slow(name) if name in ("hmc", "random_walk") else name for name in LENGTHS])
def test_a_gaussian_posterior_has_its_mean_and_covariance(method):
    model, x = _ppca()
    x = x[:1] if method in ("nuts", "hmc") else x
    found = _drawn(model, x, method)
    p = model.posterior(x)
    away = (found.draws["z"] - p.mean.unsqueeze(1)).detach()
    white = torch.linalg.solve_triangular(p.scale_tril.detach(), away.mT, upper=False).mT  # [N, S, D]
    _means_are(found, white, 0.0)
    _means_are(found, white.square(), 1.0)
    _means_are(found, white.prod(-1, keepdim=True), 0.0)
    assert (found.r_hat < 1.05).all()
    assert (found.divergences == 0).all()
    assert ((found.acceptance > 0.1) & (found.acceptance <= 1)).all()


@pytest.mark.slow
def test_more_coordinates_that_correlate():
    model, x = _ppca(4)
    found = _drawn(model, x[:1], "nuts", seed=1)
    p = model.posterior(x[:1])
    _means_are(found, (found.draws["z"] - p.mean.unsqueeze(1)).detach(), 0.0)
    assert found.names == ("z[0]", "z[1]", "z[2]", "z[3]")


@pytest.mark.parametrize(
    ("model", "x", "method"),
    [
        pytest.param(Banana(), -1.0, "nuts", marks=pytest.mark.slow),
        (Banana(), -1.0, "rejection"),
        (Ring(), 2.0, "rejection"),
    ],
)
def test_curved_posteriors_have_the_moments_of_quadrature(model, x, method, float64):
    x = torch.tensor([[x]])
    side = torch.linspace(-6, 6, 601)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 1, 2)
    weights = log_joint(model, {"z": grid}, x).softmax(0)  # [G, 1]

    def statistics(z):
        return torch.cat([z, z.square(), z.prod(-1, keepdim=True), z.square().sum(-1, keepdim=True).exp().log1p()], -1)

    found = _drawn(model.double(), x, method)
    _means_are(found, statistics(found.draws["z"]), (weights.unsqueeze(-1) * statistics(grid)).sum(0))


@pytest.mark.parametrize("method", [_slow("random_walk"), "rejection"])
def test_a_positive_site_has_its_conjugate_posterior(method, float64):
    model, x = GammaPoisson(), torch.tensor([[0.0, 1.0], [7.0, 4.0]])
    found = _drawn(model, x, method)
    z = found.draws["z"].unsqueeze(-1)  # [N, S, 1]
    p = dist.Gamma(3 + x.sum(-1, keepdim=True), 3.5)
    assert (z > 0).all()
    assert found.draws["z"].shape == found.unconstrained.shape[:2]
    assert found.names == ("z",)
    _means_are(found, z, p.mean)
    _means_are(found, z.square(), p.variance + p.mean.square())
    torch.testing.assert_close(found.unconstrained.exp(), z)


def test_a_simplex_has_its_conjugate_posterior(float64):
    model, x = DirichletCounts(), torch.tensor([[4.0, 1.0, 0.0]])
    found = _drawn(model, x, "hmc")
    p = dist.Dirichlet(torch.tensor([6.0, 4.0, 4.0]))
    assert found.names == ("z[0]", "z[1]")
    _means_are(found, found.draws["z"], p.mean)
    _means_are(found, found.draws["z"].square(), p.variance + p.mean.square())


@pytest.mark.slow
def test_sites_that_depend_on_each_other(float64):
    model = TwoLevels()
    x = model(n=1).detach()
    found = _drawn(model, x, draws=150, warmup=100)
    mean, _ = model.posterior(x)
    _means_are(found, torch.cat([found.draws["top"], found.draws["low"]], -1), mean.detach())


def test_sites_of_every_shape():
    model = Levels()
    found = _drawn(model, model(n=3).detach(), "random_walk", draws=10, warmup=10)
    assert {name: z.shape for name, z in found.draws.items()} == {
        "s": Size((3, 20)),
        "m": Size((3, 20, 2, 3)),
        "v": Size((3, 20, 4)),
    }
    values = torch.cat([found.draws[site].reshape(3, 20, -1) for site in ("s", "m", "v")], -1)
    torch.testing.assert_close(found.unconstrained, values)


def test_each_datum_has_its_own_posterior_whatever_its_neighbours():
    model, x = _ppca()
    both, second = _drawn(model, x, "rejection"), _drawn(model, x[1:], "rejection", seed=1)
    assert (both.draws["z"][0].mean(0) - both.draws["z"][1].mean(0)).abs().max() > 0.1
    error = (both.draws["z"][1].var(0) / 2000 + second.draws["z"][0].var(0) / 2000).sqrt()
    assert ((both.draws["z"][1].mean(0) - second.draws["z"][0].mean(0)).abs() < 4 * error).all()


# manners


@pytest.mark.parametrize("method", LENGTHS)
def test_a_seed_repeats_the_draws_and_leaves_everything_else(method):
    model, x = _ppca()
    model.train()
    model.prior_part = nn.Dropout()
    model.prior_part.eval()
    short = {"draws": 8, "warmup": 5} if method != "rejection" else {"draws": 8}
    _drawn(model, x, method, **short)
    before, stored = torch.get_rng_state(), {k: v.clone() for k, v in pyro.get_param_store().items()}
    weight = model.weight.detach().clone()
    one, two, other = (_drawn(model, x, method, seed=seed, **short) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.unconstrained, two.unconstrained)
    assert not torch.equal(one.unconstrained, other.unconstrained)
    assert {k: v.tolist() for k, v in pyro.get_param_store().items()} == {k: v.tolist() for k, v in stored.items()}
    assert model.training
    assert not model.prior_part.training
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is None
    assert model.weight.requires_grad
    assert not one.unconstrained.requires_grad


def test_without_a_seed_the_users_stream_is_drawn_from():
    model, x = _ppca()
    torch.manual_seed(5)
    one = _drawn(model, x, "random_walk", seed=None, draws=5, warmup=5)
    torch.manual_seed(5)
    two = _drawn(model, x, "random_walk", seed=None, draws=5, warmup=5)
    assert torch.equal(one.unconstrained, two.unconstrained)


def test_two_modes_that_no_chain_leaves_are_noticed():
    model = Ring(noise=0.1, latent=1).double()
    x = torch.tensor([[9.0]]).double()
    with pytest.warns(
        MCMCConvergenceWarning, match=r"1 of 1 data points did not converge .* coordinate z, R-hat is"
    ) as caught:
        found = mcmc_posterior(model, x, draws=50, warmup=50, seed=0, progress=False)
    assert caught[0].filename == __file__
    assert found.r_hat.item() > 1.5
    assert not found.converged.any()
    assert "did not converge" in str(found)
    exact = mcmc_posterior(model, x, method="rejection", seed=0, progress=False)
    assert exact.converged.all()
    assert (exact.draws["z"] > 0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))


def test_what_is_printed():
    model, x = _ppca()
    found = mcmc_posterior(model, x, method="rejection", seed=0, progress=False)
    text = str(found)
    head = "posterior of 2 data points in 2 coordinates by rejection: 2000 samples each"
    assert text.startswith(f"{head}\ndata point  R-hat")
    assert len(text.splitlines()) == 5
    assert repr(found) == text
    assert "rejection" in found._repr_html_()
    assert found.to_dict()["per_datum"]["converged"] == [True, True]
    walked = _drawn(model, x, "random_walk", draws=10, warmup=5)
    assert "20 samples each in 2 chains after a warmup of 5" in str(walked)


class _Nowhere(UniqueModule):
    """X has zero density for every z."""

    def __init__(self):
        super().__init__()
        self.latents, self.event_shape = {"z": Size((2,))}, Size((1,))

    def forward(self, x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("wall", torch.full(z.shape[:-1], -math.inf))
            return pyro.sample("x", dist.Normal(z[..., :1], 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.zeros(11, 5)}, r"at most 10, but got 11: use data\[:10\]"),
        ({"method": "gibbs"}, "method must be 'nuts', .* but got 'gibbs'"),
        ({"draws": 3}, "draws is at least 4, but got 3"),
        ({"warmup": 0}, "warmup is at least 1, but got 0"),
        ({"chains": 0}, "chains is at least 1, but got 0"),
        ({"data": torch.full((1, 5), math.inf)}, "NaN or infinite"),
        (
            {"model": PPCA(5, 3), "method": "rejection"},
            "one or two latent coordinates, but this model has 3: use 'nuts'",
        ),
        ({"model": Discrete(BinaryVector), "data": torch.zeros(1, 4)}, "latent site 'z' is discrete"),
    ],
)
def test_what_cannot_be_drawn_is_named(options, message):
    options = {"model": PPCA(5, 2), "data": torch.zeros(1, 5), "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        mcmc_posterior(options.pop("model"), options.pop("data"), **options)


def test_a_density_that_is_nowhere_finite_is_named():
    with pytest.raises(FloatingPointError, match="finite at 0 of 256 samples from the prior"):
        mcmc_posterior(_Nowhere(), torch.zeros(1, 1), progress=False)


# the distance of a guide


def _energy(shift, scale):
    """H of N(0, 1) against N(shift, scale^2)."""

    def mean_length(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))

    apart = mean_length(shift, math.sqrt(1 + scale**2))
    return 1 - (mean_length(0, math.sqrt(2)) + mean_length(0, scale * math.sqrt(2))) / (2 * apart)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.1, 1.0), (1.0, 1.0), (0.0, 0.5), (3.0, 2.0)])
def test_the_energy_coefficient_is_the_known_one_and_its_error_is_right(shift, scale, phi):
    """For any units: samples of N(5, 2^2) and its guide."""
    known, found = _energy(shift, scale), []
    for _ in range(60):
        u = 5 + 2 * _ar1(phi, (4, 1), 100)
        v = 5 + 2 * (shift + scale * torch.randn(300, 1).double())
        found.append(torch.stack(energy_coefficient(u, v, effective_sample_size(u))))
    value, error = torch.stack(found).unbind(1)
    assert (value.mean() - known).abs() < 4 * value.std() / math.sqrt(60)
    assert 0.7 < error.square().mean().sqrt() / value.std() < 1.6


def test_a_small_shift_counts_by_its_square():
    assert _energy(0.2, 1.0) == pytest.approx(0.2**2 / 4, rel=0.02)


def test_the_posterior_itself_is_at_no_distance():
    model, x = _ppca()
    found = _drawn(model, x, "rejection")
    distance = found.distance(ExactPosterior(model), seed=1)
    assert (distance.energy.abs() < 4 * distance.energy_error).all()
    assert (distance.mean_error.abs() < 4 * distance.mean_standard_error).all()
    assert ((distance.scale_ratio - 1).abs() < 4 * distance.scale_standard_error).all()
    assert (distance.energy_error < 0.01).all()


def test_the_prior_is_as_far_off_as_it_is():
    model, x = _ppca()
    found = _drawn(model, x, "rejection")
    distance = found.distance(PriorGuide(model), draws=5000, seed=1)
    p = model.posterior(x)
    scale = p.variance.sqrt().detach()
    shift, ratio = -p.mean.detach() / scale, 1 / scale
    slack = 1 + shift.abs()  # the units also have an error
    assert ((distance.mean_error - shift).abs() < 4 * slack * distance.mean_standard_error).all()
    assert ((distance.scale_ratio - ratio).abs() < 4 * distance.scale_standard_error).all()
    assert (distance.energy > 10 * distance.energy_error).all()
    text = str(distance)
    assert text.splitlines()[0] == "2 data points, guide samples against posterior samples"
    assert " sd (z[" in text
    assert distance.to_dict()["names"] == ["z[0]", "z[1]"]


def test_a_guide_of_constrained_sites_and_an_auxiliary_one(float64):
    model, x = GammaPoisson(), torch.tensor([[0.0, 1.0], [7.0, 4.0]])
    found = _drawn(model, x, "rejection")
    guide = amortize(model, nn.Linear(2, 8), FullCovariance, context=8, constraints=model.constraints, joint=True)
    before = torch.get_rng_state()
    one, two = (found.distance(guide, draws=100, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.energy, two.energy)
    u = found.guide_draws(guide, 100, seed=3)
    assert u.shape == (2, 100, 1)
    torch.testing.assert_close(one.mean_error, (u.mean(1) - found.unconstrained.mean(1)) / found.unconstrained.std(1))


def test_one_draw_of_a_guide_has_no_spread():
    model, x = _ppca()
    found = _drawn(model, x, "rejection")
    with pytest.raises(ValueError, match="at least 2, but got 1"):
        found.distance(PriorGuide(model), draws=1)


# pictures


def test_the_points_are_the_draws_and_the_curves_hold_the_guides_mass():
    model, x = _ppca()
    found = _drawn(model, x, "rejection", draws=250)
    axes = plot_draws(found, ExactPosterior(model), draws=4000, seed=0, titles=["one", "two"])
    assert [ax.get_title() for ax in axes] == ["one", "two"]
    p = model.posterior(x)
    for i, ax in enumerate(axes):
        points, curves = ax.collections[0], ax.collections[1]
        torch.testing.assert_close(torch.as_tensor(points.get_offsets().data), found.draws["z"][i])
        assert to_hex(points.get_facecolor()[0]) == "#0072b2"
        for mass, path in zip((0.9, 0.5), curves.get_paths(), strict=True):  # by chi squared with two degrees
            edge = torch.as_tensor(path.vertices) - p.mean[i].detach()
            squared = (edge @ p.precision_matrix[i].detach() * edge).sum(-1)
            assert squared.mean().item() == pytest.approx(-2 * math.log(1 - mass), rel=0.2)
    assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == ["posterior", "guide, 50 and 90 %"]


def test_many_coordinates_are_shown_where_the_guide_is_off():
    model, x = _ppca(4)
    found = _drawn(model, x, "random_walk", draws=50, warmup=50)
    figure = Figure()
    given = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    axes = plot_draws(found, PriorGuide(model), draws=4000, seed=0, axes=given)
    assert axes == given
    assert axes[0].get_xlabel() == "along the mean's error (sd)"
    shown = torch.as_tensor(axes[0].collections[0].get_offsets().data)
    torch.testing.assert_close(torch.cov(shown.T), torch.eye(2).double())
    curve = torch.as_tensor(axes[0].collections[1].get_paths()[1].vertices)
    u = found.unconstrained[0]
    off = (u.mean(0) @ torch.linalg.solve(torch.cov(u.T), u.mean(0))).sqrt()  # the prior's mean is zero
    assert curve.mean(0)[0].item() == pytest.approx(off.item(), rel=0.15)
    spread = torch.linalg.eigvalsh(torch.cov(u.T)).flip(0)[:2]
    ax = plot_draws(found)[0]
    assert ax.get_xlabel() == "1st principal direction"
    torch.testing.assert_close(torch.as_tensor(ax.collections[0].get_offsets().data).var(0), spread)


def test_one_coordinate_is_a_histogram():
    found = _drawn(Ring(latent=1), torch.ones(2, 1), "rejection", draws=100)
    axes = plot_draws(found, PriorGuide(Ring(latent=1)), draws=100, seed=0)
    assert (axes[0].get_xlabel(), len(axes[0].containers)) == ("z", 1)
    assert len(axes[0].patches) == 41  # forty bars and an outline
    assert len(plot_draws(found)[1].patches) == 40


def test_titles_that_do_not_fit_are_named():
    found = _drawn(Ring(), torch.ones(2, 1), "rejection", draws=10)
    with pytest.raises(ValueError, match="titles needs one for each of the 2 data points, but got 1"):
        plot_draws(found, titles=["one"])


def test_mcmc_draws_lie_over_the_contours():
    model, x = Banana(), torch.tensor([[2.0]])
    found = _drawn(model, x, "rejection", draws=20)
    ax = plot_posterior(model, PriorGuide(model), x, draws=10, mcmc=found.draws["z"][0])
    torch.testing.assert_close(torch.as_tensor(ax.collections[1].get_offsets().data).float(), found.draws["z"][0])
    assert [text.get_text() for text in ax.get_legend().get_texts()][3:] == ["MCMC", "guide"]
    with pytest.raises(ValueError, match=r"shape \[S, 2\], but got \[1, 40, 2\]"):
        plot_posterior(model, None, x, mcmc=found.draws["z"])


def test_arviz_reads_the_chains_in_their_order():
    x = torch.tensor([[1.0], [2.0], [0.5]])
    found = _drawn(Ring(), x, "random_walk", draws=200, warmup=50)
    tree, S = found.to_arviz(), found.draws["z"].shape[1]
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "datum", "z_0")
    assert z.shape == (2, S // 2, 3, 2)
    assert torch.equal(torch.as_tensor(z.values[1, 7, 2]), found.draws["z"][2, S // 2 + 7])
    theirs = array_stats.rhat(z.values, chain_axis=0, draw_axis=1)
    assert torch.allclose(torch.as_tensor(theirs), found.r_hat, atol=1e-6)


def test_without_arviz_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    found = mcmc_posterior(Ring(), torch.ones(1, 1), method="rejection", draws=100, seed=0, progress=False)
    with pytest.raises(ImportError, match="pip install arviz-base"):
        found.to_arviz()


@pytest.mark.parametrize(("latent", "noise"), [(1, 1e-6), (2, 1e-4)])
def test_rejection_zooms_to_a_posterior_narrower_than_a_cell(latent, noise):
    """Samples against the moments of PPCA's posterior; with the prior's grid their sd was once 2.3 times too large."""
    model = PPCA(4, latent).double()
    with torch.no_grad():
        model.log_noise.fill_(math.log(noise))
        x = model(n=3)
    found = mcmc_posterior(model, x, method="rejection", draws=4000, chains=1, seed=0, progress=False)
    exact, draws = model.posterior(x), found.draws["z"].double()
    assert found.converged.all()
    assert (found.above == 0).all()
    sd = exact.variance.sqrt()
    assert ((draws.mean(1) - exact.mean) / sd).abs().max() < 4.5 / math.sqrt(4000)
    assert (draws.std(1) / sd - 1).abs().max() < 4.5 / math.sqrt(2 * 4000)


def test_draws_under_an_envelope_that_is_too_low_are_not_converged(monkeypatch):
    monkeypatch.setattr("jensen.inference.annealing.rejection._SAFETY", -1.0)
    model = PPCA(4, 1).double()
    with torch.no_grad():
        x = model(n=3)
    with pytest.warns(MCMCConvergenceWarning, match="3 of 3 data points are not exact: the envelope"):
        found = mcmc_posterior(model, x, method="rejection", seed=0, progress=False)
    assert (found.r_hat <= 1.01).all()
    assert not found.converged.any()
    assert "envelope of the rejection sampling was too low" in str(found)
    assert min(found.to_dict()["per_datum"]["above"]) > 0
