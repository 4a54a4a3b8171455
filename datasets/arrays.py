"""Arrays in files: ``.npy`` and ``.npz`` by NumPy, ``.mat`` by SciPy. Pickled objects are never loaded.

``.npy`` and ``.npz`` files are read a piece at a time (:class:`Pieces`), so that what is made of them is the only whole
copy in memory.
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
BLOCK = 2**22  # bytes that are read, checked or copied at once
_SHOWN = 10  # arrays that a message names
_MATLAB = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def check_size(path: Path | str, size: int, limit: int) -> None:
    """Hold the bytes that data would take in memory against a limit.

    Raises:
        ValueError: if they exceed it.
    """
    if size > limit:
        raise ValueError(
            f"{path} would take {size} bytes of memory, more than the limit of {limit}: pass limit={size} to allow it"
        )


@dataclass(frozen=True)
class Pieces:
    """An array that is read a piece at a time.

    Attributes:
        shape: of the whole array.
        dtype: of the whole array.
        read: reads it: pairs of a place and the values there, until each place was met once. A place is an index,
            ``(rows, ..., columns)`` where the array has at least two dimensions.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Iterator[tuple[tuple[Any, ...], NDArray[np.generic]]]]

    @staticmethod
    def of(x: NDArray[np.generic]) -> Pieces:
        """The pieces of an array that is in memory.

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
    """Where so many rows stand, or columns, if the array lies column by column."""
    some, every = slice(start, start + step), slice(None)
    if len(shape) < 2:
        return (some,) * len(shape)
    return (every, ..., some) if fortran else (some, ..., every)


def read_npy(path: Path, limit: int = LIMIT) -> Pieces:
    """The array of a ``.npy`` file.

    Args:
        path: the file.
        limit: bytes that the array may have.

    Returns:
        The array, to be read in pieces.

    Raises:
        ValueError: if the file is of another kind, is cut short or too long, holds objects, or exceeds the limit.
    """

    def refuse(error: Exception) -> ValueError:
        return ValueError(
            f"{path} is no whole .npy file of numbers (pickled objects are never loaded), save the array again: {error}"
        )

    x = _pieces(path.stat().st_size, lambda: path.open("rb"), refuse)
    check_size(path, math.prod(x.shape) * x.dtype.itemsize, limit)
    return x


def read_npz(
    path: Path, label: str | int | None = None, limit: int = LIMIT, member: str | None = None
) -> tuple[Pieces, NDArray[np.generic] | None]:
    """The data of a ``.npz`` file, and their labels; what else it holds is not read.

    Args:
        path: the file.
        label: the name of the array of labels; what else it is, is a column of the data.
        limit: bytes that its arrays together may take in memory.
        member: the name of the array of data. None: that called ``x``, or the only one of numbers beside the labels.

    Returns:
        The data, to be read in pieces (a sparse matrix, as ``scipy.sparse.save_npz`` writes it, too); and the labels,
        if ``label`` names an array.

    Raises:
        ValueError: if the file is no whole ``.npz`` file, exceeds the limit, has no such array or several of data, or
            the array holds objects.
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
        raise ValueError(f"{path} is no whole .npz file, save the arrays again: {error}") from error


def _member_of(
    path: Path,
    names: list[str],
    numeric: list[str],
    label: str | int | None,
    member: str | None,
    described: Callable[[str], str],
) -> str:
    """Which array of a file holds the data."""
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
        f"{path} holds {held}: one array of data is read, or the one called x; say which it is, as by "
        f"member={named!r}, in a shell --member {named}"
    )


def _is_numeric(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether a member is an array of numbers with data in rows."""
    try:
        with archive.open(f"{name}.npy") as stream:
            shape, _, dtype = _header(stream)
    except (KeyError, *_TORN):
        return False
    return bool(shape) and dtype.kind in "biuf"


def _read_sparse(path: Path, limit: int) -> Pieces:
    from scipy import sparse  # here, since it takes long to import

    try:
        return of_sparse(sparse.load_npz(path), path, limit)
    except (*_TORN, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} is no whole sparse matrix, save it again: {error}") from error


def of_sparse(x: Any, source: Path | str, limit: int) -> Pieces:
    """A sparse matrix of SciPy's, made dense a piece at a time.

    Raises:
        ValueError: if the dense one would exceed the limit, or its indices lie beyond its shape.
    """
    check_size(source, math.prod(x.shape) * x.dtype.itemsize, limit)
    if x.format in ("csr", "csc", "bsr"):
        try:
            x.check_format(
                full_check=True
            )  # which stand beyond its shape would be written beyond the dense one's memory
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{source} is no whole sparse matrix, save it again: {error}") from error
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


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Pieces:
    """An array; what its header claims is held against the size of the member before it is read."""

    def refuse(error: Exception) -> ValueError:
        return ValueError(
            f"{path}: {name} is no whole array of numbers (pickled objects are never loaded), save it again, words as "
            f"x.astype(str): {error}"
        )

    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as whole, whole.open(f"{name}.npy") as stream:
            yield stream

    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"{path} holds {name!r}, which is no array: save it with numpy.savez")
    return _pieces(archive.getinfo(f"{name}.npy").file_size, opened, refuse)


def _pieces(
    size: int, opened: Callable[[], AbstractContextManager[IO[bytes]]], refuse: Callable[[Exception], ValueError]
) -> Pieces:
    """An array in NumPy's format, of which the header alone is read now, and held against the size of it all."""
    try:
        with opened() as stream:
            shape, fortran, dtype = _header(stream)
            claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if dtype.hasobject:
            raise ValueError("it holds objects")
        if claimed != held:
            raise ValueError(f"its header claims {claimed} bytes, {shape} of {dtype}, but {held} are there")
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
                stream.read(1)  # at its end a member's checksum is compared
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
    """Shape, whether it lies column by column, and dtype, as the header of an array claims."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is version {version}, in which NumPy writes no arrays of numbers")
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
        raise _not_matlab(path, error) from error
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


def read_matlab(
    path: Path, label: str | int | None = None, limit: int = LIMIT, member: str | None = None
) -> tuple[Pieces, NDArray[np.generic] | None]:
    """The data of a MATLAB file of your own, and their labels, by SciPy; what else it holds is not read.

    Args:
        path: the file, of level 4 or 5 (``save -v6`` or ``-v7``).
        label: the name of the array of labels; what else it is, is a column of the data.
        limit: bytes that its arrays may take in memory.
        member: the name of the array of data. None: that called ``x``, or the only one of numbers beside the labels.

    Returns:
        The data, rows first, and the labels, if ``label`` names an array.

    Raises:
        ValueError: as :func:`read_mat` does, and if there is no such array, or several of data.
    """
    from scipy import io, sparse  # here, since they take long to import

    try:
        _check_streams(path, limit)
        held = {name: (shape, kind) for name, shape, kind in io.whosmat(path, appendmat=False)}
    except Exception as error:  # a torn file raises whatever the parser meets
        raise _not_matlab(path, error) from error
    numeric = [name for name, (_, kind) in held.items() if kind in _MATLAB or kind == "sparse"]
    named = _member_of(path, list(held), numeric, label, member, lambda name: f"{name} {held[name][0]}")
    wanted = [named, str(label)] if label in held else [named]
    for name in wanted:
        if name not in numeric:
            raise ValueError(f"{path}: {name} holds {held[name][1]}, where an array of numbers was expected")
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
        f"{path} is no whole MATLAB file of level 4 or 5, get it again, or save it with -v7 in MATLAB: {error}"
    )


def _check_streams(path: Path, limit: int = LIMIT) -> None:
    """Inflate every compressed element of a MATLAB file of level 5 to its end, where its checksum stands.

    SciPy stops at the last byte that it needs.

    Raises:
        ValueError: if an element is cut short, its checksum is wrong, or the elements exceed the limit.
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
                    check_size(path, total, limit)
            if not stream.eof:
                raise ValueError("an element has no end")


_COMPRESSED = 15  # the type of an element that is a zlib stream
