"""Training and measurement of any Pyro pair: one kernel runs it, everything else is arithmetic on its log weights.

Nothing here imports another room: models and guides are met through the Pyro protocol alone.
"""

from .bounds import Bounds, bounds
from .compare import Comparison, Row, compare
from .diagnostics import pareto_k
from .evidence import Evidence, evaluate
from .exact import HasEvidence
from .history import History
from .sites import Terms
from .svi import fit
from .weights import log_joint, log_weights, terms

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
