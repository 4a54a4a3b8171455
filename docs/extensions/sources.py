"""Generated pages: the API overview and reference, the tutorials, the results of the benchmarks.

``generate`` writes them to ``docs/generated`` before Sphinx reads its sources, from the installed package and from the
files beside this folder. A new subpackage, notebook or table appears on the site without an edit here; a new public
name needs a place in ``tasks.py``.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tasks import ALONE, grouped

import jensen
from jensen.reports.references import references

ROOMS = tuple(re.findall(r":mod:`jensen\.(\w+)`", inspect.getdoc(jensen)))
DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"


def home(room: str, name: str) -> tuple[str, str]:
    """The module that defines a public name of a room, and the public room that the name belongs to.

    That is the room whose folder defines it. What a folder outside the public rooms defines belongs to the first room
    that lists it.
    """
    value = getattr(importlib.import_module(f"jensen.{room}"), name)
    module = getattr(value, "__module__", "")
    if not module.startswith("jensen."):  # a constant, or an alias of a type
        module = f"jensen.{room}"
    owner = module.split(".")[1]
    if owner not in ROOMS:
        owner = next(other for other in ROOMS if name in importlib.import_module(f"jensen.{other}").__all__)
    return module, owner


def public(room: str) -> Iterator[tuple[str, str]]:
    """The names that belong to a room and the modules that define them, in the order of the source."""
    names = importlib.import_module(f"jensen.{room}").__all__
    found = [(name, home(room, name)[0]) for name in names if home(room, name)[1] == room]
    return iter(sorted(found, key=lambda pair: _place(room, *pair)))


def _place(room: str, name: str, module: str) -> tuple[bool, str, str, int]:
    value = getattr(importlib.import_module(f"jensen.{room}"), name)
    line = inspect.getsourcelines(value)[1] if inspect.isroutine(value) or inspect.isclass(value) else 0
    return module.split(".")[1] != room, module.rpartition(".")[0], module, line


def setup(app) -> dict[str, bool]:
    """Write the pages when a build begins."""
    app.connect("builder-inited", lambda _: generate())
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def generate() -> None:
    """Write every generated page."""
    pages = dict(_reference())
    pages["members.rst"] = members()
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
    if not entries:
        return ""
    return (
        f".. toctree::\n   :hidden:\n   :maxdepth: {depth}\n\n" + "".join(f"   {entry}\n" for entry in entries) + "\n"
    )


def _reference() -> Iterator[tuple[str, str]]:
    """A page per subpackage, below it a page per task, and below that a page per module with public names.

    Modules that belong to no subpackage have a page each.
    """
    for module, names in ALONE.items():
        top = _heading(f"jensen.{module}", "=") + f".. automodule:: jensen.{module}\n   :no-members:\n\n"
        yield f"api/{module}.rst", top + _entries(module, names)
    for room in ROOMS:
        modules = dict(public(room))
        tasks = grouped(room, modules)
        pages = _pages(room, modules, tasks)
        yield f"api/{room}.rst", _room(room, tasks, pages)
        for task, names in tasks.items() if len(tasks) > 1 else ():
            text = _heading(task, "=") + _toctree([f"../{page}" for page in pages[task]]) + _table(room, names)
            yield f"api/{room}/tasks/{_slug(task)}.rst", text
        ordered = [name for names in tasks.values() for name in names]  # a function before the class that it returns
        for module in dict.fromkeys(modules.values()):
            names = [name for name in ordered if modules[name] == module]
            yield f"api/{room}/{_path(room, module)}.rst", _module(room, module, names)


def _pages(room: str, modules: dict[str, str], tasks: dict[str, list[str]]) -> dict[str, list[str]]:
    """The modules' pages, each under the first task that one of its names belongs to."""
    found: dict[str, list[str]] = {task: [] for task in tasks}
    seen: set[str] = set()
    for task, names in tasks.items():
        for page in (_path(room, modules[name]) for name in names):
            if page not in seen:
                seen.add(page)
                found[task].append(page)
    return found


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _path(room: str, module: str) -> str:
    """Where a module's page stands in the folder of its subpackage."""
    return module.removeprefix("jensen.").removeprefix(f"{room}.").replace(".", "/")


def _room(room: str, tasks: dict[str, list[str]], pages: dict[str, list[str]]) -> str:
    entries = [f"{room}/tasks/{_slug(task)}" for task in tasks]
    if len(tasks) == 1:
        entries = [f"{room}/{page}" for page in pages[next(iter(tasks))]]
    return (
        _heading(f"jensen.{room}", "=")
        + f".. automodule:: jensen.{room}\n   :no-members:\n\n"
        + _toctree(entries)
        + _tables(room, tasks, "-")
    )


def members() -> str:
    """The page of all public names: what each is, and where it comes from."""
    text = _heading("API overview", "=") + _OVERVIEW
    for room in ROOMS:
        doc = inspect.getdoc(importlib.import_module(f"jensen.{room}")) or ""
        text += _heading(f"jensen.{room}", "-") + f"{_plain(doc.splitlines()[0])}\n\n"
        text += _tables(room, grouped(room, dict(public(room))), "~")
    for module, names in ALONE.items():
        text += _heading(f"jensen.{module}", "-") + _table(module, names)
    return text


def _tables(room: str, tasks: dict[str, list[str]], line: str) -> str:
    """A table of a subpackage's names for each task, and the names that another subpackage defines."""
    text = ""
    for task, names in tasks.items():
        text += (_heading(task, line) if task else "") + _table(room, names)
    names = importlib.import_module(f"jensen.{room}").__all__
    elsewhere = [f":py:obj:`~jensen.{home(room, name)[1]}.{name}`" for name in names if home(room, name)[1] != room]
    return text + (f"Also importable from here: {', '.join(elsewhere)}.\n\n" if elsewhere else "")


def _table(room: str, names: Iterable[str]) -> str:
    return _TABLE + "".join(_row(room, name) for name in names) + "\n"


def _row(room: str, name: str) -> str:
    doc = inspect.getdoc(getattr(importlib.import_module(f"jensen.{room}"), name)) or ""
    cells = (f":py:obj:`~jensen.{room}.{name}`", _plain(_sentence(doc)), "; ".join(map(_cited, references(doc))))
    return "".join(f"   {'* -' if n == 0 else '  -'} {cell}".rstrip() + "\n" for n, cell in enumerate(cells))


def _plain(text: str) -> str:
    """A line of a docstring as reStructuredText."""
    from docstrings import rewrite  # which reads this module

    lines = [text]
    rewrite(lines)
    return lines[0]


def _sentence(doc: str) -> str:
    """The first sentence of a docstring."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`:])", " ".join(doc.split("\n\n")[0].split()))[0]


def _cited(entry: str) -> str:
    """Authors and year of a reference, linked where it has an address."""
    found = re.match(r"(.*?) \((\d{4})\)", entry)
    if found is None:
        raise ValueError(f"a reference has no year in parentheses: {entry!r}")
    first, *others = re.split(r", | and ", found[1])
    who = first if not others else f"{first} & {others[0]}" if len(others) == 1 else f"{first} et al."
    address = re.search(r"https?://\S+", entry)
    return f"`{who} {found[2]} <{address[0]}>`__" if address else f"{who} {found[2]}"


def _module(room: str, module: str, names: list[str]) -> str:
    top = _heading(", ".join(names), "=") + f".. automodule:: {module}\n   :no-members:\n   :no-index:\n\n"
    return top + _entries(room, names)


def _entries(room: str, names: Iterable[str]) -> str:
    text = ""
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
        text = re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", path.read_text())
        if text.startswith("# "):  # one of several tables of a script
            title, text = text[2:].split("\n", 1)
        yield f"benchmarks/{path.name}", f"# {title}\n\n{text}"
        entries.append((path.stem, title))
    listed = "".join(f"- [{title}](benchmarks/{name}.md)\n" for name, title in entries)
    paths = "\n".join(f"benchmarks/{name}" for name, _ in entries)
    yield "benchmarks.md", f"{_MEASURED}{listed}\n```{{toctree}}\n:hidden:\n\n{paths}\n```\n"


_OVERVIEW = """Every public name, by subpackage and task, with the first sentence of its documentation and its sources.

"""

_TABLE = """.. list-table::
   :header-rows: 1
   :widths: 22 56 22

   * - name
     - what it is
     - source
"""

_COURSE = """# Tutorials

Executed notebooks, in order. Each opens with a question and closes with its answer. To run them yourself, find them in
`notebooks/`.

| notebook | question |
| --- | --- |
"""

_MEASURED = """# Benchmarks

Tables made by the scripts in `benchmarks/`, each with its settings, date, commit and machine. One command runs a script
again; times hold for that machine.

"""
