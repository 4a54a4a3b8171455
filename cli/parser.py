"""An argument parser that suggests names for misspelt ones, and records which options were given."""

from __future__ import annotations

__all__ = ["Misuse", "Parser", "choices", "groups", "numbers", "refinement", "whole_or"]

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from textwrap import wrap
from typing import Any, NoReturn

from .names import suggestion


class Misuse(ValueError):
    """An error in the arguments; the message names the command whose help to read."""


_NO_DEFAULT = (None, False, argparse.SUPPRESS)


class _Help(argparse.HelpFormatter):
    """Help with the default of each option, and without line breaks inside names."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or "default" in text or any(action.default is no for no in _NO_DEFAULT):
            return text
        return f"{text} (default: {_shown(action.default)})"


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are :class:`Misuse` and suggest names; options are not abbreviated.

    The parsed namespace has an attribute ``given``: the names of the options in the arguments.

    Example:
        >>> parser = Parser(prog="jensen")
        >>> action = parser.add_argument("--epochs", type=int, default=100)
        >>> parser.parse_args(["--epochs", "5"]).given
        {'epochs'}
        >>> parser.parse_args(["--epocs", "5"])
        Traceback (most recent call last):
        ...
        jensen.cli.parser.Misuse: there is no option --epocs; did you mean --epochs? See jensen --help
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **options})
        self.commands: dict[str, Parser] = {}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and record the options that were given."""
        args = sys.argv[1:] if args is None else list(args)
        parsed, extras = super().parse_known_args(args, namespace)
        words = {word.split("=", 1)[0] for word in args}
        given = {action.dest for action in self._actions if words & set(action.option_strings)}
        parsed.given = given | getattr(parsed, "given", set())
        return parsed, extras

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; the error for an unknown option suggests the nearest one.

        Raises:
            Misuse: for invalid arguments.
        """
        parsed, extras = self.parse_known_args(args, namespace)
        if extras:
            self.commands.get(getattr(parsed, "command", ""), self)._refuse(extras)
        return parsed

    def _refuse(self, extras: list[str]) -> NoReturn:
        names = [name for action in self._actions for name in action.option_strings]
        wrong = [word.split("=", 1)[0] for word in extras if word.startswith("-")]
        if not wrong:
            self.error(f"unexpected argument {' '.join(extras)}")
        close = get_close_matches(wrong[0], names, n=1)
        self.error(f"there is no option {wrong[0]}" + (f"; did you mean {close[0]}?" if close else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                None, f"there is no {action.dest} {value!r}; {suggestion(str(value), action.choices)}"
            )

    def error(self, message: str) -> NoReturn:
        """Raise :class:`Misuse`."""
        end = "" if message.endswith("?") else "."
        raise Misuse(f"{message}{end} See {self.prog} --help")


def choices(what: str, names: Iterable[str], *others: str) -> Callable[[str], str]:
    """The type of an option whose values are names.

    Example:
        >>> choices("model", ["ppca", "vae"])("vea")
        Traceback (most recent call last):
        ...
        argparse.ArgumentTypeError: there is no model 'vea'; did you mean vae? Choose from ppca, vae
    """
    known = [*names, *others]

    def named(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"there is no {what} {text!r}; {suggestion(text, known)}")
        return text

    return named


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas.

    Example:
        >>> numbers("128,64")
        (128, 64)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, but got {text!r}") from None


def groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Groups of whole numbers, separated by slashes.

    Example:
        >>> groups("200,200/100,100")
        ((200, 200), (100, 100))
    """
    return tuple(numbers(part) for part in text.split("/"))


def whole_or(word: str) -> Callable[[str], int | None]:
    """The type of an option that is a whole number, or a word that stands for None.

    Example:
        >>> whole_or("auto")("12"), whole_or("auto")("auto")
        (12, None)
    """

    def whole(text: str) -> int | None:
        try:
            return None if text == word else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number or {word}, but got {text!r}") from None

    return whole


def refinement(text: str) -> str | bool | int:
    """The type of ``--refine``: auto, yes, no, or a number of evaluations.

    Example:
        >>> refinement("auto"), refinement("no"), refinement("3000")
        ('auto', False, 3000)
    """
    words: dict[str, str | bool] = {"auto": "auto", "yes": True, "no": False}
    try:
        return words[text] if text in words else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto, yes, no or a whole number, but got {text!r}") from None


def _shown(default: Any) -> str:
    if not isinstance(default, tuple):
        return str(default)
    if default and isinstance(default[0], tuple):
        return "/".join(map(_shown, default))
    return ",".join(map(str, default))
