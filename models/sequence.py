r"""The linear-Gaussian state space model, with exact evidence and posterior by a backward Kalman filter.

.. math::
    z_1 &\sim \mathcal{N}(m, P), \qquad z_t \mid z_{t-1} \sim \mathcal{N}(F z_{t-1}, \operatorname{diag}(q)^2), \\
    x_t \mid z_t &\sim \mathcal{N}(\mu + W z_t, \operatorname{diag}(s)^2), \qquad t = 1, \dots, T

The likelihood of z_t given x_t, ..., x_T is Gaussian in z_t, with precision J_t and information vector h_t (J_t times
the mean):

.. math::
    J_t &= \tilde J_t + W^\top R^{-1} W, \qquad h_t = \tilde h_t + W^\top R^{-1} (x_t - \mu), \qquad
    R = \operatorname{diag}(s)^2 \\
    \tilde J_{t-1} &= F^\top (I - J_t S_t) J_t F, \qquad \tilde h_{t-1} = F^\top (I - J_t S_t) h_t, \qquad
    S_t = (Q^{-1} + J_t)^{-1}

with Q = diag(q)^2 (P at t = 1), starting from zero after the end. The posterior is then a forward Markov chain,

.. math:: z_t \mid z_{t-1}, x \sim \mathcal{N}((I - S_t J_t) F z_{t-1} + S_t h_t, S_t)

and log p(x) = log p(x, z) - log p(z | x) at any z. It is evaluated at the posterior mean, where all terms are sums of
squares. Where features of a step are missing, R^{-1} has zeros in their places.
"""

from __future__ import annotations

__all__ = ["LinearGaussianSSM"]

import math

import pyro
import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families.base import inverse_root, lower_triangle, matvec
from jensen.families.chain import GaussMarkovChain
from jensen.missing import has_holes, of_observed
from jensen.module import UniqueModule

from .base import check_reals, data_plate
from .conditioning import fill


class LinearGaussianSSM(UniqueModule):
    r"""A linear-Gaussian state space model of sequences of different lengths.

    Data are x, [N, T, X], and lengths, [N]: entries beyond a length are ignored, but must be finite (zero) or NaN. The
    states there follow the prior, so a guide of all T states has valid weights, and log p(x) is that of the observed
    steps. Between them, NaN marks missing steps and missing features of a step. The states are one site, ``"z"``, of
    event shape [T, D].

    The noise of the transitions is diagonal. This is no restriction, only a choice of coordinates for z.

    References:
        Kalman (1960), A New Approach to Linear Filtering and Prediction Problems. https://doi.org/10.1115/1.3662552
        Fraser and Potter (1969), The Optimum Linear Smoother as a Combination of Two Optimum Linear Filters.
        Roweis and Ghahramani (1999), A Unifying Review of Linear Gaussian Models.
        https://doi.org/10.1162/089976699300016674

    Args:
        features: the number X of features of a step.
        latent: the number D of features of a state.
        steps: the number T of steps of the longest sequence.

    Raises:
        ValueError: if one of them is less than 1; and (when called) unless lengths has one integer between 1 and T for
            each data point.

    Example:
        >>> import torch
        >>> model = LinearGaussianSSM(3, latent=2, steps=10).double()
        >>> lengths = torch.tensor([10, 4, 7, 1])
        >>> x = model(None, lengths, n=4)
        >>> x.shape, model.log_evidence(x, lengths).shape
        (torch.Size([4, 10, 3]), torch.Size([4]))
        >>> model.posterior(x, lengths).mean.shape
        torch.Size([4, 10, 2])
    """

    @checked
    def __init__(self, features: int, latent: int, steps: int) -> None:
        if min(features, latent, steps) < 1:
            raise ValueError(
                "LinearGaussianSSM needs features, latent and steps of at least 1, but got "
                f"features={features}, latent={latent}, steps={steps}"
            )
        super().__init__()
        self.initial_loc = nn.Parameter(torch.zeros(latent))
        self.initial_log_scale = nn.Parameter(torch.zeros(latent))
        self.initial_below = nn.Parameter(torch.zeros(latent * (latent - 1) // 2))
        self.transition = nn.Parameter(0.9 * torch.eye(latent))
        self.transition_log_scale = nn.Parameter(torch.full((latent,), math.log(0.5)))
        self.mean = nn.Parameter(torch.zeros(features))
        self.weight = nn.Parameter(torch.randn(features, latent) / math.sqrt(latent))
        self.log_noise = nn.Parameter(torch.zeros(features))
        self.latents = {"z": Size((steps, latent))}
        self.event_shape = Size((steps, features))

    @property
    def noise(self) -> Tensor:
        """s, the standard deviation of each feature's noise, in the units of x: [X]."""
        return self.log_noise.exp()

    @property
    def initial_scale_tril(self) -> Tensor:
        """The Cholesky factor of P, the covariance of the first state: [D, D]."""
        scale = self.initial_log_scale.exp()
        return scale.diag() + scale.unsqueeze(-1) * lower_triangle(self.initial_below, len(scale))

    def prior(self) -> GaussMarkovChain:
        """p(z): a chain of batch shape [] and event shape [T, D]."""
        T, D = self.latents["z"]
        offset = torch.cat([self.initial_loc.unsqueeze(0), self.initial_loc.new_zeros(T - 1, D)])
        later = self.transition_log_scale.exp().diag().expand(T - 1, D, D)
        scale_tril = torch.cat([self.initial_scale_tril.unsqueeze(0), later])
        return GaussMarkovChain(offset, self.transition.expand(T, D, D), scale_tril)

    def likelihood(self, z: Tensor, observed: Tensor) -> TorchDistribution:
        """p(x | z) for ``z`` [..., T, D] at the steps that are ``observed``, bool [..., T]: event shape [T, X]."""
        normal = Normal(self.mean + z @ self.weight.T, self.noise).to_event(1)  # [..., T] of [X]
        masked: TorchDistribution = normal.mask(observed).to_event(1)
        return masked

    def forward(self, x: Tensor | None = None, lengths: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` [N, T, X] up to ``lengths`` [N], or samples ``n`` sequences (zero-padded)."""
        plate = data_plate(x, self.event_shape, n, "LinearGaussianSSM")
        observed = self._observed(plate.size, lengths)
        with plate:
            z = pyro.sample("z", self.prior())  # [N, T, D]
            x = pyro.sample("x", self.likelihood(z, observed), obs=x)  # [N, T, X]
            return x * observed.unsqueeze(-1)

    def log_evidence(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log p(x) of each sequence of ``x`` [N, T, X] up to its length, in nats: [N]."""
        posterior = self.posterior(x, lengths)
        z = posterior.mean  # [N, T, D]
        likelihood = of_observed(self.likelihood(z, self._observed(len(x), lengths)), x)
        log_joint = self.prior().log_prob(z) + likelihood.log_prob(x)
        log_density: Tensor = log_joint - posterior.log_prob(z)
        return log_density

    def completed(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each missing value of ``x`` [N, T, X] given all observed values of its sequence.

        .. math::
            \operatorname{E}[x_{ti} \mid x_o] = \mu_i + w_i^\top \operatorname{E}[z_t \mid x_o], \qquad
            \operatorname{Var}[x_{ti} \mid x_o] = w_i^\top \operatorname{Cov}[z_t \mid x_o] \, w_i + s_i^2

        Returns:
            The mean [N, T, X] and the variance [N, T, X]; an observed value is its own mean, with variance 0. Both are
            0 beyond the lengths.
        """
        posterior = self.posterior(x, lengths)
        loc = self.mean + posterior.mean @ self.weight.T
        spread = ((self.weight @ posterior.covariance) * self.weight).sum(-1)  # [N, T, X]
        mean, variance = fill(x, loc, spread + self.noise.square())
        within = self._observed(len(x), lengths).unsqueeze(-1)
        return torch.where(within, mean, 0.0), torch.where(within, variance, 0.0)

    def posterior(self, x: Tensor, lengths: Tensor | None = None) -> GaussMarkovChain:
        """p(z | x) of each sequence of ``x`` [N, T, X]: a chain of batch shape [N] and event shape [T, D]."""
        check_reals(x, self.event_shape, "LinearGaussianSSM", self.weight)
        prior, observed = self.prior(), self._observed(len(x), lengths)
        scaled = self.weight / self.noise.square().unsqueeze(-1)  # R^{-1} W, [X, D]
        T, D = self.latents["z"]
        eye = torch.eye(D, dtype=x.dtype, device=x.device)
        if has_holes(x):
            known = observed.unsqueeze(-1) & ~x.isnan()  # [N, T, X]
            outer = self.weight.unsqueeze(-1) * scaled.unsqueeze(-2)  # [X, D, D]
            precision = torch.tensordot(known.to(scaled.dtype), outer, 1)  # [N, T, D, D]
        else:
            known = observed.unsqueeze(-1)
            precision = observed[..., None, None] * (self.weight.T @ scaled)
        h = (torch.where(known, x - self.mean, 0.0) @ scaled).unbind(1)  # T of [N, D]
        J = precision.unbind(1)  # T of [N or 1, D, D]
        J_later, h_later = torch.zeros_like(J[0]), torch.zeros_like(h[0])
        offsets, transitions, roots = [], [], []
        for t in reversed(range(T)):
            J_now, h_now = J_later + J[t], h_later + h[t]
            push, F, L = prior.offset[t], prior.transition[t], prior.scale_tril[t]
            white = inverse_root(eye + L.T @ J_now @ L)
            root = L @ white  # [N, D, D], of S
            keep = eye - root @ root.mT @ J_now  # I - S J
            offsets.append(matvec(keep, push) + matvec(root, matvec(root.mT, h_now)))
            transitions.append(keep @ F)
            roots.append(root)
            gain = J_now @ root @ white.mT  # J S L^{-T}
            J_later = (
                F.T @ (keep.mT @ J_now @ keep + gain @ gain.mT) @ F
            )  # the same as F^T (I - J S) J F: stays positive
            h_later = matvec(F.T, matvec(keep.mT, h_now))
        offset, transition, scale_tril = (torch.stack(part[::-1], 1) for part in (offsets, transitions, roots))
        return GaussMarkovChain(offset, transition, scale_tril)

    def _observed(self, n: int, lengths: Tensor | None) -> Tensor:
        """Which steps are observed: bool [N, T]; [1, T] if all are."""
        steps = torch.arange(self.event_shape[0], device=self.mean.device)
        if lengths is None:
            return (steps >= 0).unsqueeze(0)
        if lengths.is_floating_point() or lengths.shape != (n,):
            raise ValueError(
                f"lengths must be integers, one for each of {n} data points, but got {lengths.dtype} of shape "
                f"{list(lengths.shape)}" + ("" if lengths.dim() != 1 else f"; to sample data, pass n={len(lengths)}")
            )
        if not bool(((lengths >= 1) & (lengths <= len(steps))).all()):
            raise ValueError(
                f"lengths must lie between 1 and the {len(steps)} steps of the model, but got {int(lengths.min())} to "
                f"{int(lengths.max())}"
            )
        return steps < lengths.unsqueeze(-1)
