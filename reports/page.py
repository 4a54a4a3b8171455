"""One page of HTML that needs nothing else: tables, figures, images and texts, set by a template of jinja2.

Styles, script, figures (SVG) and images (one PNG) are in the file itself. Tables sort and points show what they stand
for by a script of the page's own.
"""

from __future__ import annotations

__all__ = ["Block", "Code", "Figure", "Grid", "Images", "Item", "Section", "Text", "Thumbnails", "grid_of", "render"]

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import ClassVar, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from matplotlib import image as mpl_image
from matplotlib.colors import to_rgb
from torch import Tensor

from jensen.plots.images import HOLE, Shape, as_images
from jensen.results.tables import Table

from .meanings import meaning_of


class Item(NamedTuple):
    """What is known of a point, or of a row of a table.

    Attributes:
        text: its lines.
        image: the place of its image in the thumbnails, if it has one.
    """

    text: str
    image: int | None = None


@dataclass(frozen=True)
class Grid:
    """A table. Every heading and every name of a row or fact goes with its meaning, or with an empty string.

    Attributes:
        columns: headings and their meanings, the first of them over the names of the rows.
        rows: the name of a row, its meaning, its cells, and the place of its image, if it has one.
        facts: names, meanings and values of what is no column.
        head: a line above.
        notes: sentences below.
        sortable: whether a click on a heading sorts the rows.
    """

    kind: ClassVar[str] = "grid"
    columns: Sequence[tuple[str, str]] = ()
    rows: Sequence[tuple[str, str, Sequence[str], int | None]] = ()
    facts: Sequence[tuple[str, str, str]] = ()
    head: str = ""
    notes: Sequence[str] = ()
    sortable: bool = False

    @property
    def meanings(self) -> list[tuple[str, str]]:
        """What stands on hover, for a reader who cannot hover."""
        named = [*self.columns, *(row[:2] for row in self.rows), *(fact[:2] for fact in self.facts)]
        return list({name: tip for name, tip in named if tip}.items())


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        svg: the drawing.
        width: its largest width, in pixels.
        caption: a line below.
        points: the places, among the items of the page, of the marks of the group ``points``, in their order.
    """

    kind: ClassVar[str] = "figure"
    svg: Markup
    width: int
    caption: str = ""
    points: Sequence[int] = ()


@dataclass(frozen=True)
class Images:
    """Images side by side.

    Attributes:
        items: the places of the images of each group, and the line below it.
        caption: a line below all.
    """

    kind: ClassVar[str] = "images"
    items: Sequence[tuple[Sequence[int], str]]
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines of a fixed width."""

    kind: ClassVar[str] = "code"
    text: str


Block = Grid | Figure | Images | Text | Code


@dataclass(frozen=True)
class Section:
    """A part of the page: its title, a sentence, and what is in it."""

    title: str
    blocks: Sequence[Block]
    note: str = ""

    @property
    def anchor(self) -> str:
        """The name by which a link finds it."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass
class Thumbnails:
    """All images of a page, in one PNG.

    Args:
        shape: height and width of an image in pixels, as of :func:`~jensen.plots.plot_images`.
        value_range: the values drawn white and black.
    """

    shape: Shape
    value_range: tuple[float, float] = (0.0, 1.0)
    images: list[Tensor] = field(default_factory=list)

    def add(self, images: Tensor) -> list[int]:
        """Add images [N, ...]; their places."""
        first = len(self.images)
        self.images += as_images(images, self.shape, "a report")  # [N, H, W(, 3)]
        return list(range(first, len(self.images)))

    @property
    def height(self) -> int:
        """Of an image, in pixels."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Of an image, in pixels."""
        return self.shape[1]

    @property
    def columns(self) -> int:
        """How many images stand side by side: the PNG is about a square."""
        return max(1, math.ceil(math.sqrt(len(self.images) * self.height / self.width)))

    @property
    def uri(self) -> str:
        """The PNG, as the address of its own contents."""
        low, high = self.value_range
        images = torch.stack(self.images)  # [N, H, W(, 3)]
        scaled, holes = ((images - low) / (high - low)).clamp(0, 1), images.isnan()
        if holes.any():  # in colour: missing pixels have one of their own
            if images.dim() == 3:
                scaled, holes = (1 - scaled).unsqueeze(-1), holes.unsqueeze(-1)
            scaled = torch.where(holes.any(-1, keepdim=True), scaled.new_tensor(to_rgb(HOLE)), scaled)
        missing = -len(scaled) % self.columns
        tiles = torch.cat([scaled, scaled.new_ones(missing, *scaled.shape[1:])])
        grid = tiles.unflatten(0, (-1, self.columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [H, W(, 3)]
        buffer = io.BytesIO()
        mpl_image.imsave(buffer, grid.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, format="png")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def grid_of(table: Table, *, sortable: bool = False) -> Grid:
    """The grid of a printed table, with the meaning of each heading and name.

    Args:
        table: of a result.
        sortable: whether a click on a heading sorts the rows.
    """
    return Grid(
        columns=[(name, meaning_of(name)) for name in table.columns],
        rows=[(name.strip(), "" if sortable else meaning_of(name), cells, None) for name, *cells in table.rows],
        facts=[(name, meaning_of(name), value) for name, value in table.facts],
        head=table.head,
        notes=[note for note in table.notes if note],
        sortable=sortable,
    )


def render(
    title: str, findings: Sequence[str], sections: Sequence[Section], items: Sequence[Item], images: Thumbnails | None
) -> str:
    """The page.

    Args:
        title: its heading.
        findings: sentences that say what was found.
        sections: its parts.
        items: what points stand for; figures count them.
        images: the images of items, tables and parts.
    """
    sprite = images if images is not None and images.images else None
    places = [
        {"text": item.text, "image": None if sprite is None or item.image is None else _place(sprite, item.image)}
        for item in items
    ]
    return _template().render(
        title=title,
        findings=[sentence for sentence in findings if sentence],
        sections=[section for section in sections if section.blocks],
        items=places,
        sprite=sprite,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        version=version("jensen"),
        date=date.today().isoformat(),
    )


def _place(images: Thumbnails, index: int) -> tuple[int, int]:
    row, column = divmod(index, images.columns)
    return column, row


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("jensen.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    return environment.get_template("page.html")


def _marked(text: str) -> Markup:
    """Text with names between backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _file(name: str) -> str:
    return resources.files("jensen.reports").joinpath(name).read_text(encoding="utf-8")
