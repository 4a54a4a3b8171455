"""Data drawn from a model, with the latent values that made them: exact draws from its posterior."""

from __future__ import annotations

__all__ = ["simulate", "sites_without_data"]

from torch import Tensor

from .checks import check_simulated
from .sites import Site
from .weights import Program, model_sites


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
