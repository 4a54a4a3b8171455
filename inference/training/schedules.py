r"""Learning rates that change with every step, by name.

| schedule | factor of the learning rate at step t of T |
| --- | --- |
| ``"constant"`` | 1 |
| ``"cosine"`` | (1 + cos(pi t / T)) / 2 |
| ``"warmup"`` | t / W in the first W steps, a twentieth of all, then 1 |
| ``"warmup-cosine"`` | t / W, then (1 + cos(pi (t - W) / (T - W))) / 2 |

References:
    Loshchilov and Hutter (2017), SGDR: Stochastic Gradient Descent with Warm Restarts. https://arxiv.org/abs/1608.03983
    Goyal et al. (2017), Accurate, Large Minibatch SGD. https://arxiv.org/abs/1706.02677
"""

from __future__ import annotations

__all__ = ["Schedule", "factor"]

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "warmup", "warmup-cosine"]

_WARM = 0.05  # the share of all steps in which the rate rises


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor of the learning rate at a step.

    Args:
        schedule: its name.
        step: from 0.
        total: the number of steps.

    Example:
        >>> [round(factor("warmup-cosine", step, 100), 2) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.51, 0.0]
    """
    warm = math.ceil(_WARM * total) if schedule.startswith("warmup") else 0
    if step < warm:
        return (step + 1) / warm
    if schedule.endswith("cosine"):
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    return 1.0
