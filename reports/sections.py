"""What a page shows of each kind of result: the sentences that say what was found, and its sections."""

from __future__ import annotations

__all__ = ["Material", "bounds_of", "findings_of", "sections_of"]

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from jensen.inference import (
    Bounds,
    Calibration,
    Comparison,
    Evidence,
    HeldOut,
    History,
    Imputation,
    LearningRates,
    RateDistortion,
)
from jensen.inference import Gaps as Split
from jensen.plots import (
    plot_bounds,
    plot_gaps,
    plot_learning_rates,
    plot_missing,
    plot_ranks,
    plot_rate_distortion,
    plot_training,
)
from jensen.results.standard_errors import standard_error_of_mean
from jensen.results.tables import decimals, percent, with_error

from .drawing import PANEL, drawn, gap_bars, panel
from .meanings import meaning_of
from .page import Block, Figure, Grid, Item, Section, Thumbnails, grid_of

_WORST = 5  # data points of each kind
_SHOWN = 8  # features of a row


@dataclass
class Material:
    """What a page knows beside its results.

    Attributes:
        data: what was measured, [N, ...], if it is known.
        columns: the names of its features, if they have names.
        images: the images of the page, where data points are images.
        items: what points stand for.
    """

    data: Tensor | None = None
    columns: Sequence[str] = ()
    images: Thumbnails | None = None
    items: list[Item] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)

    def check(self, n: int, joint: bool) -> None:
        """Raise a ValueError unless the data are those of a result of so many data points."""
        if self.data is not None and not joint and len(self.data) != n:
            raise ValueError(
                f"data has {len(self.data)} data points, but the result has {n}: give the data that were measured"
            )

    def image(self, n: int) -> int | None:
        """The place of the image of a data point."""
        if self.images is None or self.data is None:
            return None
        if n not in self._places:
            (self._places[n],) = self.images.add(self.data[n : n + 1])
        return self._places[n]

    def row(self, n: int) -> str:
        """A data point that is no image, in words."""
        if self.data is None or self.images is not None:
            return ""
        values = self.data[n].flatten().tolist()
        names = self.columns if len(self.columns) == len(values) else [f"[{i}]" for i in range(len(values))]
        more = f", ... ({len(values)} in all)" if len(values) > _SHOWN else ""
        shown = ("missing" if math.isnan(value) else f"{value:.4g}" for value in values[:_SHOWN])
        return ", ".join(f"{name} {value}" for name, value in zip(names, shown, strict=False)) + more

    def item(self, n: int, lines: Sequence[str]) -> int:
        """A new item of a data point; its place."""
        self.items.append(Item("\n".join(filter(None, [*lines, self.row(n)])), self.image(n)))
        return len(self.items) - 1


@singledispatch
def findings_of(result: Any) -> list[str]:
    """Sentences that say what was found."""
    return []


@singledispatch
def sections_of(result: Any, material: Material) -> list[Section]:
    """The sections of a result."""
    return [Section("Table", [grid_of(result._table())])]


@findings_of.register
def _(result: Evidence) -> list[str]:
    n, unit = len(result.best), "" if result.joint else " per data point"
    kind = "exact" if result.exact is not None else "refined" if result.method == "refined" else "estimated"
    gap = with_error(float(result.gap.mean()), standard_error_of_mean(result.gap))
    mean = with_error(float(result.best.mean()), standard_error_of_mean(result.best))
    over = "all data points jointly" if result.joint else f"{n:,} data points"
    if n == 1:
        mean, gap = decimals(float(result.best.mean())), decimals(float(result.gap.mean()))
    sentences = [f"Log p(x) of {over} is {mean} nats{unit} ({kind}); the ELBO is {gap} nats below it."]
    if lost := int((~(result.best.isfinite() & result.elbo.isfinite())).sum()):
        sentences = [f"Log p(x) or ELBO is not finite for {lost:,} of {n:,} data points, so there are no means."]
    if result.too_low:
        sentences.insert(0, f"The estimate is unreliable: log p(x) is below the ELBO {result.too_low}.")
    if n == 1 and result.particles >= 25:
        k_hat, sure = float(result.pareto_k), "reliable"
        if not k_hat <= 0.7:
            sure = "unreliable" if result.exact is None else "unreliable as an estimate, but log p(x) is exact"
        sentences.append(f"The Pareto k-hat of the weights is {k_hat:.2f} (limit 0.7): {sure}.")
    elif result.exact is None and result.unreliable is not None:
        sentence = f"The estimate is unreliable (k-hat > 0.7) for {percent(result.unreliable)} of the data points"
        if not result.unreliable:
            sentence = "The estimate is reliable for all data points (k-hat of at most 0.7)"
        if result.by_guide is not None:
            share = percent(result.by_guide.unreliable)
            sentence += f"; with {result.particles:,} samples from the guide alone it is unreliable for {share}"
        sentences.append(f"{sentence}.")
    elif result.exact is not None and result.unreliable is not None:
        share = percent(result.unreliable)
        sentences.append(f"Log p(x) is exact; its estimate has k-hat > 0.7 for {share} of the data points.")
    if result.baseline is not None:
        difference = result.best - result.baseline
        by = with_error(float(difference.mean()), standard_error_of_mean(difference)).removeprefix("-")
        where = "above" if float(difference.mean()) > 0 else "below"
        reason = f": {result.below.partition(': ')[2]}" if result.below else ""
        sentences.append(f"Log p(x) is {by} nats {where} the baseline ({result.baseline_kind}){reason}.")
    return sentences


@sections_of.register
def _(result: Evidence, material: Material) -> list[Section]:
    material.check(len(result.best), result.joint)
    found = [Section("Table", [grid_of(result._table())])]
    if result.joint or len(result.best) < 2:
        return found
    series = {"reported": result}
    if result.by_guide is not None:
        series = {"refined": result, "samples of the guide": result.by_guide}
    return [*found, _points(series, series, material), _worst(result, material)]


@findings_of.register
def _(result: Comparison) -> list[str]:
    if len(result.rows) < 2:
        return findings_of(result._first)
    _, verdict, *more = re.split(r"(?<=\.) (?=[A-Z`])", result.sentence())  # the first says what rows have in common
    return [verdict, *(sentence for sentence in more if "k-hat" in sentence)]


@sections_of.register
def _(result: Comparison, material: Material) -> list[Section]:
    table = grid_of(result._table(), sortable=True)
    blocks: list[Block] = [table]
    split = {name: row.gaps for name, row in result.rows.items() if row.gaps is not None}
    whole = {
        name: (float(row.evidence.gap.mean()), standard_error_of_mean(row.evidence.gap))
        for name, row in result.rows.items()
        if math.isfinite(float(row.evidence.gap.mean()))
    }
    if split:
        blocks.append(drawn(plot_gaps(split), "The gap, split into the guide family's and the encoder's part."))
    elif whole:
        blocks.append(drawn(gap_bars(whole), "Variational gap of each row; whiskers are two standard errors."))
    material.check(len(result._first.best), result.joint)
    found = [Section("Table", blocks)]
    if result.joint or len(result._first.best) < 2:
        return found
    of = {name: row.evidence for name, row in result.rows.items()}
    weights = {name: evidence.by_guide or evidence for name, evidence in of.items()}
    points = _points(of, weights, material)
    if any(weights[name] is not of[name] for name in of):
        points = replace(points, note=f"{points.note} k-hat, ESS and error are those of samples from each guide alone.")
    best = max(of, key=lambda name: (float(of[name].best.mean()), float(of[name].elbo.mean())))
    worst = _worst(of[best], material)
    return [*found, points, replace(worst, note=f"Of {best}. {worst.note}")]


@sections_of.register
def _(result: History, material: Material) -> list[Section]:
    blocks: list[Block] = []
    if result.elbo:
        blocks.append(drawn(plot_training(result), "Training: bounds in nats per data point, epoch by epoch."))
    return [Section("Training", [*blocks, grid_of(result._table())])]


@sections_of.register
def _(result: LearningRates, material: Material) -> list[Section]:
    figure = drawn(plot_learning_rates(result), "Loss of each step against its learning rate.")
    return [Section("Learning rates", [figure, grid_of(result._table())])]


@sections_of.register
def _(result: Bounds, material: Material) -> list[Section]:
    return [bounds_of({"guide": result}), Section("Table", [grid_of(result._table())])]


@sections_of.register
def _(result: Split, material: Material) -> list[Section]:
    figure = drawn(
        plot_gaps({"guide": result}), "Approximation and amortization gap; whiskers are two standard errors."
    )
    return [Section("Gaps", [grid_of(result._table()), figure])]


@findings_of.register
def _(result: Imputation) -> list[str]:
    missing = result.missing
    how = "exact" if result.exact else f"estimated from {result.particles} particles"
    found = [
        f"{int(missing.sum()):,} of {missing.numel():,} values are missing; their means and variances are {how}.",
    ]
    if result.unreliable > 0:
        found.append(f"For {percent(result.unreliable)} of the rows with missing values k-hat > 0.7: unreliable.")
    return found


@sections_of.register
def _(result: Imputation, material: Material) -> list[Section]:
    figure = drawn(
        plot_missing(result.x, columns=result.columns or material.columns),
        "Which values are missing, and the share that each feature misses.",
    )
    return [Section("Missing values", [grid_of(result._table()), figure])]


@findings_of.register
def _(result: HeldOut) -> list[str]:
    joint = with_error(float(result.joint.mean()), standard_error_of_mean(result.joint))
    return [
        f"log p(held out | observed) is {joint} nats per data point jointly, and {decimals(result.per_value, 4)} nats "
        "per held-out value alone."
    ]


@sections_of.register
def _(result: Calibration, material: Material) -> list[Section]:
    return [Section("Calibration", [drawn(plot_ranks(result), _RANKS), grid_of(result._table())])]


@sections_of.register
def _(result: RateDistortion, material: Material) -> list[Section]:
    figure = drawn(plot_rate_distortion({"guide": result}), "Rate and distortion.")
    return [Section("Rate and distortion", [grid_of(result._table()), figure])]


_RANKS = (
    "Simulation-based calibration: ranks of the true z among samples of the guide, for data drawn from the model. "
    "Uniform ranks (the band) show no miscalibration; a U means that the guide is too narrow, a hump too wide."
)


def bounds_of(curves: Mapping[str, Bounds], evidence: Mapping[str, Evidence] | None = None) -> Section:
    """Bounds on log p(x) against the number of samples, with log p(x) as a line."""
    ax = plot_bounds(curves, evidence=evidence)
    caption = "Importance-weighted bounds rise from the ELBO (K = 1) to log p(x); bands are two Monte Carlo errors."
    return Section("Bounds", [drawn(ax, caption)])


def _points(series: Mapping[str, Evidence], weights: Mapping[str, Evidence], material: Material) -> Section:
    """Panels of each data point.

    Args:
        series: whose log p(x) and gap are shown, by name.
        weights: whose k-hat, effective sample size and error are shown.
        material: of the page.
    """
    first = next(iter(series.values()))
    chosen = _chosen(first, max(200, PANEL // len(series)))
    items = {
        name: [
            material.item(n, [f"#{n}" + f", {name}" * (len(series) > 1), *_lines(evidence, weights[name], n)])
            for n in chosen
        ]
        for name, evidence in series.items()
    }
    at = torch.tensor(chosen)

    def of(whose: Mapping[str, Evidence], quantity: str) -> dict[str, tuple[Tensor, Tensor, list[int]]]:
        return {
            name: (series[name].best[at].double().cpu(), getattr(e, quantity)[at].double().cpu(), items[name])
            for name, e in whose.items()
        }

    panels: list[Figure | None] = []
    if first.particles >= 25:
        k_hat = of(weights, "pareto_k")
        panels.append(panel(k_hat, "Pareto k-hat", line=(0.7, "0.7"), caption="Above 0.7: unreliable."))
    caption = "Effective sample size of the weights."
    panels.append(panel(of(weights, "ess"), "effective sample size", log=True, caption=caption))
    caption = "Monte Carlo standard error of log p(x)."
    panels.append(panel(of(weights, "standard_error"), "error (nats)", log=True, caption=caption))
    panels.append(panel(of(series, "gap"), "gap (nats)", caption="Variational gap, log p(x) - ELBO."))
    note = "Point at a mark to see the data point. The same data point is ringed in every panel."
    if len(chosen) < len(first.best):
        note += f" {len(chosen):,} of {len(first.best):,} data points are shown."
    return Section("Each data point", [figure for figure in panels if figure is not None], note)


def _chosen(evidence: Evidence, most: int) -> list[int]:
    """The data points that are drawn: all of them, or the worst and some of the others, evenly spaced."""
    N = len(evidence.best)
    if most >= N:
        return list(range(N))
    spaced = torch.linspace(0, N - 1, most - 3 * _WORST).long().tolist()
    return sorted({*spaced, *(n for of in _extremes(evidence).values() for n in of)})


def _extremes(evidence: Evidence) -> dict[str, list[int]]:
    """The worst data points in each respect."""
    respects = {"lowest log p(x)": -evidence.best, "largest gap": evidence.gap}
    if evidence.particles >= 25:
        respects["highest k-hat"] = evidence.pareto_k
    return {
        name: values.nan_to_num(-math.inf).argsort(descending=True, stable=True)[:_WORST].tolist()
        for name, values in respects.items()
        if float(values.max()) > float(values.min())
    }


def _worst(evidence: Evidence, material: Material) -> Section:
    """A table of the worst data points."""
    extremes = _extremes(evidence)
    names = ["data point", "log p(x)", "error", "ELBO", "gap", "k-hat", "ESS"]
    row = [] if material.data is None or material.images is not None else ["values"]
    rows = []
    for n in dict.fromkeys(n for of in extremes.values() for n in of):
        cells = [*(_number(value) for value in _numbers(evidence, n).values()), *(material.row(n) for _ in row)]
        rows.append((f"#{n}", "", cells, material.image(n)))
    grid = Grid(columns=[(name, meaning_of(name)) for name in [*names, *row]], rows=rows, sortable=True)
    *rest, last = extremes or ("lowest log p(x)",)
    listed = " and ".join(filter(None, [", ".join(rest), last]))
    return Section("Worst data points", [grid], f"The {_WORST} with the {listed}.")


def _numbers(evidence: Evidence, n: int) -> dict[str, float]:
    values = {
        "log p(x)": evidence.best,
        "error": evidence.standard_error,
        "ELBO": evidence.elbo,
        "gap": evidence.gap,
        "k-hat": evidence.pareto_k,
        "ESS": evidence.ess,
    }
    return {name: float(value[n]) for name, value in values.items()}


def _lines(evidence: Evidence, weights: Evidence, n: int) -> list[str]:
    of, by = ({name: _number(value) for name, value in _numbers(e, n).items()} for e in (evidence, weights))
    own = "" if weights is evidence else "samples from the guide: "
    return [
        f"log p(x) {of['log p(x)']}, error {of['error']}",
        f"ELBO {of['ELBO']}, gap {of['gap']}",
        f"{own}k-hat {by['k-hat']}, ESS {by['ESS']}" + (f", error {by['error']}" if own else ""),
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
