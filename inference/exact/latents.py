"""The latent sites of a model for sums and integrals: lists of states, maps from R^D, log p(x, z) there."""

from __future__ import annotations

__all__ = ["Latents", "read_latents"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to, constraints

from jensen.kernel.lifts import Lifted
from jensen.kernel.randomness import derived_seed, forked_rng
from jensen.kernel.sites import Site, base_of, enclosing_plates, nesting_of
from jensen.kernel.weights import Program, densities, model_sites


@dataclass(frozen=True, eq=False)
class Latents:
    """The values to sum and to integrate over, per data point.

    Attributes:
        states: for each discrete site its states, [S, *event].
        maps: for each continuous site the transform from R^d onto its support, and the shape (such as [d]) of its
            argument.
        centre: the centre of the prior in R^D, all continuous sites concatenated, [D].
        scale: its extent, [D].
        dtype: of the continuous values.
        lifted: the model, as it is run at many values.
    """

    states: dict[str, Tensor]
    maps: dict[str, tuple[Any, torch.Size]]
    centre: Tensor
    scale: Tensor
    dtype: torch.dtype
    lifted: Lifted

    @property
    def dimension(self) -> int:
        """D, the number of continuous coordinates."""
        return sum(shape.numel() for _, shape in self.maps.values())

    @property
    def combinations(self) -> int:
        """The number of joint states of the discrete sites."""
        return math.prod(len(states) for states in self.states.values())

    def log_density(self, model: Program, data: Sequence[Tensor], row: Tensor, points: Tensor, at_once: int) -> Tensor:
        r"""Log of the sum of p(x, z) over all states, as a density of points in units of the prior's extent.

        Args:
            model: the model.
            data: the tensors that contain the rows.
            row: the data point of each column, [M].
            points: [K, M, D].
            at_once: how many evaluations are run at once.

        Returns:
            float64 [K, M].
        """
        K = len(points)
        step = max(1, at_once // K)
        log_sums = []
        for part, block in zip(row.split(step), points.split(step, 1), strict=True):
            batch = tuple(x[part] for x in data)
            states = max(1, at_once // (K * len(part)))
            total = block.new_full((K, len(part)), -math.inf)
            values, log_volume = self._continuous(block)
            for first in range(0, self.combinations, states):
                index = torch.arange(first, min(first + states, self.combinations), device=block.device)
                log_p = self._joint(model, batch, index, values, K)  # [S, K, m]
                total = torch.logaddexp(total, log_p.logsumexp(0))
            log_sums.append(total + log_volume)
        return torch.cat(log_sums, 1)

    def _joint(
        self, model: Program, batch: tuple[Tensor, ...], index: Tensor, values: dict[str, Tensor], K: int
    ) -> Tensor:
        m, S = len(batch[0]), len(index)
        joint = {}
        for name, value in values.items():
            joint[name] = value.expand(S, *value.shape).flatten(0, 1)  # [S K, m, *event]
        for name, states in self.states.items():
            chosen = states[index % len(states)]
            index = index // len(states)
            shape = (S, K, m, *chosen.shape[1:])
            joint[name] = chosen[:, None, None].expand(shape).flatten(0, 1)
        with pyro.validation_enabled(False):  # extreme parameters may overflow: log p is NaN there, without mass
            log_p = torch.as_tensor(sum(densities(model, *batch, lifted=self.lifted)(joint).values())).double()
        log_p = log_p.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return log_p.reshape(S, K, m)

    def _continuous(self, points: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the continuous sites, [K, m, *event], and the log volume of a unit of the points, [K, m]."""
        free = self.centre + self.scale * points  # [K, m, D]
        log_volume = free.new_zeros(free.shape[:2]) + self.scale.log().sum()
        values, first = {}, 0
        for name, (transform, shape) in self.maps.items():
            u = free[..., first : first + shape.numel()].reshape(*free.shape[:2], *shape)
            first += shape.numel()
            value = transform(u)
            log_volume = log_volume + transform.log_abs_det_jacobian(u, value).reshape(*free.shape[:2], -1).sum(-1)
            values[name] = value.to(self.dtype)
        return values, log_volume


def read_latents(model: Program, data: Sequence[Tensor], draws: int = 256) -> Latents:
    """The latents of a model, from one run of it on a private random stream.

    Args:
        model: the model.
        data: tensors whose first dimension is N.
        draws: the number of prior samples, over all the data together: they locate the prior.

    Raises:
        ValueError: naming the site that can be neither summed nor integrated per data point.
    """
    n = len(data[0])
    repeats = max(1, draws // n)
    with forked_rng():
        torch.manual_seed(derived_seed(0, "exact"))
        sites = model_sites(model, *(x[:draws].repeat_interleave(repeats, 0) for x in data))
    rows = repeats * min(n, draws)
    latent = [site for site in sites if not site["is_observed"]]
    sizes = tuple(frame.size for frame in enclosing_plates(sites))
    if not latent:
        raise ValueError("the model has no latent site: log p(x) is the log-density of its observed sites")
    if not sizes:
        raise ValueError(
            f"the sites {[site['name'] for site in sites]} have no plate in common (a global latent), so log p(x) is "
            "joint over all data, not one value per data point; open one plate over the data around every site"
        )
    if sizes != (rows,):
        raise ValueError(f"the plates around every site have sizes {sizes}, but the model was given {rows} data points")
    states, maps, free = {}, {}, []
    for site in latent:
        name, fn = site["name"], site["fn"]
        if site["value"].shape != (rows, *fn.event_shape):
            raise ValueError(
                f"site '{name}' has values of shape {list(site['value'].shape)}, not one of {list(fn.event_shape)} for "
                "each data point: it is in a plate of its own; make that a part of the event (.to_event(1))"
            )
        if isinstance(base_of(fn), Delta):
            raise ValueError(f"site '{name}' is a point (Delta) and has no density: make it pyro.deterministic")
        if fn.support.is_discrete:
            states[name] = _states(site)
        else:
            transform = biject_to(_shared(site, fn.support, fn.event_shape))
            u = transform.inv(site["value"].double())
            maps[name] = transform, u.shape[1:]
            free.append(u.reshape(rows, -1))
    lifted = Lifted(model, nesting_of(sites))
    dtypes = [site["value"].dtype for site in latent if site["name"] in maps]
    if not free:
        nowhere = torch.zeros(0, dtype=torch.float64, device=data[0].device)
        return Latents(states, maps, nowhere, nowhere, torch.float64, lifted)
    prior = torch.cat(free, 1)  # [rows, D]
    quantiles = prior.quantile(torch.tensor([0.16, 0.5, 0.84], dtype=prior.dtype, device=prior.device), 0)
    scale = (quantiles[2] - quantiles[0]) / 2
    scale = torch.where(scale > 0, scale, 1.0)
    return Latents(states, maps, quantiles[1], scale, dtypes[0], lifted)


def _states(site: Site) -> Tensor:
    """All states of a discrete site, [S, *event]."""
    fn, event = site["fn"], site["fn"].event_shape
    try:
        states: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        base = base_of(fn)
        try:
            single = base.enumerate_support(expand=False).flatten(0) if not base.event_shape else None
        except NotImplementedError:
            single = None
        if single is None:
            raise ValueError(
                f"site '{site['name']}' ({type(base).__name__}) cannot enumerate its states ({error}), because of an "
                "infinite or varying support, or several vectors"
            ) from error
        single, count = single.flatten(), event.numel()
        if count * math.log2(len(single)) > 30:
            raise ValueError(f"site '{site['name']}' has {len(single)}^{count} states, too many to enumerate") from None
        states = torch.cartesian_prod(*[single] * count).reshape(-1, *event)
    return states.reshape(len(states), *event)


def _shared(site: Site, support: Any, event: torch.Size) -> Any:
    """The support, if its bounds are equal for all data; else ValueError."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_shared(site, support.base_constraint, event), support.reinterpreted_batch_ndims)
    bounds = {name: bound for name, bound in vars(support).items() if isinstance(bound, Tensor)}
    if not bounds:
        return support
    shared = {}
    for name, bound in vars(support).items():
        if isinstance(bound, Tensor):
            full = bound.expand(torch.broadcast_shapes(bound.shape, event)).reshape(-1, *event)
            if not (full == full[0]).all():
                raise ValueError(
                    f"the support of site '{site['name']}' differs between data points, or with another site: its "
                    f"{name} is not constant"
                )
            bound = full[0].double()
        shared[name] = bound
    return type(support)(*shared.values())
