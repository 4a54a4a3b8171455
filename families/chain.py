r"""Gaussian Markov chains over time steps, as distributions and as a family.

.. math::
    z_t = b_t + A_t z_{t-1} + L_t \epsilon_t, \qquad \epsilon_t \sim \mathcal{N}(0, I), \qquad z_0 = 0, \qquad
    t = 1, \dots, T

Stacked over time this is one Gaussian with precision B^T B, where B is block-bidiagonal. The prior and the posterior of
a linear-Gaussian state space model have this form. A sample and its density take O(T).

| symbol | meaning | shape |
| --- | --- | --- |
| T, D | steps, features of a step | |
| b, A, L | offsets, transitions, lower triangular noise | [..., T, D], [..., T, D, D], [..., T, D, D] |
"""

from __future__ import annotations

__all__ = ["GaussMarkov", "GaussMarkovChain"]

import math

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn

from jensen.checked import checked

from .base import Drawn, Family, lower_triangle, matvec, positive


class GaussMarkovChain(Drawn):
    """A Gaussian Markov chain, of event shape [T, D] or, flattened, [T D].

    Args:
        offset: b, [..., T, D].
        transition: A, [..., T, D, D]; the first one is not used.
        scale_tril: L, [..., T, D, D].
        event_shape: [T, D], or [T D]; [T, D] if None.
    """

    def __init__(self, offset: Tensor, transition: Tensor, scale_tril: Tensor, event_shape: Size | None = None) -> None:
        batch_shape = torch.broadcast_shapes(offset.shape[:-2], transition.shape[:-3], scale_tril.shape[:-3])
        super().__init__(batch_shape, offset.shape[-2:] if event_shape is None else event_shape)
        self.offset, self.transition, self.scale_tril = offset, transition, scale_tril

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """All real numbers, over all event dimensions."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """E z, [*batch, *event]."""
        return self._run(self.offset.expand(*self.batch_shape, -1, -1)).reshape(self.batch_shape + self.event_shape)

    @property
    def covariance(self) -> Tensor:
        """The covariance of each step's vector, [*batch, T, D, D]."""
        noise = self.scale_tril @ self.scale_tril.mT
        covariances = [noise[..., 0, :, :]]
        for t in range(1, noise.shape[-3]):
            transition = self.transition[..., t, :, :]
            covariances.append(transition @ covariances[-1] @ transition.mT + noise[..., t, :, :])
        shape = (*self.batch_shape, *covariances[-1].shape[-2:])
        return torch.stack([part.expand(shape) for part in covariances], -3)

    @property
    def variance(self) -> Tensor:
        """The variance of every feature, [*batch, *event]."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).reshape(self.batch_shape + self.event_shape)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """A sample, and its log-density from the noise."""
        steps = shape[: len(shape) - len(self.event_shape)] + self.offset.shape[-2:]
        noise = torch.randn(steps, dtype=self.offset.dtype, device=self.offset.device)
        z = self._run(self.offset + matvec(self.scale_tril, noise))
        return z.reshape(shape), self._log_density(noise)

    def density(self, value: Tensor) -> Tensor:
        """Log-density of any value."""
        z = value.reshape(value.shape[: value.dim() - len(self.event_shape)] + self.offset.shape[-2:])
        before = torch.cat([torch.zeros_like(z[..., :1, :]), z[..., :-1, :]], -2)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve_triangular(
            self.scale_tril, eye, upper=False
        )  # invert few matrices instead of solving for many values
        return self._log_density(matvec(inverse, z - self.offset - matvec(self.transition, before)))

    def _run(self, pushes: Tensor) -> Tensor:
        """z_t = push_t + A_t z_{t-1} of pushes [..., T, D]."""
        z = [pushes[..., 0, :]]
        for t in range(1, pushes.shape[-2]):
            z.append(pushes[..., t, :] + matvec(self.transition[..., t, :, :], z[-1]))
        return torch.stack(z, -2)

    def _log_density(self, noise: Tensor) -> Tensor:
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        log_density: Tensor = -0.5 * (noise.square() + math.log(2 * math.pi)).sum((-2, -1)) - log_det
        return log_density


class GaussMarkov(Family):
    r"""A Gaussian with Markov structure in time: the posterior of a state space model, O(T) parameters for T steps.

    .. math:: q(z \mid h) = \prod_t \mathcal{N}(z_t; b(h_t) + A(h_t) z_{t-1}, L(h_t) L(h_t)^\top)

    One affine map gives the parameters of all steps from the context. With ``per_step``, the context is the
    concatenation of T vectors, as :func:`~jensen.networks.recurrent` returns it, and one smaller map is applied to
    each. If h_t depends on the data from t on (as in a bidirectional network), the family contains the exact posterior
    of a linear-Gaussian state space model. A is initialised at zero, because random transitions make a chain explode.

    References:
        Archer, Park, Buesing, Cunningham and Paninski (2015), Black Box Variational Inference for State Space Models.
        https://arxiv.org/abs/1511.07367
        Krishnan, Shalit and Sontag (2017), Structured Inference Networks for Nonlinear State Space Models.
        https://arxiv.org/abs/1609.09869

    Args:
        features: the shape (T, D) of z; or the number T D, together with ``steps``.
        context: the width H of the context, or None: h already holds the parameters.
        steps: the number T of steps.
        per_step: whether the context concatenates one vector per step; H is then a multiple of T.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [T, D], or [T D].

    Raises:
        ValueError: without a number of steps, or if ``features`` (or ``context``, per step) is not a multiple of it.

    Example:
        >>> import torch
        >>> from jensen.networks import recurrent
        >>> encoder = recurrent(3, 16, bidirectional=True, output="flat")
        >>> q = GaussMarkov((10, 2), context=10 * 16, per_step=True)(encoder(torch.zeros(5, 10, 3)))
        >>> q.rsample().shape, q.variance.shape
        (torch.Size([5, 10, 2]), torch.Size([5, 10, 2]))
        >>> GaussMarkov(20, context=64, steps=10)(torch.zeros(5, 64)).event_shape
        torch.Size([20])
    """

    @checked
    def __init__(
        self,
        features: int | tuple[int, ...],
        context: int | None,
        steps: int | None = None,
        *,
        per_step: bool = False,
    ) -> None:
        shape = (features,) if isinstance(features, int) else tuple(features)
        if len(shape) == 2 and steps is None:
            steps = shape[0]
        size = Size(shape).numel()
        if not steps or steps < 1 or size % steps or (len(shape) == 2 and steps != shape[0]) or len(shape) > 2:
            raise ValueError(
                f"GaussMarkov needs features=(T, D), or features=T * D and steps=T, but got features={features}, "
                f"steps={steps}"
            )
        if per_step and (context is None or context % steps):
            raise ValueError(
                f"with per_step=True, GaussMarkov needs a context that is a multiple of its {steps} steps, but got "
                f"context={context}: use per_step=False for a context of any width"
            )
        D = size // steps
        each = 2 * D + D * (D - 1) // 2 + D * D
        super().__init__(features, None if per_step else context, steps * each)
        self.steps, self.context, self.per_step = steps, context, per_step
        if context is not None:
            if per_step:
                self.affine = _EachStep(context // steps, each)
            with torch.no_grad():
                for p in self.affine.parameters():
                    p.unflatten(0, (-1, each))[:, -D * D :].zero_()

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P], step by step: offset, diagonal and strict lower triangle of L, then A row by row."""
        D = self.features // self.steps
        each = parameters.unflatten(-1, (self.steps, -1))  # [..., T, P / T]
        offset, raw, below, entries = each.split([D, D, D * (D - 1) // 2, D * D], dim=-1)
        scale = positive(raw)
        scale_tril = torch.diag_embed(scale) + scale.unsqueeze(-1) * lower_triangle(below, D)  # [..., T, D, D]
        return GaussMarkovChain(offset, entries.unflatten(-1, (D, D)), scale_tril, self.event_shape)

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, steps={self.steps}, per_step={self.per_step}"


class _EachStep(nn.Linear):
    """One affine map for each of the T parts of a vector [..., T H]: [..., T P]."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.unflatten(-1, (-1, self.in_features))).flatten(-2)
