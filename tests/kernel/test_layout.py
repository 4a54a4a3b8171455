"""Kinds of guide sites: points, densities from auxiliary sites, factors that are not densities."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.poutine import block

from jensen.inference import bounds, evaluate, fit, rate_distortion
from jensen.kernel import check_pair, log_weights


def _scaled(x):
    """A positive global latent, and a local one for each data point."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _beside_an_auxiliary_site(x):
    pyro.sample("scale", dist.Delta(torch.tensor(0.7)))
    with pyro.plate("data", len(x)):
        both = pyro.sample("both", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(both[..., 0]))


def _of_an_auxiliary_site(x):
    free = pyro.sample("free", dist.Normal(-0.3, 0.2), infer={"is_auxiliary": True})
    pyro.sample("scale", dist.Delta(free.exp(), log_density=-free))
    with pyro.plate("data", len(x)):
        coins = pyro.sample("coins", dist.Bernoulli(torch.full((len(x),), 0.5)), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(coins))


def _lists(model, point):
    """A point at one site, and a Gaussian at "z"."""
    guide = AutoGuideList(model)
    guide.append(AutoDelta(block(model, expose=[point])))
    guide.append(AutoNormal(block(model, expose=["z"])))
    return guide


def test_a_point_is_found_beside_an_auxiliary_site():
    x = torch.randn(6)
    guide = _lists(_scaled, "scale")
    for half in (_beside_an_auxiliary_site, guide):
        assert check_pair(_scaled, half, x).points == ("scale",)
    with pytest.raises(ValueError, match=r"point estimate at \['scale'\]"):
        evaluate(_scaled, guide, x, 10, progress=False)


def test_a_guide_with_a_point_is_trained():
    """It finds the mode: the mean of a Gaussian of known width, whose data are blurred once more."""
    x = torch.randn(30) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mean = pyro.sample("mean", dist.Delta(pyro.param("mode", torch.tensor(0.0))))
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(0.0, 0.5**0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta((mean + x) / 2 + e))

    fit(model, guide, x, epochs=100, lr=0.05, compile=False, progress=False)
    mode = x.sum() / 2 / (1 + len(x) / 2)
    assert pyro.param("mode").item() == pytest.approx(mode.item(), abs=0.1)


def test_deltas_that_take_over_an_auxiliary_density_are_no_points():
    x = torch.randn(6)
    for guide in (_of_an_auxiliary_site, AutoNormal(_scaled), AutoMultivariateNormal(_scaled)):
        assert check_pair(_scaled, guide, x).points == ()


def test_a_delta_with_a_density_of_its_own_is_no_point(float64):
    """Noise that is not a site: z = 0.5 + 2 e, with its density in the Delta."""
    x = torch.randn(40)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        normal = dist.Normal(x / 2, 0.5**0.5)
        z = normal.sample()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=normal.log_prob(z)))

    assert check_pair(model, guide, x).points == ()
    assert log_weights(model, guide, x).squeeze(0).allclose(dist.Normal(0.0, 2**0.5).log_prob(x))


def _normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _posterior(x, inside=None, outside=None):
    if outside is not None:
        pyro.factor("outside", torch.tensor(outside), has_rsample=True)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        if inside is not None:
            pyro.factor("inside", torch.full((len(x),), inside), has_rsample=False)


def _exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_penalty_in_the_guide_is_left_out_with_a_warning(where, float64):
    x = torch.randn(40)

    def guide(x):
        _posterior(x, **{where: -7.0})

    with pytest.warns(UserWarning, match=f"the guide's pyro.factor '{where}' is not part of the density of a sample"):
        evidence = evaluate(_normal, guide, x, 20, progress=False)
    torch.testing.assert_close(evidence.elbo, _exact(x))
    with pytest.warns(UserWarning, match=f"pyro.factor '{where}' is not part of the density"):
        assert bounds(_normal, guide, x, 16, progress=False).mean.allclose(_exact(x).mean())
    with pytest.warns(UserWarning, match=f"pyro.factor '{where}' is not part of the density"):
        split = rate_distortion(_normal, guide, x, 20, progress=False)
    torch.testing.assert_close(-(split.rate + split.distortion), _exact(x))


def test_training_counts_a_penalty_in_the_guide():
    x = torch.randn(40)
    strength = torch.nn.Parameter(torch.tensor(0.0))

    def guide(x):
        pyro.param("strength", strength)
        _posterior(x)
        pyro.factor("penalty", strength.square() * 5 - strength, has_rsample=True)

    fit(_normal, guide, x, epochs=200, lr=1e-2, compile=False, progress=False)
    assert strength.item() == pytest.approx(0.1, abs=1e-3)  # the minimum of 5 s^2 - s


def test_a_penalty_outside_the_plate_is_named_where_batches_count_it():
    def guide(x):
        pyro.factor("outside", -pyro.param("strength", torch.tensor(1.0)).square(), has_rsample=True)
        _posterior(x)

    with pytest.warns(UserWarning, match=r"pyro.factor 'outside' is outside every plate.*number of batches, 4"):
        fit(_normal, guide, torch.randn(40), epochs=1, batch_size=10, progress=False)


def test_a_log_determinant_by_a_factor_is_counted(float64):
    """Latent z = x / 2 + e / sqrt 2 of an auxiliary e: log q(z) is that of e plus log(2) / 2, which is a factor."""
    x = torch.randn(40)

    def guide(x):
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x / 2 + e * 0.5**0.5))
            pyro.factor("log_det", torch.full((len(x),), 2.0).log() / 2, has_rsample=True)

    with pytest.warns(UserWarning, match="the guide's pyro.factor 'log_det' is counted as a part of log q"):
        evidence = evaluate(_normal, guide, x, 20, progress=False)
    torch.testing.assert_close(evidence.elbo, _exact(x))


def test_a_penalty_outside_the_plate_is_none_beside_auxiliary_sites(float64):
    x = torch.randn(40)
    auto = AutoNormal(_normal)
    auto(x)

    def guide(x):
        pyro.factor("penalty", torch.tensor(-3.0), has_rsample=True)
        auto(x)

    layout = check_pair(_normal, guide, x)
    assert (layout.penalties, layout.factors) == (("penalty",), ())
    with pytest.warns(UserWarning, match="'penalty' is not part of the density"):
        evidence = evaluate(_normal, guide, x, 20, seed=0, progress=False)
    torch.testing.assert_close(evidence.elbo, evaluate(_normal, auto, x, 20, seed=0, progress=False).elbo)


def test_a_factor_of_the_model_outside_the_plate_joins_the_data(float64):
    x = torch.randn(40)

    def model(x):
        pyro.factor("coupling", x.sum())
        _normal(x)

    with pytest.warns(UserWarning, match="the model's pyro.factor 'coupling' stands outside the plate"):
        evidence = evaluate(model, _posterior, x, 20, progress=False)
    torch.testing.assert_close(evidence.elbo, (_exact(x).sum() + x.sum()).unsqueeze(0))
    with pytest.raises(
        ValueError, match=r"bounds needs one value per data point, but the model's pyro.factor 'coupling'"
    ):
        bounds(model, _posterior, x, 16, progress=False)
