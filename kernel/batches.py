"""The loop over the data: how many rows run at once, and which models and guides can run on a part of the data.

:func:`stream` is the only loop over data in a measurement. Some models and guides run on a part of their data; others
run on all data or none (AutoGuides, guides with a value per data point, joint weights, models that hold their data).
The loop separates the two, checks every data point before it is run, and shows the progress.
"""

from __future__ import annotations

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "Device",
    "Part",
    "Placed",
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
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from jensen import processes
from jensen.checked import shown
from jensen.missing import expect_holes, has_holes
from jensen.progress import progress_bar
from jensen.sources import Mapped, Order, Source, as_source, between

from .arguments import Batch, Data, Given, as_tensors, in_a_line, rows_of
from .caller import outside
from .layout import Layout
from .looks import layout_on, look_at
from .measured import in_full, without_penalties
from .parameters import is_autoguide, tensors_of
from .randomness import derived_seed, forked_rng, private_randomness
from .sites import enclosing_plates, plates_of, sites_of
from .weights import Pair, Program, check_pair, parameters_of, trace_pair

Device = torch.device | str | None
Transform = Callable[[Tensor], Tensor]
Look = Callable[[Batch, Tensor], None]

_CACHE = 2**23  # bytes: measured as near the optimum for decoders of 64 to 784 features
_LOOKED_AT = 512  # data points checked at once


def placed(tensors: Iterable[Tensor], device: Device, transform: Transform | None) -> tuple[Tensor, ...]:
    """The tensors on their device, the first one transformed; what is missing in it (NaN) stays missing."""
    moved = tuple(x if device is None else x.to(device) for x in tensors)
    if transform is None:
        return moved
    if not moved:
        raise ValueError("batch_transform is applied to the first tensor of the data, but data is ()")
    try:
        holes = moved[0].isnan() if has_holes(moved[0]) else None
        made = transform(moved[0] if holes is None else moved[0].masked_fill(holes, 0.0))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"batch_transform fails on a tensor of shape {list(moved[0].shape)} ({in_a_line(error)}): it receives the "
            "first tensor of a batch and must return a tensor with as many rows"
        ) from error
    if not isinstance(made, Tensor) or made.shape[:1] != moved[0].shape[:1]:
        raise TypeError(
            f"batch_transform must return one row for each row of its input, of shape {list(moved[0].shape)}, but it "
            f"returned {shown(made)}"
        )
    if holes is not None:
        if made.shape != holes.shape:
            raise ValueError(
                f"batch_transform must keep the shape {list(holes.shape)} of data with missing values, but it returned "
                f"{list(made.shape)}"
            )
        made = made.masked_fill(holes, math.nan)
    return (made, *moved[1:])


def place_of(tensors: tuple[Tensor, ...], device: Device, *programs: Program) -> torch.device:
    """The device on which the data are run; without data, the device of the programs' parameters."""
    if device is not None:
        return torch.device(device)
    known = tensors or tensors_of(*programs)
    return known[0].device if known else torch.device("cpu")


class Batches(NamedTuple):
    """The data, the rows per batch, the device, and the transform of the first tensor.

    Data without tensors are one batch without tensors. Data of a source are read by the batch; ``tensors`` are then its
    first rows.
    """

    tensors: tuple[Tensor, ...]
    size: int
    device: Device
    transform: Transform | None
    source: Source | None = None

    @classmethod
    def of(cls, data: Given, size: int, device: Device, transform: Transform | None) -> Batches:
        """The batches of tensors, or of data that are read by the batch, which may have a size of their own."""
        source = as_source(data)
        if source is None:
            return cls(as_tensors(cast(Data, data), held=True), size, device, transform)
        size = source.size or size
        return cls(as_tensors(source.head(size)), size, device, transform, source)

    @property
    def known(self) -> int | None:
        """The number of data points; None for a stream in its first pass."""
        return rows_of(self.tensors) if self.source is None else self.source.n

    @property
    def n(self) -> int:
        """The number of data points; a stream that was not counted yet is counted by a pass."""
        known = self.known
        if known is None:
            assert self.source is not None
            return self.source.survey().n
        return known

    def facts(self) -> list[str]:
        """Words that differ if data differ, to compare those of several processes."""
        named = [] if self.source is None else [repr(self.source)]
        return [*named, *processes.facts_of(self.tensors)]

    @property
    def whole(self) -> bool:
        """Whether one batch has all data."""
        known = self.known
        return known is not None and known <= self.size

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batch of the given rows; not of a source."""
        return placed((x.index_select(0, rows.to(x.device)) for x in self.tensors), self.device, self.transform)

    def head(self, rows: int) -> tuple[Tensor, ...]:
        """The batch of the first rows."""
        if self.source is None:
            return self.take(torch.arange(min(rows, self.n), device="cpu"))
        return placed(self.source.head(rows), self.device, self.transform)

    def first(self) -> tuple[Tensor, ...]:
        """The first batch."""
        return self.head(self.size)

    def in_order(self, rows: int, first: int = 0, last: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The data from one row to another in their order, ``rows`` at a time."""
        if self.source is None:
            return map(self.take, torch.arange(self.n, device="cpu")[first:last].split(rows))
        return (placed(batch, self.device, self.transform) for batch in self.source.in_order(rows, first, last))

    def epoch(self, order: Order, look: Look | None = None) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Shuffled batches and the numbers of their rows; without rows in a step that only other processes take.

        A single batch keeps the order, as guides with a value per data point need.

        Args:
            order: the random stream of the order, and the share of this process.
            look: called with the batches of a source before they are moved and with their numbers, unless they are
                transformed; then after it.
        """
        if self.source is not None:
            return self._looked_at(self.source.epoch(self.size, *order), look)
        n, generator = self.n, order.generator
        if self.size < n:
            batches = torch.randperm(n, generator=generator, device="cpu").split(self.size)
        else:
            batches = (torch.arange(n, device="cpu"),)
        if order.processes > 1:
            batches = tuple(rows.tensor_split(order.processes)[order.rank] for rows in batches)
        return ((rows, self.take(rows) if len(rows) else ()) for rows in batches)

    def _looked_at(
        self, batches: Iterator[tuple[Tensor, Batch]], look: Look | None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for rows, batch in batches:
            if not len(rows):
                yield rows, ()
                continue
            made = placed(batch, self.device, self.transform)
            if look is not None:
                look(batch if self.transform is None else made, rows)  # without synchronization with a GPU
            yield rows, made


class Placed(Mapped):
    """A source for a measurement: its batches on their device, transformed; random transforms repeat at each pass.

    Args:
        source: the source.
        device: as for :func:`placed`.
        transform: as for :func:`placed`; it runs on blocks of 512 rows, each with a random stream of its own, which
            derives from the present one.
    """

    def __init__(self, source: Source, device: Device, transform: Transform | None) -> None:
        super().__init__(source, lambda batch: placed(batch, device, None))
        self.background = source.background and transform is None and device is None
        self._transform = transform
        self._seed = None if transform is None else int(torch.randint(2**62, ()))

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order."""
        if self._seed is None:
            return super().pieces(first, last)
        begin = first // _LOOKED_AT
        return between(self._blocks(self._seed, begin, last), first - begin * _LOOKED_AT, last and last - first)

    def _blocks(self, seed: int, begin: int, last: int | None) -> Iterator[Batch]:
        end = None if last is None else -(-last // _LOOKED_AT) * _LOOKED_AT
        for block, batch in enumerate(self.source.in_order(_LOOKED_AT, begin * _LOOKED_AT, end), begin):
            with private_randomness(derived_seed(seed, "transform", block)):
                yield placed(self.change(batch), None, self._transform)


def in_cache(tensors: tuple[Tensor, ...], numbers: int = 1) -> int:
    """How many (data point, particle) combinations run at once, so that one value per feature stays in cache.

    Without tensors: how many particles, where ``numbers`` is the count of numbers in all data.
    """
    if not tensors:
        return max(1, 8192 // max(1, numbers))
    size = max(x[0].numel() for x in tensors) * tensors[0].element_size()  # bytes
    return max(256, min(8192, _CACHE // max(1, size)))


def chunks_of(particles: int, most: int) -> list[int]:
    """Split particles into chunks of at most ``most``, equal where a divisor is near, so that they share a graph."""
    most = max(1, min(particles, most))
    size = next((k for k in range(most, most // 2, -1) if particles % k == 0), most)
    return [min(size, particles - first) for first in range(0, particles, size)]


def nested(layout: Layout, max_plate_nesting: int | None) -> Layout:
    """The layout with the user's ``max_plate_nesting``, if one is given.

    Raises:
        ValueError: if it is less than the plates need.
    """
    if max_plate_nesting is None:
        return layout
    if max_plate_nesting < layout.nesting:
        raise ValueError(
            f"max_plate_nesting={max_plate_nesting}, but the plates of model and guide take {layout.nesting} "
            "dimensions: give at least that, or omit it"
        )
    return layout._replace(nesting=max_plate_nesting)


@dataclass
class Part:
    """Rows of the data that are run together.

    Attributes:
        data: their tensors, with first dimension n; none where the model holds its data, where n is the size of its
            plate (1 for joint weights).
        first: the index of the first row in all data.
        layout: the layout of model and guide on data like these.
        size: the number of rows of a part; the last one may have fewer.
        ahead: how many parts of that size remain, this one included.
        at_once: how many (data point, particle) combinations are run at once.
        joint: whether the weights are joint, one for all data.
        of: how many parts all data have.
        advance: reports finished units of progress.
        pair: model and guide as they are run: on all data, without factors that are not densities (see
            :mod:`~jensen.kernel.measured`).
    """

    data: Batch
    first: int
    layout: Layout
    size: int
    ahead: int
    at_once: int
    joint: bool
    of: int
    advance: Callable[[int], None]
    pair: Pair = field(repr=False)
    _proven: bool = field(repr=False)

    def __len__(self) -> int:
        return len(self.data[0]) if self.data else self.size

    @property
    def rows(self) -> slice:
        """The slice of all data that this part covers."""
        return slice(self.first, self.first + len(self))

    def chunks(self, particles: int) -> list[int]:
        """K particles per data point, split into chunks that run at once."""
        return chunks_of(particles, self.at_once // self.size)

    @cached_property
    def divisible(self) -> bool:
        """Whether model and guide run on some of these data alone."""
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
    data: Batch | Source,
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
    shared: bool = False,
) -> Iterator[Part]:
    """Iterate over the data in parts of about the same size.

    All data are one part for joint weights, for AutoGuides, for a guide that fits only all of them (it holds a value
    per data point), and for a model that holds its data.

    Args:
        model: any Pyro model.
        guide: its guide.
        data: tensors whose first dimension is N, on their device; none for a model that holds its data; or a source of
            them, which is read by the batch.
        what: the name of the measurement, for the progress bar and errors.
        at_once: how many (data point, particle) combinations may run at once; without data, how many particles.
        together: how many particles of one data point must run at once.
        most: the maximal number of rows of a part.
        weights: the requirement: one weight per data point; weights of any kind, also joint ones; or values only (a
            point estimate is then allowed).
        units: the units of progress per data point, all counted at the end of a part unless ``Part.advance`` counted
            them before; None if unknown, so only ``advance`` counts.
        max_plate_nesting: the value of ``Part.layout.nesting``; None: the nesting depth of the plates.
        progress: whether to show a progress bar.
        seed: gives each part its own random stream, that of (seed, what, first row), inside a stream that is
            private already; None leaves the stream as it is.
        shared: whether several processes share the parts: each gets its own (``processes.in_order`` joins results).

    Yields:
        The :class:`Part`.

    Raises:
        ValueError: for a guide that is a point estimate, joint weights, plates that are not those of the data, a guide
            that holds values for other data, processes with other data or parameters, and the errors of
            :func:`~jensen.kernel.weights.check_pair`.
        TypeError: for a call that does not match the program's arguments.
    """
    source = data if isinstance(data, Source) else None
    if isinstance(data, Source):
        n, holes = data.survey()
        if holes:
            expect_holes(torch.tensor([math.nan]))
        _refuse_whole(is_autoguide(guide), what, "an AutoGuide is run on all data at once")
        data = as_tensors(data.head(max(_LOOKED_AT, min(n, most or n, max(1, at_once // together)))))
    else:
        expect_holes(*data)
        n = rows_of(data)
    rows = n if is_autoguide(guide) else min(n, max(1, at_once // together), most or n)
    layout = layout_on(model, guide, data, rows)
    if isinstance(layout, Exception):
        if rows == n or source is not None:
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
    _refuse_whole(joint and source is not None, what, "the weights of this model and guide are joint over all data")
    if not data and joint:
        n = rows = 1
    rows = n if joint else -(-n // -(-n // rows))
    looked_at = rows * max(1, _LOOKED_AT // rows)
    if shared and processes.count() > 1:
        read = [p for half in parameters_of(model, guide, *(x[:rows] for x in data)) for p in half]
        values = {id(t): t for t in (*tensors_of(model, guide), *read)}.values()
        facts, states = processes.facts_of(data), processes.facts_of([*values])
        named = [] if source is None else [repr(source)]
        processes.check_alike(data=[*named, *facts], parameters=states, seed=seed, rows=rows)
    firsts = range(0, n, rows)
    own = processes.own_share(len(firsts)) if shared else range(len(firsts))
    firsts = firsts[own.start : own.stop]
    begin, end = firsts[0], min(n, firsts[-1] + rows)
    total = None if units is None else (end - begin) * units
    pair = Pair(model, guide, layout)
    pieces = _pieces(data, begin, end, looked_at) if source is None else source.in_order(looked_at, begin, end)
    with progress_bar(what, n if data else 0, total=total, progress=progress, unit_scale=True) as bar:
        for start, some in zip(range(begin, end, looked_at), pieces, strict=True):
            layout = nested(check_pair(model, guide, *some), max_plate_nesting)
            if weights != "none" and not joint:
                check_rows(layout, some, len(some[0]) if some else n)
            for first in range(start, min(end, start + looked_at), rows):
                batch = tuple(x[first - start : first - start + rows] for x in some)
                if seed is not None:
                    torch.manual_seed(derived_seed(seed, what, first))
                ahead, of = (end - first) // rows, -(-n // rows)
                yield Part(batch, first, layout, rows, ahead, at_once, joint, of, bar.update, pair, rows < n)
                if units is not None:
                    bar.update(units * (min(n, first + rows) - begin) - bar.n)


def _pieces(data: Batch, first: int, last: int, rows: int) -> Iterator[Batch]:
    return (tuple(x[i : min(last, i + rows)] for x in data) for i in range(first, last, rows))


def _refuse_whole(needed: bool, what: str, reason: str) -> None:
    """Raise ValueError if all data are needed at once, but are read by the batch."""
    if needed:
        raise ValueError(
            f"{what} reads these data by the batch, but {reason}: give a part of them that fits into memory, such as "
            "jensen.datasets.stream(...).head(rows)"
        )


def _check_density(layout: Layout) -> None:
    if layout.points:
        raise ValueError(
            f"the guide is a point estimate at {list(layout.points)} (Delta): it has no density, so there is no ELBO, "
            "no estimate of log p(x) and no width to calibrate; use a guide with a density"
        )


def _as_measured(
    model: Program, guide: Program, data: Batch, rows: int, layout: Layout
) -> tuple[Program, Program, Layout]:
    """Model and guide as measured, and their layout: no penalties in the guide, and subsampled plates run in full."""
    if layout.penalties:
        warnings.warn(
            f"the guide's pyro.factor {listed(layout.penalties)} is not part of the density of a sample: training by "
            "the ELBO counts it as a penalty, but it is omitted here, since the samples do not depend on it",
            stacklevel=outside(),
        )
        guide = without_penalties(guide, layout.penalties)
    if layout.factors:
        warnings.warn(
            f"the guide's pyro.factor {listed(layout.factors)} is counted as a part of log q. This is right for the "
            "log-determinant of a map from an auxiliary site to a Delta, but wrong for a penalty: measure with a guide "
            "without the penalty",
            stacklevel=outside(),
        )
    if layout.subsampled:
        some = tuple(x[:rows] for x in data) if layout.sizes else data
        model, guide = in_full(model, guide, *some)
    if layout.penalties or layout.subsampled:
        layout = check_pair(model, guide, *(x[:rows] for x in data))
    return model, guide, layout


def _check_joint(layout: Layout, what: str, per_datum: bool) -> None:
    """Raise ValueError for joint weights where one value per data point is needed; warn of a factor that joins them."""
    if layout.sizes:
        return
    factors = (
        f"the model's pyro.factor {listed(layout.joining)} stands outside the plate around all other sites: it is a "
        "part of the joint density of all data, so the weights are joint"
    )
    if per_datum:
        reason, remedy = factors, "give each data point its own factor inside the plate"
        if not layout.joining:
            where = f" ({listed(layout.outside)} stands outside the plate of the data)" if layout.outside else ""
            reason = f"the weights of this model and guide are joint{where}"
            remedy = (
                "open the model's plate over the data around every site of model and guide (a global latent is outside "
                "that plate, and so is the single site of an AutoMultivariateNormal)"
            )
        raise ValueError(f"{what} needs one value per data point, but {reason}: {remedy}")
    if layout.joining:
        warnings.warn(f"{factors}: there is one value for all data", stacklevel=outside())


def check_rows(layout: Layout, data: Batch, rows: int) -> None:
    """Raise ValueError unless a batch has one weight per row."""
    if not data and layout.full_size is not None:
        raise ValueError(
            f"the model holds {layout.full_size} data points and takes a random {layout.sizes[0]} of them in every "
            "run, so its weights change from run to run: measure it with a plate over all data (no subsample_size)"
        )
    if not layout.sizes or layout.sizes == (rows,):
        return
    if not data:
        raise ValueError(
            f"the plates around every site have sizes {layout.sizes}, but weights need one plate: measure a model with "
            "one plate over its data around every site"
        )
    x = data[0]
    given = f"the plates around every site have sizes {layout.sizes}, but the model was given {rows} data points"
    if len(layout.sizes) > 1:
        raise ValueError(
            f"{given}: every site must be inside one plate over the data, with other plates inside it. Open other "
            "plates around single sites, or make the other dimensions events (.to_event)"
        )
    others = [dim for dim in range(1, x.dim()) if x.shape[dim] == layout.sizes[0]]
    if others:
        dim, turned = others[0], f"x.transpose(0, {others[0]})"
        raise ValueError(
            f"{given}: the plate seems to cover dimension {dim} of x, of shape {list(x.shape)}, but data points are "
            f"counted along the first dimension. Give {turned}, with lambda x: model({turned}) as the model, and do "
            "the same for the guide"
        )
    raise ValueError(f"{given}: use a model that has one plate over its data around every site and does not subsample")


def listed(names: tuple[str, ...]) -> str:
    """The names of sites, in quotes."""
    return ", ".join(f"'{name}'" for name in names)


def data_in(model: Program, guide: Program, data: Batch) -> tuple[int, int]:
    """How many data points one run of the programs covers, and how many with those that a subsample leaves out (N).

    The count is the size of a plate: the one around every site, else the one around everything observed with a latent
    site inside. Of several such plates, the one whose size equals the number of rows counts, else all of them. Without
    a plate, the rows are counted.
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
    plates = {frame for frame in plates if frame.size > 0}  # a plate without a size has that of the data
    plates = {frame for frame in plates if frame.size == rows} if data and rows in {f.size for f in plates} else plates
    if not plates:
        return rows, rows
    return math.prod(f.size for f in plates), math.prod(f.full_size or f.size for f in plates)


def data_in_epoch(model: Program, guide: Program, data: Batches) -> tuple[int, int]:
    """The sums of :func:`data_in` over all batches; only the last batch may differ in size."""
    full, rest = divmod(data.n, min(data.size, data.n))
    first = data_in(model, guide, data.first())
    last = data_in(model, guide, data.head(rest)) if rest else (0, 0)
    return full * first[0] + last[0], full * first[1] + last[1]
