"""The ELBO of guides from `amortize` for general Pyro programs, compared with Pyro's AutoGuides.

Five models without an attribute ``latents``: eight schools (Rubin 1981), baseball (Efron and Morris 1975), a Bayesian
linear regression, a logistic regression with group effects, a topic model with known topics. Every guide is trained
from every seed with the same steps, particles and optimiser; differences are paired by seed. Output: the table in
results/programs.md, all results in results/programs.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import _common as common
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam

from jensen.guides import amortize

AUTO = {"MeanField": ("AutoNormal", AutoNormal), "FullCovariance": ("AutoMultivariateNormal", AutoMultivariateNormal)}


def schools():
    """Effects of coaching in eight schools, centred."""

    def model(y, error):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(effect, error), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return model, (y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]))


def baseball():
    """Hits of 18 players in 45 times at bat, with partial pooling of log odds."""

    def model(hits, at_bats):
        mu = pyro.sample("mu", dist.Normal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("players", len(hits)):
            logit = pyro.sample("logit", dist.Normal(mu, sigma))
            pyro.sample("hits", dist.Binomial(at_bats, logits=logit), obs=hits)

    hits = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])
    return model, (hits, torch.full((18,), 45.0))


def regression():
    """A linear regression with correlated columns and an unknown scale."""

    def model(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            mean = intercept + torch.einsum("nd,...d->...n", x, w.squeeze(-2) if w.dim() > 1 else w)
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw)
    x[:, 1:] = 0.8 * x[:, :1] + 0.6 * x[:, 1:]
    y = x @ torch.tensor([1.0, -0.5, 0.0, 0.5, 2.0]) + 0.3 + torch.randn(60, generator=draw)
    return model, (x, y)


def groups():
    """A logistic regression with an intercept for each of 12 groups."""

    def model(x, group, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 12):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a[..., group] + slope * x), obs=y)

    draw = torch.Generator().manual_seed(1)
    group = torch.randint(12, (200,), generator=draw)
    x = torch.randn(200, generator=draw)
    logits = 0.5 + torch.randn(12, generator=draw)[group] - x
    return model, (x, group, (torch.rand(200, generator=draw) < logits.sigmoid()).float())


def topics():
    """The shares of 4 known topics in 100 documents of 40 words."""
    draw = torch.Generator().manual_seed(2)
    words = 1.5 * torch.randn(4, 30, generator=draw)

    def model(counts):
        with pyro.plate("documents", len(counts)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            logits = z.softmax(-1) @ words
            pyro.sample("counts", dist.Multinomial(logits=logits, validate_args=False), obs=counts)

    shares = torch.randn(100, 4, generator=draw).softmax(-1)
    drawn = torch.multinomial((shares @ words).softmax(-1), 40, replacement=True, generator=draw)
    return model, (torch.nn.functional.one_hot(drawn, 30).sum(1).float(),)


MODELS = {"eight schools": schools, "baseball": baseball, "regression": regression, "groups": groups, "topics": topics}


def main():
    """Train and measure every guide from every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--particles", type=int, default=8)
    add("--draws", type=int, default=20_000)
    add("--seeds", type=int, default=3)
    add("--lr", type=float, default=0.02)
    add("--only", default="", help="names of models, separated by commas; all if empty")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    options.threads = torch.get_num_threads()
    wanted = {name.strip() for name in options.only.split(",") if name.strip()}
    rows = []
    for name, make in MODELS.items():
        if wanted and name not in wanted:
            continue
        model, data = make()
        for family, (other, auto) in AUTO.items():
            makers = {
                "amortize": lambda model=model, data=data, family=family: amortize(model, family=family, data=data),
                "other": lambda model=model, auto=auto: auto(model),
            }
            seeds = range(options.seeds)
            found = {key: [_elbo(model, made, data, s, options) for s in seeds] for key, made in makers.items()}
            rows.append({"model": name, "family": family, "auto": other, **found})
            print(rows[-1], flush=True)
            _write(options, rows, start)


def _elbo(model, make, data, seed, options):
    """Train a guide; return its ELBO, its Monte Carlo error, and the seconds."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    begin = time.perf_counter()
    guide = make()
    loss = Trace_ELBO(options.particles, max_plate_nesting=1, vectorize_particles=True)
    optimizer = ClippedAdam({"lr": options.lr, "lrd": 0.02 ** (1 / options.steps)})
    svi = SVI(model, guide, optimizer, loss)
    for _ in range(options.steps):
        svi.step(*data)
    seconds = time.perf_counter() - begin
    many = Trace_ELBO(options.draws // 50, max_plate_nesting=1, vectorize_particles=True)
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        parts = [-many.loss(model, guide, *data) for _ in range(50)]
    return statistics.mean(parts), statistics.stdev(parts) / 50**0.5, seconds


def _write(options, rows, start):
    """Write the table and its provenance."""
    about = common.provenance(__file__, options, start)
    cells = []
    for row in rows:
        ours, auto = ([elbo for elbo, *_ in row[key]] for key in ("amortize", "other"))
        gains = [a - b for a, b in zip(ours, auto, strict=True)]
        noise = sum(e**2 for key in ("amortize", "other") for _, e, _ in row[key]) ** 0.5 / len(gains)
        spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        cells.append(
            [
                row["model"],
                row["family"],
                f"{statistics.mean(ours):.3f}",
                f"{statistics.mean(auto):.3f} ({row['auto']})",
                f"{statistics.mean(gains):+.3f} ± {max(noise, spread):.3f}",
            ]
        )
    text = (
        f"ELBO in nats for all data, mean over {options.seeds} training seeds, {options.steps} steps of "
        f"{options.particles} particles; the difference is paired by seed, ± the larger of its error over seeds and "
        "its Monte Carlo error.\n"
    )
    table = common.table(["model", "family", "amortize", "AutoGuide", "difference"], cells)
    common.write(options, "programs", about, {"rows": rows}, f"{text}\n{common.made_by(about)}\n\n{table}")


if __name__ == "__main__":
    main()
