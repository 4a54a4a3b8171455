r"""How a program is run for K particles at once: by the first method that reproduces the numbers of single runs.

| method | what the program sees |
| --- | --- |
| alone (K = 1) | the shapes that its author wrote |
| an outer plate | a dimension for the particles, left of all its own plates |
| ``torch.vmap`` | the shapes that its author wrote; PyTorch adds the dimension underneath |
| one after the other | the shapes that its author wrote, K times |

A program that counts dimensions from the left (``softmax(x, 1)``, ``z[:, 0]``, ``x @ w``) computes something else
inside an outer plate, often without an error. So a method is used only after a *proof*, for the given data, number of
particles and modes (training, evaluation): three particles are run again, each alone, at their sampled values, and
log-densities must agree site by site. What differs between runs must differ between particles. The exception is noise
of training mode (the dropout of an encoder), which particles may share, as where Pyro vectorizes them. The last method
needs no proof.
"""

from __future__ import annotations

__all__ = [
    "ALONE",
    "LOOP",
    "PLATE",
    "VMAP",
    "Call",
    "Half",
    "Lifted",
    "LiftedPair",
    "Proof",
    "Run",
    "Way",
    "for_proof",
    "read_both",
    "set_apart",
    "slowest",
]

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, Literal, NamedTuple, get_args

import pyro
import torch
from pyro import poutine, validation_enabled
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .arguments import explained
from .caller import outside
from .enumeration import Summed, check_states, enumerated, is_enumerated
from .modes import modes_kept, tensors_kept
from .parameters import owners_of
from .randomness import forked_rng, stream
from .sites import At, Program, Scored, Site, SiteFacts, base_of, facts_of, in_plate, padded, score, sites_of
from .vectorized import under_vmap

Way = Literal["alone", "outer plate", "torch.vmap", "one after the other"]
ALONE, PLATE, VMAP, LOOP = WAYS = get_args(Way)
Values = Mapping[str, Tensor]
Read = Callable[["Met"], dict[str, Tensor]]

_READING = frozenset(
    [
        "__array__",
        "__bool__",
        "__contains__",
        "__float__",
        "__index__",
        "__int__",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    ]
)
_TOLERANCE = {False: 1e-5, True: 1e-10}  # of the sum of the absolute terms: single, double precision
_NUDGE = 16.0  # units in the last place: values are moved by this to measure the rounding error of a log-density
_MOST = 1e-2  # of the sum of the absolute terms: a larger difference is not attributed to rounding


def slowest(ways: Iterable[Way]) -> Way:
    """The slowest of these methods, which describes several programs run together."""
    return max(ways, key=WAYS.index, default=ALONE)


class Met(NamedTuple):
    """The result of one run: its sites by name, and the indices of its plates."""

    sites: dict[str, Site]
    rows: dict[str, Tensor]


class Run(NamedTuple):
    """The sites of a program under K particles.

    Attributes:
        sites: by name, in order of execution.
        ranks: the number of dimensions of each site's values when the program runs alone.
        rows: the indices of its plates.
        met: the sites with their distributions, if a single run produced them all.
    """

    sites: dict[str, Scored]
    ranks: dict[str, int]
    rows: dict[str, Tensor]
    met: dict[str, Site] | None


class Call(NamedTuple):
    """The arguments of a run: see :meth:`Lifted.__call__`."""

    data: tuple[Any, ...]
    particles: int
    given: Values
    ranks: Mapping[str, int]
    rows: Values

    @property
    def fixed(self) -> dict[str, Tensor]:
        """All values that are not sampled, for a run inside an outer plate."""
        return {**self.given, **self.rows}

    def at(self, k: int) -> dict[str, Tensor]:
        """The given values of one particle, as in a single run."""
        return {name: _at(value, k, self.ranks[name]) for name, value in self.given.items()}

    def detached(self) -> Call:
        """The same call without derivatives."""
        return self._replace(given={name: value.detach() for name, value in self.given.items()})


class Proof(NamedTuple):
    """The result of the proof for a program, for given data shapes, number of particles and module modes.

    Attributes:
        way: the first method that reproduces single runs.
        buffers: whether tensors created with values must be separate for each particle under ``torch.vmap``.
        ranks: the number of dimensions of each site's values when the program runs alone.
        subsampled: the subsampled plates.
    """

    way: Way
    buffers: bool
    ranks: dict[str, int]
    subsampled: frozenset[str]


_ALONE = Proof(ALONE, False, {}, frozenset())


class Lifted:
    """A program under K particles.

    Args:
        program: any Pyro program.
        nesting: how deep the plates of model and guide are nested.
        name: the program's name in messages.

    Attributes:
        reasons: why a method was refused, by method.

    Warns:
        UserWarning: once, if neither an outer plate nor ``torch.vmap`` reproduces single runs.
    """

    def __init__(self, program: Program, nesting: int, name: str = "model") -> None:
        self.program, self.nesting, self.name = program, nesting, name
        self.programs: tuple[Program, ...] = (program,)
        self.reasons: dict[Way, str] = {}
        self._proofs: dict[Any, Proof] = {}
        self._parts: list[nn.Module] | None = None  # all modules held by the programs

    @property
    def way(self) -> Way:
        """The method of the runs; the slowest one if it differs between sizes."""
        return slowest(proof.way for proof in self._proofs.values())

    def __call__(
        self,
        data: tuple[Any, ...],
        particles: int,
        given: Values | None = None,
        ranks: Mapping[str, int] | None = None,
        rows: Values | None = None,
    ) -> Run:
        """Run it.

        Args:
            data: the arguments of the program.
            particles: K.
            given: values [K, *plates, *event] of some latent sites; the others are sampled.
            ranks: the number of dimensions of those values when the program runs alone.
            rows: indices of plates that are not to be sampled.
        """
        call = Call(data, particles, given or {}, ranks or {}, rows or {})
        proof = self.proof_for(call)
        if proof is None:
            if not torch.is_grad_enabled() and get_proxy_mode() is None and not _in_training(*self.programs):
                proof, run = self._find(call)
                self._proofs[self._key(call)] = proof
                return run
            with set_apart(*self.programs):
                proof, _ = self._find(call.detached())
            self._proofs[self._key(call)] = proof
        return self._by(proof, call)

    def proof_for(self, call: Call) -> Proof | None:
        """The proof for calls like this one; None if there is none yet."""
        return _ALONE if call.particles == 1 else self._proofs.get(self._key(call))

    def _key(self, call: Call) -> tuple[Any, ...]:
        """The conditions under which a proof is valid."""
        shapes = [(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in call.data]
        if self._parts is None:
            self._parts = _parts_of(*self.programs)
        return (call.particles, *shapes, *(part.training for part in self._parts))

    def read(self, proof: Proof, call: Call, read: Read) -> dict[str, Tensor]:
        """Tensors read off the trace of a run, [K, ...] each."""
        if proof.way == PLATE:
            return read(self.meet(call.data, call.fixed, call.particles))

        def one(values: Values) -> dict[str, Tensor]:
            return read(self.meet(call.data, {**call.rows, **values}))

        return _separately(proof.way, call, one, proof.buffers)

    def meet(self, data: tuple[Any, ...], values: Values, particles: int | None = None) -> Met:
        """Run the program once, alone or in a plate of particles, at given values and indices."""
        program = self.program if particles is None else in_plate(self.program, particles, self.nesting)
        return _met(program, data, values)

    def _by(self, proof: Proof, call: Call) -> Run:
        """Run the program by the proved method."""
        way = proof.way
        facts: dict[str, SiteFacts] = {}
        ranks: dict[str, int] = {}
        values: dict[str, Tensor] = {}  # of observed sites
        rows: dict[str, Tensor] = dict(call.rows)
        kept: list[Met] = []
        if way in (VMAP, LOOP) and not proof.subsampled <= set(rows):  # one subsample for all particles
            with forked_rng():
                rows |= self.meet(call.data, {**call.at(0), **rows}).rows
            call = call._replace(rows=rows)
        depth = self.nesting + (way == PLATE)

        def read(met: Met) -> dict[str, Tensor]:
            tensors = {}
            for name, site in met.sites.items():
                facts[name], ranks[name] = facts_of(site), site["value"].dim()
                tensors[f"density of {name}"] = padded(score(site), depth)
                if site["is_observed"]:
                    values[name] = site["value"]
                else:
                    tensors[f"value of {name}"] = site["value"]
            if way != VMAP:
                rows.update(met.rows)
            if way in (ALONE, PLATE):
                kept.append(met)
            return tensors

        tensors = self.read(proof, call, read)
        for name, fact in facts.items():
            if not fact.observed:
                drawn = tensors[f"value of {name}"]
                values[name] = drawn if way == PLATE else _spread(drawn, self.nesting + fact.event_dim)
        sites = {name: Scored(fact, values[name], tensors[f"density of {name}"]) for name, fact in facts.items()}
        return Run(sites, proof.ranks if way == PLATE else ranks, rows, kept[0].sites if kept else None)

    def _find(self, call: Call) -> tuple[Proof, Run]:
        """The first method with a proof, and a run by it."""
        tensors = tuple(x for x in call.data if isinstance(x, Tensor))
        with explained(tensors), _Reads() as reads, validation_enabled(False):
            first, moving = self._moving(call)
        frames = {frame for site in first.values() for frame in site["cond_indep_stack"] if frame.vectorized}
        ranks = {name: site["value"].dim() for name, site in first.items()}
        subsampled = frozenset(frame.name for frame in frames if frame.full_size not in (None, -1, frame.size))
        self._parts = _parts_of(*self.programs)  # a first run may create modules
        start = stream()
        for way, buffers in ((PLATE, False), (VMAP, False), (VMAP, True)):
            proof = Proof(way, buffers, ranks, subsampled)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with self._unmoved():
                        run = self._by(proof, call)
                    doubt = self._doubt(proof, call, run, moving)
                    if way == PLATE and not doubt and reads.any:
                        doubt = self._reads_draws(proof, call)
            except Exception as error:  # user code runs here in a form that it was not written for
                doubt = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            if not doubt:
                return proof, run
            self.reasons.setdefault(way, doubt)
            start()
        if not any(proof.way == LOOP for proof in self._proofs.values()):
            why = "; ".join(f"under {way}: {reason}" for way, reason in self.reasons.items())
            norms = any(part.training and _is_batch_norm(part) for part in self._parts or [])
            remedy = (
                "it uses batch normalisation in training mode, which couples particles: put it into evaluation mode "
                "(.eval()), use one particle, or another normalisation (torch.nn.LayerNorm)"
                if norms
                else "use tensor operations that neither read values (.item(), if, boolean indices) nor write into "
                "tensors created before, or count dimensions from the right (z[..., 0], softmax(-1)) so that a "
                "dimension for particles fits on the left"
            )
            warnings.warn(
                f"the {self.name} runs one particle after the other, which is slow, since no faster method reproduces "
                f"the numbers of single runs ({why}); {remedy}",
                stacklevel=outside(),
            )
        proof = Proof(LOOP, False, ranks, subsampled)
        return proof, self._by(proof, call)

    def _reads_draws(self, proof: Proof, call: Call) -> str:
        """Why values read off tensors may depend on the samples: three particles may take the same branch by chance.

        Under ``torch.vmap`` such a read is an error.
        """
        for buffers in (False, True):
            try:
                with forked_rng(), self._unmoved(), validation_enabled(False):
                    self._by(proof._replace(way=VMAP, buffers=buffers), call)
                return ""
            except Exception as error:  # user code
                doubt = f"it reads values, which all particles share ({(str(error).strip().splitlines() or [''])[0]})"
        return doubt

    def _unmoved(self) -> AbstractContextManager[None]:
        """Restore the buffers that a run in training mode changes, so that the next run starts from the same state."""
        parts = self._parts or []
        if not any(part.training for part in parts):
            return nullcontext()
        return tensors_kept(buffer for part in parts for buffer in part.buffers(recurse=False))

    def _moving(self, call: Call) -> tuple[dict[str, Site], dict[str, Tensor]]:
        """The sites of a single run, and which of their values differ between two such runs."""
        with forked_rng(), torch.no_grad(), self._unmoved():
            first, again = (self.meet(call.data, {**call.rows, **call.at(0)}).sites for _ in range(2))
        return first, _moving(first, again, self.nesting)

    def _doubt(self, proof: Proof, call: Call, run: Run, moving: dict[str, Tensor]) -> str:
        """Why a run does not reproduce single runs; empty if it does."""
        found = call._replace(rows=run.rows)
        shared = ""
        for name, moves in moving.items():
            site = run.sites[name]
            if site.facts.observed:
                first, last = site.log_prob[0], site.log_prob[-1]
            else:
                first, last = (_at(site.value, k, proof.ranks[name]) for k in (0, call.particles - 1))
            if bool((first == last)[moves].all()):
                shared = f"all particles share one sample at site '{name}'"
        with forked_rng(), torch.no_grad():
            try:
                doubt = self._differs(proof, found, run, replay=None)
            except (KeyError, NotImplementedError):
                doubt = "its log-density is known for its own samples only"
            if doubt:  # it may have randomness beside its sites, or know log q of its own samples only
                with _Recorder() as tape, self._unmoved():
                    run = self._by(proof, found)
                with under_vmap(buffers=proof.buffers) if proof.way == VMAP else nullcontext():
                    if not tape.draws or self._differs(proof, found, run, tape):
                        return doubt
                if tape.shared:
                    shared = shared or "randomness beside its sites is the same for all particles"
            noisy = [part for part in self._parts or [] if part.training and not _is_batch_norm(part)]
            if not (shared and noisy):
                return shared
            with modes_kept(noisy):  # the shared randomness may be dropout
                for part in noisy:
                    part.training = False
                return self._doubt(proof, call, self._by(proof, call), self._moving(call)[1])

    def _differs(self, proof: Proof, call: Call, run: Run, replay: _Recorder | None) -> str:
        """The site at which three particles differ from single runs, as a sentence."""
        K = call.particles
        for k in sorted({0, K // 2, K - 1}):
            given = {**call.rows, **call.at(k)}
            if replay is None:
                given |= {
                    name: _at(site.value, k, proof.ranks[name])
                    for name, site in run.sites.items()
                    if not (site.facts.observed or site.facts.point or name in given)
                }

            def single(values: Values, k: int = k) -> dict[str, Site]:  # the same noise each time
                with forked_rng(), self._unmoved(), nullcontext() if replay is None else replay.of(k, K):
                    return self.meet(call.data, values).sites

            alone = single(given)
            if list(alone) != list(run.sites):
                return f"its sites are {list(run.sites)}, but {list(alone)} in a single run"
            for name, site in alone.items():
                scored = run.sites[name]
                if not site["is_observed"] and not _near(_at(scored.value, k, site["value"].dim()), site["value"]):
                    return f"the value of site '{name}' differs from that of a single run"
                if {_place(f) for f in facts_of(site).frames} != {_place(f) for f in scored.facts.frames}:
                    return f"the plates around site '{name}' differ from those of a single run"
                density = scored.log_prob[min(k, len(scored.log_prob) - 1)]
                if not self._agree(density, site, single, given):
                    return f"the log-density of site '{name}' differs from that of a single run"
        return ""

    def _agree(self, density: Tensor, site: Site, single: Callable[[Values], dict[str, Site]], values: Values) -> bool:
        """Whether a log-density equals that of a single run, up to rounding."""
        alone = padded(score(site), self.nesting)
        if density.shape != alone.shape:
            return False
        known = alone.isfinite()
        if not torch.equal(*(t.nan_to_num(0.0, 1.0, -1.0)[~known | ~t.isfinite()] for t in (density, alone))):
            return False
        off = (density - alone).abs()
        size = padded(_size(site), self.nesting)
        allowed = _TOLERANCE[alone.dtype == torch.float64] * size
        if bool((off <= allowed)[known].all()):
            return True
        eps = torch.finfo(alone.dtype).eps
        moved = {n: v * (1 + _NUDGE * eps) if v.is_floating_point() else v for n, v in values.items()}
        with pyro.validation_enabled(False):
            again, other = (
                (padded(score(single(at)[site["name"]]), self.nesting) - alone).abs() for at in (values, moved)
            )
        if not bool((again <= allowed)[known].all()):  # noise, not rounding
            return False
        return bool((off <= allowed + (_NUDGE * other).clamp(max=_MOST * size))[known].all())


class LiftedPair(Lifted):
    """Model and guide as one program, with the states of enumerated sites summed out.

    Its sites are those of :class:`~jensen.kernel.enumeration.Summed`, named ``"p "``, ``"q "`` or ``"elbo "`` plus
    their names; ``"elbo "`` sites exist where the guide leaves states to be summed.
    """

    def __init__(self, model: Program, guide: Program, nesting: int) -> None:
        super().__init__(model, nesting, "model with its guide")
        self.programs = model, guide

    def meet(self, data: tuple[Any, ...], values: Values, particles: int | None = None) -> Met:
        """Run both once, alone or in a plate of particles, at given values and indices."""
        p, q = self._at_all_states(data, values, particles)
        summed = Summed(list(p.sites.values()), list(q.sites.values()))
        kinds = {"p": summed.p, "q": summed.q, "elbo": []}
        if any(map(is_enumerated, q.sites.values())):
            kinds["elbo"] = summed.elbo()
        sites = {}
        for kind, part in kinds.items():
            for i, site in enumerate(part):
                name = f"{kind} {i}" if kind == "elbo" else f"{kind} {site['name']}"
                sites[name] = {**site, "name": name}
        return Met(sites, {**q.rows, **p.rows})

    def check(self, data: tuple[Any, ...]) -> None:
        """Raise ValueError if the model or guide at all states at once differs from its runs at single states."""
        p, q = self._at_all_states(data, {}, None)
        for half, met in zip(self.programs, (p, q), strict=True):

            def plain(values: Values, half: Program = half, met: Met = met) -> list[Site]:
                return list(_met(half, data, {**q.rows, **met.rows, **values}).sites.values())

            check_states(list(met.sites.values()), plain)

    def _at_all_states(self, data: tuple[Any, ...], values: Values, particles: int | None) -> tuple[Met, Met]:
        """Runs of the model and of the guide whose enumerated sites take all their states."""
        model, guide = self.programs
        if particles is not None:
            model, guide = (in_plate(half, particles, self.nesting) for half in self.programs)
        q = _met(enumerated(guide, self.nesting), data, values)
        infer = {name: site["infer"] for name, site in q.sites.items()}
        seen = {**values, **q.rows, **{name: site["value"] for name, site in q.sites.items()}}
        return _met(enumerated(model, self.nesting, infer), data, seen), q


class Half(NamedTuple):
    """A run of the model or of the guide, from which tensors are read at the same values."""

    lifted: Lifted
    call: Call
    run: Run
    proof: Proof

    @property
    def extra(self) -> int:
        """The number of dimensions that its traces have for the particles."""
        return int(self.way == PLATE)

    @property
    def way(self) -> Way:
        """The method of the run."""
        return self.proof.way

    def read(self, make: Callable[[Mapping[str, Site]], Tensor]) -> Tensor:
        """A tensor made of its sites: [K, ...]."""
        if self.run.met is not None:
            made = make(self.run.met)
            return made if self.extra else made.unsqueeze(0)
        return self.lifted.read(self.proof, self.call, lambda met: {"": make(met.sites)})[""]


def read_both(model: Half, guide: Half, make: Callable[[Mapping[str, Site], Mapping[str, Site]], Tensor]) -> Tensor:
    """A tensor computed from the sites of model and guide at the same values: [K, ...]."""
    if model.run.met is not None and guide.run.met is not None and model.way == guide.way:
        made = make(model.run.met, guide.run.met)
        return made if model.extra else made.unsqueeze(0)
    way = VMAP if model.way == guide.way == VMAP else LOOP

    def one(values: Values) -> dict[str, Tensor]:
        at = {**model.call.rows, **values}
        p, q = (half.lifted.meet(half.call.data, at).sites for half in (model, guide))
        return {"": make(p, q)}

    return _separately(way, model.call, one, model.proof.buffers or guide.proof.buffers)[""]


def _separately(
    way: Way, call: Call, one: Callable[[Values], dict[str, Tensor]], buffers: bool = False
) -> dict[str, Tensor]:
    """The results of single runs at each particle's values, stacked: [K, ...]."""
    native = {name: _native(value, call.ranks[name]) for name, value in call.given.items()}
    if way == ALONE:
        return {key: t.unsqueeze(0) for key, t in one({name: v[0] for name, v in native.items()}).items()}
    if way == LOOP:
        each = [one({name: v[k] for name, v in native.items()}) for k in range(call.particles)]
        return {key: torch.stack([tensors[key] for tensors in each]) for key in each[0]}
    with under_vmap(buffers=buffers):
        mapped = torch.vmap(lambda _, values: one(values), randomness="different")
        tensors: dict[str, Tensor] = mapped(torch.arange(call.particles), native)
    return tensors


def _met(program: Program, data: tuple[Any, ...], values: Values) -> Met:
    with At(values):
        trace = poutine.trace(program).get_trace(*data)
    nodes: Any = trace.nodes.items()
    rows = {name: site["value"] for name, site in nodes if site["type"] == "sample" and site_is_subsample(site)}
    return Met({site["name"]: site for site in sites_of(trace)}, rows)


def _place(frame: Any) -> tuple[str, int | None, int]:
    return frame.name, frame.dim, frame.size


def _native(value: Tensor, rank: int) -> Tensor:
    """Values [K, *plates, *event] as single runs have them, one by one."""
    return value.reshape(len(value), *value.shape[value.dim() - rank :])


def _at(value: Tensor, k: int, rank: int) -> Tensor:
    """One of the values [K, *plates, *event], as in a single run."""
    return _native(value, rank)[k]


def _spread(value: Tensor, rank: int) -> Tensor:
    """Values [K, ...] of single runs, with a dimension for each plate: [K, *plates, *event]."""
    return value.reshape(len(value), *(1,) * (rank + 1 - value.dim()), *value.shape[1:])


def _moving(first: Mapping[str, Site], again: Mapping[str, Site], nesting: int) -> dict[str, Tensor]:
    """By site, which values differ between two runs (for observed sites: which log-densities).

    Sites with few states are omitted.
    """
    moving = {}
    for name in first.keys() & again.keys():
        site, other = first[name], again[name]
        observed = site["is_observed"]
        a, b = (padded(score(s), nesting) if observed else s["value"] for s in (site, other))
        if a.shape == b.shape:
            moves = a != b
            if bool(moves.any()) and (observed or not facts_of(site).discrete or int(moves.sum()) > 20):
                moving[name] = moves
    return moving


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two values are equal up to rounding."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 100 * _TOLERANCE[a.dtype == torch.float64]
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _size(site: Site) -> Tensor:
    """One and the absolute log-density of each element of a site's value, summed to its batch shape."""
    fn, value = site["fn"], site["value"]
    whole = score(site)
    if fn.event_dim:
        with pyro.validation_enabled(False):
            try:
                terms: Tensor = 1 + base_of(fn).log_prob(value).abs()
                inner = terms.dim() - len(fn.batch_shape)
                terms = terms.nan_to_num(0.0, 0.0, 0.0).flatten(-inner).sum(-1) if inner > 0 else terms
            except (KeyError, NotImplementedError, RuntimeError, ValueError):
                terms = (1 + whole.abs()) * max(1, fn.event_shape.numel())
            return torch.maximum(1 + whole.abs(), terms)
    return 1 + whole.abs()


def _parts_of(*programs: Program) -> list[nn.Module]:
    """The modules that programs hold, and all their parts, each once."""
    return list({id(part): part for owner in owners_of(*programs) for part in owner.modules()}.values())


def _in_training(*programs: Program) -> bool:
    return any(part.training for part in _parts_of(*programs))


def _is_batch_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)


@contextmanager
def set_apart(*programs: Program) -> Iterator[None]:
    """No gradient, no tracer, a private random stream; buffers are restored."""
    buffers = [buffer for module in owners_of(*programs) for buffer in module.buffers()]
    with disable_proxy_modes_tracing(), torch.no_grad(), forked_rng(), tensors_kept(buffers):
        yield


@contextmanager
def for_proof(*programs: Program) -> Iterator[None]:
    """As :func:`set_apart`, in evaluation mode, except batch norms in training mode."""
    parts = _parts_of(*programs)
    with set_apart(*programs), modes_kept(parts):
        for part in parts:
            part.training &= _is_batch_norm(part)
        yield


def _reader(frame: FrameType | None) -> str:
    """The library whose code reads a value, in this frame or its callers."""
    while frame is not None and frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):
        frame = frame.f_back
    name: str = "" if frame is None else frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


class _Reads(TorchFunctionMode):
    """Records whether a program reads values off tensors: ``if z.sum() > 0``, ``z.max().item()``.

    Rejection loops inside PyTorch and Pyro end correctly for all particles.

    Attributes:
        any: whether it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.any and getattr(function, "__name__", "") in _READING:
            self.any = _reader(sys._getframe(1)) not in ("jensen", "pyro", "torch")
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Records random samples, to give a single run the samples of one particle."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Tensor] = []
        self.shared = False  # whether single runs repeated samples that all particles share
        self._source: tuple[_Recorder, int, int] | None = None
        self._next = 0

    def of(self, k: int, particles: int) -> _Recorder:
        """A recorder that replays the samples of particle k."""
        again = _Recorder()
        again._source = self, k, particles
        return again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            for drawn in out if isinstance(out, tuple) else (out,):
                if isinstance(drawn, Tensor):
                    self._take(drawn)
        return out

    def _take(self, drawn: Tensor) -> None:
        """Record a sample, or replace it by the recorded one."""
        if self._source is None:
            self.draws.append(drawn.clone())
            return
        source, k, particles = self._source
        recorded = source.draws[self._next]
        self._next += 1
        if recorded.numel() == particles * drawn.numel() and len(recorded) == particles:
            recorded = recorded[k].reshape(drawn.shape)
        elif not torch.equal(recorded := recorded.reshape(drawn.shape), drawn):
            source.shared = True  # samples of a seeded stream are equal
        drawn.copy_(recorded)
