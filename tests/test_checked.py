"""Arguments that violate their annotations raise an error that names them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jensen.checked import check_features, checked
from jensen.inference import evaluate, fit, log_weights
from jensen.models import PPCA


class _HasLatents(Protocol):
    latents: dict[str, Any]


@checked
def _function(
    n: int = 1,
    scale: float = 1.0,
    quiet: bool = False,
    name: str = "a",
    way: Literal["up", "down"] | float = "up",
    widths: Sequence[int] = (),
    values: Mapping[str, Tensor] | None = None,
    run: Callable[[], int] | None = None,
    range_: tuple[float, float] = (0.0, 1.0),
    x: Tensor | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    model: _HasLatents | None = None,
):
    return n, scale, quiet, name, way, widths, values, run, range_, x, seed, device, model


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"n": True}, TypeError, r"n must be a whole number, but got True \(a bool\)"),
        ({"n": 2.0}, TypeError, r"n must be a whole number, but got 2.0 \(a float\)"),
        ({"n": "3"}, TypeError, r"n must be a whole number, but got '3' \(a str\)"),
        ({"n": 10**20}, ValueError, "n must be a whole number of at most 2147483647, but got"),
        (
            {"n": torch.tensor(True)},
            TypeError,
            r"n must be a whole number, but got a tensor of shape \[\]",
        ),
        ({"scale": math.nan}, ValueError, "scale must be a number other than NaN, but got nan"),
        ({"scale": torch.ones(2)}, TypeError, r"scale must be a number, but got a tensor of shape \[2\]"),
        ({"scale": torch.ones((), requires_grad=True)}, TypeError, "scale must be a number, but got a tensor"),
        ({"quiet": 1}, TypeError, r"quiet must be True or False, but got 1 \(an int\)"),
        ({"name": b"a"}, TypeError, r"name must be a string, but got b'a' \(a bytes\)"),
        ({"way": "left"}, ValueError, "way must be 'up', 'down' or a number, but got 'left'"),
        ({"widths": "34"}, TypeError, "widths must be a sequence of whole numbers, but got '34'"),
        ({"widths": [3, "4"]}, TypeError, "widths must be a sequence of whole numbers, but got a list"),
        ({"values": {"z": 3}}, TypeError, "values must be a dictionary of tensors by name or None, but got a dict"),
        ({"values": {3: torch.ones(2)}}, TypeError, "values must be a dictionary of tensors by name or None, but got"),
        ({"run": 3}, TypeError, "run must be a function or None, but got 3"),
        ({"range_": (0, "a")}, TypeError, "range_ must be a tuple of 2, each a number, but got a tuple"),
        ({"x": np.ones(2)}, TypeError, r"x must be a tensor or None, but got an array of shape \[2\] \(float64\)"),
        ({"x": torch.ones(2, device="meta")}, ValueError, "x must hold values, but got a tensor on the device 'meta'"),
        (
            {"x": torch.eye(2).to_sparse()},
            ValueError,
            "x must be a dense tensor, but got one of layout torch.sparse_coo",
        ),
        (
            {"x": torch.nested.nested_tensor([torch.eye(2), torch.eye(3, 2)], layout=torch.jagged)},
            ValueError,
            r"got a nested one; use torch.nested.to_padded_tensor\(x, 0.0\)",
        ),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0 to 18446744073709551615 or None, but got -1"),
        (
            {"device": "nowhere:0"},
            ValueError,
            "device must be a device such as 'cpu', but 'nowhere:0' cannot be used here",
        ),
        ({"device": "meta"}, ValueError, r"device must be a device.*tensors on it hold no values"),
        ({"model": 3}, TypeError, "model must be an object with latents or None, but got 3"),
        ({"model": PPCA}, TypeError, r"model must be an object, but got the class PPCA: use PPCA\(...\)"),
    ],
)
def test_what_does_not_suit_is_named(given, kind, message):
    with pytest.raises(kind, match=message):
        _function(**given)


def test_numbers_of_other_libraries_come_as_pythons():
    n, scale, quiet, *_ = _function(np.int64(3), torch.tensor(0.5), np.bool_(True))
    assert (n, scale, quiet) == (3, 0.5, True)
    assert (type(n), type(scale), type(quiet)) == (int, float, bool)
    assert _function(widths=np.array([3, 4]))[5] == [3, 4]
    assert _function(scale=2)[1] == 2
    assert type(_function(scale=2**70)[1]) is float


def test_what_suits_is_passed_on_as_it_is():
    values, widths, x = {"z": torch.ones(2)}, [3, 4], torch.ones(2)
    made = _function(values=values, widths=widths, x=x, way="down", seed=2**64 - 1)
    assert made[6] is values
    assert made[5] is widths
    assert made[9] is x


def test_a_call_that_does_not_bind_is_said_by_python():
    with pytest.raises(TypeError, match=r"_function\(\) got an unexpected keyword argument 'size'"):
        _function(size=3)


def test_layers_name_what_they_cannot_read():
    weight = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"h must be a tensor, but got a list of 1; use torch.as_tensor"):
        check_features([1.0], "h", weight)
    with pytest.raises(ValueError, match=r"h must be torch.float32 for the layers, but got torch.int64: convert"):
        check_features(torch.ones(3).long(), "h", weight)
    with torch.autocast("cpu"):  # where torch converts
        check_features(torch.ones(3).bfloat16(), "h", weight)


@pytest.mark.parametrize("use", [log_weights, evaluate, fit], ids=["log_weights", "evaluate", "fit"])
def test_programs_that_are_none(use):
    with pytest.raises(TypeError, match="guide must be a function, but got 'text'"):
        use(PPCA(5, 2), "text", torch.zeros(3, 5))


def test_modules_that_cannot_be_called_are_none():
    @checked
    def runs(encoder: nn.Module, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        pass

    runs(nn.Identity(), nn.SiLU)
    for wrong in ({"encoder": nn.Module()}, {"encoder": nn.Identity(), "activation": nn.ModuleList()}):
        with pytest.raises(TypeError, match="must be a module with a forward method, but got a Module"):
            runs(**wrong)


def test_what_is_iterated_over_is_looked_at_where_it_can_be_seen_twice():
    @checked
    def freezes(freeze: Iterable[nn.Module] = ()) -> list[nn.Module]:
        return list(freeze)

    one = nn.Identity()
    assert freezes({one}) == freezes([one]) == freezes(iter([one])) == [one]
    for wrong in (range(3), {"z"}, {1: one}, [one, 2]):
        with pytest.raises(TypeError, match="freeze must be a sequence of Module objects, but got"):
            freezes(wrong)
