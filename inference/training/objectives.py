r"""Objectives: bounds on log p(x) as subclasses of ``pyro.infer.ELBO``, for ``SVI(..., loss=...)`` and ``fit``.

Each is a reduction of the log weights of K draws, datum by datum, and its loss is minus the sum over the data of the
*bound*, times N/B where they are a subsample. Scales are left out, so that neither subsampling nor ``poutine.scale``
changes which quantity is bounded.

| gradient | the guide's parameters are moved by |
| --- | --- |
| ``"standard"`` | the derivative of the bound; at a site without ``rsample`` its score, against the other draws |
| ``"stl"`` | the same without the derivative of log q at fixed z: sticking the landing |
| ``"dreg"`` | path derivatives alone, weighted by the square of the normalized weights: doubly reparameterized |
"""

from __future__ import annotations

__all__ = ["IWAE", "Gradient", "Objective", "Renyi", "leave_one_out", "power_mean"]

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import pyro.infer
import torch
from torch import Tensor

from jensen.kernel.layout import Layout
from jensen.kernel.parameters import owners_of
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import Terms, needs_score
from jensen.kernel.weights import Program, check_pair, log_joint, parameters_of, terms

Gradient = Literal["standard", "stl", "dreg"]


class Objective(pyro.infer.ELBO):
    """What the objectives share: one run of the kernel, a reduction, and the gradients.

    Attributes:
        step: the number of optimizer steps done; ``fit`` and ``SVI`` keep it.
        bound: the bound of the last loss, summed over the data: without what shapes the loss.
        given: the :meth:`knobs` as a tensor, where a captured graph passes them in; else None.
    """

    gradients: tuple[str, ...] = ("standard", "stl", "dreg")

    def __init__(self, num_particles: int, gradient: str) -> None:
        if num_particles < 1:
            raise ValueError(
                f"num_particles is the number of draws from the guide, at least 1, but got {num_particles}"
            )
        if gradient not in self.gradients:
            raise ValueError(f"gradient is one of {self.gradients}, but got {gradient!r}")
        super().__init__(num_particles=num_particles)  # type: ignore[no-untyped-call]
        self.gradient = gradient
        self.step = 0
        self.bound = torch.tensor(math.nan)
        self.given: Tensor | None = None
        self._known: tuple[Program, Program, int] | None = None

    @property
    def shaped(self) -> bool:
        """Whether the loss is something else than minus the bound."""
        return False

    def knobs(self) -> tuple[float, ...]:
        """The numbers in the loss that change from step to step."""
        return ()

    @abstractmethod
    def power(self) -> float:
        """The power p of the mean of the weights, whose log is the bound: log (mean w^p)^(1/p); p = 0: mean log w."""

    def differentiable_loss(self, model: Program, guide: Program, *data: Tensor) -> Tensor:
        """Minus the bound, summed over the data, with the gradient asked for."""
        t = self._terms(model, guide, data)
        value, log_w = self._value(t)
        surrogate = self._surrogate(t, log_w)
        loss: Tensor = -t.scale * (value.detach() + surrogate - surrogate.detach())
        return loss

    def loss(self, model: Program, guide: Program, *data: Tensor) -> float:
        """The loss alone, without gradient."""
        with torch.no_grad():
            t = terms(
                model, guide, *data, particles=self.num_particles, max_plate_nesting=self._look(model, guide, data)
            )
            return -t.scale * float(self._value(t)[0])

    def loss_and_grads(self, model: Program, guide: Program, *data: Tensor) -> float:
        """The loss, its gradient added to the parameters': what ``pyro.infer.SVI`` asks for."""
        loss = self.differentiable_loss(model, guide, *data)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        self.step += 1
        return float(loss.detach())

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("this objective is a reduction of log weights, and makes no trace of its own")

    def _look(self, model: Program, guide: Program, data: tuple[Tensor, ...]) -> int:
        """How deep the plates of a pair are nested, from a look at it when it first comes."""
        if self._known is None or self._known[0] != model or self._known[1] != guide:
            layout = check_pair(model, guide, *data)
            self._check(model, guide, data, layout)
            self._known = model, guide, layout.nesting
        return self._known[2]

    def _check(self, model: Program, guide: Program, data: tuple[Tensor, ...], layout: Layout) -> None:
        name = f"{type(self).__name__}(gradient={self.gradient!r})"
        if self.gradient == "dreg" and (shared := _shared_parameters(model, guide, data, layout.nesting)):
            raise ValueError(
                f"{name} weights the gradient of the guide's parameters otherwise than that of the model's, but both "
                f"halves read {shared}: give the prior parameters of its own, or take gradient='stl' or 'standard'"
            )
        if left := sorted(layout.enumerated):
            raise NotImplementedError(
                f"the guide leaves {left} to be enumerated, which {type(self).__name__} does not do: take "
                "pyro.infer.TraceEnum_ELBO, or sample them in the guide"
            )
        stuck = sorted(layout.scored)
        if stuck and self.gradient != "standard":
            raise ValueError(
                f"{name} needs reparameterized sites, but {stuck} have no rsample: take gradient='standard'"
            )

    def _terms(self, model: Program, guide: Program, data: tuple[Tensor, ...]) -> Terms:
        nesting = self._look(model, guide, data)
        stopped = self.gradient != "standard"
        return terms(model, guide, *data, particles=self.num_particles, stopped=stopped, max_plate_nesting=nesting)

    def _value(self, t: Terms) -> tuple[Tensor, Tensor]:
        """The bound summed over the data, and the log weights whose reduction has its gradient."""
        log_w = _log_weights(t)
        value = power_mean(log_w, self.power()).sum()
        self.bound = t.scale * value.detach()
        return value, log_w

    def _surrogate(self, t: Terms, log_w: Tensor) -> Tensor:
        """A number whose derivative is the gradient of the bound."""
        p = self.power()
        if self.gradient == "dreg" and p:
            weights = (p * log_w.detach()).softmax(0)  # [K, N]
            for site in t.run.q:
                value = t.values[site["name"]]
                if value.requires_grad:
                    value.register_hook(_times(p * t.run.spread(site, weights) + (1 - p)))
        surrogate = power_mean(log_w, p).sum()
        scores = [t.log_q[site["name"]] for site in t.run.q if needs_score(site)]
        if scores:
            signal = leave_one_out(log_w.detach(), p)
            surrogate = surrogate + (signal * sum(scores)).sum()
        return surrogate


def _shared_parameters(model: Program, guide: Program, data: tuple[Tensor, ...], nesting: int) -> list[str]:
    """The names of the parameters that both log p(x, z) at fixed z and the guide's draws or log q depend on."""
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


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


def _log_weights(t: Terms) -> Tensor:
    """Log weights [K, N], by the gradient of log q that was asked for."""
    log_q = t.log_q if t.log_q_stopped is None else t.log_q_stopped
    total: Tensor = sum(t.log_p.values()) - sum(log_q.values())  # type: ignore[assignment]
    return total


def power_mean(log_w: Tensor, p: float) -> Tensor:
    r"""Log of the power mean of weights over their first dimension.

    .. math:: \frac{1}{p} \log \frac{1}{K} \sum_k w_k^p, \qquad p \to 0: \frac{1}{K} \sum_k \log w_k
    """
    if p == 0:
        return log_w.mean(0)
    return ((p * log_w).logsumexp(0) - math.log(len(log_w))) / p


def leave_one_out(log_w: Tensor, p: float) -> Tensor:
    """The power mean of all, minus that with one weight replaced by the geometric mean of the others: [K, N].

    It does not depend on what the replaced draw is, but for the first term: a baseline that leaves the score function
    unbiased. A single draw has none.

    References:
        Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives (VIMCO).
    """
    K = len(log_w)
    if K == 1:
        return log_w
    others = (log_w.sum(0) - log_w) / (K - 1)
    if p == 0:
        return (log_w - others) / K
    u = p * log_w
    edge = u.new_full((1, *u.shape[1:]), -math.inf)
    before = torch.cat([edge, u.logcumsumexp(0)[:-1]])
    after = torch.cat([u.flip(0).logcumsumexp(0)[:-1].flip(0), edge])
    replaced = torch.logaddexp(torch.logaddexp(before, after), p * others) - math.log(K)
    return power_mean(log_w, p) - replaced / p


class IWAE(Objective):
    r"""The importance-weighted bound of K draws, which rises to log p(x) with K.

    .. math:: \mathcal{L}_K = \sum_n \mathbb{E} \log \frac{1}{K} \sum_k w_{kn}

    Its standard gradient moves the guide less and less surely as K grows: the signal-to-noise ratio falls like
    1/sqrt(K). The doubly reparameterized one does not, and has the same mean. Sticking the landing has another mean for
    K > 1, and a smaller variance. The model's parameters move the same in all three.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better.
        Roeder, Wu and Duvenaud (2017), Sticking the Landing.
        Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators.

    Args:
        num_particles: K.
        gradient: ``"standard"``, ``"stl"`` or ``"dreg"``.

    Raises:
        ValueError: for K < 1 and an unknown gradient; when used, for a site without ``rsample`` under ``"stl"`` and
            ``"dreg"``, and under ``"dreg"`` for parameters that model and guide share.
        NotImplementedError: when used, for a site that the guide leaves to be enumerated.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> guide, x = PriorGuide(model), torch.randn(20, 5)
        >>> IWAE(1000).loss(model, guide, x) < IWAE(1).loss(model, guide, x)
        True
    """

    def __init__(self, num_particles: int = 10, gradient: Gradient = "standard") -> None:
        super().__init__(num_particles, gradient)

    def power(self) -> float:
        """1: the bound is the log of the mean weight."""
        return 1.0


class Renyi(Objective):
    r"""Renyi's bound of order alpha: the ELBO at 1, the importance-weighted bound at 0, above log p(x) below 0.

    .. math:: \mathcal{L}_\alpha = \sum_n \frac{1}{1 - \alpha} \mathbb{E} \log \frac{1}{K} \sum_k w_{kn}^{1 - \alpha}

    For alpha < 0 it bounds from above only as K goes to infinity.

    References:
        Li and Turner (2016), Renyi Divergence Variational Inference.

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

    def __init__(self, alpha: float = 0.5, num_particles: int = 10, gradient: Gradient = "standard") -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is the order of the bound, a finite number, but got {alpha}")
        super().__init__(num_particles, gradient)
        self.alpha = alpha

    def power(self) -> float:
        """1 - alpha."""
        return 1.0 - self.alpha
