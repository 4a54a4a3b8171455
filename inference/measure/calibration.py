r"""Simulation-based calibration: the rank of the true latent values among a guide's samples.

.. math::
    z^*_n \sim p(z), \quad x_n \sim p(x \mid z^*_n), \quad z_{1n}, \dots, z_{Ln} \sim q(z \mid x_n), \qquad
    r_{nd} = \#\{l : z_{lnd} < z^*_{nd}\} \in \{0, \dots, L\}

Given x, the true z is a sample from p(z | x). If q(z | x) equals that posterior, the true value and the samples are
L + 1 samples of one distribution, and every rank is equally likely.

The test of uniformity is, for each feature, with B bins of ranks and E_b expected data points in bin b,

.. math::
    \chi^2 = \sum_b \frac{(n_b - E_b)^2}{E_b}, \qquad
    p = \Gamma\left(\frac{B - 1}{2}, \frac{\chi^2}{2}\right) / \Gamma\left(\frac{B - 1}{2}\right)

A central interval contains the L + 1 - 2a ranks from a to L - a, so its level is exactly 1 - 2a / (L + 1).
"""

from __future__ import annotations

__all__ = ["Calibration", "calibrate"]

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.arguments import check_tensors
from jensen.kernel.batches import Data, Device, as_tensors, placed, stream
from jensen.kernel.modes import running
from jensen.kernel.parameters import is_autoguide
from jensen.kernel.simulation import simulate
from jensen.kernel.weights import Program
from jensen.results.records import Record
from jensen.results.standard_errors import standard_error_of_mean
from jensen.results.tables import Table, decimals, digits_of, with_error

_ALPHA = 0.01  # below it a corrected p-value counts as significant


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Record):
    """The result of :func:`~jensen.inference.calibrate`. F is the number of features of all sites together.

    Attributes:
        ranks: by site, the rank of the true value among the guide's samples, int64 [N, features of the site], 0 to L.
        draws: L.
        route: the method for parallel samples, such as ``"outer plate"``.

    Example:
        >>> uniform = Calibration({"z": torch.arange(1000).unsqueeze(-1) % 20}, draws=19)
        >>> uniform.p_value, uniform.levels == uniform.coverage.squeeze(-1).tolist()
        (1.0, True)
    """

    ranks: dict[str, Tensor]
    draws: int
    route: str = ""

    @property
    def pooled(self) -> Tensor:
        """The ranks of all sites in one tensor: int64 [N, F]."""
        return torch.cat(list(self.ranks.values()), dim=1)

    @property
    def features(self) -> list[str]:
        """The names of the F features: ``z[0]``, ``z[1]``, ...; ``z`` if the site has only one."""
        sizes = {site: ranks.shape[1] for site, ranks in self.ranks.items()}
        return [site if size == 1 else f"{site}[{d}]" for site, size in sizes.items() for d in range(size)]

    @property
    def edges(self) -> Tensor:
        """The bins of the test: bin b has the ranks from ``edges[b]`` to ``edges[b + 1] - 1``; int64 [B + 1].

        At most 20 bins (deviations are smooth), as equal as L + 1 ranks allow, with about 20 data points or more each.
        """
        bins = min(20, len(self.pooled) // 20, self.draws + 1)
        return torch.arange(bins + 1, device="cpu") * (self.draws + 1) // bins

    @property
    def counts(self) -> Tensor:
        """The number of data points with their rank in each bin: [B, F]."""
        of_rank = torch.bucketize(self.pooled, self.edges[1:], right=True)  # [N, F]
        return torch.nn.functional.one_hot(of_rank, len(self.edges) - 1).sum(0).T

    @property
    def expected(self) -> Tensor:
        """The expected number of data points per bin if ranks are uniform: float64 [B]."""
        return self.edges.diff().double() * len(self.pooled) / (self.draws + 1)

    @property
    def statistic(self) -> Tensor:
        """The chi-square statistic of uniformity, with B - 1 degrees of freedom, of each feature: float64 [F]."""
        expected = self.expected.unsqueeze(-1)
        squares: Tensor = (self.counts - expected).square() / expected  # [B, F]
        return squares.sum(0)

    @property
    def p_values(self) -> Tensor:
        """The probability of at least this statistic under uniform ranks, of each feature, uncorrected: float64 [F]."""
        half = torch.tensor((len(self.edges) - 2) / 2, dtype=torch.float64, device="cpu")
        p: Tensor = torch.special.gammaincc(half, self.statistic / 2)
        return p

    @property
    def p_value(self) -> float:
        """F times the smallest p-value, at most 1: Bonferroni's correction, valid for dependent features too."""
        return min(1.0, len(self.features) * float(self.p_values.min()))

    @property
    def levels(self) -> list[float]:
        """The levels of the central intervals: 50, 80, 90 and 95 %, or slightly above, as the L + 1 ranks allow."""
        return [1 - 2 * tail / (self.draws + 1) for tail in self._tails]

    @property
    def coverage(self) -> Tensor:
        """The share of data points whose true value lies in the guide's central interval: float64 [levels, F]."""
        return self._inside.double().mean(1)

    @property
    def coverage_error(self) -> Tensor:
        """The binomial standard error of ``coverage`` if the guide is calibrated: float64 [levels]."""
        level = torch.tensor(self.levels, dtype=torch.float64, device="cpu")
        return (level * (1 - level) / len(self.pooled)).sqrt()

    @property
    def _tails(self) -> list[int]:
        """How many ranks each level excludes at either end."""
        tails = (max(1, (100 - level) * (self.draws + 1) // 200) for level in (50, 80, 90, 95))
        return sorted(set(tails), reverse=True)

    @property
    def _inside(self) -> Tensor:
        """Whether the true value lies in the central interval: bool [levels, N, F]."""
        ranks = self.pooled
        return torch.stack([(ranks >= tail) & (ranks <= self.draws - tail) for tail in self._tails])

    def shapes(self) -> dict[str, str]:
        """The kind of miscalibration of each feature whose corrected p-value is below 0.01.

        If the last bin at one end has too many ranks, but neither its neighbour nor the other end has, that end is
        named. Else the larger of two scores decides: the distance of the mean rank from the middle, and the difference
        of the mean squared distance from the middle to that of uniform ranks, both in standard errors.
        """
        n, ranks = self.pooled.shape[0], self.draws + 1
        u = (self.pooled.double() + 0.5) / ranks - 0.5  # [N, F]
        variance = (1 - ranks**-2) / 12
        slope = u.mean(0) / math.sqrt(variance / n)
        spread = (u.square().mean(0) - variance) / math.sqrt(1 / 180 / n)  # 1/180: the variance of a uniform u^2
        share = self.expected[[0, -1]].unsqueeze(-1) / n
        ends = (self.counts[[0, -1]] / n - share) / (share * (1 - share) / n).sqrt()  # [2, F]
        beside = self.counts[[1, -2]] <= 1.5 * self.expected[[1, -2]].unsqueeze(-1)  # [2, F], no excess next to the end
        scores = zip(slope.tolist(), spread.tolist(), *ends.tolist(), *beside.tolist(), strict=True)
        rows = zip(self.features, self.p_values.tolist(), scores, strict=True)
        return {name: _shape(*of) for name, p, of in rows if p * len(self.features) < _ALPHA}

    @property
    def shift(self) -> Tensor:
        """Distance of the mean rank from the middle, in ranges of the ranks: float64 [F]; 0.1 is a third of a sd.

        If positive, the guide's values are too low. Its standard error is 0.29 / sqrt(N) if the guide is calibrated.
        """
        return (self.pooled.double().mean(0) + 0.5) / (self.draws + 1) - 0.5

    def effects(self) -> str:
        """The size of the deviations, in words, which the p-value does not show."""
        i = min(range(len(self.levels)), key=lambda j: abs(self.levels[j] - 0.9))
        s, n = self.summary(), len(self.pooled)
        cover, error = 100 * s["coverage"][i], 100 * s["coverage_error"][i]
        worst = int(self.shift.abs().argmax())
        return (
            f"{100 * self.levels[i]:.3g} % intervals cover {with_error(cover, error)} % of the true values"
            f"{' (mean over features)' if len(self.features) > 1 else ''}; the mean rank differs from the middle by "
            f"{with_error(float(self.shift[worst]), 1 / math.sqrt(12 * n))} of its range at {self.features[worst]}"
            f"{', the largest shift' if len(self.features) > 1 else ''}."
        )

    def verdict(self) -> str:
        """Whether the test detects miscalibration, and of which kind."""
        p = f"p = {self.p_value:.2g}" if self.p_value > 1e-12 else "p < 1e-12"
        test = p + (f", corrected for {len(self.features)} features" if len(self.features) > 1 else "")
        shapes = self.shapes()
        if not shapes:
            weak = " There is some evidence against it: p is below 5 %." if self.p_value < 0.05 else ""
            return (
                f"No miscalibration detected at the 1 % level ({test}); this does not show that q is accurate (the "
                f"prior passes too), nor that it is calibrated: {self.effects()}{weak}"
            )
        by_shape: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            by_shape.setdefault(shape, []).append(name)
        listed = "; ".join(f"{shape} at {_listed(names)}" for shape, names in by_shape.items())
        return f"Not calibrated ({test}). The guide is {listed}. {self.effects()}"

    def summary(self) -> dict[str, Any]:
        """The test and the coverage averaged over features, with its standard error over the data."""
        per_datum = self._inside.double().mean(2)  # [levels, N]
        return {
            "n": len(self.pooled),
            "draws": self.draws,
            "features": len(self.features),
            "bins": len(self.edges) - 1,
            "p_value": self.p_value,
            "levels": self.levels,
            "coverage": per_datum.mean(1).tolist(),
            "coverage_error": [standard_error_of_mean(values) for values in per_datum],
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, the verdict, each feature, the ranks."""
        columns = (self.statistic.tolist(), self.p_values.tolist(), self.coverage.T.tolist())
        rows = zip(self.features, *columns, strict=True)
        return {
            "summary": self.summary(),
            "verdict": self.verdict(),
            "per_feature": {name: {"statistic": s, "p_value": p, "coverage": c} for name, s, p, c in rows},
            "ranks": {site: ranks.tolist() for site, ranks in self.ranks.items()},
        }

    def _columns(self) -> tuple[str, list[str], dict[str, Any]]:
        columns = {f"coverage_{100 * level:.3g}": of for level, of in zip(self.levels, self.coverage, strict=True)}
        return "feature", self.features, {"statistic": self.statistic, "p_value": self.p_values, **columns}

    def _table(self) -> Table:
        s, shown = self.summary(), self.p_values.argsort()[:20].sort().values.tolist()
        coverage, names = self.coverage.T, self.features
        digits = digits_of(max(self.coverage_error.tolist()))
        levels = [f"{100 * level:.3g} %" for level in self.levels]

        def shares(values: list[float]) -> list[str]:
            return [decimals(value, digits) for value in values]

        rows = [
            *([names[i], f"{self.p_values[i]:.2g}", *shares(coverage[i].tolist())] for i in shown),
            ["mean over features", "", *shares(s["coverage"])],
            ["  its standard error", "", *shares(s["coverage_error"])],
            ["± for one feature", "", *shares(self.coverage_error.tolist())],
        ]
        head = f"{s['n']} data points from the model, {s['draws']} guide samples each, ranks in {s['bins']} bins"
        if len(shown) < len(names):
            head += f"; the {len(shown)} of {len(names)} features with the smallest p"
        return Table(head, ("coverage of intervals", "p", *levels), rows, notes=[self.verdict()])


def _shape(slope: float, spread: float, lowest: float, highest: float, low_alone: bool, high_alone: bool) -> str:
    """In words, from the scores of :meth:`Calibration.shapes`."""
    for side, end, alone, other in (("lower", lowest, low_alone, highest), ("upper", highest, high_alone, lowest)):
        if end > 4 and alone and other < 2:
            return f"too short on the {side} side (too many ranks at that end only)"
    if max(abs(slope), abs(spread)) < 3:
        return "wrong in another way (ranks neither sloped, U-shaped nor humped)"
    if abs(slope) > abs(spread):
        return f"biased, too {'low' if slope > 0 else 'high'} (sloping ranks)"
    return "too narrow (U-shaped ranks)" if spread > 0 else "too wide (hump-shaped ranks)"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@checked
def calibrate(
    model: Program,
    guide: Program,
    n: int = 500,
    draws: int = 99,
    *,
    data: Data | None = None,
    covariates: Data = (),
    seed: int | None = None,
    chunk_size: int = 4096,
    device: Device = None,
    progress: bool = True,
) -> Calibration:
    r"""Simulation-based calibration of an amortized guide, on data sampled from its model.

    .. math:: q = p(z \mid x) \quad\Rightarrow\quad P(r_{nd} = r) = \frac{1}{L + 1}, \qquad r = 0, \dots, L

    Too many ranks at both ends mean that the guide is too narrow, in the middle too wide, at one end biased. Ties,
    as in discrete sites, are broken at random. Neither data nor an exact posterior are needed.

    Uniform ranks are necessary, not sufficient. They hold for each feature alone and on average over data from the
    model. They do not detect a guide that learns too little (the prior is calibrated: see its ELBO), wrong
    correlations between features, errors at some x that cancel with others, or errors on real data unlike the
    model's.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration. https://arxiv.org/abs/1804.06788
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference.

    Args:
        model: a Pyro model that samples its data, called as ``model(None, *covariates, n=n)``; with an example any Pyro
            model, called as ``model(*data)``.
        guide: its guide, called with the sampled data, ``guide(x, *covariates)``, or ``guide(*data)``.
        n: the number N of data points, at least 100.
        draws: the number L of guide samples per data point, at least 19. The levels of the intervals are exact
            multiples of 2 / (L + 1): 199 gives 50, 80, 90 and 95 %; 99 gives 96 % instead of 95.
        data: an example of the data, as for :func:`~jensen.inference.simulate`: its observed values are sampled
            again, the rest are covariates.
        covariates: the arguments of model and guide beside x, a tensor or a tuple of tensors whose first dimension is
            N; not used with an example.
        seed: makes data and samples reproducible, with a random stream of its own; None uses the user's stream.
        chunk_size: how many (data point, sample) combinations are run at once.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Calibration`.

    Raises:
        ValueError: for fewer data points or samples than that, covariates of another length or beside an example, a
            guide that is a point estimate or holds values for given data, joint weights; and the errors of
            :func:`~jensen.inference.simulate` and :func:`~jensen.inference.log_weights`.
        TypeError: if the model cannot sample data.
        FloatingPointError: if a true value or a sample is not finite.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> calibration = calibrate(model, ExactPosterior(model), seed=0, progress=False)
        >>> calibration.ranks["z"].shape, calibration.p_value > 0.01, calibration.levels
        (torch.Size([500, 2]), True, [0.5, 0.8, 0.9, 0.96])
    """
    if n < 100 or draws < 19:
        raise ValueError(
            "calibrate needs n of at least 100 data points (20 in each of 5 bins) and draws of at least 19 (5 % per "
            f"tail), but got n={n} and draws={draws}"
        )
    covariates = (covariates,) if isinstance(covariates, Tensor) else covariates
    check_tensors(covariates)
    if other := [list(x.shape) for x in covariates if x.shape[:1] != (n,)]:
        raise ValueError(f"covariates need one row for each of the n={n} data points, but one has shape {other[0]}")
    if data is not None and covariates:
        raise ValueError("covariates are part of an example: give all arguments of the model in data")
    if is_autoguide(guide):
        raise ValueError(
            f"{type(guide).__name__} holds a value for each data point of its training and does not read the data, but "
            "calibration samples new data: use a guide that reads them (jensen.guides.amortize)"
        )
    parts: list[dict[str, Tensor]] = []
    with running(model, guide, "calibrate", seed=seed, device=device):
        true, drawn = _drawn(model, n, covariates, data, device)
        how: dict[str, Any] = {"at_once": chunk_size, "together": draws, "progress": progress, "seed": seed}
        for part in stream(model, guide, drawn, "calibrate", **how):
            t = part.pair.terms(part.data, draws)
            known = {site: z[part.rows] for site, z in true.items() if site in t.q}
            parts.append({site: _ranks(site, z, t.values[site]) for site, z in known.items()})
    if not parts[0]:
        raise ValueError("the guide samples no latent site of the model, so there is nothing to calibrate")
    return Calibration({site: torch.cat([part[site] for part in parts]) for site in parts[0]}, draws, part.pair.way)


def _drawn(
    model: Program, n: int, covariates: tuple[Tensor, ...], data: Data | None, device: Device
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Latent values by site, and the data generated from them."""
    if data is not None:
        return simulate(model, n, data=placed(as_tensors(data), device, None))
    others = placed(covariates, device, None) if covariates else ()
    true, x = simulate(model, n, *others)
    return true, (x, *others)


def _ranks(site: str, true: Tensor, drawn: Tensor) -> Tensor:
    """Ranks of true values [N, *event] among samples [L, N, *event], ties broken at random: int64 [N, features]."""
    true = true.flatten(1) if true.dim() > 1 else true.unsqueeze(-1)  # [N, features]
    drawn = drawn.reshape(-1, *true.shape)
    if not (true.isfinite().all() and drawn.isfinite().all()):
        raise FloatingPointError(f"true values or samples at site '{site}' are NaN or infinite: check the parameters")
    below, ties = (drawn < true).sum(0).cpu(), (drawn == true).sum(0).cpu()
    return below + (torch.rand(ties.shape, dtype=torch.float64, device="cpu") * (ties + 1)).long()
