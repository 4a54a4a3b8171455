"""Attacks on files and runs: what came back whole, what was refused in one sentence, and what fell short.

    python benchmarks/faults.py --mutations 10000 --kills 20 --attacks mutations kills

Every attack is a function of the options in ``ATTACKS``. It gives back a row for each thing attacked: ``attack``,
``tries``, ``refused`` (the documented error), ``same`` (the undamaged result), ``other`` (another result that no digest
can tell from the undamaged one) and ``short``, the failures: foreign errors, crashes, losses, silent differences.

The table goes to results/faults.md, everything to results/faults.json; the exit status is 1 where anything fell short.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _calls
import _common as common
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import damage  # of the tests, which run a few of these

from jensen.families import Bernoulli, MeanField
from jensen.guides import amortize
from jensen.inference import Callback, evaluate, fit
from jensen.models import VAE
from jensen.networks import mlp

COLUMNS = ("attack", "tries", "refused", "same", "other", "short")
SLOW = """
import os, random, signal, sys
from jensen.cli import main
from jensen.results import files
save, left = files.torch.save, int(sys.argv.pop(1))
def half(state, file):
    global left
    left -= 1
    if left:
        return save(state, file)
    class Cut:
        def write(self, part):
            file.write(bytes(part)[: len(part) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(state, Cut())
files.torch.save = half
sys.exit(main(sys.argv[1:]))
"""
_GROWTH = 16 * 2**20  # bytes
ROUTES = {"eager": 10, "captured": 60}  # epochs of 4 steps: short runs stay eager


def damaged(options):
    """Mutations of a file of each kind, in equal shares."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JENSEN_DATA"] = str(Path(folder).parent)
        damage.make_files(Path(folder))
        each = -(-options.mutations // len(damage.KINDS))
        return [damage.attack(Path(folder), name, each, options.seed) for name in damage.KINDS]


def killed(options):
    """Runs that are killed, half of them inside a write, and go on: they end as a run that nothing stopped."""
    return [_killed(options, route, epochs) for route, epochs in ROUTES.items()]


def _killed(options, route, epochs):
    r = random.Random(f"{route} {options.seed}")
    found = {"attack": f"killed, {route}", "tries": options.kills, "refused": 0, "same": 0, "other": 0, "short": []}
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--latent", "2", "--hidden", "16", "--batch-size", "300", "--epochs", str(epochs), "--no-pictures"]
        whole = Path(folder) / "whole"
        _jensen("train", "--run", str(whole), *arguments).communicate()
        for i in range(options.kills):
            run = Path(folder) / str(i)
            command = ["train", "--run", str(run), *arguments]
            if i % 2:
                process = _python(SLOW, str(r.randint(1, epochs)), *command)
            else:
                process = _jensen(*command)
                begin = time.monotonic()
                while not (run / "configuration.json").exists() and time.monotonic() < begin + 60:
                    time.sleep(0.01)
                time.sleep(r.uniform(0, 1.5))
                process.send_signal(signal.SIGKILL)
            process.communicate()
            resumed = _jensen("train", "--run", str(run), "--resume", "--no-pictures")
            _, log = resumed.communicate()
            if resumed.returncode or _parameters(run) != _parameters(whole):
                found["short"].append(f"{route} {i}: status {resumed.returncode}: {log.strip()[-200:]}")
            else:
                found["same"] += 1
    return found


def _python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=-1, stderr=-1, text=True)


def _jensen(*arguments):
    return _python("import sys; from jensen.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def _parameters(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return [p.numpy().tobytes() for p in [*state["parameters"], state["random"]]]


def full(options):
    """Runs whose files may have so many bytes, from none to all that they need: status 2 and one line, or 0."""
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
    """Many steps of one run, and many evaluations: memory stays what it was after the first tenth of them."""
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
    """Bytes of memory that this process has in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Memory(Callback):
    """A callback that notes the memory in use after each epoch."""

    def __init__(self, seen):
        self.seen = seen

    def after_epoch(self, *_):
        self.seen.append(_resident())


ATTACKS = {"mutations": damaged, "kills": killed, "full": full, "long runs": endured, **_calls.ATTACKS}


def main():
    """Run the attacks that are named, all by default."""
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
    rows = [row for name in options.attacks for row in ATTACKS[name](options)]
    about = common.provenance(__file__, options, start)
    cells = [[str(len(row[c]) if c == "short" else row[c]) for c in COLUMNS] for row in rows]
    text = f"{common.made_by(about)}\n\n{common.table(COLUMNS, cells)}"
    common.write(options, "faults", about, {"rows": rows}, text)
    return int(any(row["short"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
