"""The gallery of the site: figures drawn by the examples of docstrings, with the code that drew them."""

import importlib
import re

import gallery
import matplotlib.pyplot as plt
import pytest
import sources
from matplotlib.image import imread

from jensen import plots


@pytest.fixture
def references():
    return dict(sources._reference())


@pytest.fixture
def two(references, monkeypatch):
    monkeypatch.setattr(plots, "__all__", ["LiveCurves", "plot_images", "plot_samples", "save"])


def test_the_page_shows_each_figure_its_code_and_its_reference(references, two, tmp_path):
    gallery.generate(tmp_path)
    page = (tmp_path / "gallery.md").read_text()
    assert re.findall(r"^## (.*)$", page, re.M) == ["plot_images", "plot_samples"]
    for name in ("plot_images", "plot_samples"):
        assert imread(tmp_path / "gallery" / f"{name}.png").shape[1] == 510
        (target,) = re.findall(rf":target: (.*)\.html#jensen\.plots\.{name}$", page, re.M)
        assert f"autofunction:: jensen.plots.{name}\n" in references[f"{target}.rst"]
    assert plt.get_fignums() == []


def test_the_code_that_is_shown_draws_the_figure(two, tmp_path):
    for entry in gallery.draw(tmp_path):
        exec(entry.code, {})
        (number,) = plt.get_fignums()
        plt.figure(number).savefig(tmp_path / "again.png", dpi=150)
        plt.close("all")
        assert (imread(tmp_path / "again.png").shape) == imread(tmp_path / f"{entry.name}.png").shape


def test_every_figure_of_the_library_is_in_it():
    for name in (name for name in plots.__all__ if name.startswith("plot_")):
        doc = getattr(importlib.import_module("jensen.plots"), name).__doc__
        statements = list(gallery._statements(name, doc))
        assert any(re.search(rf"\b{name}\(", statement) for statement in statements), name


def test_an_example_that_draws_nothing_is_an_error(monkeypatch, tmp_path):
    def plot_nothing():
        """Nothing.

        >>> 1 + 1
        2
        """

    monkeypatch.setattr(plots, "__all__", ["plot_nothing"])
    monkeypatch.setattr(plots, "plot_nothing", plot_nothing, raising=False)
    with pytest.raises(ValueError, match="docstring of plot_nothing draws no figure"):
        list(gallery.draw(tmp_path))
