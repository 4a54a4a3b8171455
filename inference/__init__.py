"""Training and measurement of any Pyro pair: one kernel runs it, everything else is arithmetic on its log weights.

Nothing here imports another room: models and guides are met through the Pyro protocol alone.
"""

from .bounds import Bounds, bounds
from .calibration import calibrate
from .compare import Comparison, Row, compare
from .diagnostics import pareto_k
from .evidence import Evidence, evaluate
from .exact import ExactEvidence, HasEvidence, exact_log_evidence
from .gaps import Gaps, gaps
from .history import History
from .ranks import Calibration
from .simulation import simulate
from .sites import Terms
from .svi import fit
from .weights import log_joint, log_weights, terms

__all__ = [
    "Bounds",
    "Calibration",
    "Comparison",
    "Evidence",
    "ExactEvidence",
    "Gaps",
    "HasEvidence",
    "History",
    "Row",
    "Terms",
    "bounds",
    "calibrate",
    "compare",
    "evaluate",
    "exact_log_evidence",
    "fit",
    "gaps",
    "log_joint",
    "log_weights",
    "pareto_k",
    "simulate",
    "terms",
]
