"""Runs that are killed, half of them during a write, and resumed: bitwise identical to an uninterrupted run.

Every run is a fork of one process that has done the same run once, so that imports and compiled code are ready. As a
program, it prints the results as JSON.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from jensen import cli
from jensen.datasets import load
from jensen.results import files

ROUTES = {"eager": False, "traced": "auto", "compiled": True}  # what each is asked for by fit(compile=...)
_EPOCHS = {"eager": 12, "traced": 70, "compiled": 90}  # of 3 full batches: a graph pays for 200
_LONGEST = 300  # seconds of a run


def attack(route, kills, seed=0, say=lambda line: None):
    """Kill runs on a route; count equal results, and list failures."""
    r = random.Random(f"{route} {seed}")
    found = {"same": 0, "inside writes": 0, "other routes": 0, "short": []}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        _train(route, Path(folder) / "first")  # before timing
        began = time.monotonic()
        status, log = _ended(_started(route, whole))
        seconds = time.monotonic() - began
        state = _state(whole)
        way = _route(whole)
        say(f"{route}: the whole run took {seconds:.1f} s, {way}")
        if status or not way.startswith("traced and compiled" if route == "compiled" else route):
            found["short"].append(f"{route}: the whole run, {way}: status {status}: {log}")
        for i in range(kills):
            run = Path(folder) / str(i)
            what = _kill(route, run, i, r, seconds)
            begun, done = (run / "configuration.json").exists(), (run / "checkpoint.pt").exists()
            epochs = len(_state(run)["history"]["elbo"]) if done else 0
            status, log = _ended(_started(route, run, resume=begun))
            left = [path.name for path in run.glob(".*.partial.*")]
            differ = [] if status else _differences(state, _state(run))
            said = f"{route} {i}, {what}, after {epochs} of {_EPOCHS[route]} epochs"
            if status or differ or left:
                found["short"].append(f"{said}: status {status}, other {differ}, left {left}: {log}")
            else:
                found["same"] += 1
            found["inside writes"] += what.startswith("inside")
            found["other routes"] += not status and _route(run).partition(":")[0] != way.partition(":")[0]
            say(f"{said}: {'as the whole run' if not (status or differ or left) else found['short'][-1]}")
    return found


def _kill(route, run, i, r, seconds):
    """Start a run and kill it, during a write (every other time, first after one epoch) or at any time."""
    if i % 2:
        how = r.choice(["half of a write", "a later write", "before the file is moved"])
        cut = (2 if i == 1 else r.randint(1, _EPOCHS[route]), how, r.randint(1, 40))
        status, log = _ended(_started(route, run, cut=cut))
        if status != -signal.SIGKILL:
            raise AssertionError(f"{route}: {how} of {cut} did not end the run: status {status}: {log}")
        return f"inside write {cut[0]} ({how})"
    after = r.uniform(0.3, 1) * seconds
    while True:
        child, log = _started(route, run)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if _ended((child, log))[0] == -signal.SIGKILL:
            return f"after {after:.1f} s"
        for path in run.iterdir():  # it ended before the kill
            path.unlink()
        run.rmdir()
        after *= 0.7


def _started(route, run, resume=False, cut=None):
    """A training process: its id, and its output file."""
    log = run.parent / f"{run.name}.log"
    child = os.fork()
    if child:
        return child, log
    status = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(_LONGEST)
        if cut:
            _cut(*cut)
        status = _train(route, run, resume)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(route, run, resume=False):
    """Train in this process, as the command line does; the exit status."""
    train = importlib.import_module("jensen.cli.train")
    fit = train.fit
    train.fit = functools.partial(fit, compile=ROUTES[route])
    try:
        sizes = ["--latent", "2", "--hidden", "16", "--batch-size", "300", "--epochs", str(_EPOCHS[route])]
        with contextlib.redirect_stdout(sys.stderr):
            return cli.main(["train", "--run", str(run), "--no-pictures", *(["--resume"] if resume else sizes)])
    finally:
        train.fit = fit


def _ended(started):
    """The status of a process (minus the signal if killed), and the end of its output."""
    child, log = started
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()[-500:].strip()


def _cut(left, how, writes):
    """Kill this process when it writes a given checkpoint."""
    save, replace = files.torch.save, os.replace

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    class Cut:
        """A file that accepts a given number of writes, and half of the next."""

        def __init__(self, file, whole):
            self.file, self.whole = file, whole

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, part):
            if self.whole:
                self.whole -= 1
                return self.file.write(part)
            self.file.write(bytes(part)[: len(part) // 2])
            self.file.flush()
            return kill()

    def cut(state, file):
        nonlocal left
        left -= 1
        if left:
            return save(state, file)
        if how == "before the file is moved":
            files.os.replace = lambda *_: kill()
            return save(state, file)
        save(state, Cut(file, writes if how == "a later write" else 0))
        return kill()  # there are fewer writes: killed between the last one and the digest

    assert replace is files.os.replace
    files.torch.save = cut


def _state(run):
    return files.read_checkpoint(run / "checkpoint.pt")


def _route(run):
    return json.loads((run / "history.json").read_text())["fields"]["route"]


def _differences(one, other):
    """The names of different entries in two checkpoints, except times, routes, versions and run ids."""
    a, b = dict(_leaves(one)), dict(_leaves(other))
    timed = ("seconds", "elapsed", "route", "compiled", "versions", "identity")
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name) and not any(t in name for t in timed)]


def _leaves(value, name=""):
    """Every number of a checkpoint by its path; tensors as bytes, so that NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        yield name, (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}")
    else:
        yield name, repr(value)


def main():
    """Kill runs, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("routes", nargs="+", choices=list(ROUTES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load("digits")  # imports what the runs need
    found = {
        route: attack(route, options.kills, options.seed, lambda line: print(line, file=sys.stderr, flush=True))
        for route in options.routes
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
