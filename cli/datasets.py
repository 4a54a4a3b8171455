"""``jensen datasets``: list the data sets, or print the card of one."""

from __future__ import annotations

__all__ = ["run"]

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pooch

from jensen.datasets import Card, cards

from .names import suggestion
from .terminal import report


def run(options: argparse.Namespace, progress: bool) -> None:
    """List the data sets, or print one card."""
    known = cards()
    if options.name is None:
        documents = [card.to_dict() | {"present": _present(card)} for card in known.values()]
        report(_table(list(known.values())), {"datasets": documents, "places": _places()}, options.json)
        return
    if options.name not in known:
        raise ValueError(f"there is no data set {options.name!r}; {suggestion(options.name, known)}")
    card = known[options.name]
    report(f"{card}\n  files     {_standing(card)}", card.to_dict() | {"present": _present(card)}, options.json)


def _table(known: list[Card]) -> str:
    lines = [("name", "train", "features", "files", "licence")]
    lines += [(card.name, _count(card), _shape(card), _standing(card), card.licence) for card in known]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    room = columns - 1 - sum(widths) - 2 * len(widths)
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), _cut(line[4], room)])
        for line in lines
    ]
    where = f"Files are searched for in {' and '.join(_places())}."
    return "\n".join([*(line.rstrip() for line in text), "", where, "jensen datasets NAME prints a card."])


def _count(card: Card) -> str:
    size = card.splits.get("train")
    return "any number" if size is None else f"{size:,}"


def _shape(card: Card) -> str:
    return " x ".join(map(str, card.shape))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(1, room - 3)] + "..."


def _standing(card: Card) -> str:
    if card.access in ("embedded", "synthetic"):
        return card.access
    if _present(card):
        return "present"
    return "to download" if card.access == "downloaded" else "to add by hand"


def _present(card: Card) -> bool:
    """Whether the files of a data set are present; embedded and synthetic sets always are."""
    if card.access in ("embedded", "synthetic"):
        return True
    return any((Path(place) / card.name).is_dir() and any((Path(place) / card.name).iterdir()) for place in _places())


def _places() -> list[str]:
    given: Any = os.environ.get("JENSEN_DATA")
    return [*([given] if given else []), str(pooch.os_cache("jensen"))]
