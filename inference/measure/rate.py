r"""The information in the latents: rate and distortion, active units, collapse.

.. math::
    \text{ELBO}_n = -\underbrace{\mathbb{E}_q[-\log p(x_n \mid z)]}_{\text{distortion}}
    - \underbrace{\text{KL}(q(z \mid x_n) \,\|\, p(z))}_{\text{rate}}
"""

from __future__ import annotations

__all__ = ["PosteriorCollapseWarning", "RateDistortion", "rate_distortion"]

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.batches import Data, Device, Transform, as_tensors, placed, stream
from jensen.kernel.caller import outside
from jensen.kernel.enumeration import sampled
from jensen.kernel.modes import running
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Program
from jensen.results.records import Measurement, Quantity
from jensen.results.standard_errors import mc_error
from jensen.results.tables import Table

_ACTIVE = 0.01  # variance over the data of a unit's posterior mean, as in Burda et al.


class PosteriorCollapseWarning(UserWarning):
    """No unit of a latent site distinguishes data points: the guide returns the prior for every input.

    Example:
        >>> issubclass(PosteriorCollapseWarning, UserWarning)
        True
    """


@dataclass(frozen=True, eq=False, repr=False)
class RateDistortion(Measurement):
    """The result of :func:`rate_distortion`. Tensors are float64, in nats; ``summary`` has bits.

    Attributes:
        rate: KL(q(z | x) || p(z)) of each data point, [N].
        rate_error: its Monte Carlo standard error, [N].
        distortion: the mean of -log p(x | z) under the guide, of each data point, [N].
        distortion_error: its Monte Carlo standard error, [N].
        activity: by site, the variance over the data of the posterior mean of each unit, [*event]; corrected for the
            Monte Carlo error of the means.
        activity_error: its standard error over the data, by site, [*event].
        features: the number of observed numbers in one data point.
        route: the method for particles, such as ``"outer plate"``.

    Example:
        >>> one = torch.ones(4)
        >>> unit = {"z": torch.tensor([0.9, 0.001])}
        >>> costs = RateDistortion(2 * one, 0 * one, 50 * one, 0 * one, unit, {"z": torch.zeros(2)}, features=64)
        >>> costs.active_units, round(costs.summary()["rate"], 3)
        ({'z': 1}, 2.885)
    """

    rate: Tensor
    rate_error: Tensor
    distortion: Tensor
    distortion_error: Tensor
    activity: dict[str, Tensor]
    activity_error: dict[str, Tensor]
    features: int
    route: str = ""

    @property
    def active_units(self) -> dict[str, int]:
        """The number of units of each site with an activity above 0.01."""
        return {site: int((values > _ACTIVE).sum()) for site, values in self.activity.items()}

    @property
    def collapsed(self) -> list[str]:
        """The sites without an active unit."""
        return [site for site, count in self.active_units.items() if not count]

    def _quantities(self) -> list[Quantity]:
        return [
            Quantity("rate", self.rate, "rate", mc_error(self.rate_error), unit="bits"),
            Quantity("rate_error", self.rate_error, in_summary=False),
            Quantity("distortion", self.distortion, "distortion", mc_error(self.distortion_error), unit="bits"),
            Quantity("distortion_error", self.distortion_error, in_summary=False),
            Quantity("active_units", self.active_units),
            Quantity("features", self.features),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per data point and unit."""
        return {**super().to_dict(), "activity": {site: values.tolist() for site, values in self.activity.items()}}

    def _table(self) -> Table:
        facts = [
            (f"active units of {site}", f"{count} of {self.activity[site].numel()}")
            for site, count in self.active_units.items()
        ]
        return self._summary_table(f"{len(self.rate)} data points, bits per data point", facts)


@checked
def rate_distortion(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 100,
    *,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    chunk_size: int = 4096,
    device: Device = None,
    progress: bool = True,
) -> RateDistortion:
    """Measure the rate of the latents, the distortion of the data, and which latents are active.

    References:
        Alemi et al. (2018), Fixing a Broken ELBO. https://arxiv.org/abs/1711.00464
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders: active units.
        https://arxiv.org/abs/1509.00519

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of samples per data point, at least 2.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once.
        chunk_size: how many (data point, particle) combinations are run at once.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`RateDistortion`.

    Raises:
        ValueError: for ``particles`` below 2, joint weights, and the errors of
            :func:`~jensen.inference.evaluate`.

    Warns:
        PosteriorCollapseWarning: if no unit of a latent site is active.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> result = rate_distortion(model, ExactPosterior(model), torch.randn(200, 5), seed=0, progress=False)
        >>> result.rate.shape, result.active_units
        (torch.Size([200]), {'z': 2})
    """
    if particles < 2:
        raise ValueError(f"particles is the number of samples from the guide, at least 2, but got {particles}")
    tensors = as_tensors(data)
    n = len(tensors[0])
    parts: list[tuple[Tensor, ...]] = []
    means: dict[str, list[Tensor]] = {}
    noise: dict[str, list[Tensor]] = {}
    with running(model, guide, "rate_distortion", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        how: dict[str, Any] = {"at_once": chunk_size, "together": particles, "progress": progress, "seed": seed}
        for part in stream(model, guide, tensors, "rate", **how):
            if part.layout.summed:  # with summed-out states, rate and distortion cannot be separated
                return rate_distortion(
                    model,
                    sampled(guide),
                    data,
                    particles,
                    seed=seed,
                    batch_transform=batch_transform,
                    chunk_size=chunk_size,
                    device=device,
                    progress=progress,
                )
            t = part.pair.terms(part.data, particles)
            parts.append(_moments(*_split(t)))
            for site in (name for name in t.p if name in t.q):
                z = t.values[site].double().cpu()  # [K, n, *event]
                means.setdefault(site, []).append(z.mean(0))
                noise.setdefault(site, []).append(z.var(0) / particles)
    rate, rate_error, distortion, distortion_error = (torch.cat(column) for column in zip(*parts, strict=True))
    activity, errors = {}, {}
    for site in means:
        mean = torch.cat(means[site])  # [N, *event]
        squared = (mean - mean.mean(0)).square()
        activity[site] = squared.sum(0) / max(n - 1, 1) - torch.cat(noise[site]).mean(0)
        errors[site] = squared.std(0) / math.sqrt(n)
    features = tensors[0][0].numel()
    result = RateDistortion(rate, rate_error, distortion, distortion_error, activity, errors, features, part.pair.way)
    if n > 1 and result.collapsed:
        warnings.warn(
            f"posterior collapse at {result.collapsed}: no unit's posterior mean varies over the data by more than "
            f"{_ACTIVE}; anneal beta, give free bits (jensen.inference.ELBO), or use a weaker likelihood",
            PosteriorCollapseWarning,
            stacklevel=outside(),
        )
    return result


def _split(t: Terms) -> tuple[Tensor, Tensor]:
    """Samples of the rate and of the distortion: [K, n]."""
    observed = t.observed.double().cpu()
    rate = sum(t.log_q.values()) - sum(t.log_p[name] for name in t.log_p if name in t.q)
    return torch.as_tensor(rate).double().cpu().expand(observed.shape), -observed


def _moments(rate: Tensor, distortion: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and Monte Carlo error of each: [n]."""
    root = math.sqrt(len(rate))
    return rate.mean(0), rate.std(0) / root, distortion.mean(0), distortion.std(0) / root
