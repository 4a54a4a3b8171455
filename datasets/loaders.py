"""The function ``load``: published and synthetic data sets by name, your own files by path."""

from __future__ import annotations

__all__ = ["load"]

from collections.abc import Callable
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jensen.checked import checked, shown

from .arrays import LIMIT
from .cards import Card, cards
from .columns import Wanted
from .dataset import Dataset
from .formats import READ, is_path, read_table
from .missing import Missing
from .own import from_array
from .places import on_cpu
from .preparation import Split, prepare
from .published import READERS
from .synthetic import bars, linear_dynamics, linear_gaussian, pinwheel

if TYPE_CHECKING:  # a Path only for type checkers: load has its own error for data in memory
    _Name = str | PathLike[str]
_WITHOUT_SPLIT = ("digits", "frey_faces")
_SYNTHETIC: dict[str, Callable[..., Dataset]] = {
    "linear_gaussian": linear_gaussian,
    "pinwheel": pinwheel,
    "bars": bars,
    "linear_dynamics": linear_dynamics,
}


@checked
@on_cpu
def load(
    name: _Name,
    *,
    binarize: str | None = None,
    dequantize: bool | None = None,
    standardize: bool = False,
    split: Split | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    label: str | int | None = None,
    header: bool | None = None,
    drop: Wanted = None,
    only: Wanted = None,
    member: str | None = None,
    levels: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    missing: Any = None,
    limit: int | None = None,
) -> Dataset:
    r"""Load a data set by name, one of :func:`cards`, or your own data from a file.

    Grey images with L levels 0 ... L - 1 become x / (L - 1), or dequantized (x + u) / L with u uniform on [0, 1):

    .. math:: \log_2 P(\text{levels}) \ge \log_2 p\left(\tfrac{x + u}{L}\right) - X \log_2 L
              \quad\text{in expectation over } u

    Files of published sets are searched for in the folder ``JENSEN_DATA``, then in the user's cache, and otherwise
    downloaded and checked. Your own file (``.npy``, ``.npz``, ``.mat``, ``.parquet``, or a text table such as ``.csv``,
    also compressed) is treated like an array in :func:`from_array`. Pickled data are never loaded.

    References:
        Theis, van den Oord and Bethge (2016), A Note on the Evaluation of Generative Models.

    Args:
        name: the data set, such as ``"digits"`` (embedded) or ``"mnist"``, or the path of your own file.
        binarize: None; ``"threshold"``: 1 where a value exceeds one half; or ``"sample"``: sampled once from
            Bernoulli(x). For new samples in each epoch pass ``batch_transform=torch.bernoulli`` to ``fit``.
        dequantize: for grey images, whether to dequantize. None: only digits, unless binarized.
        standardize: whether to subtract the mean and divide by the standard deviation of each training feature.
        split: shares that sum to 1, or numbers that sum to N, of training, validation and test data; only for sets
            without a published split. None: their default, or (0.8, 0.1, 0.1).
        seed: fixes u, the samples of ``"sample"``, a split that is not published, and synthetic data.
        dtype: of the data.
        label: of a file, the column of the classes: its name, or its position from 0, or from -1 at the end; of an
            ``.npz`` or ``.mat`` file also the name of an array. A string is first tried as a name.
        header: whether the first line of a text has names; None: detected if unambiguous. Delimiter (comma, semicolon,
            tab, bar, blanks), decimal sign and encoding are detected too.
        drop: of a file, columns to omit, by name or position.
        only: of a file, the columns of the data, if not all but the label.
        member: of an ``.npz`` or ``.mat`` file, the array of the data; None: the only one, or the one called ``x``.
        levels: of a file, the number of grey levels, if the data are grey levels.
        image_shape: of a file, (height, width) or (channels, height, width), if the data are images.
        missing: of a file, what marks values that were not observed, besides NaN and null: ``"nan"`` for nothing else,
            in a text empty cells and NA, N/A, NaN, null, None, ?, -; a word, a number or a list of them, such as -999;
            or a Boolean mask (:func:`from_array`). None: a missing value is an error.
        limit: the maximal bytes of a file's data in memory; 4 GiB if None.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: for an unknown name, ``dequantize`` of data that are not grey images, ``binarize`` of data outside
            [0, 1], ``split`` for a set with a published split, an argument for files together with a name, or a file
            without numbers or with unexpected contents.
        FileNotFoundError: if the files are missing and cannot be downloaded; the message gives the place to put them.
        ImportError: for a ``.parquet`` file, if pyarrow is not installed.

    Example:
        >>> load("digits", dequantize=False).test.max()
        tensor(1.)
        >>> load("digits", binarize="threshold").train.unique()
        tensor([0., 1.])
    """
    if not isinstance(name, str | PathLike):
        raise TypeError(
            f"name must be the name of a data set or the path of a file, but got {shown(name)}: use from_array(x) for "
            "data in memory"
        )
    if "://" in str(name):
        raise ValueError(f"{name} is an address: download the file, and pass its path")
    if not isinstance(name, str) or (name not in cards() and is_path(name)):
        marks = Missing.of(missing)
        table = read_table(Path(name), label, header, limit or LIMIT, drop, only, member, marks)
        return from_array(
            table,
            name=Path(name).stem,
            split=split or (0.8, 0.1, 0.1),
            seed=seed,
            levels=levels,
            image_shape=image_shape,
            binarize=binarize,
            dequantize=bool(dequantize),
            standardize=standardize,
            missing=marks,
            dtype=dtype,
        )
    card = _card(name)
    for_files = {
        "label": label,
        "header": header,
        "drop": drop,
        "only": only,
        "member": member,
        "levels": levels,
        "image_shape": image_shape,
        "missing": missing,
        "limit": limit,
    }
    if given := [argument for argument, value in for_files.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} apply only to your own files, but {card.name} is the name of a data set")
    if dequantize is None:
        dequantize = card.name == "digits" and binarize is None
    if card.name in _SYNTHETIC:
        raw = _SYNTHETIC[card.name](split=split or (0.8, 0.1, 0.1), seed=seed, dtype=torch.float64)
    else:
        raw = _published(card, split, seed)
    return prepare(raw, binarize=binarize, dequantize=dequantize, standardize=standardize, seed=seed, dtype=dtype)


def _card(name: str) -> Card:
    known = cards()
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=1)
    raise ValueError(
        f"there is no data set {name!r}; " + (f"did you mean {close[0]!r}? " if close else "") + "there are "
        f"{', '.join(known)}; and your own files: {READ}"
    )


def _published(card: Card, split: Split | None, seed: int) -> Dataset:
    if split is not None and card.name not in _WITHOUT_SPLIT:
        raise ValueError(f"{card.name} has a published split, but got split={split}: omit split")
    values, labels = READERS[card.name](split, seed)
    *channels, height, width = card.shape if len(card.shape) > 1 else (0, 0)
    return Dataset(
        name=card.name,
        train=torch.tensor(values["train"]),
        validation=torch.tensor(values["validation"]),
        test=torch.tensor(values["test"]),
        labels={part: torch.tensor(y, dtype=torch.int64) for part, y in labels.items()},
        image_shape=(height, width) if height else None,
        value_range=card.value_range,
        levels=card.levels,
        dequantized=False,
        licence=card.licence,
        citation=card.citation,
        channels=channels[0] if channels else 1,
    )
