"""Figures as files: for the screen and for print."""

from __future__ import annotations

__all__ = ["save"]

import os
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jensen.checked import checked
from jensen.results.files import whole

from .axes import close_own

_DPI = 300


@checked
def save(picture: Axes | Figure, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Save a figure as PNG at 300 dots per inch and as PDF with TrueType fonts, whose text can be selected.

    The page has the size of the figure, so text of 8 points has 8 points in print. The files hold no date: the same
    figure gives the same bytes. Each is written whole or not at all; a link is replaced, not followed.

    A script closes a figure that a ``plot_*`` function made once it is saved, so that a loop keeps none open: call
    ``plt.show()`` before. Notebooks still show it, and figures of your own stay open.

    Args:
        picture: the axes that a ``plot_*`` function returned, or a figure.
        path: the file, with or without the ending ``.png`` or ``.pdf``; missing folders are made.

    Returns:
        The paths of the PNG and of the PDF.

    Raises:
        TypeError: if ``picture`` is neither axes nor a figure.
        ValueError: for axes that were removed from their figure.

    Example:
        >>> import tempfile
        >>> from jensen.plots import plot_latent
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save(plot_latent(torch.randn(50, 2)), f"{folder}/map")
        ...     [file.name for file in files]
        ['map.png', 'map.pdf']
    """
    if not isinstance(picture, Axes | Figure):
        raise TypeError(f"save takes the axes of a plot_* function, or a figure, but got {type(picture).__name__}")
    if picture.figure is None:
        raise ValueError("these axes were removed from their figure: draw it again")
    figure = picture.figure.figure  # of a subfigure, the whole
    path = Path(path)
    if not path.name:
        raise ValueError(f"path is where to save, with a name, but got {str(path)!r}")
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".pdf") else path
    png, pdf = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "pdf"))
    with rc_context({"pdf.fonttype": 42, "savefig.bbox": None}):
        with whole(png) as partial:
            figure.savefig(partial, dpi=_DPI)
        with whole(pdf) as partial:
            figure.savefig(partial, dpi=_DPI, metadata={"CreationDate": None})
    close_own(figure)
    return png, pdf
