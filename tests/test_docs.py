"""The site's pages: every example runs, and its members are held to what the library's own are held to."""

import doctest
import importlib
import inspect
import re
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import members
import names
import pytest
import sources
import tasks
import test_compile
import test_contract
import test_families
import test_objectives
import torch
from docstrings import rewrite

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text() or "```pycon" in path.read_text())
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.M | re.S)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_page(path):
    """Run a page's blocks one after the other in one namespace; what stands under a prompt must come out as it stands.

    Training of hundreds of epochs is shortened to one. Returns the namespace.
    """
    text, scope = path.read_text(), {"__name__": f"docs.{path.stem}"}
    for match in BLOCK.finditer(text):
        kind, source = match.groups()
        line = text[: match.start()].count("\n") + 1
        if kind == "python":
            source = re.sub(r"epochs=\d{3}", "epochs=1", source)
            exec(compile("\n" * line + source, path.name, "exec"), scope)
        else:
            case = doctest.DocTestParser().get_doctest(source, scope, path.name, path.name, line)
            report = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(case, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            scope.update(case.globs)
    return scope


@cache
def ran(page):
    """The namespace that a page's blocks leave, run once."""
    return run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran(page)


@pytest.fixture
def added(monkeypatch):
    """That page's members among the library's own, under the name ``added``."""
    scope = ran(DOCS / "adding.md")
    monkeypatch.setitem(members.MODELS, "added", lambda: scope["ItemResponse"](members.X, members.D))
    monkeypatch.setitem(members.GUIDES, "added", lambda model: scope["Linear"](model))
    monkeypatch.setitem(members.GUIDES, "added family", partial(members.amortized, family=scope["LogisticFamily"]))
    return scope


def _needs(test):
    return set(inspect.signature(test).parameters)


TESTS = {name: test for name, test in vars(test_contract).items() if name.startswith("test_")}
OF_A_MODEL = [name for name, test in TESTS.items() if _needs(test) == {"model_name"}]
OF_A_PAIR = [name for name, test in TESTS.items() if {"model_name", "guide_name"} <= _needs(test)]
OF_A_FAMILY = (
    "test_shapes",
    "test_an_expanded_one_is_the_same",
    "test_parameters_are_affine_in_the_context",
    "test_without_context_h_holds_the_parameters",
    "test_integrates_to_one",
    "test_log_q_of_a_draw_is_that_of_the_same_value_as_a_stranger",
    "test_the_gradient_of_log_q_at_a_value_that_was_sampled_is_the_score",
)
OF_AN_OBJECTIVE = (
    "test_the_loss_is_one_number_however_it_is_asked_for",
    "test_loss_and_bound_change_nothing_of_the_objective",
    "test_a_subsample_counts_n_over_b_times_once",
)


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_the_added_model_is_held_to_the_contract(name, added):
    TESTS[name]("added")


@pytest.mark.parametrize(
    ("model_name", "guide_name"), [("added", "added"), ("added", "added family"), ("PPCA", "added"), ("added", "IAF")]
)
@pytest.mark.parametrize("name", OF_A_PAIR)
def test_the_added_pairs_are_held_to_the_contract(name, model_name, guide_name, added, request):
    more = {"float64": None, "dtype": torch.float64, "objective": added["MIWAE"](2, 3)}
    needs = _needs(TESTS[name])
    if "float64" in needs:
        request.getfixturevalue("float64")
    TESTS[name](model_name, guide_name, **{key: more[key] for key in needs & set(more)})


@pytest.mark.parametrize("name", OF_A_FAMILY)
def test_the_added_family_is_held_to_the_contract(name, added, request):
    needs = _needs(vars(test_families)[name])
    if "float64" in needs:
        request.getfixturevalue("float64")
    for leading in [(), (3, 7)] if "leading" in needs else [()]:
        more = {"family": added["LogisticFamily"], "float64": None, "leading": leading}
        vars(test_families)[name](**{key: more[key] for key in needs})


@pytest.mark.parametrize("name", OF_AN_OBJECTIVE)
def test_the_added_objective_is_held_to_the_contract(name, added, float64):
    vars(test_objectives)[name](lambda: added["MIWAE"](2, 3))


@pytest.mark.parametrize(("model_name", "guide_name"), [("added", "added"), ("added", "added family"), ("PPCA", "IAF")])
def test_the_added_objective_is_captured(model_name, guide_name, added, float64):
    model, guide, x = members.pair(model_name, guide_name)
    test_compile._is_that_of_the_objective(model, guide, x, added["MIWAE"](2, 3))


def test_the_contract_asks_something_of_each():
    assert len(OF_A_MODEL) >= 2
    assert len(OF_A_PAIR) >= 9


def test_every_public_name_has_a_place_in_the_reference():
    listed = list(sources._reference())
    pages = dict(listed)
    assert len(pages) == len(listed)  # no two pages under one name
    for room in sources.ROOMS:
        for name in importlib.import_module(f"jensen.{room}").__all__:
            owner = sources.home(room, name)[1]
            found = [
                page
                for page, text in pages.items()
                if re.search(rf"^.. auto\w+:: jensen\.{owner}\.{name}$", text, re.M)
            ]
            assert len(found) == 1, f"jensen.{room}.{name} is on {found}"
    assert len(sources.ROOMS) == 9
    for module, listed in tasks.ALONE.items():
        for name in listed:
            assert re.search(rf"^.. auto\w+:: jensen\.{module}\.{name}$", pages[f"api/{module}.rst"], re.M)


@pytest.fixture
def elsewhere(monkeypatch):
    """Two names that ``inference`` and ``plots`` list: one from a folder of ``inference``, one from no public room."""
    rooms = [importlib.import_module(f"jensen.{room}") for room in ("inference", "plots")]
    for name, package in {"pour": "jensen.cellar", "carry": "jensen.inference.stairs"}.items():

        def value():
            """Move wine. It is heavy.

            References:
                Noah, Shem and Ham (1999), On Vines,
                second edition. https://example.org/vines
                Lot (2001), Caves.
            """

        value.__module__ = f"{package}.casks"
        for module, doc in {package: f"The folder of {name}.", value.__module__: None}.items():
            monkeypatch.setitem(sys.modules, module, ModuleType(module, doc))
        for room in rooms:
            monkeypatch.setattr(room, name, value, raising=False)
            monkeypatch.setattr(room, "__all__", [*room.__all__, name])
        monkeypatch.setitem(tasks.TASKS["inference"], f"To {name}", (name,))


def test_a_public_name_without_a_task_stops_the_build(elsewhere, monkeypatch):
    monkeypatch.delitem(tasks.TASKS["inference"], "To pour")
    with pytest.raises(ValueError, match=r"jensen.inference has \['pour'\] without a task: add each to TASKS"):
        sources.members()


def test_a_task_lists_public_names_only():
    with pytest.raises(ValueError, match=r"TASKS of jensen.plots lists \['save'\]"):
        tasks.grouped("plots", [name for name, _ in sources.public("plots") if name != "save"])


def test_every_subpackage_with_a_long_list_has_tasks():
    for room in sources.ROOMS:
        assert room in tasks.TASKS or len(list(sources.public(room))) < 5


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("PPCA", "jensen.models.PPCA"),
        ("compare(..., gaps=True)", "jensen.inference.compare"),
        ("jensen.inference.fit", "jensen.inference.fit"),
        ("Evidence.by_guide", "jensen.inference.Evidence.by_guide"),
        ("Laplace", None),  # of two subpackages
        ("guides.Laplace", "jensen.guides.Laplace"),
        ("observed_only", "jensen.missing.observed_only"),
        ("jensen.Imputer", "jensen.imputer.Imputer"),
        ("IWAE < ELBO", None),
        ("jensen compare", None),
    ],
)
def test_literals_that_are_public_names_have_a_target(text, full):
    assert names.target(text) == full


def test_a_name_defined_outside_the_public_rooms_belongs_to_the_room_that_lists_it(elsewhere):
    for room in ("inference", "plots"):
        assert sources.home(room, "pour") == ("jensen.cellar.casks", "inference")
        assert sources.home(room, "carry") == ("jensen.inference.stairs.casks", "inference")
    listed = list(sources._reference())
    pages = dict(listed)
    assert len(pages) == len(listed)
    assert ".. autofunction:: jensen.inference.pour\n" in pages["api/inference/cellar/casks.rst"]
    assert ".. autofunction:: jensen.inference.carry\n" in pages["api/inference/stairs/casks.rst"]
    for entry in re.search(r"toctree::.*?\n\n(.*?)\n\n", pages["api/inference.rst"], re.S)[1].split():
        listed = re.search(r"toctree::.*?\n\n(.*?)\n\n", pages[f"api/{entry}.rst"], re.S)
        for module in listed[1].split() if listed else []:
            assert f"api/inference/{module.removeprefix('../')}.rst" in pages


def test_the_overview_is_made_from_docstrings(elsewhere):
    text = sources.members()
    row = "\n     - Move wine.\n     - `Noah et al. 1999 <https://example.org/vines>`__; Lot 2001\n"
    for name in ("pour", "carry"):
        assert f"   * - :py:obj:`~jensen.inference.{name}`{row}" in text
        assert f"\n\nTo {name}\n~~~" in text
    assert text.count(":py:obj:`~jensen.families.MeanField`") == 2  # its row, and a mention among the guides
    assert r":py:obj:`~jensen.models.VampPrior`" in text
    assert r"q(z \| x)" in text


def test_the_course_lists_every_notebook_with_its_question():
    listed = dict(sources._course())["course.md"]
    for path in (DOCS.parent / "notebooks").glob("*.ipynb"):
        (row,) = [line for line in listed.splitlines() if f"(course/{path.name})" in line]
        assert row.rstrip(" |").endswith(("?", ".")), row


def test_docstrings_are_rewritten_for_the_site():
    lines = """A distance |x - y| of [N, *event], and ``|code|``.

| symbol | meaning |
| --- | --- |
| h | context |
| k | c \\| d |

.. math:: |z|^2

References:
    Kingma and Welling (2014), Auto-Encoding Variational
    Bayes.
    Neal (2001), Annealed Importance Sampling.

Example:
    >>> 1 | 2
    3""".splitlines()
    rewrite(lines)
    text = "\n".join(lines)
    assert r"A distance \|x - y\| of [N, \*event], and ``|code|``." in text
    assert ".. list-table::" in text
    assert "   * - h\n     - context" in text
    assert ".. math:: |z|^2" in text
    assert "    * Kingma and Welling (2014), Auto-Encoding Variational\n      Bayes.\n    * Neal" in text
    assert ">>> 1 | 2" in text
