"""The contract of every model with every guide."""

import copy
import math

import pyro
import pytest
import torch
from members import CASES, EXCLUSIONS, GUIDES, MODELS, TRAINED_CASES, D, pair
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from jensen.inference import ELBO, IWAE, fit, log_joint, log_weights, terms

pytestmark = pytest.mark.filterwarnings("ignore:Laplace")  # a warning where its Gaussian is a poor guide
each_pair = pytest.mark.parametrize(("model_name", "guide_name"), CASES)
each_trained_pair = pytest.mark.parametrize(("model_name", "guide_name"), TRAINED_CASES)
each_model = pytest.mark.parametrize("model_name", MODELS)


def test_all_pairs_but_the_exclusions_are_executed():
    assert len(CASES) == len(MODELS) * len(GUIDES) - len(EXCLUSIONS)


@each_model
def test_samples_have_the_declared_shapes(model_name):
    model = MODELS[model_name]()
    trace = poutine.trace(model).get_trace(n=4)
    assert trace.nodes["x"]["value"].shape == (4, *model.event_shape)
    assert {name: trace.nodes[name]["value"].shape for name in model.latents} == {"z": (4, D)}
    assert dict(model.latents) == {"z": (D,)}


@each_model
def test_samples_lie_in_the_support(model_name):
    model = MODELS[model_name]()
    site = poutine.trace(model).get_trace(n=4).nodes["x"]
    assert site["fn"].support.check(site["value"]).all()


@each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_weights_are_per_datum_in_the_pairs_precision(model_name, guide_name, dtype):
    model, guide, x = pair(model_name, guide_name)
    log_w = log_weights(model.to(dtype), guide.to(dtype), x.to(dtype), particles=6)
    assert log_w.shape == (6, 7)
    assert log_w.dtype == dtype
    assert log_w.isfinite().all()


@each_pair
def test_mean_log_weight_is_minus_the_loss_of_trace_elbo(model_name, guide_name, float64):
    model, guide, x = pair(model_name, guide_name)
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=6)
    torch.manual_seed(1)
    loss = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert -log_w.mean(0).sum().item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(("model_name", "guide_name"), [case for case in CASES if case[1] != "StudentT"])
def test_a_datum_moves_its_own_weights_only(model_name, guide_name, float64):
    model, guide, x = pair(model_name, guide_name)
    other = x.clone()
    other[3] = 1 - other[3]
    weights = []
    for data in (x, other):
        torch.manual_seed(1)
        weights.append(log_weights(model, guide, data, particles=6))
    moved = (weights[0] != weights[1]).any(0)
    assert moved.tolist() == [n == 3 for n in range(7)]


@each_model
def test_a_datum_moves_its_own_weights_only_where_draws_take_a_varying_number_of_random_numbers(model_name, float64):
    """Gamma samples with context-dependent degrees of freedom: a data point shifts the random stream of others."""
    model, guide, x = pair(model_name, "StudentT")
    x.requires_grad_()
    (slope,) = torch.autograd.grad(log_weights(model, guide, x, particles=6)[:, 3].sum(), x)
    assert (slope != 0).any(-1).tolist() == [n == 3 for n in range(7)]


@each_trained_pair
def test_the_gradient_reaches_every_parameter(model_name, guide_name):
    model, guide, x = pair(model_name, guide_name)
    log_weights(model, guide, x, particles=6).mean().backward()
    for prefix, half in (("model", model), ("guide", guide)):
        for name, p in half.named_parameters():
            assert p.grad is not None, f"{prefix}.{name} gets no gradient"
            assert p.grad.isfinite().all(), f"{prefix}.{name} gets a gradient that is not finite"
            assert p.grad.abs().sum() > 0, f"{prefix}.{name} gets a zero gradient"


@pytest.mark.filterwarnings("ignore:training diverged")  # a step may well be too long
@each_trained_pair
def test_fit_moves_every_parameter(model_name, guide_name):
    model, guide, x = pair(model_name, guide_name)
    before = copy.deepcopy([model.state_dict(), guide.state_dict()])
    fit(model, guide, x, epochs=1, batch_size=4, progress=False)
    for prefix, half, old in zip(("model", "guide"), (model, guide), before, strict=True):
        for name, _ in half.named_parameters():
            assert not torch.equal(half.state_dict()[name], old[name]), f"{prefix}.{name} is not trained"


@each_pair
def test_state_dict_round_trip(model_name, guide_name):
    model, guide, x = pair(model_name, guide_name)
    twin, twin_guide, _ = pair(model_name, guide_name)
    twin.load_state_dict(model.state_dict())
    twin_guide.load_state_dict(guide.state_dict())
    weights = []
    for m, g in ((model, guide), (twin, twin_guide)):
        torch.manual_seed(1)
        weights.append(log_weights(m, g, x, particles=6))
    assert torch.equal(*weights)


@each_pair
def test_log_joint_and_terms_add_up_to_the_log_weights(model_name, guide_name, float64):
    model, guide, x = pair(model_name, guide_name)
    t = terms(model, guide, x, particles=6)
    torch.testing.assert_close(log_joint(model, {"z": t.values["z"]}, x), t.log_p["x"] + t.log_p["z"])
    torch.testing.assert_close(t.log_weights, t.log_p["x"] + t.log_p["z"] - sum(t.log_q.values()))
    assert set(t.log_q) - {"joint"} == {"z"}


@each_trained_pair
def test_two_instances_train_side_by_side_under_classic_svi(model_name, guide_name):
    pairs = [pair(model_name, guide_name) for _ in range(2)]
    halves = [half for model, guide, _ in pairs for half in (model, guide)]
    before = [copy.deepcopy(half.state_dict()) for half in halves]
    for model, guide, x in pairs:
        SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    for half, old in zip(halves, before, strict=True):
        for name, _ in half.named_parameters():
            assert not torch.equal(half.state_dict()[name], old[name]), f"{name} is not trained"
    store = pyro.get_param_store()
    stored = {id(p) for p in dict(store.named_parameters()).values()}
    assert stored == {id(p) for half in halves for p in half.parameters()}


@each_trained_pair
def test_a_copy_is_a_pair_of_its_own(model_name, guide_name):
    model, guide, x = pair(model_name, guide_name)
    SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    copied_model, copied_guide = copy.deepcopy((model, guide))
    before = copy.deepcopy([model.state_dict(), guide.state_dict()])
    SVI(copied_model, copied_guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    for half, copied, old in zip((model, guide), (copied_model, copied_guide), before, strict=True):
        for name, _ in half.named_parameters():
            assert torch.equal(half.state_dict()[name], old[name]), f"training the copy moved {name}"
            assert not torch.equal(copied.state_dict()[name], old[name]), f"the copy's {name} is not trained"


@each_trained_pair
@pytest.mark.parametrize("objective", [IWAE(3), ELBO(2, analytic_kl=True)], ids=["IWAE", "ELBO"])
def test_objectives_serve_every_pair(model_name, guide_name, objective, float64):
    model, guide, x = pair(model_name, guide_name)
    objective.loss(model, guide, x)  # first inspects model and guide, without using the user's random stream
    torch.manual_seed(1)
    loss = objective.loss_and_grads(model, guide, x)
    torch.manual_seed(1)
    log_w = log_weights(model, guide, x, particles=objective.num_particles)
    if isinstance(objective, IWAE):
        assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(3)).sum().item(), rel=1e-9)
    grads = [p.grad for half in (model, guide) for p in half.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)
