"""Published results of latent-variable models, trained and measured again; one command for each table.

    JENSEN_DATA=... python benchmarks/paper_tables.py static_mnist           # the short schedules, minutes to an hour
    JENSEN_DATA=... python benchmarks/paper_tables.py static_mnist --full    # the published schedules
    python benchmarks/paper_tables.py all --quick --out FOLDER               # a smoke test of all tables, without files

| table | published | rows |
| --- | --- | --- |
| static_mnist | Burda et al. 2016 | VAE and IWAE on statically binarized MNIST, 10,000 test images |
| dynamic_mnist | Burda et al. 2016 | one and two layers, K = 1, 5, 50, binarized anew in every epoch |
| inference_gaps | Cremer et al. 2018 | approximation and amortization gap of Gaussian and flow guides |
| linear_vae | Lucas et al. 2019 | the linear VAE beside the closed form of PPCA, collapse by the noise |
| frey_oil | | mixtures of PPCA, factor analysis and VAEs beside scikit-learn |
| evidence_methods | Wu et al. 2017 | time to an error: importance weighting, AIS, refined proposals; the sandwich |

log p(x) is reported twice: by 5,000 draws of the guide, as the papers do, and refined, with a proposal of its own for
each image. Rows are ranked by the refined value, since the guide's falls short by an amount that differs by row. The
refined value of a whole test set is that of 5,000 draws plus the mean difference on a random part of the images (a
control variate), with the error of that mean.

Training keeps checkpoints under ``--runs`` and goes on from them; measured rows are kept in results/TABLE.json and not
measured again (``--fresh`` does). Output: results/TABLE.json and results/TABLE.md.
"""

import argparse
import itertools
import math
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import _common as common
import numpy as np
import pyro
import torch
from torch import nn

from jensen.datasets import load
from jensen.families import IAF, Bernoulli, Gaussian, MeanField
from jensen.guides import Amortized, BottomUp, amortize
from jensen.inference import ELBO, IWAE, LinearAnnealing, ais, evaluate, fit, gaps, rate_distortion, sandwich
from jensen.models import PPCA, VAE, FactorAnalysis, Hierarchical, MixtureOfPPCA, VampPrior
from jensen.networks import mlp

common.PACKAGES += ("scikit-learn",)
BURDA = "Burda et al. 2016"
PYTHAE = "pythae"
NBIP = "nbip's reproduction"


def main():
    """Train and measure the rows of a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=[*TABLES, "all"])
    common.add_arguments(parser)
    parser.set_defaults(threads=torch.get_num_threads())
    parser.add_argument("--full", action="store_true", help="the published schedule of training")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file of results holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.schedule = "smoke" if options.quick else "published" if options.full else "short"
    failed = 0
    for name in TABLES if options.table == "all" else [options.table]:
        make, text = TABLES[name]
        results = common.Results(options, __file__, name, {name: partial(titled, name, text)}, fresh=options.fresh)
        make(options, results)
        failed += results.failed
    if failed:
        raise SystemExit(f"{failed} results are missing")


def titled(name, text, table):
    """A table under its title."""
    return "\n\n".join([f"# {TITLES[name]}", *table["made"], text(table)])


# Pairs of the papers


def started(means, model, guide):
    """The initial parameters of the published code: Glorot's weights, and the pixels' log-odds as the last bias."""
    parts = [*model.modules(), *guide.modules()]
    flows = {layer for part in parts if isinstance(part, IAF) for layer in part.modules()}  # which start near zero
    for layer in parts:
        if isinstance(layer, nn.Linear) and layer not in flows:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == 784][-1]
    with torch.no_grad():
        last.bias.copy_(means.clamp(0.001, 0.999).logit())


def vae(latent=50, family=MeanField, activation=nn.Tanh, prior=None):
    """One layer of latents between 784-200-200 and 200-200-784."""
    encoder = mlp(784, [200, 200], activation)
    if prior is not None:
        q = family(latent, context=200)
        model = VAE(
            mlp(latent, [200, 200], activation),
            Bernoulli(784, 200),
            latent=latent,
            prior=VampPrior(nn.Sequential(encoder, q), 0.1 + 0.05 * torch.randn(prior, 784)),
        )
        return model, Amortized(encoder, {"z": q})
    model = VAE(mlp(latent, [200, 200], activation), Bernoulli(784, 200), latent=latent)
    return model, amortize(model, encoder, family, context=200)


def two_layers():
    """Two layers of latents, 784-200-200-100 and 100-100-100-50."""
    return Hierarchical.of_widths(784), BottomUp.of_widths(784)


def published_adam(parameters, lr):
    """Burda's optimizer."""
    return torch.optim.Adam(parameters, lr=lr, eps=1e-4)


def published_rates(optimizer):
    """Burda's 3,280 passes: 3^i of them with the rate 0.001 * 10^(-i / 7), i = 0, ..., 7."""
    last = np.cumsum([3**i for i in range(8)])
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 10 ** (-int(np.searchsorted(last, epoch, "right")) / 7)
    )


PUBLISHED = {
    "epochs": 3280,
    "batch_size": 20,
    "optimizer": published_adam,
    "scheduler": published_rates,
}


def short(epochs, K=1, warm=0, **how):
    """A stage of training, whose learning rate falls to zero; early stopping by the validation bound.

    The weight of the KL grows over the first ``warm`` passes: without, a third of the units collapses in these.
    """
    fixed = {"batch_size": 100, "lr": 2e-3, "schedule": "cosine", "average": "ema", "patience": 50}
    return {"K": K, "warm": warm, "epochs": epochs, **fixed, **how}


@dataclass(frozen=True)
class Row:
    """A row of a table of images.

    Attributes:
        make: builds model and guide.
        stages: the short schedule: arguments of ``fit``, and K, one stage after the other.
        K: of the published schedule.
        gradient: of the importance-weighted objective.
        published: figures of -log p(x) in nats, by source.
        images: the number of random test images that are measured, where all of them would take an hour.
    """

    make: object
    stages: list
    K: int = 1
    gradient: str = "standard"
    published: dict = field(default_factory=dict)
    images: int | None = None

    def schedule(self, options):
        """The stages that are asked for."""
        if options.quick:
            return [short(1, min(2, self.K), warm=int(self.K == 1))]
        return [{"K": self.K, "warm": 0, **PUBLISHED}] if options.full else self.stages


def trained(options, table, name, row, train, validation, transform=None):
    """Model and guide of a row, trained stage by stage, and the histories."""
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    model, guide = row.make()
    started(train.mean(0), model, guide)
    histories = []
    folder = options.runs / table / options.schedule
    for i, stage in enumerate(row.schedule(options)):
        stage = dict(stage)
        K, warm = stage.pop("K"), stage.pop("warm") * -(-len(train) // stage["batch_size"])
        objective = ELBO(1, beta=LinearAnnealing(warm)) if warm else IWAE(K, row.gradient) if K > 1 else None
        histories.append(
            fit(
                model,
                guide,
                train,
                objective,
                validation=validation,
                batch_transform=transform,
                checkpoint=folder / f"{name}, {i}.pt".replace(" ", "_"),
                resume=True,
                seed=options.seed,
                progress=False,
                **stage,
            )
        )
        print(f"{name}: stage {i}, {len(histories[-1].elbo)} passes, {histories[-1].seconds / 60:.1f} min", flush=True)
    return model, guide, histories


def described(stages):
    """A schedule for the file of results."""
    return [{name: getattr(value, "__name__", value) for name, value in stage.items()} for stage in stages]


def curves(histories):
    """At most 60 points of the bound on training and validation data, beside the minutes of training."""
    found, before = [], 0.0
    for history in histories:
        n = len(history.elbo)
        for i in sorted({*range(0, n, max(1, n // 30)), n - 1}):
            minutes = (before + history.elapsed[i]) / 60
            values = (history.elbo[i], history.validation[i])
            found.append([round(minutes, 2), *(round(v, 3) for v in values)])
        before += history.seconds
    return found


def some_of(x, n, options):
    """The positions of n random rows."""
    return torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed))[:n]


def mean_of(values):
    """Mean and standard error over the data."""
    return [round(float(values.mean()), 4), round(float(values.std() / len(values) ** 0.5), 4)]


def error_of(errors):
    """The Monte Carlo error of a mean over independent data points."""
    return round(float(errors.square().sum().sqrt() / len(errors)), 4)


def likelihoods(model, guide, test, options, how):
    """-log p(x) by draws of the guide, and refined: values and errors."""
    start = time.perf_counter()
    by_guide = evaluate(model, guide, test, how["draws"], refine=False, seed=options.seed, progress=False)
    between = time.perf_counter()
    order = some_of(test, how["refined"], options)
    some = evaluate(model, guide, test[order], 256, refine=how["budget"], seed=options.seed, progress=False)
    more = some.log_evidence - by_guide.log_evidence[order]
    value, error = mean_of(by_guide.log_evidence)
    gain, gain_error = mean_of(more)
    active = rate_distortion(model, guide, test[order], 20, seed=options.seed, progress=False).active_units
    return {
        "bound": [-mean_of(by_guide.elbo)[0], mean_of(by_guide.elbo)[1]],
        "by guide": [-value, error, error_of(by_guide.standard_error)],
        "refined": [round(-value - gain, 4), error, round(math.hypot(gain_error, error_of(some.standard_error)), 4)],
        "refined images": len(order),
        "k-hat, guide": by_guide.unreliable,
        "k-hat, refined": some.unreliable,
        "missed": None if some.missed is None else float(some.missed.double().mean()),
        "active": sum(active.values()),
        "seconds by guide": round(between - start, 1),
        "seconds refined": round(time.perf_counter() - between, 1),
    }


def images(options, results, table, rows, train, validation, test, transform=None):
    """Train and measure the rows of a table."""
    how = {"draws": 5000, "refined": 1000, "budget": 5000}
    if options.quick:
        how = {"draws": 20, "refined": 4, "budget": 800}
    for name, row in rows.items():
        schedule = described(row.schedule(options))

        def measured(name=name, row=row):
            model, guide, histories = trained(options, table, name, row, train, validation, transform)
            x = test if row.images is None else test[some_of(test, row.images, options)]
            return {
                "published": row.published,
                **likelihoods(model, guide, x, options, how),
                "minutes": round(sum(history.seconds for history in histories) / 60, 2),
                "passes": sum(len(history.elbo) for history in histories),
                "threads": options.threads,
                "route": histories[-1].route,
                "curve": curves(histories),
            }

        settings = {"stages": schedule, **how, "seed": options.seed}
        settings |= {} if row.images is None else {"images": row.images}
        results.measure(table, f"{name}/{options.schedule}", measured, settings)


def images_text(table):
    """Published and measured -log p(x), ranked by the refined value."""
    rows = []
    for key, cell in sorted(table["cells"].items(), key=lambda item: item[1]["refined"][0]):
        name, _, schedule = key.rpartition("/")
        if "images" in cell["settings"]:
            name += f" ({cell['settings']['images']:,} images)"
        published = "; ".join(f"{value:.2f} ({source})" for source, value in cell["published"].items())
        rows.append(
            [
                name,
                schedule,
                published or "-",
                f"{cell['by guide'][0]:.2f} ± {cell['by guide'][2]:.2f}",
                f"{cell['refined'][0]:.2f} ± {cell['refined'][2]:.2f}",
                f"{cell['refined'][1]:.2f}",
                f"{cell['bound'][0]:.2f}",
                f"{100 * (cell['k-hat, guide'] or 0):.0f} %, {100 * (cell['k-hat, refined'] or 0):.0f} %",
                str(cell["active"]),
                str(cell["passes"]),
                f"{cell['minutes']:.0f}",
            ]
        )
    head = ["", "schedule", "published", "5,000 draws", "refined", "± data", "-ELBO", "k-hat > 0.7", "active units"]
    return "\n\n".join(
        [
            "-log p(x) of the test images in nats, lower is better. ±: Monte Carlo error; the error by the "
            "choice of images has its own column. k-hat: the share of images where it is above 0.7, by draws of the "
            "guide and refined. Minutes of training with the threads above.",
            common.table([*head, "passes", "minutes"], rows),
        ]
    )


FIVE, FIFTY = short(60, 5, lr=1e-3), short(30, 50, lr=1e-3)  # after a stage with K = 1

# 1. Statically binarized MNIST

STATIC_ONE = short(450, warm=50)
STATIC = {
    "VAE": Row(vae, [STATIC_ONE], published={BURDA: 88.71, PYTHAE: 89.78}),
    "VAE, VampPrior": Row(partial(vae, prior=500), [short(200, warm=50)], published={PYTHAE: 85.79}, images=1000),
    "IWAE, K = 5": Row(vae, [STATIC_ONE, FIVE], 5, published={BURDA: 87.63}),
    "IWAE, K = 50": Row(vae, [STATIC_ONE, FIFTY], 50, "dreg", published={BURDA: 87.10, PYTHAE: 86.82}),
}


def of_images(options, name, size, rest):
    """Training, validation (the first ``rest``) and test images; digits, made of 784 pixels, in a smoke test."""
    if options.quick:
        x = load("digits", binarize="threshold").train
        x = nn.functional.pad(x, (0, size - x.shape[1]))
        return x[:200], x[200:220], x[220:230]
    data = load(name)
    return data.train, data.validation[:rest], data.test


def static_mnist(options, results):
    """Table 1."""
    images(options, results, "static_mnist", STATIC, *of_images(options, "binarized_mnist", 784, 2000))


# 2. Dynamically binarized MNIST

DYNAMIC_ONE = short(900, warm=100)  # new images in every pass: longer training does not overfit
LAYERS_ONE = short(200, warm=50)
DYNAMIC = {
    "VAE": Row(vae, [DYNAMIC_ONE], published={BURDA: 86.76}),
    "IWAE, K = 5": Row(vae, [DYNAMIC_ONE, FIVE], 5, published={BURDA: 85.54}),
    "IWAE, K = 50": Row(vae, [DYNAMIC_ONE, FIFTY], 50, published={BURDA: 84.78}),
    "DReG, K = 5": Row(vae, [DYNAMIC_ONE, FIVE], 5, "dreg", published={NBIP: 84.90}),
    "DReG, K = 50": Row(vae, [DYNAMIC_ONE, FIFTY], 50, "dreg", published={NBIP: 84.32}),
    "two layers, VAE": Row(two_layers, [LAYERS_ONE], published={BURDA: 85.33}),
    "two layers, IWAE, K = 5": Row(two_layers, [LAYERS_ONE, FIVE], 5, published={BURDA: 83.89}),
    "two layers, IWAE, K = 50": Row(two_layers, [LAYERS_ONE, FIFTY], 50, published={BURDA: 82.90}),
    "VAE, VampPrior": Row(
        partial(vae, prior=500),
        [short(200, warm=50)],
        published={"Tomczak and Welling 2018": 85.57},
        images=1000,
    ),
}


def dynamic_mnist(options, results):
    """Table 2: training images are binarized anew in every pass, test and validation images once."""
    train, validation, test = of_images(options, "mnist", 784, 2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        validation, test = torch.bernoulli(validation), torch.bernoulli(test)
    images(options, results, "dynamic_mnist", DYNAMIC, train, validation, test, torch.bernoulli)


# 3. Gaps of inference

GAPS = {
    "MNIST, Gaussian": ("binarized_mnist", MeanField),
    "MNIST, flow": ("binarized_mnist", IAF),
    "Fashion-MNIST, Gaussian": ("fashion_mnist", MeanField),
    "Fashion-MNIST, flow": ("fashion_mnist", IAF),
}


def inference_gaps(options, results):
    """Table 3: log p(x) - ELBO in its two parts, for factorised Gaussian and flow guides of the same decoder."""
    for name, (source, family) in GAPS.items():
        row = Row(partial(vae, family=family), [short(60)])
        how = {"images": 100, "particles": 5000, "refine": 5000}
        if options.quick:
            how = {"images": 3, "particles": 50, "refine": 500}

        def measured(name=name, row=row, source=source, how=how):
            train, validation, test = of_binary(options, source)
            model, guide, (history,) = trained(options, "inference_gaps", name, row, train, validation)
            x = test[some_of(test, how["images"], options)]
            rounds = {"rounds": 1, "steps": 3} if options.quick else {}
            found = gaps(
                model, guide, x, how["particles"], refine=how["refine"], seed=options.seed, progress=False, **rounds
            )
            return {
                "log p(x)": mean_of(found.log_evidence),
                "approximation": mean_of(found.approximation),
                "amortization": mean_of(found.amortization),
                "k-hat": found.unreliable,
                "converged": float(found.converged.double().mean()),
                "minutes": round(history.seconds / 60, 2),
                "passes": len(history.elbo),
                "curve": curves([history]),
            }

        settings = {"stages": described(row.schedule(options)), **how, "seed": options.seed}
        results.measure("inference_gaps", f"{name}/{options.schedule}", measured, settings)


def of_binary(options, source):
    """Binary images: training, validation, test."""
    if options.quick or source == "binarized_mnist":
        return of_images(options, source, 784, 2000)
    data = load(source, binarize="sample")
    return data.train, data.validation[:2000], data.test


def gaps_text(table):
    """The two parts of the gap, and whether Cremer's findings hold."""
    rows = []
    for key, cell in table["cells"].items():
        name, _, schedule = key.rpartition("/")
        total = cell["approximation"][0] + cell["amortization"][0]
        values = [" ± ".join(f"{v:.2f}" for v in cell[part]) for part in ("approximation", "amortization")]
        share = cell["amortization"][0] / total if total else math.nan
        rows.append([name, schedule, f"{cell['log p(x)'][0]:.2f}", *values, f"{100 * share:.0f} %"])
        rows[-1] += [f"{100 * cell['converged']:.0f} %", f"{100 * cell['k-hat']:.0f} %"]
        rows[-1] += [str(cell["passes"]), f"{cell['minutes']:.0f}"]
    head = ["", "schedule", "log p(x)", "approximation gap", "amortization gap", "amortization of all"]
    head += ["converged", "k-hat > 0.7"]
    return "\n\n".join(
        [
            "Gaps in nats per test image, ± of the mean over images; log p(x) is refined. Cremer et al. (2018) find "
            "that inference often falls short by amortization rather than by the family, and that the parameters of a "
            "flow also help to generalize. Their figures are for other networks and are not quoted. Converged: the "
            "share of images whose own guide converged; the approximation gap of the others is an upper limit.",
            common.table([*head, "passes", "minutes"], rows),
        ]
    )


# 4. The linear VAE


class LinearGuide(nn.Module):
    """q(z | x): the mean is linear in x, the standard deviations are the same for all x."""

    def __init__(self, features, latent):
        super().__init__()
        self.loc = nn.Linear(features, latent)
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, x):
        """The Pyro guide."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(self.loc(x), self.log_scale.exp()).to_event(1))


def optimum(x, latent, variance=None):
    """PPCA of highest log p(x), with a given variance of the noise or the best one, and the eigenvalues."""
    x = x.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    model = PPCA(x.shape[1], latent).double()
    variance = float(values[latent:].mean()) if variance is None else variance
    with torch.no_grad():
        model.mean.copy_(mean)
        model.weight.copy_(vectors[:, :latent] * (values[:latent] - variance).clamp(min=0).sqrt())
        model.log_noise.fill_(0.5 * math.log(variance))
    return model, values


def linear_vae(options, results):
    """Table 4: distance from the closed form, with sigma^2 learned and fixed; active units beside eigenvalues."""
    latent, above = (5, (2,)) if options.quick else (50, (6, 12, 20, 36))
    if options.quick:
        x, _, test = of_images(options, "mnist", 64, 0)
    else:
        data = load("mnist")
        x, test = torch.cat([data.train, data.validation]), data.test
    values = optimum(x, latent)[1]
    runs = {"learned": None} | {f"{k} eigenvalues above": float((values[k - 1] * values[k]).sqrt()) for k in above}
    for name, variance in runs.items():
        stage = {"epochs": 2 if options.quick else 1000 if options.full else 300, "batch_size": 500, "lr": 3e-3}
        stage |= {"schedule": "cosine", "average": "ema"}

        def measured(name=name, variance=variance, stage=stage):
            pyro.clear_param_store()
            torch.manual_seed(options.seed)
            best, _ = optimum(x, latent, variance)
            model, guide = PPCA(x.shape[1], latent), LinearGuide(x.shape[1], latent)
            with torch.no_grad():
                model.mean.copy_(x.mean(0))
                model.log_noise.fill_(0.5 * math.log(float(x.var(0).mean()) if variance is None else variance))
            model.log_noise.requires_grad_(variance is None)
            file = options.runs / "linear_vae" / options.schedule / f"{name}.pt".replace(" ", "_")
            history = fit(
                model,
                guide,
                x,
                ELBO(1, "stl"),
                checkpoint=file,
                resume=True,
                seed=options.seed,
                progress=False,
                **stage,
            )
            model, guide = model.double(), guide.double()
            some = x[:: max(1, len(x) // 5000)].double()
            with torch.no_grad():
                reached, known = (float(m.log_evidence(x.double()).mean()) for m in (model, best))
                tests = [float(m.log_evidence(test.double()).mean()) for m in (model, best)]
                means = guide.loc(some)
                strengths = torch.linalg.svdvals(model.weight).square()
                along = strengths / (strengths + model.noise.square())  # of the posterior mean, in W's principal axes
            bound = float(evaluate(model, guide, some, 100, refine=False, seed=0, progress=False).elbo.mean())
            return {
                "sigma^2": float(model.noise.detach().square()),
                "sigma^2 of the optimum": float(best.noise.detach().square()),
                "optimum": known,
                "short of it": known - reached,
                "gap of the guide": float(model.log_evidence(some).detach().mean()) - bound,
                "test": tests,
                "eigenvalues above": int((values[:latent] > float(best.noise.detach().square())).sum()),
                "active": int((along > 0.01).sum()),
                "active units": int((means.var(0) > 0.01).sum()),
                "variances": [round(float(v), 5) for v in along],
                "eigenvalues": [round(float(v), 5) for v in values[: latent + 1]],
                "minutes": round(history.seconds / 60, 2),
                "passes": len(history.elbo),
                "curve": [round(v, 3) for v in history.elbo[:: max(1, len(history.elbo) // 30)]],
            }

        settings = {"latent": latent, **stage, "sigma^2": variance, "seed": options.seed}
        results.measure("linear_vae", f"{name}/{options.schedule}", measured, settings)


def linear_text(table):
    """Distances from the optimum, and active units."""
    rows = []
    for key, cell in table["cells"].items():
        name, _, schedule = key.rpartition("/")
        rows.append(
            [
                name,
                schedule,
                f"{cell['sigma^2']:.5f} ({cell['sigma^2 of the optimum']:.5f})",
                f"{cell['optimum']:.3f}",
                f"{cell['short of it']:.4f}",
                f"{cell['gap of the guide']:.4f}",
                f"{cell['test'][0]:.3f} ({cell['test'][1]:.3f})",
                f"{cell['active']} ({cell['eigenvalues above']})",
                str(cell["active units"]),
                str(cell["passes"]),
                f"{cell['minutes']:.1f}",
            ]
        )
    head = ["sigma^2", "schedule", "its value (closed form)", "log p(x) of the closed form", "SVI short of it"]
    head += ["log p(x) - ELBO", "test (closed form)", "active (eigenvalues above)", "active units", "passes", "minutes"]
    return "\n\n".join(
        [
            "The linear VAE on the 60,000 grey images of MNIST in [0, 1], trained by SVI, beside the closed form of "
            "PPCA; exact log p(x) in nats per image. Lucas et al. (2019) prove that the ELBO adds no local maxima to "
            "those of log p(x), and that a unit collapses where its eigenvalue is below sigma^2. Active: "
            "principal axes of W along which the variance of the posterior mean is above 0.01; active units: the same "
            "of single units, which are rotated among nearly equal eigenvalues until the very end.",
            common.table(head, rows),
        ]
    )


# 5. Frey faces and oil flow


def frey_oil(options, results):
    """Table 5: log p(x) of test data, by scikit-learn and by jensen; sizes are chosen by validation data."""
    for source, sizes in (("frey_faces", (5, 20, 50, 100)), ("oil_flow", (2, 4, 8, 11))):
        data = load("digits") if options.quick else load(source, standardize=source == "oil_flow")
        parts = [part.double() for part in (data.train, data.validation, data.test)]
        if options.quick:
            parts, sizes = [part[:100] for part in parts], (2,)
        for name, function in DENSITIES.items():
            settings = {"sizes": list(sizes), "seed": options.seed, "schedule": options.schedule}
            made = partial(chosen, function, name, source, parts, sizes, options)
            results.measure("frey_oil", f"{source}/{name}", made, settings)


def chosen(function, name, source, parts, sizes, options):
    """The setting with the highest log p(x) of the validation data, and log p(x) of the test data."""
    start = time.perf_counter()
    found = {size: function(parts, size, options, f"{source}_{name}_{size}".replace(" ", "_")) for size in sizes}
    size = max(found, key=lambda size: float(found[size](parts[1]).mean()))
    return {"size": size, "test": mean_of(found[size](parts[2])), "seconds": round(time.perf_counter() - start, 1)}


def by_sklearn(make, parts, size, options, name):
    """A density of scikit-learn."""
    made = make(size, options.seed).fit(parts[0].numpy())
    return lambda x: torch.as_tensor(made.score_samples(x.numpy()))


def by_mixture(make, parts, size, options, name):
    """A density of scikit-learn or jensen with 1 to 10 components, chosen by validation data."""
    made = [make(size, C, parts[0], options) for C in ((2,) if options.quick else (2, 5, 10))]
    return max(made, key=lambda density: float(density(parts[1]).mean()))


def gaussian_mixture(size, C, train, options):
    """scikit-learn's mixture with full covariances, of that many components; the latent size is not used."""
    from sklearn.mixture import GaussianMixture

    made = GaussianMixture(C, reg_covar=1e-4, random_state=options.seed).fit(train.numpy())
    return lambda x: torch.as_tensor(made.score_samples(x.numpy()))


def mixture_of_ppca(size, C, train, options):
    """A mixture of PPCA."""
    torch.manual_seed(options.seed)
    model = MixtureOfPPCA(train.shape[1], size, C).double().fit_em(train)
    return lambda x: model.log_evidence(x).detach()


def closed(make, parts, size, options, name):
    """A linear model of jensen, by its own maximum likelihood."""
    torch.manual_seed(options.seed)
    model = make(parts[0].shape[1], size).double()
    (model.fit_closed_form if isinstance(model, PPCA) else model.fit_em)(parts[0])
    return lambda x: model.log_evidence(x).detach()


def gaussian_vae(parts, size, options, name):
    """A VAE with Gaussian likelihood, early stopping by validation data; its log p(x) is refined."""
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    features = parts[0].shape[1]
    model = VAE(mlp(size, [200]), Gaussian(features, 200, scale="shared"), latent=size)
    guide = amortize(model, mlp(features, [200]), MeanField, context=200)
    train, validation = (part.float() for part in parts[:2])
    epochs = 2 if options.quick else 3000 if options.full else 600
    how = {"average": "ema", "patience": 100, "schedule": "cosine", "lr": 2e-3, "batch_size": 100}
    file = options.runs / "frey_oil" / options.schedule / f"{name}.pt"
    how |= {"checkpoint": file, "resume": True, "seed": options.seed, "progress": False}
    fit(model, guide, train, validation=validation, epochs=epochs, **how)
    budget = 300 if options.quick else 3000

    def density(x):
        return evaluate(model, guide, x.float(), 256, refine=budget, seed=options.seed, progress=False).log_evidence

    return density


def of_sklearn(module, name, **how):
    """A constructor of scikit-learn with a latent size, imported when it is called."""

    def make(size, seed):
        made = getattr(__import__(f"sklearn.{module}", fromlist=[name]), name)
        return made(n_components=size, random_state=seed, **how)

    return make


DENSITIES = {
    "scikit-learn, PCA": partial(by_sklearn, of_sklearn("decomposition", "PCA")),
    "PPCA": partial(closed, PPCA),
    "scikit-learn, factor analysis": partial(by_sklearn, of_sklearn("decomposition", "FactorAnalysis", max_iter=5000)),
    "factor analysis": partial(closed, FactorAnalysis),
    "scikit-learn, Gaussian mixture": partial(by_mixture, gaussian_mixture),
    "mixture of PPCA": partial(by_mixture, mixture_of_ppca),
    "VAE": gaussian_vae,
}


def frey_text(table):
    """Test data by method."""
    rows = []
    for key, cell in table["cells"].items():
        source, name = key.split("/")
        rows.append(
            [
                source,
                name,
                "-" if "Gaussian mixture" in name else str(cell["size"]),
                " ± ".join(f"{v:.2f}" for v in cell["test"]),
                f"{cell['seconds']}",
            ]
        )
    return "\n\n".join(
        [
            "log p(x) of test data in nats, ± of the mean over data; latent sizes and numbers of components are chosen "
            "on validation data. Frey faces are grey values in [0, 1], oil flow is standardized.",
            common.table(["data", "density", "latent", "log p(x)", "seconds"], rows),
        ]
    )


# 6. Methods of evidence on trained decoders

TRAINED = ("VAE", "IWAE, K = 50")  # of table 1


def evidence_methods(options, results):
    """Table 6: error and time of importance weighting, AIS and refined proposals, and bounds on simulated images."""
    n, budget = (3, 500) if options.quick else (50, 60_000)
    draws, steps, budgets = (100, 1000, 5000, 50_000), (30, 100, 300, 1000, 3000), (1500, 5000, 12_000)
    if options.quick:
        draws, steps, budgets = (50,), (5,), (500,)
    for name in TRAINED:
        decoder = cache(partial(of_table_1, options, name, n))
        how = {"seed": options.seed, "progress": False}
        settings = {"images": n, "stages": described(STATIC[name].schedule(options)), "seed": options.seed}

        def reference(decoder=decoder):
            model, guide, x = decoder()
            found = evaluate(model, guide, x, 256, refine=budget, seed=999, progress=False)
            return {
                "log p(x)": mean_of(found.log_evidence),
                "each": found.log_evidence.tolist(),
                "errors": found.standard_error.tolist(),
                "k-hat": found.unreliable,
            }

        results.measure("evidence_methods", f"{name}/reference", reference, {**settings, "budget": budget})
        known = results.tables["evidence_methods"]["cells"].get(f"{name}/reference")
        if known is None:
            continue
        methods = {f"guide, K = {K}": partial(evaluate, particles=K, refine=False, **how) for K in draws}
        methods |= {f"refined, {B}": partial(evaluate, particles=256, refine=B, **how) for B in budgets}
        methods |= {f"AIS, T = {T}": partial(annealed, chains=16, temperatures=T, **how) for T in steps}
        for method, run in methods.items():
            made = partial(against, run, decoder, known)
            results.measure("evidence_methods", f"{name}/{method}", made, settings)

        def bracket(decoder=decoder, how=how):
            model, guide, _ = decoder()
            start = time.perf_counter()
            found = sandwich(
                model,
                guide,
                n=n,
                particles=draws[-2:][0],
                refine=budgets[-1],
                chains=16,
                temperatures=steps[:3][-1],
                **how,
            )
            widths = {part: mean_of(getattr(found, part).width) for part in ("weighted", "annealed", "refined")}
            return {"widths": widths, "verdict": found.verdict(), "seconds": round(time.perf_counter() - start, 1)}

        results.measure("evidence_methods", f"{name}/sandwich", bracket, settings)


def of_table_1(options, name, n):
    """A model and guide of table 1, and n test images."""
    train, validation, test = of_images(options, "binarized_mnist", 784, 2000)
    model, guide, _ = trained(options, "static_mnist", name, STATIC[name], train, validation)
    return model, guide, test[some_of(test, n, options)]


def annealed(model, guide, x, **how):
    """AIS from the prior: without the guide."""
    return ais(model, None, x, **how)


def against(run, decoder, known):
    """The differences of an estimate from the reference, and its time."""
    model, guide, x = decoder()
    start = time.perf_counter()
    found = run(model, guide, x)
    seconds = time.perf_counter() - start
    truth, errors = torch.tensor(known["each"]), torch.tensor(known["errors"])
    off = found.log_evidence - truth
    wide = (found.standard_error.square() + errors.square()).sqrt()
    return {
        "seconds": round(seconds, 1),
        "mean": mean_of(off),
        "root mean square": round(float(off.square().mean().sqrt()), 4),
        "of the reference": round(float(errors.square().mean().sqrt()), 4),
        "largest": round(float(off.abs().max()), 3),
        "covered": float((off.abs() <= 2 * wide).double().mean()),
        "each": [round(float(v), 4) for v in off],
    }


def seconds_to(cells, level):
    """Seconds to a root mean squared error, by interpolation of logarithms; None if it is not reached."""
    points = sorted((cell["seconds"], cell["root mean square"]) for cell in cells)
    for (a, high), (b, low) in itertools.pairwise(points):
        if low <= level < high:
            return a * (b / a) ** (math.log(high / level) / math.log(high / low))
    return points[0][0] if points and points[0][1] <= level else None


def methods_text(table):
    """Errors and times by decoder and method, times to the same error, bounds, and what 5,000 draws get wrong."""
    rows, times, words = [], [], []
    for name in TRAINED:
        cells = {key.split("/", 1)[1]: cell for key, cell in table["cells"].items() if key.split("/", 1)[0] == name}
        for method, cell in cells.items():
            if "root mean square" not in cell:
                continue
            rows.append(
                [
                    name,
                    method,
                    " ± ".join(f"{v:.3f}" for v in cell["mean"]),
                    f"{cell['root mean square']:.3f}",
                    f"{cell['largest']:.2f}",
                    f"{100 * cell['covered']:.0f} %",
                    f"{cell['seconds']:.0f}",
                ]
            )
        for kind in ("guide", "AIS", "refined"):
            some = [cell for method, cell in cells.items() if method.startswith(kind) and "seconds" in cell]
            reached = [seconds_to(some, level) for level in LEVELS]
            times.append([name, kind, *("not reached" if t is None else f"{t:.0f}" for t in reached)])
        if (cell := cells.get("sandwich")) is not None:
            widths = ", ".join(f"{part} {v:.3f} ± {e:.3f}" for part, (v, e) in cell["widths"].items())
            words.append(f"Simulated images, {name}: upper minus lower bound: {widths}. {cell['verdict']}")
        if (cell := cells.get("guide, K = 5000")) is not None:
            low = sum(v < -1 for v in cell["each"]) / len(cell["each"])
            words.append(
                f"By 5,000 draws of the guide, {name} is {-cell['mean'][0]:.2f} ± {cell['mean'][1]:.2f} nats low, "
                f"{100 * low:.0f} % of the images by more than 1 nat, and {100 * cell['covered']:.0f} % are within two "
                "standard errors."
            )
    head = ["decoder", "method", "mean difference", "root mean square", "largest", "within 2 errors", "seconds"]
    return "\n\n".join(
        [
            "log p(x) of test images by each method, minus a reference (refined, other seeds and starts, 60,000 "
            "evaluations per image), in nats.",
            common.table(head, rows),
            "Seconds to a root mean squared error per image, interpolated.",
            common.table(["decoder", "method", *(f"{level} nats" for level in LEVELS)], times),
            *words,
        ]
    )


TITLES = {
    "static_mnist": "Statically binarized MNIST, after Burda et al. 2016",
    "dynamic_mnist": "Dynamically binarized MNIST, after Burda et al. 2016",
    "inference_gaps": "Approximation and amortization gaps, after Cremer et al. 2018",
    "linear_vae": "The linear VAE is PPCA, after Lucas et al. 2019",
    "frey_oil": "Frey faces and oil flow: linear models, mixtures and VAEs",
    "evidence_methods": "Importance weighting, AIS and refined evidence, after Wu et al. 2017",
}
LEVELS = (0.5, 0.2, 0.1, 0.05)  # nats

TABLES = {
    "static_mnist": (static_mnist, images_text),
    "dynamic_mnist": (dynamic_mnist, images_text),
    "inference_gaps": (inference_gaps, gaps_text),
    "linear_vae": (linear_vae, linear_text),
    "frey_oil": (frey_oil, frey_text),
    "evidence_methods": (evidence_methods, methods_text),
}

if __name__ == "__main__":
    main()
