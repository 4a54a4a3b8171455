r"""The measurement: ELBO, importance-weighted log p(x), exact value, per datum, each with its error.

.. math::
    \text{ELBO}_n = \frac{1}{K} \sum_k \log w_{kn}, \qquad
    \widehat{\log p}(x_n) = \log \frac{1}{K} \sum_k w_{kn}, \qquad
    \text{gap}_n = \log p(x_n) - \text{ELBO}_n
"""

from __future__ import annotations

__all__ = ["Evidence", "evaluate"]

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .diagnostics import RunningWeights
from .exact import cheap_evidence
from .inputs import Data, Transform, as_tensors, expect_rows, placed, plan, running
from .text import decimals, percent, standard_error_of_mean
from .weights import Program, check_pair, log_weights


@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
    """What :func:`evaluate` measured. Tensors are per datum, [N], float64, in nats.

    Joint weights (a global latent) speak of all data at once: tensors are [1].

    Attributes:
        elbo: mean log weight.
        elbo_error: its Monte Carlo standard error.
        log_evidence: importance-weighted estimate of log p(x).
        standard_error: its Monte Carlo standard error (delta method); trust it where k-hat is below 0.7.
        ess: effective sample size of the K weights.
        pareto_k: Pareto k-hat of the weights.
        exact: log p(x) where the model knows it, or where a sum or an integral over the latents takes no more
            evaluations of log p(x, z) per datum than particles; else None.
        particles: K.
        features: the number of observed numbers in one datum (in all data, for joint weights).
        joint: whether the weights are joint.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(20, 5).double()
        >>> evidence = evaluate(model, ExactPosterior(model), x, particles=100, progress=False)
        >>> torch.allclose(evidence.log_evidence, evidence.exact), float(evidence.gap.abs().max()) < 1e-10
        (True, True)
    """

    elbo: Tensor
    elbo_error: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    exact: Tensor | None
    particles: int
    features: int
    joint: bool = False

    @property
    def best(self) -> Tensor:
        """Log p(x): exact where it is known, else the importance-weighted estimate: [N]."""
        return self.log_evidence if self.exact is None else self.exact

    @property
    def gap(self) -> Tensor:
        """Log p(x) minus ELBO, with the exact log p(x) where it is known: [N]."""
        return self.best - self.elbo

    def summary(self) -> dict[str, float | int | None]:
        """Means over the data with their errors.

        ``*_data_error`` is the standard error over the data set (how much the mean would move with other data),
        ``log_evidence_mc_error`` the Monte Carlo error of the mean (how much with other particles), ``unreliable`` the
        share of data whose k-hat is not below 0.7.
        """
        return {
            "n": len(self.elbo),
            "particles": self.particles,
            "elbo": _mean(self.elbo),
            "elbo_data_error": standard_error_of_mean(self.elbo),
            "log_evidence": _mean(self.log_evidence),
            "log_evidence_data_error": standard_error_of_mean(self.log_evidence),
            "log_evidence_mc_error": float(self.standard_error.square().sum().sqrt()) / len(self.elbo),
            "exact": None if self.exact is None else _mean(self.exact),
            "gap": _mean(self.gap),
            "gap_data_error": standard_error_of_mean(self.gap),
            "ess": _mean(self.ess),
            "unreliable": float((~(self.pareto_k <= 0.7)).double().mean()) if self.particles >= 25 else None,
        }

    def bits_per_dimension(self, offset: float = 0.0) -> float:
        """Mean of -log2 p(x) per observed number, plus ``offset``.

        Args:
            offset: log2 of the number of grey levels, for data dequantized to [0, 1]: it turns the density of the
                scaled data into that of the levels.
        """
        return -_mean(self.best) / (self.features * math.log(2)) + offset

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per datum."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        per_datum = {k: v.tolist() for k, v in values.items() if isinstance(v, Tensor)}
        return {"summary": self.summary(), "per_datum": per_datum, "features": self.features}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        s = self.summary()
        over = "± {}  over the data".format
        rows = [
            ("ELBO", decimals(s["elbo"]), over(decimals(s["elbo_data_error"]))),
            (
                "log p(x), importance-weighted",
                decimals(s["log_evidence"]),
                over(decimals(s["log_evidence_data_error"])),
            ),
            ("  its Monte Carlo error", decimals(s["log_evidence_mc_error"]), ""),
            ("log p(x), exact", decimals(s["exact"]), ""),
            ("gap = log p(x) - ELBO", decimals(s["gap"]), over(decimals(s["gap_data_error"]))),
            ("effective sample size, mean", decimals(s["ess"], 1), f"of {self.particles}"),
            ("data with k-hat > 0.7", percent(s["unreliable"]), ""),
        ]
        what = "all data jointly" if self.joint else f"{s['n']} data"
        head = f"{what}, {self.particles} particles each, nats" + ("" if self.joint else " per datum")
        return "\n".join([head, *(f"{name:31s}{value:>10s}  {note}".rstrip() for name, value, note in rows)])

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def evaluate(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 5000,
    *,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    chunk_size: int = 4096,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Measure a pair: per datum, the ELBO, an importance-weighted estimate of log p(x), and whether to trust it.

    Weights are streamed in chunks of data and particles and reduced in float64. Memory does not grow with K, but for
    the 3 sqrt(K) largest weights of the data in hand, nor with N, but for the results. (Joint weights, and guides that
    hold a value for each datum, are run on all data at once.) Parameters are not touched; modules are in evaluation
    mode meanwhile.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of draws per datum.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once: ``torch.bernoulli`` binarizes grey images at random.
        chunk_size: how many (datum, particle) pairs are run at once.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Evidence`.

    Raises:
        ValueError: for ``particles`` less than 1, data that are empty or not finite, and on what
            :func:`~jensen.inference.log_weights` names.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), MeanField, context=16)
        >>> evidence = evaluate(model, guide, torch.randn(20, 5), particles=100, progress=False)
        >>> evidence.elbo.shape, evidence.summary()["particles"]
        (torch.Size([20]), 100)
    """
    if particles < 1:
        raise ValueError(f"particles is the number of draws from the guide, at least 1, but got {particles}")
    tensors = as_tensors(data)
    n = len(tensors[0])
    with running(model, guide, seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        separate, rows = plan(model, guide, tensors, min(64, max(1, chunk_size // min(particles, 64))))
        block = max(1, chunk_size // rows)
        parts: list[dict[str, Tensor]] = []
        with tqdm(total=n * particles, disable=not progress, desc="evaluate", unit_scale=True) as bar:
            for start in range(0, n, rows):
                batch = tuple(x[start : start + rows] for x in tensors)
                layout = check_pair(model, guide, *batch)
                if separate:
                    expect_rows(layout, len(batch[0]))
                weights = RunningWeights(particles)
                for first in range(0, particles, block):
                    k = min(block, particles - first)
                    log_w = log_weights(model, guide, *batch, particles=k, max_plate_nesting=layout.nesting)
                    weights.update(log_w if separate else log_w.unsqueeze(-1))
                    bar.update(k * len(batch[0]))
                names = ("elbo", "elbo_error", "log_evidence", "standard_error", "ess", "pareto_k")
                part = {name: getattr(weights, name).cpu() for name in names}
                parts.append(part)
        known = cheap_evidence(model, tensors, budget=particles, rows=rows, joint=not separate)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    features = tensors[0][0].numel() * (1 if separate else n)
    evidence = Evidence(**joined, exact=known, particles=particles, features=features, joint=not separate)
    _doubt(evidence)
    return evidence


def _doubt(evidence: Evidence) -> None:
    """Warn of an ELBO above the exact log p(x) by more than its error and rounding: a number that cannot be right."""
    if evidence.exact is None or evidence.particles < 10:
        return
    excess = float((evidence.elbo - evidence.exact).mean())
    error = float(evidence.elbo_error.square().sum().sqrt()) / len(evidence.elbo)
    if excess > 6 * error + 1e-4 * (1 + float(evidence.exact.abs().mean())):
        warnings.warn(
            f"the ELBO lies {excess:.3g} nats above the exact log p(x), which no guide can do: numbers are lost to "
            "rounding; measure in float64 (model.double(), guide.double())",
            stacklevel=3,
        )


def _mean(values: Tensor) -> float:
    return float(values.mean())
