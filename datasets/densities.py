"""Exact log-densities of the synthetic data, in float64: functions from data to nats per data point, [N]."""

from __future__ import annotations

__all__ = ["BarsDensity", "LinearDynamicsDensity", "LinearGaussianDensity", "PinwheelDensity"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .places import on_cpu


@dataclass(frozen=True, eq=False)
class LinearGaussianDensity:
    """N(mean, weight weight^T + noise^2 I), for x of shape [N, X].

    Attributes:
        weight: W, [X, D].
        mean: mu, [X].
        noise: sigma.
    """

    weight: Tensor
    mean: Tensor
    noise: float

    @on_cpu
    def __call__(self, x: Tensor) -> Tensor:
        """Log-density of x, [N]."""
        _check(x, (len(self.mean),))
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.mean), dtype=torch.float64)
        log_density: Tensor = MultivariateNormal(self.mean, covariance).log_prob(x.double())
        return log_density


@dataclass(frozen=True, eq=False)
class PinwheelDensity:
    """The mean over arms of a Gaussian density, rotated by an angle that grows with the radius.

    Attributes:
        arms: their number A.
        radial: standard deviation along an arm.
        tangential: standard deviation across it.
        rate: how strongly the arms are bent.
    """

    arms: int
    radial: float
    tangential: float
    rate: float

    @on_cpu
    def __call__(self, x: Tensor) -> Tensor:
        """Log-density of x, [N]."""
        _check(x, (2,))
        x = x.double()
        u = self.warp(x[:, None, :], torch.arange(self.arms), back=True)  # [N, A, 2]
        scaled = (u - torch.tensor([1.0, 0.0])) / torch.tensor([self.radial, self.tangential], dtype=torch.float64)
        normalizer = math.log(2 * math.pi * self.radial * self.tangential * self.arms)
        return (-scaled.square().sum(-1) / 2).logsumexp(-1) - normalizer

    def warp(self, u: Tensor, arm: Tensor, back: bool = False) -> Tensor:
        """Rotate points [..., 2] to their arms, or back."""
        angle = 2 * math.pi * arm.double() / self.arms + self.rate * u.norm(dim=-1).exp()
        cos, sin = angle.cos(), angle.sin() * (-1 if back else 1)
        return torch.stack([cos * u[..., 0] - sin * u[..., 1], sin * u[..., 0] + cos * u[..., 1]], -1)


@dataclass(frozen=True, eq=False)
class BarsDensity:
    """The sum over all sets of bars, with flipped pixels, for x of shape [N, size * size].

    Attributes:
        size: height and width of the images.
        probability: that a bar is there.
        flip: that a pixel is flipped.
    """

    size: int
    probability: float
    flip: float

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 12:
            raise ValueError(f"size must be between 1 and 12, but got {self.size}")
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must be between 0 and 1, but got {self.probability}")
        if not 0 < self.flip < 0.5:
            raise ValueError(f"flip must be between 0 and 1/2, but got {self.flip}")

    @on_cpu
    def __call__(self, x: Tensor) -> Tensor:
        """Log-probability of x, [N]."""
        _check(x, (self.size**2,))
        images = x.double().unflatten(-1, (self.size, self.size))
        if not ((images == 0) | (images == 1)).all():
            raise ValueError("x must be images of zeros and ones, but it has other values")
        return (
            torch.cat([self._sum(part) for part in images.split(max(1, 2**18 >> self.size))])
            if len(x)
            else images[:, 0, 0]
        )

    def _sum(self, x: Tensor) -> Tensor:
        states = torch.arange(2**self.size)[:, None] >> torch.arange(self.size) & 1  # [2^size, rows]
        kept, flipped = math.log1p(-self.flip), math.log(self.flip)
        on = x * kept + (1 - x) * flipped  # [N, rows, columns]: log-probability of a pixel of a bar
        off = x * flipped + (1 - x) * kept
        there, absent = math.log(self.probability), math.log1p(-self.probability)
        with_bar = on.sum(1)  # [N, columns]
        without = torch.einsum("hr,nrc->nhc", states.double(), on - off) + off.sum(1)[:, None]  # [N, 2^size, columns]
        columns = torch.logaddexp(there + with_bar[:, None], absent + without).sum(-1)
        bars = states.sum(-1).double()
        return (columns + there * bars + absent * (self.size - bars)).logsumexp(-1)


@dataclass(frozen=True, eq=False)
class LinearDynamicsDensity:
    """A linear-Gaussian state space model with z_1 ~ N(0, I), for x of shape [N, T, X].

    Attributes:
        transition: A, [D, D].
        emission: C, [X, D].
        drive: standard deviation of the noise of the states.
        noise: standard deviation of the noise of the observations.
    """

    transition: Tensor
    emission: Tensor
    drive: float
    noise: float

    @on_cpu
    def __call__(self, x: Tensor) -> Tensor:
        """Log-density of each sequence, [N], by the Kalman filter."""
        features, latent = self.emission.shape
        if x.dim() != 3:
            raise ValueError(f"x must be sequences of shape [N, T, {features}], but got {list(x.shape)}")
        _check(x, (x.shape[1], features))
        mean = x.new_zeros(len(x), latent, dtype=torch.float64)
        covariance = torch.eye(latent, dtype=torch.float64)
        total = x.new_zeros(len(x), dtype=torch.float64)
        for observed in x.double().unbind(1):  # [N, X]
            innovation = self.emission @ covariance @ self.emission.T
            innovation = innovation + self.noise**2 * torch.eye(features, dtype=torch.float64)
            predicted = mean @ self.emission.T
            total = total + MultivariateNormal(predicted, innovation).log_prob(observed)
            gain = torch.linalg.solve(innovation, self.emission @ covariance).T  # [D, X]
            mean = (mean + (observed - predicted) @ gain.T) @ self.transition.T
            covariance = covariance - gain @ self.emission @ covariance
            covariance = self.transition @ covariance @ self.transition.T
            covariance = (covariance + covariance.T) / 2 + self.drive**2 * torch.eye(latent, dtype=torch.float64)
        return total


def _check(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape or x.dim() < 2:
        raise ValueError(f"x must have the shape [N, {', '.join(map(str, shape))}], but got {list(x.shape)}")
