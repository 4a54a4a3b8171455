"""Runtime of an importance-weighted log p(x): `evaluate` compared with other implementations.

    python benchmarks/evidence.py              # about 8 minutes; --quick for a smoke run

An untrained 784-200-200-50 Bernoulli VAE with tanh networks on random bits; float32; K particles per data point.
Contenders are timed in turn, in separate processes on the same cores; torch uses the same implementation of float32
products in all of them. A row of the table is the median of the rounds, in ns per data point and particle.

| contender | what it is |
| --- | --- |
| jensen | `evaluate(..., compile=True)`: time of many data points minus a few, without tracing and compilation |
| products | only the decoder's matrix products |
| by hand | compiled PyTorch, the encoder once per data point, the best of three chunk sizes |
| JAX | the same in one `jax.jit`, chunks in `lax.scan`, the best of three sizes; if installed |
| Pyro | traces of guide and model in a plate of particles, without validation |
| pythae | `get_nll`; if installed |

For `evaluate` alone also: peak memory against K, and the time to a given Monte Carlo error on scikit-learn's digits,
with adaptive and with equal numbers of particles.

Output: the tables in results/evidence.md, all results in results/evidence.json.
"""

import gc
import itertools
import math
import statistics
import time

import _common as common

HIDDEN, LATENT = [200, 200], 50
SETTINGS = {  # rows: data points per batch; jensen chooses the same number for 784 features
    "K = 5000": {"particles": 5000, "rows": 41, "data": 41},
    "K = 500": {"particles": 500, "rows": 41, "data": 410},
    "K = 50": {"particles": 50, "rows": 53, "data": 4240},
}
OURS = "jensen"
TARGETS = {"K = 5000": {"Pyro": 0.3, "by hand": 0.75, "JAX": 0.6, "products": 2.0}}
CHUNKS = (1000, 2500, 6000)  # data points times particles at once


def data(units):
    """Random bits."""
    import torch

    torch.manual_seed(0)
    return (torch.rand(units, 784) > 0.5).float()


def pair(features=784, hidden=None, latent=LATENT):
    """A model and its guide."""
    from torch import nn

    from jensen.families import Bernoulli, MeanField
    from jensen.guides import amortize
    from jensen.models import VAE
    from jensen.networks import mlp

    hidden = HIDDEN if hidden is None else hidden
    model = VAE(mlp(latent, hidden[::-1], nn.Tanh), Bernoulli(features, hidden[0]), latent)
    return model, amortize(model, mlp(features, hidden, nn.Tanh), MeanField, context=hidden[-1])


def jensen(setting):
    """The time of a call of evaluate, minus that of a call on few data points (median)."""
    from jensen.inference import evaluate

    model, guide = pair()

    def timed(n):
        x = data(n)
        begin = time.perf_counter()
        evaluate(model, guide, x, setting["particles"], seed=0, compile=True, refine=False, progress=False)
        return time.perf_counter() - begin

    cold = timed(setting["rows"])
    warm = [timed(setting["rows"]) for _ in range(3)]

    def run(units):
        warm.append(timed(setting["rows"]))
        return timed(setting["rows"] + units) - statistics.median(warm)

    run.said = {"compile": cold - statistics.median(warm)}
    return run


def best_of(make, setting):
    """The fastest of several chunk sizes, as a function of the number of data points; a chunk divides K."""
    runs = {}
    for chunk in CHUNKS:
        most = max(1, min(setting["particles"], chunk // setting["rows"]))
        block = next(k for k in range(most, 0, -1) if setting["particles"] % k == 0)
        if block not in runs:
            runs[block] = make(block)
            runs[block](setting["rows"])
    times = {block: min(run(setting["rows"]) for _ in range(3)) for block, run in runs.items()}
    block = min(times, key=times.get)

    def run(units):
        return runs[block](units)

    run.said = {"block": block}
    return run


def timing(step, setting):
    """A timed function of the number of data points, which processes them in batches of rows."""

    def run(units):
        x = data(units)
        begin = time.perf_counter()
        found = [step(rows) for rows in x.split(setting["rows"])]
        assert all(math.isfinite(float(v.sum())) for v in found if v is not None)
        return time.perf_counter() - begin

    return run


def products(setting):
    """The decoder's products, with the best chunk size."""
    import torch

    shapes = list(itertools.pairwise([LATENT, *HIDDEN[::-1], 784]))

    def make(block):
        found = [(torch.randn(block * setting["rows"], i), torch.randn(o, i)) for i, o in shapes]

        def step(_):
            for _ in range(setting["particles"] // block):
                for h, weight in found:
                    _ = h @ weight.t()

        return timing(step, setting)

    return best_of(make, setting)


def networks():
    """The networks as modules: encoder, heads, decoder."""
    from torch import nn

    def network(*widths):
        return [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.Tanh())]

    encoder = nn.Sequential(*network(784, *HIDDEN), nn.Linear(HIDDEN[-1], 2 * LATENT))
    return encoder, nn.Sequential(*network(LATENT, *HIDDEN[::-1]), nn.Linear(HIDDEN[0], 784))


def by_hand(setting):
    """Compiled PyTorch: log weights of each chunk; the log of their mean at the end."""
    import torch
    import torch.nn.functional as F

    torch._dynamo.reset()
    encoder, decoder = networks()

    def make(block):
        @torch.compile(dynamic=False)
        def log_weights(x, loc, log_scale):
            noise = torch.randn(block, *loc.shape)
            z = loc + log_scale.exp() * noise
            logits = decoder(z)
            log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
            return log_p - 0.5 * z.square().sum(-1) + (log_scale + 0.5 * noise.square()).sum(-1)  # [block, N]

        @torch.no_grad()
        def step(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            found = [log_weights(x, loc, log_scale) for _ in range(setting["particles"] // block)]
            return torch.cat(found).logsumexp(0) - math.log(setting["particles"])

        return timing(step, setting)

    return best_of(make, setting)


def jax_jit(setting):
    """One compiled function per batch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)

    def network(*widths):
        return [
            tuple(jnp.asarray(random.uniform(-1, 1, shape) / i**0.5, jnp.float32) for shape in ((i, o), o))
            for i, o in itertools.pairwise(widths)
        ]

    def apply(weights, h):
        for place, (weight, bias) in enumerate(weights):
            h = h @ weight + bias
            h = jnp.tanh(h) if place < len(weights) - 1 else h
        return h

    encoder, decoder = network(784, *HIDDEN, 2 * LATENT), network(LATENT, *HIDDEN[::-1], 784)

    def make(block):
        @jax.jit
        def estimate(encoder, decoder, x, key):
            loc, log_scale = jnp.split(apply(encoder, x), 2, -1)

            def chunk(total, key):
                noise = jax.random.normal(key, (block, *loc.shape))
                z = loc + jnp.exp(log_scale) * noise
                logits = apply(decoder, z)
                log_p = (x * logits - jax.nn.softplus(logits)).sum(-1)
                log_w = log_p - 0.5 * (z**2).sum(-1) + (log_scale + 0.5 * noise**2).sum(-1)
                return jnp.logaddexp(total, jax.nn.logsumexp(log_w, 0)), None

            keys = jax.random.split(key, setting["particles"] // block)
            return jax.lax.scan(chunk, jnp.full(len(x), -jnp.inf), keys)[0] - jnp.log(setting["particles"])

        def step(x):
            return estimate(encoder, decoder, x.numpy(), jax.random.PRNGKey(0))

        return timing(step, setting)

    return best_of(make, setting)


def pyro_traces(setting):
    """Traces of guide and model in a plate of particles, chunk by chunk."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro import poutine

    encoder, decoder = networks()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def make(block):
        plate = pyro.plate("particles", block, dim=-2)

        def total(trace):
            trace.compute_log_prob(lambda name, site: name in ("z", "x"))
            return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)

        def log_weights(x):
            q = poutine.trace(plate(guide)).get_trace(x)
            p = poutine.trace(poutine.replay(plate(model), trace=q)).get_trace(x)
            return total(p) - total(q)

        @torch.no_grad()
        def step(x):
            with pyro.validation_enabled(False):
                found = [log_weights(x) for _ in range(setting["particles"] // block)]
            return torch.cat(found).logsumexp(0) - math.log(setting["particles"])

        return timing(step, setting)

    return best_of(make, setting)


def pythae_nll(setting):
    """The get_nll of pythae, which processes one data point at a time."""
    import torch
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    encoder, decoder = networks()

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = encoder

        def forward(self, x):
            loc, log_variance = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = decoder

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    config = VAEConfig(input_dim=(784,), latent_dim=LATENT, reconstruction_loss="bce")
    model, K = VAE(config, Encoder(), Decoder()).eval(), setting["particles"]

    @torch.no_grad()
    def step(x):
        return torch.tensor(model.get_nll(x, n_samples=K, batch_size=min(K, 1000)))

    return timing(step, setting)


CONTENDERS = {
    OURS: jensen,
    "products": products,
    "by hand": by_hand,
    "JAX": jax_jit,
    "Pyro": pyro_traces,
    "pythae": pythae_nll,
}


def memory(quick):
    """Peak resident memory during `evaluate`, and its increase, against K; 41 data points."""
    from jensen.inference import evaluate

    model, guide = pair()
    x, rows = data(41), []
    evaluate(model, guide, x, 50, compile=True, refine=False, progress=False)
    for particles in (100, 1000) if quick else (100, 1000, 10_000, 100_000):
        gc.collect()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # reset the peak
        except OSError:
            return []
        before = _kilobytes("VmRSS")
        begin = time.perf_counter()
        evaluate(model, guide, x, particles, seed=0, compile=True, refine=False, progress=False)
        seconds, peak = time.perf_counter() - begin, _kilobytes("VmHWM")
        rows.append({"particles": particles, "peak_mb": peak / 1024, "above_mb": (peak - before) / 1024})
        rows[-1] |= {"all_at_once_mb": 4 * 41 * particles * 784 / 2**20, "seconds": seconds}
        print(rows[-1], flush=True)
    return rows


def _kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def to_error(quick):
    """Seconds until the same share of data points reaches an error, with adaptive and with equal K."""
    from jensen.datasets import load
    from jensen.inference import evaluate, fit

    digits = load("digits")
    import torch

    torch.manual_seed(0)
    train, test = ((x > x.mean()).float() for x in (digits.train, digits.test))
    model, guide = pair(features=64, hidden=[128], latent=8)
    fit(model, guide, train, epochs=2 if quick else 100, lr=5e-3, seed=0, progress=False)
    rows = []
    for tolerance in (0.2,) if quick else (0.2, 0.1, 0.05):
        most, K = 65_536, 256
        adaptive, seconds = _measured(evaluate, model, guide, test, tolerance, most)
        reached = _reached(adaptive, tolerance)
        while True:
            equal, equal_seconds = _measured(evaluate, model, guide, test, None, K)
            if _reached(equal, tolerance) >= reached or most <= K:
                break
            K *= 2
        rows.append({"tolerance": tolerance, "reached": reached, "seconds": seconds})
        rows[-1] |= {"spent": float(adaptive.spent.double().mean()), "K": K, "equal_seconds": equal_seconds}
        print(rows[-1], flush=True)
    return rows


def _measured(evaluate, model, guide, x, tolerance, most):
    begin = time.perf_counter()
    how = {"particles": most} if tolerance is None else {"tolerance": tolerance, "max_particles": most}
    found = evaluate(model, guide, x, **how, seed=0, compile=False, refine=False, progress=False)
    return found, time.perf_counter() - begin


def _reached(evidence, tolerance):
    return float((evidence.corrected_error["jackknife"] <= tolerance).double().mean())


def also(options):
    """The measurements of `evaluate` alone."""
    import torch

    torch.set_num_threads(options.threads)
    peaks, times = memory(options.quick), to_error(options.quick)
    megabytes = ("peak_mb", "above_mb", "all_at_once_mb")
    head = ["K", "peak, MB", "increase, MB", "a float per particle and feature, MB", "seconds"]
    cells = [[f"{r['particles']:,}", *(f"{r[name]:,.0f}" for name in megabytes), f"{r['seconds']:.2f}"] for r in peaks]
    other = ["error, nats", "share that reaches it", "samples per data point", "seconds", "equal K", "seconds"]
    found = []
    for r in times:
        ours = [f"{100 * r['reached']:.0f} %", f"{r['spent']:,.0f}", f"{r['seconds']:.2f}"]
        found.append([f"{r['tolerance']:g}", *ours, f"{r['K']:,}", f"{r['equal_seconds']:.2f}"])
    text = "\n\n".join(
        [
            "Peak resident memory against K, for 41 data points of 784 features, after compilation.",
            common.table(head, cells),
            "Time to a Monte Carlo error (jackknife) of log p(x): binarized digits, a 64-128-8 VAE, not compiled; "
            "adaptive particles, then the smallest equal K = 256, 512, ... with the same share of data points.",
            common.table(other, found),
        ]
    )
    return {"memory": peaks, "to_error": times}, text


def main():
    """Time all contenders at every K, measure memory and time to an error, and write the tables."""
    unit = "ns per data point and particle"
    scale = lambda setting: 1e9 / setting["particles"]  # noqa: E731
    common.run_all(__file__, __doc__, "evidence", CONTENDERS, SETTINGS, TARGETS, OURS, unit, scale, "data", also)


if __name__ == "__main__":
    main()
