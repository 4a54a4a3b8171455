"""Random streams: a seed gives each function a different one, so a measurement does not reuse the data's noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from jensen.families import FullCovariance
from jensen.guides import PriorGuide, amortize
from jensen.inference import (
    IWAE,
    ais,
    bounds,
    compare,
    encode,
    evaluate,
    fit,
    gradient_signal,
    learning_rates,
    mcmc_posterior,
    rate_distortion,
    reconstruct,
    sandwich,
    terms,
)
from jensen.kernel import randomness
from jensen.kernel.randomness import derived_seed, private_randomness
from jensen.models import PPCA


class Recorder:
    """A model and guide that record every latent value."""

    def __init__(self):
        self.seen = []

    def model(self, x=None, n=1):
        n = n if x is None else len(x)
        with pyro.plate("data", n, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(n, 2).double(), 1.0).to_event(1))
            self.seen.append(z.detach().flatten())
            return pyro.sample("x", dist.Normal(z @ torch.ones(2, 3).double(), 1.0).to_event(1), obs=x)

    def guide(self, x):
        scale = pyro.param("scale", torch.ones(2).double())
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).double(), scale).to_event(1))
            self.seen.append(z.detach().flatten())


QUIET = {"seed": 0, "progress": False}
MEASURED = {
    "evaluate": lambda m, g, x: evaluate(m, g, x, particles=8, compile=False, **QUIET),
    "evaluate, tolerance": lambda m, g, x: evaluate(m, g, x, tolerance=0.5, compile=False, **QUIET),
    "compare": lambda m, g, x: compare({"pair": (m, g)}, x, particles=8, **QUIET),
    "bounds": lambda m, g, x: bounds(m, g, x, particles=8, **QUIET),
    "rate_distortion": lambda m, g, x: rate_distortion(m, g, x, particles=8, **QUIET),
    "ais": lambda m, g, x: ais(m, None, x, start="prior", chains=4, temperatures=4, **QUIET),
    "sandwich": lambda m, g, x: sandwich(m, g, data=x, start="guide", chains=4, temperatures=4, particles=8, **QUIET),
    "mcmc_posterior": lambda m, g, x: mcmc_posterior(m, x[:2], method="rejection", draws=8, chains=1, **QUIET),
    "encode": lambda m, g, x: encode(m, g, x, 8, seed=0),
    "reconstruct": lambda m, g, x: reconstruct(m, g, x, 8, seed=0),
    "gradient_signal": lambda m, g, x: gradient_signal(m, g, x, IWAE(4), repeats=2, seed=0),
    "learning_rates": lambda m, g, x: learning_rates(m, g, x, steps=10, **QUIET),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEASURED)
def test_a_measurement_with_the_seed_of_the_data_does_not_draw_the_latents_that_made_them(name):
    pair = Recorder()
    with private_randomness(0):
        x = pair.model(n=40)
    true = pair.seen.pop()
    pair.seen.clear()
    torch.manual_seed(12345)  # of inspections, whose samples are discarded
    MEASURED[name](pair.model, pair.guide, x)
    assert pair.seen
    assert not torch.isin(torch.cat(pair.seen), true).any()


@pytest.mark.filterwarnings("ignore")
def test_the_validation_of_fit_does_not_draw_them_either():
    pair = Recorder()
    with private_randomness(0):
        x = pair.model(n=40)
    true = pair.seen.pop()
    torch.manual_seed(12345)
    fit(pair.model, pair.guide, x, epochs=1, validation=x, seed=1, compile=False, progress=False)
    assert not torch.isin(torch.cat(pair.seen), true).any()


def test_log_p_of_seeded_data_is_right_with_the_same_seed():
    model = PPCA(20, 3).double()
    with torch.no_grad():
        model.log_noise.fill_(math.log(0.3))
    with private_randomness(0), torch.no_grad():
        x = model(n=200)
    how = {"particles": 100, "progress": False, "compile": False}
    same, others = (evaluate(model, PriorGuide(model), x, seed=seed, **how) for seed in (0, 1))
    far = float((same.log_evidence - same.exact).mean() - (others.log_evidence - others.exact).mean())
    spread = math.hypot(*(float((e.log_evidence - e.exact).std()) / math.sqrt(len(x)) for e in (same, others)))
    assert abs(far) < 4 * spread


def test_a_part_of_the_data_draws_the_same_whatever_the_other_parts_took():
    model = PPCA(5, 2).double()
    with torch.no_grad():
        x = model(n=128)
    narrow = torch.cat([x[:64] * 4, x[64:]])  # distant data points need more particles
    how = {"tolerance": 0.05, "max_particles": 2048, "seed": 3, "progress": False, "compile": False}
    one, other = (evaluate(model, PriorGuide(model), data, **how) for data in (x, narrow))
    assert not torch.equal(one.spent[:64], other.spent[:64])
    assert torch.equal(one.log_evidence[64:], other.log_evidence[64:])


def test_streams_of_functions_stages_and_parts_are_different_and_repeat():
    names = [(), ("evaluate",), ("evaluate", 0), ("evaluate", 64), ("gaps",), ("gaps", "data")]
    seeds = [derived_seed(seed, *of) for seed in (0, 1, -1, 2**40) for of in names]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derived_seed(seed, *of) for seed in (0, 1, -1, 2**40) for of in names]
    assert all(0 <= seed < 2**32 for seed in seeds)


class Accelerator(torch.nn.Module):
    """PyTorch's functions for a device with a random stream of its own, and a network that samples from it."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def get_rng_state_all(self):
        return [self.generator.get_state()]

    def set_rng_state_all(self, states):
        self.generator.set_state(*states)

    def device_count(self):
        return 1

    def forward(self, h):
        return h + torch.randn(h.shape, generator=self.generator)


@pytest.fixture
def accelerator(monkeypatch):
    device = Accelerator()
    monkeypatch.setattr(randomness, "_accelerator", lambda: device)
    return device


def test_the_second_run_of_a_guide_rewinds_the_stream_of_the_accelerator(accelerator):
    model = PPCA(5, 2)
    guide = amortize(model, accelerator, FullCovariance, context=5)
    found = terms(model, guide, torch.randn(7, 5), particles=1, stopped=True)
    torch.testing.assert_close(sum(found.log_q_stopped.values()), sum(found.log_q.values()))


def test_private_randomness_restores_the_stream_of_the_accelerator(accelerator):
    state = accelerator.generator.get_state()
    with private_randomness(0):
        accelerator(torch.zeros(3))
    assert torch.equal(accelerator.generator.get_state(), state)


def test_a_resumed_run_continues_the_stream_of_the_accelerator(accelerator, tmp_path):
    found = []
    for parts in ((4,), (2, 4)):
        torch.manual_seed(0)
        accelerator.generator.manual_seed(0)
        model, path = PPCA(5, 2), tmp_path / f"{len(parts)}.pt"
        guide, x = amortize(model, accelerator, FullCovariance, context=5), torch.randn(7, 5)
        for epochs in parts:
            fit(model, guide, x, epochs=epochs, checkpoint=path, resume=epochs != parts[0], compile=False, **QUIET)
            accelerator(torch.zeros(3))  # something else samples between the parts
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


def test_the_accelerator_of_pytorch_is_asked_once_it_is_in_use(monkeypatch):
    class Module:
        is_initialized = staticmethod(lambda: used)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    used = False
    assert randomness._accelerator() is None
    used = True
    assert randomness._accelerator() is Module
