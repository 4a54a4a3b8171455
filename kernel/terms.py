"""The terms of log weights, site by site, as tensors whose first dimension is the particles."""

from __future__ import annotations

__all__ = ["Terms", "stopped_log_q"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.independent import Independent
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from jensen.missing import Observed

from .lifts import Half, Run, read_both
from .sites import Scored, Site, SiteFacts, folded, padded, score, subsampling, summed_to

_DRAWS = 100  # samples that replace an unknown mean


@dataclass(frozen=True)
class Terms:
    """The terms of log weights, site by site. Every tensor of log-densities is [K, N] ([K] if joint).

    Attributes:
        log_p: log p of each site of the model given its parents, observed sites included.
        log_q: log q of each site of the guide, auxiliary sites included.
        log_q_stopped: the same values, whose gradient reaches the guide's parameters only through the samples: the
            derivative in the parameters at fixed z is omitted. None unless requested.
        p: the properties of the model's sites, by name.
        q: the properties of the guide's sites, by name.
        values: the sampled and observed values, by site: [K, N, *event] for samples.
        repeated: with ``log_q_stopped``, whether a second run of the guide gave the same log q: a tensor of no
            dimensions. If false, an error is raised at once, except during tracing, which must not read it.
        particles: K.

    Example:
        >>> from jensen.guides import PriorGuide
        >>> from jensen.inference import terms
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> t = terms(model, PriorGuide(model), torch.zeros(3, 5))
        >>> torch.allclose(t.log_weights, t.log_p["x"] + t.log_p["z"] - t.log_q["z"])
        True
        >>> t.kl("z").shape, t.mean_p("x").shape, t.q["z"].has_rsample
        (torch.Size([1, 3]), torch.Size([1, 3, 5]), True)
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    log_q_stopped: dict[str, Tensor] | None
    p: dict[str, SiteFacts]
    q: dict[str, SiteFacts]
    values: dict[str, Tensor]
    repeated: Tensor | None
    particles: int
    _keep: list[CondIndepStackFrame] = field(repr=False)
    _halves: tuple[Half, Half] | None = field(repr=False)  # of the model, of the guide
    _elbo: Tensor | None = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return (self.particles, *(frame.size for frame in self._keep))

    @property
    def scale(self) -> float:
        """N/B if the data are a subsample, else 1: the factor of the sum over the data."""
        return subsampling(self._keep)

    @property
    def joint(self) -> bool:
        """Whether no plate encloses every site, so that the weights are joint over all data."""
        return not self._keep

    @property
    def summed(self) -> bool:
        """Whether states of enumerated sites are summed out."""
        return self._halves is None

    @property
    def elbo(self) -> Tensor:
        """The value that averages to the ELBO: log weights, or their mean over the states that the guide enumerates."""
        return self.log_weights if self._elbo is None else self._elbo

    @property
    def observed(self) -> Tensor:
        """Log p of the sites that the guide does not sample: log p(x | z), of the shape of the weights.

        Raises:
            NotImplementedError: if states are summed out together with sites that the guide samples.
        """
        if self._halves is None and (self._elbo is not None or set(self.log_q) - set(self.log_p)):
            raise NotImplementedError(
                f"the states of enumerated sites are summed out of {sorted(self.log_p)} together, so log p(x | z) "
                "cannot be separated from p(z) and q(z | x)"
            )
        total: Tensor = sum(self.log_p[name] for name in self.log_p if name not in self.log_q)  # type: ignore[assignment]
        return torch.as_tensor(total).expand(self.shape)

    @property
    def log_weights(self) -> Tensor:
        """The log weights: the sum of ``log_p`` minus the sum of ``log_q``."""
        total: Tensor = sum(self.log_p.values()) - sum(self.log_q.values())  # type: ignore[assignment]
        return torch.as_tensor(total).expand(self.shape)

    def kl(self, site: str) -> Tensor:
        r"""KL(q || p) of a site in closed form, given its parents: of the shape of the weights.

        Averaged over the samples of the sites before it, it equals the mean of log q - log p of the site. This needs
        the guide to sample the parents of p's site before the site: conditional on a parent that the guide samples
        later, the distribution of the site differs from q's. Any latent site that the model samples before it
        counts as a parent.

        Raises:
            NotImplementedError: if no closed form is known, or the guide samples a parent later.
        """
        if later := self.drawn_later(site):
            raise NotImplementedError(
                f"the KL of site '{site}' in closed form needs its parents sampled before it, but the guide samples "
                f"{later} after it: average log q - log p of its samples"
            )

        def whole(p: Site, q: Site) -> Tensor:
            return _where_masked_alike(p, q, kl_divergence(q["fn"], p["fn"]), lambda: score(q) - score(p))

        return self._folded(site, self._read(site, whole))

    def kl_per_dimension(self, site: str) -> list[Tensor]:
        """The KL of each dimension of a site with two factorized distributions, each of the shape of the weights.

        In closed form if one is known, else log q - log p of the samples, dimension by dimension.

        Raises:
            NotImplementedError: if the guide samples a parent later, as for :meth:`kl`.
            ValueError: if they do not factorize, and for a site that only one of model and guide samples.
        """
        if site not in self.p:
            raise ValueError(
                f"free_bits_per='dimension' needs the KL of each dimension, but '{site}' is not a site that both the "
                "model and the guide sample: use free_bits_per='site'"
            )
        if later := self.drawn_later(site):
            raise NotImplementedError(
                f"site '{site}' has no KL of its own, since the guide samples {later} after it, and the model before it"
            )

        def parts(p: Site, q: Site) -> Tensor:
            if not (_factorizes(p) and _factorizes(q)):
                raise ValueError(
                    f"free_bits_per='dimension' needs the KL of each dimension, but at site '{site}' guide and model "
                    "do not both factorize: use free_bits_per='site', or a mean-field guide"
                )

            def drawn() -> Tensor:
                return _per_dimension(q) - _per_dimension(p)

            try:
                known = kl_divergence(q["fn"].base_dist, p["fn"].base_dist)
            except NotImplementedError:  # no closed form is registered
                return drawn()
            return _where_masked_alike(p, q, known, drawn, trailing=1)

        return [self._folded(site, part) for part in self._read(site, parts, trailing=1).unbind(-1)]

    def drawn_later(self, site: str) -> list[str]:
        """The latent sites that the model samples before this one, and the guide after it."""
        before, after = list(self.p), list(self.q)
        before, after = before[: before.index(site)], after[after.index(site) + 1 :]
        return [name for name in before if name in after]

    def mean_p(self, site: str) -> Tensor:
        """The mean of a site of the model given its parents, [K, N, *event]; of 100 samples if it is unknown."""
        return self._mean(site, 0)

    def mean_q(self, site: str) -> Tensor:
        """The mean of a site of the guide given its parents, [K, N, *event]; the samples if it is unknown."""
        return self._mean(site, 1)

    def mode_q(self, site: str) -> Tensor:
        """The mode of a discrete site of the guide given its parents, [K, N, *event]; zero for equal states."""
        mode = self._of_half(site, 1, lambda fn: fn.mode)
        return mode.nan_to_num(0.0)

    def spread(self, site: str, weights: Tensor) -> Tensor:
        """The weights, reshaped to be multiplied with the values of a site of the guide."""
        value, facts = self.values[site], self.q[site]
        shape = [1] * value.dim()
        shape[0] = self.particles
        for frame in self._keep:
            assert frame.dim is not None
            shape[value.dim() - facts.event_dim + frame.dim] = frame.size
        return weights.reshape(shape)

    def completed(self, site: str, how: Literal["mean", "sample"]) -> Tensor:
        r"""An observed site with :math:`E[x_\text{mis} \mid x_\text{obs}, z]`, or a sample of it: [K, N, *event]."""
        return self._of_observed(site, lambda fn, x: fn.completed(x, how))

    def log_prob_each(self, site: str, values: Tensor) -> Tensor:
        r"""Log p(y_j | x_obs, z) of each single value y_j where the observed site is missing: [K, N, *event].

        Args:
            site: the observed site.
            values: y, of the shape of its values; NaN where there is none.
        """
        return self._of_observed(site, lambda fn, x: fn.log_prob_each(x, values))

    def _of_observed(self, site: str, make: Callable[[Observed, Tensor], Tensor]) -> Tensor:
        """A tensor computed from the distribution and the value of an observed site: [K, N, *event].

        Raises:
            ValueError: if another plate of the site stands left of that of the data.
        """
        source, facts = self._of(site)[0], self.p[site]
        depth = source.lifted.nesting + facts.event_dim

        def of(sites: Mapping[str, Site]) -> Tensor:
            fn = sites[site]["fn"]
            fn = fn if isinstance(fn, Observed) else Observed(fn)
            return padded(make(fn, sites[site]["value"]), depth + source.extra)

        made = source.read(of)  # [K, *plates, *event]
        first = 1 + depth - (self.values[site].dim() if self.joint else facts.event_dim - (self._keep[0].dim or 0))
        if any(size != 1 for size in made.shape[1:first]):
            raise ValueError(
                f"site '{site}' has the shape {list(made.shape[1:])}, where another plate stands left of that of the "
                "data: open the plate of the data with the most negative dim, or make the other a part of the event "
                "(.to_event)"
            )
        return made.reshape(made.shape[:1] + made.shape[first:])

    def _of(self, site: str) -> tuple[Half, Half]:
        if self._halves is None:
            raise NotImplementedError(
                f"states of enumerated sites are summed out, and the distribution of site '{site}' differs between them"
            )
        return self._halves

    def _mean(self, site: str, half: int) -> Tensor:
        try:
            mean = self._of_half(site, half, lambda fn: fn.mean)
        except NotImplementedError:
            mean = torch.tensor(torch.nan)
        if not mean.isnan().any():
            return mean
        if half:
            return self.values[site]
        dtype = torch.get_default_dtype()
        return self._of_half(site, half, lambda fn: fn.sample(torch.Size([_DRAWS])).to(dtype).mean(0))

    def _of_half(self, site: str, half: int, make: Callable[..., Tensor]) -> Tensor:
        """A tensor computed from the distribution of a site of model or guide: [K, *plates, *event]."""
        source, facts = self._of(site)[half], (self.p, self.q)[half][site]
        depth = source.lifted.nesting + facts.event_dim
        return source.read(lambda sites: padded(make(sites[site]["fn"]), depth + source.extra))

    def _read(self, site: str, make: Callable[[Site, Site], Tensor], trailing: int = 0) -> Tensor:
        """A tensor computed from a site of model and guide: [K, *plates, *trailing]."""
        model, guide = self._of(site)

        def of(p: Mapping[str, Site], q: Mapping[str, Site]) -> Tensor:
            return padded(make(p[site], q[site]), model.lifted.nesting + model.extra, trailing)

        return read_both(model, guide, of)

    def _folded(self, site: str, batch: Tensor) -> Tensor:
        return folded(batch, self.p[site], self._keep).expand(self.shape)


def _factorizes(site: Site) -> bool:
    fn = site["fn"]
    return isinstance(fn, Independent) and len(fn.event_shape) == 1 and fn.base_dist.batch_shape[-1:] == fn.event_shape


def _per_dimension(site: Site) -> Tensor:
    """The log-density of each dimension of a site that factorizes: [..., D]."""
    mask = site["mask"]
    mask = mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
    return score({**site, "fn": site["fn"].base_dist, "mask": mask})


def _where_masked_alike(p: Site, q: Site, known: Tensor, drawn: Callable[[], Tensor], trailing: int = 0) -> Tensor:
    """The closed form where the masks of two sites agree; elsewhere log q - log p of the samples, with their masks."""
    if p["mask"] is q["mask"] is None:
        return known
    inside, own = (
        torch.as_tensor(True if site["mask"] is None else site["mask"], device=known.device) for site in (p, q)
    )
    inside, own = (mask.reshape((*mask.shape, *(1,) * trailing)) for mask in (inside, own))
    return torch.where(inside == own, scale_and_mask(known, 1.0, inside), drawn())


def stopped_log_q(
    run: Run, again: Run, leaves: Mapping[str, Tensor], log_q: Mapping[str, Tensor], keep: list[CondIndepStackFrame]
) -> tuple[dict[str, Tensor], Tensor]:
    """Log q at the sampled values, differentiable only through the values; and whether a second run repeats it.

    ``again`` is the guide's run at leaves that replace the values of ``run``. Log q is differentiated with respect to
    the leaves, and that gradient is attached to the samples: no parameter has to be found and stopped. A ``Delta``'s
    log-density and a factor are not normalised, so their derivative in the parameters does not average to zero and is
    kept.
    """
    result, repeated = dict(log_q), torch.ones((), dtype=torch.bool)
    moving = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    for name, site in again.sites.items():
        if site.facts.point:
            continue
        value = folded(site.log_prob, site.facts, keep).expand(log_q[name].shape)
        close = torch.isclose(value.detach(), log_q[name].detach(), rtol=1e-3, atol=1e-3, equal_nan=True).all()
        repeated = repeated.to(close.device) & close
        if get_proxy_mode() is None and not bool(close):
            raise ValueError(
                f"log q of site '{name}' changes when the guide is run again at the same values: the guide has "
                "randomness beside its sites (dropout: guide.eval()), or is too ill-conditioned for its precision"
            )
        result[name] = log_q[name].detach()
        if not (moving and value.requires_grad):
            continue
        slopes = torch.autograd.grad(value.sum(), list(moving.values()), retain_graph=True, allow_unused=True)
        for leaf, slope in zip(moving, slopes, strict=True):
            if slope is not None:
                drawn: Scored = run.sites[leaf]
                shift = slope * (drawn.value - drawn.value.detach())  # zero, with a gradient
                shift = sum_rightmost(shift, drawn.facts.event_dim)
                result[name] = result[name] + summed_to(shift, keep)
    return result, repeated
