r"""Routes: the fastest way to run a function of tensors that gives the same numbers.

| route | what runs |
| --- | --- |
| ``"eager: ..."`` | the function itself |
| ``"traced: ..."`` | its graph, operation by operation |
| ``"traced and compiled"`` | its graph, compiled |

with the reason why no faster route is used. A function is traced if the work ahead pays for it. Its graph is
compared with the function itself, on other inputs and another seed. It is compiled if that pays too, and compared
again. If the graph fails, the previous route is used.
"""

from __future__ import annotations

__all__ = ["Replay", "Route", "Routes", "Work", "fastest", "weights_of"]

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from jensen.kernel.caller import outside
from jensen.kernel.modes import tensors_kept
from jensen.kernel.parameters import owners_of
from jensen.kernel.plain import PlainState
from jensen.kernel.randomness import forked_rng

from .capture import CannotCapture, Graph, Outputs, agrees, capture, split_draws
from .compile import CannotCompile, Compile, compiled, price

Run = TypeVar("Run")
Function = Callable[..., Outputs]
Trial = Callable[[Function], Outputs]

_HANDLERS = 3e-3  # seconds of Python per call: Pyro's handlers, distributions, autograd
_PER_SECOND = 1e10  # products and sums, including elementwise work
_WORTH_CAPTURE = 20.0  # seconds of work, in any number of calls
_COMPILED = "traced and compiled"
_KEPT = 100  # sizes


class Work(NamedTuple):
    """The work ahead: an estimate, never a measurement, so that a seed reproduces every digit.

    Attributes:
        calls: how often the function will be called.
        operations: the products and sums per call.
        least: the number of calls that pays for a graph, even for short calls.
        name: the name of the work in a sentence: "9 steps".
    """

    calls: float
    operations: float
    least: int
    name: str = ""

    @property
    def seconds(self) -> float:
        """The time that it takes without a graph, in seconds."""
        return self.calls * (_HANDLERS + self.operations / _PER_SECOND)

    def pays_capture(self) -> bool:
        """Whether it pays for tracing a graph."""
        return self.calls >= self.least or self.seconds > _WORTH_CAPTURE

    def pays_compiling(self, graph: Graph) -> bool:
        """Whether it pays for compiling a graph."""
        return self.seconds > 2 * price(graph)


class Route(NamedTuple, Generic[Run]):
    """The function to call, and its description in one sentence."""

    run: Run
    sentence: str

    @property
    def compiled(self) -> bool:
        """Whether a compiled graph runs."""
        return self.sentence == _COMPILED


def weights_of(*programs: Any) -> int:
    """The number of weights that enter products in the modules of programs."""
    return sum(p.numel() for p in {p for owner in owners_of(*programs) for p in owner.parameters()} if p.dim() > 1)


def fastest(
    eager: Run,
    captured: Callable[[], tuple[Run, Graph]],
    compiling: Callable[[], Run],
    work: Work,
    mode: Compile,
    *,
    obstacle: str = "",
    uncompiled: str = "",
    warning: str = "",
) -> Route[Run]:
    """Choose the way in which a function is run.

    Args:
        eager: the function itself.
        captured: traces it, compares, and returns the function that runs the graph, and the graph; may raise
            CannotCapture.
        compiling: compiles that graph, compares, and returns the function to run; may raise CannotCompile.
        work: the work ahead.
        mode: ``"auto"``: by the work ahead; ``True``: compiled if possible; ``False``: eager.
        obstacle: why it cannot be traced, if that is known.
        uncompiled: why the graph must not be compiled, whatever the work.
        warning: the beginning of a warning if ``mode=True`` is not possible; no warning if empty.

    Returns:
        The :class:`Route`.

    Warns:
        UserWarning: if ``mode=True`` is not possible.
    """
    route: Route[Run] = Route(eager, "eager")
    ahead = f" for {work.name}" if work.name else ""
    reason = "compile=False" if mode is False else obstacle
    if not reason and mode == "auto" and not work.pays_capture():
        reason = f"tracing would not pay{ahead}"
    if not reason:
        try:
            run, graph = captured()
            route, reason = Route(run, "traced"), uncompiled
            if not reason and mode == "auto" and not work.pays_compiling(graph):
                reason = f"compiling would not pay{ahead}"
            if not reason:
                route = Route(compiling(), _COMPILED)
        except (CannotCapture, CannotCompile) as error:
            reason = str(error)
    if reason:
        route = Route(route.run, f"{route.sentence}: {reason}")
    if warning and mode is True and not route.compiled:
        warnings.warn(f"{warning} {route.sentence}", stacklevel=outside())
    return route


class Replay:
    """A function of tensors as a graph.

    Args:
        fn: the function; it may read ``held`` by other names.
        held: tensors that it reads beside its inputs (parameters, buffers), which may change between calls.
        inputs: inputs of the shapes to come.
        split: whether operations without random samples are computed once for the same inputs, until
            :meth:`forget`.

    Raises:
        CannotCapture: if the function depends on values.
    """

    def __init__(self, fn: Function, held: Sequence[Tensor], inputs: Sequence[Tensor], split: bool) -> None:
        self.held = tuple(held)
        graph = capture(lambda *flat: fn(*flat[len(held) :]), *held, *inputs)
        self.constants = graph.constants
        self.once: Graph | None
        self.once, self.graph = split_draws(graph) if split else (None, Graph(graph.module, ()))
        self.fast: Function = self.graph
        self.known: tuple[Sequence[Tensor], Outputs] | None = None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Run the graph."""
        return self.fast(*self._flat(inputs))

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Compile the graph. May raise CannotCompile."""
        self.fast = compiled(self.graph, *self._flat(inputs))

    def forget(self) -> None:
        """Forget results computed once, after the function's state has changed."""
        self.known = None

    def _flat(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        flat = (*self.held, *inputs, *self.constants)
        if self.once is None:
            return flat
        if self.known is None or any(a is not b for a, b in zip(self.known[0], inputs, strict=True)):
            self.known = inputs, self.once(*flat)
        return (*flat, *self.known[1])


class Routes:
    """The routes of one function, one for each size of its inputs.

    Args:
        mode: ``"auto"``, ``True`` or ``False``.
        least: the number of calls that pays for a graph.
        warning: the beginning of the warning if ``mode=True`` is not possible.
        split: whether operations without random samples are computed once for the same inputs.

    Attributes:
        sentence: the route of the first size.
    """

    def __init__(self, mode: Compile, least: int, warning: str, split: bool = False) -> None:
        self.mode, self.least, self.warning, self.split = mode, least, warning, split
        self.sentence = "eager: nothing has run yet"
        self._first: Any = None
        self._calls: dict[Any, int] = {}
        self._routes: dict[Any, Route[Function]] = {}

    def __call__(
        self,
        fn: Function,
        held: Sequence[Tensor],
        inputs: Sequence[Tensor],
        operations: float,
        *,
        ahead: float | None = None,
        calls: int = 1,
        key: Any = None,
        state: PlainState | None = None,
        trial: Trial | None = None,
        obstacle: str = "",
    ) -> Function:
        """The function to call instead of the given one.

        Args:
            fn: the function.
            held: tensors that it reads beside its inputs.
            inputs: its inputs.
            operations: the products and sums per call.
            ahead: how many calls with inputs of this size will follow; None: as many as before.
            calls: how many calls use this result.
            key: other values on which the function depends: another key is another function.
            state: the state of the programs in the function: another state is another function, too. If one of their
                attributes changes repeatedly, each value has to pay for its own graph, and none is compiled.
            trial: runs a function where the graph is compared with ``fn``; None: at the inputs with rows reversed.
            obstacle: why it cannot be traced, if that is known.
        """
        shape, here = (key, *((x.shape, x.dtype, x.device) for x in inputs)), tuple(map(id, held))
        size = (shape, state and state.now(), here)
        self._first = self._first or shape
        before = self._calls.get(size, 0)
        self._calls[size] = before + calls
        _drop_oldest(self._calls)
        if size not in self._routes:
            often = state.often if state else ""
            work = Work(before if ahead is None or often else ahead, operations, self.least)
            obstacle = obstacle or (state.changing if state else "")
            route = self._route(fn, held, inputs, work, trial, obstacle, state, first=shape == self._first)
            if (often or self.mode == "auto") and not obstacle and not work.pays_capture():  # it may pay later
                return fn
            size = (shape, state and state.now(), here)  # the first run may have created state
            self._routes[size] = route
            _drop_oldest(self._routes)
        run = self._routes[size].run
        return run if isinstance(run, Replay) else fn

    def forget(self) -> None:
        """Forget results computed once for the same inputs, after the state of functions has changed."""
        for route in self._routes.values():
            if isinstance(route.run, Replay):
                route.run.forget()

    def _route(
        self,
        fn: Function,
        held: Sequence[Tensor],
        inputs: Sequence[Tensor],
        work: Work,
        trial: Trial | None,
        obstacle: str,
        state: PlainState | None,
        first: bool,
    ) -> Route[Function]:
        made: list[tuple[Replay, Trial]] = []
        buffers = [t for t in held if not isinstance(t, nn.Parameter)]  # which a run may change

        def captured() -> tuple[Function, Graph]:
            with tensors_kept(buffers):
                if state and (changing := state.watch_run(partial(_drawn_aside, fn, inputs))):
                    raise CannotCapture(changing)
                replay = Replay(fn, held, inputs, self.split)
                made.append((replay, trial or _reversed(fn, inputs)))
                _compare(made[0][1], fn, replay, CannotCapture)
            return replay, replay.graph

        def compiling() -> Function:
            replay, trial = made[0]
            try:
                with tensors_kept(buffers):
                    replay.compile(inputs)
                    _compare(trial, fn, replay, CannotCompile)
            except (CannotCapture, CannotCompile):
                replay.fast = replay.graph
                raise
            return replay

        often = state.often if state else ""
        uncompiled = "" if first or self.mode == "auto" else "inputs of the first size have the compiled graph"
        route = fastest(
            fn,
            captured,
            compiling,
            work,
            self.mode,
            obstacle=obstacle or ("" if work.pays_capture() else often),
            uncompiled=often or uncompiled,
            warning="" if self._routes else self.warning,
        )
        if first:
            self.sentence = route.sentence
        return route


def _drop_oldest(entries: dict[Any, Any]) -> None:
    while len(entries) > _KEPT:
        del entries[next(iter(entries))]


def _drawn_aside(fn: Function, inputs: Sequence[Tensor]) -> None:
    """Run a function without advancing the random stream."""
    with forked_rng():
        fn(*inputs)


def _reversed(fn: Function, inputs: Sequence[Tensor]) -> Trial:
    """Run a function at the inputs with rows reversed, or at the inputs if it does not accept others."""
    other = [x.flip(0) for x in inputs]
    try:
        with forked_rng():
            fn(*other)
    except ValueError:
        other = list(inputs)
    return lambda run: run(*other)


def _compare(trial: Trial, fn: Function, replay: Replay, error: type[CannotCapture | CannotCompile]) -> None:
    """Raise an error unless a graph gives the same numbers as its function."""
    try:
        if not agrees(lambda: trial(fn), lambda: trial(replay)):
            graph = "traced" if error is CannotCapture else "compiled"
            raise error(f"the {graph} graph gives other numbers than the model itself")
    finally:
        replay.forget()
