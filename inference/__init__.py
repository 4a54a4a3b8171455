"""Training and measurement of any Pyro pair: one kernel runs it, everything else is arithmetic on its log weights.

Nothing here imports another room: models and guides are met through the Pyro protocol alone.
"""

from .ais import AIS, ais
from .bounds import Bounds, bounds
from .brackets import Bracket, Sandwich
from .calibration import calibrate
from .callbacks import Callback, CSVLogger, TensorBoardLogger
from .compare import compare
from .comparison import Comparison, Row
from .costs import Gaps
from .decoding import decode, encode, reconstruct
from .diagnostics import pareto_k
from .distance import GuideDistance
from .elbo import ELBO, CyclicalAnnealing, LinearAnnealing
from .evaluate import evaluate
from .evidence import Evidence
from .exact import ExactEvidence, HasEvidence, exact_log_evidence
from .gaps import gaps
from .history import History
from .mcmc import mcmc_posterior
from .objectives import IWAE, Renyi
from .posterior import MCMCConvergenceWarning, PosteriorDraws
from .products import float32_products
from .ranks import Calibration
from .rate import PosteriorCollapseWarning, RateDistortion, rate_distortion
from .sandwich import sandwich
from .signal import GradientSignal, gradient_signal
from .simulation import simulate
from .sites import Terms
from .svi import fit
from .weights import log_joint, log_weights, terms

__all__ = [
    "AIS",
    "ELBO",
    "IWAE",
    "Bounds",
    "Bracket",
    "CSVLogger",
    "Calibration",
    "Callback",
    "Comparison",
    "CyclicalAnnealing",
    "Evidence",
    "ExactEvidence",
    "Gaps",
    "GradientSignal",
    "GuideDistance",
    "HasEvidence",
    "History",
    "LinearAnnealing",
    "MCMCConvergenceWarning",
    "PosteriorCollapseWarning",
    "PosteriorDraws",
    "RateDistortion",
    "Renyi",
    "Row",
    "Sandwich",
    "TensorBoardLogger",
    "Terms",
    "ais",
    "bounds",
    "calibrate",
    "compare",
    "decode",
    "encode",
    "evaluate",
    "exact_log_evidence",
    "fit",
    "float32_products",
    "gaps",
    "gradient_signal",
    "log_joint",
    "log_weights",
    "mcmc_posterior",
    "pareto_k",
    "rate_distortion",
    "reconstruct",
    "sandwich",
    "simulate",
    "terms",
]
