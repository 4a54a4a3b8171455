"""Data sets as tensors: ``load(name)`` returns train, validation and test [N, X], labels, licence and citation.

Files of published sets are searched for in the folder ``JENSEN_DATA``, then in the user's cache, and otherwise
downloaded and checked. Synthetic sets have an exact log-density. Your own data come from arrays and files. Pickled data
are never loaded, archives are expanded only up to a limit, and data are binarized, dequantized or standardized only on
request. Values that were not observed are NaN (``missing=``). Data beyond memory are read by the batch (``stream``).
"""

from .cards import Card, Result, cards
from .dataset import Dataset
from .hiding import hide
from .loaders import load
from .own import from_array
from .streams import stream
from .synthetic import bars, linear_dynamics, linear_gaussian, pinwheel

__all__ = [
    "Card",
    "Dataset",
    "Result",
    "bars",
    "cards",
    "from_array",
    "hide",
    "linear_dynamics",
    "linear_gaussian",
    "load",
    "pinwheel",
    "stream",
]
