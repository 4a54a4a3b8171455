"""Pages that are not written by hand: the reference from the rooms, the course, the results of the benchmarks.

They are laid into ``docs/generated`` before Sphinx looks for its sources, from the installed package and from the files
beside this folder. A new room, public name, notebook or table is on the site without an edit here.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jensen

ROOMS = tuple(re.findall(r":mod:`jensen\.(\w+)`", inspect.getdoc(jensen)))
DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"


def home(room: str, name: str) -> tuple[str, str]:
    """The module that defines a public name of a room, and the room at which that module is public."""
    value = getattr(importlib.import_module(f"jensen.{room}"), name)
    module = getattr(value, "__module__", f"jensen.{room}")
    owner = module.split(".")[1]
    return module, owner if owner in ROOMS else room


def public(room: str) -> Iterator[tuple[str, str]]:
    """The names of a room that no other room defines, with the module that does."""
    for name in importlib.import_module(f"jensen.{room}").__all__:
        module, owner = home(room, name)
        if owner == room:
            yield name, module


def setup(app) -> dict[str, bool]:
    """Lay the pages out when a build begins."""
    app.connect("builder-inited", lambda _: generate())
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def generate() -> None:
    """Write every generated page."""
    pages = dict(_reference())
    pages |= dict(_course())
    pages |= dict(_benchmarks())
    for path in GENERATED.rglob("*") if GENERATED.exists() else []:
        if path.is_file() and str(path.relative_to(GENERATED)) not in pages:
            path.unlink()
    for name, text in pages.items():
        path = GENERATED / name
        if not path.exists() or path.read_text() != text:  # what did not change is not read again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n\n"


def _toctree(entries: list[str], depth: int = 1) -> str:
    return (
        f".. toctree::\n   :hidden:\n   :maxdepth: {depth}\n\n" + "".join(f"   {entry}\n" for entry in entries) + "\n"
    )


def _reference() -> Iterator[tuple[str, str]]:
    """A page per room, and below it a page per module with public names."""
    yield "api/module.rst", _heading("jensen.module", "=") + ".. automodule:: jensen.module\n   :members:\n"
    for room in ROOMS:
        modules: dict[str, list[str]] = {}
        for name, module in public(room):
            modules.setdefault(module, []).append(name)
        yield f"api/{room}.rst", _room(room, modules)
        for module, names in modules.items():
            yield f"api/{room}/{module.rsplit('.', 1)[1]}.rst", _module(room, module, names)


def _room(room: str, modules: dict[str, list[str]]) -> str:
    names = sorted((name for names in modules.values() for name in names), key=str.lower)
    elsewhere = sorted(set(importlib.import_module(f"jensen.{room}").__all__) - set(names), key=str.lower)
    links = ", ".join(f":class:`~jensen.{home(room, name)[1]}.{name}`" for name in elsewhere)
    ordered = sorted(modules, key=lambda module: modules[module][0].lower())
    return (
        _heading(f"jensen.{room}", "=")
        + f".. automodule:: jensen.{room}\n   :no-members:\n\n"
        + _toctree([f"{room}/{module.rsplit('.', 1)[1]}" for module in ordered])
        + ".. autosummary::\n   :nosignatures:\n\n"
        + "".join(f"   {name}\n" for name in names)
        + (f"\nAlso here, for convenience: {links}.\n" if links else "")
    )


def _module(room: str, module: str, names: list[str]) -> str:
    text = _heading(", ".join(names), "=") + f".. automodule:: {module}\n   :no-members:\n   :no-index:\n\n"
    for name in names:
        value = getattr(importlib.import_module(f"jensen.{room}"), name)
        kind = "autoclass" if inspect.isclass(value) else "autofunction" if callable(value) else "autodata"
        options = "   :members:\n" if kind == "autoclass" else ""
        text += f".. {kind}:: jensen.{room}.{name}\n{options}\n"
    return text


def _course() -> Iterator[tuple[str, str]]:
    """The notebooks as they are committed, and a page that lists their questions."""
    entries, questions = [], []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text()
        yield f"course/{path.name}", text
        cells = json.loads(text)["cells"]
        opening = "".join("".join(cell["source"]) + "\n\n" for cell in cells[:2] if cell["cell_type"] == "markdown")
        title = re.search(r"^# (.*)$", opening, re.M)
        question = re.search(r"\*\*Question\.?\*\*\s*(.*?)(?:\n\n|\Z)", opening, re.S)
        entries.append(f"course/{path.stem}")
        asked = " ".join(question[1].split()) if question else ""
        questions.append(f"| [{title[1] if title else path.stem}](course/{path.name}) | {asked} |\n")
    yield "course.md", _COURSE + "".join(questions) + "\n```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n"


def _benchmarks() -> Iterator[tuple[str, str]]:
    """The tables of results under what their scripts say of themselves, and a page that lists them."""
    entries = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        script = ROOT / "benchmarks" / f"{path.stem}.py"
        about = ast.get_docstring(ast.parse(script.read_text())) if script.exists() else None
        title = (about or path.stem).splitlines()[0].rstrip(".").split(":")[0]
        yield f"benchmarks/{path.name}", f"# {title}\n\n{path.read_text()}"
        entries.append((path.stem, title))
    listed = "".join(f"- [{title}](benchmarks/{name}.md)\n" for name, title in entries)
    paths = "\n".join(f"benchmarks/{name}" for name, _ in entries)
    yield "benchmarks.md", f"{_MEASURED}{listed}\n```{{toctree}}\n:hidden:\n\n{paths}\n```\n"


_COURSE = """# The course

Notebooks, in order, as they were executed. Each opens with a question and closes with its answer; they lie in
`notebooks/`, to be run.

| notebook | question |
| --- | --- |
"""

_MEASURED = """# Benchmarks

Tables that scripts in `benchmarks/` made, each with its settings, date, commit and machine. The scripts run again with
one command; times are of that machine.

"""
