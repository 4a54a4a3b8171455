"""The contract of every model, alone and with a matching guide."""

import copy
from functools import partial

import pyro
import pytest
import torch
from model_members import MEMBERS
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from jensen.inference import evaluate as with_refined
from jensen.inference import log_joint, log_weights, terms

evaluate = partial(with_refined, refine=False)  # from samples of the guide

each_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=list(MEMBERS))
each_exact_member = pytest.mark.parametrize(
    "member",
    [member for member in MEMBERS.values() if hasattr(member.make(), "log_evidence")],
    ids=[name for name, member in MEMBERS.items() if hasattr(member.make(), "log_evidence")],
)


def _pair(member, n=7):
    model = member.make()
    guide = member.guide(model)
    with torch.no_grad():
        return model, guide, member.data(model, n)


def _traced(model, guide, data):
    """The sites of a run on data at samples of the guide, and these samples."""
    with torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*data)
        sites = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*data).nodes
    return sites, {name: sites[name]["value"] for name in model.latents}


@each_member
def test_latents_are_named_in_order_with_their_shapes(member):
    model, guide, data = _pair(member)
    sites, values = _traced(model, guide, data)
    drawn = [name for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]]
    assert [name for name in drawn if name in model.latents] == list(model.latents)
    assert {name: value.shape[1:] for name, value in values.items()} == dict(model.latents)


@each_member
def test_samples_have_the_declared_shape_and_lie_in_the_support(member):
    model, guide, (x, *_) = _pair(member, n=50)
    assert x.shape == (50, *model.event_shape)
    assert _traced(model, guide, member.data(model, 50))[0]["x"]["fn"].support.check(x).all()


@each_member
@pytest.mark.parametrize("particles", [1, 3])
def test_log_joint_is_the_density_written_by_hand(member, particles, float64):
    model, guide, data = _pair(member)
    values = [_traced(model, guide, data)[1] for _ in range(particles)]
    stacked = {name: torch.stack([v[name] for v in values]) for name in model.latents}
    with torch.no_grad():
        by_hand = torch.stack([member.by_hand(model, v, *data) for v in values])
        torch.testing.assert_close(log_joint(model, stacked, *data), by_hand, rtol=1e-9, atol=1e-9)


@each_member
def test_the_gradient_reaches_every_parameter(member):
    model, guide, data = _pair(member)
    log_weights(model, guide, *data, particles=6).mean().backward()
    for prefix, half in (("model", model), ("guide", guide)):
        for name, p in half.named_parameters():
            assert p.grad is not None, f"{prefix}.{name} gets no gradient"
            assert p.grad.isfinite().all(), f"{prefix}.{name} gets a gradient that is not finite"
            assert p.grad.abs().sum() > 0, f"{prefix}.{name} gets a zero gradient"


@each_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_weights_are_in_the_precision_of_the_pair(member, dtype):
    model, guide, data = _pair(member)
    data = tuple(x.to(dtype) if x.is_floating_point() else x for x in data)
    log_w = log_weights(model.to(dtype), guide.to(dtype), *data, particles=6)
    assert log_w.shape == (6, 7)
    assert log_w.dtype == dtype
    assert log_w.isfinite().all()


@each_member
def test_a_datum_moves_its_own_weights_only(member, float64):
    model, guide, data = _pair(member)
    other = tuple(x.clone() for x in data)
    for x, new in zip(other, member.data(model, 7), strict=True):
        x[3] = new[3].detach()
    weights = []
    for batch in (data, other):
        torch.manual_seed(1)
        weights.append(log_weights(model, guide, *batch, particles=6))
    torch.testing.assert_close(weights[0][:, [0, 1, 2, 4, 5, 6]], weights[1][:, [0, 1, 2, 4, 5, 6]])
    assert not torch.equal(weights[0][:, 3], weights[1][:, 3])


@each_member
def test_log_joint_and_terms_add_up_to_the_log_weights(member, float64):
    model, guide, data = _pair(member)
    t = terms(model, guide, *data, particles=6)
    values = {name: t.values[name] for name in model.latents}
    total = sum(t.log_p[name] for name in ("x", *model.latents))
    torch.testing.assert_close(log_joint(model, values, *data), total)
    torch.testing.assert_close(t.log_weights, total - sum(t.log_q.values()))


@each_member
def test_state_dict_round_trip(member):
    model, guide, data = _pair(member)
    twin, twin_guide, _ = _pair(member)
    twin.load_state_dict(model.state_dict())
    twin_guide.load_state_dict(guide.state_dict())
    weights = []
    for m, g in ((model, guide), (twin, twin_guide)):
        torch.manual_seed(1)
        weights.append(log_weights(m, g, *data, particles=6))
    assert torch.equal(*weights)


@each_member
def test_two_instances_train_side_by_side_under_classic_svi(member):
    pairs = [_pair(member) for _ in range(2)]
    halves = [half for model, guide, _ in pairs for half in (model, guide)]
    before = [copy.deepcopy(half.state_dict()) for half in halves]
    for model, guide, data in pairs:
        SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(*data)
    for half, old in zip(halves, before, strict=True):
        for name, _ in half.named_parameters():
            assert not torch.equal(half.state_dict()[name], old[name]), f"{name} is not trained"
    stored = {id(p) for p in dict(pyro.get_param_store().named_parameters()).values()}
    assert stored == {id(p) for half in halves for p in half.parameters()}


@each_exact_member
def test_weighted_estimates_rise_to_the_exact_value(member, float64):
    model, guide, data = _pair(member, n=40)
    with torch.no_grad():
        exact = model.log_evidence(*data)
    assert exact.shape == (40,)
    few, some, many = (evaluate(model, guide, data, k, seed=0, progress=False) for k in (1, 30, 20_000))
    means = [float(e.log_evidence.mean()) for e in (few, some, many)]
    assert means[0] < means[1] < float(exact.mean()) + 0.05
    z = (many.log_evidence - exact) / many.standard_error.clamp_min(1e-3)
    trusted = many.pareto_k < 0.7
    assert trusted.float().mean() > 0.5
    assert (z[trusted].abs() < 5).all()
    torch.testing.assert_close(many.exact, exact)
