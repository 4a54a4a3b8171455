"""Training curves that grow during training."""

from __future__ import annotations

__all__ = ["LiveCurves"]

import io
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from matplotlib.figure import Figure

from jensen.checked import checked
from jensen.inference import History

from .axes import house_style, own_figure, settle, without_pyplot
from .training import plot_training

_PANELS = (("elbo", "shaped", "validation"), ("rate",), ("distortion",))
_PIXELS = 480  # the width of the figure in a notebook
_SHARE = 6  # one part of so many of the time is spent on drawing


class LiveCurves:
    """A callback of ``fit`` that shows the training curves below the cell of a notebook and updates them.

    The upper panel has the bounds on training and validation data, the lower ones rate and distortion, where the
    history holds them. Outside a notebook nothing is shown, but ``figure`` holds the last figure.

    Args:
        seconds: the shortest time between two updates. Drawing takes at most about a sixth of the training time.

    Attributes:
        figure: the last figure; None before the first epoch. :func:`~jensen.plots.save` takes it.

    Raises:
        ValueError: for negative seconds.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import fit
        >>> from jensen.models import PPCA
        >>> model, x, live = PPCA(5, latent=2), torch.randn(64, 5), LiveCurves()
        >>> history = fit(model, ExactPosterior(model), x, epochs=3, callbacks=[live], progress=False)
        >>> live.figure.axes[0].get_lines()[0].get_ydata().tolist() == history.elbo
        True
    """

    @checked
    def __init__(self, seconds: float = 1.0) -> None:
        if seconds < 0:
            raise ValueError(f"seconds is the shortest time between two updates, not negative, but got {seconds}")
        self.seconds = seconds
        self.figure: Figure | None = None
        self._history: History | None = None
        self._show: Callable[[bytes], None] | None = None
        self._next = 0.0

    def after_epoch(self, history: History, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        """Update the figure, if enough time has passed."""
        if self._history is None:
            self._show, self._next = _notebook(), 0.0
        self._history = history
        if self._show is not None and time.perf_counter() >= self._next:
            self._draw(history)

    def close(self) -> None:
        """Draw the whole run; the callback can then be used for another."""
        if self._history is not None:
            self._draw(self._history)
        self._history = self._show = None

    def _draw(self, history: History) -> None:
        began = time.perf_counter()
        self.figure = _picture(history)
        if self._show is not None:
            file = io.BytesIO()
            self.figure.savefig(file, format="png")
            self._show(file.getvalue())
        now = time.perf_counter()
        self._next = now + max(self.seconds, (_SHARE - 1) * (now - began))


@without_pyplot()
@house_style()
def _picture(history: History) -> Figure:
    """The panels that the history has curves for, one above the other."""
    columns = history.per_epoch()
    panels = [curves for curves in _PANELS if set(curves) & set(columns)]
    figure = own_figure(4.6, 0.4 + 1.7 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for curves, ax in zip(panels, axes, strict=True):
        plot_training(history, curves, ax)
        ax.label_outer()
    figure.align_ylabels(axes)
    settle(figure)
    return figure


def _notebook() -> Callable[[bytes], None] | None:
    """A function that shows a PNG below the running cell and replaces the previous one; None outside a notebook."""
    if "IPython" not in sys.modules:
        return None
    shell = sys.modules["IPython"].get_ipython()
    if not any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__):
        return None
    output = import_module("IPython.display")
    handle: Any = None

    def show(png: bytes) -> None:
        nonlocal handle
        image = output.Image(data=png, format="png", width=_PIXELS)
        if handle is None:
            handle = output.display(image, display_id=True)
        else:
            handle.update(image)

    return show
