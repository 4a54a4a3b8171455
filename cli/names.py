"""The names that options take, known before anything is imported that takes seconds.

:mod:`jensen.cli.pairs` says which class each name stands for.
"""

from __future__ import annotations

__all__ = [
    "DEFAULT_GUIDES",
    "FAMILIES",
    "GRADIENTS",
    "GUIDES",
    "LIKELIHOODS",
    "MODELS",
    "OBJECTIVES",
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
GRADIENTS = ("standard", "stl", "dreg")


def suggestion(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is none: the nearest of the names, and all of them.

    Example:
        >>> suggestion("vea", ["ppca", "vae"])
        'did you mean vae? There are ppca, vae'
    """
    names = list(names)
    close = get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]}? There are " if close else "there are ") + ", ".join(names)
