"""The output of the commands: results on stdout, other lines on stderr, or one strict JSON document."""

from __future__ import annotations

__all__ = [
    "SCHEMA",
    "Unkept",
    "command",
    "fail",
    "finite",
    "forget_notices",
    "note",
    "notices",
    "progress",
    "report",
    "say",
    "strict_json",
    "versions",
    "write_json",
]

import json
import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = 1  # of the JSON documents of the commands


class Unkept(OSError):
    """A result was printed, but could not be written to its file."""


_notices: list[str] = []


def say(text: str) -> None:
    """Print a line on stderr, and keep it for the report."""
    progress(note(text))


def note(text: str) -> str:
    """Keep a text for the report; returns the text."""
    _notices.append(text)
    return text


def progress(text: str) -> None:
    """Print a line about the progress of a command on stderr."""
    print(text, file=sys.stderr, flush=True)


def notices() -> list[str]:
    """The lines of this command for the report, without repetition."""
    return list(dict.fromkeys(_notices))


def forget_notices() -> None:
    """Remove the lines of an earlier command in the same process."""
    _notices.clear()


def fail(message: str, status: int, as_json: bool) -> int:
    """Print an error, with ``as_json`` also as a JSON document; returns the exit status."""
    say(f"jensen: {message}")
    if as_json:
        print(strict_json({"error": message.removeprefix("error: "), "status": status}))
    return status


def command(*words: object) -> str:
    """A command line of jensen, quoted for a shell.

    Example:
        >>> command("evaluate", "my run")
        "jensen evaluate 'my run'"
    """
    return shlex.join(["jensen", *(f"./{word}" if _like_an_option(word) else str(word) for word in words)])


def _like_an_option(word: object) -> bool:
    return isinstance(word, Path) and str(word).startswith("-")


def report(text: str, document: dict[str, Any], as_json: bool) -> None:
    """Print a result: either its text, or its JSON document with the schema version."""
    print(strict_json({"schema": SCHEMA, **document}) if as_json else text, flush=True)


def strict_json(document: Any) -> str:
    """JSON in which NaN and infinities are null, because JSON does not have them.

    Example:
        >>> strict_json({"gap": float("nan")})
        '{"gap": null}'
    """
    return json.dumps(finite(document), allow_nan=False)


def finite(value: Any) -> Any:
    """The same nested dicts and lists, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, document: Any) -> None:
    """Write strict JSON; if it fails, no partial file remains."""
    from jensen.results.files import whole  # it imports torch, which is slow

    with whole(path) as partial:
        partial.write_text(json.dumps(finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that affect results."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("jensen", "torch", "pyro-ppl", "numpy")
    }
