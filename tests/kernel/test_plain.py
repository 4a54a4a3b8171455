"""The state of programs besides tensors: detected and undetected changes, and their names."""

import argparse
import types
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from jensen.kernel.plain import PlainState
from jensen.models import PPCA

TEMPERATURE = 5.0
SETTINGS = {"beta": 1.0}


@dataclass
class Config:
    beta: float = 1.0


class Constants:
    beta = 1.0


class Annealer:
    """A user's object inside a module."""

    def __init__(self):
        self.value = 1.0

    def __call__(self):
        return self.value * Constants.beta


class Pair(nn.Module):
    """All kinds of places for a number."""

    level = 1.0

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1))
        self.register_buffer("mean", torch.zeros(3))
        self.beta, self.name, self.nothing, self.sizes = 1.0, "a", None, (1, 2)
        self.offset = torch.zeros(3)
        self.config, self.space, self.arguments = Config(), types.SimpleNamespace(a=1), argparse.Namespace(b=2)
        self.betas, self.table = [1.0, 2.0], {"z": {"beta": 1.0}}
        self.losses = []
        self.annealer, self.activation, self.prior = Annealer(), torch.relu, dist.Normal(0.0, 1.0)

    def forward(self, x):
        return self.helper(self.decoder(x))

    def helper(self, x):
        return x * SETTINGS["beta"]

    def unused(self, x):
        return x * TEMPERATURE


def _freeze(pair):
    pair.decoder[0].weight.requires_grad_(False)


def _hook(pair):
    pair.decoder.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = {
    "float": (lambda p: setattr(p, "beta", 2.0), "the attribute 'beta' of Pair"),
    "type": (lambda p: setattr(p, "beta", 1), "the attribute 'beta' of Pair"),
    "string": (lambda p: setattr(p, "name", "b"), "the attribute 'name' of Pair"),
    "None": (lambda p: setattr(p, "nothing", 0.5), "the attribute 'nothing' of Pair"),
    "tuple": (lambda p: setattr(p, "sizes", (1, 3)), "the attribute 'sizes' of Pair"),
    "tensor": (lambda p: setattr(p, "offset", torch.ones(3)), "the attribute 'offset' of Pair"),
    "new attribute": (lambda p: setattr(p, "level", 2.0), "the attribute 'level' of Pair"),
    "deleted attribute": (lambda p: delattr(p, "name"), "the attribute 'name' of Pair"),
    "mode": (lambda p: p.decoder[1].eval(), "the attribute 'training' of Dropout"),
    "requires_grad": (_freeze, "requires_grad of the attribute 'weight' of Linear"),
    "parameter": (
        lambda p: setattr(p.decoder[0], "weight", nn.Parameter(torch.ones(3, 2))),
        "the attribute 'weight' of Linear",
    ),
    "buffer": (lambda p: setattr(p, "mean", torch.ones(3)), "the attribute 'mean' of Pair"),
    "module": (lambda p: setattr(p, "decoder", nn.Linear(2, 3)), "the attribute 'decoder' of Pair"),
    "hook": (_hook, "a hook of Sequential"),
    "dataclass": (lambda p: setattr(p.config, "beta", 2.0), "the attribute 'beta' of Config"),
    "namespace": (lambda p: setattr(p.space, "a", 2), "the attribute 'a' of SimpleNamespace"),
    "arguments": (lambda p: setattr(p.arguments, "b", 3), "the attribute 'b' of Namespace"),
    "list": (lambda p: p.betas.append(3.0), "the attribute 'betas' of Pair"),
    "empty list": (lambda p: p.losses.append(3.0), "the attribute 'losses' of Pair"),
    "dict in a dict": (lambda p: p.table["z"].update(beta=2.0), "the attribute 'table' of Pair"),
    "object": (lambda p: setattr(p.annealer, "value", 2.0), "the attribute 'value' of Annealer"),
    "function": (lambda p: setattr(p, "activation", torch.tanh), "the attribute 'activation' of Pair"),
    "distribution": (lambda p: setattr(p, "prior", dist.Normal(0.0, 2.0)), "the attribute 'prior' of Pair"),
    "global of a method": (lambda p: SETTINGS.update(beta=SETTINGS["beta"] + 1), "the global 'SETTINGS'"),
    "class": (lambda p: setattr(Pair, "level", Pair.level + 1), "the attribute 'level' of Pair"),
    "class that a method names": (
        lambda p: setattr(Constants, "beta", Constants.beta + 1),
        "the attribute 'beta' of Constants",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("program", [lambda pair: pair, lambda pair: pair.forward], ids=["module", "method"])
def test_a_change_is_noticed_and_named(kind, program):
    change, name = CHANGES[kind]
    pair = Pair()
    state = PlainState(program(pair))
    before = state.now()
    assert state.now() == before
    change(pair)
    assert state.now() != before
    assert state.changed()[0] == name


def test_an_equal_value_and_values_of_tensors_change_nothing():
    pair = Pair()
    state = PlainState(pair)
    before = state.now()
    pair.beta, pair.sizes = float("1.0"), tuple(range(1, 3))
    with torch.no_grad():
        pair.offset.fill_(3.0)
        pair.decoder[0].weight.zero_()
        pair.mean.add_(1)
    assert state.now() == before
    global TEMPERATURE
    TEMPERATURE += 1  # named only in a method that does not run
    assert state.now() == before


def test_an_earlier_state_is_known_again():
    pair = Pair()
    state, first, new = PlainState(pair), pair.decoder, nn.Linear(2, 3)
    numbers = []
    for decoder in (first, new, first, new):
        pair.decoder = decoder
        numbers.append(state.now())
    assert numbers == [numbers[0], numbers[1]] * 2
    new.extra = 1.0  # the state of the restored module is watched again
    assert state.now() not in numbers
    pair.decoder = first
    assert state.now() == numbers[0]


def test_equal_lists_that_take_turns_are_both_watched():
    pair, one, other = Pair(), [1.0], [1.0]
    state, numbers = PlainState(pair), []
    for betas in (one, other, one):
        pair.betas = betas
        numbers.append(state.now())
    assert numbers[0] == numbers[2] != numbers[1]
    one[0] = 2.0
    assert state.now() not in numbers


def test_functions_are_followed_into_what_they_close_over_and_name():
    beta, config = 1.0, Config()

    def helper():
        return beta

    def model(x, scale):
        return x * helper() * scale * config.beta + TEMPERATURE

    program = partial(model, scale=2.0)
    state = PlainState(program)
    names = []

    def look():
        before = names and names[-1][0]
        names.append((state.now(), state.changed()))
        assert names[-1][0] != before

    beta = 2.0
    look()
    config.beta = 2.0
    look()
    program.keywords["scale"] = 3.0
    look()
    global TEMPERATURE
    TEMPERATURE += 1.0
    look()
    assert [changed for _, changed in names] == [
        ["the variable 'beta' of helper"],
        ["the attribute 'beta' of Config"],
        ["the argument 'scale' of a partial"],
        ["the global 'TEMPERATURE'"],
    ]


def test_a_value_that_changes_again_and_again_is_named_with_the_remedy():
    pair = Pair()
    state = PlainState(pair)
    for i in range(20):  # two alternating values are not new
        pair.beta = 1.0 + i % 2
        state.now()
    assert not state.often
    for i in range(3):
        pair.beta = 10.0 + i
        state.now()
    assert state.often.startswith("the attribute 'beta' of Pair changes repeatedly")
    assert "register_buffer" in state.often


class Counter(nn.Module):
    """Counts its runs, and makes something in the first one."""

    def __init__(self, counts):
        super().__init__()
        self.calls, self.counts, self.cache = 0, counts, None

    def forward(self):
        self.calls += self.counts
        self.cache = self.cache or "made"


def test_a_run_that_changes_the_state_is_found_and_undone():
    counter, still = Counter(True), Counter(False)
    state = PlainState(counter)
    before = state.now()
    assert state.watch_run(counter) == "each run of model and guide changes the attribute 'calls' of Counter"
    assert state.changing
    assert (counter.calls, counter.cache) == (0, None)
    assert state.now() == before
    state = PlainState(still)
    assert not state.watch_run(still)
    assert still.cache == "made"


def test_an_autoguide_and_pyros_modules_do_not_change_by_running():
    model, x = PPCA(5, 2), torch.randn(8, 5)
    guide = AutoNormal(model)
    guide(x)
    state = PlainState(model, guide)
    before = state.now()
    for _ in range(2):
        guide(x)
        pyro.poutine.trace(model).get_trace(x)
    assert state.now() == before
    guide.locs.requires_grad_(False)
    assert state.now() != before
