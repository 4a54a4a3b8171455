"""What a guide costs, in two parts, per datum and on average."""

from __future__ import annotations

__all__ = ["Gaps"]

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jensen.results.records import Record
from jensen.results.tables import RESULT_COLUMNS, Table, result_row
from jensen.results.text import decimals, mc_error, percent, standard_error_of_mean

from .evidence import Evidence


@dataclass(frozen=True, eq=False, repr=False)
class Gaps(Record):
    """What :func:`~jensen.inference.gaps` measured. Tensors are per datum, [N], float64, in nats.

    Attributes:
        evidence: the measurement of the guide.
        local: the same of the family's best, found for each datum.
        gained: what the last round of the local optimisation still added to the ELBO.
        converged: whether that is less than the tolerance and twice its Monte Carlo error; a round that ended worse
            by more than these proves nothing either.
        rounds: how many rounds the batches took, the most of them.
        seconds: the time that the local optimisation took.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import gaps
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> found = gaps(model, ExactPosterior(model), torch.randn(20, 5).double(), particles=50, progress=False)
        >>> float(found.approximation.abs().max()) < 1e-10, float(found.amortization.abs().max()) < 1e-10
        (True, True)
    """

    evidence: Evidence
    local: Evidence
    gained: Tensor
    converged: Tensor
    rounds: int
    seconds: float

    @property
    def log_evidence(self) -> Tensor:
        """Log p(x): exact where it is known, else, of the two guides' estimates, that with the smaller k-hat: [N]."""
        if self.evidence.exact is not None:
            return self.evidence.exact
        return torch.where(self._amortized_is_better, self.evidence.log_evidence, self.local.log_evidence)

    @property
    def _amortized_is_better(self) -> Tensor:
        return self.evidence.pareto_k < self.local.pareto_k

    @property
    def approximation(self) -> Tensor:
        """Log p(x) minus the ELBO of the family's best: [N]."""
        return self.log_evidence - self.local.elbo

    @property
    def amortization(self) -> Tensor:
        """The ELBO of the family's best minus that of the guide: [N]."""
        return self.local.elbo - self.evidence.elbo

    @property
    def total(self) -> Tensor:
        """Log p(x) minus the ELBO of the guide: [N], the sum of both gaps."""
        return self.log_evidence - self.evidence.elbo

    def summary(self) -> dict[str, float | int | None]:
        """Means over the data with their errors.

        ``*_data_error`` is the standard error over the data set, ``*_mc_error`` the Monte Carlo error of the mean.
        ``unreliable`` is the share of data for which neither estimate of log p(x) has a k-hat below 0.7; None where
        log p(x) is exact, or k-hat unknown.
        """
        error = mc_error(self.local.elbo_error)
        both = math.hypot(error, mc_error(self.evidence.elbo_error)) if self.rounds else 0.0  # one measurement
        better = torch.fmin(self.evidence.pareto_k, self.local.pareto_k)
        known = self.evidence.exact is not None
        taken = torch.where(self._amortized_is_better, self.evidence.standard_error, self.local.standard_error)
        of_evidence = 0.0 if known else mc_error(taken)
        return {
            "n": len(self.total),
            "particles": self.evidence.particles,
            "gap": float(self.total.mean()),
            "gap_data_error": standard_error_of_mean(self.total),
            "approximation": float(self.approximation.mean()),
            "approximation_data_error": standard_error_of_mean(self.approximation),
            "approximation_mc_error": math.hypot(error, of_evidence),
            "amortization": float(self.amortization.mean()),
            "amortization_data_error": standard_error_of_mean(self.amortization),
            "amortization_mc_error": both,
            "converged": float(self.converged.double().mean()),
            "gained": float(self.gained.mean()),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "unreliable": None if known or self.evidence.particles < 25 else float((~(better <= 0.7)).double().mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, and the values per datum."""
        names = ("log_evidence", "approximation", "amortization", "gained", "converged")
        return {"summary": self.summary(), "per_datum": {name: getattr(self, name).tolist() for name in names}}

    def _columns(self) -> tuple[str, range, dict[str, Tensor]]:
        names = ("log_evidence", "total", "approximation", "amortization", "gained", "converged")
        return "datum", range(len(self.total)), {name: getattr(self, name) for name in names}

    def _table(self) -> Table:
        s: dict[str, Any] = {**self.summary()}
        parts = (s["approximation_mc_error"], s["amortization_mc_error"])
        rows = [result_row("gap = log p(x) - ELBO", s["gap"], s["gap_data_error"], None, math.hypot(*parts))]
        for name, cause in (("approximation", "the family"), ("amortization", "the encoder")):
            errors = (s[f"{name}_data_error"], s[f"{name}_mc_error"])
            rows.append(result_row(f"  {name} ({cause})", s[name], *errors))
        last = f"{percent(s['converged'])} of the data; last round gained {decimals(s['gained'], 4)} nats"
        facts = [("local optimisation converged", last)]
        if s["unreliable"]:
            facts.append(("log p(x) doubtful (k-hat > 0.7)", f"{percent(s['unreliable'])} of the data: gaps lean low"))
        head = f"{s['n']} data, {s['particles']} particles each, nats per datum"
        return Table(head, RESULT_COLUMNS, rows, facts)
