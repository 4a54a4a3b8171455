"""The command ``jensen``: it parses its arguments, and only then imports what takes seconds."""

from __future__ import annotations

__all__ = ["main"]

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .options import parser
from .parser import Misuse
from .terminal import fail

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after ``jensen``; those of the process if None.

    Returns:
        The exit status: 0; 1 for a run that failed (its loss was no longer finite), 2 for what the user can mend, 130
        when interrupted. With ``--json`` an error, too, is one JSON document on stdout.

    Example:
        >>> main(["compare", "--data", "digits", "--guides", "full_rank"])
        2
        >>> main(["datasets", "--json", "digits"]) # doctest: +ELLIPSIS
        {...
        0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in arguments
    try:
        options = parser().parse_args(arguments)
    except Misuse as error:
        return fail(f"error: {error}", 2, as_json)
    with _on_interrupt(_stopping(as_json)):
        from .command import main as run
    options.words = arguments
    status = run(options)
    if argv is None and _is_ours():  # what Python still does at its end is not interrupted by a page of its own
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


def _stopping(as_json: bool) -> Callable[..., None]:
    """What ends the process at once, with a line: nothing was begun that would have to be undone."""

    def stop(*_: Any) -> None:
        os.write(2, b"jensen: interrupted\n")
        if as_json:
            document = {"error": "interrupted", "status": _INTERRUPTED}
            os.write(1, json.dumps(document).encode() + b"\n")
        os._exit(_INTERRUPTED)

    return stop


def _is_ours() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here: nobody has asked for something else."""
    main_thread = threading.current_thread() is threading.main_thread()
    return main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def _on_interrupt(stop: Callable[..., None]) -> Iterator[None]:
    """Let Ctrl-C do something else than to raise in the midst of another library's imports."""
    if not _is_ours():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
