"""Factor analysis, the general linear-Gaussian model and mixtures of PPCA against closed forms and scikit-learn."""

import copy
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis

from jensen.datasets import load
from jensen.families import FullCovariance, OneHotCategorical
from jensen.guides import Amortized, ExactPosterior
from jensen.inference import exact_log_evidence, log_weights
from jensen.models import PPCA, FactorAnalysis, LinearGaussian, MixtureOfPPCA
from jensen.networks import mlp

LINEAR = {"FactorAnalysis": FactorAnalysis, "LinearGaussian": LinearGaussian}
each_linear = pytest.mark.parametrize("model_class", LINEAR.values(), ids=list(LINEAR))


def _general(model):
    """The model at generic parameters, none zero or one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


def _normal(mean, covariance):
    return torch.distributions.MultivariateNormal(mean, covariance)


def _latent_class_data(n=300):
    """Two flat clouds in three dimensions."""
    flat = torch.randn(n, 3) * torch.tensor([2.0, 1.0, 0.2])
    turned = torch.randn(n, 3) * torch.tensor([0.3, 2.0, 0.3]) + torch.tensor([4.0, 0.0, 1.0])
    return torch.cat([flat, turned])


@pytest.mark.parametrize("name", ["digits", pytest.param("oil_flow", marks=pytest.mark.data("oil_flow"))])
def test_factor_analysis_equals_scikit_learn_at_its_parameters_and_finds_them(name, float64):
    x = load(name, dtype=torch.float64).train
    theirs = SklearnFactorAnalysis(3, tol=1e-10, max_iter=5000, svd_method="lapack").fit(x.numpy())
    model = FactorAnalysis(x.shape[1], 3)
    with torch.no_grad():
        model.mean.copy_(torch.as_tensor(theirs.mean_))
        model.weight.copy_(torch.as_tensor(theirs.components_).T)
        model.log_noise.copy_(torch.as_tensor(theirs.noise_variance_).log() / 2)
        expected = torch.as_tensor(theirs.score_samples(x.numpy()))
        assert (model.log_evidence(x) - expected).abs().max() < 1e-6
        torch.testing.assert_close(model.posterior(x).mean, torch.as_tensor(theirs.transform(x.numpy())))
    fitted = FactorAnalysis(x.shape[1], 3).fit_em(x)
    assert abs(fitted.log_evidence(x).mean().item() - expected.mean().item()) < 1e-6


def test_factor_analysis_does_not_ask_for_units(float64):
    x = torch.randn(100, 2) @ torch.randn(2, 5) + torch.randn(100, 5)
    units = torch.tensor([1e-4, 0.1, 1.0, 10.0, 1e4])
    one, other = FactorAnalysis(5, 2).fit_em(x), FactorAnalysis(5, 2).fit_em(x * units)
    shift = units.log().sum()
    torch.testing.assert_close(other.log_evidence(x * units) + shift, one.log_evidence(x), rtol=0, atol=1e-4)


@each_linear
def test_evidence_and_posterior_are_those_of_the_full_covariance(model_class, float64):
    model = _general(model_class(5, 2))
    x = torch.randn(10, 5)
    with torch.no_grad():
        w = model.weight
        covariance = w @ w.T + model.covariance
        torch.testing.assert_close(model.log_evidence(x), _normal(model.mean, covariance).log_prob(x))
        torch.testing.assert_close(model.marginal().covariance_matrix, covariance)
        gain = w.T @ torch.linalg.inv(covariance)  # conditioning the joint Gaussian
        posterior = model.posterior(x)
        torch.testing.assert_close(posterior.mean, (x - model.mean) @ gain.T)
        torch.testing.assert_close(posterior.covariance_matrix, (torch.eye(2) - gain @ w).expand(10, 2, 2))


@each_linear
def test_with_the_exact_posterior_the_weights_are_constant(model_class, float64):
    model = _general(model_class(5, 2))
    x = torch.randn(10, 5)
    with torch.no_grad():
        log_w = log_weights(model, ExactPosterior(model), x, particles=4)
        torch.testing.assert_close(log_w, model.log_evidence(x).expand(4, 10), rtol=0, atol=1e-10)


def test_evidence_keeps_its_digits_in_float32():
    model = FactorAnalysis(5, 2)
    with torch.no_grad():
        model.log_noise.fill_(-6.0)
        x = model(n=20)
        exact = model.double().log_evidence(x.double())
        assert (model.float().log_evidence(x) - exact).abs().max() < 1e-2


def test_the_noise_of_the_general_model_takes_in_any_covariance(float64):
    """Its marginal can be any Gaussian, so its likelihood must reach that of the data's mean and covariance."""
    x = torch.randn(200, 5) @ torch.randn(5, 5)
    model = LinearGaussian(5, 2).fit_em(x)
    best = _normal(x.mean(0), x.T.cov(correction=0)).log_prob(x).mean()
    torch.testing.assert_close(model.log_evidence(x).mean(), best, rtol=0, atol=1e-8)


@each_linear
def test_svi_finds_the_maximum_that_em_finds(model_class, float64):
    x = torch.randn(200, 1) @ torch.randn(1, 4) + torch.tensor([0.5, 1.0, 0.3, 0.7]) * torch.randn(200, 4) + 1.0
    best = model_class(4, 1).fit_em(x).log_evidence(x).mean().item()
    model = model_class(4, 1)
    svi = SVI(model, ExactPosterior(model), Adam({"lr": 3e-2}), Trace_ELBO())
    for _ in range(500):
        svi.step(x)
    assert -1e-3 < model.log_evidence(x).mean().item() - best < 1e-8


@each_linear
def test_what_cannot_be_fitted_is_named(model_class):
    model = model_class(4, 2)
    x = torch.randn(50, 4)
    with pytest.raises(ValueError, match=r"x\[:, 2\] is always 3"):
        model.fit_em(torch.cat([x[:, :2], torch.full((50, 1), 3.0), x[:, 3:]], 1))
    with pytest.raises(ValueError, match="at least two data points"):
        model.fit_em(x[:1])
    with pytest.raises(ValueError, match=r"shape \[N, 4\]"):
        model.log_evidence(x[:, :3])
    with pytest.raises(ValueError, match="latent=0"):
        model_class(4, 0)


def test_the_general_model_names_data_on_a_plane():
    with pytest.raises(ValueError, match="covariance of the data is singular"):
        LinearGaussian(4, 2).fit_em(torch.randn(50, 2) @ torch.randn(2, 4))


def test_one_component_is_ppca(float64):
    x = torch.randn(100, 2) @ torch.randn(2, 5) + torch.randn(100, 5)
    mixture, one = MixtureOfPPCA(5, 2, 1).fit_em(x), PPCA(5, 2).fit_closed_form(x)
    torch.testing.assert_close(mixture.log_evidence(x), one.log_evidence(x))
    torch.testing.assert_close(mixture.posterior(x).mean[:, 0].abs(), one.posterior(x).mean.abs())


def test_mixture_is_a_mixture_of_gaussians(float64):
    model = _general(MixtureOfPPCA(5, 2, 3))
    x = torch.randn(10, 5)
    with torch.no_grad():
        covariance = model.weight @ model.weight.mT + model.noise.square()[:, None, None] * torch.eye(5)
        parts = _normal(model.mean, covariance)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=model.logits), parts)
        torch.testing.assert_close(model.log_evidence(x), mixture.log_prob(x))
        expected = (model.logits.log_softmax(-1) + parts.log_prob(x[:, None])).softmax(-1)
        torch.testing.assert_close(model.responsibilities(x), expected)


def test_mixture_s_program_sums_and_integrates_to_its_evidence(float64):
    model = _general(MixtureOfPPCA(3, 1, 2))
    x = model(n=5).detach()
    found = exact_log_evidence(model, x, method="quadrature", progress=False)
    torch.testing.assert_close(found.log_evidence, model.log_evidence(x).detach(), rtol=0, atol=1e-6)


class _ExactMixture(pyro.nn.PyroModule):
    """p(c | x), then p(z | x, c)."""

    def __init__(self, model):
        super().__init__()
        self._model = (model,)

    def forward(self, x):
        (model,) = self._model
        posterior = model.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.OneHotCategorical(probs=model.responsibilities(x)))  # [..., N, C]
            loc = (c.unsqueeze(-1) * posterior.mean).sum(-2)
            scale_tril = (c[..., None, None] * posterior.scale_tril).sum(-3)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def test_responsibilities_and_posteriors_are_exact(float64):
    model = _general(MixtureOfPPCA(5, 2, 3))
    x = torch.randn(10, 5)
    with torch.no_grad():
        log_w = log_weights(model, _ExactMixture(model), x, particles=20)
        torch.testing.assert_close(log_w, model.log_evidence(x).expand(20, 10), rtol=0, atol=1e-9)


def test_em_of_the_mixture_ends_at_a_maximum(float64):
    x = _latent_class_data()
    model = MixtureOfPPCA(3, 1, 2).fit_em(x, tolerance=1e-13)
    best = model.log_evidence(x).mean()
    for name, gradient in zip(
        [name for name, _ in model.named_parameters()],
        torch.autograd.grad(best, list(model.parameters())),
        strict=True,
    ):
        assert gradient.abs().max() < 1e-5, name
    assert best > MixtureOfPPCA(3, 1, 1).fit_em(x).log_evidence(x).mean() + 0.1
    right = model.responsibilities(x).argmax(-1).reshape(2, -1).double().mean(1)
    assert (right[0] - right[1]).abs() > 0.95


def test_em_of_the_mixture_never_goes_down(float64):
    x = _latent_class_data()
    model = MixtureOfPPCA(3, 1, 4)
    found = []
    for _ in range(30):
        model.fit_em(x, iterations=1, seed=None)
        found.append(model.log_evidence(x).mean().item())
    assert all(b >= a - 1e-12 for a, b in pairwise(found))


def test_svi_that_sums_over_the_component_stays_at_the_maximum_and_finds_it(float64):
    """With the exact posterior of c and z, enumerated, the loss is minus log p(x), and SVI minimises it."""
    x = _latent_class_data(100)
    best = MixtureOfPPCA(3, 1, 2).fit_em(x, tolerance=1e-12)
    model = MixtureOfPPCA(3, 1, 2).fit_em(x, iterations=0)
    guide = config_enumerate(_ExactMixture(model))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert elbo.loss(model, guide, x) == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-6)
    svi = SVI(model, guide, Adam({"lr": 2e-2}), elbo)
    for _ in range(400):
        svi.step(x)
    assert -1e-3 < (model.log_evidence(x).mean() - best.log_evidence(x).mean()).item() < 1e-8


def test_the_component_is_enumerated_in_the_model_or_in_an_amortized_guide(float64):
    x = _latent_class_data(20)
    model = MixtureOfPPCA(3, 1, 2)
    families = {"c": OneHotCategorical(2, 16), "z": FullCovariance(1, 16 + 2)}
    both = config_enumerate(Amortized(mlp(3, [16]), families))
    z_alone = Amortized(mlp(3, [16]), {"z": FullCovariance(1, 16)})
    exact = model.log_evidence(x).sum().item()
    for p, q in ((model, both), (config_enumerate(model), z_alone)):
        svi = SVI(
            p, q, Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1, num_particles=20, vectorize_particles=True)
        )
        assert svi.evaluate_loss(x) > -exact
        assert svi.step(x) > -exact


def test_what_the_mixture_cannot_fit_is_named():
    model = MixtureOfPPCA(4, 2, 3)
    with pytest.raises(ValueError, match="one data point for each of the 3 components"):
        model.fit_em(torch.randn(2, 4))
    with pytest.raises(ValueError, match="all data points are identical"):
        model.fit_em(torch.ones(10, 4))
    with pytest.raises(ValueError, match="components=0"):
        MixtureOfPPCA(4, 2, 0)


@pytest.mark.parametrize("model_class", [FactorAnalysis, LinearGaussian, PPCA])
def test_features_of_a_large_mean_are_fitted_as_those_of_none(model_class, float64):
    """Deviations of 1 about 2^30: such features were once rejected as constant."""
    x = (torch.randn(400, 2) @ torch.randn(2, 5) + torch.randn(400, 5)).mul(2**10).round() / 2**10  # exact in both
    far = x + torch.tensor([2.0**30, -(2.0**30), 0.0, 2.0**20, 2.0**30])
    start = model_class(5, 2)
    here, there = (copy.deepcopy(start) for _ in range(2))
    fit = "fit_em" if hasattr(start, "fit_em") else "fit_closed_form"
    getattr(here, fit)(x)
    getattr(there, fit)(far)
    torch.testing.assert_close(here.log_evidence(x), there.log_evidence(far), rtol=1e-6, atol=1e-5)
