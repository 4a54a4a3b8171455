"""Networks: shapes with leading dimensions, independence of data points, values, errors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jensen.families import Bernoulli, Categorical, Gaussian, MeanField
from jensen.guides import amortize
from jensen.inference import fit, log_weights
from jensen.models import PPCA, VAE
from jensen.networks import conv_decoder, conv_encoder, gated_mlp, mlp, residual_mlp

IMAGES = [(1, 28, 28), (3, 32, 32), (2, 28, 28)]
NETWORKS = {
    "mlp": (lambda: mlp(6, [9, 7]), (6,), 7),
    "gated_mlp": (lambda: gated_mlp(6, [9, 7]), (6,), 7),
    "residual_mlp": (lambda: residual_mlp(6, 7, blocks=3), (6,), 7),
    **{f"encoder, {i}": (partial(conv_encoder, i, [4, 8], 7), i, 7) for i in IMAGES},
    "encoder, deep": (partial(conv_encoder, (3, 32, 32), [2, 2, 2, 2, 2], 7), (3, 32, 32), 7),
    "encoder, gated": (partial(conv_encoder, (1, 28, 28), [4, 8], 7, gated=True), (1, 28, 28), 7),
    **{f"decoder, {i}": (partial(conv_decoder, 6, i, [8, 4, 2]), (6,), 2 * i[1] * i[2]) for i in IMAGES},
    "decoder, parameters": (partial(conv_decoder, 6, (3, 32, 32), [8, 4], parameters=2), (6,), 2 * 3 * 32 * 32),
    "decoder, gated": (partial(conv_decoder, 6, (1, 28, 28), [8, 4], gated=True), (6,), 4 * 784),
}
each_network = pytest.mark.parametrize(("make", "reads", "width"), NETWORKS.values(), ids=list(NETWORKS))


@each_network
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (4, 1, 2)])
def test_any_leading_dimensions(make, reads, width, leading, float64):
    network = make()
    x = torch.randn(*leading, *reads)
    out = network(x)
    assert out.shape == (*leading, width)
    one_by_one = torch.stack([network(row) for row in x.reshape(-1, *reads)])
    torch.testing.assert_close(out.reshape(-1, width), one_by_one)


@each_network
def test_data_stay_apart_in_training_mode(make, reads, width, float64):
    network = make().train()
    x = torch.randn(5, *reads, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x)[2].square().sum(), x)
    assert (slope.flatten(1) != 0).any(1).tolist() == [False, False, True, False, False]


@each_network
def test_the_gradient_reaches_every_parameter(make, reads, width):
    network = make()
    network(torch.randn(20, *reads)).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@each_network
def test_another_width_is_refused_by_name(make, reads, width):
    network = make()
    wrong = (*reads[:-1], reads[-1] + 1)
    with pytest.raises(ValueError, match=r"this network expects .* but got shape \(5, "):
        network(torch.zeros(5, *wrong))


@pytest.mark.parametrize("image", IMAGES)
def test_flat_images_are_the_same_images(image, float64):
    encoder = conv_encoder(image, [4, 8], 7)
    x = torch.randn(3, 5, *image)
    torch.testing.assert_close(encoder(x.flatten(-3)), encoder(x))


def test_a_decoder_ends_in_its_activation_and_parameters_do_not():
    z = 5 * torch.randn(50, 6)
    assert conv_decoder(6, (1, 28, 28), [8, 4], activation=nn.ReLU)(z).min() == 0
    assert conv_decoder(6, (1, 28, 28), [8, 4], parameters=1, activation=nn.ReLU)(z).min() < 0
    for network in (mlp(6, [9], nn.ReLU), residual_mlp(6, 9, activation=nn.ReLU)):
        assert network(z).min() == 0


def test_a_gated_layer_is_its_formula(float64):
    network, x = gated_mlp(6, [9]), torch.randn(4, 6)
    weight, gate = network[1].weight.chunk(2)
    bias, opening = network[1].bias.chunk(2)
    torch.testing.assert_close(network(x), (x @ weight.T + bias) * torch.sigmoid(x @ gate.T + opening))


def test_a_residual_block_adds_to_what_it_reads(float64):
    network, x = residual_mlp(6, 9, blocks=2), torch.randn(4, 6)
    with torch.no_grad():
        for block in network[2:-1]:
            block.added[-1].weight.zero_()
            block.added[-1].bias.fill_(1.0)
    torch.testing.assert_close(network(x), F.silu(network[1](x) + 2.0))


def test_a_parameter_is_made_for_each_value_of_its_own_pixel(float64):
    """The order of the parameters of a family without context: means before scales, level by level, pixel by pixel."""
    image = (3, 8, 8)
    for family, numbers in (
        (Gaussian(image, None, scale="context"), 2),
        (Categorical(image, None, levels=4), 4),
        (Bernoulli(image, None), 1),
    ):
        decoder = conv_decoder(6, image, [8, 4], parameters=numbers)
        head = decoder[-1].network[-1]
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.arange(numbers * 3.0))
        q = family(decoder(torch.zeros(2, 6)))
        if numbers == 1:
            expected = torch.arange(3.0).view(3, 1, 1).expand(2, *image)
            torch.testing.assert_close(q.base_dist.logits, expected)
        elif numbers == 2:
            torch.testing.assert_close(q.mean, torch.arange(3.0).view(3, 1, 1).expand(2, *image))
        else:
            logits = torch.arange(12.0).view(4, 3).T[:, None, None].expand(2, *image, 4)
            torch.testing.assert_close(q.base_dist.logits, logits.log_softmax(-1))


@pytest.mark.parametrize("flat", [False, True])
def test_a_convolutional_pair_trains_on_images_and_on_flat_ones(flat):
    features = 64 if flat else (1, 8, 8)
    model = VAE(conv_decoder(2, (1, 8, 8), [8, 4], parameters=1), Bernoulli(features, None), latent=2)
    guide = amortize(model, conv_encoder((1, 8, 8), [4, 8], 16), MeanField, context=16)
    x = (torch.rand(32, 1) > 0.5).float().expand(-1, 64).contiguous()  # all black, or all white
    x = x if flat else x.view(-1, 1, 8, 8)
    history = fit(model, guide, x, epochs=60, batch_size=32, lr=1e-2, seed=0, progress=False)
    assert history.elbo[-1] / 32 > -8.0  # -44 at the start; log 2 is the minimum
    assert log_weights(model, guide, x, particles=3).shape == (3, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(6, []), "mlp needs at least one layer"),
        (lambda: gated_mlp(6, []), "gated_mlp needs at least one layer"),
        (lambda: residual_mlp(6, 7, blocks=0), "residual_mlp needs blocks of at least 1"),
        (lambda: conv_encoder((1, 28, 28), [], 7), "conv_encoder needs at least one layer"),
        (lambda: conv_encoder((1, 28, 28), [2, 2, 2], 7), r"conv_encoder halves .* 3 times, but got .* \(1, 28, 28\)"),
        (lambda: conv_decoder(6, (1, 28, 28), [8]), "conv_decoder needs at least one layer"),
        (lambda: conv_decoder(6, (1, 30, 28), [8, 4, 2]), r"conv_decoder halves .* 2 times, but got .* \(1, 30, 28\)"),
        (lambda: conv_decoder(6, (1, 28, 28), [8, 4], parameters=0), "parameters is the number of parameters"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_of_another_shape_come_with_code_that_works():
    x = torch.randn(4, 3, 8, 8)
    network = conv_encoder((3, 8, 8), [4, 4], 16)
    with pytest.raises(ValueError, match=r"got shape \(4, 8, 8, 3\); the channels come last: use ") as caught:
        network(x.movedim(1, -1))
    code = str(caught.value).rsplit("use ", 1)[1]
    assert torch.equal(network(eval(code, {"x": x.movedim(1, -1)})), network(x))
    model = PPCA(192, 2)
    for shaped in (x, x.movedim(1, -1)):
        with pytest.raises(ValueError, match=r"PPCA expects data x of shape \[N, 192\], but got .*use ") as caught:
            model.log_evidence(shaped)
        code = str(caught.value).rsplit("use ", 1)[1]
        assert torch.equal(eval(code, {"x": shaped}), x.flatten(1))
    with pytest.raises(ValueError, match="build the network for this shape"):
        network(torch.zeros(4, 5))
