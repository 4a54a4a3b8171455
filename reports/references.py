"""The literature that a docstring names."""

from __future__ import annotations

__all__ = ["references"]

import re


def references(doc: str) -> list[str]:
    r"""The entries of a docstring's references: a line with a year in parentheses begins one, any other continues it.

    Example:
        >>> references("A bound.\n\nReferences:\n    Burda (2016), Importance\n    Weighted.\n")
        ['Burda (2016), Importance Weighted.']
    """
    section = re.search(r"^References:\n((?:[ \t]+\S.*(?:\n|\Z))+)", doc, re.M)
    entries: list[str] = []
    for line in section[1].splitlines() if section else []:
        if re.search(r"\(\d{4}\)", line) or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += f" {line.strip()}"
    return entries
