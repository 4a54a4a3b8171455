"""The command ``jensen``: one function for each of its commands, and what becomes of errors."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from . import compare, datasets, evaluate, sample, train
from .memory import memory_told
from .options import parser
from .terminal import Unkept, say, strict_json

_COMMANDS: dict[str, Callable[[argparse.Namespace, bool], None]] = {
    "compare": compare.run,
    "train": train.run,
    "evaluate": evaluate.run,
    "sample": sample.run,
    "datasets": datasets.run,
}


def main(argv: Sequence[str]) -> int:
    """Run a command, and say in one line what went wrong; the exit status, as :func:`jensen.cli.main` has it."""
    as_json = "--json" in argv
    try:
        options = parser().parse_args(argv)
        with memory_told(), _warnings_as_lines():
            _COMMANDS[options.command](options, sys.stderr.isatty())
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Unkept as error:  # its document was printed already
        return _fail(f"error: {error}", 2, False)
    except KeyboardInterrupt as stop:
        return _fail("interrupted" + f"; {stop}" * bool(str(stop)), 130, as_json)
    except FloatingPointError as error:
        return _fail(f"error: {error}", 1, as_json)
    except MemoryError as error:
        return _fail(f"error: {error or 'this takes more memory than there is'}", 2, as_json)
    except (ValueError, OSError, ImportError, TypeError, NotImplementedError) as error:
        return _fail(f"error: {error}", 2, as_json)
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print a warning as a line of the command, without the place in the code that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"jensen: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _fail(message: str, status: int, as_json: bool) -> int:
    say(f"jensen: {message}")
    if as_json:
        print(strict_json({"error": message.removeprefix("error: "), "status": status}))
    return status
