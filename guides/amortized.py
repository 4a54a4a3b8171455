r"""Amortized guides: one encoder, then a chain of families over the latent sites, or one family over all of them.

.. math:: q(z_1, \dots, z_L \mid x) = \prod_l q(z_l \mid h, z_{<l}), \qquad h = \text{encoder}(x)
"""

from __future__ import annotations

__all__ = ["Amortized", "Joint", "amortize", "coordinates", "draw_jointly", "supports_of"]

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from jensen.module import UniqueModule

from .local import Constant, PerDatum
from .members import Constrained, Member, site_transform


class Amortized(UniqueModule):
    r"""An amortized guide: the encoder reads the data once, the sites are drawn one after the other.

    The context of the first site is ``encoder(*data)``, [N, H]; that of the next is the concatenation of the context
    and the value just drawn, leading dimensions broadcast. The encoder runs once, whatever the number of particles.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114

    Args:
        encoder: a network from the data [N, X] to the context [N, H].
        families: for each latent site, in the order of drawing, a family (or :class:`Through`, :class:`Constrained`)
            whose context has the width H plus the widths of the sites drawn before.

    Raises:
        ValueError: without sites.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance
        >>> from jensen.networks import mlp
        >>> guide = Amortized(mlp(64, [128]), {"z": FullCovariance(8, context=128)})
        >>> guide(torch.zeros(5, 64))["z"].shape
        torch.Size([5, 8])
    """

    def __init__(self, encoder: nn.Module, families: Mapping[str, Member | PerDatum]) -> None:
        if not families:
            raise ValueError("Amortized needs at least one latent site: families is empty")
        super().__init__()
        self.encoder = encoder
        self.families = nn.ModuleDict(dict(families))  # type: ignore[arg-type]

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: draws every site for the rows of ``x``; returns the values by site."""
        return self.draw(self.encoder(x, *covariates), {})

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw every site given the encoder's output [N, H].

        Args:
            context: the encoder's output, [N, H].
            offsets: what is added to the parameters [N, P] of a site's family, by site.
        """
        check_context(context)
        parts = [context]  # [N, H], then a [K, N, D] for each site drawn
        values: dict[str, Tensor] = {}
        with pyro.plate("data", len(context), dim=-1):
            for site, family in self.families.items():
                q = _shifted(family, _join(parts), offsets.get(site))
                z = values[site] = pyro.sample(site, q)  # [K, N, *event]
                parts.append(z.flatten(z.dim() - q.event_dim) if q.event_dim else z.unsqueeze(-1))
        return values

    def sizes(self) -> dict[str, int]:
        """The number P of parameters of each site's family."""
        return {site: family.size for site, family in self.families.items()}  # type: ignore[misc]

    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Amortized:
        """The same families with parameters of their own for each of these data, starting at the encoder's answer.

        Parameters that depend on x alone are free numbers for each datum; every other weight of the families (a flow's
        networks, what reads the sites drawn before) becomes one copy for each datum. The guide runs on these data only.

        Args:
            data: the data.
            offsets: what is added to the parameters [N, P] of a site's family at the start, by site.
        """
        with torch.no_grad():
            context = self.encoder(*data)
        first, *_ = self.families
        members: dict[str, Member | PerDatum] = {
            site: PerDatum(family, context, site == first, (offsets or {}).get(site))
            for site, family in self.families.items()
        }
        return Amortized(Constant(context, data), members)


def check_context(context: Tensor) -> None:
    """Raise ValueError unless the encoder answered with one row for each datum."""
    if context.dim() != 2:
        raise ValueError(
            f"the encoder's output is a context [N, H], one row for each datum, but has shape {list(context.shape)}: "
            "give data with a first dimension N (x[i : i + 1] for one datum), and an encoder that flattens images"
        )


def _shifted(family: nn.Module, context: Tensor, offset: Tensor | None) -> TorchDistribution:
    """The family's distribution, with an offset on its parameters."""
    if offset is None:
        q: TorchDistribution = family(context)
        return q
    member: Member = family  # type: ignore[assignment]
    return member.distribution(member.project(context) + offset)


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate contexts [..., H], [..., D], ... along their last dimension, leading ones broadcast."""
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, -1) for part in parts], dim=-1)


class Joint(UniqueModule):
    r"""One family over all continuous latent sites at once, so that sites and levels correlate.

    .. math:: u \sim q(u \mid \text{encoder}(x)), \qquad (z_1, \dots, z_L) = t(u)

    The draw is an auxiliary site, ``"joint"``; the model's sites are its pieces, each mapped onto its support.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic Differentiation Variational Inference.
        https://arxiv.org/abs/1603.00788

    Args:
        encoder: a network from the data [N, X] to the context [N, H].
        family: a family with as many features as all sites have unconstrained coordinates.
        sites: the event shape of each site.
        constraints: the support of the sites that are not all of R^D, by site.

    Raises:
        ValueError: without sites, if the family's features are not as many as needed, or a constraint of no site.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance
        >>> from jensen.networks import mlp
        >>> guide = Joint(mlp(64, [128]), FullCovariance(6, context=128), {"z1": (4,), "z2": (2,)})
        >>> values = guide(torch.zeros(5, 64))
        >>> values["z1"].shape, values["z2"].shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Member | PerDatum,
        sites: Mapping[str, Sequence[int]],
        constraints: Mapping[str, Constraint] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.family = family
        self.sites = {site: Size(shape) for site, shape in sites.items()}
        self.constraints = supports_of(sites, constraints)
        if family.features != (needed := sum(coordinates(sites, self.constraints).values())):
            raise ValueError(
                f"the sites {list(sites)} have {needed} unconstrained coordinates, but the family has "
                f"{family.features} features"
            )

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: draws all sites for the rows of ``x``; returns the values by site."""
        return self.draw(self.encoder(x, *covariates), {})

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw all sites given the encoder's output [N, H], and an offset on the family's parameters: ``"joint"``."""
        check_context(context)
        q = _shifted(self.family, context, offsets.get("joint"))  # type: ignore[arg-type]
        return draw_jointly(q, len(context), self.sites, self.constraints)

    def sizes(self) -> dict[str, int]:
        """The number P of parameters of the family."""
        return {"joint": self.family.size}

    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Joint:
        """The same family with parameters of their own for each of these data, as for :class:`Amortized`."""
        with torch.no_grad():
            context = self.encoder(*data)
        family = PerDatum(self.family, context, first=True, offset=(offsets or {}).get("joint"))
        return Joint(Constant(context, data), family, self.sites, self.constraints)


def coordinates(sites: Mapping[str, Sequence[int]], supports: Mapping[str, Constraint]) -> dict[str, int]:
    """The number of unconstrained coordinates of each site."""
    return {site: site_transform(shape, supports[site]).inverse_shape(Size(shape))[0] for site, shape in sites.items()}


def draw_jointly(
    q: TorchDistribution, n: int, sites: Mapping[str, Size], supports: Mapping[str, Constraint]
) -> dict[str, Tensor]:
    """Draw a vector from q as the auxiliary site ``"joint"``, and set the sites to its pieces, mapped."""
    values: dict[str, Tensor] = {}
    with pyro.plate("data", n, dim=-1):
        u = pyro.sample("joint", q, infer={"is_auxiliary": True})  # [K, N, D]
        pieces = u.split(list(coordinates(sites, supports).values()), dim=-1)
        for (site, shape), piece in zip(sites.items(), pieces, strict=True):
            transform = site_transform(shape, supports[site])
            z = transform(piece)
            density = Delta(z, -transform.log_abs_det_jacobian(piece, z), event_dim=len(shape))
            values[site] = pyro.sample(site, density)
    return values


def supports_of(sites: Mapping[str, Sequence[int]], given: Mapping[str, Constraint] | None) -> dict[str, Constraint]:
    """The support of every site: what is given, else all reals."""
    given = given or {}
    if not sites or set(given) - set(sites):
        raise ValueError(f"constraints belong to latent sites, but got {list(given)} for the sites {list(sites)}")
    return {site: given.get(site, constraints.real) for site in sites}


class _HasLatents(Protocol):
    latents: dict[str, Size]


def amortize(
    model: _HasLatents,
    encoder: nn.Module,
    family: Callable[[int, int], Member],
    context: int,
    *,
    constraints: Mapping[str, Constraint] | None = None,
    joint: bool = False,
) -> Amortized | Joint:
    """An amortized guide for all latent sites of a model, every one in the same family.

    Args:
        model: a model that says its ``latents``.
        encoder: a network from the data to a context [N, context].
        family: the family, called as ``family(features, context)``: a class, or a ``functools.partial`` of one.
        context: the width of the encoder's output.
        constraints: the support of latent sites that are not all of R^D, by site.
        joint: whether one family draws all sites at once.

    Returns:
        An :class:`Amortized` guide that draws the sites in the model's order, each given those before it; or a
        :class:`Joint` guide.

    Raises:
        ValueError: for a constraint of no site.
        TypeError: for a model that does not say its ``latents``.

    Example:
        >>> from jensen.families import FullCovariance, MeanField
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(64, latent=8)
        >>> guide = amortize(model, mlp(64, [128]), MeanField, context=128)
        >>> guide = amortize(model, mlp(64, [128]), FullCovariance, context=128)  # one word swaps the family
    """
    if not hasattr(model, "latents"):
        raise TypeError(
            f"amortize needs a model that says its latents, but {type(model).__name__} does not: give it the "
            "attribute, a dict from each latent site to its event shape, such as self.latents = {'z': (8,)}"
        )
    sites = {site: Size(shape) for site, shape in model.latents.items()}
    supports = supports_of(sites, constraints)
    needed = coordinates(sites, supports)
    if joint:
        return Joint(encoder, family(sum(needed.values()), context), sites, supports)
    families: dict[str, Member | PerDatum] = {}
    for site, shape in sites.items():
        member = family(needed[site], context)
        plain = len(shape) == 1 and site not in (constraints or {})
        families[site] = member if plain else Constrained(member, supports[site], shape)
        context += shape.numel()
    return Amortized(encoder, families)
