"""Real data as tensors: ``load(name)`` gives train, validation and test [N, X], labels, value range, licence, citation.

Files are looked for in the folder ``JENSEN_DATA``, then in the user's cache, then downloaded and checked. Grey images
are never binarized silently.
"""

from .cards import Card, Result, cards
from .dataset import Dataset
from .loaders import load

__all__ = ["Card", "Dataset", "Result", "cards", "load"]
