"""The walk through the data: what is run at once, on which rows, and whether the pair can be run so.

:func:`stream` is the only loop over data that a measurement has. It knows which pairs run on a part of their data and
which on all or none (AutoGuides, guides with a value for each datum, joint weights, pairs that hold their data and are
called without any), looks at every datum before it is run, and shows how far it is.
"""

from __future__ import annotations

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "Device",
    "Part",
    "Transform",
    "as_tensors",
    "check_rows",
    "chunks_of",
    "data_in",
    "data_in_epoch",
    "in_cache",
    "layout_on",
    "listed",
    "nested",
    "place_of",
    "placed",
    "rows_of",
    "stream",
]

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jensen.checked import shown
from jensen.progress import progress_bar

from .arguments import Batch, Data, as_tensors, in_a_line, rows_of
from .caller import outside
from .layout import Layout
from .looks import layout_on, look_at
from .measured import in_full, without_penalties
from .parameters import is_autoguide, tensors_of
from .randomness import derived_seed, forked_rng
from .sites import enclosing_plates, plates_of, sites_of
from .weights import Pair, Program, check_pair, trace_pair

Device = torch.device | str | None
Transform = Callable[[Tensor], Tensor]

_CACHE = 2**23  # bytes: measured to be near the best for decoders of 64 to 784 features
_LOOKED_AT = 512  # data on which a pair is checked at once


def placed(tensors: Iterable[Tensor], device: Device, transform: Transform | None) -> tuple[Tensor, ...]:
    """Tensors on their device, the first of them transformed."""
    moved = tuple(x if device is None else x.to(device) for x in tensors)
    if transform is None:
        return moved
    if not moved:
        raise ValueError("batch_transform is applied to the first tensor of the data, but there are none, ()")
    try:
        made = transform(moved[0])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"batch_transform fails on a tensor of shape {list(moved[0].shape)} ({in_a_line(error)}): it is called "
            "with the first tensor of a batch, and returns one with as many rows"
        ) from error
    if not isinstance(made, Tensor) or made.shape[:1] != moved[0].shape[:1]:
        raise TypeError(
            f"batch_transform returns a tensor with a row for each of its input, of shape {list(moved[0].shape)}, but "
            f"it returned {shown(made)}"
        )
    return (made, *moved[1:])


def place_of(tensors: tuple[Tensor, ...], device: Device, *programs: Program) -> torch.device:
    """The device that data are run on; where there are none, that of the programs' parameters."""
    if device is not None:
        return torch.device(device)
    known = tensors or tensors_of(*programs)
    return known[0].device if known else torch.device("cpu")


class Batches(NamedTuple):
    """Data, how many rows a batch takes, where it goes, and what happens to its first tensor.

    No tensors at all are one batch without any.
    """

    tensors: tuple[Tensor, ...]
    size: int
    device: Device
    transform: Transform | None

    @property
    def n(self) -> int:
        """The number of data."""
        return rows_of(self.tensors)

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batch of these rows."""
        return placed((x.index_select(0, rows.to(x.device)) for x in self.tensors), self.device, self.transform)

    def first(self) -> tuple[Tensor, ...]:
        """The batch of the first rows."""
        return self.take(torch.arange(min(self.size, self.n)))

    def shuffled(self) -> tuple[Tensor, ...]:
        """Rows of shuffled batches; all in their own order if they fit one, as guides with a value per datum need."""
        return torch.randperm(self.n).split(self.size) if self.size < self.n else (torch.arange(self.n),)


def in_cache(tensors: tuple[Tensor, ...], numbers: int = 1) -> int:
    """How many (datum, particle) pairs to run at once: so many that a value for each feature stays in cache.

    Without tensors: how many particles, where all data together are so many numbers.
    """
    if not tensors:
        return max(1, 8192 // max(1, numbers))
    size = max(x[0].numel() for x in tensors) * tensors[0].element_size()  # bytes
    return max(256, min(8192, _CACHE // max(1, size)))


def chunks_of(particles: int, most: int) -> list[int]:
    """So many particles in chunks of at most ``most``, all alike where a divisor is near: they share a graph then."""
    most = max(1, min(particles, most))
    size = next((k for k in range(most, most // 2, -1) if particles % k == 0), most)
    return [min(size, particles - first) for first in range(0, particles, size)]


def nested(layout: Layout, max_plate_nesting: int | None) -> Layout:
    """A layout with room for so many plates, where the user says so.

    Raises:
        ValueError: if that is less than the pair's plates take.
    """
    if max_plate_nesting is None:
        return layout
    if max_plate_nesting < layout.nesting:
        raise ValueError(
            f"max_plate_nesting={max_plate_nesting}, but the pair's plates take {layout.nesting} dimensions: give at "
            "least that, or leave it out"
        )
    return layout._replace(nesting=max_plate_nesting)


@dataclass
class Part:
    """Some rows of the data, which are run together.

    Attributes:
        data: their tensors, the first dimension n; none where the pair holds its data, n being then what its plate
            says (1 for joint weights).
        first: the number of the first of them in all the data.
        layout: how the pair is laid out on data like these.
        size: how many rows a part has; the last one may have fewer.
        ahead: how many parts of that size are to come, with this one.
        at_once: how many (datum, particle) pairs are run at once.
        joint: whether the pair's weights are joint, one for all data.
        advance: says how many units of progress are done.
        pair: the pair, as it is run: on all data, and without factors that are no density (see
            :mod:`~jensen.kernel.measured`).
    """

    data: Batch
    first: int
    layout: Layout
    size: int
    ahead: int
    at_once: int
    joint: bool
    advance: Callable[[int], None]
    pair: Pair = field(repr=False)
    _proven: bool = field(repr=False)

    def __len__(self) -> int:
        return len(self.data[0]) if self.data else self.size

    @property
    def rows(self) -> slice:
        """Its place in all the data."""
        return slice(self.first, self.first + len(self))

    def chunks(self, particles: int) -> list[int]:
        """So many particles of each of its data, in chunks that are run at once."""
        return chunks_of(particles, self.at_once // self.size)

    @cached_property
    def divisible(self) -> bool:
        """Whether the pair runs on some of these data alone."""
        half = len(self) // 2
        if self.joint or not self.data or is_autoguide(self.pair.guide):
            return False
        if self._proven or not half:
            return True
        layout = layout_on(self.pair.model, self.pair.guide, self.data, half)
        return isinstance(layout, Layout) and layout.sizes == (half,)


def stream(
    model: Program,
    guide: Program,
    data: Batch,
    what: str,
    *,
    at_once: int,
    together: int = 1,
    most: int | None = None,
    weights: Literal["per datum", "any", "none"] = "per datum",
    units: int | None = 1,
    max_plate_nesting: int | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Iterator[Part]:
    """Walk through the data, part after part, each of about the same size.

    All data are one part for joint weights, for AutoGuides, for a guide that fits all of them only (it holds a value
    for each), and for a pair that holds its data.

    Args:
        model: any Pyro model.
        guide: its guide.
        data: tensors whose first dimension is N, on their device; none for a pair that holds its data.
        what: what is done, in a word: what the progress bar and errors say.
        at_once: how many (datum, particle) pairs may be run at once; without data, how many particles.
        together: how many particles of a datum have to be run at once.
        most: the most rows of a part.
        weights: what the pair must yield: weights per datum; weights, be they joint; or values alone (a guide that is
            a point will do).
        units: the units of progress of a datum, all done at the end of its part unless ``Part.advance`` said so before;
            None where nobody knows, so ``advance`` counts.
        max_plate_nesting: what ``Part.layout.nesting`` is to be; None: how deep the pair's plates are nested.
        progress: whether to show a progress bar.
        seed: gives each part a random stream of its own, that of (seed, what, first row), inside a stream that is
            private already; None leaves the stream alone.

    Yields:
        The :class:`Part`.

    Raises:
        ValueError: for a guide that is a point, weights that are joint, plates that are not those of the data, a guide
            that holds a value for each of other data, and on what :func:`~jensen.kernel.weights.check_pair` names.
        TypeError: for a call that does not fit what the pair takes.
    """
    n = rows_of(data)
    rows = n if is_autoguide(guide) else min(n, max(1, at_once // together), most or n)
    layout = layout_on(model, guide, data, rows)
    if isinstance(layout, Exception):
        if rows == n:
            raise layout
        rows, layout = n, look_at(model, guide, data)
    if not data and layout.sizes:
        n = rows = layout.sizes[0]
        at_once *= n
    if weights != "none":
        _check_density(layout)
        model, guide, layout = _as_measured(model, guide, data, rows, layout)
        _check_joint(layout, what, weights == "per datum")
        check_rows(layout, data, rows)
    joint = not layout.sizes
    if not data and joint:
        n = rows = 1
    rows = n if joint else -(-n // -(-n // rows))
    looked_at = rows * max(1, _LOOKED_AT // rows)
    total = None if units is None else n * units
    pair = Pair(model, guide, layout)
    with progress_bar(what, n if data else 0, total=total, progress=progress, unit_scale=True) as bar:
        for first in range(0, n, rows):
            if first % looked_at == 0:
                some = tuple(x[first : first + looked_at] for x in data)
                layout = nested(check_pair(model, guide, *some), max_plate_nesting)
                if weights != "none" and not joint:
                    check_rows(layout, some, len(some[0]) if some else n)
            batch = tuple(x[first : first + rows] for x in data)
            if seed is not None:
                torch.manual_seed(derived_seed(seed, what, first))
            yield Part(batch, first, layout, rows, (n - first) // rows, at_once, joint, bar.update, pair, rows < n)
            if units is not None:
                bar.update(units * min(n, first + rows) - bar.n)


def _check_density(layout: Layout) -> None:
    if layout.points:
        raise ValueError(
            f"the guide is a point estimate at {list(layout.points)} (Delta): it has no density, so there is neither "
            "an ELBO nor an estimate of log p(x), nor a width to calibrate; take a guide with a density"
        )


def _as_measured(
    model: Program, guide: Program, data: Batch, rows: int, layout: Layout
) -> tuple[Program, Program, Layout]:
    """The pair to be measured, and its layout: no penalties in the guide, and all data of subsampled plates."""
    if layout.penalties:
        warnings.warn(
            f"the guide's pyro.factor {listed(layout.penalties)} is no density of a draw: training by the ELBO counts "
            "it as a penalty, but here it is left out, since the draws do not depend on it",
            stacklevel=outside(),
        )
        guide = without_penalties(guide, layout.penalties)
    if layout.factors:
        warnings.warn(
            f"the guide's pyro.factor {listed(layout.factors)} is counted as a part of log q: this is right for the "
            "log-determinant of the map from an auxiliary site to a Delta, but not for a penalty, which is no density "
            "of a draw: measure with a guide that leaves a penalty out",
            stacklevel=outside(),
        )
    if layout.subsampled:
        some = tuple(x[:rows] for x in data) if layout.sizes else data
        model, guide = in_full(model, guide, *some)
    if layout.penalties or layout.subsampled:
        layout = check_pair(model, guide, *(x[:rows] for x in data))
    return model, guide, layout


def _check_joint(layout: Layout, what: str, per_datum: bool) -> None:
    """Raise ValueError for joint weights where a number for each datum is needed; warn of a factor that joins them."""
    if layout.sizes:
        return
    factors = (
        f"the model's pyro.factor {listed(layout.joining)} stands outside the plate around all other sites: it is a "
        "part of the joint density of all data, so the weights are joint"
    )
    if per_datum:
        reason, remedy = factors, "give each datum a factor of its own inside the plate"
        if not layout.joining:
            where = f" ({listed(layout.outside)} stands outside the plate of the data)" if layout.outside else ""
            reason = f"the weights of this pair are joint{where}"
            remedy = (
                "open the model's plate over the data around every site of model and guide (a global latent stands "
                "outside of it, and so does the one site of an AutoMultivariateNormal)"
            )
        raise ValueError(f"{what} needs a number for each datum, but {reason}: {remedy}")
    if layout.joining:
        warnings.warn(f"{factors}: one number for all data", stacklevel=outside())


def check_rows(layout: Layout, data: Batch, rows: int) -> None:
    """Raise ValueError unless the weights of a batch are one for each of its rows."""
    if not data and layout.full_size is not None:
        raise ValueError(
            f"the model holds {layout.full_size} data and takes {layout.sizes[0]} of them at random at every run, so "
            "its weights are those of other data each time: measure it with a plate over all (no subsample_size)"
        )
    if not layout.sizes or layout.sizes == (rows,):
        return
    if not data:
        raise ValueError(
            f"the plates around every site have sizes {layout.sizes}, but weights are for the data of one plate: "
            "measure a model that has one plate over its data around every site"
        )
    x = data[0]
    given = f"the plates around every site have sizes {layout.sizes}, but the model was given {rows} data"
    if len(layout.sizes) > 1:
        raise ValueError(
            f"{given}: each datum needs one plate around every site, and others inside it: leave the plate of the data "
            "alone around one site, or make the other dimensions events (.to_event)"
        )
    others = [dim for dim in range(1, x.dim()) if x.shape[dim] == layout.sizes[0]]
    if others:
        dim, turned = others[0], f"x.transpose(0, {others[0]})"
        raise ValueError(
            f"{given}: the plate seems to stand over dimension {dim} of x, of shape {list(x.shape)}, but the data are "
            f"what the first dimension counts: give {turned}, with lambda x: model({turned}) for the model, and the "
            "same for the guide"
        )
    raise ValueError(
        f"{given}: take a model that has one plate over its data around every site, and does not subsample"
    )


def listed(names: tuple[str, ...]) -> str:
    """Names of sites, in quotes."""
    return ", ".join(f"'{name}'" for name in names)


def data_in(model: Program, guide: Program, data: Batch) -> tuple[int, int]:
    """How many data one run of a pair speaks of, and how many with what its plates leave out (a subsample's N).

    They are the data of its plate: the one around every site; else the one around everything observed, with a latent
    inside, if there is such a one. Of several such plates it is the one with as many data as there are rows; else all
    of them count. Without any plate they are the rows.
    """
    rows = rows_of(data)
    with torch.no_grad(), forked_rng():
        p, q = (sites_of(trace) for trace in trace_pair(model, guide, data))
    drawn = {site["name"] for site in q if not site["is_observed"]}
    plates = set(enclosing_plates([*p, *q]))
    observed = [plates_of(site) for site in p if site["is_observed"] and site["name"] not in drawn]
    if not plates and observed:
        around = set.intersection(*observed)
        latent = [plates_of(site) for site in p if not site["is_observed"] or site["name"] in drawn]
        plates = set().union(*(frames & around for frames in latent)) or around
    plates = {frame for frame in plates if frame.size > 0}  # one without a size has that of the data
    plates = {frame for frame in plates if frame.size == rows} if data and rows in {f.size for f in plates} else plates
    if not plates:
        return rows, rows
    return math.prod(f.size for f in plates), math.prod(f.full_size or f.size for f in plates)


def data_in_epoch(model: Program, guide: Program, data: Batches) -> tuple[int, int]:
    """The sums of :func:`data_in` over all batches, which differ from the first in the size of the last alone."""
    full, rest = divmod(data.n, min(data.size, data.n))
    first = data_in(model, guide, data.first())
    last = data_in(model, guide, data.take(torch.arange(rest))) if rest else (0, 0)
    return full * first[0] + last[0], full * first[1] + last[1]
