r"""Whether the loss of a batch is the sum, or the mean, of the losses of its parts.

.. math:: \nabla L(x_{1..B}) = \sum_r \nabla L(x_r) \quad\text{or}\quad
          \nabla L(x_{1..B}) = \sum_r \frac{B_r}{B} \nabla L(x_r)

Both sides are computed, with the same noise in every row, so that no random number hides a difference; and with
parameters a little beside those of the run, where no term is zero by its initialization.
"""

from __future__ import annotations

__all__ = ["divided"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jensen import processes
from jensen.kernel.batches import Batches
from jensen.kernel.layout import Layout
from jensen.kernel.modes import buffers_kept, tensors_kept
from jensen.kernel.parameters import is_autoguide
from jensen.kernel.randomness import forked_rng

from .checkpoint import Run
from .gradients import knobs_of, loss_and_bound
from .objectives import Objective

Kind = Literal["sum", "mean", "whole"]

_NUDGE = 0.05


def divided(run: Run, objective: ELBO, layout: Layout, data: Batches) -> tuple[Kind, str]:
    """Whether losses of parts of a batch are summed or averaged; else ``"whole"``, and why batches are not divided."""
    if not data.tensors:
        return "whole", "the model holds its data"
    if not layout.sizes:
        return "whole", "a latent site is outside of the plate of the data"
    if isinstance(objective, Objective) and objective.coupled:
        return "whole", f"{type(objective).__name__} does not sum over the data points of a batch"
    if is_autoguide(run.guide):
        return "whole", f"{type(run.guide).__name__} holds a value for each data point"
    data = data._replace(source=None)  # the first rows of a source
    kinds: set[Kind] = {"sum", "mean"}
    size = min(data.size, data.n)
    for rows in {size, data.n % size} - {0, 1}:
        parts = [part for part in torch.arange(rows, device="cpu").tensor_split(processes.count()) if len(part)]

        def slopes(part: Tensor) -> list[Tensor]:
            return _loss_and_slopes(run, objective, layout, data, part)

        with _nudged(run.trained), forked_rng(), buffers_kept(run.model, run.guide):
            try:
                whole = slopes(torch.arange(rows, device="cpu"))
            except _ERRORS:
                return "whole", "its loss cannot be computed with equal noise in all rows"
            try:
                own = [slopes(part) for part in parts]
            except _ERRORS:
                return "whole", f"model and guide do not run on {len(parts[-1])} of the {rows} rows of a batch"
        weights: dict[Kind, list[float]] = {
            "sum": [1.0] * len(parts),
            "mean": [len(part) / rows for part in parts],
        }
        kinds = {kind for kind in kinds if _equal(whole, own, weights[kind])}
    if not kinds:
        return "whole", "the loss of a batch is not the sum of those of its parts"
    return ("sum" if "sum" in kinds else "mean"), ""


_ERRORS = (IndexError, RuntimeError, ValueError, NotImplementedError)


def _loss_and_slopes(run: Run, objective: ELBO, layout: Layout, data: Batches, rows: Tensor) -> list[Tensor]:
    """The loss on some rows, and its gradient in each parameter, with equal noise in all rows."""
    moving = [p for p in run.trained if p.requires_grad]

    def measured() -> tuple[Tensor, Tensor]:
        batch = data.take(rows)
        return loss_and_bound(run, objective, layout, batch, knobs_of(objective, run.history.steps, batch))

    measured()  # the first run with its own noise: it chooses how particles run
    with _EqualNoise():
        loss, bound = measured()
        found = torch.autograd.grad(loss, moving, allow_unused=True) if loss.requires_grad else [None] * len(moving)
    slopes = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(moving, found, strict=True)]
    return [loss.detach(), bound.detach(), *slopes]


def _equal(whole: list[Tensor], parts: list[list[Tensor]], weights: list[float]) -> bool:
    """Whether each quantity of the whole is the weighted sum of those of the parts, up to rounding."""
    for value, *own in zip(whole, *parts, strict=True):
        terms = [weight * x for weight, x in zip(weights, own, strict=True)]
        size = sum(float(x.abs().max()) for x in (value, *terms) if x.numel())
        tolerance = size * (1e-9 if value.dtype in (torch.float64, torch.complex128) else 1e-3)
        error = (value - sum(terms)).abs()
        if not bool((error <= tolerance).all()):
            return False
    return True


@contextmanager
def _nudged(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block, the parameters have values nearby."""
    generator = torch.Generator().manual_seed(0)
    with tensors_kept(parameters):
        with torch.no_grad():
            for p in parameters:
                if p.is_floating_point() and p.numel():
                    noise = torch.randn(p.shape, generator=generator).to(p)
                    p.add_(_NUDGE * (p.abs().mean() + _NUDGE) * noise)
        yield


class _EqualNoise(TorchDispatchMode):
    """Random numbers that are equal in all rows, and the same for every number of rows; others in every call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._calls += 1
        torch.manual_seed(self._calls)
        name = func._schema.name.removeprefix("aten::")
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if func._schema.is_mutable and given[0] is args[0] and len(given) == 1:
            if name == "bernoulli_":  # dropout: keep all
                return args[0].fill_(1.0)
            return args[0].copy_(func(args[0].new_empty(()), *args[1:], **kwargs))
        u, e = (0.2 + 0.6 * float(torch.rand(()))), float(torch.randn(()))
        if name in _OF:
            return _OF[name](u, e, *args)
        if func._schema.is_mutable and name == "bernoulli_":
            return args[0].copy_(u < args[1])
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.numel() or name == "randperm":
            return out
        fills = {"rand": u, "rand_like": u, "randn": e, "randn_like": e}
        return out.fill_(fills[name]) if name in fills else out


def _normal(u: float, e: float, mean: Any, deviation: Any = 1.0, size: Any = None, **how: Any) -> Tensor:
    scaled: Tensor = mean + deviation * e
    return scaled if size is None else torch.full(size, float(scaled))


def _multinomial(u: float, e: float, p: Tensor, count: int, replacement: bool = False, **how: Any) -> Tensor:
    if count > 1 and not replacement:
        return p.topk(count).indices
    chosen = (p.cumsum(-1) < u * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return chosen.clamp_max(p.shape[-1] - 1).expand(*p.shape[:-1], count).clone()


def _dropout(u: float, e: float, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    return x / (1 - p) if train else x.clone(), torch.ones_like(x, dtype=torch.bool)


_OF: dict[str, Callable[..., Any]] = {  # samples with parameters, from a uniform and a normal number
    "bernoulli": lambda u, e, p, q=None, **how: (u < p).to(p.dtype) if q is None else torch.full_like(p, float(u < q)),
    "binomial": lambda u, e, count, p, **how: torch.minimum((count * p + u).floor(), count),
    "multinomial": _multinomial,
    "native_dropout": _dropout,
    "normal": _normal,
    "poisson": lambda u, e, rate, **how: (rate + u).floor(),
    "_sample_dirichlet": lambda u, e, c, **how: c / c.sum(-1, keepdim=True),
    "_standard_gamma": lambda u, e, shape, **how: shape * (0.5 + u),
}
