"""The choice of routes: decisions, fallbacks, and unchanged state."""

import warnings

import pytest
import torch
from torch import nn

from jensen.graphs.capture import CannotCapture, Graph
from jensen.graphs.compile import CannotCompile
from jensen.graphs.routes import Replay, Routes, Work, fastest, weights_of

SMALL, LARGE = Work(10, 1e6, 200, "10 steps"), Work(1e6, 1e6, 200)


def nodes(n):
    """A graph with a given number of operations."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(n):
        x = graph.call_function(torch.neg, (x,))
    graph.output((x,))
    return Graph(torch.fx.GraphModule(nn.Module(), graph), ())


def decided(work, mode, capturing=None, compiling=None, **options):
    """What runs, and the sentence."""

    def captured():
        if capturing is not None:
            raise capturing
        return "captured", nodes(3)

    def compiled():
        if compiling is not None:
            raise compiling
        return "compiled"

    route = fastest("eager", captured, compiled, work, mode, **options)
    assert route.compiled == (route.run == "compiled")
    return route.run, route.sentence


def test_the_work_ahead_decides():
    assert decided(SMALL, "auto") == ("eager", "eager: tracing would not pay for 10 steps")
    assert decided(Work(200, 0, 200), "auto") == ("captured", "traced: compiling would not pay")
    assert decided(LARGE, "auto") == ("compiled", "traced and compiled")
    assert decided(Work(1, 3e11, 200), "auto") == ("compiled", "traced and compiled")
    assert decided(SMALL, True) == ("compiled", "traced and compiled")
    assert decided(LARGE, False) == ("eager", "eager: compile=False")


def test_each_failure_leaves_what_came_before_it():
    assert decided(LARGE, "auto", CannotCapture("it loops")) == ("eager", "eager: it loops")
    assert decided(LARGE, "auto", None, CannotCompile("no compiler")) == ("captured", "traced: no compiler")
    assert decided(LARGE, "auto", obstacle="enumerated") == ("eager", "eager: enumerated")
    assert decided(LARGE, "auto", uncompiled="begun so") == ("captured", "traced: begun so")


def test_only_compile_true_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decided(LARGE, "auto", CannotCapture("it loops"), warning="steps are")
        decided(SMALL, True, CannotCapture("it loops"))
        decided(SMALL, True, warning="steps are")
    with pytest.warns(UserWarning, match="^steps are eager: it loops$") as caught:
        decided(SMALL, True, CannotCapture("it loops"), warning="steps are")
    assert caught[0].filename == __file__


class Layer(nn.Module):
    """A linear layer that counts its rows in a buffer, and adds noise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("rows", torch.zeros(()))
        self.shift = 0.0

    def __call__(self, x):
        with torch.no_grad():
            self.rows.add_(len(x))
            return (x @ self.weight + torch.randn(3) + self.shift,)


def drawn(run, *inputs):
    torch.manual_seed(1)
    return run(*inputs)[0]


def test_a_graph_reads_what_the_function_holds_and_draws_afresh(float64):
    layer, x = Layer(), torch.randn(4, 3)
    routes = Routes("auto", 1, "")
    run = routes(layer, [*layer.parameters(), *layer.buffers()], (x,), 1.0, ahead=5)
    assert isinstance(run, Replay)
    assert layer.rows == 0  # the inspection did not change the count
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(drawn(run, 2 * x), drawn(layer, 2 * x))
    assert layer.rows == 8
    assert not torch.equal(run(x)[0], run(x)[0])
    assert weights_of(layer) == 9


def test_a_size_is_decided_when_there_were_enough_calls():
    layer, x = Layer(), torch.randn(4, 3)
    routes = Routes("auto", 5, "")
    held = [*layer.parameters(), *layer.buffers()]
    sentences = []
    for _ in range(4):
        run = routes(layer, held, (x,), 1.0, calls=2)
        sentences.append(routes.sentence)
        assert isinstance(run, Replay) == (len(sentences) == 4)
    assert sentences == [*["eager: tracing would not pay"] * 3, "traced: compiling would not pay"]
    assert routes(layer, held, (x[:2],), 1.0) is layer  # another size
    assert routes(layer, held, (x,), 1.0, key="other") is layer


def test_another_key_is_another_function(float64):
    layer, x = Layer(), torch.randn(4, 3)
    routes = Routes("auto", 1, "")
    held = [*layer.parameters(), *layer.buffers()]
    for layer.shift in (0.0, 5.0, 0.0):
        run = routes(layer, held, (x,), 1.0, ahead=5, key=layer.shift)
        assert isinstance(run, Replay)
        assert torch.equal(drawn(run, x), drawn(layer, x))


def test_a_compiled_graph_with_other_numbers_is_not_used(monkeypatch):
    monkeypatch.setattr("jensen.graphs.routes.compiled", lambda graph, *inputs: lambda *flat: (graph(*flat)[0] + 1,))
    layer, x = Layer(), torch.randn(4, 3)
    routes = Routes(True, 1, "it is")
    with pytest.warns(UserWarning, match="it is traced: the compiled graph gives other numbers than the model itself"):
        run = routes(layer, [layer.weight, layer.rows], (x,), 1.0)
    assert torch.equal(drawn(run, x), drawn(layer, x))


def test_what_python_remembers_is_no_graph():
    calls = []

    def fn(x):
        calls.append(1)
        return (x * len(calls),)

    routes = Routes("auto", 1, "")
    assert routes(fn, [], (torch.ones(2),), 1.0, ahead=5) is fn
    assert routes.sentence == "eager: the traced graph gives other numbers than the model itself"


def test_what_is_known_of_an_input_is_kept_until_it_is_forgotten(float64):
    layer, x = Layer(), torch.randn(4, 3)
    routes = Routes("auto", 1, "", split=True)
    run = routes(lambda x: (x @ layer.weight + torch.randn(3),), [layer.weight], (x,), 1.0, ahead=5)
    first = drawn(run, x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(drawn(run, x), first)
    routes.forget()
    assert not torch.equal(drawn(run, x), first)
