r"""The kernel: log importance weights of any Pyro model and guide.

.. math:: \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x), \quad k = 1, \dots, K

The guide is run, then the model at its samples: one particle as the program is written, several by the method that
:mod:`jensen.kernel.lifts` proves. Log probabilities are summed over every dimension but the particles' and those of the
plates that enclose every site (the data), so the weights are [K, N]; with a site outside every plate (a global latent)
they are joint, [K].

Included: a mask, auxiliary sites (a ``Delta`` with a log-density, a ``pyro.factor``). Excluded:
``pyro.deterministic``, subsample sites, and scales: neither ``poutine.scale`` nor subsampling changes a weight. A
subsampled plate that does *not* enclose every site still multiplies its own sites by N/B, since those are summed here.
"""

from __future__ import annotations

__all__ = [
    "Pair",
    "Program",
    "check_pair",
    "densities",
    "log_joint",
    "log_weights",
    "model_sites",
    "observed_sites",
    "parameters_of",
    "scaled_elbo",
    "terms",
    "trace_pair",
]

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from jensen.checked import checked

from .arguments import check_tensors, explained
from .checks import check_holes, check_match, check_scale, check_shapes, check_spread, checked_data, fit_values
from .layout import Layout, layout_of, without_auxiliary
from .lifts import Call, Half, Lifted, LiftedPair, Run, Way, for_proof, slowest
from .modes import watched_modes
from .parameters import ParametersRead, claim_parameters, claiming, own_modules, store_kept, trainable
from .randomness import forked_rng, stream
from .sites import AtMode, Program, Scored, Site, facts_of, folded, nesting_of, shared_plates, sites_of
from .terms import Terms, stopped_log_q


@checked
@store_kept()
def log_weights(
    model: Program, guide: Program, *data: Tensor, particles: int = 1, max_plate_nesting: int | None = None
) -> Tensor:
    r"""Log importance weights of K samples from the guide.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Their mean over K estimates the ELBO of each data point; their logsumexp over K, minus log K, its log p(x).

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: tensors whose first dimension is N.
        particles: the number K of samples, at least 1.
        max_plate_nesting: how deep the plates are nested, as in Pyro's losses. None: model and guide are checked and
            run once without particles to find out.

    Returns:
        The log weights in nats, [K, N]; [K] where no plate encloses every site. Differentiable in the parameters.

    Raises:
        ValueError: for data, sites or observations that do not fit model and guide, and for ``particles`` below 1.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> log_weights(model, PriorGuide(model), torch.zeros(3, 5), particles=10).shape
        torch.Size([10, 3])
    """
    with explained(data):
        return Pair(model, guide, max_plate_nesting).log_weights(data, particles)


@checked
@store_kept()
def terms(
    model: Program,
    guide: Program,
    *data: Tensor,
    particles: int = 1,
    stopped: bool = False,
    max_plate_nesting: int | None = None,
) -> Terms:
    r"""The terms of log w, site by site: log p, log q, the sampled values.

    Sticking-the-landing and doubly reparameterized gradients need ``log_q_stopped``. Its value is log q, and

    .. math:: \nabla_\phi \log q_{\text{stopped}}(z_\phi) = \nabla_z \log q_\phi(z) |_{z = z_\phi} \nabla_\phi z_\phi

    References:
        Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: tensors whose first dimension is N.
        particles: the number K of samples, at least 1.
        stopped: whether to compute ``log_q_stopped``; the guide is run once more, at the sampled values.
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
    with explained(data):
        return Pair(model, guide, max_plate_nesting).terms(data, particles, stopped)


@checked
@store_kept()
def log_joint(model: Program, values: Mapping[str, Tensor], *data: Tensor) -> Tensor:
    r"""Log p(x, z) at given z.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        values: for every latent site, values of shape [K, N, *event] (the plates of the site after K).
        data: tensors whose first dimension is N.

    Returns:
        The log joint density in nats, [K, N]; [K] where no plate encloses every site. Differentiable in the values.

    Raises:
        ValueError: for a missing or unknown site, or if the values differ in their first dimension.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> log_joint(model, {"z": torch.zeros(7, 3, 2)}, torch.zeros(3, 5)).shape
        torch.Size([7, 3])
    """
    total = sum(densities(model, *data)(values).values())
    return torch.as_tensor(total)


def densities(model: Program, *data: Tensor, lifted: Lifted | None = None) -> Callable[..., dict[str, Tensor]]:
    """Log p(x, z) site by site as a function of z, for many z on the same data; values as for :func:`log_joint`.

    The entries are log p of each site given its parents, each of the shape of :func:`log_joint`, which is their sum.
    The function accepts other data of the same shapes after z. If data of other shapes follow, give ``lifted``, the
    model as it is run: its proofs hold for them too.
    """
    run = _at_values(model, data, lifted)

    def at(values: Mapping[str, Tensor], *others: Tensor) -> dict[str, Tensor]:
        return _of_model(*run(values, others or data)).log_p

    return at


def terms_at(model: Program, values: Mapping[str, Tensor], *data: Tensor, lifted: Lifted | None = None) -> Terms:
    """The terms of the model alone at given z, without those of a guide; arguments as for :func:`densities`."""
    return _of_model(*_at_values(model, data, lifted)(values, data))


def _at_values(
    model: Program, data: tuple[Tensor, ...], lifted: Lifted | None
) -> Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], tuple[Lifted, Call, Run]]:
    """A function that runs the model at given values of all latent sites."""
    check_tensors(data)
    with forked_rng(), AtMode(), explained(data):
        sites = model_sites(model, *data)
    known = Lifted(model, nesting_of(sites)) if lifted is None else lifted
    ranks = {site["name"]: site["value"].dim() for site in sites}

    def run(values: Mapping[str, Tensor], some: tuple[Tensor, ...]) -> tuple[Lifted, Call, Run]:
        k, fitted = fit_values(values, sites, known.nesting)
        return known, Call(some, k, fitted, ranks, {}), known(some, k, fitted, ranks)

    return run


def _of_model(lifted: Lifted, call: Call, run: Run) -> Terms:
    """The terms of one run of the model."""
    keep = shared_plates(site.facts.frames for site in run.sites.values())
    shape = (call.particles, *(frame.size for frame in keep))
    half = _half(lifted, call, run) if lifted.proof_for(call) is not None else None
    return Terms(
        log_p={name: folded(site.log_prob, site.facts, keep).expand(shape) for name, site in run.sites.items()},
        log_q={},
        log_q_stopped=None,
        p={name: site.facts for name, site in run.sites.items()},
        q={},
        values={name: site.value for name, site in run.sites.items()},
        repeated=None,
        particles=call.particles,
        _keep=keep,
        _halves=None if half is None else (half, half),
        _elbo=None,
    )


class Pair:
    """A model and guide that are run many times: checked once, and their method for K particles proved once.

    Args:
        model: any Pyro model.
        guide: its guide.
        layout: the layout of both, or the nesting depth of their plates; None: they are checked to find out.

    Attributes:
        elbo_differs: whether the guide enumerates states, so that log w does not average to the ELBO; after a run.
    """

    def __init__(self, model: Program, guide: Program, layout: Layout | int | None = None) -> None:
        self.model, self.guide = model, guide
        self.layout = layout if isinstance(layout, Layout) else None
        self.nesting = layout.nesting if isinstance(layout, Layout) else layout
        self.elbo_differs = False
        self._lifted: tuple[Lifted, ...] = ()  # model and guide; or one for both, if states are summed out

    def log_weights(self, data: tuple[Tensor, ...], particles: int) -> Tensor:
        """Log weights of fresh samples, [K, N]; [K] if joint: see :func:`log_weights`."""
        p, q, keep, _ = self._run(data, particles, tapped=False)
        total = sum(_folded(p, keep)) - sum(_folded(q, keep))
        return torch.as_tensor(total).expand(particles, *(frame.size for frame in keep))

    def terms(self, data: tuple[Tensor, ...], particles: int, stopped: bool = False) -> Terms:
        """The terms of log weights of fresh samples: see :func:`terms`."""
        back = stream()
        p, q, keep, elbo = self._run(data, particles, tapped=stopped)
        model, guide = self._lifted if len(self._lifted) == 2 else (None, None)
        shape = (particles, *(frame.size for frame in keep))
        log_p, log_q = (
            {name: folded.expand(shape) for name, folded in zip(run.sites, _folded(run, keep), strict=True)}
            for run in (p, q)
        )
        drawn = {name: site.value for name, site in q.sites.items() if not site.facts.observed}
        log_q_stopped = repeated = None
        if stopped and guide is None:
            raise NotImplementedError(
                f"the states of enumerated sites are summed out of {sorted(p.sites)} together, so log q alone cannot "
                "be differentiated: use gradient='standard', or sample these sites in the guide"
            )
        if stopped and guide is not None:  # the guide runs again, at leaves that replace its values
            leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in drawn.items()}
            with torch.enable_grad(), forked_rng():
                back()
                again = guide(data, particles, leaves, q.ranks, q.rows)
                log_q_stopped, repeated = stopped_log_q(q, again, leaves, log_q, keep)
        call = Call(data, particles, drawn, q.ranks, p.rows)
        return Terms(
            log_p=log_p,
            log_q=log_q,
            log_q_stopped=log_q_stopped,
            p={name: site.facts for name, site in p.sites.items()},
            q={name: site.facts for name, site in q.sites.items()},
            values={name: site.value for name, site in {**p.sites, **q.sites}.items()},
            repeated=repeated,
            particles=particles,
            _keep=keep,
            _halves=None if model is None or guide is None else (_half(model, call, p), _half(guide, call, q)),
            _elbo=torch.as_tensor(sum(_folded(elbo, keep))).expand(shape) if elbo.sites else None,
        )

    @property
    def way(self) -> Way:
        """The method of the runs: the slower one of model and guide."""
        return slowest(part.way for part in self._lifted)

    def way_for(self, data: tuple[Tensor, ...], particles: int) -> Way | None:
        """The method for data and particles like these; None if it is not known yet."""
        call = Call(data, particles, {}, {}, {})
        proofs = [part.proof_for(call) for part in self._lifted]
        ways = [proof.way for proof in proofs if proof is not None]
        return slowest(ways) if ways and len(ways) == len(proofs) else None

    def _run(self, data: tuple[Tensor, ...], particles: int, tapped: bool) -> tuple[Run, Run, list[Any], Run]:
        """The runs of model and guide, the plates that enclose every site, and the ELBO if it differs from log w."""
        if particles < 1:
            raise ValueError(f"particles is the number of samples from the guide, at least 1, but got {particles}")
        self.prepare(data)
        if len(self._lifted) == 1:
            whole = self._lifted[0](data, particles)
            p, q, elbo = (_of_kind(whole, kind) for kind in ("p ", "q ", "elbo "))
            return p, q, shared_plates(site.facts.frames for site in whole.sites.values()), elbo
        model, guide = self._lifted
        q = guide(data, particles)
        if tapped:  # a derivative in a view is the partial one, of the densities alone: no sample depends on it
            q = q._replace(sites={name: _tapped(site) for name, site in q.sites.items()})
        drawn = {name: site.value for name, site in q.sites.items() if not site.facts.observed}
        p = model(data, particles, drawn, q.ranks, q.rows)
        sites = [*p.sites.values(), *q.sites.values()]
        return p, q, shared_plates(site.facts.frames for site in sites), Run({}, {}, {}, None)

    def prepare(self, data: tuple[Tensor, ...]) -> None:
        """Check model and guide once: their plates, and whether sites are marked for enumeration."""
        if self._lifted:
            return
        if self.nesting is None:
            from .looks import look_at  # which imports this module

            self.layout = look_at(self.model, self.guide, data)
            self.nesting = self.layout.nesting
        left, summed = self._states(data) if self.layout is None else (self.layout.enumerated, self.layout.summed)
        self.elbo_differs = bool(summed)
        if left or summed:
            pair = LiftedPair(self.model, self.guide, self.nesting)
            with for_proof(self.model, self.guide):
                pair.check(data)
            self._lifted = (pair,)
        else:
            self._lifted = Lifted(self.model, self.nesting), Lifted(self.guide, self.nesting, "guide")

    def _states(self, data: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
        """The sites to be enumerated: of the model, if the guide does not sample them, and of the guide."""
        with for_proof(self.model, self.guide):
            p, q = (sites_of(trace) for trace in trace_pair(self.model, self.guide, data))
        drawn = {site["name"] for site in q}
        left = [s["name"] for s in p if not s["is_observed"] and s["name"] not in drawn and s["infer"].get("enumerate")]
        return left, [s["name"] for s in q if s["infer"].get("enumerate")]


def _half(lifted: Lifted, call: Call, run: Run) -> Half:
    proof = lifted.proof_for(call)
    assert proof is not None
    return Half(lifted, call, run, proof)


def _tapped(site: Scored) -> Scored:
    """A site whose value is replaced by a view of it."""
    return site._replace(value=site.value.view_as(site.value)) if site.value.requires_grad else site


def _of_kind(run: Run, kind: str) -> Run:
    """The sites of one kind of a :class:`~jensen.kernel.lifts.LiftedPair`, with their own names."""
    sites = {name.removeprefix(kind): site for name, site in run.sites.items() if name.startswith(kind)}
    return run._replace(sites=sites)


def _folded(run: Run, keep: list[Any]) -> list[Tensor]:
    """The log-density of each site, summed to the shape of the weights."""
    return [folded(site.log_prob, site.facts, keep) for site in run.sites.values()]


def model_sites(model: Program, *args: Any, **kwargs: Any) -> list[Site]:
    """The sites of one run of the model alone, without gradient, from the user's random stream."""
    claim_parameters(model, model)
    with torch.no_grad(), watched_modes():
        return sites_of(claiming(lambda: poutine.trace(model).get_trace(*args, **kwargs)))


def check_pair(model: Program, guide: Program, *data: Tensor) -> Layout:
    """Run model and guide once, without particles or gradient, and raise an error for what is wrong.

    Does not use the user's random stream.

    Returns:
        Their :class:`Layout`.

    Raises:
        ValueError: naming the argument or site, for data that are empty or infinite, for NaN that makes a log-density
            non-finite, for a site of the model that the guide misses, a site of the guide that the model does not have,
            and observations outside of a fixed support.

    Warns:
        UserWarning: for the user's ``poutine.scale``, which importance weights ignore, and for a plate of
            the guide that the model does not have.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError("a GuideMessenger cannot be traced: use an AutoGuide or a guide function")
    dtypes = {p.dtype for owner in own_modules(model, guide) for p in owner.parameters()}
    with torch.no_grad(), forked_rng(), checked_data(data, dtypes) as holes:
        claim_parameters(model, guide)
        try:
            with watched_modes():
                p, q = claiming(lambda: trace_pair(model, guide, data))
        except ValueError:  # perhaps of parameters computed from a sample outside of its site's support: report that
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
        layout = layout_of(*sites, guide_again)
    check_spread(sites[0], data)
    return layout


def scaled_elbo(model: Program, guide: Program, *data: Tensor) -> Tensor:
    """The sum of all log p minus the sum of all log q in one sample, with scales and masks, as in ``Trace_ELBO``."""
    p, q = trace_pair(model, guide, data)
    return torch.as_tensor(p.log_prob_sum() - q.log_prob_sum())


def parameters_of(model: Program, guide: Program, *data: Tensor) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the model, and those of the guide only: of modules, and of ``pyro.param``."""
    claim_parameters(model, guide)
    with torch.no_grad(), forked_rng():
        with ParametersRead() as of_guide:
            q = poutine.trace(guide).get_trace(*data)
        with ParametersRead() as of_model:
            poutine.replay(model, trace=q)(*data)
    return trainable(model, guide, of_model.parameters, of_guide.parameters)


@torch.no_grad()
def observed_sites(model: Program, guide: Program, data: tuple[Tensor, ...]) -> list[Site]:
    """The sites at which the model observes data: without values that the guide samples, and without factors."""
    with forked_rng():
        p, q = (sites_of(trace) for trace in trace_pair(model, guide, data))
    drawn = {site["name"] for site in q}
    return [s for s in p if s["is_observed"] and s["name"] not in drawn and not facts_of(s).point]


def trace_pair(model: Program, guide: Program, data: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    """The traces of a model and of the guide that it is replayed against."""
    q = poutine.trace(guide).get_trace(*data)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*data)
    return p, q
