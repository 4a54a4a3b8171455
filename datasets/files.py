"""Files of data sets: found in ``JENSEN_DATA`` or the user's cache, or downloaded from a mirror and checked."""

from __future__ import annotations

__all__ = ["File", "locate"]

import os
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch

from jensen.progress import progress_bar

LARGEST = 2**30  # maximal bytes of a download: several times the largest file of the catalogue


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        folder: the data set's folder under ``JENSEN_DATA`` and in the cache.
        name: the file's name.
        sha256: its SHA-256; None if it is not published. The loader then checks the contents, and the file is never
            downloaded.
        mirrors: addresses of folders with the file, tried in order.
    """

    folder: str
    name: str
    sha256: str | None
    mirrors: tuple[str, ...] = ()

    def is_at(self, path: Path) -> bool:
        """Whether a path has this file, as far as can be checked without reading it."""
        return path.is_file() and self.sha256 in (None, pooch.file_hash(str(path), alg="sha256"))


def locate(file: File) -> Path:
    """The path of a file with the correct SHA-256.

    Raises:
        FileNotFoundError: if it is not found and no mirror responds; the message gives the place to put it.
        ValueError: if the file in ``JENSEN_DATA`` is not the expected one.
    """
    given = os.environ.get("JENSEN_DATA")
    if given and (path := Path(given) / file.folder / file.name).is_file():
        if not file.is_at(path):
            raise ValueError(f"{path} is not the expected file: its SHA-256 is not {file.sha256}; replace or remove it")
        return path
    cache = Path(pooch.os_cache("jensen")) / file.folder
    cached = cache / file.name
    if file.is_at(cached):
        return cached
    failures = []
    for mirror in file.mirrors if file.sha256 else ():
        try:
            url, known = mirror + file.name, f"sha256:{file.sha256}"
            return Path(pooch.retrieve(url, known, fname=file.name, path=cache, downloader=_download))
        except (OSError, ValueError) as error:  # no network, no such file, or another file: try the next mirror
            failures.append(f"{mirror}: {error}")
    place = Path(given or "$JENSEN_DATA") / file.folder / file.name
    where = f"at {place} with the environment variable JENSEN_DATA set to that folder, or at {cached}."
    if file.sha256 is None:
        sources = " or ".join(mirror + file.name for mirror in file.mirrors)
        raise FileNotFoundError(
            f"{file.name} was not found, and is not downloaded because its SHA-256 is not known. Download it from "
            f"{sources} and put it {where}"
        )
    raise FileNotFoundError(
        f"{file.name} was not found and could not be downloaded. Put it (SHA-256 {file.sha256}) {where} "
        + (f"Tried: {'; '.join(failures)}" if failures else "No mirror is known.")
    )


def _download(url: str, output: Any, pool: object) -> None:
    """Download an address to a file, only by https, and at most :data:`LARGEST` bytes.

    Raises:
        ValueError: for another kind of address, also after a redirection, and for more bytes.
        OSError: if there is no response.
    """
    _check_address(url)
    with urllib.request.urlopen(url, timeout=30) as response:
        _check_address(response.url)
        size, done = int(response.headers.get("Content-Length") or 0), 0
        what = f"download of {url.rpartition('/')[2]}"
        with open(output, "wb") as target, progress_bar(what, total=size or None, unit="B", unit_scale=True) as bar:
            while part := response.read(2**16):
                done += len(part)
                if max(done, size) > LARGEST:
                    raise ValueError(f"it has more than {LARGEST} bytes")
                target.write(part)
                bar.update(len(part))


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname == "127.0.0.1"):  # this machine
        raise ValueError(f"{url} is not an https address: only https is allowed for downloads")
