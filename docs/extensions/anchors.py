"""Every link inside the site leads to a page that is there, and to a place on it that is there; else a warning."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

_log = logging.getLogger(__name__)


class _Page(HTMLParser):
    def __init__(self, text: str, source: bool) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        if source:  # a page of source code: long, and all its links are Sphinx's own
            self.places = set(re.findall(r'\bid="([^"]+)"', text))
        else:
            self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        """Collect where a tag leads, and the places it makes."""
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links |= {found[key] for key in ("href", "src") if found.get(key)}


def setup(app) -> dict[str, bool]:
    """Look at the pages when they are written."""
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def check(app, exception) -> None:
    """Warn of every link that leads nowhere."""
    if exception is not None or app.builder.name != "html":
        return
    root = Path(app.outdir).resolve()
    found = [path for path in root.rglob("*.html") if "_static" not in path.parts]
    pages = {path: _Page(path.read_text(), "_modules" in path.parts) for path in found}
    count = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                _log.warning("%s links to %s, which is not there", path.relative_to(root), link)
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                _log.warning("%s links to %s, but that page has no such place", path.relative_to(root), link)
    _log.info("%d links between %d pages lead somewhere", count, len(pages))
