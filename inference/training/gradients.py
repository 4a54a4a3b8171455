"""Loss and gradients as one traced graph, if that is possible."""

from __future__ import annotations

__all__ = ["LossGraph", "capture_loss", "knobs_of", "loss_and_bound", "loss_is_finite", "obstacle"]

from collections.abc import Collection
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from jensen.graphs.capture import CannotCapture, Graph, agrees, capture
from jensen.kernel.batches import Batch
from jensen.kernel.layout import Layout
from jensen.kernel.modes import buffers_kept
from jensen.kernel.parameters import own_modules, tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import in_plate
from jensen.kernel.weights import scaled_elbo

from .checkpoint import Run
from .objectives import Objective


class LossGraph(NamedTuple):
    """A graph of (trained, held, knobs, batch) to (loss, bound, gradients), and its inputs.

    Attributes:
        graph: the graph.
        trained: the parameters that the run updates, all that require a gradient.
        held: the other tensors of model and guide: buffers, frozen parameters.
        moved: those of ``trained`` that have a gradient, in the order of the gradients.
    """

    graph: Graph
    trained: tuple[nn.Parameter, ...]
    held: tuple[Tensor, ...]
    moved: tuple[nn.Parameter, ...]


def knobs_of(objective: ELBO, step: int, batch: Batch) -> Tensor:
    """The knobs of the loss at a step, on the device of a batch; Pyro's own losses have none."""
    device = batch[0].device if batch else None
    if isinstance(objective, Objective):
        return objective.knobs(step, device)
    return torch.empty(0, dtype=torch.float64, device=device)


def loss_and_bound(run: Run, objective: ELBO, layout: Layout, batch: Batch, knobs: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of an objective on a batch, with its gradient, and the bound: two scalars.

    The bound of Pyro's own losses is minus the loss.
    """
    if isinstance(objective, Objective):
        return objective.loss_and_bound(run.model, run.guide, *batch, knobs=knobs, max_plate_nesting=layout.nesting)
    loss: Tensor = objective.differentiable_loss(run.model, run.guide, *batch)  # type: ignore[attr-defined]
    return loss, -loss.detach().reshape(())


def obstacle(run: Run, objective: ELBO, layout: Layout, replaced: Collection[nn.Parameter] = ()) -> str:
    """Why loss and gradients cannot be traced, as far as the sites show; else empty.

    Parameters that were ``replaced`` belonged to modules of model or guide, and no longer count.
    """
    kind = type(objective)
    if kind is not Trace_ELBO and not isinstance(objective, Objective):
        return f"{kind.__name__} reads values during the run; Trace_ELBO and jensen.inference.Objective can be traced"
    if layout.enumerated:
        return f"the sites {list(layout.enumerated)} are enumerated"
    if layout.scored:
        return f"the sites {list(layout.scored)} have no rsample, and need their score"
    owned = {p for owner in own_modules(run.model, run.guide) for p in owner.parameters()}
    if not owned.union(replaced).issuperset(run.trained):
        return "pyro.param or pyro.module makes parameters that belong to no module that is the model or the guide"
    return ""


def capture_loss(run: Run, objective: ELBO, layout: Layout, batch: Batch, state: PlainState) -> LossGraph:
    """Trace loss and gradients for the shapes of a batch, and compare them with the objective's own.

    Raises:
        CannotCapture: if they depend on values, a run changes the programs' state, or the graph gives other numbers.
    """
    trained = tuple(p for p in run.trained if p.requires_grad)
    ids, step = set(map(id, trained)), run.history.steps
    held = tuple(t for t in tensors_of(run.model, run.guide) if id(t) not in ids)
    moved: list[nn.Parameter] = []
    other = tuple(x.flip(0) for x in batch)

    def value_and_gradients(*flat: Tensor) -> tuple[Tensor, ...]:
        start = len(flat) - len(batch)
        loss, bound = _traceable(run, objective, layout, flat[start:], flat[start - 1])
        if not loss.requires_grad:
            raise CannotCapture("the loss depends on no parameter")
        slopes = torch.autograd.grad(loss, trained, allow_unused=True)
        moved[:] = [p for p, slope in zip(trained, slopes, strict=True) if slope is not None]
        return (loss.detach(), bound.detach(), *(slope for slope in slopes if slope is not None))

    def itself() -> tuple[Tensor, ...]:
        with pyro.validation_enabled(False):
            loss, _ = loss_and_bound(run, objective, layout, other, knobs_of(objective, step, other))
        return (loss.reshape(()), *torch.autograd.grad(loss, moved))

    def replayed() -> tuple[Tensor, ...]:
        loss, _, *slopes = graph(*trained, *held, knobs_of(objective, step, other), *other)
        return (loss.reshape(()), *slopes)

    with buffers_kept(run.model, run.guide):
        # a first run may create state: Trace_ELBO samples once before its first loss
        if changing := state.watch_run(lambda: loss_is_finite(run, objective, layout, batch, step)):
            raise CannotCapture(changing)
        graph = capture(value_and_gradients, *trained, *held, knobs_of(objective, step, batch), *batch)
        if not agrees(itself, replayed):
            raise CannotCapture("the traced graph gives other numbers than the model itself")
    return LossGraph(graph, trained, held, tuple(moved))


def _traceable(run: Run, objective: ELBO, layout: Layout, batch: Batch, knobs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and bound in a form that can be traced: Pyro's own Trace_ELBO reads values."""
    model, guide = run.model, run.guide
    if isinstance(objective, Objective):
        return loss_and_bound(run, objective, layout, batch, knobs)
    K, nesting = objective.num_particles, layout.nesting
    if K > 1 and objective.vectorize_particles:
        bound = scaled_elbo(in_plate(model, K, nesting), in_plate(guide, K, nesting), *batch) / K
    else:  # one after the other, in Pyro's order
        bound = torch.stack([scaled_elbo(model, guide, *batch) / K for _ in range(K)]).sum()
    return -bound, bound.detach()


def loss_is_finite(run: Run, objective: ELBO, layout: Layout, batch: Batch, step: int) -> bool:
    """Whether the loss on a batch is finite, with the current parameters, a step's knobs and no validation."""
    try:
        with pyro.validation_enabled(False), forked_rng(), buffers_kept(run.model, run.guide):
            loss, _ = loss_and_bound(run, objective, layout, batch, knobs_of(objective, step, batch))
    except LinAlgError:
        return False
    return bool(loss.detach().isfinite())
