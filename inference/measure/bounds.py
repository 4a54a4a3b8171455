"""Importance-weighted bounds against the number of particles: from below; from above where latents are known."""

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
        mean: the bound at each, nats per datum.
        error: its Monte Carlo standard error, one for each K (the data are the same); from the spread of the blocks of
            the draw, by the delta method for the last; NaN for a single particle.
        exact: mean exact log p(x) where the model knows it, or a sum or an integral over its latents takes no more
            evaluations of log p(x, z) than particles; else None.
        upper: the upper bound at each, nats per datum; None unless the latents that made the data were given.
        upper_error: its standard error: that of the difference to the largest lower bound over the data, and the Monte
            Carlo error of this bound. Log p(x) of these data, which both share, is not in it. NaN for a single datum.
        route: the way that particles are run: ``"outer plate"``, say.

    Example:
        >>> b = Bounds([1, 2], torch.tensor([-2.5, -2.2]), torch.tensor([0.1, 0.1]), exact=-2.0)
        >>> dict(zip(b.particles, b.mean.tolist()))[1]
        -2.5
        >>> print(b)
        bounds on log p(x), nats per datum ± their standard error
        particles          from below
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
        sides = [("from below", self.mean, self.error)]
        if self.upper is not None and self.upper_error is not None:
            sides.append(("from above", self.upper, self.upper_error))
        values = [(mean.tolist(), error.tolist()) for _, mean, error in sides]
        rows = [[str(k), *(with_error(m[i], e[i]) for m, e in values)] for i, k in enumerate(self.particles)]
        exact = [("log p(x), exact", decimals(self.exact, digits_of(float(self.error[-1]))))]
        head = "bounds on log p(x), nats per datum ± their standard error"
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
    r"""Importance-weighted bounds at K' = 1, 2, 4, ..., K from one draw of K particles.

    .. math:: \mathcal{L}_{K'} = \mathbb{E} \log \frac{1}{K'} \sum_{k=1}^{K'} w_k

    The bound at K' is the mean over the K / K' blocks of the draw, so bounds at different K' share their noise, and by
    Jensen's inequality they rise with K' in the sample, not only in expectation.

    For data that the model drew itself the values z* that made them are known, and given x they are draws from
    p(z | x). With z* in the place of one of the particles the same average bounds log p(x) from above, and falls:

    .. math::
        \mathcal{U}_{K'} = \mathbb{E} \log \frac{1}{K'} \Big( w(z^*) + \sum_{k=2}^{K'} w_k \Big) \ge \log p(x),
        \qquad z^* \sim p(z \mid x)

    A guide that misses a part of the posterior cannot know it: its own draws never come from there. A z* does, and the
    upper bound stays far away.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, theorem 1.
        https://arxiv.org/abs/1509.00519
        Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.
        Sobolev and Vetrov (2019), Importance Weighted Hierarchical Variational Inference: the bound from above.
        https://arxiv.org/abs/1909.03290

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the largest K, a power of two.
        latents: the latent values that made the data, [N, *event] by site, as :func:`~jensen.inference.simulate`
            returns them; the result then has its ``upper`` half. Nothing can tell whether they belong to the data. None
            for real data.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Bounds`.

    Raises:
        ValueError: if ``particles`` is not a power of two, or the weights are joint; for latents of another length, or
            together with a ``batch_transform``, and for a guide that draws other sites than these (an auxiliary site
            has no true value); and on what :func:`~jensen.inference.log_weights` names.
        NotImplementedError: if the guide does not know log q of the latents.

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
    means, squares = torch.zeros(len(sizes)).double(), torch.zeros(len(sizes)).double()
    upper: list[Tensor] = []
    lower: list[Tensor] = []
    with running(model, guide, "bounds", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        how: dict[str, Any] = {"at_once": 2**15, "together": particles, "progress": progress, "seed": seed}
        for part in stream(model, guide, tensors, "bounds", **how):
            if latents is not None and not part.first:
                with forked_rng():  # the draws from below are those without latents
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
    apart = torch.tensor([standard_error_of_mean(row) for row in above - below], dtype=torch.float64)
    shared = curve.error[-1].nan_to_num(0.0)  # the noise of the draw, which both sides have, is not in their difference
    return replace(curve, upper=above.mean(1), upper_error=torch.hypot(apart, shared))


def _upper(log_w: Tensor, log_w_true: Tensor, sizes: list[int]) -> Tensor:
    """The upper bound of each datum, the true weight [n] in the place of the first of each block: [sizes, n]."""
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
            f"an upper bound needs log q(z | x) at the latents that made the data, but the guide knows it for its own "
            f"draws only ({error})"
        ) from error
    return (log_joint(model, one, *data) - log_q).squeeze(0).double().cpu()


def check_latents(latents: Mapping[str, Tensor], n: int, transform: Transform | None = None) -> None:
    """Raise ValueError unless latents are values for each of ``n`` data, which nothing transforms."""
    lengths = {site: len(z) for site, z in latents.items()}
    if not latents or set(lengths.values()) != {n}:
        raise ValueError(
            f"latents are the values that made the {n} data, a row for each by site, but have lengths {lengths}: take "
            "both from one call of jensen.inference.simulate"
        )
    if transform is not None:
        raise ValueError("latents made the data as they are: leave batch_transform out, or the latents")


def check_sites(latents: Mapping[str, Tensor], drawn: Mapping[str, object]) -> None:
    """Raise ValueError if the guide draws other sites than those that latent values are given for."""
    if extra := sorted(set(drawn) - set(latents)):
        raise ValueError(
            f"the guide draws {extra}, for which latents hold no value, only for {sorted(latents)}: an auxiliary site "
            "(of Joint, Laplace, an AutoGuide) has no true value, and without it log q(z | x) of the others is not "
            "known; take a guide that draws the model's sites directly, as Amortized does"
        )
    if unknown := sorted(set(latents) - set(drawn)):
        raise ValueError(f"latents hold values for {unknown}, but the guide draws only {sorted(drawn)}")


def _block_variance(blocks: Tensor, log_w: Tensor) -> Tensor:
    """Monte Carlo variance of the mean over blocks, per datum; by the delta method where there is one block: [n]."""
    if len(blocks) > 1:
        return blocks.var(0) / len(blocks)
    running = RunningWeights(len(log_w))
    running.update(log_w)
    return running.standard_error.square()
