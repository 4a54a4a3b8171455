"""Every rewritten sampler against its distribution: under torch.vmap, and in a graph traced from it.

Particles alternate between two parameters, so that a sample of another particle is detected. Continuous distributions
are compared with their distribution function (Kolmogorov-Smirnov, SciPy's if available), counts with their
probabilities (chi-square), and the others with single samples of the same distribution, by coordinate and by products
of neighbouring coordinates.
"""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.ops.special import safe_log
from scipy import stats
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from jensen.kernel.vectorized import NotVectorized, under_vmap

K = 2400
ALPHA = 1e-4
SETTINGS = (0.8, 1.6)
TRIL = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
PROBS = torch.tensor([0.2, 0.3, 0.5])
ONES = torch.ones(3)


def vector(*values):
    return torch.stack([torch.as_tensor(value) for value in values])


def flow(transform):
    """A distribution pushed through a transform with fixed weights that are the same for both settings."""
    torch.manual_seed(1)
    built = transform()
    if isinstance(built, nn.Module):
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.4)
        built.eval().requires_grad_(False)
    return lambda s: dist.TransformedDistribution(dist.Normal(torch.zeros(2), s).to_event(1), [built])


EXACT = {  # the distribution of a positive number s, and its law
    "Normal": (lambda s: dist.Normal(s, 2 * s), lambda s: stats.norm(s, 2 * s)),
    "Normal validated": (lambda s: dist.Normal(s, 2 * s, validate_args=True), lambda s: stats.norm(s, 2 * s)),
    "LogNormal": (lambda s: dist.LogNormal(0.3, s), lambda s: stats.lognorm(s, scale=np.exp(0.3))),
    "StudentT": (lambda s: dist.StudentT(3 * s, 1.0, s), lambda s: stats.t(3 * s, 1, s)),
    "Cauchy": (lambda s: dist.Cauchy(1.0, s), lambda s: stats.cauchy(1, s)),
    "HalfCauchy": (lambda s: dist.HalfCauchy(s), lambda s: stats.halfcauchy(0, s)),
    "HalfNormal": (lambda s: dist.HalfNormal(s), lambda s: stats.halfnorm(0, s)),
    "Laplace": (lambda s: dist.Laplace(1.0, s), lambda s: stats.laplace(1, s)),
    "Gumbel": (lambda s: dist.Gumbel(1.0, s), lambda s: stats.gumbel_r(1, s)),
    "Logistic": (lambda s: dist.Logistic(1.0, s), lambda s: stats.logistic(1, s)),
    "Exponential": (lambda s: dist.Exponential(3 * s), lambda s: stats.expon(scale=1 / (3 * s))),
    "Gamma": (lambda s: dist.Gamma(s, 3.0), lambda s: stats.gamma(s, scale=1 / 3)),
    "InverseGamma": (lambda s: dist.InverseGamma(2.0, s), lambda s: stats.invgamma(2, scale=s)),
    "Chi2": (lambda s: dist.Chi2(s), lambda s: stats.chi2(s)),
    "Beta": (lambda s: dist.Beta(s, 2.0), lambda s: stats.beta(s, 2)),
    "Beta, small": (lambda s: dist.Beta(s * 0.1, 0.2), lambda s: stats.beta(s * 0.1, 0.2)),
    "AffineBeta": (lambda s: dist.AffineBeta(s, 2.0, 1.0, 3.0), lambda s: stats.beta(s, 2, 1, 3)),
    "Kumaraswamy": (lambda s: dist.Kumaraswamy(2.0, s), None),
    "Weibull": (lambda s: dist.Weibull(1.0, s), lambda s: stats.weibull_min(s)),
    "Pareto": (lambda s: dist.Pareto(1.0, s), lambda s: stats.pareto(s)),
    "Uniform": (lambda s: dist.Uniform(-1.0, s), lambda s: stats.uniform(-1, s + 1)),
    "ContinuousBernoulli": (lambda s: dist.ContinuousBernoulli(0.3 * s), None),
    "FisherSnedecor": (
        lambda s: torch.distributions.FisherSnedecor(5 * s, torch.tensor(7.0)),
        lambda s: stats.f(5 * s, 7),
    ),
    "AsymmetricLaplace": (
        lambda s: dist.AsymmetricLaplace(0.0, s, 2.0),
        lambda s: stats.laplace_asymmetric(2, scale=s),
    ),
    "SoftLaplace": (lambda s: dist.SoftLaplace(0.0, s), lambda s: stats.hypsecant(scale=s)),
    "SkewLogistic": (lambda s: dist.SkewLogistic(0.0, 1.0, s), lambda s: stats.genlogistic(s)),
    "Folded": (lambda s: dist.FoldedDistribution(dist.Normal(0.5, s)), lambda s: stats.foldnorm(0.5 / s, scale=s)),
}
COUNTS = {
    "Bernoulli": lambda s: dist.Bernoulli(0.4 * s),
    "Bernoulli, logits": lambda s: dist.Bernoulli(logits=s),
    "Binomial": lambda s: dist.Binomial(9, 0.4 * s),
    "ExtendedBinomial": lambda s: dist.ExtendedBinomial(9, 0.4 * s),
    "Geometric": lambda s: dist.Geometric(0.4 * s),
    "Categorical": lambda s: dist.Categorical(vector(0.2, 0.3, s)),
    "Poisson": lambda s: dist.Poisson(3 * s),
    "NegativeBinomial": lambda s: dist.NegativeBinomial(4, 0.4 * s),
    "BetaBinomial": lambda s: dist.BetaBinomial(s, 2.0, 9),
    "GammaPoisson": lambda s: dist.GammaPoisson(2.0, s),
    "ZeroInflatedPoisson": lambda s: dist.ZeroInflatedPoisson(3 * s, gate=torch.tensor(0.3)),
    "ZeroInflatedNegativeBinomial": lambda s: dist.ZeroInflatedNegativeBinomial(
        4, probs=0.4 * s, gate=torch.tensor(0.3)
    ),
    "OrderedLogistic": lambda s: dist.OrderedLogistic(torch.tensor(0.2), vector(-s, s)),
    "Mixture of Poissons": lambda s: dist.MixtureSameFamily(dist.Categorical(PROBS), dist.Poisson(s * 4 * PROBS)),
}
MATRIX = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
ALONE = {
    "MultivariateNormal": lambda s: dist.MultivariateNormal(torch.ones(2), scale_tril=s * TRIL),
    "LowRankMultivariateNormal": lambda s: dist.LowRankMultivariateNormal(ONES, ONES[:, None], s * ONES),
    "MultivariateStudentT": lambda s: dist.MultivariateStudentT(5 * s, torch.zeros(2), TRIL),
    "Dirichlet": lambda s: dist.Dirichlet(s * vector(0.5, 1.0, 3.0)),
    "LKJCholesky": lambda s: dist.LKJCholesky(3, s),
    "LKJ": lambda s: dist.LKJ(3, s),
    "RelaxedBernoulli": lambda s: dist.RelaxedBernoulli(torch.tensor(0.7), 0.4 * s),
    "RelaxedOneHotCategorical": lambda s: dist.RelaxedOneHotCategorical(torch.tensor(0.7), vector(0.2, 0.3, s)),
    "ZeroInflatedDistribution": lambda s: dist.ZeroInflatedDistribution(dist.Normal(2.0, s), gate=torch.tensor(0.3)),
    "MixtureSameFamily": lambda s: dist.MixtureSameFamily(dist.Categorical(PROBS), dist.Normal(5 * PROBS, s)),
    "MaskedMixture": lambda s: dist.MaskedMixture(
        torch.tensor([True, False]), dist.Normal(-2.0, s).expand([2]), dist.Gamma(s, 1.0).expand([2])
    ),
    "SoftAsymmetricLaplace": lambda s: dist.SoftAsymmetricLaplace(0.0, s, 2.0, s),
    "TruncatedPolyaGamma": lambda s: dist.TruncatedPolyaGamma(s),
    "Stable": lambda s: dist.Stable(1.5, 0.2, s),
    "ProjectedNormal": lambda s: dist.ProjectedNormal(s * ONES),
    "LogisticNormal": lambda s: torch.distributions.LogisticNormal(torch.zeros(2), s * torch.ones(2)),
    "GaussianHMM": lambda s: dist.GaussianHMM(MATRIX, s * torch.eye(2), MATRIX, torch.eye(2), MATRIX, duration=3),
    "LinearHMM": lambda s: dist.LinearHMM(
        *(dist.Normal(torch.zeros(2), s).to_event(1), torch.eye(2), dist.StudentT(4 * s * torch.ones(2)).to_event(1)),
        *(torch.eye(2), dist.Normal(torch.zeros(2), s).to_event(1)),
        duration=3,
    ),
    "Independent": lambda s: dist.Beta(s, 2.0).expand([3]).to_event(1),
    "masked": lambda s: dist.Gamma(s * ONES, 2.0).mask(torch.tensor([True, False, True])).to_event(1),
    "Empirical": lambda s: dist.Empirical(torch.tensor([1.0, 2.0, 4.0]), s * PROBS),
    **{
        f"through {name}": flow(transform)
        for name, transform in {
            "spline": lambda: T.spline(2, count_bins=4, bound=1.0),
            "quadratic spline": lambda: T.spline(2, count_bins=4, bound=1.0, order="quadratic"),
            "spline_autoregressive": lambda: T.spline_autoregressive(2, [8], bound=1.0),
            "spline_coupling": lambda: T.spline_coupling(2, 1, [8], bound=1.0),
            "affine_autoregressive": lambda: T.affine_autoregressive(2, [8]),
            "block_autoregressive": lambda: T.block_autoregressive(2),
            "neural_autoregressive": lambda: T.neural_autoregressive(2, [8]),
            "polynomial": lambda: T.polynomial(2, [8]),
            "planar": lambda: T.planar(2),
            "radial": lambda: T.radial(2),
            "sylvester": lambda: T.sylvester(2),
            "householder": lambda: T.householder(2),
            "batchnorm": lambda: T.batchnorm(2),
            "matrix_exponential": lambda: T.matrix_exponential(2),
            "exp": T.ExpTransform,
            "stick-breaking": T.StickBreakingTransform,
            "ordered": T.OrderedTransform,
            "LowerCholeskyAffine": lambda: T.LowerCholeskyAffine(torch.ones(2), TRIL),
        }.items()
    },
}
ALONE_COUNTS = {
    "OneHotCategorical": lambda s: dist.OneHotCategorical(vector(0.2, 0.3, s)),
    "OneHotCategoricalStraightThrough": lambda s: dist.OneHotCategoricalStraightThrough(vector(0.2, 0.3, s)),
    "RelaxedOneHotCategoricalStraightThrough": lambda s: dist.RelaxedOneHotCategoricalStraightThrough(
        torch.tensor(0.7), vector(0.2, 0.3, s)
    ),
    "RelaxedBernoulliStraightThrough": lambda s: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), 0.4 * s),
    "Multinomial": lambda s: dist.Multinomial(6, vector(0.2, 0.3, s)),
    "DirichletMultinomial": lambda s: dist.DirichletMultinomial(s * ONES, 6),
    "DiscreteHMM": lambda s: dist.DiscreteHMM(torch.zeros(2), torch.eye(2), dist.Poisson(vector(s, 3 * s)), duration=3),
}
BUFFERED = {"OrderedLogistic"}  # writes into torch.zeros
BUILD = {**{name: build for name, (build, _) in EXACT.items()}, **COUNTS, **ALONE, **ALONE_COUNTS}


def draw(d):
    return d.rsample() if d.has_rsample else d.sample()


def lifted(build, s, **options):
    with under_vmap(**options):
        return torch.vmap(lambda s: draw(build(s)), randomness="different")(s)


def settings(count=K):
    return torch.tensor(SETTINGS).repeat(count // 2)


def features(z):
    """Coordinates of samples [M, *event], and products of neighbours: [M, F]."""
    z = z.reshape(len(z), -1).double()
    return torch.cat([z, z[:, 1:] * z[:, :-1]], -1)


def p_value_of_counts(z, d):
    z = z.long()
    values = torch.arange(z.max() + 1)
    expected = len(z) * d.log_prob(values.to(d.sample().dtype)).exp().double()
    kept = (expected > 10).nonzero().flatten()
    last = int(kept.max())  # all values above form one cell, as do all below
    first = int(kept.min())
    observed = torch.bincount(z.clamp(first, last), minlength=last + 1)[first:].double()
    cells = expected[first : last + 1].clone()
    cells[0] += expected[:first].sum()
    cells[-1] += len(z) - expected[: last + 1].sum()
    return stats.chisquare(observed.numpy(), cells.numpy()).pvalue if len(cells) > 1 else 1.0


def p_value_of_two(a, b):
    cells = torch.cat([a, b]).unique()
    table = np.array([[int((x == cell).sum()) for cell in cells] for x in (a, b)])
    rare = table.sum(0) < 20
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1)
    table = table[:, table.sum(0) > 0]
    return stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0


def check_law(name, z, s):
    """Samples [M, *event] at one setting follow their distribution."""
    z, d = z.detach(), BUILD[name](torch.tensor(s))
    assert torch.isfinite(z).all()
    if name in EXACT:
        law = EXACT[name][1]
        cdf = law(s).cdf if law else lambda x: d.cdf(torch.as_tensor(x)).numpy()
        p = stats.kstest(z.double().numpy() if law else z.numpy(), cdf).pvalue
    elif name in COUNTS:
        p = p_value_of_counts(z, d)
    else:
        with torch.no_grad():
            alone = features((d.rsample if d.has_rsample else d.sample)((2 * K,)))
        pairs = [(a, b) for a, b in zip(features(z).T, alone.T, strict=True) if a.std() > 1e-6 or b.std() > 1e-6]
        compare = p_value_of_two if name in ALONE_COUNTS else lambda a, b: stats.ks_2samp(a, b).pvalue
        p = min(compare(a, b) for a, b in pairs) * len(pairs)
    assert p > ALPHA, f"{name}({s}): p = {p:.1e}"


@pytest.mark.parametrize("name", BUILD)
def test_draws_have_their_law_and_differ_between_particles(name):
    z = lifted(BUILD[name], settings(), buffers=name in BUFFERED)
    for i, s in enumerate(SETTINGS):
        check_law(name, z[i::2], s)
    same = lifted(lambda _: BUILD[name](torch.tensor(SETTINGS[0])), settings())  # parameters shared by all particles
    check_law(name, same, SETTINGS[0])


@pytest.mark.parametrize("name", BUILD)
def test_captured_draws_have_their_law_and_are_fresh_at_every_call(name):
    s = settings()
    graph = make_fx(lambda s: lifted(BUILD[name], s, buffers=name in BUFFERED))(s)
    z = graph(s)
    for i, setting in enumerate(SETTINGS):
        check_law(name, z[i::2], setting)
    assert not torch.equal(z, graph(s))
    torch.manual_seed(3)
    first = graph(s)
    torch.manual_seed(3)
    assert torch.equal(first, graph(s))


REPARAMETERIZED = [name for name in BUILD if BUILD[name](torch.tensor(1.0)).has_rsample]


@pytest.mark.parametrize("name", REPARAMETERIZED)
def test_derivatives_have_the_mean_of_those_of_draws_alone(name):
    """d/ds of a bounded function of the sample, averaged over particles and over 40 batches of single samples."""

    def bounded(z):
        z = z.reshape(len(z), -1)
        return torch.sin(z * torch.arange(1, z.shape[-1] + 1)).sum(-1)

    s = torch.full((K,), 0.9, requires_grad=True)
    (mapped,) = torch.autograd.grad(bounded(lifted(BUILD[name], s)).sum(), s)
    alone = []
    for _ in range(40):
        one = torch.tensor(0.9, requires_grad=True)
        alone.append(torch.autograd.grad(bounded(BUILD[name](one).rsample((K // 40,))).mean(), one)[0])
    alone = torch.stack(alone)
    error = (mapped.var() / K + alone.var() / 40).sqrt()
    assert float(error) > 0
    assert abs(float(mapped.mean() - alone.mean())) < 4.5 * float(error)


STRAIGHT = {name for name in BUILD if name.startswith("Relaxed") and name.endswith("StraightThrough")}


@pytest.mark.parametrize("name", sorted({*BUILD} - STRAIGHT - {"Stable"}))
def test_log_densities_are_those_of_the_draw_alone(name):
    def one(s):
        d = BUILD[name](s)
        z = draw(d)
        try:
            return z, d.log_prob(z)
        except NotImplementedError:
            return z, torch.zeros(())

    s = settings(6)
    with under_vmap(buffers=name in BUFFERED):
        z, log_prob = torch.vmap(one, randomness="different")(s)
    assert torch.isfinite(log_prob).all()
    for k in range(6):
        d = BUILD[name](s[k])
        try:
            alone = d.log_prob(z[k])
        except (KeyError, NotImplementedError):  # a transform without an inverse
            d = BUILD[name](s[k])
            for part in getattr(d, "transforms", ()):
                part.clear_cache()
            continue
        torch.testing.assert_close(log_prob[k], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Gamma", "Beta", "FisherSnedecor", "LKJ", "MultivariateNormal", "through spline"])
def test_captured_derivatives_are_those_of_the_same_draws(name):
    def value_and_slope(s):
        z = lifted(BUILD[name], s)
        return z, torch.autograd.grad(z.reshape(len(z), -1).sum(), s)[0] if z.requires_grad else s * 0

    s = settings(6).requires_grad_()
    graph = make_fx(value_and_slope)(s)
    torch.manual_seed(1)
    z, slope = graph(s)
    torch.manual_seed(1)
    expected = value_and_slope(s)
    torch.testing.assert_close((z, slope), expected)


@pytest.mark.parametrize("name", sorted(STRAIGHT))
def test_straight_through_values_have_the_density_of_the_relaxed_one(name):
    def one(s):
        z = draw(BUILD[name](s))
        return BUILD[name](s).log_prob(z), z._unquantize

    s = settings(6)
    log_prob, soft = mapped(one, s)
    relaxed = {"RelaxedBernoulliStraightThrough": dist.RelaxedBernoulli}.get(name, dist.RelaxedOneHotCategorical)
    for k in range(6):
        d = relaxed(torch.tensor(0.7), BUILD[name](s[k]).probs)
        torch.testing.assert_close(log_prob[k], d.log_prob(soft[k]), rtol=1e-4, atol=1e-4)


def test_the_safe_logarithm_keeps_its_derivative():
    x = torch.tensor([0.0, 1e-9, 0.3], requires_grad=True)
    mine = mapped(safe_log, x)
    torch.testing.assert_close(mine, safe_log(x))
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, safe_log(x))]
    torch.testing.assert_close(*slopes)


def test_small_concentrations_keep_their_corners():
    """Gammas of concentration 0.002 underflow even in float64, and their ratio would then be a half."""
    z = lifted(lambda s: dist.Dirichlet(0.002 * s * torch.ones(2)), torch.ones(K))[:, 0]
    assert float(((z > 0.01) & (z < 0.99)).float().mean()) < 0.02  # 0.009 exactly; 0.18 by gammas in float64
    assert abs(float((z > 0.5).float().mean()) - 0.5) < 4 * (0.25 / K) ** 0.5
    assert torch.isfinite(dist.Beta(0.002, 0.002).log_prob(z)).all()


# -- what else a program writes ------------------------------------------------------------------------------------


def mapped(fn, *x, **options):
    with under_vmap(**options):
        return torch.vmap(fn, randomness="different")(*x)


def one_by_one(fn, x):
    return torch.stack([fn(row.clone()) for row in x])


def _write_scalar(z):
    z = z * 1
    z[z > 0] = 7.0
    return z


def _write_rows(z):
    """The mask is of the leading dimension; the matrix is square, so that a wrong one would broadcast."""
    z = z * 1
    z[z[:, 0] > 0] = torch.tensor([5.0, 6.0, 7.0])
    return z


def _write_selected(z):
    out, mask = z * 2, z > 0
    out[mask] = z[mask]
    return out


def _write_integer(z):
    out = (z * 10).long()
    out[z > 0] = -3.7
    return out


def _clamped(z):
    return (z * 1).clamp_(min=-0.5).clamp_max_(0.5).clamp_min_(-0.2)


def _filled_in(z):
    out = torch.empty(3, 3)
    out[0], out[1:] = z[0], z[1:] * 2
    return out


WRITES = [_write_scalar, _write_rows, _write_selected, _write_integer, _clamped, _filled_in]


@pytest.mark.parametrize("write", [*WRITES, lambda z: z.data * 2, lambda z: z.new([1.0, 2.0]) + z[0, 0]])
def test_writes_are_those_of_particles_run_alone(write):
    x = torch.randn(5, 3, 3)
    torch.testing.assert_close(mapped(write, x), one_by_one(write, x))
    captured = make_fx(lambda x: mapped(write, x))(torch.randn(5, 3, 3))
    torch.testing.assert_close(captured(x), one_by_one(write, x))  # no mask of the captured run is kept


def test_writes_carry_derivatives():
    x = torch.randn(5, 3, 3, requires_grad=True)
    for write in (_write_scalar, _write_rows, _write_selected, _clamped, _filled_in):
        mine = torch.autograd.grad((mapped(write, x) ** 2).sum(), x)
        torch.testing.assert_close(mine, torch.autograd.grad((one_by_one(write, x) ** 2).sum(), x))


def test_values_kept_by_name_are_drawn_in_place():
    """A program that samples into a tensor and uses the tensor."""

    def draw_in_place(_):
        x = torch.empty(4)
        x.normal_(3.0, 2.0)
        return x

    z = mapped(draw_in_place, torch.zeros(K))
    assert stats.kstest(z.flatten().numpy(), stats.norm(3, 2).cdf).pvalue > ALPHA


@pytest.mark.parametrize("fill", [torch.zeros, lambda *n: torch.full(n, 2.0), lambda *n: torch.ones(n).clone()])
def test_latents_are_written_into_filled_tensors_where_asked(fill):
    def write(z):
        out = fill(3, 4)
        out[:, 0] = z[:, 0]
        return out

    x = torch.randn(5, 3, 3)
    torch.testing.assert_close(mapped(write, x, buffers=True), one_by_one(write, x))
    with pytest.raises(RuntimeError, match="vmap"):
        mapped(write, x)


RECURRENT = [nn.GRU, nn.LSTM, nn.RNN]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": False}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [*RECURRENT, lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options)])
def test_recurrent_networks_read_latents(kind, options):
    net = kind(3, 4, **{"batch_first": True, **options})

    def read(z):
        out, ends = net(z)
        return torch.cat([out.flatten(), *[end.flatten() for end in (ends if isinstance(ends, tuple) else (ends,))]])

    x = torch.randn(5, 2, 3, 3)
    torch.testing.assert_close(mapped(read, x), one_by_one(read, x))
    torch.testing.assert_close(make_fx(lambda x: mapped(read, x))(x * 2)(x), one_by_one(read, x))


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_recurrent_cells_read_latents(kind):
    cell = kind(3, 3)

    def read(z):
        out = cell(z, (z, z) if kind is nn.LSTMCell else z)
        return torch.cat(out) if isinstance(out, tuple) else out

    x = torch.randn(5, 6, 3)
    torch.testing.assert_close(mapped(read, x), one_by_one(read, x))


@pytest.mark.parametrize(("shape", "align"), [((4, 5), True), ((4, 5), False), ((1, 3), False)])
def test_images_are_moved_by_latents(shape, align):
    images = torch.randn(6, 1, *shape)

    def move(theta):
        grid = nn.functional.affine_grid(theta, images.shape, align_corners=align)
        return nn.functional.grid_sample(images, grid, align_corners=align)

    x = torch.randn(5, 6, 2, 3)
    torch.testing.assert_close(mapped(move, x), one_by_one(move, x), rtol=1e-4, atol=1e-5)
    graph = make_fx(lambda x: mapped(move, x))(x)
    assert len(graph.graph.nodes) == len(
        make_fx(lambda x: mapped(move, x))(x[:2]).graph.nodes
    )  # no loop over particles


def test_attention_reads_latents_without_a_warning():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(5, 6, 4, 8)
    torch.testing.assert_close(mapped(net, x), one_by_one(net, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0, None), (1, None), (None, 0), (2, 1), (None, None)])
def test_bernoulli_log_likelihood_stays_one_operation(a, b):
    """Wherever the particles' dimension of logits (a) and data (b) is, with the derivatives of particles run alone."""
    torch.manual_seed(0)
    sizes = [(3, 4) if dim is None else torch.Size((5, 3, 4)) for dim in (a, b)]
    each = [
        torch.rand(size) if dim is None else torch.rand(size).movedim(0, dim)
        for size, dim in zip(sizes, (a, b), strict=True)
    ]
    logits, target = (one.contiguous() for one in each)

    def density(_, logits, target):
        return -cross_entropy(logits, target, reduction="none")

    def all_at_once(logits, target):
        with under_vmap():
            return torch.vmap(density, (0, a, b), randomness="different")(torch.arange(5), logits, target)

    def alone(tensor, dim, k):
        return tensor if dim is None else tensor.select(dim, k)

    graph = make_fx(all_at_once)(logits, target).graph
    assert sum(node.target == torch.ops.aten.binary_cross_entropy_with_logits.default for node in graph.nodes) == 1
    logits.requires_grad_()
    expected = torch.stack([density(k, alone(logits, a, k), alone(target, b, k)) for k in range(5)])
    mine = all_at_once(logits, target)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), logits) for each in (mine, expected)))


# -- what is refused -----------------------------------------------------------------------------------------------


class OneDraw(dist.Normal):
    """A distribution that samples outside torch, from an unobservable random stream."""

    stream = np.random.default_rng(0)

    def rsample(self, sample_shape=()):
        return torch.as_tensor(self.stream.normal(size=self._extended_shape(sample_shape)), dtype=torch.float32)


def _site(fn):
    return lambda _: poutine.trace(lambda: pyro.sample("z", fn)).get_trace().nodes["z"]["value"]


KEPT = torch.zeros(3)
REFUSED = {
    "Python's numbers": (lambda z: z + random.random(), "Python's or NumPy's"),
    "NumPy's numbers": (lambda z: z + float(np.random.rand()), "Python's or NumPy's"),  # noqa: NPY002
    "generator": (lambda z: z + torch.rand((), generator=torch.Generator().manual_seed(0)), "Generator"),
    "seed": (lambda z: (torch.manual_seed(0), z + torch.rand(()))[1], "seeds"),
    "pyro's seed": (lambda z: (pyro.set_rng_seed(0), z + torch.rand(()))[1], "seeds"),
    "one draw for all": (_site(OneDraw(0.0, 1.0)), "site 'z': OneDraw sampled one value for all particles"),
    "selection": (lambda z: torch.randn(4)[torch.randn(4) > z].sum(), "torch.where"),
    "length of a selection": (lambda z: z * len(torch.randn(4)[torch.randn(4) > 0]), "torch.where"),
    "writing a selection elsewhere": (lambda z: _selected_elsewhere(z), "torch.where"),
    "VonMises": (_site(dist.VonMises(0.0, 1.0)), "vmap"),
    "Stable's density": (lambda z: dist.Stable(1.5, 0.0).log_prob(z), "vmap"),
    "item": (lambda z: z * z.item(), "vmap"),
    "branch": (lambda z: z if z > 0 else -z, "vmap"),
    "NumPy": (lambda z: z + float(z.detach().numpy()), "storage"),
    "buffer kept outside": (lambda z: torch.Tensor.normal_(KEPT) + z, "vmap"),
}


def _selected_elsewhere(z):
    x = torch.randn(4) + z
    x[x > 0] = torch.randn(4)[x > 0.5]
    return x


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_between_particles_is_refused(name):
    program, words = REFUSED[name]
    with pytest.raises(RuntimeError, match=words) as caught:
        mapped(program, torch.zeros(5))
    assert isinstance(caught.value, NotVectorized) or "vmap" in words or name == "NumPy"


def test_points_observations_and_factors_are_the_same_for_all_particles():
    def program(_):
        pyro.sample("point", dist.Delta(torch.ones(2)).to_event(1))
        pyro.deterministic("fixed", torch.ones(2))
        pyro.factor("factor", torch.zeros(2))
        return pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    assert mapped(program, torch.zeros(5)).tolist() == [1.0] * 5


def test_everything_is_given_back():
    built = dist.Normal(0.0, 1.0, validate_args=True)
    seed, apply = torch.manual_seed, torch.distributions.dirichlet._Dirichlet.apply
    with under_vmap():
        assert torch.isnan(built.log_prob(torch.tensor(float("nan"))))
    with pytest.raises(NotVectorized), under_vmap():
        torch.manual_seed(0)
    with pytest.raises(ValueError, match="within the support"):
        built.log_prob(torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        dist.Normal(0.0, -1.0)
    assert torch.manual_seed is seed
    assert torch.distributions.dirichlet._Dirichlet.apply == apply
    assert torch.empty(2).fill_(1.0).tolist() == [1.0, 1.0]


def test_a_traced_pair_gives_the_log_weights_of_its_particles():
    decoder, encoder = nn.Linear(2, 12), nn.Linear(12, 4)
    x = torch.rand(6, 12)

    def model():
        s = pyro.sample("s", dist.Gamma(2.0, 1.0, validate_args=True))
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(6, 2), s).to_event(1))
            pyro.sample("x", dist.Normal(torch.softmax(decoder(z), dim=1), 0.3).to_event(1), obs=x)

    def guide():
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6):
            loc, scale = encoder(x).chunk(2, 1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def log_weight(trace):
        p = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
        return p.log_prob_sum() - trace.log_prob_sum()

    def one(_):
        trace = poutine.trace(guide).get_trace()
        return log_weight(trace), trace.nodes["s"]["value"], trace.nodes["z"]["value"]

    log_w, s, z = mapped(one, torch.zeros(5))
    for k in range(5):
        p, q = (
            poutine.trace(poutine.condition(program, {"s": s[k], "z": z[k]})).get_trace().log_prob_sum()
            for program in (model, guide)
        )
        torch.testing.assert_close(log_w[k], p - q, rtol=1e-5, atol=1e-4)
    assert s.unique().numel() == 5
