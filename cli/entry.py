"""The command ``jensen``. The arguments are parsed first, because the other imports take seconds."""

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

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after ``jensen``; those of the process if None.

    Returns:
        The exit status: 0 for success, 1 for a failed run (its loss became infinite or NaN), 2 for an error that the
        user can correct, 130 after Ctrl-C. With ``--json``, an error is printed as one JSON document on stdout, too.

    Example:
        >>> main(["compare", "--data", "digits", "--guides", "full_rank"])
        2
        >>> main(["datasets", "--json", "digits"]) # doctest: +ELLIPSIS
        {...
        0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in arguments
    with _on_interrupt(_stopping(as_json)):
        from .options import parser
        from .parser import Misuse
        from .terminal import fail

        try:
            options = parser().parse_args(arguments)
        except Misuse as error:
            return fail(f"error: {error}", 2, as_json)
        from .command import main as run
    options.words = arguments
    status = run(options)
    if argv is None and _is_ours():  # Ctrl-C while Python exits prints no traceback
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


def _stopping(as_json: bool) -> Callable[..., None]:
    """A signal handler that prints one line and ends the process at once: nothing needs to be cleaned up yet."""

    def stop(*_: Any) -> None:
        os.write(2, b"jensen: interrupted\n")
        if as_json:
            document = {"error": "interrupted", "status": _INTERRUPTED}
            os.write(1, json.dumps(document).encode() + b"\n")
        os._exit(_INTERRUPTED)

    return stop


def _is_ours() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here, as it does if no other handler was installed."""
    main_thread = threading.current_thread() is threading.main_thread()
    return main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def _on_interrupt(stop: Callable[..., None]) -> Iterator[None]:
    """Handle Ctrl-C by ``stop`` inside this block, instead of an exception inside the imports of other libraries."""
    if not _is_ours():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
