"""What the commands say, and to whom: results to stdout, all else to stderr, one strict JSON document on request."""

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
    """A result that was shown could not be written to its file."""


_notices: list[str] = []


def say(text: str) -> None:
    """A line beside the progress bars, or in their place in a log, which a report repeats."""
    progress(note(text))


def note(text: str) -> str:
    """The same text, which a report repeats."""
    _notices.append(text)
    return text


def progress(text: str) -> None:
    """A line that says how far a command is."""
    print(text, file=sys.stderr, flush=True)


def notices() -> list[str]:
    """The lines of this command that a report repeats, each once."""
    return list(dict.fromkeys(_notices))


def forget_notices() -> None:
    """Begin a command, in a process that may have run another one."""
    _notices.clear()


def fail(message: str, status: int, as_json: bool) -> int:
    """Say what went wrong, in a document too if one is wanted; the exit status."""
    say(f"jensen: {message}")
    if as_json:
        print(strict_json({"error": message.removeprefix("error: "), "status": status}))
    return status


def command(*words: object) -> str:
    """A command of jensen as a shell takes it, quoted where that is needed.

    Example:
        >>> command("evaluate", "my run")
        "jensen evaluate 'my run'"
    """
    return shlex.join(["jensen", *(f"./{word}" if _like_an_option(word) else str(word) for word in words)])


def _like_an_option(word: object) -> bool:
    return isinstance(word, Path) and str(word).startswith("-")


def report(text: str, document: dict[str, Any], as_json: bool) -> None:
    """Print a result: its text, or its JSON document alone, with its schema version."""
    print(strict_json({"schema": SCHEMA, **document}) if as_json else text, flush=True)


def strict_json(document: Any) -> str:
    """JSON without NaN and infinities, which become null: they are not JSON.

    Example:
        >>> strict_json({"gap": float("nan")})
        '{"gap": null}'
    """
    return json.dumps(finite(document), allow_nan=False)


def finite(value: Any) -> Any:
    """The same nest of dicts and lists, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, document: Any) -> None:
    """Write strict JSON, whole or not at all."""
    from jensen.results.files import whole  # torch comes with it, and terminal is there before

    with whole(path) as partial:
        partial.write_text(json.dumps(finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of Python and of what numbers depend on."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("jensen", "torch", "pyro-ppl", "numpy")
    }
