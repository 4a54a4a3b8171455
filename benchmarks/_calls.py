"""Attacks on arguments and threads for faults.py, which adds ``_calls.ATTACKS``; options ``calls`` and ``seed``.

A call that raised an error message of jensen counts as ``refused``, one that returned as ``same``; failures are listed
as ``short``.
"""

import collections
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from calls import Calls
from members import pair

from jensen.inference import evaluate, log_weights

__all__ = ["ATTACKS", "generated_calls", "two_threads"]


def _row(attack, tries, short, refused=0):
    return {
        "attack": attack,
        "tries": tries,
        "refused": refused,
        "same": tries - refused - len(short),
        "other": 0,
        "short": [str(failure) for failure in short],
    }


def generated_calls(options):
    """Calls of all public names with unsuitable arguments: none may raise an error of another library, or hang."""
    calls, short, refused = Calls(options.seed), [], 0
    for i in range(getattr(options, "calls", 100_000)):
        failure = calls.one()
        if failure is not None:
            short.append(failure)
        if failure is not None or i % 5000 == 0:
            print(f"call {i}: {failure or 'as it should end'}", file=sys.stderr, flush=True)
        refused += calls.refused
    return [_row("generated calls", getattr(options, "calls", 100_000), short, refused)]


def two_threads(options):
    """Two threads that measure one model: the same numbers as with one thread, and unchanged training modes."""
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    expected = [evaluate(model, guide, x, 50, seed=s, compile=False, progress=False).log_evidence for s in range(2)]
    modes, tries, failures = (model.training, guide.training), collections.Counter(), []

    def measure(seed):
        for _ in range(40):
            tries["calls"] += 1
            try:
                log_weights(model, guide, x, particles=2)
                made = evaluate(model, guide, x, 50, seed=seed, compile=False, progress=False).log_evidence
                if not torch.equal(made, expected[seed]):
                    failures.append(f"other numbers at seed {seed}: {made} for {expected[seed]}")
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=measure, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if (model.training, guide.training) != modes:
        failures.append(f"modes {(model.training, guide.training)} for {modes}")
    return [_row("two threads on one model", tries["calls"], failures)]


ATTACKS = {"calls": generated_calls, "threads": two_threads}
