r"""Log-densities where the support depends on other values: outside of it a density is zero.

The support of x ~ Uniform(0, theta) depends on the sample of theta, so a data point may lie in it for some samples
only. For the others log p(x | theta) and the log weight are minus infinity, which importance sampling allows. PyTorch
raises an error there, or, without validation, extrapolates: Pareto and Exponential return a finite number for any
value.

A ``TransformedDistribution`` states the codomain of its last transform: all numbers, for an ``AffineTransform``. The
true support is found by inverting the transforms down to the base distribution.
"""

from __future__ import annotations

__all__ = ["bounds_of", "inside_of", "log_density"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, constraints

from jensen.missing import Observed, transforms_of


def bounds_of(fn: Any) -> list[Tensor]:
    """The tensors that bound the support of a distribution; none if its support is fixed or unknown."""
    if (shifted := _shifted(fn)) is not None:
        parts = [part for part in transforms_of(shifted) if isinstance(part, AffineTransform)]
        moved = [x for part in parts for x in (part.loc, part.scale) if isinstance(x, Tensor)]
        return moved + bounds_of(shifted.base_dist)
    try:
        support = _innermost(fn.support)
    except NotImplementedError:
        return []
    return [bound for bound in vars(support).values() if isinstance(bound, Tensor)]


def inside_of(fn: Any, value: Tensor) -> Tensor:
    """Whether a value lies in the support, of their joint batch shape.

    Raises:
        NotImplementedError: for a distribution without a support.
    """
    if isinstance(fn, Observed):
        return inside_of(fn.base_dist, fn.filled(value))
    inside: Tensor = fn.support.check(value)
    if (shifted := _shifted(fn)) is None:
        return inside
    for transform in reversed(transforms_of(shifted)):
        inside = inside & _all_from(transform.codomain.check(value), value.dim() - fn.event_dim)
        value = transform.inv(value)
    return inside & _all_from(shifted.base_dist.support.check(value), value.dim() - fn.event_dim)


def log_density(site: Any) -> Tensor:
    """Log-density of the value of a site, of its batch shape: minus infinity outside a support that tensors bound.

    Raises:
        ValueError: naming the site, if the distribution rejects the value.
    """
    fn, value = site["fn"], site["value"]
    if not bounds_of(fn):
        try:
            return torch.as_tensor(fn.log_prob(value, *site["args"], **site["kwargs"]))
        except ValueError as error:
            said = " ".join(str(error).split()).split(", but found invalid values")[0]
            raise ValueError(f"the log-density of site '{site['name']}' fails: {said[:200]}") from error
    inside = inside_of(fn, value)
    with _without_validation(fn):
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    return torch.where(inside, log_prob, -torch.inf)


def _innermost(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _shifted(fn: Any) -> Any:
    """The ``TransformedDistribution`` inside a distribution, if its stated support hides a narrower one; else None."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution", "Observed"):
        fn = fn.base_dist
    if type(fn).__name__ != "TransformedDistribution":  # subclasses state their own support
        return None
    try:
        narrower = [_innermost(c) for c in (fn.base_dist.support, *(part.codomain for part in transforms_of(fn)))]
        hidden = _innermost(fn.support) is constraints.real and any(c is not constraints.real for c in narrower)
    except NotImplementedError:
        return None
    return fn if hidden else None


def _all_from(checked: Tensor, batch: int) -> Tensor:
    """A boolean tensor, reduced by all() over the dimensions from ``batch`` on."""
    return checked.flatten(batch).all(-1) if checked.dim() > batch else checked


@contextmanager
def _without_validation(fn: Any) -> Iterator[None]:
    """Inside the block, a distribution and its components do not validate values."""
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
