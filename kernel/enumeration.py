r"""Sites whose states are summed out: those that a pair leaves to ``TraceEnum_ELBO``, in its model or in its guide.

A site c of the model that is marked ``infer={"enumerate": ...}`` and that the guide does not draw is summed out of
p(x, z, c). A site y of the guide that is so marked takes all its states at once, and each later draw z one value for
each of them:

.. math::
    \log w = \log \sum_{c, y} \frac{p(x, y, z_y, c)}{q(z_y \mid x, y)}, \qquad
    \mathrm{ELBO} = \sum_y q(y \mid x) \log \frac{\sum_c p(x, y, z_y, c)}{q(y \mid x) \, q(z_y \mid x, y)}

Both average over the draws z: w to p(x), the second to what ``TraceEnum_ELBO`` averages to. Without such a y the two
are one. Pyro's handlers name the dimensions (``pyro.markov`` included), and its contraction over the tree of plates
sums: inside a plate over the states of each of its elements, so that the cost is that of the factors.

Sums are taken by logsumexp. Pyro multiplies exponentials, which is infinite where no state is likely under every
factor (a chain whose neighbours disagree by 100 nats, in single precision).

References:
    Obermeyer et al. (2019), Tensor Variable Elimination for Plated Factor Graphs. https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

__all__ = ["Summed", "at_state", "enumerate_guide", "enumerate_model", "is_enumerated", "state_counts"]

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .sites import Site, base_of, fold, plates_of, subsampling, sum_to_data

Program = Callable[..., Any]
Packed = Any  # a tensor whose dimensions have names, in ``_pyro_dims``


def is_enumerated(site: Site) -> bool:
    """Whether a site of such a run takes all its states at once."""
    return not site["is_observed"] and site["infer"].get("_enumerate_dim") is not None


def enumerate_guide(guide: Program, first: int) -> Program:
    """A guide whose sites marked for enumeration take all their states at once, in dimensions from ``first`` leftwards.

    Args:
        guide: the guide, in its particle plate where it has one.
        first: the first dimension left of all plates, -1 or less.
    """
    return _wrap(_Enumeration(first), guide)


def enumerate_model(model: Program, guide_trace: Trace, first: int) -> Program:
    """A model at the guide's values whose marked sites, those that the guide does not draw, take all their states.

    Args:
        model: the model, in its particle plate where it has one; not replayed.
        guide_trace: one run of :func:`enumerate_guide`. Of its sites, names, values and ``infer`` are read.
        first: as there. The states of the model's sites stand left of those of the guide's.

    Raises:
        ValueError: when run, for a marked site whose states cannot be listed.
    """
    seen, dims, ids = guide_trace.copy(), [first + 1], [-1]
    shared: dict[int, int] = {}
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            infer: Any = dict(site["infer"] or {})
            infer["_dim_to_id"] = names = dict(infer.get("_dim_to_id", {}))  # the model's handler writes into it
            own: Any = {**site, "infer": infer}
            seen.nodes[name] = own
            if (dim := infer.get("_enumerate_dim")) is not None:
                dims.append(dim)
                ids.append(names[dim])
                if "_markov_scope" not in infer:
                    shared[dim] = names[dim]
    drawn = {name for name, site in seen.nodes.items() if site["type"] == "sample"}
    handler = _Enumeration(min(dims) - 1, max(ids) + 1, shared, drawn)
    return poutine.replay(_wrap(handler, model), trace=seen)  # outside: an inner one hides its sites from the handler


def _wrap(handler: _Enumeration, program: Program) -> Program:
    wrapped: Program = handler(program)
    return wrapped


class _Enumeration(EnumMessenger):
    """Pyro's handler; it also takes ``"sequential"`` for ``"parallel"`` and goes on from the guide's dimensions."""

    def __init__(
        self, first: int, next_id: int = 0, shared: Mapping[int, int] | None = None, drawn: set[str] | None = None
    ) -> None:
        super().__init__(first)
        self.next_id, self.shared = next_id, shared or {}
        self.of_model, self.drawn = drawn is not None, drawn or set()

    def __enter__(self) -> _Enumeration:
        super().__enter__()
        _ENUM_ALLOCATOR.next_available_id = self.next_id
        _ENUM_ALLOCATOR.dim_to_id = dict(self.shared)
        return self

    def _pyro_sample(self, msg: Any) -> None:
        infer, name = msg["infer"], msg["name"]
        marked = not msg["is_observed"] and not site_is_subsample(msg) and infer.get("enumerate")
        if marked and name in self.drawn:  # the guide's
            del infer["enumerate"]
        elif marked and self.of_model and infer.get("num_samples"):
            raise ValueError(
                f"site '{name}' is marked for {infer['num_samples']} draws from the model (num_samples), which is no "
                "sum over its states: sample it in the guide"
            )
        elif marked and not self.of_model and (infer.get("num_samples") or not msg["fn"].has_enumerate_support):
            del infer["enumerate"]  # drawn, like any other
        elif marked:
            infer["enumerate"] = "parallel"
        try:
            super()._pyro_sample(msg)
        except NotImplementedError as error:
            raise ValueError(
                f"site '{name}' ({type(base_of(msg['fn'])).__name__}) is marked to be enumerated, but does not list "
                f"its states ({error}): sample it in the guide, or give each state vector a site of its own"
            ) from error

    def _pyro_post_sample(self, msg: Any) -> None:
        """As Pyro has it, without ``.data``, which ``torch.vmap`` does not know."""
        value, infer = msg["value"], msg["infer"]
        if value is None or not hasattr(msg["fn"], "event_dim"):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        names = infer.setdefault("_dim_to_id", {})
        names.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {d: i for d, i in names.items() if len(shape) >= -d and shape[d] > 1}


class _Factor(NamedTuple):
    """A site's packed log-density: each of its dimensions is a plate, or the states of a site, and has a symbol."""

    site: Site
    value: Packed
    plates: frozenset[str]
    states: frozenset[str]


class Summed:
    """The densities of one run of :func:`enumerate_guide` and :func:`enumerate_model`, with the states summed out.

    Args:
        p: the model's sites that count.
        q: the guide's. A site of either whose ``"unscaled_log_prob"`` is there already is not asked for it again.
        keep: the plates that enclose every site (the data), without the particles.
        nesting: how many dimensions the plates take, without the particles.

    Attributes:
        log_p: log-densities by site, each [K or 1, *keep]. Sites that no state touches stand under their own names. The
            others are one entry for all that hang together, under their names joined by "+": the log of a sum over
            states, of their densities, divided by those of the draws that the guide makes for each of its states.
        log_q: log q of the guide's other draws, [K or 1, *keep].

    Raises:
        ValueError: for a log-density with a dimension that is neither a plate's nor a site's states.
        NotImplementedError: where a site depends on the states of one in a plate that it stands outside of, and where
            sites that are summed together are subsampled unlike, or lie in plates that cross.
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]

    def __init__(self, p: Sequence[Site], q: Sequence[Site], keep: Sequence[CondIndepStackFrame], nesting: int) -> None:
        self._keep, self._nesting = list(keep), nesting
        frames = {frame.name: frame for site in [*p, *q] for frame in plates_of(site)}
        self._symbols = {name: chr(2 * i) for i, name in enumerate(frames)}
        self._dims = {self._symbols[name]: frame.dim for name, frame in frames.items()}
        drawn, latent = {s["name"] for s in q}, {s["name"] for s in p if not s["is_observed"]}
        of_model = [s for s in p if is_enumerated(s) and s["name"] not in drawn]
        of_guide = [s for s in q if is_enumerated(s)]
        self._home = {_own_symbol(s): self._plates(s) for s in [*of_model, *of_guide]}
        self._model_states = frozenset(map(_own_symbol, of_model))
        self._ring = _LogSpace(dim_to_size={})
        self._marginals: dict[frozenset[str], Packed] = {}

        densities = [_log_prob(site) for site in [*p, *q]]
        masked = [self._factor(s, scale_and_mask(d, 1, s["mask"])) for s, d in zip([*p, *q], densities, strict=True)]
        # A mask at a site that is summed out would count each of its states as certain.
        bare = [
            self._factor(s, d) if is_enumerated(s) else f for s, d, f in zip([*p, *q], densities, masked, strict=True)
        ]
        self._p, self._q = masked[: len(p)], masked[len(p) :]
        self._own_p, own_q = bare[: len(p)], bare[len(p) :]
        self._guide_states = {_own_symbol(f.site): f for f in own_q if is_enumerated(f.site)}

        loose = {id(f.site) for f in bare if not f.states}
        folded = {
            id(s): fold(s, d, self._keep, nesting) for s, d in zip([*p, *q], densities, strict=True) if id(s) in loose
        }
        self.log_p = {s["name"]: folded[id(s)] for s in p if id(s) in loose}
        self.log_q = {s["name"]: folded[id(s)] for s in q if id(s) in loose and not is_enumerated(s)}
        tied = [f for f in self._own_p if f.states]
        for f in own_q:
            if is_enumerated(f.site):
                if f.site["name"] not in latent:  # an auxiliary site: q alone says how likely its states are
                    tied.append(f)
            elif f.states:
                tied.append(f._replace(value=packed.neg(f.value)))
        for group in _connected(tied, frozenset(self._home)):
            name = "+".join(dict.fromkeys(f.site["name"] for f in group))
            self.log_p[name] = self._to_data(*self._contract(group, frozenset(self._home)))

    @property
    def log_weights(self) -> Tensor:
        """The log weights, [K or 1, *keep]."""
        total: Tensor = sum(self.log_p.values()) - sum(self.log_q.values())  # type: ignore[assignment]
        return total

    def elbo(self) -> Tensor:
        """What averages to the ELBO, [K or 1, *keep]: the log weights, unless the guide has states.

        Raises:
            NotImplementedError: where a site of the model that is summed out stands outside of a plate with states of
                the guide: its sum is over all of the latter at once.
        """
        if not self._guide_states:
            return self.log_weights
        inside = [
            own if is_enumerated(f.site) and _own_symbol(f.site) in self._model_states else f
            for own, f in zip(self._own_p, self._p, strict=True)
            if own.states & self._model_states
        ]
        costs = [self._contract(group, self._model_states) for group in _connected(inside, self._model_states)]
        for f in self._p:
            if not f.states & self._model_states:
                costs.append((f, self._scale([f])))
        costs += [(f._replace(value=packed.neg(f.value)), self._scale([f])) for f in self._q]
        return torch.as_tensor(sum(self._to_data(self._expected(f), scale) for f, scale in costs))

    def _plates(self, site: Site) -> frozenset[str]:
        return frozenset(self._symbols[frame.name] for frame in plates_of(site))

    def _factor(self, site: Site, log_prob: Tensor) -> _Factor:
        """A log-density of the site's batch shape, packed."""
        symbols = {dim: chr(2 * id_ + 1) for dim, id_ in site["infer"].get("_dim_to_id", {}).items()}
        symbols |= {frame.dim: self._symbols[frame.name] for frame in plates_of(site)}
        shape = log_prob.shape
        if loose := [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in symbols]:
            raise ValueError(
                f"site '{site['name']}' has a log-density of shape {list(shape)} while states are summed out, but its "
                f"dimension {loose[0]} is neither a plate's nor that of a site's states: index and reduce from the "
                "right (dim=-1), declare plates, and put sequences in pyro.markov"
            )
        value = packed.pack(log_prob, symbols)
        self._ring.sizes.update(zip(value._pyro_dims, value.shape, strict=True))
        plates, states = self._plates(site), frozenset(value._pyro_dims) & frozenset(self._home)
        if any(not self._home[state] <= plates for state in states):
            raise NotImplementedError(
                f"site '{site['name']}' depends on the states of a site in a plate that it stands outside of: their "
                "sum is over all elements of it at once; draw that site in the guide, or make the plate sequential"
            )
        return _Factor(site, value, plates, states)

    def _scale(self, group: Iterable[_Factor]) -> float:
        """N/B over the subsampled plates of these sites that are summed over."""
        scales = {f.site["name"]: subsampling(set(f.site["cond_indep_stack"]) - set(self._keep)) for f in group}
        if len(set(scales.values())) > 1:
            raise NotImplementedError(
                f"the sites {sorted(scales)} are summed over states together, but their plates are subsampled unlike "
                f"(N/B: {scales}): run the inner plate in full"
            )
        return next(iter(scales.values()))

    def _contract(self, group: Sequence[_Factor], dims: frozenset[str]) -> tuple[_Factor, float]:
        """Sum connected factors over these states, and their product over the plates inside; and their N/B."""
        tree: OrderedDict[frozenset[str], list[Packed]] = OrderedDict()
        for f in group:
            tree.setdefault(f.plates, []).append(f.value)
        try:
            tree = contract_tensor_tree(tree, set(dims), ring=self._ring)
        except NotImplementedError as error:
            names = list(dict.fromkeys(f.site["name"] for f in group))
            raise NotImplementedError(
                f"the sites {names} lie in plates that cross, so that their states cannot be summed plate by plate: "
                "make one of the plates sequential (for i in pyro.plate(...)), or draw one of the sites in the guide"
            ) from error
        ((plates, (value,)),) = tree.items()
        states = frozenset(value._pyro_dims) & frozenset(self._home)
        return _Factor(group[0].site, value, plates, states), self._scale(group)

    def _expected(self, f: _Factor) -> _Factor:
        """The mean of a term under the guide's states."""
        if not f.states:
            return f
        if any(not self._home[state] <= f.plates for state in f.states):
            raise NotImplementedError(
                f"the states of site '{f.site['name']}' are summed out outside of a plate whose sites the guide "
                "enumerates: their sum is over all states of that plate at once; draw the latter in the guide, or have "
                "the guide enumerate the former too"
            )
        log_prob, value = packed.broadcast_all(self._marginal(f.states), f.value)
        prob = log_prob.exp()
        terms = torch.where(prob > 0, prob * torch.where(prob > 0, value, 0), 0)
        mean: Packed = terms.sum([value._pyro_dims.index(state) for state in f.states])
        mean._pyro_dims = "".join(dim for dim in value._pyro_dims if dim not in f.states)
        return f._replace(value=mean, states=frozenset())

    def _marginal(self, states: frozenset[str]) -> Packed:
        """Log q of these states of the guide, packed."""
        if states not in self._marginals:
            last = max(states, key=list(self._guide_states).index)  # no other depends on it
            f = self._guide_states[last]
            others = (states | f.states) - {last}
            terms = [f.value, self._marginal(others)] if others else [f.value]
            self._marginals[states] = self._ring.sumproduct(terms, others - states)
        return self._marginals[states]

    def _to_data(self, f: _Factor, scale: float) -> Tensor:
        """A term without states, summed to the shape of the weights."""
        return sum_to_data(packed.unpack(f.value, self._dims) * scale, self._keep, self._nesting)


class _LogSpace(LogRing):
    """Pyro's ring of log-densities, with sums by logsumexp, one dimension after the other: the one that costs least."""

    def __init__(self, dim_to_size: dict[str, int]) -> None:
        super().__init__(dim_to_size=dim_to_size)  # type: ignore[no-untyped-call]
        self.sizes = dim_to_size

    def sumproduct(self, terms: Sequence[Packed], dims: Iterable[str]) -> Packed:
        holding = {dim: [t for t in terms if dim in t._pyro_dims] for dim in sorted(dims)}
        left = {id(t): t for t in terms}
        cost = {dim: self._size(held) for dim, held in holding.items() if held}
        while cost:
            dim = min(cost, key=cost.__getitem__)
            held = holding[dim]
            joined = _add(held)
            term = joined.logsumexp(joined._pyro_dims.index(dim))
            term._pyro_dims = joined._pyro_dims.replace(dim, "")
            del cost[dim]
            for t in held:
                del left[id(t)]
            left[id(term)] = term
            gone = {id(t) for t in held}
            for other in cost.keys() & set(term._pyro_dims):
                holding[other] = [*(t for t in holding[other] if id(t) not in gone), term]
                cost[other] = self._size(holding[other])
        return _add(list(left.values()))

    def _size(self, terms: Iterable[Packed]) -> int:
        return prod(self.sizes[dim] for dim in {dim for t in terms for dim in t._pyro_dims})


def _add(terms: Sequence[Packed]) -> Packed:
    """The sum of packed tensors, broadcast."""
    terms = packed.broadcast_all(*terms)
    total = sum(terms[1:], start=terms[0][...])
    total._pyro_dims = terms[0]._pyro_dims
    return total


def _connected(factors: Sequence[_Factor], dims: frozenset[str]) -> list[list[_Factor]]:
    """The factors, in groups that have none of these states in common."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, f in enumerate(factors):
        states, members = set(f.states & dims), [i]
        apart = []
        for group in groups:
            if group[0] & states:
                states |= group[0]
                members = [*group[1], *members]
            else:
                apart.append(group)
        groups = [*apart, (states, members)]
    return [[factors[i] for i in sorted(members)] for _, members in groups]


def _own_symbol(site: Site) -> str:
    """The symbol of a site's own states."""
    infer = site["infer"]
    return chr(2 * infer["_dim_to_id"][infer["_enumerate_dim"]] + 1)


def _log_prob(site: Site) -> Tensor:
    known: Tensor | None = site.get("unscaled_log_prob")
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]) if known is None else known


def state_counts(sites: Iterable[Site]) -> dict[int, int]:
    """How many states each enumerated site has, by the number that stands for it in a run: to choose one by."""
    counts = {}
    for site in filter(is_enumerated, sites):
        dim = site["infer"]["_enumerate_dim"]
        counts[site["infer"]["_dim_to_id"][dim]] = site["value"].shape[dim - site["fn"].event_dim]
    return counts


def at_state(site: Site, state: Mapping[int, int], nesting: int) -> tuple[Tensor, Tensor]:
    """A site's value and log-density where each enumerated site takes one state: what a plain run at it would have.

    A value of an enumerated site is the same all over its plates.

    Args:
        site: of the model or guide.
        state: the index of the state of each enumerated site, by its number, as :func:`state_counts` has them.
        nesting: how many dimensions the plates take, with the particles where they are one.

    Returns:
        The value [*plates, *event] and the log-density [*plates], without scale and mask.
    """
    event = site["fn"].event_dim
    sizes: dict[Any, int] = {frame.dim: frame.size for frame in plates_of(site)}
    plates = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    value = _select(site["value"], site, state, nesting, event)
    if is_enumerated(site):
        value = value.expand(*plates, *value.shape[value.dim() - event :])
    return value, _select(_log_prob(site), site, state, nesting, 0)


def _select(tensor: Tensor, site: Site, state: Mapping[int, int], nesting: int, event: int) -> Tensor:
    for dim, id_ in site["infer"].get("_dim_to_id", {}).items():
        if -(dim - event) <= tensor.dim() and tensor.shape[dim - event] > 1:
            tensor = tensor.narrow(dim - event, state[id_], 1)
    return tensor.reshape(tensor.shape[max(0, tensor.dim() - event - nesting) :])
