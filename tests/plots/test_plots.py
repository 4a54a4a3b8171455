"""Figures: the data in the axes, their labels, and which figures pyplot knows."""

import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from jensen.inference import Bounds, Evidence
from jensen.plots import plot_bounds, plot_images, plot_latent, save
from jensen.plots.axes import without_pyplot

_BOUNDS = {
    "loose": Bounds([1, 2, 4], torch.tensor([-3.0, -2.5, -2.2]), torch.tensor([0.1, 0.1, 0.2]), exact=-2.0),
    "tight": Bounds([1, 2, 4], torch.tensor([-2.1, -2.05, -2.0]), torch.tensor([0.01, 0.01, 0.01]), exact=-2.0),
}


def test_bounds_are_drawn_with_bands_of_two_errors():
    ax = plot_bounds(_BOUNDS)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["loose", "tight", "exact log p(x)"]
    assert list(lines["loose"].get_xdata()) == [1, 2, 4]
    assert lines["loose"].get_ydata().tolist() == pytest.approx([-3.0, -2.5, -2.2])
    assert set(lines["exact log p(x)"].get_ydata()) == {-2.0}
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-3.2)
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "bound on log p(x) (nats per data point)"


def test_upper_bounds_are_drawn_dashed_in_the_same_colour():
    both = replace(_BOUNDS["loose"], upper=torch.tensor([-1.0, -1.5, -1.9]), upper_error=torch.full((3,), 0.2))
    ax = plot_bounds({"one": both, "other": _BOUNDS["tight"]})
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["one", "one, upper bound", "other", "exact log p(x)"]
    assert lines["one, upper bound"].get_ydata().tolist() == pytest.approx([-1.0, -1.5, -1.9])
    assert lines["one, upper bound"].get_linestyle() == "--"
    assert lines["one, upper bound"].get_color() == lines["one"].get_color() != lines["other"].get_color()
    assert ax.collections[1].get_paths()[0].vertices[:, 1].max() == pytest.approx(-0.6)


def test_the_log_evidence_of_each_model_is_marked_in_its_colour():
    values = {"tight": -1.0, "loose": -1.5, "other": 0.0}
    evidence = {
        name: Evidence(
            **{field: torch.full((4,), value) for field in ("elbo", "elbo_error", "log_evidence", "standard_error")},
            ess=torch.ones(4),
            pareto_k=torch.full((4,), 0.9 if name == "loose" else 0.1),
            exact=None,
            particles=100,
            features=1,
        )
        for name, value in values.items()
    }
    ax = plot_bounds(_BOUNDS, evidence=evidence)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["loose", "tight", "loose: log p(x), k-hat > 0.7 for 100.0 %", "tight: log p(x)"]
    for label, line in list(lines.items())[2:]:
        name = label.split(":")[0]
        assert set(line.get_ydata()) == {values[name]}
        assert line.get_color() == lines[name].get_color()
    assert lines["tight: log p(x)"].get_linestyle() == "-."
    alone = plot_bounds(_BOUNDS, evidence={"loose": evidence["loose"]})  # the exact value of the other stays
    assert [line.get_label() for line in alone.get_lines()][2] == "exact log p(x)"


def test_particles_are_written_as_numbers():
    ax = plot_bounds(_BOUNDS)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    ticks = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    assert [text.get_text() for at, text in ticks if low <= at <= high] == ["1", "2", "4"]


def test_latents_are_drawn_by_class():
    z, labels = torch.randn(30, 2), torch.arange(30) % 3
    ax = plot_latent(z, labels, title="map")
    assert [c.get_label() for c in ax.collections] == ["0", "1", "2"]
    torch.testing.assert_close(torch.as_tensor(ax.collections[1].get_offsets().data), z[labels == 1].double())
    assert (ax.get_xlabel(), ax.get_title()) == ("$z_1$", "map")
    named = plot_latent(z, labels, classes=("red", "green", "blue"))
    assert [c.get_label() for c in named.collections] == ["red", "green", "blue"]
    with pytest.raises(ValueError, match="classes names 2 classes, but labels holds 2"):
        plot_latent(z, labels, classes=("red", "green"))


@pytest.mark.parametrize("names", ["", "a name of a class that is longer than a map is wide "])
def test_classes_without_a_colour_of_their_own_stand_on_a_scale(names, tmp_path):
    z, labels = torch.randn(303, 2), torch.arange(303) % 101
    ax = plot_latent(z, labels, prior=torch.randn(200, 2), classes=[f"{names}{i}" for i in range(101)])
    (points,) = [c for c in ax.collections if len(c.get_offsets()) == len(z)]
    assert points.get_array().tolist() == labels.tolist()
    map_, scale = ax.figure.axes
    assert scale.get_ylabel() == "class, one of 101"
    assert [text.get_text() for text in map_.get_legend().get_texts()] == ["prior, 50 %", "prior, 90 %"]
    written = [text.get_text() for text in scale.get_yticklabels()]
    assert (written[0], written[-1], len(written)) == (names[:17] + "..." if names else "0", written[-1], 10)
    save(ax, tmp_path / "map")  # warnings of a layout without room are errors here
    window = ax.get_window_extent()
    assert min(window.width, window.height) > 200


def test_many_latents_are_projected_on_their_principal_plane():
    z = torch.randn(200, 5) * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1])
    ax = plot_latent(z)
    drawn = torch.as_tensor(ax.collections[0].get_offsets().data)
    expected = (z - z.mean(0))[:, [1, 3]].double()
    assert abs(torch.corrcoef(torch.stack([drawn[:, 0], expected[:, 0]]))[0, 1]) > 0.99
    assert abs(torch.corrcoef(torch.stack([drawn[:, 1], expected[:, 1]]))[0, 1]) > 0.99
    assert ax.get_xlabel() == "1st principal direction of 5 latents"


def test_images_stand_in_rows():
    images = torch.arange(6.0).unsqueeze(-1).expand(6, 4) / 5
    ax = plot_images(images, (2, 2), columns=3, row_labels=("top", "bottom"))
    canvas = torch.as_tensor(ax.get_images()[0].get_array().filled(float("nan")))
    assert canvas.shape == (5, 8)  # two rows and three columns of 2 x 2, a pixel between
    assert canvas[0, 0] == 0
    assert canvas[0, 3] == pytest.approx(0.2)
    assert canvas[3, 6] == pytest.approx(1.0)
    assert canvas[2].isnan().all()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["top", "bottom"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plot_bounds(_BOUNDS, ax),
        lambda ax: plot_latent(torch.randn(5, 2), ax=ax),
        lambda ax: plot_images(torch.rand(3, 4), (2, 2), ax=ax),
    ],
)
def test_a_figure_is_made_through_pyplot_unless_axes_are_given(draw):
    ax = Figure().add_subplot()
    assert draw(ax) is ax
    assert Gcf.get_all_fig_managers() == []
    new = draw(None)
    assert [manager.canvas.figure for manager in Gcf.get_all_fig_managers()] == [new.figure]
    with without_pyplot():
        assert draw(None).figure is not new.figure
    assert plt.gcf() is new.figure


def test_a_saved_figure_is_closed_and_a_loop_leaves_none_open(tmp_path):
    for i in range(25):  # matplotlib warns of more than 20 open figures, and warnings are errors here
        save(plot_images(torch.rand(3, 4), (2, 2)), tmp_path / f"{i % 2}")
    assert plt.get_fignums() == []


def test_save_closes_no_figure_of_the_users_and_none_that_a_notebook_is_to_show(tmp_path):
    own, ax = plt.subplots()
    save(plot_images(torch.rand(3, 4), (2, 2), ax=ax), tmp_path / "own")
    with plt.ion():
        shown = plot_images(torch.rand(3, 4), (2, 2))
        save(shown, tmp_path / "shown")
    assert [plt.figure(i) for i in plt.get_fignums()] == [own, shown.figure]


def test_pyplot_is_imported_when_a_figure_is_first_made():
    code = "import sys, jensen.plots; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_bounds({}), "results is empty"),
        (lambda: plot_latent(torch.randn(5, 1)), r"D at least 2, but got \[5, 1\]"),
        (
            lambda: plot_latent(torch.randn(5, 2), torch.zeros(4)),
            r"each of the 5 data points, but has shape \[4\]",
        ),
        (lambda: plot_images(torch.rand(3, 5), (2, 2)), r"images of shape \[N, 4\], or \[N, 2, 2\], but got \[3, 5\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
