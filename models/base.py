"""Helpers that the models share: checks of the data, the data plate, and sample moments."""

from __future__ import annotations

__all__ = ["check_latent", "check_reals", "check_width", "data_plate", "moments", "origin", "principal_plane"]

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from jensen.checked import as_event, check_data
from jensen.missing import HoledPlate


def check_width(x: Tensor, event_shape: Sequence[int], owner: str) -> None:
    """Raise ValueError unless ``x`` has the shape [N, *event_shape]."""
    check_data(x, "x")
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[1:]) != tuple(event_shape):
        expected = ", ".join(["N", *map(str, event_shape)])
        remedy = as_event(x, tuple(event_shape), "x")
        raise ValueError(
            f"{owner} expects data x of shape [{expected}], but got {list(x.shape)}" + f"; {remedy}" * bool(remedy)
        )


def check_reals(x: Tensor, event_shape: Sequence[int], owner: str, like: Tensor | None = None) -> None:
    """Raise ValueError unless ``x`` is [N, *event_shape], real, and not of higher precision than ``like``."""
    check_width(x, event_shape, owner)
    if not len(x):
        raise ValueError(f"{owner} needs at least one data point in x, but got shape {list(x.shape)}")
    if like is not None and torch.promote_types(x.dtype, like.dtype) != like.dtype:
        raise ValueError(
            f"x is {x.dtype}, but the parameters of {owner} are {like.dtype}: use x.to({like.dtype}), or convert the "
            f"model, model.to({x.dtype})"
        )
    if x.dtype == torch.bool:
        raise ValueError(f"{owner} is a density of real numbers, but x is torch.bool: use x.float()")


def origin(features: int) -> Tensor:
    """A zero vector of D = ``features`` entries, [D]. Raises ValueError for fewer than one."""
    if features < 1:
        raise ValueError(f"the number of latent features must be at least 1, but got {features}")
    return torch.zeros(features)


def data_plate(x: Tensor | None, event_shape: Sequence[int], n: int, owner: str) -> pyro.plate:
    """The plate of a model's data points: over the rows of ``x``, or over ``n`` new ones.

    Inside it, observed sites score only what is not NaN: a missing value is not part of the likelihood.

    Raises:
        ValueError: if ``x`` is empty or of another shape than [N, *event_shape], or ``n`` is less than 1.
    """
    if x is not None:
        check_width(x, event_shape, owner)
        n = len(x)
    if n < 1:
        raise ValueError(f"{owner} needs at least one data point, but got {n}")
    return HoledPlate("data", n, dim=-1)


def moments(x: Tensor, event_shape: Sequence[int], owner: str) -> tuple[Tensor, Tensor]:
    """Mean [X] and covariance [X, X] (divided by N) of data [N, X], in float64.

    Raises:
        ValueError: for data of another shape, fewer than two data points, NaN and infinity.
    """
    check_reals(x, event_shape, owner)
    if len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"{owner} needs at least two data points, and finite ones, but got x of shape {list(x.shape)}")
    x = x.double()
    r = x - x[0]  # a mean much larger than the deviations would lose them to rounding
    shift = r.mean(0)
    r = r - shift
    return x[0] + shift, r.T @ r / len(x)


def check_latent(owner: str, latent: int, features: int) -> None:
    """Raise ValueError unless there are fewer latents than features, and at least one."""
    if not 1 <= latent < features:
        alone = "; with one feature no latent is possible: use a VAE" if features == 1 else ""
        raise ValueError(f"{owner} needs 1 <= latent < features, but got latent={latent}, features={features}{alone}")


def principal_plane(covariance: Tensor, latent: int, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Maximum-likelihood W [X, D] and noise variance, not below ``floor``, of PPCA with a standard normal prior.

    References:
        Tipping and Bishop (1999), Probabilistic Principal Component Analysis.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
    variance = eigenvalues[:-latent].mean().clamp_min(floor)
    top, vectors = eigenvalues[-latent:].flip(0), vectors[:, -latent:].flip(1)
    return vectors * (top - variance).clamp_min(0).sqrt(), variance
