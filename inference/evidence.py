"""What a measurement says: ELBO, importance-weighted log p(x), exact value, per datum, each with its error."""

from __future__ import annotations

__all__ = ["Evidence"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from .text import decimals, mc_error, percent, standard_error_of_mean


@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
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
            "log_evidence": _mean(self.log_evidence),
            "log_evidence_data_error": standard_error_of_mean(self.log_evidence),
            "log_evidence_mc_error": mc_error(self.standard_error),
            **corrected,
            "exact": None if self.exact is None else _mean(self.exact),
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
            *self._corrections(s),
            ("log p(x), exact", decimals(s["exact"]), ""),
            ("gap = log p(x) - ELBO", decimals(s["gap"]), over(decimals(s["gap_data_error"]))),
            (
                "effective sample size, mean",
                decimals(s["ess"], 1),
                f"of {self.drawn.removesuffix(' each').removesuffix(' particles')}",
            ),
            ("data with k-hat > 0.7", percent(s["unreliable"]), ""),
            *self._counts(s),
        ]
        what = "all data jointly" if self.joint else f"{s['n']} data"
        head = f"{what}, {self.drawn}, nats" + ("" if self.joint else " per datum")
        return "\n".join([head, *(f"{name:31s}{value:>10s}  {note}".rstrip() for name, value, note in rows)])

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"

    def _corrections(self, s: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
        labels = {"delta": "  delta-corrected", "jackknife": "  jackknifed", "smoothed": "  Pareto-smoothed"}
        values = {name: (s[f"log_evidence_{name}"], s[f"log_evidence_{name}_mc_error"]) for name in self.corrected}
        return [(labels[k], decimals(v), f"± {decimals(e)}  Monte Carlo") for k, (v, e) in values.items()]

    def _counts(self, s: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
        rows = []
        if self.converged is not None:
            missed = int((~self.converged).sum())
            rows.append(("tolerance reached", percent(s["converged"]), f"of the data; missed by {missed}"))
            rows.append(("particles spent", f"{s['spent']:,}", f"at most {self.particles:,} on a datum"))
        if self.zero_weights is not None and s["zero_weights"]:
            where = int((self.zero_weights > 0).sum())
            rows.append(("weights of zero", f"{s['zero_weights']:,}", f"in {where} data: draws without density"))
        return rows


def _mean(values: Tensor) -> float:
    return float(values.mean())
