"""``jensen sample``: sample data from the model of a run; the file extension sets the format."""

from __future__ import annotations

__all__ = ["run"]

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jensen.inference import decode, simulate
from jensen.kernel.randomness import private_randomness
from jensen.results.files import whole

from .memory import of_machine, size_of
from .names import suggestion
from .report import images_of
from .runs import RunFolder
from .terminal import report


def run(options: argparse.Namespace, progress: bool) -> None:
    """Sample from the model of a run, and write the samples to a file."""
    if options.n < 1:
        raise ValueError(f"-n must be at least 1, but got {options.n}")
    ending = options.out.suffix.lower()
    if ending not in _WRITERS:
        raise ValueError(f"--out {options.out}: there is no format {ending!r}: {suggestion(ending, _WRITERS)}")
    folder = RunFolder.open(options.run)
    facts = folder.configuration["facts"]
    if ending in _PICTURES and facts["image_shape"] is None:
        raise ValueError(
            f"--out {options.out} is a figure, but {facts['name']} holds no images: use --out FILE.csv or FILE.npz"
        )
    model, _, _ = folder.trained()
    numbers = facts["features"] + sum(shape.numel() for shape in model.latents.values())  # type: ignore[operator]
    if (needed := _COPIES * 4.0 * options.n * numbers) > of_machine():
        raise MemoryError(
            f"-n {options.n} needs about {size_of(needed)} of memory, but this machine has {size_of(of_machine())}: "
            "sample fewer at a time, each time with another --seed"
        )
    with private_randomness(options.seed, "sample"):
        latents, x = simulate(model, options.n)
        arrays = {"x": decode(model, latents) if options.mean else x, **latents}
    with whole(options.out) as partial:
        _WRITERS[ending](partial, {name: values.cpu() for name, values in arrays.items()}, facts)
    x = arrays["x"]
    kind = "means E[x | z], z ~ p(z)" if options.mean else "samples"
    document = {"run": str(folder.path), "out": str(options.out), "shape": list(x.shape), "seed": options.seed}
    report(f"{options.out} holds {len(x)} {kind}", {**document, "mean": options.mean}, options.json)


Arrays = dict[str, Tensor]
_COPIES = 6  # of the samples: noise, samples, hidden layers, the file


def _npy(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    np.save(path, arrays["x"].numpy(), allow_pickle=False)


def _npz(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    np.savez_compressed(path, **{name: values.numpy() for name, values in arrays.items()})  # type: ignore[arg-type]


def _csv(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    x = arrays["x"].double().numpy()
    header = ",".join(f"x{i}" for i in range(1, x.shape[1] + 1))
    np.savetxt(path, x, fmt="%.9g", delimiter=",", header=header, comments="")


def _picture(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    columns = max(1, round(len(arrays["x"]) ** 0.5))
    images_of(arrays["x"], facts, columns).figure.figure.savefig(path, dpi=300)


_PICTURES = (".png", ".pdf")
_WRITERS: dict[str, Callable[[Path, Arrays, dict[str, Any]], None]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".png": _picture,
    ".pdf": _picture,
}
