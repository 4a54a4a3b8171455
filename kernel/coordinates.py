"""All continuous latent values of a data point as one vector of unconstrained coordinates."""

from __future__ import annotations

__all__ = ["Coordinates"]

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import MixtureSameFamily, biject_to
from torch.distributions.constraints import Constraint

from .randomness import forked_rng
from .sites import Site, base_of, enclosing_plates, is_discrete
from .weights import Program, model_sites


class _Piece(NamedTuple):
    """A site: its shape [*batch, *event], its map, and the position of N, counted from the right."""

    shape: Size
    transform: torch.distributions.Transform
    axis: int  # in values
    free_axis: int  # in their unconstrained coordinates
    density_axis: int  # in the log-determinant
    free_shape: Size
    fixed: bool  # whether no tensor bounds the support


class Coordinates:
    r"""The latent sites of a model on given data, concatenated, each mapped from all of R^d onto its support.

    .. math:: z = t(u), \qquad \log p(u) = \log p(t(u)) + \log |\det t'(u)|

    Args:
        model: a Pyro model with one plate over its data around every site.
        data: the data.
        joint: whether all latent values of a model without such a plate form one vector; N is then 1.
        most: the maximal number of joint states of the discrete sites, which are left to be summed over.

    Attributes:
        rows: N.
        pieces: the continuous sites, by name.
        states: the states of each discrete site as values of its shape, [S, *batch, *event].

    Raises:
        ValueError: for a discrete latent site where none is allowed, too many states, a site whose support is
            unknown or depends on the values of other sites, and a model without the plate.

    Example:
        >>> from jensen.models import PPCA
        >>> coordinates = Coordinates(PPCA(5, latent=2), torch.zeros(3, 5))
        >>> values, log_det = coordinates.values(torch.zeros(7, 3, 2))
        >>> values["z"].shape, log_det.shape
        (torch.Size([7, 3, 2]), torch.Size([7, 3]))
    """

    def __init__(self, model: Program, *data: Tensor, joint: bool = False, most: int = 0) -> None:
        with forked_rng():
            sites, again = model_sites(model, *data), model_sites(model, *data)
        plates = [] if joint else enclosing_plates(sites)
        if len(plates) != 1 and not joint:
            raise ValueError(f"the model needs one plate over its data around every site, but has {len(plates)} such")
        self.rows = 1 if joint else plates[0].size
        dim = None if joint else plates[0].dim
        latent = [pair for pair in zip(sites, again, strict=True) if not pair[0]["is_observed"]]
        discrete = [s for s, _ in latent if most and is_discrete(s["fn"])]
        self.states = {s["name"]: _states_of(s, most, 1 if joint else self.rows) for s in discrete}
        if self.combinations > most > 0:
            raise ValueError(
                f"the discrete latent sites {sorted(self.states)} have {self.combinations} joint states, more than the "
                f"{most} that can be summed over for each value of the other sites"
            )
        self.pieces = {s["name"]: _piece(s, t, dim) for s, t in latent if s["name"] not in self.states}
        self.sizes = [piece.free_shape.numel() // self.rows for piece in self.pieces.values()]

    @property
    def fixed(self) -> bool:
        """Whether the same map is valid for other data of this shape: no tensor bounds a support."""
        return all(piece.fixed for piece in self.pieces.values())

    @property
    def combinations(self) -> int:
        """The number of joint states of the discrete sites."""
        return prod(len(states) for states in self.states.values())

    def with_states(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values [C, ...] of the continuous sites, combined with each joint state: values of all sites, [S C, ...]."""
        if not self.states:
            return dict(values)
        count, chains = self.combinations, len(next(iter(values.values())))
        whole = {name: value.expand(count, *value.shape).flatten(0, 1) for name, value in values.items()}
        index = torch.arange(count)
        for name, states in self.states.items():
            chosen = states[(index % len(states)).to(states.device)]
            index = index // len(states)
            whole[name] = chosen.unsqueeze(1).expand(count, chains, *chosen.shape[1:]).flatten(0, 1)
        return whole

    @property
    def features(self) -> int:
        """F, the number of coordinates of a data point."""
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


def _states_of(site: Site, most: int, rows: int) -> Tensor:
    """The states of a discrete site with one value per data point, as values of its shape: [S, *batch, *event]."""
    fn, shape = site["fn"], site["value"].shape
    try:
        states: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError:
        raise ValueError(
            f"latent site '{site['name']}' is discrete, and {type(base_of(fn)).__name__} does not enumerate its "
            "states, so they cannot be summed over"
        ) from None
    if shape.numel() != rows * fn.event_shape.numel():
        raise ValueError(f"latent site '{site['name']}' is discrete, with more than one value per data point")
    if len(states) > most:
        raise ValueError(f"latent site '{site['name']}' is discrete, with {len(states)} states, more than {most}")
    return states.reshape(-1, *(1,) * (len(shape) - fn.event_dim), *fn.event_shape).expand(-1, *shape)


def _piece(site: Site, again: Site, dim: int | None) -> _Piece:
    name, fn = site["name"], site["fn"]
    try:
        support = fn.support
    except NotImplementedError:
        raise ValueError(f"latent site '{name}': {type(fn).__name__} has no support") from None
    if support.is_discrete:
        raise ValueError(
            f"latent site '{name}' is discrete, but Hamiltonian Monte Carlo needs continuous values: sum the site out "
            "in the model, or measure with evaluate"
        )
    if any(not torch.equal(a, b) for a, b in zip(_bounds(support), _bounds(again["fn"].support), strict=True)):
        raise ValueError(
            f"the support of latent site '{name}' depends on the values of other sites: use a fixed support, and shift "
            "and scale the values in the model"
        )
    support = getattr(support, "base_constraint", support) if isinstance(fn, MixtureSameFamily) else support
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"latent site '{name}': there is no map from unconstrained coordinates onto the support of "
            f"{type(fn).__name__} ({error})"
        ) from error
    inside, outside = transform.domain.event_dim, transform.codomain.event_dim
    shape, event = site["value"].shape, fn.event_dim
    if dim is None:  # add a dimension for N = 1
        shape, dim = Size([1, *shape]), event - len(shape) - 1
    free_shape = transform.inverse_shape(shape)
    axes = dim - event, dim - event + outside - inside, dim - event + outside
    return _Piece(shape, transform, *axes, free_shape, not _bounds(support))


def _bounds(support: Constraint) -> list[Tensor]:
    """The tensors that define a support."""
    own = [value for value in vars(support).values() if isinstance(value, Tensor)]
    inner = [_bounds(value) for value in vars(support).values() if isinstance(value, Constraint)]
    return own + [bound for bounds in inner for bound in bounds]
