r"""Networks of data with missing values: a filled input with the mask beside it.

.. math:: x \mapsto f([\tilde x, m]), \qquad m_i = 1 \text{ if } x_i \text{ is observed, else } 0, \qquad
          \tilde x_i = x_i \text{ if } m_i = 1, \text{ else } c_i

A missing value is NaN in x. Any function of :math:`[\tilde x, m]` conditions on the observed values only.
"""

from __future__ import annotations

__all__ = ["Masked", "with_mask"]

import math
from typing import Any

import torch
from torch import Tensor, nn

from jensen.checked import as_event, check_data, check_features, checked


class Masked(nn.Module):
    r"""A network of data with missing values (NaN), which get a fill value; the mask is an additional input.

    The wrapped network must be built for twice the features: x comes first, then the mask, 1 where x is observed and 0
    where it is missing.

    | wrapped network | ``features`` | input of the network |
    | --- | --- | --- |
    | ``mlp(2 * X, ...)`` | X | [..., X] becomes [..., 2 X] |
    | ``conv_encoder((2 * C, H, W), ...)`` | (C, H, W) | C more channels; images may be flat |
    | ``recurrent(2 * X, ...)`` | X | [..., T, X] becomes [..., T, 2 X] |
    | ``Conditioned(mlp(2 * X + Y, ...), Y)`` | X | the mask is before the covariates |

    With ``drop`` above 0, it hides more values at random in training mode, so that the network learns from other
    patterns of holes than those of the data. Only this network sees these additional holes: a model still scores every
    observed value.

    References:
        Collier, Nazabal and Williams (2020), VAEs in the Presence of Missing Data: the mask as an input of the encoder.
        https://arxiv.org/abs/2006.05301
        Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
        https://arxiv.org/abs/1812.02633
        Che, Purushotham, Cho, Sontag and Liu (2018), Recurrent Neural Networks for Multivariate Time Series with
        Missing Values. https://arxiv.org/abs/1606.01865

    Args:
        network: a network whose input has twice the features of x.
        features: the number X of features of x (of a step of a sequence), or (channels, height, width) of images.
        fill: the value for missing features: a number, or one for each feature such as their means,
            ``x.nanmean(0)``.
        drop: the probability that an observed value is hidden from the network in training mode.

    Raises:
        ValueError: if ``fill`` is not finite or not of the shape of one x, or ``drop`` is not in [0, 1]; and (when
            called) for x of another width, or a network that is not built for twice the features.

    Example:
        >>> from jensen.networks import mlp
        >>> encoder = Masked(mlp(2 * 3, [16]), 3)
        >>> x = torch.tensor([[1.0, torch.nan, 2.0]])
        >>> encoder(x).shape
        torch.Size([1, 16])
        >>> Masked(nn.Identity(), 3)(x)
        tensor([[1., 0., 2., 1., 0., 1.]])
        >>> Masked(mlp(3, [16]), 3)(x)
        Traceback (most recent call last):
        ValueError: Masked doubles the input: build the network for 2 * 3 = 6 features, but it was built for 3
    """

    fill: Tensor

    @checked
    def __init__(
        self,
        network: nn.Module,
        features: int | tuple[int, int, int],
        *,
        fill: float | Tensor = 0.0,
        drop: float = 0.0,
    ) -> None:
        event = (features,) if isinstance(features, int) else tuple(features)
        if min(event) < 1:
            raise ValueError(f"features is the width of x and must be at least 1, but got {features}")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop must be a probability in [0, 1], but got {drop}")
        value = fill if isinstance(fill, Tensor) else torch.tensor(float(fill))
        check_data(value, "fill")
        if value.dim() and value.numel() != math.prod(event):
            raise ValueError(
                f"fill must be a number, or a tensor of shape {list(event)} with one for each feature, but got shape "
                f"{list(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError("fill must be finite, but it holds NaN or infinity: a feature may have no observed value")
        super().__init__()
        self.network = network
        self.event = event
        self.drop = float(drop)
        self.register_buffer("fill", value.detach().reshape(event if value.dim() else ()).expand(event).clone())

    def forward(self, x: Tensor, *others: Any) -> Any:
        """The network's output for x with NaN where it is missing; covariates or lengths are passed on unchanged.

        Args:
            x: [..., X], or images [..., C, H, W] or [..., C * H * W].
            others: the other arguments of the network.
        """
        check_features(x, "x")
        shape = self._shape(x)
        seen = ~x.isnan()
        if self.training and self.drop:
            seen = seen & (torch.rand_like(x) >= self.drop)
        given = with_mask(x, seen, self.fill.to(x.dtype).reshape(shape), dim=-len(shape))
        try:
            return self.network(given, *others)
        except (RuntimeError, ValueError) as error:
            if self._runs(given.narrow(-len(shape), 0, shape[0]), *others):
                width, kind = self.event[0], "features" if len(self.event) == 1 else "channels"
                raise ValueError(
                    f"Masked doubles the input: build the network for 2 * {width} = {2 * width} {kind}, but it was "
                    f"built for {width}"
                ) from error
            if type(error) not in (RuntimeError, ValueError):  # others may not be made of a sentence
                raise
            sizes = f"from {list(x.shape)} to {list(given.shape)}"
            raise type(error)(f"{error} (Masked doubles the input, {sizes})") from error

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of one x as it is given: images may be flat."""
        for shape in (self.event, (math.prod(self.event),)):
            if tuple(x.shape[-len(shape) :]) == shape:
                return shape
        expected = ", ".join(map(str, self.event))
        flat = f", or flat ones [..., {math.prod(self.event)}]" if len(self.event) > 1 else ""
        remedy = as_event(x, self.event, "x") or "give its width as features, and build the network for twice of it"
        raise ValueError(f"Masked expects x of shape [..., {expected}]{flat}, but got {list(x.shape)}; {remedy}")

    def _runs(self, *given: Any) -> bool:
        """Whether the network runs on this input: it was built for x without the mask."""
        try:
            self.network(*given)
        except Exception:  # the first error is reported
            return False
        return True

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        features = self.event[0] if len(self.event) == 1 else self.event
        return f"features={features}, drop={self.drop}"


def with_mask(x: Tensor, seen: Tensor, fill: Tensor | float = 0.0, dim: int = -1) -> Tensor:
    """Concatenate x, filled where it is not seen, and the mask: twice the size in dimension ``dim``.

    Example:
        >>> x = torch.tensor([1.0, torch.nan])
        >>> with_mask(x, ~x.isnan())
        tensor([1., 0., 1., 0.])
    """
    return torch.cat([torch.where(seen, x, fill), seen.to(x.dtype)], dim)
