"""The command ``jensen``: the function of each subcommand, and the exit status of each error."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from jensen import processes

from . import compare, datasets, evaluate, impute, sample, train
from .memory import memory_told
from .terminal import Unkept, fail, forget_notices, note

_COMMANDS: dict[str, Callable[[argparse.Namespace, bool], None]] = {
    "compare": compare.run,
    "train": train.run,
    "evaluate": evaluate.run,
    "sample": sample.run,
    "impute": impute.run,
    "datasets": datasets.run,
}
_SHARED = ("compare", "train", "evaluate")  # by several processes; the others are run by one


def main(options: argparse.Namespace) -> int:
    """Run a command and print an error in one line; returns the exit status of :func:`jensen.cli.main`."""
    as_json = options.json
    forget_notices()
    if not processes.rank():
        return _run(options, as_json)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # process 0 prints
        return _run(options, as_json)


def _run(options: argparse.Namespace, as_json: bool) -> int:
    command = _COMMANDS[options.command]
    try:
        with memory_told(), _warnings_as_lines(), processes.together(f"jensen {options.command}"):
            if options.command in _SHARED:
                command(options, sys.stderr.isatty())
            elif not processes.rank():
                with processes.apart():
                    command(options, sys.stderr.isatty())
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Unkept as error:  # its document is already printed
        return fail(f"error: {error}", 2, False)
    except KeyboardInterrupt as stop:
        return fail("interrupted" + f"; {stop}" * bool(str(stop)), 130, as_json)
    except FloatingPointError as error:
        return fail(f"error: {error}", 1, as_json)
    except MemoryError as error:
        return fail(f"error: {error or 'not enough memory'}", 2, as_json)
    except (ValueError, OSError, ImportError, TypeError, NotImplementedError, processes.PeerError) as error:
        return fail(f"error: {error}", 2, as_json)
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning as one line, without its file and line number."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: note(f"jensen: warning: {message}") + "\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
