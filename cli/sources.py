"""The data of a run, loaded from its settings, equal in every process; a hash identifies a file of the user."""

from __future__ import annotations

__all__ = [
    "OWN",
    "added_bits",
    "batch_transform",
    "facts",
    "flat",
    "holds_bits",
    "pick",
    "reopen",
    "settle",
]

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jensen.datasets import Dataset, load
from jensen.datasets.findings import IndexColumnWarning

from .streams import Streamed, count, is_large, opened, values_of
from .terminal import say

OWN = ("label", "header", "drop", "only", "missing", "member", "levels", "image_shape", "standardize")


_DRAWN = (1, 3)  # channels of images that figures can show


def _open(settings: Mapping[str, Any], aloud: bool = False, **more: Any) -> tuple[Dataset, bool]:
    """Load the data set of the settings ``source``, ``binarize``, ``dequantize``, ``seed`` and those of ``OWN``.

    With ``aloud``, warnings about the data are printed. The second value is whether an index column was found, that is,
    a column that numbers the rows.

    Raises:
        ValueError: for an unknown name, or settings that the data set does not allow.
        FileNotFoundError: if its files do not exist.
    """
    binarize = settings["binarize"]
    how: dict[str, Any] = {"dequantize": settings["dequantize"], "seed": settings["seed"]}
    if binarize in ("threshold", "sample"):
        how["binarize"] = binarize
    how |= {name: _as_given(settings[name]) for name in OWN if settings.get(name) is not None} | more
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        data = load(settings["source"], **how)
    if aloud:
        for text in dict.fromkeys(str(warning.message) for warning in found):
            say(f"warning: {text}")
    return data, any(issubclass(warning.category, IndexColumnWarning) for warning in found)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the names and hashes of the Parquet files of a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        return hashlib.sha256("".join(f"{file.name} {_sha256(file)}\n" for file in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_given(value: Any) -> Any:
    """A setting as it was before JSON turned tuples into lists."""
    return tuple(value) if isinstance(value, list) else value


def batch_transform(settings: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """The transform of every batch: with dynamic binarization, pixels are sampled again; else None."""
    return torch.bernoulli if settings["binarize"] == "dynamic" else None


def settle(settings: dict[str, Any], density: bool, streams: bool = False) -> tuple[dict[str, Any], Dataset, bool]:
    """Load data; grey levels are dequantized if the likelihood is a density.

    Returns the final settings, the data, and whether an index column was found.

    Args:
        settings: as for :func:`_open`; if ``dequantize`` is None, this function chooses it and prints the choice.
        density: whether the likelihood is a density.
        streams: whether a file above a quarter of the free memory is read by the batch.
    """
    if settings["binarize"] == "dynamic":
        if settings["dequantize"]:
            raise ValueError("--binarize makes zeros and ones, --dequantize makes real numbers: use only one of them")
        settings = {**settings, "dequantize": False}
    path = Path(settings["source"])
    if path.is_file() or (streams and path.is_dir()):
        digest = _sha256(path)
        settings = {**settings, "source": str(path.resolve()), "sha256": digest}
    data: Dataset
    if streams and path.exists() and is_large(settings):
        settings, indexed = {**settings, "streamed": True}, False
        data = opened(settings)
    else:
        data, indexed = _open(settings, aloud=True)
    if settings.get("label") is not None:
        classes = len(data.classes) or len(torch.cat(list(data.labels.values())).unique())
        say(f"{data.name}: --label {settings['label']} has {classes} classes")
    if settings.get("missing") is not None:
        say(f"{data.name}: {100 * _missing_of(data):.2g} % of the values are missing")
    if settings["binarize"] == "dynamic":
        values = values_of(data)
        if values.low < 0 or values.high > 1:
            raise ValueError(
                f"--binarize dynamic needs values between 0 and 1, but {data.name} holds values from {values.low:g} to "
                f"{values.high:g}: rescale them"
            )
    grey = data.levels is not None and data.levels > 2 and settings["binarize"] is None
    if density and grey and not data.dequantized and settings["dequantize"] is None:
        say(
            f"{data.name}: grey levels are dequantized, because the likelihood is a density (--no-dequantize turns "
            "this off)"
        )
        settings = {**settings, "dequantize": True}
        data, _ = _open(settings)
    if data.channels not in _DRAWN:
        say(f"{data.name}: images with {data.channels} channels are used as vectors, and figures do not show them")
        data = replace(data, image_shape=None, channels=1)
    return {**settings, "dequantize": data.dequantized if grey else settings["dequantize"]}, data, indexed


def reopen(settings: Mapping[str, Any], streams: bool = False, **more: Any) -> Dataset:
    """The data of an earlier run; ``more`` are other arguments of :func:`jensen.datasets.load`.

    Raises:
        ValueError: if the file of the user has changed, or is larger than memory and the command does not stream.
        FileNotFoundError: if it does not exist any more.
    """
    digest = settings.get("sha256")
    path = Path(settings["source"])
    if settings.get("streamed") and not streams:
        raise ValueError(
            f"the run was trained on {path} by the batch, but this command needs all data at once: use Python "
            "(jensen.inference.restore loads the model and the guide)"
        )
    if digest is not None and not path.exists():
        raise FileNotFoundError(
            f"the run was trained on {path}, but there is no such file now: restore it, or give its new path with "
            "--data FILE"
        )
    if digest is not None and _sha256(path) != digest:
        raise ValueError(f"{path} has changed since the run was started: restore the file, or train again")
    return opened(settings) if settings.get("streamed") else _open(settings, **more)[0]


def _missing_of(data: Dataset) -> float:
    """The share of the values that are missing."""
    if isinstance(data, Streamed):
        return data.values.missing / data.values.count
    parts = (data.train, data.validation, data.test)
    return sum(int(mask.sum()) for mask in data.masks.values()) / sum(x.numel() for x in parts)


def flat(data: Dataset, command: str) -> Dataset:
    """The same data, if data points are vectors.

    Raises:
        ValueError: if they are not vectors.
    """
    shape = list(data.train.shape[1:])
    if len(shape) == 1:
        return data
    images = f"for images add --image-shape {','.join(map(str, shape))}; else " if len(shape) in (2, 3) else ""
    raise ValueError(
        f"--data {data.name} has data points of shape {shape}, but {command} needs vectors: {images}flatten them, or "
        "train in Python"
    )


def holds_bits(data: Dataset) -> bool:
    """Whether every observed value is 0 or 1."""
    if isinstance(data, Streamed):
        return data.values.bits
    return all(bool(((x == 0) | (x == 1) | x.isnan()).all()) for x in (data.train, data.validation, data.test))


def facts(data: Dataset) -> dict[str, Any]:
    """Facts of the data that a run folder stores, so that figures and samples do not need the data."""
    return {
        "name": data.name,
        "features": data.train[0].numel(),
        **{split: count(data, split) for split in ("train", "validation", "test")},
        "image_shape": data.image_shape,
        "channels": data.channels,
        "value_range": data.value_range,
        "levels": data.levels,
        "bits_offset": data.bits_offset,
        "licence": data.licence,
        "citation": data.citation,
    }


def added_bits(data: Dataset) -> str:
    """The terms of :attr:`~jensen.datasets.Dataset.bits_offset`, in words."""
    grey = [f"log2 {data.levels} of the grey-level scale"] if data.dequantized else []
    own = ["the mean log2 of the standardization scale (bits refer to the original units)"]
    return " and ".join(grey + (own if data.scale is not None else []))


def pick(n: int, size: int, seed: int) -> Tensor:
    """Random positions of at most ``size`` of ``n`` rows."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]
