"""Readers of array files: ``.npy`` and ``.npz`` by NumPy, ``.mat`` by SciPy. Pickled objects are never loaded.

``.npy`` and ``.npz`` files are read in pieces (:class:`Pieces`), so that memory holds only one whole copy of the data.
"""

from __future__ import annotations

__all__ = ["BLOCK", "LIMIT", "Pieces", "check_size", "of_sparse", "read_mat", "read_matlab", "read_npy", "read_npz"]

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

LIMIT = 4 * 2**30
BLOCK = 2**22  # bytes read, checked or copied at once
_SHOWN = 10  # arrays named in a message
_MATLAB = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def check_size(path: Path | str, size: int, limit: int) -> None:
    """Check the bytes that data would take in memory against a limit.

    Raises:
        ValueError: if they exceed it.
    """
    if size > limit:
        raise ValueError(
            f"{path} would take {size} bytes of memory, more than the limit of {limit}: pass limit={size} to allow it"
        )


@dataclass(frozen=True)
class Pieces:
    """An array that is read in pieces.

    Attributes:
        shape: of the whole array.
        dtype: of the whole array.
        read: reads it: yields pairs of an index and the values there, which together cover the array once. The index is
            ``(rows, ..., columns)`` if the array has at least two dimensions.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]]

    @staticmethod
    def of(x: NDArray[np.generic]) -> Pieces:
        """The pieces of an array in memory.

        Example:
            >>> x = np.arange(6.0).reshape(3, 2)
            >>> bool((Pieces.of(x).whole() == x).all())
            True
        """
        step = max(1, BLOCK // max(1, x[:1].nbytes)) if x.ndim else 1
        places = [_place(x.shape, i, step, False) for i in range(0, len(x) if x.ndim else 1, step)]
        return Pieces(x.shape, x.dtype, lambda: ((place, x[place]) for place in places))

    def whole(self) -> NDArray[np.generic]:
        """The array in memory."""
        x: NDArray[np.generic] = np.empty(self.shape, self.dtype)
        for place, values in self.read():
            x[place] = values
        return x

    def select(self, kept: Sequence[int]) -> Pieces:
        """Some columns of an array [N, X], in their order."""
        n, width = self.shape
        places = np.asarray(kept)

        def read() -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
            for (rows, _, columns), values in self.read():
                start, stop, _ = columns.indices(width)
                first, last = np.searchsorted(places, [start, stop]).tolist()
                if first < last:
                    yield (rows, ..., slice(first, last)), values[:, places[first:last] - start]

        return Pieces((n, len(kept)), self.dtype, read)

    def column(self, column: int) -> NDArray[np.generic]:
        """One column of an array [N, X]."""
        x: NDArray[np.generic] = np.empty(self.shape[0], self.dtype)
        for (rows, _, columns), values in self.read():
            start, stop, _ = columns.indices(self.shape[1])
            if start <= column < stop:
                x[rows] = values[:, column - start]
        return x


def _place(shape: tuple[int, ...], start: int, step: int, fortran: bool) -> tuple[Any, ...]:
    """The index of ``step`` rows, or of columns if the array is stored column by column."""
    some, every = slice(start, start + step), slice(None)
    if len(shape) < 2:
        return (some,) * len(shape)
    return (every, ..., some) if fortran else (some, ..., every)


def read_npy(path: Path, limit: int = LIMIT) -> Pieces:
    """The array of a ``.npy`` file.

    Args:
        path: the file.
        limit: the maximal bytes of the array.

    Returns:
        The array, readable in pieces.

    Raises:
        ValueError: if the file has another format, is truncated or too long, contains objects, or exceeds the limit.
    """

    def refuse(error: Exception) -> ValueError:
        return ValueError(
            f"{path} is not a complete .npy file of numbers (pickled objects are never loaded): save the array again "
            f"({error})"
        )

    x = _pieces(path.stat().st_size, lambda: path.open("rb"), refuse)
    check_size(path, math.prod(x.shape) * x.dtype.itemsize, limit)
    return x


def read_npz(
    path: Path, label: str | int | None = None, limit: int = LIMIT, member: str | None = None
) -> tuple[Pieces, NDArray[np.generic] | None]:
    """Read the data and labels of a ``.npz`` file; other arrays are not read.

    Args:
        path: the file.
        label: the name of the array of labels; any other value is a column of the data.
        limit: the maximal bytes of its arrays in memory.
        member: the name of the array of data. None: the one called ``x``, or the only numeric one besides the labels.

    Returns:
        The data, readable in pieces (also of a sparse matrix from ``scipy.sparse.save_npz``); and the labels, if
        ``label`` names an array.

    Raises:
        ValueError: if the file is not a complete ``.npz`` file, exceeds the limit, has no such array or several arrays
            of data, or the array contains objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive, limit)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if {"format", "shape", "data"} <= set(names) and member is None:
                return _read_sparse(path, limit), None
            numeric = [name for name in names if _is_numeric(archive, name)]
            named = _member_of(path, names, numeric, label, member, lambda name: _described(path, archive, name))
            x = _member(path, archive, named)
            return x, _member(path, archive, str(label)).whole() if label in names else None
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:  # OSError: an offset before the file
        raise ValueError(f"{path} is not a complete .npz file: save the arrays again ({error})") from error


def _member_of(
    path: Path,
    names: list[str],
    numeric: list[str],
    label: str | int | None,
    member: str | None,
    described: Callable[[str], str],
) -> str:
    """The name of the data array of a file."""
    held = ", ".join(map(described, names[:_SHOWN])) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    if isinstance(label, str) and label not in names and not re.fullmatch("-?[0-9]+", label):
        raise ValueError(f"{path} has no array {label!r} for label=; it has {held}")
    if member is not None:
        if member not in names:
            raise ValueError(f"{path} has no array {member!r} for member=; it has {held}")
        return member
    if "x" in names and label != "x":
        return "x"
    rest = [name for name in numeric if name != label] or [name for name in names if name != label]
    if len(rest) == 1:
        return rest[0]
    named = next(iter(rest), "x")
    raise ValueError(
        f"{path} contains {held}: it must have one array of data or one called x; select one, for example with "
        f"member={named!r}, in a shell --member {named}"
    )


def _is_numeric(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether a member is a numeric array with data points in rows."""
    try:
        with archive.open(f"{name}.npy") as stream:
            shape, _, dtype = _header(stream)
    except (KeyError, *_TORN):
        return False
    return bool(shape) and dtype.kind in "biuf"


def _read_sparse(path: Path, limit: int) -> Pieces:
    from scipy import sparse  # imported here because it is slow

    try:
        return of_sparse(sparse.load_npz(path), path, limit)
    except (*_TORN, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a complete sparse matrix: save it again ({error})") from error


def of_sparse(x: Any, source: Path | str, limit: int) -> Pieces:
    """A SciPy sparse matrix, made dense in pieces.

    Raises:
        ValueError: if the dense matrix would exceed the limit, or indices are out of range.
    """
    check_size(source, math.prod(x.shape) * x.dtype.itemsize, limit)
    if x.format in ("csr", "csc", "bsr"):
        try:
            x.check_format(full_check=True)  # indices out of range would be written outside the dense array
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{source} is not a complete sparse matrix: save it again ({error})") from error
    if len(x.shape) != 2:
        return Pieces.of(x.toarray())
    rows = x.tocsr()
    step = max(1, BLOCK // max(1, rows.shape[1] * rows.dtype.itemsize))
    starts = range(0, rows.shape[0], step)
    return Pieces(
        rows.shape,
        rows.dtype,
        lambda: ((_place(rows.shape, i, step, False), rows[i : i + step].toarray()) for i in starts),
    )


def _check_members(path: Path, archive: zipfile.ZipFile, limit: int) -> None:
    """Raise ValueError for an unknown compression, duplicate names, and total sizes above the limit."""
    members = archive.infolist()
    check_size(path, sum(member.file_size for member in members), limit)
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {member.filename} has compression method {member.compress_type}, but numpy.savez and "
                "numpy.savez_compressed write 0 or 8: save it again"
            )
    names = [member.filename for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{path} contains several members called {', '.join(twice)}: save each array under a different name"
        )


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Pieces:
    """An array; the size in its header is checked against the size of the member before it is read."""

    def refuse(error: Exception) -> ValueError:
        return ValueError(
            f"{path}: {name} is not a complete numeric array (pickled objects are never loaded): save it again, words "
            f"as x.astype(str) ({error})"
        )

    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as whole, whole.open(f"{name}.npy") as stream:
            yield stream

    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"{path} contains {name!r}, which is not an array: save it with numpy.savez")
    return _pieces(archive.getinfo(f"{name}.npy").file_size, opened, refuse)


def _pieces(
    size: int, opened: Callable[[], AbstractContextManager[IO[bytes]]], refuse: Callable[[Exception], ValueError]
) -> Pieces:
    """An array in NumPy's format; now only the header is read, and checked against the total size."""
    try:
        with opened() as stream:
            shape, fortran, dtype = _header(stream)
            claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if dtype.hasobject:
            raise ValueError("it contains objects")
        if claimed != held:
            raise ValueError(f"its header claims {claimed} bytes, {shape} of {dtype}, but it has {held}")
    except _TORN as error:
        raise refuse(error) from error
    fortran = fortran and len(shape) > 1
    first, *rest = (shape[::-1] if fortran else shape) or (1,)
    each = math.prod(rest) * dtype.itemsize
    step = max(1, BLOCK // max(1, each))

    def read() -> Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]:
        try:
            with opened() as stream:
                _header(stream)
                for start in range(0, first if claimed else 0, step):
                    n = min(step, first - start)
                    body = stream.read(n * each)
                    if len(body) < n * each:
                        raise EOFError("its values end early")
                    values = np.frombuffer(body, dtype).reshape(n, *rest)
                    yield _place(shape, start, step, fortran), values.T if fortran else values.reshape(-1, *shape[1:])
                stream.read(1)  # reading to the end checks the member's checksum
        except _TORN as error:
            raise refuse(error) from error

    return Pieces(shape, dtype, read)


_TORN = (
    ValueError,
    OverflowError,
    TokenError,
    EOFError,
    MemoryError,
    RuntimeError,
    zlib.error,
    OSError,
    zipfile.BadZipFile,
)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, column-by-column order and dtype from the header of an array."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version {version} is not one that NumPy uses for numeric arrays")
    found = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    shape, fortran, dtype = found
    if min(shape, default=0) < 0:
        raise ValueError(f"its header claims the shape {shape}")
    return shape, fortran, dtype


def _described(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        with archive.open(f"{name}.npy") as stream:
            shape, _, dtype = _header(stream)
    except (KeyError, *_TORN):
        return f"{name} (not a numeric array)"
    return f"{name} {shape}" if dtype.kind in "biufcUS" else f"{name} (not a numeric array)"


def read_mat(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, NDArray[np.generic]]:
    """Read numeric arrays of a MATLAB file by SciPy; its other arrays are not read.

    Args:
        path: the file, of level 4 or 5 (``save -v6`` or ``-v7``).
        shapes: the shape that each array must have, by name.

    Returns:
        The arrays, by name.

    Raises:
        ValueError: if the file has another format or is truncated, or an array is missing, has another shape, or is not
            of real numbers (text, cells, structs, objects).
    """
    from scipy import io  # imported here because it is slow

    try:
        _check_streams(path)
        held = {name: (shape, kind) for name, shape, kind in io.whosmat(path, appendmat=False)}
        numeric = [name for name in shapes if name in held and held[name][1] in _MATLAB]
        fit = [name for name in numeric if held[name][0] == shapes[name]]
        arrays = io.loadmat(path, appendmat=False, variable_names=fit)
    except Exception as error:  # a damaged file can raise any error in the parser
        raise _not_matlab(path, error) from error
    if absent := [f"{name} ({held[name][1]})" if name in held else name for name in shapes if name not in numeric]:
        raise ValueError(f"{path} has no numeric array called {', '.join(absent)}: it is not the expected file")
    for name in numeric:
        if name not in fit:
            raise ValueError(
                f"{path}: {name} has the shape {held[name][0]}, but {shapes[name]} was expected: it is not the "
                "expected file"
            )
        if arrays[name].dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} contains {arrays[name].dtype}, but real numbers were expected")
    return {name: arrays[name].astype(arrays[name].dtype.newbyteorder("="), copy=False) for name in shapes}


def read_matlab(
    path: Path, label: str | int | None = None, limit: int = LIMIT, member: str | None = None
) -> tuple[Pieces, NDArray[np.generic] | None]:
    """Read the data and labels of your own MATLAB file by SciPy; other arrays are not read.

    Args:
        path: the file, of level 4 or 5 (``save -v6`` or ``-v7``).
        label: the name of the array of labels; any other value is a column of the data.
        limit: the maximal bytes of its arrays in memory.
        member: the name of the array of data. None: the one called ``x``, or the only numeric one besides the labels.

    Returns:
        The data, rows first, and the labels, if ``label`` names an array.

    Raises:
        ValueError: as for :func:`read_mat`, and if there is no such array, or several arrays of data.
    """
    from scipy import io, sparse  # imported here because they are slow

    try:
        _check_streams(path, limit)
        held = {name: (shape, kind) for name, shape, kind in io.whosmat(path, appendmat=False)}
    except Exception as error:  # a damaged file can raise any error in the parser
        raise _not_matlab(path, error) from error
    numeric = [name for name, (_, kind) in held.items() if kind in _MATLAB or kind == "sparse"]
    named = _member_of(path, list(held), numeric, label, member, lambda name: f"{name} {held[name][0]}")
    wanted = [named, str(label)] if label in held else [named]
    for name in wanted:
        if name not in numeric:
            raise ValueError(f"{path}: {name} contains {held[name][1]}, but a numeric array was expected")
        check_size(path, 8 * math.prod(held[name][0]), limit)
    try:
        arrays = io.loadmat(path, appendmat=False, variable_names=wanted)
    except Exception as error:
        raise _not_matlab(path, error) from error
    x = arrays[named]
    pieces = of_sparse(x, path, limit) if sparse.issparse(x) else Pieces.of(x.astype(x.dtype.newbyteorder("=")))
    return pieces, np.ravel(arrays[str(label)]) if label in held else None


def _not_matlab(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a complete MATLAB file of level 4 or 5: download it again, or save it with -v7 in MATLAB "
        f"({error})"
    )


def _check_streams(path: Path, limit: int = LIMIT) -> None:
    """Decompress every element of a level 5 MATLAB file to its end, which checks its checksum.

    SciPy stops at the last byte that it needs, before the checksum.

    Raises:
        ValueError: if an element is truncated, its checksum is wrong, or the elements exceed the limit.
    """
    with path.open("rb") as file:
        order = {b"IM": "<", b"MI": ">"}.get(file.read(128)[126:])
        if order is None:  # level 4 has no compression
            return
        total, end = 0, path.stat().st_size
        while tag := file.read(8):
            kind, size = struct.unpack(f"{order}II", tag) if len(tag) == 8 else (0, end)
            if file.tell() + size > end:
                raise ValueError("its last element is truncated")
            if kind != _COMPRESSED:
                file.seek(size, 1)
                continue
            stream, left = zlib.decompressobj(), size
            while left and (part := file.read(min(left, 2**16))):
                left -= len(part)
                while part:
                    total += len(stream.decompress(part, 2**20))
                    part = stream.unconsumed_tail
                    check_size(path, total, limit)
            if not stream.eof:
                raise ValueError("an element has no end")


_COMPRESSED = 15  # the type of a compressed element (a zlib stream)
