"""Checks of a model, a guide and their data: each error names the argument or site, what came, and the remedy."""

from __future__ import annotations

__all__ = [
    "check_holes",
    "check_match",
    "check_scale",
    "check_shapes",
    "check_simulated",
    "check_spread",
    "checked_data",
    "fit_values",
]

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import Categorical, Delta, Unit
from pyro.distributions.util import sum_rightmost
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from jensen.missing import Observed

from .arguments import check_tensors
from .caller import outside
from .sites import Site, base_of, enclosing_plates, plates_of, score, sites_of, subsampling
from .supports import bounds_of, inside_of, log_density

_NARROW = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32)
_COARSE = 0.05  # standard deviations: rounding below this is harmless
_RUNS = 8  # of the model, to see whether a support moves with the samples
Again = Callable[[], list[Site]]


def _check_form(data: tuple[Tensor, ...], dtypes: set[torch.dtype]) -> None:
    check_tensors(data)
    for i, x in enumerate(data):
        if len(dtypes) == 1 and x.is_floating_point() and x.dtype not in dtypes:
            (dtype,) = dtypes
            wide = "model and guide (model.double(), guide.double())"
            remedy = f"convert the data (x.to({dtype})), or {wide}"
            if _is_coarse(x, dtype):
                remedy = f"convert {wide}, or standardize the data before x.to({dtype}), which would round them visibly"
            raise ValueError(f"data[{i}] is {x.dtype}, but the parameters of model and guide are {dtype}: {remedy}")
        if x.dim() and len(x) == 0:
            raise ValueError(f"data[{i}] is empty: its shape is {list(x.shape)}")


def _is_coarse(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether another dtype would round some feature to steps that are not small relative to its spread."""
    if len(x) < 2 or torch.finfo(x.dtype).eps >= torch.finfo(dtype).eps:
        return False
    scale = x.std(0)
    return bool(((scale > 0) & (torch.finfo(dtype).eps * x.mean(0).abs() > _COARSE * scale)).any())


def _not_finite(i: int, finite: Tensor) -> str:
    row = (~finite).nonzero()[0].tolist()
    return (
        f"data[{i}] holds {int((~finite).sum())} values that are NaN or infinite, the first at index {row}; "
        "remove these rows or fill them in"
    )


def _missing(i: int, holes: Tensor) -> str:
    row = holes.nonzero()[0].tolist()
    return f"data[{i}] holds {int(holes.sum())} NaN, the first at index {row}"


@contextmanager
def checked_data(data: tuple[Tensor, ...], dtypes: set[torch.dtype]) -> Iterator[bool]:
    """Check data; if they contain NaN, also that the block runs on them. Yields whether they contain NaN.

    Raises:
        ValueError: for data that are empty, infinite, or of another precision than the parameters, and for NaN if the
            block raises.
    """
    _check_form(data, dtypes)
    finite = [x.isfinite() for x in data]
    holes = [i for i, x in enumerate(data) if not finite[i].all()]
    for i in holes:
        if data[i].isinf().any():
            raise ValueError(_not_finite(i, finite[i]))
    if not holes:
        yield False
        return
    try:
        yield True
    except NotImplementedError:  # it names what is not possible
        raise
    except (RuntimeError, ValueError) as error:
        found = ", and ".join(_missing(i, ~finite[i]) for i in holes)
        raise ValueError(
            f"{found}, and model and guide do not run on it: if NaN marks missing values that the model observes, give "
            "missing='nan' to fit and evaluate (elsewhere the model as jensen.missing.observed_only(model)), and a "
            "guide that reads NaN, such as an encoder in jensen.networks.Masked; else (covariates, for example) remove "
            f"or fill these rows (the error: {str(error).splitlines()[0]})"
        ) from error


def check_holes(sites: list[Site]) -> None:
    """Raise ValueError unless every log-density is finite at data that contain NaN.

    Where missing values are left out, what is observed may be outside of a support that moves: minus infinity.
    """
    for site in sites:
        log_prob = score(site)
        fine = log_prob.isfinite() | log_prob.isneginf() if isinstance(site["fn"], Observed) else log_prob.isfinite()
        if not bool(fine.all()):
            raise ValueError(f"the log-density of site '{site['name']}' is not finite")


def check_spread(sites: list[Site], data: tuple[Tensor, ...]) -> None:
    """Raise ValueError if a site takes more values as missing than the data lack: the model computed with NaN.

    The mean of a column with one NaN is NaN, so is the whole column without it, and none of it would be scored.
    """
    holed = [site for site in sites if site["is_observed"] and isinstance(site["fn"], Observed)] if data else []
    lost = sum(int(x.isnan().sum()) for x in data if x.is_floating_point()) if holed else 0
    for site in holed:
        count = int(site["value"].isnan().sum())
        if count > lost:
            raise ValueError(
                f"the model observes {count} NaN at site '{site['name']}', but the data hold {lost}: it computes "
                "with NaN before it observes (a mean, a difference), or a function gives NaN (a logarithm): "
                "observe the data themselves, prepare them before, or use torch.nanmean"
            )


def _moves(site: Site, again: Again | None) -> bool:
    """Whether the support of a site depends on sampled values: its bounds differ between runs."""
    bounds = bounds_of(site["fn"])
    for _ in range(_RUNS if bounds and again is not None else 0):
        assert again is not None
        others = [bounds_of(s["fn"]) for s in again() if s["name"] == site["name"]]
        if any(
            x.shape == y.shape and not torch.equal(x, y)
            for other in others
            for x, y in zip(bounds, other, strict=False)
        ):
            return True
    return False


def check_match(p: Trace, q: Trace, again: Again | None = None) -> None:
    """Raise ValueError for a site that model or guide lacks; warn of a plate that only the guide has.

    ``again`` returns the model's sites in another run; it allows samples outside of a support that moves.
    """
    p_sites, q_sites = sites_of(p), sites_of(q)
    latent = {s["name"]: s for s in p_sites if not s["is_observed"]}
    drawn = {s["name"] for s in q_sites}
    auxiliary = {s["name"] for s in q_sites if s["infer"].get("is_auxiliary")}
    missing = {name for name, s in latent.items() if not s["infer"].get("enumerate")} - drawn
    if missing:
        listed = all(getattr(latent[name]["fn"], "has_enumerate_support", False) for name in missing)
        summed = ", or sum over its states: give pyro.infer.config_enumerate(model) instead of the model"
        raise ValueError(
            f"the guide misses {sorted(missing)} of the model's latent sites {sorted(latent)}; sample it in the guide, "
            f"or observe it in the model{summed if listed else ''}"
        )
    if extra := drawn - auxiliary - set(latent):
        raise ValueError(
            f"the guide samples {sorted(extra)}, but the model's latent sites are {sorted(latent)}; rename the site, "
            "or mark it infer={'is_auxiliary': True}"
        )
    for s in q_sites:
        if s["name"] in latent:
            _check_draw(latent[s["name"]], s, again)
    plates = {frame.name for s in p_sites for frame in plates_of(s)}
    if foreign := {frame.name for s in q_sites for frame in plates_of(s)} - plates:
        warnings.warn(
            f"the guide's plates {sorted(foreign)} are not in the model, whose plates are {sorted(plates)}: sites in "
            "plates with different names are not independent data points, so their weights are joint",
            stacklevel=outside(),
        )


def _check_draw(p: Site, q: Site, again: Again | None) -> None:
    """Raise ValueError if the guide samples a site with another shape, support or event dimension than the model's."""
    name, mine, theirs = q["name"], base_of(q["fn"]), base_of(p["fn"])
    if q["fn"].event_dim != p["fn"].event_dim:
        raise ValueError(
            f"the guide samples site '{name}' with {q['fn'].event_dim} event dimensions, but the model's site has "
            f"{p['fn'].event_dim}; give both the same to_event and the same plates"
        )
    if q["value"].is_floating_point() and (lost := int(q["value"].isnan().sum())):
        raise ValueError(
            f"the guide samples NaN at site '{name}' from {name_of(mine)}, in {lost} of {q['value'].numel()} values: "
            "check its parameters for logarithms and roots of negative numbers"
        )
    try:
        discrete = (q["fn"].support.is_discrete, p["fn"].support.is_discrete)
        outside = not bool(inside_of(p["fn"], q["value"]).all())
    except NotImplementedError:  # a distribution without a support
        return
    if (outside and not _moves(p, again)) or (discrete[0] != discrete[1] and not isinstance(mine, Delta)):
        raise ValueError(
            f"the guide samples site '{name}' from {name_of(mine)}, whose support differs from that of the model's "
            f"{name_of(theirs)}; use a family with the support of the site, or map a continuous family onto it with "
            f"constraints={{'{name}': ...}}, an argument of amortize and of several guides"
        )


def check_scale(sites: list[Site]) -> None:
    """Warn of the user's ``poutine.scale``."""
    scales = [(s["name"], torch.as_tensor(s["scale"]) / subsampling(set(s["cond_indep_stack"]))) for s in sites]
    own = {name: scale.flatten()[0].item() for name, scale in scales if ((scale - 1).abs() > 1e-6).any()}
    if own:
        listed = ", ".join(f"'{name}' ({scale:g})" for name, scale in own.items())
        warnings.warn(
            f"these sites are under a poutine.scale: {listed}; importance weights ignore scales, so they are those of "
            "the unscaled model",
            stacklevel=outside(),
        )


def check_shapes(p: list[Site], q: list[Site], again: Again | None = None) -> None:
    """Raise ValueError for a batch dimension without a plate, or for observations that do not fit.

    ``again`` returns the model's sites in another run; it allows data outside of a support that moves.
    """
    for site in [*p, *q]:
        _check_shape(site)
    for site in p:
        if site["is_observed"]:
            _check_observed(site, again)


def _check_shape(site: Site) -> None:
    """Raise ValueError for a batch dimension that no plate declares, as Pyro's own losses do."""
    shape = site["fn"].batch_shape
    declared = {frame.dim: frame.size for frame in plates_of(site)}
    loose = [dim for dim in range(-len(shape), 0) if shape[dim] != 1 and declared.get(dim) != shape[dim]]
    if loose:
        plates = f" (they have {dict(sorted(declared.items()))}, size by dimension)" if declared else ""
        raise ValueError(
            f"site '{site['name']}' has batch shape {tuple(shape)}, but dimension {loose[0]} belongs to no plate"
            f"{plates}; make it part of the event (.to_event(1)), or open a plate for it"
        )


def _check_observed(site: Site, again: Again | None) -> None:
    """Raise ValueError for an observation outside the support of its distribution, or of another shape."""
    _check_dtype(site)
    fn, value = site["fn"], site["value"]
    event_dim = fn.event_dim
    shape = tuple(value.shape[: value.dim() - event_dim])
    fits = torch.broadcast_shapes(shape, fn.batch_shape) == fn.batch_shape
    unsized = any(frame.size == -1 for frame in site["cond_indep_stack"])  # in such a plate nothing is expanded
    if not fits and not unsized:
        raise ValueError(
            f"the data observed at site '{site['name']}' have batch shape {shape}, but its distribution has "
            f"{tuple(fn.batch_shape)}"
        )
    try:
        inside = inside_of(fn, value)
    except NotImplementedError:  # a distribution without a support
        return
    mask = site["mask"]
    outside = ~inside if mask is None else ~inside & mask
    if outside.any():
        outside = outside & ~_holes(site)
    if outside.any() and not _moves(site, again):
        support = fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        wrong = ~support.check(value)[(..., *(None,) * support.event_dim)]  # each number, not the data point
        misplaced = outside[(..., *(None,) * event_dim)]
        bad = value.masked_select(wrong & misplaced if wrong.any() else misplaced)
        raise ValueError(
            f"the data observed at site '{site['name']}' lie outside the support of {name_of(fn)} in "
            f"{int(outside.sum())} places (values from {bad.min():g} to {bad.max():g} there); {_remedy(support)}"
        )


def _check_dtype(site: Site) -> None:
    """Raise ValueError for whole numbers whose density differs from that of the same real numbers.

    Narrow integers wrap around in sums and differences inside a density: 255 + 1 is 0 in bytes.
    """
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor) or value.is_floating_point() or isinstance(base_of(fn), Categorical):
        return
    wrong = "whose sums and differences wrap around" if value.dtype in _NARROW else ""
    if not wrong:
        to = torch.get_default_dtype()
        try:
            right = fn.log_prob(value.to(to))
        except (RuntimeError, ValueError, TypeError, NotImplementedError):  # it accepts only whole numbers, or none
            return
        try:
            same = torch.allclose(fn.log_prob(value).to(to), right, rtol=1e-3, atol=1e-3, equal_nan=True)
        except (RuntimeError, ValueError, TypeError):
            same = False
        wrong = "" if same else "which its density does not accept"
    if wrong:
        raise ValueError(
            f"the data observed at site '{site['name']}' of {name_of(fn)} are {value.dtype}, {wrong}: convert them "
            "(x.float())"
        )


def _holes(site: Site) -> Tensor:
    """Where a site observes NaN and its log-density is still finite."""
    fn, value = site["fn"], site["value"]
    if not value.is_floating_point() or not (holes := value.isnan()).any():
        return torch.zeros((), dtype=torch.bool)
    try:
        finite = log_density(site).isfinite()
    except ValueError:
        return torch.zeros((), dtype=torch.bool)
    found: Tensor = sum_rightmost(holes, fn.event_dim).bool() & finite
    return found


def name_of(fn: Any) -> str:
    """The name of a distribution as users know it: without the leading underscore of private versions."""
    return type(base_of(fn)).__name__.lstrip("_")


def _remedy(support: Any) -> str:
    """The support in words, and the remedy for data outside it."""
    if support is constraints.boolean:
        return "binarize grey images (batch_transform=torch.bernoulli, or a threshold), or use a continuous likelihood"
    ends = [getattr(support, end, None) for end in ("lower_bound", "upper_bound")]
    low, high = (None if end is None else torch.as_tensor(end).max().item() for end in ends)
    kind = "whole numbers" if support.is_discrete else "numbers"
    if low is None:
        return "transform the data, or use a likelihood whose support contains them"
    verb = "round, scale or shift" if support.is_discrete else "scale or shift"
    return (
        f"the support is the {kind} from {low:g} {'on' if high is None else f'to {high:g}'}: {verb} the data to fit, "
        "or use a likelihood whose support contains them"
    )


def check_simulated(sites: list[Site], n: int) -> None:
    """Raise ValueError unless a model that samples its data samples ``n`` values at each site and observes nothing."""
    enclosing = {frame.dim for frame in enclosing_plates(sites)}
    for site in sites:
        name, shape = site["name"], tuple(site["fn"].batch_shape)
        if isinstance(base_of(site["fn"]), Unit):
            raise ValueError(
                f"site '{name}' is a factor (pyro.factor): it changes the density of the model, so samples of the "
                "other sites are not samples from the model; write it as a distribution, or omit it"
            )
        if site["is_observed"]:
            raise ValueError(
                f"site '{name}' is observed in the run that samples data, so the samples ignore its value; give an "
                "example of all data (data=...): then this site is sampled, too"
            )
        if shape != (n,) and not (shape[:1] == (n,) and -len(shape) in enclosing):
            raise ValueError(
                f"site '{name}' is sampled with batch shape {shape}, but {n} data points need {(n,)}: open one plate "
                "of size n around every site, left of all others (a global latent has no value per data point)"
            )


def fit_values(values: Mapping[str, Tensor], sites: list[Site], nesting: int) -> tuple[int, dict[str, Tensor]]:
    """K, and the values [K, *site] of all latent sites, reshaped so that K is left of ``nesting`` plates.

    Raises:
        ValueError: for a site without a value, a value without a site, or a value of a wrong shape.
    """
    latent = {s["name"]: s for s in sites if not s["is_observed"]}
    if set(latent) != set(values) or not latent:
        raise ValueError(
            f"log_joint needs a value for each latent site of the model, {sorted(latent)}: missing "
            f"{sorted(set(latent) - set(values))}, not in the model {sorted(set(values) - set(latent))}"
        )
    particles = sorted({len(value) for value in values.values()})
    if len(particles) != 1:
        raise ValueError(f"log_joint needs values that agree in their first dimension K, but got {particles}")
    fitted = {}
    for name, site in latent.items():
        shape, inner = tuple(site["value"].shape), tuple(values[name].shape[1:])
        cut = len(inner) - len(shape)
        if cut < 0 or inner[cut:] != shape or set(inner[:cut]) - {1}:
            expected = ", ".join(["K", *map(str, shape)])
            raise ValueError(
                f"log_joint needs values of shape [{expected}] at site '{name}', but got {list(values[name].shape)}"
            )
        padding = (1,) * (nesting + site["fn"].event_dim - len(shape))
        fitted[name] = values[name].reshape(particles[0], *padding, *shape)
    return particles[0], fitted
