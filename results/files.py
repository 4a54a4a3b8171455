"""Files that are written completely or not at all, and read without running code from them.

A file is written to a temporary path in the same folder, flushed to the disk, and renamed. A checkpoint is the zip
archive of ``torch.save``; its comment is the SHA-256 of all bytes before the comment, which is checked before parsing.
"""

from __future__ import annotations

__all__ = ["check_schema", "partials", "read_checkpoint", "whole", "write_checkpoint"]

import errno
import hashlib
import os
import platform
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

_CHECKPOINT = 1
_MARK = b"jensen sha256 "


@contextmanager
def whole(path: str | os.PathLike[str], *, parents: bool = True) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path`` if the block succeeds, so a crash keeps the previous file.

    Missing parent folders are created, unless ``parents`` is False. A symbolic link is replaced by the file; its target
    does not change.

    Raises:
        OSError: if the file cannot be written; the message names the file.
    """
    target = Path(path)
    if parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")  # writers choose the format by the extension
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync(target.parent)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}: {target} could not be written", None) from error
    finally:
        with suppress(OSError):  # a read-only disk: the error above is more useful
            partial.unlink(missing_ok=True)


def partials(folder: Path) -> list[Path]:
    """The partial files that killed runs left in a folder."""
    return [*folder.glob("*.partial"), *folder.glob(".*.partial.*")]


def _sync(folder: Path) -> None:
    """Flush the folder entry of a renamed file, if the system can open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_schema(schema: int, newest: int, what: str | os.PathLike[str]) -> None:
    """Raise a ValueError if this version of jensen cannot read the schema version of a file."""
    if schema > newest:
        raise ValueError(
            f"{what} has schema version {schema}, but jensen {version('jensen')} reads versions up to {newest}: "
            "install the version of jensen that wrote it, or a newer one"
        )


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write tensors and numbers, completely or not at all, with the versions of the schema and of the libraries.

    Raises:
        OSError: if the file cannot be written, or if its folder does not exist: a folder that was removed during a run
            is an error.
    """
    versions = {"torch": str(torch.__version__), "pyro": version("pyro-ppl"), "python": platform.python_version()}
    with whole(path, parents=False) as partial:
        try:
            with partial.open("wb") as file:
                torch.save({"jensen_checkpoint": _CHECKPOINT, "versions": versions, **state}, file)
        except RuntimeError as error:  # torch raises this if a write fails
            cause = error.__context__ if isinstance(error.__context__, OSError) else None
            if cause is None and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(cause.errno if cause else errno.EIO, cause.strerror if cause else str(error)) from error
        with partial.open("rb+") as file:
            digest = _digest(file, os.fstat(file.fileno()).st_size - 2)
            file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
            file.write(_comment(digest))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, with ``weights_only=True``: no code of the file runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, was changed after writing, is not a checkpoint, or has a newer schema
            version.
    """
    with open(path, "rb") as file:
        try:
            _check_bytes(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types of errors for damaged files
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{path} cannot be read as a checkpoint, because it is damaged or another kind of file ({said}); give "
                "the file that fit(..., checkpoint=...) wrote, and if it is that file, start again without it"
            ) from error
    schema = state.get("jensen_checkpoint") if isinstance(state, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{path} is not a checkpoint written by fit: give the file of fit(..., checkpoint=...)")
    check_schema(schema, _CHECKPOINT, path)
    return dict(state)


def _comment(digest: str) -> bytes:
    """The end of the archive: the length of the comment, and the comment."""
    text = _MARK + digest.encode()
    return len(text).to_bytes(2, "little") + text


def _digest(file: IO[bytes], size: int) -> str:
    """The SHA-256 of the first bytes of a file."""
    file.seek(0)
    found = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, 2**20))):
        found.update(part)
        size -= len(part)
    return found.hexdigest()


def _check_bytes(file: IO[bytes]) -> None:
    """Raise ValueError unless a file is a complete, uncompressed archive."""
    size, end = os.fstat(file.fileno()).st_size, len(_comment("0" * 64))
    file.seek(max(0, size - end))
    tail = file.read()
    if _MARK in tail or len(tail) < end:
        if tail != _comment(_digest(file, size - end)):
            raise ValueError("its SHA-256 does not match its contents")
    elif not tail.endswith(b"\0\0") or tail[-22:-18] != b"PK\5\6":  # a file of version 0.1.0 has no comment
        raise ValueError("its end is not the end of an archive")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("its members are compressed")
        if sum(m.file_size for m in members) > size or len({m.filename for m in members}) < len(members):
            raise ValueError("its members overlap")
        if _MARK not in tail and (torn := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {torn} is wrong")
