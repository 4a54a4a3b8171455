"""What several processes do together, for tests/inference/test_processes.py: ``torchrun together.py FOLDER NAMES``."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from torch.utils.data import IterableDataset, TensorDataset

import jensen.processes as processes
from jensen.datasets import stream
from jensen.families import Gaussian, MeanField
from jensen.guides import amortize
from jensen.inference import (
    ELBO,
    IWAE,
    Callback,
    CSVLogger,
    Objective,
    ais,
    compare,
    evaluate,
    fit,
    gaps,
    learning_rates,
)
from jensen.models import PPCA, VAE
from jensen.networks import mlp

N = 101  # uneven for two and three processes


class PointGuide(PyroModule):
    """A guide without noise: z is an affine function of x."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.net = torch.nn.Linear(5, 2, dtype=dtype)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(self.net(x), event_dim=1))


class Scaled(PyroModule):
    """Normal data around W z, in a plate that counts a batch as 1,000 data points; or the guide of z."""

    def __init__(self, guide):
        super().__init__()
        self.net, self.guide = torch.nn.Linear(*((5, 2) if guide else (2, 5)), dtype=torch.float64), guide

    def forward(self, x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x)), dim=-1):
            if self.guide:
                pyro.sample("z", dist.Delta(self.net(x), event_dim=1))
                return
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Twice(PyroModule):
    """A global latent beside the data."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(self.shift, 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)


class Centred(torch.nn.Module):
    """A network that reads the difference from the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.net = mlp(5, [8])

    def forward(self, x):
        return self.net(x - x.mean(0))


class OfBatch(Objective):
    """A loss made of the ELBOs of a batch."""

    def __init__(self, made):
        super().__init__(2)
        self.made = made

    def value(self, terms, knobs):
        made = self.made(terms.log_weights.mean(0))
        return -made, made


class Late(torch.optim.SGD):
    """Fails in process 1 at the last step of the second epoch."""

    def step(self, closure=None):
        self.taken = getattr(self, "taken", 0) + 1
        if processes.rank() and self.taken == 12:
            raise RuntimeError("of the optimizer")
        return super().step(closure)


def _x(n=N):
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _pair():
    torch.manual_seed(1)
    return PPCA(5, latent=2).double(), PointGuide()


def _vae(seed=2, encoder=None, decoder=None):
    torch.manual_seed(seed)
    model = VAE(decoder or mlp(2, [8]), Gaussian(5, 8, scale="shared"), latent=2).double()
    return model, amortize(model, encoder or mlp(5, [8]), MeanField, context=8).double()


def _normed():
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())


def _trained(model, guide, x, **how):
    how = {"lr": 1e-3, "epochs": 4, "batch_size": 1000, "progress": False, "seed": 0, "compile": False, **how}
    history = fit(model, guide, x, **how)
    values = [p.detach().clone() for half in (model, guide) for p in half.parameters()]
    return values, history.elbo, history.route


def full_batch():
    return _trained(*_pair(), _x())


def started_apart():
    """Initial parameters that differ: those of process 0 count."""
    model, guide = _pair()
    with torch.no_grad():
        for p in [*model.parameters(), *guide.parameters()]:
            p.add_(processes.rank())
    return _trained(model, guide, _x())


def batches():
    return _trained(*_pair(), _x(), batch_size=20)


def read_by_the_batch(folder):
    """A data set with random access, a file in blocks of other shares, and a stream."""
    path = folder / f"x-{processes.count()}-{processes.rank()}.npy"
    np.save(path, _x().numpy())
    file = stream(path, dtype=torch.float64)
    found = [_trained(*_pair(), data, batch_size=20) for data in (TensorDataset(_x()), file, _Stream())]
    measured = evaluate(*_vae(), file, particles=50, seed=0, compile=False, progress=False, refine=False)
    return found, measured.log_evidence


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(_x())


def fewer_rows_than_processes():
    return _trained(*_pair(), _x(1))


def scaled():
    torch.manual_seed(4)
    return _trained(Scaled(guide=False), Scaled(guide=True), _x(), optimizer=torch.optim.SGD, lr=1e-6)


def global_latent():
    torch.manual_seed(3)
    model = Twice()
    return _trained(model, AutoDelta(model), _x())


def value_per_datum():
    model, _ = _pair()
    return _trained(model, AutoNormal(model), _x())


def divided():
    """How batches are shared, by model and objective."""
    dropped = torch.nn.Sequential(Centred(), torch.nn.Dropout())
    cases = {
        "dropout": (_vae(encoder=torch.nn.Sequential(mlp(5, [8]), torch.nn.Dropout())), None),
        "importance": (_vae(), IWAE(3)),
        "mean": (_vae(), OfBatch(torch.mean)),
        "centred": (_vae(encoder=dropped), None),
        "norm": (_vae(decoder=_normed()), None),
        "spread": (_vae(), OfBatch(lambda bounds: bounds.sum() + 0.1 * bounds.std())),
    }
    return {name: _trained(*pair, _x(), objective=objective)[2] for name, (pair, objective) in cases.items()}


def of_mean():
    """A loss that is a mean over the batch, by an optimizer with momentum and weight decay."""

    def optimizer(parameters, lr):
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=0.1)

    return _trained(*_pair(), _x(), objective=OfBatch(torch.mean), optimizer=optimizer, epochs=8, lr=1e-2)


def normed():
    """Buffers are equal in all processes after training, so that these can measure together."""
    model, guide = _vae(decoder=_normed())
    _trained(model, guide, _x(100), batch_size=20)
    return evaluate(model, guide, _x(), particles=20, seed=0, progress=False, refine=False, compile=False).elbo


def children():
    """How many processes work together: in a thread started apart, and in a process that this one starts."""
    seen = []
    with processes.apart():
        thread = threading.Thread(target=lambda: seen.append(processes.count()))
        thread.start()
        thread.join()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return processes.count(), *seen, pool.apply(processes.count)


def free_bits():
    return _trained(*_vae(), _x(), objective=ELBO(2, free_bits=0.1))


def validated():
    model, guide = _vae()
    history = fit(model, guide, _x(), epochs=2, batch_size=30, seed=0, validation=_x(70), progress=False, compile=False)
    return history.validation, history.rate


def noise():
    """The rows and random numbers of this process in each batch."""
    seen = []

    def transform(x):
        seen.append((x[:, 0].tolist(), float(torch.rand(()))))
        return x

    _trained(*_pair(), _x(), batch_size=20, batch_transform=transform)
    return (
        seen[-5:] if processes.rank() else seen[-6:]
    )  # of the last epoch: the one row of the last batch is in process 0


def resumed(folder):
    model, guide = _vae()
    whole = _trained(model, guide, _x(), batch_size=20)
    file = folder / f"of-{processes.count()}.pt"
    model, guide = _vae()
    _trained(model, guide, _x(), batch_size=20, epochs=2, checkpoint=file)
    model, guide = _vae(9)
    return whole, _trained(model, guide, _x(), batch_size=20, checkpoint=file, resume=True)


def logged(folder):
    _trained(*_pair(), _x(), callbacks=[CSVLogger(folder / f"log-{processes.count()}.csv")])


def measured():
    model, guide = _vae()
    x, how = _x(130), {"seed": 0, "compile": False, "progress": False}
    found = [
        evaluate(model, guide, x, particles=400, **how),
        evaluate(model, guide, x, tolerance=0.2, **how),
        gaps(model, guide, x, particles=50, batch_size=32, rounds=1, steps=10, **how),
        ais(model, None, x, chains=3, temperatures=5, seed=0, progress=False, chunk_size=90),
        compare({"a": (model, guide)}, x, particles=50, seed=0, progress=False),
        evaluate(Twice(), AutoNormal(Twice()), x, particles=50, refine=False, **how),
    ]
    return [_without_times(result.to_dict()) for result in found]


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if "seconds" not in key}
    return [_without_times(part) for part in value] if isinstance(value, list | tuple) else value


def unseeded():
    """Without seeds, every process has the same results, which follow the random stream of process 0."""
    model, guide = _vae()
    torch.manual_seed(processes.rank())
    how = {"particles": 50, "compile": False, "progress": False, "refine": False}
    return [evaluate(model, guide, _x(), **how).log_evidence for _ in range(2)]


def swept():
    model, guide = _pair()
    before = [p.detach().clone() for p in model.parameters()]
    found = learning_rates(model, guide, _x(), steps=20, most=0.1, batch_size=16, progress=False)
    return found.losses, all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def apart():
    model, guide = _vae(10 + processes.rank())
    with processes.apart():
        return _trained(model, guide, _x() + processes.rank())


MISTAKES = (
    *("data", "order", "seed", "model", "validation", "parameters", "function", "elsewhere", "infinite", "callback"),
    *("interrupt", "moved", "step", "optimizer", "unfrozen", "nan", "after"),
)


def mistakes():
    """What each process hears of mistakes, some of them in process 1 alone."""
    here, heard = processes.rank(), {}

    class Falling(Callback):
        def __init__(self, what):
            self.what = what

        def after_epoch(self, history, model, guide):
            if self.what == "callback" and here == 1:
                raise ValueError("of my own")
            if self.what == "interrupt" and here == 1 and len(history.elbo) == 2:
                for _ in range(2):  # torchrun sends it again
                    os.kill(os.getpid(), signal.SIGINT)
            if self.what == "elsewhere" and not here:
                evaluate(model, guide, _x(), particles=20, progress=False)
            if self.what == "unfrozen":
                model.requires_grad_(here == 1)
            if self.what == "moved" and here == 1:
                with torch.no_grad():
                    next(guide.parameters()).add_(1.0)

    for what in MISTAKES:
        model, guide = _vae()
        x, calls = _x(), []

        def transform(batch, what=what, calls=calls):
            calls.append(batch)
            if what == "step" and here == 1 and len(calls) == 20:
                raise RuntimeError("of the transform")
            return batch * float("nan") if what == "nan" and here == 1 and len(calls) > 40 else batch

        how = {"epochs": 30, "batch_size": 20, "batch_transform": transform, "callbacks": [Falling(what)]}
        if what == "data":
            x = x + here
        if what == "order":
            x = x.round().flip(0) if here else x.round()
        if what == "optimizer":
            how["optimizer"] = Late
        if what == "unfrozen":
            model.requires_grad_(False)
        if what == "validation":
            how["validation"] = x + here
        if what == "seed":
            how["seed"] = here
        if what == "model" and here:
            model = PPCA(5, latent=2).double()
        if what == "infinite" and here:
            how["validation"] = x.clone().index_fill(0, torch.tensor([50]), float("inf"))
        try:
            if what == "function" and here:
                evaluate(model, guide, x, progress=False)
            if what == "parameters":
                evaluate(*_vae(here), x, particles=20, progress=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pyro's, of parameters that require no gradient
                heard[what] = _trained(model, guide, x, **how)[1]
        except (Exception, KeyboardInterrupt) as error:
            heard[what] = f"{type(error).__name__}: {error}"
    return heard


def killed(folder):
    """Process 1 dies in epoch 3, once; torchrun starts both again."""

    class Deadly(Callback):
        def after_epoch(self, history, model, guide):
            if len(history.elbo) == 3 and processes.rank() == 1 and not processes.restarted():
                os.kill(os.getpid(), signal.SIGKILL)

    model, guide = _vae()
    how = {"checkpoint": folder / "killed.pt", "resume": True, "callbacks": [Deadly()]}
    return processes.restarted(), _trained(model, guide, _x(), batch_size=20, **how)


def uninterrupted():
    return _trained(*_vae(), _x(), batch_size=20)


def compiled():
    return _trained(*_vae(), _x(), batch_size=20, compile=True)


def main(folder, names):
    found = {}
    for name in names:
        function = globals()[name]
        found[name] = function(folder) if function.__code__.co_argcount else function()
    with (folder / f"result-{processes.rank()}.pickle").open("wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
