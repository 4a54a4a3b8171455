"""How the evaluations of log p(x, z) that refining a datum may take are spent."""

from __future__ import annotations

__all__ = ["FEW", "FRESH", "SOME", "STARTS", "TEMPERATURES", "TYPICAL", "WITNESSES", "Plan"]

from typing import NamedTuple

FEW = 10  # coordinates up to which curvature may do, and draws of the prior are part of the mixture
SOME = 20  # coordinates up to which weights of some thousand draws say more than gradients
WITNESSES, TEMPERATURES = 8, 30  # chains, and steps from the prior to the posterior
TYPICAL = 64  # draws that say about how high the mean weight is
_LARGE = 4000  # evaluations of which the witness takes a small part
STARTS = 4  # draws of the guide, at most, from which the ways uphill start
FRESH = 96  # draws that make the estimate, at least


class Plan(NamedTuple):
    """How the evaluations of a datum are spent.

    Attributes:
        starts: draws of the guide, and as many of the prior, from which the ways uphill start.
        climb: steps of each.
        newton: Newton's steps.
        pilot: draws that say which data need more work.
        proposal: how many evaluations may be spent before the fresh draws.
        budget: how many may be spent in all.
        witness: how many go to chains from the prior, which look for modes that were missed.
    """

    starts: int
    climb: int
    newton: int
    pilot: int
    proposal: int
    budget: int
    witness: int

    @classmethod
    def of(cls, budget: int, features: int) -> Plan:
        """The plan of a budget."""
        newton = 4 if features <= FEW else 0  # with many the local search finds the way
        curvatures = (1 + newton) * (3 * features + 2)
        starts = STARTS if budget >= 1500 else 2
        climb = min(40 if features <= FEW else 30, max(8, (budget - curvatures) // 5 // (6 * starts)))
        pilot = min(512, budget // 8) if budget >= 500 and features <= SOME else 0
        witness = WITNESSES * (4 * TEMPERATURES + 1) + TYPICAL if budget >= _LARGE else 0
        fresh = (budget - witness) // 4
        return cls(starts, climb, newton, pilot, budget - witness - fresh, budget, witness)

    def least(self, features: int) -> int:
        """The evaluations that a datum takes at least."""
        uphill = 6 * self.starts * self.climb + 12 * self.starts
        return uphill + (1 + self.newton) * (3 * features + 2) + self.pilot + FRESH
