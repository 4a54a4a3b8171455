"""The names that options accept; this module is fast to import.

:mod:`jensen.cli.pairs` holds the class of each name.
"""

from __future__ import annotations

__all__ = [
    "AVERAGES",
    "DEFAULT_GUIDES",
    "FAMILIES",
    "GRADIENTS",
    "GUIDES",
    "LIKELIHOODS",
    "MODELS",
    "OBJECTIVES",
    "SCHEDULES",
    "TRAINED",
    "suggestion",
]

from collections.abc import Iterable
from difflib import get_close_matches

MODELS = ("ppca", "factor-analysis", "mixture-of-ppca", "vae", "gaussian-mixture-vae", "hierarchical")
FAMILIES = (
    "mean-field",
    "low-rank",
    "full-covariance",
    "student-t",
    "mixture",
    "iaf",
    "spline",
    "spline-coupling",
    "sylvester-orthogonal",
    "sylvester-householder",
    "sylvester-triangular",
)
TRAINED = (*FAMILIES, "exact", "bottom-up", "ladder")  # the guides of train
GUIDES = ("prior", *FAMILIES, "laplace", "exact")  # the guides of compare
DEFAULT_GUIDES = ("prior", "mean-field", "full-covariance", "exact")
LIKELIHOODS = (
    "bernoulli",
    "gaussian",
    "gaussian-diagonal",
    "laplace",
    "student-t",
    "continuous-bernoulli",
    "poisson",
    "negative-binomial",
)
OBJECTIVES = ("elbo", "iwae", "renyi")
SCHEDULES = ("constant", "cosine", "warmup", "warmup-cosine")
AVERAGES = ("ema", "polyak")
GRADIENTS = ("standard", "stl", "dreg")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of an error message for an unknown name: the nearest name, and all names.

    Example:
        >>> suggestion("vea", ["ppca", "vae"])
        'did you mean vae? Choose from ppca, vae'
    """
    names = list(names)
    close = get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]}? Choose from " if close else "choose from ") + ", ".join(names)
