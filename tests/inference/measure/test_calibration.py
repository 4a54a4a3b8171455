"""Simulation-based calibration: guides with a known distribution of ranks."""

import html
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from foreign import EXAMPLE, Images
from matplotlib.colors import to_rgba
from members import pair
from pyro.infer.autoguide import AutoNormal
from scipy.stats import chisquare
from torch import nn

from jensen.guides import Amortized, ExactPosterior, PriorGuide
from jensen.inference import Calibration, calibrate, simulate
from jensen.models import PPCA
from jensen.plots import plot_ranks
from jensen.plots.axes import without_pyplot

X, D, N, L = 6, 3, 2000, 99


def _ppca(rotation=None):
    """Columns of W of different lengths; orthogonal, so that the posterior has independent features, or rotated."""
    model = PPCA(X, D).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(X, D).double()).Q * torch.tensor([3.0, 1.5, 0.5]))
    return model if rotation is None else model.rotated(rotation)


def _gaussian(model, scale=1.0, shift=0.0):
    """A guide from the exact posterior of a model: its marginals, scaled and shifted by its standard deviations."""

    def guide(x):
        exact = model.posterior(x)
        sd = exact.variance.sqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(exact.mean + shift * sd, scale * sd).to_event(1))

    return guide


def _rank_probabilities(draws, scale=1.0, shift=0.0):
    """P(rank = r) for r = 0..L where the truth is N(0, 1) and the draws N(shift, scale): a binomial mixture."""
    z = torch.linspace(-9, 9, 8001, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    below = torch.special.ndtr((z - shift) / scale).clamp(1e-300, 1 - 1e-16)
    ranks = torch.arange(draws + 1, dtype=torch.float64).unsqueeze(-1)
    return (torch.distributions.Binomial(draws, below).log_prob(ranks).exp() * weight).sum(-1)


def _expected_coverage(levels, draws, scale=1.0, shift=0.0):
    p = _rank_probabilities(draws, scale, shift)
    tails = [round((1 - level) / 2 * (draws + 1)) for level in levels]
    return torch.stack([p[tail : draws + 1 - tail].sum() for tail in tails])


def _assert_coverage(found, expected):
    """Within four binomial standard errors, [levels]."""
    error = (expected * (1 - expected) / N).sqrt()
    assert ((found - expected).abs() < 4 * error).all(), (found, expected, error)


def test_the_oracle_has_the_limit_of_many_draws():
    levels = [0.5, 0.8, 0.9]
    q = torch.special.ndtri((1 + torch.tensor(levels, dtype=torch.float64)) / 2)
    for scale in (0.5, 1.0, 2.0):
        limit = 2 * torch.special.ndtr(scale * q) - 1  # P(|N(0, 1)| < c q)
        torch.testing.assert_close(_expected_coverage(levels, 399, scale), limit, rtol=0, atol=4e-3)
    torch.testing.assert_close(_rank_probabilities(L), torch.full((L + 1,), 0.01, dtype=torch.float64))


def test_the_exact_posterior_is_calibrated():
    model = _ppca(rotation=0)
    found = calibrate(model, ExactPosterior(model), N, L, seed=0, progress=False)
    assert found.p_value > 0.01
    assert found.shapes() == {}
    assert found.verdict().startswith("No miscalibration detected at the 1 % level (p = ")
    for feature in found.coverage.T:
        _assert_coverage(feature, torch.tensor(found.levels, dtype=torch.float64))


def test_p_values_of_a_calibrated_guide_are_uniform():
    model = _ppca()
    guide = ExactPosterior(model)
    runs = [calibrate(model, guide, 200, 39, seed=seed, progress=False) for seed in range(60)]
    p = torch.cat([run.p_values for run in runs])  # 180 of them; independent, as the posterior's features are
    assert abs(p.mean() - 0.5) < 4 / math.sqrt(12 * len(p))
    for share in (0.05, 0.25, 0.75):
        assert abs((p < share).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / len(p)) + 0.01
    corrected = torch.tensor([run.p_value for run in runs])
    assert (corrected < 0.1).double().mean() < 0.1 + 4 * math.sqrt(0.09 / 60)


def test_the_prior_is_calibrated_too_and_the_verdict_says_what_that_is_worth():
    model = _ppca(rotation=0)
    found = calibrate(model, PriorGuide(model), N, L, seed=0, progress=False)
    assert found.p_value > 0.01
    assert (
        "this does not show that q is accurate (the prior passes too), nor that it is calibrated: 90 %"
        in found.verdict()
    )


@pytest.mark.parametrize(
    ("scale", "shape"),
    [(0.5, "too narrow (U-shaped ranks)"), (2.0, "too wide (hump-shaped ranks)")],
)
@pytest.mark.parametrize("draws", [99, 19, 76])
def test_a_guide_of_another_width_covers_what_it_must(scale, shape, draws):
    model = _ppca()
    found = calibrate(model, _gaussian(model, scale), N, draws, seed=1, progress=False)
    expected = _expected_coverage(found.levels, draws, scale)
    for feature in found.coverage.T:
        _assert_coverage(feature, expected)
    assert found.shapes() == dict.fromkeys(["z[0]", "z[1]", "z[2]"], shape)
    assert found.verdict().startswith(
        f"Not calibrated (p < 1e-12, corrected for 3 features). The guide is {shape} at z[0], z[1], z[2]."
    )


@pytest.mark.parametrize(("shift", "side"), [(0.5, "high"), (-0.5, "low")])
def test_a_shifted_guide_is_biased(shift, side):
    model = _ppca()
    found = calibrate(model, _gaussian(model, shift=shift), N, L, seed=2, progress=False)
    expected = _expected_coverage(found.levels, L, shift=shift)
    for feature in found.coverage.T:
        _assert_coverage(feature, expected)
    assert set(found.shapes().values()) == {f"biased, too {side} (sloping ranks)"}


@pytest.mark.parametrize(("below", "above", "side"), [(1.0, 0.4, "upper"), (0.4, 1.0, "lower")])
def test_a_guide_that_is_short_on_one_side_is_told_from_a_biased_one(below, above, side):
    """A normal truth; samples of two half normals, one of them narrower, each with half of the mass."""
    n, draws = 4000, 99
    truth, z = torch.randn(n).double(), torch.randn(draws, n).double()
    z = torch.where(z > 0, above * z, below * z)
    found = Calibration({"z": (z < truth).sum(0).unsqueeze(-1)}, draws)
    assert found.shapes() == {"z": f"too short on the {side} side (too many ranks at that end only)"}


def test_a_guide_that_misses_a_mode_is_short_on_that_side():
    """Two modes of equal mass, samples of the lower one: half of the true values are above all samples."""
    n, draws = 1000, 99
    truth = torch.randn(n).double() + 10.0 * (torch.rand(n) > 0.5)
    found = Calibration({"z": (torch.randn(draws, n).double() < truth).sum(0).unsqueeze(-1)}, draws)
    assert found.shapes() == {"z": "too short on the upper side (too many ranks at that end only)"}
    assert "too short on the upper side" in found.verdict()


def test_effects_are_those_of_the_ranks():
    """A deviation that is not significant at the 1 % level is a number in the verdict."""
    ranks = torch.arange(400) % 20
    ranks[:40] = 0
    found = Calibration({"z": ranks.unsqueeze(-1)}, draws=19)
    inside = ((ranks >= 1) & (ranks <= 18)).double()
    shift = (float(ranks.double().mean()) + 0.5) / 20 - 0.5
    assert found.shift.tolist() == pytest.approx([shift])
    share, error = 100 * float(inside.mean()), 100 * float(inside.std()) / 20
    assert f"90 % intervals cover {share:.1f} ± {error:.1f} %" in found.effects()
    assert found.effects() in found.verdict()


def test_a_p_value_between_one_and_five_per_cent_is_said_to_be_evidence():
    ranks = torch.arange(1000) % 20
    ranks[:43] = 0
    found = Calibration({"z": ranks.unsqueeze(-1)}, draws=19)
    p = chisquare(torch.bincount(ranks, minlength=20).numpy()).pvalue
    assert 0.01 < p < 0.05
    assert "There is some evidence against it: p is below 5 %." in found.verdict()
    assert "some evidence" not in Calibration({"z": (torch.arange(1000) % 20).unsqueeze(-1)}, draws=19).verdict()


def test_one_wrong_feature_is_named():
    model = _ppca()
    found = calibrate(model, _gaussian(model, torch.tensor([1.0, 0.5, 1.0])), N, L, seed=3, progress=False)
    assert list(found.shapes()) == ["z[1]"]


def test_the_best_mean_field_guide_of_a_rotated_model_covers_too_little_by_the_known_amount():
    model = _ppca(rotation=0)
    exact = model.posterior(model.mean.detach().unsqueeze(0))
    ratio = (exact.precision_matrix[0].diagonal() * exact.covariance_matrix[0].diagonal()).rsqrt().detach()
    assert ratio.min() < 0.9
    found = calibrate(model, _gaussian(model, ratio), N, L, seed=4, progress=False)
    for d in range(D):
        _assert_coverage(found.coverage[:, d], _expected_coverage(found.levels, L, float(ratio[d])))
    assert found.shapes()[f"z[{int(ratio.argmin())}]"] == "too narrow (U-shaped ranks)"


def _mixture(x=None, *, n=1):
    """Three labels, scalar data: the posterior is Bayes' rule."""
    with pyro.plate("data", n if x is None else len(x), dim=-1):
        label = pyro.sample("label", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        return pyro.sample("x", dist.Normal(label.double(), 0.7), obs=x)


def _labels(power):
    def guide(x):
        likelihood = dist.Normal(torch.arange(3).double(), 0.7).log_prob(x.unsqueeze(-1))
        logits = power * (likelihood + torch.tensor([0.5, 0.3, 0.2]).log())
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("label", dist.Categorical(logits=logits))

    return guide


def test_ties_of_a_discrete_site_are_broken_evenly():
    found = calibrate(_mixture, _labels(1.0), N, L, seed=0, progress=False)
    assert found.features == ["label"]
    assert found.ranks["label"].shape == (N, 1)
    assert found.p_value > 0.01
    _assert_coverage(found.coverage[:, 0], torch.tensor(found.levels, dtype=torch.float64))


def test_a_wrong_guide_of_a_discrete_site_is_found():
    found = calibrate(_mixture, _labels(3.0), N, L, seed=0, progress=False)
    assert found.shapes() == {"label": "too narrow (U-shaped ranks)"}


@pytest.mark.parametrize(("n", "draws", "bins"), [(500, 99, 20), (300, 99, 15), (100, 19, 5), (10_000, 19, 20)])
def test_the_test_is_the_chi_square_test(n, draws, bins):
    found = Calibration({"a": torch.randint(draws + 1, (n, 1)), "b": torch.randint(draws + 1, (n, 2))}, draws)
    assert len(found.expected) == bins
    assert found.expected.sum().item() == pytest.approx(n)
    ranks = torch.cat([found.ranks["a"], found.ranks["b"]], 1)
    for i, name in enumerate(["a", "b[0]", "b[1]"]):
        counts = [
            ((ranks[:, i] >= low) & (ranks[:, i] < high)).sum().item()
            for low, high in zip(found.edges, found.edges[1:], strict=False)
        ]
        expected = chisquare(counts, found.expected.numpy())
        row = found.to_dict()["per_feature"][name]
        assert (row["statistic"], row["p_value"]) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.p_value == pytest.approx(min(1.0, 3 * found.p_values.min().item()))


def test_levels_are_shares_of_the_ranks():
    uniform = [
        Calibration({"z": torch.arange((draws + 1) * 20).unsqueeze(-1) % (draws + 1)}, draws)
        for draws in (19, 76, 99, 199)
    ]
    assert [len(c.levels) for c in uniform] == [3, 4, 4, 4]
    assert uniform[2].levels == pytest.approx([0.5, 0.8, 0.9, 0.96])
    assert uniform[3].levels == pytest.approx([0.5, 0.8, 0.9, 0.95])
    for c in uniform:
        assert c.coverage[:, 0].tolist() == pytest.approx(c.levels)
        assert c.p_value > 0.99


def test_the_summary_and_the_table_are_the_ranks():
    torch.manual_seed(0)
    found = Calibration({"z": torch.randint(100, (400, 2)), "u": torch.randint(50, (400, 1))}, 99)
    inside = torch.stack([(found.pooled >= 5) & (found.pooled <= 94)]).double()
    s = found.summary()
    assert (s["n"], s["draws"], s["features"], s["bins"]) == (400, 99, 3, 20)
    assert s["coverage"][2] == pytest.approx(inside.mean().item())
    assert s["coverage_error"][2] == pytest.approx(inside[0].mean(1).std().item() / 20)
    assert found.coverage_error[2].item() == pytest.approx(math.sqrt(0.9 * 0.1 / 400))
    head, columns, rule, *rows, verdict = str(found).splitlines()
    assert head == "400 data points from the model, 99 guide samples each, ranks in 20 bins"
    assert len({len(line) for line in (columns, rule, *rows)}) == 1
    assert [row.split()[0] for row in rows] == ["z[0]", "z[1]", "u", "mean", "its", "±"]
    assert rows[1].split()[-2] == f"{inside[0, :, 1].mean():.3f}"
    assert verdict == found.verdict()
    assert "The guide is biased, too high (sloping ranks) at u. " in verdict
    assert html.escape(found.verdict()) in found._repr_html_()


def test_a_wide_table_shows_the_worst():
    ranks = torch.randint(100, (400, 30))
    ranks[:, 7] //= 2
    text = str(Calibration({"z": ranks}, 99))
    assert "the 20 of 30 features with the smallest p" in text.splitlines()[0]
    assert sum(line.startswith("z[") for line in text.splitlines()) == 20
    assert "\nz[7] " in text


def test_a_seed_repeats_and_nothing_of_the_users_moves():
    model, guide, _ = pair("PPCA", "MeanField")
    guide.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (calibrate(model, guide, 100, 19, seed=1, progress=False) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.pooled, two.pooled)
    assert guide.training
    assert all(p.grad is None for p in guide.parameters())


@pytest.mark.parametrize("chunk_size", [1, 190, 10**6])
def test_chunks_do_not_matter(chunk_size):
    model = _ppca()
    found = calibrate(model, ExactPosterior(model), 110, 19, seed=0, chunk_size=chunk_size, progress=False)
    assert found.ranks["z"].shape == (110, D)
    assert found.p_value > 0.01


def _dosed(x=None, dose=None, *, n=1):
    """Two latent sites and a covariate: z and u are N(0, 1), x = dose z + N(0, 1), y adds nothing."""
    with pyro.plate("data", n if x is None else len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1.0))
        return pyro.sample("x", dist.Normal(dose.unsqueeze(-1) * z, 1.0).to_event(1), obs=x)


def _of_dose(x, dose):
    precision = 1 + dose.unsqueeze(-1) ** 2
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("z", dist.Normal(dose.unsqueeze(-1) * x / precision, precision.rsqrt().expand(-1, 2)).to_event(1))


def test_covariates_and_several_sites():
    dose = torch.linspace(0, 5, N).double()
    found = calibrate(_dosed, _of_dose, N, L, covariates=(dose,), seed=0, progress=False)
    assert found.features == ["z[0]", "z[1]", "u"]
    assert found.p_value > 0.01
    wrong = calibrate(_dosed, lambda x, dose: _of_dose(x, dose + 1), N, L, covariates=(dose,), seed=0, progress=False)
    assert set(wrong.shapes()) == {"z[0]", "z[1]"}


def test_simulated_values_made_the_data():
    model = _ppca()
    with torch.no_grad():
        model.log_noise.fill_(-15.0)
    values, x = simulate(model, 50)
    assert set(values) == {"z"}
    torch.testing.assert_close(x, (model.mean + values["z"] @ model.weight.T).detach(), rtol=0, atol=1e-5)
    assert not x.requires_grad
    assert not values["z"].requires_grad


def test_simulated_values_are_drawn_from_the_users_stream():
    model = _ppca()
    torch.manual_seed(3)
    _, x = simulate(model, 4)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(model(n=4), x)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_a_model_of_any_style_is_calibrated_on_an_example(scale, shift):
    pair = Images(scale, shift)
    found = calibrate(pair.model, pair.guide, N, L, data=EXAMPLE, seed=0, progress=False)
    assert found.features == ["code[0]", "code[1]"]
    assert (found.p_value > 0.01) == (scale == 1 and shift == 0)
    for feature in found.coverage.T:
        _assert_coverage(feature, _expected_coverage(found.levels, L, scale, shift))


def test_observed_labels_are_data_not_latents():
    def model(features, label=None):
        with pyro.plate("rows", len(features)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Bernoulli(torch.sigmoid(z)), obs=label)
            pyro.sample("obs", dist.Normal(z + 2 * y, 0.5), obs=features)

    def guide(features, label=None):  # the posterior on a grid
        z = torch.linspace(-6, 6, 601).unsqueeze(-1)
        log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Bernoulli(torch.sigmoid(z)).log_prob(label)
        log_p = log_p + dist.Normal(z + 2 * label, 0.5).log_prob(features)
        p = dist.Categorical(logits=log_p.T)
        with pyro.plate("rows", len(features)):
            i = pyro.sample("i", p, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Uniform(z[i, 0] - 0.01, z[i, 0] + 0.01))

    example = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    found = calibrate(model, guide, N, L, data=example, seed=0, progress=False)
    assert found.features == ["z"]
    assert found.p_value > 0.01


def test_covariates_are_part_of_an_example():
    pair = Images()
    with pytest.raises(ValueError, match="covariates are part of an example"):
        calibrate(pair.model, pair.guide, 100, 19, data=EXAMPLE, covariates=torch.ones(100), progress=False)


def _no_n(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _no_none(x=None, *, n=1):
    with pyro.plate("data", x.shape[0], dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def _no_x(x=None, *, n=1):
    with pyro.plate("data", n, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)


def _global(x=None, *, n=1):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n, dim=-1):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "n", "error", "message"),
    [
        (_mixture, 0, ValueError, "n is the number of data points to sample, at least 1, but got 0"),
        (_no_n, 3, TypeError, r"cannot sample data: model\(None, \*covariates, n=3\) fails .*'n'.*data=\.\.\..*x=None"),
        (_no_none, 3, TypeError, r"cannot sample data: .*'NoneType' object has no attribute 'shape'.*obs=x at site"),
        (
            _no_x,
            3,
            ValueError,
            r"samples no data: none of its sampled sites, \['y', 'z'\], is 'x'; give an example",
        ),
        (_global, 3, ValueError, r"site 'z' is sampled with batch shape \(\), but 3 data points need \(3,\): open one"),
    ],
)
def test_models_that_cannot_draw(model, n, error, message):
    with pytest.raises(error, match=message):
        simulate(model, n)


@pytest.mark.parametrize(("n", "draws"), [(99, 99), (500, 18)])
def test_too_little_to_say_anything(n, draws):
    model, guide, _ = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=f"at least 100 data points.*at least 19.*got n={n} and draws={draws}"):
        calibrate(model, guide, n, draws, progress=False)


def test_covariates_of_another_length():
    with pytest.raises(ValueError, match=r"one row for each of the n=100 data points, but one has shape \[7\]"):
        calibrate(_dosed, _of_dose, 100, 19, covariates=(torch.ones(7),), progress=False)


def test_point_guides_have_no_width():
    def point(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    with pytest.raises(ValueError, match=r"point estimate at \['z'\] \(Delta\): it has no density"):
        calibrate(PPCA(5, 2), point, progress=False)


def test_guides_of_given_data_do_not_read_new_ones():
    model, _, x = pair("PPCA", "MeanField")
    guide = AutoNormal(model)
    guide(x)
    with pytest.raises(ValueError, match=r"AutoNormal holds a value for each data point.*jensen.guides.amortize"):
        calibrate(model, guide, progress=False)


@pytest.mark.filterwarnings("ignore:the guide's plates")
def test_joint_weights():
    def other_plate(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"weights of this model and guide are joint.*open the model's plate"):
        calibrate(PPCA(5, 2), other_plate, progress=False)


def test_a_guide_without_latent_sites():
    def model(x=None, *, n=1):
        with pyro.plate("data", n if x is None else len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="samples no latent site of the model, so there is nothing to calibrate"):
        calibrate(model, lambda x: None, progress=False)


def test_draws_that_are_not_finite():
    model = PPCA(5, 2)
    guide = Amortized(nn.Identity(), {"z": _Infinite()})
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match="samples at site 'z' are NaN or inf"):
        calibrate(model, guide, progress=False)


class _Infinite(nn.Module):
    def forward(self, h):
        return dist.Normal(h[..., :2] * math.inf, 1.0, validate_args=False).to_event(1)


def test_the_histogram_of_uniform_ranks_lies_in_the_band():
    torch.manual_seed(0)
    outside = []
    for _ in range(100):
        with without_pyplot():
            ax = plot_ranks(Calibration({"z": torch.randint(100, (500, 1))}, 99))
        band, line = ax.patches
        low, high = band.get_data().baseline, band.get_data().values
        outside.append(((line.get_data().values < low) | (line.get_data().values > high)).any())
    assert sum(outside) <= 5  # one expected


def test_the_histogram_shows_the_counts_of_a_site():
    torch.manual_seed(0)
    c = Calibration({"z": torch.randint(100, (500, 3)), "u": torch.randint(50, (500, 1))}, 99)
    ax = plot_ranks(c, "u")
    heights = ax.patches[-1].get_data()
    assert heights.values.tolist() == pytest.approx((c.counts[:, 3] / 25).tolist())
    assert heights.edges.tolist() == pytest.approx([5 * i - 0.5 for i in range(21)])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["99 % of uniform histograms", "the feature"]
    ax = plot_ranks(c, ax=ax)
    assert ax.patches[-1].get_data().values.tolist() == pytest.approx((c.counts.double().mean(1) / 25).tolist())
    assert ax.patches[-1].get_edgecolor() == to_rgba("#0072B2")
    with pytest.raises(ValueError, match=r"site 'w' was not calibrated, but \['u', 'z'\]"):
        plot_ranks(c, "w")
