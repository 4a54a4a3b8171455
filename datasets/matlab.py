"""Numeric arrays of MATLAB files, levels 4 and 5, whose names and shapes are known beforehand.

A level 5 file is a header of 128 bytes and then elements, each a tag (type, number of bytes) and its data. An array is
an element of sub-elements: flags, dimensions, name, values, where values may be stored in a smaller type than the
array's. Elements may be compressed. A level 4 file is arrays one after the other, each with a header of 20 bytes.
Values stand column by column. Cells, objects and functions are passed over, never made.
"""

from __future__ import annotations

__all__ = ["read_mat"]

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .streams import Stream, read_exactly

_MATRIX, _COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC = range(6, 16)  # classes double, single, int8 ... uint64
_LEVEL4 = ("f8", "f4", "i4", "i2", "u2", "u1")


def read_mat(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, NDArray[np.generic]]:
    """Read arrays of a MATLAB file.

    Args:
        path: the file, of level 4 or 5 (``save -v6`` or ``-v7``).
        shapes: the shape that each array must have, by name; others are passed over.

    Returns:
        The arrays, by name.

    Raises:
        ValueError: if the file is another kind of file, or an array is missing, or has another shape.
    """
    found: dict[str, NDArray[np.generic]] = {}
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(0)
        level5 = len(head) == 128 and head[126:] in (b"IM", b"MI") and 0 not in head[:4]
        try:
            for name, values in (_level5 if level5 else _level4)(file, path, shapes):
                found[name] = values
        except (struct.error, zlib.error) as error:
            raise ValueError(f"{path} is no whole MATLAB file of level 4 or 5: {error}") from error
    if absent := [name for name in shapes if name not in found]:
        raise ValueError(f"{path} holds no numeric array called {', '.join(absent)}")
    return found


def _level5(
    file: BinaryIO, path: Path, shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    order = "<" if file.read(128)[126:] == b"IM" else ">"
    size = path.stat().st_size
    while tag := file.read(8):
        kind, length = struct.unpack(f"{order}II", tag)
        end = file.tell() + length
        if end > size:
            raise ValueError(
                f"{path} is cut short: an element claims {length} bytes, of which {size - end + length} exist"
            )
        stream: Stream = file
        if kind == _COMPRESSED:
            stream = _Inflated(file, length)
            kind, _ = struct.unpack(f"{order}II", stream.read(8))
        if kind == _MATRIX:
            yield from _matrix(stream, order, path, shapes)
        file.seek(end)


def _matrix(
    stream: Stream, order: str, path: Path, shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    head = _element(stream, order, path, most=8)
    flags = int(head[0]) if head.size else 0
    if flags & 255 not in _NUMERIC:
        return
    shape = tuple(_element(stream, order, path, most=64).tolist())
    name = _element(stream, order, path, most=256).tobytes().decode("latin-1")
    if name not in shapes:
        return
    _check_shape(path, name, shape, shapes[name])
    if flags & 0x800:
        raise ValueError(f"{path}: {name} is complex, but numbers were expected")
    values = _element(stream, order, path, most=8 * math.prod(shape))
    if values.size != math.prod(shape):
        raise ValueError(f"{path}: {name} holds {values.size} values, but its header claims {shape}")
    yield name, values.reshape(shape, order="F")


def _element(stream: Stream, order: str, path: Path, most: int) -> NDArray[np.generic]:
    """One sub-element of numbers; small ones stand in the second half of their tag."""
    tag = bytes(read_exactly(stream, 8, path))
    kind, length = struct.unpack(f"{order}II", tag)
    if kind >> 16:
        kind, length = kind & 0xFFFF, kind >> 16
        body = tag[4 : 4 + length]
        padding = 0
    else:
        if length > most:
            raise ValueError(f"{path}: an element claims {length} bytes where at most {most} are expected")
        body = bytes(read_exactly(stream, length, path))
        padding = -length % 8
    if kind not in _TYPES:
        raise ValueError(f"{path}: an element is of type {kind}, where numbers were expected")
    stream.read(padding)
    dtype = np.dtype(order + _TYPES[kind])
    if len(body) != length or length % dtype.itemsize:
        raise ValueError(f"{path}: an element of {len(body)} bytes holds no whole number of {dtype} values")
    return np.frombuffer(body, dtype=dtype)


def _level4(
    file: BinaryIO, path: Path, shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    size = path.stat().st_size
    while head := file.read(20):
        order = "<" if struct.unpack("<i", head[:4])[0] < 1000 else ">"
        code, rows, columns, complex_, length = struct.unpack(f"{order}5i", head)
        kind = code % 1000
        if (
            code // 1000 not in (0, 1)
            or kind // 10 > 5
            or kind % 10 > 2
            or min(rows, columns) < 0
            or not 0 < length <= 256
        ):
            raise ValueError(f"{path} is no MATLAB file of level 4 or 5; save it with -v7 in MATLAB")
        name = file.read(length).rstrip(b"\0").decode("latin-1")
        dtype = np.dtype(order + _LEVEL4[kind // 10])
        claimed = rows * columns * dtype.itemsize * (2 if complex_ else 1)
        if claimed > size - file.tell():
            raise ValueError(f"{path} is cut short: {name} claims {claimed} bytes, of which {size - file.tell()} exist")
        end = file.tell() + claimed
        if name in shapes and not kind % 10 and not complex_:
            _check_shape(path, name, (rows, columns), shapes[name])
            body = read_exactly(file, claimed, path)
            yield name, np.frombuffer(body, dtype=dtype).reshape((rows, columns), order="F")
        file.seek(end)


def _check_shape(path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    if shape != expected:
        raise ValueError(f"{path}: {name} has the shape {shape}, but {expected} was expected: it is another file")


class _Inflated:
    """What a compressed element holds, inflated as far as it is read."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file, self.left, self.inflate = file, length, zlib.decompressobj()

    def read(self, size: int, /) -> bytes:
        piece = b""
        while size and not piece and not self.inflate.eof:
            packed = self.inflate.unconsumed_tail
            if not packed:
                packed = self.file.read(min(2**16, self.left))
                self.left -= len(packed)
            if not packed:
                break
            piece = self.inflate.decompress(packed, size)
        return piece
