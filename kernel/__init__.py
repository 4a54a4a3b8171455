"""Runs any Pyro pair and returns log weights: the only room that runs traces.

Nothing here knows a model, a guide, a family, or what is done with the weights.
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
