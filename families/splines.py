r"""Neural spline flows: each feature is mapped by a monotone rational-quadratic spline with parameters from a network.

On a box [-B, B] cut into bins, with widths w, heights h and slopes d at the knots, and s = h / w in the bin of x,

.. math::
    \theta = (x - x_k) / w_k, \qquad
    y = y_k + h_k \frac{s \theta^2 + d_k \theta (1 - \theta)}{s + (d_{k+1} + d_k - 2 s) \theta (1 - \theta)}

Outside the box the spline is the identity. The code uses ``torch.where`` instead of boolean masks, so that a traced
graph is valid for any values.
"""

from __future__ import annotations

__all__ = ["NeuralSpline", "rational_quadratic"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jensen.checked import checked
from jensen.networks import mlp

from .base import positive
from .flows import Flow, autoregressive, start_near_zero

_SMALLEST = 1e-3  # width, height (as a share of the box) and slope of a bin


def rational_quadratic(x: Tensor, raw: Tensor, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A monotone spline of [-bound, bound] onto itself, elementwise; the identity outside.

    Args:
        x: values, [...].
        raw: the parameters of each spline, [..., 3 bins - 1]: logits of the widths, of the heights, raw inner slopes.
        bound: B.
        inverse: whether to invert it.

    Returns:
        The mapped values, and the log slope of the (forward) spline there, both [...].

    Example:
        >>> x, raw = torch.linspace(-6, 6, 50), torch.randn(50, 23)
        >>> y, log_slope = rational_quadratic(x, raw, bound=4.0)
        >>> torch.allclose(rational_quadratic(y, raw, bound=4.0, inverse=True)[0], x, atol=1e-4)
        True
    """
    bins = (raw.shape[-1] + 1) // 3
    raw_width, raw_height, raw_slope = raw.split([bins, bins, bins - 1], dim=-1)
    x_knots, y_knots = _knots(raw_width, bound), _knots(raw_height, bound)  # [..., bins + 1]
    slopes = F.pad(positive(raw_slope) + _SMALLEST, (1, 1), value=1.0)  # [..., bins + 1]

    inside = x.abs() < bound
    at = torch.where(inside, x, torch.zeros_like(x))  # avoids infinite gradients of discarded values
    edges = (y_knots if inverse else x_knots)[..., 1:-1]
    k = (at.unsqueeze(-1) >= edges).sum(-1, keepdim=True)  # [..., 1], the bin

    def pick(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    x0, y0 = pick(x_knots, k), pick(y_knots, k)
    w, h = pick(x_knots, k + 1) - x0, pick(y_knots, k + 1) - y0
    d0, d1 = pick(slopes, k), pick(slopes, k + 1)
    s = h / w
    curve = d0 + d1 - 2 * s
    if inverse:  # the root of a theta^2 + b theta + c in [0, 1], without cancellation
        rise = at - y0
        a, b, c = h * (s - d0) + rise * curve, h * d0 - rise * curve, -s * rise
        theta = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
    else:
        theta = (at - x0) / w
    theta = theta.clamp(0.0, 1.0)  # rounding at a knot
    between = theta * (1 - theta)
    below = s + curve * between
    mapped = x0 + theta * w if inverse else y0 + h * (s * theta.square() + d0 * between) / below
    slope = d1 * theta.square() + 2 * s * between + d0 * (1 - theta).square()
    log_slope = 2 * s.log() + slope.log() - 2 * below.log()
    return torch.where(inside, mapped, x), torch.where(inside, log_slope, torch.zeros_like(x))


def _knots(logits: Tensor, bound: float) -> Tensor:
    """Logits [..., bins] to knots [..., bins + 1] from -bound to bound."""
    bins = logits.shape[-1]
    sizes = _SMALLEST + (1 - bins * _SMALLEST) * logits.softmax(-1)
    inner = 2 * bound * sizes[..., :-1].cumsum(-1) - bound
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


class NeuralSpline(Flow):
    r"""Neural spline flow over a Gaussian with full covariance, autoregressive or by coupling.

    .. math:: y_d = \text{spline}(\epsilon_d; \text{network}(\epsilon_{<d}, g)) \quad\text{or}\quad
              y_b = \text{spline}(\epsilon_b; \text{network}(\epsilon_a, g)), \; y_a = \epsilon_a

    The order of the features is reversed from layer to layer. L is triangular by default, because splines end in the
    identity and cannot rotate or stretch space. A sample takes one pass of the networks; the log-density of any other
    value takes D passes of autoregressive networks, or one of coupling networks.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows. https://arxiv.org/abs/1906.04032

    Args:
        features: the number D of features.
        context: the width H of the context, or None: h already holds the parameters.
        coupling: whether each layer maps half of the features given the other half, with twice as many layers.
        layers: the number of layers; None: 2, and 4 for coupling.
        bins: the number of bins of a spline.
        bound: B, in standard deviations of the noise. It should be large, so that almost no noise falls outside: the
            map is the identity there, and the rare samples outside would lower the ELBO much.
        hidden: the widths of the hidden layers of each network.
        reads: the number G of context parameters that are inputs of the networks.
        triangular: whether L is triangular, else diagonal.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: for fewer than 2 or more than 500 bins, a bound that is not positive, or no layers.

    Example:
        >>> import torch
        >>> q = NeuralSpline(3, context=8, coupling=True)(torch.randn(5, 8))
        >>> z = q.rsample()
        >>> torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=1e-3)
        True
    """

    @checked
    def __init__(
        self,
        features: int,
        context: int | None,
        coupling: bool = False,
        layers: int | None = None,
        bins: int = 8,
        bound: float = 6.0,
        hidden: Sequence[int] = (64, 64),
        reads: int = 16,
        triangular: bool = True,
    ) -> None:
        if not 2 <= bins <= 500:
            raise ValueError(f"NeuralSpline needs between 2 and 500 bins, but got {bins}")
        if not 0 < bound < float("inf") or (layers is not None and layers < 1):
            raise ValueError(f"bound must be positive and layers at least 1, but got bound={bound}, layers={layers}")
        super().__init__(features, context, reads, triangular)
        self.coupling, self.bins, self.bound = coupling, bins, bound
        self.kept = features // 2 if coupling else 0  # the features before this index are inputs, left unchanged
        make: Callable[[], nn.Module] = (
            (lambda: _Coupling(features, self.kept, reads, hidden, 3 * bins - 1))
            if coupling
            else (lambda: autoregressive(features, reads, hidden, 3 * bins - 1))
        )
        self.networks = nn.ModuleList(make() for _ in range((4 if coupling else 2) if layers is None else layers))

    def bend(self, noise: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [..., D] to y, one pass of each network."""
        y, log_det = noise, noise.new_zeros(())
        for network in self.networks:
            y, log_slope = self._spline(y, network(y, g.tanh()), inverse=False)
            y, log_det = y.flip(-1), log_det + log_slope.sum(-1)
        return y, log_det

    def straighten(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse: D passes of each autoregressive network, one of each coupling network."""
        log_det = y.new_zeros(())
        for network in reversed(self.networks):
            x = y = y.flip(-1)
            for _ in range(1 if self.coupling else self.features):  # pass d completes feature d
                x, log_slope = self._spline(y, network(x, g.tanh()), inverse=True)
            y, log_det = x, log_det + log_slope.sum(-1)
        return y, log_det

    def _spline(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map the features from ``kept`` on, given the spline parameters [..., 3 bins - 1, D - kept]."""
        mapped, log_slope = rational_quadratic(x[..., self.kept :], raw.transpose(-1, -2), self.bound, inverse)
        return torch.cat([x[..., : self.kept], mapped], -1), log_slope

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, coupling={self.coupling}, bins={self.bins}, bound={self.bound:g}"


class _Coupling(nn.Module):
    """A network from the kept features and g to ``outputs`` numbers for each of the others, near zero at first."""

    def __init__(self, features: int, kept: int, reads: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.kept, self.outputs = kept, outputs
        self.body = mlp(kept + reads, hidden)
        self.head = nn.Linear(hidden[-1], outputs * (features - kept))
        start_near_zero(self.head)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        read = torch.cat([x[..., : self.kept], g.expand(*x.shape[:-1], -1)], -1)
        raw: Tensor = self.head(self.body(read)).unflatten(-1, (self.outputs, -1))
        return raw
