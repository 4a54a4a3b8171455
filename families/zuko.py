r"""A family from any flow of the zuko library.

.. math:: z = \mu(h) + s(h) \odot y, \qquad y \sim \text{flow}(g(h))

This module does not import zuko: the flow is an argument. (Importing zuko disables the argument checks of every torch
distribution in the process.)
"""

from __future__ import annotations

__all__ = ["Zuko"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Normal
from torch.types import _size

from jensen.checked import checked

from .base import Drawn, Family, positive


class Zuko(Family):
    """A zuko flow, followed by an affine map given the context.

    Most of zuko's flows have fast densities but need D passes for a sample. Its coupling flows (``passes=2``) are fast
    at both; ``IAF`` and ``NeuralSpline`` of jensen sample in one pass.

    References:
        Rozet et al. (2022), Zuko: Normalizing flows in PyTorch. https://github.com/probabilists/zuko

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        flow: constructor of the flow, called as ``flow(features, reads)``: ``zuko.flows.NSF``, or a
            ``functools.partial``.
        reads: the number G of context parameters that are inputs of the flow.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch, zuko
        >>> from functools import partial
        >>> family = Zuko(3, context=8, flow=partial(zuko.flows.NSF, transforms=2, passes=2))
        >>> family(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 3])
    """

    @checked
    def __init__(self, features: int, context: int | None, flow: Callable[[int, int], nn.Module], reads: int = 16):
        super().__init__(features, context, size=2 * features + reads)
        try:
            self.flow = flow(features, reads)
        except TypeError as error:
            raise TypeError(
                "flow must be callable as flow(features, reads) and return a conditional flow, such as "
                f"zuko.flows.NSF, but the call failed: {error}"
            ) from error

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., P]: locations, scales, and the flow's inputs."""
        D = self.features
        loc, raw, g = parameters.split([D, D, self.size - 2 * D], dim=-1)
        return _Placed(self.flow, loc, positive(raw), g)


class _Placed(Drawn):
    def __init__(self, flow: Callable[[Tensor], Any], loc: Tensor, scale: Tensor, g: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.flow, self.loc, self.scale, self.g = flow, loc, scale, g
        self.base = flow(g)

    def expand(self, batch_shape: _size, _instance: object = None) -> Drawn:
        """The same distribution with another batch shape, which zuko's base must also have."""
        loc, scale, g = (part.expand(*batch_shape, -1) for part in (self.loc, self.scale, self.g))
        return _Placed(self.flow, loc, scale, g)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        sample_shape = shape[: len(shape) - self.loc.dim()]  # the base has the batch shape of the parameters
        y, log_q = self._base_draw(sample_shape)
        return self.loc + self.scale * y, log_q - self.scale.log().sum(-1)

    def _base_draw(self, sample_shape: Size) -> tuple[Tensor, Tensor]:
        noise = self.base.base.expand(self.loc.shape[:-1])
        if not isinstance(normal := getattr(noise, "base_dist", None), Normal):
            drawn: tuple[Tensor, Tensor] = self.base.rsample_and_log_prob(sample_shape)
            return drawn
        shape = (*sample_shape, *self.loc.shape)
        e = normal.loc + normal.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        y, log_det = self.base.transform.inv.call_and_ladj(e)
        return y, noise.log_prob(e) - log_det

    def density(self, value: Tensor) -> Tensor:
        log_q: Tensor = self.base.log_prob((value - self.loc) / self.scale)
        return log_q - self.scale.log().sum(-1)
