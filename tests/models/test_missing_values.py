"""Exact members on data with missing values, against the marginal Gaussian of what was observed in each row."""

from itertools import pairwise

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from jensen.guides import ExactPosterior
from jensen.models import PPCA, FactorAnalysis, LinearGaussian, LinearGaussianSSM, MixtureOfPPCA, conditioning
from jensen.models.incomplete import climb

X, D, C = 6, 2, 3
LINEAR = {
    "PPCA": lambda: PPCA(X, D, prior_scale=1.7),
    "FactorAnalysis": lambda: FactorAnalysis(X, D),
    "LinearGaussian": lambda: LinearGaussian(X, D),
}
ALL = {**LINEAR, "MixtureOfPPCA": lambda: MixtureOfPPCA(X, D, C)}
each_linear = pytest.mark.parametrize("make", LINEAR.values(), ids=list(LINEAR))
each = pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))
each_rate = pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])


def _general(model):
    """The model at generic parameters, none zero or one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


def _holes(x, rate):
    return x.masked_fill(torch.rand(x.shape) < rate, torch.nan)


def _gaussian(model):
    """p(x) of a model with one component."""
    if not isinstance(model, PPCA):
        return model.marginal()
    weight = model.prior_scale * model.weight
    return MultivariateNormal(model.mean, weight @ weight.T + model.noise.square() * torch.eye(len(model.mean)))


def _components(model):
    """p(x | c), and log p(c)."""
    if not isinstance(model, MixtureOfPPCA):
        return [_gaussian(model)], torch.zeros(1)
    covariances = model.weight @ model.weight.mT + model.noise.square()[:, None, None] * torch.eye(X)
    return list(map(MultivariateNormal, model.mean, covariances)), model.logits.log_softmax(-1)


def _marginal(gaussian, seen):
    return MultivariateNormal(gaussian.mean[seen], gaussian.covariance_matrix[seen][:, seen])


def _conditional(gaussian, row):
    """Mean and covariance of what is missing in a row."""
    seen, covariance = ~row.isnan(), gaussian.covariance_matrix
    gain = covariance[~seen][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
    mean = gaussian.mean[~seen] + gain @ (row[seen] - gaussian.mean[seen])
    return mean, covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]


def _close(got, expected, atol=1e-9):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@each
@each_rate
def test_evidence_is_the_marginal_density_of_what_was_observed(make, rate, float64):
    model, x = _general(make()), _holes(2 * torch.randn(40, X) + 1, rate)
    components, log_shares = _components(model)
    with torch.no_grad():
        expected = [
            torch.stack([_marginal(c, seen).log_prob(row[seen]) for c in components]).add(log_shares).logsumexp(0)
            for row in x
            if (seen := ~row.isnan()).any()
        ]
        some = ~x.isnan().all(1)
        _close(model.log_evidence(x)[some], torch.stack(expected))
        _close(model.log_evidence(x)[~some], torch.zeros(int((~some).sum())))


@each_linear
@each_rate
def test_posterior_and_conditional_are_those_of_the_dense_gaussian(make, rate, float64):
    model, x = _general(make()), _holes(2 * torch.randn(40, X) + 1, rate)
    scale = getattr(model, "prior_scale", 1.0)
    gaussian, weight = _gaussian(model), scale**2 * model.weight
    with torch.no_grad():
        posterior = model.posterior(x)
        mean, variance = model.completed(x)
        for n, row in enumerate(x):
            seen = ~row.isnan()
            gain = weight[seen].T @ torch.linalg.inv(gaussian.covariance_matrix[seen][:, seen])
            _close(posterior.mean[n], gain @ (row - gaussian.mean)[seen])
            _close(posterior.covariance_matrix[n], scale**2 * torch.eye(D) - gain @ weight[seen])
            missing, spread = _conditional(gaussian, row)
            _close(mean[n, ~seen], missing)
            _close(variance[n, ~seen], spread.diagonal())
            assert torch.equal(mean[n, seen], row[seen])
            assert (variance[n, seen] == 0).all()


@each_rate
def test_the_conditional_of_a_mixture_weights_its_components_by_what_was_observed(rate, float64):
    model, x = _general(MixtureOfPPCA(X, D, C)), _holes(2 * torch.randn(30, X) + 1, rate)
    components, log_shares = _components(model)
    with torch.no_grad():
        mean, variance = model.completed(x)
        for n, row in enumerate(x):
            seen = ~row.isnan()
            log_p = [_marginal(c, seen).log_prob(row[seen]) if seen.any() else torch.tensor(0.0) for c in components]
            shares = (torch.stack(log_p) + log_shares).softmax(0)
            parts = [_conditional(c, row) for c in components]
            expected = sum(r * m for r, (m, _) in zip(shares, parts, strict=True))
            second = sum(r * (s.diagonal() + m**2) for r, (m, s) in zip(shares, parts, strict=True))
            _close(mean[n, ~seen], expected)
            _close(variance[n, ~seen], second - expected**2)
            assert torch.equal(mean[n, seen], row[seen])


@each
def test_a_row_without_values_has_the_prior_as_posterior_and_full_rows_are_as_without_holes(make, float64):
    model, x = _general(make()), torch.randn(5, X)
    with torch.no_grad():
        both = torch.cat([x, torch.full((1, X), torch.nan)])
        posterior = model.posterior(both)
        scale = getattr(model, "prior_scale", 1.0)
        assert (posterior.mean[-1] == 0).all()
        _close(posterior.covariance_matrix[-1], (scale**2 * torch.eye(D)).expand(posterior.covariance_matrix.shape[1:]))
        assert model.log_evidence(both)[-1].abs() < 1e-12
        _close(model.log_evidence(both)[:-1], model.log_evidence(x))
        _close(posterior.mean[:-1], model.posterior(x).mean)
        _close(model.completed(both)[1][-1], _variance(model))


def _variance(model):
    components, log_shares = _components(model)
    shares = log_shares.exp()
    mean = sum(r * c.mean for r, c in zip(shares, components, strict=True))
    return sum(r * (c.variance + c.mean**2) for r, c in zip(shares, components, strict=True)) - mean**2


@each
def test_the_gradient_of_the_evidence_is_that_of_the_marginal_densities(make, float64):
    model, x = _general(make()), _holes(torch.randn(10, X), 0.5)
    ours = torch.autograd.grad(model.log_evidence(x).sum(), list(model.parameters()))
    components, log_shares = _components(model)
    total = sum(
        torch.stack([_marginal(c, seen).log_prob(row[seen]) for c in components]).add(log_shares).logsumexp(0)
        for row in x
        if (seen := ~row.isnan()).any()
    )
    for one, two in zip(ours, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, two)


@each
def test_blocks_of_rows_give_what_one_block_gives(make, float64, monkeypatch):
    model, x = _general(make()), _holes(torch.randn(50, X), 0.4)
    with torch.no_grad():
        whole = [model.log_evidence(x), model.posterior(x).mean, *model.completed(x)]
        monkeypatch.setattr(conditioning, "_BLOCK", 100)
        parts = [model.log_evidence(x), model.posterior(x).mean, *model.completed(x)]
        for one, two in zip(whole, parts, strict=True):
            _close(one, two, atol=1e-12)


@each_linear
def test_in_float32_the_evidence_keeps_its_digits(make):
    model = make().double()
    with torch.no_grad():
        getattr(model, "log_scale", getattr(model, "log_noise", None)).fill_(-6.0)
        x = _holes(model(n=50), 0.3)
        exact = model.log_evidence(x)
        assert (model.float().log_evidence(x.float()) - exact).abs().max() < 2e-2


@each_linear
def test_the_exact_posterior_as_guide_samples_from_it(make, float64):
    """Then log p(x_o, z) - log q(z | x_o) is log p(x_o) at every z."""
    model, x = _general(make()), _holes(torch.randn(20, X), 0.5)
    guide = ExactPosterior(model)
    with torch.no_grad():
        z = guide(x)
        weight, scale = model.weight, getattr(model, "prior_scale", 1.0)
        noise = model.noise.square() * torch.eye(X) if hasattr(model, "noise") else model.covariance
        for n, row in enumerate(x):
            seen = ~row.isnan()
            log_prior = torch.distributions.Normal(0.0, scale).log_prob(z[n]).sum()
            likelihood = MultivariateNormal((model.mean + weight @ z[n]), noise)
            log_p = log_prior + (_marginal(likelihood, seen).log_prob(row[seen]) if seen.any() else 0.0)
            _close(log_p - model.posterior(x).log_prob(z)[n], model.log_evidence(x)[n])


def _data(n, noise=0.6, features=X):
    """Data of a PPCA, and its distribution."""
    weight = torch.randn(features, D) * torch.tensor([1.5, 0.8])
    truth = MultivariateNormal(torch.arange(1.0, features + 1), weight @ weight.T + noise**2 * torch.eye(features))
    return truth.sample((n,)), truth


def _mean(model, x):
    return model.log_evidence(x).mean().item()


@each
@each_rate
def test_every_step_of_em_increases_the_evidence(make, rate, float64):
    x = _holes(_data(200)[0], rate)
    start = make()
    found = []
    for iterations in (1, 2, 3, 4, 5, 6, 10, 20):
        torch.manual_seed(1)
        model = make()
        options = {"seed": None} if isinstance(start, MixtureOfPPCA) else {}
        found.append(_mean(model.fit_em(x, iterations=iterations, tolerance=0.0, **options), x))
    assert all(after >= before - 1e-12 for before, after in pairwise(found))
    assert found[-1] > found[0] + 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("name", ["PPCA", "FactorAnalysis"])
def test_em_reaches_the_optimum_of_the_gradient(name, rate, float64):
    x = _holes(_data(5000)[0], rate)
    found = []
    for method in ("fit_em", "fit_gradient"):
        torch.manual_seed(1)
        found.append(_mean(getattr(LINEAR[name](), method)(x), x))
    assert abs(found[0] - found[1]) < 1e-6


@pytest.mark.parametrize("make", [LINEAR["FactorAnalysis"], LINEAR["LinearGaussian"]], ids=["FA", "LinearGaussian"])
def test_the_optimum_does_not_depend_on_the_units(make, float64):
    x = _holes(_data(1000, noise=1.0)[0], 0.2)
    units = torch.tensor([1e-4, 0.1, 1.0, 10.0, 1e3, 1e4])
    found = []
    for method in ("fit_em", "fit_gradient"):
        for scale in (torch.ones(X), units):
            torch.manual_seed(1)
            model = make()
            with torch.no_grad():
                model.weight.mul_(scale.unsqueeze(-1))
                getattr(model, "log_scale", getattr(model, "log_noise", None)).add_(scale.log())
            fitted = getattr(model, method)(x * scale)
            log_units = (~x.isnan()).to(x.dtype) @ scale.log()
            found.append(_mean(fitted, x * scale) + log_units.mean().item())
    assert max(found) - min(found) < 1e-5


def test_the_general_model_reaches_the_best_gaussian(float64):
    """W and Sigma together are any covariance, so at the maximum the gradient by the covariance is zero."""
    x = _holes(_data(500)[0], 0.3)
    model = LinearGaussian(X, D).fit_em(x)
    mean = model.mean.detach().requires_grad_()
    covariance = model.marginal().covariance_matrix.detach().requires_grad_()
    gaussian = MultivariateNormal(mean, covariance)
    log_p = sum(_marginal(gaussian, seen).log_prob(row[seen]) for row in x if (seen := ~row.isnan()).any()) / len(x)
    for gradient in torch.autograd.grad(log_p, [mean, covariance]):
        assert gradient.abs().max() < 1e-5


def test_with_most_values_missing_em_stops_where_the_gradient_vanishes(float64):
    x = _holes(_data(500, features=8)[0], 0.9)
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = PPCA(8, D).fit_em(x, tolerance=1e-14)
        value = model.log_evidence(x).mean()
        for gradient in torch.autograd.grad(value, list(model.parameters())):
            assert gradient.abs().max() < 1e-6
        found.append(value.item())
    torch.manual_seed(4)
    assert abs(_mean(PPCA(8, D).fit_gradient(x), x) - found[-1]) < 0.2


def test_a_fit_without_noise_is_warned_about(float64):
    x = torch.randn(60, D) @ torch.randn(D, X)
    x = _holes(x, 0.2)
    with pytest.warns(UserWarning, match=r"largest without noise.*: use a latent below 2, or more data points"):
        PPCA(X, D).fit_em(x)


def test_a_gradient_that_loses_the_noise_says_so(float64):
    """Whether rounding makes a covariance singular depends on the machine, so here one is, from the first step on."""
    p = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="because the noise became too small: use a smaller latent"):
        climb([p], lambda: [torch.linalg.cholesky(p * torch.eye(2)).sum()], 10)


@pytest.mark.parametrize("mechanism", ["mcar", "mar"])
@pytest.mark.parametrize("name", ["PPCA", "FactorAnalysis"])
def test_em_finds_the_truth_better_than_deletion_and_mean_imputation(name, mechanism, float64):
    """KL of the truth, over five data sets of 10 features, a tenth of whose values are missing.

    Missing at random: all but the first feature are missing with a probability that depends on the first.
    """
    make = {"PPCA": lambda: PPCA(10, D), "FactorAnalysis": lambda: FactorAnalysis(10, D)}[name]
    apart = torch.zeros(3)
    for _ in range(5):
        full, truth = _data(400, noise=1.0, features=10)
        chance = 0.1 if mechanism == "mcar" else 0.22 * (full[:, :1] > full[:, :1].median())
        missing = torch.rand(400, 10) < chance
        missing[:, 0] &= mechanism == "mcar"
        x = full.masked_fill(missing, torch.nan)
        ways = [x, x[~missing.any(1)], torch.where(missing, x.nanmean(0), x)]  # EM, deletion, mean imputation
        with torch.no_grad():
            apart += torch.stack([kl_divergence(truth, _gaussian(make().fit_em(way, tolerance=1e-8))) for way in ways])
    assert apart[0] < apart[1:].min() / 1.2


def test_the_mixture_finds_clusters_through_holes(float64):
    centres = torch.tensor([[0.0] * X, [8.0] * X])
    full = centres[torch.arange(200) % 2] + torch.randn(200, 1) * torch.randn(X) + 0.5 * torch.randn(200, X)
    x = _holes(full, 0.3)
    model = MixtureOfPPCA(X, 1, 2).fit_em(x)
    with torch.no_grad():
        labels = model.responsibilities(x).argmax(-1)
        some = ~x.isnan().all(1)
        agree = (labels == torch.arange(200) % 2)[some].double().mean().item()
        assert max(agree, 1 - agree) > 0.99
        full_model = MixtureOfPPCA(X, 1, 2).fit_em(full)
        assert full_model.log_evidence(full).mean() - model.log_evidence(full).mean() < 0.1


@each
def test_what_cannot_be_fitted_is_named(make):
    model, x = make(), _holes(torch.randn(50, X), 0.2)
    with pytest.raises(ValueError, match=r"cannot be fitted to x\[:, 2\], which has no observed value: remove such"):
        model.fit_em(x.index_fill(1, torch.tensor(2), torch.nan))
    with pytest.raises(ValueError, match=r"to x\[:, 1\] \(and 2 others\), which has no"):
        model.fit_em(x.index_fill(1, torch.tensor([1, 2, 4]), torch.nan))
    x[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"needs finite values \(NaN marks a missing one\), but x\[3, 1\] is inf"):
        model.fit_em(x)


def test_what_has_no_maximum_is_named():
    x = _holes(torch.randn(50, X), 0.2)
    with pytest.raises(ValueError, match=r"no closed form for data with missing values \(NaN\): use fit_em"):
        PPCA(X, D).fit_closed_form(x)
    still = torch.where(x.isnan(), x, 1.0)
    with pytest.raises(ValueError, match="every feature are constant"):
        PPCA(X, D).fit_em(still)
    x[:, 2] = still[:, 2]
    with pytest.raises(ValueError, match=r"x\[:, 2\] is always 1"):
        FactorAnalysis(X, D).fit_em(x)
    with pytest.raises(ValueError, match=r"x\[:, 2\] is always 1"):
        FactorAnalysis(X, D).fit_gradient(x)


T, LENGTHS = 5, torch.tensor([5, 3, 1, 4])


def _sequences(rate):
    model = _general(LinearGaussianSSM(3, D, T))
    with torch.no_grad():
        x = _holes(model(None, LENGTHS, n=4), rate)
    x[0, 1] = torch.nan  # a missing step
    return model, x


def _joint(model):
    """The dense Gaussian of all states and features of a sequence, in this order."""
    prior = model.prior()
    root = torch.eye(T * D)
    for t in range(T):
        rows = slice(t * D, (t + 1) * D)
        root[rows] = 0
        root[rows, rows] = prior.scale_tril[t]
        if t:
            root[rows] += prior.transition[t] @ root[(t - 1) * D : t * D]
    weight = torch.block_diag(*[model.weight] * T)
    states = root @ root.T
    z = prior.mean.flatten()
    mean = torch.cat([z, weight @ z + model.mean.repeat(T)])
    seen = weight @ states @ weight.T + model.noise.square().repeat(T).diag()
    cross = states @ weight.T
    return MultivariateNormal(mean, torch.cat([torch.cat([states, cross], 1), torch.cat([cross.T, seen], 1)]))


@each_rate
@pytest.mark.parametrize("ragged", [True, False])
def test_sequences_with_holes_are_those_of_the_dense_joint_gaussian(rate, ragged, float64):
    model, x = _sequences(rate)
    data = (x, LENGTHS) if ragged else (x,)
    with torch.no_grad():
        joint = _joint(model)
        posterior, log_p = model.posterior(*data), model.log_evidence(*data)
        mean, variance = model.completed(*data)
        for n, sequence in enumerate(x):
            row = sequence.clone()
            if ragged:
                row[LENGTHS[n] :] = torch.nan
            whole = torch.cat([torch.full((T * D,), torch.nan), row.flatten()])
            seen = ~whole.isnan()
            _close(log_p[n], _marginal(joint, seen).log_prob(whole[seen]) if seen.any() else torch.tensor(0.0))
            expected, covariance = torch.full_like(whole, torch.nan), torch.zeros(len(whole))
            expected[~seen], spread = _conditional(joint, whole)
            covariance[~seen] = spread.diagonal()
            _close(posterior.mean[n].flatten(), expected[: T * D])
            _close(posterior.variance[n].flatten(), covariance[: T * D])
            within = int(LENGTHS[n]) if ragged else T
            expected = torch.where(row.isnan(), expected[T * D :].reshape(T, 3), row)
            _close(mean[n, :within], expected[:within])
            _close(variance[n, :within], covariance[T * D :].reshape(T, 3)[:within])
            assert (mean[n, within:] == 0).all()
            assert (variance[n, within:] == 0).all()


def test_beyond_a_length_nan_and_numbers_are_alike(float64):
    model, x = _sequences(0.2)
    other = x.clone()
    other[torch.arange(T) >= LENGTHS.unsqueeze(-1)] = torch.nan
    with torch.no_grad():
        assert torch.equal(model.log_evidence(x, LENGTHS), model.log_evidence(other, LENGTHS))
        for one, two in zip(model.completed(x, LENGTHS), model.completed(other, LENGTHS), strict=True):
            assert torch.equal(one, two)


def test_the_gradient_of_the_evidence_of_sequences_is_finite(float64):
    model, x = _sequences(0.5)
    model.log_evidence(x, LENGTHS).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
