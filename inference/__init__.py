"""Training and measurement of any Pyro model and guide: one kernel runs them, the rest is arithmetic on log weights.

Nothing here imports models, guides or families: they are used through the Pyro protocol alone.
"""

from jensen.graphs.products import float32_products
from jensen.kernel.simulation import simulate
from jensen.kernel.terms import Terms
from jensen.kernel.weights import log_joint, log_weights, terms

from .annealing.ais import AIS, ais
from .annealing.sandwich import Bracket, Sandwich, sandwich
from .exact.log_evidence import ExactEvidence, HasEvidence, exact_log_evidence
from .mcmc.distance import GuideDistance
from .mcmc.posterior import MCMCConvergenceWarning, PosteriorDraws, mcmc_posterior
from .measure.baseline import Baseline, baseline, likely_reason
from .measure.bounds import Bounds, bounds
from .measure.calibration import Calibration, calibrate
from .measure.compare import Comparison, Row, compare
from .measure.decoding import decode, encode, reconstruct
from .measure.diagnostics import pareto_k
from .measure.evaluate import Evidence, evaluate
from .measure.gaps import Gaps, gaps
from .measure.impute import HasCompletion, HeldOut, Imputation, held_out, impute
from .measure.rate import PosteriorCollapseWarning, RateDistortion, rate_distortion
from .training.callbacks import Callback, CSVLogger, TensorBoardLogger
from .training.checkpoint import restore
from .training.fit import fit
from .training.gradient_signal import GradientSignal, gradient_signal
from .training.history import History
from .training.objectives import ELBO, IWAE, CyclicalAnnealing, LinearAnnealing, Objective, Renyi
from .training.range_test import LearningRates, learning_rates

__all__ = [
    "AIS",
    "ELBO",
    "IWAE",
    "Baseline",
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
    "HasCompletion",
    "HasEvidence",
    "HeldOut",
    "History",
    "Imputation",
    "LearningRates",
    "LinearAnnealing",
    "MCMCConvergenceWarning",
    "Objective",
    "PosteriorCollapseWarning",
    "PosteriorDraws",
    "RateDistortion",
    "Renyi",
    "Row",
    "Sandwich",
    "TensorBoardLogger",
    "Terms",
    "ais",
    "baseline",
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
    "held_out",
    "impute",
    "learning_rates",
    "likely_reason",
    "log_joint",
    "log_weights",
    "mcmc_posterior",
    "pareto_k",
    "rate_distortion",
    "reconstruct",
    "restore",
    "sandwich",
    "simulate",
    "terms",
]
