"""Conventions of the package: imports between subpackages, names, docstrings, the README."""

import ast
import configparser
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import sources
import torch

ROOMS = ("networks", "families", "models", "guides", "inference", "datasets", "plots", "reports", "cli")
FOLDERS = (*ROOMS, "kernel", "results", "graphs")
BELOW = {"kernel", "graphs", "results"}
MAY_IMPORT = {  # and every room jensen.checked, jensen.missing, jensen.processes and jensen.progress
    "checked": set(),
    "progress": set(),
    "module": set(),
    "missing": set(),
    "processes": set(),
    "imputer": {"families", "guides", "inference", "models", "networks"},
    "networks": set(),
    "families": {"networks"},
    "models": {"families", "networks", "module"},
    "guides": {"families", "networks", "module", "kernel", "graphs"},
    "kernel": set(),
    "results": {"reports"},  # inside to_html, when it is called
    "graphs": {"kernel"},
    "inference": {*BELOW, *(f"inference.{part}" for part in ("training", "exact", "measure", "annealing", "mcmc"))},
    "inference.training": BELOW,
    "inference.exact": BELOW,
    "inference.measure": {*BELOW, "inference.training", "inference.exact"},
    "inference.annealing": {*BELOW, "inference.training", "inference.exact", "inference.measure"},
    "inference.mcmc": {*BELOW, "inference.training", "inference.exact", "inference.measure", "inference.annealing"},
    "datasets": set(),
    "plots": {"inference", "kernel", "results"},
    "reports": {"inference", "kernel", "plots", "results"},
    "cli": {
        "datasets",
        "families",
        "guides",
        "inference",
        "kernel",
        "models",
        "networks",
        "plots",
        "reports",
        "results",
    },
}
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = ("checked", "imputer", "missing", "module", "processes", "progress")  # files of the package itself, which rooms stand on
SOURCES = {
    **{room: sorted((ROOT / room.replace(".", "/")).glob("*.py")) for room in MAY_IMPORT if room not in FILES},
    **{name: [ROOT / "package" / f"{name}.py"] for name in FILES},
}


def _modules():
    import jensen

    yield "jensen"
    for info in pkgutil.walk_packages(jensen.__path__, "jensen."):
        if not info.name.endswith("__main__"):
            yield info.name


def _imports(path, room):
    """The other subpackages that a file imports, and the top-level modules."""
    rooms, tops = set(), set()
    here = ["jensen", *room.split(".")]
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            start = ".".join([*here[: len(here) + 1 - node.level], *filter(None, [node.module])])
            start = start if node.level else node.module
            names = [f"{start}.{a.name}" for a in node.names] if start in ("jensen", "jensen.inference") else [start]
        for name in names:
            top, *rest = name.split(".")
            tops.add(top)
            if top == "jensen" and rest and not rest[0].startswith("__"):
                inner = ".".join(rest[:2])
                rooms.add(inner if inner in MAY_IMPORT else rest[0])
    return rooms - {room}, tops


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    assert SOURCES[room]
    for path in SOURCES[room]:
        rooms, tops = _imports(path, room)
        foreign = rooms - MAY_IMPORT[room] - {"checked", "missing", "processes", "progress"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"
        assert not tops & set(FOLDERS), f"{path.relative_to(ROOT)} imports a bare room"


def test_every_file_of_the_library_is_in_a_room():
    folders = {path.parent for room in FOLDERS for path in (ROOT / room).rglob("*.py")}
    assert folders == {ROOT / room.replace(".", "/") for room in MAY_IMPORT if room not in FILES}


def test_only_models_and_guides_sample_and_only_the_kernel_traces():
    for room, paths in SOURCES.items():
        for path in paths:
            source = path.read_text()
            code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith((">>>", "...")))
            if room not in ("models", "guides"):
                assert "pyro.sample(" not in code, path
            if room != "kernel":
                assert "poutine.trace(" not in code, path


class _Finder(doctest.DocTestFinder):
    """Also finds the examples of functions wrapped by a decorator of another module."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object) if inspect.isroutine(object) else object)


@pytest.mark.parametrize("name", sorted(_modules()))
def test_examples_in_docstrings_run(name):
    pyro.clear_param_store()
    torch.manual_seed(0)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in _Finder().find(module, name, extraglobs={"torch": torch}):
        runner.run(example)
    assert runner.failures == 0


def test_examples_of_wrapped_functions_are_found():
    found = {example.name for example in _Finder().find(importlib.import_module("jensen.kernel.weights"), "weights")}
    assert {"weights.log_weights", "weights.terms", "weights.log_joint"} <= found


def _public():
    for room in sources.ROOMS:
        module = importlib.import_module(f"jensen.{room}")
        for name in module.__all__:
            yield room, name, getattr(module, name)


OVERVIEW = sources.members()


@pytest.mark.parametrize(("room", "name", "value"), [pytest.param(*p, id=f"{p[0]}.{p[1]}") for p in _public()])
def test_every_public_name_has_a_docstring_with_an_example_and_a_row(room, name, value):
    doc = inspect.getdoc(value) or ""
    assert ">>>" in doc, f"jensen.{room}.{name} has no example"
    owner = sources.home(room, name)[1]
    rows = re.findall(rf"^   \* - :py:obj:`~jensen\.{owner}\.{name}`\n     -(.*)$", OVERVIEW, re.M)
    assert len(rows) == 1, f"jensen.{room}.{name} has {len(rows)} rows in the overview"
    assert rows[0].strip(), f"the docstring of jensen.{room}.{name} begins with no sentence"


def test_all_stands_first_in_every_module():
    for paths in SOURCES.values():
        for path in paths:
            _, *body = ast.parse(path.read_text()).body  # after the docstring
            body = [node for node in body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
            if path.stem not in ("__init__", "__main__"):
                assert ast.unparse(body[0]).startswith("__all__"), path


def test_no_room_is_imported_under_its_bare_name():
    code = "import sys, " + ", ".join(f"jensen.{room}" for room in ROOMS) + "; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {*FOLDERS, "package"}
    assert not set(sys.modules) & {*FOLDERS, "package"}


def test_no_module_has_the_name_of_one_of_the_standard_library():
    names = {path.stem for paths in SOURCES.values() for path in paths} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """Its blocks run one after the other; only the training is shortened."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    scope = {}
    for block in blocks:
        exec(re.sub(r"epochs=\d+", "epochs=1", block), scope)
    assert "log p(x), refined" in capsys.readouterr().out


def test_the_version_is_said_once():
    import jensen

    assert jensen.__version__ == importlib.metadata.version("jensen")
    assert f"## {jensen.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_jensen_gives_the_main_names_and_its_subpackages():
    import jensen

    for name in set(jensen.__all__) - {"__version__", *ROOMS}:
        home = importlib.import_module(f"jensen.{jensen._HOMES[name]}")
        assert getattr(jensen, name) is getattr(home, name)
        assert name in home.__all__
    assert {*ROOMS} < {*jensen.__all__} == {*dir(jensen)}
    assert all(getattr(jensen, room) is importlib.import_module(f"jensen.{room}") for room in ROOMS)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        _ = jensen.evalute


@pytest.mark.parametrize(
    "code",
    [
        "import jensen; dir(jensen); jensen.__version__",
        "from jensen.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
        "from jensen.cli import main; main(['trian'])",
    ],
    ids=["import", "help", "misspelt"],
)
def test_what_answers_at_once_imports_neither_torch_nor_numpy(code):
    code += "\nimport sys; print(sorted({'torch', 'numpy', 'pyro', 'matplotlib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_citation_is_of_this_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version, license_ = setup["metadata"]["version"], setup["metadata"]["license"]
    fields = dict(re.findall(r"^([a-z-]+): *(.*)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert {"cff-version", "message", "title", "authors"} <= set(fields)  # what version 1.2.0 of the format requires
    assert (fields["cff-version"], fields["version"], fields["license"]) == ("1.2.0", version, license_)
    for page in (README, (ROOT / "docs" / "index.md").read_text()):
        assert re.findall(r"version = \{(.*?)\}", page) == [version]
