"""Errors and warnings of fit for failing runs: the first non-finite quantity, and a falling bound."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from jensen.families import FullCovariance, Gaussian, MeanField
from jensen.guides import ExactPosterior, amortize
from jensen.inference import ELBO, fit
from jensen.models import PPCA, VAE
from jensen.networks import mlp


class _Roots(nn.Module):
    """A model and guide, one of which takes the logarithm of data that a shift keeps positive."""

    def __init__(self, site):
        super().__init__()
        self.w, self.site = nn.Parameter(torch.ones(())), site
        self.register_buffer("shift", torch.tensor(10.0))

    def _bent(self, site, x):
        return (self.w * (x + self.shift)).log() if site == self.site else x * self.w

    def model(self, x):
        pyro.module("roots", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self._bent("x", x).abs() + 0.1), obs=x)

    def guide(self, x):
        pyro.module("roots", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self._bent("z", x), 1.0))


class _After:
    def __init__(self, act):
        self.act = act

    def after_epoch(self, history, model, guide):
        self.act()

    def close(self):
        pass


@pytest.mark.parametrize(
    ("site", "what"),
    [("z", "loc of Normal at the guide's site 'z'"), ("x", "scale of Normal at the model's site 'x'")],
)
@pytest.mark.parametrize("compile", [False, True])
def test_the_first_quantity_that_is_not_finite_is_named_with_its_rows(site, what, compile):
    pair, x = _Roots(site), torch.rand(40) + 1
    x[[3, 27]] = -1.0
    unshift = _After(lambda: pair.shift.zero_())
    with pytest.raises(FloatingPointError, match=f"not finite is {what} for row") as told:
        fit(pair.model, pair.guide, x, epochs=3, batch_size=40, compile=compile, callbacks=unshift, progress=False)
    assert "for rows 3, 27 of the data; the parameters are those at the end of epoch" in str(told.value)


def test_rows_of_a_batch_are_those_of_the_data():
    pair, x = _Roots("z"), torch.rand(64) + 1
    x[50] = -1.0
    unshift = _After(lambda: pair.shift.zero_())
    with pytest.raises(FloatingPointError, match="site 'z' for row 50 of the data"):
        fit(pair.model, pair.guide, x, epochs=2, batch_size=8, seed=0, callbacks=unshift, progress=False)


def test_a_parameter_and_a_gradient_are_named():
    model = PPCA(5, 2)
    break_ = lambda: model.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"that is not finite is the parameter model\.weight; "):
        fit(model, ExactPosterior(model), torch.randn(20, 5), epochs=3, callbacks=_After(break_), progress=False)
    pair = _Roots("none")
    pair._bent = lambda site, x: (pair.w * (x - 1)).abs().sqrt()  # a slope of infinity, times zero
    with pytest.raises(FloatingPointError, match=r"that is not finite is the gradient of .*w; "):
        fit(pair.model, pair.guide, torch.ones(9), epochs=1, progress=False)


def _vae(seed=0):
    torch.manual_seed(seed)
    model = VAE(mlp(2, [32]), Gaussian(6, 32), latent=2)
    return model, amortize(model, mlp(6, [32]), MeanField, context=32)


@pytest.mark.parametrize("lr", [3.0, 1e3])
def test_a_bound_that_falls_without_end_is_told(lr):
    torch.manual_seed(1)
    model, guide = _vae()
    with pytest.warns(UserWarning, match=rf"training diverged: the bound was -\d+.* lower lr={lr:g}, or scale") as told:
        history = fit(model, guide, torch.randn(129, 6), epochs=10, lr=lr, seed=0, progress=False)
    assert len(told) == 1
    assert history.elbo[-1] < -50


def test_a_fall_at_the_end_is_told():
    model, guide = _vae()
    fall = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 8 else 1e3)
    x = torch.randn(129, 6)
    with pytest.warns(UserWarning, match="training diverged: the bound was .* at best -.* in epoch"):
        fit(model, guide, x, epochs=10, lr=1e-3, scheduler=fall, seed=0, progress=False)


@pytest.mark.parametrize("objective", [None, ELBO(beta=20.0), ELBO(10)], ids=["elbo", "beta", "ten draws"])
def test_a_run_that_goes_well_is_not_told_that_it_diverged(objective):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, guide = _vae()
        fit(model, guide, torch.randn(200, 6), objective, epochs=5, lr=1e-2, seed=0, progress=False)
        exact = PPCA(6, 2)
        fit(exact, amortize(exact, mlp(6, [8]), FullCovariance, context=8), torch.randn(3, 6), epochs=8, progress=False)


def test_a_guide_that_draws_nan_from_the_first_step_on_is_told_so():
    pair, x = _Roots("z"), torch.rand(40) + 1
    pair.shift.zero_()
    x[[3, 27]] = -1.0
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="samples NaN at site 'z' from Normal, in 2 of 40"),
    ):
        fit(pair.model, pair.guide, x, epochs=1, progress=False)


def test_an_optimizer_is_a_class():
    model = PPCA(5, 2)
    made = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer must be a class such as torch\.optim\.Adam, .* an object of it"):
        fit(model, ExactPosterior(model), torch.randn(9, 5), optimizer=made)
