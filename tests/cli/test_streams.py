"""``jensen train`` on files above a quarter of the free memory: read by the batch, in the splits of data in memory."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from jensen.cli import main
from jensen.cli.memory import free_memory
from jensen.cli.sources import pick
from jensen.cli.streams import opened, picked
from jensen.datasets import load
from jensen.inference import History

X = (3 * np.random.default_rng(0).normal(size=(900, 4)) + 1).astype(np.float32)
SMALL = ["--model", "ppca", "--guide", "mean-field", "--latent", "2", "--hidden", "8", "--no-pictures", "--standardize"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setenv("JENSEN_FREE_MEMORY", "30000")  # of which a quarter is half of the data


@pytest.fixture
def big(tmp_path):
    np.save(tmp_path / "big.npy", X)
    return tmp_path / "big.npy"


def _trained(big, run, *more):
    assert main(["train", "--data", str(big), "--run", str(run), "--epochs", "2", *SMALL, *more]) == 0
    return json.loads((run / "configuration.json").read_text())


def test_a_large_file_is_read_by_the_batch_says_so_and_is_measured(big, tmp_path, capsys, monkeypatch):
    configuration = _trained(big, tmp_path / "run")
    said = capsys.readouterr()
    assert (
        "big.npy: its data need 14.4 kB, a quarter of the free memory is 7.5 kB, so they are read by the batch"
        in said.err
    )
    facts = configuration["facts"]
    assert (facts["train"], facts["validation"], facts["test"], facts["features"]) == (720, 90, 90, 4)
    assert facts["bits_offset"] == pytest.approx(load(big, standardize=True).bits_offset, rel=1e-6)
    assert main(["evaluate", str(tmp_path / "run"), "--particles", "20", "--no-pictures", "--json"]) == 0
    found = next(iter(json.loads(capsys.readouterr().out)["runs"].values()))["summary"]
    assert found["exact"] == pytest.approx(found["log_evidence"], abs=2)
    monkeypatch.delenv("JENSEN_FREE_MEMORY")  # the run keeps its route
    assert main(["train", "--run", str(tmp_path / "run"), "--resume", "--epochs", "3", "--no-pictures"]) == 0
    whole = _trained(big, tmp_path / "whole", "--epochs", "3")
    assert "streamed" not in whole["data"]
    assert len(History.from_json(tmp_path / "run" / "history.json").elbo) == 3


def test_the_splits_are_those_of_data_in_memory(big):
    settings = {"source": str(big), "seed": 3, "standardize": True}
    data, there = opened(settings), load(big, standardize=True, seed=3)
    assert torch.allclose(data.location, there.location, rtol=1e-12)
    for split in ("train", "validation", "test"):
        rows = pick(len(getattr(there, split)), 50, 0)
        assert torch.equal(picked(data, split, rows), getattr(there, split)[rows])


def test_a_changed_file_and_infinite_or_missing_values_are_found(big, tmp_path, capsys):
    _trained(big, tmp_path / "run")
    np.save(big, X + 1)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "has changed since the run was started" in capsys.readouterr().err
    for value, message in ((np.inf, "infinite values in the rows"), (np.nan, "--missing nan")):
        holed = X.copy()
        holed[700, 1] = value
        np.save(big, holed)
        assert main(["train", "--data", str(big), "--run", str(tmp_path / "other"), "--epochs", "1", *SMALL]) == 2
        assert message in capsys.readouterr().err
    assert _trained(big, tmp_path / "holed", "--missing", "nan")["pair"]["masked"]


def test_options_that_need_all_data_load_them(big, tmp_path, capsys):
    _trained(big, tmp_path / "run", "--drop", "0")
    assert "they are loaded nevertheless, because --drop needs all of them at once" in capsys.readouterr().err


def test_a_folder_of_parquet_files_is_read_by_the_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JENSEN_FREE_MEMORY", "1e12")
    (tmp_path / "parts").mkdir()
    for name, part in (("a", X[:400]), ("b", X[400:])):
        table = pa.table({f"c{i}": column for i, column in enumerate(part.T)})
        parquet.write_table(table, tmp_path / "parts" / f"{name}.parquet")
    assert _trained(tmp_path / "parts", tmp_path / "run")["data"]["streamed"]
    assert main(["train", "--data", str(tmp_path / "parts"), "--drop", "0", "--run", str(tmp_path / "no")]) == 2
    assert "--drop needs all data at once" in capsys.readouterr().err


def test_zeros_and_ones_get_a_bernoulli_likelihood(tmp_path):
    np.save(tmp_path / "bits.npy", (X > 1).astype(np.uint8))
    more = ["--model", "vae", "--latent", "1", "--hidden", "4", "--epochs", "1", "--no-pictures"]
    run = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "bits.npy"), "--run", str(run), *more]) in (0,)
    configuration = json.loads((run / "configuration.json").read_text())
    assert configuration["pair"]["likelihood"] == "bernoulli"


def test_the_free_memory_is_known(monkeypatch):
    monkeypatch.delenv("JENSEN_FREE_MEMORY")
    assert 10**7 < free_memory() < 10**14
