"""Both parts of the gap against exact results."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchies import Discrete
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro_pairs import PyroVAE
from torch import nn

from jensen.families import IAF, Delta, FullCovariance, MeanField, OneHotCategorical, Sylvester
from jensen.graphs.capture import capture
from jensen.guides import Amortized, ExactPosterior, Laplace, PriorGuide, SemiAmortized, amortize
from jensen.inference import Evidence, Gaps, compare, evaluate, fit, gaps, simulate
from jensen.inference.measure.search import LocalSearch
from jensen.models import PPCA, Banana, Ring
from jensen.networks import mlp
from jensen.plots import plot_gaps

N = 40


@pytest.fixture(scope="module")
def model(digits):
    """The rotated PPCA of the main job, in float32."""
    return PPCA(64, 8).double().fit_closed_form(digits.train).rotated(seed=0).float()


@pytest.fixture(scope="module")
def x(digits):
    return digits.test[:N].float()


def known_kl(model):
    """KL of the best mean-field Gaussian: half of log det diag(P) - log det P, P the posterior's precision."""
    covariance = model.posterior(torch.zeros(1, 64)).covariance_matrix[0].detach().double()
    precision = torch.linalg.inv(covariance)
    return 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))


def trained(model, family, digits):
    """A guide whose encoder has three hidden units."""
    torch.manual_seed(0)
    guide = amortize(model, mlp(64, [3]), family, context=3)
    fit(model, guide, digits.train.float(), epochs=10, lr=1e-2, freeze=model, seed=0, progress=False)
    return guide


def test_a_full_covariance_family_loses_nothing_on_ppca(model, digits, x):
    guide = trained(model, FullCovariance, digits)
    s = gaps(model, guide, x, particles=500, seed=0, progress=False).summary()
    assert abs(s["approximation"]) < 4 * s["approximation_mc_error"] + 2e-3
    assert s["amortization"] > 5  # three hidden units for eight latents: all of it is the amortization gap
    assert s["converged"] > 0.95


def test_sites_of_any_name_are_split(model, x):
    def foreign(images):
        with pyro.plate("data", len(images)):
            code = pyro.sample("code", dist.Normal(images.new_zeros(8), 1.0).to_event(1))
            pixels = dist.Normal(model.mean + code @ model.weight.T, model.noise).to_event(1)
            pyro.sample("pixels", pixels, obs=images.flatten(1))

    images, encoder = x.view(-1, 8, 8), nn.Sequential(nn.Flatten(), mlp(64, [3]))
    guide = Amortized(encoder, {"code": MeanField(8, 3)})
    s = gaps(foreign, guide, images, particles=2000, seed=0, progress=False).summary()
    assert s["approximation"] == pytest.approx(known_kl(model), abs=4 * s["approximation_mc_error"] + 5e-2)
    assert s["amortization"] > 5


def test_a_mean_field_family_loses_its_known_kl_on_ppca(model, digits, x):
    guide = trained(model, MeanField, digits)
    s = gaps(model, guide, x, particles=2000, seed=0, progress=False).summary()
    assert s["approximation"] == pytest.approx(known_kl(model), abs=4 * s["approximation_mc_error"] + 5e-3)
    assert s["amortization"] > 5
    assert s["converged"] >= 0.9


def test_the_parts_add_up_and_the_guide_is_left_alone(model, digits, x):
    guide = trained(model, MeanField, digits)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    stream = torch.get_rng_state()
    found = gaps(model, guide, x, particles=300, seed=0, progress=False)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    torch.testing.assert_close(found.approximation + found.amortization, found.total)
    torch.testing.assert_close(found.total, model.log_evidence(x).double() - found.evidence.elbo, rtol=2e-6, atol=1e-5)
    same = evaluate(model, guide, x, particles=300, seed=0, progress=False)
    torch.testing.assert_close(found.evidence.elbo, same.elbo, rtol=2e-6, atol=0)  # float32
    again = gaps(model, guide, x, particles=300, seed=0, progress=False)
    assert torch.equal(found.local.elbo, again.local.elbo)


def test_batches_are_optimised_as_one(model, digits, x):
    guide = trained(model, FullCovariance, digits)
    parts = gaps(model, guide, x, particles=300, batch_size=25, seed=0, progress=False)
    assert parts.local.elbo.shape == parts.converged.shape == parts.gained.shape == (N,)
    assert parts.approximation.abs().max() < 0.05  # every data point, in its row


@pytest.mark.parametrize("make", [ExactPosterior, PriorGuide])
def test_a_guide_without_parameters_has_no_amortization_gap(make, float64):
    model = PPCA(5, 2)
    x = model(n=20).detach()
    found = gaps(model, make(model), x, particles=2000, seed=0, progress=False)
    error = found.summary()["amortization_mc_error"]
    assert abs(found.summary()["amortization"]) <= 4 * error + 1e-10
    assert found.rounds == 0 and found.converged.all()


def test_laplace_is_the_best_gaussian_on_ppca_and_not_on_a_banana(float64):
    model = PPCA(5, 2)
    x = model(n=20).detach()
    found = gaps(model, Laplace(model), x, particles=200, seed=0, progress=False)
    assert found.approximation.abs().max() < 1e-4 and found.amortization.abs().max() < 1e-4
    banana = Banana()
    torch.manual_seed(1)
    _, x = simulate(banana, 20)
    found = gaps(banana, Laplace(banana), x, particles=500, seed=0, progress=False).summary()
    assert found["approximation"] > 0.2 and found["amortization"] > 0.2


def test_an_autoguides_gap_is_split_too(model, x):
    x = x[:20]
    guide = AutoNormal(model)
    fit(model, guide, x, epochs=20, lr=1e-2, batch_size=100, freeze=model, seed=0, progress=False)
    s = gaps(model, guide, x, particles=1000, seed=0, progress=False).summary()
    assert s["approximation"] == pytest.approx(known_kl(model), abs=4 * s["approximation_mc_error"] + 1e-2)
    assert s["amortization"] > 1
    joint = AutoDiagonalNormal(model)
    joint(x)
    with pytest.raises(ValueError, match="joint"):
        gaps(model, joint, x, particles=50, progress=False)


@pytest.mark.parametrize("family", [pytest.param(kind, marks=pytest.mark.slow) for kind in (IAF, Sylvester)])
def test_flows_have_weights_of_their_own_for_each_datum(family):
    """Two latents, rotated: flows come close to the exact posterior, with and without a known log q of any value."""
    torch.manual_seed(0)
    model = PPCA(5, 2).double().fit_closed_form(torch.randn(200, 5).double() @ torch.randn(5, 5).double())
    model = model.rotated(seed=1).float()
    torch.manual_seed(0)
    guide = amortize(model, mlp(5, [8]), family, context=8)
    x = model(n=20).detach()
    s = gaps(model, guide, x, particles=500, seed=0, progress=False).summary()
    assert abs(s["approximation"]) < 0.02 + 4 * s["approximation_mc_error"]
    assert s["amortization"] > 1


def test_refinement_closes_the_amortization_gap(model, digits, x):
    guide = trained(model, MeanField, digits)
    rough = gaps(model, guide, x, particles=300, seed=0, progress=False).summary()
    refined = SemiAmortized(guide, model, steps=100, lr=0.1)
    fine = gaps(model, refined, x, particles=300, seed=0, progress=False).summary()
    assert fine["amortization"] < 0.1 * rough["amortization"]
    assert fine["approximation"] == pytest.approx(rough["approximation"], abs=0.03)


FAMILIES = {"diagonal": MeanField, "full": FullCovariance, "flow": IAF, "flow without an inverse": Sylvester}


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_find_what_eager_ones_find(family, float64):
    """The same operations in the same order: in float64 only sums of gradients differ by rounding, 1e-10."""
    model, guide, x = small(FAMILIES[family])
    gained, routes, moved = [], [], []
    for mode in (False, "auto"):
        local = guide.local(x)
        torch.manual_seed(3)
        search = LocalSearch(model, local, (x,), 4, mode, 1000)
        gained.append(search.round(20, 0.05)[0])
        routes.append(search.route)
        moved.append(local.state_dict())
    assert routes == ["eager: compile=False", "traced: compiling would not pay"]
    torch.testing.assert_close(*gained, rtol=1e-10, atol=1e-10)
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, rtol=1e-10, atol=1e-10, msg=f"{name} moved otherwise")


def small(family):
    model = PPCA(5, 2)
    return model, amortize(model, mlp(5, [8]), family, context=8), model(n=12).detach()


def test_all_of_gaps_runs_in_graphs_and_gives_the_same(float64, monkeypatch):
    """Warnings are errors here, and ``compile=True`` warns if code is not compiled."""
    monkeypatch.setattr("jensen.graphs.routes.compiled", lambda graph, *inputs: graph)
    model, guide, x = small(FullCovariance)
    eager, fast = (
        gaps(model, guide, x, 200, rounds=2, steps=30, seed=0, compile=c, progress=False) for c in (False, True)
    )
    for part in ("approximation", "amortization", "gained"):
        torch.testing.assert_close(getattr(fast, part), getattr(eager, part), rtol=1e-9, atol=1e-9)


def test_a_graph_of_steps_reads_parameters_where_they_are(float64):
    model, guide, x = small(MeanField)
    with torch.no_grad():
        search = LocalSearch(model, guide.local(x), (x,), 4, "auto", 1000)
        for p in (*model.parameters(), *search.free):
            p.add_(0.3)
        slopes = []
        for run in (search.step, search._landing):
            torch.manual_seed(3)
            slopes.append(run(x))
    assert search.route.startswith("traced")
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_where_log_q_is_not_repeated_a_captured_step_does_not_land(float64):
    """Dropout in the family: eagerly the second run raises an error, in a graph it cannot."""
    model, _, x = small(MeanField)
    guide = amortize(model, mlp(5, [8]), NoisyGaussian, context=8).local(x)
    search = LocalSearch(model, guide, (x,), 4, "auto", 1000)
    search._routed = _trusting(search)
    torch.manual_seed(3)
    search.step(x)
    expected = search._plain(x)
    torch.manual_seed(3)
    assert all(map(torch.equal, search._slopes(), expected))


class NoisyGaussian(MeanField):
    """Each distribution has another mean."""

    def distribution(self, parameters):
        noise = torch.rand(())
        return super().distribution(parameters + noise)


def _trusting(search):
    """The graph of a step, which is rejected because the step itself raises an error."""
    graph = capture(search._landing, *search.batch)
    assert not graph(*search.batch)[0]
    return graph


def test_a_search_that_cannot_be_captured_says_why(float64):
    model, guide, x = small(MeanField)
    forward = model.forward
    model.forward = lambda x: forward(x) if model.weight.isfinite().all() else None
    search = LocalSearch(model, guide.local(x), (x,), 4, True, 1000)
    with pytest.warns(UserWarning, match="gaps does not compile this search; its steps run eager: RuntimeError"):
        search.round(3, 0.1)


def test_too_short_a_search_is_not_called_converged(model, digits, x):
    guide = trained(model, FullCovariance, digits)
    s = gaps(model, guide, x, particles=100, rounds=1, steps=20, seed=0, progress=False).summary()
    assert s["converged"] < 0.5 and s["gained"] > 0.1
    guide = amortize(model, mlp(64, [3]), Sylvester, context=3)
    found = gaps(model, guide, x, particles=100, rounds=2, steps=20, lr=50.0, seed=0, progress=False)
    assert found.summary()["converged"] < 0.5  # a diverged round proves nothing


def _evidence(elbo, log_p, k):
    n = torch.full((2,), 1.0, dtype=torch.float64)
    return Evidence(elbo * n, 0.1 * n, log_p * n, 0.1 * n, 10 * n, k, None, particles=100, features=1)


def test_log_evidence_pools_both_estimates_by_their_elbos():
    """At p(x) = 0.2 and 0.6, and ELBOs log 3 apart: (0.2 + 3 * 0.6) / 4."""
    a = _evidence(-3.0, math.log(0.2), torch.tensor([0.2, 0.9]))
    b = _evidence(-3.0 + math.log(3), math.log(0.6), torch.tensor([0.5, 0.5]))
    found = Gaps(a, b, torch.zeros(2), torch.ones(2).bool(), 1, 0.0)
    assert found.log_evidence.tolist() == pytest.approx([math.log(0.5)] * 2)
    assert found.approximation.tolist() == pytest.approx([math.log(0.5) + 3.0 - math.log(3)] * 2)
    assert found.amortization.tolist() == pytest.approx([math.log(3)] * 2)
    pooled = 0.1 * math.hypot(0.1, 0.9)  # a tenth of the pooled weights are a's
    assert found.summary()["approximation_mc_error"] == pytest.approx(math.hypot(0.1, pooled) / math.sqrt(2))
    assert found.unreliable == 0.5
    far = Gaps(_evidence(-9.0, -1.0, torch.tensor([0.9, 0.9])), b, torch.zeros(2), torch.ones(2).bool(), 1, 0.0)
    assert far.unreliable == 0.0  # the guide of the large k-hat counts e^-5


def test_pooling_survives_elbos_that_are_not_finite():
    lost, found = (_evidence(elbo, p, torch.tensor([0.2, 0.2])) for elbo, p in ((-math.inf, -math.inf), (-2.0, -1.0)))
    for a, b in ((lost, found), (found, lost)):
        both = Gaps(a, b, torch.zeros(2), torch.ones(2).bool(), 1, 0.0)
        assert both.log_evidence.tolist() == pytest.approx([-1.0] * 2)
        assert both._standard_error.tolist() == pytest.approx([0.1] * 2)
    zero = [_evidence(-math.inf, math.log(p), torch.tensor([0.2, 0.2])) for p in (0.2, 0.6)]  # a weight of zero each
    both = Gaps(*zero, torch.zeros(2), torch.ones(2).bool(), 1, 0.0)
    assert both.log_evidence.tolist() == pytest.approx([math.log(0.4)] * 2)


class Unknown(PPCA):
    """PPCA without an exact log p(x)."""

    log_evidence = None


@pytest.mark.parametrize("width", [3, 32], ids=["poor encoder", "good encoder"])
def test_log_evidence_is_not_low_where_it_is_not_known(width, float64):
    """Beyond -SE^2 / 2, the bias of a log. By the smaller k-hat it was 0.09 nats low, by equal pooling 0.2."""
    torch.manual_seed(0)
    known = PPCA(8, 4)
    with torch.no_grad():
        known.weight.mul_(1.3)
        known.log_noise.fill_(math.log(0.5))
        x = known(n=1000)
    model = Unknown(8, 4)
    model.load_state_dict(known.state_dict())
    guide = amortize(model, mlp(8, [width]), MeanField, context=width)
    fit(model, guide, x, lr=1e-2, epochs=20 if width > 3 else 2, freeze=model, progress=False, seed=0)
    found = gaps(model, guide, x[:400], particles=100, rounds=3, steps=80, seed=0, progress=False)
    error = found.log_evidence - known.log_evidence(x[:400]).detach()
    own = float(found._standard_error.square().mean()) / 2  # the bias of the log of a mean
    assert abs(float(error.mean()) + own) < 3 * float(error.std()) / math.sqrt(400) + 0.005
    taken = torch.where(
        found.evidence.pareto_k < found.local.pareto_k, found.evidence.log_evidence, found.local.log_evidence
    )
    assert float((taken - found.log_evidence).mean()) < -0.02  # why none is selected


def test_a_table_has_both_columns(digits, model, x):
    guide = trained(model, MeanField, digits)
    pairs = {"prior": (model, PriorGuide(model)), "mean-field": (model, guide)}
    table = compare(pairs, x, particles=200, gaps=True, seed=0, progress=False)
    head, _, *rows = table.table().splitlines()
    assert "approximation" in head and "amortization" in head
    s = table.rows["mean-field"].gaps.summary()
    assert f"{s['amortization']:.1f}"[:2] in rows[1]
    assert table.to_dict()["rows"]["mean-field"]["gaps"] == s
    without = compare(pairs, x, particles=200, seed=0, progress=False)
    assert "approximation" not in without.table()
    assert without.rows["mean-field"].gaps is None


def test_a_guide_that_cannot_be_taken_apart_is_named():
    vae = PyroVAE()
    x = torch.bernoulli(torch.full((4, 8), 0.5))
    with pytest.raises(TypeError, match=r"has no method local\(\*data\)"):
        gaps(vae.model, vae.guide, x, progress=False)
    table = compare({"a": (vae.model, vae.guide)}, x, particles=50, gaps=True, progress=False)
    assert table.rows["a"].gaps is None


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"steps": 0}, {"draws": 0}, {"tolerance": 0.0}, {"lr": -1.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    model = PPCA(5, 2)
    with pytest.raises(ValueError, match="at least 1, tolerance and lr positive"):
        gaps(model, PriorGuide(model), torch.zeros(3, 5), progress=False, **wrong)


def test_bars_are_the_means(digits, model, x):
    guide = trained(model, MeanField, digits)
    found = gaps(model, guide, x, particles=200, seed=0, progress=False)
    ax = plot_gaps({"mean-field": found, "again": found})
    widths = [patch.get_width() for patch in ax.patches]
    s = found.summary()
    assert widths == pytest.approx([s["approximation"]] * 2 + [s["amortization"]] * 2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mean-field", "again"]
    with pytest.raises(ValueError, match="results is empty"):
        plot_gaps({})


@pytest.mark.slow
def test_models_without_a_gaussian_posterior_order_the_families():
    """By the approximation gap only: a flow beats Gaussians on both, and a full Gaussian a diagonal one on a banana."""
    for model, gain in ((Banana(), 0.0), (Ring(), -0.05)):
        torch.manual_seed(0)
        _, x = simulate(model, 16)
        part = {}
        for name, family in (("diagonal", MeanField), ("full", FullCovariance), ("flow", IAF)):
            torch.manual_seed(0)
            guide = amortize(model, mlp(1, [32]), family, context=32)
            _, train = simulate(model, 1000)
            fit(model, guide, train, epochs=40, batch_size=250, lr=1e-2, seed=0, progress=False)
            part[name] = gaps(model, guide, x, particles=1000, rounds=6, seed=0, progress=False).approximation
        for better, worse, least in (("full", "diagonal", gain), ("flow", "full", 0.1)):
            difference = part[worse] - part[better]
            assert difference.mean() > least, (type(model).__name__, better, worse)


def test_an_autoguide_is_left_as_it_was(model, x):
    guide = AutoNormal(model)
    guide(x[:20])
    before = guide.locs.z.detach().clone()
    gaps(model, guide, x[:20], 50, rounds=1, steps=20, progress=False)
    guide(x[:20])  # takes its parameters from Pyro's store
    assert torch.equal(guide.locs.z, before)


def test_a_guide_without_parameters_is_measured_once():
    ring = Ring()
    found = gaps(ring, PriorGuide(ring), torch.rand(5, 1), 100, progress=False)
    assert found.amortization.eq(0).all()
    assert found.summary()["amortization_mc_error"] == 0


def test_discrete_sites_have_no_local_optimum_and_a_dash_in_the_table():
    torch.manual_seed(0)
    model = Discrete(OneHotCategorical)
    guide = amortize(model, mlp(model.event_shape.numel(), [8]), OneHotCategorical, context=8)
    x = model(n=5).detach()
    with pytest.raises(NotImplementedError, match="follows gradients of samples"):
        gaps(model, guide, x, 50, progress=False)
    table = compare({"discrete": (model, guide)}, x, particles=50, gaps=True, progress=False)
    assert table.rows["discrete"].gaps is None


def test_a_comparison_says_at_which_pair_it_failed(model, x):
    pairs = {"prior": (model, PriorGuide(model)), "map": (model, amortize(model, mlp(64, [8]), Delta, context=8))}
    with pytest.raises(ValueError, match="point estimate") as raised:
        compare(pairs, x[:5], particles=50, progress=False)
    assert raised.value.__notes__ == ["in compare, at row 'map'"]


def test_bars_need_names(model, x):
    found = gaps(model, PriorGuide(model), x[:5], 50, progress=False)
    with pytest.raises(TypeError, match="by name"):
        plot_gaps(found)
    assert len(plot_gaps({"prior": found, "none": None}).get_yticks()) == 1
