r"""The average of the parameters over the steps, which is closer to the optimum than the last step.

.. math:: \bar\theta_t = \bar\theta_{t-1} + w_t \, (\theta_t - \bar\theta_{t-1})

| average | weight of step t |
| --- | --- |
| ``"ema"`` | 1 - min(0.999, (1 + t) / (10 + t)): an exponential moving average whose memory grows with the run |
| ``"polyak"`` | 4 / (t + 3), at most 1: all steps, weighted as t^3, so that the first ones are forgotten |

References:
    Polyak and Juditsky (1992), Acceleration of Stochastic Approximation by Averaging.
    Shamir and Zhang (2013), Stochastic Gradient Descent for Non-smooth Optimization: polynomial-decay averaging.
"""

from __future__ import annotations

__all__ = ["Average", "Averaging"]

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from jensen.kernel.modes import tensors_kept

Averaging = Literal["ema", "polyak"]

_DECAY = 0.999
_POWER = 3


class Average:
    """The averages of parameters.

    Args:
        kind: ``"ema"`` or ``"polyak"``.
        parameters: the parameters at the start.

    Attributes:
        steps: the number of steps in the average.
    """

    def __init__(self, kind: Averaging, parameters: Iterable[nn.Parameter]) -> None:
        self.kind, self.steps = kind, 0
        self._of: dict[nn.Parameter, Tensor] = {}
        self.of(parameters)

    def of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The averages of these parameters; those of new ones start at their values."""
        return [self._of.setdefault(p, p.detach().clone()) for p in parameters]

    def weight(self, step: int) -> float:
        """The weight of a step, counted from 1."""
        if self.kind == "ema":
            return 1 - min(_DECAY, (1 + step) / (10 + step))
        return min(1.0, (1 + _POWER) / (step + _POWER))

    def take(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add a step, whose parameters these are."""
        self.steps += 1
        torch._foreach_lerp_(self.of(parameters), [p.detach() for p in parameters], self.weight(self.steps))

    @torch.no_grad()
    def load(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], steps: int) -> None:
        """Continue from saved averages."""
        self.steps = steps
        for mean, value in zip(self.of(parameters), values, strict=True):
            mean.copy_(value)

    @contextmanager
    def used(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside the block, the parameters are their averages."""
        with tensors_kept(parameters):
            self.write(parameters)
            yield

    @torch.no_grad()
    def write(self, parameters: Sequence[nn.Parameter]) -> None:
        """Set the parameters to their averages."""
        for p, mean in zip(parameters, self.of(parameters), strict=True):
            p.copy_(mean)
