"""How a pair is laid out: its plates, and what its sites ask of those who run it."""

from __future__ import annotations

__all__ = ["Layout", "layout_of"]

from typing import NamedTuple

import torch
from pyro.distributions import Delta, Unit

from .sites import Site, base_of, enclosing_plates, is_discrete, needs_score, nesting_of


class Layout(NamedTuple):
    """How a pair is laid out.

    Attributes:
        nesting: how deep its plates are nested.
        sizes: the sizes of the plates that enclose every site; empty where weights are joint.
        full_size: the size of a subsampled plate around everything observed; None without one.
        points: the guide's sites that are points (``Delta``) without a density.
        scored: the guide's sites without ``rsample``, whose gradient needs their score.
        enumerated: the model's latent sites that the guide leaves to be enumerated.
        discrete: the model's latent sites whose values are discrete.
    """

    nesting: int
    sizes: tuple[int, ...]
    full_size: int | None
    points: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    discrete: tuple[str, ...] = ()


def layout_of(p: list[Site], q: list[Site]) -> Layout:
    """The layout of a pair, from the sites of its model and those of its guide."""
    points = _points(p, q)
    observed = [set(s["cond_indep_stack"]) for s in p if s["is_observed"]]
    around = set.intersection(*observed) if observed else set()
    full = [frame.full_size for frame in around if frame.full_size != frame.size]
    sizes = tuple(frame.size for frame in enclosing_plates([*p, *q]))
    scored = tuple(s["name"] for s in q if needs_score(s))
    drawn = {s["name"] for s in q}
    enumerated = tuple(s["name"] for s in p if not s["is_observed"] and s["name"] not in drawn)
    discrete = tuple(s["name"] for s in p if not s["is_observed"] and is_discrete(s["fn"]))
    return Layout(nesting_of([*p, *q]), sizes, full[0] if full else None, points, scored, enumerated, discrete)


def _points(p: list[Site], q: list[Site]) -> tuple[str, ...]:
    """The guide's sites that are points without a density of their own.

    Beside an auxiliary site (whose density a ``Delta`` takes over), and where the model is a point itself, it is none.
    """
    bases = {s["name"]: base_of(s["fn"]) for s in q}
    if all(isinstance(base, Delta | Unit) for base in bases.values()):
        return tuple(bases)
    if any(s["infer"].get("is_auxiliary") for s in q):
        return ()
    of_model = {s["name"] for s in p if isinstance(base_of(s["fn"]), Delta)}
    sure = {name: base for name, base in bases.items() if isinstance(base, Delta) and name not in of_model}
    return tuple(name for name, base in sure.items() if bool(torch.as_tensor(base.log_density).eq(0).all()))
