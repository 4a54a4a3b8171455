"""The linear-Gaussian state space model against Pyro's GaussianHMM, its chain against dense Gaussians, its guides."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from jensen.families import FullCovariance, MeanField
from jensen.families.chain import GaussMarkovChain
from jensen.guides import Amortized, ExactPosterior, GaussMarkov, PriorGuide, amortize
from jensen.inference import ELBO, fit, log_joint, log_weights, simulate
from jensen.inference import evaluate as with_refined
from jensen.models import LinearGaussianSSM
from jensen.networks import mlp, recurrent

evaluate = partial(with_refined, refine=False)  # from samples of the guide

T, X, D = 8, 3, 2
LENGTHS = torch.tensor([8, 5, 1, 7, 2, 8])


def _model(steps=T):
    """A model at generic parameters, none zero or one, with rotating states."""
    model = LinearGaussianSSM(X, D, steps)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.transition.copy_(torch.tensor([[0.9, 0.4], [-0.3, 0.8]]))
    return model


def _hidden_markov(model, steps):
    """Pyro's model of the same sequences; its first transition generates the first state."""
    prior = model.prior()
    transition = model.transition.T.expand(steps, D, D).clone()  # Pyro's states are rows
    transition[0] = 0
    noise = dist.MultivariateNormal(prior.offset[:steps], scale_tril=prior.scale_tril[:steps])
    initial = dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
    seen = dist.Normal(model.mean, model.noise).to_event(1)
    return dist.GaussianHMM(initial, transition, noise, model.weight.T, seen, duration=steps)


def _chain():
    """A chain of four steps with parameters for each of three data points, and the equivalent dense Gaussian."""
    scale_tril = torch.randn(3, 4, D, D).tril(-1) + torch.rand(3, 4, D).add(0.3).diag_embed()
    chain = GaussMarkovChain(torch.randn(3, 4, D), 0.7 * torch.randn(3, 4, D, D), scale_tril)
    inverse = torch.linalg.inv(scale_tril)
    root = torch.zeros(3, 4, D, 4, D)
    for t in range(4):
        root[:, t, :, t] = inverse[:, t]
        if t:
            root[:, t, :, t - 1] = -inverse[:, t] @ chain.transition[:, t]
    root = root.reshape(3, 4 * D, 4 * D)
    mean = torch.linalg.solve(root, (inverse @ chain.offset.unsqueeze(-1)).reshape(3, -1))
    return chain, torch.distributions.MultivariateNormal(mean, precision_matrix=root.mT @ root)


def test_a_chain_is_the_gaussian_of_its_block_bidiagonal_root(float64):
    chain, dense = _chain()
    z = torch.randn(5, 3, 4, D)
    torch.testing.assert_close(chain.log_prob(z), dense.log_prob(z.flatten(-2)))
    torch.testing.assert_close(chain.mean.flatten(-2), dense.mean)
    torch.testing.assert_close(chain.variance.flatten(-2), dense.variance)
    blocks = dense.covariance_matrix.reshape(3, 4, D, 4, D)
    torch.testing.assert_close(chain.covariance, torch.stack([blocks[:, t, :, t] for t in range(4)], 1))


def test_draws_of_a_chain_have_its_moments_and_know_their_density(float64):
    chain, dense = _chain()
    z = chain.rsample((40_000,))
    flat = z.flatten(-2)
    error = (flat.mean(0) - dense.mean).abs() / (dense.variance / 40_000).sqrt()
    assert error.max() < 5
    for n in range(3):
        torch.testing.assert_close(flat[:, n].T.cov(), dense.covariance_matrix[n], rtol=0.1, atol=0.05)
    torch.testing.assert_close(chain.log_prob(z), chain.log_prob(z.clone()))


def test_a_chain_is_broadcast_where_it_is_expanded(float64):
    chain = _model().prior().expand((4, 3))
    z = chain.rsample()
    assert z.shape == (4, 3, T, D)
    assert (z[0, 0] != z[1, 1]).all()
    assert chain.log_prob(z.clone()).shape == (4, 3)
    assert chain.mean.shape == (4, 3, T, D)


def test_family_reads_each_step_by_the_same_map(float64):
    family = GaussMarkov((T, D), context=T * 5, per_step=True)
    h = torch.randn(4, T, 5)
    order = torch.randperm(T)
    a, b = family.project(h.flatten(-2)), family.project(h[:, order].flatten(-2))
    torch.testing.assert_close(a.unflatten(-1, (T, -1))[:, order], b.unflatten(-1, (T, -1)))
    flat = GaussMarkov(T * D, context=None, steps=T)(a)
    torch.testing.assert_close(flat.mean, family.distribution(a).mean.flatten(-2))


def test_wrong_shapes_of_a_chain_are_named():
    for arguments in ({"features": 6}, {"features": 6, "steps": 4}, {"features": (3, 2), "steps": 2}):
        with pytest.raises(ValueError, match="steps=T"):
            GaussMarkov(context=12, **arguments)
    with pytest.raises(ValueError, match="context=13"):
        GaussMarkov((3, 2), context=13, per_step=True)


def test_evidence_is_that_of_pyros_gaussian_hmm(float64):
    model = _model()
    with torch.no_grad():
        x = model(n=20)
        torch.testing.assert_close(model.log_evidence(x), _hidden_markov(model, T).log_prob(x))
        x = model(None, LENGTHS, n=6)
        cut = torch.stack([_hidden_markov(model, int(m)).log_prob(x[i, :m]) for i, m in enumerate(LENGTHS)])
        torch.testing.assert_close(model.log_evidence(x, LENGTHS), cut)


def test_one_step_is_a_gaussian(float64):
    model = LinearGaussianSSM(X, D, 1)
    x = torch.randn(10, 1, X)
    covariance = model.weight @ model.weight.T + torch.eye(X)
    expected = torch.distributions.MultivariateNormal(torch.zeros(X), covariance).log_prob(x[:, 0])
    torch.testing.assert_close(model.log_evidence(x), expected)


def test_posterior_is_that_of_the_dense_joint_gaussian(float64):
    """Conditioning of the Gaussian of all states on the observed steps."""
    model = _model()
    with torch.no_grad():
        x = model(None, LENGTHS, n=6)
        posterior, prior = model.posterior(x, LENGTHS), model.prior()
        basis = torch.eye(T * D).reshape(T * D, T, D)
        unit = GaussMarkovChain(torch.zeros(T, D), prior.transition, prior.scale_tril)
        root = unit._run(torch.einsum("tij,ntj->nti", prior.scale_tril, basis)).flatten(1).T  # z = mean + root e
        covariance, mean = root @ root.T, prior.mean.flatten()
        for i, m in enumerate(LENGTHS):
            w = torch.block_diag(*[model.weight] * m)  # the first m steps
            w = torch.cat([w, w.new_zeros(len(w), (T - m) * D)], 1)
            gain = covariance @ w.T @ torch.linalg.inv(w @ covariance @ w.T + model.noise.square().repeat(m).diag())
            r = (x[i, :m] - model.mean).flatten() - w @ mean
            torch.testing.assert_close(posterior.mean[i].flatten(), mean + gain @ r)
            left = covariance - gain @ w @ covariance
            torch.testing.assert_close(posterior.variance[i].flatten(), left.diagonal())
            z = torch.randn(6, T, D)
            dense = torch.distributions.MultivariateNormal(mean + gain @ r, (left + left.T) / 2)
            torch.testing.assert_close(posterior.log_prob(z)[i], dense.log_prob(z[i].flatten()), rtol=1e-6, atol=1e-6)


def test_with_the_exact_posterior_the_weights_are_constant(float64):
    model = _model()
    with torch.no_grad():
        x = model(None, LENGTHS, n=6)
        log_w = log_weights(model, ExactPosterior(model), x, LENGTHS, particles=4)
        torch.testing.assert_close(log_w, model.log_evidence(x, LENGTHS).expand(4, 6), rtol=0, atol=1e-10)


def test_what_stands_beyond_a_length_is_not_read(float64):
    model = _model()
    guide = Amortized(
        recurrent(X, 8, bidirectional=True, output="flat"), {"z": GaussMarkov((T, D), T * 8, per_step=True)}
    )
    beyond = torch.arange(T) >= LENGTHS.unsqueeze(-1)
    with torch.no_grad():
        x = model(None, LENGTHS, n=6)
        assert (x[beyond] == 0).all()
        other = x + 100 * beyond.unsqueeze(-1)
        assert torch.equal(model.log_evidence(x, LENGTHS), model.log_evidence(other, LENGTHS))
        found = []
        for data in (x, other):
            torch.manual_seed(1)
            found.append(log_weights(model, guide, data, LENGTHS, particles=3))
        assert torch.equal(*found)
        full = torch.full((6,), T)
        z = {"z": torch.randn(3, 6, T, D)}
        torch.testing.assert_close(log_joint(model, z, x), log_joint(model, z, x, full))


def test_states_beyond_a_length_follow_the_prior(float64):
    """So any guide of all states has valid weights: with the prior they average to p(x)."""
    model = LinearGaussianSSM(1, 1, 3)
    lengths = torch.tensor([1, 2, 3, 1])
    with torch.no_grad():
        x = model(None, lengths, n=4)
    measured = evaluate(model, PriorGuide(model), (x, lengths), particles=50_000, seed=0, progress=False)
    z = (measured.log_evidence - measured.exact) / measured.standard_error
    assert z.abs().max() < 4


def test_evidence_keeps_its_digits_in_float32():
    model = _model().double()
    with torch.no_grad():
        model.log_noise.fill_(-5.0)
        x = model(n=20)
        exact = model.log_evidence(x)
        error = model.float().log_evidence(x.float()) - exact
        assert error.abs().max() < 0.05


def test_gradient_of_the_evidence_reaches_every_parameter(float64):
    model = _model()
    model.log_evidence(model(None, LENGTHS, n=6).detach(), LENGTHS).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_sequences_are_simulated_with_their_lengths():
    latents, x = simulate(_model(), 6, LENGTHS)
    assert latents["z"].shape == (6, T, D)
    assert x.shape == (6, T, X)


def test_wrong_lengths_are_named():
    model = _model()
    x = torch.zeros(3, T, X)
    with pytest.raises(ValueError, match="between 1 and the 8 steps"):
        model(x, torch.tensor([1, 2, 9]))
    with pytest.raises(ValueError, match="one for each of 3 data"):
        model.log_evidence(x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="n=3"):
        model(None, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="lengths must be integers"):
        model(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \[N, 8, 3\]"):
        model.log_evidence(torch.zeros(3, T + 1, X))
    with pytest.raises(ValueError, match="steps=0"):
        LinearGaussianSSM(X, D, 0)


def _trained(model, guide, data, epochs=20):
    fit(
        model,
        guide,
        data,
        ELBO(gradient="stl"),
        epochs=epochs,
        batch_size=100,
        lr=2e-2,
        optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99)),
        freeze=model,
        seed=0,
        progress=False,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    )
    return guide


def _gap_per_step(model, guide, data, steps):
    measured = evaluate(model, guide, data, particles=300, seed=0, progress=False)
    return (measured.exact - measured.elbo).sum().item() / steps


def test_a_structured_linear_guide_reaches_the_exact_evidence_and_mean_field_cannot():
    model = _model()
    with torch.no_grad():
        train, test = model(n=1000), model(n=200)
    gaps = {}
    for family in (GaussMarkov, MeanField):
        member = GaussMarkov((T, D), T * 16, per_step=True) if family is GaussMarkov else None
        encoder = nn.Sequential(nn.Flatten(), mlp(T * X, [T * 16], nn.Identity))
        guide = amortize(model, encoder, family, T * 16) if member is None else Amortized(encoder, {"z": member})
        gaps[family.__name__] = _gap_per_step(model, _trained(model, guide, train), test, 200 * T)
    assert -1e-3 < gaps["GaussMarkov"] < 0.01
    assert gaps["MeanField"] > 0.05


@pytest.mark.slow
def test_a_recurrent_guide_reaches_the_exact_evidence_of_ragged_sequences():
    model = _model()
    lengths = torch.randint(1, T + 1, (1200,))
    with torch.no_grad():
        x = model(None, lengths, n=1200)
    encoder = recurrent(X, 48, bidirectional=True, output="flat")
    guide = Amortized(encoder, {"z": GaussMarkov((T, D), T * 48, per_step=True)})
    _trained(model, guide, (x[:1000], lengths[:1000]), epochs=60)
    assert -1e-3 < _gap_per_step(model, guide, (x[1000:], lengths[1000:]), int(lengths[1000:].sum())) < 0.02


def test_one_line_swaps_the_family_of_a_sequence(float64):
    model = _model()
    x = model(n=4).detach()
    for family in (FullCovariance, lambda features, context: GaussMarkov(features, context, steps=T)):
        guide = amortize(model, nn.Sequential(nn.Flatten(), mlp(T * X, [16])), family, context=16)
        assert log_weights(model, guide, x, particles=3).shape == (3, 4)


def test_a_recurrent_network_is_torchs_unit_on_each_sequence_alone(float64):
    x = torch.randn(2, 3, T, X)
    lengths = LENGTHS.reshape(2, 3)
    torch.manual_seed(0)
    states = recurrent(X, 6, layers=2, bidirectional=True)
    torch.manual_seed(0)
    last = recurrent(X, 6, layers=2, bidirectional=True, output="last")
    torch.manual_seed(0)
    flat = recurrent(X, 6, layers=2, bidirectional=True, output="flat")
    assert torch.equal(flat(x, lengths), states(x, lengths).flatten(-2))
    for i in range(2):
        for j in range(3):
            m = int(lengths[i, j])
            alone, _ = states.unit(x[i, j, :m])
            torch.testing.assert_close(states(x, lengths)[i, j, :m], alone)
            assert (states(x, lengths)[i, j, m:] == 0).all()
            torch.testing.assert_close(last(x, lengths)[i, j], torch.cat([alone[-1, :3], alone[0, 3:]]))
    torch.testing.assert_close(states(x), states(x, torch.full((2, 3), T)))


def test_one_direction_knows_nothing_of_what_follows_and_two_do(float64):
    x = torch.randn(2, T, X)
    other = x.clone()
    other[:, 4:] += 1
    one, two = recurrent(X, 6), recurrent(X, 6, bidirectional=True)
    assert torch.equal(one(x)[:, :4], one(other)[:, :4])
    assert (two(x)[:, :4] != two(other)[:, :4]).any(-1).all()


def test_what_a_recurrent_network_cannot_read_is_named():
    network = recurrent(X, 6)
    with pytest.raises(ValueError, match=r"shape \[..., T, 3\]"):
        network(torch.zeros(2, T, X + 1))
    with pytest.raises(ValueError, match="between 1 and 8"):
        network(torch.zeros(2, T, X), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="one for each sequence"):
        network(torch.zeros(2, T, X), torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="must be even, but got 5"):
        recurrent(X, 5, bidirectional=True)
    with pytest.raises(ValueError, match="'mean'"):
        recurrent(X, 5, output="mean")
