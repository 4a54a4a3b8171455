"""The best Gaussian of each data point against known posteriors and optima."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import GammaPoisson, TwoLevels
from torch import Size

from jensen.families import IAF, FullCovariance, LowRank, MeanField, StudentT
from jensen.guides import amortize
from jensen.inference import gaps
from jensen.inference.measure.gaussians import Gaussians, Landscape
from jensen.inference.measure.search import LocalSearch
from jensen.kernel.weights import log_joint
from jensen.models import PPCA
from jensen.module import UniqueModule
from jensen.networks import mlp


def rotated(n=12):
    model = PPCA(5, 3).rotated(seed=0)
    with torch.no_grad():
        model.weight.mul_(2.0)
    return model, model(n=n).detach()


def searched(model, family, x, joint=False, constraints=None, draws=8):
    torch.manual_seed(0)
    guide = amortize(model, mlp(x.shape[-1], [8]), family, context=8, joint=joint, constraints=constraints)
    land = Landscape(model, 1, False, 1)
    return LocalSearch(model, guide.local(x), (x.clone(),), draws, False, 1000, None, land)


def test_the_landscape_is_the_log_density(float64):
    model = TwoLevels()
    x = model(n=4).detach()
    values = {"top": torch.randn(6, 4, 2), "low": torch.randn(6, 4, 3)}
    land = Landscape(model, 1, False, 1)
    u = land.coordinates((x,)).free(values)
    torch.testing.assert_close(land.log_density(u, x), log_joint(model, values, x))


@pytest.mark.parametrize("joint", [False, True])
def test_a_full_covariance_is_exact_after_a_round_where_the_posterior_is_gaussian(joint, float64):
    model, x = rotated()
    search = searched(model, FullCovariance, x, joint)
    search.gaussian_round(0)
    torch.testing.assert_close(search._log_weights(), model.log_evidence(x).expand(64, -1), atol=1e-6, rtol=0)


def test_levels_that_are_drawn_jointly_are_found_jointly(float64):
    model = TwoLevels()
    x = model(n=8).detach()
    search = searched(model, FullCovariance, x, joint=True)
    search.gaussian_round(0)
    torch.testing.assert_close(search._log_weights(), model.log_evidence(x).expand(64, -1), atol=1e-6, rtol=0)
    assert not searched(model, FullCovariance, x)._has_gaussians()  # one level after the other: no joint Gaussian


def test_a_diagonal_covariance_is_that_of_the_precision(float64):
    model, x = rotated()
    search = searched(model, MeanField, x)
    change, error, done = search.run(10, 200, 0.1, 0.002)
    assert done == 2 and (change.abs() <= 0.002 + 2 * error).all()
    q, posterior = search.guide.families["z"](search.guide.encoder(x)), model.posterior(x)
    torch.testing.assert_close(q.mean, posterior.mean, atol=1e-3, rtol=0)
    precision = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).expand(12, 3)
    torch.testing.assert_close(q.variance, 1 / precision, rtol=1e-4, atol=0)


def test_a_site_on_a_half_line_has_the_best_gaussian_of_its_logarithm(float64):
    """A Gamma posterior of shape a and rate b: the optimum has variance 1 / a, and E exp(u) = a / b."""
    model = GammaPoisson()
    x = model(n=10)
    search = searched(model, MeanField, x, constraints=model.constraints, draws=64)
    for number in range(3):
        search.gaussian_round(number)
    q = search.guide.families["z"](search.guide.encoder.context).base_dist
    shape = 3 + x.sum(-1, keepdim=True)
    torch.testing.assert_close(q.variance, 1 / shape, rtol=0.05, atol=0)
    torch.testing.assert_close((q.mean + q.variance / 2).exp(), shape / 3.5, rtol=0.02, atol=0)


class Quartic(UniqueModule):
    """Two z ~ N(0, 1), and x observed through a cubic: the posterior is not Gaussian."""

    def __init__(self):
        super().__init__()
        self.latents, self.event_shape = {"z": Size((2,))}, Size((2,))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 0.3 * z**3, 0.7).to_event(1), obs=x)


@pytest.mark.parametrize("family", [MeanField, FullCovariance])
def test_what_is_not_gaussian_is_found_as_a_long_search_finds_it(family, float64):
    model, x = Quartic(), torch.randn(20, 2) * 2
    quick, long = searched(model, family, x), searched(model, family, x, draws=64)
    for number in range(3):
        quick.gaussian_round(number)
    for rate in (0.1, 0.02, 0.005):
        long.round(200, rate)
    elbos = []
    for search in (quick, long):
        torch.manual_seed(5)
        elbos.append(search._weights(4000, (x,)).detach().mean(0))
    assert float((elbos[0] - elbos[1]).mean()) > -0.01


@pytest.mark.parametrize("family", [partial(LowRank, rank=1), StudentT])
def test_families_near_gaussians_start_there(family, float64):
    model, x = rotated()
    search = searched(model, family, x)
    change, _, better = search.gaussian_round(0)
    assert better.all() and change.mean() > 1


def test_other_families_take_no_part(float64):
    model, x = rotated()
    assert not searched(model, IAF, x)._has_gaussians()
    guide = amortize(model, mlp(5, [8]), MeanField, context=8)
    assert guide.reaches == "" and guide.local(x).reaches == "diagonal"
    assert not LocalSearch(model, guide.local(x), (x,), 4, False, 10)._has_gaussians()  # the model's state is not known


def test_a_datum_that_loses_goes_back(float64):
    model, x = rotated()
    search = searched(model, MeanField, x)
    search.gaussian_round(0)
    gaussians = search._gaussians
    before = gaussians.state()
    gaussians.loc, gaussians.curvature, gaussians.points = (t + 1 for t in before)
    gaussians.return_to(before, torch.arange(12) < 5)
    for old, new in zip(before, gaussians.state(), strict=True):
        assert torch.equal(old[:5], new[:5]) and torch.equal(old[5:] + 1, new[5:])
    assert isinstance(gaussians, Gaussians)


@pytest.mark.parametrize("family", [MeanField, pytest.param(IAF, marks=pytest.mark.slow)])
def test_batches_share_tensors_and_graphs(family, float64, monkeypatch):
    """The second batch uses the memory of the first, with the numbers of a separate search."""
    made = []
    init = LocalSearch.__init__
    monkeypatch.setattr(LocalSearch, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    model, x = rotated(20)
    guide = amortize(model, mlp(5, [8]), family, context=8)
    how = {"particles": 4000, "rounds": 2, "steps": 40, "seed": 0, "progress": False}
    before = x.clone()
    both = gaps(model, guide, x, batch_size=10, **how)
    assert len(made) == 1 and torch.equal(x, before)
    for rows in (slice(0, 10), slice(10, 20)):
        alone = gaps(model, guide, x[rows], batch_size=10, **how)
        error = 5 * (alone.local.elbo_error.square() + both.local.elbo_error[rows].square()).sqrt()
        room = 0.02 if family is MeanField else 0.5
        assert ((alone.local.elbo - both.local.elbo[rows]).abs() < error + room).all()
    uneven = gaps(model, guide, x[:15], batch_size=10, **how)
    assert len(made) == 1 + 2 + 2 and len(uneven.local.elbo) == 15


def test_a_guide_that_holds_more_than_tensors_is_not_written_over(float64):
    model, x = rotated(20)
    guide = amortize(model, mlp(5, [8]), MeanField, context=8)
    first, second, other = guide.local(x[:10]), guide.local(x[10:]), guide.local(x[10:])
    other.rows = x[10:]  # not a buffer, so it is not copied
    first.rows = x[:10]
    search = LocalSearch(model, first, (x[:10].clone(),), 4, False, 10)
    assert not search.take(other, (x[10:],))
    del first.rows
    assert search.take(second, (x[10:],))


def test_a_search_for_gaussians_runs_the_model_few_times(float64):
    """Rounds of 200 steps each run it for every step."""
    model, x = rotated()
    runs = []
    forward = model.forward
    model.forward = lambda x=None, **how: runs.append(1) or forward(x, **how)
    search = searched(model, FullCovariance, x)
    assert search.run(10, 200, 0.1, 0.002)[2] == 2
    assert len(runs) < 400
