"""The command ``jensen`` and its options."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jensen import __version__

from .compare import DEFAULT_GUIDES, GUIDES, run

_DATA = ("digits", "mnist", "binarized_mnist", "oil_flow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted.

    Args:
        argv: the arguments after ``jensen``; those of the process if None.

    Example:
        >>> main(["compare", "--data", "digits", "--guides", "full_rank"])
        2
    """
    options = _parser().parse_args(argv)
    try:
        run(options, progress=sys.stderr.isatty())
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"jensen: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jensen: interrupted", file=sys.stderr)
        return 130
    return 0


def _epochs(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, but got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jensen", description="Latent-variable models for Pyro whose likelihoods can be trusted."
    )
    parser.add_argument("--version", action="version", version=f"jensen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="train and measure guides and models; print tables, write a report",
        description="Two blocks. One model, several guides: probabilistic PCA in closed form, its W turned and frozen, "
        "and the guides fitted to it, whose cost is read off against the exact log p(x). Model and guide trained "
        "together: PPCA and VAEs by SVI. Prints both tables; pictures and report.json go to the folder --out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = compare.add_argument
    add(
        "--data",
        choices=_DATA,
        default="digits",
        help="data set; digits is embedded, the others are files in $JENSEN_DATA or the cache",
    )
    add(
        "--model",
        choices=("ppca", "vae", "all"),
        default="all",
        help="ppca: the first block only; vae: the second only; all: both",
    )
    add(
        "--guides",
        default=",".join(DEFAULT_GUIDES),
        metavar="NAMES",
        help=f"guides of the first block, separated by commas, out of {', '.join(GUIDES)}; the second block takes "
        "those that can be trained",
    )
    add("--latent", type=int, default=8, metavar="D", help="latent dimensions")
    add("--particles", type=int, default=5000, metavar="K", help="draws from the guide per test datum")
    add(
        "--epochs",
        type=_epochs,
        default="auto",
        metavar="E",
        help="passes over the training data; auto: as many as make 3000 steps of 128 data",
    )
    add("--test-size", type=int, default=1000, metavar="N", help="measure on at most so many random test data")
    add("--seed", type=int, default=0, help="seed of everything that is random")
    add(
        "--out",
        type=Path,
        default=Path("jensen-report"),
        metavar="DIR",
        help="folder for the pictures and report.json",
    )
    add("--gaps", action="store_true", help="split every gap into the family's part and the encoder's part")
    add("--bits", action="store_true", help="bits per dimension instead of nats per datum")
    return parser
