"""Data sets: their contents, the search for their files, and errors for missing files."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from sklearn.datasets import load_digits

from jensen.datasets import cards, files, load, published
from jensen.datasets.files import File, locate


def test_digits_are_dequantized_with_a_seeded_u():
    data = load("digits", dtype=torch.float64)
    assert (len(data.train), len(data.validation), len(data.test)) == (1197, 200, 400)
    together = torch.cat([data.train, data.validation, data.test])
    levels, u = (together * 17).floor(), (together * 17).frac()
    raw = load_digits().data
    assert sorted(map(tuple, levels.numpy())) == sorted(map(tuple, raw))  # every image once
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert torch.equal(load("digits", dtype=torch.float64).train, data.train)
    assert not torch.equal(load("digits", seed=1, dtype=torch.float64).train, data.train)
    assert data.bits_offset == pytest.approx(np.log2(17))


def test_digits_keep_their_labels():
    raw = load_digits()
    by_image = {tuple(image): label for image, label in zip(raw.data, raw.target, strict=True)}
    data = load("digits", dequantize=False, dtype=torch.float64)
    for image, label in zip((data.test * 16).round(), data.labels["test"], strict=True):
        assert by_image[tuple(image.tolist())] == label


@pytest.mark.parametrize("dequantize", [True, False])
def test_values_lie_in_their_range(dequantize):
    data = load("digits", dequantize=dequantize)
    low, high = data.value_range
    for x in (data.train, data.validation, data.test):
        assert low <= x.min() and x.max() <= high
        assert x.dtype == torch.float32
    assert data.bits_offset == (pytest.approx(np.log2(17)) if dequantize else 0.0)


@pytest.mark.data("mnist")
def test_mnist():
    data = load("mnist")
    assert (data.train.shape, data.validation.shape, data.test.shape) == (
        (50000, 784),
        (10000, 784),
        (10000, 784),
    )
    assert (data.train.min(), data.train.max()) == (0, 1)
    assert torch.bincount(torch.cat([data.labels["train"], data.labels["validation"]])).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert data.labels["test"][:5].tolist() == [7, 2, 1, 0, 4]
    dequantized = load("mnist", dequantize=True)
    assert dequantized.test.max() < 1
    torch.testing.assert_close((dequantized.test * 256).floor(), (data.test * 255).round())


@pytest.mark.data("binarized_mnist")
def test_binarized_mnist():
    data = load("binarized_mnist")
    assert (data.train.shape, data.validation.shape, data.test.shape) == (
        (50000, 784),
        (10000, 784),
        (10000, 784),
    )
    assert data.train.unique().tolist() == [0, 1]
    assert data.levels == 2
    assert data.bits_offset == 0
    with pytest.raises(ValueError, match="nothing to dequantize"):
        load("binarized_mnist", dequantize=True)


@pytest.mark.data("binarized_mnist")
def test_the_published_text_files_hold_the_same_images(tmp_path, monkeypatch):
    """The SHA-256 of the text that the loader would download, and its contents, from the archive's arrays."""
    expected = load("binarized_mnist", dtype=torch.uint8)
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    for file, split in zip(published._AMAT, ("train", "validation", "test"), strict=True):
        text = np.full((len(getattr(expected, split)), 2 * 784), ord(" "), dtype=np.uint8)
        text[:, ::2] = getattr(expected, split).numpy() + ord("0")
        text[:, -1] = ord("\n")
        (folder / file.name).write_bytes(text.tobytes())
    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    monkeypatch.setattr(files.pooch, "os_cache", lambda name: tmp_path / "cache")
    data = load("binarized_mnist", dtype=torch.uint8)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(data, split), getattr(expected, split))


@pytest.mark.data("oil_flow")
def test_oil_flow():
    data = load("oil_flow", dtype=torch.float64)
    assert data.train.shape == data.validation.shape == data.test.shape == (1000, 12)
    assert data.labels["train"].unique().tolist() == [0, 1, 2]
    assert data.licence == "none stated"
    with pytest.raises(ValueError, match="nothing to dequantize"):
        load("oil_flow", dequantize=True)


@pytest.mark.data("fashion_mnist")
def test_fashion_mnist():
    data = load("fashion_mnist")
    assert (data.train.shape, data.validation.shape, data.test.shape) == ((50000, 784), (10000, 784), (10000, 784))
    both = torch.cat([data.labels["train"], data.labels["validation"]])
    assert torch.bincount(both).tolist() == [6000] * 10
    assert data.train.mean().item() * 255 == pytest.approx(72.94, abs=0.2)  # known for the 60,000 together
    assert data.licence == "MIT (Zalando SE)"
    grey, drawn = data.test, load("fashion_mnist", binarize="sample").test
    assert drawn.unique().tolist() == [0, 1]
    z = (drawn - grey).sum() / (grey * (1 - grey)).sum().sqrt()
    assert abs(z) < 4


@pytest.mark.data("frey_faces")
def test_frey_faces():
    data = load("frey_faces", dtype=torch.float64)
    assert (len(data.train), len(data.validation), len(data.test)) == (1565, 200, 200)
    assert data.image_shape == (28, 20) and data.levels == 256
    path = Path(os.environ["JENSEN_DATA"]) / "frey_faces" / "frey_rawface.mat"
    raw = scipy.io.loadmat(path)["ff"].T
    together = torch.cat([data.train, data.validation, data.test]) * 255
    assert sorted(map(tuple, together.round().long().tolist())) == sorted(map(tuple, raw.tolist()))
    images, wrong = data.train.unflatten(1, (28, 20)), data.train.unflatten(1, (20, 28))
    assert images.diff(dim=1).abs().mean() < 0.8 * wrong.diff(dim=1).abs().mean()  # neighbours are similar
    assert torch.equal(load("frey_faces", split=(0.5, 0.25, 0.25), dtype=torch.float64).train[:3], data.train[:3])
    assert load("frey_faces", dequantize=True).bits_offset == 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty ``JENSEN_DATA``, and no cache."""
    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    monkeypatch.setattr(files.pooch, "os_cache", lambda name: tmp_path / "cache")
    return tmp_path


def _one_hot(classes, n):
    return (np.arange(classes)[:, None] == np.arange(n) % classes).astype(np.uint8)


def test_omniglot_is_read_from_the_published_format(folder):
    rng = np.random.default_rng(0)
    n, test = 24_345, 8_070
    image = np.zeros((28, 28), np.uint8)
    image[3] = 1  # a horizontal stroke
    arrays = {
        "data": np.tile(image.reshape(-1, 1, order="F"), n),
        "testdata": rng.integers(0, 2, (784, test), dtype=np.uint8),
        "target": _one_hot(50, n),
        "testtarget": _one_hot(50, test),
    }
    arrays["data"][783] = np.arange(n) % 50 == 7  # a mark that encodes the label
    (folder / "omniglot").mkdir()
    path = folder / "omniglot" / "chardata.mat"
    scipy.io.savemat(path, arrays)
    data = load("omniglot", dtype=torch.uint8)
    assert (len(data.train), len(data.validation), len(data.test)) == (23_000, 1_345, 8_070)
    assert data.train[0].reshape(28, 28)[3].tolist() == [1] * 28
    assert torch.equal(data.train[:, 783] == 1, data.labels["train"] == 7)
    assert not torch.equal(data.labels["train"][:50], torch.arange(50))  # the file is sorted
    held = np.random.RandomState(123).permutation(n)[-1_345:]
    assert data.labels["validation"].tolist() == (held % 50).tolist()
    arrays["data"][0, 0] = 2
    scipy.io.savemat(path, arrays)
    with pytest.raises(ValueError, match="data has values from 0 to 2, but values from 0 to 1 were expected"):
        load("omniglot")
    scipy.io.savemat(path, arrays | {"data": arrays["data"][:, 1:]})
    with pytest.raises(ValueError, match=r"data has the shape \(784, 24344\), but \(784, 24345\) was expected"):
        load("omniglot")


def test_caltech_silhouettes_are_read_from_the_published_format(folder):
    arrays = {}
    image = np.zeros((28, 28), np.uint8)
    image[3] = 1
    for part, n in {"train": 4_100, "val": 2_264, "test": 2_307}.items():
        arrays[f"{part}_data"] = np.tile(image.reshape(1, -1, order="F"), (n, 1))
        arrays[f"{part}_labels"] = (np.arange(n)[:, None] % 101 + 1).astype(np.uint8)
    (folder / "caltech101_silhouettes").mkdir()
    path = folder / "caltech101_silhouettes" / "caltech101_silhouettes_28_split1.mat"
    scipy.io.savemat(path, arrays | {"classnames": np.array(["ants", "ibis"], dtype=object)})
    data = load("caltech101_silhouettes")
    assert (len(data.train), len(data.validation), len(data.test)) == (4_100, 2_264, 2_307)
    assert data.test[0].reshape(28, 28)[3].tolist() == [1] * 28
    assert data.labels["test"][:102].tolist() == [*range(101), 0]
    with pytest.raises(ValueError, match="nothing to binarize"):
        load("caltech101_silhouettes", binarize="threshold")
    scipy.io.savemat(path, arrays | {"val_labels": arrays["val_labels"] + 1})
    with pytest.raises(ValueError, match="val_labels has values from 2 to 102"):
        load("caltech101_silhouettes")


@pytest.mark.parametrize(("name", "address"), [("omniglot", "yburda/iwae"), ("caltech101_silhouettes", "~marlin/data")])
def test_files_without_a_known_hash_are_never_downloaded(folder, monkeypatch, name, address):
    monkeypatch.setattr(files.pooch, "retrieve", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(
        FileNotFoundError, match=f"its SHA-256 is not known. Download it from .*{address}.*put it at .*{name}"
    ):
        load(name)


def test_cifar10_is_read_from_the_published_format(folder, monkeypatch):
    def batch(first):
        rows = np.zeros((10_000, 3073), np.uint8)
        rows[:, 0] = np.arange(10_000) % 10
        rows[:, 1] = first
        rows[:, 1 + 1024 : 1 + 2048] = 100  # all green
        return rows.tobytes()

    (folder / "cifar10").mkdir()
    path = folder / "cifar10" / "cifar-10-binary.tar.gz"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for i, name in enumerate(["batches.meta.txt", *names]):
            body = batch(i) if i else b"airplane"
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    with pytest.raises(ValueError, match="is not the expected file: its SHA-256 is not c4a38c50"):
        load("cifar10")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(published, "_CIFAR", replace(published._CIFAR, sha256=sha256))
    data = load("cifar10", dtype=torch.float16)
    assert (data.train.shape, data.validation.shape, data.test.shape) == ((45_000, 3072), (5_000, 3072), (10_000, 3072))
    assert (data.image_shape, data.channels) == ((32, 32), 3)
    assert data.labels["test"][:11].tolist() == [*range(10), 0]
    first = (data.train[::10_000, 0].double() * 255).round()
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert (data.validation[0, 0].double() * 255).round() == 5 and (data.test[0, 0].double() * 255).round() == 6
    image = data.test[0].unflatten(0, (3, 32, 32))
    assert (image[1] > 0).all() and (image[2] == 0).all()


def test_a_card_stands_for_every_set_and_says_what_load_gives():
    known = cards()
    assert set(known) == {*published.READERS, "linear_gaussian", "pinwheel", "bars", "linear_dynamics"}
    for name, card in known.items():
        assert card.name == name and card.licence and card.citation
        assert card.access in ("embedded", "synthetic", "downloaded", "put in place")
        assert (card.address == "") == (card.access == "synthetic")
        assert all(result.unit in ("nats", "bits/dim") and "https://" in result.source for result in card.results)
        assert json.loads(json.dumps(card.to_dict()))["splits"] == card.splits
        text, html = str(card), card._repr_html_()
        assert max(map(len, text.splitlines())) <= 120
        assert card.licence in text and html.count("<tr>") == html.count("</tr>") == len(card._rows())
    data, card = load("digits"), known["digits"]
    assert {split: len(getattr(data, split)) for split in card.splits} == card.splits
    assert (data.image_shape, data.value_range, data.levels) == (card.shape, card.value_range, card.levels)
    assert (data.licence, data.citation) == (card.licence, card.citation)
    assert len(data.labels["train"].unique()) == card.classes


@pytest.mark.data("oil_flow")
@pytest.mark.data("frey_faces")
@pytest.mark.parametrize("name", ["oil_flow", "frey_faces"])
def test_cards_say_what_the_files_hold(name):
    data, card = load(name), cards()[name]
    assert {split: len(getattr(data, split)) for split in card.splits} == card.splits
    assert data.train.shape[1] == math.prod(card.shape)
    assert data.image_shape == (card.shape if len(card.shape) > 1 else None)
    assert len(data.labels.get("train", torch.tensor([])).unique()) == card.classes


def test_a_cards_addresses_are_links():
    html = cards()["mnist"]._repr_html_()
    assert '<a href="https://arxiv.org/abs/1509.00519">https://arxiv.org/abs/1509.00519</a>)' in html
    assert "Bengio and Haffner" in html


def test_digits_are_split_and_binarized_on_request():
    data = load("digits", split=(0.5, 0.2, 0.3), binarize="threshold", dtype=torch.float64)
    assert (len(data.train), len(data.validation), len(data.test)) == (898, 360, 539)
    grey = load("digits", split=(0.5, 0.2, 0.3), dequantize=False, dtype=torch.float64)
    assert torch.equal(data.train, (grey.train > 0.5).double())
    assert (data.levels, data.dequantized, data.binarized) == (2, False, "threshold")


def test_a_misspelt_name_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"no data set 'digit'; did you mean 'digits'\?"):
        load("digit")


def test_absent_files_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    monkeypatch.setattr(files.pooch, "os_cache", lambda name: tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"Put it \(SHA-256 1322dda1.*oil_flow/oil_flow_3class.npz"):
        load("oil_flow")


def test_a_wrong_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    (tmp_path / "oil_flow").mkdir()
    (tmp_path / "oil_flow" / "oil_flow_3class.npz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not the expected file: its SHA-256 is not 1322dda1"):
        load("oil_flow")


@pytest.fixture
def mirror(tmp_path):
    """A folder served on the loopback interface."""
    root = tmp_path / "mirror"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_files_are_downloaded_from_the_first_mirror_that_has_them(tmp_path, monkeypatch, mirror):
    root, address = mirror
    (root / "good").mkdir()
    (root / "bad").mkdir()
    (root / "good" / "a.bin").write_bytes(b"the file")
    (root / "bad" / "a.bin").write_bytes(b"another file")
    monkeypatch.delenv("JENSEN_DATA", raising=False)
    monkeypatch.setattr(files.pooch, "os_cache", lambda name: tmp_path / "cache")
    sha256 = hashlib.sha256(b"the file").hexdigest()
    file = File("set", "a.bin", sha256, (address + "absent/", address + "bad/", address + "good/"))
    assert locate(file).read_bytes() == b"the file"
    assert locate(replace(file, mirrors=())).read_bytes() == b"the file"  # from the cache now
    (tmp_path / "cache" / "set" / "a.bin").write_bytes(b"torn")
    assert locate(file).read_bytes() == b"the file"  # downloaded again
    with pytest.raises(FileNotFoundError, match=r"Tried: .*absent"):
        locate(replace(file, name="b.bin"))


def test_idx_files_are_read_once_their_hash_is_right(folder):
    body = gzip.compress(struct.pack(">HBBII", 0, 8, 2, 2, 3) + bytes(range(6)))
    (folder / "set").mkdir()
    (folder / "set" / "x.gz").write_bytes(body)
    file = File("set", "x.gz", hashlib.sha256(body).hexdigest())
    np.testing.assert_array_equal(published._read_idx(file), np.arange(6).reshape(2, 3))
    (folder / "set" / "x.gz").write_bytes(body[:-6])
    with pytest.raises(ValueError, match=r"x\.gz is not the expected file: its SHA-256 is not .*; replace"):
        published._read_idx(file)


def test_addresses_are_https():
    readers = [value for value in vars(published).values() if isinstance(value, files.File)]
    readers += [file for value in (published._MNIST, published._FASHION) for file in value.values()]
    readers += published._AMAT
    assert all(mirror.startswith("https://") for file in readers for mirror in file.mirrors)
    for url in ("http://example.org/a", "ftp://example.org/a", "file:///etc/hostname"):
        with pytest.raises(ValueError, match="not an https address"):
            files._download(url, os.devnull, None)


def test_a_download_that_is_too_long_is_broken_off(tmp_path, mirror, monkeypatch):
    root, address = mirror
    (root / "long.bin").write_bytes(bytes(10**6))
    monkeypatch.setattr(files, "LARGEST", 10**5)
    with pytest.raises(ValueError, match="it has more than 100000 bytes"):
        files._download(f"{address}long.bin", tmp_path / "kept", None)
    assert (tmp_path / "kept").stat().st_size <= 10**5
    monkeypatch.setattr(files, "LARGEST", 10**6)
    files._download(f"{address}long.bin", tmp_path / "kept", None)
    assert (tmp_path / "kept").stat().st_size == 10**6


@pytest.mark.parametrize(
    "body",
    [
        b"\0\0\x08\x01\0\0\0\x05abc",
        b"\0\0\x08\x01\0\0\0\x02abc",
        b"\0\0\x0d\x01\0\0\0\x03abc",
        b"\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\x01abc",
        b"\0\0",
        b"",
    ],
)
def test_an_idx_file_of_another_length_or_type_is_refused(body, tmp_path, monkeypatch):
    monkeypatch.setenv("JENSEN_DATA", str(tmp_path.parent))
    (tmp_path / "a.gz").write_bytes(gzip.compress(body))
    with pytest.raises(ValueError, match=r"a\.gz is not a complete idx file"):
        published._read_idx(files.File(tmp_path.name, "a.gz", None))
