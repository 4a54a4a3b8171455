"""Own data with missing values: every container and format, preparation by the observed values, errors."""

import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from torch.utils.data import TensorDataset

from jensen.datasets import arrays, from_array, load, preparation, tables
from jensen.datasets.missing import Missing
from jensen.datasets.preparation import Moments

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).round(3)
HOLES = RNG.random(X.shape) < 0.3
HOLES[HOLES.all(1), 0] = False
X_NAN = np.where(HOLES, np.nan, X)
WHOLE = RNG.integers(0, 50, X.shape)
HOW = {"dtype": torch.float64, "split": (60, 0, 0)}


def _sorted(x):
    return sorted(map(tuple, np.nan_to_num(np.asarray(x), nan=1e9).tolist()))


def _text(word, sign=".", delimiter=","):
    cells = np.where(HOLES, word, X.astype(str)).tolist()
    return "\n".join(delimiter.join(row).replace(".", sign) for row in [list("abcd"), *cells])


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X_NAN, "nan"),
        lambda: (X_NAN, np.nan),
        lambda: (torch.from_numpy(X_NAN), "nan"),
        lambda: (np.asfortranarray(X_NAN).astype(">f8"), "nan"),
        lambda: (np.where(HOLES, -999, X), -999),
        lambda: (np.where(HOLES, -999, X), "-999"),
        lambda: (np.where(HOLES, np.inf, X), np.inf),
        lambda: (np.where(HOLES, np.where(X > 0, -99, 777.25), X), (777.25, "NA", -99)),
        lambda: (X, HOLES),
        lambda: (X, torch.from_numpy(HOLES)),
        lambda: (X, HOLES.tolist()),
        lambda: (np.where(HOLES & (X > 0), np.nan, X), HOLES & (X <= 0)),
        lambda: (np.where(HOLES, None, X), "nan"),
        lambda: (np.where(HOLES, None, X).tolist(), "nan"),
        lambda: (np.where(HOLES, "?", X.astype(str)), "?"),
        lambda: (np.ma.array(X, mask=HOLES), "nan"),
        lambda: (pd.DataFrame(X_NAN, columns=list("abcd")), "nan"),
        lambda: (pd.DataFrame(X_NAN, columns=list("abcd")).convert_dtypes(), "nan"),
        lambda: (pd.DataFrame(np.where(HOLES, "unknown", X.astype(object)), columns=list("abcd")), ["unknown"]),
        lambda: (pd.DataFrame(X, columns=list("abcd")), pd.DataFrame(HOLES, columns=list("abcd"))),
        lambda: (pa.table({name: pa.array(X[:, i], mask=HOLES[:, i]) for i, name in enumerate("abcd")}), "nan"),
        lambda: (scipy.sparse.csr_matrix(X_NAN), "nan"),
        lambda: (TensorDataset(torch.from_numpy(X_NAN)), "nan"),
    ],
)
def test_every_container_gives_nan_where_a_value_is_missing(make):
    x, missing = make()
    data = from_array(x, missing=missing, **HOW)
    assert _sorted(data.train) == _sorted(X_NAN)
    assert int(data.masks["train"].sum()) == HOLES.sum()


def _write_csv(word, **how):
    return lambda path: path.with_suffix(".csv").write_text(_text(word, **how))


@pytest.mark.parametrize(
    ("kind", "write", "missing"),
    [
        ("csv", _write_csv(""), "nan"),
        ("csv", _write_csv("NA"), "NA"),
        ("csv", _write_csv("?"), "nan"),
        ("csv", _write_csv("?", sign=",", delimiter=";"), "?"),
        ("csv", _write_csv("unknown "), "unknown"),
        ("csv", _write_csv("-999"), -999),
        ("csv", _write_csv("-999.0"), ("NA", "-999")),
        ("npy", lambda path: np.save(path.with_suffix(".npy"), X_NAN), "nan"),
        ("npy", lambda path: np.save(path.with_suffix(".npy"), X), HOLES),
        ("npz", lambda path: np.savez(path.with_suffix(".npz"), x=np.where(HOLES, -999, X)), -999),
        ("parquet", lambda path: pd.DataFrame(X_NAN, columns=list("abcd")).to_parquet(path.with_suffix(".parquet")), 7),
    ],
)
def test_every_format_gives_nan_where_a_value_is_missing(tmp_path, kind, write, missing):
    write(tmp_path / "own")
    data = load(tmp_path / f"own.{kind}", missing=missing, **HOW)
    assert _sorted(data.train) == _sorted(X_NAN)


def test_without_missing_the_error_names_the_option(tmp_path):
    (tmp_path / "own.csv").write_text(_text("NA"))
    text = "pass missing='nan', in a shell --missing nan, if they were not observed; drop those rows, or fill in values"
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "own.csv")
    with pytest.raises(ValueError, match=text):
        from_array(X_NAN)
    (tmp_path / "own.csv").write_text(_text("unknown"))
    with pytest.raises(ValueError, match="missing='unknown', in a shell --missing unknown"):
        load(tmp_path / "own.csv")


def test_whole_numbers_with_holes_become_floating_point(tmp_path):
    expected = _sorted(np.where(HOLES, np.nan, WHOLE))
    for x in (WHOLE, WHOLE.astype(np.uint8), WHOLE.astype(np.int16), torch.from_numpy(WHOLE)):
        data = from_array(x, missing=HOLES, split=(60, 0, 0))
        assert data.train.dtype == torch.float32 and _sorted(data.train) == expected
    for x in (np.where(HOLES, -1, WHOLE), np.where(HOLES, 99, WHOLE).astype(np.uint8)):
        assert _sorted(from_array(x, missing=[-1, 99], **HOW).train) == expected
    nullable = pa.table({name: pa.array(WHOLE[:, i], mask=HOLES[:, i]) for i, name in enumerate("abcd")})
    pq.write_table(nullable, tmp_path / "own.parquet")
    assert _sorted(load(tmp_path / "own.parquet", missing="nan", **HOW).train) == expected
    with pytest.raises(ValueError, match=r"missing= needs a floating-point dtype for NaN, but got torch.int64"):
        from_array(WHOLE, missing=HOLES, dtype=torch.int64)
    single = np.where(HOLES, -999.9, X).astype(np.float32)
    assert int(from_array(single, missing=-999.9).masks["train"].sum()) > 0


@pytest.mark.parametrize(
    ("x", "how", "error", "text"),
    [
        (X, {"missing": HOLES[:9]}, ValueError, r"missing is a mask of shape \(9, 4\), but the data of array have the"),
        (X, {"missing": HOLES[0]}, ValueError, r"missing is a mask of shape \(4,\)"),
        (X, {"missing": 1.0 * HOLES}, TypeError, "missing must be 'nan', another word or number .* an array of shape"),
        (X, {"missing": True}, TypeError, r"or a Boolean mask .* but got True"),
        (X, {"missing": []}, TypeError, "but got a list of 0"),
        (X, {"missing": {"a": -999}}, TypeError, "but got a dict"),
        (X, {"missing": [None]}, TypeError, "but got a list of 1"),
        (np.where(HOLES, np.inf, X), {"missing": "nan"}, ValueError, r"array has \d+ infinite values, at row \d+"),
        (np.where(np.arange(60)[:, None] % 30 == 7, np.nan, X), {}, ValueError, "array has 2 rows .* rows 7, 37: drop"),
        (
            np.where(np.arange(60)[:, None] == 7, np.nan, X),
            {},
            ValueError,
            "array has 1 row without any obs",
        ),
        (
            X * [1, np.nan, 1, np.nan],
            {},
            ValueError,
            "array has no observed training value of feature 1 and 1 more: leave them out of x",
        ),
        (np.where(HOLES, "?", "b"), {"missing": "?"}, ValueError, "array has dtype <U1, but numbers were expected"),
        (np.where(HOLES, None, "b"), {"missing": "?"}, ValueError, "does not read as a numeric array"),
    ],
)
def test_errors_of_holes(x, how, error, text):
    with pytest.raises(error, match=text):
        from_array(x, **{"missing": "nan", **how})


def test_errors_name_columns_and_labels(tmp_path):
    frame = pd.DataFrame(X_NAN, columns=list("abcd")).assign(kind="b")
    frame.loc[:, "c"] = np.nan
    frame.to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(ValueError, match="own has no observed training value of column 'c': leave it out: drop='c'"):
        load(tmp_path / "own.csv", label="kind", missing="nan", standardize=True)
    frame.loc[3, "kind"] = None
    text = "labels of array have 1 missing values, the first in row 3: give these data points a class of their own"
    with pytest.raises(ValueError, match=text):
        from_array(frame.drop(columns="c"), "kind", missing="nan")
    with pytest.raises(ValueError, match="missing apply only to your own files"):
        load("digits", missing="nan")


def test_a_mask_of_a_data_frame_may_have_the_column_of_labels():
    frame = pd.DataFrame(X_NAN, columns=list("abcd"))
    frame.insert(1, "kind", np.arange(60) % 3)
    for mask in (frame.isna(), frame.isna()[list("dbca")]):
        data = from_array(frame.fillna(0.0), "kind", missing=mask, **HOW)
        assert _sorted(data.train) == _sorted(X_NAN)
    with pytest.raises(ValueError, match="got missing with the index of x in another order: pass missing"):
        from_array(frame, "kind", missing=frame.isna()[::-1])


def test_labels_may_equal_the_number_that_marks_missing_features():
    data = from_array(np.where(HOLES, 0, X + 9), np.arange(60) % 2, missing=0)
    assert data.labels["train"].unique().tolist() == [0, 1]


def test_moments_are_those_of_the_observed_values(monkeypatch):
    for size in (preparation.BLOCK, 200):
        monkeypatch.setattr(arrays, "BLOCK", size)
        data = from_array(1e6 + X_NAN, missing="nan", standardize=True, **HOW)
        np.testing.assert_allclose(data.location - 1e6, np.nanmean(X_NAN, 0), atol=1e-9)
        np.testing.assert_allclose(data.scale, np.nanstd(X_NAN, 0, ddof=1), rtol=1e-9)
        np.testing.assert_allclose(np.nanmean(data.train, 0), 0, atol=1e-9)
        assert int(data.masks["train"].sum()) == HOLES.sum()
    moments = Moments((2,))
    for block in ([[np.nan, 5.0]], [[np.nan, np.nan]], [[3.0, 7.0], [5.0, np.nan]]):
        moments.add(np.array(block))
    assert moments.location.tolist() == [4, 6] and moments.scale.tolist() == [2**0.5, 2**0.5]


def test_sequences_and_images_keep_their_holes():
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(30, 5, 2))
    holes = rng.random(steps.shape) < 0.4
    data = from_array(steps, missing=holes, standardize=True, split=(30, 0, 0), dtype=torch.float64)
    seen = np.where(holes, np.nan, steps)
    np.testing.assert_allclose(data.location, np.nanmean(seen, (0, 1)))
    assert data.train.shape == (30, 5, 2) and int(data.masks["train"].sum()) == holes.sum()
    pixels = rng.integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)
    holes = rng.random(pixels.shape) < 0.4
    seen = np.where(holes, np.nan, pixels / 255).transpose(0, 3, 1, 2).reshape(30, -1)
    for shape in ((30, 5, 6, 3), (30, 90)):
        data = from_array(
            pixels.reshape(shape), missing=holes.reshape(shape), levels=256, image_shape=(5, 6, 3), split=(30, 0, 0)
        )
        np.testing.assert_allclose(_sorted(data.train), _sorted(seen), rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"dequantize": True}, {"binarize": "threshold"}, {"binarize": "sample"}])
def test_observed_levels_become_what_they_are_without_holes(how, monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(preparation, "BLOCK", 500)
    grey = rng.integers(0, 256, (60, 12))
    holes = rng.random(grey.shape) < 0.4
    whole, holed = (from_array(grey, levels=256, missing=missing, **how) for missing in (None, holes))
    assert holed.bits_offset == whole.bits_offset and holed.levels == whole.levels
    for part, mask in holed.masks.items():
        seen, all_of = getattr(holed, part), getattr(whole, part)
        assert torch.equal(seen[~mask], all_of[~mask]) and torch.equal(mask, seen.isnan())
    assert sum(int(mask.sum()) for mask in holed.masks.values()) == holes.sum()
    with pytest.raises(ValueError, match=r"array has values from \d to \d+, but levels=20 requires"):
        from_array(grey, levels=20, missing=holes)
    with pytest.raises(ValueError, match=r"binarize needs values between 0 and 1, but array has values from \d to"):
        from_array(grey, binarize="sample", missing=holes)


def test_masks_and_share_of_a_data_set():
    data = from_array(X_NAN, missing="nan")
    assert set(data.masks) == {"train", "validation", "test"} and f"; {100 * HOLES.mean():.2g} % missing;" in repr(data)
    whole = from_array(X, missing="nan")
    assert whole.masks == {} and "missing" not in repr(whole)
    assert torch.equal(whole.train, from_array(X).train)


def test_placeholders_advise_missing_and_holes_make_no_other_warnings():
    rng = np.random.default_rng(1)
    x = np.where(HOLES, -999, X)
    with pytest.warns(UserWarning, match="if it marks missing values, pass missing=-999, in a shell --missing -999"):
        from_array(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_array(x, missing=-999)
        from_array(pd.DataFrame(X_NAN, columns=["id", "b", "c", "d"]), missing="nan")
        days = np.column_stack([20240101 + np.arange(60) % 28, np.arange(60), X])
        from_array(np.where(rng.random(days.shape) < 0.1, np.nan, days), missing="nan", dtype=torch.float64)
    x[0, :2] = 9999
    with pytest.warns(UserWarning, match=r"missing=\[-999, 9999\], in a shell --missing -999 9999"):
        from_array(x, missing=-999)
    with pytest.warns(UserWarning, match="holds -999 in"):
        from_array(np.where(np.arange(240).reshape(60, 4) % 7 == 2, np.nan, x), missing=9999)


def test_an_index_is_found_beside_columns_with_holes():
    with pytest.warns(UserWarning, match="feature 0 counts the rows"):
        from_array(np.column_stack([np.arange(60), X_NAN]), missing="nan")


def test_pieces_cover_a_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 100)
    monkeypatch.setattr(tables, "_COLUMNS", 2)
    monkeypatch.setattr(tables, "_ROWS", 7)
    pd.DataFrame(X, columns=list("abcd")).to_parquet(tmp_path / "own.parquet")
    for order in "CF":
        np.save(tmp_path / f"{order}.npy", np.asarray(X, order=order))
    for file in ("own.parquet", "C.npy", "F.npy"):
        assert _sorted(load(tmp_path / file, missing=HOLES, **HOW).train) == _sorted(X_NAN)
        kept = load(tmp_path / file, missing=HOLES[:, :3] & HOLES[:, 1:], drop=[1], **HOW)
        assert int(kept.masks["train"].sum()) == (HOLES[:, :3] & HOLES[:, 1:]).sum()


def test_usual_words_are_known_without_naming_them():
    assert Missing.of(["NA", "?", "", "NaN", "null", "n/a", "None"]).words == frozenset()
    assert Missing.of("-1e3").numbers == (-1000.0,) and Missing.of(("a b", 3)).words == {"a b"}
    assert Missing.of(torch.tensor(-9)).numbers == (-9.0,) and Missing.of(np.array([1, 2])).numbers == (1.0, 2.0)
