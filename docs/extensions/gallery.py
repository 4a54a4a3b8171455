"""The gallery: every ``plot_*`` function with the figure that the example of its docstring draws.

``generate`` runs the examples when a build begins and writes ``docs/generated/gallery.md`` and a PNG for each, so that
no figure is committed, and a new function appears without an edit here.
"""

import doctest
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pyro
import torch
from docstrings import rewrite
from sources import GENERATED, home

from jensen import plots

_DPI = 150


class Entry(NamedTuple):
    """A function of the gallery.

    Attributes:
        name: of the function.
        says: the first paragraph of its docstring.
        code: of its example, up to the line that draws.
        page: the reference page that documents it, from the gallery's own.
    """

    name: str
    says: str
    code: str
    page: str


def setup(app) -> dict[str, bool]:
    """Write the page when a build begins, after the pages of ``sources``, which removes files that are not its own."""
    app.connect("builder-inited", lambda _: generate(), priority=600)
    app.add_css_file("gallery.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def generate(folder: Path = GENERATED) -> None:
    """Draw every figure, and write the page that shows them."""
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    entries = list(draw(folder / "gallery"))
    (folder / "gallery.md").write_text(page(entries))


def draw(folder: Path) -> Iterator[Entry]:
    """Run the example of each function until it has drawn, and save the figure under the function's name."""
    plt.switch_backend("agg")
    for name in (name for name in plots.__all__ if name.startswith("plot_")):
        doc = inspect.getdoc(getattr(plots, name)) or ""
        torch.manual_seed(0)
        pyro.clear_param_store()
        scope: dict[str, Any] = {}
        code = ""
        for source in _statements(name, doc):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(source, f"the example of {name}", "exec"), scope)
            code += source
            if plt.get_fignums():
                break
        else:
            raise ValueError(f"the example in the docstring of {name} draws no figure")
        plt.gcf().savefig(folder / f"{name}.png", dpi=_DPI)
        plt.close("all")
        page = home("plots", name)[0].rpartition(".")[2]
        yield Entry(name, " ".join(doc.split("\n\n")[0].split()), code, f"api/plots/{page}.html#jensen.plots.{name}")


def _statements(name: str, doc: str) -> Iterator[str]:
    """The statements of an example, after the imports that doctest takes from the module."""
    sources = [example.source for example in doctest.DocTestParser().get_examples(doc)]
    if any(re.search(r"\btorch\.", source) for source in sources) and "import torch\n" not in sources:
        yield "import torch\n"
    yield f"from jensen.plots import {name}\n"
    yield from sources


def page(entries: list[Entry]) -> str:
    """The page in MyST: thumbnails that lead to the reference, then each figure above its code."""
    cards = "".join(_CARD.format(entry=entry) for entry in entries)
    return _TOP + f"::::{{container}} gallery\n{cards}::::\n" + "".join(map(_section, entries))


def _section(entry: Entry) -> str:
    lines = [entry.says]
    rewrite(lines)
    return _SECTION.format(entry=entry, says=lines[0])


_TOP = """# Gallery

The figures of {mod}`jensen.plots`. The code of each is below; a thumbnail leads to the reference of its function.

"""

_CARD = """:::{{container}} card
```{{image}} gallery/{entry.name}.png
:alt: a figure of {entry.name}
:target: {entry.page}
```

[{entry.name}](#{entry.name})
:::
"""

_SECTION = """
## {entry.name}

{says} Reference: {{py:obj}}`~jensen.plots.{entry.name}`.

:::{{container}} shown
```{{image}} gallery/{entry.name}.png
:alt: a figure of {entry.name}
```

```python
{entry.code}```
:::
"""
