r"""Multilayer perceptrons: plain, residual and gated. Each ends in an activation and keeps leading dimensions.

| network | a layer |
| --- | --- |
| mlp | h' = a(A h + b) |
| residual_mlp | h' = h + C a(A a(h) + b) + c |
| gated_mlp | h' = (A h + b) * sigmoid(C h + c) |
"""

from __future__ import annotations

__all__ = ["gated_mlp", "made_by", "mlp", "residual_mlp"]

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from jensen.checked import check_features, checked, shown


@checked
def mlp(features: int, widths: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    r"""A multilayer perceptron that ends in an activation.

    .. math:: h_0 = x, \qquad h_l = a(A_l h_{l-1} + b_l)

    Args:
        features: the width of the input, the size of its last dimension.
        widths: the width of each layer in order; the last one is the width of the output.
        activation: constructor of the activation after every layer.

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
    layers: list[nn.Module] = [_Width(features, widths)]
    for inputs, outputs in pairwise([features, *widths]):
        layers += [nn.Linear(inputs, outputs), made_by(activation)]
    return nn.Sequential(*layers)


def made_by(activation: Callable[[], nn.Module]) -> nn.Module:
    """Call ``activation()``. Raises TypeError unless it returns a module."""
    remedy = "activation must be a class of torch.nn such as nn.SiLU, or another function without arguments"
    try:
        made = activation()
    except TypeError as error:
        raise TypeError(f"activation() failed ({error}): {remedy}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation() must return a module, but it returned {shown(made)}: {remedy}")
    return made


@checked
def gated_mlp(features: int, widths: Sequence[int]) -> nn.Sequential:
    r"""A multilayer perceptron of gated linear units: each layer is an affine map times a sigmoid gate.

    .. math:: h_0 = x, \qquad h_l = (A_l h_{l-1} + b_l) \odot \sigma(C_l h_{l-1} + c_l)

    References:
        Dauphin, Fan, Auli and Grangier (2017), Language Modeling with Gated Convolutional Networks.
        https://arxiv.org/abs/1612.08083
        Tomczak and Welling (2018), VAE with a VampPrior. https://arxiv.org/abs/1705.07120

    Args:
        features: the width of the input, the size of its last dimension.
        widths: the width of each layer in order; the last one is the width of the output.

    Returns:
        A module from [..., features] to [..., widths[-1]].

    Raises:
        ValueError: without layers, or (when called) if the last dimension of the input is not ``features``.

    Example:
        >>> import torch
        >>> gated_mlp(64, [300, 300])(torch.zeros(5, 7, 64)).shape
        torch.Size([5, 7, 300])
    """
    if not widths:
        raise ValueError("gated_mlp needs at least one layer: widths is empty")
    layers: list[nn.Module] = [_Width(features, widths)]
    for inputs, outputs in pairwise([features, *widths]):
        layers += [nn.Linear(inputs, 2 * outputs), nn.GLU()]
    return nn.Sequential(*layers)


@checked
def residual_mlp(
    features: int, width: int, blocks: int = 2, activation: Callable[[], nn.Module] = nn.SiLU
) -> nn.Sequential:
    r"""A residual multilayer perceptron, whose layers add to their input so that deep networks train well.

    .. math:: h_0 = A x + b, \qquad h_l = h_{l-1} + C_l \, a(A_l \, a(h_{l-1}) + b_l) + c_l, \qquad y = a(h_L)

    References:
        He, Zhang, Ren and Sun (2016), Identity Mappings in Deep Residual Networks. https://arxiv.org/abs/1603.05027

    Args:
        features: the width of the input, the size of its last dimension.
        width: the width of every block, and of the output.
        blocks: the number L of blocks, of two affine maps each.
        activation: constructor of the activations.

    Returns:
        A module from [..., features] to [..., width].

    Raises:
        ValueError: without blocks, or (when called) if the last dimension of the input is not ``features``.

    Example:
        >>> import torch
        >>> residual_mlp(64, 128, blocks=3)(torch.zeros(5, 7, 64)).shape
        torch.Size([5, 7, 128])
    """
    if blocks < 1:
        raise ValueError(f"residual_mlp needs blocks of at least 1, but got {blocks}")
    start = _Width(features, [width])
    body = [_Residual(width, activation) for _ in range(blocks)]
    return nn.Sequential(start, nn.Linear(features, width), *body, made_by(activation))


class _Residual(nn.Module):
    """Two affine maps, each after an activation, added to their input."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        first, second = made_by(activation), made_by(activation)
        self.added = nn.Sequential(first, nn.Linear(width, width), second, nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        added: Tensor = self.added(h)
        return h + added


class _Width(nn.Module):
    """Returns [..., features] unchanged; raises ValueError for any other shape."""

    def __init__(self, features: int, widths: Sequence[int]) -> None:
        super().__init__()
        if min(features, *widths) < 1:
            raise ValueError(
                f"features and the widths of layers must be at least 1, but got {features} and {list(widths)}"
            )
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, "x")
        if x.shape[-1:] != (self.features,):
            raise ValueError(
                f"this network expects {self.features} features in the last dimension of its input, but got shape "
                f"{tuple(x.shape)}; flatten the data to [..., {self.features}], or build the network for this width"
            )
        return x

    def extra_repr(self) -> str:
        return str(self.features)
