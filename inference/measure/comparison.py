r"""Several pairs in one table; paired differences between them.

Guides of one shared model are read against each other: log p(x) is the same for all, so

.. math:: \text{ELBO}_a - \text{ELBO}_b = \text{KL}(q_b \| p) - \text{KL}(q_a \| p)

is the cost of a guide, per datum and with an error. Pairs with different models differ in p and q at once.
"""

from __future__ import annotations

__all__ = ["Comparison", "Row"]

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from jensen.results.records import Record
from jensen.results.tables import Table
from jensen.results.text import decimals, digits_of, percent, standard_error_of_mean, with_error

from .costs import Gaps
from .evidence import Evidence


@dataclass(frozen=True, eq=False)
class Row:
    """One measured pair.

    Attributes:
        evidence: what :func:`~jensen.inference.evaluate` measured.
        parameters: the number of trainable parameters; of the guide alone where the model is shared.
        seconds: the time that training (where known) and measuring took.
        gaps: both parts of the gap, where they were asked for and the guide can be taken apart; else None.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import compare
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> table = compare({"prior": (model, PriorGuide(model))}, torch.randn(20, 5), particles=50, progress=False)
        >>> table.rows["prior"].evidence.elbo.shape, table.rows["prior"].parameters
        (torch.Size([20]), 16)
    """

    evidence: Evidence
    parameters: int
    seconds: float
    gaps: Gaps | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Record):
    """The table that :func:`~jensen.inference.compare` makes; ``print`` it, or read ``rows[name].evidence``.

    Attributes:
        rows: the measured pairs, by name.
        shared_model: whether all pairs have the same model, so that ELBO differences are the cost of a guide.

    Example:
        >>> from jensen.guides import ExactPosterior, PriorGuide
        >>> from jensen.inference import compare
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> pairs = {"prior": (model, PriorGuide(model)), "exact": (model, ExactPosterior(model))}
        >>> table = compare(pairs, torch.randn(20, 5), particles=50, seed=0, progress=False)
        >>> table.shared_model, table.difference("exact", "prior")[0] > 0
        (True, True)
    """

    rows: dict[str, Row]
    shared_model: bool

    def difference(self, a: str, b: str, quantity: Literal["elbo", "log_evidence"] = "elbo") -> tuple[float, float]:
        """Mean of a minus b over the data, in nats per datum, and its standard error, paired by datum.

        For ``"log_evidence"`` the exact values are taken where they are known.
        """
        first, second = (self._values(name, quantity) for name in (a, b))
        delta = first - second
        return float(delta.mean()), standard_error_of_mean(delta)

    def sentence(self) -> str:
        """What the table shows, in one plain sentence."""
        if len(self.rows) < 2:
            return "One pair alone: nothing to compare."
        quantity: Literal["elbo", "log_evidence"] = "elbo" if self.shared_model else "log_evidence"
        ordered = sorted(self.rows, key=lambda name: -float(self._values(name, quantity).mean()))
        best, others = ordered[0], ordered[1:]
        found = {name: self.difference(best, name, quantity) for name in others}
        listed = ", ".join(f"{name} {with_error(d, e)}" for name, (d, e) in found.items())
        if self.shared_model:
            return (
                f"One model, so what a guide loses of the ELBO is its own cost: in nats per datum below {best}, paired "
                f"over the data: {listed}.{self._notes()}"
            )
        gain, error = found[others[0]]
        verdict = f"{best} and {others[0]} cannot be told apart"
        if gain > 2 * error:
            verdict = f"{best} is the best model, {decimals(gain / error, 1)} standard errors above {others[0]}"
        return (
            f"Pairs trained jointly differ in p and q at once, so compare their log p(x), not the cost of a guide: "
            f"{verdict}; nats per datum below {best}, paired over the data: {listed}.{self._notes()}"
        )

    def _notes(self) -> str:
        return self._flagged() + self._unconverged()

    def _flagged(self) -> str:
        """A warning for the rows whose estimate of log p(x) counts and is flagged for more than a tenth of the data."""
        shares = {name: row.evidence.summary()["unreliable"] for name, row in self.rows.items()}
        known = {name for name, row in self.rows.items() if row.evidence.exact is not None}
        flagged = [name for name, share in shares.items() if share is not None and share > 0.1 and name not in known]
        if not flagged:
            return ""
        return f" The estimates of {', '.join(flagged)} lean low: k-hat exceeds 0.7 for more than a tenth of the data."

    def _unconverged(self) -> str:
        """A warning for the rows whose local optimisation was not done for more than a tenth of the data."""
        found = {name: row.gaps for name, row in self.rows.items() if row.gaps is not None}
        open_ones = [name for name, split in found.items() if float(split.converged.double().mean()) < 0.9]
        if not open_ones:
            return ""
        return (
            f" The approximation gap of {', '.join(open_ones)} is an upper bound: for more than a tenth of the data "
            "the local optimisation had not converged."
        )

    def table(self, bits: bool = False, offset: float = 0.0) -> str:
        """The aligned table, in nats per datum, or in bits per dimension.

        Args:
            bits: whether ELBO, log p(x) and gaps are shown as bits per dimension (of minus the value: less is better).
            offset: log2 of the number of grey levels, added to the bits of dequantized data.
        """
        return "\n".join(Table("", *self._cells(bits, offset)).grid())

    def _cells(self, bits: bool = False, offset: float = 0.0) -> tuple[list[str], list[list[str]]]:
        """The headings and the rows."""
        parts = ["approximation", "amortization"] if any(row.gaps is not None for row in self.rows.values()) else []
        before = ["", "ELBO", "log p(x)", "± data", "± MC", "exact", "gap"]
        rows = []
        for name, row in self.rows.items():
            unit = row.evidence.features * math.log(2) if bits else 1.0
            split = None if row.gaps is None else row.gaps.summary()
            cells = [
                *_levels(row.evidence.summary(), split, unit, offset if bits else None),
                *(_with_spread(split, part, unit) for part in parts),
                *(decimals(float(row.evidence.ess.mean()), 1), percent(row.evidence.summary()["unreliable"])),
                *(f"{row.parameters:,}", decimals(row.seconds, 1)),
            ]
            rows.append([name, *cells])
        return [*before, *parts, "ESS", "k>0.7", "params", "seconds"], rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers: a summary for each row."""
        rows = {
            name: {**row.evidence.summary(), "parameters": row.parameters, "seconds": row.seconds}
            | ({} if row.gaps is None else {"gaps": row.gaps.summary()})
            for name, row in self.rows.items()
        }
        return {"shared_model": self.shared_model, "rows": rows, "sentence": self.sentence()}

    def _columns(self) -> tuple[str, list[str], dict[str, list[Any]]]:
        rows = {name: dict(summary) for name, summary in self.to_dict()["rows"].items()}
        for row in rows.values():
            row |= {key: value for key, value in row.pop("gaps", {}).items() if key not in row}
        names = dict.fromkeys(key for row in rows.values() for key, value in row.items() if value is not None)
        columns = {key: [row.get(key) for row in rows.values()] for key in names}
        return "pair", list(rows), {key: [math.nan if v is None else v for v in c] for key, c in columns.items()}

    def _table(self) -> Table:
        first = next(iter(self.rows.values())).evidence
        drawn = first.drawn if first.converged is None else "as many particles as each needs"
        return Table(f"{len(first.elbo)} data, {drawn}, nats per datum", *self._cells(), notes=[self.sentence()])

    def _values(self, name: str, quantity: Literal["elbo", "log_evidence"]) -> torch.Tensor:
        evidence = self.rows[name].evidence
        return evidence.elbo if quantity == "elbo" else evidence.best


def _levels(s: Any, split: Any, unit: float, offset: float | None) -> list[str]:
    """ELBO, log p(x), both of its errors, the exact log p(x) and the gap of a row, to the digits that errors allow."""
    data, elbo_data, exact_data = (s[f"{name}_data_error"] for name in ("log_evidence", "elbo", "exact"))
    noise, elbo_noise = s["log_evidence_mc_error"], s["elbo_mc_error"]

    def shown(value: float | None, *errors: float | None, level: bool = False) -> str:
        digits = digits_of(*(None if e is None else e / unit for e in errors))
        if value is None:
            return "-"
        return decimals(offset - value / unit if level and offset is not None else value / unit, digits)

    return [
        shown(s["elbo"], elbo_data, elbo_noise, level=True),
        shown(s["log_evidence"], data, noise, level=True),
        *(shown(error, data, noise) for error in (data, noise)),
        shown(s["exact"], exact_data, noise, level=True),
        shown(s["gap"] if split is None else split["gap"], s["gap_data_error"], math.hypot(noise, elbo_noise)),
    ]


def _with_spread(split: dict[str, float | int | None] | None, part: str, unit: float) -> str:
    """One part of the gap with its error over the data; a dash where it is not known."""
    value, error = (None, None) if split is None else (split[part], split[f"{part}_data_error"])
    return "-" if value is None or error is None else with_error(value / unit, error / unit)
