"""The memory used to read a file, in addition to the resulting data."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jensen.datasets import arrays, load, preparation, tables

_CODE = """
import gc, json, sys
import pandas, pyarrow.parquet, torch
from jensen.datasets import load

def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])

load("digits", standardize=True)
for path, how in json.loads(sys.argv[1]):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on, the most is counted anew
    before = peak()
    data = load(path, **how)
    size = sum(part.nbytes for part in (data.train, data.validation, data.test))
    print(json.dumps([path, size, (peak() - before) / size]), flush=True)
    del data
"""


def test_reading_takes_little_more_memory_than_the_data(tmp_path):
    """One process for all files, because imports are slow: each gives 64 MB of float32."""
    x = np.random.default_rng(0).integers(0, 2**20, (40_000, 400)) / 2**10
    single = x.astype(np.float32)
    np.save(tmp_path / "single.npy", single)
    np.save(tmp_path / "double.npy", x)
    np.save(tmp_path / "columns.npy", np.asfortranarray(x))
    np.savez(tmp_path / "single.npz", x=single)
    np.savez(tmp_path / "columns.npz", x=np.asfortranarray(x))
    np.savez_compressed(tmp_path / "packed.npz", x=np.repeat(x[:, :40], 10, 1))
    np.savez(tmp_path / "grey.npz", x=(x % 256).astype(np.uint8))
    for name, values in (("single", single), ("double", x)):
        table = {f"c{i}": values[:, i] for i in range(400)}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet", compression="none", use_dictionary=False)
    how = {
        "grey.npz": {"levels": 256, "dequantize": True, "missing": 7},
        "double.npy": {"standardize": True},
        "columns.npy": {"standardize": True, "missing": 0.5},
    }
    _check([(str(path), how.get(path.name, {})) for path in sorted(tmp_path.iterdir())], size=4 * x.size)


@pytest.mark.slow
def test_reading_text_takes_little_more_memory_than_the_data(tmp_path):
    block = "\n".join(",".join(f"{i * j % 977}.25" for j in range(1, 401)) for i in range(1, 401)) + "\n"
    (tmp_path / "own.csv").write_text(100 * block)
    _check([(str(tmp_path / "own.csv"), {"header": False})], size=4 * 40_000 * 400)


def _check(asked, size):
    """Read files in one process, and compare the peak memory of each with the size of its data."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory is not kept for the next file
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [path for path, *_ in found] == [path for path, _ in asked]
    for path, came, ratio in found:
        assert came == size
        # on a busy machine the measurement may miss the peak, so the lower limit is loose
        assert 0.2 < ratio < 1.6, f"{path}: {ratio:.2f} times the size of its data"


def test_no_column_or_row_is_lost_in_pieces(tmp_path, monkeypatch):
    """Also with a column of labels between two pieces, and for arrays stored column by column."""
    monkeypatch.setattr(arrays, "BLOCK", 100)
    monkeypatch.setattr(tables, "_COLUMNS", 2)
    monkeypatch.setattr(tables, "_ROWS", 7)
    for label in (0, 3, 6, -1):
        x = np.random.default_rng(0).normal(size=(49, 7))
        x[:, label] = np.arange(49)
        rest = np.delete(x, label, 1)
        for order in "CF":
            np.save(tmp_path / "x.npy", np.asarray(x, order=order))
            np.savez(tmp_path / "x.npz", x=np.asarray(rest, order=order), y=x[:, label])
            pq.write_table(pa.table({f"c{i}": x[:, i] for i in range(7)}), tmp_path / "x.parquet", row_group_size=10)
            for file, name in (("x.npy", label), ("x.npz", "y"), ("x.parquet", label)):
                data = load(tmp_path / file, label=name, dtype=torch.float64)
                for part, rows in data.labels.items():
                    np.testing.assert_array_equal(getattr(data, part), rest[rows])
    cube = np.random.default_rng(0).normal(size=(49, 4, 5))
    for order in "CF":
        np.save(tmp_path / "x.npy", np.asarray(cube, order=order))
        data = load(tmp_path / "x.npy", dtype=torch.float64, split=(49, 0, 0))
        assert sorted(data.train.flatten(1).tolist()) == sorted(cube.reshape(49, -1).tolist())


def test_noise_and_moments_do_not_depend_on_the_size_of_pieces(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (200, 30)).astype(np.uint8))
    how = [
        {"levels": 256, "dequantize": True},
        {"levels": 256, "binarize": "sample"},
        {"standardize": True, "dtype": torch.float64},
    ]
    whole = [load(tmp_path / "x.npy", **each).train for each in how]
    monkeypatch.setattr(arrays, "BLOCK", 1000)
    monkeypatch.setattr(preparation, "BLOCK", 1000)
    parts = [load(tmp_path / "x.npy", **each).train for each in how]
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-13, atol=1e-13)
