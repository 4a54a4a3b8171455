"""Training and measurement of any Pyro pair: one kernel runs it, everything else is arithmetic on its log weights.

Nothing here imports another room: models and guides are met through the Pyro protocol alone.
"""

from .ais import AIS, ais
from .bounds import Bounds, bounds
from .brackets import Bracket, Sandwich
from .calibration import calibrate
from .compare import Comparison, Row, compare
from .diagnostics import pareto_k
from .evidence import Evidence, evaluate
from .exact import HasEvidence
from .gaps import Gaps, gaps
from .history import History
from .ranks import Calibration
from .sandwich import sandwich
from .simulation import simulate
from .sites import Terms
from .svi import fit
from .weights import log_joint, log_weights, terms

__all__ = [
    "AIS",
    "Bounds",
    "Bracket",
    "Calibration",
    "Comparison",
    "Evidence",
    "Gaps",
    "HasEvidence",
    "History",
    "Row",
    "Sandwich",
    "Terms",
    "ais",
    "bounds",
    "calibrate",
    "compare",
    "evaluate",
    "fit",
    "gaps",
    "log_joint",
    "log_weights",
    "pareto_k",
    "sandwich",
    "simulate",
    "terms",
]
