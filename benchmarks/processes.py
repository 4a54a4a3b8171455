"""Scaling with the number of processes: training and evidence by one and two processes, and the cost of many on paper.

    python benchmarks/processes.py            # about 8 minutes; --quick for a smoke run

Each process has one core and one thread; `torchrun` starts one or two of them, in turn; a round is a start of each.
A Bernoulli VAE with tanh networks and Adam, random bits as data, float32.

| measurement | what it is |
| --- | --- |
| training, strong | `fit(..., compile=True)`, the same batch in all: a process of two has half of it |
| training, weak | the batch grows with the processes |
| evidence, strong and weak | `evaluate`, the same data in all, and data that grow with the processes |
| all-reduce | the sum of a vector as long as the gradient over the processes, as in every step |

Strong scaling is the time of one process over that of two (2 is ideal), weak scaling the same where the work has grown
(1 is ideal); both are ratios within a round.

The cost of P processes on paper is that of a ring: each sends 2 (P - 1) / P times the bytes of the gradient, in
2 (P - 1) messages, one after the other:

    seconds = 2 (P - 1) / P * bytes / bandwidth + 2 (P - 1) * latency

Output: the tables in results/processes.md, all results in results/processes.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _common as common

HIDDEN, LATENT = [400], 20
NETWORKS = {  # assumed: bytes per second, seconds per message
    "gigabit Ethernet": (1.1e8, 5e-5),
    "100 Gbit/s": (1.1e10, 1e-5),
    "NVLink": (2e11, 5e-6),
}
COUNTS = (2, 8, 64, 1000)


def sizes(quick):
    """Batch and steps of an epoch in training; data points and particles of evidence."""
    return (32, 4, 16, 8) if quick else (512, 20, 246, 500)


def pair():
    """A model and its guide."""
    from torch import nn

    from jensen.families import Bernoulli, MeanField
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import mlp

    model = VAE(mlp(LATENT, HIDDEN[::-1], nn.Tanh), Bernoulli(784, HIDDEN[0]), LATENT)
    return model, amortize(model, mlp(784, HIDDEN, nn.Tanh), MeanField, context=HIDDEN[-1])


def training(batch, steps, epochs, compiled):
    """Seconds per step of fit, without the first epoch."""
    import torch

    from jensen.inference import fit

    torch.manual_seed(0)
    x, clock = (torch.rand(batch * steps, 784) > 0.5).float(), common.Clock()
    how = {"batch_size": batch, "epochs": epochs, "seed": 0, "compile": compiled, "progress": False}
    history = fit(*pair(), x, scheduler=clock, **how)
    return clock.after_first() / ((epochs - 1) * steps), history.route


def evidence(n, particles):
    """Seconds of evaluate for n data points, after a first call that traces."""
    import torch

    from jensen.inference import evaluate

    torch.manual_seed(0)
    x, (model, guide) = (torch.rand(n, 784) > 0.5).float(), pair()
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        evaluate(model, guide, x, particles, seed=0, compile=False, refine=False, progress=False)
        seconds.append(time.perf_counter() - begin)
    return seconds[-1]


def all_reduce(repeats):
    """Seconds of the sum of a vector as long as the gradient, and its bytes."""
    import torch

    from jensen import processes

    flat = torch.zeros(parameters())
    seconds = []
    for _ in range(repeats if processes.count() > 1 else 0):
        begin = time.perf_counter()
        processes.summed(flat)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) if seconds else 0.0


def parameters():
    """The number of parameters of model and guide."""
    return sum(p.numel() for half in pair() for p in half.parameters())


def worker(options):
    """Measure in this process, together with the others; process 0 writes."""
    local = int(os.environ["LOCAL_RANK"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[local % len(cores)]})
    import torch

    from jensen import processes

    torch.set_num_threads(1)
    batch, steps, n, particles = sizes(options.quick)
    epochs, count = 2 if options.quick else 4, processes.count()
    compiled = not options.quick
    strong, route = training(batch, steps, epochs, compiled)
    found = {
        "training, strong": strong,
        "training, weak": training(batch * count, steps, epochs, compiled)[0] if count > 1 else strong,
        "evidence, strong": evidence(n, particles),
        "evidence, weak": evidence(n * count, particles),
        "all-reduce": all_reduce(5 if options.quick else 200),
        "route": route,
    }
    if processes.rank() == 0:
        options.into.write_text(json.dumps(found))


def launched(count, options):
    """The measurements of ``count`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [__file__, "--into", str(into), *["--quick"] * options.quick]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(into.read_text())


def on_paper(bytes_, step):
    """Seconds of the all-reduce, and the share of a step that is left for computing, by network and processes."""
    made = {}
    for name, (bandwidth, latency) in NETWORKS.items():
        for P in COUNTS:
            seconds = 2 * (P - 1) / P * bytes_ / bandwidth + 2 * (P - 1) * latency
            made.setdefault(name, {})[P] = {"seconds": seconds, "efficiency": step / (step + seconds)}
    return made


def spread(values, scale=1.0, digits=3):
    """Median, least and most."""
    middle, low, high = (f"{scale * f(values):.{digits}g}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def report(about, rounds, paper, bytes_):
    """The tables."""
    rows = []
    for name in ("training, strong", "training, weak", "evidence, strong", "evidence, weak"):
        one, two = ([r[count][name] for r in rounds] for count in ("1", "2"))
        scaling = [a / b for a, b in zip(one, two, strict=True)]
        scale, unit = (1e3, "ms per step") if name.startswith("training") else (1.0, "s")
        rows.append([name, unit, spread(one, scale), spread(two, scale), spread(scaling)])
    batch, _, n, particles = sizes(about["settings"]["quick"])
    reduced = [r["2"]["all-reduce"] for r in rounds]
    head = ["network", "bandwidth, latency", *(f"P = {P}" for P in COUNTS)]
    cells = [
        [
            name,
            f"{NETWORKS[name][0] / 1e9:g} GB/s, {1e6 * NETWORKS[name][1]:g} us",
            *(f"{1e3 * row['seconds']:.2f} ms, {100 * row['efficiency']:.0f} %" for row in by.values()),
        ]
        for name, by in paper.items()
    ]
    return "\n\n".join(
        [
            common.made_by(about),
            f"784-400-20; batch {batch}; evidence of {n} data points, K = {particles}. Routes: one process "
            f"{rounds[0]['1']['route']}; two {rounds[0]['2']['route']}. Median of {len(rounds)} rounds (min to max).",
            common.table(["", "unit", "1 process", "2 processes", "scaling within a round"], rows),
            f"The sum of {bytes_ / 1e6:.2f} MB over two processes of this machine takes {spread(reduced, 1e3)} ms.",
            "On paper, with the assumed networks: milliseconds of the all-reduce per step, and the share of a step "
            "that is left for computing, where each process computes as long as one process does here (weak scaling).",
            common.table(head, cells),
        ]
    )


def main():
    """Start one and two processes in turn, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser)
    parser.add_argument("--into", type=Path, help="the file of the results (used by the script itself)")
    options = parser.parse_args()
    if options.into:
        worker(options)
        return
    options.threads = 1
    begin, rounds = common.started(), []
    for i in range(2 if options.quick else options.rounds):
        order = (1, 2) if i % 2 == 0 else (2, 1)
        rounds.append({str(count): launched(count, options) for count in order})
        print(f"round {i + 1}: {rounds[-1]}", flush=True)
    bytes_ = 4 * parameters()
    step = statistics.median(r["1"]["training, strong"] for r in rounds)
    paper = on_paper(bytes_, step)
    about = common.provenance(__file__, options, begin)
    about["settings"].pop("into")
    results = {"rounds": rounds, "bytes": bytes_, "networks": NETWORKS, "paper": paper}
    common.write(options, "processes", about, results, text := report(about, rounds, paper, bytes_))
    print(text)


if __name__ == "__main__":
    main()
