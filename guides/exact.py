r"""Guides defined by the model: its exact posterior and its prior.

With q(z | x) = p(z | x) the log weights are constant, log w = log p(x), and one particle is enough. With the prior,
q(z | x) = p(z), they are log p(x | z): naive Monte Carlo, which is unbiased for p(x) but useless if the data are
informative about z.
"""

from __future__ import annotations

__all__ = ["ExactPosterior", "PriorGuide"]

from collections.abc import Callable
from typing import Any, Protocol

import pyro
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

from jensen.checked import checked
from jensen.module import UniqueModule

from .members import data_plate


class _HasPosterior(Protocol):
    latents: dict[str, Size]

    def posterior(self, *data: Tensor) -> TorchDistribution: ...


class ExactPosterior(UniqueModule):
    r"""The model's exact posterior as a guide, for models with a known posterior.

    .. math:: q(z \mid x) = p(z \mid x) \quad\Rightarrow\quad \log w = \log p(x)

    It has no parameters, holds the model without registering it again, and uses the model's current parameters.
    Training therefore follows the gradient of the exact log p(x).

    References:
        Tipping and Bishop (1999), Probabilistic Principal Component Analysis: the posterior of PPCA.
        https://www.jstor.org/stable/2680726

    Args:
        model: a model with one latent site and ``posterior(*data)``.

    Raises:
        ValueError: if the model has more than one latent site.
        TypeError: if it has no ``posterior``.

    Example:
        >>> import torch
        >>> from jensen.inference import log_weights
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(3, 5).double()
        >>> log_w = log_weights(model, ExactPosterior(model), x, particles=4)
        >>> torch.allclose(log_w, model.log_evidence(x).expand(4, 3))
        True
    """

    @checked
    def __init__(self, model: _HasPosterior) -> None:
        super().__init__()
        if len(model.latents) != 1:
            raise ValueError(
                f"ExactPosterior needs a model with one latent site, but this model has {list(model.latents)}"
            )
        if not callable(getattr(model, "posterior", None)):
            raise TypeError(
                f"{type(model).__name__} has no posterior(x): use a model with a known posterior, or another guide"
            )
        (self.site,) = model.latents
        self._model = (model,)  # in a tuple, so not registered: saved and optimised once, with the model

    def forward(self, x: Tensor, *covariates: Tensor) -> Tensor:
        """The Pyro guide: samples the latent site for each row of ``x``."""
        (model,) = self._model
        with data_plate(len(x)):
            return pyro.sample(self.site, model.posterior(x, *covariates))  # [N, D]

    def local(self, *data: Tensor) -> ExactPosterior:
        """The guide itself: it has no parameters."""
        return self


class PriorGuide(UniqueModule):
    r"""The model's prior as its guide: naive Monte Carlo, log w = log p(x | z).

    It runs the model without its observed sites, so it works for any Pyro model, but the likelihood's network runs
    twice.

    Args:
        model: any Pyro model.

    Example:
        >>> import torch
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> q = poutine.trace(PriorGuide(model)).get_trace(torch.zeros(3, 5))
        >>> q.stochastic_nodes
        ['data', 'z']
    """

    @checked
    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so not registered: saved and optimised once, with the model

    def forward(self, *data: Tensor) -> None:
        """The Pyro guide: samples every latent site from the model."""
        (model,) = self._model
        poutine.block(model, hide_fn=_is_observed)(*data)

    def local(self, *data: Tensor) -> PriorGuide:
        """The guide itself: it has no parameters."""
        return self


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and bool(site["is_observed"])
