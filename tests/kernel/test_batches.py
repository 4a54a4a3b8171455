"""The walk through the data: every row once, in parts of about one size; which pairs are run on all data or none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from pyro.infer.autoguide import AutoNormal

from jensen.guides import PriorGuide
from jensen.kernel.batches import as_tensors, chunks_of, layout_on, stream
from jensen.kernel.layout import Layout
from jensen.models import PPCA


def _parts(model, guide, x, **settings):
    return list(stream(model, guide, (x,), "test", progress=False, **settings))


@pytest.mark.parametrize(
    ("n", "at_once", "together", "most", "sizes"),
    [
        (10, 100, 1, None, [10]),
        (10, 4, 1, None, [4, 4, 2]),
        (10, 40, 10, None, [4, 4, 2]),
        (10, 9, 1, None, [5, 5]),  # of about the same size
        (10, 100, 1, 3, [3, 3, 3, 1]),
        (3, 1, 50, None, [1, 1, 1]),
    ],
)
def test_every_row_once_in_order_in_parts_of_one_size(n, at_once, together, most, sizes):
    model = PPCA(5, latent=2)
    x = torch.randn(n, 5)
    parts = _parts(model, PriorGuide(model), x, at_once=at_once, together=together, most=most)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat([part.data[0] for part in parts]), x)
    assert [part.rows for part in parts] == [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    assert [part.ahead for part in parts] == [(n - part.first) // sizes[0] for part in parts]
    assert all(part.layout.sizes and not part.joint for part in parts)


@pytest.mark.parametrize(
    ("particles", "most", "chunks"),
    [
        (100, 1000, [100]),
        (100, 30, [25] * 4),  # a divisor is near
        (101, 30, [30, 30, 30, 11]),
        (5, 0, [1] * 5),
    ],
)
def test_chunks_are_alike_where_a_divisor_is_near(particles, most, chunks):
    assert chunks_of(particles, most) == chunks


def test_a_parts_chunks_hold_so_many_pairs_at_once():
    model = PPCA(5, latent=2)
    for part in _parts(model, PriorGuide(model), torch.randn(10, 5), at_once=40, together=10):
        assert part.chunks(20) == [10, 10]


def test_an_autoguide_is_run_on_all_data():
    model, _, x = pair("PPCA", "MeanField")
    (part,) = _parts(model, AutoNormal(model), x, at_once=2)
    assert len(part) == len(x)
    assert not part.divisible


def _holding_values_of(n):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(n, 2), 1.0).to_event(1))

    return guide


def test_a_guide_with_a_value_for_each_datum_is_run_on_all_data():
    model, x = PPCA(5, latent=2), torch.randn(7, 5)
    (part,) = _parts(model, _holding_values_of(7), x, at_once=2)
    assert len(part) == 7
    assert not part.divisible
    assert isinstance(layout_on(model, _holding_values_of(7), (x,), 3), ValueError)
    assert isinstance(layout_on(model, _holding_values_of(7), (x,), 7), Layout)


def test_a_pair_that_runs_on_a_part_is_divisible():
    model, x = PPCA(5, latent=2), torch.randn(7, 5)
    for at_once in (2, 100):
        assert all(part.divisible for part in _parts(model, PriorGuide(model), x, at_once=at_once))


def _global_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


def _global_guide(x):
    pyro.sample("mean", dist.Normal(0.0, 1.0))


def test_joint_weights_are_run_on_all_data_or_refused():
    x = torch.randn(7, 1)
    (part,) = _parts(_global_model, _global_guide, x, at_once=2, weights="any")
    assert part.joint
    assert len(part) == 7
    assert not part.divisible
    with pytest.raises(
        ValueError, match=r"test needs one value per data point.*joint \('mean' stands outside.*open the model's plate"
    ):
        _parts(_global_model, _global_guide, x, at_once=2)


def test_a_point_is_refused_where_a_density_is_needed():
    model, x = PPCA(5, latent=2), torch.randn(7, 5)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2)).to_event(1))

    with pytest.raises(ValueError, match="point estimate"):
        _parts(model, guide, x, at_once=2)
    assert [len(part) for part in _parts(model, guide, x, at_once=4, weights="none")] == [4, 3]


def test_plates_that_are_not_those_of_the_data_are_refused():
    def model(x):
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mean(0).expand(3))

    def guide(x):
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"sizes \(3,\), but the model was given 7 data"):
        _parts(model, guide, torch.randn(7, 1), at_once=100)


def test_every_datum_is_looked_at_before_it_is_run():
    model, x = PPCA(5, latent=2), torch.randn(2000, 5)
    x[1999, 3] = torch.inf
    parts = stream(model, PriorGuide(model), as_tensors(x), "test", at_once=100, progress=False)
    assert len(next(parts)) == 100
    with pytest.raises(ValueError, match=r"NaN or infinite, the first at index"):
        list(parts)


def test_nothing_is_drawn_from_the_users_stream():
    model, x = PPCA(5, latent=2), torch.randn(20, 5)
    before = torch.get_rng_state()
    _parts(model, PriorGuide(model), x, at_once=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_guide_that_reads_rows_by_their_number_is_run_on_all_data():
    """On a part it raises IndexError, which is as good a sign as any other."""
    x = torch.randn(300, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - x[299], 1.0).to_event(1))

    (part,) = stream(model, guide, (x,), "test", at_once=64, progress=False)
    assert len(part) == 300
    assert not part.divisible
