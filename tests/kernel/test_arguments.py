"""Arguments of models and guides: rows of data are accepted; others raise an error with a code example."""

import functools
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer.autoguide import AutoNormal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import jensen.datasets
from jensen.datasets import from_array
from jensen.inference import compare, evaluate, fit, gaps, log_weights
from jensen.kernel.arguments import as_tensors, misfit, rows_of


def _model(x, *rest, **options):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _guide(x, *rest, **options):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def _packed(lengths):
    return pack_padded_sequence(torch.randn(len(lengths), max(lengths), 2), torch.tensor(lengths), batch_first=True)


_X = torch.linspace(-2, 2, 10)
_OTHERS = {
    "dict": ({"hidden": 3}, "a dict", "`lambda x: model(x, a_dict)`"),
    "float": (0.5, "a float", "`lambda x: model(x, 0.5)`"),
    "bool": (True, "a bool", "`lambda x: model(x, True)`"),
    "int": (3, "an int", "`lambda x: model(x, 3)`"),
    "the number of data": (10, "an int", "`lambda x: model(x, len(x))`"),
    "none": (None, "None", "`lambda x: model(x, None)`"),
    "list": ([1, 2], "a list", "`lambda x: model(x, a_list)`"),
    "string": ("sum", "a str", "`lambda x: model(x, 'sum')`"),
}


def _code(sentence):
    return re.search(r"`((?:lambda|functools)[^`]*)`", sentence)[1]


@pytest.mark.parametrize("kind", _OTHERS)
def test_what_is_no_row_of_data_is_refused_with_a_closure_that_runs(kind):
    other, name, code = _OTHERS[kind]
    with pytest.raises(TypeError) as caught:
        evaluate(_model, _guide, (_X, other), 50, progress=False)
    sentence = str(caught.value)
    assert sentence.startswith(f"data is a tensor or a tuple of tensors, but data[1] is {name}; ")
    assert code in sentence
    assert "data[0] as data" in sentence
    names = {"a_dict": other, "a_list": other}
    halves = [eval(_code(sentence), names | {"model": program}) for program in (_model, _guide)]
    evidence = evaluate(*halves, _X, 50, seed=0, progress=False)
    exact = dist.Normal(0.0, 2**0.5).log_prob(_X).double()
    torch.testing.assert_close(evidence.log_evidence, exact, atol=1e-4, rtol=0)


def test_what_stands_before_the_data_is_fixed_by_partial():
    def model(scale, x):
        _model(x)

    with pytest.raises(TypeError, match=r"`functools.partial\(model, 0.5\)` .* data\[1\] as data") as caught:
        as_tensors((0.5, _X))
    partial = eval(_code(str(caught.value)), {"functools": functools, "model": model})
    assert log_weights(partial, _guide, _X).shape == (1, 10)


def test_tensors_of_another_length_are_fixed_by_a_closure():
    weights = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"tensors of shape \[\[10\], \[3, 2\], \[10\]\]") as caught:
        as_tensors((_X, weights, _X))
    assert _code(str(caught.value)) == "lambda x0, x2: model(x0, other, x2)"
    assert "(data[0], data[2]) as data" in str(caught.value)


def test_a_packed_sequence_is_padded_outside_and_packed_inside():
    packed = _packed([4, 4, 3, 1])
    x = torch.randn(4)
    for data, listed in ((packed, "padded, lengths"), ((x, packed), "x0, padded, lengths")):
        with pytest.raises(TypeError, match="PackedSequence; give the padded tensor and the lengths") as caught:
            as_tensors(data)
        where = "data" if data is packed else "data[1]"
        assert f"pad_packed_sequence({where}, batch_first=True)" in str(caught.value)
        code = re.findall(r"`([^`]*)`", str(caught.value))[-1]
        assert code.startswith(f"lambda {listed}: model(")
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    seen = []
    eval(code, {"model": lambda x, p: seen.append(p), "pack_padded_sequence": pack_padded_sequence})(x, padded, lengths)
    assert torch.equal(seen[0].data, packed.data)


def test_a_dict_is_taken_apart_by_its_own_keys():
    data = {"x": _X, "y": torch.randn(10), "scale": 2.0}
    with pytest.raises(TypeError, match=r"got dict; give its tensors as data, \(data\['x'\], data\['y'\]\)") as caught:
        as_tensors(data)
    one, keywords = re.findall(r"`(lambda[^`]*)`", str(caught.value))
    assert one == "lambda x, y: model({'x': x, 'y': y, 'scale': data['scale']})"
    assert keywords == "lambda x, y: model(**{'x': x, 'y': y, 'scale': data['scale']})"
    assert eval(keywords, {"data": data, "model": lambda x, y, scale: scale * x})(_X, _X) is not None


def test_one_tuple_is_taken_apart():
    with pytest.raises(TypeError, match=r"data\[0\] is a tuple; .*`lambda x0, x1: model\(\(x0, x1\)\)`"):
        as_tensors(((_X, _X),))


def test_an_option_alone_and_a_list_of_rows():
    with pytest.raises(TypeError, match=r"got int; .*functools.partial\(model, 5\).* give \(\) as data"):
        as_tensors(5)
    with pytest.raises(TypeError, match=r"got list; use tuple\(data\) .* torch.stack\(data\)"):
        as_tensors([_X, _X])
    ragged = [torch.randn(n, 2) for n in (3, 1, 4)]
    with pytest.raises(TypeError, match=r"different lengths give \(pad_sequence\(data, batch_first=True\), ") as caught:
        as_tensors(ragged)
    given = re.search(r"give (\(.*\)) as data", str(caught.value))[1]
    data = eval(given, {"pad_sequence": pad_sequence, "torch": torch, "data": ragged})
    seen = eval(_code(str(caught.value)), {"model": lambda rows: rows})(*as_tensors(data))
    assert all(map(torch.equal, seen, ragged))
    with pytest.raises(TypeError, match=r"take no arguments are given \(\)"):
        as_tensors(None)


def test_no_data_are_welcome_where_a_pair_may_hold_them():
    assert as_tensors((), held=True) == ()
    assert rows_of(()) == 1
    with pytest.raises(ValueError, match=r"data is \(\), but at least one tensor is needed here.* fit, evaluate"):
        gaps(_model, AutoNormal(_model), (), progress=False)


def _no_rest(x):
    _guide(x)


def _tuple(data):
    _model(data[0])


def _keyword(x, *, mask):
    _model(x)


def _nothing():
    _model(_X)


@pytest.mark.parametrize(
    ("model", "data", "code"),
    [
        (_tuple, (_X, _X), "lambda *data: model(data)"),
        (_no_rest, (_X, _X), "lambda x, *rest: model(x)"),
        (_keyword, (_X, _X), "lambda x, mask: model(x, mask=mask)"),
        (_keyword, (_X,), "lambda x: model(x, mask=...)"),
        (_model, (), "functools.partial(model, x)"),
        (_nothing, (_X,), "lambda *data: model()"),
    ],
)
def test_a_call_that_does_not_fit_is_said_with_one_that_does(model, data, code):
    sentence = misfit(model, "model", data)
    assert f"`{code}`" in sentence
    assert "it is called as model(" in sentence
    for run in (
        lambda: evaluate(model, lambda *rest: _guide(_X), data, 10, progress=False),
        lambda: compare({"a": (model, lambda *rest: _guide(_X))}, data, 10, progress=False),
        lambda: fit(model, lambda *rest: _guide(_X), data, epochs=1, progress=False),
    ):
        with pytest.raises(TypeError, match=re.escape(f"`{code}`")):
            run()


def test_a_call_that_fits_is_not_accused():
    def model(x):
        raise TypeError("of its own")

    assert misfit(model, "model", (_X,)) is None
    with pytest.raises(TypeError, match="of its own"):
        evaluate(model, _guide, _X, 10, progress=False)


_ROWS = torch.arange(24.0).reshape(12, 2).sin()


@pytest.mark.parametrize(
    "data",
    [
        from_array(_ROWS),
        pd.DataFrame(_ROWS.numpy()),
        pa.table({"a": _ROWS[:, 0].numpy(), "b": _ROWS[:, 1].numpy()}),
        scipy.sparse.csr_matrix(_ROWS.numpy()),
        np.ma.masked_greater(_ROWS.double().numpy(), 2),
        _ROWS.double().numpy(),
        TensorDataset(_ROWS),
        DataLoader(TensorDataset(_ROWS), 5),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_holds_data_comes_with_the_code_that_makes_a_tensor_of_it(data):
    with pytest.raises(TypeError, match="data is a tensor or a tuple of tensors, but got") as caught:
        as_tensors(data)
    codes = re.split("use | for the training rows, or | for all rows| \\(and", str(caught.value))[1:]
    for code in [code for code in codes if code.startswith(("data", "jensen", "torch"))]:
        rows = eval(code, {"data": data, "jensen": jensen, "torch": torch, "numpy": np})
        assert rows.dtype == torch.float32 and {*map(tuple, rows.tolist())} <= {*map(tuple, _ROWS.tolist())}
        assert len(rows) in (10, 12)
    assert codes


def test_a_name_is_no_data():
    with pytest.raises(TypeError, match=r"if it names a data set, use jensen.datasets.load\(data\).train"):
        as_tensors("mnist")
    with pytest.raises(TypeError, match=r"if it has one row per data point, use data\[1\].train"):
        as_tensors((_X, from_array(_ROWS)))
