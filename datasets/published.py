"""Readers of the published data sets from their distributors' files; values are raw and scaled later."""

from __future__ import annotations

__all__ = ["READERS", "Arrays", "Reader"]

import gzip
import math
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import LIMIT, check_size, read_mat
from .files import File, locate
from .preparation import SPLITS, Split, draw_split

Arrays = dict[str, NDArray[np.generic]]
Reader = Callable[[Split | None, int], tuple[Arrays, Arrays]]


def _digits(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits  # imported here because it is slow

    images, classes = load_digits(return_X_y=True)
    rows = draw_split(len(images), split or (1197, 200, 400), seed)
    return {part: images[r] for part, r in rows.items()}, {part: classes[r] for part, r in rows.items()}


def _read_idx(file: File) -> NDArray[np.uint8]:
    """Read a file in LeCun's idx format for unsigned bytes: two zeros, the type 8, the rank, the shape, the values."""
    path = locate(file)
    try:
        with gzip.open(path) as stream:
            head = stream.read(4)
            shape = tuple(np.frombuffer(stream.read(4 * head[3]), ">u4").tolist()) if head[:3] == b"\0\0\x08" else ()
            size = math.prod(shape)
            check_size(path, size, LIMIT)
            body = stream.read(size + 1)  # one more byte, so that the checksum at the end is read
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete idx file: {error}; download it again") from error
    if not shape or len(shape) != head[3] or len(body) != size:
        raise ValueError(f"{path} is not a complete idx file: {len(body)} bytes for shape {shape}; download it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx(files: dict[str, File]) -> tuple[Arrays, Arrays]:
    arrays = {part: _read_idx(file) for part, file in files.items()}
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
        try:  # the published text files: one line per image, digits separated by spaces
            return {part: _read_amat(file) for part, file in zip(SPLITS, _AMAT, strict=True)}, {}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{absent} Alternatively: {error}") from None


def _read_amat(file: File) -> NDArray[np.uint8]:
    return np.frombuffer(locate(file).read_bytes(), dtype=np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")


def _oil_flow(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    keys = dict(zip(SPLITS, ("DataTrn", "DataVdn", "DataTst"), strict=True))
    with np.load(locate(_OIL), allow_pickle=False) as archive:
        return (
            {part: archive[key] for part, key in keys.items()},
            {part: archive[key + "Lbls"].argmax(1) for part, key in keys.items()},
        )


def _omniglot(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    n, held, test = 24_345, 1_345, 8_070
    path = locate(_OMNIGLOT)
    arrays = read_mat(path, {"data": (784, n), "target": (50, n), "testdata": (784, test), "testtarget": (50, test)})
    _check_range(path, "data", arrays["data"], 0, 1)
    _check_range(path, "testdata", arrays["testdata"], 0, 1)
    order = np.random.RandomState(123).permutation(n)  # the validation split of Burda et al.
    images = _upright(arrays["data"].T[order]), _upright(arrays["testdata"].T)
    labels = arrays["target"].argmax(0)[order], arrays["testtarget"].argmax(0)
    return _hold_out(*images, held), _hold_out(*labels, held)


def _caltech(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    sizes = dict(zip(("train", "val", "test"), (4_100, 2_264, 2_307), strict=True))
    shapes = {f"{part}_data": (n, 784) for part, n in sizes.items()} | {
        f"{part}_labels": (n, 1) for part, n in sizes.items()
    }
    path = locate(_CALTECH)
    arrays = read_mat(path, shapes)
    for part in sizes:
        _check_range(path, f"{part}_data", arrays[f"{part}_data"], 0, 1, whole=True)
        _check_range(path, f"{part}_labels", arrays[f"{part}_labels"], 1, 101, whole=True)
    return (
        {part: _upright(arrays[f"{key}_data"]) for part, key in zip(SPLITS, sizes, strict=True)},
        {part: arrays[f"{key}_labels"][:, 0] - 1 for part, key in zip(SPLITS, sizes, strict=True)},
    )


def _upright(images: NDArray[np.generic]) -> NDArray[np.generic]:
    """Convert images [N, 784] from MATLAB's column-by-column order to rows."""
    return images.reshape(-1, 28, 28).swapaxes(1, 2).reshape(-1, 784)


def _check_range(
    path: Path, name: str, values: NDArray[np.generic], low: float, high: float, whole: bool = False
) -> None:
    """Check the range of values, for files without a published SHA-256."""
    if not (low <= values.min() and values.max() <= high) or (whole and (values % 1).any()):
        kind = "integers" if whole else "values"
        raise ValueError(
            f"{path}: {name} has values from {values.min():g} to {values.max():g}, but {kind} from {low} to {high} "
            "were expected: it is not the expected file"
        )


def _frey_faces(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    faces = read_mat(locate(_FREY), {"ff": (560, 1965)})["ff"].T  # [N, X]
    return {part: faces[rows] for part, rows in draw_split(1965, split or (1565, 200, 200), seed).items()}, {}


def _cifar10(split: Split | None, seed: int) -> tuple[Arrays, Arrays]:
    names = [*(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)), "cifar-10-batches-bin/test_batch.bin"]
    contents = {}
    with tarfile.open(locate(_CIFAR)) as archive:
        for member in archive:  # in the archive's order, so that it is decompressed once
            if member.name in names and (file := archive.extractfile(member)):
                contents[member.name] = file.read()
    batches = [np.frombuffer(contents[name], dtype=np.uint8).reshape(-1, 3073) for name in names]
    train, test = np.concatenate(batches[:-1]), batches[-1]  # a row is a label and 3072 pixels
    return _hold_out(train[:, 1:], test[:, 1:], 5_000), _hold_out(train[:, 0], test[:, 0], 5_000)


def _hold_out(train: NDArray[np.generic], test: NDArray[np.generic], held: int = 10_000) -> Arrays:
    """Use the last training rows as the validation split."""
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
    ("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",),
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
        ("https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",),
    )
    for part, sha256 in (
        ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
)
_OIL = File("oil_flow", "oil_flow_3class.npz", "1322dda16d4af802ea3d7361395d4574d9670966434771d3f8de2cc492060e61")
_OMNIGLOT = File("omniglot", "chardata.mat", None, ("https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/",))
_CALTECH = File(
    "caltech101_silhouettes",
    "caltech101_silhouettes_28_split1.mat",
    None,
    ("https://people.cs.umass.edu/~marlin/data/",),
)
_FREY = File(
    "frey_faces",
    "frey_rawface.mat",
    "265a83a23adb081755cd3de375509828e690324d1d60f076b8ecebc840d59c64",
    ("https://cs.nyu.edu/~roweis/data/",),
)
_CIFAR = File(
    "cifar10",
    "cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ("https://www.cs.toronto.edu/~kriz/",),
)
READERS: dict[str, Reader] = {
    "digits": _digits,
    "mnist": _mnist,
    "binarized_mnist": _binarized_mnist,
    "fashion_mnist": _fashion_mnist,
    "omniglot": _omniglot,
    "caltech101_silhouettes": _caltech,
    "frey_faces": _frey_faces,
    "cifar10": _cifar10,
    "oil_flow": _oil_flow,
}
