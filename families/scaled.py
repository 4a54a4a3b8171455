"""What families of two numbers per feature share: one read from the context, and a positive one that need not be."""

from __future__ import annotations

__all__ = ["Scale", "Scaled"]

from typing import Literal

import torch
from torch import Tensor, nn

from .base import Family, positive

Scale = float | Literal["shared", "diagonal", "context"]


class Scaled(Family):
    """A family whose parameters are a number per feature, and a positive number with four ways to it.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        scale: the positive number: fixed; ``"shared"``: one learned number; ``"diagonal"``: one learned number per
            feature; ``"context"``: read from the context, behind the first number of every feature.
        name: what the member calls it, for errors.
        more: how many more numbers per feature are read from the context.

    Raises:
        ValueError: if ``scale`` is not one of these, or a number that is not positive.

    Example:
        >>> from jensen.families import Laplace
        >>> loc, scale = Laplace(3, 8, scale=0.5).split(torch.zeros(5, 3))
        >>> loc.shape, scale
        (torch.Size([5, 3]), tensor(0.5000))
    """

    fixed: Tensor

    def __init__(
        self,
        features: int | tuple[int, ...],
        context: int | None,
        scale: Scale,
        name: str = "scale",
        more: int = 0,
    ) -> None:
        size = torch.Size((features,) if isinstance(features, int) else features).numel()
        super().__init__(features, context, size=(1 + (scale == "context") + more) * size)
        self.scale, self._name = scale, name
        if isinstance(scale, int | float) and scale > 0:
            self.register_buffer("fixed", torch.tensor(float(scale)), persistent=False)
        elif scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(()))
        elif scale == "diagonal":
            self.raw_scale = nn.Parameter(torch.zeros(self.event_shape))
        elif scale != "context":
            raise ValueError(f'{name} is a positive number, "shared", "diagonal" or "context", but got {scale!r}')

    def split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Parameters [..., P] to the first number, the positive one, and the others: each [..., *event_shape]."""
        first, *rest = (part.unflatten(-1, self.event_shape) for part in parameters.split(self.features, dim=-1))
        if self.scale == "context":
            raw, *rest = rest
            return first, positive(raw), *rest
        return first, positive(self.raw_scale) if isinstance(self.scale, str) else self.fixed, *rest

    def extra_repr(self) -> str:
        """What the printed module shows beside its layers."""
        return f"{super().extra_repr()}, {self._name}={self.scale!r}"
