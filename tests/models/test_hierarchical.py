"""Several stochastic layers: the networks of the paper, and guides with known exact results."""

import pytest
import torch
from model_members import nudged
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import nn

from jensen.families import Bernoulli, BinaryVector, Gaussian, MeanField
from jensen.families.base import raw_of
from jensen.guides import BottomUp, Ladder
from jensen.inference import IWAE, log_joint, log_weights
from jensen.models import VAE, Hierarchical
from jensen.networks import mlp


def widths(module):
    return [(part.in_features, part.out_features) for part in module.modules() if isinstance(part, nn.Linear)]


def test_the_defaults_are_the_two_layer_network_of_burda_et_al():
    model, guide = Hierarchical.of_widths(784), BottomUp.of_widths(784)
    assert dict(model.latents) == {"z_2": (50,), "z_1": (100,)}
    assert widths(model.networks[1]) == [(50, 100), (100, 100)]
    assert widths(model.families[1]) == [(100, 2 * 100)]
    assert widths(model.networks[0]) == [(100, 200), (200, 200)]
    assert widths(model.families[0]) == [(200, 784)]
    assert widths(guide) == [(784, 200), (200, 200), (200, 2 * 100), (100, 100), (100, 100), (100, 2 * 50)]
    assert sum(isinstance(part, nn.Tanh) for half in (model, guide) for part in half.modules()) == 8
    ladder = Ladder.of_widths(model, 784)
    assert sorted(widths(ladder)) == sorted(
        [(784, 200), (200, 200), (200, 2 * 100), (200, 100), (100, 100), (100, 2 * 50)]
    )


def test_one_layer_is_a_vae(float64):
    decoder, likelihood = mlp(2, [8]), Bernoulli(5, 8)
    one, vae = Hierarchical([(decoder, likelihood)], latent=2), VAE(decoder, likelihood, latent=2)
    x, z = vae(n=4), torch.randn(3, 4, 2)
    torch.testing.assert_close(log_joint(one, {"z_1": z}, x), log_joint(vae, {"z": z}, x))


def linear_pair():
    """z_2 ~ N(0, I), z_1 ~ N(a z_2 + b, 0.6^2), x ~ N(z_1, 0.5^2), feature by feature; guide: the likelihood."""
    model = Hierarchical([(nn.Identity(), Gaussian(3, None, scale=0.5)), (nn.Identity(), Gaussian(3, 3, scale=0.6))], 3)
    a, b = torch.tensor([0.5, -1.0, 2.0]), torch.randn(3)
    guide = Ladder(model, [(nn.Identity(), MeanField(3, 3)), (nn.Identity(), MeanField(3, 3))])
    variance = 0.36 + 0.25  # of x given z_2
    precision = 1 + a.square() / variance  # of z_2 given x
    with torch.no_grad():
        for family, scale in ((guide.families[0], torch.full((3,), 0.5)), (guide.families[1], precision.rsqrt())):
            family.affine.weight.zero_()
            family.affine.bias.copy_(torch.cat([torch.zeros(3), raw_of(scale)]))
        model.families[1].affine.weight.copy_(a.diag())
        model.families[1].affine.bias.copy_(b)
        guide.families[0].affine.weight[:3] = torch.eye(3)
        shrink = a / variance / precision
        guide.families[1].affine.weight[:3] = shrink.diag()
        guide.families[1].affine.bias[:3] = -shrink * b
    return model, guide, MultivariateNormal(b, (a.square() + variance).diag())


def test_a_ladder_that_knows_the_likelihood_is_the_posterior(float64):
    """q(z_1 | x, z_2) is exactly likelihood times p(z_1 | z_2), so every log weight is log p(x)."""
    model, guide, marginal = linear_pair()
    x = model(n=6).detach()
    log_w = log_weights(model, guide, x, particles=5)
    torch.testing.assert_close(log_w, marginal.log_prob(x).expand(5, 6), rtol=1e-9, atol=1e-9)


def test_a_bottom_up_chain_set_to_the_posterior_has_constant_weights(float64):
    model, _, marginal = linear_pair()
    a, b = model.families[1].affine.weight.diagonal(), model.families[1].affine.bias
    prior, seen, above = 1 / (a.square() + 0.36), 1 / 0.25, 1 + a.square() / 0.36  # precisions
    guide = BottomUp([(nn.Identity(), MeanField(3, 3)), (nn.Identity(), MeanField(3, 3))])
    families = guide.families["z_1"], guide.families["z_2"].family
    with torch.no_grad():
        for family, slope, offset, precision in (
            (families[0], seen / (seen + prior), b * prior / (seen + prior), seen + prior),
            (families[1], a / 0.36 / above, -a * b / 0.36 / above, above),
        ):
            family.affine.weight.copy_(torch.cat([slope.diag(), torch.zeros(3, 3)]))
            family.affine.bias.copy_(torch.cat([offset, raw_of(precision.rsqrt())]))
        x = model(n=6)
        log_w = log_weights(model, guide, x, particles=5)
    torch.testing.assert_close(log_w, marginal.log_prob(x).expand(5, 6), rtol=1e-9, atol=1e-9)


def test_bottom_up_layers_read_the_layer_below_alone(float64):
    guide = nudged(BottomUp.of_widths(5, (3, 2, 2), ((8,), (7,), (6,))))
    z_1, z_2 = torch.randn(4, 3), torch.randn(4, 2)

    def of(site, x, z_1, z_2):
        trace = poutine.trace(poutine.condition(guide, {"z_1": z_1, "z_2": z_2})).get_trace(x)
        return trace.nodes[site]["fn"].base_dist.loc

    x, other = torch.randn(4, 5), torch.randn(4, 5)
    assert not torch.equal(of("z_1", x, z_1, z_2), of("z_1", other, z_1, z_2))
    assert torch.equal(of("z_2", x, z_1, z_2), of("z_2", other, z_1, z_2))
    assert not torch.equal(of("z_2", x, z_1, z_2), of("z_2", x, z_1 + 1, z_2))
    assert torch.equal(of("z_3", x, z_1, z_2), of("z_3", other, z_1 + 1, z_2))
    assert not torch.equal(of("z_3", x, z_1, z_2), of("z_3", x, z_1, z_2 + 1))


@pytest.mark.parametrize("kind", ["ladder", "bottom-up"])
def test_local_guides_start_where_the_networks_stand(kind, float64):
    model = nudged(Hierarchical.of_widths(5, (3, 2), ((8,), (7,))))
    guide = Ladder.of_widths(model, 5, ((8,), (7,)))
    if kind == "bottom-up":
        guide = BottomUp.of_widths(5, (3, 2), ((8,), (7,)))
    x = model(n=6).detach()
    local = guide.local(x)
    values = {name: value.detach() for name, value in guide(x).items()}
    log_q = [poutine.trace(poutine.condition(g, values)).get_trace(x).log_prob_sum() for g in (guide, local)]
    torch.testing.assert_close(*log_q)
    with pytest.raises(ValueError, match="other data points"):
        local(x + 1)


def test_what_does_not_fit_is_named():
    model = Hierarchical.of_widths(5, (3, 2), ((8,), (7,)))
    with pytest.raises(ValueError, match="layers is empty"):
        Hierarchical([], latent=2)
    with pytest.raises(ValueError, match="layers is empty"):
        BottomUp([])
    with pytest.raises(ValueError, match="must have the same length"):
        Hierarchical.of_widths(5, (3, 2), ((8,),))
    with pytest.raises(ValueError, match="must have the same length"):
        BottomUp.of_widths(5, (3, 2), ((8,),))
    with pytest.raises(ValueError, match="2 layers of latents, but hidden has 1"):
        Ladder.of_widths(model, 5, ((8,),))
    with pytest.raises(
        ValueError, match=r"\[3, 2\] latent features, from the data up, but the guide's layers have \[3, 4\]"
    ):
        Ladder(model, [(mlp(5, [8]), MeanField(3, 8)), (mlp(8, [7]), MeanField(4, 7))])
    bits = Hierarchical([(mlp(3, [8]), Bernoulli(5, 8)), (mlp(2, [7]), BinaryVector(3, 7))], 2)
    with pytest.raises(ValueError, match="site 'z_1' has a _BinaryVector"):
        Ladder.of_widths(bits, 5, ((8,), (7,)))(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="both depend on"):
        IWAE(2, "dreg").loss(model, Ladder.of_widths(model, 5, ((8,), (7,))), model(n=3).detach())
