"""Data drawn from a model, with the latent values that made them: exact draws from its posterior.

A model draws data in one of two ways. A model of ours is run without data, ``model(None, *covariates, n=n)``. Any other
is run on an example of its data: what it observes there (``obs=``) it draws instead, and the values drawn take the
places of those observed among its arguments. That no draw depends on the values of the example is checked: the model is
run again on the data that it drew, with the same random numbers, and has to draw the same.
"""

from __future__ import annotations

__all__ = ["DrawnData", "OnExample", "WithoutData", "drawn_data", "prior_quantiles", "simulate"]

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
    r"""Draw data from a model, together with the latent values that made them.

    .. math:: z_n \sim p(z), \qquad x_n \sim p(x \mid z_n)

    Given x, the z that made it is an exact draw from p(z | x). Draws from the user's random stream, without gradient.

    With an example, a model of any style draws: everything that it observes is drawn, whatever its sites are called,
    and arguments that it does not observe are covariates, which stay as they are. An observed value is an argument, or
    its numbers reshaped or cut into slices that together are all of it. Where a mask leaves an observation out, the
    example's value stays (padding, missing values). A model whose later sites read earlier data is run until the data
    no longer change. Models are then run in evaluation mode.

    Args:
        model: a model called as ``model(None, *covariates, n=n)`` that draws its data at site ``"x"``; with an example
            any Pyro model, called as ``model(*data)``.
        n: the number N of data, at least 1.
        covariates: what the model reads beside x, tensors whose first dimension is N.
        data: an example of the data, a tensor or a tuple of tensors as the model takes them, covariates included; its
            rows are repeated where it has fewer than N.

    Returns:
        The latent values by site, [N, *event], and the data: x, [N, *event_shape]; with an example, data of its form,
        N rows of each argument.

    Raises:
        ValueError: for ``n`` less than 1, a model without site ``"x"``, and a site that is not in the one plate of
            the data; with an example, for draws that depend on its values, and for observed values that are neither
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


Seen = dict[str, Any]  # what was observed, by site
Place = tuple[int, Tensor, Tensor]  # which argument; the flat positions in it, of the site's shape; which of them count


class DrawnData(Protocol):
    """A model that draws its data.

    Attributes:
        observed: the sites of the data, in the order in which the model draws them.
    """

    observed: tuple[str, ...]

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that draws everything, and its data."""
        ...

    def sites(self, given: Mapping[str, Tensor]) -> list[Site]:
        """The sites of a run at given values, by site, of latents or of data."""
        ...


def drawn_data(model: Program, n: int, covariates: tuple[Tensor, ...], data: Data | None) -> DrawnData:
    """How a model draws ``n`` data: without data, or as on an example."""
    if n < 1:
        raise ValueError(f"n is the number of data to draw, at least 1, but got {n}")
    if data is None:
        return WithoutData(model, n, covariates)
    if covariates:
        raise ValueError("covariates are part of an example: give both in data, the arguments that the model takes")
    return OnExample(model, n, data)


class WithoutData:
    """A model called as ``model(None, *covariates, n=n)``, which draws its data at site ``"x"``."""

    observed: tuple[str, ...] = ("x",)

    def __init__(self, model: Program, n: int, covariates: tuple[Tensor, ...]) -> None:
        self._model, self._n, self._covariates = model, n, covariates

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that draws everything, and its data."""
        sites = self.sites({})
        if "x" not in (names := [site["name"] for site in sites if not site["is_observed"]]):
            raise ValueError(
                f"the model draws no data: none of the sites that it draws, {sorted(names)}, is 'x'; give an example "
                "of its data, as simulate(model, n, data=...) takes it, or name the site of the data 'x', with "
                "obs=None where there are none"
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
                f"the model cannot draw data: model(None, *covariates, n={self._n}) fails ({error}); give an example "
                "of its data, as simulate(model, n, data=...) takes it, or write it as forward(x=None, *covariates, "
                "n=1), with obs=x at site 'x' and a plate over n data where x is None"
            ) from error


class OnExample:
    """A model that is run on an example of its data, and draws what it observes there.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        n: the number of data to draw.
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
        claim_parameters(model, model)
        try:
            with forked_rng():
                sites, seen = self._run(self._data)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or n == len(example[0]):
                raise
            raise ValueError(
                f"the model does not run on n={n} data made of the {len(example[0])} rows of the example "
                f"({_first_line(error)}); take n={len(example[0])}, or write the model for any number of data"
            ) from error
        self._places = _places(sites, seen, self._data)
        self.observed = tuple(self._places)

    def draw(self) -> tuple[list[Site], Data]:
        """The sites of a run that draws everything, and its data."""
        with forked_rng():
            before, _ = self._run(self._data)
        for settled in range(1, len(self._places) + 1):  # sites of data that do not change any more
            self._put({site["name"]: site["value"] for site in before})
            with forked_rng():
                after, _ = self._run(self._data)
            changed = self._first_change(before, after)
            if changed is None:
                break
            if sum(site["name"] in self._places for site in before[:changed]) < settled:
                raise ValueError(
                    f"the model cannot draw data: site '{before[changed]['name']}' depends on the values that the "
                    "model observes at that site or later ones, so these are no draws from it; compute what it depends "
                    "on from covariates (arguments of their own) and from values drawn before it"
                )
            before = after
        self._warn_of_unread(before)
        sites, seen = self._run(self._data)
        for site in sites:
            if site["name"] in seen:
                self._check_put(site, seen[site["name"]])
        check_simulated([site for site in sites if site["name"] not in seen], self._n)
        return sites, self._data[0] if self._alone else self._data

    def sites(self, given: Mapping[str, Tensor]) -> list[Site]:
        """The sites of a run at given values, those of data in their places among the arguments."""
        self._put({name: value for name, value in given.items() if name in self._places})
        return self._run(self._data, given)[0]

    def _run(self, data: tuple[Tensor, ...], given: Mapping[str, Tensor] | None = None) -> tuple[list[Site], Seen]:
        """The sites of a run that draws what it observes, and what it observed."""
        handler = _Redraw()
        program = poutine.condition(handler(self._model), data=dict(given or {}))
        with explained(data):
            try:
                with running(self._model, self._model):
                    return model_sites(program, *data), handler.seen
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"the model cannot draw data: one of its distributions has no sample() ({_first_line(error)})"
                ) from error

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Put values of sites of data in their places among the arguments."""
        data = [x.clone() for x in self._data]
        for name, (i, index, counted) in self._places.items():
            if name in values:
                value = values[name].expand(index.shape)
                data[i].view(-1)[index[counted]] = value[counted].to(data[i].dtype)
        self._data = tuple(data)

    @staticmethod
    def _first_change(before: list[Site], after: list[Site]) -> int | None:
        """The first site at which two runs differ, in its value, its density there or its mask."""
        for i, (one, other) in enumerate(zip(before, after, strict=False)):
            if one["name"] != other["name"] or not all(map(_same, _facts(one), _facts(other))):
                return i
        return None if len(before) == len(after) else min(len(before), len(after)) - 1

    def _check_put(self, site: Site, seen: Any) -> None:
        """Raise ValueError unless a site observes what it draws, once that is in its place among the arguments."""
        i, _, counted = self._places[site["name"]]
        if not _same(site["value"][counted], seen[counted]):
            raise ValueError(
                f"the model observes other values at site '{site['name']}' than those drawn, once these stand in "
                f"data[{i}] ({self._data[i].dtype}): it rounds, clips or otherwise changes that argument, or observes "
                "another one that is equal to it; hand the model the data as it is to observe them"
            )

    def _warn_of_unread(self, sites: list[Site]) -> None:
        """Warn of arguments that the model does not observe, and whose rows may be moved without any effect."""
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
                    f"the model neither observes nor reads data[{i}], which stays as in the example: if it is made "
                    "from what the model observes (a series reversed, say), make it anew from the drawn data",
                    stacklevel=outside(),
                )


class _Redraw(Messenger):
    """A handler under which observed sites are drawn; ``seen`` has what was observed.

    Unlike ``poutine.uncondition`` it writes nothing into ``infer``, which sites may share, and leaves factors alone.
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
    """Where among the arguments each observed value stands.

    Raises:
        ValueError: for values that are not made of an argument's numbers by reshaping and slicing alone, for numbers
            that are observed twice, and for arguments of which only a part is observed.
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
                f"the value observed at site '{name}' has shape {list(getattr(value, 'shape', []))}, but values drawn "
                f"there have {list(counted.shape)}; give both one shape (and take n of its size where a plate has a "
                "size of its own)"
            )
        if (found := _find(value, counted, data)) is None:
            raise ValueError(
                f"the value observed at site '{name}' is no argument of the model, nor made of the numbers of one by "
                "reshaping and slicing alone, so a drawn value cannot be put in its place; hand the model the data as "
                "it observes them"
            )
        places[name] = (*found, counted)
    for i, x in enumerate(data):
        names = [name for name, (j, *_) in places.items() if j == i]
        if not names:
            continue
        every = torch.cat([places[name][1].flatten() for name in names]).bincount(minlength=x.numel())
        drawn = torch.cat([places[name][1][places[name][2]] for name in names]).bincount(minlength=x.numel())
        if (drawn > 1).any():
            raise ValueError(f"the model observes numbers of data[{i}] more than once, at {names}: it draws each anew")
        if (every == 0).any():
            raise ValueError(
                f"the model observes {int((every > 0).sum())} of the {x.numel()} numbers of data[{i}], at {names}, and "
                "does not draw the others; give what it does not observe as an argument of its own, or leave it out"
            )
    return places


def _check_in_full(site: Site) -> None:
    for frame in plates_of(site):
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"the plate '{frame.name}' around site '{site['name']}' takes {frame.size} of {frame.full_size} data; "
                "data are drawn from a model without subsampling (no subsample_size)"
            )


def _find(value: Tensor, counted: Tensor, data: tuple[Tensor, ...]) -> tuple[int, Tensor] | None:
    """The argument that a value is part of, and its flat positions there: by its memory, or else by its numbers."""
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
    """Which numbers of a site's value its masks leave in, bool of the shape of the value."""
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
    """What two runs of a site are compared in."""
    log_prob = None
    with torch.no_grad(), suppress(NotImplementedError, ValueError):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return site["value"], log_prob, _counted(site)


def _first_line(error: Exception) -> str:
    """What an error says, without the shapes that Pyro adds to it."""
    return str(error).partition("\n")[0]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same up to rounding."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), 1e-5, 1e-6, equal_nan=True)


def prior_quantiles(
    model: Program, levels: Tensor, *covariates: Tensor, data: Data | None = None, seed: int | None = 0
) -> dict[str, Tensor]:
    """Quantiles of each continuous latent feature under the prior, by site: [L, *event].

    Those of the top site are exact where its distribution knows them; the others are of draws.

    Args:
        model: as for :func:`~jensen.inference.simulate`.
        levels: between 0 and 1, [L].
        covariates: what the model reads beside x; one row.
        data: an example of the data, as for :func:`~jensen.inference.simulate`; one row.
        seed: of the draws.
    """
    check_tensors(covariates)
    if other := [list(c.shape) for c in covariates if c.shape[:1] != (1,)]:
        raise ValueError(f"covariates are of one row here, [1, ...], but got a tensor of shape {other[0]}")
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
    """Quantiles of the features of a site of one row, [L, *event], if its distribution knows them."""
    fn, value = base_of(site["fn"]), site["value"]
    if isinstance(fn, TransformedDistribution) or fn.event_shape:  # icdf speaks of the base, or of no feature
        return None
    try:
        quantiles: Tensor = fn.icdf(levels.to(value).reshape(-1, *[1] * value.dim()))
    except NotImplementedError:
        return None
    return quantiles.expand(len(levels), *value.shape)[:, 0]
