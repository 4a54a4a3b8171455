r"""Convergence of Markov chains and the information in their samples: R-hat and effective sample size.

Both are computed on ranks, to be robust to heavy tails, and on the halves of the chains, to detect a drift.
The ranks r of S samples, over all chains, become normal scores,

.. math:: u = \Phi^{-1}\left( \frac{r - 3/8}{S + 1/4} \right)
"""

from __future__ import annotations

__all__ = ["effective_sample_size", "plain_sample_size", "r_hat"]

import math

import torch
from pyro.ops.stats import effective_sample_size as geyer
from pyro.ops.stats import gelman_rubin
from torch import Tensor


def r_hat(draws: Tensor) -> Tensor:
    """Rank-normalized split R-hat, the larger one of the samples and of their distance from the median.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-Normalization, Folding, and Localization: An
        Improved R-hat for Assessing Convergence of MCMC.

    Args:
        draws: [C, S, ...], at least four samples per chain.

    Returns:
        Float64 [...]: 1 if all chains are alike; NaN if they never moved.

    Example:
        >>> chains = torch.randn(4, 500)
        >>> bool(r_hat(chains) < 1.02), bool(r_hat(chains + torch.arange(4.0).unsqueeze(-1)) > 1.5)
        (True, True)
    """
    halves = _halves(draws.double())  # [2 C, S / 2, ...]
    folded = (halves - halves.flatten(0, 1).quantile(0.5, 0)).abs()
    largest: Tensor = torch.maximum(gelman_rubin(_scores(halves)), gelman_rubin(_scores(folded)))
    return largest


def effective_sample_size(draws: Tensor) -> Tensor:
    """The number of independent samples with as much information about the posterior's bulk.

    Pyro's estimate (the initial monotone sequence of Geyer), for the normal scores of the ranks and the halves of the
    chains.

    References:
        Geyer (1992), Practical Markov Chain Monte Carlo.
        Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-Normalization, Folding, and Localization: An
        Improved R-hat for Assessing Convergence of MCMC.

    Args:
        draws: [C, S, ...], at least four samples per chain.

    Returns:
        Float64 [...], at most C S log10(C S); 0 if the chains never moved.

    Example:
        >>> bool(effective_sample_size(torch.randn(4, 500)) > 1000)
        True
    """
    return plain_sample_size(_scores(_halves(draws.double())))


def plain_sample_size(draws: Tensor) -> Tensor:
    """The effective sample size of the original samples [C, S, ...], for the error of their mean: float64 [...]."""
    draws = draws.double()
    total = draws.shape[0] * draws.shape[1]
    moved = draws.flatten(0, 1).std(0) > 0
    ess: Tensor = geyer(draws).nan_to_num(0.0).clamp(0.0, total * math.log10(total))
    return torch.where(moved, ess, 0.0)


def _halves(draws: Tensor) -> Tensor:
    """The first and the second half of each chain as separate chains; for an odd number the middle is omitted."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _scores(draws: Tensor) -> Tensor:
    """Normal scores of the ranks over all chains; equal samples share their mean rank."""
    flat = draws.flatten(0, 1).movedim(0, -1).contiguous()  # [..., C S]
    ordered = flat.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    rank = (below + up_to + 1).double() / 2
    scores: Tensor = torch.special.ndtri((rank - 0.375) / (flat.shape[-1] + 0.25))
    return scores.movedim(-1, 0).reshape(draws.shape)
