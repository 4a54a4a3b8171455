r"""Log-densities where the support moves: outside of it a density is zero.

The support of x ~ Uniform(0, theta) depends on the draw of theta, so that a datum may lie in it at some draws only. At
the others log p(x | theta) is minus infinity, and so is the log weight, which importance sampling bears. PyTorch raises
there, or, where its validation is off, extrapolates: Pareto and Exponential return a finite number for any value.
"""

from __future__ import annotations

__all__ = ["bounds_of", "log_density"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


def bounds_of(fn: Any) -> list[Tensor]:
    """The tensors that bound the support of a distribution; none where its support is known to be fixed, or unknown."""
    try:
        support = fn.support
    except NotImplementedError:
        return []
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return [bound for bound in vars(support).values() if isinstance(bound, Tensor)]


def log_density(site: Any) -> Tensor:
    """Log-density of the value of a site, of its batch shape: minus infinity outside a support that tensors bound."""
    fn, value = site["fn"], site["value"]
    if not bounds_of(fn):
        return torch.as_tensor(fn.log_prob(value, *site["args"], **site["kwargs"]))
    inside = fn.support.check(value)
    with _without_validation(fn):
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    return torch.where(inside, log_prob, -torch.inf)


@contextmanager
def _without_validation(fn: Any) -> Iterator[None]:
    """A distribution, and those that it is made of, do not check their values inside the block."""
    parts = list(_parts(fn))
    before = [part._validate_args for part in parts]
    for part in parts:
        part._validate_args = False
    try:
        yield
    finally:
        for part, checked in zip(parts, before, strict=True):
            part._validate_args = checked


def _parts(fn: Any) -> Iterator[Any]:
    yield fn
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from _parts(part)
