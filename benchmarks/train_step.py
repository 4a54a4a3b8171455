"""Runtime of a training step in `fit`, compared with other implementations of the same step.

    python benchmarks/train_step.py            # about 8 minutes; --quick for a smoke run

Bernoulli VAEs with tanh networks and Adam, random bits as data, rows shuffled and gathered by every contender; float32.
Contenders are timed in turn, in separate processes on the same cores; torch uses the same implementation of float32
products in all of them. A row of the table is the median of the rounds.

| contender | what it is |
| --- | --- |
| jensen | `fit(..., compile=True)`: all epochs except the first, which traces and compiles |
| products | only the matrix products of the step |
| by hand, usual | usual PyTorch: `torch.compile` of the loss, autograd, fused Adam |
| by hand, best | optimised PyTorch: loss, gradients and Adam's update in one compiled function |
| Pyro | `SVI(..., Trace_ELBO())`, or `RenyiELBO(alpha=0)` with its particles vectorized |
| NumPyro | `jit(svi.update)`; if installed |
| pythae | an epoch of its trainer; if installed |

Output: the tables in results/train_step.md, all results in results/train_step.json.
"""

import itertools
import time

import _common as common

VAE_400 = {"hidden": [400], "latent": 20, "particles": 1}
VAE_200 = {"hidden": [200, 200], "latent": 50}
SETTINGS = {
    "784-400-20, batch 20": {**VAE_400, "batch": 20, "steps": 100},
    "784-400-20, batch 128": {**VAE_400, "batch": 128, "steps": 100},
    "784-400-20, batch 512": {**VAE_400, "batch": 512, "steps": 50},
    "784-200-200-50, batch 100": {**VAE_200, "particles": 1, "batch": 100, "steps": 100},
    "784-200-200-50, batch 20, IWAE K = 50": {**VAE_200, "particles": 50, "batch": 20, "steps": 50},
}
OURS = "jensen"
TARGETS = {  # the largest ratio of jensen's time to another's
    "784-400-20, batch 20": {"Pyro": 0.2, "by hand, usual": 0.7, "by hand, best": 1.1, "NumPyro": 1.0},
    "784-400-20, batch 128": {
        "Pyro": 0.35, "by hand, usual": 0.75, "by hand, best": 1.05, "NumPyro": 1.0, "products": 1.6,
    },
    "784-400-20, batch 512": {
        "Pyro": 0.55, "by hand, usual": 0.95, "by hand, best": 1.05, "NumPyro": 1.0, "products": 1.6,
    },
}  # fmt: skip


def bits(setting):
    """The data of one epoch."""
    import torch

    torch.manual_seed(0)
    return (torch.rand(setting["steps"] * setting["batch"], 784) > 0.5).float()


def batches(setting, x, units):
    """Shuffled rows in batches, for ``units`` steps."""
    import torch

    epochs = (torch.randperm(len(x)).split(setting["batch"]) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), units)


def jensen(setting):
    """A call of fit without its first epoch. The very first call minus a later one is the compilation time."""
    from torch import nn

    from jensen.families import Bernoulli, MeanField
    from jensen.guides import amortize
    from jensen.inference import IWAE, fit
    from jensen.models import VAE
    from jensen.networks import mlp

    x, hidden, latent, K = bits(setting), setting["hidden"], setting["latent"], setting["particles"]

    def timed(epochs):
        model = VAE(mlp(latent, hidden[::-1], nn.Tanh), Bernoulli(784, hidden[0]), latent)
        guide = amortize(model, mlp(784, hidden, nn.Tanh), MeanField, context=hidden[-1])
        how = {"batch_size": setting["batch"], "seed": 0, "compile": True, "progress": False}
        begin, clock = time.perf_counter(), common.Clock()
        history = fit(model, guide, x, None if K == 1 else IWAE(K), epochs=epochs, scheduler=clock, **how)
        return time.perf_counter() - begin, clock.after_first(), history.route

    cold, _, route = timed(1)

    def run(units):
        return timed(1 + units // setting["steps"])[1]

    run.said = {"compile": cold - timed(1)[0], "route": route}
    return run


def layers(setting):
    """Rows, inputs and outputs of every layer; the encoder's heads count as one."""
    encoder, decoder = [784, *setting["hidden"]], [setting["latent"], *setting["hidden"][::-1], 784]
    shapes = [(setting["batch"], i, o) for i, o in itertools.pairwise([*encoder, 2 * setting["latent"]])]
    return shapes + [(setting["batch"] * setting["particles"], i, o) for i, o in itertools.pairwise(decoder)]


def products(setting):
    """Forward pass, gradient in weights, and gradient in inputs (except the data) of every layer."""
    import torch

    found = [(torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for n, i, o in layers(setting)]

    def step():
        for place, (h, weight, slope) in enumerate(found):
            _ = h @ weight.t()
            _ = slope.t() @ h
            if place:
                _ = slope @ weight

    return timing(lambda units: [step() for _ in range(units)])


def timing(steps):
    """A timed function of the number of units."""

    def run(units):
        begin = time.perf_counter()
        steps(units)
        return time.perf_counter() - begin

    return run


def by_hand(setting):
    """The networks as a module, and the loss of a batch as a function of it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    def network(*widths):
        made = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*made)

    hidden, latent, K = setting["hidden"], setting["latent"], setting["particles"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.heads = network(784, *hidden), nn.Linear(hidden[-1], 2 * latent)
            self.decoder, self.out = network(latent, *hidden[::-1]), nn.Linear(hidden[0], 784)

        def forward(self, x):
            loc, log_scale = self.heads(self.encoder(x)).chunk(2, -1)
            noise = torch.randn(K, *loc.shape) if K > 1 else torch.randn_like(loc)
            z = loc + log_scale.exp() * noise
            logits = self.out(self.decoder(z))
            if K == 1:
                rate = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
                return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + rate
            log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
            log_w = log_p - 0.5 * z.square().sum(-1) + (log_scale + 0.5 * noise.square()).sum(-1)  # [K, N]
            return -log_w.logsumexp(0).sum()

    return Net()


def by_hand_usual(setting):
    """Compiled loss, autograd, fused Adam."""
    import torch

    torch._dynamo.reset()
    x, net = bits(setting), by_hand(setting)
    loss = torch.compile(net, dynamic=False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)

    def steps(units):
        for rows in batches(setting, x, units):
            optimizer.zero_grad()
            loss(x[rows]).backward()
            optimizer.step()

    return timing(steps)


def adam_step(net, values, first, second, bias, x):
    """The loss of a batch, and Adam's update by its gradients, in place; ``bias``: the rate, and 1 / (1 - b2^t)."""
    from torch.func import functional_call, grad_and_value

    slopes, loss = grad_and_value(lambda values: functional_call(net, values, (x,)))(values)
    for name, p in values.items():
        m = first[name].lerp_(slopes[name], 0.1)
        v = second[name].mul_(0.999).addcmul_(slopes[name], slopes[name], value=0.001)
        p.sub_(m * bias[0] / ((v * bias[1]).sqrt() + 1e-8))
    return loss


def by_hand_best(setting):
    """Loss, gradients and update in place as one compiled function."""
    import torch

    torch._dynamo.reset()
    x, net = bits(setting), by_hand(setting)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in values.items()} for _ in range(2))

    @torch.compile(dynamic=False, fullgraph=True)
    def step(values, first, second, bias, x):
        return adam_step(net, values, first, second, bias, x)

    done = 0

    @torch.no_grad()
    def steps(units):
        nonlocal done
        for rows in batches(setting, x, units):
            done += 1
            step(values, first, second, torch.tensor([1e-3 / (1 - 0.9**done), 1 / (1 - 0.999**done)]), x[rows])

    return timing(steps)


def pyro_svi(setting):
    """Pyro's step."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, RenyiELBO, Trace_ELBO

    x, net, latent, K = bits(setting), by_hand(setting), setting["latent"], setting["particles"]
    pyro.clear_param_store()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net.out(net.decoder(z))).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        loc, log_scale = net.heads(net.encoder(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    loss = Trace_ELBO() if K == 1 else RenyiELBO(alpha=0.0, num_particles=K, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    return timing(lambda units: [svi.step(x[rows]) for rows in batches(setting, x, units)])


def numpyro_svi(setting):
    """NumPyro's step, with the batch gathered inside."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

    hidden, latent, K = setting["hidden"], setting["latent"], setting["particles"]
    random = np.random.default_rng(0)
    x = jnp.asarray(random.random((setting["steps"] * setting["batch"], 784)) > 0.5, jnp.float32)
    widths = {"encoder": [784, *hidden, 2 * latent], "decoder": [latent, *hidden[::-1], 784]}

    def network(name, h):
        for place, (i, o) in enumerate(itertools.pairwise(widths[name])):
            start = random.uniform(-1, 1, (i + 1, o)).astype("float32") / i**0.5
            weight, bias = (numpyro.param(f"{name}{place}{part}", start[s]) for part, s in (("w", slice(i)), ("b", i)))
            h = h @ weight + bias
            h = jnp.tanh(h) if place < len(widths[name]) - 2 else h
        return h

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=network("decoder", z)).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = jnp.split(network("encoder", x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    loss = Trace_ELBO() if K == 1 else RenyiELBO(alpha=0.0, num_particles=K)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    state = svi.init(jax.random.PRNGKey(0), x[: setting["batch"]])
    update = jax.jit(lambda state, x, rows: svi.update(state, x[rows]), donate_argnums=0)

    def steps(units):
        nonlocal state
        done = 0
        while done < units:
            for rows in random.permutation(len(x)).reshape(-1, setting["batch"])[: units - done]:
                state, loss = update(state, x, rows)
                done += 1
        loss.block_until_ready()

    return timing(steps)


def pythae_epochs(setting):
    """Epochs of pythae's trainer."""
    import logging
    import tempfile

    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)
    x, net, latent, K = bits(setting), by_hand(setting), setting["latent"], setting["particles"]

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body, self.heads = net.encoder, net.heads

        def forward(self, x):
            loc, log_variance = self.heads(self.body(x)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.body, self.out = net.decoder, net.out

        def forward(self, z):
            return ModelOutput(reconstruction=self.out(self.body(z)).sigmoid())

    how = {"input_dim": (784,), "latent_dim": latent, "reconstruction_loss": "bce"}
    if K == 1:
        model = VAE(VAEConfig(**how), Encoder(), Decoder())
    else:
        model = IWAE(IWAEConfig(**how, number_samples=K), Encoder(), Decoder())
    settings = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=setting["batch"], learning_rate=1e-3, no_cuda=True
    )
    trainer = BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=settings, callbacks=[])
    trainer.prepare_training()
    trainer.callback_handler.callbacks.clear()  # progress bars and printed numbers
    return timing(lambda units: [trainer.train_step(1) for _ in range(units // setting["steps"])])


CONTENDERS = {
    OURS: jensen,
    "products": products,
    "by hand, usual": by_hand_usual,
    "by hand, best": by_hand_best,
    "Pyro": pyro_svi,
    "NumPyro": numpyro_svi,
    "pythae": pythae_epochs,
}


def main():
    """Time all contenders on all settings, and write the tables."""
    common.run_all(__file__, __doc__, "train_step", CONTENDERS, SETTINGS, TARGETS, OURS, "ms per step", 1e3, "steps")


if __name__ == "__main__":
    main()
