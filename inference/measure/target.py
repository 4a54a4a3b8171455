"""Log p(x, z) of blocks of data in unconstrained coordinates: values, gradients, curvatures, by graphs if they pay."""

from __future__ import annotations

__all__ = ["STATES", "Block", "Target"]

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from jensen.graphs.capture import Outputs
from jensen.graphs.compile import Compile
from jensen.graphs.routes import Function, Routes, weights_of
from jensen.kernel.arguments import rows_of
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.lifts import LOOP, Lifted
from jensen.kernel.newton import slopes
from jensen.kernel.parameters import tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.randomness import forked_rng
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Program, densities, terms_at

from .hmc import Point

_LEAST = 100  # calls that pay for a graph
_AT_ONCE, _PAIRS = 128, 2**15  # maximal number of points of a data point, and of all data points of a block
STATES = 64  # of the discrete sites of a data point
_ROWS_AT_ONCE = 64  # of a Hessian
_LADDER = (1, 4, 16)  # divisors that give the sizes of blocks


class Block(NamedTuple):
    """Some data points, possibly repeated, then the first of them again up to one of a few sizes.

    Attributes:
        data: the tensors.
        rows: the indices of these data points, including the padding: [size].
        real: how many are not padding.
    """

    data: tuple[Tensor, ...]
    rows: Tensor
    real: int


class _Sized(NamedTuple):
    """Results that are valid for data with one number of rows."""

    data: tuple[Tensor, ...]
    coordinates: Coordinates
    log_p: Callable[..., dict[str, Tensor]]
    log_q: Callable[..., dict[str, Tensor]] | None


class Target:
    """Log p(x, u) of blocks of data at coordinates [C, N, F], and samples from which proposals start.

    Args:
        model: the model.
        guide: its guide.
        data: the first block.
        nesting: how deep the plates of model and guide are nested.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.evaluate`.
        blocks: the number of future blocks of that size.
        joint: whether weights are joint: all data then count as one data point.
        given: samples of the guide, [C, N, F], if its density is not used.

    Attributes:
        features: F.
        states: the number of joint states of discrete sites that an evaluation sums over.
        at_once: the number of points of a block processed at once.
        knows_guide: whether the guide can compute log q of any value, for many at once.
        draws_prior: whether many samples of the prior are generated at once.
        spent: the number of evaluations for each data point of the block, including states; a gradient counts three.

    Raises:
        ValueError: the errors of :class:`~jensen.kernel.coordinates.Coordinates`, and for a model without continuous
            latent sites, or one that runs one particle after the other.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: tuple[Tensor, ...],
        nesting: int,
        mode: Compile = False,
        blocks: int = 1,
        joint: bool = False,
        given: Tensor | None = None,
    ) -> None:
        self._programs, self.blocks, self.joint = (model, guide), blocks, joint
        self._model, self._prior = Lifted(model, nesting), Lifted(model, nesting)  # at given values, and sampled
        self._guide = Lifted(guide, nesting, "guide")
        self._state = PlainState(model, guide)
        self._operations = 2 * weights_of(model)
        self._sizes: dict[int, _Sized] = {}
        self._routes = {
            name: Routes(mode, _LEAST, f"the {name} of refined evidence are not compiled; their steps run")
            for name in ("densities", "slopes", "curvatures", "local steps", "chains")
        }
        self.knows_guide = given is None
        self.move_to(data, given)
        sized = self._sized(data)
        self.features, self.states = sized.coordinates.features, sized.coordinates.combinations
        self._fixed = sized.coordinates.fixed
        self.knows_guide = sized.log_q is not None
        if not self.features:
            raise ValueError("the model has no continuous latent site: exact_log_evidence sums over its states")
        with torch.no_grad(), forked_rng():
            (block, *_) = self.blocks_of(self.rows[:1])
            self.parts(block, self.of_prior(2, block))
        if self._model.way == LOOP:
            raise ValueError("the model runs one particle after the other, which is too slow here")
        self.knows_guide &= self._guide.way != LOOP
        self.draws_prior = self._prior.way != LOOP
        self.move_to(data, given)

    def move_to(self, data: tuple[Tensor, ...], given: Tensor | None = None) -> None:
        """Switch to another block, with the guide's samples there if it is not run."""
        n, places = rows_of(data), [*data, *tensors_of(*self._programs), torch.zeros(())]
        self.data, self._given = data, given
        self.size = 1 if self.joint else n if not self._sizes else max(self._sizes)
        self.spent = torch.zeros(1 if self.joint else n, dtype=torch.long, device=places[0].device)
        self.at_once = max(1, min(_AT_ONCE, _PAIRS // max(1, n)))

    def __len__(self) -> int:
        return len(self.spent)

    @property
    def rows(self) -> Tensor:
        """All data of the block."""
        return torch.arange(len(self), device=self.spent.device)

    def blocks_of(self, rows: Tensor) -> list[Block]:
        """These data points in blocks of a few sizes, so that few graphs are needed."""
        if self.joint:
            return [Block(self.data, row, 1) for row in rows[:, None]]
        sizes = sorted({-(-self.size // part) for part in _LADDER}, reverse=True)
        made, left = [], rows
        while len(left):
            size = next((size for size in sizes if size <= len(left)), None) or next(
                size for size in reversed(sizes) if size >= len(left)
            )
            if size < self.size and (larger := [s for s in sizes if s > size and s < 2 * len(left)]):
                size = larger[-1]  # one block padded to less than twice its size is better than several
            some, left = left[:size], left[size:]
            real = len(some)
            some = torch.cat([some, some[:1].expand(size - real)])
            if real == size == len(self) and torch.equal(some, self.rows):
                made.append(Block(self.data, some, real))
            else:
                made.append(Block(tuple(x[some.to(x.device)] for x in self.data), some, real))
        return made

    def count(self, block: Block, evaluations: int) -> None:
        """Count so many evaluations for each data point of a block."""
        rows = block.rows[: block.real]
        self.spent.index_add_(0, rows, torch.full_like(rows, evaluations))

    @torch.no_grad()
    def parts(self, block: Block, u: Tensor, calls: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log p(x, u), log p(u), and log q(u | x) if the guide can compute it: [C, N] each."""
        self.count(block, len(u))
        run = self._run("densities", partial(self._parts, block), (u, *block.data), 1.0 * len(u), calls)
        joint, prior, *rest = run(u, *block.data)
        return joint, prior, rest[0] if rest else None

    def slopes(self, block: Block, u: Tensor, calls: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function that returns log p(x, u), [C, N], and its gradient, [C, N, F], at points like these."""
        run = self._run("slopes", partial(self._slopes, block), (u, *block.data), 3.0 * len(u), calls)

        def at(u: Tensor) -> tuple[Tensor, Tensor]:
            self.count(block, 3 * len(u))
            f, slope = run(u, *block.data)
            return f, slope

        return at

    def curvature(self, block: Block, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density [N], gradient [N, F] and negative Hessian [N, F, F] at points [N, F]; three evaluations a row."""
        features = self.features
        eye = torch.eye(features, dtype=u.dtype, device=u.device)
        rows = []
        at_once = min(self.at_once, _ROWS_AT_ONCE)
        at_once = -(-features // -(-features // at_once))
        for directions in eye.split(at_once):
            filled = torch.cat([directions, directions[:1].expand(at_once - len(directions), -1)])
            inputs = (u, filled, *block.data)
            calls = self.blocks * 6 * -(-features // at_once)
            run = self._run("curvatures", partial(self._curvature, block), inputs, 6.0 * at_once, calls)
            f, slope, part = run(*inputs)
            rows.append(part[: len(directions)])
        self.count(block, 3 * features)
        hessian = -torch.cat(rows).transpose(0, 1).nan_to_num(0.0, 0.0, 0.0)  # [N, F, F]
        return f, slope.nan_to_num(0.0, 0.0, 0.0), (hessian + hessian.mT) / 2

    def landing(self, block: Block, draws: int, inputs: tuple[Tensor, ...], calls: int) -> Function:
        """A function of Gaussians and noise: see :meth:`_landing`."""
        run = self._run("local steps", partial(self._landing, block), (*inputs, *block.data), 3.0 * draws, calls)

        def step(*inputs: Tensor) -> Outputs:
            self.count(block, 3 * draws)
            return run(*inputs, *block.data)

        return step

    def path(self, block: Block, calls: int) -> Callable[[Tensor], Point]:
        """The path from prior to posterior, at coordinates [C, N, F]; one evaluation and two gradients a point."""

        def at(u: Tensor) -> Point:
            self.count(block, 4 * len(u))
            run = self._run("chains", partial(self._on_path, block), (u, *block.data), 4.0 * len(u), calls)
            return Point(u, *run(u, *block.data))

        return at

    @torch.no_grad()
    def terms(self, block: Block, u: Tensor) -> Terms:
        """The terms of the model at coordinates [C, N, F], for a target without discrete sites."""
        with validation_enabled(False):
            values, _ = self._sized(block.data).coordinates.values(u)
            return terms_at(self._programs[0], values, *block.data, lifted=self._model)

    def of_guide(self, count: int, block: Block | None = None) -> Tensor:
        """Samples of the guide, [C, N, F]."""
        if self._given is not None:
            return self._given[:count] if block is None else self._given[:count, block.rows]
        return self._drawn(self._guide, count, block)

    def of_prior(self, count: int, block: Block | None = None) -> Tensor:
        """Samples of the prior, [C, N, F]."""
        return self._drawn(self._prior, count, block)

    def free(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the block's data, [C, N, *event] by site, as coordinates [C, N, F]."""
        return self._sized(self.data).coordinates.free(values)

    @torch.no_grad()
    def _drawn(self, lifted: Lifted, count: int, block: Block | None) -> Tensor:
        data = self.data if block is None else block.data
        return self._sized(data).coordinates.free(_values(lifted, data, count))

    def _run(self, name: str, fn: Function, inputs: tuple[Tensor, ...], cost: float, calls: float) -> Function:
        """The function to call instead of ``fn``; ``cost``: its evaluations for each data point."""
        n = rows_of(inputs[len(inputs) - len(self.data) :])
        obstacle = "" if self._fixed else "supports of latent sites depend on the data"
        return self._routes[name](
            fn,
            tensors_of(*self._programs),
            inputs,
            self._operations * cost * n,
            ahead=calls,
            state=self._state,
            obstacle=obstacle,
        )

    def _sized(self, data: tuple[Tensor, ...]) -> _Sized:
        """Results for data like these; only for these data if supports depend on them."""
        n = rows_of(data)
        known = self._sizes.get(n)
        if known is None or not (known.coordinates.fixed or known.data is data):
            model, _ = self._programs
            coordinates = Coordinates(model, *data, joint=self.joint, most=STATES)
            log_p = densities(model, *data, lifted=self._model)
            known = _Sized(data, coordinates, log_p, self._log_q(coordinates, data))
            self._sizes[n] = known
        return known

    def _log_q(self, coordinates: Coordinates, data: tuple[Tensor, ...]) -> Callable[..., dict[str, Tensor]] | None:
        """The guide's density of any value, if it can compute it."""
        if not self.knows_guide:
            return None
        with forked_rng(), torch.no_grad():
            drawn = _values(self._guide, data, 2)
            if set(drawn) != {*coordinates.pieces, *coordinates.states}:
                return None
            log_q = densities(self._programs[1], *data, lifted=self._guide)
            try:
                log_q({name: value.clone() for name, value in drawn.items()})
            except (KeyError, NotImplementedError):
                return None
        return log_q

    def _parts(self, block: Block, u: Tensor, *data: Tensor) -> Outputs:
        sized = self._sized(block.data)
        with validation_enabled(False):
            values, log_det = sized.coordinates.values(u)
            whole = sized.coordinates.with_states(values)
            log_p = sized.log_p(whole, *data)
            prior = self._summed([log_p[name] for name in whole], len(u)) + log_det
            joint = self._summed(log_p.values(), len(u)) + log_det
            if sized.log_q is None or not self.knows_guide:
                return joint, prior
            return joint, prior, self._summed(sized.log_q(whole, *data).values(), len(u)) + log_det

    def _joint(self, block: Block, u: Tensor, *data: Tensor) -> Tensor:
        sized = self._sized(block.data)
        with validation_enabled(False):
            values, log_det = sized.coordinates.values(u)
            return self._summed(sized.log_p(sized.coordinates.with_states(values), *data).values(), len(u)) + log_det

    def _summed(self, parts: Iterable[Tensor], points: int) -> Tensor:
        """The log of the sum over all joint states of densities that are products of parts: [C, N]."""
        total = torch.as_tensor(sum(parts))
        total = total.reshape(len(total), -1).sum(-1, keepdim=True) if self.joint else total
        return total if len(total) == points else total.unflatten(0, (-1, points)).logsumexp(0)

    def _slopes(self, block: Block, u: Tensor, *data: Tensor) -> Outputs:
        return slopes(partial(self._joint, block), u, *data)

    @torch.enable_grad()
    def _on_path(self, block: Block, u: Tensor, *data: Tensor) -> Outputs:
        """Log p(u) and log p(x | u), [C, N], and their gradients, [C, N, F]."""
        u = u.detach().requires_grad_()
        joint, prior, *_ = self._parts(block, u, *data)
        parts = prior, joint - prior
        slopes = []
        for part in parts:
            known = torch.where(part.isfinite(), part, 0.0).sum()
            slope = torch.autograd.grad(known, u, retain_graph=True)[0] if known.requires_grad else torch.zeros_like(u)
            slopes.append(slope.nan_to_num(0.0, 0.0, 0.0))
        return *(part.detach() for part in parts), *slopes

    @torch.enable_grad()
    def _curvature(self, block: Block, u: Tensor, directions: Tensor, *data: Tensor) -> Outputs:
        """Log density [N], gradient [N, F], and the Hessian's products with directions [R, F]: [R, N, F]."""
        at = u.detach().expand(len(directions), *u.shape).clone().requires_grad_()
        f = self._joint(block, at, *data)
        (slope,) = torch.autograd.grad(f.sum(), at, create_graph=True)
        along = (slope * directions.unsqueeze(1)).sum()
        rows = torch.autograd.grad(along, at)[0] if along.requires_grad else torch.zeros_like(at)
        return f[0].detach(), slope[0].detach(), rows

    @torch.enable_grad()
    def _landing(
        self,
        block: Block,
        loc: Tensor,
        below: Tensor,
        log_scale: Tensor,
        start: Tensor,
        whitening: Tensor,
        noise: Tensor,
        *data: Tensor,
    ) -> Outputs:
        """The mean log weight [P] of Gaussians, and the gradients of minus its sum, with sticking the landing.

        Args:
            block: the data of each of them.
            loc: locations [P, F], relative to ``start``, in units of ``whitening``.
            below: the Cholesky factors below the diagonal [P, F, F], in these units.
            log_scale: the log of the diagonal, [P, F].
            start: the initial locations, [P, F].
            whitening: a Cholesky factor, [P, F, F].
            noise: [C, P, F].
            data: the block's tensors.
        """
        free = [t.detach().requires_grad_() for t in (loc, below, log_scale)]
        loc, below, log_scale = free
        inner = torch.tril(below, -1) + torch.diag_embed(log_scale.exp())  # [P, F, F]
        y = loc + torch.einsum("pij,cpj->cpi", inner, noise)
        log_p = self._joint(block, start + torch.einsum("pij,cpj->cpi", whitening, y), *data)
        away = (y - loc.detach()).permute(1, 2, 0)  # [P, F, C]
        white = torch.linalg.solve_triangular(inner.detach(), away, upper=False)
        log_q = -0.5 * white.square().sum(1).T - log_scale.detach().sum(-1)
        total = log_p - log_q
        slopes = torch.autograd.grad(-torch.where(total.isfinite(), total, 0.0).mean(0).sum(), free)
        return total.detach().mean(0), *(slope.nan_to_num(0.0, 0.0, 0.0) for slope in slopes)


def _values(lifted: Lifted, data: tuple[Tensor, ...], count: int) -> dict[str, Tensor]:
    return {name: site.value for name, site in lifted(data, count).sites.items() if not site.facts.observed}
