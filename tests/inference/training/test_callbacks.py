"""Callbacks of training, the history of every epoch, and the modules loaded by an import."""

import csv
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair

from jensen.families import Delta, Gaussian
from jensen.graphs.draws import LogWeights
from jensen.guides import amortize
from jensen.inference import (
    ELBO,
    IWAE,
    Callback,
    CSVLogger,
    History,
    Renyi,
    TensorBoardLogger,
    fit,
    log_weights,
    rate_distortion,
    terms,
)
from jensen.kernel.randomness import derived_seed
from jensen.kernel.weights import Pair
from jensen.models import VAE
from jensen.networks import mlp


class Spy(Callback):
    """Records its calls; can raise an error after an epoch, or when closed."""

    def __init__(self, after=None, error=None, on_close=None):
        self.after, self.error, self.on_close = after, error, on_close
        self.seen, self.closed = [], 0

    def after_epoch(self, history, model, guide):
        self.seen.append((len(history.elbo), history.elbo[-1], model, guide))
        if len(history.elbo) == self.after:
            raise self.error

    def close(self):
        self.closed += 1
        if self.on_close is not None:
            raise self.on_close


def _fit(epochs=3, callbacks=(), **settings):
    """Train a small model and guide from one seed; return both and the history."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, x = pair("VAE, shared scale", "MeanField")
    settings = {"batch_size": 4, "lr": 1e-2, "seed": 3, "progress": False} | settings
    return model, guide, fit(model, guide, x, epochs=epochs, callbacks=callbacks, **settings)


def _data():
    torch.manual_seed(0)
    return pair("VAE, shared scale", "MeanField")[2]


def test_every_epoch_is_shown_once_with_the_pair_and_the_history_so_far():
    spy = Spy()
    model, guide, history = _fit(callbacks=spy)
    assert spy.seen == [(i + 1, bound, model, guide) for i, bound in enumerate(history.elbo)]
    assert spy.closed == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_all_are_closed_whatever_ends_the_run(error):
    first, second = Spy(on_close=ValueError("cannot close")), Spy(after=2, error=error)
    third = Spy()
    with pytest.raises(ValueError, match="cannot close") as caught:
        _fit(callbacks=[first, second, third])
    assert caught.value.__context__ is error
    assert (first.closed, second.closed, third.closed) == (1, 1, 1)
    assert (len(first.seen), len(second.seen), len(third.seen)) == (2, 2, 1)


def test_all_are_closed_where_training_diverges_or_cannot_begin():
    spy = Spy()
    with pytest.raises(FloatingPointError):
        _fit(epochs=50, lr=1e30, callbacks=[spy])
    assert spy.closed == 1
    model, guide, x = pair("VAE, shared scale", "MeanField")
    with pytest.raises(ValueError, match="there is nothing to train"):
        fit(model, guide, x, callbacks=[spy], freeze=[model, guide], progress=False)
    assert spy.closed == 2


def test_a_callback_that_draws_and_switches_modes_changes_nothing():
    class Meddler(Callback):
        def after_epoch(self, history, model, guide):
            torch.manual_seed(99)
            torch.randn(5)
            model.eval()
            guide.eval()

    modes = Spy()
    modes.after_epoch = lambda history, model, guide: modes.seen.append(model.training and guide.training)
    *plain, one = _fit(seed=None)
    *watched, two = _fit(seed=None, callbacks=[Meddler(), modes])
    assert one.elbo == two.elbo
    for a, b in zip(plain, watched, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert modes.seen == [True] * 3


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="callbacks must be a Callback or a sequence of Callback objects"):
        _fit(callbacks=[_fit])


def test_the_validation_elbo_is_that_of_the_kernel_and_minus_rate_and_distortion(float64):
    """All from the same random numbers."""
    x = _data()
    model, guide, history = _fit(validation=x, batch_size=100)
    with torch.no_grad():
        torch.manual_seed(derived_seed(0, "validation", 0))
        log_w = log_weights(model, guide, x, particles=8)
        torch.manual_seed(derived_seed(0, "validation", 0))
        t = terms(model, guide, x, particles=8)
    assert history.validation[-1] == float(log_w.mean(0).sum()) / len(x)
    assert history.rate[-1] == pytest.approx((t.log_q["z"] - t.log_p["z"]).mean().item(), rel=1e-10)
    assert history.distortion[-1] == pytest.approx(-t.log_p["x"].mean().item(), rel=1e-12)
    sums = [-(r + d) for r, d in zip(history.rate, history.distortion, strict=True)]
    assert sums == pytest.approx(history.validation, rel=1e-14)


@pytest.mark.parametrize(
    ("objective", "K", "power"), [(ELBO(20), 1, 0), (IWAE(5), 5, 1.0), (IWAE(20), 20, 1.0), (Renyi(-0.5, 4), 4, 1.5)]
)
def test_the_validation_bound_is_that_of_the_objective(float64, objective, K, power):
    """Of groups of its K particles, at least 8 particles in all."""
    x = _data()
    model, guide, history = _fit(validation=x, batch_size=100, objective=objective)
    groups = -(-8 // K)
    with torch.no_grad():
        torch.manual_seed(derived_seed(0, "validation", 0))
        log_w = log_weights(model, guide, x, particles=groups * K).reshape(groups, K, len(x))
    means = (power * log_w).exp().mean(1).log() / power if power else log_w.mean(1)
    assert history.validation[-1] == pytest.approx(means.mean().item(), rel=1e-12)
    assert history.rate[-1] + history.distortion[-1] == pytest.approx(-log_w.mean().item(), rel=1e-12)


def test_rate_and_distortion_of_batches_add_up():
    x = _data()
    model, guide, _ = pair("VAE, shared scale", "MeanField")
    history = fit(model, guide, x, epochs=1, batch_size=3, validation=x, progress=False)
    found = rate_distortion(model, guide, x, 4000, seed=1, progress=False)
    spread = math.sqrt(4000 / 8 * float(found.distortion_error.square().sum())) / len(x)
    assert history.distortion == pytest.approx([found.distortion.mean().item()], abs=4.5 * spread)


@pytest.mark.parametrize("mode", ["auto", False])
def test_captured_draws_have_the_same_parts(mode):
    model, guide, x = pair("VAE, shared scale", "FullCovariance")
    captured, plain = (LogWeights(Pair(model, guide, 1), mode, observed=seen) for seen in (True, False))
    with torch.no_grad():
        for batch in (x, x + 1):
            torch.manual_seed(5)
            log_w, _, observed = captured.parts((batch,), 8, ahead=2000)
            torch.manual_seed(5)
            assert torch.equal(log_w, log_weights(model, guide, batch, particles=8))
            torch.manual_seed(5)
            assert torch.equal(log_w, plain((batch,), 8, ahead=2000))
            assert observed.shape == log_w.shape
            assert (log_w - observed).abs().min() > 0
    assert captured.route.startswith("traced" if mode == "auto" else "eager")


def test_there_is_no_rate_without_validation_data_without_a_density_and_of_joint_weights():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    x = torch.randn(8)
    joint = fit(model, guide, x, epochs=1, validation=x, progress=False)
    vae = VAE(mlp(2, [8]), Gaussian(5, 8), latent=2)
    point = amortize(vae, mlp(5, [8]), Delta, context=8)
    x = torch.randn(8, 5)
    of_point = fit(vae, point, x, epochs=1, validation=x, progress=False)
    for history in (joint, of_point):
        assert len(history.validation) == 1
        assert history.rate == history.distortion == []
    assert _fit()[2].rate == []


def test_learning_rate_and_time_are_kept_by_epoch():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    history = _fit(scheduler=scheduler)[2]
    assert history.learning_rate == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert sorted(history.elapsed) == history.elapsed
    assert 0 < history.elapsed[0] < history.elapsed[-1] <= history.seconds


def test_columns_are_of_one_length_and_say_what_is_missing():
    columns = History(elbo=[-3.0, -2.0, -1.0], validation=[-5.0], elapsed=[1.0, 2.0, 3.0]).per_epoch()
    assert list(columns) == ["epoch", "elbo", "validation", "seconds"]
    assert columns["epoch"] == [1, 2, 3]
    assert columns["validation"][2] == -5.0
    assert all(math.isnan(value) for value in columns["validation"][:2])


def _interrupted_and_resumed(folder, make, epochs=5, at=3):
    """Train with a logger until Ctrl-C after an epoch, then continue with another one."""
    settings = {"epochs": epochs, "validation": _data(), "checkpoint": folder / "c.pt", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        _fit(callbacks=[make(), Spy(after=at, error=KeyboardInterrupt())], **settings)
    return _fit(callbacks=[make()], **settings)[2]


def test_a_csv_file_holds_every_epoch_once(tmp_path):
    file = tmp_path / "logs" / "run.csv"
    history = _interrupted_and_resumed(tmp_path, lambda: CSVLogger(file))
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    names = ["epoch", "elbo", "validation", "rate", "distortion", "learning_rate", "seconds"]
    assert list(rows[0]) == names == list(history.per_epoch())
    for name, values in history.per_epoch().items():
        assert [float(row[name]) for row in rows] == values
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]


def test_a_csv_file_is_there_while_the_run_goes_on_and_begins_anew_with_the_next(tmp_path):
    logger = CSVLogger(tmp_path / "run.csv")
    logger.after_epoch(History(elbo=[-3.0]), None, None)
    logger.after_epoch(History(elbo=[-3.0, math.nan], validation=[-5.0]), None, None)
    assert logger.path.read_text() == "epoch,elbo\n1,-3.0\n2,,-5.0\n"
    logger.close()
    logger.after_epoch(History(elbo=[-7.0]), None, None)
    logger.close()
    logger.close()
    assert logger.path.read_text() == "epoch,elbo\n1,-7.0\n"


def test_tensorboard_reads_every_epoch_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "board"
    history = _interrupted_and_resumed(tmp_path, lambda: TensorBoardLogger(folder))
    events = EventAccumulator(str(folder)).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "bound/elbo",
        "bound/validation",
        "latents/distortion",
        "latents/rate",
        "optimizer/learning_rate",
    ]
    found = events.Scalars("bound/validation")
    assert [event.step for event in found] == [1, 2, 3, 4, 5]
    assert [event.value for event in found] == pytest.approx(history.validation, rel=1e-6)
    apart = [found[i].wall_time - found[0].wall_time for i in (2, 4)]
    assert apart == pytest.approx([history.elapsed[i] - history.elapsed[0] for i in (2, 4)], abs=0.5)


_HEAVY = {"pandas", "zuko", "tensorboard", "arviz", "arviz_base", "matplotlib", "sklearn", "scipy", "pooch"}
_HEAVY |= {"torch._inductor", "torch._dynamo"}
_ROOMS = ("jensen.models", "jensen.guides", "jensen.inference")
_IMPORTS = """
import sys
for name in {names!r}:
    __import__(name)
    print(name, *sorted(set(sys.modules) & {unwanted!r}))
"""


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [
        (("jensen",), _HEAVY | {"torch", "pyro", "numpy"}),
        (_ROOMS, _HEAVY),
        (("jensen.datasets",), _HEAVY - {"pooch"}),
    ],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(names, unwanted):
    code = _IMPORTS.format(names=names, unwanted=unwanted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == list(names)


@pytest.mark.parametrize("module", ["torch.utils.tensorboard", "tensorboard"])
def test_without_tensorboard_the_remedy_is_named(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    if module == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match="pip install tensorboard, or use CSVLogger"):
        TensorBoardLogger(tmp_path)
