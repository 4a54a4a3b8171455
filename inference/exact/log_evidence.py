"""Log p(x) without Monte Carlo: closed forms of models, sums and integrals."""

from __future__ import annotations

__all__ = ["ExactEvidence", "HasEvidence", "cheap_evidence", "exact_evidence", "exact_log_evidence"]

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.arguments import explained
from jensen.kernel.batches import Data, Device, as_tensors, placed
from jensen.kernel.caller import outside
from jensen.kernel.checks import check_holes, check_scale, check_shapes, check_spread, checked_data
from jensen.kernel.modes import running
from jensen.kernel.parameters import own_modules
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Program, model_sites
from jensen.progress import progress_bar
from jensen.results.records import Record
from jensen.results.standard_errors import standard_error_of_mean
from jensen.results.tables import Table, with_error
from jensen.sources import Source

from .latents import Latents, read_latents
from .quadrature import Integral, first_evaluations, integrate

METHODS = ("closed form", "enumeration", "quadrature")
_MOST_STATES = 2**20
_MOST_DIMENSIONS = 3
_ROWS = {0: 4096, 1: 1024, 2: 64, 3: 8}  # data points at once, by dimension
_OF_PRIOR = 256  # samples of the prior that locate it
_PROBE = 4  # data points tried first
_CHEAP = 1e-4  # nats: allowed error of a cheap value


@runtime_checkable
class HasEvidence(Protocol):
    """A model whose log p(x) is known in closed form.

    Example:
        >>> from jensen.models import PPCA
        >>> isinstance(PPCA(5, latent=2), HasEvidence)
        True
    """

    def log_evidence(self, *data: Tensor) -> Tensor:
        """Log p(x) of each row of ``x``, in nats: [N]. NotImplementedError: unknown for a model of this size."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class ExactEvidence(Record):
    """Log p(x) of each data point, made by :func:`exact_log_evidence`. Tensors are [N], on the CPU.

    Attributes:
        log_evidence: in nats, float64.
        error: its possible error in nats, float64: a conservative estimate for quadrature and rounding; zero for
            a closed form and for enumeration, which are exact up to rounding.
        method: ``"closed form"``, ``"enumeration"`` or ``"quadrature"``.
        evaluations: how often log p(x, z) was evaluated for each data point.
        tolerance: the largest acceptable error, in nats.
        route: the method for many values of the latents, such as ``"outer plate"``; empty for a closed form.

    Example:
        >>> from jensen.models import PPCA
        >>> evidence = exact_log_evidence(PPCA(5, latent=2), torch.zeros(3, 5))
        >>> evidence.method, evidence.log_evidence.shape, evidence.error.tolist()
        ('closed form', torch.Size([3]), [0.0, 0.0, 0.0])
    """

    log_evidence: Tensor
    error: Tensor
    method: str
    evaluations: Tensor
    tolerance: float
    route: str = ""

    @property
    def reached(self) -> Tensor:
        """Whether the error is within the tolerance: bool [N]."""
        return self.error <= self.tolerance

    def _columns(self) -> tuple[str, range, dict[str, Tensor]]:
        return "datum", range(len(self.log_evidence)), {**self._tensors(), "reached": self.reached}

    def _table(self) -> Table:
        n, mean = len(self.log_evidence), float(self.log_evidence.mean())
        facts = [("mean", f"{with_error(mean, standard_error_of_mean(self.log_evidence))} over the data")]
        if self.method == "quadrature":
            late = int((~self.reached).sum())
            note = f"{late} of {n} above the tolerance {self.tolerance:g}" if late else f"tolerance {self.tolerance:g}"
            facts.append(("largest error", f"{float(self.error.max()):.1e}, {note}"))
        if self.method != "closed form":
            most, mean = int(self.evaluations.max()), float(self.evaluations.double().mean())
            facts.append(("evaluations of log p(x, z)", f"{mean:.0f} per data point, at most {most}"))
        return Table(f"log p(x) of {n} data points by {self.method}, nats per data point", facts=facts)


def exact_evidence(model: object, data: Sequence[Tensor]) -> Tensor | None:
    """Log p(x) of each data point in float64, [N], if the model has a closed form; else None."""
    if not isinstance(model, HasEvidence):
        return None
    try:
        with explained(tuple(data)):
            return model.log_evidence(*data).double()
    except NotImplementedError:
        return None


@checked
def exact_log_evidence(
    model: Program,
    data: Data,
    *,
    method: str | None = None,
    tolerance: float = 1e-6,
    max_evaluations: int = 500_000,
    chunk_size: int = 16384,
    device: Device = None,
    progress: bool = True,
) -> ExactEvidence:
    r"""Log p(x) of each data point by a closed form, a sum over all states, or an integral: no Monte Carlo, no guide.

    .. math:: \log p(x_n) = \log \sum_{c} \int p(x_n, c, z) \, dz

    over all joint states c of the discrete latent sites, and all values z of the continuous ones. A site on an
    interval, or on positive numbers, is integrated over the real line, by Pyro's map onto its support.

    Quadrature divides a box around the prior's bulk into cells, interpolates log p(x, z) in each by a polynomial, and
    halves the cells whose error is too large; the box grows until no mass remains outside. So
    posteriors may be narrow, curved, multimodal, and far from the prior: the logarithm shows their location.
    A peak without effect on the logarithm elsewhere, such as one of two components of which the other is as wide as
    the prior, is found down to a tenth of the prior's scale in two and three dimensions (a fiftieth in one); a narrower
    peak can be missed, and the error does not show this. A network with kinks (ReLU) needs many cells.

    References:
        Genz and Malik (1980), An Adaptive Algorithm for Numerical Integration over an N-Dimensional Rectangular Region.
        https://doi.org/10.1016/0771-050X(80)90039-X
        Trefethen (2019), Approximation Theory and Approximation Practice.

    Args:
        model: any Pyro model with one plate over its data around every site, called as ``model(*data)``.
        data: a tensor [N, ...], or a tuple of such tensors.
        method: ``"closed form"`` (the model's own ``log_evidence``), ``"enumeration"`` or ``"quadrature"`` (over
            continuous sites, summed over discrete ones); None uses the first available one.
        tolerance: the target error of quadrature, in nats; in float32 it is limited by rounding.
        max_evaluations: of log p(x, z) per data point, after which quadrature stops.
        chunk_size: how many evaluations are run at once.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`ExactEvidence`.

    Raises:
        ValueError: naming the site, for a discrete site without a finite list of states, more than 2^20 joint states,
            more than 3 continuous dimensions, and a site outside the plate of the data (a global latent); for a method
            that is impossible for the model, and data that are empty or not finite.
        FloatingPointError: if log p(x, z) is plus infinity somewhere.

    Warns:
        UserWarning: if quadrature did not reach the tolerance.

    Example:
        >>> from jensen.models import Ring
        >>> model = Ring().double()
        >>> x = model(n=5)
        >>> evidence = exact_log_evidence(model, x, method="quadrature", progress=False)
        >>> bool(((evidence.log_evidence - model.log_evidence(x)).abs() <= evidence.error).all())
        True
        >>> bool((evidence.error < 1e-6).all())
        True
    """
    if method not in (None, *METHODS):
        raise ValueError(f"method is one of {', '.join(METHODS)}, or None, but got {method!r}")
    if not tolerance > 0 or max_evaluations < 1 or chunk_size < 1:
        raise ValueError(
            f"tolerance, max_evaluations and chunk_size must be positive, but got {tolerance}, {max_evaluations} and "
            f"{chunk_size}"
        )
    tensors = as_tensors(data)
    n = len(tensors[0])
    with running(model, model, device=device), forked_rng():
        tensors = placed(tensors, device, None)
        if method in (None, "closed form"):
            known = _closed_form(model, tensors, chunk_size)
            if known is not None:
                zero = torch.zeros(n, dtype=torch.float64, device="cpu")
                return ExactEvidence(known, zero, METHODS[0], zero.long(), tolerance)
            if method:
                raise ValueError(f"{type(model).__name__} has no log_evidence(x): omit method, or give another one")
        dtypes = {p.dtype for owner in own_modules(model, model) for p in owner.parameters()}
        with checked_data(tensors, dtypes) as holes, explained(tensors):
            sites = model_sites(model, *tensors)
            if holes:
                check_holes(sites)
        check_spread(sites, tensors)
        check_scale(sites)
        check_shapes(sites, [], lambda: model_sites(model, *tensors))
        latents = read_latents(model, tensors)
        _check_size(latents, method)
        parts = []
        with progress_bar("exact", n, total=n, progress=progress) as bar:
            for part in _parts(model, tensors, latents, tolerance, max_evaluations, chunk_size):
                parts.append(part)
                bar.update(len(part.value))
    value, error, evaluations = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    evidence = ExactEvidence(
        value, error, METHODS[2 if latents.dimension else 1], evaluations, tolerance, latents.lifted.way
    )
    if not evidence.reached.all():
        warnings.warn(
            f"quadrature did not reach the tolerance of {tolerance:g} nats for {int((~evidence.reached).sum())} of {n} "
            f"data points: their error is up to {float(error.max()):.2g}; measure in float64 (model.double(), "
            "x.double()), raise max_evaluations, or accept the error (tolerance)",
            stacklevel=outside(),
        )
    return evidence


def cheap_evidence(
    model: Program, data: Sequence[Tensor] | Source, budget: int, rows: int, joint: bool
) -> Tensor | None:
    """Log p(x) in float64, [N], by a closed form, or if it needs no more evaluations than sampling did; else None.

    A closed form is always used ([1], the sum, for joint weights). A sum or an integral, to 1e-4 nats, may need
    ``budget`` evaluations per data point, on average; a few data points are tried first, and if one of them fails there
    is no exact value. The user's random stream is not used, and no error is raised. A source is read by the batch.
    """
    known = _closed_form(model, data, rows)
    if known is not None:
        return known.sum().unsqueeze(0) if joint else known
    if joint:
        return None
    try:
        with forked_rng():
            return _within(model, data, budget)
    except Exception:  # a model that cannot be analysed is still measured
        return None


def _within(model: Program, data: Sequence[Tensor] | Source, budget: int) -> Tensor | None:
    some = data.head(_OF_PRIOR) if isinstance(data, Source) else data
    latents = read_latents(model, tuple(x[:1] for x in some), draws=1)
    D, states = latents.dimension, latents.combinations
    if D > _MOST_DIMENSIONS or states * (first_evaluations(D) if D else 1) > budget:
        return None
    latents = read_latents(model, some, _OF_PRIOR)
    values: list[Tensor] = []
    for part in (tuple(x[:_PROBE] for x in some), data):
        values, spent = [], 0
        n = part.survey().n if isinstance(part, Source) else len(part[0])
        for value, error, evaluations in _parts(model, part, latents, _CHEAP, 4 * budget, 4096):
            spent += int(evaluations.sum())
            rounding = 256 * torch.finfo(latents.dtype).eps * (1 + value.abs())
            if spent > budget * n or not (error <= _CHEAP + rounding).all():
                return None
            values.append(value.cpu())
    return torch.cat(values)


def _closed_form(model: object, data: Sequence[Tensor] | Source, rows: int) -> Tensor | None:
    if not isinstance(model, HasEvidence):
        return None
    known = [value.cpu() for batch in _batches(data, rows) if (value := exact_evidence(model, batch)) is not None]
    return torch.cat(known) if known else None


def _batches(data: Sequence[Tensor] | Source, rows: int) -> Iterator[tuple[Tensor, ...]]:
    return data.in_order(rows) if isinstance(data, Source) else zip(*(x.split(rows) for x in data), strict=True)


def _parts(
    model: Program,
    data: Sequence[Tensor] | Source,
    latents: Latents,
    tolerance: float,
    max_evaluations: int,
    at_once: int,
) -> Iterator[Integral]:
    """The evidence of consecutive parts of the rows."""
    S, D = latents.combinations, latents.dimension
    for batch in _batches(data, _ROWS[D]):
        m = len(batch[0])
        density = partial(latents.log_density, model, batch, at_once=at_once)
        if D:
            eps = torch.finfo(latents.dtype).eps
            most = max(1, max_evaluations // S)
            integral = integrate(
                density, m, D, tolerance=tolerance, max_evaluations=most, eps=eps, device=batch[0].device
            )
            yield integral._replace(evaluations=integral.evaluations * S)
        else:
            row = torch.arange(m, device=batch[0].device)
            value = density(row, latents.centre.expand(1, m, 0)).squeeze(0)
            yield Integral(value, torch.zeros_like(value), torch.full_like(row, S))


def _check_size(latents: Latents, method: str | None) -> None:
    """Raise ValueError for too many states or dimensions, and for a method that does not fit the sites."""
    D, states = latents.dimension, latents.combinations
    if method == "enumeration" and D:
        raise ValueError(f"the sites {list(latents.maps)} are continuous and cannot be enumerated: method='quadrature'")
    if method == "quadrature" and not D:
        raise ValueError(f"the sites {list(latents.states)} are discrete: method='enumeration'")
    if states > _MOST_STATES:
        counts = " x ".join(f"{len(s)} of '{name}'" for name, s in latents.states.items())
        raise ValueError(
            f"the discrete sites have {states} joint states ({counts}), more than the {_MOST_STATES} that can be "
            "summed over: estimate log p(x) with evaluate"
        )
    if D > _MOST_DIMENSIONS:
        sizes = ", ".join(f"{shape.numel()} of '{name}'" for name, (_, shape) in latents.maps.items())
        raise ValueError(
            f"the continuous sites have {D} dimensions in total ({sizes}), more than the {_MOST_DIMENSIONS} that "
            "quadrature supports: estimate log p(x) with evaluate, or use a smaller latent"
        )
