r"""Two latent features and one number seen: models whose posterior is curved, and whose evidence is known.

.. math:: z \sim \mathcal{N}(0, I_2), \qquad x \mid z \sim \mathcal{N}(f(z), \sigma^2)

| model | f(z) | its level sets, along which the posterior lies | p(x) |
| --- | --- | --- | --- |
| Banana | z_2 + b z_1^2 | parabolas | an integral over z_1 alone |
| Ring | z_1^2 + z_2^2 | circles of radius sqrt(x) | closed form |

There is nothing to learn in them: they show what a guide loses of log p(x) to a posterior that is not Gaussian.
"""

from __future__ import annotations

__all__ = ["Banana", "Ring"]

import math

import pyro
import torch
from pyro.distributions import Normal
from torch import Size, Tensor

from jensen.module import UniqueModule

from .base import check_width, data_plate
from .priors import StandardNormal

_POINTS = 128  # of the trapezoidal rule; half as many give the same digits
_NATS = 40.0  # how far below its maximum the integrand is followed: e^-40 is lost in float64


class _Curved(UniqueModule):
    """What the two share: the prior, the noise, one number seen. A member says what f(z) is."""

    def __init__(self, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise ValueError(f"noise is a positive standard deviation, but got {noise}")
        super().__init__()
        self.noise = float(noise)
        self.prior = StandardNormal(2)
        self.latents = {"z": Size((2,))}
        self.event_shape = Size((1,))

    def location(self, z: Tensor) -> Tensor:
        """f(z), the mean of x given z: [..., 2] to [...]."""
        raise NotImplementedError

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, 1], or draws ``n`` data."""
        with data_plate(x, self.event_shape, n, type(self).__name__):
            z = pyro.sample("z", self.prior())  # [N, 2]
            loc = self.location(z).unsqueeze(-1)  # [N, 1]
            return pyro.sample("x", Normal(loc, self.noise).to_event(1), obs=x)


class Banana(_Curved):
    r"""A Gaussian seen through a parabola: the posterior is a banana, and breaks in two where x is large.

    .. math::
        z \sim \mathcal{N}(0, I_2), \qquad x \mid z \sim \mathcal{N}(z_2 + b z_1^2, \sigma^2), \qquad
        p(x) = \int \mathcal{N}(z_1; 0, 1) \, \mathcal{N}(x; b z_1^2, 1 + \sigma^2) \, dz_1

    E x = b and var x = 1 + 2 b^2 + sigma^2. With b = 0 the model is linear and p(x) Gaussian. The integral is taken by
    the trapezoidal rule over the region that counts for the datum, in float64, and is exact up to rounding: the
    integrand is smooth and dies off at both ends.

    References:
        Haario, Saksman and Tamminen (1999), Adaptive Proposal Distribution for Random Walk Metropolis Algorithm.
        Trefethen and Weideman (2014), The Exponentially Convergent Trapezoidal Rule.

    Args:
        curvature: b, the bend of the parabola: the sign says which way.
        noise: sigma, the standard deviation of x given z: the thickness of the banana.

    Raises:
        ValueError: if ``curvature`` is not finite, or ``noise`` not positive and finite.

    Example:
        >>> model = Banana()
        >>> x = model(n=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    def __init__(self, curvature: float = 0.5, noise: float = 0.25) -> None:
        if not math.isfinite(curvature):
            raise ValueError(f"curvature is a finite number, but got {curvature}")
        super().__init__(noise)
        self.curvature = float(curvature)

    def location(self, z: Tensor) -> Tensor:
        """z_2 + b z_1^2, the mean of x given z: [..., 2] to [...]."""
        loc: Tensor = z[..., 1] + self.curvature * z[..., 0].square()
        return loc

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, 1], in nats, by quadrature in float64: [N], in the precision of ``x``."""
        check_width(x, self.event_shape, "Banana")
        return torch.cat([self._integral(part) for part in x.split(2**14)]).to(x.dtype)

    def _integral(self, x: Tensor) -> Tensor:
        x = x.double()
        low, high = self._support(x)  # [N, 1]
        steps = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device=x.device)
        z = low + (high - low) * steps  # [N, P]
        likelihood = Normal(self.curvature * z.square(), math.sqrt(1 + self.noise**2))
        integrand: Tensor = Normal(0.0, 1.0).log_prob(z) + likelihood.log_prob(x)
        integrand[:, [0, -1]] -= math.log(2)  # the ends count half
        step = (high - low).squeeze(-1) / (_POINTS - 1)
        return integrand.logsumexp(-1) + (2 * step).log()  # twice, since z_1 and -z_1 are alike

    def _support(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and largest z_1 >= 0 that count, each [N, 1]: the integrand is e^-(A w^2 + B w), w = z_1^2."""
        variance = 1 + self.noise**2
        a = x.new_tensor(self.curvature**2 / (2 * variance))
        b = 0.5 - self.curvature * x / variance
        peak, radius = -b / (2 * a), (_NATS / a).sqrt()  # where B < 0: a parabola about a positive w
        falling = 2 * _NATS / (b + (b.square() + 4 * a * _NATS).sqrt())  # where it falls from w = 0 on
        low = torch.where(b < 0, (peak - radius).clamp_min(0), 0.0)
        return low.sqrt(), torch.where(b < 0, peak + radius, falling).sqrt()


class Ring(_Curved):
    r"""A Gaussian of which only the squared length is seen: the posterior is a ring, and a blob where x is small.

    .. math::
        z \sim \mathcal{N}(0, I_2), \qquad x \mid z \sim \mathcal{N}(|z|^2, \sigma^2), \qquad
        \log p(x) = \frac{\sigma^2}{8} - \frac{x}{2} - \log 2 + \log \Phi\left(\frac{x - \sigma^2 / 2}{\sigma}\right)

    with Phi the standard normal distribution function: the squared length is exponential with mean 2, so x is
    exponentially modified Gaussian, with E x = 2 and var x = 4 + sigma^2. A Gaussian guide sits on one side of the
    ring, or fills it.

    References:
        Rezende and Mohamed (2015), Variational Inference with Normalizing Flows: the ring among their potentials.
        Grushka (1972), Characterization of Exponentially Modified Gaussian Peaks in Chromatography.

    Args:
        noise: sigma, the standard deviation of x given z: the ring is about sigma / (2 sqrt(x)) thick.

    Raises:
        ValueError: if ``noise`` is not positive and finite.

    Example:
        >>> model = Ring()
        >>> x = model(n=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    def __init__(self, noise: float = 0.5) -> None:
        super().__init__(noise)

    def location(self, z: Tensor) -> Tensor:
        """|z|^2, the mean of x given z: [..., 2] to [...]."""
        return z.square().sum(-1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, 1], in nats, worked out in float64: [N], in the precision of ``x``."""
        check_width(x, self.event_shape, "Ring")
        t = x.squeeze(-1).double()
        tail: Tensor = torch.special.log_ndtr(t / self.noise - self.noise / 2)
        return (self.noise**2 / 8 - t / 2 - math.log(2) + tail).to(x.dtype)
