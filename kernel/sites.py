"""Reading traces: the sites that count, the plates that enclose them, and their tensors."""

from __future__ import annotations

__all__ = [
    "PARTICLES",
    "At",
    "AtMode",
    "Program",
    "Scored",
    "Site",
    "SiteFacts",
    "base_of",
    "enclosing_plates",
    "facts_of",
    "folded",
    "in_plate",
    "is_discrete",
    "needs_score",
    "nesting_of",
    "observed_numbers",
    "padded",
    "plates_of",
    "score",
    "shared_plates",
    "sites_of",
    "subsampling",
    "summed_to",
]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform, Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from jensen.missing import has_holes

from .supports import log_density

Program = Callable[..., Any]
Site = Any  # a Pyro message: a TypedDict that Pyro does not type fully
PARTICLES = "jensen_particles"


def sites_of(trace: Trace) -> list[Site]:
    """The sample sites that count: without subsampling sites and ``pyro.deterministic``."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    ]


def plates_of(site: Site) -> set[CondIndepStackFrame]:
    """The vectorized plates around a site; a plate opened without a size has the size of the site's batch."""
    return {frame for frame in _frames(site) if frame.vectorized}


def _frames(site: Site) -> list[CondIndepStackFrame]:
    """All plates around a site."""
    return [
        _sized(frame, site) if frame.vectorized and frame.size == -1 else frame for frame in site["cond_indep_stack"]
    ]


def _sized(frame: CondIndepStackFrame, site: Site) -> CondIndepStackFrame:
    value = site["value"].shape
    shape = torch.broadcast_shapes(site["fn"].batch_shape, value[: len(value) - site["fn"].event_dim])
    size = shape[_dim(frame)] if len(shape) >= -_dim(frame) else 1
    return frame._replace(size=size, full_size=size)


def _dim(frame: CondIndepStackFrame) -> int:
    assert frame.dim is not None  # plates_of excludes sequential plates
    return frame.dim


def nesting_of(sites: list[Site]) -> int:
    """The number of dimensions that the plates of these sites take."""
    return max((-_dim(frame) for site in sites for frame in plates_of(site)), default=0)


def enclosing_plates(sites: list[Site]) -> list[CondIndepStackFrame]:
    """The plates, other than the particle plate, that enclose every site, from left to right."""
    return shared_plates(map(plates_of, sites))


def shared_plates(frames: Iterable[Iterable[CondIndepStackFrame]]) -> list[CondIndepStackFrame]:
    """The vectorized plates, other than the particle plate, that are in all of these sets, from left to right."""
    sets = [set(part) for part in frames]
    common = set.intersection(*sets) if sets else set()
    return sorted((frame for frame in common if frame.vectorized and frame.name != PARTICLES), key=_dim)


def in_plate(fn: Callable[..., Any], particles: int, nesting: int) -> Callable[..., Any]:
    """A program under K particles, in a plate left of all its own."""
    wrapped: Callable[..., Any] = pyro.plate(PARTICLES, particles, dim=-nesting - 1)(fn)
    return wrapped


def base_of(fn: Any) -> Any:
    """The distribution inside ``Independent``, ``mask`` and ``expand``, of all features of an observation."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution", "Observed"):
        fn = fn.base_dist
    return fn


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has discrete values; without a support it counts as continuous."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def needs_score(site: Site) -> bool:
    """Whether the guide samples this site without a derivative."""
    return facts_of(site).needs_score


def subsampling(frames: Iterable[CondIndepStackFrame]) -> float:
    """N/B over the subsampled plates among these."""
    return prod((frame.full_size or frame.size) / frame.size for frame in frames)


@dataclass(frozen=True)
class SiteFacts:
    """The properties of a site without its tensors.

    Attributes:
        name: its name.
        observed: whether its value is data.
        event_dim: how many dimensions of its values form one event.
        frames: the plates around it, without the particle plate.
        family: the class of its distribution, inside ``to_event``, ``mask`` and ``expand``.
        has_rsample: whether its samples have a derivative.
        discrete: whether its values are discrete.
        auxiliary: whether only the guide has it.
    """

    name: str
    observed: bool
    event_dim: int
    frames: frozenset[CondIndepStackFrame]
    family: type
    has_rsample: bool
    discrete: bool
    auxiliary: bool

    @property
    def point(self) -> bool:
        """Whether it is a ``Delta`` or a factor, without a normalised density of its own."""
        return issubclass(self.family, Delta | Unit)

    @property
    def needs_score(self) -> bool:
        """Whether it is sampled without a derivative."""
        return not (self.observed or self.has_rsample or self.point)


def facts_of(site: Site) -> SiteFacts:
    """The properties of a site of a trace."""
    fn = site["fn"]
    return SiteFacts(
        name=site["name"],
        observed=bool(site["is_observed"]),
        event_dim=fn.event_dim,
        frames=frozenset(frame for frame in _frames(site) if frame.name != PARTICLES),
        family=type(base_of(fn)),
        has_rsample=bool(fn.has_rsample),
        discrete=is_discrete(fn),
        auxiliary=bool((site["infer"] or {}).get("is_auxiliary")),
    )


class Scored(NamedTuple):
    """A site of a run under K particles: its properties, its value, and its log-density.

    The value is [K, *plates, *event] for samples (observed values keep their shape); the log-density is [K, *plates],
    with one dimension for every plate of model and guide, of size 1 where the site is outside; masked, without scale.
    """

    facts: SiteFacts
    value: Tensor
    log_prob: Tensor


def score(site: Site) -> Tensor:
    """The log-density of a site's value, of its batch shape: without scale, with mask.

    Raises:
        NotImplementedError: if the distribution cannot compute it at this value.
    """
    try:
        log_prob = log_density(site)
    except (KeyError, NotImplementedError) as error:  # of a flow without an inverse, which stores its samples
        if site["is_observed"]:
            raise NotImplementedError(f"site '{site['name']}': {error}") from error
        raise NotImplementedError(
            f"site '{site['name']}': its distribution cannot compute log q of a given value ({error})"
        ) from error
    masked: Tensor = scale_and_mask(log_prob, 1.0, site["mask"])
    return masked


def padded(batch: Tensor, rank: int, trailing: int = 0) -> Tensor:
    """A tensor whose batch shape is padded with ones on the left to ``rank`` dimensions, before the trailing ones.

    Raises:
        ValueError: if the batch has more.
    """
    missing = rank + trailing - batch.dim()
    if missing < 0:
        raise ValueError(
            f"a batch of shape {list(batch.shape)} has more dimensions than the {rank} of the plates: give a larger "
            "max_plate_nesting, or omit it"
        )
    return batch.reshape((1,) * missing + tuple(batch.shape))


def folded(batch: Tensor, facts: SiteFacts, keep: list[CondIndepStackFrame]) -> Tensor:
    """A tensor [K, *plates] of a site, scaled by its inner subsampling and summed to the particles and kept plates."""
    inner = subsampling(facts.frames - set(keep))
    return summed_to(batch if inner == 1.0 else batch * inner, keep)


def summed_to(batch: Tensor, keep: list[CondIndepStackFrame]) -> Tensor:
    """A tensor [K, *plates] summed over all dimensions but the particles and the kept plates."""
    kept = {0, *(batch.dim() + _dim(frame) for frame in keep)}
    summed = [dim for dim in range(batch.dim()) if dim not in kept]
    return batch.sum(summed) if summed else batch


class At(Messenger):
    """A handler under which latent sites, and subsampling sites, take given values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class AtMode(Messenger):
    """A handler under which a site with an improper prior, which has no samples, takes its mode."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and isinstance(msg["fn"], ImproperUniform):
            msg["value"], msg["done"] = msg["fn"].mode, True


def observed_numbers(site: Site) -> float:
    """How many numbers of the data a site observes: neither masked nor NaN, times N/B in a subsampled plate."""
    fn, value = site["fn"], site["value"]
    shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    seen = _masked(torch.ones(shape, dtype=torch.bool, device=value.device), site["mask"])
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution", "Observed"):
        if isinstance(fn, Independent):
            inner = fn.event_shape[: fn.reinterpreted_batch_ndims]
            seen = seen.reshape(seen.shape + (1,) * len(inner)).expand(seen.shape + inner)
        seen = _masked(seen, getattr(fn, "_mask", None))
        fn = fn.base_dist
    seen = seen.reshape(seen.shape + (1,) * fn.event_dim)
    if has_holes(value):
        seen = seen & ~value.isnan()
    numbers = torch.broadcast_shapes(seen.shape, shape + site["fn"].event_shape)
    return float(seen.expand(numbers).sum()) * subsampling(plates_of(site))


def _masked(seen: Tensor, mask: Any) -> Tensor:
    return seen if mask is None else seen & torch.as_tensor(mask, device=seen.device)
