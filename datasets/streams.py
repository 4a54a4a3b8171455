"""Reading files that may lie: what a header claims is held against the file's size before anything is allocated."""

from __future__ import annotations

__all__ = ["LIMIT", "check_claim", "read_exactly", "read_idx", "read_npy", "read_npz", "read_tar"]

import gzip
import math
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

LIMIT = 4 * 2**30
_CHUNK = 2**20
_DEFLATE = 1032  # DEFLATE never expands by more
_HEADER = 10_000


class Stream(Protocol):
    """What has a ``read``."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes."""


def read_exactly(stream: Stream, size: int, path: Path) -> bytearray:
    """So many bytes of a stream, in pieces, so that a false size is found out before it is allocated.

    Raises:
        ValueError: if the stream ends before.
    """
    body = bytearray()
    while len(body) < size:
        piece = stream.read(min(_CHUNK, size - len(body)))
        if not piece:
            raise ValueError(f"{path} is cut short: {len(body)} bytes remain where its header claims {size}")
        body += piece
    return body


def check_claim(path: Path, claimed: int, available: int, limit: int = LIMIT) -> None:
    """Hold a claimed number of bytes against what can be there and against a limit.

    Raises:
        ValueError: if it exceeds either.
    """
    if claimed > available:
        raise ValueError(
            f"{path} cannot hold what its header claims: {claimed} bytes, of which at most {available} exist"
        )
    if claimed > limit:
        raise ValueError(
            f"{path} would take {claimed} bytes of memory, more than the limit of {limit}: pass limit={claimed}"
        )


def read_idx(path: Path, limit: int = LIMIT) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes (LeCun's MNIST format).

    Args:
        path: the file.
        limit: bytes that it may take in memory.

    Returns:
        The array that the header describes.

    Raises:
        ValueError: if the header is not that of such a file, or claims another size than the file has.
    """
    with gzip.open(path) as stream:
        try:
            zeros, kind, rank = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != 8 or not 1 <= rank <= 4:
                raise ValueError(f"{path} is not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
            check_claim(path, math.prod(shape), _DEFLATE * path.stat().st_size, limit)
            body = read_exactly(stream, math.prod(shape), path)
            if stream.read(1):
                raise ValueError(f"{path} holds more than the {len(body)} values that its header claims: {shape}")
        except struct.error as error:
            raise ValueError(f"{path} is not an IDX file: its header is cut short") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}; download it again") from error
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def read_npy(path: Path, limit: int = LIMIT) -> NDArray[np.generic]:
    """Read a ``.npy`` file of numbers or booleans; never a pickled one.

    Args:
        path: the file.
        limit: bytes that it may take in memory.

    Returns:
        The array.

    Raises:
        ValueError: if it is no such file, holds objects, or its header claims another size than the file has.
    """
    with path.open("rb") as stream:
        return _read_array(stream, path, path.stat().st_size, limit)


def read_npz(path: Path, limit: int = LIMIT) -> dict[str, NDArray[np.generic]]:
    """Read all arrays of a ``.npz`` file; never pickled ones.

    Args:
        path: the file.
        limit: bytes that all of them together may take in memory.

    Returns:
        Arrays by name.

    Raises:
        ValueError: as :func:`read_npy`, or if the file is no zip archive of arrays.
    """
    size, arrays = path.stat().st_size, {}
    try:
        with zipfile.ZipFile(path) as archive:
            check_claim(path, sum(member.file_size for member in archive.infolist()), _DEFLATE * size, limit)
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise ValueError(f"{path} holds {member.filename!r}, which is no array")
                with archive.open(member) as stream:
                    arrays[member.filename[:-4]] = _read_array(stream, path, member.file_size, limit)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from error
    return arrays


def read_tar(path: Path, members: dict[str, int]) -> dict[str, bytes]:
    """Read members of a gzipped tar file into memory; nothing is written to disk.

    Args:
        path: the file.
        members: the size in bytes that each member must have, by name; others are passed over.

    Returns:
        Contents by name.

    Raises:
        ValueError: if a member is missing, is no plain file or has another size, or if the whole inflates to much more
            than the members.
    """
    found = {}
    try:
        with gzip.open(path) as inflated:
            bounded = _Bounded(inflated, sum(members.values()) + _CHUNK, path)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if member.name not in members:
                        continue
                    size = members[member.name]
                    if not member.isfile() or member.size != size:
                        raise ValueError(f"{path}: {member.name} is no file of {size} bytes, but claims {member.size}")
                    found[member.name] = archive.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole .tar.gz file: {error}; download it again") from error
    if absent := [name for name in members if name not in found]:
        raise ValueError(f"{path} does not hold {', '.join(absent)}")
    return found


class _Bounded:
    """A stream that refuses to give more than so many bytes."""

    def __init__(self, stream: Stream, most: int, path: Path) -> None:
        self.stream, self.left, self.path = stream, most, path

    def read(self, size: int, /) -> bytes:
        if size > self.left:
            raise ValueError(f"{self.path} inflates to more than the files that it should hold: it is another file")
        self.left -= size
        return self.stream.read(size)


def _read_array(stream: Stream, path: Path, size: int, limit: int) -> NDArray[np.generic]:
    header = _Counted(stream)
    try:
        version = npy.read_magic(header)  # type: ignore[arg-type]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(header, max_header_size=_HEADER)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if dtype.kind not in "biuf":
        what = "pickled objects, which are not loaded: they can run code" if dtype.hasobject else f"values of {dtype}"
        raise ValueError(f"{path} holds {what}; save an array of numbers")
    claimed = math.prod(shape) * dtype.itemsize
    check_claim(path, claimed, size - header.count, limit)
    if claimed != size - header.count:
        raise ValueError(
            f"{path} holds {size - header.count} bytes of values, but its header claims {shape} of {dtype}"
        )
    body = read_exactly(stream, claimed, path)
    return np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if fortran else "C")


class _Counted:
    """A stream that counts what was read, and gives no more than a header can be."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.count = stream, 0

    def read(self, size: int, /) -> bytes:
        if self.count + size > _HEADER + 16:
            raise ValueError(f"its header claims {size} bytes, more than {_HEADER}")
        piece = self.stream.read(size)
        self.count += len(piece)
        return piece
