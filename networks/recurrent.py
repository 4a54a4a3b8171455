"""A recurrent encoder of sequences of different lengths, with gated recurrent units."""

from __future__ import annotations

__all__ = ["recurrent"]

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from jensen.checked import check_features, checked


@checked
def recurrent(
    features: int,
    width: int,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    output: Literal["steps", "flat", "last"] = "steps",
) -> nn.Module:
    r"""A gated recurrent unit for sequences of different lengths.

    .. math:: h_t = (1 - u_t) \odot n_t + u_t \odot h_{t-1}, \qquad u_t, r_t = \sigma(A [x_t, h_{t-1}]), \quad
              n_t = \tanh(B x_t + r_t \odot C h_{t-1})

    Called as ``network(x, lengths)`` with x of shape [..., T, features] and lengths, int64 [...], it ignores entries
    beyond a length, and its output there is zero. Without lengths all T steps are used.

    References:
        Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk and Bengio (2014), Learning Phrase Representations
        using RNN Encoder-Decoder for Statistical Machine Translation. https://arxiv.org/abs/1406.1078
        Schuster and Paliwal (1997), Bidirectional Recurrent Neural Networks. https://doi.org/10.1109/78.650093

    Args:
        features: the number of features of a step.
        width: the width of the output of a step; half of it for each direction of a bidirectional network.
        layers: the number of stacked units.
        bidirectional: whether a second unit runs from the end of the sequence, so that each step depends on later
            steps.
        output: ``"steps"``: the state of every step, [..., T, width]; ``"flat"``: the same states concatenated,
            [..., T width], a context of :class:`~jensen.families.GaussMarkov` per step; ``"last"``: the state after the
            whole sequence, [..., width].

    Returns:
        A module.

    Raises:
        ValueError: if a number is less than 1, a bidirectional width odd, or ``output`` none of these; and (when
            called) for x of another width, and lengths that are not between 1 and T, one for each sequence.

    Example:
        >>> import torch
        >>> network = recurrent(3, 16, bidirectional=True)
        >>> network(torch.zeros(5, 10, 3), torch.tensor([10, 4, 7, 1, 10])).shape
        torch.Size([5, 10, 16])
        >>> recurrent(3, 16, output="last")(torch.zeros(2, 5, 10, 3)).shape
        torch.Size([2, 5, 16])
    """
    if min(features, width, layers) < 1:
        raise ValueError(
            f"recurrent needs features, width and layers of at least 1, but got {features}, {width} and {layers}"
        )
    if bidirectional and width % 2:
        raise ValueError(
            f"a bidirectional network uses half of its width for each direction, so width must be even, but got {width}"
        )
    if output not in ("steps", "flat", "last"):
        raise ValueError(f'output must be "steps", "flat" or "last", but got {output!r}')
    return _Recurrent(features, width, layers, bidirectional, output)


class _Recurrent(nn.Module):
    def __init__(self, features: int, width: int, layers: int, bidirectional: bool, output: str) -> None:
        super().__init__()
        size = width // 2 if bidirectional else width
        self.unit = nn.GRU(features, size, layers, batch_first=True, bidirectional=bidirectional)
        self.features, self.output = features, output

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        check_features(x, "x", next(self.unit.parameters()))
        if x.dim() < 2 or x.shape[-1] != self.features or not x.shape[-2]:
            raise ValueError(
                f"this network expects sequences x of shape [..., T, {self.features}], T at least 1, but got shape "
                f"{tuple(x.shape)}"
            )
        leading, steps = x.shape[:-2], x.shape[-2]
        rows = x.reshape(leading.numel(), steps, self.features)  # [N, T, X]
        if lengths is None:
            states, last = self.unit(rows)
        else:
            packed = pack_padded_sequence(
                rows, _checked(lengths, leading, steps), batch_first=True, enforce_sorted=False
            )
            states, last = self.unit(packed)
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=steps)
        if self.output == "last":
            top = last[-2:] if self.unit.bidirectional else last[-1:]  # [directions, N, H]
            return torch.cat(list(top), -1).reshape(*leading, -1)
        if self.output == "flat":
            states = states.flatten(-2)
        h: Tensor = states.reshape(*leading, *states.shape[1:])
        return h


def _checked(lengths: Tensor, leading: torch.Size, steps: int) -> Tensor:
    """Lengths as a vector on the CPU, as packing requires."""
    if lengths.is_floating_point() or lengths.shape != leading[len(leading) - lengths.dim() :]:
        raise ValueError(
            f"lengths must be integers, one for each sequence, of shape {list(leading)}, but got {lengths.dtype} of "
            f"shape {list(lengths.shape)}"
        )
    flat = lengths.expand(leading).reshape(-1).cpu()
    if len(flat) and not (flat.min() >= 1 and flat.max() <= steps):
        raise ValueError(f"lengths must lie between 1 and {steps}, but got {int(flat.min())} to {int(flat.max())}")
    return flat
