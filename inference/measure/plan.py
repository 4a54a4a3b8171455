"""The use of the evaluations of log p(x, z) that are allowed to refine a data point."""

from __future__ import annotations

__all__ = ["FEW", "FRESH", "SOME", "STARTS", "TEMPERATURES", "TYPICAL", "WITNESSES", "Plan"]

from typing import NamedTuple

FEW = 10  # coordinates up to which curvature may suffice, and samples of the prior are part of the mixture
SOME = 20  # coordinates up to which the weights of some thousand samples are more informative than gradients
WITNESSES, TEMPERATURES = 8, 30  # chains, and steps from the prior to the posterior
TYPICAL = 64  # samples that estimate the mean weight roughly
_LARGE = 4000  # evaluations, of which the witness needs a small part
STARTS = 4  # maximal number of guide samples from which ascents start
FRESH = 96  # minimal number of samples for the estimate


class Plan(NamedTuple):
    """The use of the evaluations of a data point.

    Attributes:
        starts: samples of the guide, and as many of the prior, from which ascents start.
        climb: steps of each ascent.
        newton: Newton steps.
        pilot: samples that decide which data points need more work.
        proposal: how many evaluations may be used before the fresh samples.
        budget: how many may be used in total.
        witness: how many are for chains from the prior, which search for missed modes.
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
        newton = 4 if features <= FEW else 0  # with many, the local search is enough
        curvatures = (1 + newton) * (3 * features + 2)
        starts = STARTS if budget >= 1500 else 2
        climb = min(40 if features <= FEW else 30, max(8, (budget - curvatures) // 5 // (6 * starts)))
        pilot = min(512, budget // 8) if budget >= 500 and features <= SOME else 0
        witness = WITNESSES * (4 * TEMPERATURES + 1) + TYPICAL if budget >= _LARGE else 0
        fresh = (budget - witness) // 4
        return cls(starts, climb, newton, pilot, budget - witness - fresh, budget, witness)

    def least(self, features: int) -> int:
        """The minimal number of evaluations of a data point."""
        uphill = 6 * self.starts * self.climb + 12 * self.starts
        return uphill + (1 + self.newton) * (3 * features + 2) + self.pilot + FRESH
