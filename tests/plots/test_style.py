"""The style of new figures: it holds for them, and for nothing else."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib import rc_context, rcParams
from matplotlib.colors import to_hex

from jensen.inference import Bounds, History
from jensen.plots import LiveCurves, plot_bounds, plot_images
from jensen.plots.axes import COLOURS

BOUNDS = {"one": Bounds([1, 2, 4], torch.tensor([-3.0, -2.5, -2.2]), torch.full((3,), 0.1), exact=None)}


def _looks(ax):
    """What a reader sees of the frame and the ticks, whenever the figure is drawn."""
    ax.figure.canvas.draw()
    labels = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    return (
        {text.get_fontname() for text in labels},
        {text.get_size() for text in labels},
        {tick.tick1line.get_markersize() for tick in ax.yaxis.get_major_ticks()},
        [ax.spines[side].get_visible() for side in ("left", "bottom", "top", "right")],
    )


def test_a_new_figure_has_the_style_whatever_the_callers_is():
    expected = ({"DejaVu Sans"}, {7.0}, {2.5}, [True, True, False, False])
    with rc_context({"font.family": "STIXGeneral", "xtick.labelsize": 20, "ytick.labelsize": 20, "figure.dpi": 50}):
        ax = plot_bounds(BOUNDS)
        assert _looks(ax) == expected
        assert (ax.figure.dpi, ax.xaxis.label.get_size()) == (200, 8)


def test_the_callers_style_is_back_afterwards():
    before = rcParams.copy()
    plot_bounds(BOUNDS)
    with pytest.raises(ValueError, match="images of shape"):
        plot_images(torch.rand(3, 5), (2, 2))
    assert rcParams == before


def test_what_a_backend_sets_when_the_first_figure_loads_it_stays(monkeypatch):
    """The backend of notebooks turns on interactive mode then, and shows figures only as long as it is on."""
    figure = plt.figure

    def loaded(**how):
        plt.ion()
        return figure(**how)

    monkeypatch.setattr(plt, "figure", loaded)
    plot_bounds(BOUNDS)
    assert plt.isinteractive()
    plt.ioff()


def test_given_axes_keep_the_style_of_their_maker():
    with rc_context({"font.family": "STIXGeneral", "xtick.labelsize": 9, "ytick.labelsize": 9}):
        ax = plot_bounds(BOUNDS, ax=plt.subplots()[1])
        assert _looks(ax) == ({"STIXGeneral"}, {9.0}, {3.5}, [True] * 4)


def test_the_style_can_be_used_by_its_name():
    with plt.style.context("jensen.plots.jensen"):
        figure, ax = plt.subplots()
        assert [to_hex(line.get_color()).upper() for line in ax.plot(torch.rand(2, 10))] == list(COLOURS)
        assert tuple(figure.get_size_inches()) == (3.4, 2.6)


def test_live_curves_have_the_style():
    live = LiveCurves()
    live.after_epoch(History(elbo=[-3.0, -2.0]), None, None)
    live.close()
    assert _looks(live.figure.axes[0])[0] == {"DejaVu Sans"}
    assert live.figure.dpi == 200
    assert plt.get_fignums() == []


def test_what_fails_leaves_no_empty_figure():
    with pytest.raises(RuntimeError, match="size of tensor"):
        plot_bounds({"one": Bounds([1, 2], torch.tensor([-3.0, -2.0]), torch.ones(5), exact=None)})
    assert plt.get_fignums() == []


def test_a_call_that_does_not_fit_is_refused_in_pythons_words():
    with pytest.raises(TypeError, match=r"plot_bounds\(\) got an unexpected keyword argument 'axes'"):
        plot_bounds(BOUNDS, axes=None)
