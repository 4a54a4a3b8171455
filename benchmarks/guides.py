"""Approximation and amortization gaps of every guide family, for one trained and frozen decoder.

    JENSEN_DATA=... python benchmarks/guides.py

Data: statically binarized MNIST (Salakhutdinov and Murray 2008; Larochelle and Murray 2011). Model: the 784-200-200-50
Bernoulli VAE, trained with a mean-field guide, then frozen. Every guide has a 784-200-200 encoder, initialised from the
one trained with the model, and a separate head; all are trained for the same number of epochs. Measured on random test
images: ELBO, importance-weighted log p(x), and both parts of the gap (Cremer, Li and Duvenaud 2018).

Output after every guide: the table in results/guides.md, all results in results/guides.json.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import _common as common
import torch

from jensen.datasets import load
from jensen.families import (
    IAF,
    Bernoulli,
    FullCovariance,
    LowRank,
    MeanField,
    Mixture,
    NeuralSpline,
    StudentT,
    Sylvester,
)
from jensen.guides import Laplace, SemiAmortized, amortize
from jensen.inference import fit, gaps
from jensen.models import VAE
from jensen.networks import mlp

LATENT = 50
SMALL = {"hidden": (64,)}
FAMILIES = {
    "mean-field": MeanField,
    "low rank 5": partial(LowRank, rank=5),
    "full covariance": FullCovariance,
    "Student's t": StudentT,
    "mixture of 4": partial(Mixture, components=4),
    "IAF": partial(IAF, **SMALL),
    "Sylvester, orthogonal": partial(Sylvester, kind="orthogonal"),
    "Sylvester, triangular": partial(Sylvester, kind="triangular", layers=2),
    "Sylvester, Householder": partial(Sylvester, kind="householder", layers=2),
    "spline, coupling": partial(NeuralSpline, coupling=True, bins=5, layers=2, **SMALL),
    "spline, autoregressive": partial(NeuralSpline, bins=5, layers=1, **SMALL),
}
COLUMNS = (
    ("guide", "guide"),
    ("ELBO", "elbo"),
    ("log p(x)", "log_evidence"),
    ("gap", "gap"),
    ("approximation", "approximation"),
    ("amortization", "amortization"),
    ("k>0.7", "unreliable"),
    ("converged", "converged"),
    ("last round gained", "gained"),
    ("parameters", "parameters"),
    ("s training", "seconds_training"),
    ("s measuring", "seconds_measuring"),
)


def main():
    """Train the model, then train and measure every guide."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-epochs", type=int, default=20)
    add("--guide-epochs", type=int, default=5)
    add("--images", type=int, default=1000)
    add("--particles", type=int, default=500)
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--only", default="", help="names of guides, separated by commas; all if empty")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    options.threads = torch.get_num_threads()
    data = load("binarized_mnist")
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(options.seed))
    test = data.test[order[: options.images]]
    torch.manual_seed(options.seed)
    model = VAE(mlp(LATENT, [200, 200]), Bernoulli(784, 200), LATENT)
    first = amortize(model, mlp(784, [200, 200]), MeanField, context=200)
    history = fit(model, first, data.train, **_settings(options.model_epochs, 2e-3, options.seed))
    model.requires_grad_(False)
    print(f"model: {history.seconds:.0f} s, training ELBO {history.elbo[-1]:.2f}", flush=True)

    rows, wanted = [], {name.strip() for name in options.only.split(",") if name.strip()}
    for name in ["mean-field", "semi-amortized mean-field", "Laplace", *list(FAMILIES)[1:]]:
        if wanted and name not in wanted:
            continue
        torch.manual_seed(options.seed)
        seconds = 0.0
        if name in FAMILIES:
            guide = amortize(model, copy.deepcopy(first.encoder), FAMILIES[name], context=200)
            settings = _settings(options.guide_epochs, 1e-3, options.seed)
            seconds = fit(model, guide, data.train, freeze=model, **settings).seconds
            if name == "mean-field":
                mean_field, mean_field_seconds = guide, seconds
        elif name == "Laplace":
            guide = Laplace(model)
        else:
            guide, seconds = SemiAmortized(mean_field, model, steps=10), mean_field_seconds
        rows.append(_measure(name, model, guide, test, seconds, options))
        _write(options, history, rows, start)


def _settings(epochs, lr, seed):
    return {
        "epochs": epochs,
        "batch_size": 200,
        "lr": lr,
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        "seed": seed,
        "progress": False,
    }


def _measure(name, model, guide, test, seconds, options):
    """One row: means over the images, with their standard errors."""
    begin = time.perf_counter()
    found = gaps(
        model,
        guide,
        test,
        options.particles,
        rounds=options.rounds,
        steps=options.steps,
        lr=0.1,
        draws=4,
        seed=options.seed,
        progress=False,
    )
    summary, evidence = found.summary(), found.evidence.summary()
    row = {
        "guide": name,
        "elbo": evidence["elbo"],
        "elbo_data_error": evidence["elbo_data_error"],
        "log_evidence": float(found.log_evidence.mean()),
        "log_evidence_data_error": float(found.log_evidence.std()) / len(test) ** 0.5,
        **summary,
        "parameters": sum(p.numel() for p in guide.parameters() if p.requires_grad),
        "seconds_training": seconds,
        "seconds_measuring": time.perf_counter() - begin,
        "seconds_local_optimisation": summary["seconds"],
    }
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def _write(options, history, rows, start):
    """Write the table and its provenance."""
    about = common.provenance(
        __file__, options, start, model_seconds=round(history.seconds), model_training_elbo=history.elbo[-1]
    )
    s = options
    text = (
        f"Statically binarized MNIST, one frozen 784-200-200-50 decoder, {s.images} random test images, {s.particles} "
        "particles, nats per image. ± is the standard error over the images; k>0.7 is the share of images where both "
        "the guide's estimate of log p(x) and that of the local optimum are unreliable. The approximation gap is an "
        "upper bound, and a loose one for a family with few converged images.\n"
    )
    table = common.table([title for title, _ in COLUMNS], [[_cell(row, key) for _, key in COLUMNS] for row in rows])
    common.write(options, "guides", about, {"rows": rows}, f"{text}{common.made_by(about)}\n\n{table}")


def _cell(row, key):
    value = row[key]
    if f"{key}_data_error" in row:
        return f"{value:.2f} ± {row[f'{key}_data_error']:.2f}"
    if key in ("converged", "unreliable"):
        return f"{100 * value:.0f} %"
    if key == "gained":
        return f"{value:.3f}"
    return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    main()
