"""Speedup of each rule of `graphs/rewrites.py`: compiled graphs with all rules, compared with one rule removed.

    python benchmarks/rewrites.py              # about 40 minutes; --quick for a smoke run

Graphs of log weights (K = 500, 20 data points) and of training steps (loss and gradients, 128 data points), float32,
random data. Every graph is compiled with all three rules and without each of them. Both versions are timed directly one
after the other in one process, in alternating order. A ratio below 1 means that the rule is faster; a dash, that the
rule does not change the graph.

| rule | effect | | --- | --- | | bias | a product with a bias added becomes a product and a sum | | tanh | tanh becomes
a quotient of polynomials | | bernoulli | the log-likelihood of Bernoulli features uses one logarithm for many of them |

Output: the table in results/rewrites.md, all results in results/rewrites.json.
"""

import argparse
import statistics
import time

import _common as common

RULES = ("bias", "tanh", "bernoulli")
LATENT, WIDTH = 50, 200
NETWORKS = {  # activation, observation model
    "tanh, Bernoulli": ("Tanh", "Bernoulli"),
    "ReLU, Bernoulli": ("ReLU", "Bernoulli"),
    "GELU, Bernoulli": ("GELU", "Bernoulli"),
    "tanh, Gaussian": ("Tanh", "Gaussian"),
    "ReLU, Gaussian": ("ReLU", "Gaussian"),
    "ReLU, Categorical": ("ReLU", "Categorical"),
    "convolutions, Bernoulli": ("conv", "Bernoulli"),
}
SIZES = {"evidence": (20, 500), "training": (128, 1)}  # data, particles
QUICK = {"evidence": (2, 10), "training": (8, 1)}
FEW = {("ReLU, Categorical", "evidence"): (20, 50), ("convolutions, Bernoulli", "evidence"): (20, 50)}  # expensive ones


def pair(activation, observation, n):
    """A 784-200-200-50 model, its guide and n data points."""
    import torch
    from torch import nn

    from jensen import families
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import conv_decoder, conv_encoder, mlp

    torch.manual_seed(0)
    if activation == "conv":
        decoder = conv_decoder(LATENT, (1, 28, 28), [16, 8, 8], parameters=1)
        encoder = conv_encoder((1, 28, 28), [8, 16], WIDTH)
        model = VAE(decoder, families.Bernoulli(784, None), LATENT)
    else:
        kind, options = getattr(nn, activation), {"Categorical": {"levels": 4}}.get(observation, {})
        decoder, encoder = mlp(LATENT, [WIDTH, WIDTH], kind), mlp(784, [WIDTH, WIDTH], kind)
        model = VAE(decoder, getattr(families, observation)(784, WIDTH, **options), LATENT)
    with torch.no_grad():
        x = model(n=n)
    return model, amortize(model, encoder, families.MeanField, context=WIDTH), x


def graph_of(kind, model, guide, x, particles):
    """A traced graph of log weights or of a training step, and its input tensors."""
    import torch

    from jensen.graphs.capture import capture
    from jensen.inference import log_weights
    from jensen.kernel.parameters import tensors_of

    held = tensors_of(model, guide)
    trained = [p for p in held if isinstance(p, torch.nn.Parameter)]

    def evidence(*flat):
        with torch.no_grad():
            return (log_weights(model, guide, flat[-1], particles=particles, max_plate_nesting=1),)

    def training(*flat):
        loss = -log_weights(model, guide, flat[-1], particles=particles, max_plate_nesting=1).mean(0).sum()
        return (loss.detach(), *torch.autograd.grad(loss, trained))

    inputs = (*held, x)
    graph = capture({"evidence": evidence, "training": training}[kind], *inputs)
    return graph.module, tuple(t.detach() for t in (*inputs, *graph.constants))


def compiled(module, inputs):
    """A function without arguments that runs the compiled graph."""
    import torch
    import torch._inductor

    run = torch._inductor.compile(module, list(inputs), options={"fallback_random": True})

    def once():
        with torch.no_grad():
            run(*inputs)

    once()
    return once


def timed(run, calls):
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def ratios(module, inputs, rounds, seconds):
    """By rule: the paired times with and without it, and their ratios; None if it changes nothing."""
    from jensen.graphs.rewrites import rewritten

    everything = rewritten(module)
    run, rows = compiled(everything, inputs), {}
    calls = max(1, round(seconds / max(1e-6, timed(run, 2))))
    for rule in RULES:
        rest = rewritten(module, rules=[name for name in RULES if name != rule])
        if rest.code == everything.code:
            rows[rule] = None
            continue
        other, pairs = compiled(rest, inputs), []
        for i in range(rounds):  # the order alternates
            times = {first: timed((other, run)[first], calls) for first in ((True, False) if i % 2 else (False, True))}
            pairs.append((times[True], times[False]))
        each = [a / b for a, b in pairs]
        rows[rule] = {"pairs": pairs, "median": statistics.median(each), "least": min(each), "most": max(each)}
    return rows


def main():
    """Measure every rule on every graph, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, rounds=15)
    options = parser.parse_args()
    common.confine(options.threads)
    import torch

    from jensen.graphs.products import product_route

    torch.set_num_threads(options.threads)
    start, results, table = common.started(), [], []
    wanted = {part.strip() for part in options.only.split(";") if part.strip()}
    names = [name for name in NETWORKS if not wanted or name in wanted]
    rounds, seconds = (2, 0.01) if options.quick else (options.rounds, options.seconds)
    with product_route(torch.device("cpu")) as route:
        for name in names[: 2 if options.quick else None]:
            for kind in SIZES:
                n, particles = QUICK[kind] if options.quick else FEW.get((name, kind), SIZES[kind])
                model, guide, x = pair(*NETWORKS[name], n)
                rows = ratios(*graph_of(kind, model, guide, x, particles), rounds, seconds)
                results.append({"network": name, "graph": kind, "n": n, "particles": particles, "rules": rows})
                table.append([name, kind, *(cell(rows[rule]) for rule in RULES)])
                print(" | ".join(table[-1]), flush=True)
    about = common.provenance(__file__, options, start, products=route, rounds=rounds)
    text = (
        f"{common.made_by(about)} Float32 products: {route}.\n\nTime with a rule over time without it: median of "
        f"{rounds} pairs (min to max). Below 1 the rule is faster; a dash: it changes nothing."
    )
    head = ["network", "graph", *RULES]
    common.write(options, "rewrites", about, {"results": results}, f"{text}\n\n{common.table(head, table)}")


def cell(row):
    """A ratio and its spread."""
    return "-" if row is None else f"{row['median']:.3f} ({row['least']:.3f} to {row['most']:.3f})"


if __name__ == "__main__":
    main()
