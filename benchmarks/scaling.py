"""Scaling of the runtime of `fit` and `evaluate` with the data N, the particles K, the latent features D, the width.

    python benchmarks/scaling.py               # about 8 minutes; --quick for a smoke run

Bernoulli VAEs of 784 features with two tanh layers each way, random bits, float32, compiled. One size is varied, the
others stay at K = 500 (in training: 1), D = 50, width 200. A runtime is the time of a long call minus that of a short
one (in training: of all epochs except the first), so that tracing and compilation cancel; it is the median of rounds
over all sizes. The slope is the exponent of a power law through all runtimes, and through the last two (1:
proportional).

Output: the tables in results/scaling.md, all results in results/scaling.json.
"""

import argparse
import statistics
import time

import _common as common

ROWS = 41  # the batch size of evaluate for 784 features; other numbers need another graph for the remainder
BATCH, STEPS = 100, 20
NOTE = "At K = 50 `evaluate` uses batches of more than 41 data points, and traces another graph for the remainder."
USUAL = {"particles": 500, "latent": 50, "width": 200}
AXES = {
    "evaluate: ms against N": ("n", [ROWS * k for k in (1, 2, 4, 8, 16)]),
    "evaluate: ms per data point against K": ("particles", [50, 100, 200, 500, 1000, 5000]),
    "evaluate: ms per data point against D": ("latent", [2, 8, 32, 128, 512]),
    "evaluate: ms per data point against width": ("width", [64, 128, 256, 512, 1024]),
    "fit: ms per epoch against N": ("n", [BATCH * k for k in (10, 20, 40, 80)]),
    "fit: ms per step against K (IWAE)": ("particles", [1, 4, 16, 64]),
    "fit: ms per step against D": ("latent", [2, 8, 32, 128, 512]),
    "fit: ms per step against width": ("width", [64, 128, 256, 512, 1024]),
}


def pair(latent, width):
    """A model and its guide."""
    from torch import nn

    from jensen.families import Bernoulli, MeanField
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import mlp

    model = VAE(mlp(latent, [width, width], nn.Tanh), Bernoulli(784, width), latent)
    return model, amortize(model, mlp(784, [width, width], nn.Tanh), MeanField, context=width)


def bits(n):
    """Random data."""
    import torch

    torch.manual_seed(0)
    return (torch.rand(n, 784) > 0.5).float()


def measuring(n=None, particles=500, latent=50, width=200):
    """A function without arguments: the runtime of measuring n data points, or per data point; in ms."""
    from jensen.inference import evaluate

    model, guide = pair(latent, width)
    more = ROWS * max(1, 2000 // particles) if n is None else n

    def timed(data):
        x = bits(data)
        begin = time.perf_counter()
        evaluate(model, guide, x, particles, seed=0, compile=True, refine=False, progress=False)
        return time.perf_counter() - begin

    timed(ROWS)
    return lambda: 1e3 * (-timed(ROWS) + timed(ROWS + more)) / (more if n is None else 1)


def training(n=None, particles=1, latent=50, width=200):
    """A function without arguments: the runtime of an epoch of n data points, or of a step; in ms."""
    from jensen.inference import IWAE, fit

    x = bits(BATCH * STEPS if n is None else n)
    epochs = max(1, round((300 if particles == 1 else 600 // particles) / (len(x) / BATCH)))

    def run():
        model, guide = pair(latent, width)
        objective, clock = None if particles == 1 else IWAE(particles), common.Clock()
        how = {"batch_size": BATCH, "seed": 0, "compile": True, "progress": False}
        fit(model, guide, x, objective, epochs=1 + epochs, scheduler=clock, **how)
        return 1e3 * clock.after_first() / epochs / (1 if n is not None else STEPS)

    run()
    return run


def main():
    """Measure along every axis, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, rounds=3)
    options = parser.parse_args()
    common.confine(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    start, found, parts = common.started(), [], []
    for title, (axis, sizes) in AXES.items():
        sizes = sizes[:2] if options.quick else sizes
        make = measuring if title.startswith("evaluate") else training
        runs = {size: make(**{axis: size}) for size in sizes}
        each = {size: [] for size in sizes}
        for _ in range(1 if options.quick else options.rounds):
            for size, run in runs.items():
                each[size].append(run())
        costs = [statistics.median(each[size]) for size in sizes]
        slopes = [common.slope(sizes, costs), common.slope(sizes[-2:], costs[-2:])] if min(costs) > 0 else [None, None]
        found.append({"title": title, "axis": axis, "sizes": sizes, "each": list(each.values()), "slopes": slopes})
        head = [title, *(f"{size:,}" for size in sizes), "slope", "last slope"]
        cells = ["", *(f"{cost:.3g}" for cost in costs), *("-" if s is None else f"{s:.2f}" for s in slopes)]
        parts.append(common.table(head, [cells]))
        print(parts[-1].splitlines()[0], parts[-1].splitlines()[2], sep="\n", flush=True)
    about = common.provenance(__file__, options, start, products=common.faster_products(), usual=USUAL)
    text = f"{common.made_by(about)} Float32 products: {about['products']}. Medians of {options.rounds} rounds. {NOTE}"
    common.write(options, "scaling", about, {"results": found}, "\n\n".join([text, *parts]))


if __name__ == "__main__":
    main()
