"""The layout of a model and guide: their plates, and the properties of their sites that a run must respect."""

from __future__ import annotations

__all__ = ["Layout", "layout_of", "without_auxiliary"]

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import Delta, Unit
from pyro.poutine.trace_struct import Trace

from .sites import Site, base_of, enclosing_plates, is_discrete, needs_score, nesting_of, sites_of

_RUNS = 8  # of the guide: a value equal in all runs is a point (two coins of a scalar site agree half the time)
Again = Callable[[], list[Site]]


class Layout(NamedTuple):
    """The layout of a model and guide.

    Attributes:
        nesting: how deep their plates are nested.
        sizes: the sizes of the plates that enclose every site; empty if weights are joint.
        full_size: the full size of a subsampled plate around everything observed; None without one.
        points: the guide's sites that are points (``Delta``) without a density.
        scored: the guide's sites without ``rsample``, whose gradient needs their score.
        enumerated: the model's latent sites that are left to be enumerated.
        discrete: the model's latent sites with discrete values.
        subsampled: the subsampled plates that do not enclose every site.
        penalties: the guide's ``pyro.factor`` sites that are not part of the density of its samples.
        factors: the guide's ``pyro.factor`` sites that may be part of it, beside auxiliary sites.
        outside: the sites outside the plates around everything observed.
        joining: the ``pyro.factor`` sites that are the only sites outside the plates of all other sites.
        summed: the guide's sites to be enumerated.
    """

    nesting: int
    sizes: tuple[int, ...]
    full_size: int | None
    points: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    discrete: tuple[str, ...] = ()
    subsampled: tuple[str, ...] = ()
    penalties: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    joining: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()


def layout_of(p: list[Site], q: list[Site], again: Again) -> Layout:
    """The layout of a model and guide, from their sites.

    Args:
        p: the model's sites.
        q: the guide's sites.
        again: returns the guide's sites in another run that resamples only its auxiliary sites.
    """
    deltas = _deltas(p, q)
    points = _points(q, deltas, again)
    observed = [set(s["cond_indep_stack"]) for s in p if s["is_observed"]]
    around = set.intersection(*observed) if observed else set()
    full = [frame.full_size for frame in around if frame.full_size != frame.size]
    enclosing = enclosing_plates([*p, *q])
    frames = {frame for s in [*p, *q] for frame in s["cond_indep_stack"]} - set(enclosing)
    drawn = {s["name"] for s in q}
    joining = _joining([*p, *q])
    penalties, factors = _factors(q, bool(set(deltas) - set(points)), joining)
    return Layout(
        nesting=nesting_of([*p, *q]),
        sizes=tuple(frame.size for frame in enclosing),
        full_size=full[0] if full else None,
        points=points,
        scored=tuple(s["name"] for s in q if needs_score(s)),
        enumerated=tuple(s["name"] for s in p if not s["is_observed"] and s["name"] not in drawn),
        discrete=tuple(s["name"] for s in p if not s["is_observed"] and is_discrete(s["fn"])),
        subsampled=tuple(sorted({frame.name for frame in frames if frame.full_size != frame.size})),
        penalties=penalties,
        factors=factors,
        outside=_outside([*p, *q], [s for s in p if s["is_observed"] and not _is_factor(s)]),
        joining=joining,
        summed=tuple(s["name"] for s in q if s["infer"].get("enumerate")),
    )


def without_auxiliary(q: Trace) -> Trace:
    """A guide's trace without auxiliary sites and Deltas: replayed with it, the guide resamples only those."""
    kept = q.copy()
    for site in sites_of(q):
        if site["infer"].get("is_auxiliary") or isinstance(base_of(site["fn"]), Delta):
            kept.remove_node(site["name"])
    return kept


def _is_factor(site: Site) -> bool:
    return isinstance(base_of(site["fn"]), Unit)


def _deltas(p: list[Site], q: list[Site]) -> dict[str, Site]:
    """The guide's ``Delta`` sites without a log-density, except those where the model also has a ``Delta``."""
    of_model = {s["name"] for s in p if isinstance(base_of(s["fn"]), Delta)}
    found = {s["name"]: s for s in q if isinstance(base_of(s["fn"]), Delta) and s["name"] not in of_model}
    return {name: s for name, s in found.items() if not torch.as_tensor(base_of(s["fn"]).log_density).any()}


def _points(q: list[Site], deltas: dict[str, Site], again: Again) -> tuple[str, ...]:
    """The guide's ``Delta`` sites that are points: the others take over the density of an auxiliary site.

    A site is not a point if its value changes with samples of the auxiliary sites. (A ``pyro.factor`` counts as an
    auxiliary site: it may be the density of noise that is sampled outside of Pyro's sites.)
    """
    points = dict(deltas)
    if not any(s["infer"].get("is_auxiliary") and s["name"] not in deltas for s in q):
        return tuple(points)
    for _ in range(_RUNS):
        if not points:
            break
        other = {s["name"]: s["value"] for s in again()}
        points = {name: s for name, s in points.items() if name in other and torch.equal(s["value"], other[name])}
    return tuple(points)


def _factors(q: list[Site], carried: bool, joining: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The guide's factors that are not part of the density of its samples, and those that may be.

    If each sample has the density of its own site, the density is complete. If Deltas carry the density of auxiliary
    sites, a factor may be the log-determinant of the map, unless only the factor is outside the plates of other sites.
    """
    names = [s["name"] for s in q if _is_factor(s)]
    penalties = tuple(name for name in names if not carried or name in joining)
    return penalties, tuple(name for name in names if name not in penalties)


def _outside(sites: list[Site], observed: list[Site]) -> tuple[str, ...]:
    """The sites outside the plates around everything observed, each once."""
    plates = set(enclosing_plates(observed))
    return tuple(dict.fromkeys(s["name"] for s in sites if not plates <= set(enclosing_plates([s]))))


def _joining(sites: list[Site]) -> tuple[str, ...]:
    """The factors that are the only sites outside the plates of all other sites."""
    plates = set(enclosing_plates([s for s in sites if not _is_factor(s)]))
    return tuple(s["name"] for s in sites if _is_factor(s) and not plates <= set(enclosing_plates([s])))
