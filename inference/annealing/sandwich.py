r"""Log p(x) from both sides: importance weighting and annealing, each with a bound from below and one from above.

.. math::
    \mathbb{E} \log \frac{1}{K} \sum_k w_k \le \log p(x) \le
    \mathbb{E} \log \frac{1}{K} \Big( w(z^*) + \sum_{k=2}^{K} w_k \Big), \qquad
    \mathbb{E} \log \frac{1}{C} \sum_c w_c \le \log p(x) \le
    -\mathbb{E} \log \frac{1}{C} \sum_c \frac{1}{\tilde w_c}, \qquad z^* \sim p(z \mid x)

with annealed weights w_c that run from the start to the posterior, and reversed ones that run from z* back to it.
"""

from __future__ import annotations

__all__ = ["sandwich"]

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from jensen.kernel.batches import Data, Device, as_tensors, expect_rows, placed, running
from jensen.kernel.randomness import forked_rng
from jensen.kernel.simulation import simulate
from jensen.kernel.weights import Program, check_pair, log_weights, terms

from ..exact.log_evidence import exact_evidence
from ..measure.bounds import check_sites, log_weight_of
from ..measure.diagnostics import RunningWeights
from .ais import check_settings, plan_rows
from .annealing import Path, Start, anneal, temperatures_of, tune
from .brackets import Bracket, Sandwich
from .rejection import posterior_draws


def sandwich(
    model: Program,
    guide: Program,
    n: int = 200,
    *,
    data: Data | None = None,
    covariates: tuple[Tensor, ...] = (),
    particles: int = 1000,
    chains: int = 16,
    temperatures: int | Sequence[float] | Tensor = 100,
    schedule: str = "sigmoid",
    leapfrog: int = 2,
    pilot: int = 16,
    start: Start = "prior",
    seed: int | None = None,
    chunk_size: int = 2**14,
    device: Device = None,
    progress: bool = True,
) -> Sandwich:
    r"""Bounds on log p(x) from below and above, of importance weighting and of annealing, per datum.

    A bound from above needs a draw z* from the posterior of each datum. Data that the model draws come with one: the
    latents that made them. For given data it is drawn by rejection from a grid, where the latent space has one or two
    coordinates.

    Importance weighting puts z* in the place of one of its K draws. Annealing runs C chains from z* back to the start,
    through the transitions of the run forward, with its frozen step sizes, from last to first. Where both bounds of one
    kind meet, log p(x) of these data is known. Where they stay apart, the weights vary too much, or z* comes from where
    the guide does not go.

    References:
        Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.
        Sobolev and Vetrov (2019), Importance Weighted Hierarchical Variational Inference.
        Wu, Burda, Salakhutdinov and Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.

    Args:
        model: a Pyro model; without ``data`` it draws them, called as ``model(None, *covariates, n=n)``.
        guide: its guide, which knows log q of a given value.
        n: the number N of data to draw from the model; not used with ``data``.
        data: given data, a tensor [N, ...] or a tuple of such tensors, with the covariates; None draws them.
        covariates: what model and guide read beside the x that is drawn, tensors whose first dimension is N.
        particles: the number K of draws from the guide per datum, at least 2.
        chains: the number C of chains of each datum, forward and as many backward, at least 2.
        temperatures: as for :func:`~jensen.inference.ais`; likewise ``schedule``, ``leapfrog``, ``pilot``, ``start``.
        schedule: how temperatures are spread, ``"sigmoid"`` or ``"linear"``.
        leapfrog: leapfrog steps of a transition.
        pilot: how many chains the pilot run has.
        start: where annealing starts, ``"prior"`` or ``"guide"``; from the prior it owes nothing to the guide.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        chunk_size: how many (datum, chain) or (datum, particle) pairs are run at once.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Sandwich`.

    Raises:
        ValueError: for settings that make no sense; given data together with covariates, or with more than two latent
            coordinates; and on what :func:`~jensen.inference.ais` and :func:`~jensen.inference.simulate` name.
        NotImplementedError: if the guide does not know log q of a given value.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> found = sandwich(model, ExactPosterior(model), n=20, start="guide", seed=0, progress=False)
        >>> bool(found.annealed.width.abs().max() < 1e-9), bool(found.weighted.width.abs().max() < 1e-9)
        (True, True)
    """
    betas = temperatures_of(temperatures, schedule)
    check_settings(guide, chains, leapfrog, pilot, start)
    if particles < 2:
        raise ValueError(f"particles is the number of draws from the guide, at least 2, but got {particles}")
    if data is not None and covariates:
        raise ValueError(
            "covariates belong to data that the model draws; give data as a tuple (x, *covariates) instead"
        )
    origin = guide if start == "guide" else None
    weighted: list[Bracket] = []
    annealed: list[Bracket] = []
    exact: list[Tensor] = []
    above: list[float] = []
    with running(model, guide, seed=seed, device=device):
        latents = None
        if data is None:
            others = placed(covariates, device, None) if covariates else ()
            latents, x = simulate(model, n, *others)
            tensors = (x, *others)
        else:
            tensors = placed(as_tensors(data), device, None)
        rows = plan_rows(model, guide, tensors, max(1, min(256, chunk_size // chains)))
        for first in tqdm(range(0, len(tensors[0]), rows), disable=not progress, desc="sandwich"):
            batch = tuple(x[first : first + rows] for x in tensors)
            layout = check_pair(model, guide, *batch)
            expect_rows(layout, len(batch[0]))
            path = Path(model, origin, batch, layout.nesting)
            if latents is None:
                prior = Path(model, None, batch, layout.nesting)
                found = posterior_draws(prior.draw(4096), prior.log_joint)
                true = {site: z[0] for site, z in path.coordinates.values(found.u)[0].items()}
                above.append(found.above)
            else:
                true = {site: z[first : first + rows] for site, z in latents.items()}
            with forked_rng():
                check_sites(true, terms(model, guide, *batch).q)
            block = max(1, chunk_size // len(batch[0]))
            weighted.append(_weighted(model, guide, true, batch, particles, block, layout.nesting))
            tuning, _ = tune(path, betas, leapfrog, pilot)
            forward, _ = anneal(path, path.draw(chains), betas, tuning, leapfrog)
            back, _ = anneal(path, path.at(true, chains), betas, tuning, leapfrog, backwards=True)
            annealed.append(_annealed(forward, back))
            known = exact_evidence(model, batch)
            exact += [] if known is None else [known.cpu()]
    return Sandwich(
        weighted=Bracket.joined(weighted),
        annealed=Bracket.joined(annealed),
        exact=torch.cat(exact) if exact else None,
        particles=particles,
        chains=chains,
        temperatures=len(betas) - 1,
        start=start,
        drawn=data is None,
        above=max(above, default=0.0),
    )


def _weighted(
    model: Program,
    guide: Program,
    true: Mapping[str, Tensor],
    batch: tuple[Tensor, ...],
    particles: int,
    block: int,
    nesting: int,
) -> Bracket:
    """The importance-weighted bounds of a batch."""
    every, rest = RunningWeights(particles), RunningWeights(particles - 1)  # rest: all but the first
    for done in range(0, particles, block):
        log_w = log_weights(
            model, guide, *batch, particles=min(block, particles - done), max_plate_nesting=nesting
        ).detach()
        every.update(log_w)
        if done or len(log_w) > 1:
            rest.update(log_w if done else log_w[1:])
    others = rest.log_evidence + math.log(particles - 1)  # log of their sum
    upper = torch.logaddexp(others, log_weight_of(model, guide, true, batch).to(others.device))
    return Bracket(
        lower=every.log_evidence.cpu(),
        lower_error=every.standard_error.cpu(),
        upper=(upper - math.log(particles)).cpu(),
        upper_error=(rest.standard_error * (others - upper).exp()).cpu(),
    )


def _annealed(forward: Tensor, back: Tensor) -> Bracket:
    """The bounds of annealed log weights, forward [C, N] and reversed [C, N]."""
    moments = []
    for log_w in (forward, -back):
        moments.append(RunningWeights(len(log_w)))
        moments[-1].update(log_w)
    there, inverse = moments
    return Bracket(
        lower=there.log_evidence.cpu(),
        lower_error=there.standard_error.cpu(),
        upper=-inverse.log_evidence.cpu(),
        upper_error=inverse.standard_error.cpu(),
    )
