"""Progress bars: where they show, and what they say."""

import io
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from jensen.guides import ExactPosterior, PriorGuide
from jensen.inference import compare, evaluate, fit
from jensen.kernel.batches import stream
from jensen.models import PPCA
from jensen.progress import progress_bar, watched


class _Terminal(io.StringIO):
    def isatty(self):
        return True

    def texts(self):
        """What bars wrote, in order."""
        return [text for text in self.getvalue().split("\r") if text.strip()]


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal, from within the test: pytest replaces it between the set-up and the test."""

    def begin():
        made = _Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return begin


def _labels(texts):
    return list(dict.fromkeys(re.match(r"(.*?):? +\d+%", text)[1] for text in texts))


def test_bars_say_what_is_measured_and_of_how_many_points(terminal):
    shown, model, x = terminal(), PPCA(5, latent=2), torch.randn(40, 5)
    pairs = {"exact": (model, ExactPosterior(model)), "prior": (model, PriorGuide(model))}
    compare(pairs, x, 64, refine=False, seed=0)
    assert _labels(shown.texts()) == ["evaluate: exact, 40 data points", "evaluate: prior, 40 data points"]
    shown = terminal()
    fit(model, ExactPosterior(model), x, epochs=2, seed=0)
    assert _labels(shown.texts()) == ["fit: 40 data points"]


def test_a_bar_that_is_done_goes_away(terminal):
    shown = terminal()
    with progress_bar("walk", over=range(3)) as bar:
        assert list(bar) == [0, 1, 2]
    assert shown.texts()
    assert shown.getvalue().split("\r")[-1] == ""


def test_the_bar_counts_every_unit_once(terminal, monkeypatch):
    monkeypatch.setattr("jensen.kernel.batches.progress_bar", partial(progress_bar, mininterval=0))
    shown, model, x = terminal(), PPCA(5, latent=2), torch.randn(4, 5)
    for part in stream(model, PriorGuide(model), (x,), "walk", at_once=2, units=10):
        if not part.first:
            part.advance(20)  # of a part that says nothing all is done at its end
    last = shown.texts()[-1]
    assert last.startswith("walk: 4 data points: 100%")
    assert "40.0/40.0" in last


def test_nothing_is_written_where_nobody_watches_or_progress_is_off(capsys, terminal, monkeypatch):
    model, x = PPCA(5, latent=2), torch.randn(40, 5)
    evaluate(model, ExactPosterior(model), x, 64)
    fit(model, ExactPosterior(model), x, epochs=2)
    assert capsys.readouterr() == ("", "")
    shown = terminal()
    evaluate(model, ExactPosterior(model), x, 64, progress=False)
    assert shown.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)
    assert not watched()


@pytest.mark.parametrize("person", [True, False])
def test_a_notebook_shows_bars_to_a_person_only(person, monkeypatch):
    kernel = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": person}})
    module = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert watched() is person
