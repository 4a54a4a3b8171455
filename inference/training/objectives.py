r"""Objectives: bounds on log p(x) as subclasses of ``pyro.infer.ELBO``, for ``SVI(..., loss=...)`` and ``fit``.

Each is a reduction of the log weights of K samples, per data point. Its loss is minus the sum over the data of the
*bound*, times N/B if they are a subsample. Scales are omitted, so that neither subsampling nor ``poutine.scale``
changes the bounded quantity.

| gradient | the guide's parameters follow |
| --- | --- |
| ``"standard"`` | the derivative of the bound; at a site without ``rsample`` its score, with the other samples as
baseline | | ``"stl"`` | the same without the derivative of log q at fixed z: sticking the landing |
| ``"dreg"`` | path derivatives only, weighted by the square of the normalized weights: doubly reparameterized |

The ELBO may be shaped by beta, its annealing, and free bits. The bound itself is always reported beside the loss.

.. math:: \text{loss} = -\sum_n \Big( \mathbb{E} \log p(x_n \mid z)
          - \beta \sum_g \max\big(\lambda_g, \overline{\text{KL}}_g\big) \Big)
"""

from __future__ import annotations

__all__ = [
    "ELBO",
    "IWAE",
    "CyclicalAnnealing",
    "Gradient",
    "Knob",
    "LinearAnnealing",
    "Objective",
    "Renyi",
    "leave_one_out",
    "path_log_q",
    "path_log_weights",
    "power_loss",
    "power_mean",
    "reparameterize_doubly",
    "scored_power_mean",
    "with_gradient_of",
]

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import pyro.infer
import torch
from torch import Tensor

from jensen.checked import checked, checked_fields
from jensen.kernel.arguments import check_tensors
from jensen.kernel.layout import Layout
from jensen.kernel.lifts import ALONE, Way
from jensen.kernel.looks import look_at
from jensen.kernel.parameters import owners_of
from jensen.kernel.randomness import forked_rng
from jensen.kernel.terms import Terms
from jensen.kernel.weights import Pair, Program, log_joint, parameters_of, terms

Gradient = Literal["standard", "stl", "dreg"]
Knob = float | Callable[[int], float]  # a number, or a function from the step to one


class Objective(pyro.infer.ELBO):
    r"""Base class of objectives: a subclass defines one method, ``value``, the loss of one run of model and guide.

    .. math:: \text{loss} = -\frac{N}{B} \sum_{n=1}^{B} \mathcal{L}(\log w_{1n}, \dots, \log w_{Kn})

    The base class runs model and guide, multiplies by N/B if a plate subsamples the data, rejects models and guides
    that the objective does not support, and works with ``pyro.infer.SVI`` and :func:`~jensen.inference.fit`. A subclass
    is traced and compiled like jensen's own objectives if :meth:`value` uses tensor operations only and does not branch
    on the value of a tensor.

    An objective keeps no state that affects training: ``fit`` passes the knobs of the step and gets loss and
    bound from :meth:`loss_and_bound`, which changes nothing. Under ``SVI`` the objective counts its own calls.

    References:
        Schulman, Heess, Weber and Abbeel (2015), Gradient Estimation Using Stochastic Computation Graphs.

    Args:
        num_particles: the number K of samples, at least 1.
        gradient: ``"standard"``, ``"stl"`` or ``"dreg"``. With the last two the terms have ``log_q_stopped`` if a
            gradient is computed; ``"dreg"`` rejects a model and guide that share parameters.
        knobs: the numbers in the loss that may change between steps: each is a float, or a function from the number
            of finished optimizer steps (an int from 0) to a float.
        shaped: whether the loss differs from minus the bound: then ``History.shaped`` is recorded beside
            ``History.elbo``.
        scores: whether :meth:`value` gives sites without ``rsample`` the gradient of their score; else a guide with
            such sites is rejected.

    Attributes:
        coupled: whether the loss of a batch is not a sum over its data points (free bits are an average over the
            batch): several processes then take whole batches instead of sharing them. False unless a subclass sets it.
        power: the bound of a data point is the power mean of its K weights with this power: 0 for the ELBO (unless a
            subclass sets it), 1 for the importance-weighted bound. ``fit`` computes it of the validation data.

    Raises:
        ValueError: for ``num_particles`` below 1 and an unknown gradient; when used, for a guide that has sites
            without ``rsample`` unless ``scores``, for parameters that model and guide share under ``"dreg"``, and for
            a :meth:`value` that does not return scalars.
        NotImplementedError: when used, for sites that the guide enumerates; with a gradient other than the standard
            one, for sites of the model whose states are summed out.

    Example:
        The ELBO with a KL whose weight increases in the first 100 steps:

        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> class WarmUp(Objective):
        ...     def __init__(self, steps):
        ...         super().__init__(knobs=[LinearAnnealing(steps)], shaped=True)
        ...
        ...     def value(self, terms, knobs):
        ...         log_w = terms.log_weights  # [K, N]
        ...         kl = terms.observed - log_w
        ...         return -(terms.observed - knobs[0] * kl).mean(0).sum(), log_w.mean(0).sum()
        >>> objective, model = WarmUp(100), PPCA(5, latent=2)
        >>> loss = objective.loss(model, PriorGuide(model), torch.randn(20, 5))
        >>> objective.knobs(0).tolist(), objective.knobs(50).tolist(), loss == -float(objective.bound)
        ([0.0], [0.5], True)
    """

    @checked
    def __init__(
        self,
        num_particles: int = 1,
        gradient: Gradient = "standard",
        *,
        knobs: Sequence[Knob] = (),
        shaped: bool = False,
        scores: bool = False,
    ) -> None:
        if num_particles < 1:
            raise ValueError(
                f"num_particles is the number of samples from the guide, at least 1, but got {num_particles}"
            )
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {get_args(Gradient)}, but got {gradient!r}")
        super().__init__(num_particles=num_particles)  # type: ignore[no-untyped-call]
        self.gradient, self.shaped, self.scores = gradient, shaped, scores
        self.coupled, self.power = False, 0.0
        self._knobs = tuple(knobs)
        self._step = 0
        self._bound = torch.tensor(math.nan)
        self._last = _Last()

    @abstractmethod
    def value(self, terms: Terms, knobs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the bound of one run of model and guide, each summed over the data, without the factor N/B.

        Args:
            terms: the terms of the log weights [K, N] ([K] if joint).
            knobs: the knobs of the step, float64 [P] for P of them, on the data's device.

        Returns:
            The loss, a scalar: its value is minus the bound (or the shaped bound), its gradient that of the estimator;
            if the two differ, use ``value.detach() + surrogate - surrogate.detach()``. And the bound, a scalar without
            the shaping of the loss; its gradient is not used.
        """

    @property
    def step(self) -> int:
        """The number of calls of :meth:`loss_and_grads`: the step of the knobs outside of ``fit``."""
        return self._step

    @property
    def bound(self) -> Tensor:
        """The bound of the last loss outside of ``fit``, summed over the data; NaN before the first one."""
        return self._bound

    @property
    def way(self) -> Way:
        """The method by which the last model and guide were run for K particles: ``"alone"`` before a run."""
        return ALONE if self._last.pair is None else self._last.pair.way

    def knobs(self, step: int, device: torch.device | None = None) -> Tensor:
        """The knobs of the loss after ``step`` optimizer steps: float64 [P]."""
        numbers = [knob(step) if callable(knob) else knob for knob in self._knobs]
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    def loss_and_bound(
        self, model: Program, guide: Program, *data: Tensor, knobs: Tensor, max_plate_nesting: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and bound at given knobs; the objective itself does not change.

        Args:
            model: any Pyro model, called as ``model(*data)``.
            guide: its guide, called with the same data.
            data: tensors whose first dimension is N.
            knobs: :meth:`knobs` of the step.
            max_plate_nesting: the nesting depth of the plates, after :meth:`check`. None: model and guide are
                checked, once.

        Returns:
            The loss, differentiable in the parameters, and the bound, detached: scalars, times N/B under subsampling.
        """
        pair = self._pair_of(model, guide, data, max_plate_nesting)
        scale, loss, bound = self._unscaled(pair, data, knobs)
        return scale * loss, scale * bound

    @checked
    def differentiable_loss(self, model: Program, guide: Program, *data: Tensor) -> Tensor:
        """The loss at the knobs of :attr:`step`, with its gradient."""
        loss, self._bound = self.loss_and_bound(model, guide, *data, knobs=self._own_knobs(data))
        return loss

    @checked
    def loss(self, model: Program, guide: Program, *data: Tensor) -> float:
        """The loss at the knobs of :attr:`step`, without gradient."""
        with torch.no_grad():
            pair = self._pair_of(model, guide, data, None)
            scale, loss, bound = self._unscaled(pair, data, self._own_knobs(data))
        self._bound = scale * bound
        return scale * float(loss)

    @checked
    def loss_and_grads(self, model: Program, guide: Program, *data: Tensor) -> float:
        """The loss; its gradient is added to that of the parameters, as ``pyro.infer.SVI`` requires."""
        loss = self.differentiable_loss(model, guide, *data)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        self._step += 1
        return float(loss.detach())

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("this objective is a reduction of log weights and has no traces")

    def _own_knobs(self, data: tuple[Tensor, ...]) -> Tensor:
        check_tensors(data)
        return self.knobs(self._step, data[0].device if data else None)

    def _unscaled(self, pair: Pair, data: tuple[Tensor, ...], knobs: Tensor) -> tuple[float, Tensor, Tensor]:
        """N/B, and the :meth:`value` of one run of model and guide."""
        stopped = self.gradient != "standard" and torch.is_grad_enabled()
        t = pair.terms(data, self.num_particles, stopped)
        if not (t.p or t.q):
            raise ValueError("there are no sites: neither model nor guide calls pyro.sample")
        loss, bound = self.value(t, knobs)
        if loss.shape or bound.shape:
            raise ValueError(
                f"{type(self).__name__}.value must return a loss and a bound summed over the data, two scalars, but "
                f"their shapes are {list(loss.shape)} and {list(bound.shape)}"
            )
        return t.scale, loss.to(bound.dtype), bound.detach()  # a knob times a float32 scalar is float64

    def _pair_of(self, model: Program, guide: Program, data: tuple[Tensor, ...], nesting: int | None) -> Pair:
        """Model and guide as they are run; without a nesting they are checked at their first use."""
        known = self._last.pair
        if known is None or known.model != model or known.guide != guide or nesting not in (None, known.nesting):
            layout: Layout | int | None = nesting
            if layout is None:
                layout = look_at(model, guide, data)
                self.check(model, guide, layout, *data)
            self._last.pair = known = Pair(model, guide, layout)
        return known

    def check(self, model: Program, guide: Program, layout: Layout, *data: Tensor) -> None:
        """Raise an error of the class docstring if the objective does not support this model and guide."""
        kind = type(self).__name__
        name = kind if self.gradient == "standard" else f"{kind}(gradient={self.gradient!r})"
        if self.gradient == "dreg" and (shared := _shared_parameters(model, guide, data, layout.nesting)):
            raise ValueError(
                f"{name} weights the gradient differently for the parameters of guide and model, but both depend on "
                f"{shared}: give the prior separate parameters, or use gradient='stl' or 'standard'"
            )
        if layout.summed:
            raise NotImplementedError(
                f"the guide enumerates {sorted(layout.summed)}: their states are summed out of the log weights, which "
                f"then do not average to the bound of {kind}. Use pyro.infer.TraceEnum_ELBO, or sample these sites"
            )
        if (left := sorted(layout.enumerated)) and self.gradient != "standard":
            raise NotImplementedError(
                f"the guide leaves {left} to be enumerated, which {name} does not support: use gradient='standard' or "
                "pyro.infer.TraceEnum_ELBO, or sample these sites in the guide"
            )
        if (stuck := sorted(layout.scored)) and not self.scores:
            raise ValueError(
                f"{name} needs reparameterized sites, but {stuck} have no rsample: use gradient='standard' of ELBO, "
                "IWAE or Renyi"
            )


class _Last:
    """The last model and guide of an objective, already checked, with their proved method for K particles."""

    def __init__(self) -> None:
        self.pair: Pair | None = None


def _shared_parameters(model: Program, guide: Program, data: tuple[Tensor, ...], nesting: int) -> list[str]:
    """The names of the parameters on which log p(x, z) at fixed z and the guide's samples or log q both depend."""
    candidates = [p for half in parameters_of(model, guide, *data) for p in half]
    with torch.enable_grad(), forked_rng():
        t = terms(model, guide, *data, max_plate_nesting=nesting)
        fixed = {name: t.values[name].detach() for name in t.q if name in t.p}
        drawn = [*t.log_q.values(), *(t.values[name] for name in t.q)]
        depends = []
        for outcome in (drawn, [log_joint(model, fixed, *data)]):
            total = sum(v.sum() for v in outcome if v.requires_grad)
            slopes = torch.autograd.grad(total, candidates, allow_unused=True) if isinstance(total, Tensor) else ()
            depends.append({p for p, slope in zip(candidates, slopes, strict=bool(slopes)) if slope is not None})
    names = {p: name for owner in owners_of(guide, model) for name, p in owner.named_parameters()}
    return sorted(names.get(p, "a pyro.param") for p in set.intersection(*depends))


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """A number with the value of the first and the gradient of the second; the first alone without gradients."""
    return value.detach() + surrogate - surrogate.detach() if torch.is_grad_enabled() else value


def path_log_q(t: Terms) -> dict[str, Tensor]:
    """Log q of each site [K, N]; under ``"stl"`` and ``"dreg"`` its gradient flows through the samples only."""
    return t.log_q if t.log_q_stopped is None else t.log_q_stopped


def path_log_weights(t: Terms) -> Tensor:
    """The log weights [K, N], with log q by :func:`path_log_q`."""
    total: Tensor = sum(t.log_p.values()) - sum(path_log_q(t).values())  # type: ignore[assignment]
    return total


def reparameterize_doubly(t: Terms, log_w: Tensor, p: float) -> None:
    """Reweight the gradient that reaches the samples, so that the power mean's becomes doubly reparameterized.

    References:
        Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators.
    """
    weights = (p * log_w.detach()).softmax(0)  # [K, N]
    for site in t.q:
        value = t.values[site]
        if value.requires_grad:
            value.register_hook(_times(p * t.spread(site, weights) + (1 - p)))


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


def scored_power_mean(t: Terms, log_w: Tensor, p: float) -> Tensor:
    """The power mean, summed over the data, plus a score term for sites without ``rsample``: unbiased gradient.

    Its value equals the power mean only if the guide has no such site.
    """
    total = power_mean(log_w, p).sum()
    scores = [t.log_q[name] for name, site in t.q.items() if site.needs_score]
    if scores:
        total = total + (leave_one_out(log_w.detach(), p) * sum(scores)).sum()
    return total


def power_loss(t: Terms, log_w: Tensor, p: float, gradient: str = "standard") -> tuple[Tensor, Tensor]:
    """Loss and bound for a power mean of the weights, with the requested gradient."""
    bound = power_mean(log_w, p).sum()
    if gradient == "dreg" and p:
        reparameterize_doubly(t, log_w, p)
    return -with_gradient_of(bound, scored_power_mean(t, log_w, p)), bound


def power_mean(log_w: Tensor, p: float) -> Tensor:
    r"""Log of the power mean of weights over their first dimension.

    .. math:: \frac{1}{p} \log \frac{1}{K} \sum_k w_k^p, \qquad p \to 0: \frac{1}{K} \sum_k \log w_k
    """
    if p == 0:
        return log_w.mean(0)
    top, u = _below_largest(log_w, p)
    even = (u.clamp(-1.0, 1.0).expm1().mean(0)).log1p()  # 1/p would magnify the rounding of a logsumexp near zero
    return top + torch.where(_nearly_even(u), even, u.logsumexp(0) - math.log(len(log_w))) / p


def _below_largest(log_w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The largest log weight [N] (0 if all weights are zero), and p times the distances from it: [K, N]."""
    top = log_w.detach().amax(0)
    top = torch.where(top.isneginf(), torch.zeros_like(top), top)
    return top, p * (log_w - top)


def _nearly_even(u: Tensor) -> Tensor:
    """Whether every power of a weight is within a factor of e from that of the largest: [N]."""
    return u.detach().abs().amax(0) <= 1


def leave_one_out(log_w: Tensor, p: float) -> Tensor:
    """The power mean of all, minus that with one weight replaced by the geometric mean of the others: [K, N].

    Only the first term depends on the replaced sample: the second is a baseline that keeps the score function
    unbiased. A single sample has no baseline, and neither has one if all others have weight zero.

    References:
        Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives (VIMCO).
    """
    K = len(log_w)
    if K == 1:
        return log_w
    zero = log_w.isneginf()
    finite = log_w.masked_fill(zero, 0.0)
    others = (finite.sum(0) - finite) / (K - 1)
    others = torch.where(zero.sum(0) - zero.long() > 0, torch.full_like(others, -math.inf), others)
    if p == 0:
        return (log_w - others) / K
    top, u = _below_largest(log_w, p)
    inserted = p * (others - top)
    near = u.clamp(-1.0, 1.0).expm1()
    even = ((near.sum(0) - near + inserted.clamp(-1.0, 1.0).expm1()) / K).log1p()
    edge = u.new_full((1, *u.shape[1:]), -math.inf)
    before = torch.cat([edge, u.logcumsumexp(0)[:-1]])
    after = torch.cat([u.flip(0).logcumsumexp(0)[:-1].flip(0), edge])
    apart = torch.logaddexp(torch.logaddexp(before, after), inserted) - math.log(K)
    baseline = top + torch.where(_nearly_even(u), even, apart) / p
    whole = power_mean(log_w, p).expand_as(log_w)
    return torch.where(baseline.isneginf(), whole, whole - baseline)


class IWAE(Objective):
    r"""The importance-weighted bound of K samples, which increases to log p(x) with K.

    .. math:: \mathcal{L}_K = \sum_n \mathbb{E} \log \frac{1}{K} \sum_k w_{kn}

    The signal-to-noise ratio of its standard gradient for the guide falls like 1/sqrt(K). The doubly reparameterized
    gradient has the same mean without this loss. Sticking the landing has another mean for K > 1, and a smaller
    variance. For the model's parameters all three are equal.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders. https://arxiv.org/abs/1509.00519
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better.
        Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194
        Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators.
        https://arxiv.org/abs/1810.04152

    Args:
        num_particles: K.
        gradient: ``"standard"``, ``"stl"`` or ``"dreg"``.

    Raises:
        ValueError: for K < 1 and an unknown gradient; when used, for a site without ``rsample`` under ``"stl"`` and
            ``"dreg"``, and under ``"dreg"`` for parameters that model and guide share.
        NotImplementedError: when used, for sites that the guide enumerates; with a gradient other than the standard
            one, for sites of the model whose states are summed out.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> guide, x = PriorGuide(model), torch.randn(20, 5)
        >>> IWAE(1000).loss(model, guide, x) < IWAE(1).loss(model, guide, x)
        True
    """

    @checked
    def __init__(self, num_particles: int = 10, gradient: Gradient = "standard") -> None:
        super().__init__(num_particles, gradient, scores=gradient == "standard")
        self.power = 1.0

    def value(self, terms: Terms, knobs: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the log of the mean weight, and that log."""
        return power_loss(terms, path_log_weights(terms), self.power, self.gradient)


class Renyi(Objective):
    r"""Renyi's bound of order alpha: the ELBO for 1, the importance-weighted bound for 0, an upper bound below 0.

    .. math:: \mathcal{L}_\alpha = \sum_n \frac{1}{1 - \alpha} \mathbb{E} \log \frac{1}{K} \sum_k w_{kn}^{1 - \alpha}

    For alpha < 0 it is an upper bound only in the limit of infinite K.

    References:
        Li and Turner (2016), Renyi Divergence Variational Inference. https://arxiv.org/abs/1602.02311

    Args:
        alpha: the order, any finite number.
        num_particles: K.
        gradient: ``"standard"``, ``"stl"`` or ``"dreg"``, as for :class:`IWAE`.

    Raises:
        ValueError: if alpha is not finite, and as :class:`IWAE`.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> guide, x = PriorGuide(model), torch.randn(20, 5)
        >>> Renyi(0.0, 1000).loss(model, guide, x) < Renyi(0.9, 1000).loss(model, guide, x)
        True
    """

    @checked
    def __init__(self, alpha: float = 0.5, num_particles: int = 10, gradient: Gradient = "standard") -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is the order of the bound, a finite number, but got {alpha}")
        super().__init__(num_particles, gradient, scores=gradient == "standard")
        self.alpha, self.power = alpha, 1.0 - alpha

    def value(self, terms: Terms, knobs: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the power mean of the weights with power 1 - alpha, and that mean."""
        return power_loss(terms, path_log_weights(terms), self.power, self.gradient)


@checked_fields
@dataclass(frozen=True)
class LinearAnnealing:
    """Beta as a linear function from ``start`` to ``end`` over the given steps, and ``end`` afterwards.

    References:
        Bowman et al. (2016), Generating Sentences from a Continuous Space. https://arxiv.org/abs/1511.06349

    Example:
        >>> beta = LinearAnnealing(100)
        >>> beta(0), beta(50), beta(1000)
        (0.0, 0.5, 1.0)
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is the length of the annealing, at least 1, but got {self.steps}")

    @checked
    def __call__(self, step: int) -> float:
        """Beta at a step."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@checked_fields
@dataclass(frozen=True)
class CyclicalAnnealing:
    """Beta that increases from ``start`` to ``end`` over the first part of every period, and then stays constant.

    References:
        Fu et al. (2019), Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing.
        https://arxiv.org/abs/1903.10145

    Example:
        >>> beta = CyclicalAnnealing(100)
        >>> beta(0), beta(25), beta(75), beta(100)
        (0.0, 0.5, 1.0, 0.0)
    """

    period: int
    rise: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 < self.rise <= 1:
            raise ValueError(
                f"period must be at least 1 and rise a share of it in (0, 1], but got {self.period} and {self.rise}"
            )

    @checked
    def __call__(self, step: int) -> float:
        """Beta at a step."""
        passed = (step % self.period) / self.period
        return self.start + (self.end - self.start) * min(1.0, passed / self.rise)


class ELBO(Objective):
    r"""The evidence lower bound, with low-variance gradients and the usual shaping.

    .. math:: \text{ELBO}_n = \mathbb{E}_q \log p(x_n \mid z) - \sum_s \mathbb{E}_q \text{KL}(q(z_s) \| p(z_s))

    Sticking the landing omits the derivative of log q at fixed z, whose mean is zero: if q equals the posterior, the
    gradient has no noise. With ``analytic_kl`` the KL of a site is computed in closed form if its two distributions
    have a registered one (``torch.distributions.kl_divergence``), given the samples of the sites before it. This needs
    the guide to sample before it all latent sites that the model samples before it; for other sites log q - log p of
    the samples is used. Shaped by beta or free bits, the loss is not a bound: ``History.elbo`` holds the ELBO
    itself, and so does ``objective.bound`` after a loss outside of ``fit``.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.
        Roeder, Wu and Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194
        Higgins et al. (2017), beta-VAE.
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow: free bits.

    Args:
        num_particles: the number K of samples.
        gradient: ``"standard"`` or ``"stl"``.
        analytic_kl: whether to use closed forms of the KL.
        beta: weight of the KL, or a function from the number of finished steps to it, as :class:`LinearAnnealing`.
        free_bits: nats below which the KL of a group, averaged over the batch, has no gradient: one number for every
            group, or one by site. Sites without their own density (an auxiliary site and its ``Delta``) are one
            group, named ``"auxiliary"``.
        free_bits_per: the kind of group: a ``"site"``, or a ``"dimension"`` of a site whose two distributions
            factorize; the KL of a dimension is in closed form if one is known, with and without ``analytic_kl``. Sites
            that the guide samples in another order than the model are one group with the sum of their nats: for single
            sites the mean of log q - log p is not a KL, and may be negative.

    Raises:
        ValueError: for invalid settings; when used, for free bits of an unknown site, or per
            dimension of one that does not factorize, and as :class:`~jensen.inference.IWAE`.
        NotImplementedError: when used, for sites that the guide enumerates; with a gradient other than the standard
            one, for sites of the model whose states are summed out.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), MeanField, context=16)
        >>> objective = ELBO(analytic_kl=True, beta=LinearAnnealing(10))
        >>> history = fit(model, guide, torch.randn(64, 5), objective, epochs=3, seed=0, progress=False)
        >>> len(history.elbo), len(history.shaped)
        (3, 3)
    """

    @checked
    def __init__(
        self,
        num_particles: int = 1,
        gradient: Literal["standard", "stl"] = "standard",
        *,
        analytic_kl: bool = False,
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float | Mapping[str, float] = 0.0,
        free_bits_per: Literal["site", "dimension"] = "site",
    ) -> None:
        if gradient not in ("standard", "stl"):
            raise ValueError(f"gradient is one of ('standard', 'stl'), but got {gradient!r}")
        floors = list(free_bits.values()) if isinstance(free_bits, Mapping) else [free_bits]
        if any(floor < 0 for floor in floors) or (not callable(beta) and beta < 0):
            raise ValueError(f"beta and free_bits are at least 0, but got {beta} and {free_bits}")
        if free_bits_per not in ("site", "dimension"):
            raise ValueError(f"free_bits_per is 'site' or 'dimension', but got {free_bits_per!r}")
        super().__init__(
            num_particles,
            gradient,
            knobs=[beta],
            shaped=any(floors) or callable(beta) or beta != 1,
            scores=gradient == "standard",
        )
        self.analytic_kl, self.beta = analytic_kl, beta
        self.free_bits, self.free_bits_per = free_bits, free_bits_per
        self.coupled = any(floors)

    def value(self, terms: Terms, knobs: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, shaped by beta and free bits, and the ELBO."""
        if terms.summed and not self.shaped:  # log p(x | z) may not be separable
            return power_loss(terms, path_log_weights(terms), 0.0)
        kls = self._kls(terms)
        observed = terms.observed
        log_w = observed - sum(kls.values())
        if not self.shaped:
            return power_loss(terms, log_w, 0.0)
        beta, n = knobs[0], prod(terms.shape[1:])
        value, shaped = observed.mean(0).sum(), observed
        for kl, floor in self._groups(terms, kls):
            mean = kl.mean()  # over samples and data; an estimate of it may be negative
            value = value - (beta * n).to(mean.dtype) * (mean.clamp_min(floor) if floor else mean)
            shaped = shaped - beta * (kl * (mean > floor) if floor else kl)
        return -with_gradient_of(value, scored_power_mean(terms, shaped, 0.0)), log_w.mean(0).sum()

    def _kls(self, t: Terms) -> dict[str, Tensor]:
        """The KL of each site, in closed form or as log q - log p of the samples: [K, N] by name."""
        log_q = path_log_q(t)
        kls: dict[str, Tensor] = {}
        for name in t.q:
            if name not in t.p or t.q[name].point:
                rest = log_q[name] - (t.log_p[name] if name in t.p else 0.0)
                kls["auxiliary"] = kls.get("auxiliary", 0.0) + rest
                continue
            kls[name] = log_q[name] - t.log_p[name]
            if self.analytic_kl:
                with suppress(NotImplementedError):  # none is registered, or the guide samples a parent later
                    kls[name] = t.kl(name)
        return kls

    def _groups(self, t: Terms, kls: dict[str, Tensor]) -> list[tuple[Tensor, float]]:
        """The KL [K, N] of each group, and its free nats."""
        free = self.free_bits
        if isinstance(free, Mapping) and (unknown := sorted(set(free) - set(kls))):
            raise ValueError(f"free_bits names {unknown}, but the KL has parts {sorted(kls)}")
        floors = {name: free.get(name, 0.0) if isinstance(free, Mapping) else free for name in kls}
        groups = []
        for names in _in_order(t, kls):
            apart = self.free_bits_per == "dimension" and any(floors[name] for name in names)
            if apart and len(names) == 1:
                groups += [(part, floors[names[0]]) for part in t.kl_per_dimension(names[0])]
                continue
            total: Tensor = sum(kls[name] for name in names)  # type: ignore[assignment]
            sizes = [_size(t, name) if apart else 1 for name in names]
            groups.append((total, sum(floors[name] * size for name, size in zip(names, sizes, strict=True))))
        return groups


def _size(t: Terms, site: str) -> int:
    """The number of dimensions of a site's event; the auxiliary group counts as one."""
    return prod(t.values[site].shape[-t.q[site].event_dim :]) if site in t.q and t.q[site].event_dim else 1


def _in_order(t: Terms, kls: Mapping[str, Tensor]) -> list[list[str]]:
    """The parts of the KL in groups that model and guide sample in the same order, each a KL given earlier groups.

    If the guide samples a site before a parent, the mean of its log q - log p is not a KL, and may be negative; summed
    with that of the parent it is a KL.
    """
    groups = [{name} for name in kls]
    for name in set(kls) & set(t.p):
        linked = {name, *(later if later in kls else "auxiliary" for later in t.drawn_later(name))}
        joined = set().union(*(group for group in groups if group & linked))
        groups = [*(group for group in groups if not group & linked), joined]
    return [[name for name in kls if name in group] for group in groups]
