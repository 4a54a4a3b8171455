"""Accuracy and runtime of log p(x) from K = 5000 samples of the guide, as papers report, and of refined estimates.

    JENSEN_DATA=... python benchmarks/trusted.py

Every model and guide is trained, then measured on random test points in three ways: by the guide alone
(``refine=False``); by K = 256 samples of the guide and one proposal per data point with a budget of 5,000 evaluations
of log p(x, z); and with a budget of 12,000. The table shows log p(x), the share of data points with k-hat above 0.7,
the share where annealed chains found posterior mass that the proposal misses, the 95th percentile and the maximum of
the standard errors, and the processor seconds.

Coverage: the share of data points whose estimate is within two standard errors of a reference, among all data points
and among those not flagged by k-hat, and the shares below and above. References are exact values if available;
otherwise refined estimates from other seeds, and so from other starts, with ``--reference`` evaluations (their error is
included).

An independent check is annealed importance sampling from the prior, with ``--temperatures``. On data simulated from
each trained model: the distance between the refined bounds; whether the rank of the true latents, by their weight among
the weighted samples of the proposal, is uniform; and the share of data points where their weight exceeds that of all
samples together. Finally the coverage of the error of the *mean* over the data, in ``--reruns`` repetitions.

Output: the tables in results/trusted.md, all results in results/trusted.json, which keeps rows of models not measured
in this run.
"""

import argparse
import json
import time
from pathlib import Path

import _common as common
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import nn

from jensen.datasets import load
from jensen.families import IAF, Bernoulli, FullCovariance, Gaussian, MeanField
from jensen.guides import Ladder, amortize
from jensen.inference import ais, evaluate, exact_log_evidence, fit, sandwich, simulate
from jensen.inference.measure.proposals import propose
from jensen.inference.measure.refined import target_of
from jensen.kernel.batches import stream
from jensen.models import PPCA, VAE, Banana, FactorAnalysis, Hierarchical, Ring
from jensen.networks import mlp

WAYS = {
    "guide, K = 5000": {"particles": 5000, "refine": False},
    "refined, 5,000": {"particles": 256, "refine": 5000},
    "refined, 12,000": {"particles": 256, "refine": 12_000},
}
COLUMNS = ("pair", "way", "log p(x)", "k-hat > 0.7", "missed", "error, 95 %", "largest", "seconds")
ANNEALED = ("pair", "data", "mean difference", "its error", "covered", "farthest, in errors", "evaluations of AIS")
SIMULATED = ("pair", "upper - lower", "largest", "true above all draws", "uniform ranks, p")
RERUNS = ("pair", "covered", "mean of z", "sd of z")
COVERAGE = ("pair", "budget", "reference", "covered", "of the unflagged", "low", "high", "mean - reference")


def mnist(options, data="binarized_mnist", latent=50, family=MeanField, activation=nn.Tanh, passes=1):
    """A 784-200-200-D Bernoulli VAE."""
    x = load(data) if data == "binarized_mnist" else load(data, binarize="sample")
    model = VAE(mlp(latent, [200, 200], activation), Bernoulli(784, 200), latent=latent)
    guide = amortize(model, mlp(784, [200, 200], activation), family, context=200)
    return model, guide, x, {"epochs": passes * options.epochs, "batch_size": 100}


def digits(options, family=FullCovariance):
    """The model and guide of the README."""
    model = VAE(mlp(8, [128]), Gaussian(64, 128, scale="shared"), latent=8)
    guide = amortize(model, mlp(64, [128]), family, context=128)
    return model, guide, load("digits"), {"epochs": options.epochs * 30, "lr": 5e-3}


def gaussian(options, name, features, latent):
    """A Gaussian VAE."""
    model = VAE(mlp(latent, [200]), Gaussian(features, 200, scale="shared"), latent=latent)
    guide = amortize(model, mlp(features, [200]), MeanField, context=200)
    return model, guide, load(name, standardize=name == "oil_flow"), {"epochs": options.epochs * 10}


def hierarchical(options):
    """Two layers of latents and a ladder guide."""
    layers = [(mlp(16, [200]), Bernoulli(784, 200)), (mlp(8, [64]), MeanField(16, 64))]
    model = Hierarchical(layers, latent=8)
    guide = Ladder(model, [(mlp(784, [200]), MeanField(16, 200)), (mlp(200, [64]), MeanField(8, 64))])
    return model, guide, load("binarized_mnist"), {"epochs": options.epochs, "batch_size": 100}


def poisson(options):
    """Counts from a decoder of positive latents, Gamma(2, 1) each."""
    decoder = mlp(4, [64])
    rate = nn.Linear(64, 64)

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("rate", rate)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_full((4,), 2.0), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(nn.functional.softplus(rate(decoder(z))) + 1e-3).to_event(1), obs=x)

    data = load("digits", dequantize=False)
    train = (data.train * 16).round()
    guide = amortize(model, mlp(64, [64]), MeanField, context=64, data=train[:64])
    return model, guide, (train, (data.test * 16).round()), {"epochs": options.epochs * 10}


SHORT = ("digits, full covariance", "PPCA", "Banana")
ANNEALABLE = ("digits, full covariance", "digits, mean-field", "MNIST, 50 latents", "counts, Gamma(2, 1) latents")
PAIRS = {
    "digits, full covariance": digits,
    "digits, mean-field": lambda options: digits(options, MeanField),
    "MNIST, 50 latents": mnist,
    "MNIST, 50 latents, ten times the passes": lambda options: mnist(options, passes=10),
    "Fashion-MNIST, 50 latents": lambda options: mnist(options, "fashion_mnist"),
    "Frey faces, 10 latents": lambda options: gaussian(options, "frey_faces", 560, 10),
    "oil flow, 2 latents": lambda options: gaussian(options, "oil_flow", 12, 2),
    "MNIST, two layers": hierarchical,
    "MNIST, IAF": lambda options: mnist(options, latent=16, family=IAF),
    "counts, Gamma(2, 1) latents": poisson,
}
EXACT = {
    "PPCA": (lambda: PPCA(20, latent=5), FullCovariance),
    "factor analysis": (lambda: FactorAnalysis(20, latent=5), MeanField),
    "Banana": (Banana, MeanField),
    "Ring": (Ring, MeanField),
    "Ring, one latent": (lambda: Ring(noise=0.1, latent=1), MeanField),
}


def main():
    """Train, measure, and compare with references."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    add("--exact", nargs="*", default=list(EXACT), choices=list(EXACT), help="models whose log p(x) is known")
    add("--epochs", type=int, default=10)
    add("--data", type=int, default=200, help="number of test points; 0: only train")
    add("--reference", type=int, default=60_000, help="evaluations of a reference; 0: no coverage")
    add("--repeats", type=int, default=3, help="seeds of coverage")
    add("--chains", type=int, default=50)
    add("--temperatures", type=int, default=2000, help="temperatures of annealed importance sampling; 0: none")
    add("--simulated", type=int, default=1000, help="number of simulated data points")
    add("--annealed", type=int, default=50, help="number of annealed data points")
    add("--reruns", type=int, default=400, help="number of repeated measurements of a mean")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--trained", help="a folder to store trained models and guides")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    torch.set_num_threads(options.threads)
    sections = {name: [] for name in ("rows", "coverage", "annealed", "simulated", "reruns")}
    rows, covered, annealed, simulated_rows, reruns = sections.values()
    for name in options.exact:
        make, family = EXACT[name]
        torch.manual_seed(options.seed + 1)
        model = make().double()
        x = simulate(model, 400)[1]
        guide = amortize(model, mlp(x.shape[1], [16]), family, context=16).double()
        fit(model, guide, x, epochs=20, seed=options.seed, progress=False)
        exact = exact_log_evidence(model, x, progress=False)
        reference = exact.log_evidence, 1e-4 + exact.error
        covered.append(coverage(name, exact.method, model, guide, x, reference, options))
        if name in SHORT:
            reruns.append(rerun(name, model, guide, x[:50], reference[0][:50], torch.zeros(50), options))
        save(sections, options, start)
    for name in options.pairs:
        pyro.clear_param_store()
        torch.manual_seed(options.seed)
        model, guide, data, how = PAIRS[name](options)
        train, test = data if isinstance(data, tuple) else (data.train, data.test)
        trained(name, model, guide, train, how, options)
        if not options.data:
            continue
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(options.seed))
        x = test[order[: options.data]]
        rows += [measured(name, way, model, guide, x, options) for way in WAYS]
        if options.reference:
            long = evaluate(model, guide, x, 256, refine=options.reference, seed=999, progress=False)
            reference = long.log_evidence, long.standard_error
            covered.append(coverage(name, "refined", model, guide, x, reference, options))
            if name in SHORT:
                reruns.append(rerun(name, model, guide, x[:50], reference[0][:50], reference[1][:50], options))
        if options.temperatures and name in ANNEALABLE:
            annealed.append(by_annealing(name, model, guide, x, options))
        if options.simulated and isinstance(model, VAE):
            simulated_rows.append(simulated(name, model, guide, options))
        save(sections, options, start)


def save(sections, options, start):
    """Write the results so far."""
    about = common.provenance(__file__, options, start)
    sections, made = dict(sections), [common.made_by(about)]
    earlier = options.out / "trusted.json"
    if earlier.exists():  # rows of other models are kept, with their provenance
        old = json.loads(earlier.read_text())
        measured = {row["pair"] for rows in sections.values() for row in rows}
        sections = {
            name: [row for row in old.get(name, []) if row["pair"] not in measured] + rows
            for name, rows in sections.items()
        }
        before = old.get("made") or [common.made_by(old["provenance"])]
        made = [line for line in before if line.split(";")[0] != made[0].split(";")[0]] + made
    rows, covered, annealed, simulated_rows, reruns = sections.values()
    by = "\n\n".join(made)
    text = (
        f"log p(x) of {options.data} test points by the guide and by one proposal per data point, in nats; standard "
        f"errors of log p(x): the 95th percentile and the maximum over the data points.\n\n{by}\n\n"
        f"{common.table(COLUMNS, [[cell(row[c]) for c in COLUMNS] for row in rows])}\n\n"
        f"Coverage at two standard errors, budget of 5,000 evaluations, {options.repeats} seeds.\n\n"
        f"{common.table(COVERAGE, [[cell(row[c]) for c in COVERAGE] for row in covered])}\n\n"
        f"Refined, 5,000 evaluations, minus AIS from the prior, {options.chains} chains, {options.temperatures} "
        f"temperatures.\n\n{common.table(ANNEALED, [[cell(row[c]) for c in ANNEALED] for row in annealed])}\n\n"
        f"{options.simulated} data points simulated from each model, 5,000 evaluations.\n\n"
        f"{common.table(SIMULATED, [[cell(row[c]) for c in SIMULATED] for row in simulated_rows])}\n\n"
        f"The mean over 50 data points, {options.reruns} times, 1,000 evaluations.\n\n"
        f"{common.table(RERUNS, [[cell(row[c]) for c in RERUNS] for row in reruns])}"
    )
    common.write(options, "trusted", about, {**sections, "made": made}, text)


def trained(name, model, guide, train, how, options):
    """Train a model and guide, or load those of an earlier run."""
    kept = options.trained and Path(options.trained) / f"{name}, {how['epochs']} epochs, seed {options.seed}.pt"
    fit(model, guide, train, **how, seed=options.seed, progress=False, checkpoint=kept, resume=kept is not None)


def measured(name, way, model, guide, x, options):
    """Measure one model and guide in one way."""
    begin = time.process_time()
    found = evaluate(model, guide, x, **WAYS[way], seed=options.seed, progress=False)
    seconds = time.process_time() - begin
    missed = None if found.missed is None else f"{100 * float(found.missed.double().mean()):.1f} %"
    row = {
        "pair": name,
        "way": way if found.method in ("guide", "refined") else f"{way}: {found.method}",
        "log p(x)": float(found.log_evidence.mean()),
        "k-hat > 0.7": f"{100 * found.unreliable:.1f} %",
        "missed": missed,
        "error, 95 %": float(found.standard_error.quantile(0.95)),
        "largest": float(found.standard_error.max()),
        "seconds": seconds,
    }
    print(row, flush=True)
    return row


def coverage(name, method, model, guide, x, reference, options):
    """The share of estimates within two standard errors of a reference, over several seeds."""
    off, wide, flagged = [], [], []
    for repeat in range(options.repeats):
        found = evaluate(model, guide, x, 256, refine=5000, seed=1000 + repeat, progress=False)
        off.append(found.log_evidence - reference[0])
        wide.append(2 * torch.hypot(found.standard_error, torch.as_tensor(reference[1]).expand_as(off[-1])))
        flagged.append(~(found.pareto_k <= 0.7))
    off, wide, flagged = map(torch.cat, (off, wide, flagged))
    inside = off.abs() <= wide
    row = {
        "pair": name,
        "budget": "5,000",
        "reference": method,
        "covered": share(inside),
        "of the unflagged": share(inside[~flagged]),
        "low": share(off < -wide),
        "high": share(off > wide),
        "mean - reference": float(off.mean()),
    }
    print(row, flush=True)
    return row


def by_annealing(name, model, guide, x, options):
    """Refined evidence compared with annealing from the prior."""
    x = x[: options.annealed]
    found = evaluate(model, guide, x, 256, refine=5000, seed=2000, progress=False)
    begin = time.process_time()
    other = ais(
        model, None, x, chains=options.chains, temperatures=options.temperatures, start="prior", seed=3, progress=False
    )
    off = found.log_evidence - other.log_evidence
    joint = torch.hypot(found.standard_error, other.standard_error)
    row = {
        "pair": name,
        "data": f"{len(x)}",
        "mean difference": float(off.mean()),
        "its error": float(off.std() / len(x) ** 0.5),
        "covered": share(off.abs() <= 2 * joint),
        "farthest, in errors": float((off.abs() / joint).max()),
        "evaluations of AIS": f"{other.evaluations:,}",
        "seconds": time.process_time() - begin,
    }
    print(row, flush=True)
    return row


def simulated(name, model, guide, options):
    """Bounds from both sides, and the rank of the true latents."""
    torch.manual_seed(7)
    latents, x = simulate(model, options.simulated)
    how = {"particles": 256, "refine": 5000, "chains": 4, "temperatures": 4, "progress": False}
    both = sandwich(model, guide, data=x, latents=latents, **how)
    width = both.refined.width
    ranks, beyond = [], []
    model.eval(), guide.eval()
    for part in stream(model, guide, (x,), "ranks", at_once=128, weights="any", progress=False, seed=0):
        target, plan = target_of(part, 5000)
        true = target.free({site: z[None, part.rows] for site, z in latents.items()})
        proposal, _ = propose(target, plan)
        (block,) = target.blocks_of(target.rows)
        n, count = len(target), int((plan.budget - plan.witness - target.spent).amin())
        own = proposal.of(block.rows)
        log_w = own.log_joint_weights(target, block, count)[:, :n]
        given = own.log_weights_at(target, block, true[:, block.rows], own.counts(count))[0, :n]
        below = (log_w.softmax(0) * (log_w < given)).sum(0)
        ranks.append(below)
        beyond.append(given > log_w.logsumexp(0))
    ranks, beyond = torch.cat(ranks), torch.cat(beyond)
    row = {
        "pair": name,
        "upper - lower": float(width.mean()),
        "largest": float(width.max()),
        "true above all draws": share(beyond),
        "uniform ranks, p": float(stats.kstest(ranks.detach().numpy(), "uniform").pvalue),
    }
    print(row, flush=True)
    return row


def rerun(name, model, guide, x, values, errors, options):
    """The coverage of the mean over the data at two standard errors."""
    z = []
    for repeat in range(options.reruns):
        found = evaluate(model, guide, x, 25, refine=1000, seed=10_000 + repeat, progress=False)
        error = (found.standard_error.square() + torch.as_tensor(errors).square()).sum().sqrt() / len(x)
        z.append((found.log_evidence - values).mean() / error)
    z = torch.stack(z)
    row = {"pair": name, "covered": share(z.abs() <= 2), "mean of z": float(z.mean()), "sd of z": float(z.std())}
    print(row, flush=True)
    return row


def share(true):
    """A share in per cent, with its standard error."""
    p = float(true.double().mean())
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / max(1, len(true))) ** 0.5:.1f} %"


def cell(value):
    """A cell of a table."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
