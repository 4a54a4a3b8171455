"""Guides of data with missing values (NaN): what they condition on, and how they recognize the same data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size
from torch.fx.experimental.proxy_tensor import make_fx

from jensen.families import FullCovariance, Gaussian, MeanField
from jensen.guides import BottomUp, Contractive, Ladder, SemiAmortized, amortize
from jensen.guides.local import Constant
from jensen.inference import log_weights
from jensen.missing import same_values
from jensen.models import VAE, Hierarchical
from jensen.module import UniqueModule
from jensen.networks import Masked, mlp

X, N = 5, 12


class Holed(UniqueModule):
    """A linear model that scores the observed values only."""

    def __init__(self):
        super().__init__()
        self.latents = {"z": Size([2])}
        self.decoder = torch.nn.Linear(2, X)

    def forward(self, x=None, n=1):
        with pyro.plate("data", n if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            p = dist.Normal(self.decoder(z), 0.5)
            if x is None:
                return pyro.sample("x", p.to_event(1))
            return pyro.sample("x", p.mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


def holed(*shape, share=0.4):
    x = torch.randn(*shape)
    return torch.where(torch.rand_like(x) < share, torch.nan, x)


def masked(*widths):
    return Masked(mlp(2 * X, list(widths)), X)


def test_missing_values_are_equal_in_comparisons_of_data():
    x, y = torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0])
    assert same_values(x, x.clone())
    assert not same_values(x, y)
    assert not same_values(x, x.nan_to_num())
    assert not same_values(x, x[:1])
    assert same_values(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not same_values(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_free_parameters_belong_to_data_with_the_same_holes():
    x = holed(N, X)
    other = x.clone()
    other[0] = other[0].isnan().float().masked_fill(~other[0].isnan(), torch.nan)  # the other values are missing
    guide = amortize(Holed(), masked(8), MeanField).local(x)
    assert guide(x.clone())["z"].shape == (N, 2)
    with pytest.raises(ValueError, match="this guide has parameters for 12 data points, but got 12 other data"):
        guide(other)
    stored = Constant(torch.ones(N, 2), (x,))
    graph = make_fx(stored)(x)
    assert torch.equal(graph(x), torch.ones(N, 2))
    assert graph(other).isnan().all()


def test_a_search_is_remembered_for_data_with_holes():
    model, x = Holed(), holed(N, X)
    guide = SemiAmortized(amortize(model, masked(8), MeanField), model, steps=3)
    calls, search = [], guide._refine
    object.__setattr__(guide, "_refine", lambda *data: calls.append(1) or search(*data))
    for _ in range(3):
        assert log_weights(model, guide, x, particles=4).isfinite().all()
    assert len(calls) == 1
    assert guide.local(x)(x)["z"].isfinite().all()


def test_the_default_encoder_standardizes_by_what_is_observed_and_reads_the_mask(float64):
    x = 3.0 + 2.0 * holed(400, X)
    x[:, 0] = torch.nan
    encoder = amortize(Holed(), data=x).encoder
    assert encoder.loc[0] == 0.0
    assert encoder.scale[0] == 1.0
    for j in range(1, X):
        known = x[~x[:, j].isnan(), j]
        torch.testing.assert_close(encoder.loc[j], known.mean())
        torch.testing.assert_close(encoder.scale[j], known.std(unbiased=False))
    seen = ~x.isnan()
    standard = torch.where(seen, (x - encoder.loc) / encoder.scale, 0.0)
    torch.testing.assert_close(encoder(x), encoder.network(torch.cat([standard, seen.double()], -1)))
    marked = amortize(Holed(), data=x.nan_to_num(-999.0), missing=~seen).encoder
    assert torch.equal(marked.loc, encoder.loc)
    assert torch.equal(marked.scale, encoder.scale)
    with pytest.raises(ValueError, match=r"missing must have the shape of the data, \[400, 5\]"):
        amortize(Holed(), data=x, missing=seen[0])
    full = torch.randn(7, X)
    assert encoder(full).isfinite().all()
    assert amortize(Holed(), data=full).encoder.network[1].in_features == X  # no mask for complete data
    assert amortize(Holed(), data=full).encoder(x).isfinite().all()


def test_a_model_and_its_guides_condition_on_what_is_observed(float64):
    """Values that are hidden change nothing: log weights are those of a model of the observed features alone."""
    model = VAE(mlp(2, [8]), Gaussian(X, 8, scale="diagonal"), latent=2)
    x = torch.randn(N, X)
    x[:, 3:] = torch.nan
    guide = amortize(model, data=x)
    part = VAE(model.decoder, Gaussian(3, 8, scale="diagonal"), latent=2)
    with torch.no_grad():
        part.likelihood.affine.weight.copy_(model.likelihood.affine.weight[:3])
        part.likelihood.affine.bias.copy_(model.likelihood.affine.bias[:3])

    def of_part(y):
        return guide(torch.cat([y, y.new_full((len(y), 2), torch.nan)], -1))

    log_w = []
    for p, q, y in ((model, guide, x), (part, of_part, x[:, :3])):
        torch.manual_seed(0)
        log_w.append(log_weights(p, q, y, particles=4))
    torch.testing.assert_close(*log_w)
    assert log_w[0].isfinite().all()
    for refined in (guide.local(x), SemiAmortized(guide, model, steps=2)):
        assert log_weights(model, refined, x, particles=4).isfinite().all()


def grouped(x, y):
    """A value for each group, whose number is the last column of x, and outcomes y of two columns with holes."""
    group = x[:, -1].long()
    with pyro.plate("groups", 300):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        mean = a[group].unsqueeze(-1).expand(-1, 2)
        pyro.sample("y", dist.Normal(mean, 1.0).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())


def gaussian(x, y):
    """The same with a likelihood that does not know of holes: the guide's reading of the program does not need it."""
    group = x[:, -1].long()
    with pyro.plate("groups", 300):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a[group].unsqueeze(-1).expand(-1, 2), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("model", [grouped, gaussian])
def test_holes_do_not_spread_to_the_other_rows_of_a_group(model):
    group = torch.arange(600) % 300
    x = torch.stack([torch.randn(600), group.float()], -1)
    y = holed(600, 2)
    y[group == 0] = torch.nan  # nothing is observed of a whole group, and of each row of another a part
    y[group == 1] = torch.tensor([1.0, torch.nan])
    x[3, 0] = torch.nan
    guide = amortize(model, data=(x, y))
    assert str(guide) == "Structured: a given its rows of the data"
    assert guide(x, y)["a"].isfinite().all()

    def drawn():
        torch.manual_seed(0)
        return guide(x, y)["a"]

    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
        before = drawn()
        y[group == 2] = torch.nan
        changed = (drawn() != before).nonzero().squeeze(-1)
    assert changed.tolist() == [2]


def test_a_column_with_holes_is_not_taken_for_the_groups():
    group = (torch.arange(600) % 300).float()
    x = torch.stack([torch.randn(600), group], -1)

    def model(x, known, y):
        with pyro.plate("groups", 300):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(a[known.long()], 1.0), obs=y)

    y = torch.randn(600)
    assert [(column.tensor, column.column) for column in amortize(model, data=(x, group, y))._columns.values()] == [
        (0, 1)
    ]
    x[5, 1] = torch.nan
    guide = amortize(model, data=(x, group, y))
    assert [column.tensor for column in guide._columns.values()] == [1]
    group[7] = torch.nan
    with pytest.raises((IndexError, RuntimeError)):  # never the rows of another group
        guide(x, group, y)


def test_the_penalty_of_a_contractive_guide_is_finite(float64):
    model = VAE(mlp(2, [8]), Gaussian(X, 8, scale=0.5), latent=2)
    guide = Contractive(amortize(model, masked(8), MeanField), weight=0.1)
    x = holed(N, X)
    x[0] = torch.nan
    penalty = guide.penalty(x)
    assert penalty.isfinite().all()
    assert penalty[0] == 0.0  # nothing is observed, so nothing can change
    assert (penalty[1:] > 0).all()


@pytest.mark.parametrize("kind", ["BottomUp", "Ladder"])
def test_guides_of_levels_read_the_mask_in_their_first_network(kind):
    x = holed(N, X)
    x[0], x[1] = torch.nan, torch.nan
    layers = [(masked(8), MeanField(3, 8)), (mlp(3 if kind == "BottomUp" else 8, [6]), MeanField(2, 6))]
    if kind == "BottomUp":
        guide = BottomUp(layers)
    else:
        guide = Ladder(Hierarchical([(mlp(3, [8]), Gaussian(X, 8)), (mlp(2, [6]), MeanField(3, 6))], latent=2), layers)
    for half in (guide, guide.local(x)):
        values = half(x)
        assert set(values) == {"z_1", "z_2"}
        assert all(value.isfinite().all() for value in values.values())


def test_a_full_gaussian_guide_of_the_mask_reaches_the_posterior_given_what_is_observed(float64):
    """Free parameters in a family that holds the posterior: log weights are constant at the observed log-likelihood."""
    model, x = Holed(), holed(N, X)
    x[0] = torch.nan
    guide = amortize(model, masked(8), FullCovariance).local(x)
    weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    exact, loc, root = [], [], []
    for row in x:
        seen = ~row.isnan()
        w, r = weight[seen], row[seen] - bias[seen]
        covariance = torch.linalg.inv(torch.eye(2) + w.T @ w / 0.25)
        loc.append(covariance @ w.T @ r / 0.25)
        root.append(torch.linalg.cholesky(covariance))
        p = dist.MultivariateNormal(torch.zeros(len(r)), w @ w.T + 0.25 * torch.eye(len(r))) if len(r) else None
        exact.append(p.log_prob(r) if p else torch.zeros(()))
    guide.move_to(torch.stack(loc), torch.stack(root))
    log_w = log_weights(model, guide, x, particles=3)
    torch.testing.assert_close(log_w, torch.stack(exact).expand(3, N))
