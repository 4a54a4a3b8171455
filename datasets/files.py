"""Files of data sets: found in ``JENSEN_DATA`` or the user's cache, else downloaded from a mirror and checked."""

from __future__ import annotations

__all__ = ["File", "locate", "read_idx"]

import gzip
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from numpy.typing import NDArray


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        folder: the data set's folder under ``JENSEN_DATA`` and in the cache.
        name: the file's name.
        sha256: what its bytes hash to.
        mirrors: addresses of folders that hold it, tried in order.
    """

    folder: str
    name: str
    sha256: str
    mirrors: tuple[str, ...] = ()


def locate(file: File) -> Path:
    """The path of a file whose SHA-256 is right.

    Raises:
        FileNotFoundError: if it is nowhere and no mirror answers; the message says where to put it.
        ValueError: if the file in ``JENSEN_DATA`` is another one.
    """
    given = os.environ.get("JENSEN_DATA")
    if given and (path := Path(given) / file.folder / file.name).is_file():
        if pooch.file_hash(str(path), alg="sha256") != file.sha256:
            raise ValueError(f"{path} is not the file expected: its SHA-256 is not {file.sha256}; replace or remove it")
        return path
    cache = Path(pooch.os_cache("jensen")) / file.folder
    cached = cache / file.name
    if cached.is_file() and pooch.file_hash(str(cached), alg="sha256") == file.sha256:
        return cached
    failures = []
    for mirror in file.mirrors:
        try:
            url, known = mirror + file.name, f"sha256:{file.sha256}"
            return Path(pooch.retrieve(url, known, fname=file.name, path=cache, progressbar=True))
        except (
            OSError,
            ValueError,
        ) as error:  # no network, no such file there, or another file: the next mirror
            failures.append(f"{mirror}: {error}")
    raise FileNotFoundError(
        f"{file.name} was not found and could not be downloaded. Put it (SHA-256 {file.sha256}) at "
        f"{Path(given or '$JENSEN_DATA') / file.folder / file.name} with the environment variable JENSEN_DATA naming "
        f"that folder, or at {cached}. " + (f"Tried: {'; '.join(failures)}" if failures else "No mirror is known.")
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes (LeCun's MNIST format).

    Raises:
        ValueError: if the header is not that of such a file, or claims another size than the file has.
    """
    with gzip.open(path) as stream:
        try:
            zeros, kind, rank = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != 8 or not 1 <= rank <= 4:
                raise ValueError(f"{path} is not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
        except struct.error as error:
            raise ValueError(f"{path} is not an IDX file: its header is cut short") from error
        body = stream.read()
    if len(body) != math.prod(shape):
        raise ValueError(f"{path} holds {len(body)} values, but its header claims {shape}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)
