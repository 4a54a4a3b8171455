"""Your own data: reading, requested transformations, errors; files with wrong headers."""

import io
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from jensen.datasets import delimited, from_array, load, own
from jensen.datasets.arrays import read_mat, read_npy, read_npz
from jensen.datasets.delimited import read_csv

X = np.random.default_rng(0).normal(size=(50, 3))
Y = np.arange(50) % 4


def _rows(data):
    return torch.cat([data.train, data.validation, data.test])


def _sorted(x):
    return sorted(map(tuple, np.asarray(x).tolist()))


def _frame():
    return pd.DataFrame(X, columns=["a", "b", "c"]).assign(kind=Y)


def _write(folder, kind):
    path = folder / f"own.{kind}"
    if kind == "npy":
        np.save(path, np.column_stack([X, Y]))
        return path, 3
    if kind == "npz":
        np.savez(path, x=X, kind=Y)
    elif kind == "csv":
        _frame().to_csv(path, index=False)
    else:
        _frame().to_parquet(path, index=False)
    return path, "kind"


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_data(tmp_path, kind):
    path, label = _write(tmp_path, kind)
    data = load(path, label=label, dtype=torch.float64)
    expected = from_array(X, Y, dtype=torch.float64)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(data, split), getattr(expected, split))
        assert torch.equal(data.labels[split], expected.labels[split])
    assert data.name == "own"
    assert torch.equal(load(str(path), label=label, dtype=torch.float64).test, data.test)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X, Y),
        lambda: (torch.from_numpy(X), torch.from_numpy(Y)),
        lambda: (X.tolist(), Y.tolist()),
        lambda: (np.asfortranarray(X).astype(">f8"), Y.astype(">i4")),
        lambda: (_frame(), "kind"),
        lambda: (_frame().drop(columns="kind"), Y),
        lambda: (_frame().convert_dtypes(), "kind"),
        lambda: (TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), None),
        lambda: (TensorDataset(torch.from_numpy(X)), Y),
    ],
)
def test_every_kind_of_array_gives_the_same_data(make):
    data = from_array(*make(), dtype=torch.float64)
    by_row = {tuple(row): label for row, label in zip(X.tolist(), Y.tolist(), strict=True)}
    assert _sorted(_rows(data)) == _sorted(X)
    for split in ("train", "validation", "test"):
        assert [by_row[tuple(row)] for row in getattr(data, split).tolist()] == data.labels[split].tolist()


def test_splits_are_seeded_and_share_no_datum():
    x = np.arange(100.0)[:, None]
    data = from_array(x, split=(0.7, 0.2, 0.1))
    assert (len(data.train), len(data.validation), len(data.test)) == (70, 20, 10)
    assert _rows(data).flatten().sort().values.tolist() == list(range(100))
    assert torch.equal(from_array(x, split=(70, 20, 10)).train, data.train)
    assert not torch.equal(from_array(x, split=(0.7, 0.2, 0.1), seed=1).train, data.train)
    assert len(from_array(x, split=(0.5, 0, 0.5)).validation) == 0
    assert [len(from_array(x[:7], split=(1 / 3, 1 / 3, 1 / 3)).train)] == [2]
    for split in [(0.5, 0.1, 0.1), (80, 10, 9), (-0.1, 0.1, 1.0)]:
        with pytest.raises(
            ValueError, match="split must be three shares that sum to 1, or three numbers that sum to 100"
        ):
            from_array(x, split=split)
    with pytest.raises(ValueError, match="split must be a tuple of 3, but got a tuple of 2"):
        from_array(x, split=(0.5, 0.5))
    with pytest.raises(ValueError, match="leaves no training data"):
        from_array(x, split=(0, 0.5, 0.5))


def test_nothing_is_done_to_values_unasked():
    x = np.random.default_rng(0).integers(0, 256, (30, 4), dtype=np.uint8)
    data = from_array(x)
    assert _sorted(_rows(data)) == _sorted(x)
    assert (data.levels, data.value_range, data.dequantized, data.binarized, data.scale) == (
        None,
        None,
        False,
        None,
        None,
    )
    assert data.labels == {} and data.bits_offset == 0


def test_levels_scale_dequantize_and_binarize_grey_values():
    x = np.random.default_rng(0).integers(0, 256, (200, 40), dtype=np.uint8)
    grey = from_array(x, levels=256, dtype=torch.float64)
    assert _sorted((_rows(grey) * 255).round()) == _sorted(x)
    noisy = from_array(x, levels=256, dequantize=True)
    torch.testing.assert_close((noisy.train * 256).floor().double(), grey.train * 255)
    assert abs((noisy.train * 256).frac().mean() - 0.5) < 4 * (1 / 12 / noisy.train.numel()) ** 0.5
    assert noisy.dequantized and noisy.bits_offset == 8
    black = from_array(x, levels=256, binarize="threshold")
    assert torch.equal(black.train, (grey.train > 0.5).float())
    drawn = from_array(x, levels=256, binarize="sample")
    assert drawn.train.unique().tolist() == [0, 1] and drawn.levels == 2 and drawn.bits_offset == 0
    z = (drawn.train - grey.train).sum() / (grey.train * (1 - grey.train)).sum().sqrt()
    assert abs(z) < 4
    low, high = grey.train < 0.2, grey.train > 0.8
    assert drawn.train[low].mean() < 0.15 and drawn.train[high].mean() > 0.85
    assert torch.equal(from_array(x, levels=256, binarize="sample").train, drawn.train)
    assert not torch.equal(from_array(x, levels=256, binarize="sample", seed=1).train, drawn.train)
    assert "binarized by sample" in repr(drawn) and "dequantized" in repr(noisy)


def test_standardization_is_that_of_the_training_data():
    data = from_array(X * [1, 10, 100] + 5, standardize=True, dtype=torch.float64)
    plain = from_array(X * [1, 10, 100] + 5, dtype=torch.float64)
    torch.testing.assert_close(data.location, plain.train.mean(0))
    torch.testing.assert_close(data.test * data.scale + data.location, plain.test)
    torch.testing.assert_close(data.train.std(0), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 of array are constant in the training data, the first is feature 1"):
        from_array(np.column_stack([X[:, 0], np.ones(50)]), standardize=True)


def test_images_and_sequences_keep_or_lose_their_shape_as_told():
    x = np.random.default_rng(0).random((20, 3, 4, 5))
    assert from_array(x).train.shape == (16, 3, 4, 5)
    data = from_array(x, image_shape=(3, 4, 5))
    assert (data.train.shape, data.channels, data.image_shape) == ((16, 60), 3, (4, 5))
    flat = from_array(x[:, 0].reshape(20, 20), image_shape=(4, 5))
    assert (flat.train.shape, flat.channels, flat.image_shape) == ((16, 20), 1, (4, 5))
    assert torch.equal(from_array(x[:, :1], image_shape=(4, 5)).train, flat.train)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\), which do not match image_shape=\(5, 4\)"):
        from_array(x, image_shape=(5, 4))


def test_words_become_classes():
    words = np.array(["dog", "cat", "dog", "eel"] * 5)
    data = from_array(np.arange(20.0)[:, None], words)
    assert data.classes == ("cat", "dog", "eel")
    for row, code in zip(data.train.flatten().long(), data.labels["train"], strict=True):
        assert data.classes[code] == words[row]
    frame = pd.DataFrame({"x": np.arange(20.0), "kind": pd.Categorical(words)})
    assert from_array(frame, "kind").classes == data.classes


def test_torch_datasets_are_measured_before_they_are_collected():
    class Pictures(TorchDataset):
        asked = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            Pictures.asked += 1
            return torch.full((1, 4, 4), float(i)), i % 10

    with pytest.raises(
        ValueError, match="Pictures would take 64000 bytes of memory, more than the limit of 63999: pass limit="
    ):
        from_array(Pictures(), limit=63_999)
    assert Pictures.asked == 1
    data = from_array(Pictures(), image_shape=(4, 4), limit=64_000)
    assert torch.equal(data.train[:, 0].long() % 10, data.labels["train"])

    class Ragged(Pictures):
        def __getitem__(self, i):
            return torch.zeros(2 if i == 7 else 3)

    with pytest.raises(ValueError, match=r"item 7 of Ragged is float32 \(2,\), but the first is float32 \(3,\)"):
        from_array(Ragged())

    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3)

    with pytest.raises(TypeError, match="Stream has no length"):
        from_array(Stream())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: from_array(np.where(X > 2, np.nan, X)),
            r"array has \d missing values \(NaN\), at row \d+, feature \d",
        ),
        (lambda: from_array(np.where(X > 2, np.inf, X)), r"array has \d infinite values, at row"),
        (
            lambda: from_array(_frame().where(_frame() < 1, np.nan)[["a"]]),
            r"array has \d+ missing values \(NaN\), at row \d+, column 'a'",
        ),
        (lambda: from_array(np.arange(5)), r"shape \(5,\), but \[N, X\] was expected: x\[:, None\]"),
        (lambda: from_array(np.empty((0, 3))), "no data"),
        (lambda: from_array(np.array([["a", "b"]])), "has dtype <U1, but numbers were expected"),
        (lambda: from_array(X + 1e300), "which torch.float32 cannot represent: use dtype=torch.float64"),
        (lambda: from_array(X, Y[:-1]), r"labels of array have the shape \(49,\), but there are 50 data"),
        (lambda: from_array(X, X[:, 0]), "labels of array must be classes"),
        (lambda: from_array(X, "kind"), "x is not a DataFrame"),
        (lambda: from_array(_frame(), "sort"), "no column 'sort' for labels=; it has a, b, c, kind"),
        (lambda: from_array(_frame().assign(kind="a")), "column 'kind' .* is not numeric"),
        (lambda: from_array(X, dequantize=True), "the number of levels of array: pass levels, for bytes levels=256"),
        (lambda: from_array(X, levels=256), "but levels=256 requires integers from 0 to 255"),
        (lambda: from_array(X, binarize="threshold"), "binarize needs values between 0 and 1"),
        (lambda: from_array(X, binarize="yes"), "binarize must be None, 'threshold' or 'sample', but got 'yes'"),
        (lambda: from_array(Y[:, None], levels=4, binarize="sample", dequantize=True), "exclude each other"),
        (lambda: from_array(Y[:, None] % 2, levels=2, dequantize=True), "nothing to dequantize"),
        (lambda: load("digits", label="y"), "label apply only to your own files, but digits is the name of a data set"),
        (lambda: load("bars", split=(1, 1, 1)), "split must be three shares"),
        (lambda: load("oil_flow", split=(0.8, 0.1, 0.1)), "oil_flow has a published split"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n3,\n,4\n", {}, r"own has 2 missing values \(NaN\), at row 1, column 'b', row 2, column 'a'"),
        ("a,b\n1,NA\n", {}, "1 missing values"),
        ("a,b\n1,x\n", {}, "column 'b' is not numeric: line 2 has 'x'"),
        ("a,b,c\n1,x,y\n2,3,z\n", {}, r"column 'b' is not numeric: line 2 has 'x' \(nor are 'c'\)"),
        (
            'a,b\n1,"2,5"\n',
            {},
            "'2,5'.*; a decimal comma is supported only with semicolons or tabs as delimiters: write a point",
        ),
        ("a;b\n1,5;2.5\n", {}, "'1,5'.*other numbers use another decimal sign: use only one of the two"),
        ("a;b\n1,5;1.234,5\n", {}, "column 'b' is not numeric: line 2 has '1.234,5'"),
        ("a;b\n1,234;5\n1;67,890\n", {}, "line 2 has '1,234', and every comma here may be a decimal sign or"),
        ("a,b\n1,True\n2,False\n", {}, "column 'b' is not numeric: line 2 has 'True'"),
        ("a,b\n1,True\n2,\n", {}, "column 'b' is not numeric: line 2 has 'True'"),
        ("a,b\n1,2020-01-01\n", {}, "column 'b' is not numeric: line 2 has '2020-01-01'"),
        ("a,b\n1,2020_03\n", {}, "column 'b' is not numeric: line 2 has '2020_03'"),
        ("a,b\n1,0x10\n", {}, "column 'b' is not numeric: line 2 has '0x10'"),
        ("a,b\n1,\u0661\n", {}, "column 'b' is not numeric: line 2 has '\u0661'"),
        ("a,b\n\n1,2\n\n3,x\n", {}, "column 'b' is not numeric: line 5 has 'x'"),
        ("a,b\n0,1,\n1,2,\n", {}, "line 2 has 3 fields, but the first has 2"),
        ("a,b\n0,1,NA\n", {}, "line 2 has 3 fields, but the first has 2"),
        ("a,b\n1,2\n3,4,\n", {}, "line 3 has 3 fields, but the first has 2"),
        ("a b\n1 2\n3\n", {}, "line 3 has 1 fields, but the first has 2"),
        ('"a","b"\n"1",2,3\n', {}, "column 0 has no name: if it is an index"),
        ('a,b\n1,"2\n3,4\n', {}, "line 3 has 2 fields|not a text table of numbers"),
        ("a,b\n1e400,1\n", {}, r"own has 1 infinite values, at row 0, column 'a'"),
        ("a,b\n1,\0\n", {}, "not a text table of numbers: it contains zero bytes"),
        ("a,b\n1,2\n3,-\n", {"label": "b"}, "labels of own have 1 missing values, the first in row 1"),
        ("a,b\n1,2\n3\n", {}, "line 3 has 1 fields, but the first has 2"),
        ("1,2,red\n3,4,blue\n", {}, "pass header=True or header=False"),
        (",a\n0,1\n", {"header": True}, "column 0 has no name: if it is an index"),
        ("a,a\n0,1\n", {}, "several columns with the same name"),
        ("a,b\n", {}, "has no data"),
        ("", {}, "has no data"),
        ("a,b\n1,2\n", {"label": "c"}, "no column 'c' for label=; it has a, b"),
        ("a,b\n1,2\n,3\n", {"label": "a"}, "labels of own have 1 missing values, the first in row 1"),
        ("a,b\n1,2\n3,4\n", {"limit": 31}, "32 bytes of memory, more than the limit of 31: pass limit=32"),
        ("a\n" + "9" * 200_000 + "\n", {}, "not a text table of numbers: field larger"),
    ],
)
def test_csv_errors_say_where(tmp_path, text, options, message):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "own.csv", split=(1, 0, 0), **options)


def test_csv_with_and_without_a_header(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("1,2,red\n\n3,4,blue\n5,6,red\n")
    data = load(path, header=False, label=-1, split=(1.0, 0, 0))
    assert _sorted(data.train) == [(1, 2), (3, 4), (5, 6)]
    assert data.classes == ("blue", "red")
    assert data.labels["train"][data.train[:, 0] == 3].tolist() == [0]
    path.write_text("\ufeff2001,2002,kind\n1,2,0\n3,4,7\n", encoding="utf-8")
    data = load(path, label="kind", split=(1.0, 0, 0))  # numbers as names: identified by the label's name
    assert _sorted(data.train) == [(1, 2), (3, 4)]
    assert sorted(data.labels["train"].tolist()) == [0, 7]


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ("a,b\n1,2\n3,4.5\n", "ab", [[1, 2], [3, 4.5]]),
        ("a;b\n1;2\n3;4.5\n", "ab", [[1, 2], [3, 4.5]]),
        ("a;b\n1,5;-0,25\n3;1e-3\n", "ab", [[1.5, -0.25], [3, 1e-3]]),
        ("a;b\n1,234;5,5\n", "ab", [[1.234, 5.5]]),
        ("a\tb\n1\t2\n3\t4.5\n", "ab", [[1, 2], [3, 4.5]]),
        ("a\tb\n1,5\t2\n3\t4\n", "ab", [[1.5, 2], [3, 4]]),
        ("a b\n 1   2\n3 \t 4.5  \n\n", "ab", [[1, 2], [3, 4.5]]),
        ("1 2\n3 4.5\n", "01", [[1, 2], [3, 4.5]]),
        ("a|b\n1|2\n3,5|4\n", "ab", [[1, 2], [3.5, 4]]),
        ("1,5;2\n3,5;4\n", "01", [[1.5, 2], [3.5, 4]]),
        ("body mass\n1\n2.5\n", ["body mass"], [[1], [2.5]]),
        ("-3,\t3,1\n1,\t2,3\n", "012", [[-3, 3, 1], [1, 2, 3]]),
        ("1,nan\n-nan,2\n", "01", [[1, np.nan], [np.nan, 2]]),
        ('"a, in m","b; in s"\n"1","2"\n"3","4.5"\n', ["a, in m", "b; in s"], [[1, 2], [3, 4.5]]),
        ("a, b\n1, 2 \n 3 ,\t4.5\n", "ab", [[1, 2], [3, 4.5]]),
        ("\n\na,b\n\n1,2\n   \n\n3,4.5", "ab", [[1, 2], [3, 4.5]]),
        ("a,b\r\n1,2\r\n3,4.5\r\n", "ab", [[1, 2], [3, 4.5]]),
        ("a,b\r1,2\r3,4.5\r", "ab", [[1, 2], [3, 4.5]]),
        ('"a\nx",b\n1,2\n', ["a\nx", "b"], [[1, 2]]),
        ("a,b\n.5,5.\n+1,1E2\n", "ab", [[0.5, 5], [1, 100]]),
        ("a,b\n007,0.10\n", "ab", [[7, 0.1]]),
        ("a,b\n18446744073709551616,-1\n-1,18446744073709551615\n", "ab", [[2**64, -1], [-1, 2**64 - 1]]),
        (
            "a,b\n0.1,5e-324\n0.30000000000000004,1.7976931348623157e308\n",
            "ab",
            [[0.1, 5e-324], [0.30000000000000004, 1.7976931348623157e308]],
        ),
    ],
)
def test_csv_dialects_give_exact_numbers(tmp_path, text, columns, rows):
    path = tmp_path / "own.csv"
    path.write_bytes(text.encode())
    table = read_csv(path)
    assert table.columns == tuple(columns) and table.x.dtype == np.float64
    np.testing.assert_array_equal(table.x.whole(), np.array(rows, dtype=np.float64))


def test_tables_may_be_wide(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 10_000))
    for delimiter in ",;\t ":
        np.savetxt(tmp_path / "own.csv", x, delimiter=delimiter)
        np.testing.assert_array_equal(read_csv(tmp_path / "own.csv").x.whole(), x)


def test_random_numbers_come_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "_CHUNK", 1000)  # several pieces
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 4)) * 10.0 ** rng.integers(-300, 300, (1000, 4))
    for sep, decimal in (",.", ";,", "\t,", " ."):
        lines = [sep.join(repr(v).replace(".", decimal) for v in row) for row in x.tolist()]
        (tmp_path / "own.csv").write_text("\n".join([sep.join("abcd"), *lines]))
        np.testing.assert_array_equal(read_csv(tmp_path / "own.csv").x.whole(), x)


@pytest.mark.parametrize(
    "mark", ["", "NA", "NaN", "nan", "?", "-", "N/A", "#N/A", "null", "NULL", "None", " ", "nA", "NA "]
)
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_missing_values_are_nan_where_they_are(tmp_path, mark, sep):
    path = tmp_path / "own.csv"
    path.write_text(f"a{sep}b\n1{sep}2\n{mark}{sep}4\n5{sep}{mark}\n")
    np.testing.assert_array_equal(read_csv(path).x.whole(), [[1, 2], [np.nan, 4], [5, np.nan]])
    with pytest.raises(ValueError, match=r"own has 2 missing values \(NaN\), at row 1, column 'a', row 2, column 'b'"):
        load(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_csv_encodings(tmp_path, encoding):
    path = tmp_path / "own.csv"
    path.write_bytes("l\u00e4nge;art\n1,5;s\u00fc\u00df\n2;herb\n".encode(encoding))
    table = read_csv(path, label="art")
    assert table.columns == ("l\u00e4nge",) and table.x.whole().tolist() == [[1.5], [2]]
    assert table.labels.tolist() == ["s\u00fc\u00df", "herb"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["3", "-1"], [3, -1]),
        (["007", "7"], ["007", "7"]),  # words: as numbers they would be one class
        (["+", "-"], ["+", "-"]),
        (["True", "False"], ["True", "False"]),
        (["1.0", "2.0"], [1, 2]),
        (["0.5", ".25"], [0.5, 0.25]),
        (['"a, b"', "c"], ["a, b", "c"]),
    ],
)
def test_labels_of_a_csv_file_stay_as_they_are_written(tmp_path, labels, expected):
    (tmp_path / "own.csv").write_text("x,kind\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    assert read_csv(tmp_path / "own.csv", label="kind").labels.tolist() == expected


def test_parquet_is_measured_by_its_own_word_first(tmp_path):
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({"a": pa.array(np.zeros(3_000_000))}), path)
    assert path.stat().st_size < 100_000  # repetition compresses well
    with pytest.raises(ValueError, match="more than the limit of 20000000: pass limit="):
        load(path, limit=20_000_000)
    pq.write_table(pa.table({"a": [1.0, None], "b": pa.array(["x", "y"]).dictionary_encode()}), path)
    with pytest.raises(ValueError, match=r"own has 1 missing values \(NaN\), at row 1, column 'a'"):
        load(path, label="b")
    with pytest.raises(ValueError, match=r"column 'b' .* is not numeric"):
        load(path)
    _frame().sample(frac=1, random_state=0).to_parquet(path)
    with pytest.raises(ValueError, match="has the index of a DataFrame as a column: write it with index=False"):
        load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete Parquet file"):
        load(path)


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    _frame().to_parquet(tmp_path / "own.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load(tmp_path / "own.parquet", label="kind")


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the file .*own\.csv does not exist"):
        load(tmp_path / "own.csv")
    np.savez(tmp_path / "two.npz", a=X, b=X)
    with pytest.raises(
        ValueError, match=r"contains a \(50, 3\), b \(50, 3\): it must have one array of data or one called x"
    ):
        load(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="no array 'y' for label="):
        load(tmp_path / "two.npz", label="y")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ValueError, match=r"header applies to text files such as \.csv"):
        load(tmp_path / "one.npy", header=True)
    with pytest.raises(
        ValueError,
        match=r"has no column 'a' for label=; it has 0, 1, 2 \(or give a position, 0 to 2, or -1 for the last\)",
    ):
        load(tmp_path / "one.npy", label="a")


class _Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@contextmanager
def refused(message):
    """A ValueError before more than 8 MiB are allocated, for any size in the file's header."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            yield
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def _header(shape, descr="<f8"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def test_npy_and_npz_that_lie_are_refused(tmp_path):
    path, trace = tmp_path / "own.npy", tmp_path / "written"
    np.save(path, np.array([_Bomb(trace)], dtype=object), allow_pickle=True)
    with refused("pickled objects are never loaded"):
        read_npy(path)
    path.write_bytes(_header((2**40, 3)) + bytes(48))
    with refused("not a complete .npy file of numbers .*its header claims 26388279066624 bytes"):
        read_npy(path)
    path.write_bytes(_header((1, 3)) + bytes(48))
    with refused(r"its header claims 24 bytes, \(1, 3\) of float64, but it has 48"):
        read_npy(path)
    for content in (_header((-1, 3)) + bytes(48), b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**16) + b"{", b"else", b""):
        path.write_bytes(content)
        with refused(r"not a complete \.npy file"):
            read_npy(path)
    np.save(path, X)
    with refused(r"would take 1200 bytes of memory, more than the limit of 1199: pass limit=1200"):
        read_npy(path, limit=1199)
    np.testing.assert_array_equal(read_npy(path).whole(), X)
    path.write_bytes(path.read_bytes()[:-1])
    with refused(r"not a complete \.npy file"):
        read_npy(path)
    np.savez(tmp_path / "objects.npz", x=np.array([_Bomb(trace)], dtype=object))
    with refused("x is not a complete numeric array .pickled objects are never loaded"):
        read_npz(tmp_path / "objects.npz")
    np.savez(tmp_path / "objects.npz", x=X, notes=np.array([_Bomb(trace)], dtype=object))
    np.testing.assert_array_equal(read_npz(tmp_path / "objects.npz")[0].whole(), X)
    np.savez(tmp_path / "objects.npz", a=X, notes=np.array([_Bomb(trace)], dtype=object))
    np.testing.assert_array_equal(read_npz(tmp_path / "objects.npz")[0].whole(), X)
    with refused(r"notes is not a complete numeric array"):
        read_npz(tmp_path / "objects.npz", member="notes")
    assert not trace.exists()


def test_archives_that_inflate_are_refused(tmp_path):
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        member.write(_header((64, 2**17)))
        for _ in range(64):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**17
    with refused("more than the limit of 1048576"):
        read_npz(path, limit=2**20)
    packed = bytearray(path.read_bytes())  # the directory now claims far more than 64 MiB
    at = packed.index(b"PK\x01\x02") + 24
    packed[at : at + 4] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(packed)
    with refused("would take 4294967294 bytes of memory, more than the limit of 4000000000"):
        read_npz(path, limit=4_000_000_000)


def _zip(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)


def test_archives_that_are_torn_or_lie_are_refused(tmp_path):
    path = tmp_path / "own.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, x=X)
        whole = path.read_bytes()
        for end in (0, 4, 100, len(whole) - 1):
            path.write_bytes(whole[:end])
            with refused(r"not a complete \.npz file"):
                read_npz(path)
        for at in range(60, 1000, 50):  # within the compressed or stored values
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
            with refused(r"not a complete (\.npz file|numeric array)"):
                read_npz(path)[0].whole()
    _zip(path, _header((2**50, 3)) + bytes(48))
    with pytest.raises(ValueError, match=r"x is not a complete numeric array.*header claims 27021597764222976 bytes"):
        read_npz(path)
    _zip(path, _header((1, 3)) + bytes(48))
    with refused(r"its header claims 24 bytes, \(1, 3\) of float64, but it has 48"):
        read_npz(path)
    _zip(path, _header((2, 3)) + bytes(47))
    with refused("x is not a complete numeric array"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "words")
    with refused(r"contains 'readme\.txt', which is not an array"):
        read_npz(path)


@pytest.mark.parametrize(("level", "packed"), [("5", True), ("5", False), ("4", False)])
def test_matlab_files_give_the_arrays_asked_for(tmp_path, level, packed):
    rng = np.random.default_rng(0)
    arrays = {"data": rng.random((7, 30)), "n": rng.integers(0, 255, (3, 2)).astype(np.uint8), "w": np.eye(40)}
    others = {"text": "words", "z": np.eye(2) * 1j}
    if level == "5":
        others |= {"cells": np.array(["a", "bc"], dtype=object), "s": {"field": 1.0}}
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, others | arrays, format=level, do_compression=packed)
    found = read_mat(path, {name: array.shape for name, array in arrays.items()})
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype.isnative
        np.testing.assert_array_equal(found[name], array)
    with refused(r"data has the shape \(7, 30\), but \(7, 31\) was expected"):
        read_mat(path, {"data": (7, 31)})
    with refused(r"has no numeric array called text \(char\), other: it is not the expected file"):
        read_mat(path, {"text": (1, 5), "other": (1, 1)})
    with refused("z contains complex128, but real numbers were expected"):
        read_mat(path, {"z": (2, 2)})
    if level == "5":
        with refused(r"has no numeric array called cells \(cell\), s \(struct\)"):
            read_mat(path, {"cells": (1, 2), "s": (1, 1)})
    whole = path.read_bytes()
    for end in (0, 3, 100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:end])
        with refused("not a complete MATLAB file of level 4 or 5: download it again|has no numeric array called"):
            read_mat(path, {"w": (40, 40), "data": (7, 30)})
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    with refused("not a complete MATLAB file of level 4 or 5: download it again, or save it with -v7 in MATLAB"):
        read_mat(path, {"data": (2, 2)})


def test_no_reader_unpickles():
    """No reader calls a loader that can run code, or NumPy's loader without allow_pickle=False."""
    for path in Path(own.__file__).parent.glob("*.py"):
        source = path.read_text()
        for door in ("torch.load", "pickle.", "read_pickle", "allow_pickle=True", "extractall"):
            assert door not in source, f"{path.name} calls {door}"
        for call in re.findall(r"\b(?:np\.load|npy\.read_array)\(.*", source):
            assert "allow_pickle=False" in call, f"{path.name}: {call}"


def test_an_archive_of_another_compression_is_refused_before_it_expands(tmp_path):
    path = tmp_path / "own.npz"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", _header((2**20, 4)) + bytes(2**25))
        with refused(rf"x\.npy has compression method {method}"):
            read_npz(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("x.npy", _header((2, 3)) + bytes(48))
    with refused(r"several members called x\.npy"):
        read_npz(path)


def test_names_of_arrays_are_described_without_reading_them(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, a=np.zeros((2**21, 4)), b=np.zeros(3))
    with refused(r"contains a \(2097152, 4\), b \(3,\): it must have one array of data"):
        read_npz(path)


@pytest.mark.parametrize("at", [-5, -1000, -200_000])
def test_every_checksum_of_a_compressed_matlab_file_is_reached(tmp_path, at):
    """Also after the requested arrays."""
    path = tmp_path / "x.mat"
    arrays = {"data": np.eye(20, 30), "more": np.random.default_rng(0).random((300, 400))}
    scipy.io.savemat(path, arrays, do_compression=True)
    body = bytearray(path.read_bytes())
    body[at] ^= 4
    path.write_bytes(body)
    with pytest.raises(ValueError, match=r"x\.mat is not a complete MATLAB file"):
        read_mat(path, {"data": (20, 30)})


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([0.5, 1.0], torch.int64, "fractions, which torch.int64 cannot represent"),
        ([0.0, 300.0], torch.uint8, "values from 0 to 300, which torch.uint8 cannot represent"),
        ([-1.0, 3.0], torch.uint8, "values from -1 to 3"),
        ([0, 2], torch.bool, "values from 0 to 2, which torch.bool"),
        ([0.0, 2.0**63], torch.int64, "which torch.int64 cannot represent"),
        ([0.0, 1.0], torch.complex64, "data are real"),
    ],
)
def test_a_dtype_that_would_change_values_is_refused(values, dtype, message):
    with pytest.raises(ValueError, match=message):
        from_array(np.array([values] * 20), dtype=dtype)


def test_bfloat16_tensors_are_read_as_they_are():
    x = torch.randn(20, 3).bfloat16()
    data = from_array(x, torch.arange(20).bfloat16(), split=(20, 0, 0))
    assert torch.equal(data.train, x[data.labels["train"]].float())


def test_whole_numbers_keep_their_values_in_a_dtype_that_holds_them():
    assert from_array(np.array([[0.0, 255.0]] * 20), dtype=torch.uint8).train[0].tolist() == [0, 255]


@pytest.mark.parametrize("labels", [np.array([2**63 + 1, 1] * 10, np.uint64), np.array([1e30, 1.0] * 10)])
def test_labels_that_int64_does_not_hold_are_refused(labels):
    with pytest.raises(ValueError, match="above int64: renumber the classes"):
        from_array(np.zeros((20, 2)) + np.arange(20)[:, None], labels)


def test_labels_of_a_parquet_file_take_the_memory_of_their_different_words(tmp_path):
    path, n = tmp_path / "own.parquet", 50_000
    table = pa.table({"a": np.arange(n) % 7 / 2, "kind": ["long" * 10_000, "short"] * (n // 2)})
    pq.write_table(table, path)
    del table
    tracemalloc.start()
    try:
        data = load(str(path), label="kind")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # 1 GB as text, 8 GB as an array of it
    finally:
        tracemalloc.stop()
    assert data.classes == ("long" * 10_000, "short")
    assert sum(len(part) for part in data.labels.values()) == n


def test_an_array_is_copied_once(tmp_path):
    np.save(tmp_path / "own.npy", np.random.default_rng(0).normal(size=(2**18, 32)).astype(np.float32))  # 32 MiB
    tracemalloc.start()
    try:
        data = load(str(tmp_path / "own.npy"))
        torch_bytes = sum(part.nbytes for part in (data.train, data.validation, data.test))
        assert torch_bytes == 2**25
        assert tracemalloc.get_traced_memory()[1] < 0.5 * torch_bytes  # memory of NumPy only; torch holds the result
    finally:
        tracemalloc.stop()
