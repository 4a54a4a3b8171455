"""A report: what results say, in one HTML file that opens from a disk."""

from __future__ import annotations

__all__ = ["Report"]

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from jensen.checked import checked
from jensen.inference import Bounds, Evidence, History
from jensen.plots.axes import without_pyplot
from jensen.plots.images import Shape
from jensen.results.files import whole
from jensen.results.tables import Printed

from .page import Block, Code, Figure, Images, Section, Thumbnails, render
from .sections import Material, bounds_of, findings_of, sections_of


class Report:
    """One self-contained HTML page: what was found, tables, figures, data points, and how to make it again.

    The page loads nothing from a network. Tables sort, headings explain themselves, and a mark shows its data point.
    Every result has :meth:`~jensen.inference.Evidence.to_html` for a page of its own; a report holds several.

    Args:
        title: of the page.
        data: the data points that were measured, [N, ...], in their order: marks and rows then show them.
        image_shape: where data points are images, their height and width: ``data.image_shape``.
        value_range: the values drawn white and black; by default those of the data.
        columns: the names of the features of a table.

    Example:
        >>> import tempfile
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> model, x = PPCA(4, latent=2), torch.rand(20, 4)
        >>> evidence = evaluate(model, PriorGuide(model), x, particles=100, progress=False)
        >>> report = Report("A first look", data=x).add(evidence)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.write(f"{folder}/report.html").name
        'report.html'
    """

    @checked
    def __init__(
        self,
        title: str,
        *,
        data: Tensor | None = None,
        image_shape: Shape | None = None,
        value_range: tuple[float, float] | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        if image_shape is not None and data is None:
            raise ValueError("image_shape needs data: pass the data points that were measured")
        self.title = title
        self.findings: list[str] = []
        self.sections: list[Section] = []
        images = None
        if data is not None and image_shape is not None:
            known = data[~data.isnan()]
            own = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
            images = Thumbnails(image_shape, value_range or own)
        self.material = Material(None if data is None else data.detach().cpu(), columns, images)

    def add(self, result: Printed, name: str = "") -> Self:
        """Add what a result found, and its sections.

        Args:
            result: of any kind.
            name: of its sections, where a report holds several results of a kind.
        """
        self.find(*findings_of(result), name=name)
        with without_pyplot():
            found = sections_of(result, self.material)
        self.sections += [replace(s, title=f"{name}: {s.title.lower()}") if name else s for s in found]
        return self

    def find(self, *sentences: str, name: str = "") -> Self:
        """Add sentences to the head of the page."""
        self.findings += [f"{name}: {sentence}" if name else sentence for sentence in sentences]
        return self

    def section(self, title: str, *blocks: Block, note: str = "") -> Self:
        """Add a section."""
        self.sections.append(Section(title, blocks, note))
        return self

    def training(self, histories: Mapping[str, History]) -> Self:
        """Add a section with the curves of several trainings, by name."""
        with without_pyplot():
            figures = [
                replace(block, caption=f"{name}: {history._line()}")
                for name, history in histories.items()
                for section in sections_of(history, self.material)
                for block in section.blocks
                if isinstance(block, Figure)
            ]
        return self.section("Training", *figures)

    def bounds(self, curves: Mapping[str, Bounds], evidence: Mapping[str, Evidence], name: str = "") -> Self:
        """Add a figure of several bounds, by name, if there are any, with the log p(x) that evidence gives."""
        if not curves:
            return self
        with without_pyplot():
            section = bounds_of(curves, evidence)
        self.sections.append(replace(section, title=f"{name}: bounds") if name else section)
        return self

    def images(self, title: str, rows: Sequence[tuple[Sequence[Tensor], str]], caption: str = "") -> Self:
        """Add a section of images: in each group some of them side by side, with a line below."""
        shown = self.material.images
        if shown is None:
            raise ValueError("a report without image_shape shows no images: give it one")
        items = [
            ([place for image in images for place in shown.add(image.unsqueeze(0))], text) for images, text in rows
        ]
        return self.section(title, Images(items, caption))

    def made_by(self, command: str, settings: Mapping[str, Any], versions: Mapping[str, str]) -> Self:
        """Add how to make the page again: the command, the settings, seeds among them, and the versions."""
        listed = "\n".join(f"{name} {number}" for name, number in versions.items())
        text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
        return self.section("How to repeat it", Code(command), Code(listed), Code(text))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all; folders on the way to it are made.

        Returns:
            The path.
        """
        text = render(self.title, self.findings, self.sections, self.material.items, self.material.images)
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return Path(path)
