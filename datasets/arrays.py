"""Arrays in files: ``.npy`` and ``.npz`` by NumPy, ``.mat`` by SciPy. Pickled objects are never loaded."""

from __future__ import annotations

__all__ = ["LIMIT", "check_size", "read_mat", "read_npy", "read_npz"]

import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

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
            check_size(path, sum(member.file_size for member in archive.infolist()), limit)
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


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    try:
        with archive.open(f"{name}.npy") as stream:
            x: NDArray[np.generic] = npy.read_array(stream, allow_pickle=False)
            more = len(stream.read(1))  # at its end a member's checksum is compared
    except KeyError:
        raise ValueError(f"{path} holds {name!r}, which is no array: save it with numpy.savez") from None
    except (ValueError, OverflowError, TokenError, EOFError, MemoryError, RuntimeError, zlib.error) as error:
        raise ValueError(
            f"{path}: {name} is no whole array of numbers (pickled objects are never loaded), save it again: {error}"
        ) from error
    if more:
        raise ValueError(f"{path}: {name} holds more than its header claims, {x.shape} of {x.dtype}: save it again")
    return x


def _described(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        return f"{name} {_member(path, archive, name).shape}"
    except ValueError:
        return f"{name} (no array of numbers)"


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
