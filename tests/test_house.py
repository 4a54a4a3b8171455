"""The house: arrows between rooms, names, docstrings, the README."""

import ast
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
import torch

ROOMS = ("networks", "families", "models", "guides", "inference", "datasets", "plots", "cli")
MAY_IMPORT = {
    "module": set(),
    "networks": set(),
    "families": {"networks"},
    "models": {"families", "networks", "module"},
    "guides": {"families", "networks", "module", "inference"},  # inference: guides/refine.py alone
    "inference": set(),
    "datasets": set(),
    "plots": {"inference"},
    "cli": {"datasets", "families", "guides", "inference", "models", "networks", "plots"},
}
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = {
    **{room: sorted((ROOT / room).glob("*.py")) for room in ROOMS},
    "module": [ROOT / "package" / "module.py"],
}


def _modules():
    import jensen

    yield "jensen"
    for info in pkgutil.walk_packages(jensen.__path__, "jensen."):
        if not info.name.endswith("__main__"):
            yield info.name


def _imports(path):
    """Rooms that a file imports by their absolute names, and top-level modules that it imports."""
    rooms, tops = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module] if node.module != "jensen" else [f"jensen.{a.name}" for a in node.names]
        for name in names:
            top, *rest = name.split(".")
            tops.add(top)
            if top == "jensen" and rest and not rest[0].startswith("__"):
                rooms.add(rest[0])
    return rooms, tops


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    assert SOURCES[room]
    for path in SOURCES[room]:
        rooms, tops = _imports(path)
        if room == "guides" and path.name != "refine.py":
            assert "inference" not in rooms, f"{path.relative_to(ROOT)} imports inference; only guides/refine.py may"
        assert rooms <= MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {sorted(rooms - MAY_IMPORT[room])}"
        assert not tops & set(ROOMS), f"{path.relative_to(ROOT)} imports a bare room"


def test_only_models_and_guides_sample_and_only_the_kernel_traces():
    for room, paths in SOURCES.items():
        for path in paths:
            source = path.read_text()
            code = "\n".join(line for line in source.splitlines() if ">>>" not in line)
            if room not in ("models", "guides"):
                assert "pyro.sample(" not in code, path
            if path.name != "weights.py":
                assert "poutine.trace(" not in code, path


@pytest.mark.parametrize("name", sorted(_modules()))
def test_examples_in_docstrings_run(name):
    pyro.clear_param_store()
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def _public():
    for room in ROOMS:
        module = importlib.import_module(f"jensen.{room}")
        for name in module.__all__:
            yield room, name, getattr(module, name)


@pytest.mark.parametrize(("room", "name", "value"), [pytest.param(*p, id=f"{p[0]}.{p[1]}") for p in _public()])
def test_every_public_name_has_a_docstring_with_an_example_and_a_row(room, name, value):
    doc = inspect.getdoc(value) or ""
    assert ">>>" in doc, f"jensen.{room}.{name} has no example"
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert any(re.search(rf"`{name}\b", row) for row in rows), f"jensen.{room}.{name} is in no table of the README"


@pytest.mark.parametrize("name", sorted(_modules()))
def test_all_stands_first_and_is_true(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        assert hasattr(module, public)


def test_no_room_is_imported_under_its_bare_name():
    code = "import sys, " + ", ".join(f"jensen.{room}" for room in ROOMS) + "; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {*ROOMS, "package"}
    assert not set(sys.modules) & {*ROOMS, "package"}


def test_files_are_small():
    for paths in SOURCES.values():
        for path in paths:
            assert len(path.read_text().splitlines()) <= 300, path


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """Its blocks run one after the other; only the training is shortened."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    scope = {}
    for block in blocks:
        exec(re.sub(r"epochs=\d+", "epochs=1", block).replace("particles=5000", "particles=50"), scope)
    assert "log p(x), importance-weighted" in capsys.readouterr().out


def test_the_version_is_said_once():
    import jensen

    assert jensen.__version__ == importlib.metadata.version("jensen")
    assert f"## {jensen.__version__}" in (ROOT / "CHANGELOG.md").read_text()
