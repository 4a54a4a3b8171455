r"""When to stop: once the parameters no longer improve, as far as the noise of validation shows.

Validation uses the same samples every time, so the improvement of a data point over the last W = 10 epochs is a paired
difference, :math:`d_n = \mathcal{L}_n(\text{now}) - \mathcal{L}_n(W \text{ epochs ago})`, in which most of the noise
cancels. Training stops if even its upper limit,

.. math:: \bar d + 2 \, \text{sd}(d) / \sqrt{N},

is below a tolerance. The parameters compared are averages over the steps: single iterates move by more than they
improve.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins and Vehtari (2020), Robust, Accurate Stochastic Optimization for
    Variational Inference: averages of iterates, and rules on them. https://arxiv.org/abs/2009.00666
"""

from __future__ import annotations

__all__ = ["WINDOW", "has_converged"]

from collections.abc import Sequence

from torch import Tensor

WINDOW = 10  # epochs


def has_converged(recent: Sequence[Tensor], tolerance: float) -> bool:
    """Whether the improvement over the window is below a tolerance, with its error.

    Args:
        recent: the validation bound of each data point [N] after each of the last epochs; the last one is the present.
        tolerance: in nats per data point.

    Example:
        >>> import torch
        >>> level = torch.randn(100)
        >>> has_converged([level + 0.1 * i for i in range(11)], 0.01), has_converged([level] * 11, 0.01)
        (False, True)
        >>> has_converged([level] * 10, 0.01)
        False
    """
    if len(recent) <= WINDOW:
        return False
    gain = recent[-1].double() - recent[-1 - WINDOW].double()
    error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else float("inf")
    return float(gain.mean()) + 2 * error < tolerance
