"""The options of every command, and what their help says."""

from __future__ import annotations

__all__ = ["parser"]

from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter, _ArgumentGroup
from pathlib import Path

from jensen import __version__

from .names import DEFAULT_GUIDES, GRADIENTS, GUIDES, LIKELIHOODS, MODELS, OBJECTIVES, TRAINED
from .parser import Parser, choices, groups, numbers, refinement, whole_or

_EXITS = """exit status:
  0    done
  1    a run that failed: its loss was no longer finite
  2    what you can mend: an option, a file, a name
  130  interrupted by Ctrl-C; jensen train --resume goes on

Every command takes --json: one JSON document on stdout, all else on stderr."""


def parser() -> Parser:
    """The parser of the command ``jensen``."""
    root = Parser(
        prog="jensen",
        description="Latent-variable models for Pyro whose likelihoods can be trusted.",
        epilog=_EXITS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"jensen {__version__}")
    commands = root.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, add in (
        ("compare", _compare),
        ("train", _train),
        ("evaluate", _evaluate),
        ("sample", _sample),
        ("datasets", _datasets),
    ):
        words = add.__doc__ or ""
        root.commands[name] = commands.add_parser(name, help=words.splitlines()[0].rstrip("."), description=words)
        add(root.commands[name])
        root.commands[name].add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return root


_WAYS = {
    "none": "none",
    "threshold": "threshold: above 1/2",
    "sample": "sample: drawn once",
    "dynamic": "dynamic: drawn anew for every batch",
}


def _data(command: Parser, ways: tuple[str, ...]) -> _ArgumentGroup:
    """The options that say what the data are, and how they are prepared."""
    data = command.add_argument_group("data")
    add = data.add_argument
    add("--data", default="digits", metavar="NAME|FILE", help="data set (see jensen datasets), or a file of your own")
    add("--label", metavar="COLUMN", help="of a file: the column that holds the class: its name, or 0, 1, ..., -1")
    add("--header", action=BooleanOptionalAction, default=None, help="of a text: whether its first line holds names")
    add("--drop", nargs="+", action="extend", metavar="COLUMN", help="of a file: columns to leave out")
    add("--only", nargs="+", action="extend", metavar="COLUMN", help="of a file: the columns of the data")
    add("--member", metavar="NAME", help="of an .npz or .mat file: the array of the data")
    add("--levels", type=int, metavar="L", help="of a file: the number of grey levels, 0 to L - 1")
    add("--image-shape", type=numbers, metavar="H,W", help="of a file: H,W of its images, or H,W,C or C,H,W")
    add("--standardize", action="store_true", help="mean 0 and standard deviation 1 for every feature")
    add(
        "--binarize",
        type=choices("way to binarize", ways),
        default="none",
        metavar="HOW",
        help="; ".join(_WAYS[way] for way in (*ways[1:], ways[0])),
    )
    return data


def _train(command: Parser) -> None:
    """Train a model and its guide into a run folder.

    The folder holds configuration.json, checkpoint.pt (after every epoch), history.json and pictures; jensen evaluate
    and jensen sample need nothing else. After Ctrl-C, --resume goes on to the numbers of an uninterrupted run.
    """
    data = _data(command, ("none", "threshold", "sample", "dynamic"))
    data.add_argument(
        "--dequantize",
        action=BooleanOptionalAction,
        default=None,
        help="noise between grey levels (default: where a density is fitted to them)",
    )
    data.add_argument("--data-seed", type=int, default=0, metavar="SEED", help="seed of split and noise")
    pair = command.add_argument_group("pair")
    add = pair.add_argument
    add("--model", type=choices("model", MODELS), default="vae", metavar="NAME", help=", ".join(MODELS))
    add("--guide", type=choices("guide", TRAINED), default="mean-field", metavar="NAME", help=", ".join(TRAINED))
    add(
        "--latent",
        type=numbers,
        default=(8,),
        metavar="D",
        help="latent features; for hierarchical those of each layer from the data up, as 16,4",
    )
    add(
        "--hidden",
        type=groups,
        default=((128, 128),),
        metavar="H",
        help="widths of the hidden layers, as 128,128; for hierarchical also layer by layer, as 200,200/100,100",
    )
    add(
        "--likelihood",
        type=choices("likelihood", ("auto", *LIKELIHOODS)),
        default="auto",
        metavar="NAME",
        help=f"p(x | z): {', '.join(LIKELIHOODS)}; auto: bernoulli for binary data, else gaussian",
    )
    add("--components", type=int, metavar="C", help="components of a mixture (default: 10)")
    training = command.add_argument_group("training")
    add = training.add_argument
    add(
        "--objective",
        type=choices("objective", OBJECTIVES),
        default="elbo",
        metavar="NAME",
        help=", ".join(OBJECTIVES),
    )
    add("--particles", type=int, metavar="K", help="draws per datum and step (default: 1 for elbo, else 10)")
    add(
        "--gradient",
        type=choices("gradient", GRADIENTS),
        default="standard",
        metavar="NAME",
        help="standard, stl (sticking the landing) or dreg (doubly reparameterized; not for elbo)",
    )
    add("--beta", type=float, metavar="B", help="weight of the KL, for elbo (default: 1)")
    add("--alpha", type=float, metavar="A", help="order of the bound, for renyi (default: 0.5)")
    add("--epochs", type=int, default=100, metavar="E", help="passes over the training data")
    add("--batch-size", type=int, default=128, metavar="B", help="data per step")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam")
    add(
        "--schedule",
        type=choices("schedule", ("constant", "cosine")),
        default="constant",
        metavar="NAME",
        help="of the learning rate: constant, or cosine, down to 0 at the last epoch",
    )
    add("--patience", type=int, metavar="P", help="stop P epochs after the best validation ELBO, and keep that epoch")
    add("--seed", type=int, default=0, help="seed of initial parameters, batches and draws")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train N runs, from --seed on, into DIR/seed-...; jensen evaluate DIR counts the variance between them",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    folder = command.add_argument_group("run folder")
    add = folder.add_argument
    add("--run", type=Path, default=Path("jensen-run"), metavar="DIR", help="folder of the run")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in DIR, as it was begun; a larger --epochs trains it for longer",
    )
    add("--no-pictures", action="store_true", help="leave the pictures out")
    add("--overwrite", action="store_true", help="begin anew where DIR holds a run")


def _refine(command: Parser) -> None:
    command.add_argument(
        "--refine",
        type=refinement,
        default="auto",
        metavar="WHEN",
        help="log p(x) by proposals of each datum's own: auto, yes, no, or the most evaluations that a datum may take "
        "(auto: K)",
    )


def _evaluate(command: Parser) -> None:
    """Measure trained runs: ELBO, log p(x), gap and whether to trust them.

    Several runs on the same data make one table; those of jensen train --seeds, in one folder, are one row of it.
    report.json goes into the folder of each run.
    """
    add = command.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder of jensen train")
    add("--data", type=Path, metavar="FILE", help="where the runs' own data file is now, if it was moved")
    add("--particles", type=int, default=5000, metavar="K", help="draws from the guide per datum")
    _refine(command)
    add("--tolerance", type=float, metavar="T", help="as many draws as an error of T nats per datum takes")
    add(
        "--split",
        type=choices("split", ("test", "validation", "train")),
        default="test",
        metavar="NAME",
        help="test, validation or train",
    )
    add("--test-size", type=int, default=1000, metavar="N", help="measure on at most so many random data of the split")
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--gaps", action="store_true", help="of several runs: split every gap into the family's and the encoder's part")
    add("--bits", action="store_true", help="bits per dimension too; in a table in place of nats")


def _sample(command: Parser) -> None:
    """Draw data from the model of a run.

    The ending of FILE names the format: .npy and .csv hold the data, .npz the latent values too; .png and .pdf are
    pictures of images.
    """
    add = command.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of jensen train")
    add("-n", type=int, default=64, metavar="N", help="number of data")
    add("--out", type=Path, default=Path("samples.npz"), metavar="FILE", help="where to")
    add("--mean", action="store_true", help="E[x | z] at draws of z, in place of draws of x: images without noise")
    add("--seed", type=int, default=0, help="seed of the draws")


def _datasets(command: Parser) -> None:
    """List the data sets, or print the card of one.

    A card says size, range, licence, whom to cite, and published results.
    """
    command.add_argument("name", nargs="?", metavar="NAME", help="the data set whose card to print")


def _compare(command: Parser) -> None:
    """Train and measure guides and models; print tables, write a report.

    Two blocks. One model, several guides: probabilistic PCA in closed form, its W turned and frozen, and the guides
    fitted to it, whose cost is read off against the exact log p(x). Model and guide trained together: PPCA and VAEs by
    SVI. Prints both tables; pictures and report.json go to the folder --out.
    """
    _data(command, ("none", "threshold", "sample"))
    add = command.add_argument_group("job").add_argument
    add(
        "--model",
        type=choices("model", ("ppca", "vae", "all")),
        default="all",
        metavar="NAME",
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
    _refine(command)
    add(
        "--epochs",
        type=whole_or("auto"),
        default="auto",
        metavar="E",
        help="passes over the training data; auto: as many as make 3000 steps of 128 data",
    )
    add("--test-size", type=int, default=1000, metavar="N", help="measure on at most so many random test data")
    add("--seed", type=int, default=0, help="seed of everything that is random")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train every pair from N seeds, so that verdicts count the variance between training runs",
    )
    add(
        "--out",
        type=Path,
        default=Path("jensen-report"),
        metavar="DIR",
        help="folder for the pictures and report.json",
    )
    add("--gaps", action="store_true", help="split every gap into the family's part and the encoder's part")
    add("--bits", action="store_true", help="bits per dimension instead of nats per datum")
