"""The walk through the data: what is run at once, on which rows, and whether the pair can be run so.

:func:`stream` is the only loop over data that a measurement has. It knows which pairs run on a part of their data and
which on all or none (AutoGuides, guides with a value for each datum, joint weights), looks at every datum before it is
run, and shows how far it is.
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
    "in_cache",
    "layout_on",
    "listed",
    "placed",
    "stream",
]

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .layout import Layout
from .measured import in_full, without_penalties
from .parameters import is_autoguide
from .weights import Program, check_pair

Data = Tensor | tuple[Tensor, ...]
Batch = tuple[Tensor, ...]
Device = torch.device | str | None
Transform = Callable[[Tensor], Tensor]

_CACHE = 2**23  # bytes: measured to be near the best for decoders of 64 to 784 features
_LOOKED_AT = 512  # data on which a pair is checked at once


def as_tensors(data: Data) -> tuple[Tensor, ...]:
    """Data as a tuple of tensors that agree in their first dimension, which is not zero."""
    tensors = data if isinstance(data, tuple) else (data,)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"data is a tensor or a tuple of tensors, but got {type(x).__name__}; use torch.as_tensor, or tuple"
            )
    shapes = [list(x.shape) for x in tensors]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
        raise ValueError(f"data need one first dimension N of at least 1, but got tensors of shape {shapes}")
    return tensors


def placed(tensors: Iterable[Tensor], device: Device, transform: Transform | None) -> tuple[Tensor, ...]:
    """Tensors on their device, the first of them transformed."""
    first, *others = (x.to(device or x.device) for x in tensors)
    return (first if transform is None else transform(first), *others)


class Batches(NamedTuple):
    """Data, how many rows a batch takes, where it goes, and what happens to its first tensor."""

    tensors: tuple[Tensor, ...]
    size: int
    device: Device
    transform: Transform | None

    @property
    def n(self) -> int:
        """The number of data."""
        return len(self.tensors[0])

    @property
    def where(self) -> torch.device:
        """The device that batches are on."""
        return torch.device(self.device) if self.device is not None else self.tensors[0].device

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batch of these rows."""
        return placed((x.index_select(0, rows.to(x.device)) for x in self.tensors), self.device, self.transform)

    def first(self) -> tuple[Tensor, ...]:
        """The batch of the first rows."""
        return self.take(torch.arange(min(self.size, self.n)))

    def shuffled(self) -> tuple[Tensor, ...]:
        """Rows of shuffled batches; all in their own order if they fit one, as guides with a value per datum need."""
        return torch.randperm(self.n).split(self.size) if self.size < self.n else (torch.arange(self.n),)


def in_cache(tensors: tuple[Tensor, ...]) -> int:
    """How many (datum, particle) pairs to run at once: so many that a value for each feature stays in cache."""
    size = max(x[0].numel() for x in tensors) * tensors[0].element_size()  # bytes
    return max(256, min(8192, _CACHE // max(1, size)))


def chunks_of(particles: int, most: int) -> list[int]:
    """So many particles in chunks of at most ``most``, all alike where a divisor is near: they share a graph then."""
    most = max(1, min(particles, most))
    size = next((k for k in range(most, most // 2, -1) if particles % k == 0), most)
    return [min(size, particles - first) for first in range(0, particles, size)]


def layout_on(model: Program, guide: Program, data: Batch, rows: int) -> Layout | Exception:
    """How a pair is laid out on the first rows of its data, all checked; what it raises where it does not run there."""
    try:
        return check_pair(model, guide, *(x[:rows] for x in data))
    except (RuntimeError, ValueError) as error:
        return error


@dataclass
class Part:
    """Some rows of the data, which are run together.

    Attributes:
        data: their tensors, the first dimension n.
        first: the number of the first of them in all the data.
        layout: how the pair is laid out on data like these.
        size: how many rows a part has; the last one may have fewer.
        ahead: how many parts of that size are to come, with this one.
        at_once: how many (datum, particle) pairs are run at once.
        joint: whether the pair's weights are joint, one for all data.
        advance: says how many units of progress are done.
        pair: the model and the guide to be run: on all data, and without factors that are no density (see
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
    pair: tuple[Program, Program] = field(repr=False)
    _proven: bool = field(repr=False)

    def __len__(self) -> int:
        return len(self.data[0])

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
        if self.joint or is_autoguide(self.pair[1]):
            return False
        if self._proven or not half:
            return True
        layout = layout_on(*self.pair, self.data, half)
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
    progress: bool = True,
) -> Iterator[Part]:
    """Walk through the data, part after part, each of about the same size.

    All data are one part for joint weights, for AutoGuides, and for a guide that fits all of them only (it holds a
    value for each).

    Args:
        model: any Pyro model.
        guide: its guide.
        data: tensors whose first dimension is N, on their device.
        what: what is done, in a word: what the progress bar and errors say.
        at_once: how many (datum, particle) pairs may be run at once.
        together: how many particles of a datum have to be run at once.
        most: the most rows of a part.
        weights: what the pair must yield: weights per datum; weights, be they joint; or values alone (a guide that is
            a point will do).
        units: the units of progress of a datum, all done at the end of its part unless ``Part.advance`` said so before;
            None where nobody knows, so ``advance`` counts.
        progress: whether to show a progress bar.

    Yields:
        The :class:`Part`.

    Raises:
        ValueError: for a guide that is a point, weights that are joint, plates that are not those of the data, and on
            what :func:`~jensen.kernel.weights.check_pair` names.
    """
    n = len(data[0])
    rows = n if is_autoguide(guide) else min(n, max(1, at_once // together), most or n)
    layout = layout_on(model, guide, data, rows)
    if isinstance(layout, Exception):
        if rows == n:
            raise layout
        rows, layout = n, check_pair(model, guide, *data)
    if weights != "none":
        _check_density(layout)
        model, guide, layout = _as_measured(model, guide, data, rows, layout)
        _check_joint(layout, what, weights == "per datum")
        check_rows(layout, data, rows)
    joint = not layout.sizes
    rows = n if joint else -(-n // -(-n // rows))
    looked_at = rows * max(1, _LOOKED_AT // rows)
    total = None if units is None else n * units
    with tqdm(total=total, disable=not progress, desc=what, unit_scale=True) as bar:
        for first in range(0, n, rows):
            if first % looked_at == 0:
                some = tuple(x[first : first + looked_at] for x in data)
                layout = check_pair(model, guide, *some)
                if weights != "none" and not joint:
                    check_rows(layout, some, len(some[0]))
            batch = tuple(x[first : first + rows] for x in data)
            yield Part(
                batch, first, layout, rows, (n - first) // rows, at_once, joint, bar.update, (model, guide), rows < n
            )
            if units is not None:
                bar.update(units * (first + len(batch[0])) - bar.n)


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
            stacklevel=4,
        )
        guide = without_penalties(guide, layout.penalties)
    if layout.factors:
        warnings.warn(
            f"the guide's pyro.factor {listed(layout.factors)} is counted as a part of log q: this is right for the "
            "log-determinant of the map from an auxiliary site to a Delta, but not for a penalty, which is no density "
            "of a draw: measure with a guide that leaves a penalty out",
            stacklevel=4,
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
            outside = f" ({listed(layout.outside)} stands outside the plate of the data)" if layout.outside else ""
            reason = f"the weights of this pair are joint{outside}"
            remedy = (
                "open the model's plate over the data around every site of model and guide (a global latent stands "
                "outside of it, and so does the one site of an AutoMultivariateNormal)"
            )
        raise ValueError(f"{what} needs a number for each datum, but {reason}: {remedy}")
    if layout.joining:
        warnings.warn(f"{factors}: one number for all data", stacklevel=4)


def check_rows(layout: Layout, data: Batch, rows: int) -> None:
    """Raise ValueError unless the weights of a batch are one for each of its rows."""
    if not layout.sizes or layout.sizes == (rows,):
        return
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
