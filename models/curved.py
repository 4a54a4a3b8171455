r"""Small test models with one observed number: the posterior is curved and the evidence is known.

.. math:: z \sim \mathcal{N}(0, I_D), \qquad x \mid z \sim \mathcal{N}(f(z), \sigma^2)

| model | D | f(z) | its level sets, along which the posterior lies | p(x) |
| --- | --- | --- | --- | --- |
| Banana | 2 | z_2 + b z_1^2 | parabolas | an integral over z_1 alone |
| Ring | 2 | z_1^2 + z_2^2 | circles of radius sqrt(x) | closed form |
| Ring | any | z_1^2 + ... + z_D^2 | two points, spheres | an integral over the radius |

They have no parameters to learn. They measure the variational gap of a guide when the posterior is not Gaussian.
"""

from __future__ import annotations

__all__ = ["Banana", "Ring"]

import math

import pyro
import torch
from pyro.distributions import Normal
from torch import Size, Tensor

from jensen.checked import checked
from jensen.module import UniqueModule

from .base import check_reals, data_plate
from .priors import StandardNormal

_POINTS = 128  # of the trapezoidal rule; 64 points give the same digits
_RADII = 1024  # of the rule along the radius: the integrand may have a peak and a long tail
_NATS = 40.0  # the integrand is cut off this far below its maximum: e^-40 vanishes in float64
_ROOT_TWO_PI = math.sqrt(2 * math.pi)


class _Curved(UniqueModule):
    """The common part: the prior, the noise, one observed number. A subclass defines f(z)."""

    def __init__(self, noise: float, latent: int) -> None:
        if not 0 < noise < math.inf:
            raise ValueError(f"noise is a positive standard deviation, but got {noise}")
        super().__init__()
        self.noise = float(noise)
        self.prior = StandardNormal(latent)
        self.latents = {"z": Size((latent,))}
        self.event_shape = Size((1,))

    def location(self, z: Tensor) -> Tensor:
        """f(z), the mean of x given z: [..., D] to [...]."""
        raise NotImplementedError

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, 1], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, type(self).__name__):
            z = pyro.sample("z", self.prior())  # [N, D]
            loc = self.location(z).unsqueeze(-1)  # [N, 1]
            return pyro.sample("x", Normal(loc, self.noise).to_event(1), obs=x)


class Banana(_Curved):
    r"""A Gaussian observed through a parabola: the posterior is banana-shaped, with two separate modes for large x.

    .. math::
        z \sim \mathcal{N}(0, I_2), \qquad x \mid z \sim \mathcal{N}(z_2 + b z_1^2, \sigma^2), \qquad
        p(x) = \int \mathcal{N}(z_1; 0, 1) \, \mathcal{N}(x; b z_1^2, 1 + \sigma^2) \, dz_1

    E x = b and var x = 1 + 2 b^2 + sigma^2. With b = 0 the model is linear and p(x) Gaussian. The integral is computed
    in float64 by the trapezoidal rule, over the region where the integrand is not negligible. It is exact up to
    rounding, because the integrand is smooth and decays at both ends.

    References:
        Haario, Saksman and Tamminen (1999), Adaptive Proposal Distribution for Random Walk Metropolis Algorithm.
        https://doi.org/10.1007/s001800050022
        Trefethen and Weideman (2014), The Exponentially Convergent Trapezoidal Rule.

    Args:
        curvature: b, the curvature of the parabola; its sign is the direction of the bend.
        noise: sigma, the standard deviation of x given z: the thickness of the banana.

    Raises:
        ValueError: if ``curvature`` is not finite, or ``noise`` not positive and finite.

    Example:
        >>> model = Banana()
        >>> x = model(n=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    @checked
    def __init__(self, curvature: float = 0.5, noise: float = 0.25) -> None:
        if not math.isfinite(curvature):
            raise ValueError(f"curvature is a finite number, but got {curvature}")
        super().__init__(noise, latent=2)
        self.curvature = float(curvature)

    def location(self, z: Tensor) -> Tensor:
        """z_2 + b z_1^2, the mean of x given z: [..., 2] to [...]."""
        loc: Tensor = z[..., 1] + self.curvature * z[..., 0].square()
        return loc

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, 1], in nats, by quadrature in float64: [N], in the precision of ``x``."""
        check_reals(x, self.event_shape, "Banana")
        missing, x = x.isnan(), torch.where(x.isnan(), 0.0, x)
        log_p = torch.cat([self._integral(part) for part in x.split(2**14)]).to(x.dtype)
        return log_p.masked_fill(missing.squeeze(-1), 0.0)

    def _integral(self, x: Tensor) -> Tensor:
        x = x.double()
        low, high = self._support(x)  # [N, 1]
        steps = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device=x.device)
        z = low + (high - low) * steps  # [N, P]
        likelihood = Normal(self.curvature * z.square(), math.sqrt(1 + self.noise**2))
        integrand: Tensor = Normal(0.0, 1.0).log_prob(z) + likelihood.log_prob(x)
        integrand[:, [0, -1]] -= math.log(2)  # the end points have half weight
        step = (high - low).squeeze(-1) / (_POINTS - 1)
        return integrand.logsumexp(-1) + (2 * step).log()  # twice, since z_1 and -z_1 are alike

    def _support(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of z_1 >= 0 to integrate over, two of [N, 1]: the integrand is e^-(A w^2 + B w), w = z_1^2."""
        variance = 1 + self.noise**2
        a = x.new_tensor(self.curvature**2 / (2 * variance))
        b = 0.5 - self.curvature * x / variance
        peak, radius = -b / (2 * a), (_NATS / a).sqrt()  # where B < 0: a parabola about a positive w
        falling = 2 * _NATS / (b + (b.square() + 4 * a * _NATS).sqrt())  # where it decreases from w = 0
        low = torch.where(b < 0, (peak - radius).clamp_min(0), 0.0)
        return low.sqrt(), torch.where(b < 0, peak + radius, falling).sqrt()


class Ring(_Curved):
    r"""A Gaussian of which only the squared length is observed: the posterior is a ring, or a single blob for small x.

    .. math::
        z \sim \mathcal{N}(0, I_D), \qquad x \mid z \sim \mathcal{N}(|z|^2, \sigma^2), \qquad
        p(x) = \int_0^\infty \chi^2_D(w) \, \mathcal{N}(x; w, \sigma^2) \, dw

    so E x = D and var x = 2 D + sigma^2. With one latent feature the ring is two modes of equal mass, at +-sqrt(x): a
    guide that covers only one of them has a gap of log 2. With two, the squared length is exponential and x is
    exponentially modified Gaussian; with Phi the standard normal distribution function,

    .. math:: \log p(x) = \frac{\sigma^2}{8} - \frac{x}{2} - \log 2
              + \log \Phi\left(\frac{x - \sigma^2 / 2}{\sigma}\right)

    Otherwise the integral is computed in float64 by the trapezoidal rule in log w, over the region where the integrand
    is not negligible: it is smooth and decays at both ends. A Gaussian guide covers one side of the ring, or its whole
    disc.

    References:
        Rezende and Mohamed (2015), Variational Inference with Normalizing Flows: the ring among their potentials.
        https://arxiv.org/abs/1505.05770
        Grushka (1972), Characterization of Exponentially Modified Gaussian Peaks in Chromatography.

    Args:
        noise: sigma, the standard deviation of x given z: the ring is about sigma / (2 sqrt(x)) thick.
        latent: the number D of latent features.

    Raises:
        ValueError: if ``noise`` is not positive and finite, or ``latent`` less than 1.

    Example:
        >>> model = Ring()
        >>> x = model(n=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 1]), torch.Size([5]))
        >>> Ring(latent=1).latents
        {'z': torch.Size([1])}
    """

    @checked
    def __init__(self, noise: float = 0.5, latent: int = 2) -> None:
        if latent < 1:
            raise ValueError(f"latent is the number of latent features, at least 1, but got {latent}")
        super().__init__(noise, latent)
        self.latent = latent

    def location(self, z: Tensor) -> Tensor:
        """|z|^2, the mean of x given z: [..., D] to [...]."""
        return z.square().sum(-1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, 1], in nats, computed in float64: [N], in the precision of ``x``."""
        check_reals(x, self.event_shape, "Ring")
        missing, x = x.isnan(), torch.where(x.isnan(), 0.0, x)
        if self.latent != 2:
            log_p = torch.cat([self._integral(part) for part in x.split(2**11)])
        else:
            t = x.squeeze(-1).double()
            tail = torch.special.log_ndtr(t / self.noise - self.noise / 2)
            log_p = self.noise**2 / 8 - t / 2 - math.log(2) + tail
        return log_p.to(x.dtype).masked_fill(missing.squeeze(-1), 0.0)

    def _integral(self, x: Tensor) -> Tensor:
        x = x.double()
        low, high = self._support(x)  # [N, 1]
        steps = torch.linspace(0, 1, _RADII, dtype=torch.float64, device=x.device)
        integrand = self._integrand(low + (high - low) * steps, x)  # [N, P]
        step = (high - low).squeeze(-1) / (_RADII - 1)
        scale = math.lgamma(self.latent / 2) + self.latent / 2 * math.log(2) + math.log(self.noise * _ROOT_TWO_PI)
        return integrand.logsumexp(-1) + step.log() - scale

    def _integrand(self, v: Tensor, x: Tensor) -> Tensor:
        """The log integrand up to a constant, at v = log w: it has a single peak."""
        w = v.exp()
        return self.latent / 2 * v - w / 2 - ((x - w) / self.noise).square() / 2

    def _support(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of v = log w to integrate over, two of [N, 1], by bisection between the peak and distant points.

        At a distance s from the peak the integrand is below it by at least D/2 (e^s - 1 - s) to the right, and
        D/2 (e^-s - 1 + s) to the left.
        """
        D, m = self.latent, x - self.noise**2 / 2
        root = (m.square() + 2 * D * self.noise**2).sqrt()
        peak = torch.where(m > 0, (root + m) / 2, D * self.noise**2 / (root - m)).log()
        least = self._integrand(peak, x) - _NATS
        ends = []
        for far in (peak - 1 - 2 * _NATS / D, peak + math.sqrt(4 * _NATS / D)):
            near = peak
            for _ in range(40):
                middle = (near + far) / 2
                counts = self._integrand(middle, x) > least
                near, far = torch.where(counts, middle, near), torch.where(counts, far, middle)
            ends.append(far)
        return ends[0], ends[1]
