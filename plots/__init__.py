"""Figures: each function takes a result (or tensors), draws on an ``Axes`` and returns it.

Without an ``Axes`` a new figure is made through pyplot, as wide as a column of a paper: a notebook shows it below the
cell, and a script shows it with ``plt.show()``. ``save(ax, "figures/bounds")`` writes PNG and PDF. Lines that differ in
colour also differ in marker or dashes.

New figures have the style of ``jensen.mplstyle``: 8 points, 200 dots per inch, no frame at the top and at the right,
colours that colour-blind readers tell apart. ``plt.style.use("jensen.plots.jensen")`` takes it for figures of your own.
Axes that you give (``ax=``) keep the style in which you made them; a title that you add later has the style of then.
"""

from .bounds import plot_bounds
from .calibration import plot_ranks
from .diagnostics import plot_ess, plot_pareto_k
from .draws import plot_draws
from .gaps import plot_gaps
from .generated import plot_reconstructions, plot_samples
from .gradient_signal import plot_signal
from .images import plot_images
from .imputations import plot_imputations
from .latent import plot_latent
from .learning_rates import plot_learning_rates
from .live import LiveCurves
from .manifold import plot_manifold
from .missing import plot_missing
from .posterior import plot_posterior
from .rate import plot_rate_distortion
from .save import save
from .training import plot_training
from .walks import plot_interpolations, plot_traversals
from .worst import plot_worst

__all__ = [
    "LiveCurves",
    "plot_bounds",
    "plot_draws",
    "plot_ess",
    "plot_gaps",
    "plot_images",
    "plot_imputations",
    "plot_interpolations",
    "plot_latent",
    "plot_learning_rates",
    "plot_manifold",
    "plot_missing",
    "plot_pareto_k",
    "plot_posterior",
    "plot_ranks",
    "plot_rate_distortion",
    "plot_reconstructions",
    "plot_samples",
    "plot_signal",
    "plot_training",
    "plot_traversals",
    "plot_worst",
    "save",
]
