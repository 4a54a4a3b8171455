"""Helpers of the speed benchmarks: contenders in separate processes, timed in turn, and the provenance of results.

A contender is a function of a setting that returns ``run(units) -> seconds``, the time of that many units of work
(steps, or data points). Each has a separate process, so that no thread pool, allocator or parameter store is shared,
and waits while another is timed. All use the same processor cores.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("jensen", "torch", "pyro-ppl", "numpy", "numpyro", "jax", "pythae")


def confine(threads):
    """Limit this process and its children to ``threads`` cores and threads; call it before importing torch or jax."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


class Contender:
    """A contender in a separate process, started by ``script --contender name``.

    Args:
        script: the script, which then calls :func:`serve`.
        name: the name of the contender.
        route: the implementation of float32 products for contenders that use torch; "" keeps the default.
    """

    def __init__(self, script, name, route=""):
        self.name = name
        command = [sys.executable, str(script), "--contender", name, "--route", route]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question):
        """Send a question; return the answer, or {"error": why}."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"{self.name} is not running"}

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(contenders, name, route):
    """Run as a contender: read lines of JSON {"setting": ..., "units": ...}, and answer {"seconds": ..., ...}."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    runs = {}
    for line in sys.stdin:
        question = json.loads(line)
        key = json.dumps(question["setting"], sort_keys=True)
        begin = time.perf_counter()
        try:
            if key not in runs:
                if route:
                    importlib.import_module("torch").set_float32_matmul_precision(route)
                runs.clear()
                runs[key] = contenders[name](question["setting"])
            answer = {"seconds": runs[key](question["units"]), "wall": time.perf_counter() - begin}
            answer |= getattr(runs[key], "said", {})
        except ImportError as error:
            answer = {"error": f"{error}"}
        except Exception as error:  # a contender that fails gets a dash in the table, and the reason
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


class Clock:
    """A scheduler for ``fit`` that does not change rates but records the end of every epoch."""

    def __init__(self):
        self.times = []

    def __call__(self, optimizer):
        """Attach to this optimizer."""
        return self

    def step(self):
        """Record the end of an epoch."""
        self.times.append(time.perf_counter())

    def state_dict(self):
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state):
        """Empty: there is no state."""

    def after_first(self):
        """Seconds of all epochs except the first, in which model and guide are traced and compiled."""
        return self.times[-1] - self.times[0]


def in_turn(contenders, setting, rounds, seconds, multiple=1):
    """Time contenders on a setting, one after the other in every round.

    Args:
        contenders: by name.
        setting: the setting to run.
        rounds: the number of timings of each.
        seconds: the approximate time of each in a round.
        multiple: the units of a round are a multiple of this.

    Returns:
        By name: {"first": seconds of the first call (building, compiling), "each": seconds per unit in each round,
        "median", "least", "most"} or {"error": the reason}.
    """
    found, units = {}, {}
    for name, contender in contenders.items():
        first = contender.ask(setting=setting, units=multiple)
        if "error" not in first:
            trial = contender.ask(setting=setting, units=4 * multiple)["seconds"] / 4  # per ``multiple`` units
            units[name] = multiple * min(60, max(1, round(seconds / trial))) if trial > 0 else 10 * multiple
            first = {"first": first["wall"], **{k: v for k, v in first.items() if k not in ("seconds", "wall")}}
        found[name] = {**first, "each": []}
    for _ in range(rounds):
        for name, n in units.items():
            found[name]["each"].append(contenders[name].ask(setting=setting, units=n)["seconds"] / n)
    for row in found.values():
        if each := row["each"]:
            row |= {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return found


def ratio(found, name, over):
    """The ratio of a contender's median to another's; None if one is missing."""
    a, b = (found.get(n, {}).get("median") for n in (name, over))
    return None if a is None or b is None else a / b


def slope(sizes, costs):
    """The exponent of a power law of costs in sizes, by least squares of logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def provenance(script, options, start, **more):
    """The provenance of a result: command, versions, machine; ``start`` is the result of :func:`started`."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *_arguments()]),
        "date": datetime.date.today().isoformat(),
        "commit": _run("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "threads": options.threads,
        "load_before": start["load"],
        "load_after": os.getloadavg(),
        "seconds": round(time.perf_counter() - start["time"]),
        "settings": {name: v for name, v in vars(options).items() if not isinstance(v, Path)},
        **more,
    }


def started():
    """The time and the load of the machine; call it first."""
    return {"time": time.perf_counter(), "load": os.getloadavg()}


def made_by(about):
    """A sentence about the provenance, for the top of a table."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v and name != "jensen")
    return (
        f"Made by `{about['command']}` on {about['date']}, commit {about['commit']}, {about['processor']}, "
        f"{about['threads']} threads, Python {about['python']}, {versions}; load of the machine before "
        f"{about['load_before'][0]:.2f}; {about['seconds']} s."
    )


def table(head, rows):
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(options, name, about, results, text):
    """Write the tables to NAME.md, and all results to NAME.json."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps({"provenance": about, **results}, indent=2) + "\n")
    (options.out / f"{name}.md").write_text(text + "\n")


class Results:
    """Results in NAME.json and NAME.md, by table and key, each written when it is there; earlier ones are kept.

    Args:
        options: of the script.
        script: its file.
        name: of the results.
        texts: for each table, a function from its contents to markdown.
        fresh: whether to measure again what the file holds.
    """

    def __init__(self, options, script, name, texts, fresh=False):
        self.options, self.script, self.name, self.texts, self.fresh = options, script, name, texts, fresh
        self.start, self.failed = started(), 0
        self.commit = provenance(script, options, self.start)["commit"]
        path = options.out / f"{name}.json"
        self.tables = json.loads(path.read_text())["tables"] if path.exists() else {}

    def measure(self, table, key, function, settings):
        """``function()``, a dictionary of numbers, unless the file holds it already, with the same settings."""
        kept = self.tables.setdefault(table, {"made": [], "cells": {}})
        only = [part.strip() for part in self.options.only.split(";") if part.strip()]
        if only and not set(only) & set(key.split("/")):
            return
        if not self.fresh and kept["cells"].get(key, {}).get("settings") == settings:
            return
        try:
            found = function()
        except Exception as error:  # the other results are still measured, and a later run measures this one
            print(table, key, f"{type(error).__name__}: {error}", flush=True)
            self.failed += 1
            return
        kept["cells"][key] = {**found, "settings": settings}
        print(table, key, {k: v for k, v in kept["cells"][key].items() if not isinstance(v, list)}, flush=True)
        about = provenance(self.script, self.options, self.start) | {"commit": self.commit}
        line = made_by(about)
        kept["made"] = [old for old in kept["made"] if old.split(" on ")[0] != line.split(" on ")[0]] + [line]
        texts = [self.texts[name](self.tables[name]) for name in self.texts if name in self.tables]
        write(self.options, self.name, about, {"tables": self.tables}, "\n\n".join(texts))


def add_arguments(parser, rounds=5):
    """Add the options of all scripts."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="number of timings of each contender")
    add("--threads", type=int, default=2)
    add("--only", default="", help="names of contenders, separated by semicolons; all if empty")
    add("--seconds", type=float, default=1.0, help="approximate time of a contender in a round")
    add("--quick", action="store_true", help="a smoke test: little work, meaningless numbers")
    add("--out", type=Path, default=HERE / "results")
    add("--contender", default="", help="run as this contender (used by the script itself)")
    add("--route", default="", help="the implementation of float32 products of a contender")


def _arguments():
    """The command-line arguments except for the folders of output and checkpoints."""
    given = sys.argv[1:]
    return [a for before, a in zip(["", *given], given, strict=False) if not {"--out", "--runs"} & {before, a}]


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip() or "unknown"


def _processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def run_all(script, about, name, contenders, settings, targets, ours, unit, scale, multiple, also=None):
    """Main function of a script: run as the contender in the options, or time all contenders and write the tables.

    Args:
        script: the script.
        about: its description, for its help.
        name: the name of the results.
        contenders: by name.
        settings: by title.
        targets: by title and contender: the largest ratio of our time to its time.
        ours: the name of the contender that is compared with the others.
        unit: the unit of the times in the table.
        scale: the factor from seconds to ``unit``; a function of the setting, or a number.
        multiple: the entry of a setting of which the units of a round are a multiple.
        also: called at the end for further results and text: ``also(options) -> (dict, str)``.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    add_arguments(parser)
    options = parser.parse_args()
    confine(options.threads)
    if options.contender:
        serve(contenders, options.contender, options.route)
        return
    begin = started()
    wanted = {part.strip() for part in options.only.split(";") if part.strip()}
    names = [n for n in contenders if not wanted or n in wanted]
    rounds, seconds = (2, 0.05) if options.quick else (options.rounds, options.seconds)
    route = faster_products()
    print(f"float32 products: {route}", flush=True)
    running = {n: Contender(script, n, "medium" if route == "onednn" and n != ours else "") for n in names}
    results = {}
    for title, setting in list(settings.items())[: 1 if options.quick else None]:
        found = in_turn(running, setting, rounds, seconds, setting[multiple])
        factor = scale(setting) if callable(scale) else scale
        for n, row in found.items():
            row["ratio"] = ratio(found, ours, n)
            cell = _spread(row, factor) if "median" in row else row.get("error")
            print(f"{title:40s} {n:16s} {cell}", flush=True)
        results[title] = {"setting": setting, "scale": factor, "found": found}
    for contender in running.values():
        contender.close()
    more, text = also(options) if also else ({}, "")
    made = provenance(script, options, begin, products=route)
    write(options, name, made, {"results": results, **more}, _report(made, results, names, ours, targets, unit, text))


def faster_products():
    """The implementation of float32 products that jensen uses on this machine."""
    import torch

    from jensen.graphs.products import product_route

    with product_route(torch.device("cpu")) as route:
        return route


def _spread(row, factor):
    return f"{factor * row['median']:.3g} ({factor * row['least']:.3g} to {factor * row['most']:.3g})"


def _report(about, results, names, ours, targets, unit, text):
    """Three tables: times, ratios of jensen's time to the others' with targets, compilation times."""
    head = ["", *(title for title in results)]
    costs, ratios = [], []
    for n in names:
        rows = [result["found"][n] for result in results.values()]
        scales = [result["scale"] for result in results.values()]
        pairs = zip(rows, scales, strict=True)
        costs.append([n, *(_spread(row, scale) if "median" in row else "-" for row, scale in pairs)])
        cells = []
        for title, row in zip(results, rows, strict=True):
            target = targets.get(title, {}).get(n)
            cells.append("-" if row["ratio"] is None else f"{row['ratio']:.2f}" + (f" (<= {target})" if target else ""))
        ratios += [[n, *cells]] * (n != ours)
    compiling = [result["found"].get(ours, {}) for result in results.values()]
    rows = [["seconds", *(f"{max(0.0, row['compile']):.1f}" if "compile" in row else "-" for row in compiling)]]
    missing = {row["error"] for r in results.values() for row in r["found"].values() if "error" in row}
    return "\n\n".join(
        [
            f"{made_by(about)} Float32 products: {about['products']}.",
            f"Time, {unit}: median of {about['settings']['rounds']} rounds in turn (min to max).",
            table(head, costs),
            f"Time of {ours} relative to the others (below 1: {ours} is faster; in parentheses the target).",
            table(head, ratios),
            f"Tracing and compilation by {ours}: the first call minus a later one.",
            table(head, rows),
            *(f"Missing: {why}." for why in sorted(missing)),
            *([text] if text else []),
        ]
    )
