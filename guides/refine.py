r"""Guides that look for each datum's own best answer: a few steps of SVI from the encoder's, or mode and curvature.

They run the model while they draw, outside of every Pyro handler around them: nothing of that search is a site.
"""

from __future__ import annotations

__all__ = ["Laplace", "SemiAmortized"]

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyro
import torch
from pyro.poutine import runtime
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from jensen.families import FullCovariance
from jensen.families.gaussian import RememberingNormal
from jensen.kernel.parameters import owners_of
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import check_pair, log_joint, terms
from jensen.module import UniqueModule

from .amortized import Joint, coordinates, draw_jointly, supports_of
from .local import Constant, PerDatum
from .members import site_transform


class _Refinable(Protocol):
    encoder: nn.Module

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def sizes(self) -> dict[str, int]: ...
    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Any: ...


class SemiAmortized(UniqueModule):
    r"""An amortized guide whose answer is refined: each datum's parameters follow its own ELBO for some steps.

    .. math:: \lambda_n^{(0)} = \lambda(\text{encoder}(x_n)), \qquad
              \lambda_n^{(t+1)} = \lambda_n^{(t)} + \text{Adam}(\nabla_\lambda \text{ELBO}_n(\lambda_n^{(t)}))

    The steps use the same noise at every call on the same data, so q is a fixed distribution. In training what they
    find counts as a constant: model and encoder follow the ELBO at the refined parameters, to first order. (Kim et al.
    differentiate through the steps, at several times the price.)

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-Amortized Variational Autoencoders.
        https://arxiv.org/abs/1802.02550

    Args:
        guide: an :class:`~jensen.guides.Amortized` or :class:`~jensen.guides.Joint` guide.
        model: its model, which must broadcast over a leading dimension of particles.
        steps: the number of steps.
        lr: the size of a step, in units of the family's parameters.
        particles: draws per datum and step.

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

    def __init__(
        self, guide: _Refinable, model: Callable[..., Any], steps: int, lr: float = 0.05, particles: int = 4
    ) -> None:
        if steps < 1 or particles < 1:
            raise ValueError(f"SemiAmortized takes at least 1 step and 1 particle, but got {steps} and {particles}")
        super().__init__()
        self.guide = guide
        self.steps, self.lr, self.particles = steps, lr, particles
        self._model = (model,)  # in a tuple: not registered, so saved and optimised once, with the model
        self._found = _Memory()

    def forward(self, *data: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: refines, then draws every site."""
        context = self.guide.encoder(*data)
        return self.guide.draw(context, self._offsets(context, data))

    def local(self, *data: Tensor) -> Any:
        """The guide's families with parameters of their own for each of these data, starting at the refined ones."""
        with torch.no_grad():
            context = self.guide.encoder(*data)
        return self.guide.local(*data, offsets=self._offsets(context, data))

    def _offsets(self, context: Tensor, data: tuple[Tensor, ...]) -> Any:
        return self._found(self._refine, [self.guide, *self._model], (context, *data))

    def _refine(self, context: Tensor, *data: Tensor) -> dict[str, Tensor]:
        """What to add to the parameters of each site's family: [N, P] by site."""
        (model,) = self._model
        sizes = self.guide.sizes().items()
        offsets = {site: context.new_zeros(len(context), size, requires_grad=True) for site, size in sizes}
        optimizer = torch.optim.Adam(offsets.values(), lr=self.lr)

        def guide(*_: Tensor) -> None:
            self.guide.draw(context, offsets)

        nesting = check_pair(model, guide, *data).nesting
        for _ in range(self.steps):
            t = terms(model, guide, *data, particles=self.particles, max_plate_nesting=nesting)
            if stuck := [site for site, q in t.q.items() if not q.has_rsample]:
                raise ValueError(f"draws of {stuck} have no gradient to follow: take a family that has rsample")
            loss = -t.log_weights.mean(0).sum()
            for offset, slope in zip(offsets.values(), torch.autograd.grad(loss, list(offsets.values())), strict=True):
                offset.grad = slope.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
        return {site: offset.detach() for site, offset in offsets.items()}


class Laplace(UniqueModule):
    r"""The Laplace approximation of each datum's posterior: a Gaussian at the mode, with the curvature there.

    .. math:: q(u \mid x) = \mathcal{N}(u; \hat u, H^{-1}), \qquad \hat u = \arg\max_u \log p(x, t(u)) |\det t'(u)|,
              \qquad H = -\nabla_u^2 \log p(x, t(u)) |\det t'(u)| \text{ at } \hat u

    over the unconstrained coordinates u of all continuous sites. The mode is found by Newton's method with a damping of
    its own for each datum. It has no parameters, and the posterior of a linear-Gaussian model exactly.

    References:
        Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities.
        https://www.jstor.org/stable/2287970
        Nocedal and Wright (2006), Numerical Optimization, second edition, section 4.1.

    Args:
        model: a model that says its ``latents``, and broadcasts over a leading dimension of particles.
        constraints: the support of latent sites that are not all of R^D, by site.
        iterations: the most Newton steps.
        tolerance: a datum has converged when a Newton step promises fewer nats than this.

    Warns:
        UserWarning: for data where the search did not converge, or ended where the curvature is not that of a maximum.

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

    def __init__(
        self,
        model: Any,
        constraints: Mapping[str, Constraint] | None = None,
        iterations: int = 100,
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__()
        self.sites = {site: Size(shape) for site, shape in model.latents.items()}
        self.constraints = supports_of(self.sites, constraints)
        self.iterations, self.tolerance = iterations, tolerance
        self._model = (model,)  # in a tuple: not registered, so saved and optimised once, with the model
        self._found = _Memory()

    def forward(self, *data: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: finds the modes, then draws every site."""
        loc, scale_tril = self._found(self._search, self._model, data)
        return draw_jointly(RememberingNormal(loc, scale_tril=scale_tril), len(loc), self.sites, self.constraints)

    def local(self, *data: Tensor) -> Joint:
        """A Gaussian with full covariance of its own for each of these data, starting at mode and curvature."""
        loc, scale_tril = self._found(self._search, self._model, data)
        family = FullCovariance(loc.shape[-1], None)
        parameters = family.parameters_of(loc, scale_tril)
        own = PerDatum(family, parameters, first=True)
        return Joint(Constant(parameters, data), own, self.sites, self.constraints)

    def _log_density(self, u: Tensor, data: tuple[Tensor, ...]) -> Tensor:
        """Log-density of unconstrained coordinates [N, D] and each datum: [N]."""
        (model,) = self._model
        values, log_det = {}, torch.zeros(())
        pieces = u.split(list(coordinates(self.sites, self.constraints).values()), dim=-1)
        for (site, shape), piece in zip(self.sites.items(), pieces, strict=True):
            transform = site_transform(shape, self.constraints[site])
            z = transform(piece)
            log_det = log_det + transform.log_abs_det_jacobian(piece, z)
            values[site] = z.unsqueeze(0)
        with pyro.validation_enabled(False):  # a step may go too far: its density is no number then
            return log_joint(model, values, *data)[0] + log_det

    def _derivatives(self, u: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density [N], gradient [N, D] and negative Hessian [N, D, D]."""
        u = u.detach().requires_grad_()
        value = self._log_density(u, data)
        (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        rows = (slope[:, d].sum() + 0 * u.sum() for d in range(u.shape[1]))  # 0: where it does not depend on u
        curvature = -torch.stack([torch.autograd.grad(row, u, retain_graph=True)[0] for row in rows], dim=-2)
        slope, curvature = (t.detach().nan_to_num(0.0, 0.0, 0.0) for t in (slope, curvature))
        return value.detach(), slope, (curvature + curvature.mT) / 2

    def _search(self, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Mode [N, D] and Cholesky factor [N, D, D] of the inverse curvature, for each datum."""
        D = sum(coordinates(self.sites, self.constraints).values())
        tensors = [*(t for owner in owners_of(*self._model) for t in owner.parameters()), *data, torch.zeros(())]
        dtype = next(t.dtype for t in tensors if t.is_floating_point())  # data may be counts
        u = 0.1 * torch.randn(len(data[0]), D, dtype=dtype, device=data[0].device)
        damping = u.new_ones(len(u), 1)
        value, slope, curvature = self._derivatives(u, data)
        for _ in range(self.iterations):
            step, promise = _newton(slope, curvature, damping)
            going = promise >= self.tolerance
            if not bool(going.any()):
                break
            with torch.no_grad():
                trial = self._log_density(u + step, data)
            better = trial.isfinite() & ~(trial < value) & going
            u = torch.where(better.unsqueeze(-1), u + step, u)
            damping = torch.where(better.unsqueeze(-1), damping / 5, damping * 4).clamp(1e-8, 1e8)
            value, slope, curvature = self._derivatives(u, data)
        step, promise = _newton(slope, curvature, 0 * damping)
        near = promise < self.tolerance  # the last step is a whole one, and squares the distance that is left
        curvature = self._derivatives(u := torch.where(near.unsqueeze(-1), u + step, u), data)[2]
        eigenvalues, vectors = torch.linalg.eigh(curvature)
        floor = (10 * torch.finfo(u.dtype).eps * eigenvalues[:, -1:]).clamp_min(1e-3)
        lost = int((~near).sum())
        flat = int((eigenvalues[:, :1] < floor).sum())
        if lost or flat:
            warnings.warn(
                f"Laplace: of {len(u)} data, {lost} did not converge in {self.iterations} steps, and for {flat} the "
                "curvature is not that of a maximum (it is raised to 1e-3): q is a poor guide there",
                stacklevel=2,
            )
        lift = (floor - eigenvalues).clamp_min(0.0)
        curvature = curvature + (vectors * lift.unsqueeze(-2)) @ vectors.mT
        # H = U U^T with U upper triangular, so H^{-1} = L L^T with L = U^{-T}
        upper = torch.linalg.cholesky(curvature.flip(-2, -1)).flip(-2, -1)
        return u, torch.linalg.solve_triangular(upper, torch.eye(D).to(u), upper=True).mT


def _newton(slope: Tensor, curvature: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """A damped Newton step uphill, [N, D], and the nats that the whole step promises, [N]."""
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    along = (vectors.mT @ slope.unsqueeze(-1)).squeeze(-1)  # [N, D]
    sizes = eigenvalues.abs().clamp_min(1e-6)
    return (vectors @ (along / (sizes + damping)).unsqueeze(-1)).squeeze(-1), (along.square() / sizes).sum(-1) / 2


class _Memory:
    """Remembers the last answer of a search, as long as its inputs and all that its programs hold are the same.

    Compared are values (of inputs, parameters, buffers, Pyro's store, plain numbers): a write through ``.data`` leaves
    no other trace. The search runs outside of Pyro's handlers, with gradients, and from the same noise at every call.
    """

    def __init__(self) -> None:
        self.seen: Any = None
        self.answer: Any = None

    def __call__(self, search: Callable[..., Any], programs: Sequence[Any], inputs: tuple[Tensor, ...]) -> Any:
        modules = owners_of(*programs)
        parts = [part for module in modules for part in module.modules()]
        numbers = [{k: v for k, v in vars(part).items() if isinstance(v, int | float)} for part in parts]
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        stored = [t for t in pyro.get_param_store()._params.values() if not any(t is other for other in held)]
        tensors = [*inputs, *held, *stored]
        if not self._knows(numbers, tensors):
            with torch.inference_mode(False), torch.enable_grad(), _outside_handlers(), forked_rng():
                seen = [t.detach().clone() for t in tensors]
                torch.manual_seed(0)
                self.answer = search(*seen[: len(inputs)])
            self.seen = (numbers, seen) if len(modules) == len(programs) else None
        return self.answer

    def _knows(self, numbers: list[dict[str, float]], tensors: list[Tensor]) -> bool:
        if self.seen is None or self.seen[0] != numbers or len(self.seen[1]) != len(tensors):
            return False
        same = (a.dtype == b.dtype and a.device == b.device for a, b in zip(self.seen[1], tensors, strict=True))
        return all(same) and all(map(torch.equal, self.seen[1], tensors))

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:  # copies and pickles start empty
        return _Memory, ()


@contextmanager
def _outside_handlers() -> Iterator[None]:
    """Run Pyro programs as if no handler and no plate stood around them."""
    stack, plates = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        runtime._PYRO_STACK[:] = stack
        runtime._DIM_ALLOCATOR._stack[:] = plates
