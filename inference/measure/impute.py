r"""Missing values given the observed ones: means, quantiles and samples; and the log-likelihood of held-out values.

With samples :math:`z_k \sim q(z \mid x_\text{obs})` and normalised importance weights :math:`\bar w_k`,

.. math::
    p(x_\text{mis} \mid x_\text{obs}) \approx \sum_k \bar w_k \, p(x_\text{mis} \mid x_\text{obs}, z_k), \qquad
    \bar w_k \propto \frac{p(x_\text{obs}, z_k)}{q(z_k \mid x_\text{obs})}
"""

from __future__ import annotations

__all__ = ["HeldOut", "Imputation", "held_out", "impute"]

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from jensen.checked import check_tensor, checked, shown
from jensen.kernel.arguments import prepared
from jensen.kernel.batches import Batch, Data, as_tensors, stream
from jensen.kernel.caller import outside
from jensen.kernel.enumeration import sampled
from jensen.kernel.modes import running
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Program
from jensen.missing import Missing, has_holes
from jensen.results.records import Measurement, Quantity, Record
from jensen.results.standard_errors import mc_error
from jensen.results.tables import Table, decimals, percent

from .diagnostics import pareto_k as tail_of
from .evaluate import Evidence, evaluate
from .refined import refine as find

_NUMBERS = 2**24  # of the samples of missing values that are held at once


@dataclass(frozen=True, eq=False, repr=False)
class Imputation(Record):
    r"""The result of :func:`~jensen.inference.impute`: missing values of N data points.

    Attributes:
        x: the data, [N, *event], NaN where missing.
        mean: the data with :math:`E[x_\text{mis} \mid x_\text{obs}]` where they are missing, [N, *event].
        variance: the variance of each missing value given the observed ones, [N, *event]; 0 where observed.
        quantiles: of each missing value, [Q, N, *event], at ``levels``; the data where observed.
        levels: the Q probabilities.
        draws: m complete data sets, [m, N, *event]: each missing row is a sample of its joint conditional distribution.
            With a fitted model this is improper multiple imputation: the draws do not include the uncertainty of the
            parameters, unless model and guide are fitted again on bootstrap samples of the data.
        ess: the effective sample size of the weights, [N]; infinite where nothing is missing.
        pareto_k: their Pareto k-hat, [N]: above 0.7 a row is unreliable.
        samples: the number of weighted samples of z, [N].
        particles: K: with a proposal for each data point, the evaluations of log p(x, z), including ``samples``.
        exact: whether mean and variance are exact rather than estimated from the samples.
        method: ``"refined"``: samples of a proposal for each data point; ``"guide"``: of the guide; else why the
            guide's samples were used.
        columns: the names of the features; empty if they have none.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import impute
        >>> from jensen.models import PPCA
        >>> model = PPCA(3, latent=1).double()
        >>> x = torch.tensor([[1.0, 2.0, math.nan], [0.5, math.nan, math.nan]]).double()
        >>> imputation = impute(model, ExactPosterior(model), x, columns=["a", "b", "c"], seed=0, progress=False)
        >>> imputation.mean.shape, imputation.draws.shape, bool(imputation.mean.isfinite().all())
        (torch.Size([2, 3]), torch.Size([5, 2, 3]), True)
        >>> list(imputation.to_frame())
        ['a', 'b', 'c']
    """

    x: Tensor
    mean: Tensor
    variance: Tensor
    quantiles: Tensor
    levels: tuple[float, ...]
    draws: Tensor
    ess: Tensor
    pareto_k: Tensor
    samples: Tensor
    particles: int
    exact: bool = False
    method: str = "guide"
    columns: tuple[str, ...] = ()

    @property
    def missing(self) -> Tensor:
        """Which values are missing, bool [N, *event]."""
        return self.x.isnan()

    @property
    def unreliable(self) -> float:
        """The share of rows with missing values whose k-hat is not below 0.7."""
        rows = _flat(self.missing).any(1)
        return float((~(self.pareto_k[rows] <= 0.7)).double().mean()) if rows.any() else 0.0

    def __getitem__(self, rows: slice | Tensor) -> Imputation:
        """The imputation of some data points, such as ``imputation[:10]``."""
        alone = {name: getattr(self, name)[rows] for name in ("x", "mean", "variance", "ess", "pareto_k", "samples")}
        return replace(self, **alone, quantiles=self.quantiles[:, rows], draws=self.draws[:, rows])

    def in_units(self, location: Tensor, scale: Tensor) -> Imputation:
        """The imputation of standardized data in the units of the data before: x scale + location.

        Args:
            location: the means that standardization subtracted, [X] (``Dataset.location``).
            scale: the standard deviations that it divided by, [X] (``Dataset.scale``).

        Returns:
            A copy.
        """
        location, scale = (part.to(self.mean).reshape(self.mean.shape[1:]) for part in (location, scale))

        def back(values: Tensor) -> Tensor:
            return values * scale + location

        return replace(
            self,
            x=back(self.x),
            mean=back(self.mean),
            variance=self.variance * scale.square(),
            quantiles=back(self.quantiles),
            draws=back(self.draws),
        )

    def to_frame(self) -> Any:
        """The data with the mean in place of each missing value, as a ``pandas.DataFrame`` with its own columns."""
        return self.frame_of(self.mean)

    def frame_of(self, values: Tensor) -> Any:
        """Values of the shape of the data, such as one of the ``draws``, as a ``pandas.DataFrame`` with columns."""
        import pandas

        flat = _flat(values).cpu().numpy()
        return pandas.DataFrame(flat, columns=list(self._names()))

    def _names(self) -> Sequence[str]:
        return self.columns or [f"x{i}" for i in range(self.mean[0].numel())]

    def _columns(self) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
        flat = _flat(self.mean)
        return "row", range(len(flat)), dict(zip(self._names(), flat.unbind(1), strict=True))

    def _table(self) -> Table:
        missing = _flat(self.missing)
        rows = missing.any(1)
        facts = [("missing values", f"{int(missing.sum()):,} of {missing.numel():,}")]
        if rows.any():
            facts.append(("effective sample size, mean", _size(self.ess[rows], self.samples[rows])))
            facts.append(("rows with k-hat > 0.7", f"{percent(self.unreliable)} of those with missing values"))
        facts.append(("mean and variance", "exact" if self.exact else "estimated from the samples"))
        facts.append(("samples of z", _sampled(self.method)))
        spread = _flat(self.variance).sqrt()
        lines: list[list[str]] = []
        shown = _SHOWN if self.columns or missing.shape[1] <= _SHOWN else 0
        for name, out, values, deviation in zip(self._names(), missing.T, _flat(self.mean).T, spread.T, strict=True):
            if out.any() and len(lines) < shown:
                mean, sd = (decimals(float(part[out].mean()), 3) for part in (values, deviation))
                lines.append([name, str(int(out.sum())), mean, sd])
        more = int(missing.any(0).sum()) - len(lines)
        if more and lines:
            facts.append(("features not shown", str(more)))
        head = f"{len(self.x)} data points, {self.particles} particles each"
        return Table(head, ("", "missing", "mean imputed", "mean std. dev."), lines, facts)


_SHOWN = 20  # features in a table


def _size(ess: Tensor, samples: Tensor) -> str:
    return f"{decimals(float(ess.mean()), 1)} of {decimals(float(samples.double().mean()), 0)}"


def _sampled(method: str) -> str:
    known = {"refined": "a proposal for each data point", "guide": "the guide"}
    return known.get(method, f"the guide: {method}")


@runtime_checkable
class HasCompletion(Protocol):
    r"""A model whose conditional distribution of missing values has a mean and a variance in closed form.

    Example:
        >>> from jensen.models import PPCA
        >>> isinstance(PPCA(5, latent=2), HasCompletion)
        True
    """

    def completed(self, *data: Tensor) -> tuple[Tensor, Tensor]:
        r"""The data with :math:`E[x_\text{mis} \mid x_\text{obs}]`, and the variances (0 where observed)."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class HeldOut(Measurement):
    r"""The result of :func:`~jensen.inference.held_out`. Tensors are per data point, [N], float64, in nats.

    Two different numbers: the held-out values of a data point jointly, and the sum of each one alone. They are equal if
    at most one value of each data point is held out.

    Attributes:
        joint: :math:`\log p(x_\text{ho} \mid x_\text{obs}) = \log p(x_\text{obs}, x_\text{ho}) - \log p(x_\text{obs})`.
        joint_error: its Monte Carlo standard error; 0 if exact.
        single: :math:`\sum_j \log p(x_j \mid x_\text{obs})` over the held-out values.
        single_error: its Monte Carlo standard error.
        each: the terms of ``single``, [N, *event]; NaN where nothing is held out.
        count: the number of held-out values.
        observed: the evidence of the observed values.
        complete: the evidence of the observed and held-out values.
        ess: the effective sample size of the weights of ``single``.
        pareto_k: their Pareto k-hat.
        samples: the number of these weights, [N].
        particles: K.
        method: how ``single`` was sampled, as for :class:`Imputation`.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import held_out
        >>> from jensen.models import PPCA
        >>> model = PPCA(3, latent=1).double()
        >>> x = torch.randn(10, 3).double()
        >>> hidden = x.clone()
        >>> hidden[:, 0] = math.nan
        >>> found = held_out(model, ExactPosterior(model), hidden, x, particles=200, seed=0, progress=False)
        >>> found.joint.shape, found.each.shape, int(found.count.sum())
        (torch.Size([10]), torch.Size([10, 3]), 10)
    """

    joint: Tensor
    joint_error: Tensor
    single: Tensor
    single_error: Tensor
    each: Tensor
    count: Tensor
    observed: Evidence
    complete: Evidence
    ess: Tensor
    pareto_k: Tensor
    samples: Tensor
    particles: int
    method: str = "guide"

    @property
    def per_value(self) -> float:
        """The mean of log p(x_j | x_obs) over all held-out values, in nats."""
        return float(self.single.sum() / self.count.sum())

    def _quantities(self) -> list[Quantity]:
        return [
            Quantity("joint", self.joint, "log p(held out | observed), jointly", mc_error(self.joint_error)),
            Quantity("single", self.single, "sum of log p(each | observed)", mc_error(self.single_error)),
            Quantity("count", self.count, total=True),
            Quantity("ess", self.ess),
            Quantity("pareto_k", self.pareto_k, in_summary=False),
        ]

    def _per_datum(self, frame: bool = False) -> dict[str, Tensor]:
        errors = {"joint_error": self.joint_error, "single_error": self.single_error}
        return {**super()._per_datum(frame), **errors}

    def _table(self) -> Table:
        held = self.count > 0
        k_hat = float((~(self.pareto_k[held] <= 0.7)).double().mean())
        facts = [
            ("held-out values", f"{int(self.count.sum()):,}"),
            ("per held-out value, each alone", f"{decimals(self.per_value, 4)} nats"),
            ("effective sample size, mean", _size(self.ess[held], self.samples[held])),
            ("data points with k-hat > 0.7", percent(k_hat)),
            ("samples of z", _sampled(self.method)),
        ]
        return self._summary_table(f"{len(self.joint)} data points, {self.particles} particles each, nats", facts)


@checked
def impute(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 1000,
    *,
    draws: int = 5,
    levels: Sequence[float] = (0.05, 0.5, 0.95),
    columns: Sequence[str] = (),
    missing: Missing = None,
    site: str | None = None,
    refine: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    progress: bool = True,
) -> Imputation:
    r"""Impute missing values: their conditional mean, variance, quantiles, and samples of complete rows.

    .. math::
        E[x_\text{mis} \mid x_\text{obs}] \approx \sum_k \bar w_k \, E[x_\text{mis} \mid x_\text{obs}, z_k]

    by self-normalized importance sampling. Quantiles invert the weighted distribution function of one sample of the
    missing values for each particle. A draw resamples one particle per row with probabilities :math:`\bar w_k`, and is
    the sample of its missing values. Where the model has ``completed(x)``, mean and variance are exact.

    References:
        Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
        https://arxiv.org/abs/1812.02633
        Rubin (1987), Multiple Imputation for Nonresponse in Surveys.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data; its encoder reads NaN (:class:`jensen.networks.Masked`).
        data: a tensor [N, ...] with NaN where a value is missing, or a tuple of such tensors.
        particles: the number K of samples per data point.
        draws: the number m of complete data sets.
        levels: the probabilities of the quantiles.
        columns: the names of the features, such as ``Dataset.columns``, for data frames.
        missing: ``"nan"``, for a model that does not know NaN, or a Boolean mask of the first tensor, as for
            :func:`~jensen.inference.fit`.
        site: the observed site whose values are imputed, if the model observes several with missing values.
        refine: whether the samples of z come from a separate proposal for each data point, as in
            :func:`~jensen.inference.evaluate`, at ``particles`` evaluations of log p(x, z) each, rather than from the
            guide. ``"auto"``: if it is possible, and k-hat of the guide's weights is above 0.7 for more than 5 % of the
            first 64 data points (by samples that are not used again); ``True``: with a warning if it is impossible.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Imputation`.

    Raises:
        ValueError: for ``particles`` or ``draws`` below 1, ``levels`` outside 0 to 1, ``columns`` of another number,
            data without missing values, a model that observes no such values, and the errors of
            :func:`~jensen.inference.log_weights`.
        NotImplementedError: for a likelihood whose conditional mean is not known.

    Example:
        >>> from jensen.families import Gaussian, MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit
        >>> from jensen.models import VAE
        >>> from jensen.networks import Masked, mlp
        >>> x = torch.randn(50, 4)
        >>> x[torch.rand(50, 4) < 0.3] = math.nan
        >>> model = VAE(mlp(2, [8]), Gaussian(4, 8), latent=2)
        >>> guide = amortize(model, Masked(mlp(8, [16]), 4), MeanField, context=16)
        >>> history = fit(model, guide, x, epochs=2, progress=False)
        >>> bool(impute(model, guide, x, particles=100, progress=False).mean.isfinite().all())
        True
    """
    _check_numbers(particles, draws, levels)
    exactly = model
    model, data = prepared(model, data, missing)
    tensors = as_tensors(data)
    if not any(map(has_holes, tensors)):
        raise ValueError("data has no missing values (NaN), so there is nothing to impute: give missing=mask, or NaN")
    changed = False

    def look(t: Terms, log_w: Tensor, data: Batch, rows: Tensor, name: str) -> dict[str, Tensor]:
        nonlocal changed
        drawn = t.completed(name, "sample")
        x = t.values[name].expand(drawn.shape[1:])
        changed = changed or not any(_holds(part, x) for part in data)
        share = log_w.softmax(0).to(drawn.dtype)  # [K, N]
        spread = share.reshape(*share.shape, *(1,) * (drawn.dim() - 2))
        mean = (spread * t.completed(name, "mean")).sum(0)
        which = torch.multinomial(share.T, draws, replacement=True).T  # [m, N]
        full = x.isnan().reshape(drawn.shape[1], -1).sum(1) == 0
        ess = share.double().square().sum(0).reciprocal()
        return {
            "x": x,
            "mean": torch.where(x.isnan(), mean, x),
            "variance": (spread * (drawn - mean).square()).sum(0) * x.isnan(),
            "quantiles": _quantiles(drawn, share, levels).movedim(0, 1),
            "draws": drawn[which, torch.arange(drawn.shape[1], device=drawn.device)].movedim(0, 1),
            "ess": ess.masked_fill(full, math.inf),
            "pareto_k": tail_of(log_w).masked_fill(full, 0.0),
        }

    made, name, method = _over(model, guide, tensors, particles, site, refine, seed, "impute", progress, look)
    made["quantiles"], made["draws"] = made["quantiles"].movedim(1, 0), made["draws"].movedim(1, 0)
    known = _conditional(exactly, tensors, name, made["x"])
    if known is not None:
        made["mean"], made["variance"] = known
    if changed:
        warnings.warn(
            f"the values observed at site '{name}' are not those of the data: the model transforms them, and the "
            "imputation has the units of the site",
            stacklevel=outside(),
        )
    if lost := int((~made["mean"].isfinite()).sum()):
        warnings.warn(
            f"the mean of {lost} missing values is not finite (a Cauchy distribution has no mean, nor a Student's t "
            "with few degrees of freedom): use quantiles or draws",
            stacklevel=outside(),
        )
    names = tuple(map(str, columns))
    if names and len(names) != made["x"][0].numel():
        raise ValueError(f"columns must name each of {made['x'][0].numel()} features, but got {len(names)} names")
    return Imputation(
        **made,
        levels=tuple(map(float, levels)),
        particles=particles,
        exact=known is not None,
        method=method,
        columns=names,
    )


@checked
def held_out(
    model: Program,
    guide: Program,
    data: Data,
    complete: Tensor,
    particles: int = 1000,
    *,
    missing: Missing = None,
    site: str | None = None,
    refine: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> HeldOut:
    r"""The log-likelihood of held-out values given the observed ones, jointly and each alone.

    .. math::
        \log p(x_\text{ho} \mid x_\text{obs}) &= \log p(x_\text{obs}, x_\text{ho}) - \log p(x_\text{obs}) \\
        \log p(x_j \mid x_\text{obs}) &\approx \log \sum_k \bar w_k \, p(x_j \mid x_\text{obs}, z_k)

    The joint number is the difference of two measurements by :func:`~jensen.inference.evaluate`, refined where that is
    possible; the others use the guide's samples given x_obs. The errors are those of the Monte Carlo samples.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data; its encoder reads NaN.
        data: a tensor [N, ...] with NaN where a value is missing or held out, or a tuple of such tensors.
        complete: the first tensor with the held-out values; NaN where a value is missing in truth.
        particles: the number K of samples per data point.
        missing: as for :func:`impute`.
        site: as for :func:`impute`.
        refine: as for :func:`impute`; for the joint number as for :func:`~jensen.inference.evaluate`.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        progress: whether to show a progress bar.
        settings: other arguments of :func:`~jensen.inference.evaluate`, such as ``refine=False``.

    Returns:
        The :class:`HeldOut`.

    Raises:
        ValueError: for ``particles`` below 1, ``complete`` of another shape, other values where ``data`` are observed,
            nothing held out, and as :func:`impute`.
        NotImplementedError: for a likelihood whose marginals of single features are not known.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model, x = PPCA(5, latent=2), torch.randn(20, 5)
        >>> hidden = torch.where(torch.rand(20, 5) < 0.5, math.nan, x)
        >>> held_out(model, PriorGuide(model), hidden, x, particles=100, progress=False).joint.shape
        torch.Size([20])
    """
    _check_numbers(particles, 1, (0.5,))
    model, data = prepared(model, data, missing)
    tensors = as_tensors(data)
    held = _held_out_values(tensors[0], complete)

    def look(t: Terms, log_w: Tensor, data: Batch, rows: Tensor, name: str) -> dict[str, Tensor]:
        x, given = t.values[name], data[0]
        fits = x.numel() == given.numel()
        y = held[rows.to(held.device)].to(x).reshape(x.shape) if fits else torch.full_like(x, math.nan)
        each = t.log_prob_each(name, y)
        if not fits or not _holds(given, x.reshape(given.shape)):
            raise ValueError(
                f"held-out values are those of the first tensor, but site '{name}' observes other values: observe the "
                "tensor as it is, and transform data and complete before"
            )
        asked = ~y.isnan()  # [N, *event]
        share = log_w.softmax(0).to(each.dtype)  # [K, N]
        spread = share.log().reshape(*share.shape, *(1,) * (each.dim() - 2))
        found = torch.where(asked, (spread + each).logsumexp(0), 0.0)
        off = torch.where(asked, (each - found).expm1(), 0.0)  # the delta method
        off = off.reshape(*off.shape[:2], -1).sum(2)  # [K, N]
        return {
            "each": found.masked_fill(~asked, math.nan).double(),
            "single": _flat(found).sum(1).double(),
            "single_error": (share * off).square().sum(0).sqrt().double(),
            "count": _flat(asked).sum(1),
            "ess": share.double().square().sum(0).reciprocal(),
            "pareto_k": tail_of(log_w),
        }

    made, _, method = _over(model, guide, tensors, particles, site, refine, seed, "held_out", progress, look)
    filled = torch.where(held.isnan(), tensors[0], held.to(tensors[0]))
    how: dict[str, Any] = {"refine": refine, "seed": seed, "progress": progress, **settings}
    observed = evaluate(model, guide, tensors, particles, **how)
    whole = evaluate(model, guide, (filled, *tensors[1:]), particles, **how)
    errors = [e.standard_error if e.exact is None else torch.zeros_like(e.standard_error) for e in (observed, whole)]
    return HeldOut(
        joint=whole.best - observed.best,
        joint_error=torch.hypot(*errors),
        **made,
        observed=observed,
        complete=whole,
        particles=particles,
        method=method,
    )


def _holds(data: Tensor, x: Tensor) -> bool:
    """Whether each feature of x [N, ...] is one of the data [N, ...]."""
    if data.shape[:1] != x.shape[:1]:
        return False
    a, b = (part.reshape(len(part), -1).to(x) for part in (data, x))
    if a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True):
        return True
    if a.shape == b.shape:
        return False
    a, b = a.nan_to_num(math.inf), b.nan_to_num(math.inf)  # data are finite
    return all(bool((a == column.unsqueeze(1)).all(0).any()) for column in b.unbind(1))


def _flat(values: Tensor) -> Tensor:
    """Values [N, *event] as [N, X]; one feature where there is no event."""
    return values.reshape(len(values), -1)


def _check_numbers(particles: int, draws: int, levels: Sequence[float]) -> None:
    if particles < 1 or draws < 1:
        raise ValueError(f"particles and draws are at least 1, but got {particles} and {draws}")
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels are probabilities in [0, 1], at least one, but got {list(levels)}")


def _held_out_values(x: Tensor, complete: Tensor) -> Tensor:
    """The held-out values, NaN elsewhere."""
    check_tensor(complete, "complete")
    if complete.shape != x.shape:
        raise ValueError(f"complete must have the shape of the data, {list(x.shape)}, but got {shown(complete)}")
    complete = complete.to(x)
    seen = ~x.isnan()
    if bool((complete[seen] != x[seen]).any()):
        raise ValueError("complete differs from data where data are observed: give the same values there")
    held = torch.where(seen, math.nan, complete)
    if bool(held.isnan().all()):
        raise ValueError("nothing is held out: complete has no value where data are NaN")
    return held


Look = Callable[[Terms, Tensor, Batch, Tensor, str], dict[str, Tensor]]


def _over(
    model: Program,
    guide: Program,
    tensors: Batch,
    particles: int,
    site: str | None,
    refine: bool | Literal["auto"],
    seed: int | None,
    what: str,
    progress: bool,
    look: Look,
) -> tuple[dict[str, Tensor], str, str]:
    """The results of ``look`` for all data points in order; the name of the imputed site; and the method of sampling.

    ``look`` is called with the terms at weighted samples of z for some data points, the log weights, these data, their
    indices, and the name of the site.
    """
    parts: list[dict[str, Tensor]] = []
    places: list[Tensor] = []
    name = ""

    def keep(terms: Terms, log_w: Tensor, rows: Tensor, real: int) -> None:
        nonlocal name
        name = name or _site_of(terms, site)
        _check_possible(log_w)
        rows = torch.arange(len(tensors[0]), device=rows.device) if terms.joint else rows
        real = len(rows) if terms.joint else real
        data = tuple(x[rows.to(x.device)] for x in tensors)
        found = look(terms, log_w.unsqueeze(-1) if log_w.dim() == 1 else log_w, data, rows, name)
        found["samples"] = torch.full_like(rows, len(log_w))
        parts.append({key: values.expand(len(rows), *values.shape[1:])[:real].cpu() for key, values in found.items()})
        places.append(rows[:real].cpu())

    def joined() -> dict[str, Tensor]:
        order = torch.cat(places).argsort()
        return {key: torch.cat([part[key] for part in parts])[order] for key in parts[0]}

    numbers = max(x[0].numel() for x in tensors)
    most = max(1, _NUMBERS // (particles * numbers))
    how: dict[str, Any] = {"seed": seed, "progress": progress}
    method = "guide"
    with running(model, guide, what, seed=seed):
        if refine is True or (refine and not _suffices(model, guide, tensors, particles)):
            refined = find(model, guide, tensors, particles, look=keep, **how)
            if not isinstance(refined, str):
                return joined(), name, "refined"
            method = refined
            if refine is True:
                warnings.warn(f"samples of the guide are used: {method}", stacklevel=outside())
        sizes: dict[str, Any] = {"at_once": particles * most, "together": particles, "most": most}
        for part in stream(model, guide, tensors, what, weights="any", **sizes, **how):
            if part.layout.summed:  # states that are summed out have no values
                return _over(model, sampled(guide), tensors, particles, site, False, seed, what, progress, look)
            terms = part.pair.terms(part.data, particles)
            if terms.summed:
                raise NotImplementedError(
                    f"{what} needs a sample of each latent site, but the states of enumerated sites are summed out: "
                    f"{sorted(terms.log_p)}; sample these sites in the guide"
                )
            rows = torch.arange(part.first, part.first + len(part), device=terms.log_weights.device)
            keep(terms, terms.log_weights.double(), rows, len(rows))
    return joined(), name, method


def _suffices(model: Program, guide: Program, tensors: Batch, particles: int) -> bool:
    """Whether the guide's samples are good enough, by samples for the first data points that are used for nothing else.

    They are if the weights are constant, or k-hat is above 0.7 for at most 5 % of these data points.
    """
    how: dict[str, Any] = {"at_once": _PILOT * particles, "together": particles, "most": _PILOT, "progress": False}
    part = next(iter(stream(model, guide, tensors, "impute", weights="any", **how)))
    log_w = part.pair.log_weights(part.data, particles).double()
    log_w = log_w.unsqueeze(-1) if log_w.dim() == 1 else log_w
    constant = log_w.std(0) <= 1e-4 * (1 + log_w.mean(0).abs())
    doubtful = ~(tail_of(log_w) <= 0.7) & ~constant
    return bool(doubtful.double().mean() <= _DOUBTFUL)


_PILOT, _DOUBTFUL = 64, 0.05


def _site_of(t: Terms, site: str | None) -> str:
    """The observed site whose values are missing.

    Raises:
        ValueError: if there is none, or there are several.
    """
    observed = {name: t.values[name] for name, facts in t.p.items() if facts.observed and t.values[name].numel()}
    if site is not None and site not in observed:
        raise ValueError(f"site must be an observed site of the model, {sorted(observed)}, but got {site!r}")
    fits = [name for name, value in observed.items() if value.is_floating_point() and value.dim()]
    holed = [name for name in fits if has_holes(observed[name])] or fits
    if site is None and len(holed) != 1:
        raise ValueError(
            f"the model observes {sorted(observed)}: name the site to impute, site={(holed or ['x'])[0]!r}"
        )
    return site or holed[0]


def _check_possible(log_w: Tensor) -> None:
    """Raise ValueError if all weights of a data point are zero."""
    if lost := int(log_w.isneginf().all(0).sum()):
        raise ValueError(
            f"none of the {len(log_w)} samples of z is possible given the observed values, for {lost} data points: use "
            "more particles, or a guide that is closer to the posterior"
        )


def _quantiles(values: Tensor, share: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of weighted values [K, N, *event], with weights [K, N] that sum to 1: [Q, N, *event]."""
    ordered, order = values.sort(0)
    weights = share.reshape(*share.shape, *(1,) * (values.dim() - 2)).expand(values.shape).gather(0, order)
    below = weights.cumsum(0)
    found = []
    for level in levels:
        first = (below < level * (1 - 1e-6)).sum(0, keepdim=True).clamp_max(len(values) - 1)
        found.append(ordered.gather(0, first)[0])
    return torch.stack(found)


def _conditional(model: Any, tensors: tuple[Tensor, ...], name: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The exact mean and variance, if the model has them."""
    if name != "x" or not isinstance(model, HasCompletion):
        return None
    with torch.no_grad():
        mean, variance = model.completed(*tensors)
    return mean.cpu().to(x), variance.cpu().to(x)
