"""Data drawn from a model, with the latent values that made them: exact draws from its posterior."""

from __future__ import annotations

__all__ = ["prior_quantiles", "simulate", "sites_without_data"]

from pyro.distributions import TransformedDistribution
from torch import Tensor

from .checks import check_simulated
from .modes import running
from .parameters import claim_parameters, store_kept
from .sites import Site, base_of, is_discrete
from .weights import Program, model_sites

_PRIOR_DRAWS = 10_000  # for quantiles


@store_kept()
def simulate(model: Program, n: int, *covariates: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    r"""Draw data from a model, together with the latent values that made them.

    .. math:: z_n \sim p(z), \qquad x_n \sim p(x \mid z_n)

    Given x, the z that made it is an exact draw from p(z | x). Draws from the user's random stream, without gradient.

    Args:
        model: a model called as ``model(None, *covariates, n=n)`` that draws its data at site ``"x"``.
        n: the number N of data, at least 1.
        covariates: what the model reads beside x, tensors whose first dimension is N.

    Returns:
        The latent values by site, [N, *event], and the data x, [N, *event_shape].

    Raises:
        ValueError: for ``n`` less than 1, a model without site ``"x"``, and a site that is not in the one plate of
            the data.
        TypeError: if the model does not run as ``model(None, *covariates, n=n)``.

    Example:
        >>> from jensen.models import PPCA
        >>> values, x = simulate(PPCA(5, latent=2), 3)
        >>> values["z"].shape, x.shape
        (torch.Size([3, 2]), torch.Size([3, 5]))
    """
    if n < 1:
        raise ValueError(f"n is the number of data to draw, at least 1, but got {n}")
    values = check_simulated(sites_without_data(model, n, *covariates), n)
    return values, values.pop("x")


def sites_without_data(model: Program, n: int, *covariates: Tensor) -> list[Site]:
    """The sites of a model that is run without data; TypeError if it does not run like that."""
    try:
        return model_sites(model, None, *covariates, n=n)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"the model cannot draw data: model(None, *covariates, n={n}) fails ({error}); write it as "
            "forward(x=None, *covariates, n=1), with obs=x at site 'x' and a plate over n data where x is None"
        ) from error


def prior_quantiles(model: Program, levels: Tensor, *covariates: Tensor, seed: int | None = 0) -> dict[str, Tensor]:
    """Quantiles of each continuous latent feature under the prior, by site: [L, *event].

    Those of the top site are exact where its distribution knows them; the others are of draws.

    Args:
        model: as for :func:`~jensen.inference.simulate`.
        levels: between 0 and 1, [L].
        covariates: what the model reads beside x; one row.
        seed: of the draws.
    """
    rows = [c.expand(_PRIOR_DRAWS, *c.shape[1:]) for c in covariates]
    with running(model, model, seed=seed):
        claim_parameters(model, model)
        sites = [site for site in sites_without_data(model, 1, *covariates) if site["name"] != "x"]
        quantiles = {}
        drawn: dict[str, Tensor] = {}
        for i, site in enumerate(sites):
            if is_discrete(site["fn"]):
                continue
            exact = _exact_quantiles(site, levels) if i == 0 else None
            if exact is None and not drawn:
                drawn = simulate(model, _PRIOR_DRAWS, *rows)[0]
            name = site["name"]
            quantiles[name] = drawn[name].quantile(levels.to(drawn[name]), 0) if exact is None else exact
    return quantiles


def _exact_quantiles(site: Site, levels: Tensor) -> Tensor | None:
    """Quantiles of the features of a site of one row, [L, *event], if its distribution knows them."""
    fn, value = base_of(site["fn"]), site["value"]
    if isinstance(fn, TransformedDistribution) or fn.event_shape:  # icdf speaks of the base, or of no feature
        return None
    try:
        quantiles: Tensor = fn.icdf(levels.to(value).reshape(-1, *[1] * value.dim()))
    except NotImplementedError:
        return None
    return quantiles.expand(len(levels), *value.shape)[:, 0]
