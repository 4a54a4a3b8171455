"""Checkpoints: plain tensors and numbers, written whole or not at all, read without running anything."""

from __future__ import annotations

__all__ = ["read", "write"]

import os
import pickle
import platform
from pathlib import Path
from typing import Any

import pyro
import torch

FORMAT = 1


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint: to a temporary file first, so that a crash leaves the last good one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": str(torch.__version__), "pyro": pyro.__version__, "python": platform.python_version()}
    partial = target.with_name(target.name + f".{os.getpid()}.partial")
    torch.save({"jensen_checkpoint": FORMAT, "versions": versions, **state}, partial)
    os.replace(partial, target)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is torn, or not a checkpoint of :func:`~jensen.inference.fit`.
    """
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is torn or of another kind ({error}); delete it and start again"
        ) from error
    if not isinstance(state, dict) or state.get("jensen_checkpoint") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint written by fit in format {FORMAT}")
    return state
