"""A linear encoder that shares the weight of a linear decoder."""

from __future__ import annotations

__all__ = ["Transposed"]

from torch import Tensor, nn

from jensen.checked import checked


class Transposed(nn.Module):
    r"""The transpose of a linear layer with the same offset: a linear encoder with tied weights.

    .. math:: f(z) = W z + b, \qquad g(x) = W^\top (x - b)

    It holds the layer without registering it, so W and b are trained and saved once, with the layer's owner.

    References:
        Baldi and Hornik (1989), Neural Networks and Principal Component Analysis.

    Args:
        layer: the linear layer f, from [..., D] to [..., X].

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 5)
        >>> Transposed(layer)(torch.zeros(7, 5)).shape
        torch.Size([7, 2])
    """

    @checked
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so not registered

    def forward(self, x: Tensor) -> Tensor:
        """The code of x, [..., X]: [..., D]."""
        (layer,) = self._layer
        return (x if layer.bias is None else x - layer.bias) @ layer.weight
