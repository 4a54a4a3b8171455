"""Importance-weighted bounds against the number of particles."""

from __future__ import annotations

__all__ = ["Bounds", "bounds"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .diagnostics import RunningWeights
from .exact import exact_evidence
from .inputs import Data, Transform, as_tensors, expect_rows, placed, plan, running
from .weights import Program, check_pair, log_weights


@dataclass(frozen=True, eq=False)
class Bounds:
    """Importance-weighted bounds against K, averaged over the data; made by :func:`bounds`.

    Attributes:
        particles: the numbers of particles, ascending.
        mean: the bound at each, nats per datum.
        error: its Monte Carlo standard error, one for each K (the data are the same); from the spread of the blocks of
            the draw, by the delta method for the last; NaN for a single particle.
        exact: mean exact log p(x) where the model knows it, else None.

    Example:
        >>> b = Bounds([1, 2], torch.tensor([-2.5, -2.2]), torch.tensor([0.1, 0.1]), exact=-2.0)
        >>> dict(zip(b.particles, b.mean.tolist()))[1]
        -2.5
    """

    particles: list[int]
    mean: Tensor
    error: Tensor
    exact: float | None


def bounds(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 4096,
    *,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Bounds:
    r"""Importance-weighted bounds at K' = 1, 2, 4, ..., K from one draw of K particles.

    .. math:: \mathcal{L}_{K'} = \mathbb{E} \log \frac{1}{K'} \sum_{k=1}^{K'} w_k

    The bound at K' is the mean over the K / K' blocks of the draw, so bounds at different K' share their noise, and by
    Jensen's inequality they rise with K' in the sample, not only in expectation.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, theorem 1.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the largest K, a power of two.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Bounds`.

    Raises:
        ValueError: if ``particles`` is not a power of two, or the weights are joint; and on what
            :func:`~jensen.inference.log_weights` names.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> b = bounds(model, PriorGuide(model), torch.randn(20, 5), particles=64, progress=False)
        >>> b.particles, bool((b.mean.diff() >= 0).all())
        ([1, 2, 4, 8, 16, 32, 64], True)
    """
    if particles < 1 or particles & (particles - 1):
        raise ValueError(f"bounds needs a power of two as its largest number of particles, but got {particles}")
    tensors = as_tensors(data)
    n = len(tensors[0])
    sizes = [2**i for i in range(particles.bit_length())]
    means, squares = torch.zeros(len(sizes)).double(), torch.zeros(len(sizes)).double()
    exact: list[Tensor] = []
    with running(model, guide, seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        separate, rows = plan(model, guide, tensors, max(1, 2**15 // particles))
        if not separate:
            raise ValueError("bounds averages over data, but the weights of this pair are joint (a global latent)")
        for start in tqdm(range(0, n, rows), disable=not progress, desc="bounds"):
            batch = tuple(x[start : start + rows] for x in tensors)
            expect_rows(check_pair(model, guide, *batch), len(batch[0]))
            log_w = log_weights(model, guide, *batch, particles=particles).double().cpu()  # [K, n]
            for i, size in enumerate(sizes):
                blocks = log_w.unflatten(0, (particles // size, size)).logsumexp(1) - math.log(size)  # [K / K', n]
                means[i] += blocks.mean(0).sum()
                squares[i] += _block_variance(blocks, log_w).sum()
            known = exact_evidence(model, batch)
            exact += [] if known is None else [known.cpu()]
    return Bounds(sizes, means / n, squares.sqrt() / n, float(torch.cat(exact).mean()) if exact else None)


def _block_variance(blocks: Tensor, log_w: Tensor) -> Tensor:
    """Monte Carlo variance of the mean over blocks, per datum; by the delta method where there is one block: [n]."""
    if len(blocks) > 1:
        return blocks.var(0) / len(blocks)
    running = RunningWeights(len(log_w))
    running.update(log_w)
    return running.standard_error.square()
