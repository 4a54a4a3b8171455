"""Robustness tests on files and runs: counts of unchanged results, of clear errors, and of failures.

    python benchmarks/faults.py --mutations 10000 --kills 20 --attacks mutations kills

Every attack in ``ATTACKS`` is a function of the options. It returns a row for each target: ``attack``, ``tries``,
``refused`` (the documented error), ``same`` (the undamaged result), ``other`` (another result that no digest can
distinguish from the undamaged one) and ``short``, the failures: undocumented errors, crashes, lost data, silent
differences.

Output: the table in results/faults.md, all results in results/faults.json. They are written after each attack and
replace earlier results of the same attack and seed, so a long attack can run in parts. The exit status is 1 if there
were failures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _calls
import _common as common
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import damage  # a module of the tests, which run a few of these attacks
import kills

from jensen.families import Bernoulli, MeanField
from jensen.guides import amortize
from jensen.inference import Callback, evaluate, fit
from jensen.models import VAE
from jensen.networks import mlp

COLUMNS = ("attack", "tries", "refused", "same", "other", "short")
_GROWTH = 16 * 2**20  # bytes


def damaged(options):
    """Mutations of files of each kind, in equal numbers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JENSEN_DATA"] = str(Path(folder).parent)
        damage.make_files(Path(folder))
        each = -(-options.mutations // len(damage.KINDS))
        return [damage.attack(Path(folder), name, each, options.seed) for name in damage.KINDS]


def killed(options):
    """Runs that are killed, half of them during a write, and resumed: the result must equal an uninterrupted run."""
    rows = []
    for route in kills.ROUTES:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, kills.__file__, route, "--kills", str(options.kills), "--seed", str(options.seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        out, _ = process.communicate()
        found = json.loads(out)[route] if process.returncode == 0 else {"same": 0, "short": ["the attack did not end"]}
        print(f"{route}: {options.kills} kills in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        rows.append({"attack": f"killed, {route}", "tries": options.kills, "refused": 0, "other": 0, **found})
    return rows


def _python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=-1, stderr=-1, text=True)


def full(options):
    """Runs with a limit on file size, from zero to sufficient: status 2 and one line, or 0."""
    row = {"attack": "full disk", "tries": 0, "refused": 0, "same": 0, "other": 0, "short": []}
    code = (
        "import resource, signal, sys; from jensen.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); sys.exit(main(sys.argv[2:]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in (0, 100, 1_000, 2_000, 10_000, 20_000, 40_000, 80_000, 10**9):
            run = Path(folder) / str(size)
            process = _python(code, str(size), "train", "--run", str(run), "--epochs", "2", "--hidden", "8")
            _, log = process.communicate()
            row["tries"] += 1
            row["refused"] += process.returncode == 2
            row["same"] += process.returncode == 0
            if process.returncode not in (0, 2) or "Traceback" in log or list(run.glob(".*.partial.*")):
                row["short"].append(f"{size} bytes: status {process.returncode}: {log.strip()[-200:]}")
    return [row]


def endured(options):
    """Many steps of one run, and many evaluations: memory must not grow after the first tenth."""
    model = VAE(mlp(2, [16]), Bernoulli(20, 16), latent=2)
    guide = amortize(model, mlp(20, [16]), MeanField, context=16)
    x = (torch.rand(1_000, 20) > 0.5).float()
    seen = {"steps": [], "evaluations": []}
    per_epoch = 100
    epochs = max(10, options.steps // per_epoch)
    fit(
        *(model, guide, x),
        epochs=epochs,
        batch_size=len(x) // per_epoch,
        callbacks=[_Memory(seen["steps"])],
        progress=False,
        seed=options.seed,
    )
    for i in range(options.evaluations):
        evaluate(model, guide, x[:20], 50, seed=i, progress=False)
        seen["evaluations"].append(_resident())
    rows = []
    for (name, memory), tries in zip(seen.items(), (epochs * per_epoch, options.evaluations), strict=True):
        grown = memory[-1] - memory[len(memory) // 10]
        short = [f"grew by {grown / 2**20:.0f} MiB"] if grown > _GROWTH else []
        rows.append({"attack": name, "tries": tries, "refused": 0, "same": tries, "other": 0, "short": short})
    return rows


def _resident():
    """Bytes of memory in use by this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Memory(Callback):
    """A callback that records the memory in use after each epoch."""

    def __init__(self, seen):
        self.seen = seen

    def after_epoch(self, *_):
        self.seen.append(_resident())


ATTACKS = {"mutations": damaged, "kills": killed, "full": full, "long runs": endured, **_calls.ATTACKS}


def main():
    """Run the attacks in the options, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    add("--mutations", type=int, default=10_000)
    add("--kills", type=int, default=20)
    add("--calls", type=int, default=100_000)
    add("--steps", type=int, default=200_000)
    add("--evaluations", type=int, default=5_000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    options.threads = torch.get_num_threads()
    short = False
    for name in options.attacks:
        rows = ATTACKS[name](options)
        about = common.provenance(__file__, options, start)
        write(options, name, about, rows)
        for row in rows:
            print(*(f"{c} {len(row[c]) if c == 'short' else row[c]}" for c in COLUMNS), sep=", ", flush=True)
        short = short or any(row["short"] for row in rows)
    return int(short)


def write(options, name, about, rows):
    """Write the rows of an attack, replacing earlier results of the same attack and seed."""
    path = options.out / "faults.json"
    known = json.loads(path.read_text())["attacks"] if path.exists() else {}
    known[f"{name}, seed {options.seed}"] = {"provenance": about, "rows": rows}
    order = [*ATTACKS]
    known = dict(sorted(known.items(), key=lambda item: (order.index(item[0].partition(",")[0]), item[0])))
    cells = [
        [*(str(len(row[c]) if c == "short" else row[c]) for c in COLUMNS), str(made["provenance"]["settings"]["seed"])]
        for made in known.values()
        for row in made["rows"]
    ]
    made_by = {made["provenance"]["command"]: made["provenance"] for made in known.values()}
    sources = [common.made_by(about) for about in made_by.values()]
    text = "\n\n".join([common.table([*COLUMNS, "seed"], cells), *sources])
    common.write(options, "faults", about, {"attacks": known}, text)


if __name__ == "__main__":
    sys.exit(main())
