"""Published sets, each read from the files of its distributor; raw values, scaled by :mod:`~jensen.datasets.loaders`."""

from __future__ import annotations

__all__ = ["READERS", "Arrays", "Reader"]

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from .files import File, locate, read_idx
from .preparation import SPLITS, Split, draw_split

Arrays = dict[str, NDArray[np.generic]]
Reader = Callable[[Split | None, int], tuple[Arrays, Arrays]]


def _digits(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    images, classes = load_digits(return_X_y=True)
    rows = draw_split(len(images), split or (1197, 200, 400), seed)
    return {part: images[r] for part, r in rows.items()}, {part: classes[r] for part, r in rows.items()}


def _idx(files: dict[str, File]) -> tuple[Arrays, Arrays]:
    arrays = {part: read_idx(locate(file)) for part, file in files.items()}
    images = {part: arrays[part].reshape(len(arrays[part]), -1) for part in ("train-images", "t10k-images")}
    return (
        _hold_out(images["train-images"], images["t10k-images"]),
        _hold_out(arrays["train-labels"], arrays["t10k-labels"]),
    )


def _mnist(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    return _idx(_MNIST)


def _fashion_mnist(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    return _idx(_FASHION)


def _binarized_mnist(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    try:
        with np.load(locate(_BINARIZED), allow_pickle=False) as archive:
            return {part: archive[key] for part, key in zip(SPLITS, ("train", "valid", "test"), strict=True)}, {}
    except FileNotFoundError as absent:
        try:  # the published text files: a line an image, digits with a space between
            return {part: _read_amat(file) for part, file in zip(SPLITS, _AMAT, strict=True)}, {}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{absent} Or else: {error}") from None


def _read_amat(file: File) -> NDArray[np.uint8]:
    return np.frombuffer(locate(file).read_bytes(), dtype=np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")


def _oil_flow(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    with np.load(locate(_OIL), allow_pickle=False) as archive:
        keys = dict(zip(SPLITS, ("DataTrn", "DataVdn", "DataTst"), strict=True))
        return (
            {part: archive[key] for part, key in keys.items()},
            {part: archive[key + "Lbls"].argmax(1) for part, key in keys.items()},
        )


def _hold_out(train: NDArray[np.generic], test: NDArray[np.generic], held: int = 10_000) -> Arrays:
    """The last training rows are the validation split."""
    return {"train": train[:-held], "validation": train[-held:], "test": test}


def _idx_files(folder: str, mirrors: tuple[str, ...], *sha256: str) -> dict[str, File]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return {
        part[:-5]: File(folder, f"{part}-ubyte.gz", known, mirrors) for part, known in zip(parts, sha256, strict=True)
    }


_MNIST = _idx_files(
    "mnist",
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_FASHION = _idx_files(
    "fashion_mnist",
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
_BINARIZED = File(
    "binarized_mnist",
    "binarized_mnist.npz",
    "350243cb824d66d022e0c3e87cac231231668817ff03f5f6d7b6533017d56b4b",
)
_AMAT = tuple(
    File(
        "binarized_mnist",
        f"binarized_mnist_{part}.amat",
        sha256,
        ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",),
    )
    for part, sha256 in (
        ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
)
_OIL = File("oil_flow", "oil_flow_3class.npz", "1322dda16d4af802ea3d7361395d4574d9670966434771d3f8de2cc492060e61")
READERS: dict[str, Reader] = {
    "digits": _digits,
    "mnist": _mnist,
    "binarized_mnist": _binarized_mnist,
    "fashion_mnist": _fashion_mnist,
    "oil_flow": _oil_flow,
}
