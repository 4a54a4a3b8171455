r"""Routes: the fastest way to run a function of tensors that gives the same numbers.

| route | what runs |
| --- | --- |
| ``"eager: ..."`` | the function itself |
| ``"captured: ..."`` | its graph, operation by operation |
| ``"captured and compiled"`` | its graph, compiled |

with the reason why the route is no faster one. A function is captured where the work ahead pays for it. Its graph is
compared with the function itself, on other inputs and from another seed, compiled where that pays too, and compared
again. Where the graph fails, what came before it runs.
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

_HANDLERS = 3e-3  # seconds of a call that Python takes: Pyro's handlers, distributions, autograd
_PER_SECOND = 1e10  # products and sums, with the elementwise work around them
_WORTH_CAPTURE = 20.0  # seconds, however few calls take them
_COMPILED = "captured and compiled"
_KEPT = 100  # sizes


class Work(NamedTuple):
    """The work ahead: an estimate, never a measurement, so that a seed repeats every digit.

    Attributes:
        calls: how often the function will be called.
        operations: the products and sums of a call.
        least: how many calls pay for a graph, however short they are.
        name: what to call the work in a sentence: "9 steps".
    """

    calls: float
    operations: float
    least: int
    name: str = ""

    @property
    def seconds(self) -> float:
        """The seconds that it takes without a graph."""
        return self.calls * (_HANDLERS + self.operations / _PER_SECOND)

    def pays_capture(self) -> bool:
        """Whether it pays for a graph."""
        return self.calls >= self.least or self.seconds > _WORTH_CAPTURE

    def pays_compiling(self, graph: Graph) -> bool:
        """Whether it pays for compiling a graph."""
        return self.seconds > 2 * price(graph)


class Route(NamedTuple, Generic[Run]):
    """What to call, and what it is in one sentence."""

    run: Run
    sentence: str

    @property
    def compiled(self) -> bool:
        """Whether a compiled graph runs."""
        return self.sentence == _COMPILED


def weights_of(*programs: Any) -> int:
    """The number of weights that products take in the modules behind programs."""
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
    """Decide how a function is run.

    Args:
        eager: the function itself.
        captured: captures it, compares, and returns how its graph is run, and the graph; may raise CannotCapture.
        compiling: compiles that graph, compares, and returns how it is run; may raise CannotCompile.
        work: the work ahead.
        mode: ``"auto"``: by the work ahead; ``True``: compiled where it can be; ``False``: eager.
        obstacle: why it cannot be captured, if that is known.
        uncompiled: why the graph is not to be compiled, whatever the work.
        warning: what comes before the sentence in a warning where ``mode=True`` cannot be obeyed; none if empty.

    Returns:
        The :class:`Route`.

    Warns:
        UserWarning: where ``mode=True`` cannot be obeyed.
    """
    route: Route[Run] = Route(eager, "eager")
    ahead = f" for {work.name}" if work.name else ""
    reason = "compile=False" if mode is False else obstacle
    if not reason and mode == "auto" and not work.pays_capture():
        reason = f"a graph would not pay{ahead}"
    if not reason:
        try:
            run, graph = captured()
            route, reason = Route(run, "captured"), uncompiled
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
        fn: the function; it may read ``held`` by the names that they have elsewhere.
        held: tensors that it reads beside its inputs (parameters, buffers), which may be written to between calls.
        inputs: inputs of the shapes to come.
        split: whether what does not depend on random draws is worked out once for the same inputs, until
            :meth:`forget`.

    Raises:
        CannotCapture: if what the function does depends on values.
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
        """Forget what was worked out once: what the function holds has changed."""
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
        least: how many calls pay for a graph.
        warning: what comes before the sentence in the warning where ``mode=True`` cannot be obeyed.
        split: whether what does not depend on draws is worked out once for the same inputs.

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
        """What to call in the place of a function.

        Args:
            fn: the function.
            held: tensors that it reads beside its inputs.
            inputs: its inputs.
            operations: the products and sums of a call.
            ahead: how many calls with inputs of this size are to come; None: as many as there were.
            calls: how many calls follow this one question.
            key: what the function depends on beside tensors: with another key it is another function.
            state: that of the programs behind the function: in another state it is another function, too. Where one
                of their attributes takes a new value again and again, each value has to pay for a graph of its own,
                and none is compiled.
            trial: runs a function where the graph is compared with ``fn``; None: at the inputs with rows reversed.
            obstacle: why it cannot be captured, if that is known.
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
            if (often or self.mode == "auto") and not obstacle and not work.pays_capture():  # it may later
                return fn
            size = (shape, state and state.now(), here)  # the first run may have made something that stays
            self._routes[size] = route
            _drop_oldest(self._routes)
        run = self._routes[size].run
        return run if isinstance(run, Replay) else fn

    def forget(self) -> None:
        """Forget what was worked out once for the same inputs: what functions hold has changed."""
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
        buffers = [t for t in held if not isinstance(t, nn.Parameter)]  # which running the function may move

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
    """Run a function, and leave the random stream where it is."""
    with forked_rng():
        fn(*inputs)


def _reversed(fn: Function, inputs: Sequence[Tensor]) -> Trial:
    """Run a function at the inputs with rows reversed; as they are, where it takes no others."""
    other = [x.flip(0) for x in inputs]
    try:
        with forked_rng():
            fn(*other)
    except ValueError:
        other = list(inputs)
    return lambda run: run(*other)


def _compare(trial: Trial, fn: Function, replay: Replay, error: type[CannotCapture | CannotCompile]) -> None:
    """Raise an error unless a graph gives the numbers of its function."""
    try:
        if not agrees(lambda: trial(fn), lambda: trial(replay)):
            graph = "captured" if error is CannotCapture else "compiled"
            raise error(f"the {graph} graph gives other numbers than the pair itself")
    finally:
        replay.forget()
