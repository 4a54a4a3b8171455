"""The base class of families with a location per feature and a positive scale of four kinds."""

from __future__ import annotations

__all__ = ["Scale", "Scaled"]

from typing import Literal

import torch
from torch import Tensor, nn

from .base import Family, positive

Scale = float | Literal["shared", "diagonal", "context"]


class Scaled(Family):
    """A family with one number per feature from the context, and a positive number of four kinds.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        scale: the positive number: fixed; ``"shared"``: one learned number; ``"diagonal"``: one learned number per
            feature; ``"context"``: a function of the context, after the first numbers of all features.
        name: its argument name in the subclass, for errors.
        more: how many further numbers per feature are functions of the context.

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
            raise ValueError(f'{name} must be a positive number, "shared", "diagonal" or "context", but got {scale!r}')

    def split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Parameters [..., P] to the first number, the positive one, and the others: each [..., *event_shape]."""
        first, *rest = (part.unflatten(-1, self.event_shape) for part in parameters.split(self.features, dim=-1))
        if self.scale == "context":
            raw, *rest = rest
            return first, positive(raw), *rest
        return first, positive(self.raw_scale) if isinstance(self.scale, str) else self.fixed, *rest

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, {self._name}={self.scale!r}"
