r"""Sylvester flows: residual layers of width M with a log-determinant in O(M).

.. math::
    f(x) = x + Q R \tanh(\tilde R Q^\top x + b), \qquad
    \log |\det f'| = \sum_m \log \left(1 + R_{mm} \tilde R_{mm} \tanh'(\cdot)_m \right)

with Q of M orthonormal columns, R and R~ upper triangular. Their diagonals lie within (-1, 1), so f is invertible;
there is no formula for the inverse.
"""

from __future__ import annotations

__all__ = ["Sylvester"]

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from jensen.checked import checked

from .base import lower_triangle, matvec
from .flows import Flow

_EDGE = 1 - 1e-3  # a product of diagonals at -1 would make the map singular


class Sylvester(Flow):
    r"""Sylvester normalizing flow, with all parameters as functions of the context.

    | kind | Q | M |
    | --- | --- | --- |
    | ``"orthogonal"`` | the Q of a QR decomposition, a function of the context | ``rank`` |
    | ``"householder"`` | a product of ``rank`` reflections | D |
    | ``"triangular"`` | the identity, or the features in reverse order | D |

    Log q is known only for the flow's own samples; for any other value it raises ``NotImplementedError``.

    References:
        van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester Normalizing Flows for Variational Inference.
        https://arxiv.org/abs/1803.05649

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        kind: the kind of Q.
        layers: the number of layers.
        rank: columns of an orthogonal Q, at most D, or the number of reflections; None: D, at most 8.
        triangular: whether L is triangular, so that the base Gaussian has a full covariance; diagonal in the paper.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: for another ``kind``, or a ``rank`` that is not between 1 and D.

    Example:
        >>> import torch
        >>> q = Sylvester(3, context=8, kind="householder")(torch.randn(5, 8))
        >>> q.log_prob(q.rsample()).shape
        torch.Size([5])
    """

    @checked
    def __init__(
        self,
        features: int,
        context: int | None,
        kind: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
        layers: int = 4,
        rank: int | None = None,
        triangular: bool = True,
    ) -> None:
        if kind not in ("orthogonal", "householder", "triangular"):
            raise ValueError(f'kind must be "orthogonal", "householder" or "triangular", but got {kind!r}')
        rank = min(features, 8) if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank must lie between 1 and the number of features, {features}, but got {rank}")
        self.kind, self.layers, self.rank = kind, layers, rank
        width = rank if kind == "orthogonal" else features
        turn = 0 if kind == "triangular" else features * rank
        self._layer = [turn, *(width * (width - 1) // 2,) * 2, width, width, width]
        super().__init__(features, context, layers * sum(self._layer), triangular)
        if isinstance(self.affine, nn.Linear):  # it starts close to its base Gaussian for every x
            with torch.no_grad():
                self.affine.weight[-layers * sum(self._layer) :] *= 0.01
                self.affine.bias[-layers * sum(self._layer) :] *= 0.3

    def bend(self, noise: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [..., D] to y, layer after layer."""
        y, log_det = noise, noise.new_zeros(())
        for part in g.chunk(self.layers, dim=-1):
            turn, below, below_tilde, raw, raw_tilde, bias = part.split(self._layer, dim=-1)
            width = bias.shape[-1]
            diagonal, diagonal_tilde = _EDGE * raw.tanh(), _EDGE * raw_tilde.tanh()  # [..., M]
            upper = lower_triangle(below, width).transpose(-1, -2) / width**0.5
            upper_tilde = lower_triangle(below_tilde, width).transpose(-1, -2) / width**0.5
            turned, turned_back = self._orthonormal(turn)
            inner = turned_back(y)  # [..., M]
            inner = torch.tanh(matvec(upper_tilde, inner) + diagonal_tilde * inner + bias)
            y = y + turned(matvec(upper, inner) + diagonal * inner)
            log_det = log_det + torch.log1p(diagonal * diagonal_tilde * (1 - inner.square())).sum(-1)
            if self.kind == "triangular":
                y = y.flip(-1)
        return y, log_det

    def straighten(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Not available in closed form."""
        raise NotImplementedError(
            "a Sylvester flow has no inverse in closed form, so log q is known only for its own samples (rsample): "
            "for log q of any value use FullCovariance, IAF or NeuralSpline"
        )

    def _orthonormal(self, turn: Tensor) -> tuple[_Map, _Map]:
        """The maps x -> Q x and y -> Q^T y."""
        if self.kind == "orthogonal":
            raw = turn.unflatten(-1, (self.features, self.rank))
            eye = torch.eye(self.features, self.rank, dtype=turn.dtype, device=turn.device)
            basis = torch.linalg.qr(eye + raw).Q  # [..., D, M]
            return partial(matvec, basis), partial(matvec, basis.transpose(-1, -2))
        if self.kind == "householder":
            normals = turn.unflatten(-1, (self.rank, self.features))
            normals = normals / normals.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            vectors = normals.unbind(-2)  # of [..., D]
            return partial(_reflect, vectors), partial(_reflect, vectors[::-1])
        return _same, _same


_Map = Callable[[Tensor], Tensor]


def _reflect(normals: Sequence[Tensor], x: Tensor) -> Tensor:
    """Reflect x [..., D] at the hyperplanes with these unit normals, the last one first."""
    for normal in reversed(normals):
        x = x - 2 * normal * (normal * x).sum(-1, keepdim=True)
    return x


def _same(x: Tensor) -> Tensor:
    return x
