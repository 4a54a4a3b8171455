"""Training and measurement where --device says, with that device's random stream, and data on the CPU or there."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zuko
from members import DEVICE, pair
from torch import nn

from jensen.datasets import bars, hide, linear_dynamics, linear_gaussian, load, pinwheel
from jensen.families import FullCovariance, Gaussian, MeanField, Zuko
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.imputer import Imputer
from jensen.inference import (
    ELBO,
    IWAE,
    ais,
    bounds,
    calibrate,
    compare,
    encode,
    evaluate,
    exact_log_evidence,
    fit,
    gaps,
    held_out,
    impute,
    mcmc_posterior,
    rate_distortion,
    reconstruct,
    sandwich,
    terms,
)
from jensen.kernel.randomness import accelerator_states
from jensen.models import PPCA, VAE
from jensen.networks import mlp

QUIET = {"seed": 0, "progress": False}
HERE = Path(__file__).parent


def ppca(n=12):
    """A model in double precision on the device, its exact posterior, and data on the CPU."""
    model = PPCA(5, 2).double()
    with torch.no_grad():
        x = model(n=n)
    model.to(DEVICE)
    return model, ExactPosterior(model), x


def close(found, expected):
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected.cpu(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("moved", [False, True], ids=["data on the CPU", "data on the device"])
def test_evaluate_gives_the_exact_log_evidence(moved):
    model, guide, x = ppca()
    exact = copy.deepcopy(model).cpu().log_evidence(x)
    found = evaluate(model, guide, x.to(DEVICE) if moved else x, 4, device=None if moved else DEVICE, **QUIET)
    close(found.log_evidence, exact)
    close(exact_log_evidence(model, x, device=DEVICE).log_evidence, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of few particles and chains
@pytest.mark.parametrize(
    "measured",
    [
        lambda m, g, x: evaluate(m, g, x, tolerance=0.3, max_particles=600, **QUIET),
        lambda m, g, x: evaluate(m, PriorGuide(m), x, 64, refine=True, **QUIET),
        lambda m, g, x: compare({"a": (m, g), "b": (m, PriorGuide(m))}, x, particles=8, **QUIET),
        lambda m, g, x: gaps(m, guide_of(m), x, 8, rounds=1, steps=2, **QUIET),
        lambda m, g, x: bounds(m, g, x, 4, **QUIET),
        lambda m, g, x: ais(m, g, x, chains=2, temperatures=3, **QUIET),
        lambda m, g, x: sandwich(m, g, data=x, chains=2, temperatures=3, particles=8, **QUIET),
        lambda m, g, x: rate_distortion(m, g, x, 4, **QUIET),
        lambda m, g, x: calibrate(m, g, 100, 19, **QUIET),
        lambda m, g, x: mcmc_posterior(m, x[:1], draws=4, warmup=2, chains=1, **QUIET),
        lambda m, g, x: reconstruct(m, g, x, 2, seed=0),
        lambda m, g, x: encode(m, g, x, 2, seed=0),
        lambda m, g, x: impute(m, PriorGuide(m), holes(x), 50, **QUIET),
        lambda m, g, x: held_out(m, PriorGuide(m), holes(x), x, 50, **QUIET),
    ],
    ids=[
        "tolerance",
        "refine",
        "compare",
        "gaps",
        "bounds",
        "ais",
        "sandwich",
        "rate",
        "calibrate",
        "mcmc",
        "reconstruct",
        "encode",
        "impute",
        "held",
    ],
)
def test_measurements_run_there_and_repeat(measured):
    model, guide, x = ppca()
    x, states = x.to(DEVICE), [torch.get_rng_state(), *accelerator_states()]
    first, again = measured(model, guide, x), measured(model, guide, x)
    if hasattr(first, "per_datum"):
        assert first.to_dict().keys() == again.to_dict().keys()
    assert all(torch.equal(*both) for both in zip(states, [torch.get_rng_state(), *accelerator_states()], strict=True))


def guide_of(model):
    with torch.random.fork_rng(devices=[]):
        return amortize(model, mlp(5, [4]), MeanField, context=4).double().to(DEVICE)


def holes(x):
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), device="cpu") < 0.7
    return x.masked_fill(~seen.to(x.device), math.nan)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, ELBO(2, "stl"), IWAE(3, "dreg")])
@pytest.mark.parametrize("compiled", [False, "auto"])
def test_fit_learns_the_optimum_of_the_model(objective, compiled):
    torch.manual_seed(0)
    _, _, x = ppca(200)
    best = PPCA(5, 2).double().fit_closed_form(x).log_evidence(x).mean().item()
    model, start = PPCA(5, 2).double(), PPCA(5, 2).double().fit_closed_form(x)
    model.load_state_dict(start.state_dict())
    guide = amortize(model, nn.Identity(), FullCovariance, context=5).double()
    how = {"epochs": 60, "lr": 0.05, "batch_size": 200, "compile": compiled, "device": DEVICE, "validation": x}
    fit(model, guide, x, objective, **how, **QUIET)
    found = evaluate(model, guide, x, 10, device=DEVICE, refine=False, **QUIET)
    assert next(model.parameters()).device.type == DEVICE.type
    assert abs(float(found.log_evidence.mean() - best)) < 0.1


def test_a_resumed_run_continues_the_devices_random_stream(tmp_path):
    weights = []
    for parts in ((4,), (2, 4)):
        torch.manual_seed(0)
        model, guide, x = pair("PPCA", "MAF")
        for epochs in parts:
            how = {"checkpoint": tmp_path / f"{len(parts)}.pt", "resume": epochs != parts[0], "batch_size": 4}
            fit(model, guide, x, epochs=epochs, **how, **QUIET)
        weights.append([p.detach().clone() for p in [*model.parameters(), *guide.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Noisy(nn.Module):
    """A network with noise of its own."""

    def forward(self, h):
        return h + torch.randn_like(h)


def test_the_second_run_of_a_guide_repeats_its_noise():
    model = VAE(mlp(2, [8]), Gaussian(5, 8), 2)
    guide = amortize(model, nn.Sequential(mlp(5, [8]), Noisy()), FullCovariance, context=8)
    model.to(DEVICE), guide.to(DEVICE)
    x = torch.randn(7, 5).to(DEVICE)
    found = terms(model, guide, x, particles=3, stopped=True)
    torch.testing.assert_close(sum(found.log_q_stopped.values()), sum(found.log_q.values()))


def test_the_noise_of_a_zuko_flow_is_drawn_there():
    family = Zuko(2, 4, flow=lambda f, c: zuko.flows.NSF(f, c, transforms=1, hidden_features=(8,))).to(DEVICE)
    q = family(torch.randn(3, 4).to(DEVICE))
    state = torch.get_rng_state()
    q.rsample()
    assert torch.equal(torch.get_rng_state(), state) == (DEVICE.type != "cpu")


def test_the_imputer_leaves_the_random_streams():
    imputer = Imputer(latent=1)
    states = [torch.get_rng_state(), *accelerator_states()]
    imputer.fit(holes(torch.randn(20, 3, generator=torch.Generator().manual_seed(0))).numpy())
    assert all(torch.equal(*both) for both in zip(states, [torch.get_rng_state(), *accelerator_states()], strict=True))


def test_a_diverging_compiled_run_with_an_optimizer_of_pytorch_ends_with_its_reason(monkeypatch):
    """Its losses are read together: those of the device, and the last one."""
    monkeypatch.setattr(sys.modules["jensen.inference.training.steps"], "compiled", lambda graph, *inputs: graph)
    torch.manual_seed(0)
    model, guide, x = pair("VAE, shared scale", "MeanField")
    with pytest.raises(FloatingPointError, match="not finite at or after step"):
        fit(model, guide, x, optimizer=torch.optim.Adagrad, lr=1e8, epochs=50, batch_size=1, compile=True, **QUIET)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of few particles and chains
@pytest.mark.parametrize(
    "call",
    [
        lambda m, g, x: m.rotated(0).weight,
        lambda m, g, x: fit(m, guide_of(m), x, epochs=2, batch_size=5, validation=x, **QUIET),
        lambda m, g, x: evaluate(m, g, x, tolerance=0.3, max_particles=600, **QUIET),
        lambda m, g, x: bounds(m, g, x, 8, **QUIET),
        lambda m, g, x: calibrate(m, g, 100, 19, **QUIET).p_values,
        lambda m, g, x: mcmc_posterior(m, x[:2], draws=4, warmup=2, chains=1, **QUIET).converged,
        lambda m, g, x: mcmc_posterior(m, x[:2], method="rejection", draws=4, chains=1, **QUIET).converged,
        lambda m, g, x: hide(load("digits"), rate=0.1),
        lambda m, g, x: [make(100) for make in (bars, linear_dynamics, linear_gaussian, pinwheel)],
        lambda m, g, x: Imputer(latent=1).fit(holes(x).cpu().numpy()).transform(holes(x).cpu().numpy()),
    ],
    ids=["rotated", "fit", "tolerance", "bounds", "calibrate", "nuts", "rejection", "digits", "synthetic", "imputer"],
)
def test_the_default_device_of_pytorch_may_be_another(call):
    with torch.device(DEVICE):
        model, guide, x = ppca()
        call(model, guide, x.to(DEVICE))


@pytest.mark.slow
def test_synthetic_densities_are_computed_where_the_data_are():
    with torch.device(DEVICE):
        found = [make(100) for make in (bars, linear_dynamics, linear_gaussian, pinwheel)]
        assert all(data.log_density(data.test).device.type == "cpu" for data in found)


@pytest.mark.slow
def test_the_contract_holds_on_a_device_with_memory_and_random_stream_of_its_own():
    some = "terms_add_up or (test_device and not own)"
    suites = [HERE / "test_device.py", HERE.parent / "test_contract.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-n",
        "0",
        "--device",
        "second",
        "-m",
        "",
    ]
    done = subprocess.run(
        [*command, "-k", some, *map(str, suites)], capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:]
