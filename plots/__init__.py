"""Pictures: each function takes a result (or tensors), draws on an ``Axes`` and returns it. No global state.

Without an ``Axes`` a figure of its own is made, which pyplot does not know of: ``ax.figure.savefig(...)``.
"""

from .bounds import plot_bounds
from .calibration import plot_ranks
from .draws import plot_draws
from .gaps import plot_gaps
from .images import plot_images
from .latent import plot_latent
from .posterior import plot_posterior
from .rate import plot_rate_distortion
from .signal import plot_signal

__all__ = [
    "plot_bounds",
    "plot_draws",
    "plot_gaps",
    "plot_images",
    "plot_latent",
    "plot_posterior",
    "plot_ranks",
    "plot_rate_distortion",
    "plot_signal",
]
