"""One door to all data: published sets by name, synthetic ones by name, your own by path."""

from __future__ import annotations

__all__ = ["load"]

from difflib import get_close_matches
from pathlib import Path

import torch

from .cards import Card, cards
from .dataset import Dataset
from .preparation import Split, prepare
from .published import READERS

_RESPLIT = ("digits", "frey_faces")


def load(
    name: str | Path,
    *,
    binarize: str | None = None,
    dequantize: bool | None = None,
    standardize: bool = False,
    split: Split | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""A data set by name, one of :func:`cards`, such as ``"digits"`` (embedded) or ``"mnist"``.

    Grey images with L levels 0 ... L - 1 become x / (L - 1), or dequantized (x + u) / L with u uniform on [0, 1):

    .. math:: \log_2 P(\text{levels}) \ge \log_2 p\left(\tfrac{x + u}{L}\right) - X \log_2 L
              \quad\text{in expectation over } u

    References:
        Theis, van den Oord and Bethge (2016), A Note on the Evaluation of Generative Models.

    Args:
        name: the data set.
        binarize: None; ``"threshold"``: 1 where a value exceeds one half; or ``"sample"``: drawn once from
            Bernoulli(x). For a new draw at every sight pass ``batch_transform=torch.bernoulli`` to ``fit``.
        dequantize: for grey images, whether to dequantize. None: digits unless binarized (a density is fitted to
            them), others not.
        standardize: whether to take off the mean and divide by the standard deviation of each training feature.
        split: shares or numbers of training, validation and test data, for sets without a published split.
        seed: fixes u, the draws of ``"sample"``, and the split where none is published.
        dtype: of the data.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: for a name that is none, ``dequantize`` of data that are no grey images, or a ``split`` of a set
            whose split is published.
        FileNotFoundError: if the files are not there and cannot be downloaded; the message says where to put them.

    Example:
        >>> load("digits", dequantize=False).test.max()
        tensor(1.)
        >>> load("digits", binarize="threshold").train.unique()
        tensor([0., 1.])
    """
    known = cards()
    if name not in known:
        close = get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"there is no data set {str(name)!r}; " + (f"did you mean {close[0]!r}? " if close else "") + "there are "
            f"{', '.join(known)}"
        )
    card = known[str(name)]
    if split is not None and card.name not in _RESPLIT:
        raise ValueError(f"{card.name} has a published split, but got split={split}: leave split out")
    if dequantize is None:
        dequantize = card.name == "digits" and binarize is None
    raw = _raw(card, split, seed)
    return prepare(raw, binarize=binarize, dequantize=dequantize, standardize=standardize, seed=seed, dtype=dtype)


def _raw(card: Card, split: Split | None, seed: int) -> Dataset:
    images, labels = READERS[card.name](split, seed)
    *planes, height, width = card.shape if len(card.shape) > 1 else (0, 0)
    return Dataset(
        name=card.name,
        **{part: torch.tensor(values) for part, values in images.items()},
        labels={part: torch.tensor(values, dtype=torch.int64) for part, values in labels.items()},
        image_shape=(height, width) if height else None,
        value_range=card.value_range,
        levels=card.levels,
        dequantized=False,
        licence=card.licence,
        citation=card.citation,
        channels=planes[0] if planes else 1,
    )
