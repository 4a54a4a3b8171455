"""Every picture at the width of a column: what it shows is the result's, and all of it can be read."""

import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign import EXAMPLE, Images
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from jensen.families import MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import (
    Bounds,
    Calibration,
    Evidence,
    Gaps,
    GradientSignal,
    History,
    LearningRates,
    RateDistortion,
    decode,
    encode,
    fit,
    mcmc_posterior,
    reconstruct,
    simulate,
)
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA, Banana, BinaryLatentVAE, ConditionalVAE, Hierarchical
from jensen.networks import mlp
from jensen.plots import (
    LiveCurves,
    plot_bounds,
    plot_draws,
    plot_ess,
    plot_gaps,
    plot_images,
    plot_imputations,
    plot_interpolations,
    plot_latent,
    plot_learning_rates,
    plot_manifold,
    plot_missing,
    plot_pareto_k,
    plot_posterior,
    plot_ranks,
    plot_rate_distortion,
    plot_reconstructions,
    plot_samples,
    plot_signal,
    plot_training,
    plot_traversals,
    plot_worst,
    save,
)
from jensen.plots.axes import COLOURS, without_pyplot
from jensen.plots.images import HOLE

SHAPE = (4, 4)
HISTORY = History(
    elbo=[-900.0 + 30 * i for i in range(30)],
    validation=[-905.0 + 30 * i for i in range(30)],
    rate=[0.1 * i for i in range(30)],
    distortion=[905.0 - 30.1 * i for i in range(30)],
    best_epoch=28,
)


def _ppca(latent=3):
    torch.manual_seed(0)
    model = PPCA(16, latent)
    with torch.no_grad():
        model.weight.normal_()
        model.mean.normal_()
    return model, ExactPosterior(model), model(n=8).detach()


def _evidence(n=40, particles=1000):
    """An evidence whose values are known: k-hat and ESS go up and down with the datum's number."""
    place = torch.arange(n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    values = {"elbo": -place, "elbo_error": 0 * place, "log_evidence": -place + 1, "standard_error": 0 * place}
    return Evidence(**values, ess=1000 / (1 + place), pareto_k=place / n, exact=None, particles=particles, features=16)


def _bounds(upper=False):
    b = Bounds([1, 2, 4, 8], torch.tensor([-5.0, -4.0, -3.5, -3.2]), torch.full((4,), 0.1), exact=-3.0)
    return replace(b, upper=b.mean + 2, upper_error=b.error) if upper else b


def _gaps(elbo=1.0, local=0.4, noise=0.0):
    """Gaps of a guide and of the best member of its family, in nats below log p(x)."""
    found = _evidence()
    spread = noise * torch.linspace(-1, 1, len(found.elbo)).double()
    found = replace(found, elbo=found.log_evidence - elbo + spread)
    best = replace(found, elbo=found.log_evidence - local + spread / 2)
    return Gaps(found, best, gained=0 * found.elbo, converged=found.elbo < 1, rounds=1, seconds=0.1)


def _rates(rate):
    one = torch.ones(20).double()
    noise = 0.1 * torch.randn(20).double()
    return RateDistortion(rate + noise, one, 90 - rate + noise, one, {"z": one}, {"z": one}, features=16)


def _draws():
    model = Banana()
    found = mcmc_posterior(model, torch.tensor([[1.0], [2.0]]), method="rejection", draws=60, seed=0, progress=False)
    return model, found


def _signals():
    one = torch.ones(3)
    signals = {k: GradientSignal(one / k, one / k, repeats=10_000) for k in (1, 4, 16)}
    return {"standard": signals, "doubly reparameterized": {1: signals[1], 4: signals[1]}}


def _sweep():
    rates = torch.logspace(-6, -0.2, 180).double()
    return LearningRates(rates, (rates.log10() + 2).abs() * 10 + torch.randn(180).double(), 200, 128)


def _walk():
    model, guide, x = _ppca()
    return plot_interpolations(model, guide, x[:3], x[3:6], SHAPE)


def _traversals():
    model, guide, x = _ppca()
    return plot_traversals(model, guide, x[:1], SHAPE)


def _quadrature():
    model, found = _draws()
    x = torch.tensor([[1.0]])
    return plot_posterior(model, PriorGuide(model), x, draws=100, mcmc=found.draws["z"][0], points=64, title="a banana")


def _holed(*shape):
    """Data of which about half is missing, more of the last features."""
    return torch.rand(shape).masked_fill(torch.rand(shape) < torch.linspace(0, 1, shape[-1]), torch.nan)


def _imputed():
    return _holed(12, 16), torch.rand(12, 16), torch.rand(5, 12, 16)


def _titled(ax):
    ax.set_title("a title of one's own", fontsize=8)
    return ax


PICTURES = {
    "bounds": lambda: _titled(plot_bounds({"mean-field": _bounds(), "full covariance": _bounds(upper=True)})),
    "gaps": lambda: _titled(plot_gaps({"mean-field": _gaps(), "full covariance": _gaps()})),
    "latent": lambda: plot_latent(torch.randn(300, 2), torch.arange(300) % 10, prior=torch.randn(500, 2), title="map"),
    "latent of many": lambda: plot_latent(torch.randn(300, 12), torch.arange(300) % 10),
    "manifold": lambda: plot_manifold(_ppca()[0], SHAPE),
    "samples": lambda: plot_samples(_ppca()[0], SHAPE, n=20, seed=0),
    "reconstructions": lambda: plot_reconstructions(*_ppca(), SHAPE, columns=5),
    "interpolations": _walk,
    "traversals": _traversals,
    "images": lambda: plot_images(torch.rand(20, 16), SHAPE, title="images", row_labels=("above", "below")),
    "missing": lambda: plot_missing(_holed(40, 4), columns=["age", "sex", "income (thousands of euros)", "BMI"]),
    "missing of many": lambda: plot_missing(_holed(3000, 60)),
    "imputations": lambda: plot_imputations(_imputed(), SHAPE, truth=torch.rand(12, 16), title="digits"),
    "pareto_k": lambda: plot_pareto_k({"mean-field": _evidence(), "full covariance": _evidence(30)}),
    "ess": lambda: plot_ess({"mean-field": _evidence(), "full covariance": _evidence(30)}),
    "worst": lambda: plot_worst(_evidence(), torch.rand(40, 16), SHAPE),
    "worst by log p(x)": lambda: plot_worst(_evidence(), torch.rand(40, 16), SHAPE, by="log_evidence", n=3, columns=4),
    "training": lambda: plot_training(HISTORY),
    "rate": lambda: plot_training(HISTORY, ["rate"]),
    "posterior": _quadrature,
    "draws": lambda: plot_draws(_draws()[1], PriorGuide(_draws()[0]), draws=300, seed=0)[0],
    "ranks": lambda: plot_ranks(Calibration({"z": torch.randint(100, (300, 3))}, 99)),
    "rate-distortion": lambda: plot_rate_distortion({f"β = {b}": _rates(10.0 / b) for b in (1, 2, 4)}),
    "signal": lambda: plot_signal(_signals()),
    "learning rates": lambda: plot_learning_rates(_sweep()),
}


@pytest.fixture(scope="module", params=PICTURES)
def picture(request):
    with without_pyplot():  # the tests of one figure follow each other, and each closes those of pyplot
        ax = PICTURES[request.param]()
    FigureCanvasAgg(ax.figure).draw()
    return ax


def _texts(figure):
    """All that can be read, with its box in pixels."""
    renderer = figure.canvas.get_renderer()
    hidden = {t for ax in figure.findobj(Axes) for axis in (ax.xaxis, ax.yaxis) for t in _outside(axis)}
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    return [(t, t.get_window_extent(renderer)) for t in shown]


def _outside(axis):
    """Labels of ticks that the frame does not show."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [t for tick in ticks if not low <= tick.get_loc() <= high for t in (tick.label1, tick.label2)]


def test_a_new_picture_is_a_column_wide(picture):
    assert isinstance(picture, Axes)
    assert picture.figure.get_figwidth() == 3.4


def test_nothing_is_cut_off(picture):
    page = picture.figure.bbox
    for text, box in _texts(picture.figure):
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside, f"{text.get_text()!r} at {box} leaves the page {page}"


def test_no_text_covers_another(picture):
    for (one, a), (other, b) in combinations(_texts(picture.figure), 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width < 1 or height < 1, f"{one.get_text()!r} and {other.get_text()!r} overlap"


def test_text_is_of_a_columns_size(picture):
    sizes = {t.get_text(): t.get_size() for t, _ in _texts(picture.figure)}
    assert all(6 <= size <= 8 for size in sizes.values()), sizes
    labels = {t.get_size() for t in (picture.xaxis.label, picture.yaxis.label) if t.get_text()}
    assert labels <= {7.0, 8.0}


# print


def test_a_picture_is_saved_as_png_and_as_pdf_with_truetype_fonts(tmp_path):
    ax = plot_latent(torch.randn(20, 2), torch.arange(20) % 3)
    png, pdf = save(ax, tmp_path / "new" / "map.v2")
    assert (png.name, pdf.name) == ("map.v2.png", "map.v2.pdf")
    assert imread(png).shape[:2] == (810, 1020)
    page = pdf.read_bytes()
    assert re.search(rb"/MediaBox \[ 0 0 244.8 194.4 \]", page)
    assert b"/FontFile2" in page
    assert b"/Type3" not in page


def test_the_same_picture_gives_the_same_files(tmp_path):
    ax = plot_bounds({"one": _bounds()})
    first = [file.read_bytes() for file in save(ax, tmp_path / "a.png")]
    second = [file.read_bytes() for file in save(ax.figure, tmp_path / "a")]
    assert first == second
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pdf", "a.png"]


def test_a_subfigures_whole_page_is_saved(tmp_path):
    figure = Figure(figsize=(2, 1))
    part = figure.subfigures(1, 2)[0]
    png, _ = save(plot_images(torch.rand(2, 16), SHAPE, ax=part.subplots()), tmp_path / "part")
    assert imread(png).shape[:2] == (300, 600)


def test_what_is_no_picture_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="picture must be an Axes or a Figure, but got 'map'"):
        save("map", tmp_path / "map")
    ax = plot_images(torch.rand(2, 16), SHAPE)
    ax.remove()
    with pytest.raises(ValueError, match="removed from their figure"):
        save(ax, tmp_path / "map")


# grey print


def test_curves_and_classes_differ_without_colour():
    for ax in (PICTURES[name]() for name in ("bounds", "pareto_k", "ess", "training", "signal")):
        styles = [(line.get_marker(), line.get_linestyle(), line.get_markerfacecolor() == "white") for line in ax.lines]
        assert len(set(styles)) == len(styles)
    z, labels = torch.randn(100, 2), torch.arange(100) % 10
    shapes = {c.get_paths()[0].vertices.tobytes() for c in plot_latent(z, labels).collections}
    assert len(shapes) == 10


# images


def _cell(ax, row, column, gaps=(1, 1), shape=SHAPE):
    top, left = row * (shape[0] + gaps[0]), column * (shape[1] + gaps[1])
    canvas = np.ma.filled(ax.get_images()[0].get_array(), np.nan)
    return torch.as_tensor(canvas[top : top + shape[0], left : left + shape[1]]).flatten()


def test_samples_are_the_models_mean_or_its_draws():
    model, _, _ = _ppca()
    torch.manual_seed(derived_seed(5, "plot_samples"))
    values, x = simulate(model, 20)
    mean = decode(model, values)
    for noise, expected in ((False, mean), (True, x)):
        ax = plot_samples(model, SHAPE, n=20, columns=10, noise=noise, seed=5)
        torch.testing.assert_close(_cell(ax, 1, 3), expected[13].detach())


@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE, 3)])
def test_missing_pixels_have_a_colour_of_their_own(shape):
    x = torch.rand(3, *shape)
    x[1, 2, 3] = torch.nan
    ax = plot_images(x.flatten(1), shape, columns=2)
    grid, holes = ax.get_images()
    assert np.asarray(grid.get_array()).shape[:2] == (9, 9)
    if shape == SHAPE:
        torch.testing.assert_close(_cell(ax, 0, 1), x[1].flatten(), equal_nan=True)
    shown = np.asarray(holes.get_array())
    assert np.argwhere(shown[..., 3] > 0).tolist() == [[2, 8]]  # in the second cell; not in the empty fourth
    assert shown[2, 8, :3] == pytest.approx(to_rgb(HOLE))
    assert len(plot_images(x[:1].flatten(1), shape).get_images()) == 1


def test_imputations_keep_what_was_observed():
    x, mean, draws = _imputed()
    truth = torch.rand(12, 16)
    ax = plot_imputations((x, mean, draws), SHAPE, truth=truth, draws=2, columns=8)
    rows = [truth, x, *(torch.where(x.isnan(), z, x) for z in (mean, draws[0], draws[1]))]
    for row, images in enumerate(rows):
        torch.testing.assert_close(_cell(ax, row, 7), images[7], equal_nan=True)
        torch.testing.assert_close(_cell(ax, 5 + row, 3), images[11], equal_nan=True)
    names = ["truth", "observed", "mean", "sample 1", "sample 2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names * 2
    result = SimpleNamespace(x=x.reshape(12, 4, 4), mean=mean, draws=draws)
    again = plot_imputations(result, SHAPE, draws=0)
    assert [t.get_text() for t in again.get_yticklabels()] == ["observed", "mean"] * 2
    torch.testing.assert_close(_cell(again, 3, 1), rows[2][11])


def test_rows_with_the_same_holes_are_together_and_features_have_their_share():
    x = torch.rand(1000, 3)
    x[::2, 1] = torch.nan
    x[1::4, 0] = x[1::4, 2] = torch.nan
    ax = plot_missing(x)
    lines = torch.as_tensor(np.asarray(ax.get_images()[0].get_array()))
    assert lines.shape == (400, 3)
    assert lines.unique_consecutive(dim=0).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert lines.mean(0).tolist() == pytest.approx([0.25, 0.5, 0.25])
    (above,) = ax.child_axes
    assert [bar.get_height() for bar in above.patches] == pytest.approx([25, 50, 25])
    assert ax.get_title() == "33.3 % missing, 3 patterns"
    assert plot_missing(x[:3].long().reshape(3, 3, 1)).get_title() == "0 % missing, 1 pattern"


def test_data_stand_above_their_reconstructions():
    model, guide, x = _ppca()
    again = reconstruct(model, guide, x, seed=1)
    ax = plot_reconstructions(model, guide, x, SHAPE, columns=5, seed=1)
    torch.testing.assert_close(_cell(ax, 0, 4), x[4])
    torch.testing.assert_close(_cell(ax, 1, 4), again[4])
    torch.testing.assert_close(_cell(ax, 2, 2), x[7])
    torch.testing.assert_close(_cell(ax, 3, 2), again[7])
    assert _cell(ax, 3, 3).isnan().all()  # eight data in rows of five
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "E[x | z]"] * 2


def test_an_interpolation_goes_straight_through_a_linear_model():
    model, guide, x = _ppca()
    ends = decode(model, encode(model, guide, x))
    ax = plot_interpolations(model, guide, x[:2], x[2:4], SHAPE, steps=5)
    for row in (0, 1):
        torch.testing.assert_close(_cell(ax, row, 0), x[row])
        torch.testing.assert_close(_cell(ax, row, 1), ends[row])
        torch.testing.assert_close(_cell(ax, row, 2), 0.75 * ends[row] + 0.25 * ends[2 + row], atol=1e-5, rtol=0)
        torch.testing.assert_close(_cell(ax, row, 5), ends[2 + row])
        torch.testing.assert_close(_cell(ax, row, 6), x[2 + row])
    assert ax.get_xlabel().startswith("t, from the posterior mean")


def test_a_traversal_moves_one_latent_and_keeps_the_others():
    model, guide, x = _ppca()
    z = encode(model, guide, x[:1])["z"]
    ax = plot_traversals(model, guide, x[:1], SHAPE, latents=[2, 0], steps=5)
    for row, d in enumerate((2, 0)):
        moved = z.clone()
        moved[0, d] = torch.special.ndtri(torch.tensor(0.005))
        torch.testing.assert_close(_cell(ax, row, 0), decode(model, {"z": moved})[0], atol=1e-5, rtol=0)
        moved[0, d] = 0.0
        torch.testing.assert_close(_cell(ax, row, 2), decode(model, {"z": moved})[0], atol=1e-5, rtol=0)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["$z_{3}$", "$z_{1}$"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5 %", "50 %", "99.5 %"]


def test_layers_below_follow_a_traversal_and_those_above_stay():
    model = Hierarchical.of_widths(16, latents=(3, 2), hidden=((8,), (8,)))
    guide = PriorGuide(model)
    top = plot_traversals(model, guide, torch.zeros(1, 16), SHAPE, seed=0)
    assert (_cell(top, 0, 0) - _cell(top, 0, 8)).abs().max() > 1e-3
    assert len(top.get_yticks()) == 2
    below = plot_traversals(model, guide, torch.zeros(1, 16), SHAPE, site="z_1", seed=0)
    assert len(below.get_yticks()) == 3


def test_a_manifold_is_decoded_from_the_priors_quantiles():
    model, _, _ = _ppca()
    ax = plot_manifold(model, SHAPE, latents=(2, 0), points=5)
    edge = torch.special.ndtri(torch.tensor(0.99))
    z = torch.tensor([[edge, 0.0, -edge]])  # z_1 upwards, z_3 to the right: above at the left
    torch.testing.assert_close(_cell(ax, 0, 0), decode(model, {"z": z})[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(_cell(ax, 4, 4), decode(model, {"z": -z})[0], atol=1e-5, rtol=0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{3}$", "$z_{1}$")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["\N{MINUS SIGN}2.33", "0.00", "2.33"]
    assert ax.get_yticks()[0] > ax.get_yticks()[-1]  # the lowest value at the bottom


def test_a_conditional_models_pictures_are_of_a_class():
    from jensen.families import Gaussian

    model = ConditionalVAE(mlp(2 + 3, [8]), Gaussian(16, 8), latent=2, covariates=3)
    ax = plot_manifold(model, SHAPE, points=3, covariates=(torch.tensor([2]),))
    expected = decode(model, {"z": torch.zeros(1, 2)}, torch.tensor([2]))[0]
    torch.testing.assert_close(_cell(ax, 1, 1), expected)
    assert plot_samples(model, SHAPE, n=3, covariates=(torch.arange(3),)).get_images()


def test_models_of_any_style_are_pictured_on_an_example():
    pair, shape = Images(), (2, 3)

    torch.manual_seed(derived_seed(0, "plot_samples"))
    latents, x = simulate(pair.model, 4, data=EXAMPLE)
    means = decode(pair.model, latents, data=x)
    found = plot_samples(pair.model, shape, n=4, data=EXAMPLE, seed=0)
    torch.testing.assert_close(_cell(found, 0, 0, shape=shape), means[0], check_dtype=False)
    found = plot_samples(pair.model, shape, n=4, noise=True, data=EXAMPLE, seed=0)
    torch.testing.assert_close(_cell(found, 0, 0, shape=shape), x[0].flatten(), check_dtype=False)
    low, high = torch.special.ndtri(torch.tensor([0.01, 0.99])).double()
    found = plot_manifold(pair.model, shape, points=3, data=EXAMPLE)
    expected = decode(pair.model, {"code": torch.stack([low, high]).unsqueeze(0)}, data=EXAMPLE)[0]
    torch.testing.assert_close(_cell(found, 0, 0, shape=shape), expected, atol=1e-4, rtol=0, check_dtype=False)
    found = plot_traversals(pair.model, pair.guide, x[:1], shape, steps=3)
    assert [label.get_text() for label in found.get_yticklabels()] == ["$z_{1}$", "$z_{2}$"]
    assert len(plot_interpolations(pair.model, pair.guide, x[:2], x[2:], shape, steps=3).get_yticks()) == 0
    assert plot_reconstructions(pair.model, pair.guide, x, shape).get_images()


def test_colours_are_kept_and_clipped():
    images = torch.linspace(-0.5, 1.5, 2 * 48).reshape(2, 48)
    ax = plot_images(images, (4, 4, 3))
    canvas = torch.as_tensor(np.asarray(ax.get_images()[0].get_array()))
    torch.testing.assert_close(canvas[:4, :4], images[0].reshape(4, 4, 3).clamp(0, 1))
    assert (canvas[:, 4] == 1).all()
    planes = images.reshape(2, 4, 4, 3).movedim(-1, 1)
    for again in (planes, planes.flatten(1)):
        first = plot_images(again, (4, 4))
        assert np.array_equal(first.get_images()[0].get_array(), ax.get_images()[0].get_array())


# measurements


def test_k_hats_are_ranked_between_their_limits():
    evidence = _evidence(40, particles=100)
    ax = plot_pareto_k({"mean-field": evidence})
    lines = {line.get_label(): line for line in ax.lines}
    curve = lines["mean-field: 50 % above 0.5"]  # 1 - 1 / log10(100)
    assert curve.get_ydata().tolist() == pytest.approx([i / 40 for i in range(40)])
    assert curve.get_xdata().tolist() == pytest.approx([1.25 + 2.5 * i for i in range(40)])
    assert set(lines["0.7"].get_ydata()) == {0.7}
    thousand = {line.get_label(): line for line in plot_pareto_k({"a": _evidence()}).lines}
    assert set(thousand["0.67, for K = 1000"].get_ydata()) == {1 - 1 / 3}
    assert set(thousand["0.5"].get_ydata()) == {0.5}
    assert not [s for s in (t.get_label() for t in plot_pareto_k({"a": _evidence(40, 5000)}).lines) if "5000" in s]


def test_an_endless_k_hat_is_marked_and_counted():
    evidence = _evidence(4)
    evidence = replace(evidence, pareto_k=torch.tensor([0.1, torch.inf, 0.2, torch.nan]).double())
    ax = plot_pareto_k({"a": evidence})
    assert ax.lines[0].get_label() == "a: 50 % above 0.67"
    assert ax.lines[0].get_ydata()[:2].tolist() == pytest.approx([0.1, 0.2])
    assert ax.collections[0].get_offsets().data.tolist() == [[62.5, 1.0], [87.5, 1.0]]


def test_effective_sample_sizes_are_ranked_below_k():
    ax = plot_ess({"mean-field": _evidence(), "other": _evidence(20)})
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([1000 / (1 + i) for i in range(40)])
    assert ax.lines[0].get_label() == f"mean-field: mean {sum(25 / (1 + i) for i in range(40)):.3g}"
    assert (ax.lines[-1].get_label(), set(ax.lines[-1].get_ydata())) == ("K = 1000", {1000})
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "data points, from the best to the worst (%)")


@pytest.mark.parametrize(
    ("by", "lowest"), [("pareto_k", False), ("ess", True), ("elbo", True), ("log_evidence", True), ("gap", False)]
)
def test_the_worst_data_come_first(by, lowest):
    evidence = replace(_evidence(), elbo=_evidence().elbo * 2)
    values = evidence.best if by == "log_evidence" else getattr(evidence, by)
    x = torch.rand(40, 16)
    ax = plot_worst(evidence, x, SHAPE, by=by, n=6, columns=3)
    order = values.argsort(descending=not lowest)[:6].tolist()
    shown = [t.get_text() for t in ax.texts]
    assert shown == [f"#{i}: {float(values[i]):.3g}".replace("-", "\N{MINUS SIGN}") for i in order]
    torch.testing.assert_close(_cell(ax, 0, 2), x[order[2]])
    canvas = np.ma.filled(ax.get_images()[0].get_array(), np.nan)
    torch.testing.assert_close(torch.as_tensor(canvas[-4:, -4:]).flatten(), x[order[5]])


def test_a_map_shows_where_the_prior_is():
    z, draws = torch.randn(50, 2), torch.randn(8000, 2)
    ax = plot_latent(z, prior=draws)
    curves = ax.collections[0].get_paths()
    for mass, path in zip((0.9, 0.5), curves, strict=True):  # by chi squared with two degrees
        squared = torch.as_tensor(path.vertices).square().sum(-1)
        assert squared.mean().item() == pytest.approx(-2 * np.log(1 - mass), rel=0.15)
    assert ax.get_xlim()[1] < 4  # the frame holds the curves, not the grid of the estimate
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["prior, 50 %", "prior, 90 %"]
    far = plot_latent(z + 10, prior=draws)
    assert far.get_xlim()[0] < -1.5 < 11 < far.get_xlim()[1]


@pytest.mark.parametrize("gap", [4.0, 0.002])
def test_every_gap_can_be_seen_and_read(gap):
    ax = plot_gaps({"mean-field": _gaps(elbo=4.0, local=1.0), "flow": _gaps(elbo=gap, local=gap / 4)})
    FigureCanvasAgg(ax.figure).draw()
    of_family, of_encoder = ax.containers[0].patches, ax.containers[1].patches
    assert [bar.get_width() for bar in of_family] == pytest.approx([1.0, gap / 4])
    assert [bar.get_x() + bar.get_width() for bar in of_encoder] == pytest.approx([4.0, gap])
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3] / 255
    colours = np.array([to_rgb(COLOURS[0]), to_rgb(COLOURS[4])])
    for bars in zip(of_family, of_encoder, strict=True):  # also of the shortest there are pixels in colour
        box = Bbox.union([bar.get_window_extent() for bar in bars])
        rows = slice(*sorted(round(pixels.shape[0] - y) for y in (box.y0 + 2, box.y1 - 2)))
        columns = slice(round(box.x0) - 3, round(box.x1) + 4)
        off = np.abs(pixels[rows, columns, None] - colours).max(-1)  # [rows, columns, 2]
        assert (off < 0.1).any((0, 2)).sum() >= 2, "at least two columns of pixels"
    assert [text.get_text().split(" ")[0] for text in ax.texts] == ["4.0000", f"{gap:.4f}"]


def test_whiskers_stand_out_from_bars():
    noisy = _gaps(elbo=4.0, local=1.0, noise=2.0)
    ax = plot_gaps({"mean-field": noisy})
    FigureCanvasAgg(ax.figure).draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(int)
    lines = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert len(lines) == 2
    for line in lines:
        (start, end) = ax.transData.transform(line.get_segments()[0])
        row, column = round(pixels.shape[0] - start[1]), round(0.75 * start[0] + 0.25 * end[0])
        seen = pixels[row - 5 : row + 6, column]
        assert seen.max(-1).min() < 40, "a black line"
        assert (seen.min(-1) > 235).any(), "with white beside it, on bars of any colour"


def test_names_of_close_points_do_not_cover_each_other():
    ax = plot_rate_distortion({name: _rates(10.0 + 0.01 * i) for i, name in enumerate(("mean-field", "full", "IAF"))})
    FigureCanvasAgg(ax.figure).draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_logarithmic_axis_has_ticks_to_read_within_less_than_a_decade():
    ax = plot_ess({"a": replace(_evidence(), ess=torch.linspace(300.0, 800.0, 40).double())})
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    shown = [t.get_text() for at, t in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low <= at <= high]
    assert {"300", "500", "700", "1000"} <= set(shown)


# training


def test_curves_are_those_of_the_history():
    ax = plot_training(HISTORY)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["training bound", "validation bound", "kept"]
    assert lines["training bound"].get_ydata().tolist() == HISTORY.elbo
    assert lines["validation bound"].get_ydata().tolist() == HISTORY.validation
    assert list(lines["training bound"].get_xdata()) == list(range(1, 31))
    assert set(lines["kept"].get_xdata()) == {28}
    assert ax.get_ylim()[0] == pytest.approx(HISTORY.validation[3] - 0.06 * 785)  # all but the first tenth
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "bound on log p(x)\n(nats per data point)")
    assert plot_training(HISTORY, ["distortion"]).lines[0].get_ydata().tolist() == HISTORY.distortion


def _trained(callbacks):
    torch.manual_seed(0)
    model = PPCA(5, latent=2)
    guide, x = amortize(model, mlp(5, [8]), MeanField, context=8), torch.randn(40, 5)
    return fit(model, guide, x, epochs=4, validation=x[:20], seed=0, callbacks=callbacks, progress=False)


def test_live_curves_hold_the_run_and_do_not_change_it():
    live = LiveCurves()
    history = _trained([live])
    assert history.elbo == _trained([]).elbo
    above, middle, below = live.figure.axes
    assert [line.get_ydata().tolist() for line in above.lines] == [history.elbo, history.validation]
    assert middle.lines[0].get_ydata().tolist() == history.rate
    assert below.lines[0].get_ydata().tolist() == history.distortion
    assert Gcf.get_all_fig_managers() == []


def test_a_notebook_sees_one_picture_that_is_redrawn(monkeypatch):
    """A stand-in for IPython keeps what it is shown; notebooks themselves are executed elsewhere."""
    shown = []

    class ZMQInteractiveShell:
        pass

    class Handle:
        def update(self, image):
            shown.append(("again", image))

    def display(image, display_id):
        shown.append(("first", image))
        return Handle()

    modules = {"IPython": {"get_ipython": ZMQInteractiveShell}, "IPython.display": {"Image": dict, "display": display}}
    for name, content in modules.items():
        monkeypatch.setitem(__import__("sys").modules, name, type(name, (), content))
    live = LiveCurves(seconds=0)
    history = HISTORY
    for _ in range(2):
        live.after_epoch(history, None, None)
    live.close()
    assert [kind for kind, _ in shown][:1] == ["first"]
    assert {kind for kind, _ in shown[1:]} == {"again"}
    assert all(image["data"].startswith(b"\x89PNG") for _, image in shown)
    drawn = len(shown)
    live.close()
    assert len(shown) == drawn  # closed once


def test_live_curves_outside_a_notebook_show_nothing(capsys):
    _trained([LiveCurves()])
    assert capsys.readouterr().out == ""


# what cannot be drawn


@pytest.mark.parametrize("draw", [plot_bounds, plot_pareto_k, plot_ess, plot_gaps, plot_signal, plot_rate_distortion])
def test_results_come_by_name(draw):
    with pytest.raises(TypeError, match=r"results must be a dictionary of .* by name, but got a list"):
        draw([1])
    with pytest.raises(ValueError, match=rf"results is empty: {draw.__name__} needs at least one"):
        draw({})


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda m, g, x: plot_interpolations(m, g, x[:2], x[:1], SHAPE),
            "same number of data points, but got 2 and 1",
        ),
        (lambda m, g, x: plot_interpolations(m, g, x[:1], x[:1], SHAPE, steps=1), "at least 2, but got 1"),
        (lambda m, g, x: plot_traversals(m, g, x, SHAPE), r"needs one data point.* but got 8: take x\[i"),
        (lambda m, g, x: plot_traversals(m, g, x[:1], SHAPE, steps=1), "at least 2, but got 1"),
        (lambda m, g, x: plot_traversals(m, g, x[:1], SHAPE, latents=[3]), r"from 0 to 2, but got \[3\]"),
        (lambda m, g, x: plot_traversals(m, g, x[:1], SHAPE, site="y"), "site 'y' must be a continuous vector"),
        (lambda m, g, x: plot_manifold(m, SHAPE, points=1), "at least 2, but got 1"),
        (lambda m, g, x: plot_manifold(m, SHAPE, latents=(0, 3)), r"from 0 to 2, but got \(0, 3\)"),
        (lambda m, g, x: plot_manifold(PPCA(16, 1), SHAPE), "at least 2 features"),
        (lambda m, g, x: plot_missing(x[:0]), r"at least one row and feature, but got \[0, 16\]"),
        (lambda m, g, x: plot_missing(x, columns=["a"]), "columns needs a name for each of the 16 features, but has 1"),
        (
            lambda m, g, x: plot_imputations((x, x[1:], x[None]), SHAPE),
            r"of x, \[8, 16\], .* {'mean': \[7, 16\]}",
        ),
        (lambda m, g, x: plot_imputations((x, x, x), SHAPE), r"draws of shape \[m, 8, 16\], but got {'draws'"),
        (lambda m, g, x: plot_imputations((x, x, x[None]), SHAPE, draws=-1), "at least 0, but got -1"),
        (lambda m, g, x: plot_samples(m, (5, 5)), r"images of shape \[N, 25\], or \[N, 5, 5\], but got \[50, 16\]"),
        (
            lambda m, g, x: plot_latent(x, prior=torch.randn(9, 3)),
            r"or more, of shape \[M, 16\], but got \[9, 3\]",
        ),
        (
            lambda m, g, x: plot_pareto_k({"a": _evidence(4, 20)}),
            r"at least 25 particles, but results have \{'a': 20\}",
        ),
        (lambda m, g, x: plot_worst(_evidence(8), x, SHAPE, by="loss"), "by must be 'pareto_k'.*, but got 'loss'"),
        (lambda m, g, x: plot_worst(_evidence(9), x, SHAPE), "evidence is of 9 data points, but got 8"),
        (lambda m, g, x: plot_worst(_evidence(8, 20), x, SHAPE), "at least 25 particles, but evidence has 20"),
        (lambda m, g, x: plot_training(HISTORY, ["loss"]), r"curves are among .* but got \['loss'\]"),
        (lambda m, g, x: plot_training(History()), "the history holds none of"),
        (lambda m, g, x: LiveCurves(seconds=-1), "not negative, but got -1"),
    ],
)
def test_what_makes_no_picture_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(*_ppca())


def test_there_is_no_way_between_bits():
    from jensen.families import Bernoulli

    model = BinaryLatentVAE(mlp(3, [8]), Bernoulli(16, 8), latent=3)
    x = torch.zeros(1, 16)
    with pytest.raises(ValueError, match=r"discrete latents cannot be interpolated, .* than \['z'\]"):
        plot_interpolations(model, PriorGuide(model), x, x, SHAPE)
