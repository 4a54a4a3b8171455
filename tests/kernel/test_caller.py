"""Warnings point to the user's line."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from jensen.inference import bounds, evaluate, fit, log_weights


def _model(x):
    with pyro.plate("data", len(x)):
        with pyro.poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


CALLS = {
    "log_weights, which is decorated": lambda x: log_weights(_model, _guide, x),
    "evaluate, which looks at the pair twice": lambda x: evaluate(_model, _guide, x, 10, progress=False),
    "bounds": lambda x: bounds(_model, _guide, x, 4, progress=False),
    "fit": lambda x: fit(_model, _guide, x, epochs=1, progress=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_points_at_the_line_of_the_user_once(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        CALLS[name](torch.zeros(3))
    assert [(one.filename, "poutine.scale" in str(one.message)) for one in caught] == [(__file__, True)]
