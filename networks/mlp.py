"""The multilayer perceptron: affine maps with an activation after each, the last one included."""

from __future__ import annotations

__all__ = ["mlp"]

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


def mlp(features: int, widths: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    r"""A multilayer perceptron that ends in its activation.

    .. math:: h_0 = x, \qquad h_l = a(A_l h_{l-1} + b_l)

    Args:
        features: the width of the input, the size of its last dimension.
        widths: the width of each layer in order; the last one is the width of the output.
        activation: what makes the activation that follows every layer.

    Returns:
        A module from [..., features] to [..., widths[-1]].

    Raises:
        ValueError: without layers, or (when called) if the last dimension of the input is not ``features``.

    Example:
        >>> import torch
        >>> mlp(64, [128, 32])(torch.zeros(5, 7, 64)).shape
        torch.Size([5, 7, 32])
    """
    if not widths:
        raise ValueError("mlp needs at least one layer: widths is empty")
    layers: list[nn.Module] = [_Width(features)]
    for inputs, outputs in pairwise([features, *widths]):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers)


class _Width(nn.Module):
    """Passes [..., features] on and names what is wrong with anything else."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.features,):
            raise ValueError(
                f"this network reads {self.features} features in the last dimension of its input, but got shape "
                f"{tuple(x.shape)}; flatten the data to [..., {self.features}] or build the network for its width"
            )
        return x

    def extra_repr(self) -> str:
        return str(self.features)
