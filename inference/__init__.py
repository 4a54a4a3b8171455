"""Training and measurement of any Pyro pair: one kernel runs it, everything else is arithmetic on its log weights.

Nothing here imports another room: models and guides are met through the Pyro protocol alone.
"""

from .compare import Comparison, Row, compare
from .diagnostics import pareto_k
from .evidence import Bounds, Evidence, bounds, evaluate
from .exact import HasEvidence
from .svi import History, fit
from .weights import Terms, log_joint, log_weights, terms

__all__ = [
    "Bounds",
    "Comparison",
    "Evidence",
    "HasEvidence",
    "History",
    "Row",
    "Terms",
    "bounds",
    "compare",
    "evaluate",
    "fit",
    "log_joint",
    "log_weights",
    "pareto_k",
    "terms",
]
