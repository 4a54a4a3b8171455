"""Files that are written whole or not at all, and read without running anything."""

from __future__ import annotations

__all__ = ["check_schema", "read_checkpoint", "whole", "write_checkpoint"]

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_CHECKPOINT = 1


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside this one to write to; it takes its place where nothing failed, so that a crash leaves the last one.

    Folders on the way are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_schema(schema: int, newest: int, what: str | os.PathLike[str]) -> None:
    """Raise a ValueError if the schema version of a file is newer than the newest that this version of jensen reads."""
    if schema > newest:
        raise ValueError(
            f"{what} has schema version {schema}, but jensen {version('jensen')} reads versions up to {newest}: "
            "install the version of jensen that wrote it, or a later one"
        )


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write plain tensors and numbers, whole or not at all, with the schema version and those of the libraries."""
    versions = {"torch": str(torch.__version__), "pyro": version("pyro-ppl"), "python": platform.python_version()}
    with whole(path) as partial:
        torch.save({"jensen_checkpoint": _CHECKPOINT, "versions": versions, **state}, partial)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, with ``weights_only=True``: nothing in the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is torn, of another kind, or of a newer schema version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of bytes that are no checkpoint, the reader raises anything
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is torn or of another kind ({error}); delete it and start again"
        ) from error
    schema = state.get("jensen_checkpoint") if isinstance(state, dict) else None
    if not isinstance(schema, int):
        raise ValueError(f"{path} is not a checkpoint written by fit; give the file named in fit(..., checkpoint=...)")
    check_schema(schema, _CHECKPOINT, path)
    return dict(state)
