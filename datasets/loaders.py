"""The data sets: each loader returns splits of raw values; :func:`load` scales them and says what they are."""

from __future__ import annotations

__all__ = ["Dataset", "load"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from .files import File, locate, read_idx

Splits = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set in three splits.

    Attributes:
        name: its name.
        train: training data, [N, X].
        validation: validation data, [N, X].
        test: test data, [N, X].
        labels: class of each datum by split name, int64 [N]; empty where there are no classes.
        image_shape: height and width of an image, or None where the data are no images.
        value_range: the smallest and largest value that data of this kind can have, if bounded.
        levels: grey levels of the raw images; 2 for binary ones; None for measurements.
        dequantized: whether uniform noise fills the steps between levels, so that the data have a density.
        licence: the licence as its distributor states it, or "none stated".
        citation: whom to cite.

    Example:
        >>> data = load("digits")
        >>> data.train.shape, data.test.shape, data.levels
        (torch.Size([1197, 64]), torch.Size([400, 64]), 17)
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    labels: dict[str, Tensor]
    image_shape: tuple[int, int] | None
    value_range: tuple[float, float] | None
    levels: int | None
    dequantized: bool
    licence: str
    citation: str

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test data"
        return f"<Dataset {self.name}: {sizes} of {self.train.shape[1]} features; licence: {self.licence}>"

    @property
    def bits_offset(self) -> float:
        """log2 of the number of grey levels, to be added to bits per dimension; 0 for data that are not dequantized."""
        return math.log2(self.levels) if self.dequantized and self.levels else 0.0


def load(name: str, *, dequantize: bool | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    r"""A data set by name: ``"digits"`` (embedded), ``"mnist"``, ``"binarized_mnist"`` or ``"oil_flow"``.

    Grey images with L levels 0 ... L - 1 become x / (L - 1), or dequantized (x + u) / L with u uniform on [0, 1):

    .. math:: \log_2 P(\text{levels}) \ge \log_2 p\left(\tfrac{x + u}{L}\right) - X \log_2 L
              \quad\text{in expectation over } u

    References:
        Theis, van den Oord and Bethge (2016), A Note on the Evaluation of Generative Models.

    Args:
        name: the data set.
        dequantize: for grey images, whether to dequantize. None: digits yes (a density is fitted to them), MNIST no
            (it is usually binarized: ``batch_transform=torch.bernoulli``, or ``(x > 0.5).float()``).
        seed: fixes u, and the split of digits.
        dtype: of the data.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: for a name that is none, or ``dequantize`` of data that are no grey images.
        FileNotFoundError: if the files are not there and cannot be downloaded; the message says where to put them.

    Example:
        >>> load("digits", dequantize=False).test.max()
        tensor(1.)
    """
    if name not in _LOADERS:
        close = get_close_matches(name, _LOADERS, n=1)
        raise ValueError(
            f"there is no data set {name!r}; " + (f"did you mean {close[0]!r}? " if close else "") + "there are "
            f"{', '.join(_LOADERS)}"
        )
    return _LOADERS[name](dequantize, seed, dtype)


def _digits(dequantize: bool | None, seed: int, dtype: torch.dtype) -> Dataset:
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    parts = dict(zip(_SPLITS, np.split(order, [1197, 1397]), strict=True))
    return _grey(
        "digits",
        {split: images[rows] for split, rows in parts.items()},
        {split: classes[rows] for split, rows in parts.items()},
        levels=17,
        image_shape=(8, 8),
        dequantize=dequantize is not False,
        seed=seed,
        dtype=dtype,
        licence="CC BY 4.0 (UCI); shipped with scikit-learn (BSD 3-Clause)",
        citation="Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI ML Repository",
    )


def _mnist(dequantize: bool | None, seed: int, dtype: torch.dtype) -> Dataset:
    arrays = {part: read_idx(locate(file)) for part, file in _MNIST.items()}
    images = {part: arrays[part].reshape(len(arrays[part]), -1) for part in ("train-images", "t10k-images")}
    return _grey(
        "mnist",
        _hold_out(images["train-images"], images["t10k-images"]),
        _hold_out(arrays["train-labels"], arrays["t10k-labels"]),
        levels=256,
        image_shape=(28, 28),
        dequantize=bool(dequantize),
        seed=seed,
        dtype=dtype,
        licence="none stated",
        citation="LeCun, Bottou, Bengio and Haffner (1998), Gradient-Based Learning Applied to Document Recognition",
    )


def _binarized_mnist(dequantize: bool | None, seed: int, dtype: torch.dtype) -> Dataset:
    if dequantize:
        raise ValueError("binarized_mnist is binary: there is nothing to dequantize")
    return Dataset(
        name="binarized_mnist",
        **{split: torch.as_tensor(a).to(dtype) for split, a in _binarized_arrays().items()},
        labels={},
        image_shape=(28, 28),
        value_range=(0.0, 1.0),
        levels=2,
        dequantized=False,
        licence="none stated",
        citation="Salakhutdinov and Murray (2008), On the Quantitative Analysis of Deep Belief Networks; "
        "Larochelle and Murray (2011), The Neural Autoregressive Distribution Estimator",
    )


def _binarized_arrays() -> Splits:
    try:
        with np.load(locate(_BINARIZED), allow_pickle=False) as archive:
            return {split: archive[key] for split, key in zip(_SPLITS, ("train", "valid", "test"), strict=True)}
    except FileNotFoundError as absent:
        try:  # the published text files: a line an image, digits with a space between
            return {split: _read_amat(file) for split, file in zip(_SPLITS, _AMAT, strict=True)}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{absent} Or else: {error}") from None


def _read_amat(file: File) -> NDArray[np.uint8]:
    return np.frombuffer(locate(file).read_bytes(), dtype=np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")


def _oil_flow(dequantize: bool | None, seed: int, dtype: torch.dtype) -> Dataset:
    if dequantize:
        raise ValueError("oil_flow holds measurements: there is nothing to dequantize")
    with np.load(locate(_OIL), allow_pickle=False) as archive:
        keys = dict(zip(_SPLITS, ("DataTrn", "DataVdn", "DataTst"), strict=True))
        return Dataset(
            name="oil_flow",
            **{split: torch.as_tensor(archive[key]).to(dtype) for split, key in keys.items()},
            labels={split: torch.as_tensor(archive[key + "Lbls"].argmax(1)) for split, key in keys.items()},
            image_shape=None,
            value_range=None,
            levels=None,
            dequantized=False,
            licence="none stated",
            citation="Bishop and James (1993), Analysis of Multiphase Flows Using Dual-Energy Gamma Densitometry and "
            "Neural Networks",
        )


def _grey(
    name: str,
    images: Splits,
    labels: Splits,
    *,
    levels: int,
    image_shape: tuple[int, int],
    dequantize: bool,
    seed: int,
    dtype: torch.dtype,
    licence: str,
    citation: str,
) -> Dataset:
    """Grey images with values 0 ... levels - 1, scaled to [0, 1]."""
    noise = torch.Generator().manual_seed(seed)
    scaled = {}
    for split, values in images.items():
        x = torch.tensor(values, dtype=dtype)
        if dequantize:
            u = torch.rand(x.shape, generator=noise, dtype=torch.float32)
            x = (x + u.clamp_max(1 - 2**-16)) / levels  # 255 + u stays below 256 in float32
        else:
            x = x / (levels - 1)
        scaled[split] = x
    return Dataset(
        name=name,
        **scaled,
        labels={split: torch.tensor(values, dtype=torch.int64) for split, values in labels.items()},
        image_shape=image_shape,
        value_range=(0.0, 1.0),
        levels=levels,
        dequantized=dequantize,
        licence=licence,
        citation=citation,
    )


def _hold_out(train: NDArray[np.generic], test: NDArray[np.generic]) -> Splits:
    """The last 10,000 training rows are the validation split."""
    return {"train": train[:-10_000], "validation": train[-10_000:], "test": test}


_SPLITS = ("train", "validation", "test")
_LECUN = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_LAROCHELLE = ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",)
_MNIST = {
    name: File("mnist", f"{name}-idx{rank}-ubyte.gz", sha256, _LECUN)
    for name, rank, sha256 in (
        ("train-images", 3, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels", 1, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images", 3, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels", 1, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    )
}
_BINARIZED = File(
    "binarized_mnist",
    "binarized_mnist.npz",
    "350243cb824d66d022e0c3e87cac231231668817ff03f5f6d7b6533017d56b4b",
)
_AMAT = tuple(
    File("binarized_mnist", f"binarized_mnist_{split}.amat", sha256, _LAROCHELLE)
    for split, sha256 in (
        ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
)
_OIL = File("oil_flow", "oil_flow_3class.npz", "1322dda16d4af802ea3d7361395d4574d9670966434771d3f8de2cc492060e61")
_LOADERS: dict[str, Callable[[bool | None, int, torch.dtype], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "binarized_mnist": _binarized_mnist,
    "oil_flow": _oil_flow,
}
