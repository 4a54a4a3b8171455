"""The options of every command, with their help texts."""

from __future__ import annotations

__all__ = ["parser"]

from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter, _ArgumentGroup
from pathlib import Path

from jensen import __version__

from .names import AVERAGES, DEFAULT_GUIDES, GRADIENTS, GUIDES, LIKELIHOODS, MODELS, OBJECTIVES, SCHEDULES, TRAINED
from .parser import Parser, choices, groups, numbers, refinement, whole_or

_EXITS = """exit status:
  0    success
  1    the run failed: its loss became infinite or NaN
  2    an error that you can correct, such as a wrong option or a missing file
  130  interrupted by Ctrl-C; jensen train --resume continues the run

Every command has --json: it prints one JSON document to stdout, and all other
output to stderr."""


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
        ("impute", _impute),
        ("datasets", _datasets),
    ):
        words = add.__doc__ or ""
        root.commands[name] = commands.add_parser(name, help=words.splitlines()[0].rstrip("."), description=words)
        add(root.commands[name])
        root.commands[name].add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return root


_WAYS = {
    "none": "none",
    "threshold": "threshold: 1 if above 1/2",
    "sample": "sample: values are probabilities, sampled once",
    "dynamic": "dynamic: sampled again for every batch",
}


def _data(command: Parser, ways: tuple[str, ...]) -> _ArgumentGroup:
    """The options for the data and their preparation."""
    data = command.add_argument_group("data")
    add = data.add_argument
    add("--data", default="digits", metavar="NAME|FILE", help="data set (see jensen datasets), or your own file")
    add("--label", metavar="COLUMN", help="for a file: the column of class labels, by name or number (0, 1, ..., -1)")
    add(
        "--header",
        action=BooleanOptionalAction,
        default=None,
        help="for a text file: whether its first line holds column names",
    )
    add("--drop", nargs="+", action="extend", metavar="COLUMN", help="for a file: columns to leave out")
    add("--only", nargs="+", action="extend", metavar="COLUMN", help="for a file: the only columns to use")
    add(
        "--missing",
        nargs="+",
        action="extend",
        metavar="VALUE",
        help="for a file: words and numbers that mark missing values, such as NA or -999; NaN, empty cells, NA, ? and "
        "the like then do so too",
    )
    add("--member", metavar="NAME", help="for an .npz or .mat file: the name of the data array")
    add("--levels", type=int, metavar="L", help="for a file: the number of grey levels (values 0 to L - 1)")
    add("--image-shape", type=numbers, metavar="H,W", help="for a file of images: their shape, H,W or H,W,C or C,H,W")
    add("--standardize", action="store_true", help="scale every feature to mean 0 and standard deviation 1")
    add(
        "--binarize",
        type=choices("way to binarize", ways),
        default="none",
        metavar="HOW",
        help="; ".join(_WAYS[way] for way in (*ways[1:], ways[0])),
    )
    return data


def _train(command: Parser) -> None:
    """Train a model and its guide, and save them in a run folder.

    The folder is self-contained: it holds configuration.json, checkpoint.pt (saved after every epoch), history.json,
    report.html and figures. After Ctrl-C, --resume continues the run; the result is identical to that of an
    uninterrupted run.
    """
    data = _data(command, ("none", "threshold", "sample", "dynamic"))
    data.add_argument(
        "--dequantize",
        action=BooleanOptionalAction,
        default=None,
        help="add uniform noise to grey levels (default: only if the likelihood is a density)",
    )
    data.add_argument("--data-seed", type=int, default=0, metavar="SEED", help="seed of the data split and the noise")
    pair = command.add_argument_group("model and guide")
    add = pair.add_argument
    add("--model", type=choices("model", MODELS), default="vae", metavar="NAME", help=", ".join(MODELS))
    add(
        "--guide",
        type=choices("guide", TRAINED),
        default="mean-field",
        metavar="NAME",
        help=", ".join(TRAINED),
    )
    add(
        "--latent",
        type=numbers,
        default=(8,),
        metavar="D",
        help="number of latent dimensions; for hierarchical one per layer, nearest to the data first, such as 16,4",
    )
    add(
        "--hidden",
        type=groups,
        default=((128, 128),),
        metavar="H",
        help="widths of the hidden layers, such as 128,128; for hierarchical optionally one list per layer, such as "
        "200,200/100,100",
    )
    add(
        "--likelihood",
        type=choices("likelihood", ("auto", *LIKELIHOODS)),
        default="auto",
        metavar="NAME",
        help=f"p(x | z): {', '.join(LIKELIHOODS)}; auto: bernoulli for binary data, else gaussian",
    )
    add("--components", type=int, metavar="C", help="for mixtures: number of components (default: 10)")
    training = command.add_argument_group("training")
    add = training.add_argument
    add(
        "--objective",
        type=choices("objective", OBJECTIVES),
        default="elbo",
        metavar="NAME",
        help=", ".join(OBJECTIVES),
    )
    add("--particles", type=int, metavar="K", help="samples per data point and step (default: 1 for elbo, else 10)")
    add(
        "--gradient",
        type=choices("gradient", GRADIENTS),
        default="standard",
        metavar="NAME",
        help="gradient estimator: standard, stl (sticking the landing) or dreg (doubly reparameterized; not for elbo)",
    )
    add("--beta", type=float, metavar="B", help="for elbo: weight of the KL (default: 1)")
    add("--alpha", type=float, metavar="A", help="for renyi: order alpha of the bound (default: 0.5)")
    add("--epochs", type=int, default=100, metavar="E", help="passes over the training data")
    add("--batch-size", type=int, default=128, metavar="B", help="data points per training step")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam")
    add(
        "--schedule",
        type=choices("schedule", SCHEDULES),
        default="constant",
        metavar="NAME",
        help="learning rate: constant; cosine (falls to 0 at the last epoch); warmup (rises in the first twentieth of "
        "the steps); warmup-cosine",
    )
    add("--clip", type=float, metavar="NORM", help="shorten gradients to this norm at most (default: any norm)")
    add("--weight-decay", type=float, metavar="W", help="L2 penalty of the weights in Adam (default: none)")
    add(
        "--average",
        type=choices("average", AVERAGES),
        metavar="NAME",
        help="average the parameters over the steps, exponentially (ema) or over all steps with weights that forget "
        "the first ones (polyak); the averages are validated and kept (default: no average)",
    )
    add(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="stop when the averaged parameters improve the validation bound by less than this over 10 epochs, up to "
        "two standard errors; not with --patience. (--tolerance of jensen evaluate is the error of log p(x) instead)",
    )
    add("--patience", type=int, metavar="P", help="stop P epochs after the best validation bound; keep the best epoch")
    add("--seed", type=int, default=0, help="seed of initial parameters, batches and samples")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train N runs in DIR/seed-..., with seeds from --seed on; jensen evaluate DIR includes the variance "
        "between runs",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    folder = command.add_argument_group("run folder")
    add = folder.add_argument
    add("--run", type=Path, default=Path("jensen-run"), metavar="DIR", help="the run folder to create")
    add(
        "--resume",
        action="store_true",
        help="continue the run in DIR with its settings; a larger --epochs extends the training",
    )
    _pictures(command, "write no figures and no report.html")
    add("--overwrite", action="store_true", help="replace the run in DIR")


def _pictures(command: Parser, help: str) -> None:
    command.add_argument("--no-pictures", action="store_true", help=help)


def _refine(command: Parser) -> None:
    command.add_argument(
        "--refine",
        type=refinement,
        default="auto",
        metavar="WHEN",
        help="estimate log p(x) with a proposal fitted to each data point: auto, yes, no, or the maximal number of "
        "evaluations per data point (auto: K)",
    )


def _evaluate(command: Parser) -> None:
    """Measure trained runs: ELBO, log p(x), their gap, and how reliable they are.

    Several runs on the same data are compared in one table. A folder of jensen train --seeds is one row of the table.
    report.html and report.json are written into the folder of each run.
    """
    add = command.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder of jensen train")
    add("--data", type=Path, metavar="FILE", help="the new path of the data file, if it was moved after training")
    add("--particles", type=int, default=5000, metavar="K", help="samples from the guide per data point")
    _refine(command)
    add("--tolerance", type=float, metavar="T", help="adapt the number of samples to an error of T nats per data point")
    add(
        "--split",
        type=choices("split", ("test", "validation", "train")),
        default="test",
        metavar="NAME",
        help="the data to measure: test, validation or train",
    )
    add("--test-size", type=int, default=1000, metavar="N", help="maximal number of data points, chosen at random")
    add("--seed", type=int, default=0, help="seed of the samples")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--gaps", action="store_true", help="for several runs: split gaps into approximation and amortization gap")
    add("--bits", action="store_true", help="also print bits per dimension; for several runs instead of nats")
    _pictures(command, "write no report.html")


def _sample(command: Parser) -> None:
    """Sample data from the model of a run.

    The extension of FILE sets the format: .npy and .csv hold the data, .npz also the latent values; .png and .pdf
    show images.
    """
    add = command.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of jensen train")
    add("-n", type=int, default=64, metavar="N", help="number of data points")
    add("--out", type=Path, default=Path("samples.npz"), metavar="FILE", help="the file to write")
    add("--mean", action="store_true", help="write means E[x | z] instead of samples of x: images without noise")
    add("--seed", type=int, default=0, help="seed of the samples")


def _impute(command: Parser) -> None:
    """Fill in the missing values of a table with a trained run.

    Each missing value is replaced by its mean given the observed values of its row, in the units of the table. The
    extension of FILE sets the format: .csv, .tsv and .parquet keep all columns of the table, .npy holds the features
    of the run. With --draws, M more files hold complete samples: FILE-1.csv, FILE-2.csv, ...
    """
    add = command.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of jensen train")
    add("--data", type=Path, metavar="FILE", help="the table, with the columns of the run; by default its own data")
    add("--out", type=Path, default=Path("filled.csv"), metavar="FILE", help="the file to write")
    add("--draws", type=int, default=0, metavar="M", help="number of complete samples to write as well")
    add("--particles", type=int, default=1000, metavar="K", help="samples from the guide per data point")
    add("--seed", type=int, default=0, help="seed of the samples")


def _datasets(command: Parser) -> None:
    """List the data sets, or print the card of one.

    A card holds size, range of values, licence, citation and published results.
    """
    command.add_argument("name", nargs="?", metavar="NAME", help="the data set of the card")


def _compare(command: Parser) -> None:
    """Train and measure guides and models; print tables, write a report.

    The first block has one model and several guides: probabilistic PCA in closed form, its W rotated and frozen. Each
    guide is fitted to it, and its variational gap is measured against the exact log p(x). In the second block, model
    and guide are trained together by SVI: PPCA and VAEs. Both tables are printed; report.html, report.json and figures
    are written into the folder --out.
    """
    _data(command, ("none", "threshold", "sample"))
    add = command.add_argument_group("models and guides").add_argument
    add(
        "--model",
        type=choices("model", ("ppca", "vae", "all")),
        default="all",
        metavar="NAME",
        help="ppca: only the first block; vae: only the second; all: both",
    )
    add(
        "--guides",
        default=",".join(DEFAULT_GUIDES),
        metavar="NAMES",
        help=f"guides of the first block, separated by commas: {', '.join(GUIDES)}; the second block uses them "
        "without prior, laplace and exact",
    )
    add("--latent", type=int, default=8, metavar="D", help="number of latent dimensions")
    add("--particles", type=int, default=5000, metavar="K", help="samples from the guide per test point")
    _refine(command)
    add(
        "--epochs",
        type=whole_or("auto"),
        default="auto",
        metavar="E",
        help="passes over the training data; auto: about 3000 steps of 128 data points",
    )
    add("--test-size", type=int, default=1000, metavar="N", help="maximal number of test points, chosen at random")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train from N seeds, so that comparisons include the variance between training runs",
    )
    add(
        "--out",
        type=Path,
        default=Path("jensen-report"),
        metavar="DIR",
        help="folder for report.html, report.json and figures",
    )
    add("--gaps", action="store_true", help="split gaps into approximation and amortization gap")
    add("--bits", action="store_true", help="bits per dimension instead of nats per data point")
    _pictures(command, "write no figures and no report.html")
