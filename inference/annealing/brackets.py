r"""Bounds from below and above side by side, and what to make of bounds that contradict each other.

In expectation every lower bound lies below log p(x), and log p(x) below every upper bound. Numbers that lie the other
way round by more than four standard errors of their difference, paired by datum, cannot all be what they are called.
"""

from __future__ import annotations

__all__ = ["Bracket", "Contradiction", "Sandwich"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jensen.results.records import Record
from jensen.results.tables import Table
from jensen.results.text import decimals, digits_of, percent, standard_error_of_mean, with_error

from .annealing import Start

_ERRORS = 4.0
_EXACT = "exact log p(x)"


@dataclass(frozen=True, eq=False)
class Bracket:
    """A bound from below and one from above, of each datum. Tensors are float64 [N], in nats.

    Attributes:
        lower: the bound from below.
        lower_error: its Monte Carlo standard error (delta method).
        upper: the bound from above.
        upper_error: its Monte Carlo standard error given z*; what another z* would change is not in it.

    Example:
        >>> one, none = torch.ones(3).double(), torch.zeros(3).double()
        >>> Bracket(lower=-2 * one, lower_error=none, upper=-one, upper_error=none).width
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    lower: Tensor
    lower_error: Tensor
    upper: Tensor
    upper_error: Tensor

    @property
    def width(self) -> Tensor:
        """Upper minus lower bound of each datum: [N]; below zero for some, by chance."""
        return self.upper - self.lower

    @staticmethod
    def joined(parts: Sequence[Bracket]) -> Bracket:
        """The bounds of all data, from those of their batches."""
        return Bracket(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Bracket)))


class Contradiction(NamedTuple):
    """Two numbers in an order that mathematics excludes.

    Attributes:
        above: the name of the number that lies above the other, and must not.
        below: the name of the other.
        excess: by how much, mean over the data in nats.
        error: its standard error, paired by datum.
    """

    above: str
    below: str
    excess: float
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich(Record):
    """What :func:`~jensen.inference.sandwich` measured, per datum.

    Attributes:
        weighted: the bounds of importance weighting.
        annealed: the bounds of annealing, forward and reversed.
        exact: log p(x) where the model knows it, else None: float64 [N].
        particles: K.
        chains: C.
        temperatures: T.
        start: where annealing starts.
        drawn: whether the model drew the data, and with them the latents; else these come from rejection.
        above: of rejection, the share of proposals where the density stood above its envelope, in the worst batch:
            where it is not zero, z* are not quite draws from the posterior, and the upper bounds not quite bounds.

    Example:
        >>> one, none = torch.ones(3).double(), torch.zeros(3).double()
        >>> wide, tight = Bracket(-2 * one, none, -one, none), Bracket(-1.6 * one, none, -1.4 * one, none)
        >>> found = Sandwich(wide, tight, None, particles=100, chains=8, temperatures=10, start="guide")
        >>> found.contradictions()
        []
        >>> print(found)
        3 data drawn from the model, nats per datum (± of the mean over these data)
                                               lower           upper          width
        ---------------------------------------------------------------------------
        importance-weighted, K = 100  -2.000 ± 0.000  -1.000 ± 0.000  1.000 ± 0.000
        annealed, C = 8, T = 10       -1.600 ± 0.000  -1.400 ± 0.000  0.200 ± 0.000
    """

    weighted: Bracket
    annealed: Bracket
    exact: Tensor | None
    particles: int
    chains: int
    temperatures: int
    start: Start
    drawn: bool = True
    above: float = 0.0

    def contradictions(self) -> list[Contradiction]:
        """Pairs of numbers whose order is wrong by more than four standard errors, and more than rounding."""
        lower = {f"{name} lower bound": b.lower for name, b in self._brackets()}
        upper = {f"{name} upper bound": b.upper for name, b in self._brackets()}
        if self.exact is not None:
            lower[_EXACT] = upper[_EXACT] = self.exact
        found = []
        for low, small in lower.items():
            for high, large in upper.items():
                excess = small - large
                error = standard_error_of_mean(excess) if len(excess) > 1 else 0.0
                mean, rounding = float(excess.mean()), 1e-5 * (1 + float(large.abs().mean()))
                if low != high and mean > _ERRORS * error + rounding and len(excess) > 1:
                    found.append(Contradiction(low, high, mean, error))
        return found

    def verdict(self) -> str:
        """Whether the bounds are in order; if not, which numbers contradict each other, and what to look at."""
        found = self.contradictions()
        if not found:
            return "The bounds are in order."
        listed = [
            f"  the {c.above} lies {decimals(c.excess)} ± {decimals(c.error)} nats above the {c.below}" for c in found
        ]
        head = "Bounds that contradict each other, so no table: in expectation no lower bound exceeds an upper one."
        return "\n".join([head, *listed, f"Suspect: {self._suspect(found)}."])

    def _suspect(self, found: list[Contradiction]) -> str:
        rounding = "or numbers are lost to rounding (measure in float64)"
        of_model = (
            "the model: it does not draw what it scores (a site drawn and observed from different distributions, or "
            "from a random stream of its own)"
            if self.drawn
            else "the draws from the posterior of the given data"
        )
        if self.exact is not None:
            of_model += ", or its log_evidence is not that of the model as it stands"
        of_guide = (
            "the guide: its log q(z | x) is not the density of what it draws, or changes from run to run (dropout)"
        )
        free = [c for c in found if not (self._reads_guide(c.above) or self._reads_guide(c.below))]
        if free:
            return f"{of_model}. The {free[0].above} and the {free[0].below} owe nothing to the guide; {rounding}"
        if self.start == "guide" and self.exact is None:
            return f"either {of_guide}; or {of_model}. Annealing from the prior tells which; {rounding}"
        if not any(self._reads_guide(c.above) for c in found):  # a z* that is no draw from the posterior does it too
            return f"either {of_guide}; or {of_model}; {rounding}"
        return f"{of_guide}. Each of these pairs holds a number that reads it, and the others agree; {rounding}"

    def _reads_guide(self, name: str) -> bool:
        return name.startswith("importance") or (name.startswith("annealed") and self.start == "guide")

    def _brackets(self) -> list[tuple[str, Bracket]]:
        return [("importance-weighted", self.weighted), ("annealed", self.annealed)]

    def summary(self) -> dict[str, Any]:
        """Means over the data with their errors.

        The error of a lower bound is Monte Carlo. That of an upper bound, and of a width, is over the data as well,
        since each has one z* only; for upper bounds it is that of the difference to log p(x) where this is known, else
        to the annealed lower bound, whose own error is added.
        """
        result: dict[str, Any] = {"n": len(self.annealed.lower)}
        anchor = self.annealed.lower if self.exact is None else self.exact
        drift = _monte_carlo(self.annealed.lower_error) if self.exact is None else 0.0
        for name, b in (("weighted", self.weighted), ("annealed", self.annealed)):
            result[name] = {
                "lower": float(b.lower.mean()),
                "lower_error": _monte_carlo(b.lower_error),
                "upper": float(b.upper.mean()),
                "upper_error": math.hypot(standard_error_of_mean(b.upper - anchor), drift),
                "width": float(b.width.mean()),
                "width_error": standard_error_of_mean(b.width),
            }
        result["exact"] = None if self.exact is None else float(self.exact.mean())
        result["above"] = self.above
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, the verdict, the values per datum."""
        per_datum = {
            name: {f.name: getattr(b, f.name).tolist() for f in fields(Bracket)}
            for name, b in (("weighted", self.weighted), ("annealed", self.annealed))
        }
        exact = None if self.exact is None else self.exact.tolist()
        return {"summary": self.summary(), "verdict": self.verdict(), "per_datum": {**per_datum, "exact": exact}}

    def _columns(self) -> tuple[str, range, dict[str, Tensor | None]]:
        sides = (("weighted", self.weighted), ("annealed", self.annealed))
        columns = {f"{name}_{f.name}": getattr(b, f.name) for name, b in sides for f in fields(Bracket)}
        return "datum", range(len(self.annealed.lower)), {**columns, "exact": self.exact}

    def _table(self) -> Table:
        s = self.summary()
        source = "drawn from the model" if self.drawn else "given, latents by rejection"
        head = f"{s['n']} data {source}, nats per datum (± of the mean over these data)"
        if self.contradictions():
            return Table(head, notes=[self.verdict()])
        names = (f"importance-weighted, K = {self.particles}", f"annealed, C = {self.chains}, T = {self.temperatures}")
        rows = []
        for name, key in zip(names, ("weighted", "annealed"), strict=True):
            cells = ((s[key][part], s[key][f"{part}_error"]) for part in ("lower", "upper", "width"))
            rows.append([name, *(with_error(value, error) for value, error in cells)])
        if self.exact is not None:
            digits = digits_of(None, s["annealed"]["lower_error"], s["weighted"]["lower_error"])
            rows.append([_EXACT, *[decimals(s["exact"], digits)] * 2, ""])
        above = (
            f"the envelope of the rejection was too low at {percent(self.above)} of the proposals: z* are not quite "
            "draws from the posterior"
        )
        return Table(head, ("", "lower", "upper", "width"), rows, notes=[above] if self.above else [])


def _monte_carlo(errors: Tensor) -> float:
    """The Monte Carlo error of a mean over data, from those of its terms."""
    return float(errors.square().sum().sqrt()) / len(errors)
