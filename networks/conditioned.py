"""Networks with covariates (class labels, or any vector) as additional input."""

from __future__ import annotations

__all__ = ["Conditioned", "as_vectors", "join_covariates"]

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jensen.checked import checked


class Conditioned(nn.Module):
    r"""A network of the concatenated input and covariates.

    .. math:: (x, y) \mapsto f([x, y])

    Covariates are class indices, int64 [N], which become one-hot vectors, or any vectors [N, Y].

    References:
        Sohn, Lee and Yan (2015), Learning Structured Output Representation Using Deep Conditional Generative Models.

    Args:
        network: a network from [..., X + Y] to [..., H].
        covariates: the width Y of the covariates: the number of classes.

    Raises:
        ValueError: if ``covariates`` is less than 1, or (when called) for classes outside 0, ..., Y - 1 or another
            width.

    Example:
        >>> import torch
        >>> from jensen.networks import mlp
        >>> encoder = Conditioned(mlp(64 + 10, [128]), covariates=10)
        >>> x, y = torch.zeros(5, 64), torch.tensor([0, 3, 9, 1, 1])
        >>> encoder(x, y).shape
        torch.Size([5, 128])
        >>> torch.equal(encoder(x, y), encoder(x, torch.eye(10)[y]))
        True
    """

    @checked
    def __init__(self, network: nn.Module, covariates: int) -> None:
        if covariates < 1:
            raise ValueError(
                f"covariates is the width of y (the number of classes) and must be at least 1, but got {covariates}"
            )
        super().__init__()
        self.network = network
        self.covariates = covariates

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The network's output for x [..., X] and covariates int64 [N] or [N, Y]: [..., H]."""
        answer: Tensor = self.network(join_covariates(x, y, self.covariates))
        return answer

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"covariates={self.covariates}"


def join_covariates(x: Tensor, y: Tensor, width: int) -> Tensor:
    """Concatenate x [..., N, X] and covariates, int64 [N] or [N, Y], in the precision of x: [..., N, X + Y].

    Raises:
        ValueError: for a class outside 0, ..., Y - 1, or covariates of another width.
    """
    vectors = as_vectors(y, width).to(x.dtype)
    leading = torch.broadcast_shapes(x.shape[:-1], vectors.shape[:-1])
    return torch.cat([x.expand(*leading, -1), vectors.expand(*leading, -1)], -1)


def as_vectors(y: Tensor, width: int) -> Tensor:
    """Covariates as vectors [N, Y]: class indices become one-hot vectors, vectors are unchanged."""
    if y.dim() == 1 and not y.is_floating_point():
        if not ((y >= 0) & (y < width)).all():
            raise ValueError(f"covariates y must be classes from 0 to {width - 1}, but got {y.min()} to {y.max()}")
        return F.one_hot(y.long(), width)
    if y.dim() != 2 or y.shape[1] != width:
        raise ValueError(
            f"covariates y must be class indices, integers [N], or vectors [N, {width}], but got {y.dtype} of shape "
            f"{list(y.shape)}"
        )
    return y
