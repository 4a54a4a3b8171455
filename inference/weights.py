r"""The kernel: log importance weights of any Pyro pair. The only place in jensen that runs traces.

.. math:: \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x), \quad k = 1, \dots, K

Model and guide are wrapped in an outermost particle plate; the guide is traced, the model replayed against it. Log
probabilities are summed over every dimension but the particle plate and the plates that enclose every site (the data),
so the weights are [K, N]; with a site outside every plate (a global latent) they are joint, [K].

What counts: a mask, auxiliary sites (a ``Delta`` with a log-density, a ``pyro.factor``). What does not:
``pyro.deterministic``, subsample sites, and scales: neither ``poutine.scale`` nor subsampling moves a weight. A plate
that is subsampled and does *not* enclose every site still multiplies its own sites by N/B, since those are summed here.
"""

from __future__ import annotations

__all__ = ["Layout", "Terms", "check_pair", "log_joint", "log_weights", "parameters_of", "terms", "trained_by"]

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

Program = Callable[..., Any]
Site = Any  # a Pyro message: a TypedDict that Pyro does not type fully
PARTICLES = "jensen_particles"


class Layout(NamedTuple):
    """How a pair is laid out: ``nesting`` plates deep, with the sizes of the plates that enclose every site."""

    nesting: int
    sizes: tuple[int, ...]


def log_weights(
    model: Program, guide: Program, *data: Tensor, particles: int = 1, max_plate_nesting: int | None = None
) -> Tensor:
    r"""Log importance weights of K draws from the guide.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Their mean over K estimates the ELBO of each datum; their logsumexp over K, minus log K, its log p(x).

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: tensors whose first dimension is N.
        particles: the number K of draws, at least 1.
        max_plate_nesting: how deep the pair's plates are nested, as in Pyro's losses. None: the pair is checked and run
            once without particles to find out.

    Returns:
        The log weights in nats, [K, N]; [K] where no plate encloses every site. Differentiable in the parameters.

    Raises:
        ValueError: on what :func:`check_pair` names, and for ``particles`` less than 1.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> log_weights(model, PriorGuide(model), torch.zeros(3, 5), particles=10).shape
        torch.Size([10, 3])
    """
    p, q, layout = _traced(model, guide, data, particles, max_plate_nesting)
    keep = _enclosing([*_sites(p), *_sites(q)])
    total: Tensor | float = 0.0
    for site in _sites(p):
        if site["is_observed"] or site["name"] in q.nodes:  # a site to enumerate is its own proposal
            total = total + _log_prob(site, keep, layout.nesting)
    for site in _sites(q):
        total = total - _log_prob(site, keep, layout.nesting)
    shape = (particles, *(frame.size for frame in keep))
    return torch.as_tensor(total).expand(shape)


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
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    log_q_stopped: dict[str, Tensor] | None
    p: dict[str, TorchDistribution]
    q: dict[str, TorchDistribution]
    values: dict[str, Tensor]

    @property
    def log_weights(self) -> Tensor:
        """The log weights: the sum of ``log_p`` minus the sum of ``log_q``."""
        total: Tensor = sum(self.log_p.values()) - sum(self.log_q.values())  # type: ignore[assignment]
        return total


def terms(
    model: Program,
    guide: Program,
    *data: Tensor,
    particles: int = 1,
    stopped: bool = False,
    max_plate_nesting: int | None = None,
) -> Terms:
    r"""What log w is made of: log p, log q and the distributions, site by site.

    ``log_q_stopped`` is what sticking-the-landing and doubly reparameterized gradients need. Its value is log q, and

    .. math:: \nabla_\phi \log q_{\text{stopped}}(z_\phi) = \nabla_z \log q_\phi(z) \big|_{z = z_\phi} \nabla_\phi z_\phi

    References:
        Roeder, Wu and Duvenaud (2017), Sticking the Landing.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: tensors whose first dimension is N.
        particles: the number K of draws, at least 1.
        stopped: whether to work out ``log_q_stopped``; the guide is run once more, at the values drawn.
        max_plate_nesting: as for :func:`log_weights`.

    Returns:
        The :class:`Terms`.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> t = terms(model, ExactPosterior(model), torch.zeros(3, 5), particles=10)
        >>> sorted(t.log_p), sorted(t.log_q), t.values["z"].shape, t.log_weights.shape
        (['x', 'z'], ['z'], torch.Size([10, 3, 2]), torch.Size([10, 3]))
    """
    p, q, layout = _traced(model, guide, data, particles, max_plate_nesting)
    keep = _enclosing([*_sites(p), *_sites(q)])
    shape = (particles, *(frame.size for frame in keep))
    p_sites = [s for s in _sites(p) if s["is_observed"] or s["name"] in q.nodes]
    return Terms(
        log_p={s["name"]: _log_prob(s, keep, layout.nesting).expand(shape) for s in p_sites},
        log_q={s["name"]: _log_prob(s, keep, layout.nesting).expand(shape) for s in _sites(q)},
        log_q_stopped=_stopped(guide, data, q, keep, layout.nesting, shape) if stopped else None,
        p={s["name"]: s["fn"] for s in p_sites},
        q={s["name"]: s["fn"] for s in _sites(q)},
        values={s["name"]: s["value"] for s in [*p_sites, *_sites(q)]},
    )


def log_joint(model: Program, values: Mapping[str, Tensor], *data: Tensor) -> Tensor:
    r"""log p(x, z) at given z.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        values: for every latent site, values of shape [K, N, *event] (the plates of the site after K).
        data: tensors whose first dimension is N.

    Returns:
        The log joint density in nats, [K, N]; [K] where no plate encloses every site. Differentiable in the values.

    Raises:
        ValueError: if a latent site has no value, a value no site, or the values differ in their first dimension.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> log_joint(model, {"z": torch.zeros(7, 3, 2)}, torch.zeros(3, 5)).shape
        torch.Size([7, 3])
    """
    with torch.no_grad(), _forked_rng(data):
        sites = _sites(poutine.trace(model).get_trace(*data))
    latent = {s["name"] for s in sites if not s["is_observed"]}
    if latent != set(values):
        raise ValueError(
            f"log_joint needs a value for each latent site of the model: missing {sorted(latent - set(values))}, "
            f"not in the model {sorted(set(values) - latent)}"
        )
    sizes = {len(value) for value in values.values()}
    if len(sizes) != 1:
        raise ValueError(f"log_joint needs values that agree in their first dimension K, but got {sorted(sizes)}")
    nesting, particles = _nesting(sites), sizes.pop()
    conditioned = poutine.condition(_in_plate(model, particles, nesting), data=dict(values))
    sites = _sites(poutine.trace(conditioned).get_trace(*data))
    keep = _enclosing(sites)
    total = sum(_log_prob(site, keep, nesting) for site in sites)
    return torch.as_tensor(total).expand((particles, *(frame.size for frame in keep)))


def check_pair(model: Program, guide: Program, *data: Tensor) -> Layout:
    """Run the pair once, without particles or gradient, and raise what is wrong with it.

    Draws nothing from the user's random stream.

    Returns:
        The pair's :class:`Layout`.

    Raises:
        ValueError: naming the argument or site, for data that are empty or hold NaN or infinity, a site of the model
            that the guide misses, a site of the guide that the model has not, and observations outside the support.

    Warns:
        UserWarning: for a ``poutine.scale`` of the user's own, which importance weights leave out, and for a plate of
            the guide that the model does not have.
    """
    _check_data(data)
    with torch.no_grad(), _forked_rng(data):
        p, q = _trace_pair(model, guide, data)
    _check_match(p, q)
    _check_scale([*_sites(p), *_sites(q)])
    for site in _sites(p):
        if site["is_observed"]:
            _check_support(site)
    sites = [*_sites(p), *_sites(q)]
    return Layout(_nesting(sites), tuple(frame.size for frame in _enclosing(sites)))


@contextmanager
def trained_by() -> Iterator[list[nn.Parameter]]:
    """Collect, into the list it yields, the (unconstrained) parameters that Pyro programs read inside the block."""
    found: list[nn.Parameter] = []
    with poutine.trace(param_only=True) as capture:
        yield found
    found += [site["value"].unconstrained() for site in capture.trace.nodes.values()]


def parameters_of(model: Program, guide: Program, *data: Tensor) -> list[nn.Parameter]:
    """The trainable parameters of a pair, each once: those of modules, and those that ``pyro.param`` makes."""
    with torch.no_grad(), _forked_rng(data), trained_by() as read:
        _trace_pair(model, guide, data)
    owned = [p for half in (model, guide) if isinstance(half, nn.Module) for p in half.parameters()]
    return [p for p in dict.fromkeys([*owned, *read]) if p.requires_grad]


def _in_plate(fn: Program, particles: int, nesting: int) -> Program:
    wrapped: Program = pyro.plate(PARTICLES, particles, dim=-nesting - 1)(fn)
    return wrapped


def _trace_pair(model: Program, guide: Program, data: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    q = poutine.trace(guide).get_trace(*data)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*data)
    return p, q


def _traced(
    model: Program, guide: Program, data: tuple[Tensor, ...], particles: int, nesting: int | None
) -> tuple[Trace, Trace, Layout]:
    if particles < 1:
        raise ValueError(f"particles is the number of draws from the guide, at least 1, but got {particles}")
    layout = check_pair(model, guide, *data) if nesting is None else Layout(nesting, ())
    p, q = _trace_pair(
        _in_plate(model, particles, layout.nesting), _in_plate(guide, particles, layout.nesting), data
    )
    return p, q, layout


def _sites(trace: Trace) -> list[Site]:
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    ]


def _plates(site: Site) -> set[CondIndepStackFrame]:
    return {frame for frame in site["cond_indep_stack"] if frame.vectorized}


def _nesting(sites: list[Site]) -> int:
    return max((-frame.dim for site in sites for frame in _plates(site)), default=0)


def _enclosing(sites: list[Site]) -> list[CondIndepStackFrame]:
    """The plates, other than the particles, that enclose every site, from left to right."""
    common = set.intersection(*map(_plates, sites)) if sites else set()
    return sorted((frame for frame in common if frame.name != PARTICLES), key=lambda frame: frame.dim)


def _subsampling(frames: set[CondIndepStackFrame]) -> float:
    """N/B over the subsampled ones of these plates."""
    return prod((frame.full_size or frame.size) / frame.size for frame in frames)


def _log_prob(site: Site, keep: list[CondIndepStackFrame], nesting: int) -> Tensor:
    """The site's log-density without scale, with mask, summed over all but particles and ``keep``: [K or 1, ...]."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    log_prob = scale_and_mask(log_prob, _subsampling(_plates(site) - set(keep)), site["mask"])
    return _reduce(log_prob, keep, nesting)


def _reduce(batch: Tensor, keep: list[CondIndepStackFrame], nesting: int) -> Tensor:
    """Sum a tensor of a site's batch shape over all dimensions but particles and ``keep``."""
    batch = batch.reshape((1,) * (nesting + 1 - batch.dim()) + batch.shape)
    kept = {-nesting - 1, *(frame.dim for frame in keep)}
    summed = [dim for dim in range(-batch.dim(), 0) if dim not in kept]
    return batch.sum(summed) if summed else batch


def _stopped(
    guide: Program,
    data: tuple[Tensor, ...],
    q: Trace,
    keep: list[CondIndepStackFrame],
    nesting: int,
    shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """log q at the drawn values, differentiable through the values alone.

    The guide is run again with the values as leaves, log q is differentiated in them, and that gradient is attached to
    the drawn values: no parameter of any kind has to be found and stopped.
    """
    leaves = {}
    frozen = q.copy()
    for site in _sites(q):
        if not site["is_observed"]:
            leaf = site["value"].detach().requires_grad_(site["value"].requires_grad)
            frozen.nodes[site["name"]] = {**site, "value": leaf}
            if leaf.requires_grad:
                leaves[site["name"]] = leaf
    with torch.enable_grad():
        again = poutine.trace(poutine.replay(_in_plate(guide, shape[0], nesting), trace=frozen)).get_trace(*data)
        result = {}
        for site in _sites(again):
            log_q = _log_prob(site, keep, nesting).expand(shape)
            result[site["name"]] = log_q.detach()
            if not (leaves and log_q.requires_grad):
                continue
            slopes = torch.autograd.grad(log_q.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, slope in zip(leaves, slopes, strict=True):
                if slope is not None:
                    value, event_dim = q.nodes[name]["value"], q.nodes[name]["fn"].event_dim
                    shift = sum_rightmost(slope * (value - value.detach()), event_dim)  # zero, with a gradient
                    result[site["name"]] = result[site["name"]] + _reduce(shift, keep, nesting)
    return result


@contextmanager
def _forked_rng(data: tuple[Tensor, ...]) -> Iterator[None]:
    devices = {x.device for x in data if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _check_data(data: tuple[Tensor, ...]) -> None:
    for i, x in enumerate(data):
        if x.dim() and len(x) == 0:
            raise ValueError(f"data[{i}] is empty: its shape is {list(x.shape)}")
        if x.is_floating_point() and not (finite := x.isfinite()).all():
            row = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"data[{i}] holds {int((~finite).sum())} values that are NaN or infinite, the first at index {row}; "
                "remove these rows or fill them in"
            )


def _check_match(p: Trace, q: Trace) -> None:
    p_sites, q_sites = _sites(p), _sites(q)
    latent = {s["name"]: s for s in p_sites if not s["is_observed"]}
    drawn = {s["name"] for s in q_sites}
    auxiliary = {s["name"] for s in q_sites if s["infer"].get("is_auxiliary")}
    missing = {name for name, s in latent.items() if not s["infer"].get("enumerate")} - drawn
    if missing:
        raise ValueError(
            f"the guide misses {sorted(missing)} of the model's latent sites {sorted(latent)}; sample it in the guide, "
            "or observe it in the model"
        )
    if extra := drawn - auxiliary - set(latent):
        raise ValueError(
            f"the guide samples {sorted(extra)}, but the model's latent sites are {sorted(latent)}; rename the site, or "
            "mark it infer={'is_auxiliary': True}"
        )
    plates = {frame.name for s in p_sites for frame in _plates(s)}
    if foreign := {frame.name for s in q_sites for frame in _plates(s)} - plates:
        warnings.warn(
            f"the guide's plates {sorted(foreign)} are not in the model, whose plates are {sorted(plates)}: sites in "
            "differently named plates are not independent data, and their weights are joint",
            stacklevel=4,
        )


def _check_scale(sites: list[Site]) -> None:
    scales = {s["name"]: torch.as_tensor(s["scale"]) / _subsampling(_plates(s)) for s in sites}
    own = {name: scale.flatten()[0].item() for name, scale in scales.items() if ((scale - 1).abs() > 1e-6).any()}
    if own:
        listed = ", ".join(f"'{name}' ({scale:g})" for name, scale in own.items())
        warnings.warn(
            f"these sites stand under a poutine.scale: {listed}; importance weights leave scales out, so they are those "
            "of the unscaled model",
            stacklevel=4,
        )


def _check_support(site: Site) -> None:
    fn, value = site["fn"], site["value"]
    try:
        inside = fn.support.check(value)
    except NotImplementedError:  # a distribution that does not know its support
        return
    mask = site["mask"]
    outside = ~inside if mask is None else ~inside & mask
    if outside.any():
        bad = value[outside.expand(value.shape[: outside.dim()])] if outside.dim() else value
        raise ValueError(
            f"the data observed at site '{site['name']}' lie outside the support of {_name(fn)} in "
            f"{int(outside.sum())} places (values from {bad.min():g} to {bad.max():g} there); binarize grey images "
            "(batch_transform=torch.bernoulli, or a threshold), or take a continuous likelihood"
        )


def _name(fn: Any) -> str:
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
