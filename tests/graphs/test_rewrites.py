"""Rewritten graphs against float64: equal numbers up to rounding, with the intended operations."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent
from torch.fx.experimental.proxy_tensor import make_fx

from jensen.graphs.rewrites import rewritten
from jensen.kernel.vectorized import under_vmap

OPS = torch.ops.aten


def likelihood(logits, x):
    """Log p(x) of Bernoulli features, [...]."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False).log_prob(x)


def targets(graph):
    return {node.target for node in graph.graph.nodes}


def test_tanh_within_four_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.linspace(-0.6, 0.6, 200_001), torch.logspace(-30, 0, 5001)])
    graph = rewritten(make_fx(torch.tanh)(x))
    assert OPS.tanh.default not in targets(graph)
    exact = x.double().tanh()
    unit = torch.finfo(torch.float32).eps * exact.abs().clamp_min(1e-37)
    assert ((graph(x).double() - exact).abs() / unit).max() < 4
    assert torch.equal(graph(torch.tensor([0.0, -0.0, 100.0, -100.0])), torch.tensor([0.0, -0.0, 1.0, -1.0]))
    assert graph(torch.tensor([float("nan")])).isnan().all()


def test_tanh_in_double_precision_stays():
    x = torch.randn(4, dtype=torch.float64)
    assert OPS.tanh.default in targets(rewritten(make_fx(torch.tanh)(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [8, 64, 784, 1600])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_bernoulli_log_likelihood(features, scale, dtype):
    torch.manual_seed(0)
    logits, x = scale * torch.randn(3, 20, features, dtype=dtype), (torch.rand(3, 20, features) > 0.5).to(dtype)

    graph = rewritten(make_fx(likelihood)(logits, x))
    assert OPS.prod.dim_int in targets(graph)
    assert OPS.binary_cross_entropy_with_logits.default not in targets(graph)
    exact = likelihood(logits.double(), x.double())
    assert ((graph(logits, x).double() - exact) / exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_bernoulli_log_likelihood_of_particles_under_vmap():
    torch.manual_seed(0)
    logits, x = torch.randn(5, 20, 64), (torch.rand(20, 64) > 0.5).float()

    def each(logits, x):
        with under_vmap():
            return torch.vmap(likelihood, (0, None), randomness="different")(logits, x)

    graph = rewritten(make_fx(each)(logits, x))
    assert OPS.prod.dim_int in targets(graph)
    exact = likelihood(logits.double(), x.double())
    assert ((graph(logits, x).double() - exact) / exact).abs().max() < 8 * torch.finfo(torch.float32).eps


def test_certain_features_do_not_overflow_or_vanish():
    logits = torch.tensor([[0.0, 1e4, -1e4, 90.0]]).repeat(2, 16)
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(2, 16)
    graph = rewritten(make_fx(likelihood)(logits, x))
    assert torch.allclose(graph(logits, x), torch.full((2,), -16 * (torch.tensor(2.0).log() + 90)), rtol=1e-6)


@pytest.mark.parametrize("features", [7, 1604, 3200])
def test_other_widths_keep_their_logarithms(features):
    logits, x = torch.randn(5, features), torch.ones(5, features)
    graph = rewritten(make_fx(likelihood)(logits, x))
    assert OPS.prod.dim_int not in targets(graph)
    assert torch.equal(graph(logits, x), likelihood(logits, x))


def test_features_that_are_needed_one_by_one_stay():
    logits, x = torch.randn(5, 64), torch.ones(5, 64)

    def fn(logits, x):
        each = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return each.view(5, -1).sum(-1), each.amax(-1)

    graph = rewritten(make_fx(fn)(logits, x))
    assert OPS.prod.dim_int not in targets(graph)
    assert all(torch.equal(a, b) for a, b in zip(graph(logits, x), fn(logits, x), strict=True))


def test_bias_is_taken_out_of_the_product():
    torch.manual_seed(0)
    b, a, w = torch.randn(6), torch.randn(5, 4), torch.randn(4, 6)
    graph = rewritten(make_fx(torch.addmm)(b, a, w))
    assert OPS.addmm.default not in targets(graph)
    assert torch.allclose(graph(b, a, w), torch.addmm(b, a, w), rtol=1e-6)


def test_a_matrix_added_to_a_product_stays():
    b, a, w = torch.randn(5, 6), torch.randn(5, 4), torch.randn(4, 6)
    assert OPS.addmm.default in targets(rewritten(make_fx(torch.addmm)(b, a, w)))


@pytest.mark.parametrize("rule", ["bias", "tanh", "bernoulli"])
def test_one_rule_leaves_the_others_out(rule):
    operations = {"bias": OPS.addmm, "tanh": OPS.tanh, "bernoulli": OPS.binary_cross_entropy_with_logits}

    def fn(b, a, w, x):
        return likelihood(torch.addmm(b, a, w).tanh(), x)

    inputs = torch.randn(64), torch.randn(5, 4), torch.randn(4, 64), torch.ones(5, 64)
    graph = rewritten(make_fx(fn)(*inputs), rules=[rule])
    for name, operation in operations.items():
        assert (operation.default in targets(graph)) == (name != rule)
    assert torch.allclose(graph(*inputs), fn(*inputs), rtol=1e-5)
