r"""Guides that look for each datum's own best answer: a few steps of SVI from the encoder's, or mode and curvature.

They run the model while they draw, outside of every Pyro handler around them: nothing of that search is a site.
"""

from __future__ import annotations

__all__ = ["Laplace", "SemiAmortized"]

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pyro.poutine import runtime
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from jensen.families import FullCovariance
from jensen.families.gaussian import RememberingNormal
from jensen.inference.weights import log_joint, log_weights
from jensen.module import UniqueModule

from .amortized import Joint, coordinates, draw_jointly, supports_of
from .local import Constant, PerDatum
from .members import site_transform


class _Refinable(Protocol):
    encoder: nn.Module

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def sizes(self) -> dict[str, int]: ...
    def local(self, *data: Tensor) -> Any: ...


class SemiAmortized(UniqueModule):
    r"""An amortized guide whose answer is refined: each datum's parameters follow its own ELBO for some steps.

    .. math:: \lambda_n^{(0)} = \lambda(\text{encoder}(x_n)), \qquad
              \lambda_n^{(t+1)} = \lambda_n^{(t)} + \text{Adam}(\nabla_\lambda \text{ELBO}_n(\lambda_n^{(t)}))

    The steps use the same noise at every call, so q(z | x) is a fixed distribution. In training the refinement counts
    as a constant: model and encoder follow the ELBO at the refined parameters, to first order. (Kim et al.
    differentiate through the steps, at several times the price.)

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-Amortized Variational Autoencoders.

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
        return self.guide.draw(context, self._found(self._refine, [self.guide, *self._model], data))

    def local(self, *data: Tensor) -> Any:
        """The guide's families with parameters of their own for each of these data."""
        return self.guide.local(*data)

    def _refine(self, *data: Tensor) -> dict[str, Tensor]:
        """What to add to the parameters of each site's family: [N, P] by site."""
        (model,) = self._model
        with torch.no_grad():
            context = self.guide.encoder(*data)
        offsets = {
            site: context.new_zeros(len(context), p, requires_grad=True) for site, p in self.guide.sizes().items()
        }
        optimizer = torch.optim.Adam(offsets.values(), lr=self.lr)

        def guide(*_: Tensor) -> None:
            self.guide.draw(context, offsets)

        for _ in range(self.steps):
            loss = -log_weights(model, guide, *data, particles=self.particles, max_plate_nesting=1).mean(0).sum()
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
        family = FullCovariance(loc.shape[-1], None).to(loc)
        start = Constant(family.parameters_of(loc, scale_tril))
        return Joint(start, PerDatum(family, len(loc), first=True), self.sites, self.constraints)

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
        return log_joint(model, values, *data)[0] + log_det

    def _derivatives(self, u: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density [N], gradient [N, D] and negative Hessian [N, D, D]."""
        u = u.detach().requires_grad_()
        value = self._log_density(u, data)
        (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        rows = [
            torch.autograd.grad(slope[:, d].sum(), u, retain_graph=True)[0] if slope.requires_grad else slope * 0
            for d in range(u.shape[1])
        ]
        curvature = -torch.stack(rows, dim=-2)
        return value.detach(), slope.detach(), (curvature + curvature.mT) / 2

    def _search(self, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Mode [N, D] and Cholesky factor [N, D, D] of the inverse curvature, for each datum."""
        D = sum(coordinates(self.sites, self.constraints).values())
        u = 0.1 * torch.randn(len(data[0]), D, dtype=data[0].dtype, device=data[0].device)
        damping = u.new_ones(len(u), 1)
        value, slope, curvature = self._derivatives(u, data)
        promise = slope.new_full((len(u),), float("inf"))
        for _ in range(self.iterations):
            eigenvalues, vectors = torch.linalg.eigh(curvature)
            along = (vectors.mT @ slope.unsqueeze(-1)).squeeze(-1)  # [N, D]
            promise = (along.square() / eigenvalues.abs().clamp_min(1e-6)).sum(-1) / 2
            if bool((promise < self.tolerance).all()):
                break
            step = (vectors @ (along / (eigenvalues.abs() + damping)).unsqueeze(-1)).squeeze(-1)
            with torch.no_grad():
                better = self._log_density(u + step, data) >= value
            u = torch.where(better.unsqueeze(-1), u + step, u)
            damping = torch.where(better.unsqueeze(-1), damping / 5, damping * 4).clamp(1e-8, 1e8)
            value, slope, curvature = self._derivatives(u, data)
        eigenvalues = torch.linalg.eigvalsh(curvature)
        lost = int((promise >= self.tolerance).sum())
        flat = eigenvalues[:, 0] < 1e-3
        if lost or bool(flat.any()):
            warnings.warn(
                f"Laplace: of {len(u)} data, {lost} did not converge in {self.iterations} steps, and for "
                f"{int(flat.sum())} the curvature is not that of a maximum (it is raised to 1e-3): q is a poor guide "
                "there",
                stacklevel=2,
            )
        lift = (1e-3 - eigenvalues[:, :1]).clamp_min(0.0).unsqueeze(-1)
        curvature = curvature + lift * torch.eye(D, dtype=u.dtype, device=u.device)
        # H = U U^T with U upper triangular, so H^{-1} = L L^T with L = U^{-T}
        upper = torch.linalg.cholesky(curvature.flip(-2, -1)).flip(-2, -1)
        eye = torch.eye(D, dtype=u.dtype, device=u.device).expand_as(upper)
        return u, torch.linalg.solve_triangular(upper, eye, upper=True).mT


class _Memory:
    """Remembers the last answer of a search, as long as the data and the parameters that it read are the same.

    The search runs outside of Pyro's handlers, with gradients, and from the same noise at every call.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.answer: Any = None

    def __call__(self, search: Callable[..., Any], programs: Any, data: tuple[Tensor, ...]) -> Any:
        owners = [getattr(program, "__self__", program) for program in programs]
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        tensors = [*data, *(t for module in modules for t in (*module.parameters(), *module.buffers()))]
        key = [(t, t._version) for t in tensors]
        known = self.key is not None and len(key) == len(self.key)
        if not known or any(a is not b or v != w for (a, v), (b, w) in zip(key, self.key, strict=True)):
            with _outside_handlers(), torch.enable_grad(), torch.random.fork_rng(devices=_cuda(data)):
                torch.manual_seed(0)
                self.answer = search(*data)
            self.key = [(t, t._version) for t in tensors] if len(modules) == len(owners) else None
        return self.answer

    def __deepcopy__(self, memo: Any) -> _Memory:
        return _Memory()


def _cuda(data: tuple[Tensor, ...]) -> list[int]:
    return [x.device.index for x in data[:1] if x.device.type == "cuda"]


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
