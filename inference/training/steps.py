"""The steps of a training run, by the fastest route with the same numbers.

| route | operations of a step |
| --- | --- |
| eager | Pyro's objective with its handlers, autograd, the optimizer |
| traced | the graph of loss and gradients, operation by operation, and the optimizer |
| compiled | one compiled graph of loss, gradients and update |

The first two give bitwise identical parameters, the third the same up to rounding. A step whose loss or gradient is not
finite changes nothing, and its loss is NaN. Losses stay on their device until they are read, without synchronization.

A graph fixes the plain state of model, guide and objective (see :mod:`jensen.kernel.plain`), so each state has its own
graph: a callback may change a temperature, freeze parameters or replace a module between any two steps.
"""

from __future__ import annotations

__all__ = ["BLOCK", "Steps"]

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from jensen.graphs.capture import Graph, Outputs, agrees, capture
from jensen.graphs.compile import CannotCompile, Compile, compiled
from jensen.graphs.guards import Witnesses
from jensen.graphs.routes import Route, Work, fastest
from jensen.kernel.batches import Batch, Batches, rows_of
from jensen.kernel.layout import Layout
from jensen.kernel.looks import Incoming
from jensen.kernel.modes import buffers_kept
from jensen.kernel.parameters import ParametersRead, own_modules
from jensen.kernel.plain import PlainState
from jensen.sources import Order

from .checkpoint import Run
from .gradients import LossGraph, capture_loss, knobs_of, loss_and_bound, loss_is_finite, obstacle
from .schedules import Schedule, factor
from .shares import Shares
from .updates import Update, update_of

Step = Callable[[Batch], tuple[Tensor, Tensor]]  # from a batch to its loss and its bound
Key = tuple[Any, int]  # the shapes of a batch, the state of model and guide

BLOCK = 100  # steps whose losses are read together
_LEAST = 200  # steps that pay for a graph
_KEPT = 16  # graphs
_HELD = 2**26  # bytes of batches whose losses are not read yet


class _Way(NamedTuple):
    """The function of a step.

    Attributes:
        step: performs it.
        update: the optimizer's update if it is part of the graph; else the optimizer performs it.
        rows: how many rows its numbers had when it was compiled.
    """

    step: Step
    update: Update | None = None
    rows: int = 0


class Steps:
    """Performs steps by the route that suits the work ahead.

    Args:
        run: model and guide, their parameters and the optimizer.
        objective: the loss.
        layout: the layout of model and guide.
        frozen: parameters that do not change.
        mode: the setting ``compile`` of :func:`~jensen.inference.fit`.
        ahead: the number of future steps with a full batch.
        rest: the number of those with a smaller last batch.
        shares: how processes share the batches; None: this process is alone.
        check: checks batches as they come, if the data are read by the batch.
        clip: the largest norm of the gradient; None: any.
        schedule: of the learning rate over all these steps.

    Attributes:
        begun: whether a resumed run was compiled; None: the run starts here.
        compiled: whether full batches run in a compiled graph now.
        route: their present route, and why it is not faster.
    """

    def __init__(
        self,
        run: Run,
        objective: ELBO,
        layout: Layout,
        frozen: set[nn.Parameter],
        mode: Compile,
        ahead: int,
        rest: int,
        shares: Shares | None = None,
        check: Incoming | None = None,
        clip: float | None = None,
        schedule: Schedule = "constant",
    ) -> None:
        self.run, self.objective, self.layout, self.frozen, self.mode = run, objective, layout, frozen, mode
        self.ahead, self.rest, self.shares, self.check = ahead, rest, shares, check
        self.clip, self.schedule = clip, schedule
        self._epochs = 0
        self.begun: bool | None = None
        self.compiled, self.route = False, ""
        self._state = PlainState(run.model, run.guide, objective)
        self._here = self._state.now()
        self._owned = {p: p.requires_grad for p in self._parameters()}
        self._routes: dict[Key, Route[_Way]] = {}
        self._waiting: set[Key] = set()  # keys that get a graph once their state has lasted
        self._lasted = 0  # steps in the present state
        self._full: Any = None  # the shapes of full batches
        self._done: Counter[Any] = Counter()  # steps by shapes
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._update: Update | None = None
        self._taken = 0  # steps of which the optimizer has no record yet

    def __call__(self, batch: Batch) -> None:
        """Take a step."""
        shapes = tuple((x.shape, x.dtype) for x in batch)
        self._full = self._full or shapes
        self._notice()
        way = self._way(batch, shapes)
        if self.schedule != "constant":
            scale = factor(self.schedule, self.run.history.steps, self.ahead + self.rest)
            for group in self.run.optimizer.param_groups:
                group["lr"] = scale * group["initial_lr"]
        self._unread.append(way.step(batch))
        self._done[shapes] += 1
        self._lasted += 1
        self.run.history.steps += 1

    def _parameters(self) -> list[nn.Parameter]:
        return [p for owner in own_modules(self.run.model, self.run.guide) for p in owner.parameters()]

    def _notice(self) -> None:
        """Notice a new state."""
        if (here := self._state.now()) != self._here:
            self._arrive(here)

    def _arrive(self, state: int) -> None:
        """A new state: train parameters that are new, or require a gradient now."""
        self.settle()
        self._here, self._lasted = state, 0
        parameters = self._parameters()
        self.run.adopt(p for p in parameters if p.requires_grad > self._owned.get(p, False) and p not in self.frozen)
        self._owned |= {p: p.requires_grad for p in parameters}

    def _way(self, batch: Batch, shapes: Any) -> _Way:
        """The step for batches of these shapes in the present state."""
        key = (shapes, self._here)
        if key not in self._routes or (key in self._waiting and self._lasted >= _LEAST):
            key = self._choose(batch, shapes)
        way = self._routes[key].run
        if way.update is not None and way.update is not self._update:
            self.settle()
            way.update.recount()
            self._update = way.update
            if len(way.update.hyper(1)) != way.rows:  # temporarily frozen parameters have taken fewer steps
                key = self._choose(batch, shapes)
                way = self._routes[key].run
        if shapes == self._full:
            self.compiled, self.route = self._routes[key].compiled, self._routes[key].sentence
        return way

    def _choose(self, batch: Batch, shapes: Any) -> Key:
        """Choose a route for batches like this one in the present state."""
        often = self._state.often
        wait = bool(often) and self._lasted < _LEAST
        route = self._route(batch, shapes, often, wait)
        self._notice()  # a first run may create state
        key = (shapes, self._here)
        self._routes[key] = route
        if route.run.update is not None:  # its step count was read before it created missing state
            self._update = route.run.update
        (self._waiting.add if wait else self._waiting.discard)(key)
        while len(self._routes) > _KEPT:
            oldest = next(iter(self._routes))
            del self._routes[oldest]
            self._waiting.discard(oldest)
        return key

    def epoch(self, data: Batches) -> tuple[list[float], list[float], Batch, Tensor]:
        """One pass over shuffled batches: losses, bounds, and the last batch with its rows.

        It ends at the first loss that is not finite, or soon after: this is then the last loss, and the last step that
        ``history.steps`` counts.
        """
        losses: list[float] = []
        bounds: list[float] = []
        shares, trained = self.shares, self.run.trained
        unread: list[tuple[Tensor, Batch]] = []  # a source cannot be asked for these batches again
        held = 0
        known = 0  # losses before those of the unread steps
        rows: Tensor
        batch: Batch
        order = Order() if shares is None else shares.order(len(self.run.history.elbo))
        batches = data.epoch(order, self._look)
        last = -(-data.n // data.size) - 1 if data.source is None else -1  # of a source it is not known
        for i in count():
            with nullcontext() if shares is None else shares.step(trained, i == last):
                given = next(batches, None)
                if given is None:
                    break
                rows, batch = given
                if len(rows):
                    self(batch)
                else:  # other processes have rows of this batch
                    self._notice()
                    self._unread.append(self._move(*self._nan_loss(), 0))
                    self.run.history.steps += 1
            unread.append((rows, batch if self.check is not None else ()))
            held += sum(x.numel() * x.element_size() for x in unread[-1][1])
            if len(self._unread) >= (BLOCK if self.compiled and shares is None else 1) or held > _HELD:
                self._read(losses, bounds)
                if not math.isfinite(losses[-1]):
                    break
                unread.clear()
                held, known = 0, len(losses)
        self._read(losses, bounds)
        self.settle()
        self._epochs += 1
        if not math.isfinite(losses[-1]) and rows is not unread[len(losses) - 1 - known][0]:
            rows, batch = unread[len(losses) - 1 - known]
            batch = batch or data.take(rows)
        return losses, bounds, batch, rows

    def _look(self, batch: Batch, rows: Tensor) -> None:
        """Check a batch of a source; graphs traced on complete data do not allow for the first missing values."""
        if self.check is not None and self.check(batch, rows, self._epochs):
            self.settle()
            self._routes.clear()
            self._waiting.clear()

    def _read(self, losses: list[float], bounds: list[float]) -> None:
        """Add the unread losses, up to the first one that is not finite."""
        if not self._unread:
            return
        new, of = (torch.stack(values).tolist() for values in zip(*self._unread, strict=True))
        self._unread.clear()
        kept = next((i + 1 for i, loss in enumerate(new) if not math.isfinite(loss)), len(new))
        self.run.history.steps -= len(new) - kept
        losses += new[:kept]
        bounds += of[:kept]

    def _hyper(self, update: Update, step: int) -> Tensor:
        """The numbers of the update at a step, and the weight of the step in the average of the parameters."""
        average, numbers = self.run.average, update.hyper(step)
        weight = 0.0 if average is None else average.weight(average.steps + step)
        return torch.cat([numbers, torch.full_like(numbers[:, :1], weight)], 1)

    def settle(self) -> None:
        """Record in the optimizer, and in the average of the parameters, the steps taken without them."""
        if self._update is not None and self._taken:
            self._update.tell(self._taken)
            if self.run.average is not None:
                self.run.average.steps += self._taken
            self._taken = 0

    def _route(self, batch: Batch, shapes: Any, often: str, wait: bool) -> Route[_Way]:
        """The route of batches like this one; full batches come first."""
        made: list[LossGraph] = []

        def captured() -> tuple[_Way, Graph]:
            made.append(capture_loss(self.run, self.objective, self.layout, batch, self._state))
            return _Way(self._with_optimizer(made[0], made[0].graph)), made[0].graph

        first = shapes == self._full
        steps = max(0, (self.ahead if first else self.rest) - self._done[shapes])
        weights: int = sum(p.numel() for p in self.run.trained if p.dim() > 1)
        operations = 3 * weights * rows_of(batch) * self.objective.num_particles  # at twice the speed of log weights
        mode: Compile = "auto" if self.mode and not first else self.mode
        uncompiled = "" if first else "full batches have the compiled graph"
        if first and mode == "auto" and self.begun is not None:
            mode, uncompiled = self.begun or mode, "" if self.begun else "the run was started like this"
        known = obstacle(self.run, self.objective, self.layout, self._owned.keys()) or self._state.changing
        news = first and (not self._routes or (wait and not self._waiting))
        return fastest(
            _Way(self._eager),
            captured,
            lambda: self._compiled(made[0], batch),
            Work(steps, operations, _LEAST, f"{steps} steps"),
            mode,
            obstacle=known or (often if wait else ""),
            uncompiled=often or uncompiled,
            warning="fit does not compile the steps; they run" if news else "",
        )

    def _knobs(self, batch: Batch) -> Tensor:
        """The knobs of the loss at this step."""
        return knobs_of(self.objective, self.run.history.steps, batch)

    def _eager(self, batch: Batch) -> tuple[Tensor, Tensor]:
        run, objective, layout = self.run, self.objective, self.layout
        with ParametersRead() as reads:
            try:
                loss, bound = loss_and_bound(run, objective, layout, batch, self._knobs(batch))
            except (ValueError, LinAlgError):  # distributions reject parameters that are not finite
                if loss_is_finite(run, objective, layout, batch, run.history.steps):
                    raise
                return self._move(*self._nan_loss(), rows_of(batch))
        # created by pyro.param in this step for the first time
        run.adopt(p for p in reads.parameters if p.requires_grad and p not in self.frozen)
        value = loss.detach().reshape(())
        run.optimizer.zero_grad()
        if bool(value.isfinite()) and (moving := [p for p in run.trained if p.requires_grad]):
            torch.autograd.backward(loss, inputs=moving)
        return self._move(value, bound, rows_of(batch))

    def _with_optimizer(self, loss_graph: LossGraph, graph: Callable[..., Outputs]) -> Step:
        """Loss and gradients from a graph, traced or compiled, and a step of the optimizer."""
        fixed = (*loss_graph.trained, *loss_graph.held)

        def step(batch: Batch) -> tuple[Tensor, Tensor]:
            try:
                loss, bound, *slopes = graph(*fixed, self._knobs(batch), *batch)
            except LinAlgError:
                return self._move(*self._nan_loss(), rows_of(batch))
            self.run.optimizer.zero_grad()
            for p, slope in zip(loss_graph.moved, slopes, strict=True):
                p.grad = slope
            return self._move(loss.reshape(()), bound, rows_of(batch))

        return step

    def _move(self, loss: Tensor, bound: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The optimizer's step with the gradients that the parameters hold, if they and the loss are finite."""
        run = self.run
        if self.shares is not None:
            loss, bound, good = self.shares.reduce(loss, bound, run.trained, rows, run.names)
        else:
            slopes = (p.grad for p in run.trained if p.grad is not None)
            good = bool(loss.isfinite()) and all(bool(slope.isfinite().all()) for slope in slopes)
        if good:
            self.settle()
            if self.clip is not None:
                nn.utils.clip_grad_norm_([p for p in run.trained if p.grad is not None], self.clip)
            run.optimizer.step()
            if run.average is not None:
                run.average.take(run.trained)
            if self._update is not None:
                self._update.recount()
        run.optimizer.zero_grad()
        return (loss, bound.reshape(())) if good else self._nan_loss()

    def _nan_loss(self) -> tuple[Tensor, Tensor]:
        """On the device of the other losses, with which it is read."""
        nan = torch.tensor(math.nan, device=self.run.trained[0].device)
        return nan, nan

    def _compiled(self, loss_graph: LossGraph, batch: Batch) -> _Way:
        """Loss, gradients and update as one compiled graph, if the update can be part of it."""
        read = (*loss_graph.trained, *loss_graph.held)
        n, where = len(loss_graph.trained), [t.data_ptr() for t in read]
        kept = [t.detach() for t in loss_graph.held]
        held = (*kept, self._knobs(batch), *batch)
        update = None if self.shares else update_of(self.run.optimizer, list(loss_graph.moved))
        if update is None:
            return _Way(self._with_optimizer(loss_graph, compiled(loss_graph.graph, *loss_graph.trained, *held)))
        average = self.run.average
        means = [None] * len(loss_graph.moved) if average is None else [[mean] for mean in average.of(loss_graph.moved)]
        state = [[*moments, *(mean or [])] for moments, mean in zip(update.moments, means, strict=True)]
        moving = [*(p.detach() for p in loss_graph.trained), *(m for moments in state for m in moments)]
        hyper, sizes = self._hyper(update, 1), [len(moments) for moments in state]
        with buffers_kept(self.run.model, self.run.guide):
            whole = _with_update(loss_graph, update, sizes, self.clip, (*_copies(moving), hyper, *held))
            fast = compiled(whole, *_copies(moving), hyper, *held)
            _compare(whole, fast, hyper, moving, len(loss_graph.trained), held)

        def step(batch: Batch) -> tuple[Tensor, Tensor]:
            if where != (now := [t.data_ptr() for t in read]):  # user code has assigned p.data
                where[:], moving[:n] = now, (t.detach() for t in read[:n])
                kept[:] = (t.detach() for t in read[n:])
            self._taken += 1
            hyper = self._hyper(update, self._taken)
            loss, bound = fast(*moving, hyper, *kept, self._knobs(batch), *batch)
            return loss, bound

        return _Way(step, update, len(update.hyper(1)))


def _copies(tensors: list[Any]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _with_update(
    loss_graph: LossGraph, update: Update, sizes: list[int], clip: float | None, example: tuple[Tensor, ...]
) -> Graph:
    """The graph of a full step: (trained, states, hyper, held, knobs, batch) to (loss, bound), written in place.

    The state of a parameter, of the given size, is its moments, and its average if there is one.
    """
    n = len(loss_graph.trained)
    witnesses = Witnesses(loss_graph.graph, first=2)
    place_of = {p: i for i, p in enumerate(loss_graph.trained)}
    places = [place_of[p] for p in loss_graph.moved]

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        end = n + sum(sizes)
        trained, moments, hyper = flat[:n], iter(flat[n:end]), flat[end]
        loss, bound, *slopes = witnesses.graph.module(*trained, *flat[end + 1 :])
        slopes, extra = slopes[: len(places)], slopes[len(places) :]
        good = loss.isfinite() & witnesses.finite(extra)
        if clip is not None:
            norm = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
            slopes = [slope * (clip / (norm + 1e-6)).clamp(max=1.0) for slope in slopes]
        for i, (place, slope, size) in enumerate(zip(places, slopes, sizes, strict=True)):
            old = [trained[place], *(next(moments) for _ in range(size))]
            end, numbers = 1 + len(update.moments[i]), hyper[i if len(hyper) > 1 else 0]
            new = update.apply(i, old[0], slope, old[1:end], numbers[:-1])
            new += [mean + numbers[-1] * (new[0] - mean) for mean in old[end:]]
            for before, after in zip(old, new, strict=True):
                before.copy_(torch.where(good, after, before))
        nan = torch.full_like(loss, math.nan)
        return torch.where(good, loss, nan).reshape(()), torch.where(good, bound, nan).reshape(())

    graph = capture(step, *example, *loss_graph.graph.constants)
    return Graph(graph.module, (*loss_graph.graph.constants, *graph.constants))


def _compare(
    whole: Graph, fast: Callable[..., Outputs], hyper: Tensor, moving: list[Tensor], n: int, held: tuple[Tensor, ...]
) -> None:
    """Raise CannotCompile unless a step of the compiled graph changes copies as the traced one does.

    Adam's first step is the sign of the gradient, and rounding changes the sign of a gradient that is almost zero: so
    changes of parameters are compared loosely, loss and moments strictly.
    """

    def once(run: Callable[..., Outputs], moves: bool) -> Outputs:
        copies = _copies(moving)
        values = run(*copies, hyper, *held)
        return tuple(a - b for a, b in zip(copies[:n], moving, strict=False)) if moves else (*values, *copies[n:])

    for moves, tolerance in ((False, None), (True, 0.5)):
        if not agrees(partial(once, whole, moves), partial(once, fast, moves), tolerance):
            raise CannotCompile("the compiled graph gives other numbers than the traced one")
