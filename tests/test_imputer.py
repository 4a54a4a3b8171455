"""The transformer of scikit-learn: its contract, and its numbers beside those of the models."""

import numpy as np
import pytest
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # the import enables the next one
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

import jensen as jn
from jensen.imputer import Imputer


def _checks():
    """Those of scikit-learn, without that of other arrays than NumPy's, which is skipped by default."""
    found = estimator_checks_generator(Imputer(latent=1))
    return [(estimator, check) for estimator, check in found if check.func.__name__ != "check_array_api_input"]


@pytest.mark.parametrize(("estimator", "check"), _checks(), ids=[str(check.func.__name__) for _, check in _checks()])
def test_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


def _table(seed=0, n=300, rate=0.3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) @ rng.normal(size=(2, 5)) * [1, 10, 1, 100, 1] + [0, 5, -3, 1000, 1]
    x = x + 0.1 * rng.normal(size=x.shape)
    holed = np.where(rng.random(x.shape) < rate, np.nan, x)
    return x, holed


@pytest.mark.parametrize("model", ["ppca", "factor-analysis", "mixture-of-ppca"])
def test_missing_values_are_better_than_their_means(model):
    x, holed = _table()
    imputer = Imputer(model, latent=2, random_state=0).fit(holed)
    filled, out = imputer.transform(holed), np.isnan(holed)
    error = ((filled - x) / imputer.scale_)[out].std()
    assert error < 0.6
    assert error < 1.1 * ((IterativeImputer().fit_transform(holed) - x) / imputer.scale_)[out].std()
    assert (filled[~out] == holed[~out]).all()


def test_a_row_without_observed_values_gets_the_means():
    _, holed = _table()
    imputer = Imputer(latent=2, random_state=0).fit(holed)
    nothing = np.full((1, 5), np.nan)
    np.testing.assert_allclose(
        imputer.transform(nothing)[0], imputer.model_.mean.detach().numpy() * imputer.scale_ + imputer.location_
    )
    assert imputer.score_samples(nothing)[0] == 0


def test_densities_are_those_of_the_table():
    x, holed = _table(rate=0.0)
    imputer = Imputer(latent=2, random_state=0).fit(holed)
    model, scale = imputer.model_, imputer.scale_
    weight = model.weight.detach().numpy() * scale[:, None]
    covariance = weight @ weight.T + np.diag(scale**2) * float(model.noise.detach()) ** 2
    r = x - imputer.location_ - model.mean.detach().numpy() * scale
    expected = -0.5 * (
        np.einsum("ni,ij,nj->n", r, np.linalg.inv(covariance), r) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    np.testing.assert_allclose(imputer.score_samples(x), expected)


def test_a_trained_vae_stands_in_a_pipeline():
    x, holed = _table()
    imputer = Imputer("vae", latent=2, hidden=(16,), epochs=60, particles=50, random_state=0)
    pipeline = make_pipeline(imputer, LinearRegression()).fit(holed, x[:, 3])
    assert pipeline.predict(holed[:5]).shape == (5,)
    out = np.isnan(holed)
    assert ((imputer.transform(holed) - x) / imputer.scale_)[out].std() < 0.8
    assert np.isfinite(imputer.score_samples(holed)).all()


def test_draws_come_in_the_units_and_columns_of_the_table():
    import pandas

    _, holed = _table()
    frame = pandas.DataFrame(holed, columns=list("abcde"))
    found = jn.Imputer(latent=2, random_state=0).fit(frame).impute(frame, draws=3)
    assert found.draws.shape == (3, 300, 5)
    assert list(found.to_frame()) == list("abcde")
    assert abs(found.to_frame()["d"].mean() - 1000) < 50


def test_what_cannot_be_fitted_is_said():
    _, holed = _table()
    with pytest.raises(ValueError, match="model must be one of ppca"):
        Imputer("pca").fit(holed)
    holed[:, 2] = np.nan
    with pytest.raises(ValueError, match=r"features \[2\] have no observed value"):
        Imputer().fit(holed)
    with pytest.raises(ValueError, match="infinity"):
        Imputer().fit(np.array([[1.0, np.inf], [2.0, 3.0]]))
    with pytest.raises(NotImplementedError, match="samples need a guide"):
        Imputer("mixture-of-ppca", latent=1).fit(_table()[1]).impute(_table()[1])
