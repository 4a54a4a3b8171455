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

__all__ = [
    "Layout",
    "Terms",
    "check_pair",
    "log_joint",
    "log_weights",
    "parameters_of",
    "terms",
    "trained_by",
]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from .checks import check_data, check_match, check_scale, check_support
from .sites import PARTICLES, Terms, enclosing_plates, nesting_of, site_log_prob, sites_of, sum_to_data

Program = Callable[..., Any]


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
    keep = enclosing_plates([*sites_of(p), *sites_of(q)])
    total: Tensor | float = 0.0
    for site in sites_of(p):
        if site["is_observed"] or site["name"] in q.nodes:  # a site to enumerate is its own proposal
            total = total + site_log_prob(site, keep, layout.nesting)
    for site in sites_of(q):
        total = total - site_log_prob(site, keep, layout.nesting)
    shape = (particles, *(frame.size for frame in keep))
    return torch.as_tensor(total).expand(shape)


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

    .. math:: \nabla_\phi \log q_{\text{stopped}}(z_\phi) = \nabla_z \log q_\phi(z) |_{z = z_\phi} \nabla_\phi z_\phi

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
    keep = enclosing_plates([*sites_of(p), *sites_of(q)])
    shape = (particles, *(frame.size for frame in keep))
    p_sites = [s for s in sites_of(p) if s["is_observed"] or s["name"] in q.nodes]
    return Terms(
        log_p={s["name"]: site_log_prob(s, keep, layout.nesting).expand(shape) for s in p_sites},
        log_q={s["name"]: site_log_prob(s, keep, layout.nesting).expand(shape) for s in sites_of(q)},
        log_q_stopped=_stopped(guide, data, q, keep, layout.nesting, shape) if stopped else None,
        p={s["name"]: s["fn"] for s in p_sites},
        q={s["name"]: s["fn"] for s in sites_of(q)},
        values={s["name"]: s["value"] for s in [*p_sites, *sites_of(q)]},
    )


def log_joint(model: Program, values: Mapping[str, Tensor], *data: Tensor) -> Tensor:
    r"""Log p(x, z) at given z.

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
        sites = sites_of(poutine.trace(model).get_trace(*data))
    latent = {s["name"] for s in sites if not s["is_observed"]}
    if latent != set(values):
        raise ValueError(
            f"log_joint needs a value for each latent site of the model: missing {sorted(latent - set(values))}, "
            f"not in the model {sorted(set(values) - latent)}"
        )
    sizes = {len(value) for value in values.values()}
    if len(sizes) != 1:
        raise ValueError(f"log_joint needs values that agree in their first dimension K, but got {sorted(sizes)}")
    nesting, particles = nesting_of(sites), sizes.pop()
    conditioned = poutine.condition(_in_plate(model, particles, nesting), data=dict(values))
    sites = sites_of(poutine.trace(conditioned).get_trace(*data))
    keep = enclosing_plates(sites)
    total = sum(site_log_prob(site, keep, nesting) for site in sites)
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
    check_data(data)
    with torch.no_grad(), _forked_rng(data):
        p, q = _trace_pair(model, guide, data)
    check_match(p, q)
    check_scale([*sites_of(p), *sites_of(q)])
    for site in sites_of(p):
        if site["is_observed"]:
            check_support(site)
    sites = [*sites_of(p), *sites_of(q)]
    return Layout(nesting_of(sites), tuple(frame.size for frame in enclosing_plates(sites)))


@contextmanager
def trained_by() -> Iterator[list[nn.Parameter]]:
    """Collect, into the list it yields, the (unconstrained) parameters that Pyro programs read inside the block."""
    found: list[nn.Parameter] = []
    with poutine.trace(param_only=True) as capture:
        yield found
    sites: Any = capture.trace.nodes.values()
    found += [site["value"].unconstrained() for site in sites]


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
    p, q = _trace_pair(_in_plate(model, particles, layout.nesting), _in_plate(guide, particles, layout.nesting), data)
    return p, q, layout


def _stopped(
    guide: Program,
    data: tuple[Tensor, ...],
    q: Trace,
    keep: list[CondIndepStackFrame],
    nesting: int,
    shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """Log q at the drawn values, differentiable through the values alone.

    The guide is run again with the values as leaves, log q is differentiated in them, and that gradient is attached to
    the drawn values: no parameter of any kind has to be found and stopped.
    """
    leaves = {}
    frozen = q.copy()
    for site in sites_of(q):
        if not site["is_observed"]:
            leaf = site["value"].detach().requires_grad_(site["value"].requires_grad)
            at_leaf: Any = {**site, "value": leaf}
            frozen.nodes[site["name"]] = at_leaf
            if leaf.requires_grad:
                leaves[site["name"]] = leaf
    with torch.enable_grad():
        again = poutine.trace(poutine.replay(_in_plate(guide, shape[0], nesting), trace=frozen)).get_trace(*data)
        result = {}
        for site in sites_of(again):
            log_q = site_log_prob(site, keep, nesting).expand(shape)
            result[site["name"]] = log_q.detach()
            if not (leaves and log_q.requires_grad):
                continue
            slopes = torch.autograd.grad(log_q.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, slope in zip(leaves, slopes, strict=True):
                if slope is not None:
                    drawn: Any = q.nodes[name]
                    shift = slope * (drawn["value"] - drawn["value"].detach())  # zero, with a gradient
                    shift = sum_rightmost(shift, drawn["fn"].event_dim)
                    result[site["name"]] = result[site["name"]] + sum_to_data(shift, keep, nesting)
    return result


@contextmanager
def _forked_rng(data: tuple[Tensor, ...]) -> Iterator[None]:
    devices = {x.device for x in data if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
