"""Networks of data with missing values: what they are given, every kind of network, transforms and errors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from jensen.networks import Conditioned, Masked, conv_encoder, gated_mlp, mlp, recurrent, residual_mlp

NETWORKS = {
    "mlp": (lambda n: mlp(6 * n, [9, 7]), 6, (6,)),
    "gated_mlp": (lambda n: gated_mlp(6 * n, [9, 7]), 6, (6,)),
    "residual_mlp": (lambda n: residual_mlp(6 * n, 7), 6, (6,)),
    "linear": (lambda n: nn.Linear(6 * n, 7), 6, (6,)),
    "images": (lambda n: conv_encoder((2 * n, 8, 8), [4], 7), (2, 8, 8), (2, 8, 8)),
    "flat images": (lambda n: conv_encoder((2 * n, 8, 8), [4], 7), (2, 8, 8), (128,)),
    "sequences": (lambda n: recurrent(3 * n, 7, output="last"), 3, (5, 3)),
}
each_network = pytest.mark.parametrize(("make", "features", "reads"), NETWORKS.values(), ids=list(NETWORKS))


def _holes(x, share=0.4):
    return torch.where(torch.rand_like(x) < share, torch.nan, x)


@each_network
def test_the_output_depends_on_the_observed_values_and_the_mask_alone(make, features, reads, float64):
    network, x = Masked(make(2), features), torch.randn(2, 5, *reads)
    holes = _holes(x)
    out = network(holes)
    assert out.shape == (2, 5, 7)
    assert out.isfinite().all()
    seen = ~holes.isnan()
    dim = {3: -3, 2: -1, 1: -1}[len(reads)]
    by_hand = torch.cat([holes.nan_to_num(), seen.double()], dim)
    torch.testing.assert_close(out, network.network(by_hand))
    assert not torch.equal(out, network(holes.nan_to_num()))  # a zero is not a hole


@each_network
def test_the_gradient_of_a_row_with_holes_is_finite(make, features, reads, float64):
    network, x = Masked(make(2), features), _holes(torch.randn(5, *reads)).requires_grad_()
    network(x).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert torch.equal(x.grad != 0, ~x.isnan())


@each_network
def test_a_network_that_is_built_for_one_x_is_refused_in_one_sentence(make, features, reads):
    width = features if isinstance(features, int) else features[0]
    message = rf"^Masked doubles the input: build the network for 2 \* {width} = {2 * width} (features|channels), but"
    with pytest.raises(ValueError, match=message):
        Masked(make(1), features)(torch.zeros(5, *reads))
    with pytest.raises((ValueError, RuntimeError), match=r"\(Masked doubles the input, from \[5, .*\] to \[5, .*\]\)$"):
        Masked(make(3), features)(torch.zeros(5, *reads))  # the network knows its width


@each_network
def test_vmap_and_a_traced_graph_give_the_same(make, features, reads, float64):
    network, x = Masked(make(2), features), _holes(torch.randn(3, 5, *reads))
    expected = network(x)
    if reads != (5, 3):  # torch has no rule for a GRU under vmap
        torch.testing.assert_close(torch.func.vmap(network)(x), expected)
    graph = make_fx(network)(x)
    other = _holes(torch.randn_like(x), 0.0)  # no holes
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(graph(other), network(other))


def test_channels_of_the_mask_come_after_all_channels_of_the_image():
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    x[0, 1, 0, 0] = torch.nan
    given = Masked(nn.Identity(), (2, 2, 2))(x)
    assert given.shape == (1, 4, 2, 2)
    assert given[0, 1].flatten().tolist() == [0.0, 5.0, 6.0, 7.0]
    assert given[0, 2].flatten().tolist() == [1.0, 1.0, 1.0, 1.0]
    assert given[0, 3].flatten().tolist() == [0.0, 1.0, 1.0, 1.0]
    assert torch.equal(Masked(nn.Identity(), (2, 2, 2))(x.flatten(1)), given.flatten(1))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), (2, 2)])
def test_missing_values_are_filled_with_those_given(shape):
    means = torch.tensor([1.0, 2.0, 3.0, 4.0])
    features = shape if len(shape) == 3 else 4
    network = Masked(nn.Identity(), features, fill=means.reshape(shape))
    assert network(torch.full((2, 4), torch.nan))[0].tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    assert Masked(nn.Identity(), 4, fill=9)(torch.full((2, 4), torch.nan))[0, :4].tolist() == [9.0] * 4
    again = Masked(nn.Identity(), features, fill=torch.zeros(4))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.fill, network.fill)


def test_more_values_are_hidden_in_training_mode_only():
    network, x = Masked(nn.Identity(), 4, drop=0.3), torch.ones(5000, 4)
    x[:, 0] = torch.nan
    seen = network(x)[:, 4:]
    share = seen.mean(0)
    assert share[0] == 0.0
    assert ((share[1:] - 0.7).abs() < 4 * (0.21 / 5000) ** 0.5).all()
    assert network.eval()(x)[:, 4:].mean(0).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_covariates_and_lengths_are_passed_on(float64):
    x, y = _holes(torch.randn(5, 3)), torch.tensor([0, 1, 1, 0, 1])
    network = Masked(Conditioned(mlp(2 * 3 + 2, [7]), 2), 3)
    given = torch.cat([x.nan_to_num(), (~x.isnan()).double(), torch.eye(2)[y]], -1)
    torch.testing.assert_close(network(x, y), network.network.network(given))
    steps, lengths = _holes(torch.randn(5, 4, 3)), torch.tensor([4, 1, 2, 3, 4])
    network = Masked(recurrent(2 * 3, 7), 3)
    assert (network(steps, lengths)[1, 1:] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Masked, nn.Identity(), 0), "features is the width of x and must be at least 1, but got 0"),
        (partial(Masked, nn.Identity(), 3, drop=1.5), r"drop must be a probability in \[0, 1\], but got 1.5"),
        (partial(Masked, nn.Identity(), 3, fill=torch.zeros(4)), r"one for each feature, but got shape \[4\]"),
        (partial(Masked, nn.Identity(), 1, fill=torch.tensor([torch.nan])), "fill must be finite"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_x_is_named():
    with pytest.raises(ValueError, match=r"Masked expects x of shape \[..., 3\], but got \[5, 4\]"):
        Masked(mlp(6, [7]), 3)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"x must be torch.float32 for the layers, but got torch.int64"):
        Masked(mlp(6, [7]), 3)(torch.zeros(5, 3).long())
    with pytest.raises(ValueError, match=r"or flat ones \[..., 12\], but got \[5, 2, 2, 3\]; the channels come last"):
        Masked(conv_encoder((6, 2, 2), [4], 7), (3, 2, 2))(torch.zeros(5, 2, 2, 3))
