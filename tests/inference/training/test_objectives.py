"""Objectives: their values against the kernel and Pyro, their gradients against known answers and each other."""

import math
from decimal import Decimal, localcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import TwoLevels
from members import OBJECTIVES, pair
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import jensen.families
from jensen.families import IAF, BinaryVector, FullCovariance, LowRank, MeanField, Sylvester
from jensen.guides import ExactPosterior, amortize
from jensen.inference import (
    ELBO,
    IWAE,
    CyclicalAnnealing,
    GradientSignal,
    LinearAnnealing,
    Objective,
    Renyi,
    fit,
    gradient_signal,
    log_weights,
    terms,
)
from jensen.inference.training.objectives import leave_one_out, power_mean
from jensen.models import PPCA, VAE
from jensen.networks import mlp
from jensen.plots import plot_signal

pytestmark = pytest.mark.usefixtures("float64")


def gradients(objective, model, guide, x, of=None):
    """The flattened gradient of the guide's parameters, or of those of another module."""
    parameters = list((of or guide).parameters())
    parts = torch.autograd.grad(objective.differentiable_loss(model, guide, x), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(parts, parameters, strict=True)]
    )


class Rows(nn.Module):
    """The same context for every row as separate parameters: repeats at one point."""

    def __init__(self, rows, width=6):
        super().__init__()
        self.h = nn.Parameter(torch.randn(1, width).expand(rows, -1).clone())

    def forward(self, x):
        return self.h


def repeated(model, family, rows=4000, **options):
    """A model and guide, one repeated data point, and a function that samples its gradient for every row: [rows, H]."""
    torch.manual_seed(0)
    guide = amortize(model, Rows(rows), family, context=6, **options)
    with torch.no_grad():
        x = model(n=1).expand(rows, -1)

    def draw(objective):
        return torch.autograd.grad(objective.differentiable_loss(model, guide, x), guide.encoder.h)[0]

    return draw


def same_mean(one, other):
    """Whether repeated gradients [R, P] of two kinds have the same mean: z-scores with mean square 1."""
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    z = (one.mean(0) - other.mean(0))[error > 0] / error[error > 0]
    return float(z.abs().max()) < 4.5 and float(z.square().mean()) < 1 + 6 * math.sqrt(2 / len(z))


# values


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
def test_the_loss_is_the_bound(gradient):
    model, guide, x = pair("PPCA", "FullCovariance")
    for objective, p in ((IWAE(6, gradient), 1.0), (Renyi(0.5, 6, gradient), 0.5), (Renyi(-1.0, 6, gradient), 2.0)):
        torch.manual_seed(1)
        log_w = log_weights(model, guide, x, particles=6)
        torch.manual_seed(1)
        loss = objective.differentiable_loss(model, guide, x)
        expected = -(((p * log_w).logsumexp(0) - math.log(6)) / p).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.manual_seed(1)
        assert objective.loss(model, guide, x) == pytest.approx(expected.item(), rel=1e-12)
        assert float(objective.bound) == pytest.approx(-expected.item(), rel=1e-12)


def test_renyi_of_order_one_is_the_elbo_and_of_order_zero_the_importance_weighted_bound():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    values = []
    for objective in (Renyi(1.0, 5), ELBO(5), Renyi(0.0, 5), IWAE(5)):
        torch.manual_seed(1)
        values.append(objective.loss(model, guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[2] == pytest.approx(values[3], rel=1e-12)


def test_the_elbo_and_its_gradient_are_those_of_pyro():
    model, guide, x = pair("VAE, Bernoulli", "IAF")
    pyros = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    found = []
    for objective in (ELBO(4), pyros):
        torch.manual_seed(1)
        found.append(gradients(objective, model, guide, x))
        torch.manual_seed(1)
        assert objective.loss(model, guide, x) == pytest.approx(pyros_loss(pyros, model, guide, x), rel=1e-12)
    assert torch.allclose(found[0], found[1], rtol=1e-10, atol=1e-12)


def pyros_loss(pyros, model, guide, x):
    torch.manual_seed(1)
    return pyros.loss(model, guide, x)


class Subsampled(PyroModule):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1) for a thousand data points, subsampled by a plate."""

    def __init__(self, x, size):
        super().__init__()
        self.x, self.size = x, size

    def forward(self):
        with pyro.plate("data", len(self.x), subsample_size=self.size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[rows])


class ShiftedPosterior(Subsampled):
    """The exact posterior, 1.5 times too wide."""

    def forward(self):
        with pyro.plate("data", len(self.x), subsample_size=self.size) as rows:
            pyro.sample("z", dist.Normal(self.x[rows] / 2, 1.5 * math.sqrt(0.5)))


def test_bounds_are_right_under_subsampling_where_those_of_pyro_are_not():
    torch.manual_seed(0)
    x = math.sqrt(2) * torch.randn(1000)
    model, guide = Subsampled(x, 20), ShiftedPosterior(x, 20)
    exact = float(Normal(0.0, math.sqrt(2.0)).log_prob(x).sum())
    ours = torch.tensor([-IWAE(200).loss(model, guide) for _ in range(200)])
    error = float(ours.std()) / math.sqrt(len(ours))
    assert abs(float(ours.mean()) - exact) < 4 * error + 2.0  # the bound of 200 particles lies a nat or two below
    pyros = RenyiELBO(alpha=0.0, num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([-pyros.loss(model, guide) for _ in range(200)])
    assert float(theirs.mean()) > exact + 20 * error  # a "lower" bound far above


def test_a_scale_does_not_move_the_bound():
    model, guide, x = pair("PPCA", "MeanField")
    objective, values = IWAE(50), []
    for scale in (1.0, 0.01):
        scaled = (poutine.scale(half, scale=scale) for half in (model, guide))
        torch.manual_seed(1)
        if scale == 1.0:
            values.append(objective.loss(*scaled, x))
        else:
            with pytest.warns(UserWarning, match="poutine.scale"):
                values.append(IWAE(50).loss(*scaled, x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_global_latent_has_one_joint_bound():
    torch.manual_seed(0)
    x = torch.randn(8) + 1.0

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))

    covariance = torch.eye(8) + 1.0
    exact = float(MultivariateNormal(torch.zeros(8), covariance).log_prob(x))
    for objective in (IWAE(3), ELBO(3), Renyi(0.5, 3), ELBO(3, gradient="stl")):
        assert -objective.loss(model, guide, x) == pytest.approx(exact, abs=1e-10)


# the base class


each_objective = pytest.mark.parametrize(
    "objective", [pytest.param(make, id=name) for name, make in OBJECTIVES.items()]
)


@each_objective
def test_the_loss_is_one_number_however_it_is_asked_for(objective):
    model, guide, x = pair("VAE, shared scale", "MeanField")
    losses, objective = [], objective()
    for ask in (
        lambda: objective.loss(model, guide, x),
        lambda: objective.differentiable_loss(model, guide, x).item(),
        lambda: objective.loss_and_bound(model, guide, x, knobs=objective.knobs(0))[0].item(),
        lambda: objective.loss_and_grads(model, guide, x),
    ):
        torch.manual_seed(1)
        losses.append(ask())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)
    assert objective.shaped or losses[0] == pytest.approx(-objective.bound.item(), rel=1e-12)


@each_objective
def test_loss_and_bound_change_nothing_of_the_objective(objective):
    model, guide, x = pair("PPCA", "MeanField")
    objective = objective()
    before = dict(vars(objective))
    loss, bound = objective.loss_and_bound(model, guide, x, knobs=objective.knobs(3), max_plate_nesting=1)
    assert loss.requires_grad
    assert not bound.requires_grad
    assert all(vars(objective)[name] is value for name, value in before.items())


@each_objective
def test_a_subsample_counts_n_over_b_times_once(objective):
    x, objective = torch.randn(1000), objective()
    model, guide = Subsampled(x, 20), ShiftedPosterior(x, 20)
    knobs = objective.knobs(0)
    torch.manual_seed(1)
    loss, bound = objective.loss_and_bound(model, guide, knobs=knobs)
    torch.manual_seed(1)
    stopped = objective.gradient != "standard"
    value = objective.value(terms(model, guide, particles=objective.num_particles, stopped=stopped), knobs)
    assert (loss.item(), bound.item()) == pytest.approx([50 * part.item() for part in value], rel=1e-12)


def test_knobs_go_by_the_step_that_is_passed_and_under_svi_by_the_objectives_own_calls():
    objective = ELBO(beta=LinearAnnealing(10, start=1.0, end=3.0))
    assert [objective.knobs(step).item() for step in (0, 5, 20)] == [1.0, 2.0, 3.0]
    model, guide, x = pair("PPCA", "MeanField")
    losses = []
    for step in (0, 5):
        torch.manual_seed(1)
        losses.append(objective.loss_and_bound(model, guide, x, knobs=objective.knobs(step))[0].item())
    assert objective.step == 0
    for step in range(6):
        torch.manual_seed(1)
        loss = objective.loss_and_grads(model, guide, x)
        assert step not in (0, 5) or loss == pytest.approx(losses[step // 5], rel=1e-12)
    assert losses[0] != losses[1]
    assert objective.step == 6


class Plain(Objective):
    """The mean log weight, as a minimal objective."""

    def value(self, terms, knobs):
        bound = terms.log_weights.mean(0).sum()
        return -bound, bound


def test_an_objective_is_its_value():
    model, guide, x = pair("VAE, Bernoulli", "IAF")
    found = []
    for objective in (Plain(4), ELBO(4)):
        torch.manual_seed(1)
        found.append((objective.loss(model, guide, x), gradients(objective, model, guide, x)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)


def test_an_objective_without_a_score_refuses_sites_that_need_one():
    for use in (lambda *pair: Plain().loss(*pair), lambda *pair: fit(*pair, Plain(), epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"Plain needs reparameterized sites, but \['z'\] have no rsample: use"):
            use(*bits())


def test_a_value_is_two_scalars():
    class PerDatum(Objective):
        def value(self, terms, knobs):
            return -terms.log_weights.mean(0), terms.log_weights.mean()

    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(
        ValueError, match=r"PerDatum.value must return .* two scalars, but their shapes are \[7\] and \[\]"
    ):
        PerDatum().loss(model, guide, x)


def test_an_objective_without_a_value_is_no_objective():
    with pytest.raises(TypeError, match="abstract"):
        Objective()


# gradients


@pytest.mark.parametrize("objective", [IWAE, lambda k, g: Renyi(0.3, k, g)], ids=["IWAE", "Renyi"])
@pytest.mark.parametrize("family", [MeanField, FullCovariance, IAF, "joint"])
def test_doubly_reparameterized_gradients_have_the_mean_of_the_standard_ones(objective, family):
    joint = family == "joint"
    draw = repeated(PPCA(5, 2), FullCovariance if joint else family, joint=joint)
    standard, dreg = (draw(objective(4, gradient)) for gradient in ("standard", "dreg"))
    assert same_mean(standard, dreg)
    assert dreg.var(0).sum() < 0.6 * standard.var(0).sum()


def test_doubly_reparameterized_gradients_go_through_a_hierarchy_once():
    torch.manual_seed(0)
    model, rows = TwoLevels(), 40_000
    x = model(n=1).detach()
    mean, precision = (part.detach() for part in model.posterior(x))
    cov = precision.inverse()
    gain = cov[2:, :2] @ cov[:2, :2].inverse()  # of low given top
    roots = [torch.linalg.cholesky(part) for part in (cov[:2, :2], cov[2:, 2:] - gain @ cov[:2, 2:])]
    shift = nn.Parameter(torch.full((rows, 5), 0.3))

    def guide(x):  # the posterior, shifted and wider
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.MultivariateNormal(mean[:, :2] + shift[:, :2], scale_tril=1.3 * roots[0]))
            loc = mean[:, 2:] + (top - mean[:, :2]) @ gain.T + shift[:, 2:]
            pyro.sample("low", dist.MultivariateNormal(loc, scale_tril=1.3 * roots[1]))

    standard, dreg, stl = (
        torch.autograd.grad(IWAE(3, g).differentiable_loss(model, guide, x.expand(rows, -1)), shift)[0]
        for g in ("standard", "dreg", "stl")
    )
    assert same_mean(standard, dreg)
    assert not same_mean(standard, stl)  # so that the test can detect it


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_the_models_gradient_is_the_same_in_all(gradient):
    model, guide, x = pair("VAE, shared scale", "MeanField")
    found = []
    for objective in (IWAE(4), IWAE(4, gradient)):
        torch.manual_seed(1)
        found.append(gradients(objective, model, guide, x, of=model))
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)
    assert found[0].abs().max() > 0


def test_sticking_the_landing_has_the_mean_of_the_standard_gradient_of_the_elbo():
    draw = repeated(PPCA(5, 2), FullCovariance)
    assert same_mean(draw(ELBO()), draw(ELBO(gradient="stl")))


def test_a_guide_at_the_exact_posterior_sticks_the_landing():
    torch.manual_seed(0)
    model = PPCA(5, latent=2)
    x = model(n=7).detach()
    family = FullCovariance(2, context=None)
    posterior = model.posterior(x)
    at_posterior = family.parameters_of(posterior.mean.expand(7, 2), posterior.scale_tril.expand(7, 2, 2)).detach()
    free = nn.Parameter(at_posterior)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(free))

    (stl,) = torch.autograd.grad(ELBO(3, gradient="stl").differentiable_loss(model, guide, x), [free])
    (standard,) = torch.autograd.grad(ELBO(3).differentiable_loss(model, guide, x), [free])
    assert float(stl.abs().max()) < 1e-10
    assert float(standard.abs().max()) > 1e-2


@pytest.mark.slow
def test_the_signal_of_the_standard_gradient_falls_with_the_particles_and_that_of_dreg_does_not():
    torch.manual_seed(0)
    model, family, rows = PPCA(5, latent=2), FullCovariance(2, context=None), 8000
    x = model(n=1).detach()
    posterior = model.posterior(x)
    root = posterior.scale_tril.expand(1, 2, 2)
    aside = posterior.mean + 0.5 * root.diagonal(dim1=-2, dim2=-1)  # half a standard deviation
    free = nn.Parameter(family.parameters_of(aside, root).detach().repeat(rows, 1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(free))

    counts, slope = (4, 16, 64, 256), {}
    t = torch.tensor(counts).double().log()
    for gradient in ("standard", "dreg"):
        logs = []
        for k in counts:
            loss = IWAE(k, gradient).differentiable_loss(model, guide, x.expand(rows, -1))
            drawn = torch.autograd.grad(loss, free)[0]
            logs.append(math.log(GradientSignal(drawn.mean(0), drawn.var(0), rows).snr))
        logs = torch.tensor(logs)
        slope[gradient] = float(((t - t.mean()) * (logs - logs.mean())).sum() / (t - t.mean()).square().sum())
    assert slope["standard"] == pytest.approx(-0.5, abs=0.1)
    assert slope["dreg"] > 0


# sites without rsample


class Bits(PyroModule):
    """Three bits with a uniform prior, observed through a linear map."""

    latents = {"z": torch.Size([3])}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", BinaryVector(3, context=None)(torch.zeros(len(x), 3)))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.7).to_event(1), obs=x)


def bits():
    torch.manual_seed(0)
    model = Bits()
    guide = amortize(model, mlp(4, [5]), BinaryVector, context=5)
    return model, guide, torch.randn(2, 4)


def exact_gradient(model, guide, x, K, reduce):
    """The gradient of the bound of K samples, averaged over all states of K samples, for one data point at a time."""
    total = 0.0
    for row in x.split(1):
        states = torch.tensor([[i >> b & 1 for b in range(3)] for i in range(8)]).to(row.dtype)
        q = guide.families["z"](guide.encoder(row))
        log_q = torch.stack([q.log_prob(s.expand(1, 3)) for s in states])[:, 0]  # [8]
        log_p = torch.stack([Normal(s @ model.weight, 0.7).log_prob(row[0]).sum() - 3 * math.log(2) for s in states])
        index = torch.cartesian_prod(*[torch.arange(8)] * K).reshape(-1, K)  # [8^K, K]
        total = total + (log_q[index].sum(1).exp() * reduce((log_p - log_q)[index])).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(-total, list(guide.parameters()))])


@pytest.mark.parametrize(
    ("objective", "reduce"),
    [
        (ELBO(2), lambda w: w.mean(1)),
        (ELBO(1), lambda w: w.mean(1)),
        (IWAE(3), lambda w: w.logsumexp(1) - math.log(3)),
        (Renyi(0.5, 2), lambda w: 2 * ((0.5 * w).logsumexp(1) - math.log(2))),
        (Renyi(-1.0, 2), lambda w: ((2 * w).logsumexp(1) - math.log(2)) / 2),
    ],
    ids=["ELBO", "ELBO of one", "IWAE", "Renyi", "Renyi above"],
)
def test_the_score_function_is_unbiased(objective, reduce):
    model, guide, x = bits()
    exact = exact_gradient(model, guide, x, objective.num_particles, reduce)
    torch.manual_seed(1)
    found = torch.stack([gradients(objective, model, guide, x) for _ in range(1000)])
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found))).clamp_min(1e-12)
    assert float(z.abs().max()) < 4.5
    assert float(exact.norm()) > 0.05


class Loud(Objective):
    """The ELBO, whose score function has no baseline."""

    def value(self, terms, knobs):
        log_w = terms.log_weights
        bound = log_w.mean(0).sum()
        surrogate = (log_w.detach().mean(0) * terms.log_q["z"]).sum() + bound
        return -(bound.detach() + surrogate - surrogate.detach()), bound


@pytest.mark.slow
def test_the_other_draws_make_the_score_function_quieter_and_pyro_has_none():
    model, guide, x = bits()
    ours = torch.stack([gradients(IWAE(8), model, guide, x) for _ in range(300)])
    loud = torch.stack([gradients(Loud(8, scores=True), model, guide, x) for _ in range(300)])
    assert ours.var(0).sum() < 0.2 * loud.var(0).sum()
    pyros = RenyiELBO(alpha=0.0, num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    for p in guide.parameters():
        p.grad = None
    pyros.loss_and_grads(model, guide, x)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-10 for p in guide.parameters())
    assert float(ours.mean(0).norm()) > 0.05


# refusals


def test_dreg_refuses_shared_parameters_by_name():
    model = PPCA(5, latent=2)
    with pytest.raises(ValueError, match=r"both depend on .*weight.*gradient='stl'"):
        IWAE(4, "dreg").loss(model, ExactPosterior(model), torch.randn(3, 5))
    IWAE(4, "stl").loss(model, ExactPosterior(model), torch.randn(3, 5))


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_path_gradients_refuse_sites_without_rsample(gradient):
    with pytest.raises(ValueError, match=r"\['z'\] have no rsample: use gradient='standard'"):
        IWAE(4, gradient).loss(*bits())


def test_a_family_without_log_q_of_given_values_cannot_stick_the_landing():
    model = PPCA(5, latent=2)
    guide = amortize(model, mlp(5, [8]), Sylvester, context=8)
    with pytest.raises(NotImplementedError, match="cannot compute log q of a given value"):
        ELBO(gradient="stl").differentiable_loss(model, guide, torch.randn(3, 5))
    assert math.isfinite(ELBO().loss(model, guide, torch.randn(3, 5)))


def test_enumerated_sites_are_summed_out():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    theirs = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), lambda x: None, torch.zeros(3))
    assert ELBO().loss(config_enumerate(model), lambda x: None, torch.zeros(3)) == pytest.approx(theirs, rel=1e-6)
    with pytest.raises(NotImplementedError, match=r"\['k'\] to be enumerated"):
        ELBO(gradient="stl").loss(config_enumerate(model), lambda x: None, torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IWAE(0), "at least 1, but got 0"),
        (lambda: IWAE(2, "landing"), "gradient must be 'standard'"),
        (lambda: ELBO(gradient="dreg"), "gradient must be 'standard'"),
        (lambda: Renyi(math.inf), "finite number, but got inf"),
        (lambda: ELBO(beta=-1.0), "at least 0"),
        (lambda: ELBO(free_bits={"z": -1.0}), "at least 0"),
        (lambda: ELBO(free_bits_per="group"), "'site' or 'dimension'"),
        (lambda: LinearAnnealing(0), "at least 1, but got 0"),
        (lambda: CyclicalAnnealing(10, rise=0.0), "share of it"),
    ],
)
def test_settings_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# shaping


def split(model, guide, x, particles=20_000):
    """Rate and distortion of a mean-field guide, the rate in closed form."""
    q = guide.families["z"](guide.encoder(x))
    rate = kl_divergence(q, Independent(Normal(torch.zeros(2), torch.ones(2)), 1)).sum()
    torch.manual_seed(0)
    elbo = -ELBO(particles, analytic_kl=True).loss(model, guide, x)
    return rate.item(), -elbo - rate.item()


@pytest.mark.parametrize("analytic", [False, True])
def test_beta_weighs_the_rate_and_the_bound_is_reported(analytic):
    model, guide, x = pair("PPCA", "MeanField")
    rate, distortion = split(model, guide, x)
    torch.manual_seed(1)
    objective = ELBO(20_000, beta=3.0, analytic_kl=analytic)
    loss = objective.loss(model, guide, x)
    assert objective.shaped
    assert loss == pytest.approx(distortion + 3 * rate, rel=5e-3)
    assert float(objective.bound) == pytest.approx(-distortion - rate, rel=5e-3)


def test_free_bits_are_free():
    model, guide, x = pair("PPCA", "MeanField")
    rate, distortion = split(model, guide, x)
    n = len(x)
    for floor, paid in ((0.5 * rate / n, rate), (2.0 * rate / n, 2.0 * rate)):
        objective = ELBO(20_000, free_bits=floor, analytic_kl=True)
        assert objective.loss(model, guide, x) == pytest.approx(distortion + paid, rel=5e-3)
        assert float(objective.bound) == pytest.approx(-distortion - rate, rel=5e-3)
    above, below = (
        gradients(ELBO(1, free_bits=floor, analytic_kl=True), model, guide, x) for floor in (0.0, 2.0 * rate / n)
    )
    torch.manual_seed(1)
    free = gradients(ELBO(1, free_bits=2.0 * rate / n, analytic_kl=True), model, guide, x)
    torch.manual_seed(1)
    none = gradients(ELBO(1, beta=0.0, analytic_kl=True), model, guide, x)
    assert torch.allclose(free, none)
    assert not torch.allclose(above, below)


def test_free_bits_per_dimension():
    model, guide, x = pair("PPCA", "MeanField")
    q = guide.families["z"](guide.encoder(x))
    parts = kl_divergence(q.base_dist, Normal(torch.zeros(2), torch.ones(2))).mean(0)  # [D]
    floor = parts.mean().item()  # above the one, below the other
    rate, distortion = split(model, guide, x)
    objective = ELBO(20_000, free_bits={"z": floor}, free_bits_per="dimension", analytic_kl=True)
    expected = distortion + len(x) * parts.clamp_min(floor).sum().item()
    assert objective.loss(model, guide, x) == pytest.approx(expected, rel=5e-3)
    assert expected > distortion + rate + 1e-3
    model, guide, x = pair("PPCA", "FullCovariance")
    with pytest.raises(ValueError, match="do not both factorize"):
        objective.loss(model, guide, x)
    with pytest.raises(ValueError, match=r"names \['y'\]"):
        ELBO(free_bits={"y": 1.0}).loss(model, guide, x)


@pytest.mark.parametrize("name", ["MeanField", "FullCovariance", "LowRank"])
def test_the_analytic_kl_has_the_same_mean_and_less_variance(name):
    torch.manual_seed(0)
    model, guide, x = pair("PPCA", name)
    drawn, analytic = (
        torch.tensor([-ELBO(1, analytic_kl=known).loss(model, guide, x) for _ in range(400)]) for known in (False, True)
    )
    error = math.hypot(float(drawn.std()), float(analytic.std())) / math.sqrt(400)
    assert abs(float(drawn.mean() - analytic.mean())) < 4 * error
    assert float(analytic.var() / drawn.var()) < 0.95
    draw = repeated(PPCA(5, 2), getattr(jensen.families, name))
    assert same_mean(draw(ELBO()), draw(ELBO(analytic_kl=True)))


class Crossed:
    """p: b, then a given b, then x given a. q: a given x, then b given a. The ELBO is known, by the moments of q."""

    M, A, B = 0.8, 0.6, 0.3  # q: a ~ N(M x, A^2), b ~ N(a / 2, B^2)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            a = pyro.sample("a", dist.Normal(b, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(self.M * x, self.A).to_event(1))
            pyro.sample("b", dist.Normal(a / 2, self.B).to_event(1))

    def elbo(self, x):
        m, within = self.M * x, self.A**2 / 4 + self.B**2

        def expected(mean, variance, scale):  # E log N(r; 0, scale^2) for r ~ N(mean, variance)
            return -0.5 * ((mean**2 + variance) / scale**2 + math.log(2 * math.pi * scale**2))

        entropy = math.log(2 * math.pi * math.e * self.A * self.B)  # of a and b, half of log(2 pi e s^2) each
        parts = expected(x - m, self.A**2, 0.5) + expected(m / 2, within, 1.0) * 2 + entropy
        return float(parts.sum())


@pytest.mark.parametrize(
    "shape",
    [{}, {"analytic_kl": True}, {"free_bits": 1e-9}, {"free_bits": 1e-9, "free_bits_per": "dimension"}],
    ids=["draws", "closed form", "free bits per site", "free bits per dimension"],
)
def test_a_guide_that_draws_a_parent_later_has_its_own_elbo(shape):
    """Tiny free bits leave the loss at minus the ELBO: each group is a KL."""
    torch.manual_seed(0)
    crossed, x = Crossed(), torch.randn(6, 2)
    objective = ELBO(1000, **shape)
    losses = torch.tensor([objective.loss(crossed.model, crossed.guide, x) for _ in range(60)])
    error = float(losses.std()) / math.sqrt(60)
    assert error < 0.02
    assert abs(float(losses.mean()) + crossed.elbo(x)) < 4 * error


def test_a_kl_in_closed_form_needs_its_parents_drawn_before():
    crossed, x = Crossed(), torch.randn(6, 2)
    t = terms(crossed.model, crossed.guide, x, particles=3)
    assert (t.drawn_later("a"), t.drawn_later("b")) == (["b"], [])
    for kl in (t.kl, t.kl_per_dimension):
        with pytest.raises(NotImplementedError, match=r"\['b'\]"):
            kl("a")
    q, p = Normal(t.values["a"] / 2, crossed.B), Normal(0.0, 1.0)
    assert torch.allclose(t.kl("b"), kl_divergence(q, p).sum(-1))  # b has no parents in the model


def test_free_bits_of_sites_in_another_order_are_those_of_all_of_them():
    torch.manual_seed(0)
    crossed, x = Crossed(), torch.randn(6, 2)
    distortion = -float(terms(crossed.model, crossed.guide, x, particles=50_000).observed.mean(0).sum())
    kl = (-crossed.elbo(x) - distortion) / len(x)
    for per, free in (("site", 2 * (kl + 1)), ("dimension", 4 * (kl + 1))):
        objective = ELBO(20_000, free_bits=kl + 1, free_bits_per=per)
        assert objective.loss(crossed.model, crossed.guide, x) == pytest.approx(distortion + free * len(x), rel=1e-2)


def test_free_bits_per_dimension_without_a_closed_form():
    """KL(Laplace(m, s) || N(0, 1)) = log(2 pi) / 2 + (m^2 + 2 s^2) / 2 - log(2 s) - 1, by dimension."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    m, s = torch.tensor([2.0, 0.1]), torch.tensor([0.3, 0.9])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Laplace(m, s).to_event(1))

    torch.manual_seed(0)
    t = terms(model, guide, torch.zeros(3, 2), particles=100_000)
    exact = (m**2 + 2 * s**2) / 2 - (2 * s).log() - 1 + math.log(2 * math.pi) / 2
    parts = torch.stack([part.mean() for part in t.kl_per_dimension("z")])
    assert torch.allclose(parts, exact, atol=0.02)


@pytest.mark.parametrize("whose", ["model", "both"])
def test_a_kl_under_masks_has_the_mean_of_its_draws(whose):
    """Where the guide's mask is wider, log q counts there, without a closed form."""
    mask = torch.tensor([True, False, True, False])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with (
            pyro.plate("data", len(x), dim=-1),
            poutine.mask(mask=mask.clone() if whose == "both" else torch.tensor(True)),
        ):
            pyro.sample("z", dist.Normal(0.3 * x, 0.5).to_event(1))

    torch.manual_seed(0)
    x = torch.randn(4, 2)
    t = terms(model, guide, x, particles=20_000)
    drawn = t.log_q["z"] - t.log_p["z"]
    error = drawn.std(0) / math.sqrt(20_000)
    for kl in (t.kl("z"), sum(t.kl_per_dimension("z"))):
        assert ((kl.mean(0) - drawn.mean(0)).abs() <= 4 * error).all()
        assert torch.allclose(kl[:, mask], kl[:1, mask])  # in closed form there


@pytest.mark.parametrize("family", [FullCovariance, LowRank])
def test_the_kl_of_gaussians_in_closed_form(family):
    torch.manual_seed(0)
    q = family(3, context=4)(torch.randn(5, 4))
    prior = dist.Normal(torch.tensor([0.5, 0.0, -1.0]), torch.tensor([1.0, 2.0, 0.5])).to_event(1)
    covariance = torch.stack([torch.cov(row.T) for row in q.rsample((400_000,)).transpose(0, 1)])
    exact = kl_divergence(
        MultivariateNormal(q.loc, covariance),
        MultivariateNormal(prior.base_dist.loc, torch.diag(prior.base_dist.scale.square())),
    )
    assert torch.allclose(kl_divergence(q, prior), exact, rtol=0.02, atol=0.01)
    if family is FullCovariance:
        sure = MultivariateNormal(prior.base_dist.loc, torch.diag(prior.base_dist.scale.square())).expand([5])
        assert torch.allclose(kl_divergence(q, prior), kl_divergence(q, sure), rtol=1e-10)


# training


@pytest.mark.parametrize(
    "objective", [IWAE(5), IWAE(5, "dreg"), Renyi(0.5, 5), ELBO(gradient="stl"), ELBO(analytic_kl=True)]
)
def test_every_objective_trains_under_svi_and_fit(objective):
    torch.manual_seed(0)
    model = PPCA(5, latent=2)
    x = model(n=64).detach()
    guide = amortize(model, mlp(5, [16]), MeanField, context=16)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=objective)
    losses = [svi.step(x) for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert objective.step == 100
    history = fit(model, guide, x, objective, epochs=30, batch_size=32, lr=1e-2, seed=0, progress=False)
    assert history.elbo[-1] > -losses[0] / 64
    assert history.shaped == []


def test_a_schedule_goes_by_optimizer_steps_and_survives_a_resumed_run(tmp_path):
    def run(epochs, resume):
        torch.manual_seed(0)
        model = VAE(mlp(2, [8]), _observations(), 2)
        guide = amortize(model, mlp(5, [8]), MeanField, context=8)
        seen = []
        objective = ELBO(beta=lambda step: seen.append(step) or min(1.0, step / 20))
        history = fit(
            model,
            guide,
            x,
            objective,
            epochs=epochs,
            batch_size=16,
            seed=0,
            progress=False,
            checkpoint=tmp_path / f"{resume}.pt",
            resume=resume,
        )
        return history, torch.cat([p.detach().flatten() for p in guide.parameters()]), seen

    torch.manual_seed(1)
    x = torch.randn(32, 5)
    whole, end, seen = run(6, False)
    run(3, True)
    resumed, again, later = run(6, True)
    assert resumed.elbo == whole.elbo
    assert resumed.shaped == whole.shaped
    assert len(whole.shaped) == 6
    assert torch.equal(end, again)
    assert max(seen) == max(later) == 11
    assert whole.shaped[0] > whole.elbo[0]  # beta below 1: a smaller weight of the KL


def _observations():
    from jensen.families import Gaussian

    return Gaussian(5, 8, scale=0.5)


def test_gradient_signals_know_their_own_noise():
    model, guide, x = pair("PPCA", "MeanField")
    one, two = (gradient_signal(model, guide, x, ELBO(), repeats=r, seed=0) for r in (200, 1000))
    assert one.snr == pytest.approx(two.snr, rel=0.15)
    assert len(one.mean) == sum(p.numel() for p in guide.parameters())
    with pytest.raises(ValueError, match="at least 2, but got 1"):
        gradient_signal(model, guide, x, ELBO(), repeats=1)


def test_the_picture_of_signals_shows_each_ratio():
    one = torch.ones(3)
    signals = {k: GradientSignal(one / k, one / k, repeats=10_000) for k in (1, 4, 16)}
    ax = plot_signal({"standard": signals, "dreg": {1: signals[1]}})
    assert ax.lines[0].get_xdata().tolist() == [1, 4, 16]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([s.snr for s in signals.values()])
    assert ax.lines[-1].get_ydata().tolist() == pytest.approx([signals[1].snr / math.sqrt(k) for k in (1, 4, 16)])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["standard", "dreg", "falls as 1/√K"]
    with pytest.raises(ValueError, match="results is empty"):
        plot_signal({})


def _power_mean(log_w, p):
    """The power mean of a list of log weights, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        powers = [(Decimal(p) * Decimal(w)).exp() for w in log_w]
        return float((sum(powers) / len(powers)).ln() / Decimal(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [3.0, 1.0, 0.1, 1e-3, 1e-5, 1e-7, 1e-12, -1e-7, -1e-3, -2.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_power_mean_keeps_its_digits_at_every_order(p, spread, dtype):
    """In float32 the bound of order 1 - 1e-7 was 2.7 nats from the ELBO."""
    log_w = (torch.randn(10, 5).double() * spread - 100).to(dtype)
    expected = torch.tensor([_power_mean(column.tolist(), p) for column in log_w.T], dtype=torch.float64)
    found = power_mean(log_w, p).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=(100 + 4 * spread) * 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p", [1.0, 0.1, 1e-4, 1e-7])
def test_gradients_of_the_power_mean_are_normalized_powers(p):
    log_w = (3 * torch.randn(10, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(power_mean(log_w, p).sum(), log_w)
    powers = (p * log_w.detach().double()).softmax(0)
    torch.testing.assert_close(gradient.double(), powers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-3, 1e-6])
def test_the_baseline_replaces_one_weight_by_the_geometric_mean_of_the_others(p):
    log_w = torch.randn(6, 3) - 50
    found = leave_one_out(log_w, p)
    for n in range(3):
        column = log_w[:, n].double().tolist()
        for k in range(6):
            rest = column[:k] + column[k + 1 :]
            expected = _power_mean(column, p) - _power_mean([*rest, sum(rest) / 5], p)
            assert found[k, n].item() == pytest.approx(expected, abs=2e-4)


def test_vimco_with_weights_of_zero():
    """The signal of log weights (-inf, 0, 1) by hand; it was NaN."""
    log_w = torch.tensor([[-math.inf], [0.0], [1.0]]).double()
    e = math.e
    expected = [math.log((1 + e) / (1 + e + e**0.5)), math.log((1 + e) / e), math.log(1 + e)]
    torch.testing.assert_close(leave_one_out(log_w, 1.0).flatten(), torch.tensor(expected).double())
    alone = torch.tensor([[-math.inf], [-math.inf], [1.0]]).double()  # no baseline for the one that counts
    found = leave_one_out(alone, 1.0).flatten()
    assert found[2].item() == pytest.approx(1 - math.log(3))
    assert (found[:2] == 0).all()


def test_the_gradient_of_iwae_is_unbiased_where_draws_have_no_density():
    """With m of K draws possible, m binomial, the bound is log p(1, x) - log q(1) + log(m / K): its slope by hand."""
    start, K = 2.0, 8

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5).double()))
            pyro.factor("hard", torch.where(c > 0, torch.zeros_like(c), torch.full_like(c, -math.inf)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.tensor(start).double())

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("c", dist.Bernoulli(logits=self.logit.expand(len(x))))

    def bound(logit):
        q = 1 / (1 + math.exp(-logit))
        return sum(math.comb(K, m) * q**m * (1 - q) ** (K - m) * math.log(m / K) for m in range(1, K + 1)) - math.log(q)

    guide, x, objective = Guide(), torch.randn(20).double(), IWAE(K)
    drawn = torch.stack(
        [torch.autograd.grad(objective.differentiable_loss(model, guide, x), guide.logit)[0] for _ in range(400)]
    )
    expected = -20 * (bound(start + 1e-4) - bound(start - 1e-4)) / 2e-4
    assert abs(float(drawn.mean()) - expected) < 4 * float(drawn.std()) / math.sqrt(400)
