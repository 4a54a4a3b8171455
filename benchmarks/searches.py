"""Runtime of the searches per data point in ``gaps`` and ``Laplace``, for this checkout and another version.

    JENSEN_DATA=... python benchmarks/searches.py --against FOLDER

FOLDER is the PYTHONPATH of another version of jensen. Data: statically binarized MNIST. Model: the 784-200-200-50
Bernoulli VAE, trained for a few epochs and frozen; guides with an encoder of the same size. Each run has a separate
process, on the same core; processor seconds are those of this process alone.

Output: the table in results/searches.md, all results in results/searches.json.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import _common as common

FAMILIES = ("MeanField", "FullCovariance")
COLUMNS = ("seconds", "processor", "elbo", "approximation", "approximation_mc_error", "amortization", "converged")


def main():
    """Train models and guides, run both versions in turn, and write the table; or perform one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, rounds=3)
    add = parser.add_argument
    add("--against", default="", help="a folder to import another version of jensen from")
    add("--images", type=int, default=500)
    add("--particles", type=int, default=500)
    add("--epochs", type=int, default=4)
    add("--pairs", default="", help="the file of the trained models and guides (used by the script itself)")
    options = parser.parse_args()
    common.confine(options.threads)
    if options.contender:
        print(json.dumps(_run(options)))
        return
    begin = common.started()
    if options.quick:
        options.images, options.particles, options.epochs, options.rounds = 20, 50, 1, 1
    versions = {"this": ""} | ({"other": options.against} if options.against else {})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        options.pairs = str(Path(folder) / "pairs.pt")
        _train(options)
        for _ in range(options.rounds):
            for name in (*FAMILIES, "Laplace"):
                for version, path in versions.items():
                    answer = _ask(options, name, path)
                    found.setdefault(f"{name}, {version}", []).append(answer)
                    print(name, version, {k: round(v, 4) for k, v in answer.items()}, flush=True)
    del options.pairs
    about = common.provenance(__file__, options, begin)
    rows = [[name, *(_cell(runs, key) for key in COLUMNS)] for name, runs in found.items()]
    text = (
        f"`gaps` of two guides, and the search of `Laplace`, {options.images} images, {options.particles} particles: "
        f"medians of {options.rounds} runs in turn. elbo is that of the best member of the family.\n\n"
        f"{common.made_by(about)}\n\n"
    )
    common.write(options, "searches", about, {"runs": found}, text + common.table(["", *COLUMNS], rows))


def _cell(runs, key):
    return f"{statistics.median(run[key] for run in runs):.4g}" if key in runs[0] else "-"


def _ask(options, name, path):
    command = [sys.executable, __file__, "--contender", name, "--pairs", options.pairs, "--threads", options.threads]
    command += ["--images", options.images, "--particles", options.particles]
    place = {"PYTHONPATH": path} if path else {}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | place)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _made(name):
    from jensen import families
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import mlp

    model = VAE(mlp(50, [200, 200]), families.Bernoulli(784, 200), 50)
    return model, amortize(model, mlp(784, [200, 200]), getattr(families, name), context=200)


def _train(options):
    import torch

    from jensen.datasets import load
    from jensen.inference import fit

    data, kept = load("binarized_mnist"), {}
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: options.images]
    train = data.train[:2000] if options.quick else data.train
    for name in FAMILIES:
        torch.manual_seed(0)
        model, guide = _made(name)
        if kept:
            model.load_state_dict(kept["model"])
        how = {"freeze": model} if kept else {}
        fit(model, guide, train, epochs=options.epochs, batch_size=200, lr=2e-3, seed=0, progress=False, **how)
        kept |= {"model": copy.deepcopy(model.state_dict()), name: guide.state_dict()}
    torch.save({**kept, "x": data.test[rows].clone()}, options.pairs)


def _run(options):
    import torch

    from jensen.guides import Laplace
    from jensen.inference import gaps

    torch.set_num_threads(options.threads)
    kept, name = torch.load(options.pairs), options.contender
    model, guide = _made(name if name in FAMILIES else FAMILIES[0])
    model.load_state_dict(kept["model"])
    model.requires_grad_(False).eval()
    wall, processor = time.perf_counter(), time.process_time()
    row = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # data points that did not converge are counted in the table
        if name == "Laplace":
            Laplace(model)(kept["x"])
        else:
            guide.load_state_dict(kept[name])
            how = {"rounds": 5, "steps": 100, "draws": 4, "seed": 0, "progress": False}
            found = gaps(model, guide, kept["x"], options.particles, **how)
            row = {key: found.summary()[key] for key in COLUMNS[3:]} | {"elbo": float(found.local.elbo.mean())}
    return {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor, **row}


if __name__ == "__main__":
    main()
