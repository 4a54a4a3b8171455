"""The site's pages: every example runs, and its members are held to what the library's own are held to."""

import doctest
import inspect
import re
from functools import partial
from pathlib import Path

import members
import pytest
import test_contract
import test_families
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text() or "```pycon" in path.read_text())
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.M | re.S)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_page(path):
    """Run a page's blocks one after the other in one namespace; what stands under a prompt must come out as it stands.

    Returns the namespace.
    """
    text, scope = path.read_text(), {"__name__": f"docs.{path.stem}"}
    for match in BLOCK.finditer(text):
        kind, source = match.groups()
        line = text[: match.start()].count("\n") + 1
        if kind == "python":
            exec(compile("\n" * line + source, path.name, "exec"), scope)
        else:
            case = doctest.DocTestParser().get_doctest(source, scope, path.name, path.name, line)
            report = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(case, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            scope.update(case.globs)
    return scope


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


ADDED = {}  # the namespace of the page that adds one of each


@pytest.fixture
def added(monkeypatch):
    """That page's members among the library's own, under the name ``added``."""
    if not ADDED:
        ADDED.update(run_page(DOCS / "adding.md"))
    monkeypatch.setitem(members.MODELS, "added", lambda: ADDED["ItemResponse"](members.X, members.D))
    monkeypatch.setitem(members.GUIDES, "added", lambda model: ADDED["Linear"](model))
    monkeypatch.setitem(members.GUIDES, "added family", partial(members.amortized, family=ADDED["LogisticFamily"]))
    return ADDED


def _needs(test):
    return set(inspect.signature(test).parameters)


TESTS = {name: test for name, test in vars(test_contract).items() if name.startswith("test_")}
OF_A_MODEL = [name for name, test in TESTS.items() if _needs(test) == {"model_name"}]
OF_A_PAIR = [name for name, test in TESTS.items() if {"model_name", "guide_name"} <= _needs(test)]
OF_A_FAMILY = [
    name
    for name, test in vars(test_families).items()
    if name.startswith("test_")
    and {"family"} <= _needs(test) <= {"family", "float64", "leading"}
    and "flow" not in name
    and "foreign" not in name
]


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
