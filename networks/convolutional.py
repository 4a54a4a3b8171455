r"""Convolutional networks for images: encoder layers halve height and width, decoder layers double them.

Images are [..., channels, height, width] or flat, [..., channels * height * width], as in the data sets. Any leading
dimensions are kept. Height and width must be divisible by 2 to the power of the number of layers: 28 x 28 allows two,
32 x 32 up to five. There is no normalisation across a batch.
"""

from __future__ import annotations

__all__ = ["conv_decoder", "conv_encoder"]

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from jensen.checked import as_event, check_features, checked

from .mlp import made_by, mlp

Image = tuple[int, int, int]


@checked
def conv_encoder(
    image: Image,
    channels: Sequence[int],
    width: int,
    *,
    gated: bool = False,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    r"""A convolutional encoder: images to contexts.

    Each layer is a convolution of stride 2 (kernel 4) with an activation; the last layer is an affine map with an
    activation.

    References:
        LeCun, Bottou, Bengio and Haffner (1998), Gradient-Based Learning Applied to Document Recognition.
        Radford, Metz and Chintala (2016), Unsupervised Representation Learning with Deep Convolutional Generative
        Adversarial Networks: strides instead of pooling. https://arxiv.org/abs/1511.06434

    Args:
        image: channels, height and width of an image.
        channels: the number of channels after each convolution.
        width: the width of the output.
        gated: whether convolutions are gated linear units (Dauphin et al. 2017) instead of using ``activation``.
        activation: constructor of the activations.

    Returns:
        A module from [..., *image], or flat [..., channels * height * width], to [..., width].

    Raises:
        ValueError: without layers, if height or width cannot be halved that often, or (when called) for another image
            shape.

    Example:
        >>> import torch
        >>> encoder = conv_encoder((1, 28, 28), [16, 32], 128)
        >>> encoder(torch.zeros(5, 7, 1, 28, 28)).shape, encoder(torch.zeros(5, 784)).shape
        (torch.Size([5, 7, 128]), torch.Size([5, 128]))
    """
    small = _halved(image, channels, len(channels), "conv_encoder")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([image[0], *channels]):
        layers += _layer(nn.Conv2d, inputs, outputs, gated, activation)
    head = mlp(channels[-1] * math.prod(small), [width], activation)
    return nn.Sequential(_Flat(image), _OnImages(image, nn.Sequential(*layers)), head)


@checked
def conv_decoder(
    features: int,
    image: Image,
    channels: Sequence[int],
    *,
    parameters: int | None = None,
    gated: bool = False,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    r"""A convolutional decoder: latent features to the context or parameters of an observation family.

    One affine map and its activation make small images of ``channels[0]`` channels. Each layer is a transposed
    convolution of stride 2 (kernel 4) with an activation; the last one has ``channels[-1]`` channels.

    With ``parameters=None`` it ends in that activation. The affine map of a family then connects the whole image to
    every pixel, with many weights: ``Bernoulli((1, 28, 28), context=channels[-1] * 784)``. With ``parameters=p`` a last
    convolution (kernel 3, no activation) gives p numbers for every value of the image, one parameter after the other,
    for a family with ``context=None``:

    | p | likelihood |
    | --- | --- |
    | 1 | ``Bernoulli((1, 28, 28), None)``, or ``(784, None)`` for flat data; other families of one parameter |
    | 2 | ``Gaussian((1, 28, 28), None, scale="context")``; other families of two parameters |
    | C | ``Categorical((1, 28, 28), None, levels=C)`` |

    References:
        Radford, Metz and Chintala (2016), Unsupervised Representation Learning with Deep Convolutional Generative
        Adversarial Networks. https://arxiv.org/abs/1511.06434

    Args:
        features: the width of the input, the size of its last dimension.
        image: channels, height and width of an image.
        channels: the number of channels of the small images, then the number after each layer.
        parameters: the number of parameters for every value of the image; None: end in the activation.
        gated: whether convolutions are gated linear units (Dauphin et al. 2017) instead of using ``activation``.
        activation: constructor of the activations.

    Returns:
        A module from [..., features] to [..., channels[-1] * height * width], or with ``parameters`` to
        [..., parameters * X], X the number of values of an image.

    Raises:
        ValueError: for fewer than two ``channels`` or ``parameters`` less than 1, if height or width cannot be halved
            that often, or (when called) if the last dimension of the input is not ``features``.

    Example:
        >>> import torch
        >>> from jensen.families import Bernoulli
        >>> decoder = conv_decoder(8, (1, 28, 28), [64, 32, 16], parameters=1)
        >>> likelihood = Bernoulli((1, 28, 28), context=None)
        >>> likelihood(decoder(torch.zeros(5, 7, 8))).sample().shape
        torch.Size([5, 7, 1, 28, 28])
        >>> likelihood = Bernoulli((1, 28, 28), context=2 * 784)
        >>> likelihood(conv_decoder(8, (1, 28, 28), [64, 32, 2])(torch.zeros(5, 8))).sample().shape
        torch.Size([5, 1, 28, 28])
    """
    small = _halved(image, channels, len(channels) - 1, "conv_decoder")
    if parameters is not None and parameters < 1:
        raise ValueError(
            "parameters is the number of parameters per value of the image and must be at least 1, but got "
            f"{parameters}"
        )
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += _layer(nn.ConvTranspose2d, inputs, outputs, gated, activation)
    if parameters is not None:
        layers.append(nn.Conv2d(channels[-1], parameters * image[0], kernel_size=3, padding=1))
    head = mlp(features, [channels[0] * math.prod(small)], activation)
    return nn.Sequential(head, _OnImages((channels[0], *small), nn.Sequential(*layers)))


def _halved(image: Image, channels: Sequence[int], layers: int, owner: str) -> tuple[int, int]:
    """Height and width after ``layers`` halvings."""
    if layers < 1 or min(channels) < 1:
        raise ValueError(f"{owner} needs at least one layer, and channels of at least 1, but got {list(channels)}")
    _, height, width = image
    if min(image) < 1 or height % 2**layers or width % 2**layers:
        raise ValueError(
            f"{owner} halves height and width {layers} times, but got images of (channels, height, width) = "
            f"{tuple(image)}: use fewer layers (fewer entries in channels), or pad the images"
        )
    return height // 2**layers, width // 2**layers


def _layer(
    convolution: Callable[..., nn.Module], inputs: int, outputs: int, gated: bool, activation: Callable[[], nn.Module]
) -> list[nn.Module]:
    """A convolution that halves or doubles height and width, with its activation or gate."""
    made = convolution(inputs, 2 * outputs if gated else outputs, kernel_size=4, stride=2, padding=1)
    return [made, nn.GLU(dim=-3) if gated else made_by(activation)]


class _Flat(nn.Module):
    """Images [..., C, H, W], or flat ones, to flat ones; raises ValueError for any other shape."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self.image = tuple(image)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, "x")
        if tuple(x.shape[-3:]) == self.image:
            return x.flatten(-3)
        if x.shape[-1:] == (math.prod(self.image),):
            return x
        shape = ", ".join(map(str, self.image))
        remedy = as_event(x, self.image, "x") or "build the network for this shape"
        raise ValueError(
            f"this network expects images [..., {shape}], or flat ones [..., {math.prod(self.image)}], but got shape "
            f"{tuple(x.shape)}; {remedy}"
        )

    def extra_repr(self) -> str:
        return str(self.image)


class _OnImages(nn.Module):
    """Apply a network of images to flat images with any leading dimensions: [..., C * H * W] to [..., C' * H' * W']."""

    def __init__(self, image: Image, network: nn.Module) -> None:
        super().__init__()
        self.image = tuple(image)
        self.network = network

    def forward(self, h: Tensor) -> Tensor:
        made: Tensor = self.network(
            h.reshape(-1, *self.image)
        )  # [B, C', H', W'], B the product of the leading dimensions
        return made.reshape(*h.shape[:-1], made.shape[1:].numel())
