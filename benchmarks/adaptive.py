"""Evaluations saved by an adaptive number of particles per image, compared with an equal number, on MNIST.

    JENSEN_DATA=... python benchmarks/adaptive.py

Data: statically binarized MNIST (Salakhutdinov and Murray 2008; Larochelle and Murray 2011). Model: the 784-200-200-50
Bernoulli VAE with a mean-field guide, a few epochs. Measured on random test images, in decoder evaluations and in nats:
the 95th percentile and the maximum over the images (including those that missed the tolerance) of three errors of log
p(x): the reported standard error; the jackknife error, which does not saturate at 1; and the deviation (root mean
square over the repeats) from a reference. The reference pools all repeats of K = 5000 and as many further samples; its
own error is not small for the hardest images.

Output: the table in results/adaptive.md, all results in results/adaptive.json.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import _common as common
import torch

from jensen.datasets import load
from jensen.families import Bernoulli, MeanField
from jensen.guides import amortize
from jensen.inference import evaluate, fit
from jensen.models import VAE
from jensen.networks import mlp

LATENT = 50
COLUMNS = (
    ("draws", "name"),
    ("evaluations per image", "evaluations"),
    ("relative to first row", "share"),
    ("tolerance reached", "converged"),
    ("reported error, 95 %", "reported_95"),
    ("largest", "reported_worst"),
    ("jackknife error, 95 %", "jackknife_95"),
    ("largest", "jackknife_worst"),
    ("deviation, 95 %", "deviation_95"),
    ("largest", "deviation_worst"),
    ("seconds", "seconds"),
)


def main():
    """Train model and guide, then measure them with equal numbers of particles and with tolerances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=int, default=5)
    add("--images", type=int, default=200)
    add("--particles", type=int, default=5000)
    add("--settings", nargs="+", default=["1:8192", "2.5:4096"], help="tolerance:max_particles of each run")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    options.threads = torch.get_num_threads()
    data = load("binarized_mnist")
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(options.seed))
    test = data.test[order[: options.images]]
    torch.manual_seed(options.seed)
    model = VAE(mlp(LATENT, [200, 200]), Bernoulli(784, 200), LATENT)
    guide = amortize(model, mlp(784, [200, 200]), MeanField, context=200)
    scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=options.epochs)
    settings = {"epochs": options.epochs, "batch_size": 200, "lr": 2e-3, "scheduler": scheduler, "seed": options.seed}
    history = fit(model, guide, data.train, **settings, progress=False)
    print(f"model: {history.seconds:.0f} s, training ELBO {history.elbo[-1]:.2f}", flush=True)

    k = options.particles
    runs = {f"{k} each": _runs(model, guide, test, options, particles=k)}
    for setting in options.settings:
        tolerance, most = setting.split(":")
        name = f"tolerance {tolerance}, at most {most}"
        runs[name] = _runs(model, guide, test, options, tolerance=float(tolerance), max_particles=int(most))
    more = options.repeats * k
    long = evaluate(model, guide, test, more, refine=False, seed=999, progress=False).log_evidence
    same = torch.stack([e.log_evidence for e, _ in runs[f"{k} each"]])  # [repeats, N]
    reference = torch.logaddexp(long, same.logsumexp(0) - torch.tensor(float(len(same))).log())
    reference = reference - torch.tensor(2.0).log()
    rows = [_row(name, found, reference) for name, found in runs.items()]
    for row in rows:
        row["share"] = row["evaluations"] / rows[0]["evaluations"]
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    _write(options, history, rows, start)


def _runs(model, guide, test, options, **how):
    """Repeats of one measurement, each with its time in seconds."""
    found = []
    for repeat in range(options.repeats):
        begin = time.perf_counter()
        seed = 1000 * (options.seed + 1) + repeat
        found.append(
            (evaluate(model, guide, test, **how, refine=False, seed=seed, progress=False), time.perf_counter() - begin)
        )
    return found


def _row(name, found, reference):
    """One row: means over the repeats of the 95th percentile and the maximum over the images."""
    runs = [evidence for evidence, _ in found]
    deviation = torch.stack([e.log_evidence - reference for e in runs]).square().mean(0).sqrt()
    converged = [float(e.converged.double().mean()) for e in runs if e.converged is not None]
    errors = {
        "reported": torch.stack([e.standard_error for e in runs]),
        "jackknife": torch.stack([e.corrected_error["jackknife"] for e in runs]),
        "deviation": deviation.unsqueeze(0),
    }  # [repeats, N] each
    row = {
        "name": name,
        "evaluations": sum(e.summary()["spent"] for e in runs) / len(runs) / len(reference),
        "converged": sum(converged) / len(converged) if converged else None,
        "seconds": sum(seconds for _, seconds in found) / len(found),
        "log_evidence": float(torch.stack([e.log_evidence for e in runs]).mean()),
        "unreliable": sum(e.summary()["unreliable"] for e in runs) / len(runs),
    }
    for kind, values in errors.items():
        row[f"{kind}_95"] = float(values.quantile(0.95, dim=1).mean())
        row[f"{kind}_worst"] = float(values.amax(1).mean())
    return row


def _write(options, history, rows, start):
    """Write the table and its provenance."""
    about = common.provenance(
        __file__, options, start, model_seconds=round(history.seconds), model_training_elbo=history.elbo[-1]
    )
    text = (
        f"Statically binarized MNIST, a 784-200-200-50 Bernoulli VAE, mean-field guide, {options.epochs} epochs; "
        f"{options.images} random test images, {options.repeats} repeats, errors of log p(x) in nats per image: the "
        "95th percentile and the maximum over the images. The deviation is from a pooled reference; its own error is "
        f"not small for the hardest images. k-hat is above 0.7 for {100 * rows[0]['unreliable']:.0f} % of the images.\n"
    )
    table = common.table(
        [title for title, _ in COLUMNS], [[_cell(row[key], key) for _, key in COLUMNS] for row in rows]
    )
    common.write(options, "adaptive", about, {"rows": rows}, f"{text}{common.made_by(about)}\n\n{table}")


def _cell(value, key):
    if key in ("share", "converged"):
        return "-" if value is None else f"{100 * value:.0f} %"
    return value if isinstance(value, str) else f"{value:,.0f}" if key == "evaluations" else f"{value:.2f}"


if __name__ == "__main__":
    main()
