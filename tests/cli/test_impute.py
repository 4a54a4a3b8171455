"""``jensen impute``: a table comes back with its columns and rows, and without missing values."""

import json

import numpy as np
import pandas
import pytest

from jensen.cli import main

_QUICK = ["--latent", "1", "--hidden", "8", "--epochs", "2", "--no-pictures", "--batch-size", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a table with a name, a class and three features, some of whose values are NA."""
    folder = tmp_path_factory.mktemp("impute")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 1)) @ np.ones((1, 3)) * [1, 10, 100] + [0, 5, 1000] + 0.1 * rng.normal(size=(100, 3))
    x[rng.random(x.shape) < 0.3] = np.nan
    x[np.isnan(x).all(1), 0] = 1.0
    table = pandas.DataFrame(x, columns=["a", "b", "c"])
    table.insert(0, "id", [f"r{i}" for i in range(100)])
    table["kind"] = rng.choice(["u", "v"], 100)
    table.to_csv(folder / "own.csv", index=False, na_rep="NA")
    table.to_parquet(folder / "own.parquet")
    np.save(folder / "own.npy", x)
    more = ["--data", str(folder / "own.csv"), "--missing", "NA", "--standardize", "--drop", "id", "--label", "kind"]
    assert main(["train", "--run", str(folder / "run"), *more, *_QUICK]) == 0
    return folder


def test_a_table_comes_back_with_its_columns_and_observed_values(folder, tmp_path, capsys):
    out = tmp_path / "filled.csv"
    capsys.readouterr()
    arguments = ["impute", str(folder / "run"), "--out", str(out), "--draws", "2", "--particles", "100", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    before, after = pandas.read_csv(folder / "own.csv"), pandas.read_csv(out)
    assert list(after) == list(before)
    assert document["missing"] == int(before[["a", "b", "c"]].isna().sum().sum())
    assert not after.isna().any().any()
    assert after["id"].equals(before["id"])
    assert after["kind"].equals(before["kind"])
    seen = before[["a", "b", "c"]].notna().to_numpy()
    assert (after[["a", "b", "c"]].to_numpy()[seen] == before[["a", "b", "c"]].to_numpy()[seen]).all()
    assert abs(after["c"].mean() - 1000) < 60  # in the units of the table
    drawn = [pandas.read_csv(tmp_path / f"filled-{m}.csv") for m in (1, 2)]
    assert not drawn[0].equals(drawn[1])


@pytest.mark.parametrize("out", ["filled.parquet", "filled.tsv", "filled.npy"])
def test_other_formats(folder, tmp_path, out, capsys):
    assert main(["impute", str(folder / "run"), "--out", str(tmp_path / out), "--particles", "50"]) == 0
    if out.endswith("npy"):
        filled = np.load(tmp_path / out)
    else:
        read = pandas.read_parquet if out.endswith("parquet") else lambda path: pandas.read_csv(path, sep="\t")
        frame = read(tmp_path / out)
        assert list(frame) == ["id", "a", "b", "c", "kind"]
        filled = frame[["a", "b", "c"]].to_numpy().astype(float)
    assert filled.shape == (100, 3)
    assert np.isfinite(filled).all()


def test_another_table_is_standardized_as_the_data_of_the_run(folder, tmp_path, capsys):
    table = pandas.DataFrame({"id": ["x", "y"], "a": [1.0, 0.5], "b": [15.0, None], "c": [None, 1050.0], "kind": "u"})
    table.to_csv(tmp_path / "new.csv", index=False, na_rep="NA")
    arguments = ["impute", str(folder / "run"), "--data", str(tmp_path / "new.csv"), "--out", str(tmp_path / "f.csv")]
    assert main(arguments) == 0
    filled = pandas.read_csv(tmp_path / "f.csv")
    assert list(filled["id"]) == ["x", "y"]
    assert 700 < filled["c"][0] < 1300
    assert -30 < filled["b"][1] < 40


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "filled.xlsx"], "there is no format '.xlsx'"),
        (["--particles", "0"], "--particles must be at least 1"),
        (["--data", "nowhere.csv"], "there is no such file"),
        (["--data", "other.csv"], "was trained on a, b, c: give a table with the same columns"),
    ],
)
def test_what_cannot_be_imputed_is_said(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    other = pandas.DataFrame({"id": ["x", "y"], "a": [1.0, 0.5], "q": [15.0, 2.0], "kind": ["u", "v"]})
    other.to_csv("other.csv", index=False)
    assert main(["impute", str(folder / "run"), *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("guide", ["bottom-up", "ladder"])
def test_hierarchical_guides_read_missing_values(folder, tmp_path, guide, capsys):
    more = ["--data", str(folder / "own.csv"), "--missing", "NA", "--standardize", "--drop", "id", "--label", "kind"]
    more += ["--model", "hierarchical", "--guide", guide, "--latent", "2,1", "--hidden", "8", "--epochs", "1"]
    assert main(["train", "--run", str(tmp_path / "run"), *more, "--no-pictures"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--particles", "50", "--no-pictures"]) == 0
    assert "log p(x)" in capsys.readouterr().out


def test_models_and_guides_are_compared_on_what_was_observed(folder, tmp_path, capsys):
    more = ["--data", str(folder / "own.csv"), "--missing", "NA", "--standardize", "--drop", "id", "kind"]
    more += ["--latent", "1", "--epochs", "1", "--particles", "50", "--no-pictures", "--guides", "mean-field,exact"]
    assert main(["compare", *more, "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]["one-model"]["rows"]
    exact = rows["exact posterior"]
    assert exact["elbo"] == pytest.approx(exact["exact"], abs=1e-4)
    assert rows["mean-field"]["elbo"] < exact["elbo"]
