"""Public names in running text become links: ``MeanField`` or ``compare(..., gaps=True)`` leads to its definition.

A page needs no markup for that. A literal links where its text, up to a parenthesis, is the public name of exactly one
object, or a dotted path that begins with one.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import TYPE_CHECKING

from sources import ROOMS, home
from tasks import ALONE

if TYPE_CHECKING:
    from docutils import nodes

_CALL = re.compile(r"(?:jensen\.)?(?P<path>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", re.S)


def setup(app) -> dict[str, bool]:
    """Link the literals of every page when the page's own links are resolved."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


@cache
def owners() -> dict[str, str]:
    """The full name of each public name that means one object only; the paths with their subpackage, too."""
    found: dict[str, set[str]] = {}
    for room in ROOMS:
        for name in importlib.import_module(f"jensen.{room}").__all__:
            full = f"jensen.{home(room, name)[1]}.{name}"
            found.setdefault(name, set()).add(full)
            found.setdefault(f"{room}.{name}", set()).add(full)
    for module, names in ALONE.items():
        for name in names:
            found.setdefault(name, set()).add(f"jensen.{module}.{name}")
            found[f"{module}.{name}"] = {f"jensen.{module}.{name}"}
    return {name: fulls.pop() for name, fulls in found.items() if len(fulls) == 1}


def target(text: str) -> str | None:
    """The full name of the object that a literal names."""
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    parts = match["path"].split(".")
    for n in (2, 1):
        if full := owners().get(".".join(parts[:n])):
            return ".".join([full, *parts[n:]])
    return None


def link(app, doctree: nodes.document, docname: str) -> None:
    """Wrap each literal that is a public name in a link to its definition."""
    from docutils import nodes
    from sphinx.util.nodes import make_refnode

    if docname.startswith("generated/api/cli"):  # where names are those of commands
        return
    objects = app.env.domains["py"].objects
    for node in list(doctree.findall(nodes.literal)):
        full = target(node.astext())
        entry = objects.get(full) if full else None
        if entry is not None and not _inside(node, full):
            wrapped = make_refnode(app.builder, docname, entry.docname, entry.node_id, node.deepcopy(), full)
            node.replace_self(wrapped)


def _inside(node: nodes.Node, full: str) -> bool:
    """Whether a literal stands in a link or a title, or in the documentation of the very name."""
    while node.parent is not None:
        node = node.parent
        if node.tagname in ("reference", "title", "caption"):
            return True
        if node.tagname == "desc" and any(full in child.get("ids", ()) for child in node.children[:-1]):
            return True
    return False
