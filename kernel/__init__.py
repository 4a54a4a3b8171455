"""Runs any Pyro model and guide and returns log weights: the only subpackage that runs traces.

Nothing here depends on a particular model, guide or family, or on the use of the weights.
"""

from .batches import Part, stream
from .layout import Layout
from .simulation import simulate
from .terms import Terms
from .weights import Program, check_pair, log_joint, log_weights, terms

__all__ = [
    "Layout",
    "Part",
    "Program",
    "Terms",
    "check_pair",
    "log_joint",
    "log_weights",
    "simulate",
    "stream",
    "terms",
]
