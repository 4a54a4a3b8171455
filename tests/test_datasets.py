"""Data sets: what they hold, where their files are found, what is said when they are not."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from jensen.datasets import files, load, published
from jensen.datasets.files import File, locate
from jensen.datasets.streams import read_idx


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
    """The SHA-256 of the text that the loader would download, and its reading, from the archive's arrays."""
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
    with pytest.raises(ValueError, match=r"is not the file expected: its SHA-256 is not 1322dda1"):
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


def test_idx_files_are_checked_before_they_are_believed(tmp_path):
    def write(header, body):
        path = tmp_path / "x.gz"
        path.write_bytes(gzip.compress(header + body))
        return path

    good = struct.pack(">HBBII", 0, 8, 2, 2, 3)
    np.testing.assert_array_equal(read_idx(write(good, bytes(range(6)))), np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"cannot hold what its header claims: 12000000000 bytes"):
        read_idx(write(struct.pack(">HBBII", 0, 8, 2, 4_000_000_000, 3), bytes(6)))
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(write(struct.pack(">HBBII", 0, 13, 2, 2, 3), bytes(6)))
