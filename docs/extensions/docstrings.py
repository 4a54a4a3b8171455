"""Docstrings as they are written, read by Sphinx: tables in pipes, references one a line, names of any room.

A docstring of jensen is for ``help()`` first. Some habits of it mean something else in reStructuredText: a table in
pipes, ``|x|`` in a sentence, a shape ``[N, *event]``, references on lines of their own. They are rewritten here, on
their way into the site.
"""

from __future__ import annotations

import builtins
import importlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sources import ROOMS, home

if TYPE_CHECKING:
    from docutils import nodes

_YEAR = re.compile(r"^\s*\S.*\(\d{4}\)")
_BUILTIN = {*dir(builtins)}
_STAR = re.compile(r"(?<=[\[ ])\*(?=\w+[,\]])")
_TITLE = re.compile(r"^(Args|Attributes|Example|Examples|Raises|References|Returns|Warns|Yields):$")


def setup(app) -> dict[str, bool]:
    """Rewrite docstrings before napoleon reads them; resolve what Sphinx could not."""
    app.connect("autodoc-process-docstring", _process, priority=1)
    app.connect("missing-reference", resolve, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(app, kind, name, value, options, lines: list[str]) -> None:
    rewrite(lines)
    if kind in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # or napoleon takes what stands before a colon for a type


def rewrite(lines: list[str]) -> None:
    """Rewrite the lines of one docstring in place."""
    lines[:] = list(_escaped(_listed(_tabled(lines))))


def _cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _tabled(lines: list[str]) -> Iterator[str]:
    """Tables in pipes as list-tables."""
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        if not (line.lstrip().startswith("|") and rest and re.fullmatch(r"\s*[|\s:-]+-\s*\|", rest[0])):
            yield line
            continue
        rest.pop(0)
        rows = [_cells(line)]
        while rest and rest[0].lstrip().startswith("|"):
            rows.append(_cells(rest.pop(0)))
        indent = line[: len(line) - len(line.lstrip())]
        yield from ("", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", "")
        for row in rows:
            for n, cell in enumerate(row):
                yield f"{indent}   {'* -' if n == 0 else '  -'} {cell}".rstrip()
        yield ""


def _listed(lines: Iterable[str]) -> Iterator[str]:
    """References as a list: a line that holds a year in parentheses begins one, any other goes on."""
    inside = False
    for line in lines:
        if _TITLE.match(line):
            inside = line == "References:"
        elif inside and line and not line[0].isspace():
            inside = False
        elif inside and line.strip():
            indent = line[: len(line) - len(line.lstrip())]
            line = f"{indent}{'* ' if _YEAR.match(line) else '  '}{line.strip()}"
        yield line


def _escaped(lines: Iterable[str]) -> Iterator[str]:
    """Bars and the stars of shapes as they are, outside of directives, examples and literals."""
    depth = None  # the indentation of the directive that the line stands in
    example = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and depth is not None and indent <= depth:
            depth = None
        if re.match(r"\s*\.\. (math|code-block)::", line):
            depth = indent
        if _TITLE.match(line):
            example = line.startswith("Example")
        if depth is None and not example:
            parts = re.split(r"(``[^`]*``|:\w+:`[^`]*`|`[^`]*`)", line)  # every other one is a literal
            parts[::2] = [_STAR.sub(r"\\*", part).replace("|", r"\|") for part in parts[::2]]
            line = "".join(parts)
        yield line


def resolve(app, env, node, contnode) -> nodes.Node | None:
    """A name that another room defines leads there; a name of another library stays what it is."""
    target = node.get("reftarget", "").split("[")[0]
    if node.get("refdomain") != "py":
        return None
    name = target.rsplit(".", 1)[-1]
    for room in ROOMS:
        module = importlib.import_module(f"jensen.{room}")
        if name in module.__all__:
            owner = home(room, name)[1]
            domain = env.domains["py"]
            found = f"jensen.{owner}.{name}"
            if found in domain.objects:
                return domain.resolve_xref(
                    env, node["refdoc"], app.builder, node["reftype"], found, _at_root(node), contnode
                )
    return contnode if target in _BUILTIN or _there(target) else None


def _there(target: str) -> bool:
    """Whether a dotted name is an object, of another library or of the rooms' own parts."""
    parts = target.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def _at_root(node: nodes.Element) -> nodes.Element:
    copied = node.copy()
    copied.attributes.pop("py:class", None)
    return copied
