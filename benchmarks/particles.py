"""Runtime of the ways to run many particles, per data point and particle, and of the check that selects one.

    python benchmarks/particles.py              # about 4 minutes; --quick for a smoke run

The 784-200-200-50 Bernoulli VAE on random bits, float32. The same model is written in three ways: so that an outer
plate of particles works; with dimensions counted from the left, so that `torch.vmap` is used; and with a branch on a
value, so that particles run one after the other. Each is timed eagerly and compiled, in turn in every round.

The time of the check is that of the first log weights of a model and guide minus that of later ones, for models of
jensen.

Output: the tables in results/particles.md, all results in results/particles.json.
"""

import argparse
import statistics
import time

import _common as common

STYLES = ("outer plate", "torch.vmap", "one after the other")


def pair(style):
    """Model and guide as methods of one module, so that both are recognised."""
    import pyro
    import pyro.distributions as dist
    from torch import nn

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(
                nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784)
            )
            self.encoder = nn.Sequential(
                nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100)
            )

        def model(self, x):
            with pyro.plate("data", x.shape[0]):
                z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 50), 1.0).to_event(1))
                if style == "torch.vmap":
                    z = z.view(x.shape[0], 50)
                if style == "one after the other":
                    z[0, 0].item()
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return VAE().eval()


def timed(run, calls):
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def ways(options):
    """By style and route: nanoseconds per data point and particle in each round."""
    import warnings

    import torch

    from jensen.graphs.draws import LogWeights
    from jensen.kernel.weights import Pair

    warnings.simplefilter("ignore")
    n, particles = (5, 8) if options.quick else (40, 100)
    runs = {}
    for style in STYLES:
        vae = pair(style)
        torch.manual_seed(0)
        x = (torch.rand(n, 784) > 0.5).float()
        for route in ("eager", "compiled"):
            weights = LogWeights(Pair(vae.model, vae.guide), route == "compiled")
            weights((x,), particles)  # selects the way, traces, compiles
            weights((x,), particles)
            assert weights.pair.way == style, weights.pair.way
            if route == "compiled" and not weights.route.startswith("traced and compiled"):
                continue  # it branches on values
            runs[style, route] = lambda weights=weights, x=x: weights((x,), particles)
    calls = {key: max(1, round(options.seconds / max(1e-6, timed(run, 1)))) for key, run in runs.items()}
    each = {key: [] for key in runs}
    for _ in range(2 if options.quick else options.rounds):
        for key, run in runs.items():
            each[key].append(1e9 * timed(run, calls[key]) / n / particles)
    return each


def proofs(options):
    """By model and guide: milliseconds of the first log weights, of later ones, and of the check before them."""
    import torch

    from jensen.families import IAF, Bernoulli, FullCovariance, Gaussian
    from jensen.guides import amortize
    from jensen.kernel.weights import Pair, check_pair
    from jensen.models import PPCA, VAE
    from jensen.networks import mlp

    pairs = {
        "PPCA 64-8, FullCovariance": (PPCA(64, 8), FullCovariance, 64),
        "VAE 64-128-8, IAF": (VAE(mlp(8, [128]), Gaussian(64, 128, scale="shared"), latent=8), IAF, 64),
        "VAE 784-200-200-50, FullCovariance": (
            VAE(mlp(50, [200, 200]), Bernoulli(784, 200), latent=50),
            FullCovariance,
            784,
        ),
    }
    found = {}
    for name, (model, family, features) in pairs.items():
        guide = amortize(model, mlp(features, [128]), family, context=128)
        x = (torch.rand(64, features) > 0.5).float()
        rows = []
        for _ in range(2 if options.quick else 15):
            layout = check_pair(model.eval(), guide.eval(), x)
            fresh = Pair(model, guide, layout)
            rows.append([1e3 * timed(lambda fresh=fresh, x=x: fresh.log_weights((x,), 64), 1) for _ in range(2)])
        found[name] = [statistics.median(column) for column in zip(*rows, strict=True)]
    return found


def main():
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, rounds=11)
    options = parser.parse_args()
    common.confine(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    start = common.started()
    with torch.no_grad():
        each, proof = ways(options), proofs(options)
    about = common.provenance(__file__, options, start)
    base = {route: each[STYLES[0], route] for route in ("eager", "compiled")}
    rows = []
    for (style, route), times in each.items():
        ratios = [a / b for a, b in zip(times, base[route], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([style, route, f"{statistics.median(times):,.0f}", spread])
    text = (
        f"{common.made_by(about)}\n\nNanoseconds per data point and particle, medians of the rounds; and the ratio to "
        f"the outer plate with the same route, per round (min to max).\n\n"
        f"{common.table(['way', 'route', 'ns', 'ratio'], rows)}\n\n"
        "Milliseconds for the first log weights of 64 data points and 64 particles, including the check, and for later "
        "ones:\n\n"
        + common.table(
            ["model and guide", "first", "later", "check"],
            [[name, f"{a:.1f}", f"{b:.1f}", f"{a - b:.1f}"] for name, (a, b) in proof.items()],
        )
    )
    results = {"ways": [{"way": s, "route": r, "ns": times} for (s, r), times in each.items()], "proofs": proof}
    common.write(options, "particles", about, results, text)
    print(text)


if __name__ == "__main__":
    main()
