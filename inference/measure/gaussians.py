r"""The optimal Gaussian of each data point, for families that contain Gaussians: by its optimality conditions.

.. math:: E_q[\nabla f(u)] = 0, \qquad \Sigma^{-1} = -E_q[\nabla^2 f(u)], \qquad f(u) = \log p(x, u)

for q of full covariance, and for a diagonal one with only the diagonal of the second condition. Both are iterated from
the mode and its curvature. Samples come in opposite pairs: in the mean gradient all linear terms cancel, in
the mean Hessian the terms linear in u; so few samples are needed.

References:
    Opper and Archambeau (2009), The Variational Gaussian Approximation Revisited, equations 12 and 13.
"""

from __future__ import annotations

__all__ = ["MOST", "Gaussians", "Landscape"]

from collections.abc import Callable
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor

from jensen.graphs.compile import Compile
from jensen.graphs.routes import Routes, weights_of
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.lifts import Lifted
from jensen.kernel.newton import block_rows, climb, derivatives, find_modes, in_blocks, raised, slopes
from jensen.kernel.parameters import tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.weights import Program, densities

MOST = 256  # coordinates
_LEAST = 100  # calls that pay for a graph
_UPHILL = 20  # gradient steps before Newton's method
_HESSIANS, _MOST_HESSIANS = 2, 20  # in the search for a mode, usually and at most
_PROMISE = 1e-2  # nats: a mode need not be exact
_FARTHEST = 0.5  # standard deviations per step
_FLOOR = 1e-2  # minimal curvature


class Landscape:
    """Log p(x, u) of any data of a model, in unconstrained coordinates, with gradients and Hessians.

    Args:
        model: the model.
        nesting: how deep the plates of model and guide are nested.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.gaps`.
        parts: the number of future batches.
    """

    def __init__(self, model: Program, nesting: int, mode: Compile, parts: int) -> None:
        self.model, self.parts = model, parts
        self.lifted = Lifted(model, nesting)
        self.routes = Routes(mode, _LEAST, "gaps does not compile this search; its steps run")
        self.state = PlainState(model)
        self.weights = weights_of(model)
        self._known: dict[int, tuple[Coordinates, Callable[..., dict[str, Tensor]]]] = {}

    def coordinates(self, data: tuple[Tensor, ...]) -> Coordinates:
        """The coordinates for data like these; ValueError if the model has none."""
        return self._of(data)[0]

    def _of(self, data: tuple[Tensor, ...]) -> tuple[Coordinates, Callable[..., dict[str, Tensor]]]:
        """Coordinates, and log p(x, z) site by site, for data like these."""
        n = len(data[0])
        if n not in self._known:
            self._known[n] = Coordinates(self.model, *data), densities(self.model, *data, lifted=self.lifted)
        return self._known[n]

    def log_density(self, u: Tensor, *data: Tensor) -> Tensor:
        """Log p(x, u), the log-determinant of the map included, at points [C, N, F]: [C, N]."""
        coordinates, log_p = self._of(data)
        with validation_enabled(False):
            values, log_det = coordinates.values(u)
            return torch.as_tensor(sum(log_p(values, *data).values())) + log_det

    def run(self, fn: Callable[..., tuple[Tensor, ...]], u: Tensor, data: tuple[Tensor, ...], calls: int) -> Any:
        """The fastest route to derivatives at points and data like these, called ``calls`` times per batch."""
        self.coordinates(data)
        rows = u.shape[:-1].numel() * (u.shape[-1] if fn is derivatives else 1)

        def at(u: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
            return fn(self.log_density, u, *data)

        inputs, operations = (u, *data), 6.0 * self.weights * rows
        ahead = calls * self.parts
        run = self.routes(
            at, tensors_of(self.model), inputs, operations, ahead=ahead, key=fn.__name__, state=self.state
        )
        return lambda u, *data: run(u.contiguous(), *data)  # the graph needs contiguous points


class Gaussians:
    """A Gaussian for each data point of a batch, which is improved towards the best ELBO.

    Args:
        land: log p(x, u).
        data: the batch.
        start: the start of the search for modes, [N, F].
        diagonal: whether covariances are diagonal.
    """

    def __init__(self, land: Landscape, data: tuple[Tensor, ...], start: Tensor, diagonal: bool) -> None:
        self.land, self.data, self.diagonal = land, data, diagonal
        n, features = start.shape
        self.size = block_rows(n, features)
        some = tuple(x[: self.size] for x in data)
        steps, blocks = _UPHILL if features > _UPHILL else 0, -(-n // self.size)
        u = climb(land.run(slopes, start.unsqueeze(0), data, steps), start.unsqueeze(0), data, steps)[0][0]
        up = land.run(slopes, start[None, : self.size], some, 10 * blocks)
        self.second = land.run(derivatives, start[: self.size], some, (1 + _HESSIANS + 4) * blocks)
        self.loc, self.curvature, _ = find_modes(up, self.second, u, data, _MOST_HESSIANS, _PROMISE)
        self.points = torch.zeros(n, dtype=u.dtype, device=u.device)  # number of points in the mean curvature

    def state(self) -> tuple[Tensor, ...]:
        """The numbers that change, [N, ...] each."""
        return self.loc, self.curvature, self.points

    def return_to(self, state: tuple[Tensor, ...], rows: Tensor) -> None:
        """Restore an earlier state of some data points, [N] of bool."""
        self.loc, self.curvature, self.points = (
            torch.where(rows.view(-1, *(1,) * (new.dim() - 1)), old, new)
            for old, new in zip(state, self.state(), strict=True)
        )

    def distribution(self) -> tuple[Tensor, Tensor]:
        """Means [N, F] and Cholesky factors [N, F, F]."""
        if self.diagonal:
            return self.loc, torch.diag_embed(self.curvature.diagonal(dim1=-2, dim2=-1).clamp_min(_FLOOR).rsqrt())
        return self.loc, self._whitening()

    def _whitening(self) -> Tensor:
        """W, lower triangular with W W^T the inverse of the curvature: [N, F, F]."""
        curvature, _ = raised(self.curvature, _FLOOR)
        whitening: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(curvature)))
        return whitening

    def move(self, steps: int, draws: int, points: int, share: float) -> None:
        """Steps of the mean, each a share of Newton's; the mean of the last half is kept; then a new mean curvature."""
        n, features = self.loc.shape
        lower, whitening = self.distribution()[1], self._whitening()
        total = torch.zeros_like(self.loc)
        up = self.land.run(slopes, self.loc.new_empty(2 * max(1, draws // 2), n, features), self.data, 2 * steps)
        for step in range(steps):
            away = torch.einsum("nij,cnj->cni", lower, self._noise(draws, n, features))
            slope = up(self.loc + away, *self.data)[1].mean(0)
            white = share * min(1.0, 2 * (1 - step / steps)) * torch.einsum("nji,nj->ni", whitening, slope)
            self.loc = self.loc + torch.einsum("nij,nj->ni", whitening, white.clamp(-_FARTHEST, _FARTHEST))
            if step >= steps // 2:
                total += self.loc / (steps - steps // 2)
        self.loc = total
        noise = self._noise(points, n, features)
        u = (self.loc + torch.einsum("nij,cnj->cni", lower, noise)).flatten(0, 1)
        rows = torch.arange(n, device=u.device).repeat(len(noise))
        curvature = in_blocks(self.second, self.size, u, self.data, rows)[2].unflatten(0, (len(noise), n)).mean(0)
        self.points = self.points + points
        weight = points / self.points
        curvature = self.curvature + weight[:, None, None] * (curvature - self.curvature)
        self.curvature = _no_wider(curvature, raised(self.curvature, _FLOOR)[0])

    def _noise(self, draws: int, n: int, features: int) -> Tensor:
        """Standard normal numbers in opposite pairs, [C, N, F]."""
        noise = torch.randn(max(1, draws // 2), n, features, dtype=self.loc.dtype, device=self.loc.device)
        return torch.cat([noise, -noise])


def _no_wider(curvature: Tensor, before: Tensor) -> Tensor:
    """Curvatures [N, F, F] of Gaussians that are at most twice as wide as before in each direction."""
    _, info = torch.linalg.cholesky_ex(curvature - before / 4)
    wide = (info != 0).nonzero().flatten()
    if not len(wide):
        return curvature
    root = torch.linalg.cholesky(before[wide])
    white = torch.linalg.solve_triangular(root, curvature[wide], upper=False)
    white = torch.linalg.solve_triangular(root, white.mT, upper=False)
    eigenvalues, vectors = torch.linalg.eigh((white + white.mT) / 2)
    bounded = curvature.clone()
    bounded[wide] = root @ (vectors * eigenvalues.clamp_min(0.25).unsqueeze(-2)) @ vectors.mT @ root.mT
    return bounded
