"""Users' tables: with or without header, labels and columns by name or position, columns that are not features."""

import bz2
import gzip
import lzma
import re
import shlex

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jensen.datasets import from_array, load
from jensen.datasets.counters import Counters
from jensen.datasets.delimited import read_csv
from jensen.datasets.stand_ins import StandIns

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4)).round(3)
ROWS = "\n".join(",".join(map(str, row)) for row in X.tolist()) + "\n"
IRIS = "\n".join(f"{5 + i % 7 / 10},{3 + i % 5 / 10},{1 + i % 3},kind{i % 3}" for i in range(30)) + "\n"
QUESTION = r"the first line may be names or data: .*header=True or header=False, in a shell --header or --no-header"


def _read(tmp_path, text, **how):
    path = tmp_path / "own.csv"
    path.write_text(text)
    return read_csv(path, **how)


@pytest.mark.parametrize(
    "first",
    [
        "0,1,2,3",
        "1,2,3,4",
        "400,402,404,406",
        "1990,1991,1992,1993",
        "4000.5,3998.5,3996.5,3994.5",
        "3,unknown,5,7",
        "?,?,?,?",
        "?,red,NA,?",
    ],
)
def test_a_first_line_that_may_be_names_is_a_question(tmp_path, first):
    with pytest.raises(ValueError, match=QUESTION):
        _read(tmp_path, f"{first}\n{ROWS}")
    assert _read(tmp_path, f"{first}\n{ROWS}", header=True, only=0).columns == (first.split(",")[0],)
    if first[0].isdigit() and "unknown" not in first:  # a word would not be a number
        assert _read(tmp_path, f"{first}\n{ROWS}", header=False).x.shape == (31, 4)


@pytest.mark.parametrize("first", ["0,1", "0"])
def test_a_count_above_fractions_is_a_question(tmp_path, first):
    rows = "\n".join(",".join(map(str, row[: first.count(",") + 1])) for row in X.tolist())
    with pytest.raises(ValueError, match=QUESTION):
        _read(tmp_path, f"{first}\n{rows}\n")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{4 * i},{4 * i + 1},{4 * i + 2},{4 * i + 3}" for i in range(10)),  # every line is even
        "\n".join(",".join(map(str, np.sort(row).tolist())) for row in RNG.normal(size=(10, 12))),  # every line rises
        "0,1\n1,0\n1,1\n0,0\n",  # below are also integers
        "0\n1\n1\n",
        "5.1,3.5,1.4,0.2\n4.9,3.0,1.4,0.2\n",
        "-1,0\n2.5,3\n",
        "0.0\n0.5\n",
        "inf,inf,inf\n1,2,3\n",
    ],
)
def test_numbers_like_those_below_are_data(tmp_path, text):
    table = _read(tmp_path, text)
    assert table.x.shape[0] == len(text.strip().splitlines())


@pytest.mark.parametrize("first", ["400.5,401.25,402,403.1", "30,-31,40,25.5"])
def test_a_line_far_from_all_below_it_is_a_question(tmp_path, first):
    with pytest.raises(ValueError, match=QUESTION):
        _read(tmp_path, f"{first}\n{ROWS}")
    assert _read(tmp_path, f"4,-1,0.2,0.1\n{ROWS}").x.shape == (31, 4)  # one number far off is an outlier


def test_an_index_without_a_name_beside_names_that_count(tmp_path):
    """As pandas writes a frame without column names."""
    frame = pd.DataFrame(np.column_stack([np.arange(30) % 3, X]))
    frame.to_csv(tmp_path / "own.csv")
    for drop in (0, "Unnamed: 0"):
        table = read_csv(tmp_path / "own.csv", label="0", drop=drop)
        assert table.x.shape == (30, 4) and table.columns == ("1", "2", "3", "4")
        assert table.labels.tolist() == [i % 3 for i in range(30)]
    with pytest.raises(ValueError, match=r"column Unnamed: 0 has no name|column 0 has no name: .*--drop 'Unnamed: 0'"):
        read_csv(tmp_path / "own.csv")
    assert _read(tmp_path, ",0,1\n3,0,1\n4,1,0\n", drop=0).x.shape == (3, 2)  # also counts below: a missing value
    frame.columns = [2000, 2001, 2002, 2003, 2004]
    frame.to_csv(tmp_path / "own.csv")
    with pytest.raises(ValueError, match=QUESTION):
        read_csv(tmp_path / "own.csv", drop=0)


def test_a_line_that_rises_where_no_other_does_is_a_question(tmp_path):
    x = RNG.normal(size=(10, 12))
    grid = ",".join(map(str, np.sort(RNG.normal(size=12)).tolist()))
    with pytest.raises(ValueError, match=QUESTION):
        _read(tmp_path, grid + "\n" + "\n".join(",".join(map(str, row)) for row in x.tolist()))


def test_words_that_come_again_are_classes_and_words_above_numbers_names(tmp_path):
    for label in ("3", 3, -1, "-1"):
        table = _read(tmp_path, IRIS, label=label)
        assert table.x.shape == (30, 3) and set(table.labels) == {"kind0", "kind1", "kind2"}
    unlike = "15.0,8,300.5,130.0,car0\n" + "\n".join(f"{15 + i},{i},{300 + i / 2},{i},car{i}" for i in range(1, 20))
    assert _read(tmp_path, unlike, drop=4).x.shape == (20, 4)  # unordered fractions are not names
    table = _read(tmp_path, "?,red\n1,blue\n2,red\n", label=1)
    assert table.x.shape == (3, 1) and table.labels.tolist() == ["red", "blue", "red"]
    pixels = "\n".join(f"{i % 10}," + ",".join(map(str, RNG.integers(0, 256, 5).tolist())) for i in range(20))
    table = _read(tmp_path, f"label,0,1,2,3,4\n{pixels}", label="label")
    assert table.columns == ("0", "1", "2", "3", "4") and table.labels.tolist() == [i % 10 for i in range(20)]


def test_the_label_is_never_looked_for_among_the_data(tmp_path):
    """The number of the column is a value in the first line."""
    x = np.column_stack([RNG.integers(5, 60, 99), RNG.normal(size=(99, 2)).round(3), RNG.integers(0, 3, 99)])
    x[0] = [3, 0.7, 0.1, 2]
    np.savetxt(tmp_path / "own.csv", x, delimiter=",", fmt="%g")
    for label in ("3", 3, -1):
        data = load(tmp_path / "own.csv", label=label, split=(99, 0, 0), dtype=torch.float64)
        assert sorted(data.train.tolist()) == sorted(x[:, :3].tolist())
        assert sorted(data.labels["train"].tolist()) == sorted(x[:, 3].tolist())
    with pytest.raises(
        ValueError, match=r"no column 'kind0' for label=; it has 0, 1, 2, 3 \(or give a position, 0 to 3"
    ):
        _read(tmp_path, IRIS, label="kind0")


def test_a_name_goes_before_a_position(tmp_path):
    text = "1,2,3\n" + "\n".join(f"{10 + i},{20 + i},{i % 2}" for i in range(10))
    assert _read(tmp_path, text, header=True, label="2").labels.tolist() == list(range(20, 30))
    assert set(_read(tmp_path, text, header=True, label=2).labels.tolist()) == {0, 1}


def test_columns_are_left_out_or_kept_by_name_or_position(tmp_path):
    text = "id,name,a,b,kind\n" + "\n".join(
        f"{i},n{i},{i * 0.37 % 1:.3f},{i * 0.71 % 1:.3f},{i % 2}" for i in range(20)
    )
    for how in (
        {"drop": ["id", "name"]},
        {"drop": (0, 1)},
        {"only": ["a", "b"]},
        {"only": [3, "-3"]},
        {"drop": ["0", 1]},
    ):
        table = _read(tmp_path, text, label="kind", **how)
        assert table.columns == ("a", "b") and table.labels.tolist() == [i % 2 for i in range(20)]
    frame = pd.read_csv(tmp_path / "own.csv")
    frame.to_parquet(tmp_path / "own.parquet", index=False)
    numbers = frame[["id", "a", "b", "kind"]].to_numpy()
    np.save(tmp_path / "own.npy", numbers)
    np.savez(tmp_path / "own.npz", x=numbers)
    for name, drop in (("csv", [0, 1]), ("parquet", ["id", -4]), ("npy", 0), ("npz", "0")):
        data = load(tmp_path / f"own.{name}", label=-1, drop=drop, split=(20, 0, 0), dtype=torch.float64)
        assert sorted(data.train.tolist()) == sorted(frame[["a", "b"]].to_numpy().tolist())
    for how, message in (
        ({"drop": "x"}, "no column 'x' for drop=; it has id, name, a, b, kind"),
        ({"only": 9}, "no column 9 for only="),
        ({"drop": "a", "only": "b"}, "pass only one of them"),
        ({"label": "a", "drop": "a"}, "contains the column of labels, 'a'"),
        ({"drop": [0, 1, 2, 3, 4]}, "has no column of data besides the omitted ones"),
    ):
        with pytest.raises(ValueError, match=message):
            _read(tmp_path, text, **how)


def test_all_columns_that_cannot_be_used_are_named_at_once_and_the_advice_works(tmp_path):
    rows = [f"n{i},{X[i, 0]},{'' if i % 9 == 0 else X[i, 1]},t{i % 3},{X[i, 2]}" for i in range(30)]
    text = "name,a,b,the town,c\n" + "\n".join(rows)
    with pytest.raises(
        ValueError, match=r"line 2 has 'n0' .nor are 'the town'., and values are missing: 4 of 'b'"
    ) as caught:
        _read(tmp_path, text)
    told = re.search(r"drop=(\[[^]]*\]), in a shell --drop (.*?);", str(caught.value))
    assert eval(told[1]) == shlex.split(told[2]) == ["name", "the town", "b"]
    assert _read(tmp_path, text, drop=eval(told[1])).columns == ("a", "c")
    many = ",".join(f"c{i}" for i in range(40)) + "\n" + "\n".join([",".join(["x"] * 40)] * 5)
    with pytest.raises(ValueError, match=r"and 29 more.*only=") as caught:
        _read(tmp_path, many)
    assert len(str(caught.value)) < 500


def test_columns_of_one_name_and_without_a_name(tmp_path):
    rows = "\n".join(f"{i * 0.37 % 1:.3f},{i * 0.71 % 1:.3f},{i * 0.11 % 1:.3f}" for i in range(10))
    with pytest.raises(ValueError, match=r"the same name: a \(the first at positions 0, 2\)"):
        _read(tmp_path, f"a,b,a\n{rows}")
    assert _read(tmp_path, f"a,b,a\n{rows}", drop=2).columns == ("a", "b")
    with pytest.raises(ValueError, match="several columns called 'a', at positions 0, 2: give the position for drop="):
        _read(tmp_path, f"a,b,a\n{rows}", drop="a")
    with pytest.raises(ValueError, match=r"column 1 has no name: .*--drop 1"):
        _read(tmp_path, f"a,,b\n{rows}")
    assert _read(tmp_path, f"a,,b\n{rows}", drop=1).columns == ("a", "b")


@pytest.mark.parametrize("sep", [" ", "\t", ","])
def test_rows_that_have_names(tmp_path, sep):
    """R writes one name fewer than columns."""
    rows = "\n".join(sep.join([f'"r{i}"', *map(str, row)]) for i, row in enumerate(X.tolist()))
    text = sep.join(['"a"', '"b"', '"c"', '"d"']) + "\n" + rows
    with pytest.raises(ValueError, match="column 0 has no name: if it is an index"):
        _read(tmp_path, text)
    table = _read(tmp_path, text, drop=0)
    assert table.columns == ("a", "b", "c", "d")
    np.testing.assert_array_equal(table.x.whole(), X)
    assert _read(tmp_path, text, only=["b", "d"]).columns == ("b", "d")


def test_separators_of_thousands_are_named(tmp_path):
    for text in ("a;b\n1.234,5;1,5\n2.345,5;2\n", 'a,b\n"1,234,567",2\n', "a;b\n1 234,5;2\n"):
        with pytest.raises(ValueError, match="write it without thousands separators"):
            _read(tmp_path, text)


def test_advice_on_commas_lines_and_titles_fits(tmp_path):
    with pytest.raises(
        ValueError, match="a decimal comma is supported only with semicolons or tabs as delimiters: write a point"
    ):
        _read(tmp_path, 'a,b\n"0,126",2\n"1,5",3\n')
    with pytest.raises(ValueError, match="4 fields, but the first has 2; if every second comma is a decimal sign"):
        _read(tmp_path, "a,b\n0,126,2,5\n1,5,3,5\n")
    for text in ("Report\na,b\n1,2\n", "Report\n\na,b\n1,2\n"):
        with pytest.raises(ValueError, match="if the first lines are a title, remove them"):
            _read(tmp_path, text)
    for footer, what in (
        ("Total,2", "1 is not a number; correct that line"),
        (".,1\n.,2", "2 are not numbers; correct those"),
    ):
        with pytest.raises(ValueError, match=rf"of its \d+ fields {what}.*or leave it out: drop='a'.*encode it as"):
            _read(tmp_path, "a,b\n1,2\n3,4\n5,6\n" + footer)
    with pytest.raises(ValueError, match="line 2 has 'x'; leave it out"):
        _read(tmp_path, "a,b\nx,2\ny,4\n")


def test_delimiters_without_anything_between_them_are_no_data(tmp_path):
    rows = "\n".join(f"{a};{b};;".replace(".", ",") for a, b in X[:, :2].tolist())
    table = _read(tmp_path, f"a;b;;\n{rows}\n;;;\n;;;\n")
    assert table.columns == ("a", "b")
    np.testing.assert_array_equal(table.x.whole(), X[:, :2])
    rows = "\n".join(f"{a},{b}," for a, b in X[:, :2].tolist())
    np.testing.assert_array_equal(_read(tmp_path, rows).x.whole(), X[:, :2])
    assert _read(tmp_path, rows, label=-1).x.shape == (30, 1)
    with pytest.raises(ValueError, match="column 2 has no name"):
        _read(tmp_path, f"a,b,\n{rows}7\n")


def test_comments_and_the_delimiter_above_a_table(tmp_path):
    np.savetxt(tmp_path / "own.csv", X, delimiter=",", header="a,b,c,d")
    assert read_csv(tmp_path / "own.csv", drop="a").columns == ("b", "c", "d")
    for above in ("# made by us\n# a,b,c,d\n", "# a, b, c, d\n"):
        table = _read(tmp_path, above + ROWS)
        assert table.columns == ("a", "b", "c", "d")
        np.testing.assert_array_equal(table.x.whole(), X)
    assert _read(tmp_path, "# one, two\n" + ROWS).columns == ("0", "1", "2", "3")
    table = _read(tmp_path, "sep=;\na;b\n1,5;2\n2,5;3\n")
    assert table.columns == ("a", "b") and table.x.whole().tolist() == [[1.5, 2], [2.5, 3]]
    with pytest.raises(ValueError, match="line 4 has 3 fields"):
        _read(tmp_path, "# one\na,b\n1,2\n1,2,3\n")


@pytest.mark.parametrize(
    "name", ["own.tsv", "own.txt", "own.data", "own", "own.xyz", "own.csv.gz", "own.txt.bz2", "own.xz"]
)
def test_text_is_read_whatever_it_is_called(tmp_path, name):
    text = "a\tb\n" + "\n".join(f"{row[0]}\t{row[1]}" for row in X.tolist())
    opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(name.rsplit(".", 1)[-1], open)
    with opened(tmp_path / name, "wt") as file:
        file.write(text)
    data = load(tmp_path / name, split=(30, 0, 0), dtype=torch.float64)
    assert sorted(data.train.tolist()) == sorted(X[:, :2].tolist())


@pytest.mark.parametrize("name", ["own.csv", "own.text"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_text_of_any_encoding_and_name(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("gr\xf6\xdfe,art\n1.5,s\xfc\xdf\n2.5,herb\n".encode(encoding))
    data = load(tmp_path / name, label="art", split=(2, 0, 0))
    assert data.classes == ("herb", "s\xfc\xdf") and sorted(data.train.flatten().tolist()) == [1.5, 2.5]


def test_packed_text_that_is_torn_or_expands(tmp_path):
    packed = gzip.compress(ROWS.encode())
    (tmp_path / "own.csv.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"own.csv.gz is not a text table of numbers"):
        load(tmp_path / "own.csv.gz")
    (tmp_path / "own.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"own.csv.gz is not a text table of numbers"):
        load(tmp_path / "own.csv.gz")
    (tmp_path / "own.csv.gz").write_bytes(gzip.compress(b"1,2\n" * 10**6))
    with pytest.raises(ValueError, match="expands to more than 1000000 bytes"):
        load(tmp_path / "own.csv.gz", limit=10**6)


@pytest.mark.parametrize("label", ["price", 2])
def test_measurements_are_no_classes(tmp_path, label):
    text = "a;b;price\n" + "\n".join(";".join(map(str, row[:3])) for row in X.tolist())
    for written in (text, text.replace(".", ",")):
        (tmp_path / "own.csv").write_text(written)
        with pytest.raises(
            ValueError, match=r"labels of own must be classes \(integers or words\), but 30 are other numbers"
        ):
            load(tmp_path / "own.csv", label=label)
    pd.DataFrame(X[:, :3], columns=["a", "b", "price"]).to_parquet(tmp_path / "own.parquet", index=False)
    with pytest.raises(ValueError, match="30 are other numbers"):
        load(tmp_path / "own.parquet", label=label)


def test_as_many_classes_as_data_are_a_warning():
    x = RNG.normal(size=(60, 2))
    with pytest.warns(UserWarning, match="the 60 labels have 60 different values, but labels should be classes"):
        from_array(x, RNG.permutation(1000)[:60])
    with pytest.warns(UserWarning, match="60 different values"):
        from_array(x, [f"n{i}" for i in range(60)])


@pytest.mark.parametrize(
    ("name", "column", "what"),
    [
        ("rownames", np.arange(1, 31), "counts the rows"),
        ("t", np.arange(30), "counts the rows"),
        ("year", np.arange(1821, 1851), "rises by 1 from row to row"),
        ("time", np.arange(30) * 0.05, "rises by 0.05 from row to row"),
        ("k", RNG.permutation(30), "holds each of 0 to 29 once"),
        ("k", RNG.permutation(30) + 1, "holds each of 1 to 30 once"),
        (
            "k",
            20000100 + RNG.integers(1, 29, 30) + 10_000 * RNG.integers(0, 25, 30),
            r"holds dates as integers, such as 20\d{6}",
        ),
        ("PassengerId", RNG.permutation(10**6)[:30], "holds a different integer in each row"),
        ("sample_id", RNG.permutation(10**6)[:30], "holds a different integer in each row"),
        ("Unnamed: 0", RNG.permutation(10**6)[:30], "holds a different integer in each row"),
    ],
)
def test_columns_that_number_the_rows_are_named(tmp_path, name, column, what):
    frame = pd.DataFrame(X, columns=list("abcd"))
    frame.insert(2, name, column)
    frame.to_csv(tmp_path / "own.csv", index=False)
    with pytest.warns(UserWarning, match=f"own: column '{name}' {what}: if it is an index, .*--drop"):
        load(tmp_path / "own.csv")
    with pytest.warns(UserWarning, match=f"array: column '{name}' {what}: if it is an index, remove it from x"):
        from_array(frame)
    load(tmp_path / "own.csv", drop=name)
    if not name.endswith(("d", "0")):
        with pytest.warns(UserWarning, match=f"array: feature 2 {what}"):
            from_array(frame.to_numpy())


def test_numbers_that_stand_for_missing_values_are_told():
    for code, count in ((-999, 1), (-99, 5), (99999, 2), (9999.0, 29 - 10)):
        x = X.copy()
        x[:count, 2] = code
        with pytest.warns(UserWarning, match=rf"feature 2 holds {code:g} in {count} rows?, far from its other values"):
            from_array(x)
    x[:, 2] = np.arange(30) % 15 - 9  # -9 is one of its values
    from_array(x)
    x[:, 2] = np.where(np.arange(30) == 3, 99, X[:, 2] * 40)
    from_array(x)
    found = []
    for step in (30, 7):
        codes = StandIns(2)
        for start in range(0, 30, step):
            codes.look(np.column_stack([X[:, 0], np.where(X[:, 0] > 0, -999, X[:, 1])])[start : start + step], 0)
        found.append(codes.found())
    assert found[0] == found[1] == {1: (-999.0, int((X[:, 0] > 0).sum()))}


def test_advice_holds_for_names_that_look_like_options(tmp_path):
    text = "a,--x,-y\n1,u,v\n2,w,v\n"
    with pytest.raises(ValueError, match=r"drop='--x', in a shell --drop=--x; .*label='--x', in a shell --label=--x"):
        _read(tmp_path, text, drop=2)
    with pytest.raises(ValueError, match=r"drop=\['--x', '-y'\], in a shell --drop and their positions"):
        _read(tmp_path, text)


def test_the_number_of_a_column_of_a_frame_is_its_name():
    data = from_array(pd.DataFrame({**dict(enumerate(X.T)), 7: np.arange(30) % 3}), 7)
    assert data.train.shape[1] == 4 and data.labels["train"].unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="labels=3 names a column, but x is not a DataFrame"):
        from_array(X, 3)


def test_labels_in_another_order_than_the_data_are_refused():
    frame = pd.DataFrame(X, columns=list("abcd"))
    labels = pd.Series(np.arange(30) % 3)
    with pytest.raises(ValueError, match=r"the index of x in another order: pass labels\.loc\[x\.index\]"):
        from_array(frame, labels.sample(frac=1, random_state=0))
    assert len(from_array(frame, labels.set_axis(np.arange(30) + 100)).labels["train"]) == 24


def test_counting_does_not_depend_on_pieces():
    x = np.column_stack([RNG.normal(size=100), np.arange(100), RNG.permutation(100), RNG.integers(0, 100, 100)])
    found = []
    for step in (100, 7, 30):
        counters = Counters(x.shape)
        for start in range(0, 100, step):
            counters.look(x[start : start + step], start, 0)
        found.append(counters.found())
    by_columns = Counters(x.shape)
    for column in range(4):
        by_columns.look(x[:, column : column + 1], 0, column)
    assert found[0] == {1: "counts the rows", 2: "holds each of 0 to 99 once"}
    assert all(other == found[0] for other in [*found, by_columns.found()])


def test_what_counts_by_chance_or_on_purpose_is_left_alone():
    assert Counters((100, 2)).found() == {}
    from_array(np.arange(60.0).reshape(20, 3))  # every column rises
    from_array(np.column_stack([np.arange(8), RNG.normal(size=8)]))  # too few rows
    from_array(np.arange(40.0)[:, None])  # the only feature


def test_the_index_of_a_frame_in_a_parquet_file_is_told_from_its_columns(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcd"), index=pd.Index(RNG.permutation(30), name="id"))
    frame.to_parquet(tmp_path / "own.parquet")
    with pytest.raises(ValueError, match=r"has the index of a DataFrame as a column: .*--drop id"):
        load(tmp_path / "own.parquet")
    assert load(tmp_path / "own.parquet", drop="id").train.shape[1] == 4


def test_columns_of_text_in_another_encoding(tmp_path):
    n = 30
    places = pa.py_buffer(np.arange(n + 1, dtype="i4").tobytes())
    text = pa.Array.from_buffers(pa.string(), n, [None, places, pa.py_buffer(b"\xe9" * n)])
    pq.write_table(pa.table({"a": X[:, 0], "a.b": X[:, 1], "name": text}), tmp_path / "own.parquet")
    assert load(tmp_path / "own.parquet", drop="name").train.shape[1] == 2
    assert load(tmp_path / "own.parquet", only="a.b").train.shape[1] == 1
    with pytest.raises(ValueError, match="the labels, column 'name', are not UTF-8 text"):
        load(tmp_path / "own.parquet", label="name")
