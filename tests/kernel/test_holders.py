"""Modules are found wherever a program stores them, and modules in training mode during a measurement are named."""

import functools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import nn

from jensen.inference import evaluate, fit, log_weights
from jensen.kernel.modes import running
from jensen.kernel.parameters import own_modules, owners_of
from jensen.models import PPCA

NET = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
NETS = SimpleNamespace(encoder=nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)))
unused = nn.Linear(3, 2)


def draw(net, x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(F.pad(z, (0, 1)), 1.0).to_event(1), obs=x)


def uses_a_global(x):
    draw(NET, x)


def uses_a_global_of_a_function(x):
    uses_a_global(x)


def uses_an_attribute_of_a_global(x):
    draw(NETS.encoder, x)


def scaled(fn):
    @functools.wraps(fn)
    def inner(*args):
        with poutine.scale(scale=1.0):
            return fn(*args)

    return inner


class Plain:
    """An object that is not a module but contains one."""

    def __init__(self, net):
        self.parts = {"deep": [net]}

    def guide(self, x):
        self._draw(x)

    def __call__(self, x):
        self._draw(x)

    def _draw(self, x):
        draw(self.parts["deep"][0], x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def guide(self, x):
        draw(self.net, x)


class Owner(nn.Module):
    """A module that keeps another one in a list."""

    def __init__(self, net):
        super().__init__()
        self.nets = [net]

    def guide(self, x):
        draw(self.nets[0], x)

    def forward(self, x):
        draw(self.nets[0], x)


def closure(net):
    def guide(x):
        draw(net, x)

    return guide


def default(net):
    def guide(x, net=net):
        draw(net, x)

    return guide


def class_attribute(net):
    class Holder:
        encoder = net

        @classmethod
        def guide(cls, x):
            draw(cls.encoder, x)

    return Holder.guide


def nested(net):
    def guide(x):
        def inner():
            return net

        draw(inner(), x)

    return guide


def itself(net):
    """A function in its own closure, beside the net."""

    def guide(x, again=True):
        return guide(x, False) if again else draw(net, x)

    return guide


STYLES = {
    "bound method": lambda net: Owner(net).guide,
    "module with a list": Owner,
    "partial": lambda net: functools.partial(draw, net),
    "partial by keyword": lambda net: functools.partial(lambda x, net: draw(net, x), net=net),
    "partial of a nested function": lambda net: functools.partial(nested(net)),
    "closure": closure,
    "closure of a closure": lambda net: closure(lambda x: net(x)),
    "closure with itself": itself,
    "default argument": default,
    "dictionary": lambda net: (lambda nets: lambda x: draw(nets["a"], x))({"a": net}),
    "list of tuples": lambda net: (lambda nets: lambda x: draw(nets[0][1], x))([("a", net)]),
    "lambda": lambda net: lambda x: draw(net, x),
    "lambda around a handler": lambda net: lambda x: poutine.scale(closure(net), scale=1.0)(x),
    "poutine.scale": lambda net: poutine.scale(closure(net), scale=1.0),
    "poutine.scale of a bound method": lambda net: poutine.scale(Owner(net).guide, scale=1.0),
    "poutine.block": lambda net: poutine.block(poutine.scale(closure(net), scale=1.0), hide=["w"]),
    "poutine.trace": lambda net: poutine.trace(closure(net)),
    "handler as decorator": lambda net: poutine.mask(mask=torch.tensor(True))(closure(net)),
    "config_enumerate": lambda net: pyro.infer.config_enumerate(closure(net)),
    "plate around": lambda net: pyro.plate("outer", 1, dim=-2)(closure(net)),
    "reparam": lambda net: poutine.reparam(closure(net), config={"w": LocScaleReparam()}),
    "functools.wraps": lambda net: scaled(closure(net)),
    "lru_cache": lambda net: functools.lru_cache(closure(net)),
    "no_grad": lambda net: torch.no_grad()(closure(net)),
    "method of an object": lambda net: Plain(net).guide,
    "callable object": Plain,
    "object with slots": lambda net: Slotted(net).guide,
    "class attribute": class_attribute,
    "namespace": lambda net: (lambda held: lambda x: draw(held.net, x))(SimpleNamespace(net=net)),
    "global": lambda _: uses_a_global,
    "global of a function": lambda _: uses_a_global_of_a_function,
    "attribute of a global": lambda _: uses_an_attribute_of_a_global,
}
MEASURED = [name for name in STYLES if name not in ("plate around", "lru_cache")]


def program_in(style):
    net = {"global": NET, "global of a function": NET, "attribute of a global": NETS.encoder}.get(style)
    net = net or nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    return STYLES[style](net), net.train()


@pytest.mark.parametrize("style", STYLES)
def test_a_module_is_found(style):
    program, net = program_in(style)
    assert any(part is net or part.__dict__.get("nets") == [net] for part in owners_of(program))
    assert any(part is net for owner in owners_of(program) for part in owner.modules())
    assert owners_of(program) == owners_of(program)


@pytest.mark.parametrize("style", MEASURED)
def test_it_is_measured_in_evaluation_mode_and_given_back(style):
    guide, net = program_in(style)
    x = torch.randn(20, 3)
    seen, before = [], net[0].running_mean.clone()
    handle = net.register_forward_pre_hook(lambda part, _: seen.append([p.training for p in part.modules()]))
    evaluate(model, guide, x, 10, seed=0, progress=False)
    handle.remove()
    assert seen
    assert not any(map(any, seen))
    assert all(part.training for part in net.modules())
    assert torch.equal(net[0].running_mean, before)


def test_what_a_function_does_not_name_is_not_held():
    net = nn.Linear(3, 2)
    assert owners_of(closure(net)) == [net]
    assert owners_of(draw, model) == []

    def names_an_attribute(x):
        return x.unused

    assert owners_of(names_an_attribute) == []
    assert unused.training


def test_the_search_is_in_the_order_of_programs_and_without_parts():
    whole, other = nn.Sequential(nn.Linear(3, 2)), nn.Linear(1, 1)
    assert owners_of(closure(whole[0]), closure(other)) == [whole[0], other]
    assert owners_of(closure([whole[0], other]), closure(whole)) == [other, whole]
    owner = Owner(other)
    assert owners_of(closure(whole), owner.guide) == [owner, whole, other]


def test_the_search_ends():
    endless = SimpleNamespace(next=None, net=nn.Linear(1, 1))
    first = endless
    for _ in range(100_000):
        endless.next = SimpleNamespace(next=None)
        endless = endless.next
    endless.next = first
    assert owners_of(lambda x: first.net(x)) == [first.net]


def test_an_auto_guide_holds_its_model():
    ppca = PPCA(3, 2)
    guide = pyro.infer.autoguide.AutoNormal(ppca)
    assert owners_of(guide) == [guide, ppca]
    assert own_modules(guide) == [guide]


class Stubborn(nn.Module):
    """Dropout that sets itself to training mode, as Monte Carlo dropout is often written."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.drop.train()
        return self.drop(x)[:, :2]


def makes_its_dropout(x):
    draw(lambda x: nn.Dropout(0.5)(x)[:, :2], x)


def calls_the_function(x):
    draw(lambda x: F.dropout(x)[:, :2], x)


@pytest.mark.parametrize(
    ("guide", "name"),
    [
        (functools.partial(draw, Stubborn()), r"drop \(Dropout\)"),
        (makes_its_dropout, r"Dropout \(made inside the program\)"),
        (calls_the_function, r"torch\.nn\.functional\.dropout"),
    ],
)
def test_what_stays_in_training_mode_is_named(guide, name):
    x = torch.randn(20, 3)
    with pytest.warns(UserWarning, match=f"{name} runs in training mode during the measurement"):
        evaluate(model, guide, x, 10, progress=False)


def test_dropout_with_its_own_mode_and_training_are_not_blamed():
    x = torch.randn(20, 3)
    net = nn.Linear(3, 2)

    def guide(x):
        pyro.module("net", net)
        draw(lambda x: net(F.dropout(x, 0.5, training=net.training)), x)

    evaluate(model, guide, x, 10, progress=False)
    fit(model, guide, x, epochs=1, progress=False)
    log_weights(model, guide, x, particles=2)  # in the user's mode


def test_modules_that_no_search_finds_are_put_into_evaluation_mode_by_a_run():
    hidden = [nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))]
    names = iter(lambda: hidden[0], None)

    def guide(x):
        draw(next(names), x)

    assert not any(part is hidden[0] for owner in owners_of(guide) for part in owner.modules())
    seen = []
    hidden[0][0].register_forward_pre_hook(lambda part, _: seen.append(part.training))
    evaluate(model, guide, torch.randn(20, 3), 10, progress=False)
    assert seen
    assert not any(seen)
    assert hidden[0].training
    assert hidden[0][0].training


def test_running_puts_buffers_back_that_a_program_moves():
    counter = nn.BatchNorm1d(3)
    with running(functools.partial(draw, counter), model):
        counter.running_mean += 1.0
    assert counter.running_mean.tolist() == [0.0] * 3
