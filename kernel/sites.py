"""Reading traces: which sites count, which plates enclose them, and their log-densities per datum."""

from __future__ import annotations

__all__ = [
    "PARTICLES",
    "AtMode",
    "PairRun",
    "Site",
    "Terms",
    "at_leaves",
    "base_of",
    "enclosing_plates",
    "fold",
    "in_plate",
    "is_discrete",
    "needs_score",
    "nesting_of",
    "plates_of",
    "site_log_prob",
    "sites_of",
    "stop_parameters",
    "subsampling",
    "sum_to_data",
    "with_taps",
]

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform, TorchDistribution, Unit
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .supports import log_density

Site = Any  # a Pyro message: a TypedDict that Pyro does not type fully
PARTICLES = "jensen_particles"


def sites_of(trace: Trace) -> list[Site]:
    """The sample sites that count: not those of subsampling, not ``pyro.deterministic``."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    ]


def plates_of(site: Site) -> set[CondIndepStackFrame]:
    """The vectorized plates around a site; one that was opened without a size has that of the site's batch."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return {frame if frame.size != -1 else _sized(frame, site) for frame in frames}


def _sized(frame: CondIndepStackFrame, site: Site) -> CondIndepStackFrame:
    value = site["value"].shape
    shape = torch.broadcast_shapes(site["fn"].batch_shape, value[: len(value) - site["fn"].event_dim])
    size = shape[_dim(frame)] if len(shape) >= -_dim(frame) else 1
    return frame._replace(size=size, full_size=size)


def _dim(frame: CondIndepStackFrame) -> int:
    assert frame.dim is not None  # plates_of leaves the sequential ones out
    return frame.dim


def nesting_of(sites: list[Site]) -> int:
    """How many dimensions the plates of these sites take."""
    return max((-_dim(frame) for site in sites for frame in plates_of(site)), default=0)


def enclosing_plates(sites: list[Site]) -> list[CondIndepStackFrame]:
    """The plates, other than the particles, that enclose every site, from left to right."""
    common = set.intersection(*map(plates_of, sites)) if sites else set()
    return sorted((frame for frame in common if frame.name != PARTICLES), key=_dim)


def in_plate(fn: Callable[..., Any], particles: int, nesting: int) -> Callable[..., Any]:
    """A program under K particles, in a plate left of all its own."""
    wrapped: Callable[..., Any] = pyro.plate(PARTICLES, particles, dim=-nesting - 1)(fn)
    return wrapped


def base_of(fn: Any) -> Any:
    """The distribution inside ``Independent``, ``mask`` and ``expand``."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return fn


def is_discrete(fn: Any) -> bool:
    """Whether the values of a distribution are discrete; one that does not know its support is taken for continuous."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def needs_score(site: Site) -> bool:
    """Whether the guide draws this site without a derivative."""
    fn = site["fn"]
    return not (site["is_observed"] or fn.has_rsample or isinstance(base_of(fn), Unit | Delta))


def subsampling(frames: set[CondIndepStackFrame]) -> float:
    """N/B over the subsampled ones of these plates."""
    return prod((frame.full_size or frame.size) / frame.size for frame in frames)


def site_log_prob(site: Site, keep: list[CondIndepStackFrame], nesting: int) -> Tensor:
    """The site's log-density without scale, with mask, summed over all but particles and ``keep``: [K or 1, ...]."""
    return fold(site, log_density(site), keep, nesting)


def fold(site: Site, batch: Tensor, keep: list[CondIndepStackFrame], nesting: int) -> Tensor:
    """A tensor of the site's batch shape under its mask and inner subsampling, summed: [K or 1, ...]."""
    batch = scale_and_mask(batch, subsampling(set(site["cond_indep_stack"]) - set(keep)), site["mask"])
    return sum_to_data(batch, keep, nesting)


def sum_to_data(batch: Tensor, keep: list[CondIndepStackFrame], nesting: int) -> Tensor:
    """Sum a tensor of a site's batch shape over all dimensions but particles and ``keep``."""
    batch = batch.reshape((1,) * (nesting + 1 - batch.dim()) + batch.shape)
    kept = {-nesting - 1, *map(_dim, keep)}
    summed = [dim for dim in range(-batch.dim(), 0) if dim not in kept]
    return batch.sum(summed) if summed else batch


@dataclass(frozen=True)
class Terms:
    """What log weights are made of, site by site. Every tensor of log-densities is [K, N] ([K] where joint).

    Attributes:
        log_p: log p of each site of the model given its parents, observed sites included.
        log_q: log q of each site of the guide, auxiliary sites included.
        log_q_stopped: the same values, whose gradient reaches the guide's parameters through the draws alone: the
            derivative in the parameters at fixed z is left out. None unless asked for.
        p: the model's distributions, by site.
        q: the guide's distributions, by site.
        values: the values drawn and observed, by site: [K, N, *event] for draws.
        repeated: with ``log_q_stopped``, whether log q came out the same when the guide was run again: a tensor of no
            dimensions. A false one is raised at once, but for where a function is captured, which must not read it.
        run: the sites that the rest was read from.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import terms
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> t = terms(model, PriorGuide(model), torch.zeros(3, 5))
        >>> torch.allclose(t.log_weights, t.log_p["x"] + t.log_p["z"] - t.log_q["z"])
        True
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    log_q_stopped: dict[str, Tensor] | None
    p: dict[str, TorchDistribution]
    q: dict[str, TorchDistribution]
    values: dict[str, Tensor]
    repeated: Tensor | None
    run: PairRun = field(repr=False)

    @property
    def scale(self) -> float:
        """N/B where the data are a subsample, else 1: what the sum over the data is to be multiplied by."""
        return subsampling(set(self.run.keep))

    @property
    def joint(self) -> bool:
        """Whether no plate encloses every site, so that the weights speak of all data at once."""
        return not self.run.keep

    @property
    def observed(self) -> Tensor:
        """Log p of the sites that the guide does not draw: log p(x | z), of the shape of the weights."""
        total: Tensor = sum(self.log_p[name] for name in self.log_p if name not in self.log_q)  # type: ignore[assignment]
        return torch.as_tensor(total).expand(self.run.shape)

    def per_datum(self, name: str, batch: Tensor) -> Tensor:
        """A tensor of the batch shape of a site (a KL, say), under its mask, summed to the shape of the weights."""
        site = next(site for site in [*self.run.p, *self.run.q] if site["name"] == name)
        return self.run.fold(site, batch)

    @property
    def log_weights(self) -> Tensor:
        """The log weights: the sum of ``log_p`` minus the sum of ``log_q``."""
        total: Tensor = sum(self.log_p.values()) - sum(self.log_q.values())  # type: ignore[assignment]
        return total


class PairRun(NamedTuple):
    """One run of a pair under K particles: its sites, what the model saw of the guide's, the plates that are kept.

    ``shape`` is that of the weights.
    """

    p: list[Site]
    q: list[Site]
    q_trace: Trace
    keep: list[CondIndepStackFrame]
    nesting: int
    shape: tuple[int, ...]

    def log_prob(self, site: Site) -> Tensor:
        """Log-density of one of its sites, of the shape of the weights."""
        return site_log_prob(site, self.keep, self.nesting).expand(self.shape)

    def spread(self, site: Site, weights: Tensor) -> Tensor:
        """A tensor of the shape of the weights, to be multiplied with a value of one of its sites."""
        shape = [1] * (self.nesting + 1 + site["fn"].event_dim)
        shape[0] = self.shape[0]
        for frame in self.keep:
            shape[self.nesting + 1 + _dim(frame)] = frame.size
        return weights.reshape(shape)

    def fold(self, site: Site, batch: Tensor) -> Tensor:
        """A tensor of the batch shape of one of its sites, summed to the shape of the weights."""
        return fold(site, batch, self.keep, self.nesting).expand(self.shape)


def with_taps(trace: Trace) -> Trace:
    """The guide's trace with a view of each draw in its place, for the model to be replayed against.

    No draw depends on another's view: a derivative in a view is the partial one, of the densities alone.
    """
    tapped = trace.copy()
    for name, site in trace.nodes.items():
        value = site.get("value")
        if site["type"] == "sample" and not site["is_observed"] and isinstance(value, Tensor) and value.requires_grad:
            view: Any = {**site, "value": value.view_as(value)}
            tapped.nodes[name] = view
    return tapped


def at_leaves(run: PairRun) -> tuple[Trace, dict[str, Tensor]]:
    """The guide's trace with leaves in the place of its draws, to be replayed, and the leaves that need a gradient."""
    frozen, leaves = run.q_trace.copy(), {}
    for site in run.q:
        if not site["is_observed"]:
            leaf = site["value"].detach().requires_grad_(site["value"].requires_grad)
            at_leaf: Any = {**site, "value": leaf}
            frozen.nodes[site["name"]] = at_leaf
            if leaf.requires_grad:
                leaves[site["name"]] = leaf
    return frozen, leaves


def stop_parameters(
    run: PairRun, log_q: dict[str, Tensor], again: list[Site], leaves: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Log q at the drawn values, differentiable through the values alone; and whether it came out the same again.

    ``again`` are the guide's sites run at the leaves. Log q is differentiated in the leaves, and that gradient is
    attached to the drawn values: no parameter of any kind has to be found and stopped. A ``Delta``'s log-density and a
    factor are no normalised densities, so their derivative in the parameters does not average to zero: they keep it.
    """
    result, repeated = dict(log_q), torch.ones((), dtype=torch.bool)
    for site in again:
        name = site["name"]
        if isinstance(base_of(site["fn"]), Delta | Unit):
            continue
        try:
            value = run.log_prob(site)
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(f"site '{name}': its distribution has no log q of a given value") from error
        close = torch.isclose(value.detach(), log_q[name].detach(), rtol=1e-3, atol=1e-3, equal_nan=True).all()
        repeated = repeated.to(close.device) & close
        if get_proxy_mode() is None and not bool(close):
            raise ValueError(
                f"log q of site '{name}' changes when the guide is run again at the same values: it draws more than "
                "its sites (dropout: guide.eval()), or is too ill-conditioned for its precision"
            )
        result[name] = log_q[name].detach()
        if not (leaves and value.requires_grad):
            continue
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        for leaf, slope in zip(leaves, slopes, strict=True):
            if slope is not None:
                drawn: Any = run.q_trace.nodes[leaf]
                shift = slope * (drawn["value"] - drawn["value"].detach())  # zero, with a gradient
                shift = sum_rightmost(shift, drawn["fn"].event_dim)
                result[name] = result[name] + sum_to_data(shift, run.keep, run.nesting)
    return result, repeated


class AtMode(Messenger):
    """A handler under which a site with an improper prior takes its mode, in the place of a draw that there is not."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and isinstance(msg["fn"], ImproperUniform):
            msg["value"], msg["done"] = msg["fn"].mode, True
