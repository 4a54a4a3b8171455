"""Data sampled from a model, with the latent values that generated them: exact samples from its posterior.

There are two ways to sample data. A model in jensen's style runs without data, ``model(None, *covariates, n=n)``. Any
other model runs on an example of its data: its observed values (``obs=``) are sampled instead, and the samples replace
them among its arguments. A second run on the sampled data with the same random numbers must give the same samples: this
checks that no sample depends on the values of the example.
"""

from __future__ import annotations

__all__ = ["DrawnData", "OnExample", "WithoutData", "drawn_data", "prior_quantiles", "simulate"]

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol, overload

import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution, Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from jensen.checked import checked
from jensen.missing import has_holes

from .arguments import check_tensors, explained
from .batches import Data, as_tensors
from .caller import outside
from .checks import check_simulated
from .modes import running
from .parameters import claim_parameters, store_kept
from .randomness import forked_rng
from .sites import Site, base_of, is_discrete, plates_of
from .weights import Program, model_sites

_PRIOR_DRAWS = 10_000  # for quantiles


@overload
def simulate(model: Program, n: int, *covariates: Tensor, data: None = None) -> tuple[dict[str, Tensor], Tensor]: ...
@overload
def simulate(model: Program, n: int, *, data: Tensor) -> tuple[dict[str, Tensor], Tensor]: ...
@overload
def simulate(model: Program, n: int, *, data: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]: ...


@checked
@store_kept()
def simulate(model: Program, n: int, *covariates: Tensor, data: Data | None = None) -> tuple[dict[str, Tensor], Data]:
    r"""Sample data from a model, together with the latent values that generated them.

    .. math:: z_n \sim p(z), \qquad x_n \sim p(x \mid z_n)

    Given x, the z that generated it is an exact sample from p(z | x). Uses the user's random stream, without gradient.

    With an example, a model of any style can sample data: all its observed sites are sampled, whatever their names,
    and arguments that it does not observe are covariates, which stay unchanged. An observed value must be an argument,
    or its numbers reshaped or cut into slices that together cover all of it. Where a mask excludes an observation, the
    example's value stays (padding, missing values), and NaN stays missing. A model whose later sites read earlier data
    is run until the data stop changing. Models with an example are run in evaluation mode.

    Args:
        model: a model called as ``model(None, *covariates, n=n)`` that samples its data at site ``"x"``; with an
            example any Pyro model, called as ``model(*data)``.
        n: the number N of data points, at least 1.
        covariates: the other arguments of the model, tensors whose first dimension is N.
        data: an example of the data, a tensor or a tuple of tensors as the model takes them, covariates included; its
            rows are repeated if it has fewer than N.

    Returns:
        The latent values by site, [N, *event], and the data: x, [N, *event_shape]; with an example, data of its form,
        N rows of each argument.

    Raises:
        ValueError: for ``n`` less than 1, a model without site ``"x"``, and a site outside the one plate of
            the data; with an example, for samples that depend on its values, and for observed values that are neither
            arguments nor parts of them.
        TypeError: if the model does not run as ``model(None, *covariates, n=n)`` and there is no example.

    Warns:
        UserWarning: for an argument of the example that the model neither observes nor reads.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from jensen.models import PPCA
        >>> values, x = simulate(PPCA(5, latent=2), 3)
        >>> values["z"].shape, x.shape
        (torch.Size([3, 2]), torch.Size([3, 5]))
        >>> def regression(features, y):
        ...     with pyro.plate("rows", len(features)):
        ...         slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(slope * features, 0.1), obs=y)
        >>> values, (features, y) = simulate(regression, 3, data=(torch.ones(2), torch.zeros(2)))
        >>> features, bool((y - values["slope"]).abs().max() < 1)
        (tensor([1., 1., 1.]), True)
    """
    source = drawn_data(model, n, covariates, data)
    sites, drawn = source.draw()
    return {site["name"]: site["value"] for site in sites if site["name"] not in source.observed}, drawn


Seen = dict[str, Any]  # the observed value, by site
Place = tuple[int, Tensor, Tensor]  # argument; the flat positions in it, of the site's shape; which of them count


class DrawnData(Protocol):
    """A model that samples its data.

    Attributes:
        observed: the sites of the data, in sampling order.
    """

    observed: tuple[str, ...]

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that samples everything, and its data."""
        ...

    def sites(self, given: Mapping[str, Tensor]) -> list[Site]:
        """The sites of a run at given values, by site, of latent sites or data sites."""
        ...


def drawn_data(model: Program, n: int, covariates: tuple[Tensor, ...], data: Data | None) -> DrawnData:
    """The method by which a model samples ``n`` data points: without data, or with an example."""
    if n < 1:
        raise ValueError(f"n is the number of data points to sample, at least 1, but got {n}")
    if data is None:
        return WithoutData(model, n, covariates)
    if covariates:
        raise ValueError("covariates are part of an example: give all arguments of the model in data")
    return OnExample(model, n, data)


class WithoutData:
    """A model called as ``model(None, *covariates, n=n)``, which samples its data at site ``"x"``."""

    observed: tuple[str, ...] = ("x",)

    def __init__(self, model: Program, n: int, covariates: tuple[Tensor, ...]) -> None:
        self._model, self._n, self._covariates = model, n, covariates

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that samples everything, and its data."""
        sites = self.sites({})
        if "x" not in (names := [site["name"] for site in sites if not site["is_observed"]]):
            raise ValueError(
                f"the model samples no data: none of its sampled sites, {sorted(names)}, is 'x'; give an example of "
                "its data, simulate(model, n, data=...), or name the site of the data 'x', with obs=None if there are "
                "none"
            )
        check_simulated(sites, self._n)
        return sites, next(site["value"] for site in sites if site["name"] == "x")

    def sites(self, given: Mapping[str, Tensor]) -> list[Site]:
        """The sites of a run at given values; TypeError if the model does not run without data."""
        model = poutine.condition(self._model, data=dict(given)) if given else self._model
        try:
            return model_sites(model, None, *self._covariates, n=self._n)
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"the model cannot sample data: model(None, *covariates, n={self._n}) fails ({error}); give an example "
                "of its data, simulate(model, n, data=...), or write it as forward(x=None, *covariates, n=1), with "
                "obs=x at site 'x' and a plate over n data points if x is None"
            ) from error


class OnExample:
    """A model that runs on an example of its data and samples its observed sites.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        n: the number of data points to sample.
        data: the example, as for :func:`simulate`.

    Example:
        >>> from jensen.models import PPCA
        >>> source = OnExample(PPCA(5, latent=2), 3, torch.zeros(2, 5))
        >>> sites, x = source.draw()
        >>> source.observed, x.shape, torch.equal(x, sites[-1]["value"])
        (('x',), torch.Size([3, 5]), True)
    """

    def __init__(self, model: Program, n: int, data: Data) -> None:
        example = as_tensors(data)
        rows = torch.arange(n) % len(example[0])
        self._model, self._n, self._alone = model, n, isinstance(data, Tensor)
        self._data = tuple(x.detach().index_select(0, rows.to(x.device)) for x in example)
        self._holes = tuple(x.isnan() if has_holes(x) else None for x in self._data)
        claim_parameters(model, model)
        try:
            with forked_rng():
                sites, seen = self._run(self._data)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or n == len(example[0]):
                raise
            raise ValueError(
                f"the model does not run on n={n} data points made of the {len(example[0])} rows of the example "
                f"({_first_line(error)}); use n={len(example[0])}, or write the model for any number of data points"
            ) from error
        self._places = _places(sites, seen, self._data)
        self.observed = tuple(self._places)

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that samples everything, and its data."""
        with forked_rng():
            before, _ = self._run(self._data)
        for settled in range(1, len(self._places) + 1):  # sites of data that no longer change
            self._put({site["name"]: site["value"] for site in before})
            with forked_rng():
                after, _ = self._run(self._data)
            changed = self._first_change(before, after)
            if changed is None:
                break
            if sum(site["name"] in self._places for site in before[:changed]) < settled:
                raise ValueError(
                    f"the model cannot sample data: site '{before[changed]['name']}' depends on values observed at "
                    "that site or later, so these are not samples from the model; compute its parameters from "
                    "covariates (separate arguments) and from values sampled before it"
                )
            before = after
        self._warn_of_unread(before)
        sites, seen = self._run(self._data)
        for site in sites:
            if site["name"] in seen:
                self._check_put(site, seen[site["name"]])
        check_simulated([site for site in sites if site["name"] not in seen], self._n)
        pairs = zip(self._data, self._holes, strict=True)
        drawn = tuple(x if holes is None else x.masked_fill(holes, math.nan) for x, holes in pairs)
        return sites, drawn[0] if self._alone else drawn

    def sites(self, given: Mapping[str, Tensor]) -> list[Site]:
        """The sites of a run at given values; values of data sites replace parts of the arguments."""
        self._put({name: value for name, value in given.items() if name in self._places})
        return self._run(self._data, given)[0]

    def _run(self, data: tuple[Tensor, ...], given: Mapping[str, Tensor] | None = None) -> tuple[list[Site], Seen]:
        """The sites of a run that samples its observed sites, and the values that it observed."""
        handler = _Redraw()
        program = poutine.condition(handler(self._model), data=dict(given or {}))
        with explained(data):
            try:
                with running(self._model, self._model):
                    return model_sites(program, *data), handler.seen
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"the model cannot sample data: one of its distributions has no sample() ({_first_line(error)})"
                ) from error

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Write the values of data sites into the arguments."""
        data = [x.clone() for x in self._data]
        for name, (i, index, counted) in self._places.items():
            if name in values:
                value = values[name].expand(index.shape)
                data[i].view(-1)[index[counted]] = value[counted].to(data[i].dtype)
        self._data = tuple(data)

    @staticmethod
    def _first_change(before: list[Site], after: list[Site]) -> int | None:
        """The first site at which two runs differ in value, density or mask."""
        for i, (one, other) in enumerate(zip(before, after, strict=False)):
            if one["name"] != other["name"] or not all(map(_same, _facts(one), _facts(other))):
                return i
        return None if len(before) == len(after) else min(len(before), len(after)) - 1

    def _check_put(self, site: Site, seen: Any) -> None:
        """Raise ValueError unless a site observes its sampled value once that is in the arguments."""
        i, _, counted = self._places[site["name"]]
        if not _same(site["value"][counted], seen[counted]):
            raise ValueError(
                f"the model observes other values at site '{site['name']}' than the samples written into data[{i}] "
                f"({self._data[i].dtype}): it rounds, clips or otherwise changes that argument, or observes another "
                "argument that is equal to it; give the model the data exactly as it observes them"
            )

    def _warn_of_unread(self, sites: list[Site]) -> None:
        """Warn of arguments that the model does not observe and whose rows have no effect when permuted."""
        for i in set(range(len(self._data))) - {i for i, *_ in self._places.values()}:
            moved = self._data[i].roll(1, 0)
            if torch.equal(moved, self._data[i]):
                continue
            try:
                with forked_rng():
                    again, _ = self._run((*self._data[:i], moved, *self._data[i + 1 :]))
            except (IndexError, RuntimeError, ValueError):
                continue
            if self._first_change(sites, again) is None:
                warnings.warn(
                    f"the model neither observes nor reads data[{i}], which stays as in the example: if it is derived "
                    "from the observed data (a reversed series, for example), derive it again from the sampled data",
                    stacklevel=outside(),
                )


class _Redraw(Messenger):
    """A handler under which observed sites are sampled; ``seen`` holds the observed values.

    Unlike ``poutine.uncondition`` it writes nothing into ``infer``, which sites may share, and skips factors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = {}

    def _pyro_sample(self, msg: Any) -> None:
        if (
            msg["is_observed"]
            and not (msg["infer"] or {}).get("_deterministic")
            and not isinstance(base_of(msg["fn"]), Unit)
        ):
            self.seen[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _places(sites: list[Site], seen: Seen, data: tuple[Tensor, ...]) -> dict[str, Place]:
    """The place of each observed value among the arguments.

    Raises:
        ValueError: for values that are not an argument, reshaped or sliced, for numbers that are observed twice, and
            for arguments that are only partly observed.
    """
    if not seen:
        raise ValueError(f"the model observes nothing in a run on data, whose sites are {[s['name'] for s in sites]}")
    places: dict[str, Place] = {}
    for site in sites:
        if (name := site["name"]) not in seen:
            continue
        _check_in_full(site)
        value, counted = seen[name], _counted(site)
        if not isinstance(value, Tensor) or value.shape != counted.shape:
            raise ValueError(
                f"the value observed at site '{name}' has shape {list(getattr(value, 'shape', []))}, but sampled "
                f"values have {list(counted.shape)}; give both the same shape (and use the size of the plate as n, if "
                "it is fixed)"
            )
        if (found := _find(value, counted, data)) is None:
            raise ValueError(
                f"the value observed at site '{name}' is neither an argument of the model nor a reshaped slice of one, "
                "so a sampled value cannot replace it; give the model the data exactly as it observes them"
            )
        places[name] = (*found, counted)
    for i, x in enumerate(data):
        names = [name for name, (j, *_) in places.items() if j == i]
        if not names:
            continue
        every = torch.cat([places[name][1].flatten() for name in names]).bincount(minlength=x.numel())
        drawn = torch.cat([places[name][1][places[name][2]] for name in names]).bincount(minlength=x.numel())
        if (drawn > 1).any():
            raise ValueError(f"the model observes numbers of data[{i}] repeatedly, at {names}, and would sample each")
        if (every == 0).any():
            raise ValueError(
                f"the model observes {int((every > 0).sum())} of the {x.numel()} numbers of data[{i}], at {names}, and "
                "does not sample the others; give the unobserved numbers as a separate argument, or omit them"
            )
    return places


def _check_in_full(site: Site) -> None:
    for frame in plates_of(site):
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"the plate '{frame.name}' around site '{site['name']}' takes {frame.size} of {frame.full_size} data "
                "points; sample data from a model without subsampling (no subsample_size)"
            )


def _find(value: Tensor, counted: Tensor, data: tuple[Tensor, ...]) -> tuple[int, Tensor] | None:
    """The argument that contains a value, and its flat positions there: found by memory, else by numbers."""
    positions = [torch.arange(x.numel(), device=x.device).view(x.shape) for x in data]
    for i, x in enumerate(data):
        if value.dtype == x.dtype and value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            return i, positions[i].as_strided(value.shape, value.stride(), value.storage_offset())
    for i, x in enumerate(data):
        for part, where in zip(_parts(x), _parts(positions[i]), strict=True):
            if part.numel() == value.numel() and bool(((part.reshape(value.shape) == value) | ~counted).all()):
                return i, where.reshape(value.shape)
    return None


def _parts(x: Tensor) -> Iterator[Tensor]:
    """A tensor, and its slices at each index of each dimension but the first."""
    yield x
    for dim in range(1, x.dim()):
        yield from x.unbind(dim)


def _counted(site: Site) -> Tensor:
    """Which numbers of a site's value its masks include, bool of the shape of the value."""
    value, fn = site["value"], site["fn"]
    counted = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    masks = [(site["mask"], fn.event_dim)]
    while base_of(fn) is not fn:
        masks.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    for mask, event_dim in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device)
            counted = counted & mask.reshape(*mask.shape, *[1] * event_dim).bool()
    return counted


def _facts(site: Site) -> tuple[Tensor | None, ...]:
    """The quantities in which two runs of a site are compared."""
    log_prob = None
    with torch.no_grad(), suppress(NotImplementedError, ValueError):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return site["value"], log_prob, _counted(site)


def _first_line(error: Exception) -> str:
    """The message of an error without the shapes that Pyro appends."""
    return str(error).partition("\n")[0]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal up to rounding."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), 1e-5, 1e-6, equal_nan=True)


def prior_quantiles(
    model: Program, levels: Tensor, *covariates: Tensor, data: Data | None = None, seed: int | None = 0
) -> dict[str, Tensor]:
    """Quantiles of each continuous latent feature under the prior, by site: [L, *event].

    Those of the top site are exact if its distribution has quantiles; the others are estimated from samples.

    Args:
        model: as for :func:`~jensen.inference.simulate`.
        levels: between 0 and 1, [L].
        covariates: the other arguments of the model; one row.
        data: an example of the data, as for :func:`~jensen.inference.simulate`; one row.
        seed: of the samples.
    """
    check_tensors(covariates)
    if other := [list(c.shape) for c in covariates if c.shape[:1] != (1,)]:
        raise ValueError(f"covariates must have one row here, [1, ...], but got a tensor of shape {other[0]}")
    rows = tuple(c.expand(_PRIOR_DRAWS, *c.shape[1:]) for c in covariates)
    with running(model, model, "prior_quantiles", seed=seed):
        claim_parameters(model, model)
        one = drawn_data(model, 1, covariates, data)
        sites = [site for site in one.draw()[0] if site["name"] not in one.observed]
        quantiles = {}
        drawn: dict[str, Tensor] = {}
        for i, site in enumerate(sites):
            if is_discrete(site["fn"]):
                continue
            exact = _exact_quantiles(site, levels) if i == 0 else None
            if exact is None and not drawn:
                many = drawn_data(model, _PRIOR_DRAWS, rows, data)
                drawn = {site["name"]: site["value"] for site in many.draw()[0]}
            name = site["name"]
            quantiles[name] = drawn[name].quantile(levels.to(drawn[name]), 0) if exact is None else exact
    return quantiles


def _exact_quantiles(site: Site, levels: Tensor) -> Tensor | None:
    """Quantiles of the features of a site of one row, [L, *event], if its distribution has them."""
    fn, value = base_of(site["fn"]), site["value"]
    if isinstance(fn, TransformedDistribution) or fn.event_shape:  # icdf is that of the base, or undefined
        return None
    try:
        quantiles: Tensor = fn.icdf(levels.to(value).reshape(-1, *[1] * value.dim()))
    except NotImplementedError:
        return None
    return quantiles.expand(len(levels), *value.shape)[:, 0]
