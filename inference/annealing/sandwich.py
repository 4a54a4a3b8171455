r"""Log p(x) from both sides: importance weighting and annealing, each with a lower and an upper bound.

.. math::
    \mathbb{E} \log \frac{1}{K} \sum_k w_k \le \log p(x) \le
    \mathbb{E} \log \frac{1}{K} \Big( w(z^*) + \sum_{k=2}^{K} w_k \Big), \qquad
    \mathbb{E} \log \frac{1}{C} \sum_c w_c \le \log p(x) \le
    -\mathbb{E} \log \frac{1}{C} \sum_c \frac{1}{\tilde w_c}, \qquad z^* \sim p(z \mid x)

with annealed weights w_c that run from the start to the posterior, and reversed ones that run from z* back to it.

In expectation every lower bound is below log p(x), and every upper bound above it. If numbers are in the wrong
order by more than four standard errors of their difference (more, by Student's t, for few data points), paired by
data point, they contradict each other: at least one of them is invalid.
"""

from __future__ import annotations

__all__ = ["Bracket", "Contradiction", "Sandwich", "sandwich"]

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.batches import Data, Device, Part, as_tensors, placed, stream
from jensen.kernel.caller import outside
from jensen.kernel.lifts import slowest
from jensen.kernel.modes import running
from jensen.kernel.randomness import forked_rng
from jensen.kernel.simulation import simulate
from jensen.kernel.weights import Program
from jensen.results.records import Record
from jensen.results.standard_errors import mc_error, standard_error_of_mean, within_t
from jensen.results.tables import Table, decimals, digits_of, percent, with_error

from ..exact.log_evidence import exact_evidence
from ..measure.bounds import check_latents, check_sites, log_weight_of
from ..measure.diagnostics import RunningWeights
from ..measure.evaluate import Refine
from ..measure.refined import bounds_of, target_of
from .ais import Path, Start, anneal, check_settings, temperatures_of, tune
from .rejection import posterior_draws

_ERRORS = 4.0
_SURE = math.erf(_ERRORS / math.sqrt(2))  # probability within so many errors of a normal distribution
_EXACT = "exact log p(x)"
_NAMES = {"weighted": "importance-weighted", "refined": "refined", "annealed": "annealed"}


@dataclass(frozen=True, eq=False)
class Bracket:
    """A lower and an upper bound for each data point. Tensors are float64 [N], in nats.

    Attributes:
        lower: the lower bound.
        lower_error: its Monte Carlo standard error (delta method).
        upper: the upper bound.
        upper_error: its Monte Carlo standard error given z*, without the variance over z*.

    Example:
        >>> one, none = torch.ones(3).double(), torch.zeros(3).double()
        >>> Bracket(lower=-2 * one, lower_error=none, upper=-one, upper_error=none).width
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    lower: Tensor
    lower_error: Tensor
    upper: Tensor
    upper_error: Tensor

    @property
    def width(self) -> Tensor:
        """Upper minus lower bound of each data point: [N]; negative for some, by chance."""
        return self.upper - self.lower

    @staticmethod
    def joined(parts: Sequence[Bracket]) -> Bracket:
        """The bounds of all data, from those of their batches."""
        return Bracket(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Bracket)))


class Contradiction(NamedTuple):
    """Two numbers in a mathematically impossible order.

    Attributes:
        above: the name of the number that is above the other, which is impossible.
        below: the name of the other.
        excess: the mean difference over the data in nats.
        error: its standard error, paired by data point.
    """

    above: str
    below: str
    excess: float
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich(Record):
    """The result of :func:`~jensen.inference.sandwich`, per data point.

    Attributes:
        weighted: the bounds of importance weighting.
        annealed: the bounds of annealing, forward and reversed.
        exact: log p(x) if the model has it, else None: float64 [N].
        particles: K.
        chains: C.
        temperatures: T.
        start: the start of annealing.
        drawn: whether the model sampled data and latents; else the latents come from rejection sampling.
        above: of rejection, the share of proposals where the density was above its envelope, in the worst batch:
            if it is not zero, z* are not exact samples from the posterior, and the upper bounds not exact bounds.
        route: the method for parallel particles and chains, such as ``"outer plate"``.
        refined: the bounds of importance weighting by a separate proposal per data point, if available.

    Example:
        >>> one, none = torch.ones(3).double(), torch.zeros(3).double()
        >>> wide, tight = Bracket(-2 * one, none, -one, none), Bracket(-1.6 * one, none, -1.4 * one, none)
        >>> bounds = Sandwich(wide, tight, None, particles=100, chains=8, temperatures=10, start="guide")
        >>> bounds.contradictions()
        []
        >>> print(bounds)
        3 data points sampled from the model, nats per data point (± of the mean over these data)
                                               lower           upper          width
        ---------------------------------------------------------------------------
        importance-weighted, K = 100  -2.000 ± 0.000  -1.000 ± 0.000  1.000 ± 0.000
        annealed, C = 8, T = 10       -1.600 ± 0.000  -1.400 ± 0.000  0.200 ± 0.000
    """

    weighted: Bracket
    annealed: Bracket
    exact: Tensor | None
    particles: int
    chains: int
    temperatures: int
    start: Start
    drawn: bool = True
    above: float = 0.0
    route: str = ""
    refined: Bracket | None = None

    def contradictions(self) -> list[Contradiction]:
        """Pairs of numbers whose order is wrong by more than chance and rounding allow.

        The limit is four standard errors for many data points. For few, the standard error itself is uncertain: the
        limit is then the one with the same probability under Student's t (16 for 5 data points, 10,000 for 2), and
        also four times the known Monte Carlo errors.
        """
        lower = {f"{_NAMES[key]} lower bound": b.lower for key, b in self._brackets.items()}
        upper = {f"{_NAMES[key]} upper bound": b.upper for key, b in self._brackets.items()}
        noise = {_EXACT: 0.0}
        for key, b in self._brackets.items():
            noise[f"{_NAMES[key]} lower bound"] = mc_error(b.lower_error)
            noise[f"{_NAMES[key]} upper bound"] = mc_error(b.upper_error)
        if self.exact is not None:
            lower[_EXACT] = upper[_EXACT] = self.exact
        wrong = []
        for low, small in lower.items():
            for high, large in upper.items():
                excess = small - large
                error = standard_error_of_mean(excess) if len(excess) > 1 else 0.0
                mean, rounding = float(excess.mean()), 1e-5 * (1 + float(large.abs().mean()))
                if low == high or len(excess) < 2 or mean - rounding <= _ERRORS * math.hypot(noise[low], noise[high]):
                    continue
                if error == 0 or within_t((mean - rounding) / error, len(excess) - 1) > _SURE:
                    wrong.append(Contradiction(low, high, mean, error))
        return wrong

    def verdict(self) -> str:
        """Whether the bounds are in order; if not, the contradictory numbers and the likely cause."""
        wrong = self.contradictions()
        if not wrong:
            return "The bounds are in order."
        listed = [
            f"  the {c.above} is {decimals(c.excess)} ± {decimals(c.error)} nats above the {c.below}" for c in wrong
        ]
        head = "The bounds contradict each other, so there is no table: a lower bound exceeds an upper one."
        return "\n".join([head, *listed, f"Suspect: {self._suspect(wrong)}."])

    def _suspect(self, wrong: list[Contradiction]) -> str:
        rounding = "or precision is lost to rounding (measure in float64)"
        of_model = (
            "the model: its samples do not follow its density (a site sampled and observed from different "
            "distributions, or from a separate random stream)"
            if self.drawn
            else "the samples from the posterior of the given data"
        )
        if self.exact is not None:
            of_model += ", or its log_evidence is that of another model"
        of_guide = "the guide: its log q(z | x) is not the density of its samples, or changes from run to run (dropout)"
        free = [c for c in wrong if not (self._reads_guide(c.above) or self._reads_guide(c.below))]
        if free:
            return f"{of_model}. The {free[0].above} and the {free[0].below} do not depend on the guide; {rounding}"
        if self.start == "guide" and self.exact is None:
            return f"either {of_guide}; or {of_model}. Annealing from the prior shows which; {rounding}"
        if not any(self._reads_guide(c.above) for c in wrong):  # a z* that is no posterior sample has this effect
            return f"either {of_guide}; or {of_model}; {rounding}"
        return f"{of_guide}. Each contradiction has a number that depends on it, and the others agree; {rounding}"

    def _reads_guide(self, name: str) -> bool:
        return name.startswith(("importance", "refined")) or (name.startswith("annealed") and self.start == "guide")

    @property
    def _brackets(self) -> dict[str, Bracket]:
        own = {} if self.refined is None else {"refined": self.refined}
        return {"weighted": self.weighted, **own, "annealed": self.annealed}

    def summary(self) -> dict[str, Any]:
        """Means over the data with their errors.

        The error of a lower bound is Monte Carlo error. That of an upper bound, and of a width, also covers the data,
        since each has one z* only; for upper bounds it is that of the difference to log p(x) if this is known, else
        to the refined lower bound, or the annealed one, whose own error is added.
        """
        result: dict[str, Any] = {"n": len(self.annealed.lower)}
        below = self.refined or self.annealed
        anchor = below.lower if self.exact is None else self.exact
        drift = mc_error(below.lower_error) if self.exact is None else 0.0
        for name, b in self._brackets.items():
            result[name] = {
                "lower": float(b.lower.mean()),
                "lower_error": mc_error(b.lower_error),
                "upper": float(b.upper.mean()),
                "upper_error": math.hypot(standard_error_of_mean(b.upper - anchor), drift),
                "width": float(b.width.mean()),
                "width_error": standard_error_of_mean(b.width),
            }
        result["exact"] = None if self.exact is None else float(self.exact.mean())
        result["above"] = self.above
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists: the summary, the verdict, the values per data point."""
        per_datum: dict[str, Any] = {"exact": None if self.exact is None else self.exact.tolist()}
        for name, b in self._brackets.items():
            per_datum[name] = {side: values.tolist() for side, values in vars(b).items()}
        return {"summary": self.summary(), "verdict": self.verdict(), "per_datum": per_datum}

    def _columns(self) -> tuple[str, range, dict[str, Tensor | None]]:
        columns = {f"{name}_{side}": v for name, b in self._brackets.items() for side, v in vars(b).items()}
        return "datum", range(len(self.annealed.lower)), {**columns, "exact": self.exact}

    def _table(self) -> Table:
        s = self.summary()
        source = "sampled from the model" if self.drawn else "given, latents by rejection sampling"
        head = f"{s['n']} data points {source}, nats per data point (± of the mean over these data)"
        above = (
            f"the envelope of the rejection sampling was too low at {percent(self.above)} of the proposals: z* are not "
            "exact samples from the posterior"
        )
        notes = [above] if self.above else []
        if self.contradictions():
            return Table(head, notes=[self.verdict(), *notes])
        drawn = {"weighted": f"K = {self.particles}", "refined": "own proposals"}
        drawn["annealed"] = f"C = {self.chains}, T = {self.temperatures}"
        rows = []
        for key in self._brackets:
            size = drawn[key]
            cells = (with_error(s[key][part], s[key][f"{part}_error"]) for part in ("lower", "upper", "width"))
            rows.append([f"{_NAMES[key]}, {size}", *cells])
        if self.exact is not None:
            digits = digits_of(None, s["annealed"]["lower_error"], s["weighted"]["lower_error"])
            rows.append([_EXACT, *[decimals(s["exact"], digits)] * 2, ""])
        return Table(head, ("", "lower", "upper", "width"), rows, notes=notes)


@checked
def sandwich(
    model: Program,
    guide: Program,
    n: int = 200,
    *,
    data: Data | None = None,
    latents: Mapping[str, Tensor] | None = None,
    covariates: tuple[Tensor, ...] = (),
    particles: int = 1000,
    refine: Refine = "auto",
    chains: int = 16,
    temperatures: int | Sequence[float] | Tensor = 100,
    schedule: str = "sigmoid",
    leapfrog: int = 2,
    pilot: int = 16,
    start: Start = "prior",
    seed: int | None = None,
    chunk_size: int = 2**14,
    device: Device = None,
    progress: bool = True,
) -> Sandwich:
    r"""Lower and upper bounds on log p(x), by importance weighting and by annealing, per data point.

    An upper bound needs a sample z* from the posterior of each data point. Data sampled from the model have one: the
    latents that generated them; so do data of :func:`~jensen.inference.simulate`, which samples from models of any
    style. For other given data z* is sampled by rejection on a grid, if the latent space has one or two coordinates.

    In importance weighting z* replaces one of the K samples; in refined proposals (``refine``) it replaces a sample
    from the same part of the mixture. Annealing runs C chains from z* back to the start, through the transitions of
    the forward run, with its frozen step sizes, from last to first. If both bounds of one
    kind agree, log p(x) of these data is known. If they differ, the weights vary too much, or z* is in a region that
    the guide does not sample.

    References:
        Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.
        https://arxiv.org/abs/1511.02543
        Sobolev and Vetrov (2019), Importance Weighted Hierarchical Variational Inference.
        https://arxiv.org/abs/1909.03290
        Wu, Burda, Salakhutdinov and Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.

    Args:
        model: a Pyro model; without ``data`` it samples them, called as ``model(None, *covariates, n=n)``.
        guide: its guide, which can compute log q of a given value.
        n: the number N of data points to sample from the model; not used with ``data``.
        data: given data, a tensor [N, ...] or a tuple of such tensors, with the covariates; None: sampled data.
        latents: the latent values that generated the given data, [N, *event] by site, as
            :func:`~jensen.inference.simulate` returns them. It cannot be checked that they belong to the data. None
            for real data.
        covariates: the arguments of model and guide beside the sampled x, tensors whose first dimension is N.
        particles: the number K of guide samples per data point, at least 2.
        refine: whether to also use a separate proposal per data point, as in :func:`~jensen.inference.evaluate`, and
            the number of its evaluations of log p(x, z); ``"auto"``: if it is possible.
        chains: the number C of chains per data point, forward and as many backward, at least 2.
        temperatures: as for :func:`~jensen.inference.ais`; likewise ``schedule``, ``leapfrog``, ``pilot``, ``start``.
        schedule: the spacing of temperatures, ``"sigmoid"`` or ``"linear"``.
        leapfrog: leapfrog steps of a transition.
        pilot: the number of chains of the pilot run.
        start: the start of annealing, ``"prior"`` or ``"guide"``; from the prior it does not depend on the guide.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        chunk_size: how many (data point, chain) or (data point, particle) combinations are run at once.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Sandwich`.

    Raises:
        ValueError: for invalid settings; given data together with covariates, or without latents and with
            more than two latent coordinates; latents without data or of another length; and the errors of
            :func:`~jensen.inference.ais` and :func:`~jensen.inference.simulate`.
        NotImplementedError: if the guide cannot compute log q of a given value.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> result = sandwich(model, ExactPosterior(model), n=20, start="guide", seed=0, progress=False)
        >>> bool(result.annealed.width.abs().max() < 1e-9), bool(result.weighted.width.abs().max() < 1e-9)
        (True, True)
    """
    betas = temperatures_of(temperatures, schedule)
    check_settings(guide, chains, leapfrog, pilot, start)
    if particles < 2:
        raise ValueError(f"particles is the number of samples from the guide, at least 2, but got {particles}")
    if data is not None and covariates:
        raise ValueError(
            "covariates belong to data that the model samples; give data as a tuple (x, *covariates) instead"
        )
    if latents is not None and data is None:
        raise ValueError("latents belong to data: give both, data and latents, from one call of simulate")
    origin = guide if start == "guide" else None
    weighted: list[Bracket] = []
    annealed: list[Bracket] = []
    exact: list[Tensor] = []
    above: list[float] = []
    refined: list[Bracket] = []
    budget = (particles if isinstance(refine, bool | str) else refine) if refine else 0
    with running(model, guide, "sandwich", seed=seed, device=device):
        if data is None:
            others = placed(covariates, device, None) if covariates else ()
            latents, x = simulate(model, n, *others)
            tensors = (x, *others)
        else:
            tensors = placed(as_tensors(data), device, None)
            if latents is not None:
                check_latents(latents, len(tensors[0]))
        how: dict[str, Any] = {"at_once": chunk_size, "together": chains, "progress": progress, "seed": seed}
        for part in stream(model, guide, tensors, "sandwich", most=256, **how):
            path = Path(part.pair.model, None if origin is None else part.pair.guide, part.data, part.layout.nesting)
            if latents is None:
                prior = Path(part.pair.model, None, part.data, part.layout.nesting)
                posterior = posterior_draws(prior.draw(4096), prior.log_joint)
                true = {site: z[0] for site, z in path.coordinates.values(posterior.u)[0].items()}
                above.append(float(posterior.above.mean()))
            else:
                true = {site: z[part.rows].to(part.data[0].device) for site, z in latents.items()}
            with forked_rng():
                check_sites(true, part.pair.terms(part.data, 1).q)
            weighted.append(_weighted(part, true, particles))
            tuning, _ = tune(path, betas, leapfrog, pilot)
            forward, _ = anneal(path, path.draw(chains), betas, tuning, leapfrog)
            back, _ = anneal(path, path.at(true, chains), betas, tuning, leapfrog, backwards=True)
            annealed.append(_annealed(forward, back))
            if budget:
                made = target_of(part, budget)
                if isinstance(made, str):
                    budget = 0
                    if refine != "auto":
                        warnings.warn(f"no bounds by refined proposals: {made}", stacklevel=outside())
                else:
                    one = {site: value.unsqueeze(0) for site, value in true.items()}
                    sides = bounds_of(*made, made[0].free(one)[0])
                    refined.append(Bracket(*(side.cpu() for side in sides)))
            known = exact_evidence(model, part.data)
            exact += [] if known is None else [known.cpu()]
    return Sandwich(
        weighted=Bracket.joined(weighted),
        annealed=Bracket.joined(annealed),
        exact=torch.cat(exact) if exact else None,
        particles=particles,
        chains=chains,
        temperatures=len(betas) - 1,
        start=start,
        drawn=latents is not None,
        above=max(above, default=0.0),
        route=slowest((part.pair.way, path.way)),
        refined=Bracket.joined(refined) if refined else None,
    )


def _weighted(part: Part, true: Mapping[str, Tensor], particles: int) -> Bracket:
    """The importance-weighted bounds of a part of the data."""
    every, rest = RunningWeights(particles), RunningWeights(particles - 1)  # rest: all but the first
    for k in part.chunks(particles):
        log_w = part.pair.log_weights(part.data, k).detach()
        others = log_w if every.seen else log_w[1:]
        every.update(log_w)
        if len(others):
            rest.update(others)
    log_sum = rest.log_evidence + math.log(particles - 1)
    upper = torch.logaddexp(
        log_sum, log_weight_of(part.pair.model, part.pair.guide, true, part.data).to(log_sum.device)
    )
    return Bracket(
        lower=every.log_evidence.cpu(),
        lower_error=every.standard_error.cpu(),
        upper=(upper - math.log(particles)).cpu(),
        upper_error=(rest.standard_error * (log_sum - upper).exp()).cpu(),
    )


def _annealed(forward: Tensor, back: Tensor) -> Bracket:
    """The bounds from annealed log weights, forward [C, N] and reversed [C, N]."""
    moments = []
    for log_w in (forward, -back):
        moments.append(RunningWeights(len(log_w)))
        moments[-1].update(log_w)
    there, inverse = moments
    return Bracket(
        lower=there.log_evidence.cpu(),
        lower_error=there.standard_error.cpu(),
        upper=-inverse.log_evidence.cpu(),
        upper_error=inverse.standard_error.cpu(),
    )
