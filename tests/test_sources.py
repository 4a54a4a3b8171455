"""Data that are read by the batch: every kind gives the rows of the data in memory, to fit and evaluate too."""

import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyarrow import parquet
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from jensen.datasets import stream
from jensen.families import Bernoulli, Gaussian, MeanField
from jensen.guides import ExactPosterior, amortize
from jensen.inference import compare, evaluate, fit
from jensen.models import PPCA, VAE
from jensen.networks import Masked, mlp
from jensen.sources import as_source, in_memory, prefetched

N = 503
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))


class Stream(IterableDataset):
    def __init__(self, x=X):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Shuffled(Stream):
    def __iter__(self):
        return iter(self.x[torch.randperm(len(self.x))])


class Noisy(Dataset):
    """Rows with noise of torch's random stream."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return X[i] + torch.randn(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rows in files."""
    made = tmp_path_factory.mktemp("sources")
    np.save(made / "x.npy", X.numpy())
    np.save(made / "turned.npy", np.asfortranarray(X.numpy()))
    np.save(made / "wide.npy", X.double().numpy().astype(">f8"))
    (made / "parts").mkdir()
    for name, part in (("a", X[:300]), ("b", X[300:])):
        table = pa.table({str(i): column.numpy() for i, column in enumerate(part.T)})
        parquet.write_table(table, made / "parts" / f"{name}.parquet", row_group_size=90)
    return made


KINDS = {
    "npy": lambda at: at / "x.npy",
    "other byte order": lambda at: str(at / "wide.npy"),
    "memory map": lambda at: np.load(at / "x.npy", mmap_mode="r"),
    "rows of a file": lambda at: stream(at / "x.npy", rows=range(N)),
    "parquet": lambda at: at / "parts",
    "sparse": lambda at: scipy.sparse.csr_matrix(X.numpy()),
    "data set": lambda at: TensorDataset(X),
    "subset": lambda at: Subset(TensorDataset(X), range(N)),
    "loader": lambda at: DataLoader(TensorDataset(X), 60, shuffle=True),
    "stream": lambda at: Stream(),
    "loader of a stream": lambda at: DataLoader(Stream(), 60),
}
EXACT = ("sparse", "data set", "subset")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def data(kind, folder):
    return KINDS[kind](folder)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_row_is_once_in_an_epoch_in_as_many_steps_of_every_process(data, count):
    source, seen, steps = as_source(data), [], []
    for rank in range(count):
        batches = list(source.epoch(60, torch.Generator().manual_seed(3), rank, count))
        steps.append(len(batches))
        for rows, batch in batches:
            assert not len(rows) or torch.equal(batch[0], X[rows])
        seen += [row for rows, _ in batches for row in rows.tolist()]
    assert sorted(seen) == list(range(N))
    assert len(set(steps)) == 1


def test_rows_come_in_order_from_one_number_to_another(data):
    source = as_source(data)
    assert torch.equal(in_memory(source)[0], X)
    assert source.survey() == (N, False)
    assert torch.equal(source.head(5)[0], X[:5])
    for first, last in ((0, 10), (200, 477), (490, None), (128, 256)):
        assert torch.equal(torch.cat([x for (x,) in source.in_order(17, first, last)]), X[first:last])


def test_batches_have_the_given_size_and_another_order_in_every_epoch(kind, data):
    source = as_source(data)
    size = source.size or 60
    batches, others = ([rows for rows, _ in source.epoch(60)] for _ in range(2))
    assert [len(rows) for rows in batches] == [size] * (N // size) + [N % size] * (N % size > 0)
    if "stream" not in kind:
        assert not torch.equal(torch.cat(batches), torch.cat(others))
        torch.manual_seed(1)
        one = torch.cat([rows for rows, _ in source.epoch(60)])
        torch.manual_seed(1)
        assert torch.equal(one, torch.cat([rows for rows, _ in source.epoch(60)]))


def test_blocks_are_permuted_in_windows_and_rows_within_them(folder, monkeypatch):
    monkeypatch.setattr("jensen.sources.WINDOW", 200 * 12)
    order = torch.cat([rows for rows, _ in as_source(folder / "x.npy").epoch(50)])
    assert sorted(order.tolist()) == list(range(N))
    near = (order[1:] - order[:-1]).abs() < 8  # a block has 8 rows
    assert 0.02 < near.double().mean() < 0.5  # some neighbours in the file meet in a window, most rows do not


def _pair(features=3, **how):
    torch.manual_seed(1)
    model = VAE(mlp(2, [8]), Gaussian(features, 8, scale="shared"), latent=2)
    return model, amortize(model, mlp(features, [8]), MeanField, context=8)


def _fitted(data, pair=_pair, **how):
    model, guide = pair()
    how = {"epochs": 2, "batch_size": 64, "seed": 0, "progress": False, "compile": False, **how}
    history = fit(model, guide, data, **how)
    return history, torch.cat([p.detach().flatten() for p in [*model.parameters(), *guide.parameters()]])


@pytest.fixture(scope="module")
def in_memory_run():
    return _fitted(X, validation=X[:100])


def test_fit_takes_every_kind_and_random_access_is_bitwise_the_run_in_memory(kind, data, in_memory_run):
    history, values = _fitted(data, validation=Stream(X[:100]))
    there, others = in_memory_run
    assert (history.data, len(history.elbo)) == (N, 2)
    assert history.elbo[-1] == pytest.approx(there.elbo[-1], abs=0.3)
    if kind in EXACT:
        assert history.elbo == there.elbo
        assert torch.equal(values, others)
        assert history.validation == there.validation


SOME = ["npy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("data set", "stream", "loader"))]


@pytest.mark.parametrize("kind", SOME, indirect=True)
def test_a_resumed_run_is_that_of_one_that_was_not_stopped(data, tmp_path):
    whole, values = _fitted(data, epochs=3)
    _fitted(data, epochs=2, checkpoint=tmp_path / "c.pt")
    again, others = _fitted(data, epochs=3, checkpoint=tmp_path / "c.pt", resume=True)
    assert again.elbo == whole.elbo
    assert torch.equal(values, others)


def test_traced_steps_of_a_file_are_the_eager_ones(folder):
    _, eager = _fitted(folder / "x.npy", epochs=30)
    history, traced = _fitted(folder / "x.npy", epochs=30, compile="auto")
    assert history.route.startswith("traced")
    assert torch.allclose(eager, traced, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def measured():
    return [
        evaluate(*_pair(), X[:200], particles=400, refine=refine, seed=0, progress=False) for refine in (True, False)
    ]


@pytest.mark.parametrize("refine", [True, False])
def test_evaluate_gives_exactly_the_numbers_of_the_same_rows_in_memory(refine, folder, measured):
    there = measured[0 if refine else 1]
    for data in (stream(folder / "x.npy", rows=range(200)), DataLoader(TensorDataset(X[:200]), 30), Stream(X[:200])):
        found = evaluate(*_pair(), data, particles=400, refine=refine, seed=0, progress=False)
        for name in ("elbo", "log_evidence", "standard_error", "ess", "pareto_k", "baseline"):
            assert torch.equal(getattr(found, name), getattr(there, name)), name
        assert (found.features, found.method) == (there.features, there.method)


def test_evaluate_knows_exact_values_and_a_baseline_of_training_data(folder):
    model = PPCA(3, latent=2)
    how = {"particles": 20, "seed": 0, "progress": False}
    found = evaluate(model, ExactPosterior(model), folder / "x.npy", train=Stream(X[:500]), **how)
    there = evaluate(model, ExactPosterior(model), X, train=X[:500], **how)
    assert torch.equal(found.exact, there.exact)
    assert torch.allclose(found.baseline, there.baseline, rtol=1e-12)


def test_a_random_transform_repeats_in_every_pass_of_a_measurement(folder):
    np.save(folder / "grey.npy", torch.rand(300, 3).numpy())
    torch.manual_seed(0)
    model = VAE(mlp(1, [8]), Bernoulli(3, 8), latent=1)
    guide = amortize(model, mlp(3, [8]), MeanField, context=8)
    how = {"particles": 2000, "refine": False, "seed": 0, "batch_transform": torch.bernoulli, "progress": False}
    found = evaluate(model, guide, folder / "grey.npy", **how)
    assert found.exact is not None  # of the same zeros and ones as the weights
    assert (found.log_evidence - found.exact).abs().max() < 0.05


def _holed(x=X):
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.2, torch.nan, x)


def _masked():
    torch.manual_seed(1)
    model = VAE(mlp(2, [8]), Gaussian(3, 8, scale="shared"), latent=2)
    return model, amortize(model, Masked(mlp(6, [8]), 3), MeanField, context=8)


def test_missing_values_are_left_out(folder):
    x = _holed()
    np.save(folder / "holed.npy", x.numpy())
    there, values = _fitted(x, _masked)
    _, others = _fitted(TensorDataset(x), _masked)
    assert torch.equal(values, others)
    history, _ = _fitted(folder / "holed.npy", _masked, missing="nan")
    assert history.elbo[-1] == pytest.approx(there.elbo[-1], abs=0.1)
    one, other = (
        evaluate(*_masked(), data, particles=50, seed=0, progress=False, refine=False)
        for data in (x, folder / "holed.npy")
    )
    assert torch.equal(one.log_evidence, other.log_evidence)


@pytest.mark.parametrize("compile", [pytest.param(False, marks=pytest.mark.slow), "auto"])
def test_the_first_missing_value_may_come_late(compile):
    x = X.clone()
    x[-30:, 0] = torch.nan
    loader = DataLoader(Stream(x), 60)
    history, values = _fitted(loader, _masked, epochs=30, compile=compile)
    assert history.route.startswith("traced" if compile else "eager")
    assert values.isfinite().all()


def test_rows_are_tuples_of_tensors():
    y = X[:, :1] * 2
    model, guide = _pair()
    taken = []

    def with_covariate(half):
        def run(x, y):
            taken.append(bool(torch.equal(y, x[:, :1] * 2)))
            return half(x)

        return run

    pyro.module("model", model)
    pyro.module("guide", guide)
    history = fit(
        with_covariate(model), with_covariate(guide), TensorDataset(X, y), epochs=1, progress=False, compile=False
    )
    assert history.data == N
    assert all(taken)


def test_a_plate_that_scales_batches_keeps_its_meaning():
    def model(x):
        with pyro.plate("data", 5000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(pyro.param("w", torch.ones(())) * z[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 5000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())) * x[:, 0], 1.0))

    found = []
    for data in (X, TensorDataset(X), Stream()):
        pyro.clear_param_store()
        found.append(fit(model, guide, data, epochs=1, batch_size=128, seed=0, progress=False, compile=False))
    assert found[0].data == found[1].data == found[2].data
    assert found[0].elbo == found[1].elbo
    assert found[2].elbo[0] == pytest.approx(found[0].elbo[0], rel=0.2)


def test_standardization_is_that_of_data_in_memory(folder):
    x = _holed(5 * X + 1000)
    np.save(folder / "far.npy", x.double().numpy())
    train = stream(folder / "far.npy", rows=torch.arange(0, N, 2), standardize=True)
    test = stream(folder / "far.npy", rows=range(1, N, 2), standardize=train)
    location, scale = x[::2].double().nanmean(0), torch.tensor(np.nanstd(x[::2].double().numpy(), 0, ddof=1))
    assert torch.allclose(train.location, location, rtol=1e-12)
    assert torch.allclose(train.scale, scale, rtol=1e-10)
    expected = ((x[1::2].double() - location) / scale).float()
    assert torch.allclose(in_memory(test)[0], expected, atol=1e-6, equal_nan=True)


def _model_of_bits():
    torch.manual_seed(0)
    model = VAE(mlp(1, [4]), Bernoulli(3, 4), latent=1)
    return model, amortize(model, mlp(3, [4]), MeanField, context=4)


def _with(row, column, value):
    x = (X > 0).float()
    x[row, column] = value
    return DataLoader(TensorDataset(x), 60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_with(450, 1, torch.inf), r"values that are NaN or infinite.*of rows"),
        (_with(450, 1, 0.5), r"outside the support of Bernoulli.*binarize"),
        (_with(450, 1, torch.nan), "NaN"),
        (DataLoader([*X[:100].sign().relu(), torch.zeros(4)], 60), "stack expects|equal size"),
    ],
    ids=["infinite", "support", "missing", "another width"],
)
def test_data_are_checked_as_they_come(data, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        _fitted(data, _model_of_bits)


class Empty(Dataset):
    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "turned.npy", "column by column.*ascontiguousarray"),
        (lambda at: np.load(at / "x.npy", mmap_mode="r")[:, :2], "range of the rows"),
        (lambda at: np.load(at / "x.npy", mmap_mode="c"), "mode is 'c'"),
        (lambda at: DataLoader([{"x": row} for row in X], 5), "collate_fn"),
        (lambda at: DataLoader(TensorDataset(X), batch_size=None), "batch_size"),
        (lambda at: DataLoader(TensorDataset(X), 5, sampler=DistributedSampler(X, 2, 0)), "repeats rows"),
        (lambda at: Empty(), "is empty"),
        (lambda at: Stream(X[:0]), "no rows"),
    ],
)
def test_what_cannot_be_read_is_refused(make, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(*_pair(), make(folder), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("data", "how", "message"),
    [
        ("digits", {}, "no file"),
        (X, {}, "give it to fit and evaluate as it is"),
        (TensorDataset(X), {"rows": [1]}, "Subset"),
        ("x.npy", {"rows": [1, 1]}, "different numbers from 0 to 502"),
        ("x.npy", {"rows": [2000]}, "different numbers from 0 to 502"),
        ("x.npy", {"standardize": as_source(TensorDataset(X))}, "result of stream"),
        ("constant.npy", {"standardize": True}, "features that vary"),
    ],
)
def test_stream_names_mistakes(data, how, message, folder):
    np.save(folder / "constant.npy", np.ones((5, 2)))
    with pytest.raises((ValueError, TypeError), match=message):
        stream(folder / data if isinstance(data, str) and data.endswith(".npy") else data, **how)


def test_measurements_need_the_same_rows_at_every_pass():
    how = {"particles": 10, "seed": 0, "progress": False}
    with pytest.raises(ValueError, match="gives other rows, or another order, at each pass"):
        evaluate(*_pair(), Shuffled(), **how)
    loader = DataLoader(TensorDataset(X), 50, sampler=WeightedRandomSampler(torch.ones(N), N))
    with pytest.raises(ValueError, match="gives other rows, or another order, at each pass"):
        evaluate(*_pair(), loader, **how)
    assert fit(*_pair(), loader, epochs=1, progress=False).data == N


def test_what_needs_all_data_at_once_is_refused():
    model = PPCA(3, latent=2)
    guide = AutoNormal(model)
    guide(X[:10])
    with pytest.raises(ValueError, match=r"AutoGuide is run on all data at once.*head"):
        evaluate(model, guide, TensorDataset(X), progress=False)
    with pytest.raises(ValueError, match=r"mask.*read by the batch.*missing='nan'"):
        fit(model, ExactPosterior(model), TensorDataset(X), missing=X > 0, progress=False)
    with pytest.raises(TypeError, match=r"only fit and evaluate read data by the batch.*head\(1000\)"):
        compare({"a": (model, ExactPosterior(model))}, as_source(TensorDataset(X)), progress=False)

    def shifted(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=x)

    def guess(x):
        pyro.sample("m", dist.Normal(pyro.param("at", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match="joint over all data"):
        evaluate(shifted, guess, TensorDataset(X), progress=False)


def test_a_data_set_that_draws_random_numbers_is_read_in_the_thread_of_the_caller():
    assert as_source(TensorDataset(X)).background
    assert not as_source(Noisy()).background
    (one, values), (other, others) = (_fitted(Noisy()) for _ in range(2))
    assert one.elbo == other.elbo
    assert torch.equal(values, others)


def test_the_background_thread_ends_and_its_errors_arrive():
    def failing():
        yield 1
        raise OSError("of the disk")

    with pytest.raises(OSError, match="of the disk"):
        list(prefetched(failing()))
    ahead = prefetched(iter(range(10**6)))
    assert next(ahead) == 0
    assert "jensen reads data" in [thread.name for thread in threading.enumerate()]
    ahead.close()
    assert "jensen reads data" not in [thread.name for thread in threading.enumerate()]


def test_workers_of_a_loader_read_the_rows():
    loader = DataLoader(TensorDataset(X), 100, shuffle=True, num_workers=1)
    seen = [row for rows, (x,) in as_source(loader).epoch(1) for row in rows.tolist() if torch.equal(x, X[rows])]
    assert sorted(seen) == list(range(N))


_PEAK = """
import sys
import numpy as np, torch
import jensen.sources
from jensen.datasets import stream
from jensen.guides import ExactPosterior
from jensen.inference import fit
from jensen.models import PPCA
jensen.sources.WINDOW, jensen.sources.AHEAD = 2**22, 2**21
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))
model = PPCA(400, latent=2)
guide = ExactPosterior(model)
fit(model, guide, torch.randn(1000, 400), epochs=1, batch_size=500, compile=False, progress=False)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts anew at what is resident now
before = status("VmRSS")
data = stream(sys.argv[1], standardize=True) if sys.argv[2] == "file" else np.load(sys.argv[1], mmap_mode="r")
fit(model, guide, data, epochs=1, batch_size=500, compile=False, progress=False)
print(status("VmHWM") - before)
"""


_WHOLE = """
import sys
from jensen.datasets import stream
from jensen.families import Gaussian, MeanField
from jensen.guides import amortize
from jensen.inference import fit
from jensen.models import VAE
from jensen.networks import mlp
model = VAE(mlp(4, [32]), Gaussian(1000, 32, scale="shared"), latent=4)
guide = amortize(model, mlp(1000, [32]), MeanField, context=32)
fit(model, guide, stream(sys.argv[1], standardize=True), epochs=1, batch_size=1000, progress=False)
with open("/proc/self/status") as f:
    print(next(int(line.split()[1]) for line in f if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells the peak: /proc")
def test_a_file_of_2_gb_trains_in_1_gb_in_all(tmp_path):
    made = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (500_000, 1000))
    random = np.random.default_rng(0).standard_normal((10_000, 1000), dtype=np.float32)
    for first in range(0, 500_000, 10_000):
        made[first : first + 10_000] = random
    del made
    command = [sys.executable, "-c", _WHOLE, str(tmp_path / "x.npy")]
    peak = 1024 * int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    print(f"peak of the whole process: {peak / 1e9:.2f} GB")
    assert peak < 1e9


def _peak(path, kind):
    command = [sys.executable, "-c", _PEAK, str(path), kind]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells the peak of a span: /proc")
@pytest.mark.parametrize("kind", ["file", pytest.param("map", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    made = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (100_000, 400))  # 160 MB
    random = np.random.default_rng(0).standard_normal((20_000, 400), dtype=np.float32)
    for first in range(0, 100_000, 20_000):
        made[first : first + 20_000] = random
    del made
    assert _peak(tmp_path / "x.npy", kind) < 80  # MiB
