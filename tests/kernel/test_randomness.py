"""Random streams: a seed gives each function a different one, so a measurement does not reuse the data's noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from jensen.guides import PriorGuide
from jensen.inference import (
    IWAE,
    ais,
    bounds,
    compare,
    encode,
    evaluate,
    fit,
    gradient_signal,
    mcmc_posterior,
    rate_distortion,
    reconstruct,
    sandwich,
)
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
