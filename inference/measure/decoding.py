r"""Means of data and latents, for figures of a model and guide.

.. math::
    \mathbb{E}[z \mid x] \approx \mathbb{E}_{q(z \mid x)}[z], \qquad
    \mathbb{E}[x \mid z], \qquad
    \mathbb{E}_{q(z \mid x)} \, \mathbb{E}[x' \mid z]
"""

from __future__ import annotations

__all__ = ["decode", "encode", "reconstruct"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.batches import Data, as_tensors, stream
from jensen.kernel.enumeration import sampled
from jensen.kernel.modes import running
from jensen.kernel.randomness import forked_rng
from jensen.kernel.simulation import drawn_data
from jensen.kernel.sites import AtMode, Site, is_discrete
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Program

_AT_ONCE = 8192  # (data point, particle) combinations
_DRAWS = 100  # samples that replace an unknown mean


@overload
def decode(model: Program, values: Mapping[str, Tensor], *covariates: Tensor, data: None = None) -> Tensor: ...
@overload
def decode(model: Program, values: Mapping[str, Tensor], *, data: Data) -> Tensor | dict[str, Tensor]: ...


@checked
def decode(
    model: Program, values: Mapping[str, Tensor], *covariates: Tensor, data: Data | None = None
) -> Tensor | dict[str, Tensor]:
    r"""The mean of the data at given latents.

    .. math:: \mathbb{E}[x_m \mid z_m], \qquad m = 1, \dots, M

    A latent site without a value takes, from the top down, the mean of its distribution given the sites above it, or
    the mode if it is discrete. An unknown mean is estimated from 100 samples. If a model has several sites of data,
    those that other sites depend on take their mean or mode in the same way, unless ``values`` contain them.

    Args:
        model: a model called as ``model(None, *covariates, n=M)`` that samples its data at site ``"x"``; with an
            example any Pyro model, called as ``model(*data)``.
        values: by latent site, [M, *event].
        covariates: the other arguments of the model, tensors whose first dimension is M.
        data: an example of the data, as for :func:`~jensen.inference.simulate`: the means do not depend on its
            values, except covariates, whose rows belong to the rows of the values.

    Returns:
        The means, [M, *event_shape], without gradient; by site if the model has several sites of data.

    Raises:
        ValueError: without values, for values of different M, of an unknown site or of another event
            shape, and the errors of :func:`~jensen.inference.simulate`.

    Example:
        >>> from jensen.models import PPCA
        >>> decode(PPCA(5, latent=2), {"z": torch.zeros(3, 2)}).shape
        torch.Size([3, 5])
    """
    sizes = {len(value) for value in values.values()}
    if len(sizes) != 1 or 0 in sizes:
        shapes = {name: list(value.shape) for name, value in values.items()}
        raise ValueError(f"decode needs values by latent site, with one first dimension M >= 1, but got {shapes}")
    (m,) = sizes
    given = dict(values)
    means: dict[str, Tensor] = {}
    with running(model, model):
        with forked_rng(), AtMode():
            source = drawn_data(model, m, covariates, data)
            sites, _ = source.draw()
        _check_given(given, {site["name"]: site for site in sites}, source.observed)
        while missing := [site for site in source.sites(given) if site["name"] not in given]:
            name, fn = missing[0]["name"], missing[0]["fn"]
            mean = _mean(fn) if name in source.observed or not is_discrete(fn) else None
            if mean is not None and name in source.observed:
                means[name] = mean
            if len(missing) == 1 and name in source.observed:
                break  # no other site depends on it
            given[name] = _mode(fn) if mean is None or is_discrete(fn) else mean
    return _one(means)


@checked
def encode(
    model: Program, guide: Program, data: Data, particles: int = 32, *, seed: int | None = None
) -> dict[str, Tensor]:
    r"""One value of each latent site per data point: the guide's mean, or its mode if the site is discrete.

    .. math:: \mathbb{E}_{q(z \mid x_n)}[z_n]

    It is the mean of the guide's distributions, averaged over K samples of the sites above; for a distribution without
    a known mean (a flow), the mean of the samples. For a guide of one Gaussian site it is exact for any K. Sites
    that the guide enumerates are sampled here; those that it leaves to be enumerated in the model have no value.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of samples, at least 1.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.

    Returns:
        By site, in the model's order, [N, *event], without gradient.

    Raises:
        ValueError: for ``particles`` below 1, and the errors of :func:`~jensen.inference.log_weights`.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model, x = PPCA(5, latent=2), torch.randn(3, 5)
        >>> torch.allclose(encode(model, ExactPosterior(model), x)["z"], model.posterior(x).mean)
        True
    """

    def values(t: Terms) -> dict[str, Tensor]:
        sites = [name for name in t.p if name in t.q]
        return {name: t.mode_q(name)[0] if t.p[name].discrete else t.mean_q(name).mean(0) for name in sites}

    return _over_data(model, guide, data, particles, seed, "encode", values)


@checked
def reconstruct(
    model: Program, guide: Program, data: Data, particles: int = 32, *, seed: int | None = None
) -> Tensor | dict[str, Tensor]:
    r"""Data as the model and guide reconstruct them: the mean of p(x | z), averaged over the guide's samples.

    .. math:: \frac{1}{K} \sum_k \mathbb{E}[x' \mid z_{kn}], \qquad z_{kn} \sim q(z \mid x_n)

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of samples, at least 1.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.

    Returns:
        The mean of the observed values, [N, *event_shape], without gradient; by site, in the order of the model,
        if it observes several.

    Raises:
        ValueError: for a model that observes nothing, ``particles`` below 1, and the errors of
            :func:`~jensen.inference.log_weights`.
        NotImplementedError: for a model with enumerated sites that the guide does not sample.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> reconstruct(model, ExactPosterior(model), torch.randn(3, 5), seed=0).shape
        torch.Size([3, 5])
    """

    def means(t: Terms) -> dict[str, Tensor]:
        observed = [name for name in t.log_p if name not in t.log_q and t.values[name].numel()]  # not factors
        if t.summed:
            raise NotImplementedError(
                f"the states of enumerated sites are summed out of {sorted(t.log_p)} together, and the mean of the "
                "data differs between states: sample the enumerated sites in the guide"
            )
        if not observed:
            raise ValueError(f"the model observes nothing: the guide samples all of its sites, {sorted(t.log_p)}")
        return {name: t.mean_p(name).mean(0) for name in observed}

    return _one(_over_data(model, guide, data, particles, seed, "reconstruct", means))


def _one(means: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """A single mean as a tensor, several by site."""
    return next(iter(means.values())) if len(means) == 1 else means


def _check_given(given: Mapping[str, Tensor], sites: Mapping[str, Site], observed: Sequence[str]) -> None:
    """Raise ValueError for values of an unknown site, of another shape, or of all data sites."""
    latent = sorted(set(sites) - set(observed))
    if extra := sorted(set(given) - set(sites if len(observed) > 1 else latent)):
        raise ValueError(f"decode got values of {extra}, but the model's latent sites are {latent}")
    if set(observed) <= set(given):
        raise ValueError(f"decode got values of all sites of data, {list(observed)}: omit those to be decoded")
    for name, value in given.items():
        shape = sites[name]["value"].shape[1:]
        if value.shape[1:] != shape:
            expected = ", ".join(["M", *map(str, shape)])
            raise ValueError(f"decode needs values of shape [{expected}] at site '{name}', but got {list(value.shape)}")


def _mean(fn: torch.distributions.Distribution, values: Tensor | None = None) -> Tensor:
    """A distribution's mean; if it is unknown, the given samples, or the mean of 100 new samples."""
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if not mean.isnan().any():
        return mean
    return fn.sample(torch.Size([_DRAWS])).to(torch.get_default_dtype()).mean(0) if values is None else values


def _mode(fn: torch.distributions.Distribution) -> Tensor:
    """A discrete distribution's mode; for two equally probable states, zero."""
    return fn.mode.nan_to_num(0.0)


def _over_data(
    model: Program,
    guide: Program,
    data: Data,
    particles: int,
    seed: int | None,
    what: str,
    reduce: Callable[[Terms], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The results of ``reduce`` for the terms of model and guide, batch by batch."""
    if particles < 1:
        raise ValueError(f"particles is the number of samples from the guide, at least 1, but got {particles}")
    settings: dict[str, Any] = {"at_once": _AT_ONCE, "together": particles, "weights": "none", "progress": False}
    settings["seed"] = seed
    reduced = []
    with running(model, guide, what, seed=seed):
        for part in stream(model, guide, as_tensors(data), what, **settings):
            if part.layout.summed:  # states that are summed out have no values
                return _over_data(model, sampled(guide), data, particles, seed, what, reduce)
            reduced.append(reduce(part.pair.terms(part.data, particles)))
    return {name: torch.cat([part[name] for part in reduced]) for name in reduced[0]}
