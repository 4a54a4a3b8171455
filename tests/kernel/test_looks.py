"""A guide with a value for each data point fits no other data: an error for such guides only."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule
from torch import nn

from jensen.inference import compare, evaluate, fit, gaps, log_weights, terms
from jensen.kernel.looks import held_by, layout_on, look_at
from jensen.models import PPCA


def _model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _global(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def _made(kind, n, model=_model):
    guide = kind(model)
    guide(torch.randn(n))
    return guide


_WAYS = {
    "evaluate": lambda model, guide, x: evaluate(model, guide, x, 10, progress=False),
    "compare": lambda model, guide, x: compare({"a": (model, guide)}, x, 10, progress=False),
    "validation": lambda model, guide, x: fit(
        model, guide, torch.randn(50), epochs=1, validation=x, progress=False, lr=1e-9
    ),
    "fit": lambda model, guide, x: fit(model, guide, x, epochs=1, progress=False),
    "log_weights": lambda model, guide, x: log_weights(model, guide, x, particles=3),
    "terms": lambda model, guide, x: terms(model, guide, x, particles=3),
    "gaps": lambda model, guide, x: gaps(model, guide, x, 10, progress=False),
}


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("way", _WAYS)
def test_an_autoguide_of_local_latents_on_other_data(way, kind):
    with pytest.raises(
        ValueError,
        match=rf"the {kind.__name__} .* each of 50 data points \(site 'z', plate .*\), but got 20: .*amortize",
    ):
        _WAYS[way](_model, _made(kind, 50), torch.randn(20))


def test_an_autoguide_of_one_datum_is_not_broadcast():
    with pytest.raises(ValueError, match=r"a value for each of 1 data points \(site 'z', plate 'data'\), but got 20:"):
        evaluate(_model, _made(AutoNormal, 1), torch.randn(20), 10, progress=False)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_an_autoguide_of_global_latents_serves_other_data(kind):
    guide = _made(kind, 50, _global)
    assert evaluate(_global, guide, torch.randn(20), 10, progress=False).joint
    history = fit(_global, guide, torch.randn(30), epochs=1, validation=torch.randn(20), progress=False)
    assert history.data == 30


@pytest.mark.parametrize("kind", [AutoStructured, AutoGaussian])
def test_an_autoguide_that_keeps_no_trace_of_its_sites(kind):
    x = torch.randn(50)
    guide = _made(kind, 50)
    assert evaluate(_model, guide, x, 10, progress=False).elbo.isfinite().all()
    assert fit(_model, guide, x, epochs=1, progress=False).steps == 1
    with pytest.raises(ValueError, match=rf"the {kind.__name__}.* each of 50 data points .*, but got 20:"):
        evaluate(_model, guide, torch.randn(20), 10, progress=False)


def test_a_list_of_guides_is_read_part_by_part():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def local(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    def listed(*parts):
        guide = AutoGuideList(model)
        for part in parts:
            guide.append(part)
        guide(torch.randn(50))
        return guide

    x = torch.randn(20)
    amortized = listed(AutoNormal(pyro.poutine.block(model, expose=["mean"])), local)
    assert held_by(model, amortized, (x,)) is None
    holding = listed(
        AutoNormal(pyro.poutine.block(model, expose=["mean"])), AutoNormal(pyro.poutine.block(model, expose=["z"]))
    )
    assert held_by(model, holding, (x,)).size == 50


def _stored(x):
    loc = pyro.param("loc", lambda: torch.zeros(50))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


class _Owned(PyroModule):
    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.zeros(2, 50))

    def forward(self, x):
        with pyro.plate("data", self.locs.shape[1]):
            pyro.sample("z", dist.Normal(self.locs[0], self.locs[1].exp()))


@pytest.mark.parametrize(("guide", "name"), [(_stored, "loc"), (_Owned(), "locs")])
def test_a_guide_with_a_parameter_for_each_datum(guide, name):
    log_weights(_model, guide, torch.randn(50))
    with pytest.raises(ValueError, match=rf"of 50 data points \(parameter '{name}' of shape .*50\]\), but got 20"):
        evaluate(_model, guide, torch.randn(20), 10, progress=False)


class _Wide(PyroModule):
    """A guide with a parameter and layers for five features; data of another width are not per-point values."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x) + self.shift, 1.0).to_event(1))


def test_what_fails_for_another_reason_is_not_accused():
    model = PPCA(5, latent=2)
    with pytest.raises(ValueError, match=r"do not run on data\[0\] of shape \[20, 6\].*shapes cannot be multiplied"):
        look_at(model, _Wide(), (torch.randn(20, 6),))
    x = torch.randn(20, 5)
    x[15] = torch.nan  # the first two rows would run
    with pytest.raises(ValueError, match=r"data\[0\] holds 5 NaN, the first at index \[15, 0\]"):
        look_at(model, _Wide(), (x,))
    assert layout_on(model, _Wide(), (x,), 15).sizes == (15,)


def _rowwise(plate):
    """Independent rows, in a plate or as dimensions of one event."""

    def model(x):
        with pyro.plate("data", len(x)) if plate else nullcontext():
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1 if plate else 2))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1 if plate else 2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)) if plate else nullcontext():
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1 if plate else 2))

    return model, guide


def _walk():
    """A random walk over the rows, whose steps depend on each other."""

    def model(x):
        cov = torch.minimum(*torch.meshgrid(*[torch.arange(1.0, len(x) + 1)] * 2, indexing="ij"))
        path = pyro.sample("path", dist.MultivariateNormal(torch.zeros(len(x)), cov))
        pyro.sample("x", dist.Normal(path, 1.0).to_event(1), obs=x[:, 0])

    def guide(x):
        pyro.sample("path", dist.MultivariateNormal(x[:, 0], torch.eye(len(x))))

    return model, guide


def test_a_forgotten_plate_is_told_where_rows_are_independent():
    x, quick = torch.randn(20, 3), {"particles": 20, "progress": False}
    with pytest.warns(UserWarning, match=r"its 20 rows are one data point: .* sample z \(and observe x\) in pyro"):
        assert evaluate(*_rowwise(False), x, **quick).joint
    assert not evaluate(*_rowwise(True), x, **quick).joint
    assert evaluate(*_walk(), x, **quick).joint  # and no warning, which would be an error
    model, _ = _rowwise(False)

    def trained(x):
        loc = pyro.param("scale", torch.tensor(0.5)) * x[:, :2]
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))

    with pytest.warns(UserWarning, match="there is no plate around the data"):
        fit(model, trained, x, epochs=1, progress=False)
