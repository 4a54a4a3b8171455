"""What a measurement says: ELBO, importance-weighted log p(x), exact value, per datum, each with its error."""

from __future__ import annotations

__all__ = ["Evidence"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from jensen.results.records import Record
from jensen.results.tables import RESULT_COLUMNS, Table, result_row
from jensen.results.text import decimals, mc_error, percent, standard_error_of_mean

Summary = Mapping[str, float | int | None]


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Record):
    """What :func:`~jensen.inference.evaluate` measured. Tensors are per datum, [N], float64, in nats.

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
        particles: K; with a tolerance, the most that a datum took.
        features: the number of observed numbers in one datum (in all data, for joint weights).
        joint: whether the weights are joint.
        corrected: log p(x) by estimators with less bias than ``log_evidence``: ``"delta"`` adds back its bias of order
            1/K, ``"jackknife"`` is JVI-1, ``"smoothed"`` has the largest weights replaced by quantiles of a fitted
            Pareto distribution (PSIS; NaN for K below 25). Where k-hat is above 0.7 none of them can be trusted.
        corrected_error: their Monte Carlo standard errors.
        zero_weights: how many of the K weights are zero: draws where the model has no density.
        spent: how many particles were drawn; with a tolerance, the 256 of the pilot among them, which no other number
            here is made from.
        converged: with a tolerance, whether it was reached; else None.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import evaluate
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(20, 5).double()
        >>> evidence = evaluate(model, ExactPosterior(model), x, particles=100, progress=False)
        >>> torch.allclose(evidence.log_evidence, evidence.exact), float(evidence.gap.abs().max()) < 1e-10
        (True, True)
        >>> again = Evidence.from_json(evidence.to_json())
        >>> torch.equal(again.elbo, evidence.elbo), again.particles
        (True, 100)
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
    corrected: dict[str, Tensor] = field(default_factory=dict)
    corrected_error: dict[str, Tensor] = field(default_factory=dict)
    zero_weights: Tensor | None = None
    spent: Tensor | None = None
    converged: Tensor | None = None

    @property
    def best(self) -> Tensor:
        """Log p(x): exact where it is known, else the importance-weighted estimate: [N]."""
        return self.log_evidence if self.exact is None else self.exact

    @property
    def gap(self) -> Tensor:
        """Log p(x) minus ELBO, with the exact log p(x) where it is known: [N]."""
        return self.best - self.elbo

    @property
    def drawn(self) -> str:
        """How many particles were drawn per datum, in words."""
        if self.converged is None or self.spent is None:
            return f"{self.particles} particles each"
        return f"{float(self.spent.double().mean()):.0f} particles on average"

    def summary(self) -> dict[str, float | int | None]:
        """Means over the data with their errors.

        ``*_data_error`` is the standard error over the data set (how much the mean would move with other data),
        ``*_mc_error`` the Monte Carlo error of the mean (how much with other particles), ``unreliable`` the share of
        data whose k-hat is not below 0.7, ``zero_weights`` and ``spent`` totals, ``converged`` a share of the data.
        """
        corrected: dict[str, float | int | None] = {}
        for name, values in self.corrected.items():
            corrected[f"log_evidence_{name}"] = _mean(values)
            corrected[f"log_evidence_{name}_mc_error"] = mc_error(self.corrected_error[name])
        return {
            "n": len(self.elbo),
            "particles": self.particles,
            "elbo": _mean(self.elbo),
            "elbo_data_error": standard_error_of_mean(self.elbo),
            "elbo_mc_error": mc_error(self.elbo_error),
            "log_evidence": _mean(self.log_evidence),
            "log_evidence_data_error": standard_error_of_mean(self.log_evidence),
            "log_evidence_mc_error": mc_error(self.standard_error),
            **corrected,
            "exact": None if self.exact is None else _mean(self.exact),
            "exact_data_error": None if self.exact is None else standard_error_of_mean(self.exact),
            "gap": _mean(self.gap),
            "gap_data_error": standard_error_of_mean(self.gap),
            "ess": _mean(self.ess),
            "unreliable": float((~(self.pareto_k <= 0.7)).double().mean()) if self.particles >= 25 else None,
            "zero_weights": None if self.zero_weights is None else int(self.zero_weights.sum()),
            "spent": None if self.spent is None else int(self.spent.sum()),
            "converged": None if self.converged is None else _mean(self.converged.double()),
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
        for name in self.corrected:
            values[f"log_evidence_{name}"] = self.corrected[name]
            values[f"log_evidence_{name}_error"] = self.corrected_error[name]
        per_datum = {k: v.tolist() for k, v in values.items() if isinstance(v, Tensor)}
        return {"summary": self.summary(), "per_datum": per_datum, "features": self.features}

    def _columns(self) -> tuple[str, range, dict[str, Tensor | None]]:
        corrected = {f"log_evidence_{name}": values for name, values in self.corrected.items()}
        errors = {f"log_evidence_{name}_error": values for name, values in self.corrected_error.items()}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return "datum", range(len(self.elbo)), {**plain, "gap": self.gap, **corrected, **errors}

    def _table(self) -> Table:
        s: dict[str, Any] = {**self.summary()}
        noise = (s["elbo_mc_error"], s["log_evidence_mc_error"])
        rows = [
            result_row("ELBO", s["elbo"], s["elbo_data_error"], noise[0]),
            result_row("log p(x), importance-weighted", s["log_evidence"], s["log_evidence_data_error"], noise[1]),
            *(
                result_row(_LABELS[name], s[f"log_evidence_{name}"], None, s[f"log_evidence_{name}_mc_error"])
                for name in self.corrected
            ),
            result_row("log p(x), exact", s["exact"], s["exact_data_error"], None, noise[1]),
            result_row("gap = log p(x) - ELBO", s["gap"], s["gap_data_error"], None, math.hypot(*noise)),
        ]
        what = "all data jointly" if self.joint else f"{s['n']} data"
        head = f"{what}, {self.drawn}, nats" + ("" if self.joint else " per datum")
        return Table(head, RESULT_COLUMNS, rows, self._facts(s))

    def _facts(self, s: Summary) -> list[tuple[str, str]]:
        drawn = self.drawn.removesuffix(" each").replace(" particles", "")
        facts = [
            ("effective sample size, mean", f"{decimals(s['ess'], 1)} of {drawn}"),
            ("data with k-hat > 0.7", percent(s["unreliable"])),
        ]
        if self.converged is not None:
            missed = int((~self.converged).sum())
            facts.append(("tolerance reached", f"{percent(s['converged'])} of the data; missed by {missed}"))
            facts.append(("particles spent", f"{s['spent']:,}, at most {self.particles:,} on a datum"))
        if self.zero_weights is not None and s["zero_weights"]:
            where = int((self.zero_weights > 0).sum())
            facts.append(("weights of zero", f"{s['zero_weights']:,} in {where} data: draws without density"))
        return facts


_LABELS = {"delta": "  delta-corrected", "jackknife": "  jackknifed", "smoothed": "  Pareto-smoothed"}


def _mean(values: Tensor) -> float:
    return float(values.mean())
