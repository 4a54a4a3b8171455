"""Importance-weighted bounds against the number of particles: lower bounds; upper ones if the latents are known."""

from __future__ import annotations

__all__ = ["Bounds", "bounds", "check_latents", "check_sites", "log_weight_of"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.batches import Data, Transform, as_tensors, placed, stream
from jensen.kernel.modes import running
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Program, log_joint
from jensen.results.records import Record
from jensen.results.standard_errors import standard_error_of_mean
from jensen.results.tables import Table, decimals, digits_of, with_error

from ..exact.log_evidence import cheap_evidence
from .diagnostics import RunningWeights


@dataclass(frozen=True, eq=False, repr=False)
class Bounds(Record):
    """Importance-weighted bounds against K, averaged over the data; made by :func:`bounds`.

    Attributes:
        particles: the numbers of particles, ascending.
        mean: the bound at each, nats per data point.
        error: its Monte Carlo standard error, one for each K (the data are the same); from the spread of the blocks of
            particles, by the delta method for the last; NaN for a single particle.
        exact: mean exact log p(x) if the model has it, or if a sum or an integral over its latents needs at most
            ``particles`` evaluations of log p(x, z); else None.
        upper: the upper bound at each, nats per data point; None unless the latents that generated the data are given.
        upper_error: its standard error: that of its difference to the largest lower bound over the data, and the Monte
            Carlo error of this bound. It excludes the error of log p(x), which both share. NaN for a single data point.
        route: the method for particles, such as ``"outer plate"``.

    Example:
        >>> b = Bounds([1, 2], torch.tensor([-2.5, -2.2]), torch.tensor([0.1, 0.1]), exact=-2.0)
        >>> dict(zip(b.particles, b.mean.tolist()))[1]
        -2.5
        >>> print(b)
        bounds on log p(x), nats per data point ± standard error
        particles         lower bound
        -----------------------------
        1                -2.50 ± 0.10
        2                -2.20 ± 0.10
        log p(x), exact  -2.00
    """

    particles: list[int]
    mean: Tensor
    error: Tensor
    exact: float | None
    upper: Tensor | None = None
    upper_error: Tensor | None = None
    route: str = ""

    def _columns(self) -> tuple[str, list[int], dict[str, Tensor]]:
        return "particles", self.particles, self._tensors()

    def _table(self) -> Table:
        sides = [("lower bound", self.mean, self.error)]
        if self.upper is not None and self.upper_error is not None:
            sides.append(("upper bound", self.upper, self.upper_error))
        values = [(mean.tolist(), error.tolist()) for _, mean, error in sides]
        rows = [[str(k), *(with_error(m[i], e[i]) for m, e in values)] for i, k in enumerate(self.particles)]
        exact = [("log p(x), exact", decimals(self.exact, digits_of(float(self.error[-1]))))]
        head = "bounds on log p(x), nats per data point ± standard error"
        return Table(head, ("particles", *(name for name, *_ in sides)), rows, exact if self.exact is not None else ())


@checked
def bounds(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 4096,
    *,
    latents: Mapping[str, Tensor] | None = None,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Bounds:
    r"""Importance-weighted bounds at K' = 1, 2, 4, ..., K from one set of K particles.

    .. math:: \mathcal{L}_{K'} = \mathbb{E} \log \frac{1}{K'} \sum_{k=1}^{K'} w_k

    The bound at K' is the mean over the K / K' blocks of particles, so bounds at different K' share their noise, and by
    Jensen's inequality they increase with K' in the sample, not only in expectation.

    For data sampled from the model the values z* that generated them are known; given x, they are samples from
    p(z | x). If z* replaces one of the particles, the same average is an upper bound on log p(x), and decreases:

    .. math::
        \mathcal{U}_{K'} = \mathbb{E} \log \frac{1}{K'} \Big( w(z^*) + \sum_{k=2}^{K'} w_k \Big) \ge \log p(x),
        \qquad z^* \sim p(z \mid x)

    A guide that misses a part of the posterior cannot detect this: its samples never reach that part. Values z* do, and
    the upper bound stays far away.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, theorem 1.
        https://arxiv.org/abs/1509.00519
        Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.
        Sobolev and Vetrov (2019), Importance Weighted Hierarchical Variational Inference: the upper bound.
        https://arxiv.org/abs/1909.03290

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the largest K, a power of two.
        latents: the latent values that generated the data, [N, *event] by site, as :func:`~jensen.inference.simulate`
            returns them; the result then has ``upper``. It cannot be checked that they belong to the data. None
            for real data.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Bounds`.

    Raises:
        ValueError: if ``particles`` is not a power of two, or the weights are joint; for latents of another length, or
            together with a ``batch_transform``, and for a guide that samples other sites (an auxiliary site has
            no true value); and the errors of :func:`~jensen.inference.log_weights`.
        NotImplementedError: if the guide cannot compute log q of the latents.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> b = bounds(model, PriorGuide(model), torch.randn(20, 5), particles=64, progress=False)
        >>> b.particles, bool((b.mean.diff() >= 0).all())
        ([1, 2, 4, 8, 16, 32, 64], True)
        >>> from jensen.inference import simulate
        >>> latents, x = simulate(model, 1000)
        >>> b = bounds(model, PriorGuide(model), x, particles=64, latents=latents, progress=False)
        >>> bool(b.mean[-1] < b.exact < b.upper[-1])
        True
    """
    if particles < 1 or particles & (particles - 1):
        raise ValueError(f"bounds needs a power of two as its largest number of particles, but got {particles}")
    tensors = as_tensors(data)
    n = len(tensors[0])
    if latents is not None:
        check_latents(latents, n, batch_transform)
    sizes = [2**i for i in range(particles.bit_length())]
    means, squares = torch.zeros(2, len(sizes), dtype=torch.float64, device="cpu")
    upper: list[Tensor] = []
    lower: list[Tensor] = []
    with running(model, guide, "bounds", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        how: dict[str, Any] = {"at_once": 2**15, "together": particles, "progress": progress, "seed": seed}
        for part in stream(model, guide, tensors, "bounds", **how):
            if latents is not None and not part.first:
                with forked_rng():  # the lower bounds use the same samples as without latents
                    check_sites(latents, part.pair.terms(part.data, 1).q)
            log_w = part.pair.log_weights(part.data, particles).double().cpu()  # [K, n]
            for i, size in enumerate(sizes):
                blocks = log_w.unflatten(0, (particles // size, size)).logsumexp(1) - math.log(size)  # [K / K', n]
                means[i] += blocks.mean(0).sum()
                squares[i] += _block_variance(blocks, log_w).sum()
            if latents is not None:
                values = {site: z[part.rows].to(part.data[0].device) for site, z in latents.items()}
                upper.append(_upper(log_w, log_weight_of(part.pair.model, part.pair.guide, values, part.data), sizes))
                lower.append(log_w.logsumexp(0) - math.log(particles))
        known = cheap_evidence(model, tensors, budget=particles, rows=part.size, joint=False)
    exact = None if known is None else float(known.mean())
    curve = Bounds(sizes, means / n, squares.sqrt() / n, exact, route=part.pair.way)
    if latents is None:
        return curve
    above, below = torch.cat(upper, 1), torch.cat(lower)  # [sizes, N], [N]
    apart = torch.tensor([standard_error_of_mean(row) for row in above - below], dtype=torch.float64, device="cpu")
    shared = curve.error[-1].nan_to_num(0.0)  # the sampling noise of both sides cancels in their difference
    return replace(curve, upper=above.mean(1), upper_error=torch.hypot(apart, shared))


def _upper(log_w: Tensor, log_w_true: Tensor, sizes: list[int]) -> Tensor:
    """The upper bound of each data point; the true weight [n] replaces the first of each block: [sizes, n]."""
    rows = []
    for size in sizes:
        blocks = log_w.unflatten(0, (len(log_w) // size, size)).clone()  # [K / K', K', n]
        blocks[:, 0] = log_w_true
        rows.append(blocks.logsumexp(1).mean(0) - math.log(size))
    return torch.stack(rows)


def log_weight_of(model: Program, guide: Program, values: Mapping[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
    """Log p(x, z) - log q(z | x) at given values of shape [n, *event]: float64 [n]."""
    one = {site: z.unsqueeze(0) for site, z in values.items()}  # K = 1
    try:
        log_q = log_joint(guide, one, *data)  # a guide's joint density is its log q
    except (KeyError, NotImplementedError) as error:
        raise NotImplementedError(
            "an upper bound needs log q(z | x) at the latents that generated the data, but the guide can compute it "
            f"for its own samples only ({error})"
        ) from error
    return (log_joint(model, one, *data) - log_q).squeeze(0).double().cpu()


def check_latents(latents: Mapping[str, Tensor], n: int, transform: Transform | None = None) -> None:
    """Raise ValueError unless latents have a value for each of ``n`` data points, and no transform is given."""
    lengths = {site: len(z) for site, z in latents.items()}
    if not latents or set(lengths.values()) != {n}:
        raise ValueError(
            f"latents must hold one row per data point ({n}) by site, but have lengths {lengths}: use data and latents "
            "from one call of jensen.inference.simulate"
        )
    if transform is not None:
        raise ValueError("latents belong to the untransformed data: omit batch_transform, or the latents")


def check_sites(latents: Mapping[str, Tensor], drawn: Mapping[str, object]) -> None:
    """Raise ValueError if the guide samples other sites than those with given latent values."""
    if extra := sorted(set(drawn) - set(latents)):
        raise ValueError(
            f"the guide samples {extra}, but latents hold values only for {sorted(latents)}: an auxiliary site (of "
            "Joint, Laplace, an AutoGuide) has no true value, and without it log q(z | x) of the other sites is "
            "unknown; use a guide that samples the model's sites directly, as Amortized does"
        )
    if unknown := sorted(set(latents) - set(drawn)):
        raise ValueError(f"latents hold values for {unknown}, but the guide samples only {sorted(drawn)}")


def _block_variance(blocks: Tensor, log_w: Tensor) -> Tensor:
    """Monte Carlo variance of the mean over blocks, per data point; by the delta method for one block: [n]."""
    if len(blocks) > 1:
        return blocks.var(0) / len(blocks)
    running = RunningWeights(len(log_w))
    running.update(log_w)
    return running.standard_error.square()
