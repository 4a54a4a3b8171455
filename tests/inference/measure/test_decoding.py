"""Between data and latents: encode, decode, reconstruct, and quantiles of priors, against known answers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from foreign import EXAMPLE, Images

from jensen.families import IAF, Bernoulli, Categorical, Delta, FullCovariance, Gaussian, MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import decode, encode, reconstruct, simulate
from jensen.inference.measure.decoding import _mode
from jensen.kernel.simulation import prior_quantiles
from jensen.models import (
    PPCA,
    VAE,
    BinaryLatentVAE,
    ConditionalVAE,
    FlatPrior,
    GaussianMixtureVAE,
    Hierarchical,
    LearnedPrior,
    MixtureOfPPCA,
)
from jensen.networks import Conditioned, mlp


def _ppca():
    model = PPCA(5, latent=2)
    with torch.no_grad():
        model.weight.normal_()
        model.mean.normal_()
    return model, model(n=6).detach()


def _hierarchy():
    return Hierarchical([(mlp(4, [8]), Bernoulli(6, 8)), (mlp(2, [8]), MeanField(4, 8))], latent=2)


def test_a_linear_models_data_lie_at_their_mean():
    model, _ = _ppca()
    z = torch.randn(4, 2)
    torch.testing.assert_close(decode(model, {"z": z}), z @ model.weight.detach().T + model.mean.detach())


def test_layers_without_a_value_take_their_mean_given_those_above():
    model, z = _hierarchy(), torch.randn(3, 2)
    expected = model.conditional(1, model.conditional(2, z).mean).mean
    torch.testing.assert_close(decode(model, {"z_2": z}), expected.detach())
    below = torch.randn(3, 4)
    torch.testing.assert_close(decode(model, {"z_1": below}), model.conditional(1, below).mean.detach())


def test_a_discrete_site_takes_the_guides_mode_or_else_the_models():
    model = MixtureOfPPCA(5, latent=2, components=3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    x = model(n=20).detach()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.OneHotCategorical(model.responsibilities(x)))
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

    found = encode(model, guide, x)
    assert list(found) == list(model.latents) == ["c", "z"]
    torch.testing.assert_close(found["c"].argmax(-1), model.responsibilities(x).argmax(-1))
    likeliest = simulate(model, 2000)[0]["c"].mean(0).argmax()
    z, c = torch.randn(1, 2), torch.eye(3)[likeliest : likeliest + 1]
    torch.testing.assert_close(decode(model, {"z": z}), decode(model, {"c": c, "z": z}))
    assert (decode(model, {"z": z}) - decode(model, {"c": c.roll(1, -1), "z": z})).abs().max() > 1e-3


def test_bits_as_likely_as_not_are_zero():
    model = BinaryLatentVAE(mlp(3, [8]), Bernoulli(6, 8), latent=3)
    zero = torch.zeros(1, 3)
    expected = model.likelihood(model.decoder(zero)).mean
    torch.testing.assert_close(decode(model, {"z": zero}), expected.detach())
    assert not _mode(torch.distributions.Bernoulli(torch.tensor([0.5, 0.2]))).any()


def test_a_family_without_a_mean_is_averaged_over_draws():
    torch.manual_seed(0)
    model = VAE(mlp(2, [8]), Categorical(6, 8, levels=3), latent=2)
    z = torch.zeros(200, 2)
    p = model.likelihood(model.decoder(z[:1])).base_dist.probs  # [1, 6, 3]
    expected = (p * torch.arange(3.0)).sum(-1)
    found = decode(model, {"z": z})
    torch.testing.assert_close(found.mean(0, keepdim=True), expected.detach(), atol=0.03, rtol=0)


def test_covariates_reach_the_model():
    model = ConditionalVAE(mlp(2 + 3, [8]), Gaussian(6, 8), latent=2, covariates=3)
    guide = amortize(model, Conditioned(mlp(6 + 3, [8]), 3), MeanField, context=8)
    z = torch.zeros(3, 2)
    found = decode(model, {"z": z}, torch.arange(3))
    again = decode(model, {"z": z[:1]}, torch.tensor([2]))
    torch.testing.assert_close(found[2:], again)
    assert (found[0] - found[2]).abs().max() > 1e-3
    data = torch.randn(3, 6), torch.arange(3)
    assert encode(model, guide, data)["z"].shape == (3, 2)
    assert reconstruct(model, guide, data).shape == (3, 6)


def test_a_gaussian_guides_mean_is_exact():
    model, x = _ppca()
    expected = model.posterior(x).mean.detach()
    torch.testing.assert_close(encode(model, ExactPosterior(model), x, particles=1)["z"], expected)


def test_a_flows_mean_is_that_of_its_draws():
    model, x = _ppca()
    guide = amortize(model, mlp(5, [8]), IAF, context=8)
    many = encode(model, guide, x, particles=4000, seed=0)["z"]
    few = encode(model, guide, x, particles=4000, seed=1)["z"]
    assert 0 < (many - few).abs().max() < 0.2
    torch.testing.assert_close(encode(model, guide, x, particles=4000, seed=0)["z"], many)


def test_many_data_are_encoded_in_batches_alike():
    model, _ = _ppca()
    x = torch.randn(1000, 5)
    whole = encode(model, ExactPosterior(model), x, particles=32)["z"]  # four batches
    torch.testing.assert_close(whole, model.posterior(x).mean.detach())


def test_reconstructions_are_means_over_the_guides_draws():
    model, x = _ppca()
    expected = decode(model, {"z": model.posterior(x).mean})
    found = reconstruct(model, ExactPosterior(model), x, particles=20_000, seed=0)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    flat = VAE(mlp(2, [8]), Gaussian(5, 8), latent=2, prior=FlatPrior(2))
    point = amortize(flat, mlp(5, [8]), Delta, context=8)
    torch.testing.assert_close(reconstruct(flat, point, x), decode(flat, encode(flat, point, x)))


def test_models_of_any_style_are_encoded_decoded_and_reconstructed():
    pair = Images()
    latents, x = simulate(pair.model, 6, data=EXAMPLE)
    posterior = pair.exact.posterior(x.view(6, 6)).mean.detach()
    found = encode(pair.model, pair.guide, x, particles=3)
    assert list(found) == ["code"]
    torch.testing.assert_close(found["code"], posterior)
    linear = pair.exact.mean.detach() + latents["code"] @ pair.exact.weight.detach().T
    torch.testing.assert_close(decode(pair.model, latents, data=EXAMPLE), linear)
    again = reconstruct(pair.model, pair.guide, x, particles=20_000, seed=0)
    expected = pair.exact.mean.detach() + posterior @ pair.exact.weight.detach().T
    torch.testing.assert_close(again, expected, atol=0.08, rtol=0)


def test_every_site_that_is_observed_is_reconstructed():
    def model(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("weight", -z)
            label = pyro.sample("label", dist.Bernoulli(torch.full_like(z, 0.3)), obs=y)
            for t in range(2):
                pyro.sample(f"x_{t}", dist.Normal(z + t + label, 1.0), obs=x[:, t])

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x[:, 0] + 0 * u, 1e-3))

    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
    found = reconstruct(model, guide, (x, y), particles=20)
    assert list(found) == ["label", "x_0", "x_1"]
    torch.testing.assert_close(found["label"], torch.full((2,), 0.3))
    torch.testing.assert_close(found["x_1"], x[:, 0] + 1 + y, atol=3e-3, rtol=0)
    assert list(encode(model, guide, (x, y))) == ["z"]
    with pytest.raises(ValueError, match=r"observes nothing: the guide samples all of its sites, \['z'\]"):
        reconstruct(_prior, _prior, x[:, 0])


def _prior(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_encoding_leaves_the_random_stream_and_the_mode_alone():
    model, x = _ppca()
    guide = PriorGuide(model)
    model.train()
    before = torch.get_rng_state()
    encode(model, guide, x, seed=0)
    reconstruct(model, guide, x, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_quantiles_of_a_normal_prior_are_exact():
    levels = torch.tensor([0.1, 0.5, 0.975])
    expected = torch.special.ndtri(levels).unsqueeze(-1)
    for model in (PPCA(5, latent=2), _hierarchy()):
        top = next(iter(model.latents))
        torch.testing.assert_close(prior_quantiles(model, levels)[top], expected.expand(3, 2))


def test_quantiles_of_other_priors_are_those_of_draws():
    model = VAE(mlp(2, [8]), Gaussian(5, 8), latent=2, prior=LearnedPrior(FullCovariance(2, None)))
    with torch.no_grad():
        for p in model.prior.parameters():
            p.normal_()
    p, levels = model.prior(), torch.tensor([0.1, 0.5, 0.9])
    scale = p.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    expected = p.mean + scale * torch.special.ndtri(levels).unsqueeze(-1)
    torch.testing.assert_close(prior_quantiles(model, levels)["z"], expected.detach(), atol=0.1, rtol=0.05)
    clusters = GaussianMixtureVAE(mlp(2, [8]), Gaussian(5, 8), latent=2, components=3)
    assert list(prior_quantiles(clusters, levels)) == ["z"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "by latent site, with one first dimension"),
        ({"z": torch.zeros(0, 2)}, "with one first dimension M >= 1"),
        ({"y": torch.zeros(3, 2)}, r"values of \['y'\], but the model's latent sites are \['z'\]"),
        ({"z": torch.zeros(3, 2, 2)}, r"shape \[M, 2\] at site 'z', but got \[3, 2, 2\]"),
    ],
)
def test_values_that_cannot_be_decoded_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        decode(_ppca()[0], values)


def test_a_model_that_needs_data_is_named():
    with pytest.raises(TypeError, match=r"the model cannot sample data: model\(None, \*covariates, n=3\) fails"):
        decode(lambda x: x + 1, {"z": torch.zeros(3, 2)})


def _classes(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(2.0 * y, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_sites_that_the_guide_enumerates_are_encoded_by_draws():
    x = torch.tensor([-2.0, 0.5, 4.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.stack([-x, x], -1)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.5 * x + y, 0.7))

    q = torch.sigmoid(2 * x)
    means = encode(_classes, guide, x, particles=4000, seed=0)
    assert means["y"].tolist() == [0, 1, 1]
    torch.testing.assert_close(means["z"], 0.5 * x + q, rtol=0, atol=4 * 0.5 / 4000**0.5)
    torch.testing.assert_close(reconstruct(_classes, guide, x, 4000, seed=0), 0.5 * x + q, rtol=0, atol=0.06)


def test_data_whose_mean_differs_between_states_that_are_summed_out_are_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    with pytest.raises(NotImplementedError, match="sample the enumerated sites in the guide"):
        reconstruct(_classes, guide, torch.zeros(3))
