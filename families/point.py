r"""Point estimates as a family: a point mass at a function of the context.

.. math:: q(z \mid h) = \delta(z - \mu(h))
"""

from __future__ import annotations

__all__ = ["Delta"]

from pyro.distributions import Delta as PointMass
from pyro.distributions import TorchDistribution
from torch import Tensor

from jensen.checked import checked

from .base import Family


class Delta(Family):
    r"""A point estimate given the context; SVI trains it to the posterior mode (MAP).

    Its log-density at the point counts as 0, so the mean log weight is log p(x, z) at that point. This is not a bound
    on log p(x), and :func:`jensen.inference.evaluate` raises an error.

    References:
        Gelman et al. (2013), Bayesian Data Analysis, third edition, section 13.1.

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the D parameters.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> Delta(2, context=8)(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, features: int, context: int | None) -> None:
        super().__init__(features, context, size=features)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., D] to a point."""
        return PointMass(parameters, event_dim=1)
