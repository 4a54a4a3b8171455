r"""The ELBO and what shapes it: beta, its annealing, free bits. The bound itself is always reported beside the loss.

.. math:: \text{loss} = -\sum_n \Big( \mathbb{E} \log p(x_n \mid z)
          - \beta \sum_g \max\big(\lambda_g, \overline{\text{KL}}_g\big) \Big)
"""

from __future__ import annotations

__all__ = ["ELBO", "CyclicalAnnealing", "LinearAnnealing"]

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Literal

from pyro.distributions import Delta, Unit
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from jensen.kernel.sites import Terms, base_of

from .objectives import Objective


@dataclass(frozen=True)
class LinearAnnealing:
    """Beta from ``start`` to ``end`` in a straight line over so many steps, and ``end`` from then on.

    References:
        Bowman et al. (2016), Generating Sentences from a Continuous Space.

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

    def __call__(self, step: int) -> float:
        """Beta at a step."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class CyclicalAnnealing:
    """Beta that rises from ``start`` to ``end`` over the first part of every period, and stays there for the rest.

    References:
        Fu et al. (2019), Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing.

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
                f"period is at least 1 and rise a share of it in (0, 1], but got {self.period} and {self.rise}"
            )

    def __call__(self, step: int) -> float:
        """Beta at a step."""
        passed = (step % self.period) / self.period
        return self.start + (self.end - self.start) * min(1.0, passed / self.rise)


class ELBO(Objective):
    r"""The evidence lower bound, with better gradients and the usual shapes of it.

    .. math:: \text{ELBO}_n = \mathbb{E}_q \log p(x_n \mid z) - \sum_s \mathbb{E}_q \text{KL}(q(z_s) \| p(z_s))

    Sticking the landing leaves out the derivative of log q at fixed z, whose mean is zero: where q is the posterior,
    nothing is left of the gradient's noise. With ``analytic_kl`` the KL of each site whose two distributions have a
    registered one (``torch.distributions.kl_divergence``) is taken in closed form, given the draws of the sites before
    it. Shaped by beta or free bits the loss is no bound: ``objective.bound`` and ``History.elbo`` hold the ELBO itself.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.
        Roeder, Wu and Duvenaud (2017), Sticking the Landing.
        Higgins et al. (2017), beta-VAE.
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow: free bits.

    Args:
        num_particles: the number K of draws.
        gradient: ``"standard"`` or ``"stl"``.
        analytic_kl: whether to take the KL in closed form where there is one.
        beta: weight of the KL, or what makes it of the number of steps done: :class:`LinearAnnealing`, any function.
        free_bits: nats below which the KL of a group, averaged over the batch, is not pushed: one number for every
            group, or one by site. Sites whose density is not their own (an auxiliary one and its ``Delta``) are one
            group, named ``"auxiliary"``.
        free_bits_per: what a group is: a ``"site"``, or a ``"dimension"`` of a site whose two distributions factorize.

    Raises:
        ValueError: for settings that make no sense; when used, for free bits of a site that is not there, or per
            dimension of one that does not factorize, and as :class:`~jensen.inference.IWAE`.
        NotImplementedError: when used, for a site that the guide leaves to be enumerated.

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

    gradients = ("standard", "stl")

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
        super().__init__(num_particles, gradient)
        floors = free_bits.values() if isinstance(free_bits, Mapping) else [free_bits]
        if any(floor < 0 for floor in floors) or (not callable(beta) and beta < 0):
            raise ValueError(f"beta and free_bits are at least 0, but got {beta} and {free_bits}")
        if free_bits_per not in ("site", "dimension"):
            raise ValueError(f"free_bits_per is 'site' or 'dimension', but got {free_bits_per!r}")
        self.analytic_kl, self.beta = analytic_kl, beta
        self.free_bits, self.free_bits_per = free_bits, free_bits_per

    @property
    def shaped(self) -> bool:
        """Whether beta or free bits make the loss something else than minus the bound."""
        free = any(self.free_bits.values()) if isinstance(self.free_bits, Mapping) else self.free_bits > 0
        return bool(free or callable(self.beta) or self.beta != 1)

    def knobs(self) -> tuple[float, ...]:
        """Beta at the present step."""
        return (self.beta(self.step) if callable(self.beta) else self.beta,)

    def power(self) -> float:
        """0: the bound is the mean of the log weights."""
        return 0.0

    def _value(self, t: Terms) -> tuple[Tensor, Tensor]:
        kls = self._kls(t)
        observed = t.observed
        log_w = observed - sum(kls.values())
        bound = log_w.mean(0).sum()
        self.bound = t.scale * bound.detach()
        if not self.shaped:
            return bound, log_w
        beta = self.knobs()[0] if self.given is None else self.given[0]
        value, n = observed.mean(0).sum(), prod(t.run.shape[1:])
        shaped = observed
        for kl, floor in self._groups(t, kls):
            mean = kl.mean()  # over draws and data; an estimate of it may be negative
            value = value - beta * n * (mean.clamp_min(floor) if floor else mean)
            shaped = shaped - beta * (kl * (mean > floor) if floor else kl)
        return value, shaped

    def _kls(self, t: Terms) -> dict[str, Tensor]:
        """The KL of each site, in closed form or as log q - log p of the draws: [K, N] by name."""
        log_q = t.log_q if t.log_q_stopped is None else t.log_q_stopped
        found: dict[str, Tensor] = {}
        for name in t.q:
            if name not in t.p or isinstance(base_of(t.q[name]), Delta | Unit):
                rest = log_q[name] - (t.log_p[name] if name in t.p else 0.0)
                found["auxiliary"] = found.get("auxiliary", 0.0) + rest
                continue
            found[name] = log_q[name] - t.log_p[name]
            if self.analytic_kl:
                with suppress(NotImplementedError):  # none is registered
                    found[name] = t.per_datum(name, kl_divergence(t.q[name], t.p[name]))
        return found

    def _groups(self, t: Terms, kls: dict[str, Tensor]) -> list[tuple[Tensor, float]]:
        """The KL [K, N] of each group, and the nats that it has for free."""
        free = self.free_bits
        if isinstance(free, Mapping) and (unknown := sorted(set(free) - set(kls))):
            raise ValueError(f"free_bits names {unknown}, but the KL has parts {sorted(kls)}")
        floors = {name: free.get(name, 0.0) if isinstance(free, Mapping) else free for name in kls}
        groups = []
        for name, kl in kls.items():
            if self.free_bits_per == "site" or not floors[name]:
                groups.append((kl, floors[name]))
                continue
            parts = _kl_per_dimension(t, name)
            groups += [(t.per_datum(name, part), floors[name]) for part in parts.unbind(-1)]
        return groups


def _kl_per_dimension(t: Terms, name: str) -> Tensor:
    """The KL of each dimension of a site whose distributions factorize: [..., D]."""
    q, p = t.q.get(name), t.p.get(name)
    if isinstance(q, Independent) and isinstance(p, Independent) and len(q.event_shape) == 1:
        parts: Tensor = kl_divergence(q.base_dist, p.base_dist)
        if parts.shape[-1:] == q.event_shape:
            return parts
    raise ValueError(
        f"free_bits_per='dimension' needs the KL of each dimension, but at site '{name}' guide and model do not both "
        "factorize: take free_bits_per='site', or a mean-field guide"
    )
