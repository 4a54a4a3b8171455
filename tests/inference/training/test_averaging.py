"""Averages of parameters, stopping that knows its noise, schedules, clipping, weight decay: in every kind of step."""

import math

import pytest
import torch
from torch import nn

from jensen.families import FullCovariance
from jensen.guides import ExactPosterior, amortize
from jensen.inference import Callback, fit, restore
from jensen.inference.training.averaging import Average
from jensen.inference.training.schedules import factor
from jensen.inference.training.stopping import has_converged
from jensen.kernel.randomness import derived_seed
from jensen.kernel.weights import log_weights
from jensen.models import PPCA, FactorAnalysis


def _data(n=60, features=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator) @ torch.randn(2, features, generator=generator) + 0.5 * torch.randn(
        n, features, generator=generator
    )


def _pair(seed=0, features=5):
    torch.manual_seed(seed)
    model = PPCA(features, latent=2)
    return model, amortize(model, nn.Identity(), FullCovariance, context=features)


class _Values(Callback):
    """The parameters after each epoch."""

    def __init__(self):
        self.epochs = []

    def after_epoch(self, history, model, guide):
        self.epochs.append([p.detach().clone() for half in (model, guide) for p in half.parameters()])


def _fitted(pair, x, **how):
    how = {"seed": 0, "progress": False, "compile": False, "lr": 1e-2, "batch_size": 20, **how}
    history = fit(*pair, x, **how)
    return history, [p.detach().clone() for half in pair for p in half.parameters()]


@pytest.mark.parametrize("kind", ["ema", "polyak"])
def test_the_result_is_the_average_of_the_steps(kind):
    pair, seen = _pair(), _Values()
    first = [p.detach().clone() for half in pair for p in half.parameters()]
    _, found = _fitted(pair, _data(), epochs=8, batch_size=60, average=kind, callbacks=[seen])
    for i, start in enumerate(first):
        mean = start.clone()
        for t in range(1, 9):
            weight = 1 - min(0.999, (1 + t) / (10 + t)) if kind == "ema" else min(1.0, 4 / (t + 3))
            mean += weight * (seen.epochs[t - 1][i] - mean)
        assert torch.allclose(found[i], mean, atol=1e-6)
        assert not torch.allclose(found[i], seen.epochs[-1][i], atol=1e-6)


def test_polyak_weights_are_those_of_their_formula():
    average, p = Average("polyak", []), nn.Parameter(torch.zeros(()))
    for t in range(1, 50):
        with torch.no_grad():
            p.fill_(float(t))
        average.take([p])
    weights = torch.tensor([math.prod(range(t, t + 3)) for t in range(1, 50)], dtype=torch.float64)  # about t^3
    expected = float((weights * torch.arange(1, 50)).sum() / weights.sum())
    assert float(average.of([p])[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"average": "ema"}, marks=pytest.mark.slow),
        pytest.param({"average": "polyak", "optimizer": torch.optim.SGD, "clip": 1.0}, marks=pytest.mark.slow),
        {
            "average": "ema",
            "clip": 5.0,
            "schedule": "warmup-cosine",
            "optimizer": torch.optim.AdamW,
            "weight_decay": 0.1,
        },
    ],
    ids=["ema", "clipped", "all"],
)
def test_compiled_steps_average_clip_and_schedule_alike(how):
    how = {"epochs": 4, "lr": 1e-3, **how}
    eager, values = _fitted(_pair(), _data(), **how)
    history, others = _fitted(_pair(), _data(), **how, compile=True)
    assert history.compiled
    assert history.elbo == pytest.approx(eager.elbo, rel=1e-4)
    assert history.learning_rate == pytest.approx(eager.learning_rate)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, others, strict=True))


def test_what_is_validated_is_the_average():
    pair, x = _pair(), _data(seed=1)
    history, _ = _fitted(pair, _data(), epochs=3, average="ema", validation=x, batch_size=60)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "validation", 0))
        again = log_weights(*pair, x, particles=8).mean().item()
    assert again == pytest.approx(history.validation[-1], rel=1e-5)


@pytest.mark.parametrize("how", [{"average": "polyak"}, {"tolerance": 0.5, "schedule": "cosine"}])
def test_a_resumed_run_is_the_uninterrupted_one(how, tmp_path):
    how = {"validation": _data(seed=1), "checkpoint": tmp_path / "run.pt", **how}
    whole, values = _fitted(_pair(), _data(), epochs=25, **{**how, "checkpoint": None})

    class Stop(Callback):
        def after_epoch(self, history, model, guide):
            if len(history.elbo) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fitted(_pair(), _data(), epochs=25, **how, callbacks=[Stop()])
    pair = _pair(seed=5)
    history, others = _fitted(pair, _data(), epochs=25, **how, resume=True)
    assert history.validation == whole.validation
    assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    copy = _pair(seed=6)
    restore(*copy, tmp_path / "run.pt")
    assert all(torch.equal(a, b) for a, b in zip(copy[0].parameters(), pair[0].parameters(), strict=True))


def test_a_checkpoint_with_an_average_is_not_continued_without(tmp_path):
    how = {"checkpoint": tmp_path / "run.pt", "epochs": 2}
    _fitted(_pair(), _data(), average="ema", **how)
    with pytest.raises(ValueError, match=r"started with \{'average': 'ema'\}, but now got \{'average': None\}"):
        _fitted(_pair(), _data(), **{**how, "epochs": 3}, resume=True)


def test_stopping_compares_an_improvement_with_its_error():
    generator = torch.Generator().manual_seed(0)
    level = 10 * torch.randn(400, generator=generator)
    noisy = [level + 0.2 * torch.randn(400, generator=generator) for _ in range(11)]
    assert not has_converged(noisy, 0.01)  # two errors of 0.2 sqrt(2 / 400) each
    assert has_converged(noisy, 0.1)
    assert not has_converged([level[:1]] * 11, 0.01)


def _stopped(make, seed):
    """How far from the optimum a run stops, after how many epochs, and after how many it was near first."""
    x = _data(400)
    torch.manual_seed(seed)
    model, optimal = make(5, latent=2), make(5, latent=2).double()
    optimal = optimal.fit_closed_form(x.double()) if make is PPCA else optimal.fit_em(x.double())
    best = float(optimal.log_evidence(x.double()).mean().detach())
    gaps = []

    class Gap(Callback):
        def after_epoch(self, history, model, guide):
            gaps.append(best - float(model.log_evidence(x).mean().detach()))

    pair = model, ExactPosterior(model)
    history, _ = _fitted(
        pair, x, epochs=400, tolerance=0.01, validation=x, lr=7e-3, seed=seed, batch_size=40, callbacks=[Gap()]
    )
    near = next((i + 1 for i, gap in enumerate(gaps) if gap < 0.01), None)
    return best - float(model.log_evidence(x).mean().detach()), len(history.elbo), near


@pytest.mark.parametrize("make", [PPCA, FactorAnalysis])
def test_it_stops_near_the_optimum(make):
    gap, epochs, near = _stopped(make, 0)
    assert gap < 0.01
    assert near is not None
    assert epochs <= 2 * near


@pytest.mark.slow
@pytest.mark.parametrize(("make", "runs", "enough"), [(PPCA, 50, 45), (FactorAnalysis, 20, 19)])
def test_most_runs_stop_near_the_optimum(make, runs, enough):
    found = [_stopped(make, seed) for seed in range(runs)]
    assert sum(gap < 0.01 and near is not None and epochs <= 2 * near for gap, epochs, near in found) >= enough


def test_a_clipped_gradient_has_the_norm():
    pair = _pair()
    before = [p.detach().clone() for half in pair for p in half.parameters()]
    _, after = _fitted(pair, _data(), epochs=1, batch_size=60, optimizer=torch.optim.SGD, lr=1.0, clip=0.25)
    moved = torch.stack([(a - b).square().sum() for a, b in zip(before, after, strict=True)]).sum().sqrt()
    assert float(moved) == pytest.approx(0.25, rel=1e-3)


def test_weight_decay_reaches_the_optimizer():
    pair = _pair()
    plain, decayed = (
        _fitted(_pair(), _data(), epochs=1, optimizer=torch.optim.AdamW, weight_decay=decay)[1] for decay in (0.0, 50.0)
    )
    assert sum(float(p.square().sum()) for p in decayed) < 0.5 * sum(float(p.square().sum()) for p in plain)
    with pytest.raises(TypeError, match="weight_decay"):
        _fitted(pair, _data(), optimizer=torch.optim.Rprop, weight_decay=0.1)


def test_schedules_follow_the_steps():
    history, _ = _fitted(_pair(), _data(), epochs=10, schedule="cosine", lr=0.5)
    expected = [0.5 * factor("cosine", 3 * epoch + 2, 30) for epoch in range(10)]
    assert history.learning_rate == pytest.approx(expected)
    rising = [factor("warmup", step, 100) for step in range(6)]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"schedule": "cosine", "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, "give one of them"),
        ({"clip": 0.0}, "clip is the largest norm"),
        ({"tolerance": 0.01}, "give validation data"),
        ({"tolerance": 0.01, "validation": _data(), "patience": 3}, "no patience"),
        ({"tolerance": -1.0, "validation": _data()}, "tolerance is an improvement"),
    ],
)
def test_impossible_settings_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        _fitted(_pair(), _data(), epochs=1, **how)
