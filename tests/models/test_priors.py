"""Priors: densities on a grid, one line to swap them, and parameters that model and guide share."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from model_members import same_posterior, vamp
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from jensen.families import MAF, FullCovariance, Gaussian, MeanField, Mixture, NeuralSpline, Sylvester
from jensen.guides import Amortized, PriorGuide, amortize
from jensen.inference import ELBO, IWAE, ais, exact_log_evidence, fit, log_weights
from jensen.inference import evaluate as with_refined
from jensen.models import VAE, LearnedPrior, StandardNormal, VampPrior
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide


def _vamp(family):
    return VampPrior(nn.Sequential(mlp(5, [16]), family(2, 16)), torch.randn(4, 5))


PRIORS = {
    "standard normal": lambda: StandardNormal(2),
    "Gaussian": lambda: LearnedPrior(MeanField(2, None)),
    "full covariance": lambda: LearnedPrior(FullCovariance(2, None)),
    "mixture": lambda: LearnedPrior(Mixture(2, None, components=5)),
    "MAF": lambda: LearnedPrior(MAF(2, None, hidden=[16])),
    "spline, coupling": lambda: LearnedPrior(NeuralSpline(2, None, coupling=True, hidden=[16])),
    "VampPrior": vamp,
    "VampPrior, full covariance": partial(_vamp, FullCovariance),
    "VampPrior, mixture": partial(_vamp, Mixture),
}
each_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=list(PRIORS))
DATA = torch.randn(12, 5, generator=torch.Generator().manual_seed(7))


def vae(prior):
    return VAE(mlp(2, [16]), Gaussian(5, 16, scale=0.5), latent=2, prior=prior)


def vamp_pair(dtype=torch.float32):
    model = vae(vamp()).to(dtype)
    return model, same_posterior(model).to(dtype)


@each_prior
@torch.no_grad()
def test_integrates_to_one_and_draws_have_its_moments(make, float64):
    prior = make()()
    t = torch.linspace(-3.6, 3.6, 300)
    axis, weight = t.sinh(), t.cosh() * (t[1] - t[0])
    grid = torch.cartesian_prod(axis, axis)  # [n^2, 2]
    mass = prior.log_prob(grid).exp() * torch.cartesian_prod(weight, weight).prod(-1)
    assert abs(mass.sum().item() - 1) < 2e-4
    mean = (mass.unsqueeze(-1) * grid).sum(0)
    variance = (mass.unsqueeze(-1) * grid.square()).sum(0) - mean.square()
    z = prior.sample((20_000,))
    assert z.shape == (20_000, 2)
    assert ((z.mean(0) - mean).abs() < 5 * (variance / 20_000).sqrt()).all()
    torch.testing.assert_close(z.var(0), variance, rtol=0.1, atol=0)


@each_prior
def test_broadcasts_over_data_and_particles(make, float64):
    prior = make()()
    assert (prior.batch_shape, prior.event_shape) == ((), (2,))
    wide = prior.expand([3, 7])
    z = wide.sample()
    assert z.shape == (3, 7, 2)
    assert len(z.reshape(-1, 2).unique(dim=0)) == 21
    torch.testing.assert_close(wide.log_prob(z), prior.log_prob(z.clone()))


@pytest.mark.parametrize("make", [make for name, make in PRIORS.items() if "spline" not in name])
def test_one_line_swaps_the_prior_and_log_p_stays_that_of_quadrature(make, float64):
    model = vae(make())
    x = model(n=4).detach()
    guide = amortize(model, mlp(5, [16]), FullCovariance, context=16)
    exact = exact_log_evidence(model, x)
    found = evaluate(model, PriorGuide(model), x, 30_000, seed=0, progress=False)
    z = (found.log_evidence - exact.log_evidence) / found.standard_error
    assert (z[found.pareto_k < 0.7].abs() < 5).all()
    assert (found.pareto_k < 0.7).sum() >= 2
    assert log_weights(model, guide, x, particles=3).isfinite().all()


@pytest.mark.parametrize("make", [PRIORS["mixture"], vamp], ids=["mixture", "VampPrior"])
def test_annealing_starts_from_the_prior(make, float64):
    model = vae(make())
    x = model(n=3).detach()
    found = ais(model, None, x, chains=20, temperatures=100, start="prior", seed=0, progress=False)
    assert (found.log_evidence - exact_log_evidence(model, x).log_evidence).abs().max() < 0.5


@pytest.mark.parametrize("name", ["Gaussian", "full covariance", "mixture", "MAF", "VampPrior"])
def test_an_analytic_kl_is_taken_where_there_is_one_and_the_bound_stays_the_same(name, float64):
    model = vae(PRIORS[name]())
    guide = Amortized(mlp(5, [16]), {"z": FullCovariance(2, 16)})
    bounds = []
    for analytic in (False, True):
        torch.manual_seed(1)
        with torch.no_grad():
            bounds.append(ELBO(20_000, analytic_kl=analytic).loss(model, guide, DATA.double()))
    assert abs(bounds[0] - bounds[1]) < 0.5  # of 12 data points: 20000 samples each
    assert (bounds[0] != bounds[1]) == (name in ("Gaussian", "full covariance"))


def test_components_of_a_mixture_come_apart():
    """Trained on samples of a mixture of two, its mean log-density must be minus the mixture's entropy."""
    which = torch.arange(2000) % 2
    z = torch.where(which == 0, -2.0, 2.0).unsqueeze(-1) + 0.5 * torch.randn(2000, 2)
    truth = torch.distributions.Normal(torch.tensor([[-2.0], [2.0]]), 0.5)
    target = (truth.log_prob(z.unsqueeze(1)).sum(-1).logsumexp(1) - math.log(2)).mean()
    for family in (Mixture(2, None, components=4), NeuralSpline(2, None, coupling=True, hidden=[32])):
        prior = LearnedPrior(family)
        optimizer = torch.optim.Adam(prior.parameters(), lr=2e-2)
        for _ in range(200):
            optimizer.zero_grad()
            (-prior().log_prob(z).mean()).backward()
            optimizer.step()
        assert abs(prior().log_prob(z).mean().item() - target.item()) < 0.08


def test_with_the_data_as_pseudo_inputs_the_rate_is_at_most_log_n(float64):
    """The KL to the average of q over the data is the mutual information of the data index and z."""
    network, family = mlp(5, [16]), MeanField(2, 16)
    nn.init.normal_(family.affine.weight, std=20.0)  # posteriors far apart
    prior = VampPrior(nn.Sequential(network, family), DATA.double())
    q = family(network(DATA.double()))
    z = q.sample((2000,))
    rate = (q.log_prob(z) - prior().log_prob(z)).mean()
    assert math.log(12) - 1.0 < rate < math.log(12)


# shared parameters


def shared(model, guide):
    mine = {id(p) for p in guide.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in mine}


def test_both_halves_hold_the_posterior_and_only_the_model_the_pseudo_inputs():
    network, family = mlp(5, [16]), MeanField(2, 16)
    model, guide = vae(VampPrior(nn.Sequential(network, family), DATA[:4])), Amortized(network, {"z": family})
    names = {"prior.posterior.0.1.weight", "prior.posterior.0.1.bias"}
    assert shared(model, guide) == names | {"prior.posterior.1.affine.weight", "prior.posterior.1.affine.bias"}
    assert "prior.pseudo_inputs" in model.state_dict()
    assert len(shared(*copy.deepcopy((model, guide)))) == 4


def _expected_after_one_step(model, guide, lr):
    """Parameters minus lr times the gradient, by name, with the samples of seed 1."""
    torch.manual_seed(1)
    log_weights(model, guide, DATA.double(), particles=1).sum().neg().backward()
    moved = {name: (p - lr * p.grad).detach() for name, p in [*model.named_parameters(), *guide.named_parameters()]}
    for p in (*model.parameters(), *guide.parameters()):
        p.grad = None
    return moved


def _svi(model, guide, path):
    SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(DATA.double())


def _fit(model, guide, path):
    options = {"epochs": 1, "batch_size": 12, "lr": 1e-3, "optimizer": torch.optim.SGD, "progress": False}
    fit(model, guide, DATA.double(), checkpoint=path, **options)


@pytest.mark.parametrize("train", [_svi, _fit])
def test_shared_parameters_move_once_a_step(train, float64, tmp_path):
    model, guide = vamp_pair(torch.float64)
    expected = _expected_after_one_step(model, guide, 1e-3)
    torch.manual_seed(1)
    train(model, guide, tmp_path / "run.pt")
    for name, p in [*model.named_parameters(), *guide.named_parameters()]:
        torch.testing.assert_close(p, expected[name], msg=name)


def test_fit_saves_shared_parameters_once_and_resumes(float64, tmp_path):
    path = tmp_path / "run.pt"
    model, guide = vamp_pair(torch.float64)
    _fit(model, guide, path)
    saved = torch.load(path, weights_only=True)
    unique = {id(p) for p in (*model.parameters(), *guide.parameters())}
    assert len(saved["names"]) == len(set(saved["names"])) == len(unique)
    twin, twin_guide = vamp_pair(torch.float64)
    fit(twin, twin_guide, DATA.double(), epochs=1, optimizer=torch.optim.SGD, checkpoint=path, resume=True)
    for half, other in ((model, twin), (guide, twin_guide)):
        for name, value in half.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, msg=name)
    assert len(shared(twin, twin_guide)) == 4


def test_state_dicts_of_both_halves_agree_and_load():
    model, guide = vamp_pair()
    other, other_guide = vamp_pair()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        other_guide.state_dict(), guide.state_dict()
    )  # the model's parameters include the guide's


def test_doubly_reparameterized_gradients_refuse_shared_parameters_by_name():
    model, guide = vamp_pair()
    with pytest.raises(ValueError, match=r"both depend on \[.*'prior\.posterior\.1\.affine\.weight'\]"):
        fit(model, guide, DATA, IWAE(4, gradient="dreg"), epochs=1, progress=False)
    fit(model, guide, DATA, IWAE(4, gradient="stl"), epochs=1, progress=False)


def test_training_with_a_vamp_prior_raises_the_bound_above_that_of_the_standard_normal():
    """Two distant clusters and one latent feature: a standard normal prior does not fit the two modes."""
    centre = torch.tensor([[-3.0] * 5, [3.0] * 5])
    x = centre[torch.arange(200) % 2] + 0.1 * torch.randn(200, 5)
    found = {}
    for name in ("standard normal", "VampPrior"):
        torch.manual_seed(0)
        network, family = mlp(5, [16]), MeanField(1, 16)
        prior = VampPrior(nn.Sequential(network, family), x[:2]) if name == "VampPrior" else None
        model = VAE(mlp(1, [16]), Gaussian(5, 16, scale=0.5), latent=1, prior=prior)
        guide = Amortized(network, {"z": family})
        fit(model, guide, x, ELBO(4), epochs=80, batch_size=100, lr=2e-2, seed=0, progress=False)
        found[name] = evaluate(model, guide, x, 500, seed=0, progress=False).elbo.mean().item()
    best = 5 * (-math.log(0.5) - math.log(2 * math.pi) / 2) - math.log(2)  # z carries only one bit
    assert found["standard normal"] + 0.2 < found["VampPrior"] < best + 0.1


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LearnedPrior(MeanField(2, 8)),
            r"a family without context: build it as MeanField\(..., context=None\)",
        ),
        (lambda: LearnedPrior(MeanField(2, None), spread=0.0), "spread must be a positive"),
        (lambda: LearnedPrior(Sylvester(2, None)), "Sylvester has it only at its own samples: use MAF"),
        (lambda: _vamp(Sylvester), "this posterior has it only at its own samples"),
        (lambda: VampPrior(nn.Sequential(mlp(5, [16]), MeanField(2, 16)), torch.randn(5)), "give pseudo_inputs as"),
        (lambda: vae(StandardNormal(3)), r"2 latent features, but its prior has event shape \(3,\)"),
    ],
)
def test_wrong_priors_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
