r"""The distance of a guide's samples from the posterior's: mean, scale, energy distance, in units of the posterior.

With u sampled from the posterior, v from the guide, u' and v' likewise, all divided by a root of the posterior's
covariance,

.. math::
    H = \frac{2 \, \mathbb{E} |u - v| - \mathbb{E} |u - u'| - \mathbb{E} |v - v'|}{2 \, \mathbb{E} |u - v|}

lies between 0 and 1, and is 0 only if the two distributions are equal.
"""

from __future__ import annotations

__all__ = ["GuideDistance", "energy_coefficient", "measure_distance"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jensen.results.records import Record
from jensen.results.tables import Table, decimals, with_error

from .chains import plain_sample_size


@dataclass(frozen=True, eq=False, repr=False)
class GuideDistance(Record):
    r"""The distance of a guide's samples from those of the posterior, per data point, in unconstrained coordinates.

    The energy coefficient H is the energy distance of the samples, divided by its maximum. For two Gaussians of equal
    covariance whose means are s standard deviations apart, in D dimensions, it is about s^2 / (4 D). The estimate is
    unbiased except for the division, so it may be negative; its error includes the autocorrelation of the chains.

    References:
        Székely and Rizzo (2013), Energy Statistics: A Class of Statistics Based on Distances.
        https://doi.org/10.1016/j.jspi.2013.03.018

    Attributes:
        energy: H of each data point, float64 [N].
        energy_error: its Monte Carlo standard error, float64 [N].
        mean_error: the guide's mean minus the posterior's, in standard deviations of the posterior: float64 [N, F].
        mean_standard_error: its Monte Carlo standard error, float64 [N, F].
        scale_ratio: the guide's standard deviation divided by the posterior's: float64 [N, F].
        scale_standard_error: its Monte Carlo standard error, float64 [N, F].
        names: the names of the F coordinates.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import mcmc_posterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> posterior = mcmc_posterior(model, torch.randn(2, 5), method="rejection", seed=0, progress=False)
        >>> distance = posterior.distance(ExactPosterior(model), seed=0)
        >>> bool((distance.energy < 5 * distance.energy_error).all()), distance.scale_ratio.shape
        (True, torch.Size([2, 2]))
    """

    energy: Tensor
    energy_error: Tensor
    mean_error: Tensor
    mean_standard_error: Tensor
    scale_ratio: Tensor
    scale_standard_error: Tensor
    names: tuple[str, ...]

    def _columns(self) -> tuple[str, list[int], dict[str, Any]]:
        N, F = self.mean_error.shape
        tensors = self._tensors()
        of_coordinate = {name: v.flatten() for name, v in tensors.items() if v.dim() == 2}
        of_datum = {name: v.repeat_interleave(F) for name, v in tensors.items() if v.dim() == 1}
        datum = [i for i in range(N) for _ in range(F)]
        return "datum", datum, {"coordinate": list(self.names) * N, **of_coordinate, **of_datum}

    def _table(self) -> Table:
        rows = []
        for i, shift in enumerate(self.mean_error):
            worst = int(shift.abs().argmax())
            off = f"{decimals(float(shift[worst]), 2)} sd ({self.names[worst]})"
            scales = self.scale_ratio[i]
            wide = f"{decimals(float(scales.min()), 2)} to {decimals(float(scales.max()), 2)}"
            rows.append([str(i), with_error(float(self.energy[i]), float(self.energy_error[i])), off, wide])
        head = f"{len(self.energy)} data points, guide samples against posterior samples"
        columns = ("data point", "energy coefficient", "largest shift of the mean", "ratio of scales to posterior")
        return Table(head, columns, rows)


def measure_distance(posterior: Tensor, guide: Tensor, ess: Tensor, names: tuple[str, ...]) -> GuideDistance:
    """Compare samples for each data point.

    Args:
        posterior: unconstrained coordinates in their chains, [N, C, S, F].
        guide: independent samples, [N, M, F].
        ess: the effective sample size of the posterior's coordinates, [N, F].
        names: of the coordinates.
    """
    u, v = posterior.double().flatten(1, 2), guide.double()  # [N, C S, F], [N, M, F]
    spread, of_guide = u.std(1), v.std(1)
    ratio = of_guide / spread
    inverse = 1 / ess.clamp_min(1.0)
    pairs = [energy_coefficient(a, b, e) for a, b, e in zip(posterior.double(), v, ess, strict=True)]
    energy, energy_error = zip(*pairs, strict=True)
    of_log = (_excess(u) * inverse + _excess(v) / v.shape[1]).sqrt() / 2  # of log scales: (kurtosis - 1) / 4 n
    return GuideDistance(
        energy=torch.stack(energy),
        energy_error=torch.stack(energy_error),
        mean_error=(v.mean(1) - u.mean(1)) / spread,
        mean_standard_error=(inverse + ratio.square() / v.shape[1]).sqrt(),
        scale_ratio=ratio,
        scale_standard_error=ratio * of_log,
        names=names,
    )


def _excess(draws: Tensor) -> Tensor:
    """Kurtosis minus one of samples [N, S, F]: [N, F]."""
    away = draws - draws.mean(1, keepdim=True)
    return away.pow(4).mean(1) / away.square().mean(1).square() - 1


def energy_coefficient(posterior: Tensor, guide: Tensor, ess: Tensor) -> tuple[Tensor, Tensor]:
    r"""H of one data point, and its Monte Carlo standard error.

    Distances between samples of one chain are omitted if there are several chains: other chains are independent. The
    statistic has a linear part, whose variance depends on the effective sample size of the chains, and a quadratic one,
    the only one if the two distributions are equal. Its variance, with d the doubly centred distance, is

    .. math:: q = 2 \, (1 / \text{ess} + 1 / M)^2 \, \mathbb{E} \, \tilde d(v, v')^2

    and the estimated variance of the linear part is too large by 2 q. The error of the covariance that sets the
    units is not included.

    Args:
        posterior: coordinates in their chains, [C, S, F].
        guide: independent samples, [M, F].
        ess: the effective sample size of the coordinates, [F].
    """
    (C, S, F), M = posterior.shape, len(guide)
    root = torch.linalg.cholesky(torch.cov(posterior.flatten(0, 1).T).reshape(F, F))
    u, v = (torch.linalg.solve_triangular(root, part.reshape(-1, F).T, upper=False).T for part in (posterior, guide))
    across, among, within = torch.cdist(u, v), torch.cdist(v, v), torch.cdist(u, u)
    of_u, of_v = within.sum(1) / (C * S - 1), among.sum(1) / (M - 1)  # mean distance of each sample to its own kind
    inside = within.reshape(C, S, C, S).diagonal(dim1=0, dim2=2).sum()  # of pairs in one chain
    between = (within.sum() - inside) / (C * (C - 1) * S**2) if C > 1 else of_u.mean()
    apart = across.mean()
    coefficient = 1 - (between + of_v.mean()) / (2 * apart)
    scale = 2 * apart
    slope_u = 2 * ((1 - coefficient) * across.mean(1) - of_u) / scale  # the linear parts, of H
    slope_v = 2 * ((1 - coefficient) * across.mean(0) - of_v) / scale
    worth = plain_sample_size(slope_u.reshape(C, S)).clamp(1.0, C * S)
    linear = slope_u.var() / worth + slope_v.var() / M
    centred = among - among.mean(0) - among.mean(1, keepdim=True) + among.mean()
    fewest = ess.min().clamp(1.0, C * S)
    quadratic = 2 * (1 / fewest + 1 / M).square() * centred.square().mean() / scale.square()
    return coefficient, torch.maximum(linear - quadratic, quadratic).sqrt()
