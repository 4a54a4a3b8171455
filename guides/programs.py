r"""A guide for any Pyro program: its sites are read from one run, and each level is sampled given the levels above.

.. math:: q(\theta) \, q(a \mid \theta) \, \prod_n q(z_n \mid e(x_n), \theta, a)

| level | sites | parameters |
| --- | --- | --- |
| theta, global | in no plate | free numbers |
| a, of groups | in other plates | free numbers for each group; for many groups, pooled from the group's rows |
| z, local | in the data plate | output of an encoder of the data |

All unconstrained coordinates of a level (of one row, for z and pooled groups) are sampled jointly,

.. math:: u = m(h) + A(h) \tilde\theta + s \odot v, \qquad v \sim \text{family}(h, \tilde\theta), \qquad z = t(u)

with :math:`\tilde\theta` the standardized coordinates of the levels above. With a Gaussian family of full covariance
this contains the best joint Gaussian over all sites if rows are independent given the levels above, because the
precision of that Gaussian has the sparsity of the model.
"""

from __future__ import annotations

__all__ = ["Structured", "encoder_for"]

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution, TransformedDistribution, constraints
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform

from jensen.checked import checked, shown
from jensen.families.base import matvec
from jensen.kernel.arguments import explained, in_a_line
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import At, AtMode, Site, base_of, is_discrete, plates_of
from jensen.kernel.weights import Program, model_sites
from jensen.missing import has_holes
from jensen.module import UniqueModule
from jensen.networks import mlp
from jensen.networks.masked import with_mask

from .local import Constant, PerDatum
from .members import Member, check_context, join, made_by, site_transform

_FEW = 256  # the most coordinates of all groups that are sampled jointly
_READ = 64  # linear features of the levels above that a level conditions on
_CATEGORIES = 64  # groups that the default encoder distinguishes
_START = 0.1  # the initial scale of samples, in unconstrained coordinates
_DRAWS = 15  # samples of the prior, whose median is the initial location


class _Plate(NamedTuple):
    """A plate of the model: the size of its subsample, and its full size (None if it has no size)."""

    name: str
    dim: int
    size: int
    full: int | None


class _Piece(NamedTuple):
    """A latent site: its inner plates from left to right, its support (None if it depends on other values)."""

    name: str
    event: Size
    free: Size
    plates: tuple[_Plate, ...]
    support: Constraint | None

    @property
    def width(self) -> int:
        """The number of coordinates in all of its inner plates."""
        return math.prod(plate.size for plate in self.plates) * self.free.numel()


class _Column(NamedTuple):
    """The column of the data with the group of each row: index of the tensor, and of its column."""

    tensor: int
    column: int | None

    def of(self, data: tuple[Tensor, ...]) -> Tensor:
        """The groups, [N]; -1, which no index accepts, where the group is missing."""
        x = data[self.tensor]
        x = x if self.column is None else x[..., self.column]
        return torch.where(x.isnan(), -1, x).long() if x.is_floating_point() else x.long()


class Structured(UniqueModule):
    r"""A guide for an arbitrary Pyro program.

    The sites are read from one run of the model on ``data``. The data plate is the one around the observed sites, with
    one index for each row. Continuous sites inside it are local: sampled for each row from the encoder's output for
    that row, given all other sites. Sites outside every plate are global, and sampled jointly without a context. Sites
    in other plates belong to groups. A few groups are sampled jointly; otherwise each group has separate parameters,
    pooled from the group's rows if a column of the data gives the group of each row. Discrete sites are not sampled but
    listed in ``enumerated`` (use ``TraceEnum_ELBO`` and ``config_enumerate``). Supports that depend on other sites are
    read from the model in every run, at the sampled values. The guide uses the names of the model's plates, so
    subsampling is that of the model: the encoder gets the rows chosen by the plate. Only the size of the data plate
    follows the number of rows in a call.

    References:
        Hoffman and Blei (2015), Structured Stochastic Variational Inference. https://arxiv.org/abs/1404.4114
        Agrawal and Domke (2021), Amortized Variational Inference for Simple Hierarchical Models.
        https://arxiv.org/abs/2111.03144

    Args:
        model: a Pyro model, called as ``model(*data)``.
        data: the tensors that the model is called with.
        encoder: a network from the data to a context [N, context]; if None, a multilayer perceptron on standardized
            data, with the mask as an additional input if ``data`` contain missing values (NaN). Only
            local sites and pooled groups use it.
        family: the family, called as ``family(features, context)``. Its samples are real vectors.
        context: the width of the encoder's output; if None, inferred, or chosen by the width of the data.

    Raises:
        ValueError: for a site that this guide cannot sample: a discrete site with infinitely many values, a site
            without a known support, under a mask, or in a subsampled plate inside the data plate; and for a model
            without continuous latent sites.
        TypeError: for a family of point masses or of discrete values.

    Example:
        >>> import pyro.distributions as dist
        >>> from jensen.families import MeanField
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, scale))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = Structured(model, (torch.randn(20),), None, MeanField)
        >>> guide
        Structured: scale | z given its row of the data
        >>> guide(torch.randn(7))["z"].shape
        torch.Size([7])
    """

    @checked
    def __init__(
        self,
        model: Program,
        data: tuple[Tensor, ...],
        encoder: nn.Module | None,
        family: Callable[[int, int | None], Member],
        context: int | None = None,
    ) -> None:
        super().__init__()
        full = tuple(map(_filled, data))  # the runs read structure and priors
        with forked_rng():  # one random stream: the second run samples other values
            sites, again = _run(model, full), _run(model, full)
        latent = [site for site in sites if not site["is_observed"]]
        self.enumerated = tuple(s["name"] for s in latent if _to_enumerate(s))
        latent = [site for site in latent if site["name"] not in self.enumerated]
        if not latent:
            raise ValueError(
                "amortize needs a continuous latent site, but the model has none: its latent sites "
                f"{list(self.enumerated)} are discrete and summed out, so write a guide"
            )
        rows = _data_plate(sites, len(data[0]) if data else None)
        self._rows = rows
        self._follows = rows is not None and rows.full in (None, len(data[0]))
        other = {site["name"]: site for site in again}
        pieces = {s["name"]: _piece(s, other[s["name"]], rows) for s in latent}
        moving = any(piece.support is None for piece in pieces.values())
        self._model: tuple[Program, ...] = (
            (model,) if moving else ()
        )  # in a tuple, so not registered: saved and optimised once
        self._order = [site["name"] for site in latent]

        local = [s["name"] for s in latent if rows is not None and rows in _plates(s)]
        grouped = [name for name, piece in pieces.items() if piece.plates and name not in local]
        theta = [name for name in pieces if name not in local and name not in grouped]
        starts = _starts(model, full, latent, pieces, theta)
        wide = sum(pieces[name].width for name in grouped) > _FEW
        apart: dict[_Plate, list[str]] = {}
        for name in grouped:
            plates = pieces[name].plates
            subsampled = [p.name for p in plates if p.full != p.size]
            if subsampled and len(plates) > 1:
                raise ValueError(
                    f"latent site '{name}' is in the plates {[p.name for p in plates]}, of which {subsampled} are "
                    "subsampled: amortize supports a subsampled plate only without other plates; write a guide"
                )
            if subsampled or (wide and len(plates) == 1):
                apart.setdefault(plates[0], []).append(name)
        few = [name for name in grouped if not any(name in names for names in apart.values())]
        self._columns: dict[str, _Column] = {}  # by the name of a plate of groups
        with forked_rng():
            for plate in {p for name in grouped for p in pieces[name].plates if len(pieces[name].plates) == 1}:
                name = next(n for n in grouped if pieces[n].plates == (plate,))
                found = _group_column(model, full, sites, rows, plate, name, list(_columns(data)))
                if found is not None:
                    self._columns[plate.name] = found

        start = next(iter(starts.values()))
        pooled = self._follows and rows is not None and rows.size == len(data[0])
        reads = bool(local) or (pooled and any(p.name in self._columns for p in apart))
        self.encoder: nn.Module | None = None
        if reads:
            sizes = {p.name: p.full or p.size for name in grouped for p in pieces[name].plates}
            columns = {column: sizes[name] for name, column in self._columns.items()}
            self.encoder, context = encoder_for(data, encoder, context, columns, start)

        def level(names: list[str], rows: int | None, width: int | None, reads: int) -> _Level:
            widths = [pieces[name].free.numel() if rows else pieces[name].width for name in names]
            begin = torch.cat([_flat(starts[name], rows) for name in names], -1)
            return _Level(family, sum(widths), width, rows, reads, begin).to(start)

        # for each level its name, its sites, and the plate that its rows index
        self._levels: list[tuple[str, list[_Piece], _Plate | None]] = []
        self.levels = nn.ModuleDict()
        self.pools = nn.ModuleDict()
        above = sum(pieces[name].width for name in theta)

        def add(key: str, names: list[str], plate: _Plate | None, made: _Level) -> None:
            own = [pieces[name]._replace(plates=()) if plate in pieces[name].plates else pieces[name] for name in names]
            self._levels.append((key, own, plate))
            self.levels[key] = made

        if theta:
            add("global", theta, None, level(theta, None, None, 0))
        if few:
            add("groups", few, None, level(few, None, None, above))
        for i, (plate, names) in enumerate(apart.items()):
            width = None
            if pooled and plate.name in self._columns and plate.full == plate.size:
                assert context is not None
                self.pools[f"plate_{i}"] = mlp(2 * context + 1, [context])
                width = context
            add(f"plate_{i}", names, plate, level(names, plate.full, width, above))
        if local:
            read = above
            for name in few:
                piece = pieces[name]
                read += piece.free.numel() if self._column_of(piece.plates) else piece.width
            for plate, names in apart.items():
                if self._readable(plate):
                    each = sum(pieces[name].free.numel() for name in names)
                    read += each if plate.name in self._columns else each * plate.size
            inner = [pieces[name] for name in local]
            begin = torch.cat([starts[name].reshape(-1) for name in local], -1)
            made = _Level(family, sum(piece.width for piece in inner), context, None, read, begin).to(start)
            self._levels.append(("local", inner, rows))
            self.levels["local"] = made

    def _column_of(self, plates: tuple[_Plate, ...]) -> _Column | None:
        return self._columns.get(plates[0].name) if len(plates) == 1 else None

    def _readable(self, plate: _Plate) -> bool:
        """Whether local sites can condition on this plate's groups: not subsampled, and not too many."""
        return plate.full == plate.size and (plate.name in self._columns or plate.size <= _FEW)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {' | '.join(self._said())}"

    def _said(self) -> Iterator[str]:
        for key, pieces, _ in self._levels:
            names = ", ".join(piece.name for piece in pieces)
            if key == "local":
                yield f"{names} given its row of the data"
            elif key in self.pools:
                yield f"{names} given its rows of the data"
            else:
                yield names
        if self.enumerated:
            yield f"{', '.join(self.enumerated)} enumerated"

    def forward(self, *data: Tensor) -> dict[str, Tensor]:
        """The Pyro guide: samples every continuous site for these data; returns the values by site."""
        plates, index = self._open(data)
        rows = data if index is None else tuple(x[index] for x in data)
        everything = (
            self._encoded(data) if self.pools else None
        )  # groups pool all their rows, also those not in the subsample
        h = None
        if "local" in self.levels:
            h = self._encoded(rows) if everything is None else everything if index is None else everything[index]
        values: dict[str, Tensor] = {
            name: plate._indices for name, plate in plates.items() if plate._indices is not None
        }
        given = set(values)
        theta: list[Tensor] = []  # standardized coordinates of the global level
        groups: list[Tensor] = []  # those of the groups, as inputs of local sites
        for key, pieces, plate in self._levels:
            level: _Level | _Own = self.levels[key]  # type: ignore[assignment]
            context = chosen = None
            above = theta
            if key == "local" and plate is not None and h is not None:
                context = _at(h, plate.dim)
                above = [*theta, *groups]
            elif key in self.pools and plate is not None and everything is not None:
                pooled = _pool(everything, self._columns[plate.name].of(data), plate.size)
                context = _at(self.pools[key](pooled), plate.dim)
            elif plate is not None:
                chosen = plate.dim, plates[plate.name]._indices if plate.full != plate.size else None
            q = level(context, join(above) if above else None, chosen)
            u, drawn = self._draw(key, q, pieces, plate, plates, values, data)
            values |= drawn
            standard = level.standard(u, q)
            if key == "global":
                theta = [standard]
            elif key == "groups":
                split = standard.split([piece.width for piece in pieces], -1)
                groups += [self._for_rows(s, piece, rows) for s, piece in zip(split, pieces, strict=True)]
            elif plate is not None and self._rows is not None and self._readable(plate) and key != "local":
                standard = standard.unsqueeze(-2).transpose(standard.dim() - 1 + plate.dim, -2)
                groups.append(self._gather(standard, self._columns.get(plate.name), rows))
        return {name: values[name] for name in self._order if name not in given}

    def local(self, *data: Tensor, offsets: Mapping[str, Tensor] | None = None) -> Structured:
        """The same family with free parameters for each of these data points, as for :class:`Amortized`.

        Args:
            data: the data.
            offsets: initial offsets of location, log scale and parameters of the family [N, P], as ``"z"`` or, for
                several sites, ``"joint_local"``.

        Raises:
            ValueError: if there are sites other than local ones, or rows are subsampled: data points then have no
                separate parameters.
        """
        rows = self._rows
        full = rows is not None and self._follows and rows.full in (None, rows.size) and rows.dim == -1
        if [key for key, *_ in self._levels] != ["local"] or not full:
            raise ValueError(
                f"{self} cannot have separate parameters for each data point: all latent sites must be in the data "
                "plate, at dim=-1 and not subsampled"
            )
        with torch.no_grad():
            context = self._encoded(data)
        local = copy.deepcopy(self)
        local.encoder = Constant(context, data)
        level: _Level = self.levels["local"]  # type: ignore[assignment]
        offset = next(iter((offsets or {}).values()), None)
        local.levels = nn.ModuleDict({"local": _Own(PerDatum(_Rows(level), context, first=True, offset=offset))})
        return local

    def _encoded(self, data: tuple[Tensor, ...]) -> Tensor:
        assert self.encoder is not None  # if a level uses it
        h: Tensor = self.encoder(*data)
        check_context(h)
        return h

    def _for_rows(self, standard: Tensor, piece: _Piece, rows: tuple[Tensor, ...]) -> Tensor:
        """The values of a site of groups as inputs of the rows, [..., W]: of the row's group, or of all."""
        column = self._column_of(piece.plates)
        if column is None or self._rows is None:
            return standard
        return self._gather(standard.unflatten(-1, (-1, piece.free.numel())), column, rows)

    def _gather(self, standard: Tensor, column: _Column | None, rows: tuple[Tensor, ...]) -> Tensor:
        """Values of G groups [..., G, F] as inputs of the rows: of the row's group, or of all groups."""
        if column is None:
            return standard.flatten(-2)
        assert self._rows is not None
        own = standard.index_select(-2, column.of(rows).reshape(-1))  # [..., N, F]
        return _place(own.flatten(-2), (self._rows.dim,), (own.shape[-2],), own.shape[-1])

    def _open(self, data: tuple[Tensor, ...]) -> tuple[dict[str, Any], Tensor | None]:
        """The model's plates for use in the guide, and the rows chosen by the data plate (None: all)."""
        plates: dict[str, Any] = {}
        index = None
        if (rows := self._rows) is not None:
            n = len(data[0])
            if rows.full is None:
                plate = pyro.plate(rows.name, dim=rows.dim)
            elif self._follows and rows.size == rows.full:
                plate = pyro.plate(rows.name, n, dim=rows.dim)
            elif self._follows:
                plate = pyro.plate(rows.name, n, subsample_size=min(rows.size, n), dim=rows.dim)
                index = plate._indices
            else:
                with poutine.block(hide=[rows.name]):  # the subsample is chosen before the model is called
                    plate = pyro.plate(rows.name, rows.full, subsample_size=n, dim=rows.dim)
            plates[rows.name] = plate
        for _, pieces, own in self._levels:
            for p in [*([own] if own is not None else []), *(p for piece in pieces for p in piece.plates)]:
                if p.name not in plates:
                    plates[p.name] = pyro.plate(p.name, p.full, subsample_size=p.size, dim=p.dim)
        return plates, index

    def _draw(
        self,
        key: str,
        q: TransformedDistribution,
        pieces: list[_Piece],
        plate: _Plate | None,
        plates: Mapping[str, Any],
        values: dict[str, Tensor],
        data: tuple[Tensor, ...],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample a level's coordinates [..., D], and set its sites to their parts, mapped onto the supports."""
        own = [plates[plate.name]] if plate is not None else []
        first = pieces[0]
        if len(pieces) == 1 and not first.plates and first.support is not None:
            onto = site_transform(first.event, first.support, first.free)
            with _inside(own):
                z = pyro.sample(first.name, TransformedDistribution(q, [onto]))
            return onto.inv(z), {first.name: z}
        with _inside(own):
            u = pyro.sample(f"joint_{key}", q, infer={"is_auxiliary": True})
        drawn: dict[str, Tensor] = {}
        for piece, part in zip(pieces, u.split([piece.width for piece in pieces], -1), strict=True):
            support = piece.support or self._support(piece.name, {**values, **drawn}, data)
            onto = site_transform(piece.event, support, piece.free)
            dims, sizes = tuple(p.dim for p in piece.plates), tuple(p.size for p in piece.plates)
            part = _place(part, dims, sizes, piece.free.numel())
            z = onto(part)
            density = Delta(z, -onto.log_abs_det_jacobian(part, z), event_dim=len(piece.event))
            with _inside([*own, *(plates[p.name] for p in piece.plates)]):
                drawn[piece.name] = pyro.sample(piece.name, density)
        return u, drawn

    def _support(self, name: str, values: Mapping[str, Tensor], data: tuple[Tensor, ...]) -> Constraint:
        """The support of a site given the values of others, from a run of the model."""
        model = self._model[0]
        with poutine.block(), At(values), AtMode(), _Until(name) as seen:
            try:
                model(*data)
            except _Reached:
                return seen.support
        raise ValueError(
            f"site '{name}' was in the model's run when the guide was made, but not in this run: make the guide "
            "again, or write one by hand"
        )


class _Level(nn.Module):
    """A location-scale family over all coordinates of a level, for one row or many.

    Args:
        family: the family.
        features: the number D of coordinates.
        context: the width H of each row's context; None if the parameters are free numbers.
        rows: the number R of rows with separate free numbers; None for one, and with a context.
        reads: how many coordinates of the levels above are inputs.
        start: the initial location, [D] or [R, D].
    """

    def __init__(
        self,
        family: Callable[[int, int | None], Member],
        features: int,
        context: int | None,
        rows: int | None,
        reads: int,
        start: Tensor,
    ) -> None:
        super().__init__()
        lead = () if rows is None or context is not None else (rows,)
        if not lead:
            start = start.reshape(-1, features).mean(0)
        self.loc = nn.Parameter(start.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(_START)))
        self.family = _checked(made_by(family, features, context), features, context)
        size, seen = self.family.size, min(reads, _READ)
        self.project = nn.Linear(reads, _READ, bias=False) if reads > _READ else None
        if context is None:
            self.free = nn.Parameter(torch.empty(*lead, size).uniform_(-0.1, 0.1))
            if reads:
                self.slope = nn.Parameter(torch.zeros(*lead, features, seen))
                self.response = nn.Parameter(torch.zeros(*lead, size, seen))
        else:
            self.location = _zero(nn.Linear(context, features))
            if reads:
                self.slopes = _zero(nn.Linear(context, features * seen))
                last = _zero(nn.Linear(context, context))
                self.mix = nn.Sequential(nn.Linear(context + seen, context), nn.SiLU(), last)

    def forward(
        self, context: Tensor | None, reads: Tensor | None, chosen: tuple[int, Tensor | None] | None
    ) -> TransformedDistribution:
        """The distribution of u: [..., D].

        Args:
            context: the rows' contexts [R, 1, ..., H], None for free numbers.
            reads: standardized coordinates of the levels above, [..., T], None without.
            chosen: for many rows of free numbers, the dimension of their plate and the chosen rows (None: all).
        """
        loc, log_scale = self._at(self.loc, chosen), self._at(self.log_scale, chosen)
        if reads is not None and self.project is not None:
            reads = self.project(reads)
        if context is None:
            parameters = self._at(self.free, chosen)
            if reads is not None:
                loc = loc + matvec(self._at(self.slope, chosen, 2), reads)
                parameters = parameters + matvec(self._at(self.response, chosen, 2), reads)
        else:
            if reads is not None:
                slopes = self.slopes(context).unflatten(-1, (self.loc.shape[-1], -1))
                loc = loc + matvec(slopes, reads)
                context = context + self.mix(join([context, reads]))
            loc = loc + self.location(context)
            parameters = self.family.project(context)
        return _placed(self.family.distribution(parameters), loc, log_scale.exp().expand(loc.shape))

    def standard(self, u: Tensor, q: TransformedDistribution) -> Tensor:
        """Coordinates standardized by location and scale: the inputs of the levels below."""
        place: Any = q.transforms[0]
        standard: Tensor = (u - place.loc) / place.scale
        return standard

    def _at(self, value: Tensor, chosen: tuple[int, Tensor | None] | None, inner: int = 1) -> Tensor:
        if chosen is None:
            return value
        dim, index = chosen
        return _at(value if index is None else value[index], dim, inner)


class _Rows(nn.Module):
    """A level with a context as its only input, as one family whose parameters include location and scale."""

    def __init__(self, level: _Level) -> None:
        super().__init__()
        self.level = level
        self.features = level.loc.shape[-1]
        self.size = 2 * self.features + level.family.size

    def forward(self, h: Tensor) -> TransformedDistribution:
        """Contexts [..., H] to a distribution of batch shape [...]."""
        return self.distribution(self.project(h))

    def project(self, h: Tensor) -> Tensor:
        """Contexts [..., H] to parameters [..., P]."""
        loc = self.level.loc + self.level.location(h)
        return torch.cat([loc, self.level.log_scale.expand(loc.shape), self.level.family.project(h)], -1)

    def distribution(self, parameters: Tensor) -> TransformedDistribution:
        """Parameters [..., P] to a distribution of batch shape [...]."""
        loc, log_scale, inner = parameters.split([self.features, self.features, self.level.family.size], -1)
        return _placed(self.level.family.distribution(inner), loc, log_scale.exp())

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The family's other weights."""
        return {f"level.family.{name}": value for name, value in self.level.family.own_weights().items()}


class _Own(nn.Module):
    """A level whose rows have separate parameters; it is not an input of other levels."""

    def __init__(self, family: PerDatum) -> None:
        super().__init__()
        self.family = family

    def forward(self, context: Tensor, *_: Any) -> TorchDistribution:
        """The distribution of u, [N, D]."""
        q: TorchDistribution = self.family(context)
        return q

    def standard(self, u: Tensor, q: TorchDistribution) -> Tensor:
        """The coordinates, unchanged."""
        return u


def _placed(q: TorchDistribution, loc: Tensor, scale: Tensor) -> TransformedDistribution:
    return TransformedDistribution(q, [AffineTransform(loc, scale, event_dim=1, cache_size=1)])


def _zero(layer: nn.Linear) -> nn.Linear:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _checked(member: Any, features: int, context: int | None) -> Any:
    """Check that the family samples real vectors with a density."""
    if not all(hasattr(member, name) for name in ("size", "project", "distribution")):
        raise TypeError(
            "family must be callable as family(features, context) and return a family of jensen.families, but it "
            f"returned {shown(member)}"
        )
    with torch.no_grad():
        q = member.distribution(torch.zeros(1, member.size))
    support = getattr(q, "support", None)
    real = support is not None and support.event_dim == 1 and not support.is_discrete
    if isinstance(base_of(q), Delta) or not real:
        raise TypeError(
            f"the family {type(member).__name__} samples {'points without a density' if real else 'no real vectors'}: "
            "amortize needs a density over real vectors, such as MeanField or FullCovariance (for points use Pyro's "
            "AutoDelta)"
        )
    return member


def _inside(plates: list[Any]) -> ExitStack:
    stack = ExitStack()
    for plate in plates:
        stack.enter_context(plate)
    return stack


def _at(rows: Tensor, dim: int, inner: int = 1) -> Tensor:
    """Rows [R, *inner] at the dimension of their plate: [R, 1, ..., *inner]."""
    return rows.reshape(rows.shape[:1] + (1,) * (-dim - 1) + rows.shape[rows.dim() - inner :])


def _place(part: Tensor, dims: tuple[int, ...], sizes: tuple[int, ...], width: int) -> Tensor:
    """Coordinates [*batch, sizes * width] with ``sizes`` moved to ``dims``: [*batch with sizes at dims, width]."""
    batch = part.shape[:-1]
    batch = Size((1,) * (max((-dim for dim in dims), default=0) - len(batch))) + batch
    part = part.reshape(*batch, *sizes, width)
    for i, dim in enumerate(dims):
        part = part.transpose(len(batch) + dim, len(batch) + i)
    return part.reshape(*part.shape[: len(batch)], width)


def _pool(h: Tensor, group: Tensor, size: int) -> Tensor:
    """Pool the rows [N, H] of each group to [G, 2 H + 1]: mean, sum over root of the count, and count."""
    total = h.new_zeros(size, h.shape[-1]).index_add(0, group.reshape(-1), h)
    count = h.new_zeros(size, 1).index_add(0, group.reshape(-1), h.new_ones(len(h), 1))
    return torch.cat([total / count.clamp_min(1), total / (count + 1).sqrt(), count.log1p()], -1)


# what is read from one run


class _Reached(Exception):
    """Raised when the model reaches the site."""


class _Until(Messenger):
    """A handler that stops the run at a site and stores its support."""

    support: Constraint

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            self.support = msg["fn"].support
            raise _Reached


def _run(model: Program, data: tuple[Tensor, ...], values: Mapping[str, Tensor] | None = None) -> list[Site]:
    with explained(data), AtMode(), At(values or {}):
        return model_sites(model, *data)


def _to_enumerate(site: Site) -> bool:
    if not is_discrete(site["fn"]):
        return False
    if not getattr(site["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"latent site '{site['name']}' has the discrete distribution {type(base_of(site['fn'])).__name__} with "
            "infinitely many values, which cannot be enumerated: sum it out in the model, or write a guide"
        )
    return True


def _plates(site: Site) -> list[_Plate]:
    """The vectorized plates around a site, from left to right."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]  # a plate may be opened without a size
    return sorted(map(_plate, frames), key=lambda plate: plate.dim)


def _plate(frame: CondIndepStackFrame) -> _Plate:
    assert frame.dim is not None  # it is vectorized
    full = frame.size if frame.full_size is None else frame.full_size
    return _Plate(frame.name, frame.dim, frame.size, full if full > 0 else None)


def _data_plate(sites: list[Site], n: int | None) -> _Plate | None:
    """The plate around observed sites with one index for each row; not subsampled and outermost preferred."""
    if n is None:
        return None
    observed = [site for site in sites if site["is_observed"] and plates_of(site)]
    candidates = [_plate(f) for site in observed for f in reversed(site["cond_indep_stack"]) if f.vectorized]
    fitting = [plate for plate in candidates if plate.full is None or n in (plate.size, plate.full)]
    around = [plate for plate in fitting if all(plate in _plates(site) for site in observed)]
    return next(iter([*around, *fitting]), None)


def _piece(site: Site, again: Site, rows: _Plate | None) -> _Piece:
    name, fn = site["name"], site["fn"]
    if isinstance(site["mask"], Tensor):
        raise ValueError(
            f"latent site '{name}' is under a mask and has no prior where the mask is False, so amortize cannot "
            "sample it: move the site out of the mask, and mask only observed sites"
        )
    try:
        support = fn.support
        onto = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"latent site '{name}': the support of {type(base_of(fn)).__name__} has no map from the real numbers; "
            "write a guide"
        ) from None
    plates = tuple(plate for plate in _plates(site) if plate != rows)
    if rows in _plates(site) and (subsampled := [p.name for p in plates if p.full != p.size]):
        raise ValueError(
            f"latent site '{name}' is in the data plate and in the subsampled plates {subsampled}, but amortize "
            "samples all values of a row together: remove the inner subsampling, or write a guide"
        )
    shape, event_dim = site["value"].shape, fn.event_dim
    event = shape[len(shape) - event_dim :]
    inside = onto.inverse_shape(shape)
    free = inside[len(shape) - event_dim :]
    pairs = zip(_bounds(support), _bounds(again["fn"].support), strict=True)
    fixed = all(a.shape == b.shape and bool((a == b).all()) and bool((a == a.flatten()[0]).all()) for a, b in pairs)
    if fixed:
        support = _scalar(support)
    return _Piece(name, event, Size(free), plates, support if fixed else None)


def _bounds(support: Any) -> list[Tensor]:
    """The tensors that define a support."""
    own = [value.detach() for value in vars(support).values() if isinstance(value, Tensor)]
    inner = [_bounds(value) for value in vars(support).values() if isinstance(value, Constraint)]
    return own + [bound for bounds in inner for bound in bounds]


def _scalar(support: Any) -> Constraint:
    """The same support with each constant bound as a scalar, so that it fits any number of rows."""
    if isinstance(support, constraints.independent):
        base = _scalar(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    changed = {name: float(v.flatten()[0]) for name, v in vars(support).items() if isinstance(v, Tensor)}
    if not changed:
        return support  # type: ignore[no-any-return]
    new = object.__new__(type(support))
    new.__dict__.update({**vars(support), **changed})
    return new  # type: ignore[no-any-return]


def _starts(
    model: Program, data: tuple[Tensor, ...], latent: list[Site], pieces: Mapping[str, _Piece], first: list[str]
) -> dict[str, Tensor]:
    """The initial values of the sites: medians of the prior, for all but ``first`` given the values of those."""
    starts, values = {}, {}
    with forked_rng():
        for site in latent:
            if (name := site["name"]) in first:
                starts[name] = _start(site, pieces[name])
                if (support := pieces[name].support) is not None:
                    onto = site_transform(pieces[name].event, support, pieces[name].free)
                    values[name] = onto(starts[name]).reshape(site["value"].shape)
        again = {site["name"]: site for site in _run(model, data, values)}
        for name in [site["name"] for site in latent if site["name"] not in first]:
            starts[name] = _start(again[name], pieces[name])
    return starts


def _start(site: Site, piece: _Piece) -> Tensor:
    """The median of prior samples in unconstrained coordinates: [*sizes of inner plates, F], averaged over rows."""
    fn, value = site["fn"], site["value"].detach()
    with torch.no_grad():
        try:
            draws = fn.sample((_DRAWS,))
        except NotImplementedError:  # an improper prior
            draws = value.unsqueeze(0)
        u = biject_to(fn.support).inv(draws)
    batch = value.dim() - fn.event_dim
    u = u.nan_to_num(0.0, 0.0, 0.0).median(0).values.reshape(*value.shape[:batch], piece.free.numel())
    kept = [batch + plate.dim for plate in piece.plates]
    sizes = [plate.size for plate in piece.plates]
    others = [axis for axis in range(batch) if axis not in kept]
    u = u.mean(others) if others else u
    start: Tensor = u.reshape(*sizes, piece.free.numel())
    return start


def _flat(start: Tensor, rows: int | None) -> Tensor:
    """A site's initial value in the shape of its level: [D], or for many rows [R, D]."""
    if rows is None:
        return start.reshape(-1)
    return start if len(start) == rows else start.mean(0).expand(rows, -1)


def _filled(x: Tensor) -> Tensor:
    """Data in which a missing value (NaN) is the median of its column, one of the observed values; 0 without any."""
    return torch.where(x.isnan(), x.nanmedian(0).values.nan_to_num(), x) if has_holes(x) else x


def _group_column(
    model: Program,
    data: tuple[Tensor, ...],
    sites: list[Site],
    rows: _Plate | None,
    plate: _Plate,
    name: str,
    columns: list[_Column],
) -> _Column | None:
    """Find the column of integers with the group of each row of a plate.

    It changes the value of one group; the rows whose densities change must be those of the group.
    """
    if rows is None or plate.full != plate.size or len(data[0]) != rows.size:
        return None
    found = [c for c in columns if _counts(c.of(data), plate.size)]
    if not found:
        return None
    values = {s["name"]: s["value"] for s in sites if not s["is_observed"]}
    values |= {rows.name: torch.arange(rows.size, device=data[0].device)}
    site = next(s for s in sites if s["name"] == name)
    onto = biject_to(site["fn"].support)
    axis = site["value"].dim() - site["fn"].event_dim + plate.dim
    for column in found:
        group = column.of(data)
        mine = group == group[0]
        moved = onto.inv(values[name]).clone()
        moved.select(axis, int(group[0])).add_(0.5)
        with pyro.validation_enabled(False):
            before, after = _run(model, data, values), _run(model, data, {**values, name: onto(moved)})
        changed = torch.zeros(rows.size, dtype=torch.bool, device=group.device)
        for a, b in zip(before, after, strict=True):
            if rows in _plates(a):
                log_p = [s["fn"].log_prob(s["value"]) for s in (a, b)]
                differs = (log_p[0] != log_p[1]) & ~(log_p[0].isnan() & log_p[1].isnan())
                at = differs.dim() + rows.dim
                differs = differs.movedim(at, 0).flatten(1).any(1) if differs.dim() > 1 else differs
                changed |= differs
        if bool(changed.any()) and not bool((changed & ~mine).any()):
            return column
    return None


def _columns(data: tuple[Tensor, ...]) -> Iterator[_Column]:
    """The columns that may hold integers: without missing values."""
    for i, x in enumerate(data):
        whole = ~x.isnan().any(0) if x.dim() and len(x) else x.new_ones(x.shape[1:], dtype=torch.bool)
        if x.dim() == 1 and whole:
            yield _Column(i, None)
        elif x.dim() == 2 and x.shape[1] <= 64:
            yield from (_Column(i, j) for j in range(x.shape[1]) if whole[j])


def _counts(group: Tensor, size: int) -> bool:
    return int(group.min()) >= 0 and int(group.max()) < size and len(group.unique()) > 1


# the default encoder


class _Encoder(nn.Module):
    """A multilayer perceptron on standardized data; a column of groups becomes one-hot columns.

    If the data contain missing values (NaN), the observed ones give the means and standard deviations, and the mask is
    an additional input.

    Args:
        data: the data that give the means and standard deviations.
        groups: the columns of groups, and the number of groups.
        width: the width of its layers; if None, chosen by the width of the data.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, data: tuple[Tensor, ...], groups: Mapping[_Column, int], width: int | None) -> None:
        super().__init__()
        self.groups = {column: size for column, size in groups.items() if size <= _CATEGORIES}
        self._left_out = set(groups)
        numbers = self._numbers(data, torch.get_default_dtype())
        loc, scale = numbers.mean(0), numbers.std(0, unbiased=False)
        if holes := has_holes(numbers):
            loc = numbers.nanmean(0).nan_to_num()
            scale = (numbers - loc).square().nanmean(0).sqrt()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))
        self.holes = holes
        features = (2 if holes else 1) * len(scale) + sum(self.groups.values())
        if features == 0:
            raise ValueError(
                "the data have only group columns, so there is nothing to encode: pass an encoder to amortize"
            )
        self.width = width or min(256, max(32, 2 ** math.ceil(math.log2(2 * features))))
        self.network = mlp(features, [self.width, self.width])

    def forward(self, *data: Tensor) -> Tensor:
        numbers = (self._numbers(data, self.loc.dtype) - self.loc) / self.scale
        parts = [with_mask(numbers, ~numbers.isnan()) if self.holes else numbers.nan_to_num()]
        for column, size in self.groups.items():
            known = torch.arange(size, device=self.loc.device)
            parts.append((column.of(data).reshape(-1, 1) == known).to(self.loc.dtype))
        h: Tensor = self.network(torch.cat(parts, -1))
        return h

    def _numbers(self, data: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """All columns except those of groups, [N, F]."""
        parts = []
        for i, x in enumerate(data):
            x = x.reshape(len(x), -1).to(dtype)
            kept = [j for j in range(x.shape[1]) if not {_Column(i, j), _Column(i, None)} & self._left_out]
            parts.append(x if len(kept) == x.shape[1] else x[:, kept])
        return torch.cat(parts, -1)


def encoder_for(
    data: tuple[Tensor, ...],
    encoder: nn.Module | None = None,
    context: int | None = None,
    groups: Mapping[_Column, int] | None = None,
    like: Tensor | None = None,
) -> tuple[nn.Module, int]:
    """The encoder of data and the width of its output; if None is given, a perceptron as wide as the data need.

    Args:
        data: its input.
        encoder: the given encoder, or None.
        context: the given width, or None.
        groups: the columns of groups, and the number of groups.
        like: a tensor with the precision and device for a new encoder.
    """
    if encoder is None:
        made = _Encoder(data, groups or {}, context)
        return made if like is None else made.to(like), made.width
    with torch.no_grad(), forked_rng():
        try:
            h = encoder(*data)
        except (IndexError, RuntimeError, TypeError) as error:
            shapes = ", ".join(str(list(x.shape)) for x in data)
            raise ValueError(f"encoder cannot be called on data of shape {shapes}: {in_a_line(error)}") from error
    check_context(h)
    return encoder, h.shape[-1]
