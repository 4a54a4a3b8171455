"""Arrays in files: ``.npy`` and ``.npz`` by NumPy, ``.mat`` by SciPy. Pickled objects are never loaded."""

from __future__ import annotations

__all__ = ["LIMIT", "check_size", "read_mat", "read_npy", "read_npz"]

import math
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

LIMIT = 4 * 2**30
_MATLAB = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def check_size(path: Path, size: int, limit: int) -> None:
    """Hold the bytes that data would take in memory against a limit.

    Raises:
        ValueError: if they exceed it.
    """
    if size > limit:
        raise ValueError(
            f"{path} would take {size} bytes of memory, more than the limit of {limit}: pass limit={size} to allow it"
        )


def read_npy(path: Path, limit: int = LIMIT) -> NDArray[np.generic]:
    """The array of a ``.npy`` file, mapped from the disk.

    Args:
        path: the file.
        limit: bytes that the array may have.

    Returns:
        The array, read-only.

    Raises:
        ValueError: if the file is of another kind, is cut short or too long, holds objects, or exceeds the limit.
    """
    try:
        x = npy.open_memmap(path, mode="r")  # what numpy.load(mmap_mode="r") calls, without its way to pickles
    except (ValueError, OverflowError, TokenError) as error:
        raise ValueError(
            f"{path} is no whole .npy file of numbers (pickled objects are never loaded), save the array again: {error}"
        ) from error
    held, claimed = path.stat().st_size - x.offset, x.nbytes
    if held != claimed:
        raise ValueError(
            f"{path} holds {held} bytes of values, but its header claims {claimed}, {x.shape} of {x.dtype}: save the "
            "array again"
        )
    check_size(path, claimed, limit)
    return x


def read_npz(
    path: Path, label: str | int | None = None, limit: int = LIMIT
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """The data of a ``.npz`` file, and their labels; what else it holds is not read.

    Args:
        path: the file.
        label: the name of the array of labels.
        limit: bytes that its arrays together may take in memory.

    Returns:
        The array called ``x``, or the only one beside the labels; and the labels, if ``label`` is given.

    Raises:
        ValueError: if the file is no whole ``.npz`` file, exceeds the limit, has no array ``label`` or several of data,
            or the array holds objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive, limit)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            rest = [name for name in names if name != label]
            if label is not None and label not in names:
                held = ", ".join(_described(path, archive, name) for name in names)
                raise ValueError(f"{path} has no array {label!r} for label=; it has {held}")
            if "x" not in rest and len(rest) != 1:
                held = ", ".join(_described(path, archive, name) for name in names)
                raise ValueError(f"{path} holds {held}: one array of data is read, or the one called x; save it so")
            x = _member(path, archive, "x" if "x" in rest else rest[0])
            return x, None if label is None else _member(path, archive, str(label))
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:  # OSError: an offset before the file
        raise ValueError(f"{path} is no whole .npz file, save the arrays again: {error}") from error


def _check_members(path: Path, archive: zipfile.ZipFile, limit: int) -> None:
    """Refuse members that would grow beyond what the directory says, two of one name, and more than a limit."""
    members = archive.infolist()
    check_size(path, sum(member.file_size for member in members), limit)
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {member.filename} is compressed by method {member.compress_type}, where numpy.savez and "
                "numpy.savez_compressed write 0 or 8: save it again"
            )
    names = [member.filename for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} holds several members called {', '.join(twice)}: save each array under its own name")


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    """An array; what its header claims is held against the size of the member before it is read."""
    try:
        size = archive.getinfo(f"{name}.npy").file_size
        with archive.open(f"{name}.npy") as stream:
            shape, dtype = _header(stream)
            claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
            if claimed != held and not dtype.hasobject:
                raise ValueError(f"its header claims {claimed} bytes, {shape} of {dtype}, but {held} are there")
        with archive.open(f"{name}.npy") as stream:
            x: NDArray[np.generic] = npy.read_array(stream, allow_pickle=False)
            stream.read(1)  # at its end a member's checksum is compared
    except KeyError:
        raise ValueError(f"{path} holds {name!r}, which is no array: save it with numpy.savez") from None
    except _TORN as error:
        raise ValueError(
            f"{path}: {name} is no whole array of numbers (pickled objects are never loaded), save it again: {error}"
        ) from error
    return x


_TORN = (ValueError, OverflowError, TokenError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype that the header of an array claims."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is version {version}, in which NumPy writes no arrays of numbers")
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    return shape, dtype


def _described(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        with archive.open(f"{name}.npy") as stream:
            shape, dtype = _header(stream)
    except (KeyError, *_TORN):
        return f"{name} (no array of numbers)"
    return f"{name} {shape}" if dtype.kind in "biufcUS" else f"{name} (no array of numbers)"


def read_mat(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, NDArray[np.generic]]:
    """Numeric arrays of a MATLAB file, by SciPy; its other arrays are not read.

    Args:
        path: the file, of level 4 or 5 (``save -v6`` or ``-v7``).
        shapes: the shape that each array must have, by name.

    Returns:
        The arrays, by name.

    Raises:
        ValueError: if the file is of another kind or cut short, or an array is missing, has another shape, or holds no
            real numbers (text, cells, structs and objects do not).
    """
    from scipy import io  # here, since it takes long to import

    try:
        _check_streams(path)
        held = {name: (shape, kind) for name, shape, kind in io.whosmat(path, appendmat=False)}
        numeric = [name for name in shapes if name in held and held[name][1] in _MATLAB]
        fit = [name for name in numeric if held[name][0] == shapes[name]]
        arrays = io.loadmat(path, appendmat=False, variable_names=fit)
    except Exception as error:  # a torn file raises whatever the parser meets
        raise ValueError(
            f"{path} is no whole MATLAB file of level 4 or 5, get it again, or save it with -v7 in MATLAB: {error}"
        ) from error
    if absent := [f"{name} ({held[name][1]})" if name in held else name for name in shapes if name not in numeric]:
        raise ValueError(f"{path} holds no numeric array called {', '.join(absent)}: it is another file")
    for name in numeric:
        if name not in fit:
            raise ValueError(
                f"{path}: {name} has the shape {held[name][0]}, but {shapes[name]} was expected: it is another file"
            )
        if arrays[name].dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} holds {arrays[name].dtype}, where real numbers were expected")
    return {name: arrays[name].astype(arrays[name].dtype.newbyteorder("="), copy=False) for name in shapes}


def _check_streams(path: Path) -> None:
    """Inflate every compressed element of a MATLAB file of level 5 to its end, where its checksum stands.

    SciPy stops at the last byte that it needs.

    Raises:
        ValueError: if an element is cut short, its checksum is wrong, or the elements exceed :data:`LIMIT`.
    """
    with path.open("rb") as file:
        order = {b"IM": "<", b"MI": ">"}.get(file.read(128)[126:])
        if order is None:  # level 4, which compresses nothing
            return
        total, end = 0, path.stat().st_size
        while tag := file.read(8):
            kind, size = struct.unpack(f"{order}II", tag) if len(tag) == 8 else (0, end)
            if file.tell() + size > end:
                raise ValueError("its last element is cut short")
            if kind != _COMPRESSED:
                file.seek(size, 1)
                continue
            stream, left = zlib.decompressobj(), size
            while left and (part := file.read(min(left, 2**16))):
                left -= len(part)
                while part:
                    total += len(stream.decompress(part, 2**20))
                    part = stream.unconsumed_tail
                    check_size(path, total, LIMIT)
            if not stream.eof:
                raise ValueError("an element has no end")


_COMPRESSED = 15  # the type of an element that is a zlib stream
