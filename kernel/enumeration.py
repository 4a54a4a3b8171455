r"""Sites whose states are summed out, as in ``TraceEnum_ELBO``: sites of the model or of the guide.

A site c of the model that is marked ``infer={"enumerate": ...}`` and that the guide does not sample is summed out of
p(x, z, c). A site y of the guide with that mark takes all its states at once, and each later site z has one sample for
each of them:

.. math::
    \log w = \log \sum_{c, y} \frac{p(x, y, z_y, c)}{q(z_y \mid x, y)}, \qquad
    \mathrm{ELBO} = \sum_y q(y \mid x) \log \frac{\sum_c p(x, y, z_y, c)}{q(y \mid x) \, q(z_y \mid x, y)}

Both average over the samples z: w to p(x), the second to the limit of ``TraceEnum_ELBO``. Without such a y the two
are equal. Pyro's handlers name the dimensions (``pyro.markov`` included), and its tree contraction sums: inside a
plate, over the states of each element, so that the cost is that of the factors.

Sums use logsumexp. Pyro multiplies exponentials, which fails where no state is likely under every factor (a chain
whose neighbours disagree by 100 nats, in single precision).

References:
    Obermeyer et al. (2019), Tensor Variable Elimination for Plated Factor Graphs. https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

__all__ = ["Summed", "at_state", "check_states", "enumerated", "is_enumerated", "sampled", "state_counts"]

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import infer_config
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor

from .sites import Program, Site, plates_of, subsampling
from .supports import log_density

Packed = Any  # a tensor whose dimensions have names, in ``_pyro_dims``
_TOLERANCE = {False: 1e-4, True: 1e-10}  # relative to one plus the log-density: single, double precision


def is_enumerated(site: Site) -> bool:
    """Whether a site takes all its states at once."""
    return not site["is_observed"] and site["infer"].get("_enumerate_dim") is not None


def enumerated(program: Program, nesting: int, drawn: Mapping[str, Mapping[str, Any]] | None = None) -> Program:
    """A program whose sites marked for enumeration take all their states at once, each site in its own dimension.

    Sites that an outer handler gives a value (for a model: samples of the guide) are left as they are. Sites that
    cannot enumerate their states, or are marked with ``num_samples``, are sampled.

    Args:
        program: a model or a guide.
        nesting: how many dimensions its plates take. States are left of them and of one dimension for particles.
        drawn: for a model, ``infer`` of the guide's sites by name; needed if sites of the guide have states.
    """
    wrapped: Program = _Enumeration(nesting, drawn or {})(program)
    return wrapped


def sampled(program: Program) -> Program:
    """A program whose sites marked for enumeration are sampled."""
    wrapped: Program = infer_config(program, lambda site: {"enumerate": None})  # type: ignore[typeddict-item]
    return wrapped


class _Enumeration(EnumMessenger):
    """Pyro's handler; it also accepts ``"sequential"`` for ``"parallel"`` and continues the guide's dimensions."""

    def __init__(self, nesting: int, drawn: Mapping[str, Mapping[str, Any]]) -> None:
        self.drawn = drawn
        states = [infer for infer in drawn.values() if infer.get("_enumerate_dim") is not None]
        self.next_id = 1 + max(map(_number, states), default=-1)
        # The guide's dimensions on which any site may depend.
        self.everywhere = {i["_enumerate_dim"]: _number(i) for i in states if "_markov_scope" not in i}
        super().__init__(min((infer["_enumerate_dim"] - 1 for infer in states), default=-nesting - 2))

    def __enter__(self) -> _Enumeration:
        super().__enter__()
        _ENUM_ALLOCATOR.next_available_id = self.next_id
        _ENUM_ALLOCATOR.dim_to_id = dict(self.everywhere)
        return self

    def _pyro_sample(self, msg: Any) -> None:
        infer = msg["infer"]
        if infer.get("enumerate"):
            listed = not infer.get("num_samples") and getattr(msg["fn"], "has_enumerate_support", False)
            infer["enumerate"] = "parallel" if listed and msg["name"] not in self.drawn else None
        with suppress(NotImplementedError):  # the number of states differs between elements: not enumerable
            super()._pyro_sample(msg)
        self._listed = msg["value"] if infer.get("_enumerate_dim") is not None else None

    def _pyro_post_sample(self, msg: Any) -> None:
        """As in Pyro, without ``.data``, which ``torch.vmap`` does not support."""
        value, infer = msg["value"], msg["infer"]
        if value is None or not hasattr(msg["fn"], "event_dim"):
            return
        if (dim := infer.get("_enumerate_dim")) is not None and value is not self._listed:  # it received a value
            del infer["_enumerate_dim"]
            names = infer.pop("_dim_to_id")
            if _ENUM_ALLOCATOR.dim_to_id.get(dim) == names[dim]:
                del _ENUM_ALLOCATOR.dim_to_id[dim]
                _ENUM_ALLOCATOR.next_available_dim += 1
        names = infer.setdefault("_dim_to_id", {})
        names.update(self._param_dims.get(msg["name"], {}))
        if (known := self.drawn.get(msg["name"])) and not msg["is_observed"]:
            names.update(known.get("_dim_to_id", {}))
            infer["_enumerate_dim"] = known.get("_enumerate_dim")
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        self._value_dims[msg["name"]] = {d: i for d, i in names.items() if len(shape) >= -d and shape[d] > 1}


class _Factor(NamedTuple):
    """A site's packed log-density: each dimension has a symbol and is a plate, or the states of a site."""

    site: Site
    value: Packed
    plates: frozenset[str]
    states: frozenset[str]


class Summed:
    """The sites of one run of a model and guide that are :func:`enumerated`, with the states summed out.

    Args:
        p: the model's sites that count.
        q: the guide's sites that count.

    Attributes:
        p: sites without states that hold the model's log-densities. Sites without any states are unchanged. All
            connected sites with states become one site, like a ``pyro.factor``, with their names joined by "+": its
            log-density is the log of a sum over states, of their densities divided by those of the guide's samples
            for each of its states. Sites that are sampled from the model are omitted: p is also their proposal.
        q: the guide's other samples. Log w is the sum of all ``p`` minus the sum of all ``q``.

    Raises:
        ValueError: for a log-density with a dimension that is neither a plate's nor a site's states.
        NotImplementedError: where a site outside a plate depends on states inside the plate, where sites that are
            summed together are subsampled differently, or where their plates cross.

    Example:
        >>> from pyro import poutine
        >>> from pyro.infer import config_enumerate
        >>> from jensen.families import Bernoulli
        >>> from jensen.kernel.sites import sites_of
        >>> from jensen.models import BinaryLatentVAE
        >>> from jensen.networks import mlp
        >>> model, x = BinaryLatentVAE(mlp(4, [16]), Bernoulli(10, 16), latent=4), torch.ones(3, 10)
        >>> trace = poutine.trace(enumerated(config_enumerate(model), nesting=1)).get_trace(x)
        >>> (site,) = Summed(sites_of(trace)).p
        >>> site["name"], torch.allclose(site["fn"].log_prob(site["value"]), model.log_evidence(x))
        ('z+x', True)
    """

    def __init__(self, p: Sequence[Site], q: Sequence[Site] = ()) -> None:
        self._frames = {frame.name: frame for site in [*p, *q] for frame in plates_of(site)}
        self._symbols = {name: chr(2 * i) for i, name in enumerate(self._frames)}
        drawn, latent = {s["name"] for s in q}, {s["name"] for s in p if not s["is_observed"]}
        p = [s for s in p if s["is_observed"] or is_enumerated(s) or s["name"] in drawn]  # else p is its proposal
        of_model = [s for s in p if is_enumerated(s) and s["name"] not in drawn]
        of_guide = [s for s in q if is_enumerated(s)]
        self._home = {_symbol(s): self._plates(s) for s in [*of_model, *of_guide]}
        self._all, self._model_states = frozenset(self._home), frozenset(map(_symbol, of_model))
        self._ring = _LogSpace(dim_to_size={})
        self._marginals: dict[frozenset[str], Packed] = {}

        pairs = [self._factors(site) for site in [*p, *q]]
        self._p, self._q = pairs[: len(p)], pairs[len(p) :]
        self._guide_states = {_symbol(bare.site): bare for _, bare in self._q if is_enumerated(bare.site)}

        self.p = [bare.site for _, bare in self._p if not bare.states]
        self.q = [bare.site for _, bare in self._q if not bare.states and not is_enumerated(bare.site)]
        tied = [bare for _, bare in self._p if bare.states]
        for _, f in self._q:
            if is_enumerated(f.site):
                if f.site["name"] not in latent:  # an auxiliary site: only q gives probabilities to its states
                    tied.append(f)
            elif f.states:
                tied.append(f._replace(value=packed.neg(f.value)))
        self.p += [self._contract(group, self._all) for group in _connected(tied, self._all)]

    def elbo(self) -> list[Site]:
        """Sites whose log-densities add up to a value that averages to the ELBO: log w if the guide has no states.

        Raises:
            NotImplementedError: where a summed-out site of the model is outside of a plate with states of the guide:
                its sum then runs over all elements of the plate at once.
        """
        inside, costs = [], [self._expected(masked._replace(value=packed.neg(masked.value))) for masked, _ in self._q]
        for masked, bare in self._p:
            if not masked.states & self._model_states:
                costs.append(self._expected(masked))
            else:
                inside.append(bare if _symbol(bare.site) in self._model_states else masked)
        for group in _connected(inside, self._model_states):
            costs.append(self._expected(self._sum(group, self._model_states)))
        return [self._plain(f, f.site["name"]) for f in costs]

    def _plates(self, site: Site) -> frozenset[str]:
        return frozenset(self._symbols[frame.name] for frame in plates_of(site))

    def _factors(self, site: Site) -> tuple[_Factor, _Factor]:
        """A site's log-density with its mask, and as it is summed over states: a mask would count each as certain."""
        log_prob = log_density(site)
        masked = self._factor(site, scale_and_mask(log_prob, 1.0, site["mask"]))
        return masked, self._factor(site, log_prob) if is_enumerated(site) else masked

    def _factor(self, site: Site, log_prob: Tensor) -> _Factor:
        """A log-density of the site's batch shape, packed."""
        symbols = {dim: chr(2 * id_ + 1) for dim, id_ in site["infer"].get("_dim_to_id", {}).items()}
        symbols |= {frame.dim: self._symbols[frame.name] for frame in plates_of(site)}
        shape = log_prob.shape
        if loose := [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in symbols]:
            raise ValueError(
                f"site '{site['name']}' has a log-density of shape {list(shape)} while states are summed out, but its "
                f"dimension {loose[0]} is neither a plate nor the states of a site: index and reduce from the right "
                "(dim=-1), declare plates, and put sequences in pyro.markov"
            )
        value = packed.pack(log_prob, symbols)
        self._ring.sizes.update(zip(value._pyro_dims, value.shape, strict=True))
        plates, states = self._plates(site), frozenset(value._pyro_dims) & self._all
        if any(not self._home[state] <= plates for state in states):
            raise NotImplementedError(
                f"site '{site['name']}' depends on the states of a site in a plate that does not contain it, so the "
                "sum runs over all elements of the plate at once; sample that site in the guide, or make the plate "
                "sequential"
            )
        return _Factor(site, value, plates, states)

    def _sum(self, group: Sequence[_Factor], dims: frozenset[str]) -> _Factor:
        """Connected factors summed over these states, and multiplied over the plates inside the widest one."""
        tree: OrderedDict[frozenset[str], list[Packed]] = OrderedDict()
        for f in group:
            tree.setdefault(f.plates, []).append(f.value)
        try:
            tree = contract_tensor_tree(tree, set(dims), ring=self._ring)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"the plates of sites {_names(group)} cross, so their states cannot be summed plate by plate: make one "
                "of the plates sequential (for i in pyro.plate(...)), or sample one of the sites in the guide"
            ) from error
        ((plates, (value,)),) = tree.items()
        whole = _Factor(group[0].site, value, plates, frozenset(value._pyro_dims) & self._all)
        inner = {frame for f in group for frame in _subsampled(f.site["cond_indep_stack"])}
        if inner != set(_subsampled(self._stack(whole))):
            raise NotImplementedError(
                f"the states of sites {_names(group)} are summed together, but not all of these sites are in the "
                f"subsampled plates {sorted(frame.name for frame in inner)}: run these plates in full"
            )
        return whole

    def _contract(self, group: Sequence[_Factor], dims: frozenset[str]) -> Site:
        return self._plain(self._sum(group, dims), "+".join(_names(group)))

    def _stack(self, f: _Factor) -> tuple[CondIndepStackFrame, ...]:
        """The remaining plates of a term: those of its site that are sequential or were not multiplied over."""
        stack: tuple[CondIndepStackFrame, ...] = f.site["cond_indep_stack"]
        return tuple(frame for frame in stack if not frame.vectorized or self._symbols[frame.name] in f.plates)

    def _plain(self, f: _Factor, name: str) -> Site:
        """A term without states as a site, like a ``pyro.factor``."""
        dims = {self._symbols[plate]: frame.dim for plate, frame in self._frames.items()}
        fn = Unit(packed.unpack(f.value, dims), validate_args=False)
        site = {"type": "sample", "name": name, "fn": fn, "value": fn.sample(), "is_observed": True, "args": ()}
        return {**site, "kwargs": {}, "infer": {}, "scale": 1.0, "mask": None, "cond_indep_stack": self._stack(f)}

    def _expected(self, f: _Factor) -> _Factor:
        """The mean of a term under the guide's states."""
        if not f.states:
            return f
        if any(not self._home[state] <= f.plates for state in f.states):
            raise NotImplementedError(
                f"the states of site '{f.site['name']}' are summed out outside of a plate whose sites the guide "
                "enumerates, so the sum runs over all states of that plate at once; sample the sites of the plate in "
                "the guide, or let the guide enumerate the first site, too"
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
            last = max(states, key=list(self._guide_states).index)  # no other state depends on it
            f = self._guide_states[last]
            others = (states | f.states) - {last}
            terms = [f.value, self._marginal(others)] if others else [f.value]
            self._marginals[states] = self._ring.sumproduct(terms, others - states)
        return self._marginals[states]


class _LogSpace(LogRing):
    """Pyro's ring of log-densities with sums by logsumexp, one dimension at a time, the cheapest first."""

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
    """The factors, in groups that share none of these states."""
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


def _names(group: Iterable[_Factor]) -> list[str]:
    return list(dict.fromkeys(f.site["name"] for f in group))


def _subsampled(frames: Iterable[CondIndepStackFrame]) -> list[CondIndepStackFrame]:
    return [frame for frame in frames if subsampling({frame}) != 1.0]


def _number(infer: Mapping[str, Any]) -> int:
    """The number that identifies a site's own states in a run."""
    number: int = infer["_dim_to_id"][infer["_enumerate_dim"]]
    return number


def _symbol(site: Site) -> str:
    """The symbol of a site's own states; empty if it has none."""
    return chr(2 * _number(site["infer"]) + 1) if is_enumerated(site) else ""


def check_states(sites: Sequence[Site], plain: Callable[[dict[str, Tensor]], Sequence[Site]]) -> None:
    """Raise unless a program run at all states at once gives the log-densities of runs at single states.

    Three joint states are run: the first state of every site, the last one, and the states in turn.

    Args:
        sites: the sites of a run of an :func:`enumerated` program.
        plain: returns the sites of a run of the original program, at given values of all latent sites.

    Raises:
        ValueError: naming the first site that differs.
    """
    counts = state_counts(sites)
    orders = ([0 for _ in counts], [n - 1 for n in counts.values()], [i % n for i, n in enumerate(counts.values())])
    for order in orders:
        state = dict(zip(counts, order, strict=True))
        at = {site["name"]: at_state(site, state) for site in sites}
        alone = plain({site["name"]: at[site["name"]][0] for site in sites if not site["is_observed"]})
        for site in alone:
            with suppress(KeyError, NotImplementedError):  # of a flow that knows log q of its own samples only
                if _near(at[site["name"]][1], log_density(site)):
                    continue
                raise ValueError(
                    f"the log-density of site '{site['name']}' with all states of "
                    f"{[s['name'] for s in sites if is_enumerated(s)]} at once differs from that of a run at one of "
                    "them: the program counts dimensions from the left, or mixes rows; index and reduce from the right "
                    "(dim=-1, z[..., 0]), or sample these sites in the guide"
                )


def _near(got: Tensor, expected: Tensor) -> bool:
    """Whether a log-density equals that of a plain run, up to rounding and to plates along which it is constant."""
    sizes = zip(reversed(got.shape), reversed(expected.shape), strict=False)
    if got.dim() > expected.dim() or any(ours not in (1, size) for ours, size in sizes):
        return False
    allowed = _TOLERANCE[expected.dtype == torch.float64] * (1 + expected.abs())
    near = (got == expected) | ((got - expected).abs() <= allowed) | (got.isnan() & expected.isnan())
    return bool(near.all())


def state_counts(sites: Iterable[Site]) -> dict[int, int]:
    """The number of states of each enumerated site, by its number in a run."""
    counts = {}
    for site in filter(is_enumerated, sites):
        dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
        counts[_number(site["infer"])] = site["value"].shape[dim]
    return counts


def at_state(site: Site, state: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """A site's value and log-density at one state of each enumerated site, as in a plain run at that state.

    The value of an enumerated site is constant over its plates.

    Args:
        site: of the model or guide.
        state: the index of the state of each enumerated site, by its number as in :func:`state_counts`.

    Returns:
        The value [*plates, *event] and the log-density [*plates], without scale and mask.
    """
    event = site["fn"].event_dim
    sizes: dict[Any, int] = {frame.dim: frame.size for frame in plates_of(site)}
    plates = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    value = _select(site["value"], site, state, len(plates), event)
    if is_enumerated(site):
        value = value.expand(*plates, *value.shape[value.dim() - event :])
    return value, _select(log_density(site), site, state, len(plates), 0)


def _select(tensor: Tensor, site: Site, state: Mapping[int, int], depth: int, event: int) -> Tensor:
    """A tensor at one state of each enumerated site that it depends on: [*plates, *event]."""
    whole = tensor
    for dim, id_ in site["infer"].get("_dim_to_id", {}).items():
        if -(dim - event) <= tensor.dim() and tensor.shape[dim - event] > 1:
            tensor = tensor.narrow(dim - event, state[id_], 1)
    while (tensor is not whole or is_enumerated(site)) and tensor.dim() > event + depth and len(tensor) == 1:
        tensor = tensor[0]
    return tensor
