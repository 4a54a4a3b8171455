"""The likelihood of what was observed: against marginals computed without the missing values."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from jensen import families
from jensen.families import FullCovariance, Gaussian, LowRank, MeanField, Mixture
from jensen.guides import Amortized, ExactPosterior, PriorGuide, amortize
from jensen.inference import (
    ELBO,
    IWAE,
    Renyi,
    ais,
    calibrate,
    evaluate,
    exact_log_evidence,
    fit,
    gaps,
    log_weights,
    simulate,
)
from jensen.missing import Observed, as_holes, draw_missing, has_holes, observed_only
from jensen.models import PPCA, VAE, Banana, BinaryLatentVAE, ConditionalVAE, Ring
from jensen.module import UniqueModule
from jensen.networks import Conditioned, mlp

NAN = math.nan
INDEPENDENT = {
    "Gaussian": lambda: Gaussian(4, 3, scale="context"),
    "Gaussian image": lambda: Gaussian((1, 2, 2), 3, scale="diagonal"),
    "MeanField": lambda: MeanField(4, 3),
    "StudentT": lambda: families.StudentT(4, 3),
    "Laplace": lambda: families.Laplace(4, 3),
    "ContinuousBernoulli": lambda: families.ContinuousBernoulli(4, 3),
    "Bernoulli": lambda: families.Bernoulli(4, 3),
    "BinaryVector": lambda: families.BinaryVector(4, 3),
    "Poisson": lambda: families.Poisson(4, 3),
    "NegativeBinomial": lambda: families.NegativeBinomial(4, 3),
    "Binomial": lambda: families.Binomial(4, 3, trials=5),
    "Categorical": lambda: families.Categorical(4, 3, levels=5),
    "DiscretizedLogistic": lambda: families.DiscretizedLogistic(4, 3, levels=16),
}
CORRELATED = {
    "FullCovariance": lambda: FullCovariance(4, 3),
    "LowRank": lambda: LowRank(4, 3, rank=2),
    "Mixture": lambda: Mixture(4, 3, components=3),
}


def _made(make):
    """A distribution of a family for six contexts, samples of it, and which of their values are missing."""
    torch.manual_seed(0)
    family = make().double()
    p = family(torch.randn(6, 3, dtype=torch.float64))
    x = p.sample().double()
    missing = torch.rand(x.shape) < 0.5
    missing[0], missing[1] = True, False
    return p, x, missing


@pytest.mark.parametrize("make", INDEPENDENT.values(), ids=INDEPENDENT)
def test_independent_features_score_those_observed(make):
    p, x, missing = _made(make)
    scored = Observed(p).log_prob(x.masked_fill(missing, NAN))
    each = p.base_dist.log_prob(x).masked_fill(missing, 0.0)
    assert torch.equal(scored, each.flatten(1).sum(1))
    assert scored[0] == 0
    assert torch.equal(Observed(p).log_prob(x), p.log_prob(x))


def _gaussian(p):
    return (p.loc, p.covariance_matrix) if hasattr(p, "covariance_matrix") else (p.loc, torch.diag_embed(p.scale**2))


@pytest.mark.parametrize("make", CORRELATED.values(), ids=CORRELATED)
def test_correlated_features_are_marginalized(make):
    p, x, missing = _made(make)
    scored = Observed(p).log_prob(x.masked_fill(missing, NAN))
    assert scored[0] == 0
    loc, covariance = _gaussian(p)
    for n in range(1, 6):
        seen = ~missing[n]
        if isinstance(p, dist.MultivariateNormal) or not hasattr(p, "log_weights"):
            marginal = dist.MultivariateNormal(loc[n][seen], covariance[n][seen][:, seen]).log_prob(x[n][seen])
        else:
            parts = dist.Normal(loc[n][:, seen], p.scale[n][:, seen]).log_prob(x[n][seen]).sum(-1)
            marginal = (p.log_weights[n] + parts).logsumexp(-1)
        torch.testing.assert_close(scored[n], marginal, rtol=1e-12, atol=1e-12)


def test_a_multivariate_t_is_marginalized():
    torch.manual_seed(1)
    root = torch.randn(3, 3, dtype=torch.float64).tril() + 2 * torch.eye(3, dtype=torch.float64)
    df = torch.tensor(4.0, dtype=torch.float64)
    p = dist.MultivariateStudentT(df, torch.zeros(3, dtype=torch.float64), root)
    x = torch.tensor([0.3, NAN, -1.0], dtype=torch.float64)
    keep = torch.tensor([0, 2])
    covariance = (root @ root.T)[keep][:, keep]
    expected = dist.MultivariateStudentT(df, torch.zeros(2, dtype=torch.float64), torch.linalg.cholesky(covariance))
    torch.testing.assert_close(Observed(p).log_prob(x), expected.log_prob(x[keep]))
    torch.testing.assert_close(Observed(p).log_prob(x.nan_to_num(0.5)), p.log_prob(x.nan_to_num(0.5)))


SHAPED = {
    "positive": dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
    "affine": dist.TransformedDistribution(
        dist.Exponential(torch.ones(3)), [dist.transforms.AffineTransform(5.0, 2.0)]
    ).to_event(1),
    "uniform": dist.Uniform(torch.full((3,), 2.0), 3.0).to_event(1),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 3), torch.ones(2, 3)).to_event(1)
    ),
    "masked": dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, True, False])).to_event(1),
    "one number": dist.Gamma(2.0, 1.0).expand([3]),
}


@pytest.mark.parametrize("p", SHAPED.values(), ids=SHAPED)
def test_missing_values_lie_in_no_support(p):
    torch.manual_seed(2)
    x = p.sample()
    holed = torch.where(torch.tensor([False, True, False]), NAN, x)
    value = Observed(p).log_prob(holed)
    assert bool(value.isfinite().all())
    other = torch.where(torch.tensor([False, True, False]), p.sample(), x)
    torch.testing.assert_close(value, Observed(p).log_prob(torch.where(holed.isnan(), NAN, other)))
    assert torch.equal(value, Observed(p).log_prob(x)) == (p is SHAPED["uniform"])


def test_dependent_features_of_unknown_marginal_are_refused_in_part_only():
    p = dist.OneHotCategorical(torch.ones(3) / 3)
    whole = torch.tensor([[1.0, 0.0, 0.0], [NAN, NAN, NAN]])
    torch.testing.assert_close(Observed(p.expand([2])).log_prob(whole), torch.tensor([-math.log(3), 0.0]))
    with pytest.raises(NotImplementedError, match="OneHotCategorical is the distribution of dependent features"):
        Observed(p).log_prob(torch.tensor([NAN, 0.0, 1.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", p.expand([len(x)]), obs=x)

    with pytest.raises(NotImplementedError, match=r"^site 'x': OneHotCategorical is the distribution of dependent"):
        log_weights(observed_only(model), _guide_of_z, torch.tensor([[NAN, 0.0, 1.0]]))


def test_completed_values_are_conditional_means_and_samples():
    p, x, missing = _made(CORRELATED["FullCovariance"])
    holed = x.masked_fill(missing, NAN)
    loc, covariance = _gaussian(p)
    made, drawn = Observed(p).completed(holed), Observed(p.expand([20_000, 6])).completed(holed, "sample")
    each = Observed(p).log_prob_each(holed, x)
    for n in range(6):
        out, seen = missing[n], ~missing[n]
        gain = covariance[n][out][:, seen] @ torch.linalg.inv(covariance[n][seen][:, seen])
        mean = loc[n][out] + gain @ (x[n] - loc[n])[seen]
        left = covariance[n][out][:, out] - gain @ covariance[n][seen][:, out]
        torch.testing.assert_close(made[n][out], mean)
        assert torch.equal(made[n][seen], x[n][seen])
        assert torch.equal(drawn[:, n, seen], x[n][seen].expand(20_000, -1))
        error = (left.diagonal() / 20_000).sqrt()
        assert bool(((drawn[:, n, out].mean(0) - mean).abs() <= 4 * error).all())
        torch.testing.assert_close(drawn[:, n, out].T.cov().reshape(left.shape), left, rtol=0.06, atol=0.02)
        alone = dist.Normal(mean, left.diagonal().sqrt()).log_prob(x[n][out])
        torch.testing.assert_close(each[n][out], alone)
        assert not each[n][seen].any()


@pytest.mark.parametrize("make", [INDEPENDENT["Poisson"], CORRELATED["Mixture"], CORRELATED["LowRank"]])
def test_single_densities_and_samples_agree_with_the_joint_marginal(make):
    p, x, missing = _made(make)
    missing[:, 0], missing[:, 1:] = True, False
    holed = x.masked_fill(missing, NAN)
    each = Observed(p).log_prob_each(holed, x)
    torch.testing.assert_close(each[:, 0], Observed(p).log_prob(x) - Observed(p).log_prob(holed))
    drawn = Observed(p.expand([20_000, 6])).completed(holed, "sample")
    mean, error = Observed(p).completed(holed)[:, 0], drawn[..., 0].std(0) / math.sqrt(20_000)
    assert bool(((drawn[..., 0].mean(0) - mean).abs() <= 4 * error).all())


def test_a_mask_becomes_nan():
    x, mask = torch.tensor([[1, 2**26 + 1]]), torch.tensor([[True, False]])
    made = as_holes(x, mask)
    assert made.dtype == torch.float64
    assert has_holes(made)
    assert made[0, 1] == 2**26 + 1
    assert not has_holes(x)
    with pytest.raises(ValueError, match=r"missing must have the shape of the data, \[1, 2\], but got a mask of shape"):
        as_holes(x, mask[0])
    with pytest.raises(ValueError, match="Boolean mask, True where x is missing"):
        as_holes(x, mask.int())


def _ppca(features=5, latent=2, n=40, rate=0.4):
    torch.manual_seed(3)
    model = PPCA(features, latent).double()
    x = model(n=n).detach()
    x[torch.rand(x.shape) < rate] = NAN
    x[0], x[1] = NAN, x[1].nan_to_num(0.0)
    return model, x


def _marginals(model, x):
    """Log p(x_obs) of PPCA, row by row, from its covariance."""
    covariance = model.weight @ model.weight.T + model.noise.square() * torch.eye(len(model.mean)).double()
    made = []
    for row in x:
        seen = ~row.isnan()
        p = dist.MultivariateNormal(model.mean[seen], covariance[seen][:, seen]) if seen.any() else None
        made.append(row.new_zeros(()) if p is None else p.log_prob(row[seen]))
    return torch.stack(made).detach()


class _Reader(nn.Module):
    """An encoder that reads missing values."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, *rest):
        return self.network(torch.cat([x.nan_to_num(0.0), (~x.isnan()).to(x.dtype)], -1), *rest)


def test_importance_weights_are_those_of_the_observed_values():
    model, x = _ppca()
    exact = _marginals(model, x)
    found = evaluate(model, PriorGuide(model), x, 4000, refine=False, seed=0, progress=False)
    z = (found.log_evidence - exact) / found.standard_error.clamp_min(1e-9)
    assert float(found.log_evidence[0]) == 0
    assert float(z[1:].abs().max()) < 4.5
    assert found.features == float((~x.isnan()).sum()) / len(x)
    bits = -float(found.best.mean()) / (found.features * math.log(2))
    assert found.bits_per_dimension() == pytest.approx(bits)


def test_a_complete_mask_changes_no_number():
    model, x = _ppca(rate=0.0)
    x[0] = 1.0
    model, x = model.float(), x.float()
    guide = PriorGuide(model)
    plain = evaluate(model, guide, x, 50, seed=0, progress=False)
    masked = evaluate(model, guide, x, 50, seed=0, missing=torch.zeros_like(x, dtype=torch.bool), progress=False)
    assert torch.equal(plain.log_evidence, masked.log_evidence)
    assert torch.equal(plain.elbo, masked.elbo)
    torch.manual_seed(0)
    plain = pyro.poutine.trace(model).get_trace(x).log_prob_sum()
    torch.manual_seed(0)
    with pyro.poutine.trace() as seen:
        observed_only(lambda x: model(x))(x)
    assert torch.equal(plain, seen.trace.log_prob_sum())


def _pairs():
    torch.manual_seed(4)
    model = VAE(mlp(2, [8]), Gaussian(4, 8), 2)
    guide = Amortized(_Reader(mlp(8, [16])), {"z": MeanField(2, 16)})
    x = torch.randn(200, 4) @ torch.randn(4, 4)
    x[torch.rand(x.shape) < 0.4] = NAN
    return model, guide, x


@pytest.mark.parametrize("objective", [None, ELBO(2), IWAE(4), IWAE(4, "dreg"), Renyi(0.5, 4)])
def test_every_objective_trains_on_what_was_observed(objective):
    model, guide, x = _pairs()
    history = fit(model, guide, x, objective, epochs=15, batch_size=50, lr=1e-2, seed=0, compile=False, progress=False)
    assert history.elbo[-1] > history.elbo[0] + 0.5


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_and_eager_runs_agree_where_the_first_batches_are_complete(measured):
    bounds = []
    for compile in (False, True):
        model, guide, x = _pairs()
        x[:150] = x[:150].nan_to_num(0.3)
        if measured:
            found = evaluate(model, guide, x, 30, refine=False, seed=0, compile=compile, progress=False)
            bounds.append([float(found.log_evidence.mean())])
        else:
            history = fit(model, guide, x, epochs=3, batch_size=20, seed=0, compile=compile, progress=False)
            bounds.append(history.elbo)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)


def test_plain_pyro_trains_on_missing_values():
    model, guide, x = _pairs()
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_refined_evidence_and_chains_condition_on_what_was_observed():
    model, x = _ppca(n=12)
    exact = _marginals(model, x)
    found = evaluate(model, PriorGuide(model), x, 1000, refine=True, seed=0, progress=False)
    assert found.method == "refined"
    far = (found.log_evidence - exact).abs() / (found.standard_error + 1e-6)
    assert float(far[1:].max()) < 5
    annealed = ais(model, None, x, chains=8, temperatures=60, seed=0, progress=False)
    z = (annealed.log_evidence - exact) / annealed.standard_error.clamp_min(1e-6)
    assert float(z[1:].abs().max()) < 5


def test_gaps_of_a_guide_that_reads_missing_values():
    model, guide, x = _pairs()
    fit(model, guide, x, epochs=20, batch_size=50, lr=1e-2, seed=0, progress=False)
    found = gaps(model, guide, x[:8], seed=0, progress=False)
    assert bool(found.amortization.isfinite().all())
    assert float(found.amortization.mean()) > -0.05


def _foreign(x, y=None):
    """A program that does not know of missing values, with two kinds of observations."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).expand([*z.shape, 3]).to_event(1), obs=x)


def _foreign_guide(x, y=None):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x.nan_to_num(0.0).sum(-1), 1.0))


@pytest.mark.parametrize("how", ["nan", "mask"])
def test_any_program_scores_what_was_observed(how):
    torch.manual_seed(5)
    pyro.clear_param_store()
    x = torch.randn(30, 1) + torch.randn(30, 3)
    missing = torch.rand(x.shape) < 0.4
    holed = x.masked_fill(missing, NAN)
    data, given = (holed, "nan") if how == "nan" else (x, missing)
    with pytest.raises(ValueError, match="give missing='nan' to fit and evaluate"):
        evaluate(_foreign, _foreign_guide, holed, 10, progress=False)
    found = evaluate(_foreign, _foreign_guide, data, 3000, seed=0, missing=given, refine=False, progress=False)
    for n in range(30):
        seen = ~missing[n]
        covariance = 1.0 + torch.eye(3)
        p = dist.MultivariateNormal(torch.zeros(int(seen.sum())), covariance[seen][:, seen]) if seen.any() else None
        exact = 0.0 if p is None else float(p.log_prob(x[n][seen]))
        assert abs(float(found.log_evidence[n]) - exact) < 5 * float(found.standard_error[n]) + 1e-3
    history = fit(_foreign, _foreign_guide, data, epochs=40, batch_size=10, lr=0.05, missing=given, progress=False)
    assert history.elbo[-1] > history.elbo[0]
    assert float(pyro.param("loc").detach()) != pytest.approx(0.1, abs=0.01)


def test_a_guide_that_does_not_read_missing_values_is_named():
    model, _, x = _pairs()
    guide = amortize(model, mlp(4, [16]), MeanField, context=16)
    with pytest.raises(ValueError, match=r"data\[0\] holds .* NaN, .* such as an encoder in jensen.networks.Masked"):
        fit(model, guide, x, epochs=1, progress=False)


def test_infinite_values_and_missing_labels_are_refused():
    model, guide, x = _pairs()
    x[3, 2] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(model, guide, x, epochs=1, progress=False)
    conditional = ConditionalVAE(mlp(2 + 3, [8]), Gaussian(4, 8), 2, covariates=3)
    own = Amortized(_Reader(Conditioned(mlp(8 + 3, [16]), 3)), {"z": MeanField(2, 16)})
    x, y = _pairs()[2], torch.randint(0, 3, (200,))
    assert math.isfinite(fit(conditional, own, (x, y), epochs=1, progress=False).elbo[0])
    with pytest.raises(ValueError, match=r"data\[1\] holds 1 NaN, the first at index \[4\]"):
        fit(conditional, own, (x.nan_to_num(0.0), y.float().index_fill(0, torch.tensor(4), NAN)), epochs=1)
    with pytest.raises(ValueError, match=r"data\[0\] holds \d+ NaN, .*, and data\[1\] holds 1 NaN, .* \(covariates,"):
        fit(conditional, own, (x, y.float().index_fill(0, torch.tensor(4), NAN)), missing="nan", epochs=1)


def test_binarizing_batches_keeps_what_is_missing():
    torch.manual_seed(6)
    model = VAE(mlp(2, [8]), families.Bernoulli(4, 8), 2)
    guide = Amortized(_Reader(mlp(8, [16])), {"z": MeanField(2, 16)})
    x = torch.rand(40, 4).masked_fill(torch.rand(40, 4) < 0.3, NAN)
    found = evaluate(model, guide, x, 20, batch_transform=torch.bernoulli, refine=False, seed=0, progress=False)
    assert found.features == float((~x.isnan()).sum()) / 40
    assert found.baseline_kind.startswith("Bernoulli")
    half = torch.where(x.isnan(), NAN, (x > 0.5).float())
    ones = (half.nan_to_num(0.0).sum(0) + 0.5) / ((~half.isnan()).sum(0) + 1)
    expected = dist.Bernoulli(ones).log_prob(half.nan_to_num(0.0)).masked_fill(half.isnan(), 0.0).sum(-1)
    found = evaluate(model, guide, half, 20, refine=False, seed=0, progress=False)
    torch.testing.assert_close(found.baseline.float(), expected)


def test_log_weights_with_an_exact_guide_are_constant():
    model, x = _ppca()
    weights = log_weights(model, ExactPosterior(model), x, particles=4)
    torch.testing.assert_close(weights, _marginals(model, x).expand(4, -1), rtol=1e-9, atol=1e-9)


def test_sums_and_integrals_over_latents_condition_on_what_was_observed():
    torch.manual_seed(7)
    binary = BinaryLatentVAE(mlp(3, [8]), families.Bernoulli(4, 8), 3)
    x = torch.tensor([[1.0, NAN, 0.0, NAN], [NAN, NAN, NAN, NAN]])
    filled = [torch.tensor([[1.0, a, 0.0, b]]) for a in (0.0, 1.0) for b in (0.0, 1.0)]
    expected = torch.stack([binary.log_evidence(row) for row in filled]).logsumexp(0)
    torch.testing.assert_close(binary.log_evidence(x), torch.cat([expected, torch.zeros(1)]), rtol=1e-5, atol=1e-5)
    smooth = VAE(mlp(1, [8]), Gaussian(2, 8, scale=0.7), 1)
    holed = torch.tensor([[0.4, NAN]])
    z = torch.linspace(-9, 9, 4001).unsqueeze(-1)
    density = smooth.likelihood(smooth.decoder(z)).base_dist.log_prob(torch.tensor(0.4))[:, 0]
    integral = (density + dist.Normal(0.0, 1.0).log_prob(z[:, 0])).logsumexp(0) + math.log(18 / 4000)
    found = exact_log_evidence(smooth, holed, tolerance=1e-4, progress=False)
    assert float(found.log_evidence) == pytest.approx(float(integral.detach()), abs=1e-4)
    for curved in (Ring(latent=2, noise=0.5), Banana(curvature=0.5, noise=0.5)):
        one = curved.log_evidence(torch.tensor([[1.0], [NAN]]))
        assert torch.equal(one, torch.cat([curved.log_evidence(torch.tensor([[1.0]])), torch.zeros(1)]))


def test_a_model_draws_what_is_missing_on_request_and_scores_the_same():
    model, x = _ppca()
    torch.manual_seed(8)
    with pyro.poutine.trace() as plain:
        assert torch.equal(model(x).isnan(), x.isnan())
    torch.manual_seed(8)
    with pyro.poutine.trace() as drawn:
        made = draw_missing(model)(x).detach()
    assert torch.equal(plain.trace.log_prob_sum(), drawn.trace.log_prob_sum())
    assert torch.equal(made[~x.isnan()], x[~x.isnan()])
    z = drawn.trace.nodes["z"]["value"]
    noise = ((made - (model.mean + z @ model.weight.T))[x.isnan()] / model.noise).detach()
    assert abs(float(noise.mean())) < 4 / math.sqrt(len(noise))
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * len(noise))


def _centred(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x - x.mean(0))


def _logged(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x.log())


def _guide_of_z(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(("model", "hole"), [(_centred, True), (_logged, False)])
def test_values_that_the_model_makes_nan_are_not_missing(model, hole):
    torch.manual_seed(7)
    x = torch.randn(6, 3)
    if hole:
        x[0, 0] = NAN
    with pytest.raises(ValueError, match=r"observes \d+ NaN at site 'x', but the data hold [01]: it computes with NaN"):
        evaluate(model, _guide_of_z, x, 10, missing="nan", progress=False)
    with pytest.raises(ValueError, match=r"observes \d+ NaN at site 'x'"):
        exact_log_evidence(observed_only(model), x, method="quadrature", progress=False)


def test_a_support_that_moves_leaves_out_what_is_missing():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(0.0, z.exp()[..., None] * torch.ones(2)).to_event(1), obs=x)

    x = torch.tensor([[1.0, NAN], [NAN, NAN], [0.5, 2.0]])
    found = evaluate(model, _guide_of_z, x, 20_000, missing="nan", refine=False, seed=0, progress=False)
    z = torch.linspace(-8.0, 8.0, 100_001, dtype=torch.float64)
    prior = dist.Normal(0.0, 1.0).log_prob(z) + math.log(16.0 / 100_000)
    for row, value, error in zip(x, found.log_evidence, found.standard_error, strict=True):
        seen = row[~row.isnan()]
        inside = (z.exp() > seen.max()) if len(seen) else torch.ones_like(z, dtype=torch.bool)
        exact = (prior - len(seen) * z)[inside].logsumexp(0)
        assert abs(float(value - exact)) < 5 * float(error) + 1e-3


def test_a_model_that_holds_its_data_is_traced_with_its_missing_values():
    x = torch.tensor([0.5, NAN, 1.0])

    def model():
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    how = {"missing": "nan", "refine": False, "seed": 0, "progress": False}
    eager = evaluate(model, guide, (), 100, compile=False, **how)
    torch.testing.assert_close(evaluate(model, guide, (), 100, compile=True, **how).log_evidence, eager.log_evidence)
    assert eager.log_evidence[1] == 0
    with pytest.raises(ValueError, match=r"missing is a mask of the first tensor of the data, but data is \(\)"):
        evaluate(model, guide, (), 10, missing=x.isnan(), progress=False)


def test_matrices_may_be_missing_as_a_whole_and_components_be_of_pytorch():
    torch.manual_seed(8)
    p = dist.LKJCholesky(3, torch.tensor(2.0)).expand([2])
    x = p.sample()
    assert Observed(p).log_prob(x.index_fill(0, torch.tensor(1), NAN)).tolist() == [float(p.log_prob(x)[0]), 0.0]
    normal = torch.distributions.Normal(torch.randn(2, 3), torch.ones(2, 3))
    mixture = dist.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7])), torch.distributions.Independent(normal, 1)
    )
    x = torch.tensor([0.3, NAN, -1.0])
    parts = normal.log_prob(x.nan_to_num(0.0))[:, [0, 2]].sum(-1)
    expected = (torch.tensor([0.3, 0.7]).log() + parts).logsumexp(0)
    torch.testing.assert_close(Observed(mixture).log_prob(x), expected)


def test_the_mean_of_categories_is_that_of_their_numbers():
    p = Observed(dist.Categorical(torch.tensor([0.2, 0.3, 0.5])).expand([2]))
    torch.testing.assert_close(p.completed(torch.tensor([NAN, 2.0])), torch.tensor([1.3, 2.0]))
    logit = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [dist.transforms.SigmoidTransform()])
    with pytest.raises(NotImplementedError, match="the mean of TransformedDistribution is not known"):
        Observed(logit).completed(torch.tensor([NAN, 0.5]))


class _Own(UniqueModule):
    """A model of the user's own, which knows its evidence, but does not know of missing values when it runs."""

    def __init__(self):
        super().__init__()
        self.known = PPCA(4, latent=1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = self.known.mean + z @ self.known.weight.T
            pyro.sample("x", dist.Normal(loc, self.known.noise).to_event(1), obs=x)

    def log_evidence(self, x):
        return self.known.log_evidence(x)


def test_a_module_of_the_users_own_is_wrapped_and_keeps_its_exact_evidence():
    torch.manual_seed(9)
    model, x = _Own(), torch.randn(20, 4)
    x[torch.rand(20, 4) < 0.4] = NAN
    found = evaluate(model, PriorGuide(model.known), x, 500, missing="nan", seed=0, progress=False)
    torch.testing.assert_close(found.exact, model.log_evidence(x).double().detach())
    assert float((found.log_evidence - found.exact).abs().max()) < 0.2


@pytest.mark.slow
def test_a_module_that_observes_in_part_is_compiled_as_it_is():
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    class Encoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x.nan_to_num(0.0)), 1.0).to_event(1))

    torch.manual_seed(9)
    x = torch.randn(40, 3).masked_fill(torch.rand(40, 3) < 0.3, NAN)
    found = []
    for compile in (False, True):
        torch.manual_seed(9)
        model, guide = Decoder(), Encoder()
        history = fit(model, guide, x, missing="nan", epochs=3, batch_size=20, compile=compile, seed=0, progress=False)
        assert history.compiled == compile
        found.append(history.elbo)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_sampled_data_miss_what_their_example_misses():
    torch.manual_seed(10)
    model, x = _ppca(n=30)
    _latents, made = simulate(model, 60, data=x)
    assert torch.equal(made.isnan(), x.isnan().repeat(2, 1))
    weights = log_weights(model, ExactPosterior(model), made, particles=2)
    torch.testing.assert_close(weights[0], _marginals(model, made), rtol=1e-9, atol=1e-9)
    found = calibrate(model, ExactPosterior(model), 200, draws=19, data=x, seed=0, progress=False)
    assert float(found.p_values.min()) > 1e-3
