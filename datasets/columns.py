"""Selection of the data and label columns of a table, by name or by position from either end."""

from __future__ import annotations

__all__ = ["Wanted", "advise_drop", "advise_label", "check_names", "listed", "position", "select"]

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

Wanted = str | int | Sequence[str | int] | None
_LISTED = 10  # columns named in a message


def select(
    source: str | Path, columns: Sequence[str], label: str | int | None, drop: Wanted = None, only: Wanted = None
) -> tuple[int | None, list[int]]:
    """The column of labels, and the columns of the data in their order.

    Args:
        source: the name of the file for messages.
        columns: the names.
        label: the column of labels, which is not part of the data.
        drop: columns to omit.
        only: the columns of the data, if not all others.

    Raises:
        ValueError: for an unknown column, both ``drop`` and ``only``, a dropped label, or if no data are left.

    Example:
        >>> select("own.csv", ("id", "a", "b", "kind"), label=-1, drop="id")
        (3, [1, 2])
    """
    at = None if label is None else position(source, label, columns)
    if drop is not None and only is not None:
        raise ValueError(f"got both drop={drop!r} and only={only!r}: pass only one of them")
    out = _positions(source, drop, columns, "drop")
    if at is not None and at in out:
        raise ValueError(
            f"drop={drop!r} contains the column of labels, {columns[at]!r}: pass it as label or in drop, not both"
        )
    kept = range(len(columns)) if only is None else sorted(_positions(source, only, columns, "only"))
    data = [i for i in kept if i != at and i not in out]
    if not data:
        raise ValueError(f"{source} has no column of data" + " besides the omitted ones" * bool(out))
    return at, data


def _positions(source: str | Path, wanted: Wanted, columns: Sequence[str], argument: str) -> set[int]:
    some = () if wanted is None else (wanted,) if isinstance(wanted, str | int) else wanted
    return {position(source, column, columns, argument) for column in some}


def position(source: str | Path, column: str | int, columns: Sequence[str], argument: str = "label") -> int:
    """The position of a column, given by name or by a number from 0, or from -1 at the end.

    A string is first tried as a name, then as a number; an int first as a number, then as a name.

    Raises:
        ValueError: if there is none, or several with that name.

    Example:
        >>> position("own.csv", "2", ("a", "b", "c")), position("own.csv", "2", ("1", "2", "3"))
        (2, 1)
    """
    named = [i for i, name in enumerate(columns) if name == str(column)]
    number = _number(column)
    inside = number is not None and -len(columns) <= number < len(columns)
    if inside and (isinstance(column, int) or not named):
        assert number is not None
        return number % len(columns)
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(
            f"{source} has several columns called {column!r}, at positions {', '.join(map(str, named))}: give the "
            f"position for {argument}="
        )
    raise ValueError(
        f"{source} has no column {column!r} for {argument}=; it has {listed(columns)} (or give a position, 0 to "
        f"{len(columns) - 1}, or -1 for the last)"
    )


def _number(column: str | int) -> int | None:
    try:
        return int(column)
    except ValueError:
        return None


def check_names(source: str | Path, names: Sequence[object], remedy: str = "rename them") -> None:
    """Check that the names of columns are unique.

    Raises:
        ValueError: if two are the same.
    """
    words = [str(name) for name in names]
    if twice := [word for word, count in Counter(words).items() if count > 1]:
        places = [i for i, word in enumerate(words) if word == twice[0]]
        raise ValueError(
            f"{source} has several columns with the same name: {listed(twice)} (the first at positions "
            f"{', '.join(map(str, places[:_LISTED]))}); {remedy}"
        )


def listed(names: Sequence[object], most: int = _LISTED) -> str:
    """Names separated by commas; of many, only the first ones and the number of the others.

    Example:
        >>> listed(range(12), most=3)
        '0, 1, 2 and 9 more'
    """
    shown = ", ".join(str(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def advise_label(name: str) -> str:
    """Advice on naming the column of labels, in Python and in a shell."""
    return f"name it: label={name!r}, in a shell {_option('label', [name])}"


def advise_drop(names: Sequence[str]) -> str:
    """Advice on dropping columns, in Python and in a shell; for many columns, on keeping the others."""
    if len(names) > _LISTED:
        return "name the columns to keep: only=[...], in a shell --only COLUMN ..."
    python = repr(names[0]) if len(names) == 1 else repr(list(names))
    return f"leave {'it' if len(names) == 1 else 'them'} out: drop={python}, in a shell {_option('drop', names)}"


def _option(name: str, values: Sequence[str]) -> str:
    """An option with its values in shell syntax; a value that begins with a dash would be read as an option."""
    if not any(value.startswith("-") for value in values):
        return f"--{name} {shlex.join(values)}"
    return f"--{name}={shlex.quote(values[0])}" if len(values) == 1 else f"--{name} and their positions"
