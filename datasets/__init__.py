"""Data as tensors: ``load(name)`` gives train, validation and test [N, X], labels, value range, licence, citation.

Published sets come from files that are looked for in the folder ``JENSEN_DATA``, then in the user's cache, then
downloaded and checked; synthetic sets know their own log-density; your own data come from arrays and files. No pickled
data are loaded, no archive is expanded beyond a limit, and nothing is binarized, dequantized or scaled unasked.
"""

from .cards import Card, Result, cards
from .dataset import Dataset
from .loaders import load
from .own import from_array
from .synthetic import bars, linear_dynamics, linear_gaussian, pinwheel

__all__ = [
    "Card",
    "Dataset",
    "Result",
    "bars",
    "cards",
    "from_array",
    "linear_dynamics",
    "linear_gaussian",
    "load",
    "pinwheel",
]
