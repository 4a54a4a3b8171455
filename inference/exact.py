"""What a model that knows its answer says: one protocol, asked for by isinstance; the only type test in jensen."""

from __future__ import annotations

__all__ = ["HasEvidence"]

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

    def log_evidence(self, x: Tensor, /) -> Tensor:
        """log p(x) of each row of ``x``, in nats: [N]."""
        ...
