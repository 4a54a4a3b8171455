"""What a model that knows its answer says: one protocol, asked for by isinstance; the only type test in jensen."""

from __future__ import annotations

__all__ = ["HasEvidence", "exact_evidence"]

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasEvidence(Protocol):
    """A model whose log p(x) is known in closed form.

    Example:
        >>> from jensen.models import PPCA
        >>> isinstance(PPCA(5, latent=2), HasEvidence)
        True
    """

    def log_evidence(self, *data: Tensor) -> Tensor:
        """Log p(x) of each row of ``x``, in nats: [N]."""
        ...


def exact_evidence(model: object, data: Sequence[Tensor]) -> Tensor | None:
    """Log p(x) of each datum in float64, [N], where the model knows it; else None."""
    return model.log_evidence(*data).double() if isinstance(model, HasEvidence) else None
