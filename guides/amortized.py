r"""Amortized guides: one encoder, and one family per latent site or one family over all sites.

.. math:: q(z_1, \dots, z_L \mid x) = \prod_l q(z_l \mid h, z_{<l}), \qquad h = \text{encoder}(x)
"""

from __future__ import annotations

__all__ = ["Amortized", "Joint", "amortize", "coordinates", "draw_jointly", "supports_of"]

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from jensen import families
from jensen.checked import checked
from jensen.families import MeanField
from jensen.kernel.arguments import as_tensors, in_a_line
from jensen.kernel.modes import buffers_kept, modes_kept
from jensen.kernel.parameters import store_kept
from jensen.kernel.randomness import forked_rng
from jensen.missing import Missing, as_holes
from jensen.module import UniqueModule

from .local import Constant, PerDatum
from .members import Constrained, Member, check_context, data_plate, join, made_by, site_transform
from .programs import Structured, encoder_for


class Amortized(UniqueModule):
    r"""An amortized guide: one encoder for the data, and latent sites sampled one after the other.

    The context of the first site is ``encoder(*data)``, [N, H]; the context of the next site is the concatenation of
    this context and the sampled value, with leading dimensions broadcast. The encoder runs once for any number of
    particles.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114

    Args:
        encoder: a network from the data [N, X] to the context [N, H].
        families: for each latent site, in sampling order, a family (or :class:`Through`, :class:`Constrained`) whose
            context has width H plus the widths of the earlier sites.

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

    @checked
    def __init__(self, encoder: nn.Module, families: Mapping[str, Member | nn.Module]) -> None:
        if not families:
            raise ValueError("Amortized needs at least one latent site: families is empty")
        super().__init__()
        self.encoder = encoder
        self.families = nn.ModuleDict(dict(families))  # type: ignore[arg-type]

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: samples every site for the rows of ``x``; returns the values by site."""
        return self.draw(self.encoder(x, *covariates), {})

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sample every site given the encoder's output [N, H].

        Args:
            context: the encoder's output, [N, H].
            offsets: offsets added to the parameters [N, P] of a site's family, by site.
        """
        check_context(context)
        parts = [context]  # [N, H], then a [K, N, D] for each sampled site
        values: dict[str, Tensor] = {}
        with data_plate(len(context)):
            for site, family in self.families.items():
                q = _shifted(family, join(parts), offsets.get(site))
                z = values[site] = pyro.sample(site, q)  # [K, N, *event]
                parts.append(z.flatten(z.dim() - q.event_dim) if q.event_dim else z.unsqueeze(-1))
        return values

    def sizes(self) -> dict[str, int]:
        """The number P of parameters of each site's family."""
        return {site: family.size for site, family in self.families.items()}  # type: ignore[misc]

    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Amortized:
        """The same families with free parameters for each of these data points, starting at the encoder's output.

        Parameters that depend on x alone become free numbers for each data point. Every other weight of the families
        (the networks of a flow or of the dependence on earlier sites) gets one copy for each data point. The guide
        accepts these data only.

        Args:
            data: the data.
            offsets: initial offsets of the parameters [N, P] of a site's family, by site.
        """
        with torch.no_grad():
            context = self.encoder(*data)
        first, *_ = self.families
        members: dict[str, Member | PerDatum] = {
            site: PerDatum(family, context, site == first, (offsets or {}).get(site))
            for site, family in self.families.items()
        }
        return Amortized(Constant(context, data), members)

    @property
    def reaches(self) -> str:
        """Which Gaussians :meth:`move_to` can represent; none, except for a guide of one site from :meth:`local`."""
        own = list(self.families.values())
        return own[0].reaches if len(own) == 1 and isinstance(own[0], PerDatum) else ""

    def move_to(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the guide to, or near, one Gaussian for each data point: means [N, D], Cholesky factors [N, D, D]."""
        (own,) = self.families.values()
        own.move_to(self.encoder.context, loc, scale_tril)  # type: ignore[operator]


def _shifted(family: nn.Module, context: Tensor, offset: Tensor | None) -> TorchDistribution:
    """The family's distribution, with an offset on its parameters."""
    if offset is None:
        q: TorchDistribution = family(context)
        return q
    member: Member = family  # type: ignore[assignment]
    return member.distribution(member.project(context) + offset)


class Joint(UniqueModule):
    r"""One family over all continuous latent sites, so that sites and levels can be correlated.

    .. math:: u \sim q(u \mid \text{encoder}(x)), \qquad (z_1, \dots, z_L) = t(u)

    The joint sample is an auxiliary site, ``"joint"``; the model's sites are its parts, each mapped onto its support.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic Differentiation Variational Inference.
        https://arxiv.org/abs/1603.00788

    Args:
        encoder: a network from the data [N, X] to the context [N, H].
        family: a family whose features are the unconstrained coordinates of all sites.
        sites: the event shape of each site.
        constraints: the support of each site with constrained values, by site.

    Raises:
        ValueError: without sites, for a wrong number of features, or for a constraint on an unknown site.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance
        >>> from jensen.networks import mlp
        >>> guide = Joint(mlp(64, [128]), FullCovariance(6, context=128), {"z1": (4,), "z2": (2,)})
        >>> values = guide(torch.zeros(5, 64))
        >>> values["z1"].shape, values["z2"].shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """

    @checked
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
                f"{family.features} features: build it with {needed}"
            )

    def forward(self, x: Tensor, *covariates: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: samples all sites for the rows of ``x``; returns the values by site."""
        return self.draw(self.encoder(x, *covariates), {})

    def draw(self, context: Tensor, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sample all sites given the encoder's output [N, H]; ``offsets["joint"]`` shifts the family's parameters."""
        check_context(context)
        q = _shifted(self.family, context, offsets.get("joint"))  # type: ignore[arg-type]
        return draw_jointly(q, len(context), self.sites, self.constraints)

    def sizes(self) -> dict[str, int]:
        """The number P of parameters of the family."""
        return {"joint": self.family.size}

    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Joint:
        """The same family with free parameters for each of these data points, as for :class:`Amortized`."""
        with torch.no_grad():
            context = self.encoder(*data)
        family = PerDatum(self.family, context, first=True, offset=(offsets or {}).get("joint"))
        return Joint(Constant(context, data), family, self.sites, self.constraints)

    @property
    def reaches(self) -> str:
        """Which Gaussians :meth:`move_to` can represent; none, except for a guide from :meth:`local`."""
        return self.family.reaches if isinstance(self.family, PerDatum) else ""

    def move_to(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the guide to, or near, one Gaussian for each data point: means [N, D], Cholesky factors [N, D, D]."""
        assert isinstance(self.family, PerDatum)
        assert isinstance(self.encoder, Constant)
        self.family.move_to(self.encoder.context, loc, scale_tril)


def coordinates(sites: Mapping[str, Sequence[int]], supports: Mapping[str, Constraint]) -> dict[str, int]:
    """The number of unconstrained coordinates of each site."""
    return {site: site_transform(shape, supports[site]).inverse_shape(Size(shape))[0] for site, shape in sites.items()}


def draw_jointly(
    q: TorchDistribution, n: int, sites: Mapping[str, Size], supports: Mapping[str, Constraint]
) -> dict[str, Tensor]:
    """Sample a vector from q as the auxiliary site ``"joint"``, and set the sites to its mapped parts."""
    values: dict[str, Tensor] = {}
    with data_plate(n):
        u = pyro.sample("joint", q, infer={"is_auxiliary": True})  # [K, N, D]
        pieces = u.split(list(coordinates(sites, supports).values()), dim=-1)
        for (site, shape), piece in zip(sites.items(), pieces, strict=True):
            transform = site_transform(shape, supports[site])
            z = transform(piece)
            density = Delta(z, -transform.log_abs_det_jacobian(piece, z), event_dim=len(shape))
            values[site] = pyro.sample(site, density)
    return values


def supports_of(sites: Mapping[str, Sequence[int]], given: Mapping[str, Constraint] | None) -> dict[str, Constraint]:
    """The support of every site: the given one, or all reals."""
    given = given or {}
    if not sites or set(given) - set(sites):
        raise ValueError(f"constraints must name latent sites, which are {list(sites)}, but got {list(given)}")
    return {site: given.get(site, constraints.real) for site in sites}


class _SaysLatents(Protocol):
    """The part of a model with ``latents`` that ``amortize`` uses."""

    latents: dict[str, Sequence[int]]


@checked
def amortize(
    model: Callable[..., Any] | _SaysLatents,
    encoder: nn.Module | None = None,
    family: str | Callable[[int, Any], Member] = MeanField,
    context: int | None = None,
    *,
    data: Tensor | tuple[Tensor, ...] | None = None,
    constraints: Mapping[str, Constraint] | None = None,
    joint: bool = False,
    missing: Missing = None,
) -> Amortized | Joint | Structured:
    """Build an amortized guide for all latent sites of a model, with the same family for each.

    For a model with the attribute ``latents``, the guide samples each of these sites for each data point. For any other
    Pyro program the sites are read from one run on ``data``, and the guide is a :class:`Structured` one.

    Args:
        model: a model with ``latents``, or any Pyro model, called as ``model(*data)``.
        encoder: a network from the data to a context [N, context]; if None, a multilayer perceptron on standardized
            data, with the mask as an additional input if ``data`` contain missing values (NaN).
        family: the family, called as ``family(features, context)``: a class, a ``functools.partial`` of one, or the
            name of a class of ``jensen.families`` (``"mean-field"`` is ``MeanField``).
        context: the width of the encoder's output; if None, found by running it on ``data``, or on samples of the
            model.
        data: a tensor, or the tensors that the model is called with. A model with ``latents`` needs them only if
            ``encoder`` is None, or if the encoder does not run on samples of the model.
        constraints: the support of each latent site with constrained values, by site, for a model with ``latents``. For
            other programs the supports are read from the model.
        joint: whether one family samples all sites jointly; always true within each level of a :class:`Structured`
            guide.
        missing: a Boolean mask of the first tensor of ``data``, True where a value is missing, as for
            :func:`~jensen.inference.fit`; NaN needs none.

    Returns:
        An :class:`Amortized` guide, which samples the sites in the model's order, each given the earlier ones; or a
        :class:`Joint` guide; or a :class:`Structured` one.

    Raises:
        ValueError: if ``context`` is not the width of the encoder's output; for a constraint on an unknown site, or on
            a program whose supports are read; for sites that such a guide cannot sample; and for a mask of another
            shape than the data.
        TypeError: for a model without ``latents`` if ``data`` is None, and for an unknown family name.

    Example:
        >>> import torch
        >>> from jensen.families import FullCovariance, MeanField
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(64, latent=8)
        >>> guide = amortize(model, mlp(64, [128]), MeanField, context=128)
        >>> guide = amortize(model, mlp(64, [128]), FullCovariance, context=128)  # one word swaps the family
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def regression(x, y):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        >>> amortize(regression, family="FullCovariance", data=(torch.randn(20, 3), torch.randn(20)))
        Structured: w
    """
    made = _family(family)
    tensors = None if data is None else as_tensors(data)
    if tensors:
        tensors = (as_holes(tensors[0], missing), *tensors[1:])
    if not hasattr(model, "latents"):
        if tensors is None:
            raise TypeError(
                f"amortize needs the latent sites of the model, but {_name(model)} has no attribute latents: pass "
                "data=x, so that the sites are read from a run, or set a dict of event shapes, such as self.latents "
                "= {'z': (8,)}"
            )
        if constraints is not None:
            raise ValueError(
                f"the supports of {_name(model)} are read from the model, but got constraints for "
                f"{list(constraints)}: remove the constraints"
            )
        return Structured(model, tensors, encoder, made, context)
    if encoder is None or context is None:
        found, error = (None, None) if encoder is None or tensors is not None else _width(model, encoder)
        if found is None:
            if tensors is None:
                reason = "" if error is None else f" (on samples of the model: {in_a_line(error)})"
                raise TypeError(
                    "amortize needs data to build the encoder or to find its output width, but got none: pass "
                    f"data=x, or both encoder and context{reason}"
                ) from error
            encoder, found = encoder_for(tensors, encoder, context)
        context = found
    elif (found := _width(model, encoder, tensors)[0]) not in (None, context):
        raise ValueError(
            f"context must be the width of the encoder's output, {found}, but got {context}: omit it, and the width "
            "is inferred"
        )
    assert encoder is not None
    sites = {site: Size(shape) for site, shape in model.latents.items()}
    supports = supports_of(sites, constraints)
    needed = coordinates(sites, supports)
    if joint:
        return Joint(encoder, made_by(made, sum(needed.values()), context), sites, supports)
    members: dict[str, Member | PerDatum] = {}
    for site, shape in sites.items():
        member = made_by(made, needed[site], context)
        plain = len(shape) == 1 and site not in (constraints or {})
        members[site] = member if plain else Constrained(member, supports[site], shape)
        context += shape.numel()
    return Amortized(encoder, members)


@torch.no_grad()
def _width(
    model: Any, encoder: nn.Module, data: tuple[Tensor, ...] | None = None
) -> tuple[int | None, Exception | None]:
    """The width of an encoder's output on data, or on samples of the model, or the error that it raises on them.

    Modules, Pyro's parameter store and the random state are restored afterwards.
    """
    modules = [part for part in (model, encoder) if isinstance(part, nn.Module)]
    with store_kept(), forked_rng(), modes_kept(modules), buffers_kept(*modules):
        for module in modules:
            module.eval()
        try:
            drawn = model(n=2) if data is None else data
            h = encoder(*(drawn if isinstance(drawn, tuple) else (drawn,)))
        except Exception as error:  # a user's model or encoder may fail here in any way; the width is then unknown
            return None, error
    return (h.shape[-1] if isinstance(h, Tensor) and h.dim() > 1 else None), None


def _family(family: str | Callable[[int, Any], Member]) -> Callable[[int, Any], Member]:
    """A family, given as a class or by its name."""
    if isinstance(family, families.Family):
        raise TypeError(
            f"family must be a class such as {type(family).__name__}, but got an instance: pass the class, because "
            "amortize sets its features and context"
        )
    if not isinstance(family, str):
        return family
    known = {name: getattr(families, name) for name in sorted(families.__all__) if name != "Family"}
    plain = {_plain(name): made for name, made in known.items()}
    if _plain(family) not in plain:
        close = get_close_matches(_plain(family), plain, n=1)
        hint = f"; did you mean {plain[close[0]].__name__}?" if close else ":"
        raise TypeError(
            f"family must be a family or its name, but got '{family}'{hint} jensen.families has {list(known)}"
        )
    made: Callable[[int, Any], Member] = plain[_plain(family)]
    return made


def _plain(name: str) -> str:
    """A name in lower case without hyphens and underscores, so that mean-field and MeanField are the same."""
    return name.replace("-", "").replace("_", "").lower()


def _name(model: object) -> str:
    """The name of a model in messages."""
    return getattr(model, "__name__", type(model).__name__)
