"""Diagnosis of a failed training run: the first quantity that is not finite, or a bound that only decreases."""

from __future__ import annotations

__all__ = ["Falls", "first_bad"]

import warnings
from collections.abc import Iterator

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from jensen.kernel.batches import Batch
from jensen.kernel.caller import outside
from jensen.kernel.layout import Layout
from jensen.kernel.modes import buffers_kept
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import Site, base_of, score
from jensen.kernel.weights import trace_pair

from .checkpoint import Run, named_parameters
from .gradients import knobs_of, loss_and_bound
from .history import History

_DRAWS = 10  # runs that search for the quantity: it may occur only in some samples
_LISTED = 5  # rows named in the message


class _Found(Exception):
    """The description of a quantity that is not finite."""


def first_bad(run: Run, objective: ELBO, layout: Layout, batch: Batch, rows: Tensor, step: int) -> str:
    """The first quantity of a step that is not finite, as a part of a sentence; empty if none is found.

    The search covers the parameters, then the sites of guide and model in their order (parameters of the distribution,
    value, log-density), then the gradient.

    Args:
        run: the run as it was at the step.
        objective: its loss.
        layout: the layout of model and guide.
        batch: the data of the step.
        rows: the indices of these rows in all data.
        step: the number of previous steps.
    """
    found = _first_bad(run, objective, layout, batch, rows, step)
    return found and f", and the first quantity that is not finite is {found}"


def _first_bad(run: Run, objective: ELBO, layout: Layout, batch: Batch, rows: Tensor, step: int) -> str:
    names = named_parameters(run.model, run.guide)
    bad = [names.get(id(p), "a parameter") for p in run.trained if not bool(p.isfinite().all())]
    if bad:
        return f"the parameter {bad[0]}" + f" and {len(bad) - 1} others" * (len(bad) > 1)
    with pyro.validation_enabled(False), forked_rng(), buffers_kept(run.model, run.guide):
        for _ in range(_DRAWS):
            try:
                with torch.no_grad():
                    trace_pair(_Look("model", rows)(run.model), _Look("guide", rows)(run.guide), batch)
            except _Found as found:
                return str(found)
            except (LinAlgError, ValueError, NotImplementedError) as error:
                return f"a matrix or a parameter of a distribution ({str(error).splitlines()[0]})"
        try:
            return _bad_gradient(run, objective, layout, batch, step, names)
        except (LinAlgError, ValueError):
            return ""


def _bad_gradient(run: Run, objective: ELBO, layout: Layout, batch: Batch, step: int, names: dict[int, str]) -> str:
    moving = [p for p in run.trained if p.requires_grad]
    loss, _ = loss_and_bound(run, objective, layout, batch, knobs_of(objective, step, batch))
    if not bool(loss.isfinite()):
        return ""
    slopes = torch.autograd.grad(loss, moving, allow_unused=True)
    bad = [p for p, slope in zip(moving, slopes, strict=True) if slope is not None and not bool(slope.isfinite().all())]
    return f"the gradient of {names.get(id(bad[0]), 'a parameter')}" if bad else ""


class _Look(Messenger):
    """Raises :class:`_Found` at the first site whose log-density or sample is not finite."""

    def __init__(self, half: str, rows: Tensor) -> None:
        super().__init__()
        self.half, self.rows = half, rows

    def _pyro_post_sample(self, msg: Site) -> None:
        fn, value = msg["fn"], msg["value"]
        if site_is_subsample(msg) or not isinstance(value, Tensor):
            return
        density = score(msg)
        seen = msg["is_observed"] or not value.is_floating_point()
        if bool(density.isfinite().all()) and (seen or bool(value.isfinite().all())):
            return
        where = f"at the {self.half}'s site '{msg['name']}'"
        kind = type(base_of(fn)).__name__.lstrip("_")
        for name, parameter in _parameters(fn):
            if not bool(parameter.isfinite().all()):
                raise _Found(f"{name} of {kind} {where}{self._rows(parameter)}")
        what = "the log-density" if seen or bool(value.isfinite().all()) else "the value"
        raise _Found(f"{what} of {kind} {where}{self._rows(density if what != 'the value' else value)}")

    def _rows(self, of: Tensor) -> str:
        """The affected rows of the data, along the first dimension as long as the batch."""
        dim = next((d for d, size in enumerate(of.shape) if size == len(self.rows)), None)
        if dim is None:
            return ""
        bad = (~of.isfinite()).movedim(dim, 0).flatten(1).any(1) if of.dim() > 1 else ~of.isfinite()
        rows = sorted(self.rows[bad.cpu()].tolist())
        return f" for row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_LISTED]))} " + (
            f"and {len(rows) - _LISTED} others of the data" if len(rows) > _LISTED else "of the data"
        )


def _parameters(fn: object) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a distribution, and of the base of its transforms."""
    base = base_of(fn)
    for name in getattr(base, "arg_constraints", {}):
        value = base.__dict__.get(name)
        if isinstance(value, Tensor):
            yield name, value
    if hasattr(base, "base_dist"):
        yield from _parameters(base.base_dist)


class Falls:
    """Warns, once, of a bound that fell far below that of the first step: training diverged with finite numbers.

    Args:
        lr: the learning rate.
        kept: whether the best parameters are restored at the end; then only a persistent fall causes a warning.
    """

    def __init__(self, lr: float, kept: bool) -> None:
        self.lr, self.kept, self.told = lr, kept, False

    def look(self, first: float, history: History, last: bool) -> None:
        """Compare the bound of the first step, per data point, with those of the epochs."""
        half, now = history.elbo[len(history.elbo) // 2 :], history.elbo[-1]
        best = max(first, *history.elbo)
        ended = last and not self.kept and len(half) > 1
        fallen = first - now > _AMPLE * (1 + abs(first))
        fallen |= ended and first - max(half) > _LITTLE * (1 + abs(first))
        fallen |= ended and best - now > _MUCH * (1 + abs(best))
        if self.told or not fallen:
            return
        self.told = True
        warnings.warn(
            f"training diverged: the bound was {first:.4g} {history.unit} at the first step, at best {best:.4g}, and "
            f"{now:.4g} in epoch {len(history.elbo)}; lower lr={self.lr:g}, or scale the data",
            stacklevel=outside(),
        )


_AMPLE, _LITTLE, _MUCH = 10.0, 0.5, 3.0
"""Thresholds as parts of the initial bound: below the first step in any epoch, below it in the whole second half, and
from the best epoch to the last."""
