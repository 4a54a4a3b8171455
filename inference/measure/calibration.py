r"""Simulation-based calibration: where the latent values that made the data lie among a guide's draws.

.. math::
    z^*_n \sim p(z), \quad x_n \sim p(x \mid z^*_n), \quad z_{1n}, \dots, z_{Ln} \sim q(z \mid x_n), \qquad
    r_{nd} = \#\{l : z_{lnd} < z^*_{nd}\} \in \{0, \dots, L\}

Given x, the true z is a draw from p(z | x). If q(z | x) is that posterior, true value and draws are L + 1 draws of one
distribution, and every rank is equally likely.
"""

from __future__ import annotations

__all__ = ["calibrate"]

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from jensen.kernel.batches import Data, Device, expect_rows, placed, running
from jensen.kernel.layout import Layout
from jensen.kernel.simulation import simulate
from jensen.kernel.weights import Program, check_pair, terms

from .ranks import Calibration


def calibrate(
    model: Program,
    guide: Program,
    n: int = 500,
    draws: int = 99,
    *,
    covariates: Data = (),
    seed: int | None = None,
    chunk_size: int = 4096,
    device: Device = None,
    progress: bool = True,
) -> Calibration:
    r"""Simulation-based calibration of an amortized guide, on data drawn from its model.

    .. math:: q = p(z \mid x) \quad\Rightarrow\quad P(r_{nd} = r) = \frac{1}{L + 1}, \qquad r = 0, \dots, L

    Ranks that pile up at both ends say that the guide is too narrow, in the middle too wide, at one end biased. Ties,
    as discrete sites have them, are broken at random. No data are asked for, and no exact posterior.

    Uniform ranks are necessary, not sufficient. They hold for each feature alone and on average over the model's own
    data. They do not show a guide that learns too little, if it is honest about it (the prior is calibrated: see its
    ELBO), wrong correlations between features, errors at some x that cancel at others, nor what the guide does on real
    data that the model would not draw.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration.
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference.

    Args:
        model: a Pyro model that draws its data, called as ``model(None, *covariates, n=n)``.
        guide: its guide, called with what the model drew, ``guide(x, *covariates)``.
        n: the number N of data, at least 100.
        draws: the number L of draws from the guide for each datum, at least 19. The levels of the intervals are
            multiples of 2 / (L + 1), exactly: 199 has 50, 80, 90 and 95 %; 99 has 96 % in the place of 95.
        covariates: what model and guide read beside x, a tensor or a tuple of tensors whose first dimension is N.
        seed: makes data and draws repeatable and leaves the user's random stream alone; None draws from that stream.
        chunk_size: how many (datum, draw) pairs are run at once.
        device: where to run; modules and covariates are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Calibration`.

    Raises:
        ValueError: for fewer data or draws than that, covariates of another length, a guide that is a point, one that
            holds values for given data, joint weights; and on what :func:`~jensen.inference.simulate` and
            :func:`~jensen.inference.log_weights` name.
        TypeError: if the model cannot draw data.
        FloatingPointError: if a true value or a draw is not finite.

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
            f"calibrate needs n of at least 100 data (20 in each of 5 bins) and at least 19 draws (5 % in each tail), "
            f"but got n={n} and draws={draws}"
        )
    covariates = (covariates,) if isinstance(covariates, Tensor) else covariates
    if {len(x) for x in covariates} - {n}:
        raise ValueError(f"covariates need a row for each of the n={n} data, but have {[len(x) for x in covariates]}")
    if isinstance(guide, AutoGuide):
        raise ValueError(
            f"{type(guide).__name__} holds a value for each datum that it was trained on and does not read the data, "
            "but calibration draws new ones: take a guide that reads them (jensen.guides.amortize)"
        )
    parts: list[dict[str, Tensor]] = []
    rows = max(1, chunk_size // draws)
    with running(model, guide, seed=seed, device=device), tqdm(total=n, disable=not progress, desc="calibrate") as bar:
        for start in range(0, n, rows):
            others = placed((x[start : start + rows] for x in covariates), device, None) if covariates else ()
            size = min(rows, n - start)
            true, x = simulate(model, size, *others)
            layout = check_pair(model, guide, x, *others)
            _check_layout(layout, size)
            t = terms(model, guide, x, *others, particles=draws, max_plate_nesting=layout.nesting)
            parts.append({site: _ranks(site, true[site], t.values[site]) for site in true if site in t.q})
            bar.update(size)
    if not parts[0]:
        raise ValueError("the guide draws no latent site of the model, so there is nothing to calibrate")
    return Calibration({site: torch.cat([part[site] for part in parts]) for site in parts[0]}, draws)


def _check_layout(layout: Layout, rows: int) -> None:
    if layout.points:
        raise ValueError(
            f"the guide is a point estimate at {list(layout.points)} (Delta): it has no width to be calibrated; take a "
            "guide with a density"
        )
    if not layout.sizes:
        raise ValueError(
            "the weights of this pair are joint, so its guide draws no value for each datum: open the model's plate "
            "over the data around every site of the guide (a global latent cannot be calibrated on one data set)"
        )
    expect_rows(layout, rows)


def _ranks(site: str, true: Tensor, drawn: Tensor) -> Tensor:
    """Ranks of true values [N, *event] among draws [L, N, *event], ties broken at random: int64 [N, features]."""
    true = true.flatten(1) if true.dim() > 1 else true.unsqueeze(-1)  # [N, features]
    drawn = drawn.reshape(-1, *true.shape)
    if not (true.isfinite().all() and drawn.isfinite().all()):
        raise FloatingPointError(f"true values or draws at site '{site}' are NaN or infinite: look at the parameters")
    below, ties = (drawn < true).sum(0).cpu(), (drawn == true).sum(0).cpu()
    return below + (torch.rand(ties.shape, dtype=torch.float64) * (ties + 1)).long()
