"""All continuous latent values of each datum as one vector of unconstrained coordinates."""

from __future__ import annotations

__all__ = ["Coordinates"]

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import MixtureSameFamily, biject_to
from torch.distributions.constraints import Constraint

from .randomness import forked_rng
from .sites import Site, enclosing_plates
from .weights import Program, model_sites


class _Piece(NamedTuple):
    """A site: its shape [*batch, *event], how it is mapped, and where N stands, counted from the right."""

    shape: Size
    transform: torch.distributions.Transform
    axis: int  # in values
    free_axis: int  # in their unconstrained coordinates
    density_axis: int  # in the log-determinant
    free_shape: Size
    fixed: bool  # whether no tensor bounds the support


class Coordinates:
    r"""The latent sites of a model on some data, one after the other, each mapped from all of R^d onto its support.

    .. math:: z = t(u), \qquad \log p(u) = \log p(t(u)) + \log |\det t'(u)|

    Args:
        model: a Pyro model with one plate over its data around every site.
        data: the data.

    Raises:
        ValueError: for a discrete latent site, one whose support is not known or moves with the values of others, and
            a model without the plate.

    Example:
        >>> from jensen.models import PPCA
        >>> coordinates = Coordinates(PPCA(5, latent=2), torch.zeros(3, 5))
        >>> values, log_det = coordinates.values(torch.zeros(7, 3, 2))
        >>> values["z"].shape, log_det.shape
        (torch.Size([7, 3, 2]), torch.Size([7, 3]))
    """

    def __init__(self, model: Program, *data: Tensor) -> None:
        with forked_rng():
            sites, again = model_sites(model, *data), model_sites(model, *data)
        plates = enclosing_plates(sites)
        if len(plates) != 1:
            raise ValueError(f"the model needs one plate over its data around every site, but has {len(plates)} such")
        (frame,) = plates
        assert frame.dim is not None
        self.rows = frame.size
        pairs = zip(sites, again, strict=True)
        self.pieces = {s["name"]: _piece(s, t, frame.dim) for s, t in pairs if not s["is_observed"]}
        self.sizes = [piece.free_shape.numel() // self.rows for piece in self.pieces.values()]

    @property
    def fixed(self) -> bool:
        """Whether the same map serves other data of this shape: no tensor bounds a support."""
        return all(piece.fixed for piece in self.pieces.values())

    @property
    def features(self) -> int:
        """F, how many coordinates a datum has."""
        return sum(self.sizes)

    def free(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values [C, N, *event] by site to coordinates [C, N, F]."""
        parts = []
        for name, piece in self.pieces.items():
            u = piece.transform.inv(values[name].reshape(-1, *piece.shape))  # [C, *batch, *free]
            parts.append(u.movedim(piece.free_axis, 1).flatten(2) if u.dim() > 2 else u.unsqueeze(-1))
        return torch.cat(parts, -1)

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Coordinates [C, N, F] to values [C, N, *event] by site, and the log-determinant of the map, [C, N]."""
        values, total = {}, u.new_zeros(u.shape[:2])
        for (name, piece), part in zip(self.pieces.items(), u.split(self.sizes, -1), strict=True):
            inner = list(piece.free_shape)
            del inner[piece.free_axis]
            free = part.unflatten(-1, inner) if inner else part.squeeze(-1)  # [C, N, *rest]
            free = free.movedim(1, piece.free_axis)  # [C, *batch, *free]
            z = values[name] = piece.transform(free)
            log_det = piece.transform.log_abs_det_jacobian(free, z)
            total = total + log_det.movedim(piece.density_axis, 1).flatten(1).unflatten(1, (self.rows, -1)).sum(-1)
        return values, total


def _piece(site: Site, again: Site, dim: int) -> _Piece:
    name, fn = site["name"], site["fn"]
    try:
        support = fn.support
    except NotImplementedError:
        raise ValueError(f"latent site '{name}': {type(fn).__name__} does not say its support") from None
    if support.is_discrete:
        raise ValueError(
            f"latent site '{name}' is discrete, but Hamiltonian Monte Carlo moves continuous values only: sum the site "
            "out in the model, or measure with evaluate"
        )
    if any(not torch.equal(a, b) for a, b in zip(_bounds(support), _bounds(again["fn"].support), strict=True)):
        raise ValueError(
            f"the support of latent site '{name}' moves with the values of other sites: write it as a fixed support, "
            "and shift and scale its values in the model"
        )
    support = getattr(support, "base_constraint", support) if isinstance(fn, MixtureSameFamily) else support
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"latent site '{name}': no map from unconstrained coordinates onto the support of {type(fn).__name__} is "
            f"known ({error})"
        ) from error
    inside, outside = transform.domain.event_dim, transform.codomain.event_dim
    shape = site["value"].shape
    event = fn.event_dim
    free_shape = transform.inverse_shape(shape)
    axes = dim - event, dim - event + outside - inside, dim - event + outside
    return _Piece(shape, transform, *axes, free_shape, not _bounds(support))


def _bounds(support: Constraint) -> list[Tensor]:
    """The tensors that a support is made of."""
    own = [value for value in vars(support).values() if isinstance(value, Tensor)]
    inner = [_bounds(value) for value in vars(support).values() if isinstance(value, Constraint)]
    return own + [bound for bounds in inner for bound in bounds]
