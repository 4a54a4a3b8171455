"""Priors p(z): a module without input that returns a distribution of event shape [D]."""

from __future__ import annotations

__all__ = ["StandardNormal"]

from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn, zeros


class StandardNormal(nn.Module):
    r"""The standard normal prior.

    .. math:: p(z) = \mathcal{N}(z; 0, I)

    Args:
        features: the number D of latent features.

    Returns:
        When called, a distribution of batch shape [] and event shape [D].

    Example:
        >>> StandardNormal(3)().sample().shape
        torch.Size([3])
    """

    loc: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", zeros(features), persistent=False)

    def forward(self) -> TorchDistribution:
        """The distribution, in the module's precision and on its device."""
        prior: TorchDistribution = Normal(self.loc, 1.0).to_event(1)
        return prior
