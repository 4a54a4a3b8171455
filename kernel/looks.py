"""Check of a model and guide on given data: their layout, or the reason why they do not run.

A guide that holds a value per data point (an AutoGuide of local latents, ``pyro.param("loc", torch.zeros(50))``) fits
only the data that it was made for. PyTorch's error is then about broadcasting; the error here names the guide.
"""

from __future__ import annotations

__all__ = ["Held", "Incoming", "held_by", "layout_on", "look_at", "warn_of_no_plate"]

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoGaussian, AutoGuideList, AutoStructured
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import nn
from torch.distributions import constraints

from jensen.missing import expect_holes, has_holes, same_values

from .arguments import Batch, check_tensors, explained, misfit, other_lengths, rows_of
from .caller import outside
from .layout import Layout
from .modes import buffers_kept
from .parameters import ParametersRead, is_autoguide, owners_of
from .randomness import forked_rng
from .sites import AtMode, base_of, plates_of, sites_of
from .supports import bounds_of
from .weights import Program, check_pair, model_sites, observed_sites, trace_pair


def look_at(model: Program, guide: Program, data: Batch) -> Layout:
    """:func:`check_pair` with errors that relate to the arguments or to the number of data points.

    Raises:
        TypeError: for a call that does not match a program's arguments.
        ValueError: for a guide that holds values for other data, and as :func:`check_pair`.
    """
    check_tensors(data)
    _refuse(_held_by_autoguide(model, guide, data))
    try:
        return check_pair(model, guide, *data)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and (sentence := misfit(guide, "guide", data) or misfit(model, "model", data)):
            raise TypeError(sentence + other_lengths([list(x.shape) for x in data])) from error
        if isinstance(error, RuntimeError | ValueError):
            _refuse(_held_by_parameters(model, guide, data))
        with explained(data):
            raise


def layout_on(model: Program, guide: Program, data: Batch, rows: int) -> Layout | Exception:
    """The layout of model and guide on the first rows of their data, all checked; or the error that they raise."""
    try:
        return look_at(model, guide, tuple(x[:rows] for x in data))
    except (IndexError, RuntimeError, ValueError) as error:
        return error


@torch.no_grad()
def warn_of_no_plate(model: Program, guide: Program, data: Batch) -> None:
    """Warn of independent latent values for each row without a plate: all rows are then one data point.

    A site counts if its distribution treats rows as independent and its rows decrease with those of the data.
    """
    n = len(data[0]) if data else 0
    if n < 3:
        return
    try:
        with forked_rng(), buffers_kept(model, guide):
            pairs = [trace_pair(model, guide, tuple(x[:rows] for x in data)) for rows in (n, n - 1)]
    except (IndexError, RuntimeError, TypeError, ValueError):  # other rows do not run
        return
    if any(site["cond_indep_stack"] for trace in pairs[0] for site in sites_of(trace)):
        return
    lengths = [{s["name"]: tuple(base_of(s["fn"]).batch_shape[:1]) for s in sites_of(q)} for _, q in pairs]
    local = [name for name, length in lengths[0].items() if (length, lengths[1].get(name)) == ((n,), (n - 1,))]
    if local:
        warnings.warn(
            f"there is no plate around the data, so its {n} rows are one data point: bounds and log p(x) are joint "
            f"over all rows. If rows are independent, sample {' and '.join(local)} (and observe x) in "
            "pyro.plate('data', len(x), dim=-1), with one to_event dimension less",
            stacklevel=outside(),
        )


class Incoming:
    """The check of batches as they come, at the cost of a sum: shape, type, finite values, support.

    The model and guide are run (:func:`check_pair`) only on a batch with missing values, on one that fails, and, in the
    first epoch, on every batch if a site observes something else than a tensor of the data in a fixed support.

    Args:
        model: the model.
        guide: its guide.
        first: a batch that is checked already, on the device of model and guide.
    """

    def __init__(self, model: Program, guide: Program, first: Batch) -> None:
        self.model, self.guide, self._device = model, guide, [x.device for x in first]
        self._form = [(x.dtype, x.shape[1:]) for x in first]
        self._supports: list[tuple[int, Any]] = []
        self._holed = {i for i, x in enumerate(first) if has_holes(x)}  # tensors with missing values
        with forked_rng(), torch.no_grad(), buffers_kept(model, guide):
            seen = observed_sites(model, guide, first)
        self._run = not all(self._known(site["fn"], site["value"], first) for site in seen)

    def _known(self, fn: Any, value: Any, first: Batch) -> bool:
        """Whether the data of a site can be checked without a run of the model."""
        try:
            support = fn.support
        except NotImplementedError:
            return True
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is constraints.real or (support is constraints.real_vector):
            return True
        for i, x in enumerate(first):
            if (
                isinstance(value, torch.Tensor)
                and value.numel() == x.numel()
                and same_values(value.reshape(x.shape), x)
            ):
                if bounds_of(fn) or support.event_dim:
                    return False
                self._supports.append((i, support))
                return True
        return False

    def __call__(self, batch: Batch, rows: torch.Tensor, epoch: int = 0) -> bool:
        """Check a batch; returns whether it is the first one with missing values.

        Args:
            batch: the batch.
            rows: the numbers of its rows, for the message.
            epoch: how many complete passes were checked before.

        Raises:
            ValueError: if model and guide do not run on it.
        """
        if [(x.dtype, x.shape[1:]) for x in batch] != self._form:
            came = [f"{x.dtype} {list(x.shape[1:])}" for x in batch]
            raise ValueError(
                f"the data points of {_numbered(rows)} have the types and shapes {came}, but those of the first batch "
                f"{[f'{dtype} {list(shape)}' for dtype, shape in self._form]}: make them alike"
            )
        odd = {i for i, x in enumerate(batch) if x.is_floating_point() and not bool(x.sum().isfinite())}
        holed = {i for i in odd if has_holes(batch[i])}
        wrong = holed - self._holed or any(bool(batch[i].isinf().any()) for i in odd)
        wrong = wrong or any(not _inside(support, batch[i], i in holed) for i, support in self._supports)
        new = bool(holed) and not self._holed
        self._holed |= holed
        if new:
            expect_holes(*batch)
        if wrong or (self._run and not epoch):
            try:
                with forked_rng(), buffers_kept(self.model, self.guide):
                    moved = (x.to(device) for x, device in zip(batch, self._device, strict=True))
                    check_pair(self.model, self.guide, *moved)
            except ValueError as error:
                raise ValueError(f"{error} (positions are those in a batch, of {_numbered(rows)})") from error
        return new


def _inside(support: Any, x: torch.Tensor, holed: bool) -> bool:
    inside = support.check(x)
    return bool((inside | x.isnan() if holed else inside).all())


def _numbered(rows: torch.Tensor) -> str:
    return f"rows {', '.join(map(str, rows[:3].tolist()))}{', ...' * (len(rows) > 3)}"


class Held(NamedTuple):
    """Where a guide holds values, one for each of ``size`` data points, and the number ``came`` of the given data."""

    guide: str
    size: int
    where: str
    came: int

    def __str__(self) -> str:
        return f"{self.guide} holds a value for each of {self.size} data points ({self.where})"


def held_by(model: Program, guide: Program, data: Batch) -> Held | None:
    """The values that a guide holds for other data, if they are why it does not run on these."""
    return _held_by_autoguide(model, guide, data) or _held_by_parameters(model, guide, data)


def _refuse(held: Held | None) -> None:
    if held is not None:
        raise ValueError(
            f"{held}, but got {held.came}: use a guide that computes q(z | x) from x (jensen.guides.amortize), or fit "
            "a new guide of this kind to these data"
        )


def _held_by_autoguide(model: Program, guide: Program, data: Batch) -> Held | None:
    """An AutoGuide holds values for other data if the plate of a latent had another size at its first call.

    A run would not show this: a guide made for one data point broadcasts to any number.
    """
    made = [part for part in _autoguides(guide) if part.prototype_trace is not None]
    if not made:
        return None
    try:
        with forked_rng(), AtMode():
            sites = {site["name"]: site for site in model_sites(model, *data)}
    except Exception:  # the check of the model reports its errors
        return None
    for part in made:
        for name, frames in _plates_at_first(part):
            now = {f.name: f.full_size or f.size for f in plates_of(sites[name])} if name in sites else {}
            for frame in frames:
                size = frame.full_size or frame.size
                if (came := now.get(frame.name, size)) != size:
                    where = f"site '{name}', plate '{frame.name}'"
                    return Held(f"the {type(part).__name__} (an AutoGuide)", size, where, came)
    return None


def _plates_at_first(guide: Any) -> Iterator[tuple[str, set[CondIndepStackFrame]]]:
    """The latent sites of an AutoGuide that holds values, and the plates around them at its first call."""
    if isinstance(guide, AutoStructured):  # both classes empty the sites of their trace
        for name, kept in guide._sorted_sites:
            yield name, {frame for frame in kept["cond_indep_stack"] if frame.vectorized}
    elif isinstance(guide, AutoGaussian):
        for name in guide._unconstrained_event_shapes:
            yield name, set(guide._plates[name])
    else:
        for name, site in guide.prototype_trace.iter_stochastic_nodes():
            yield name, plates_of(site)


def _autoguides(guide: Program) -> Iterator[Any]:
    """The AutoGuides that hold values: the guide itself, or the parts of a list."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            yield from _autoguides(part)
    elif is_autoguide(guide):
        yield guide


def _held_by_parameters(model: Program, guide: Program, data: Batch) -> Held | None:
    """A parameter of the guide itself, not of a layer, has a value for each of other data.

    An experiment proves it: the guide runs if the rows are repeated to the number of values, and fails if they are
    repeated to the given number.
    """
    n = rows_of(data)
    for name, shape in _own_parameters(model, guide, data).items() if data else ():
        for size in sorted({size for size in shape if size not in (1, n)}):
            few = torch.arange(max(size, n)) % min(size, n)
            if _runs(model, guide, data, few[:size]) and not _runs(model, guide, data, few[:n]):
                return Held("the guide", size, f"parameter '{name}' of shape {list(shape)}", n)
    return None


def _own_parameters(model: Program, guide: Program, data: Batch) -> dict[str, torch.Size]:
    """Names and shapes of the parameters that a guide holds itself or reads by ``pyro.param``, without layers."""
    with forked_rng(), torch.no_grad(), ParametersRead() as reads, suppress(Exception):
        guide(*data)
    own, store = {}, pyro.get_param_store()
    modules = [module for owner in owners_of(guide) for module in owner.modules()]
    in_modules = {id(p) for module in modules for p in module.parameters(recurse=False)}
    for p in reads.parameters:
        if id(p) not in in_modules and (name := store.param_name(p)):
            own[name] = p.shape
    for module in modules:
        if not any(
            kind.__module__.startswith("torch.nn.modules") and kind is not nn.Module for kind in type(module).__mro__
        ):
            own |= {k.removesuffix("_unconstrained"): p.shape for k, p in module.named_parameters(recurse=False)}
    return own


def _runs(model: Program, guide: Program, data: Batch, rows: torch.Tensor) -> bool:
    try:
        check_pair(model, guide, *(x.index_select(0, rows.to(x.device)) for x in data))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return True
