"""Containers of data in memory, and files with several arrays: supported ones, and errors for the others."""

import os
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from jensen.datasets import from_array, load
from jensen.datasets.arrays import Pieces
from jensen.datasets.preparation import Moments

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = np.arange(40) % 3
EXACT = {"dtype": torch.float64}


class Items(TorchDataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return self.item(i)


def _frame():
    return pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "kind": Y})


@pytest.mark.parametrize(
    "make",
    [
        lambda: (scipy.sparse.csr_matrix(X), Y),
        lambda: (scipy.sparse.coo_array(X), Y),
        lambda: (scipy.sparse.csc_matrix(X).T.tocsr().T, Y),
        lambda: (np.ma.array(X), np.ma.array(Y)),
        lambda: (pa.Table.from_pandas(_frame()), "kind"),
        lambda: (np.rec.fromarrays([*X.T, Y], names="a,b,c,kind"), "kind"),
        lambda: (Items(lambda i: {"data": torch.from_numpy(X[i]), "labels": Y[i]}), None),
        lambda: (Items(lambda i: {"data": X[i]}), Y),
        lambda: (Subset(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), range(40)), None),
        lambda: (AnnData(X), "kind"),
        lambda: (AnnData(scipy.sparse.csr_matrix(X)), Y),
    ],
)
def test_other_containers_give_the_same_data(make):
    data, expected = from_array(*make(), **EXACT), from_array(X, Y, **EXACT)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(data, split), getattr(expected, split))
        assert torch.equal(data.labels[split], expected.labels[split])


class AnnData:
    """The part of the interface that is used."""

    def __init__(self, x):
        self.X, self.obs, self.var_names = x, pd.DataFrame({"kind": Y}), pd.Index(["g1", "g2", "g3"])


def test_sparse_matrices_are_made_dense_a_piece_at_a_time_within_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr("jensen.datasets.arrays.BLOCK", 50)
    x = scipy.sparse.random_array((40, 5), density=0.3, rng=RNG)
    np.testing.assert_array_equal(np.sort(from_array(x, split=(40, 0, 0), **EXACT).train, 0), np.sort(x.toarray(), 0))
    with pytest.raises(ValueError, match="x would take 1600 bytes of memory, more than the limit of 1599"):
        from_array(x, limit=1599)
    scipy.sparse.save_npz(tmp_path / "own.npz", scipy.sparse.csr_matrix(x))
    assert torch.equal(load(tmp_path / "own.npz", **EXACT).train, from_array(x, **EXACT).train)
    with pytest.raises(ValueError, match="more than the limit of 1599"):
        load(tmp_path / "own.npz", limit=1599)


@pytest.mark.parametrize("indices", [[0, 7], [0, -1], [0, 2**30]])
def test_a_sparse_matrix_whose_indices_lie_is_refused(tmp_path, indices):
    whole = {"format": np.array("csr"), "shape": np.array([2, 3]), "data": np.ones(2), "indptr": np.array([0, 1, 2])}
    np.savez(tmp_path / "own.npz", **whole, indices=np.array(indices, dtype=np.int32))
    with pytest.raises(ValueError, match="is not a complete sparse matrix: save it again"):
        load(tmp_path / "own.npz")
    np.savez(tmp_path / "own.npz", **{**whole, "indptr": np.array([0, 9, 2])}, indices=np.array([0, 1], dtype=np.int32))
    with pytest.raises(ValueError, match="is not a complete sparse matrix: save it again"):
        load(tmp_path / "own.npz")


def test_masked_values_are_missing():
    for x in (X, (X * 100).astype(int), X.astype(np.float32)):
        masked = np.ma.array(x, mask=np.zeros(x.shape, bool))
        masked[::5, 1] = np.ma.masked
        with pytest.raises(
            ValueError, match=r"array has 8 missing values \(NaN\), at row 0, feature 1, row 5, feature 1"
        ):
            from_array(masked)
    for labels in (np.ma.masked_equal(Y, 1), np.ma.masked_equal(np.array(list("abc"))[Y], "b")):
        with pytest.raises(ValueError, match="labels of array have 13 missing values, the first in row 1"):
            from_array(X, labels)
    missing = pd.Series([None if i % 5 == 0 else "a" for i in range(40)], dtype="string")
    for labels in (missing, missing.astype(object)):
        with pytest.raises(ValueError, match="labels of array have 8 missing values, the first in row 0"):
            from_array(X, labels)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: from_array(DataLoader(TensorDataset(torch.zeros(30, 3)), 10)),
            TypeError,
            "pass its data set, x.dataset",
        ),
        (lambda: from_array(load("pinwheel")), TypeError, "already a Dataset with splits.*use x.train"),
        (lambda: from_array("own.csv"), TypeError, r"use load\(x\) for files"),
        (lambda: load(_frame()), TypeError, r"but got a DataFrame: use from_array\(x\) for data in memory"),
        (lambda: load(torch.zeros(3, 2)), TypeError, r"use from_array\(x\) for data in memory"),
        (lambda: from_array({"x": X}), ValueError, r"a dict with the entries x: pass one of them, x\[...\]"),
        (
            lambda: from_array(Items(lambda i: {"image": X[i], "y": 0})),
            ValueError,
            r"entries image, y, but .* numpy.stack\(\[item\['image'\] for item in x\]\)",
        ),
        (lambda: from_array(Items(lambda i: (X[i], 0, 1))), ValueError, "has 3 parts: pass an array of the data"),
        (
            lambda: from_array(type("S", (IterableDataset,), {"__len__": lambda s: 3, "__iter__": None})()),
            TypeError,
            "S has no length",
        ),
        (lambda: from_array(X.astype(object)), ValueError, r"not read as a numeric array: .*x.astype\(float\)"),
        (lambda: from_array(None), ValueError, "x is None, which NumPy does not read as a numeric array"),
        (lambda: from_array(X, np.eye(3)[Y]), ValueError, r"for one-hot labels use labels.argmax\(1\)"),
        (lambda: from_array(X.T, Y), ValueError, "data points must be rows: transpose the data"),
        (
            lambda: from_array(_frame().assign(t="q", u="r")),
            ValueError,
            r"columns 't' .*, 'u' .* are not numeric: .*x.drop\(columns=\['t', 'u'\]\).*labels='t'",
        ),
        (lambda: from_array(_frame(), "0"), ValueError, "the DataFrame has no column '0' for labels="),
    ],
)
def test_what_is_not_read_comes_with_what_is(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("labels", "codes", "classes"),
    [
        ([Decimal(2), Decimal(1)], [2, 1], ()),
        (np.array([True, False], dtype=object), [1, 0], ()),
        (np.array([3, 1], dtype=object), [3, 1], ()),
        (np.array([b"\xc3\xa9", b"\xe9"]), [0, 0], ("\xe9",)),
        (np.array(["b", "a"]), [1, 0], ("a", "b")),
    ],
)
def test_labels_are_numbers_or_words_whatever_holds_them(labels, codes, classes):
    data = from_array(X[:2], labels, split=(2, 0, 0))
    order = [X[:2, 0].tolist().index(value) for value in from_array(X[:2], split=(2, 0, 0), **EXACT).train[:, 0]]
    assert [codes[i] for i in order] == data.labels["train"].tolist() and data.classes == classes


@pytest.mark.parametrize("labels", [[Decimal("1.25")] * 40, np.array([1.25, 2] * 20, dtype=object)])
def test_objects_that_are_measurements_are_no_classes(labels):
    with pytest.raises(ValueError, match=r"classes \(integers or words\), but [24]0 are other numbers, such as 1.25"):
        from_array(X, labels)
    with pytest.raises(ValueError, match="labels of array must be classes, but they are dates or times"):
        from_array(X, pd.date_range("2020", periods=40))


def test_items_may_be_pictures():
    pixels = RNG.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    data = from_array(Items(lambda i: (Image.fromarray(pixels[i]), Y[i])), image_shape=(8, 8), levels=256)
    assert torch.equal(data.train, from_array(pixels, Y, image_shape=(8, 8), levels=256).train)


@pytest.mark.parametrize("kind", ["npz", "mat"])
def test_arrays_of_a_file_are_taken_by_name(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    arrays = {"imgs": X, "latents": X[:, :2], "y": Y[:, None]}
    if kind == "npz":
        np.savez(path, **arrays, notes=np.array({"title": "sprites"}, dtype=object))
    else:
        scipy.io.savemat(path, {**arrays, "notes": "sprites"})
    with pytest.raises(ValueError, match=r"contains imgs \(40, 3\), .*select one, .* member='imgs', .* --member imgs"):
        load(path)
    expected = from_array(X, Y, **EXACT)
    data = load(path, member="imgs", label="y", **EXACT)
    assert torch.equal(data.train, expected.train) and torch.equal(data.labels["train"], expected.labels["train"])
    assert torch.equal(load(path, member="imgs", drop=-1, **EXACT).train, expected.train[:, :2])
    with pytest.raises(ValueError, match="no array 'img' for member="):
        load(path, member="img")
    with pytest.raises(ValueError, match="no array 'z' for label="):
        load(path, member="imgs", label="z")
    with pytest.raises(ValueError, match="notes"):
        load(path, member="notes")


def test_structured_arrays_in_a_file_and_columns_of_structs(tmp_path):
    both = np.rec.fromarrays([*X.T], names="a,b,c")
    np.save(tmp_path / "own.npy", both)
    with pytest.raises(ValueError, match="own has a structured array with the fields a, b, c: load it"):
        load(tmp_path / "own.npy")
    assert torch.equal(from_array(np.load(tmp_path / "own.npy"), **EXACT).train, from_array(X, **EXACT).train)
    nested = [{f"field{i}": i for i in range(50)}] * 40
    pq.write_table(pa.table({"a": X[:, 0], "s": nested}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match=r"column 's' \(struct<field0: int64, .* is not numeric") as caught:
        load(tmp_path / "own.parquet")
    assert len(str(caught.value)) < 400
    assert load(tmp_path / "own.parquet", drop="s").train.shape == (32, 1)


def test_matlab_files_of_ones_own(tmp_path):
    path = tmp_path / "own.mat"
    scipy.io.savemat(path, {"features": X, "note": "text"})
    assert torch.equal(load(path, **EXACT).train, from_array(X, **EXACT).train)
    scipy.io.savemat(path, {"x": scipy.sparse.csc_matrix(X), "other": X})
    assert torch.equal(load(path, **EXACT).train, from_array(X, **EXACT).train)
    with pytest.raises(ValueError, match="more than the limit of 900"):
        load(path, limit=900)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a complete MATLAB file"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.xlsx", r"a spreadsheet, which is not supported: pass pandas.read_excel\('own.xlsx'\) to from_array"),
        ("own.h5", r"an HDF5 file, which is not supported: pass h5py.File\('own.h5'\)\['name'\]\[:\] to from_array"),
        ("own.h5ad", r"anndata.read_h5ad\('own.h5ad'\) to from_array"),
        ("own.pkl", "unpickling can run any code"),
        ("own.pt", "unpickling can run any code"),
        ("own.png", r"one image, which is not supported: stack all images into an array \[N, height, width\]"),
        ("own.zip", "an archive, which is not supported: unpack it"),
        ("own.tar.gz", "a compressed file that is not text: decompress it"),
        ("own.npy.gz", "a compressed file that is not text: decompress it"),
        ("own.what", "not text and of unknown format"),
        ("own", "not text and of unknown format"),
    ],
)
def test_files_of_other_kinds_come_with_what_to_do(tmp_path, name, message):
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / name))


def test_folders_addresses_and_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("images")
    for name in ("images", tmp_path):
        with pytest.raises(
            ValueError, match="is a folder, but one file was expected: join its contents into one array"
        ):
            load(name)
    with pytest.raises(ValueError, match=r"https://host/own\.csv is an address: download the file"):
        load("https://host/own.csv")
    for name in ("adult.data", "folder/own", "~/no such file"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(name)
    np.save("own.npy", X)
    os.rename("own.npy", "own.array")
    assert load("own.array").train.shape == (32, 3)
    with pytest.raises(ValueError, match=r"member names an array of an .npz or .mat file"):
        load("own.array", member="x")


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_may_come_last(channels, standardize):
    x = RNG.random((20, 6, 5, channels))
    first, last = (channels, 6, 5), (6, 5, channels)
    right = from_array(x.transpose(0, 3, 1, 2), image_shape=first, standardize=standardize)
    assert (right.channels, right.image_shape) == (channels, (6, 5))
    for data, shape in (
        (x, last),
        (x, first),
        (np.asfortranarray(x), last),
        (x.reshape(20, -1), last),
        (x.transpose(0, 3, 1, 2).reshape(20, -1), first),
    ):
        data = from_array(data, image_shape=shape, standardize=standardize)
        assert torch.equal(data.train, right.train) and torch.equal(data.test, right.test)
        assert (data.channels, data.image_shape) == (channels, (6, 5))
        if standardize:
            assert torch.equal(data.scale, right.scale) and torch.equal(data.location, right.location)
    with pytest.raises(ValueError, match=rf"image_shape=\(5, 6\): use image_shape=\(6, 5, {channels}\)"):
        from_array(x, image_shape=(5, 6))
    with pytest.raises(ValueError, match="there is one extra column; if it has the classes, name it"):
        from_array(np.zeros((20, 31)), image_shape=(6, 5))


def test_statistics_are_those_of_the_values_before_they_are_rounded():
    """Seconds since 1970: in float32 their steps are 128."""
    x = np.column_stack([1.6e9 + RNG.integers(0, 1000, 500), RNG.normal(size=500)])
    exact = from_array(x, standardize=True, **EXACT)
    data = from_array(x, standardize=True)
    torch.testing.assert_close(data.train, exact.train.float(), rtol=0, atol=0)
    torch.testing.assert_close(data.location, exact.location, rtol=0, atol=0)
    assert data.scale.dtype == torch.float64 and data.bits_offset == exact.bits_offset
    np.testing.assert_allclose(exact.scale, exact.train.mul(exact.scale).add(exact.location).std(0), rtol=1e-9)
    with pytest.raises(
        ValueError, match=r"float32 would round feature 0 of array to steps of 1.9e\+02: .*standardize=True"
    ):
        from_array(x)
    with pytest.raises(ValueError, match="would round column 'stamp' of array"):
        from_array(pd.DataFrame(x, columns=["stamp", "x"]))
    with pytest.raises(ValueError, match="would round feature 0 of array"):
        from_array(np.array([[i + 1e-45, i] for i in RNG.random(20)]) * [1e-45, 1])
    from_array(x, **EXACT)
    from_array(x.astype(np.float32))  # rounded by others
    whole = from_array((x[:, :1] + [0, 1]).astype(np.int64), standardize=True)
    torch.testing.assert_close(whole.train[:, 0], exact.train[:, 0].float())
    with pytest.raises(ValueError, match="numbers with finite squares"):
        from_array(X * 1e200, standardize=True, **EXACT)


def test_synthetic_data_are_standardized_before_they_are_stored():
    exact, data = load("pinwheel", standardize=True, dtype=torch.float64), load("pinwheel", standardize=True)
    assert torch.equal(data.train, exact.train.float()) and torch.equal(data.scale, exact.scale)


def test_constant_columns_are_named_together(tmp_path):
    np.savetxt(
        tmp_path / "own.csv", np.column_stack([X, np.ones((40, 2))]), delimiter=",", header="a,b,c,d,e", comments=""
    )
    with pytest.raises(ValueError, match=r"2 of own are constant .*, 'd', 'e': leave them out: drop=\['d', 'e'\]"):
        load(tmp_path / "own.csv", standardize=True)
    load(tmp_path / "own.csv", standardize=True, drop=["d", "e"])


def test_moments_of_pieces_are_those_of_the_whole():
    x = RNG.normal(size=(300, 4)) * [1, 1e-8, 1e8, 1] + [1e6, 1, -1e9, 0]
    moments = Moments((4,))
    for start, stop in ((0, 1), (1, 1), (1, 120), (120, 300)):
        for column in range(4):
            moments.add(x[start:stop, column : column + 1], slice(column, column + 1))
    np.testing.assert_allclose(moments.location, x.mean(0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(moments.scale, x.std(0, ddof=1), rtol=1e-9)


def test_columns_are_selected_in_pieces():
    x = np.arange(60.0).reshape(10, 6)
    for kept in ([0], [5], [1, 2, 4], [0, 1, 2, 3, 4, 5]):
        for pieces in (Pieces.of(x), Pieces.of(np.asfortranarray(x))):
            np.testing.assert_array_equal(pieces.select(kept).whole(), x[:, kept])
