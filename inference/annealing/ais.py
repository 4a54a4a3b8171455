r"""Annealed importance sampling: log p(x) by many small steps from a guide, or the prior, to the posterior.

Where importance sampling draws z from the guide and weighs it once, annealing moves it through densities in between,

.. math:: \log f_b(z) = (1 - b) \log q_0(z \mid x) + b \log p(x, z), \qquad 0 = b_0 < \dots < b_T = 1

so what the guide misses can still be found. The weights average to p(x), as importance weights do.
"""

from __future__ import annotations

__all__ = ["AIS", "ais", "check_settings", "path_of", "plan_rows"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from jensen.kernel.batches import Data, Device, Transform, as_tensors, expect_rows, placed, plan, running
from jensen.kernel.weights import Program, check_pair
from jensen.results.records import Record
from jensen.results.tables import RESULT_COLUMNS, Table, result_row
from jensen.results.text import decimals, percent, standard_error_of_mean

from ..exact.log_evidence import exact_evidence
from ..measure.diagnostics import RunningWeights
from .annealing import Path, Start, anneal, temperatures_of, tune


@dataclass(frozen=True, eq=False, repr=False)
class AIS(Record):
    """What :func:`ais` measured. Tensors are per datum, in nats.

    Attributes:
        log_weights: float64 [C, N]; their exponentials average to p(x).
        acceptance: the share of Hamiltonian moves that were accepted, [N].
        evaluations: how often log p(x, z) was evaluated for each datum, over all chains, the pilot's too; a value
            counts one and a gradient one more.
        exact: log p(x) where the model knows it, else None: float64 [N].
        betas: the temperatures, 0 to 1.
        step_sizes: the frozen step sizes of the T - 1 transitions, in units of the posterior's spread: [T - 1, N].
        leapfrog: leapfrog steps of a transition.
        start: where the chains started.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(3, 5).double()
        >>> found = ais(model, ExactPosterior(model), x, chains=4, temperatures=3, start="guide", progress=False)
        >>> torch.allclose(found.log_weights, found.exact.expand(4, 3))
        True
    """

    log_weights: Tensor
    acceptance: Tensor
    evaluations: int
    exact: Tensor | None
    betas: list[float]
    step_sizes: Tensor
    leapfrog: int
    start: Start

    @property
    def chains(self) -> int:
        """C."""
        return len(self.log_weights)

    @property
    def _moments(self) -> RunningWeights:
        moments = RunningWeights(self.chains)
        moments.update(self.log_weights)
        return moments

    @property
    def log_evidence(self) -> Tensor:
        """Log of the mean weight: float64 [N]. Below log p(x) in expectation, by about half its squared error."""
        return self._moments.log_evidence

    @property
    def standard_error(self) -> Tensor:
        """Monte Carlo standard error of ``log_evidence``, by the delta method over chains: float64 [N]."""
        return self._moments.standard_error

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the C weights, 1 to C: float64 [N]."""
        return self._moments.ess

    def summary(self) -> dict[str, float | int | None]:
        """Means over the data with their errors: over the data set, and Monte Carlo."""
        n = self.log_weights.shape[1]
        return {
            "n": n,
            "chains": self.chains,
            "temperatures": len(self.betas) - 1,
            "log_evidence": float(self.log_evidence.mean()),
            "log_evidence_data_error": standard_error_of_mean(self.log_evidence),
            "log_evidence_mc_error": float(self.standard_error.square().sum().sqrt()) / n,
            "exact": None if self.exact is None else float(self.exact.mean()),
            "ess": float(self.ess.mean()),
            "acceptance": float(self.acceptance.mean()),
            "evaluations": self.evaluations,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per datum."""
        names = ("log_evidence", "standard_error", "ess", "acceptance", "exact")
        values = {name: getattr(self, name) for name in names}
        return {"summary": self.summary(), "per_datum": {k: v.tolist() for k, v in values.items() if v is not None}}

    def _columns(self) -> tuple[str, range, dict[str, Tensor | None]]:
        names = ("log_evidence", "standard_error", "ess", "acceptance", "exact")
        return "datum", range(self.log_weights.shape[1]), {name: getattr(self, name) for name in names}

    def _table(self) -> Table:
        s = self.summary()
        noise = s["log_evidence_mc_error"]
        rows = [
            result_row("log p(x), annealed", s["log_evidence"], s["log_evidence_data_error"], noise),
            result_row("log p(x), exact", s["exact"], None, None, noise),
        ]
        facts = [
            ("effective sample size, mean", f"{decimals(s['ess'], 1)} of {s['chains']}"),
            ("moves accepted", percent(s["acceptance"])),
            ("evaluations per datum", f"{s['evaluations']:.4g} of log p(x, z), a gradient counting one more"),
        ]
        head = (
            f"{s['n']} data, {s['chains']} chains each, {s['temperatures']} temperatures from the {self.start}, nats "
        )
        return Table(head + "per datum", RESULT_COLUMNS, rows, facts)


def ais(
    model: Program,
    guide: Program | None,
    data: Data,
    *,
    chains: int = 50,
    temperatures: int | Sequence[float] | Tensor = 100,
    schedule: str = "sigmoid",
    leapfrog: int = 2,
    pilot: int = 16,
    start: Start = "prior",
    seed: int | None = None,
    batch_transform: Transform | None = None,
    chunk_size: int = 2**14,
    device: Device = None,
    progress: bool = True,
) -> AIS:
    r"""Annealed importance sampling of log p(x), per datum.

    .. math::
        \log w = \sum_{t=0}^{T-1} (b_{t+1} - b_t) \, \log \frac{p(x, z_t)}{q_0(z_t \mid x)}, \qquad
        \mathbb{E}\, w = p(x), \qquad \widehat{\log p}(x) = \log \frac{1}{C} \sum_c w_c

    z_0 is drawn from q_0; z_t follows from z_{t-1} by L leapfrog steps of Hamiltonian Monte Carlo at temperature b_t,
    in unconstrained coordinates, accepted or not for each chain and datum. A pilot run of other chains sets step sizes
    and scales for each datum and temperature, for an acceptance of 65 %; then they are frozen, and the run that counts
    draws anew: p(x) is estimated without bias, and its logarithm from below. More temperatures lower the variance of
    log w, about as 1 / T once the chains keep up.

    Neither ESS nor error knows of what no chain found. From the prior chains look everywhere, at the price of a longer
    way. From a guide the way is short, but chains from one that is narrower than the posterior, or misses a mode, leave
    it no wider: few weights in many are then very large, and where none of them was drawn estimate and error are both
    too small. :func:`~jensen.inference.sandwich` tells, on data whose latents are known.

    References:
        Neal (2001), Annealed Importance Sampling.
        Wu, Burda, Salakhutdinov and Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.

    Args:
        model: any Pyro model whose latent sites are continuous, called as ``model(*data)``.
        guide: its guide, called with the same data; used with ``start="guide"``, else it may be None.
        data: a tensor [N, ...], or a tuple of such tensors.
        chains: the number C of chains of each datum, at least 2.
        temperatures: the number T of steps, or the temperatures themselves, rising from 0 to 1.
        schedule: how T temperatures are spread: ``"sigmoid"`` (finer at both ends) or ``"linear"``.
        leapfrog: the number L of leapfrog steps of a transition. For the same price many temperatures with one to
            three steps each say more than few with many.
        pilot: how many chains the pilot run has, at least 2.
        start: q_0: ``"prior"`` or ``"guide"``.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        chunk_size: how many (datum, chain) pairs are run at once.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`AIS`.

    Raises:
        ValueError: for settings that make no sense, discrete latent sites, joint weights, a guide with auxiliary sites,
            and on what :func:`~jensen.inference.log_weights` names.
        NotImplementedError: if the guide does not know log q of a given value.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> found = ais(model, None, torch.randn(20, 5), temperatures=20, progress=False)
        >>> found.log_weights.shape, bool((found.log_evidence - found.exact).abs().max() < 0.5)
        (torch.Size([50, 20]), True)
    """
    betas = temperatures_of(temperatures, schedule)
    check_settings(guide, chains, leapfrog, pilot, start)
    origin = guide if start == "guide" else None
    tensors = as_tensors(data)
    n = len(tensors[0])
    log_w: list[Tensor] = []
    acceptance: list[Tensor] = []
    exact: list[Tensor] = []
    steps: list[Tensor] = []
    evaluated = 0
    proposal = _prior_of(model) if origin is None else origin
    with running(model, proposal, seed=seed, device=device), tqdm(total=n, disable=not progress, desc="ais") as bar:
        tensors = placed(tensors, device, batch_transform)
        rows = plan_rows(model, proposal, tensors, max(1, chunk_size // chains))
        for first in range(0, n, rows):
            batch = tuple(x[first : first + rows] for x in tensors)
            path = path_of(model, origin, batch)
            tuning, evaluated = tune(path, betas, leapfrog, pilot)
            weights, accepted = anneal(path, path.draw(chains), betas, tuning, leapfrog)
            log_w.append(weights.cpu())
            acceptance.append(accepted.double().cpu())
            steps.append(tuning.steps.cpu())
            known = exact_evidence(model, batch)
            exact += [] if known is None else [known.cpu()]
            bar.update(len(batch[0]))
    found = torch.cat(log_w, 1)
    return AIS(
        log_weights=found,
        acceptance=torch.cat(acceptance),
        evaluations=2 * (pilot * evaluated + chains * (1 + leapfrog * (len(betas) - 2)))
        + (pilot + chains) * (origin is None),  # drawing from the prior runs the model
        exact=torch.cat(exact) if exact else None,
        betas=betas,
        step_sizes=torch.cat(steps, 1),
        leapfrog=leapfrog,
        start=start,
    )


def path_of(model: Program, origin: Program | None, batch: tuple[Tensor, ...]) -> Path:
    """The path of one batch from a guide, or from the prior where it is None, checked."""
    layout = check_pair(model, _prior_of(model) if origin is None else origin, *batch)
    expect_rows(layout, len(batch[0]))
    return Path(model, origin, batch, layout.nesting)


def plan_rows(model: Program, proposal: Program, tensors: tuple[Tensor, ...], rows: int) -> int:
    """How many data are run at once.

    Raises:
        ValueError: for joint weights, and on what :func:`~jensen.kernel.batches.plan` names.
    """
    separate, rows = plan(model, proposal, tensors, rows)
    if not separate:
        raise ValueError(
            "annealing runs chains for each datum, but the weights of this pair are joint (a global latent): open the "
            "model's plate over the data around every site"
        )
    return rows


def _prior_of(model: Program) -> Program:
    """The model without what it observes."""
    hidden: Program = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    return hidden


def check_settings(guide: Program | None, chains: int, leapfrog: int, pilot: int, start: str) -> None:
    """Raise ValueError for settings of an annealed run that make no sense."""
    if start not in ("guide", "prior"):
        raise ValueError(f"start is 'guide' or 'prior', but got {start!r}")
    if guide is None and start == "guide":
        raise ValueError("start='guide' needs a guide, but got None: give one, or start from the prior (start='prior')")
    for name, value, least in (("chains", chains, 2), ("leapfrog", leapfrog, 1), ("pilot", pilot, 2)):
        if value < least:
            raise ValueError(f"{name} is at least {least}, but got {value}")
