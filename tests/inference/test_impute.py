"""Imputation and held-out values: against the conditional distributions of linear-Gaussian models."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from jensen.families import FullCovariance, Gaussian, Poisson
from jensen.guides import PriorGuide
from jensen.inference import HeldOut, Imputation, held_out, impute
from jensen.models import VAE
from jensen.networks import mlp
from jensen.results.standard_errors import mc_error

NAN = math.nan


class _Linear(torch.nn.Module):
    """A decoder mu + W z, so that the data are Gaussian."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, z):
        return z @ self.weight.T


def _linear(n=30, features=4, seed=0):
    """A VAE whose data are Gaussian, with data in which about half of the values are missing, and the covariance."""
    torch.manual_seed(seed)
    weight = torch.randn(features, 2, dtype=torch.float64)
    model = VAE(_Linear(weight), Gaussian(features, None, scale=0.5), 2).double()
    x = model(n=n)
    holed = x.masked_fill(torch.rand(x.shape) < 0.5, NAN)
    holed[0], holed[1] = NAN, x[1]
    return model, x, holed, weight @ weight.T + 0.25 * torch.eye(features, dtype=torch.float64)


def _conditional(covariance, row):
    """Mean and covariance of the missing values of a row."""
    out, seen = row.isnan(), ~row.isnan()
    gain = covariance[out][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
    return gain @ row[seen], covariance[out][:, out] - gain @ covariance[seen][:, out]


@pytest.mark.parametrize("refine", [False, True])
def test_means_variances_quantiles_and_draws_are_those_of_the_conditional_distribution(refine):
    model, _, holed, covariance = _linear()
    how = {"draws": 400, "levels": (0.1, 0.5), "seed": 0, "progress": False}
    found = impute(model, PriorGuide(model), holed, 8000, refine=refine, **how)
    assert found.method == ("refined" if refine else "guide")
    assert torch.equal(found.mean[1], holed[1])
    assert math.isinf(found.ess[1])
    for n in [0, *range(2, 30)]:
        out = holed[n].isnan()
        if not out.any():
            continue
        mean, left = _conditional(covariance, holed[n])
        deviation = left.diagonal().sqrt()
        error = deviation / found.ess[n].sqrt()
        assert bool(((found.mean[n][out] - mean).abs() <= 4.5 * error).all())
        assert bool(((found.variance[n][out] / left.diagonal() - 1).abs() <= 8 / found.ess[n].sqrt()).all())
        assert torch.equal(found.mean[n][~out], holed[n][~out])
        low = dist.Normal(mean, deviation).icdf(torch.tensor(0.1).double())
        assert bool(((found.quantiles[0, n][out] - low).abs() <= 8 * error).all())
        assert bool(((found.quantiles[1, n][out] - mean).abs() <= 6 * error).all())
        drawn = found.draws[:, n][:, out]
        assert bool(((drawn.mean(0) - mean).abs() <= 4.5 * deviation * (1 / 400 + 1 / found.ess[n]).sqrt()).all())
        if out.sum() == 2:  # the samples of a row belong together
            near = left[0, 1] / deviation.prod()
            assert abs(float(drawn.T.corrcoef()[0, 1] - near)) < 0.25


def test_a_proposal_for_each_data_point_is_better_than_a_poor_guide():
    model, x, holed, _ = _linear(n=40, features=12)
    poor = {"seed": 0, "progress": False}
    guess = impute(model, PriorGuide(model), holed, 400, refine=False, **poor)
    found = impute(model, PriorGuide(model), holed, 400, **poor)
    rows = holed.isnan().any(1) & ~holed.isnan().all(1)
    assert float(found.ess[rows].mean()) > 3 * float(guess.ess[rows].mean())
    assert found.unreliable < 0.1 < guess.unreliable
    some = held_out(model, PriorGuide(model), holed, x, 400, **poor)
    assert some.method == "refined"
    assert torch.equal(found[3:5].mean, found.mean[3:5])
    assert found[3:5].draws.shape == (5, 2, 12)


def test_correlated_noise_is_part_of_the_conditional_mean():
    torch.manual_seed(1)
    likelihood = FullCovariance(3, None)
    parameters = torch.randn(likelihood.size, dtype=torch.float64)
    model = VAE(_Constant(parameters), likelihood, 1).double()
    p = likelihood(parameters)
    x = torch.tensor([[0.3, NAN, NAN], [NAN, 0.2, -1.0]], dtype=torch.float64)
    found = impute(model, PriorGuide(model), x, 50, seed=0, progress=False)
    for n in range(2):
        centred = x[n] - p.loc
        mean, _ = _conditional(p.covariance_matrix, centred)
        torch.testing.assert_close(found.mean[n][x[n].isnan()], mean + p.loc[x[n].isnan()])


class _Constant(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.parameters_ = parameters

    def forward(self, z):
        return self.parameters_.expand(*z.shape[:-1], -1)


def test_held_out_values_jointly_and_alone():
    model, x, holed, covariance = _linear(n=100, seed=2)
    found = held_out(model, PriorGuide(model), holed, x, 2000, seed=0, progress=False)
    assert found.count.tolist() == holed.isnan().sum(1).tolist()
    joint, single = [], []
    for row, known in zip(x, holed, strict=True):
        out = known.isnan()
        if not out.any():
            joint.append(row.new_zeros(()))
            single.append(row.new_zeros(()))
            continue
        mean, left = _conditional(covariance, known)
        joint.append(dist.MultivariateNormal(mean, left).log_prob(row[out]))
        single.append(dist.Normal(mean, left.diagonal().sqrt()).log_prob(row[out]).sum())
    for estimate, errors, truth in (
        (found.joint, found.joint_error, joint),
        (found.single, found.single_error, single),
    ):
        off = estimate - torch.stack(truth)
        covered = (off.abs() <= 2 * errors + 1e-5).double().mean()
        assert 0.9 <= float(covered) <= 1.0
        assert abs(float(off.mean())) <= 4 * mc_error(errors) + 1e-5
    assert float((found.joint - found.single).mean()) > 0.05  # two different numbers
    assert bool(found.each.isnan()[~holed.isnan()].all())


def test_counts_keep_their_support():
    torch.manual_seed(3)
    model = VAE(mlp(2, [8]), Poisson(3, 8), 2)
    x = model(n=20).masked_fill(torch.rand(20, 3) < 0.4, NAN)
    found = impute(model, PriorGuide(model), x, 200, seed=0, progress=False)
    assert bool((found.draws == found.draws.round()).all())
    assert bool((found.draws >= 0).all())
    assert bool((found.quantiles == found.quantiles.round()).all())


def _program(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def _program_guide(x):
    n = float((~x.isnan()).sum())
    pyro.sample("mean", dist.Normal(x.nansum() / (n + 0.01), (n + 0.01) ** -0.5))


def test_any_program_with_joint_weights():
    torch.manual_seed(4)
    x = torch.where(torch.rand(20) < 0.3, NAN, 3.0 + torch.randn(20))
    found = impute(_program, _program_guide, x, 4000, missing="nan", seed=0, progress=False)
    n = int((~x.isnan()).sum())
    mean, variance = float(x.nansum()) / (n + 0.01), 1 + 1 / (n + 0.01)
    out = x.isnan()
    assert float((found.mean[out] - mean).abs().max()) < 0.02
    assert float((found.variance[out] / variance - 1).abs().max()) < 0.12


def test_units_and_columns_come_back():
    model, _, holed, _ = _linear()
    found = impute(model, PriorGuide(model), holed, 100, columns=["a", "b", "c", "d"], seed=0, progress=False)
    location, scale = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    back = found.in_units(location, scale)
    torch.testing.assert_close(back.mean, found.mean * scale + location)
    torch.testing.assert_close(back.variance, found.variance * scale**2)
    assert list(back.to_frame().columns) == ["a", "b", "c", "d"]
    assert back.to_frame().shape == (30, 4)
    again = Imputation.from_json(found.to_json())
    assert torch.equal(again.draws, found.draws)
    assert "missing values" in str(found)


def test_a_held_out_result_comes_back():
    model, x, holed, _ = _linear()
    found = held_out(model, PriorGuide(model), holed, x, 100, seed=0, refine=False, progress=False)
    again = HeldOut.from_json(found.to_json())
    assert torch.equal(again.single, found.single)
    assert "each alone" in str(found)
    assert {"joint", "joint_error", "single", "single_error"} <= set(found.to_frame())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"particles": 0}, "particles and draws are at least 1"),
        ({"draws": 0}, "particles and draws are at least 1"),
        ({"levels": [2.0]}, "levels are probabilities"),
        ({"columns": ["a"]}, "columns must name each of 4 features, but got 1 names"),
        ({"site": "y"}, r"site must be an observed site of the model, \['x'\], but got 'y'"),
        ({"data": torch.zeros(3, 4).double()}, "no missing values"),
        ({"missing": torch.zeros(3, 4, dtype=torch.bool)}, "missing must have the shape of the data"),
    ],
)
def test_what_cannot_be_imputed_is_said(change, sentence):
    model, _, holed, _ = _linear()
    arguments = {"data": holed, "particles": 10} | change
    with pytest.raises(ValueError, match=sentence):
        impute(model, PriorGuide(model), progress=False, **arguments)


def test_held_out_values_must_agree_with_the_data():
    model, x, holed, _ = _linear()
    with pytest.raises(ValueError, match="differs from data where data are observed"):
        held_out(model, PriorGuide(model), holed, x + 1, 10, progress=False)
    with pytest.raises(ValueError, match="nothing is held out"):
        held_out(model, PriorGuide(model), holed, holed.nan_to_num(NAN), 10, progress=False)
    with pytest.raises(ValueError, match="complete must have the shape"):
        held_out(model, PriorGuide(model), holed, x[:3], 10, progress=False)


def _factor(x, left=0, turned=False, shift=0.0):
    """x_nj ~ N(z_n, 1), with a plate of two other latents left of the data, or features in a plate left of them."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if left:
            with pyro.plate("left", left, dim=-2):
                pyro.sample("u", dist.Normal(0.0, 1.0))
        if turned:
            with pyro.plate("features", x.shape[1], dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)
        else:
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x - shift)


def _factor_guide(x, left=0, **_):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        if left:
            with pyro.plate("left", left, dim=-2):
                pyro.sample("u", dist.Normal(0.0, 1.0))


def _holed_rows():
    return torch.tensor([[1.0, NAN, 2.0], [NAN, -1.0, NAN], [0.5, 0.5, NAN]])


@pytest.mark.parametrize("left", [0, 2])
def test_plates_left_of_the_data_without_the_site_do_not_matter(left):
    x, model, guide = _holed_rows(), partial(_factor, left=left), partial(_factor_guide, left=left)
    found = impute(model, guide, x, 20_000, missing="nan", seed=0, progress=False)
    assert found.mean.shape == found.draws.shape[1:] == x.shape
    for row, mean in zip(x, found.mean, strict=True):
        seen = row[~row.isnan()]
        torch.testing.assert_close(
            mean[row.isnan()], (seen.sum() / (1 + len(seen))).expand(int(row.isnan().sum())), rtol=0.0, atol=0.05
        )


def test_a_plate_of_the_site_left_of_the_data_is_refused():
    x = _holed_rows()  # as many rows as features: nothing else would show it
    for measure in (impute, partial(held_out, complete=x.nan_to_num(0.0), refine=False)):
        with pytest.raises(ValueError, match="where another plate stands left of that of the data"):
            measure(partial(_factor, turned=True), _factor_guide, x, particles=10, missing="nan", progress=False)


def test_a_site_in_other_units_is_said():
    x = _holed_rows()
    with pytest.warns(UserWarning, match="'x' are not those of the data: .* the units of the site"):
        impute(partial(_factor, shift=1.0), _factor_guide, x, 10, missing="nan", progress=False)
    with pytest.raises(ValueError, match="those of the first tensor, but site 'x' observes other values"):
        held_out(partial(_factor, shift=1.0), _factor_guide, x, x.nan_to_num(0.0), 10, missing="nan", progress=False)


def test_summed_states_means_and_weights_that_do_not_exist_are_said():
    def summed(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def cauchy(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Cauchy(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def bounded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(0.0, z.exp()[..., None] * torch.ones(2)).to_event(1), obs=x)

    x = torch.tensor([1.0, NAN])
    with pytest.raises(NotImplementedError, match="the states of enumerated sites are summed out"):
        impute(summed, lambda x: None, x, 10, missing="nan", progress=False)
    with pytest.warns(UserWarning, match="the mean of 1 missing values is not finite"):
        impute(cauchy, _factor_guide, x, 10, missing="nan", seed=0, progress=False)
    with pytest.raises(ValueError, match=r"none of the 2 samples of z is possible .* for 1 data points"):
        impute(bounded, _factor_guide, torch.tensor([[1e4, NAN]]), 2, missing="nan", seed=0, progress=False)


def test_data_of_one_feature_have_no_event():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    holed = x.index_fill(0, torch.tensor(1), NAN)
    found = impute(model, _factor_guide, holed, 100, missing="nan", seed=0, progress=False)
    assert "x0" in str(found)
    assert found.unreliable < 1
    assert torch.equal(Imputation.from_json(found.to_json()).mean, found.mean)
    held = held_out(model, _factor_guide, holed, x, 20_000, missing="nan", refine=False, seed=0, progress=False)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x[1])
    assert float(held.single[1]) == pytest.approx(float(exact), abs=0.02)
    assert held.count.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"levels are probabilities in \[0, 1\], at least one, but got \[\]"):
        impute(model, _factor_guide, holed, 10, levels=[], missing="nan", progress=False)


def test_held_out_values_with_joint_weights_are_shown():
    x = torch.tensor([2.0, 3.0, 4.0])
    holed = x.index_fill(0, torch.tensor(1), NAN)
    found = held_out(_program, _program_guide, holed, x, 1000, missing="nan", refine=False, seed=0, progress=False)
    assert "held-out values" in str(found)
    exact = dist.Normal(6.0 / 2.01, math.sqrt(1 + 1 / 2.01)).log_prob(x[1])
    assert float(found.single[1]) == pytest.approx(float(exact), abs=0.05)
