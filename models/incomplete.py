r"""Maximum likelihood of linear-Gaussian models from data with missing values.

For models with independent noise, and with C components (C = 1: PPCA and factor analysis):

.. math::
    x_i \mid z, c \sim \mathcal{N}(\mu_{ci} + w_{ci}^\top z, s_{ci}^2), \qquad z \sim \mathcal{N}(0, I), \qquad
    p(x_o) = \sum_c \pi_c \, \mathcal{N}(x_o; \mu_{co}, W_{co} W_{co}^\top + \operatorname{diag}(s_{co})^2)

**E step.** With o the mask (1: observed), r the responsibilities and u = (z, 1), sums over the data points:

.. math::
    A_{ci} = \sum_n o_{ni} r_{nc} \operatorname{E}[u u^\top \mid x_n, c], \qquad
    b_{ci} = \sum_n o_{ni} r_{nc} x_{ni} \operatorname{E}[u \mid x_n, c]

which are products of the masks [X, N] with one array of the posteriors' moments, [N, C (D D + D + 1)].

**M step.** A regression of each feature on u:

.. math::
    (w_{ci}, \mu_{ci}) = A_{ci}^{-1} b_{ci}, \qquad
    s_{ci}^2 = \Big(\sum_n o_{ni} r_{nc} x_{ni}^2 - b_{ci}^\top A_{ci}^{-1} b_{ci}\Big) \Big/ \sum_n o_{ni} r_{nc}

The M step also fits the mean a_c and covariance K_c of z, and then transforms z to have mean 0 and covariance I again:
mu_c + W_c a_c and W_c K_c^{1/2} (parameter expansion). This is EM in a larger model with the same p(x), so it never
decreases the likelihood, but it needs fewer iterations: on 5,000 data points of ten features with half of the values
missing, 24 instead of 260. Extrapolation, where it increases the likelihood, saves more where EM is slow.

References:
    Tipping and Bishop (1999), Probabilistic Principal Component Analysis, section 4.
    https://www.jstor.org/stable/2680726
    Roweis (1998), EM Algorithms for PCA and SPCA. https://proceedings.neurips.cc/paper/1997
    Little and Rubin (2002), Statistical Analysis with Missing Data.
    Liu, Rubin and Wu (1998), Parameter Expansion to Accelerate EM: The PX-EM Algorithm.
    https://doi.org/10.1093/biomet/85.4.755
"""

from __future__ import annotations

__all__ = [
    "Parameters",
    "Sums",
    "check_observed",
    "climb",
    "expect",
    "fit_incomplete",
    "losses_of",
    "maximize",
    "observed_variance",
]

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .base import check_reals
from .conditioning import condition_values, in_blocks, split_observed


class HasLogEvidence(Protocol):
    def log_evidence(self, x: Tensor, /) -> Tensor: ...


class Parameters(NamedTuple):
    """Of C components.

    Attributes:
        logits: log pi, [C].
        mean: mu, [C, X].
        weight: W, [C, X, D].
        log_noise: log s, [C, X].
    """

    logits: Tensor
    mean: Tensor
    weight: Tensor
    log_noise: Tensor


class Sums(NamedTuple):
    """What the M step needs of the data.

    Attributes:
        log_likelihood: of the observed values, summed over the data points, [].
        latent: sum of r E[u u^T], [C, D + 1, D + 1].
        second: A, [C, X, D + 1, D + 1].
        cross: b, [C, X, D + 1].
        squares: sum of o r x^2, [C, X].
    """

    log_likelihood: Tensor
    latent: Tensor
    second: Tensor
    cross: Tensor
    squares: Tensor


def expect(x: Tensor, parameters: Parameters) -> Sums:
    """The E step: sums over the rows of ``x`` [N, X], NaN where it is missing."""
    logits, *linear = parameters
    C, X, D = parameters.weight.shape
    total = x.new_zeros(())
    latent, second = x.new_zeros(C * (D * D + D + 1)), x.new_zeros(X, C * (D * D + D + 1))
    cross, squares = x.new_zeros(X, C * (D + 1)), x.new_zeros(X, C)
    for rows in in_blocks(x, C * D * (D + 1)):
        values, observed = split_observed(rows)
        given = condition_values(values, observed, *linear)
        log_joint = logits.log_softmax(-1) + given.log_density  # [n, C]
        total += log_joint.logsumexp(-1).sum()
        share = log_joint.softmax(-1).unsqueeze(-1)
        both = torch.cat([given.root, given.mean.unsqueeze(-1)], -1)  # [n, C, D, D + 1]
        first = torch.cat([given.mean, torch.ones_like(share)], -1) * share  # r E[u], [n, C, D + 1]
        moments = torch.cat([(both @ both.mT).flatten(-2) * share, first], -1).flatten(1)
        latent += moments.sum(0)
        second += observed.T @ moments
        cross += values.T @ first.flatten(1)
        squares += values.square().T @ share.squeeze(-1)
    return Sums(
        total,
        _square(latent.unflatten(-1, (C, -1)), D),
        _square(second.unflatten(-1, (C, -1)), D).transpose(0, 1),
        cross.unflatten(-1, (C, -1)).transpose(0, 1),
        squares.T,
    )


def _square(packed: Tensor, D: int) -> Tensor:
    """Moments of z, then of z times 1, then of 1, [..., D D + D + 1], as symmetric matrices [..., D + 1, D + 1]."""
    first = packed[..., D * D :]  # [..., D + 1]
    top = torch.cat([packed[..., : D * D].unflatten(-1, (D, D)), first[..., :-1].unsqueeze(-1)], -1)
    return torch.cat([top, first.unsqueeze(-2)], -2)


def maximize(sums: Sums, before: Parameters, pool: Callable[[Tensor, Tensor], Tensor]) -> Parameters:
    """The M step.

    Args:
        sums: of the E step.
        before: the parameters, which a component keeps where nothing was observed of its data points.
        pool: the noise variances [C, X] from sums of squared residuals and numbers of observed values, both [C, X].
    """
    D = before.weight.shape[-1]
    counts = sums.second[..., -1, -1]  # [C, X]
    enough = counts > 1e-10
    eye = torch.eye(D + 1, dtype=counts.dtype, device=counts.device)
    second = torch.where(enough[..., None, None], sums.second, eye)
    best = torch.linalg.solve(second, sums.cross.unsqueeze(-1)).squeeze(-1)  # [C, X, D + 1]
    residual = sums.squares - (best * sums.cross).sum(-1)
    weight = torch.where(enough.unsqueeze(-1), best[..., :-1], before.weight)
    mean = torch.where(enough, best[..., -1], before.mean)
    rows = sums.latent[..., -1, -1]  # [C]
    moments = sums.latent / rows.clamp_min(1e-10)[..., None, None]
    shift = moments[..., :-1, -1]  # a, [C, D]
    spread = moments[..., :-1, :-1] - shift.unsqueeze(-1) * shift.unsqueeze(-2)
    spread = torch.where(rows[..., None, None] > 1e-10, spread, eye[:-1, :-1])
    return Parameters(
        rows.clamp_min(1e-300).log(),
        mean + (weight @ shift.unsqueeze(-1)).squeeze(-1),
        weight @ torch.linalg.cholesky(spread),
        pool(residual.clamp_min(0), counts).log() / 2,
    )


def fit_incomplete(
    x: Tensor,
    start: Parameters,
    pool: Callable[[Tensor, Tensor], Tensor],
    iterations: int,
    tolerance: float,
) -> Parameters:
    """EM from ``start``, until one iteration gains less than ``tolerance`` nats per data point."""
    shift = x.nanmean(0)  # a mean much larger than the deviations would lose them to rounding
    x = x - shift

    def step(now: Sequence[Tensor]) -> tuple[float, Callable[[], Parameters]]:
        sums = expect(x, parameters := Parameters(*now))
        return float(sums.log_likelihood) / len(x), lambda: maximize(sums, parameters, pool)

    def allowed(far: Sequence[Tensor]) -> Parameters:
        variance = (2 * Parameters(*far).log_noise).exp()
        return Parameters(*far)._replace(log_noise=pool(variance, torch.ones_like(variance)).log() / 2)

    best = Parameters(*ascend(start._replace(mean=start.mean - shift), step, allowed, iterations, tolerance))
    return best._replace(mean=best.mean + shift)


def ascend(
    start: Sequence[Tensor],
    step: Callable[[Sequence[Tensor]], tuple[float, Callable[[], Sequence[Tensor]]]],
    allowed: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    iterations: int,
    tolerance: float,
) -> Sequence[Tensor]:
    r"""Iterate EM with extrapolation (SQUAREM), and never accept a lower likelihood.

    From three successive iterates, with r the first difference and v the second one:

    .. math:: \theta' = \theta_0 + 2 \alpha r + \alpha^2 v, \qquad \alpha = |r| / |v|

    If the likelihood at it is below that of the second iterate, EM continues from the third one.

    Args:
        start: the parameters.
        step: the log-likelihood per data point at some parameters, and a function that gives the next ones.
        allowed: parameters near the given ones that the model allows.
        iterations: the maximal number of evaluations of the likelihood.
        tolerance: stop when one iteration gains less than this.

    References:
        Varadhan and Roland (2008), Simple and Globally Convergent Methods for Accelerating the Convergence of Any EM
        Algorithm. https://doi.org/10.1111/j.1467-9469.2007.00585.x
    """
    now, before, path = start, -math.inf, [start]
    third: Sequence[Tensor] | None = None  # the iterate to continue from, while ``now`` is extrapolated
    for _ in range(iterations):
        try:
            reached, following = step(now)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # extrapolated to where the covariance has no Cholesky factor
            if third is None:
                raise
            reached = -math.inf
        if third is not None and not reached >= before:
            now, path, third = third, [third], None
            continue
        third = None
        if not reached - before >= tolerance:
            break
        before, now = reached, following()
        path.append(now)
        if len(path) == 3:
            third, now = now, allowed(_extrapolated(*path))
            path = [now]
    return now if third is None else third


def _extrapolated(first: Sequence[Tensor], second: Sequence[Tensor], third: Sequence[Tensor]) -> Sequence[Tensor]:
    r = [b - a for a, b in zip(first, second, strict=True)]
    v = [c - b - d for b, c, d in zip(second, third, r, strict=True)]
    length = sum(d.square().sum() for d in r) / sum(d.square().sum() for d in v)
    alpha = torch.as_tensor(length).sqrt().nan_to_num(1.0, 1.0).clamp_min(1.0)  # 1: the third iterate
    return [a + 2 * alpha * d + alpha.square() * e for a, d, e in zip(first, r, v, strict=True)]


def climb(parameters: Iterable[Tensor], losses: Callable[[], Iterable[Tensor]], iterations: int) -> None:
    """Minimize the sum of ``losses()`` by L-BFGS; each loss is differentiated before the next one is computed.

    Raises:
        ValueError: where the noise becomes so small that a covariance has no Cholesky factor.
    """
    optimizer = torch.optim.LBFGS(
        list(parameters),
        max_iter=iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for part in losses():
            part.backward()
            total += part.detach().cpu()
        return total

    try:
        optimizer.step(loss)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            "L-BFGS found no maximum of the likelihood, because the noise became too small: use a smaller latent, more "
            "data points, or fit_em(x)"
        ) from error


def losses_of(model: HasLogEvidence, x: Tensor) -> Iterator[Tensor]:
    """Minus the mean of log p(x) over the rows of ``x``, in parts."""
    for rows in x.split(10_000):
        yield -model.log_evidence(rows).sum() / len(x)


def check_observed(x: Tensor, event_shape: Sequence[int], owner: str) -> Tensor:
    """The data in float64, where they can be fitted.

    Raises:
        ValueError: for data of another shape, fewer than two data points, infinite values, and a feature of which
            nothing was observed.
    """
    check_reals(x, event_shape, owner)
    if len(x) < 2:
        raise ValueError(f"{owner} needs at least two data points, but got x of shape {list(x.shape)}")
    if (infinite := x.isinf()).any():
        n, i = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"{owner} needs finite values (NaN marks a missing one), but x[{n}, {i}] is {x[n, i]:g}: "
            "remove or correct it"
        )
    if (empty := x.isnan().all(0)).any():
        places = empty.nonzero().flatten().tolist()
        more = len(places) - 1
        others = f" (and {more} other{'s' * (more > 1)})" * bool(more)
        raise ValueError(
            f"{owner} cannot be fitted to x[:, {places[0]}]{others}, which has no observed value: remove such features"
        )
    return x.double()


def observed_variance(x: Tensor) -> Tensor:
    """Variance of the observed values of each feature of ``x`` [N, X], divided by their number: [X]."""
    return (x - x.nanmean(0)).square().nanmean(0)
