"""What pictures share: a figure of their own, and colours that colour-blind readers tell apart."""

from __future__ import annotations

__all__ = ["COLOURS", "own_axes"]

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
    "#882255",
    "#999999",
)
"""The palette of Okabe and Ito (2008), Color Universal Design, and two more: ten classes."""


def own_axes(ax: Axes | None, width: float = 5.0, height: float = 3.6) -> Axes:
    """The given axes, or those of a new figure (in inches) that pyplot does not keep."""
    if ax is not None:
        return ax
    made: Axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    return made
