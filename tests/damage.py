"""Damage to files: flipped bits; inserted, removed, repeated or zeroed bytes; truncation.

A reader of a damaged file may return the result of the undamaged one, or raise the documented error. ``KINDS`` states
for each kind of file whether a digest or checksum of its contents makes every other result a failure.
"""

import csv
import gzip
import random
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jensen.cli.runs import RunFolder
from jensen.datasets import load
from jensen.datasets.files import File
from jensen.datasets.published import _read_idx
from jensen.guides import ExactPosterior
from jensen.inference import Evidence, History, evaluate, fit, restore
from jensen.models import PPCA

_CONFIGURATION = {
    "data": {
        "source": "digits",
        "binarize": None,
        "dequantize": None,
        "seed": 0,
        "label": None,
        "levels": None,
        "image_shape": None,
        "standardize": False,
    },
    "facts": {
        "name": "digits",
        "features": 64,
        "train": 1197,
        "validation": 200,
        "test": 400,
        "image_shape": [8, 8],
        "channels": 1,
        "value_range": [0.0, 1.0],
        "levels": 17,
        "bits_offset": 4.0,
        "licence": "none stated",
        "citation": "",
    },
    "pair": {
        "model": "ppca",
        "guide": "exact",
        "latent": [2],
        "hidden": [[8]],
        "likelihood": None,
        "components": None,
    },
    "training": {
        "objective": "elbo",
        "particles": 1,
        "gradient": "standard",
        "alpha": None,
        "beta": None,
        "epochs": 2,
        "batch_size": 20,
        "lr": 0.001,
        "schedule": "constant",
        "patience": None,
        "seed": 0,
    },
}


def _flat(value):
    """A comparable form: tensors as bytes, so that NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if hasattr(value, "__dict__"):
        return _flat(vars(value))
    if isinstance(value, dict):
        return tuple((k, _flat(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_flat, value))
    return repr(value)


def _pair():
    model = PPCA(3, latent=2)
    return model, ExactPosterior(model)


def _checkpoint(path):
    model, guide = _pair()
    history = restore(model, guide, path)
    return _flat([*model.state_dict().values(), history])


def _resumed(path):
    model, guide = _pair()
    x = torch.linspace(-1, 1, 60).reshape(20, 3)
    fit(model, guide, x, epochs=2, checkpoint=path, resume=True, seed=0, progress=False)
    return _flat(list(model.state_dict().values()))


def _rows(path, **how):
    data = load(str(path), **how)
    return _flat([data.train, data.validation, data.test, *data.labels.values(), list(data.classes)])


KINDS = {  # file: (reader, whether every change of its contents is detectable)
    "checkpoint.pt": (_checkpoint, True),
    "old/checkpoint.pt": (_resumed, False),
    "configuration.json": (lambda path: _flat(RunFolder.open(path.parent).configuration), True),
    "history.json": (lambda path: _flat(History.from_json(path)), True),
    "evidence.json": (lambda path: _flat(Evidence.from_json(path)), True),
    "own.npz": (lambda path: _rows(path, label="y"), True),
    "images.gz": (lambda path: _read_idx(File(path.parent.name, path.name, None)).tobytes(), True),
    "own.npy": (_rows, False),
    "own.csv": (lambda path: _rows(path, label="kind"), False),
    "own.parquet": (lambda path: _rows(path, label="kind"), False),
}


def make_files(folder):
    """An undamaged file of each kind."""
    torch.manual_seed(0)
    model, guide = _pair()
    x = torch.linspace(-1, 1, 60).reshape(20, 3)
    history = fit(model, guide, x, epochs=2, checkpoint=folder / "checkpoint.pt", seed=0, progress=False)
    (folder / "old").mkdir()
    torch.save(torch.load(folder / "checkpoint.pt", weights_only=True), folder / "old" / "checkpoint.pt")
    with ExitStack() as stack:
        RunFolder.begin(folder / "run", _CONFIGURATION, False, stack)
    (folder / "run" / "configuration.json").rename(folder / "configuration.json")
    (folder / "run").rmdir()
    history.to_json(folder / "history.json")
    evaluate(model, guide, x, 20, seed=0, progress=False).to_json(folder / "evidence.json")
    r = np.random.default_rng(0)
    values, kinds = r.normal(size=(40, 3)), r.integers(0, 3, 40)
    np.savez_compressed(folder / "own.npz", x=values, y=kinds)
    np.save(folder / "own.npy", values)
    body = b"\0\0\x08\x03" + np.array([10, 4, 4], ">u4").tobytes() + r.integers(0, 256, 160, dtype=np.uint8).tobytes()
    (folder / "images.gz").write_bytes(gzip.compress(body, mtime=0))
    names = [f"kind{i}" for i in kinds]
    with (folder / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["a", "b", "c", "kind"], *([*row, k] for row, k in zip(values, names, strict=True))]
        )
    table = {name: values[:, i] for i, name in enumerate("abc")} | {"kind": names}
    pq.write_table(pa.table(table), folder / "own.parquet")


def mutated(whole, r):
    """The bytes with one to three damages."""
    body = bytearray(whole)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        place, size = r.randrange(len(body) or 1), r.choice((1, 1, 4, 16, 200))
        match r.randrange(7):
            case 0 | 1:
                body[place : place + 1] = bytes([(body[place] if body else 0) ^ 1 << r.randrange(8)])
            case 2:
                del body[place:]
            case 3:
                body[place : place + size] = bytes(len(body[place : place + size]))
            case 4:
                del body[place : place + size]
            case 5:
                body[place:place] = r.randbytes(size)
            case 6:
                body[place:place] = body[place : place + size]
    return bytes(body)


def attack(folder, name, tries, seed=0):
    """Damage a file repeatedly; count errors, equal and other results, and list failures."""
    read, told = KINDS[name]
    path, r = folder / name, random.Random(f"{name} {seed}")
    whole = path.read_bytes()
    before, found, short = read(path), Counter(), []
    for i in range(tries):
        body = mutated(whole, r)
        path.write_bytes(body)
        try:
            outcome = "same" if read(path) == before else "other"
        except ValueError as error:
            outcome = "refused" if path.stem in str(error) else "foreign"
            if outcome == "foreign":
                short.append(f"{name} {i}: the error does not name the file: {error!r:.200}")
        except FloatingPointError:
            outcome = "refused"  # values that are only known to be wrong in training
        except Exception as error:
            outcome = "foreign"
            short.append(f"{name} {i}: {type(error).__name__}: {error!s:.200}")
        if outcome == "other" and told:
            short.append(f"{name} {i}: another result, without a word")
        found[outcome] += 1
    path.write_bytes(whole)
    return {"attack": f"damaged {name}", "tries": tries, "refused": found["refused"], "same": found["same"]} | {
        "other": found["other"],
        "short": short,
    }
