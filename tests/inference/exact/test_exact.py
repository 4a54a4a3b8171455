"""Sums and integrals over latents against closed forms, explicit sums and a grid; errors; number of evaluations."""

import itertools
import math
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import CONJUGATE, Discrete, DiscreteThenNormal, TwoLevels
from members import MODELS
from torch import nn

from jensen.families import Bernoulli, BinaryVector, Gaussian, MeanField, OneHotCategorical
from jensen.guides import PriorGuide, amortize
from jensen.inference import evaluate as with_refined
from jensen.inference import exact_log_evidence, log_joint, simulate
from jensen.inference.exact.quadrature import integrate
from jensen.models import PPCA, VAE, Banana, Ring
from jensen.networks import mlp

evaluate = partial(with_refined, refine=False)  # from samples of the guide; refined evidence has its own tests

REAL = torch.float64


def _integrated(model, x, **options):
    return exact_log_evidence(model, x, method="quadrature", progress=False, **options)


def _check(found, exact, tolerance=1e-6):
    assert found.method == "quadrature"
    assert found.log_evidence.dtype == found.error.dtype == torch.float64
    off = (found.log_evidence - exact).abs()
    assert (off <= found.error).all(), f"off by {off.max():.1e}, which the error {found.error.max():.1e} does not admit"
    assert (found.error <= tolerance).all()
    assert found.reached.all()


def _drawn(model, n=12):
    return simulate(model, n)[1].detach()


@pytest.mark.parametrize("latent", [1, 2, 3])
def test_a_linear_model(latent):
    model = PPCA(5, latent, prior_scale=2.0).double()
    x = _drawn(model)
    _check(_integrated(model, x), model.log_evidence(x))


@pytest.mark.parametrize("latent", [1, 2, 3])
def test_a_narrow_posterior_far_from_the_prior(latent):
    """Noise of 0.01, and data at least twenty standard deviations from typical samples of the model."""
    model = PPCA(4, latent).double()
    with torch.no_grad():
        model.log_noise.fill_(math.log(0.01))
    x = model.mean.detach() + (20 * torch.randn(3, latent, dtype=REAL)) @ model.weight.detach().T
    _check(_integrated(model, x), model.log_evidence(x))


@pytest.mark.parametrize(("curvature", "noise"), [(0.5, 0.25), (1.0, 0.05), (-0.5, 0.01)])
def test_a_banana(curvature, noise):
    model = Banana(curvature, noise).double()
    x = torch.cat([_drawn(model, 6), torch.tensor([[10.0], [-10.0]], dtype=REAL) * math.copysign(1, curvature)])
    _check(_integrated(model, x), model.log_evidence(x))


@pytest.mark.parametrize(("latent", "noise", "n"), [(1, 0.02, 12), (2, 0.5, 12), (2, 0.02, 4), (3, 0.5, 4)])
def test_a_ring(latent, noise, n):
    model = Ring(noise, latent).double()
    x = _drawn(model, n)
    _check(_integrated(model, x), model.log_evidence(x))


@pytest.mark.parametrize("name", CONJUGATE)
def test_constrained_sites_are_integrated_over_their_supports(name, float64):
    model = CONJUGATE[name]()
    x = _drawn(model)
    _check(_integrated(model, x, tolerance=1e-5), model.log_evidence(x), 1e-5)


def _uniform(x):
    """Latent z ~ U(-2, 5), x ~ N(z, 0.1^2), so p(x) is a difference of normal distribution functions over 7."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Uniform(x.new_full((len(x),), -2.0), 5.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def test_a_site_on_an_interval():
    x = torch.tensor([0.0, 4.95, -1.9, 5.2], dtype=REAL)
    normal = torch.distributions.Normal(x, 0.1)
    two, five = x.new_tensor(-2.0), x.new_tensor(5.0)
    _check(_integrated(_uniform, x), ((normal.cdf(five) - normal.cdf(two)) / 7).log())


@pytest.mark.parametrize("D", [1, 2])
def test_two_narrow_modes_far_from_each_other(D):
    """Given z, x lies around z - 3 or z + 4: the posterior is in two pieces, and p(x) a mixture of Gaussians."""
    weights = torch.tensor([0.3, 0.7], dtype=REAL)
    shifts = torch.tensor([-3.0, 4.0], dtype=REAL)

    def seen(loc, scale):
        parts = dist.Normal(loc.unsqueeze(-2) + shifts.unsqueeze(-1), scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(weights.expand(*loc.shape[:-1], 2)), parts)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", seen(z, 0.03), obs=x)

    x = torch.randn(6, D, dtype=REAL)
    _check(_integrated(model, x), seen(torch.zeros_like(x), math.sqrt(1 + 0.03**2)).log_prob(x))


def test_two_levels_side_by_side(float64):
    model = TwoLevels(low=2, top=1)
    x = _drawn(model)
    _check(_integrated(model, x), model.log_evidence(x))


def test_discrete_and_continuous_sites_together(float64):
    model = DiscreteThenNormal()
    x = _drawn(model)
    mixture = torch.stack(
        [dist.Normal(mu, math.sqrt(1.25)).to_event(1).log_prob(x) for mu in model.mu.detach()], -1
    ) + model.logits.detach().log_softmax(-1)
    found = _integrated(model, x)
    _check(found, mixture.logsumexp(-1))
    assert (found.evaluations % 3 == 0).all()


def _vae(activation, likelihood=Gaussian, latent=2, seed=0):
    torch.manual_seed(seed)
    options = {"scale": "shared"} if likelihood is Gaussian else {}
    model = VAE(mlp(latent, [16, 16], activation), likelihood(8, 16, **options), latent).double()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(3.0)  # curved enough for non-Gaussian posteriors
    return model


def _on_a_grid(model, x, end=8.0, points=1201):
    """Log p(x) by the trapezoidal rule on a fixed grid, for a posterior inside the grid: [N]."""
    ticks = torch.linspace(-end, end, points, dtype=REAL)
    grid = torch.cartesian_prod(ticks, ticks)
    parts = [log_joint(model, {"z": z.unsqueeze(1).expand(-1, len(x), -1)}, x).logsumexp(0) for z in grid.split(40_000)]
    return torch.stack(parts).logsumexp(0) + 2 * (ticks[1] - ticks[0]).log()


@pytest.mark.parametrize(
    ("activation", "likelihood"), [(nn.Tanh, Gaussian), pytest.param(nn.SiLU, Bernoulli, marks=pytest.mark.slow)]
)
def test_a_nonlinear_decoder_agrees_with_a_fine_grid(activation, likelihood):
    model = _vae(activation, likelihood)
    x = _drawn(model, 4)
    with torch.no_grad():
        expected = _on_a_grid(model, x)
    found = _integrated(model, x)
    _check(found, expected)
    assert (found.evaluations < 50_000).all()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_error_bounds_the_true_error_at_any_tolerance(tolerance):
    model = _vae(nn.Tanh)
    x = _drawn(model, 40)
    best = _integrated(model, x, tolerance=1e-9)
    rough = _integrated(model, x, tolerance=tolerance)
    _check(rough, best.log_evidence, tolerance)
    assert (rough.evaluations <= best.evaluations).all()
    assert rough.evaluations.double().mean() < 0.8 * best.evaluations.double().mean()


@pytest.mark.parametrize(("D", "n"), [(1, 400), (2, 200)])
def test_the_error_bounds_the_true_error_of_random_gaussians(D, n, float64):
    """Their integral is 1 for any location and width."""
    centre, scale = 2 * torch.randn(n, D), 10 ** (-2 * torch.rand(n, 1)) * (1 + torch.rand(n, D))
    f = lambda row, points: dist.Normal(centre[row], scale[row]).log_prob(points).sum(-1)
    found = integrate(f, n, D, tolerance=1e-6, max_evaluations=10_000)
    assert (found.value.abs() <= found.error).all()
    assert (found.error <= 1e-6).all()


@pytest.mark.parametrize(("D", "scale"), [(1, 0.02), (2, 0.1)])
def test_a_narrow_peak_in_a_wide_one_is_seen(D, scale, float64):
    """Half of the mass is on a hundredth of the prior's area, and is not visible in log f elsewhere."""
    centre = torch.randn(60, D)

    def f(row, points):
        wide = dist.Normal(0.0, 1.0).log_prob(points).sum(-1)
        return torch.logaddexp(wide, dist.Normal(centre[row], scale).log_prob(points).sum(-1)) - math.log(2)

    found = integrate(f, 60, D, tolerance=1e-4, max_evaluations=50_000)
    assert (found.value.abs() <= found.error).all()
    assert (found.error <= 1e-4).all()


def test_a_tail_that_falls_slowly_is_followed(float64):
    found = integrate(lambda row, z: dist.StudentT(1.0).log_prob(z).sum(-1), 1, 1, tolerance=1e-6, max_evaluations=5000)
    assert found.value.abs() <= found.error <= 1e-6
    flat = integrate(lambda row, z: torch.zeros_like(z[..., 0]), 1, 1, tolerance=1e-6, max_evaluations=5000)
    assert not flat.error <= 1e-1


def test_what_is_not_reached_is_admitted_and_warned_of():
    model = _vae(nn.Tanh)
    x = _drawn(model, 10)
    with pytest.warns(UserWarning, match=r"did not reach the tolerance of 1e-06 nats for \d+ of 10 data"):
        found = _integrated(model, x, max_evaluations=1500)
    assert not found.reached.all()
    best = _integrated(model, x)
    assert ((found.log_evidence - best.log_evidence).abs() <= found.error).all()
    assert "of 10 above the tolerance 1e-06" in str(found)


def test_float32_admits_its_rounding():
    model = _vae(nn.Tanh)
    x = _drawn(model, 10)
    best = _integrated(model, x)
    with pytest.warns(UserWarning, match="measure in float64"):
        found = _integrated(model.float(), x.float())
    assert ((found.log_evidence - best.log_evidence).abs() <= found.error).all()
    assert (found.error < 2e-3).all()


def _mixture(x):
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 4.0])[c], 1.0), obs=x)


def test_a_categorical_mixture_by_hand():
    x = torch.linspace(-3, 6, 10)
    found = exact_log_evidence(_mixture, x, progress=False)
    parts = [w * dist.Normal(m, 1.0).log_prob(x).exp() for w, m in ((0.2, -1.0), (0.3, 0.0), (0.5, 4.0))]
    torch.testing.assert_close(found.log_evidence, sum(parts).log().double(), rtol=0, atol=1e-6)
    assert found.method == "enumeration"
    assert found.error.tolist() == [0.0] * 10
    assert found.evaluations.tolist() == [3] * 10


@pytest.mark.parametrize("chunk_size", [1, 7, 16384])
@pytest.mark.parametrize("family", [BinaryVector, OneHotCategorical])
def test_a_discrete_vector_by_hand(family, chunk_size, float64):
    model = Discrete(family)
    x = _drawn(model, 5)
    binary = family is BinaryVector
    states = itertools.product([0.0, 1.0], repeat=3) if binary else torch.eye(3).tolist()
    total = 0.0
    with torch.no_grad():
        for state in map(torch.tensor, states):
            prior = dist.Bernoulli(logits=model.logits).log_prob(state).sum()
            prior = prior if binary else model.logits.log_softmax(-1) @ state
            total = total + (prior + dist.Normal(model.weight @ state, 1.0).to_event(1).log_prob(x)).exp()
    found = exact_log_evidence(model, x, chunk_size=chunk_size, progress=False)
    torch.testing.assert_close(found.log_evidence, total.log(), rtol=0, atol=1e-12)


def _hierarchy(x):
    """One of two, a, b ~ three coins whose odds depend on a, x ~ N(a + sum b, 1)."""
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        odds = (0.2 + 0.6 * a).unsqueeze(-1).expand(*a.shape, 3)
        b = pyro.sample("b", dist.Bernoulli(odds).to_event(1))
        pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)


def test_two_discrete_sites_one_after_the_other_by_hand(float64):
    x = torch.randn(6)
    total = torch.zeros(6)
    for a, *b in itertools.product([0.0, 1.0], repeat=4):
        odds = 0.2 + 0.6 * a
        p = (0.3 if a else 0.7) * math.prod(odds if coin else 1 - odds for coin in b)
        total += p * dist.Normal(a + sum(b), 1.0).log_prob(x).exp()
    found = exact_log_evidence(_hierarchy, x, progress=False)
    torch.testing.assert_close(found.log_evidence, total.log(), rtol=0, atol=1e-12)
    assert found.evaluations.tolist() == [16] * 6


def test_many_states_are_summed_in_pieces(float64):
    """Twelve coins: p(x) factorises over them, so the sum over 4096 states is known."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", BinaryVector(12, None)(torch.linspace(-2, 2, 12)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 12)
    p = torch.linspace(-2, 2, 12).sigmoid()
    each = (1 - p) * dist.Normal(0.0, 1.0).log_prob(x).exp() + p * dist.Normal(1.0, 1.0).log_prob(x).exp()
    found = exact_log_evidence(model, x, chunk_size=1000, progress=False)
    torch.testing.assert_close(found.log_evidence, each.log().sum(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_library_is_within_reach(name, float64):
    model = MODELS[name]()
    x = _drawn(model, 3)
    found = _integrated(model, x)
    _check(found, model.log_evidence(x) if hasattr(model, "log_evidence") else found.log_evidence)


def test_the_closed_form_comes_first():
    model = PPCA(5, 2).double()
    x = _drawn(model)
    found = exact_log_evidence(model, x)
    assert found.method == "closed form"
    torch.testing.assert_close(found.log_evidence, model.log_evidence(x))
    assert found.error.eq(0).all()
    assert found.evaluations.eq(0).all()


def test_it_prints():
    text = str(_integrated(Ring().double(), _drawn(Ring().double(), 5)))
    assert text.startswith("log p(x) of 5 data points by quadrature, nats per data point")
    assert "largest error" in text
    assert "evaluations of log p(x, z)" in text


def _site(fn, plate=True):
    def model(x):
        if not plate:
            z = pyro.sample("z", fn)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", fn) if plate else z
            pyro.sample("x", dist.Normal(z.reshape(*z.shape[: x.dim()], -1).sum(-1), 1.0), obs=x)

    return model


def _inner_plate(x):
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)


def _moving(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (
            _site(dist.Normal(torch.zeros(4), 1.0).to_event(1)),
            None,
            r"have 4 dimensions in total \(4 of 'z'\).*",
        ),
        (_site(dist.Poisson(2.0)), None, r"site 'z' \(Poisson\) cannot enumerate its states"),
        (_site(dist.Bernoulli(torch.full((21,), 0.5)).to_event(1)), None, r"2097152 joint states \(2097152 of 'z'\)"),
        (_site(dist.Bernoulli(torch.full((99,), 0.5)).to_event(1)), None, r"site 'z' has 2\^99 states"),
        (_site(dist.Normal(0.0, 1.0), plate=False), None, r"no plate in common \(a global latent\)"),
        (_inner_plate, None, r"site 'z' has values of shape \[3, \d+\].*a plate of its own"),
        (_moving, None, "the support of site 'b' differs between data points, or with another site: its upper_bound"),
        (_site(dist.Delta(torch.tensor(0.0))), None, r"site 'z' is a point \(Delta\)"),
        (_site(dist.Normal(0.0, 1.0)), "enumeration", r"\['z'\] are continuous and cannot be enumerated"),
        (_mixture, "quadrature", r"\['c'\] are discrete: method='enumeration'"),
        (_mixture, "closed form", r"has no log_evidence\(x\)"),
        (_mixture, "guess", "method is one of closed form, enumeration, quadrature"),
    ],
)
def test_refusals_say_why(model, method, message):
    with pytest.raises(ValueError, match=message):
        exact_log_evidence(model, torch.zeros(5), method=method, progress=False)


def test_a_model_without_latents_and_data_outside_the_support_are_refused():
    def nothing(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="no latent site"):
        exact_log_evidence(nothing, torch.zeros(3), progress=False)
    with pytest.raises(ValueError, match="lie outside the support of Bernoulli"):
        exact_log_evidence(_vae(nn.Tanh, Bernoulli), torch.full((3, 8), 0.5, dtype=REAL), progress=False)
    with pytest.raises(ValueError, match="tolerance, max_evaluations and chunk_size must be positive"):
        exact_log_evidence(_mixture, torch.zeros(3), tolerance=0.0)


def test_nothing_is_drawn_and_nothing_is_left_behind():
    model = _vae(nn.Tanh)
    x = _drawn(model, 3)
    state = torch.get_rng_state()
    _integrated(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def _guided(model, **options):
    return amortize(model, mlp(model.event_shape.numel(), [16]), MeanField, context=16, **options).double()


def test_evaluate_has_the_column_where_it_is_cheap():
    model = _vae(nn.SiLU, latent=1)
    x = _drawn(model, 30)
    guide = _guided(model)
    known = _integrated(model, x)
    few = evaluate(model, guide, x, 100, seed=0, progress=False)
    many = evaluate(model, guide, x, 1000, seed=0, progress=False)
    assert few.exact is None
    assert known.evaluations.double().mean() < 1000
    torch.testing.assert_close(many.exact, known.log_evidence, rtol=0, atol=1e-4)


def test_evaluate_has_the_column_of_a_sum():
    model = Discrete(BinaryVector).double()
    x = _drawn(model, 20)
    evidence = evaluate(model, PriorGuide(model), x, 8, seed=0, progress=False)
    torch.testing.assert_close(evidence.exact, exact_log_evidence(model, x, progress=False).log_evidence)
    assert evaluate(model, PriorGuide(model), x, 7, seed=0, progress=False).exact is None


def test_the_column_leaves_the_draws_of_evaluate_alone(monkeypatch):
    model = _vae(nn.SiLU, latent=1)
    x, guide = _drawn(model, 10), _guided(model)
    torch.manual_seed(3)
    with_it = evaluate(model, guide, x, 1000, progress=False)
    after = torch.rand(1)
    monkeypatch.setattr(sys.modules["jensen.inference.measure.evaluate"], "cheap_evidence", lambda *_, **__: None)
    torch.manual_seed(3)
    without = evaluate(model, guide, x, 1000, progress=False)
    assert with_it.exact is not None and without.exact is None
    assert torch.equal(with_it.log_evidence, without.log_evidence)
    assert torch.equal(after, torch.rand(1))


class _Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, z):
        self.rows += z.shape[:-1].numel()
        return self.inner(z)


@pytest.mark.parametrize("latent", [3, 4])
def test_the_column_costs_nothing_where_it_does_not_apply(latent):
    model = _vae(nn.SiLU, latent=latent)
    x, guide = _drawn(model, 50), _guided(model)
    model.decoder = _Counted(model.decoder)
    evidence = evaluate(model, guide, x, 200, seed=0, progress=False)
    assert evidence.exact is None
    assert model.decoder.rows < 1.05 * 200 * 50


def test_evaluate_gives_up_after_a_few_data():
    """Kinks in two dimensions need far more evaluations than the particles: a few data points show it."""
    model = _vae(nn.ReLU)
    x, guide = _drawn(model, 200), _guided(model)
    model.decoder = _Counted(model.decoder)
    assert evaluate(model, guide, x, 1500, seed=0, progress=False).exact is None
    assert model.decoder.rows < 1.25 * 1500 * 200


def test_the_column_never_raises():
    model = _vae(nn.SiLU, latent=1)
    x, guide = _drawn(model, 10), _guided(model)
    inner = model.decoder

    class Fragile(nn.Module):
        def forward(self, z):
            if z.shape[-2] != len(x):  # fits these data alone
                raise RuntimeError("other rows than data")
            return inner(z)

    model.decoder = Fragile()
    assert evaluate(model, guide, x, 1000, seed=0, progress=False).exact is None
