"""Files of data sets: found in ``JENSEN_DATA`` or the user's cache, else downloaded from a mirror and checked."""

from __future__ import annotations

__all__ = ["File", "locate"]

import os
from dataclasses import dataclass
from pathlib import Path

import pooch


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        folder: the data set's folder under ``JENSEN_DATA`` and in the cache.
        name: the file's name.
        sha256: what its bytes hash to; None where nobody published it, and then the loader checks the contents, and the
            file is never downloaded.
        mirrors: addresses of folders that hold it, tried in order.
    """

    folder: str
    name: str
    sha256: str | None
    mirrors: tuple[str, ...] = ()

    def is_at(self, path: Path) -> bool:
        """Whether a path holds this file, as far as can be told before it is read."""
        return path.is_file() and self.sha256 in (None, pooch.file_hash(str(path), alg="sha256"))


def locate(file: File) -> Path:
    """The path of a file whose SHA-256 is right.

    Raises:
        FileNotFoundError: if it is nowhere and no mirror answers; the message says where to put it.
        ValueError: if the file in ``JENSEN_DATA`` is another one.
    """
    given = os.environ.get("JENSEN_DATA")
    if given and (path := Path(given) / file.folder / file.name).is_file():
        if not file.is_at(path):
            raise ValueError(f"{path} is not the file expected: its SHA-256 is not {file.sha256}; replace or remove it")
        return path
    cache = Path(pooch.os_cache("jensen")) / file.folder
    cached = cache / file.name
    if file.is_at(cached):
        return cached
    failures = []
    for mirror in file.mirrors if file.sha256 else ():
        try:
            url, known = mirror + file.name, f"sha256:{file.sha256}"
            return Path(pooch.retrieve(url, known, fname=file.name, path=cache, progressbar=True))
        except (OSError, ValueError) as error:  # no network, no such file there, or another file: the next mirror
            failures.append(f"{mirror}: {error}")
    place = Path(given or "$JENSEN_DATA") / file.folder / file.name
    where = f"at {place} with the environment variable JENSEN_DATA naming that folder, or at {cached}."
    if file.sha256 is None:
        sources = " or ".join(mirror + file.name for mirror in file.mirrors)
        raise FileNotFoundError(
            f"{file.name} was not found, and is not downloaded, since no SHA-256 of it is known. Get it from {sources} "
            f"and put it {where}"
        )
    raise FileNotFoundError(
        f"{file.name} was not found and could not be downloaded. Put it (SHA-256 {file.sha256}) {where} "
        + (f"Tried: {'; '.join(failures)}" if failures else "No mirror is known.")
    )
