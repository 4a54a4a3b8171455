r"""The quality of a stochastic gradient: its mean relative to its noise.

.. math:: \text{SNR} = \frac{\|\mathbb{E} g\|}{\sqrt{\mathbb{E} \|g - \mathbb{E} g\|^2}}
"""

from __future__ import annotations

__all__ = ["GradientSignal", "gradient_signal"]

from dataclasses import dataclass
from math import nan, sqrt

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from jensen.checked import checked
from jensen.kernel.batches import Data, as_tensors
from jensen.kernel.looks import look_at
from jensen.kernel.modes import modes_kept
from jensen.kernel.parameters import owners_of, store_kept
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program, parameters_of

from .fit import check_objective


@dataclass(frozen=True, eq=False, repr=False)
class GradientSignal:
    """Repeated gradients of one loss at fixed parameters; made by :func:`gradient_signal`.

    Attributes:
        mean: their mean, [P].
        variance: the variance of one gradient, [P].
        repeats: R, the number of gradients.

    Example:
        >>> signal = GradientSignal(torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.5]), repeats=1000)
        >>> round(signal.snr, 3)
        5.0
    """

    mean: Tensor
    variance: Tensor
    repeats: int

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio of one gradient; the square of the mean is corrected for its remaining noise."""
        noise = float(self.variance.sum())
        signal = float(self.mean.square().sum()) - noise / self.repeats
        return sqrt(max(signal, 0.0) / noise) if noise else nan

    def __repr__(self) -> str:
        return f"<GradientSignal: {len(self.mean)} parameters, {self.repeats} repeats, SNR {self.snr:.3g}>"


@checked
def gradient_signal(
    model: Program,
    guide: Program,
    data: Data,
    objective: ELBO,
    *,
    repeats: int = 200,
    of: nn.Module | None = None,
    seed: int | None = None,
) -> GradientSignal:
    """Sample the gradient of an objective's loss many times, at the current parameters.

    References:
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better. https://arxiv.org/abs/1802.04537

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        objective: an objective with ``differentiable_loss``; the knobs of an :class:`~jensen.inference.Objective` are
            those of its own ``step``, which ``fit`` does not change.
        repeats: the number of gradients, at least 2.
        of: the module whose parameters are differentiated; None: the guide, or the parameters that it reads.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.

    Returns:
        The :class:`GradientSignal`.

    Raises:
        ValueError: for ``repeats`` below 2, and if there is no parameter.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.inference import IWAE
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model, x = PPCA(5, latent=2), torch.randn(20, 5)
        >>> guide = amortize(model, mlp(5, [16]), MeanField, context=16)
        >>> few, many = (gradient_signal(model, guide, x, IWAE(k), repeats=50, seed=0).snr for k in (1, 256))
        >>> many < few
        True
    """
    if repeats < 2:
        raise ValueError(f"repeats is the number of gradients, at least 2, but got {repeats}")
    check_objective(objective)
    tensors = as_tensors(data)
    owners = owners_of(model, guide)
    with store_kept(), modes_kept(owners), private_randomness(seed, "gradient_signal"):
        for owner in owners:
            owner.eval()
        look_at(model, guide, tensors)
        if of is None:
            parameters = parameters_of(model, guide, *tensors)[1]
        else:
            parameters = [p for p in of.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                f"there is no trainable parameter in {'model and guide' if of is None else 'of'} for a gradient"
            )
        total, squares = torch.zeros(()), torch.zeros(())
        for _ in range(repeats):
            loss = objective.differentiable_loss(model, guide, *tensors)  # type: ignore[attr-defined]
            parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(parts, parameters, strict=True)]
            gradient = torch.cat(flat).double()  # [P]
            total, squares = total + gradient, squares + gradient.square()
    mean = total / repeats
    variance = (squares / repeats - mean.square()).clamp_min(0) * (repeats / (repeats - 1))
    return GradientSignal(mean, variance, repeats)
