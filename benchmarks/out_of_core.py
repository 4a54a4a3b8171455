"""Training on data that are read by the batch: pace relative to data in memory, and peak memory of large files.

    python benchmarks/out_of_core.py --folder /tmp/data --gigabytes 2 20

Pace: an epoch of ``fit`` without the first one, which traces and compiles, on equal rows in memory, in a ``.npy`` file,
in a folder of Parquet files, in a torch ``Dataset`` and in a sparse matrix. Contenders run in turn, in separate
processes; a ratio is the median (minimum to maximum) of the ratios of the rounds. The target of files
is a pace of at least 0.9 times that of data in memory.

Memory: for each size a file is written, removed from the page cache, and read in one epoch by a new process, whose peak
(``VmHWM``) is reported; the target is 1 GB for 2 GB of data. The pace of its steps is compared with that of a process
that trains the same model on 1 GB of the same rows in memory.

Output: the tables in results/out_of_core.md, all numbers in results/out_of_core.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

import _common as common

FEATURES = 784
SETTINGS = {
    "784-400-20, batch 128": {"hidden": [400], "latent": 20, "batch": 128, "compile": "auto"},
    "784-20-2, batch 1000": {"hidden": [20], "latent": 2, "batch": 1000, "compile": "auto"},
}
LARGE = {"hidden": [100], "latent": 10, "batch": 500, "compile": True}  # the same route for any number of steps
HELD = 10**9  # bytes of the data in memory


def pair(setting):
    """A VAE and its guide."""
    import torch
    from torch import nn

    from jensen.families import Gaussian, MeanField
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import mlp

    torch.manual_seed(0)
    hidden, latent = setting["hidden"], setting["latent"]
    model = VAE(mlp(latent, hidden[::-1], nn.Tanh), Gaussian(FEATURES, hidden[0], scale="shared"), latent)
    return model, amortize(model, mlp(FEATURES, hidden, nn.Tanh), MeanField, context=hidden[-1])


def write(path, rows, share=1.0):
    """A file of standard normal numbers, of which a share is not zero."""
    import numpy as np

    random = np.random.default_rng(0)
    made = np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))
    for first in range(0, rows, 10_000):
        x = random.standard_normal((min(10_000, rows - first), FEATURES), dtype=np.float32)
        made[first : first + len(x)] = x if share == 1 else np.where(random.random(x.shape) < share, np.abs(x), 0)
        if first % 200_000 == 0:
            made.flush()
    made.flush()


def data_of(kind, rows, folder):
    """The same rows in one of the kinds."""
    import numpy as np
    import torch
    from torch.utils.data import Dataset

    path = Path(folder) / f"{rows}.npy"
    if kind == ".npy file":
        return path
    x = np.load(path)
    if kind == "in memory":
        return torch.from_numpy(x)
    if kind == "sparse matrix":
        from scipy.sparse import csr_matrix

        return csr_matrix(np.where(np.abs(x) > 1.6, x, 0))  # 11 % are not zero
    if kind == "Parquet folder":
        import pyarrow
        from pyarrow import parquet

        made = path.with_suffix("")
        if not made.exists():
            made.mkdir()
            for i, part in enumerate(np.array_split(x, 4)):
                table = pyarrow.table({str(j): part[:, j] for j in range(FEATURES)})
                parquet.write_table(table, made / f"{i}.parquet", row_group_size=5000)
        return made

    class Rows(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return torch.from_numpy(x[i])

    return Rows()


KINDS = ("in memory", ".npy file", "Parquet folder", "Dataset", "sparse matrix")


def epoch(kind, setting):
    """A timed function of a number of epochs."""
    from jensen.inference import fit

    data = data_of(kind, setting["rows"], setting["folder"])
    known = {}

    def run(units):
        clock = common.Clock()
        how = {"batch_size": setting["batch"], "seed": 0, "compile": setting["compile"], "progress": False}
        known["route"] = fit(*pair(setting), data, epochs=1 + units, scheduler=clock, **how).route
        return clock.after_first()

    run.said = known
    return run


CONTENDERS = {kind: partial(epoch, kind) for kind in KINDS}


def pace(options, folder):
    """Times of the kinds in turn, and each one's pace relative to data in memory in each round."""
    rows = 3_000 if options.quick else options.rows
    write(Path(folder) / f"{rows}.npy", rows)
    wanted = {part.strip() for part in options.only.split(";") if part.strip()}
    running = {kind: common.Contender(__file__, kind) for kind in KINDS if not wanted or kind in wanted}
    found = {}
    for title, setting in list(SETTINGS.items())[: 1 if options.quick else None]:
        setting = {**setting, "rows": rows, "folder": str(folder)}
        found[title] = common.in_turn(running, setting, options.rounds, 0.1 if options.quick else options.seconds)
        print(title, {kind: row.get("median", row.get("error")) for kind, row in found[title].items()}, flush=True)
    for contender in running.values():
        contender.close()
    return {"rows": rows, "found": found}


class _Steps:
    """A batch_transform that records when the last 500 batches were transformed: of the end of the epoch."""

    def __init__(self):
        self.times = deque(maxlen=501)

    def __call__(self, x):
        """Return the batch as it is."""
        self.times.append(time.perf_counter())
        return x

    def seconds(self):
        """Seconds of a step."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def large(path, kind):
    """Train one epoch on a file, and print the seconds of a step and the peak of memory."""
    import numpy as np
    import torch

    from jensen.inference import fit

    steps, data = _Steps(), Path(path)
    if kind == "in memory":
        data = torch.from_numpy(np.load(path, mmap_mode="r")[: HELD // (4 * FEATURES)].copy())
    how = {"batch_size": LARGE["batch"], "seed": 0, "compile": LARGE["compile"], "progress": False}
    history = fit(*pair(LARGE), data, epochs=1, batch_transform=steps, **how)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"step": steps.seconds(), "peak": peak, "steps": history.steps, "seconds": history.seconds}))


def memory(options, folder):
    """Peaks of memory and paces for files of each size."""
    found = {}
    for size in options.gigabytes:
        rows = int(size * 1e9) // (4 * FEATURES)
        path = Path(folder) / "large.npy"
        write(path, rows)
        found[str(size)] = {"bytes": path.stat().st_size, "rows": rows}
        for kind in (".npy file", "in memory", ".npy file", "in memory"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
            command = [sys.executable, __file__, "--large", str(path), "--route", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[str(size)].setdefault(kind, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(size, kind, found[str(size)][kind][-1], flush=True)
        path.unlink()
    return found


def ratios(row, base):
    """The pace relative to a base in each round: median (minimum to maximum)."""
    values = [b / a for a, b in zip(row["each"], base["each"], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def text(results):
    """The tables."""
    parts = []
    if "pace" in results:
        found, rows = results["pace"]["found"], results["pace"]["rows"]
        parts += [
            results["pace"]["made"],
            f"Pace of training on {rows:,} rows of {FEATURES} numbers ({rows * FEATURES * 4 / 1e6:.0f} MB), relative "
            "to the same rows in memory, in the same round: median (minimum to maximum); above 1 is faster. The target "
            "of files is at least 0.9. In the first row seconds of an epoch.",
        ]
        kinds = list(next(iter(found.values())))
        lines = []
        for kind in kinds:
            cells = []
            for setting in found.values():
                row, base = setting[kind], setting["in memory"]
                if not row.get("each"):
                    cells.append("-")
                elif kind == "in memory":
                    cells.append(f"{row['median']:.2f} s ({row['least']:.2f} to {row['most']:.2f})")
                else:
                    cells.append(ratios(row, base))
            lines.append([kind, *cells])
        parts.append(common.table(["", *found], lines))
    if "memory" in results:
        parts += [
            results["memory"]["made"],
            "One epoch on a file, read from disk by a new process: peak of memory of the whole process in GB (two "
            "runs), and the pace of the last 500 steps relative to a process with 1 GB of the same rows in memory (two "
            "runs each, in turn). The target for 2 GB is a peak of at most 1 GB.",
        ]
        lines = []
        for size, row in results["memory"]["found"].items():
            here, there = row[".npy file"], row["in memory"]
            lines.append(
                [
                    f"{float(size):g} GB, {row['rows']:,} rows",
                    ", ".join(f"{run['peak'] / 1e9:.2f}" for run in here),
                    ", ".join(f"{b['step'] / a['step']:.2f}" for a, b in zip(here, there, strict=True)),
                    ", ".join(f"{run['seconds']:.0f}" for run in here),
                ]
            )
        parts.append(common.table(["file", "peak, GB", "pace", "seconds of the run"], lines))
    return "\n\n".join(parts)


def main():
    """Run as a contender, or measure and write the tables; a part that is not asked for keeps its earlier numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write the files; a temporary folder if None"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the pace")
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[2.0], help="sizes of the large files")
    parser.add_argument("--parts", nargs="+", default=["pace", "memory"], choices=["pace", "memory"])
    parser.add_argument("--large", default="", help="train on this file (used by the script itself)")
    options = parser.parse_args()
    common.confine(options.threads)
    if options.contender:
        common.serve(CONTENDERS, options.contender, options.route)
        return
    if options.large:
        large(options.large, options.route)
        return
    file = options.out / "out_of_core.json"
    results = json.loads(file.read_text())["results"] if file.is_file() and not options.quick else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.parts:
            begin = common.started()
            if options.quick and name == "memory":
                continue
            found = pace(options, folder) if name == "pace" else {"found": memory(options, folder)}
            about = common.provenance(__file__, options, begin)
            about["settings"]["folder"] = str(options.folder)
            results[name] = {**found, "made": common.made_by(about), "provenance": about}
    common.write(options, "out_of_core", {"parts": list(results)}, {"results": results}, text(results))


if __name__ == "__main__":
    main()
