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
    "check_pair",
    "densities",
    "log_joint",
    "log_weights",
    "model_sites",
    "parameters_of",
    "parameters_read",
    "scaled_elbo",
    "terms",
    "trace_pair",
]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from .checks import check_holes, check_match, check_scale, check_shapes, checked_data, fit_values
from .layout import Layout, layout_of, without_auxiliary
from .parameters import claim_parameters, owners_of, trainable
from .randomness import forked_rng
from .sites import (
    AtMode,
    PairRun,
    Site,
    Terms,
    at_leaves,
    enclosing_plates,
    in_plate,
    nesting_of,
    site_log_prob,
    sites_of,
    stop_parameters,
    with_taps,
)

Program = Callable[..., Any]


def log_weights(
    model: Program, guide: Program, *data: Tensor, particles: int = 1, max_plate_nesting: int | None = None
) -> Tensor:
    r"""Log importance weights of K draws from the guide.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Their mean over K estimates the ELBO of each datum; their logsumexp over K, minus log K, its log p(x).

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519

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
        ValueError: for data, sites or observations that do not fit the pair, and for ``particles`` less than 1.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> log_weights(model, PriorGuide(model), torch.zeros(3, 5), particles=10).shape
        torch.Size([10, 3])
    """
    run = _run(model, guide, data, particles, max_plate_nesting)
    total = sum(run.log_prob(site) for site in run.p) - sum(run.log_prob(site) for site in run.q)
    return torch.as_tensor(total).expand(run.shape)


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
        Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194

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
    state = torch.get_rng_state()
    run = _run(model, guide, data, particles, max_plate_nesting, tapped=stopped)
    log_q = {site["name"]: run.log_prob(site) for site in run.q}
    log_q_stopped = repeated = None
    if stopped:  # the guide runs again, at leaves in the place of its values
        frozen, leaves = at_leaves(run)
        guide = poutine.replay(in_plate(guide, particles, run.nesting), trace=frozen)
        with torch.enable_grad(), forked_rng():
            torch.set_rng_state(state)
            again = sites_of(poutine.trace(guide).get_trace(*data))
            log_q_stopped, repeated = stop_parameters(run, log_q, again, leaves)
    return Terms(
        log_p={site["name"]: run.log_prob(site) for site in run.p},
        log_q=log_q,
        log_q_stopped=log_q_stopped,
        p={site["name"]: site["fn"] for site in run.p},
        q={site["name"]: site["fn"] for site in run.q},
        values={s["name"]: run.q_trace.nodes.get(s["name"], s)["value"] for s in [*run.p, *run.q]},
        repeated=repeated,
        run=run,
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
    total = sum(densities(model, *data)(values).values())
    return torch.as_tensor(total)


def densities(model: Program, *data: Tensor) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Log p(x, z) site by site as a function of z, for many z on the same data; values as for :func:`log_joint`.

    The entries are log p of each site given its parents, each of the shape of :func:`log_joint`, which is their sum.
    """
    with forked_rng(), AtMode():
        sites = model_sites(model, *data)
    nesting = nesting_of(sites)

    def at(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        k, fitted = fit_values(values, sites, nesting)
        seen = sites_of(poutine.trace(poutine.condition(in_plate(model, k, nesting), data=fitted)).get_trace(*data))
        keep = enclosing_plates(seen)
        shape = (k, *(frame.size for frame in keep))
        return {site["name"]: site_log_prob(site, keep, nesting).expand(shape) for site in seen}

    return at


def model_sites(model: Program, *args: Any, **kwargs: Any) -> list[Site]:
    """The sites of one run of the model alone, without gradient, from the user's random stream."""
    claim_parameters(model, model)
    with torch.no_grad():
        return sites_of(poutine.trace(model).get_trace(*args, **kwargs))


def check_pair(model: Program, guide: Program, *data: Tensor) -> Layout:
    """Run the pair once, without particles or gradient, and raise what is wrong with it.

    Draws nothing from the user's random stream.

    Returns:
        The pair's :class:`Layout`.

    Raises:
        ValueError: naming the argument or site, for data that are empty or hold infinity, or NaN that does not leave
            every log-density finite, a site of the model that the guide misses, a site of the guide that the model has
            not, and observations outside of a support that does not move with the draws.

    Warns:
        UserWarning: for a ``poutine.scale`` of the user's own, which importance weights leave out, and for a plate of
            the guide that the model does not have.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError("a GuideMessenger is not traced like a guide: use an AutoGuide or a guide function")
    dtypes = {p.dtype for owner in owners_of(model, guide) for p in owner.parameters()}
    with torch.no_grad(), forked_rng(), checked_data(data, dtypes) as holes:
        claim_parameters(model, guide)
        try:
            p, q = trace_pair(model, guide, data)
        except ValueError:  # perhaps of parameters made from a draw outside of its site's support: say so
            with validation_enabled(False), suppress(RuntimeError):
                check_match(*trace_pair(model, guide, data))
            raise

        def model_again() -> list[Site]:
            return sites_of(trace_pair(model, guide, data)[0])

        def guide_again() -> list[Site]:
            return sites_of(poutine.trace(poutine.replay(guide, trace=without_auxiliary(q))).get_trace(*data))

        check_match(p, q, model_again)
        sites = sites_of(p), sites_of(q)
        if holes:
            check_holes([*sites[0], *sites[1]])
        check_scale([*sites[0], *sites[1]])
        check_shapes(*sites, model_again)
        return layout_of(*sites, guide_again)


def scaled_elbo(model: Program, guide: Program, *data: Tensor) -> Tensor:
    """The sum of all log p minus that of all log q in one draw, scales and masks included, as ``Trace_ELBO`` has it."""
    p, q = trace_pair(model, guide, data)
    return torch.as_tensor(p.log_prob_sum() - q.log_prob_sum())


@contextmanager
def parameters_read(*programs: Program) -> Iterator[list[nn.Parameter]]:
    """Collect, into the list it yields, the (unconstrained) parameters that Pyro programs read inside the block.

    What ``pyro.module`` reads from its store for a module that is not among the programs' own is left out.
    """
    parameters: list[nn.Parameter] = []
    with poutine.trace(param_only=True) as capture:
        yield parameters
    sites: Any = capture.trace.nodes.values()
    read = {site["value"].unconstrained(): site["name"] for site in sites}
    owned = {p for owner in owners_of(*programs) for p in owner.parameters()}
    parameters += [p for p, name in read.items() if p in owned or not owned or "$$$" not in name]


def parameters_of(model: Program, guide: Program, *data: Tensor) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the model, and those of the guide alone: of modules, and of ``pyro.param``."""
    claim_parameters(model, guide)
    with torch.no_grad(), forked_rng():
        with parameters_read(model, guide) as of_guide:
            q = poutine.trace(guide).get_trace(*data)
        with parameters_read(model, guide) as of_model:
            poutine.replay(model, trace=q)(*data)
    return trainable(model, guide, of_model, of_guide)


def trace_pair(model: Program, guide: Program, data: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    """The traces of a model and of the guide that it is replayed against."""
    q = poutine.trace(guide).get_trace(*data)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*data)
    return p, q


def _run(
    model: Program,
    guide: Program,
    data: tuple[Tensor, ...],
    particles: int,
    nesting: int | None,
    tapped: bool = False,
) -> PairRun:
    if particles < 1:
        raise ValueError(f"particles is the number of draws from the guide, at least 1, but got {particles}")
    if nesting is None:
        nesting = check_pair(model, guide, *data).nesting
    q = poutine.trace(in_plate(guide, particles, nesting)).get_trace(*data)
    seen = with_taps(q) if tapped else q  # by the model
    p = poutine.trace(poutine.replay(in_plate(model, particles, nesting), trace=seen)).get_trace(*data)
    p_sites, q_sites = sites_of(p), sites_of(q)
    keep = enclosing_plates([*p_sites, *q_sites])
    p_sites = [s for s in p_sites if s["is_observed"] or s["name"] in q.nodes]  # one to enumerate: its own proposal
    return PairRun(p_sites, q_sites, seen, keep, nesting, (particles, *(frame.size for frame in keep)))
