"""Missing values: imputation of tables, images of which half is missing, and the time that missing values cost.

    JENSEN_DATA=... python benchmarks/missing.py                # --quick --out FOLDER for a smoke run
    python benchmarks/missing.py --tables uci --only "PPCA, EM" # some rows; the others are kept from the earlier run

**uci.** Four tables of scikit-learn, half of the values missing completely at random, standardized by the observed
values. All methods are fitted to the incomplete table and impute the same rows. The root mean squared error is that of
the missing values, in standard deviations. Each seed has its own missing values and its own training. Whatever a method
chooses (neighbours, latents, components, steps), it chooses in each run by the error on a tenth of the observed values,
hidden in addition; the missing values are never used.

**mnist.** A 784-200-200-50 Bernoulli VAE on statically binarized MNIST, half of the pixels missing, trained on the
observed pixels; on images with zeros in place of the missing pixels; and on images where each missing pixel is sampled
at every visit with the mean of its observed values as probability (grey values are outside the support of a Bernoulli).
All have the same networks, including an encoder that reads the mask, and the same number of passes. Measured on test
images with holes of their own: log p of the observed pixels, and of the missing ones given the observed ones, both
without any imputation in the likelihood. The encoders of imputing models read the holes filled in their own way (zeros;
means). All measurements are refined, which makes them almost independent of the encoder.

**speed.** A training step of a VAE with and without missing values, and an iteration of EM of PPCA. Contenders run in
turn, in separate processes on the same cores; a ratio is the median (minimum to maximum) of the ratios of the rounds.

Output: the tables in results/missing.md, all results in results/missing.json. A run continues an earlier one: results
that the file already holds with the same settings are kept. ``--fresh`` measures them again.
"""

import argparse
import copy
import itertools
import math
import statistics
import time
import warnings
from functools import partial

import _common as common
import torch
from torch import nn

from jensen.datasets import hide, load
from jensen.families import Bernoulli, Gaussian, MeanField, StudentT
from jensen.guides import amortize
from jensen.inference import IWAE, Callback, fit, held_out, impute
from jensen.models import PPCA, VAE, FactorAnalysis, MixtureOfPPCA
from jensen.networks import Masked, mlp

common.PACKAGES += ("scikit-learn",)
TABLES = ("uci", "mnist", "speed")
SOURCES = {"breast cancer": "breast_cancer", "wine": "wine", "iris": "iris", "diabetes": "diabetes"}
FULL = {
    "uci": {"seeds": 5},
    "forest": {"trees": 50, "rounds": 10},
    "ridge": {"rounds": 100},
    "em": {"iterations": 500, "tolerance": 1e-6},
    "miwae": {"steps": 1250, "every": 250, "batch": 64, "lr": 2e-3, "K": 20, "particles": 1000, "refine": "auto"},
    "mnist": {"images": 50_000, "epochs": 15, "test": 400, "particles": 4000},
    "speed": {"rows": 100_000, "features": 50, "latent": 10, "steps": 100, "rounds": 7},
}
QUICK = {
    "uci": {"seeds": 2},
    "forest": {"trees": 2, "rounds": 2},
    "ridge": {"rounds": 2},
    "em": {"iterations": 3, "tolerance": 1e-6},
    "miwae": {"steps": 6, "every": 3, "batch": 64, "lr": 2e-3, "K": 3, "particles": 300, "refine": "auto"},
    "mnist": {"images": 300, "epochs": 2, "test": 10, "particles": 500},
    "speed": {"rows": 500, "features": 8, "latent": 2, "steps": 5, "rounds": 2},
}


def main():
    """Measure the tables that are asked for; each result is written when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--tables", default=",".join(TABLES), help="names of tables, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file of results holds")
    options = parser.parse_args()
    if options.contender:
        common.serve(CONTENDERS, options.contender, options.route)
        return
    torch.set_num_threads(options.threads)
    wanted = [name.strip() for name in options.tables.split(",") if name.strip()]
    if unknown := set(wanted) - set(TABLES):
        parser.error(f"--tables are some of {', '.join(TABLES)}, but got {', '.join(sorted(unknown))}")
    results = common.Results(options, __file__, "missing", TEXTS, fresh=options.fresh)
    results.settings = QUICK if options.quick else FULL
    for name in wanted:
        {"uci": uci, "mnist": mnist, "speed": speed}[name](options, results)
    if results.failed:
        raise SystemExit(f"{results.failed} results are missing")


def error_of(filled, truth, where):
    """The root mean squared error of the entries ``where``."""
    return float((filled - truth)[where].square().mean().sqrt())


def uci(options, results):
    """Impute four tables by each method."""
    seeds = range(results.settings["uci"]["seeds"])
    for (method, (function, kind)), source, seed in itertools.product(METHODS.items(), SOURCES, seeds):
        settings = results.settings.get(kind, {})
        made = partial(imputed, source, function, seed, settings)
        results.measure("uci", f"{source}/{method}/{seed}", made, settings)


def imputed(source, function, seed, settings):
    """The error of a method on a table."""
    from sklearn import datasets

    truth = torch.as_tensor(getattr(datasets, f"load_{SOURCES[source]}")().data, dtype=torch.float64)
    x = hide(truth, 0.5, seed=seed)
    mean = x.nanmean(0)
    deviation = (x - mean).square().nanmean(0).sqrt()
    x, truth = (x - mean) / deviation, (truth - mean) / deviation
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        filled, chosen = function(x, seed, settings)
    return {
        "error": error_of(filled, truth, x.isnan()),
        "seconds": time.process_time() - begin,
        "chosen": chosen,
        "warnings": sorted({str(w.message).splitlines()[0] for w in warned}),
    }


def best_of(candidates, fill, x, seed):
    """The candidate with the smallest error on a tenth of the observed values, hidden in addition."""
    fewer = hide(x, 0.1, seed=1000 + seed)
    held = fewer.isnan() & ~x.isnan()
    return min(candidates, key=lambda candidate: error_of(fill(candidate, fewer), x, held))


def by_mean(x, seed, settings):
    """The mean of the observed values of each feature."""
    return torch.where(x.isnan(), x.nanmean(0), x), None


def sklearn_fill(imputer, x):
    """A table filled by an imputer of scikit-learn."""
    return torch.as_tensor(imputer.fit_transform(x.numpy()))


def by_neighbours(x, seed, settings):
    """``KNNImputer``, with the number of neighbours chosen."""
    from sklearn.impute import KNNImputer

    def fill(k, x):
        return sklearn_fill(KNNImputer(n_neighbors=k), x)

    k = best_of([1, 2, 3, 5, 10, 20, 40, 80], fill, x, seed)
    return fill(k, x), k


def by_regressions(estimator, x, seed, settings):
    """``IterativeImputer``: regressions of each feature on all others, in turn."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    imputer = IterativeImputer(estimator(settings, seed), max_iter=settings["rounds"], random_state=seed)
    filled = sklearn_fill(imputer, x)
    return filled, f"{imputer.n_iter_} rounds"


def bayesian_ridge(settings, seed):
    """A linear regression with a Gaussian prior."""
    from sklearn.linear_model import BayesianRidge

    return BayesianRidge()


def forest(settings, seed):
    """The forest of missForest: the square root of the number of features is tried in each split."""
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(settings["trees"], max_features="sqrt", random_state=seed)


def extra_trees(settings, seed):
    """The forest of the notebook of Mattei and Frellsen."""
    from sklearn.ensemble import ExtraTreesRegressor

    return ExtraTreesRegressor(settings["trees"], random_state=seed)


def by_em(build, sizes, x, seed, settings):
    """A model with latents that are summed out exactly, by EM, with its size chosen; the conditional mean is exact."""

    def fill(size, x):
        torch.manual_seed(seed)
        model = build(x.shape[1], *size).double().fit_em(x, settings["iterations"], settings["tolerance"])
        with torch.no_grad():
            return model.completed(x)[0]

    size = best_of([size for size in sizes if size[0] < x.shape[1]], fill, x, seed)
    return fill(size, x), " x ".join(map(str, size))


def by_default(model, x, seed, settings):
    """The imputer with scikit-learn's interface: nothing is chosen."""
    from jensen.imputer import Imputer

    imputer = Imputer(model, random_state=seed)
    return sklearn_fill(imputer, x), str(imputer.model_.latents["z"][0])


def by_miwae(likelihood, family, x, seed, settings):
    """A VAE trained by the importance-weighted bound of the observed values (MIWAE).

    Two hidden layers of 128 units, half as many latents as features, K = 20 and batches of 64, as in the notebook of
    Mattei and Frellsen; but tanh, the mask beside the input, doubly reparameterized gradients, and Adam at 2e-3. The
    number of steps is chosen; the chosen state is trained for a last part on all observed values.
    """
    x = x.float()
    features = x.shape[1]
    latent = features // 2
    fewer = hide(x, 0.1, seed=1000 + seed)
    held = fewer.isnan() & ~x.isnan()
    per_epoch = -(-len(x) // settings["batch"])
    torch.manual_seed(seed)
    model = VAE(mlp(latent, [128, 128], nn.Tanh), likelihood(features, 128), latent)
    encoder = Masked(mlp(2 * features, [128, 128], nn.Tanh), features)
    guide = amortize(model, encoder, family, context=128)
    how = {"batch_size": settings["batch"], "lr": settings["lr"], "seed": seed, "progress": False}
    watch = Best(fewer, x, held, -(-settings["every"] // per_epoch), settings, seed)
    objective = IWAE(settings["K"], gradient="dreg")
    epochs = watch.every * (settings["steps"] // settings["every"])
    fit(model, guide, fewer, objective, epochs=epochs, callbacks=watch, **how)
    model.load_state_dict(watch.state[0])
    guide.load_state_dict(watch.state[1])
    fit(model, guide, x, objective, epochs=watch.every, **how)
    how = {"draws": 1, "refine": settings["refine"], "seed": seed, "progress": False}
    found = impute(model, guide, x, settings["particles"], **how)
    k_hat = f"k-hat > 0.7: {100 * found.unreliable:.0f} % ({found.method})"
    return found.mean.double(), f"{watch.epoch * per_epoch} steps; {k_hat}"


class Best(Callback):
    """Keeps the state of the epoch, one of every few, that imputes held-out values with the smallest error."""

    def __init__(self, x, truth, held, every, settings, seed):
        self.x, self.truth, self.held, self.every = x, truth, held, every
        self.particles, self.seed, self.least = settings["particles"] // 5, seed, math.inf

    def after_epoch(self, history, model, guide):
        """Impute, and compare."""
        if len(history.elbo) % self.every:
            return
        how = {"draws": 1, "refine": False, "seed": self.seed, "progress": False}
        found = impute(model, guide, self.x, self.particles, **how)
        now = error_of(found.mean, self.truth, self.held)
        if now < self.least:
            self.least, self.epoch = now, len(history.elbo)
            self.state = copy.deepcopy((model.state_dict(), guide.state_dict()))


OURS = "jensen: "
LATENTS = [(d,) for d in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)]
MIXTURES = [(d, c) for d in (1, 2, 4, 8) for c in (2, 3)]  # latents, components
METHODS = {  # the function, and the name of its settings
    "mean": (by_mean, ""),
    "KNNImputer": (by_neighbours, ""),
    "IterativeImputer, BayesianRidge": (partial(by_regressions, bayesian_ridge), "ridge"),
    "IterativeImputer, random forest": (partial(by_regressions, forest), "forest"),
    "IterativeImputer, extra trees": (partial(by_regressions, extra_trees), "forest"),
    "jensen: PPCA, EM": (partial(by_em, PPCA, LATENTS), "em"),
    "jensen: factor analysis, EM": (partial(by_em, FactorAnalysis, LATENTS), "em"),
    "jensen: mixture of PPCA, EM": (partial(by_em, MixtureOfPPCA, MIXTURES), "em"),
    "jensen: Imputer(), PPCA": (partial(by_default, "ppca"), ""),
    'jensen: Imputer("factor-analysis")': (partial(by_default, "factor-analysis"), ""),
    "jensen: MIWAE, Gaussian": (partial(by_miwae, partial(Gaussian, scale="diagonal"), MeanField), "miwae"),
    "jensen: MIWAE, Student's t": (partial(by_miwae, StudentT, StudentT), "miwae"),
}


def uci_text(table):
    """The errors of all methods, and who is best."""
    cells = table["cells"]
    seeds = sorted({int(key.split("/")[-1]) for key in cells})

    def of(source, method, name):
        found = [cells.get(f"{source}/{method}/{seed}", {}).get(name) for seed in seeds]
        return [] if None in found else found  # means over different seeds cannot be compared

    methods = [m for m in METHODS if any(of(source, m, "error") for source in SOURCES)]
    mean = {(s, m): statistics.mean(e) for s in SOURCES for m in methods if (e := of(s, m, "error"))}
    best = {s: min((m for m in methods if (s, m) in mean), key=lambda m: mean[s, m], default=None) for s in SOURCES}
    rows, times, notes = [], [], []
    for m in methods:
        row = []
        for s in SOURCES:
            errors = of(s, m, "error")
            text = "-" if not errors else f"{mean[s, m]:.3f}{spread(errors)}"
            row.append(f"**{text}**" if best[s] == m else text)
        rows.append([m, *row])
        times.append([m, *(f"{statistics.mean(t):.2g}" if (t := of(s, m, "seconds")) else "-" for s in SOURCES)])
    for s in SOURCES:
        groups = [[m for m in methods if (s, m) in mean and m.startswith(OURS) is own] for own in (True, False)]
        if not all(groups):
            continue
        ours, theirs = (min(group, key=lambda m: mean[s, m]) for group in groups)
        pairs = ([cells.get(f"{s}/{m}/{seed}") for m in (ours, theirs)] for seed in seeds)
        gaps = [a["error"] - b["error"] for a, b in pairs if a and b]
        verdict = "jensen is the best" if mean[s, ours] < mean[s, theirs] else "jensen is not the best"
        close = len(gaps) > 1 and abs(statistics.mean(gaps)) < 2 * statistics.stdev(gaps) / len(gaps) ** 0.5
        notes.append(
            f"- {s}: {verdict}{', within two standard errors' if close else ''}: {ours.removeprefix(OURS)} minus "
            f"{theirs} is {statistics.mean(gaps):+.3f}{spread(gaps)}, paired over the seeds."
        )
    return "\n\n".join(
        [
            "## Half of a table is missing",
            "Root mean squared error of the missing values, in standard deviations: mean over "
            f"{len(seeds)} seeds ± its standard error; the smallest mean of a column is bold. Settings: "
            + "; ".join(
                f"{m}: {', '.join(f'{k} {v}' for k, v in s.items())}" for m in methods if (s := of_any(cells, m))
            )
            + ".",
            *table["made"],
            common.table(["", *SOURCES], rows),
            "The best row of jensen and the best of the others (which ones is known only after the measurement):",
            "\n".join(notes),
            "Processor seconds of a run, with the choice of neighbours, latents, components or steps.",
            common.table(["", *SOURCES], times),
        ]
    )


def of_any(cells, method):
    """The settings of the cells of a method."""
    return next(cell["settings"] for key, cell in cells.items() if key.split("/")[1] == method)


def spread(values):
    """The standard error of a mean."""
    return f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""


class Filled(nn.Module):
    """A network that reads ``fill`` where a value is missing."""

    def __init__(self, network, fill):
        super().__init__()
        self.network = network
        self.register_buffer("fill", fill)

    def forward(self, x):
        """The network's output for the filled input."""
        return self.network(torch.where(x.isnan(), self.fill, x))


WAYS = {
    "observed pixels only": "nan",
    "zeros in place of missing pixels": "zero",
    "means in place of missing pixels, sampled": "mean",
    "complete images (for reference)": "complete",
}


def mnist(options, results):
    """Train in each way, and measure on test images."""
    settings = results.settings["mnist"]
    data = load("binarized_mnist")
    train = data.train[: settings["images"]]
    holed = hide(train, 0.5, seed=0)
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    test = data.test[order[: settings["test"]]]
    hidden = hide(test, 0.5, seed=1)
    means = holed.nanmean(0)
    results.measure("mnist", "independent pixels", partial(by_pixel, means, hidden, test, len(train)), settings)
    for name, way in WAYS.items():
        results.measure("mnist", name, partial(trained, way, train, holed, means, hidden, test, settings), settings)


def by_pixel(means, hidden, test, n):
    """The baseline: one probability per pixel, the mean of its observed values, smoothed by one image of each kind."""
    p = (means * n / 2 + 1) / (n / 2 + 2)
    each = torch.distributions.Bernoulli(p).log_prob(test).double()
    out = hidden.isnan()
    return {
        "observed": rounded((each * ~out).sum(1)),
        "joint": rounded((each * out).sum(1)),
        "single": rounded((each * out).sum(1)),
        "count": int(out.sum()),
    }


def rounded(values):
    """Numbers for the file."""
    return [round(float(v), 4) for v in values]


def trained(way, train, holed, means, hidden, test, settings):
    """Train and measure one model."""
    fill = torch.zeros_like(means) if way == "zero" else means
    x = {"nan": holed, "complete": train}.get(way, torch.where(holed.isnan(), fill, holed))
    torch.manual_seed(0)
    model = VAE(mlp(50, [200, 200]), Bernoulli(784, 200), latent=50)
    encoder = Masked(mlp(2 * 784, [200, 200]), 784)
    if way in ("zero", "mean"):
        encoder = Filled(encoder, fill)
    guide = amortize(model, encoder, MeanField, context=200)
    epochs = settings["epochs"]
    history = fit(
        model,
        guide,
        x,
        epochs=epochs,
        batch_size=200,
        lr=2e-3,
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        batch_transform=torch.bernoulli if way == "mean" else None,
        seed=0,
        progress=False,
    )
    found = held_out(model, guide, hidden, test, settings["particles"], seed=0, progress=False)
    return {
        "observed": rounded(found.observed.best),
        "joint": rounded(found.joint),
        "joint error": rounded(found.joint_error),
        "single": rounded(found.single),
        "single error": rounded(found.single_error),
        "count": int(found.count.sum()),
        "ess": float(found.ess.mean()),
        "k-hat, refined": max(found.observed.unreliable, found.complete.unreliable),
        "k-hat, single": float((~(found.pareto_k <= 0.7)).double().mean()),
        "bound at the end of training": history.elbo[-1],
        "seconds of training": history.seconds,
    }


def mnist_text(table):
    """Log-likelihoods per image and per pixel, and paired differences to training on the observed pixels."""
    cells = table["cells"]
    settings = next(iter(cells.values()))["settings"]
    names = [n for n in ("independent pixels", *WAYS) if n in cells]
    reference = cells.get(next(iter(WAYS)))
    rows, pairs = [], []
    for name in names:
        cell = cells[name]
        count = cell["count"] / len(cell["joint"])
        seen = 784 - count
        rows.append(
            [
                name,
                mean_of(cell["observed"]),
                f"{statistics.mean(cell['observed']) / seen:.4f}",
                mean_of(cell["joint"]),
                f"{statistics.mean(cell['joint']) / count:.4f}",
                mean_of(cell["single"]),
                f"{statistics.mean(cell['single']) / count:.4f}",
                *(f"{100 * cell[k]:.0f} %" if k in cell else "-" for k in ("k-hat, refined", "k-hat, single")),
            ]
        )
        if reference is not None and cell is not reference:
            differences = [
                mean_of([a - b for a, b in zip(cell[k], reference[k], strict=True)], "+")
                for k in ("observed", "joint", "single")
            ]
            pairs.append([name, *differences])
    errors = [
        math.sqrt(sum(e * e for e in cells[n][k])) / len(cells[n][k])
        for n in names
        for k in ("joint error", "single error")
        if k in cells[n]
    ]
    head = [
        "training on", "log p(observed)", "per pixel", "log p(missing given observed), jointly", "per pixel",
        "sum of log p(each missing given observed)", "per pixel", "k-hat > 0.7, jointly", "k-hat > 0.7, each",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "## Half of the pixels are missing",
            f"Statically binarized MNIST, {settings['images']:,} training images, {settings['epochs']} passes of a "
            f"784-200-200-50 VAE; {settings['test']} random test images. Nats per image, ± the standard error over the "
            f"images (Monte Carlo errors of these means are at most {max(errors, default=0):.2f}). Refined with "
            + (
                f"{settings['refine']:,} evaluations per image; single pixels with {settings['particles']} samples of "
                "the guide, whose k-hat is in the last column: where it is high, their sum is only approximate."
                if "refine" in settings
                else f"{settings['particles']:,} evaluations per image."
            ),
            *table["made"],
            common.table(head, rows),
            "Paired differences to training on the observed pixels only (above 0: better than it).",
            common.table(["training on", *(head[i] for i in (1, 3, 5))], pairs),
        ]
    )


def mean_of(values, sign=""):
    """A mean with its standard error over the data."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{sign}.2f} ± {error:.2f}"


def vae_step(way, setting):
    """A training step of ``fit``, without its first epoch, which traces and compiles."""
    hidden, latent, batch = setting["hidden"], setting["latent"], setting["batch"]
    torch.manual_seed(0)
    x = (torch.rand(setting["steps"] * batch, 784) > 0.5).float()
    if way in ("holes", "zeros"):
        x = hide(x, 0.5, seed=0)
    known = {}

    def timed(epochs):
        model = VAE(mlp(latent, hidden[::-1], nn.Tanh), Bernoulli(784, hidden[0]), latent)
        if way in ("plain", "zeros"):
            encoder = mlp(784, hidden, nn.Tanh)
            encoder = encoder if way == "plain" else Filled(encoder, torch.zeros(784))
        else:
            encoder = Masked(mlp(2 * 784, hidden, nn.Tanh), 784)
        guide = amortize(model, encoder, MeanField, context=hidden[-1])
        clock = common.Clock()
        how = {"batch_size": batch, "seed": 0, "compile": setting["compile"], "progress": False}
        known["route"] = fit(model, guide, x, epochs=epochs, scheduler=clock, **how).route
        return clock.after_first()

    def run(units):
        return timed(1 + units // setting["steps"])

    run.said = known
    return run


def ppca_data(setting):
    """Data of a PPCA model, and a start."""
    torch.manual_seed(0)
    truth = PPCA(setting["features"], setting["latent"]).double()
    x = truth(n=setting["rows"]).detach()
    return x, PPCA(setting["features"], setting["latent"]).double()


def ppca_iteration(way, setting):
    """An iteration of EM: of ``fit_em``, or over the rows of complete data by hand."""
    x, model = ppca_data(setting)
    x = hide(x, 0.5, seed=0) if way == "holes" else x
    start = copy.deepcopy(model.state_dict())

    def run(units):
        model.load_state_dict(start)
        begin = time.perf_counter()
        if way == "rows":
            em_over_rows(model, x, units)
        else:
            model.fit_em(x, units, -math.inf)
        return time.perf_counter() - begin

    return run


def em_over_rows(model, x, iterations):
    """Tipping and Bishop's E and M steps on complete data, one pass over the rows per iteration."""
    n, features = x.shape
    mean, weight, variance = x.mean(0), model.weight.detach(), model.noise.detach().square()
    for _ in range(iterations):
        centred = x - mean
        eye = torch.eye(weight.shape[1], dtype=x.dtype)
        inverse = torch.linalg.inv(weight.T @ weight + variance * eye)
        z = centred @ (weight @ inverse)  # [N, D]
        second = n * variance * inverse + z.T @ z
        cross = centred.T @ z
        weight = torch.linalg.solve(second, cross.T).T
        left = centred.square().sum() - 2 * (cross * weight).sum() + (second * (weight.T @ weight)).sum()
        variance = left / (n * features)
    return weight, variance


STEPS = {
    "no missing values, plain encoder": partial(vae_step, "plain"),
    "no missing values, encoder with the mask": partial(vae_step, "masked"),
    "half missing, plain encoder of zeros": partial(vae_step, "zeros"),
    "half missing, encoder with the mask": partial(vae_step, "holes"),
}
ITERATIONS = {
    "no missing values, over the rows, by hand": partial(ppca_iteration, "rows"),
    "no missing values, `fit_em`": partial(ppca_iteration, "complete"),
    "half missing, `fit_em`": partial(ppca_iteration, "holes"),
}
CONTENDERS = STEPS | ITERATIONS
VAES = {
    "784-200-200-50, batch 100": {"hidden": [200, 200], "latent": 50, "batch": 100, "compile": "auto"},
    "784-200-200-50, batch 100, compiled": {"hidden": [200, 200], "latent": 50, "batch": 100, "compile": True},
    "784-400-20, batch 128, compiled": {"hidden": [400], "latent": 20, "batch": 128, "compile": True},
}


def speed(options, results):
    """Time the steps and the iterations in turn."""
    settings = results.settings["speed"]
    common.confine(options.threads)
    for title, setting in VAES.items():
        setting = {**setting, **settings}
        results.measure("speed", title, partial(timed, options, STEPS, setting, settings["steps"]), setting)
    title = f"EM of PPCA, {settings['rows']:,} x {settings['features']}, {settings['latent']} latents"
    results.measure("speed", title, partial(timed, options, ITERATIONS, settings, 5), settings)


def timed(options, contenders, setting, multiple):
    """Times of contenders, and each one's ratio to the others in each round."""
    running = {name: common.Contender(__file__, name) for name in contenders}
    seconds = 0.02 if options.quick else options.seconds
    found = common.in_turn(running, setting, setting["rounds"], seconds, multiple)
    for contender in running.values():
        contender.close()
    return {"found": found}


def speed_text(table):
    """Times and ratios."""
    parts = [
        "## The time that missing values cost",
        "Milliseconds of a step or iteration: median of the rounds (minimum to maximum). Ratios: to the row named, in "
        "the same round, median (minimum to maximum). The target of a VAE step is at most 1.1 times the same step "
        "without missing values, that of an iteration of EM at most 15 times a pass over the rows without them. EM "
        "runs at least five iterations at a time. Without missing values, `fit_em` reads the rows once, for their "
        "covariance, and then iterates on that.",
        *table["made"],
    ]
    for title, cell in table["cells"].items():
        found = {name: row for name, row in cell["found"].items() if row.get("each")}
        names, rows = list(found), []
        for name, row in found.items():
            ratios = [over(row["each"], found[other]["each"]) for other in names[:2]]
            rows.append([name, over(row["each"], [0.001] * len(row["each"])), *ratios, row.get("route", "-")])
        failed = [f"{n}: {row['error']}." for n, row in cell["found"].items() if "error" in row]
        head = [title, "ms", *(f"to: {n}" for n in names[:2]), "route"]
        parts += [common.table(head, rows), *failed]
    return "\n\n".join(parts)


def over(times, others):
    """Ratios of paired times: median (minimum to maximum)."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


TEXTS = {"uci": uci_text, "mnist": mnist_text, "speed": speed_text}

if __name__ == "__main__":
    main()
