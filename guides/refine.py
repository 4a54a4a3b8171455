r"""Guides that optimise per data point: some SVI steps from the encoder's output, or the Laplace approximation.

They run the model inside the guide but outside the surrounding Pyro handlers, so the search adds no sites to the trace.
"""

from __future__ import annotations

__all__ = ["Laplace", "SemiAmortized"]

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import pyro
import torch
from pyro.poutine import runtime
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from jensen.checked import checked
from jensen.families import FullCovariance
from jensen.families.base import inverse_root
from jensen.families.gaussian import RememberingNormal
from jensen.graphs.capture import CannotCapture
from jensen.graphs.compile import Compile, check_compile
from jensen.graphs.routes import Routes, weights_of
from jensen.kernel.caller import outside
from jensen.kernel.newton import block_rows, climb, derivatives, find_modes, raised, slopes
from jensen.kernel.parameters import owners_of, tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Pair, check_pair, log_joint
from jensen.missing import same_values
from jensen.module import UniqueModule

from .amortized import Joint, coordinates, draw_jointly, supports_of
from .local import Constant, PerDatum
from .members import site_transform

_LEAST = 200  # steps that are worth building a graph
_UNROLLED = 20  # the most steps that are unrolled into another graph
_UPHILL = 20  # gradient steps before Newton's
_USUAL = 10  # expected number of Newton steps,
_HESSIANS = 4  # and of Hessians


class _HasLatents(Protocol):
    latents: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class _Refinable(Protocol):
    encoder: nn.Module

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def sizes(self) -> dict[str, int]: ...
    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Any: ...


class SemiAmortized(UniqueModule):
    r"""An amortized guide with refinement: the parameters of each data point take some gradient steps on its ELBO.

    .. math:: \lambda_n^{(0)} = \lambda(\text{encoder}(x_n)), \qquad
              \lambda_n^{(t+1)} = \lambda_n^{(t)} + \text{Adam}(\nabla_\lambda \text{ELBO}_n(\lambda_n^{(t)}))

    The steps use the same noise at every call on the same data, so q is a fixed distribution. In training the offsets
    found count as constants: model and encoder follow the ELBO at the refined parameters, to first order. (Kim et al.
    differentiate through the steps, at several times the runtime.)

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-Amortized Variational Autoencoders.
        https://arxiv.org/abs/1802.02550

    Args:
        guide: an :class:`~jensen.guides.Amortized` or :class:`~jensen.guides.Joint` guide.
        model: the model, which must broadcast over a leading dimension of particles.
        steps: the number of steps.
        lr: the size of a step, in units of the family's parameters.
        particles: samples per data point and step.
        compile: how steps are run. ``"auto"``: from a traced graph after enough steps; ``True``: compiled where
            possible; ``False``: eagerly. The numbers agree up to rounding.

    Raises:
        ValueError: if ``steps`` or ``particles`` is less than 1.

    Example:
        >>> import torch
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = SemiAmortized(amortize(model, mlp(5, [16]), MeanField, context=16), model, steps=5)
        >>> guide(torch.zeros(3, 5))["z"].shape
        torch.Size([3, 2])
    """

    @checked
    def __init__(
        self,
        guide: _Refinable,
        model: Callable[..., Any],
        steps: int,
        lr: float = 0.05,
        particles: int = 4,
        compile: Compile = "auto",
    ) -> None:
        if steps < 1 or particles < 1:
            raise ValueError(f"SemiAmortized needs steps and particles of at least 1, but got {steps} and {particles}")
        super().__init__()
        self.guide = guide
        self.steps, self.lr, self.particles = steps, lr, particles
        self._model = (model,)  # in a tuple: not registered, so saved and optimised once, with the model
        self._memory = _Memory(compile, type(self).__name__)

    @property
    def route(self) -> str:
        """How the steps of the search are run: from a compiled graph, a traced graph, or eagerly, with the reason."""
        return self._memory.routes.sentence

    def forward(self, *data: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: refines the parameters, then samples every site."""
        context = self.guide.encoder(*data)
        return self.guide.draw(context, self._offsets(context, data))

    def local(self, *data: Tensor) -> Any:
        """The guide's families with free parameters for each of these data points, starting at the refined ones."""
        with torch.no_grad():
            context = self.guide.encoder(*data)
        return self.guide.local(*data, offsets=self._offsets(context, data))

    def _offsets(self, context: Tensor, data: tuple[Tensor, ...]) -> Any:
        long = f"{self.steps} steps are too many for a graph around them: the limit is {_UNROLLED}"
        obstacle = long if self.steps > _UNROLLED else ""
        return self._memory(self._refine, [self.guide, *self._model], (context, *data), obstacle)

    def _refine(self, context: Tensor, *data: Tensor) -> dict[str, Tensor]:
        """The offsets for the parameters of each site's family: [N, P] by site."""
        sizes = self.guide.sizes()
        offsets = [context.new_zeros(len(context), size) for size in sizes.values()]
        moments = [(torch.zeros_like(offset), torch.zeros_like(offset)) for offset in offsets]
        now: dict[str, Any] = {"context": context, "offsets": offsets}
        with disable_proxy_modes_tracing():  # a check needs values
            layout = check_pair(*self._model, self._at(now), *data)
        pair = Pair(
            *self._model, self._at(now), layout
        )  # one for all steps, so that its particle vectorization is checked once
        uphill = partial(self._slopes, pair, now)
        operations = 6 * weights_of(*self._model) * self.particles * len(context)
        programs, inputs = [self.guide, *self._model], (context, *offsets, *data)
        run = self._memory.route(uphill, programs, inputs, operations, self.steps)
        for t in range(1, self.steps + 1):
            for i, slope in enumerate(run(context, *offsets, *data)):
                offsets[i], moments[i] = _adam(offsets[i], slope, moments[i], t, self.lr)
        return dict(zip(sizes, offsets, strict=True))

    def _slopes(self, pair: Pair, now: dict[str, Any], context: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The gradients of minus the ELBO in the offsets (the arguments between context and data): [N, P] each."""
        sites = len(self.guide.sizes())
        offsets = [offset.detach().requires_grad_() for offset in rest[:sites]]
        now.update(context=context, offsets=offsets)
        t = pair.terms(rest[sites:], self.particles)
        if stuck := [site for site, q in t.q.items() if not q.has_rsample]:
            raise ValueError(f"samples of {stuck} have no gradient: use a family with rsample")
        slopes = torch.autograd.grad(-t.log_weights.mean(0).sum(), offsets)
        return tuple(slope.nan_to_num(0.0, 0.0, 0.0) for slope in slopes)

    def _at(self, now: Mapping[str, Any]) -> Callable[..., None]:
        """The guide at the current context and offsets."""

        def guide(*_: Tensor) -> None:
            self.guide.draw(now["context"], dict(zip(self.guide.sizes(), now["offsets"], strict=True)))

        return guide


def _adam(
    value: Tensor, slope: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One descent step of Adam with its usual constants, and the updated moments."""
    first = moments[0].lerp(slope, 0.1)
    second = (0.999 * moments[1]).addcmul(slope, slope, value=0.001)
    size = second.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
    return value.addcdiv(first, size, value=-lr / (1 - 0.9**step)), (first, second)


class Laplace(UniqueModule):
    r"""The Laplace approximation of each data point's posterior: a Gaussian at the mode, with the curvature there.

    .. math:: q(u \mid x) = \mathcal{N}(u; \hat u, H^{-1}), \qquad \hat u = \arg\max_u \log p(x, t(u)) |\det t'(u)|,
              \qquad H = -\nabla_u^2 \log p(x, t(u)) |\det t'(u)| \text{ at } \hat u

    over the unconstrained coordinates u of all continuous sites. The search takes gradient steps (for many
    coordinates), then Newton steps with one damping per data point and several steps per Hessian; converged data points
    are no longer updated. The guide has no parameters, and is exact for linear-Gaussian models.

    References:
        Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities.
        https://www.jstor.org/stable/2287970
        Nocedal and Wright (2006), Numerical Optimization, second edition, sections 3.4 and 6.1.

    Args:
        model: a model with ``latents`` that broadcasts over a leading dimension of particles.
        constraints: the support of each latent site with constrained values, by site.
        iterations: the maximal number of Hessians per data point.
        tolerance: a data point has converged when the predicted gain of a Newton step is fewer nats than this.
        compile: how derivatives are computed. ``"auto"``: from a traced graph after enough of them; ``True``: compiled
            where possible; ``False``: eagerly. The numbers agree up to rounding.
        start: the start of the search: a function from the data to values [N, *event] by site, such as an amortized
            guide. None: near zero, in unconstrained coordinates.

    Raises:
        ValueError: if ``start`` returns other sites or shapes, or values outside a support.

    Warns:
        UserWarning: for data points where the search did not converge, or ended at a point that is not a maximum.

    Example:
        >>> import torch
        >>> from jensen.inference import log_weights
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(3, 5).double()
        >>> log_w = log_weights(model, Laplace(model), x, particles=4)
        >>> torch.allclose(log_w, model.log_evidence(x).expand(4, 3))
        True
    """

    @checked
    def __init__(
        self,
        model: _HasLatents,
        constraints: Mapping[str, Constraint] | None = None,
        iterations: int = 100,
        tolerance: float = 1e-6,
        compile: Compile = "auto",
        start: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.sites = {site: Size(shape) for site, shape in model.latents.items()}
        self.constraints = supports_of(self.sites, constraints)
        self.iterations, self.tolerance = iterations, tolerance
        self._model = (model,)  # in a tuple: not registered, so saved and optimised once, with the model
        self._start = () if start is None else (start,)
        self._memory = _Memory(compile, type(self).__name__)

    @property
    def _programs(self) -> list[Any]:
        return [*self._model, *self._start]

    @property
    def route(self) -> str:
        """How derivatives are computed: from a compiled graph, a traced graph, or eagerly, with the reason."""
        return self._memory.routes.sentence

    def forward(self, *data: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: finds the modes, then samples every site."""
        loc, scale_tril = self._answer(data)
        return draw_jointly(RememberingNormal(loc, scale_tril=scale_tril), len(loc), self.sites, self.constraints)

    def local(self, *data: Tensor) -> Joint:
        """A free full-covariance Gaussian for each of these data points, starting at mode and curvature."""
        loc, scale_tril = self._answer(data)
        family = FullCovariance(loc.shape[-1], None)
        parameters = family.parameters_of(loc, scale_tril)
        own = PerDatum(family, parameters, first=True)
        return Joint(Constant(parameters, data), own, self.sites, self.constraints)

    def _answer(self, data: tuple[Tensor, ...]) -> Any:
        return self._memory(self._search, self._programs, data, "Laplace searches until every data point has converged")

    def _log_density(self, u: Tensor, *data: Tensor) -> Tensor:
        """Log-density of unconstrained coordinates [C, N, D] and each data point: [C, N]."""
        (model,) = self._model
        values, log_det = {}, torch.zeros((), device=u.device)
        pieces = u.split(list(coordinates(self.sites, self.constraints).values()), dim=-1)
        for (site, shape), piece in zip(self.sites.items(), pieces, strict=True):
            transform = site_transform(shape, self.constraints[site])
            z = values[site] = transform(piece)
            log_det = log_det + transform.log_abs_det_jacobian(piece, z)
        with pyro.validation_enabled(False):  # a step may go too far, where the density is NaN
            return log_joint(model, values, *data) + log_det

    def _slopes(self, u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        return slopes(self._log_density, u, *data)

    def _derivatives(self, u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return derivatives(self._log_density, u, *data)

    def _search(self, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Mode [N, D] and Cholesky factor [N, D, D] of the inverse curvature, for each data point."""
        u = self._first(data)
        n, features = u.shape
        size, products = block_rows(n, features), weights_of(*self._model)
        some = tuple(x[:size] for x in data)
        steps = _UPHILL if features > _UPHILL else 0  # a Hessian costs as much as this many gradients
        route = partial(self._memory.route, programs=self._programs)
        up = route(self._slopes, inputs=(u.unsqueeze(0), *data), operations=6 * products * n, calls=steps)
        u = climb(up, u.unsqueeze(0), data, steps)[0][0]
        blocks = -(-n // size)
        calls = (_USUAL * blocks, _HESSIANS * blocks)
        up = route(self._slopes, inputs=(u[None, :size], *some), operations=6 * products * size, calls=calls[0])
        operations = 6 * products * size * features
        second = route(self._derivatives, inputs=(u[:size], *some), operations=operations, calls=calls[1])
        u, curvature, near = find_modes(up, second, u, data, self.iterations, self.tolerance)
        curvature, flat = raised(curvature)
        lost = int((~near).sum())
        if lost or flat:
            warnings.warn(
                f"Laplace: of {len(u)} data points, {lost} did not converge in {self.iterations} steps, and {flat} "
                "ended at a point that is not a maximum (their curvature is raised to 1e-3): q is poor there",
                stacklevel=outside(),
            )
        return u, inverse_root(curvature)

    def _first(self, data: tuple[Tensor, ...]) -> Tensor:
        """The start of the search, [N, D]."""
        sizes = coordinates(self.sites, self.constraints)
        tensors = [*(t for owner in owners_of(*self._model) for t in owner.parameters()), *data, torch.zeros(())]
        dtype = next(t.dtype for t in tensors if t.is_floating_point())  # data may be integer counts
        if not self._start:
            features = torch.arange(sum(sizes.values()), dtype=dtype, device=data[0].device)
            return 0.1 * torch.cos(features).repeat(len(data[0]), 1)  # zero itself is often a point of symmetry
        with torch.no_grad():
            values = self._start[0](*data)
        if not isinstance(values, Mapping) or set(self.sites) - set(values):
            got = list(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(
                f"start must return a value for each of the sites {list(self.sites)}, but it returned {got}"
            )
        pieces = []
        for site, shape in self.sites.items():
            value = torch.as_tensor(values[site])
            if value.shape != (expected := (len(data[0]), *shape)):
                raise ValueError(
                    f"start must return a value of shape {list(expected)} for the site '{site}', but it returned "
                    f"shape {list(value.shape)}"
                )
            pieces.append(site_transform(shape, self.constraints[site]).inv(value.to(dtype)))
        u = torch.cat(pieces, dim=-1)
        if not u.isfinite().all():
            raise ValueError(
                "start must return values inside the support of each site, but it returned values at its edge or "
                "outside"
            )
        return u


class _Memory:
    """Cache of the last two results of a search, valid while its inputs and the state of its programs are unchanged.

    Validity is checked by values (inputs, parameters, buffers, Pyro's store, plain numbers), because a write through
    ``.data`` leaves no other trace. The search runs outside Pyro's handlers, with gradients, and with the same noise at
    every call. When a function that calls the guide is traced, the search becomes part of the graph, with its noise as
    constants.
    """

    def __init__(self, mode: Compile, name: str) -> None:
        check_compile(mode)
        self.options = mode, name
        self.routes = Routes(mode, _LEAST, f"{name} does not compile its search; its steps are")
        self.known: list[tuple[int, list[Tensor], Any]] = []  # states, tensors and results: one for each mode
        self.state = PlainState()

    def __call__(
        self, search: Callable[..., Any], programs: Sequence[Any], inputs: tuple[Tensor, ...], obstacle: str
    ) -> Any:
        if get_proxy_mode() is not None:
            if obstacle:
                raise CannotCapture(obstacle)
            with torch.enable_grad(), _outside_handlers(), forked_rng(), _FixedDraws():
                torch.manual_seed(0)
                return search(*(t.detach() for t in inputs))
        held = tensors_of(*programs)
        stored = [t for t in pyro.get_param_store()._params.values() if not any(t is other for other in held)]
        state, tensors = self._state(programs).now(), [*inputs, *held, *stored]
        for before, seen, answer in self.known:
            if before == state and _same(seen, tensors):
                return answer
        with torch.inference_mode(False), torch.enable_grad(), _outside_handlers(), forked_rng():
            seen = [t.detach().clone() for t in tensors]
            torch.manual_seed(0)
            answer = search(*seen[: len(inputs)])
        if all(map(_is_module, programs)):
            self.known = [(state, seen, answer), *self.known[:1]]
        return answer

    def route(
        self,
        fn: Callable[..., tuple[Tensor, ...]],
        programs: Sequence[Any],
        inputs: tuple[Tensor, ...],
        operations: float,
        calls: int,
    ) -> Callable[..., tuple[Tensor, ...]]:
        """The function to call instead of one that runs these programs, given the number of calls."""
        if get_proxy_mode() is not None:
            return fn
        obstacle = "" if all(map(_is_module, programs)) else "the model is a function, so its inputs are not known"
        options: Any = {"calls": calls, "state": self._state(programs), "obstacle": obstacle}
        return self.routes(fn, tensors_of(*programs), inputs, operations, **options)

    def _state(self, programs: Sequence[Any]) -> PlainState:
        if self.state.programs != tuple(programs):
            self.state = PlainState(*programs)
        return self.state

    def __reduce__(self) -> tuple[type[_Memory], tuple[Compile, str]]:  # copies and pickles start with an empty cache
        return _Memory, self.options


def _is_module(program: Any) -> bool:
    """Whether a program is a module or a module's method."""
    return isinstance(getattr(program, "__self__", program), nn.Module)


def _same(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether the tensors equal the earlier ones; missing values (NaN) are equal."""
    if len(before) != len(now):
        return False
    alike = (a.dtype == b.dtype and a.device == b.device for a, b in zip(before, now, strict=True))
    return all(alike) and all(map(same_values, before, now))


class _FixedDraws(TorchDispatchMode):
    """While a function is traced, samples are drawn now and become constants of the graph."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or get_proxy_mode() is None:
            return func(*args, **kwargs)
        written = func._schema.is_mutable
        if any(isinstance(a, Tensor) for a in (*args[written:], *kwargs.values())):
            raise CannotCapture(f"the search samples with {func}, whose samples depend on parameters")
        with disable_proxy_modes_tracing():
            values = func(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
        return args[0].copy_(values) if written else values


@contextmanager
def _outside_handlers() -> Iterator[None]:
    """Run Pyro programs without the surrounding handlers and plates."""
    stack, plates = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        runtime._PYRO_STACK[:] = stack
        runtime._DIM_ALLOCATOR._stack[:] = plates
