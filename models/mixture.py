r"""Mixtures of probabilistic PCA models.

.. math::
    c &\sim \operatorname{Categorical}(\pi), \qquad z \sim \mathcal{N}(0, I), \qquad
    x \mid c, z \sim \mathcal{N}(\mu_c + W_c z, \sigma_c^2 I) \\
    p(x) &= \sum_c \pi_c \, \mathcal{N}(x; \mu_c, W_c W_c^\top + \sigma_c^2 I)
"""

from __future__ import annotations

__all__ = ["MixtureOfPPCA"]

import copy
import math

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal, OneHotCategorical
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.missing import has_holes
from jensen.module import UniqueModule

from .base import check_reals, data_plate, principal_plane
from .conditioning import Conditioned, by_blocks, condition, condition_observed, fill, predict
from .incomplete import Parameters, check_observed, fit_incomplete, observed_variance
from .priors import StandardNormal


class MixtureOfPPCA(UniqueModule):
    r"""A mixture of probabilistic principal component analysers: each component is a PPCA with its own subspace.

    The component is the one-hot site ``"c"``; the coordinates in its subspace are the site ``"z"``. A guide samples c
    with :class:`~jensen.families.OneHotCategorical`, then z given c; or Pyro enumerates c. The posterior is exact:
    responsibilities :math:`p(c \mid x)` and Gaussians :math:`p(z \mid x, c)`.

    NaN in the data marks a missing value: log p(x) and the posterior are then those of the observed values.

    References:
        Tipping and Bishop (1999), Mixtures of Probabilistic Principal Component Analysers.
        https://doi.org/10.1162/089976699300016728

    Args:
        features: the number X of features of a data point.
        latent: the number D of latent features, less than ``features``.
        components: the number C of components.

    Raises:
        ValueError: if not 1 <= latent < features, or ``components`` is less than 1.

    Example:
        >>> import torch
        >>> x = torch.cat([torch.randn(50, 3) * torch.tensor([3.0, 1.0, 0.1]) + shift for shift in (-5, 5)]).double()
        >>> model = MixtureOfPPCA(3, latent=1, components=2).double().fit_em(x)
        >>> model.log_evidence(x).shape, model.responsibilities(x).shape
        (torch.Size([100]), torch.Size([100, 2]))
        >>> model.posterior(x).batch_shape, model.posterior(x).event_shape
        (torch.Size([100, 2]), torch.Size([1]))
    """

    @checked
    def __init__(self, features: int, latent: int, components: int) -> None:
        if not 1 <= latent < features or components < 1:
            raise ValueError(
                "MixtureOfPPCA needs 1 <= latent < features and components of at least 1, but got "
                f"latent={latent}, features={features}, components={components}"
            )
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.randn(components, features))
        self.weight = nn.Parameter(torch.randn(components, features, latent) / math.sqrt(features))
        self.log_noise = nn.Parameter(torch.zeros(components))
        self.prior = StandardNormal(latent)
        self.latents = {"c": Size((components,)), "z": Size((latent,))}
        self.event_shape = Size((features,))

    @property
    def noise(self) -> Tensor:
        """sigma_c, the standard deviation of each component's noise, in the units of x: [C]."""
        return self.log_noise.exp()

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, X], or samples ``n`` data points."""
        mean, weight, noise = self.mean, self.weight, self.noise
        with data_plate(x, self.event_shape, n, "MixtureOfPPCA"):
            c = pyro.sample("c", OneHotCategorical(logits=self.logits))  # [N, C]
            z = pyro.sample("z", self.prior())  # [N, D]
            locs = mean + torch.einsum("cxd,...d->...cx", weight, z)  # [N, C, X]
            loc = (c.unsqueeze(-1) * locs).sum(-2)  # [N, X]
            scale = (c * noise).sum(-1, keepdim=True)  # [N, 1]
            return pyro.sample("x", Normal(loc, scale).to_event(1), obs=x)  # [N, X]

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, X], in nats: the sum over the components, [N]."""
        return self._log_joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(c | x) of each row of ``x`` [N, X]: [N, C]."""
        return self._log_joint(x).softmax(-1)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x, c) of each row of ``x`` [N, X] and each c: a Gaussian of batch shape [N, C] and event shape [D]."""
        conditioned = self._condition(x)
        return MultivariateNormal(conditioned.mean, scale_tril=conditioned.root)

    def completed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each missing value of ``x`` [N, X] given the observed values of its row.

        With r the responsibilities given the observed values, and m and v the mean and variance in each component:

        .. math::
            \bar m_i = \operatorname{E}[x_i \mid x_o] = \sum_c r_c m_{ci}, \qquad
            \operatorname{Var}[x_i \mid x_o] = \sum_c r_c \left(v_{ci} + (m_{ci} - \bar m_i)^2\right)

        Returns:
            The mean [N, X] and the variance [N, X]; an observed value is its own mean, with variance 0.
        """

        def block(x: Tensor) -> tuple[Tensor, Tensor]:
            given = self._condition(x)
            share = (self.logits.log_softmax(-1) + given.log_density).softmax(-1).unsqueeze(-1)  # [n, C, 1]
            means, variances = predict(given, self.mean, self.weight, self.log_noise.unsqueeze(-1))  # [n, C, X]
            mean = (share * means).sum(1)
            return fill(x, mean, (share * (variances + (means - mean.unsqueeze(1)).square())).sum(1))

        mean, variance = by_blocks(block, x, self.weight.numel())
        return mean, variance

    def _condition(self, x: Tensor) -> Conditioned:
        check_reals(x, self.event_shape, "MixtureOfPPCA", self.weight)
        if has_holes(x):
            return condition_observed(x, self.mean, self.weight, self.log_noise.unsqueeze(-1).expand_as(self.mean))
        scale = self.noise.unsqueeze(-1)  # [C, 1]
        given = condition((x.unsqueeze(1) - self.mean) / scale, self.weight / scale.unsqueeze(-1))
        return given._replace(log_density=given.log_density - len(self.mean.T) * self.log_noise)

    def _log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, c): [N, C]."""
        return self.logits.log_softmax(-1) + self._condition(x).log_density

    @torch.no_grad()
    def fit_em(
        self, x: Tensor, iterations: int = 1000, tolerance: float = 1e-9, *, seed: int | None = 0
    ) -> MixtureOfPPCA:
        r"""Maximum likelihood by expectation maximization; returns the model.

        Given the responsibilities r, the best parameters of a component are those of the PPCA of its weighted data:

        .. math::
            \pi_c = \bar r_c, \qquad \mu_c = \frac{\sum_n r_{nc} x_n}{\sum_n r_{nc}}, \qquad
            W_c = U_c (\Lambda_c - \sigma_c^2 I)^{1/2}, \qquad \sigma_c^2 = \tfrac{1}{X - D} \sum_{i > D} \lambda_{ci}

        from the largest eigenvalues of its weighted covariance. The maximum is local and depends on the start. No noise
        scale falls below 1e-3 of the data's standard deviation (per feature, in quadratic mean). Otherwise a component
        with few data points could shrink onto them, and the likelihood would grow without bound.

        Where values are missing (NaN), the likelihood is that of the observed values, and z too is summed out in the E
        step. The clusters of the start are those of the data with the mean of each feature in place of its missing
        values. This is a poor start if many values are missing: compare several seeds.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.
            tolerance: stop when one iteration gains fewer nats per data point than this.
            seed: of the k-means clusters used as the start; None: start from the current parameters.

        Raises:
            ValueError: for fewer data points than components, infinity, identical data points, or a feature of which
                nothing was observed.
        """
        x = check_observed(x, self.event_shape, "MixtureOfPPCA")
        C = len(self.logits)
        if len(x) < C:
            raise ValueError(
                f"MixtureOfPPCA needs at least one data point for each of the {C} components, but got x of shape "
                f"{list(x.shape)}"
            )
        holes = has_holes(x)
        floor = 1e-6 * (observed_variance(x) if holes else x.var(0, correction=0)).mean()
        if not floor > 0:
            raise ValueError(
                "MixtureOfPPCA has no maximum of the likelihood, because all data points are identical: use data "
                "that vary"
            )
        work = copy.deepcopy(self).to(x)  # in float64
        if seed is not None:
            work._start(x, seed, floor)
        if holes:
            work._fit_observed(x, floor, iterations, tolerance)
            self.load_state_dict(work.state_dict())
            return self
        before = -math.inf
        for _ in range(iterations):
            log_joint = work._log_joint(x)  # [N, C]
            now = float(log_joint.logsumexp(-1).mean())
            if now - before < tolerance:
                break
            before = now
            work._maximize(x, log_joint.softmax(-1), floor)
        self.load_state_dict(work.state_dict())
        return self

    def _start(self, x: Tensor, seed: int, floor: Tensor) -> None:
        """Set the parameters to those of k-means clusters; missing values are replaced by means of their cluster."""
        from sklearn.cluster import KMeans  # imported here because it takes longer than all of Pyro

        C, missing = len(self.logits), x.isnan()
        filled = torch.where(missing, x.nanmean(0), x)
        labels = torch.as_tensor(KMeans(C, n_init=10, random_state=seed).fit(filled.cpu().numpy()).labels_).long()
        clusters = nn.functional.one_hot(labels, C).to(x)  # [N, C]
        if missing.any():
            counts = clusters.T @ (~missing).to(x.dtype)  # [C, X]
            means = torch.where(counts > 0, clusters.T @ x.nan_to_num(0.0) / counts.clamp_min(1), x.nanmean(0))
            filled = torch.where(missing, means[labels.to(x.device)], x)
        self._maximize(filled, clusters, floor)

    def _fit_observed(self, x: Tensor, floor: Tensor, iterations: int, tolerance: float) -> None:
        def pool(squares: Tensor, counts: Tensor) -> Tensor:
            tiny = torch.finfo(x.dtype).tiny
            return (squares.sum(-1) / counts.sum(-1).clamp_min(tiny)).maximum(floor).unsqueeze(-1).expand(counts.shape)

        start = Parameters(self.logits, self.mean, self.weight, self.log_noise.unsqueeze(-1).expand_as(self.mean))
        best = fit_incomplete(x, start, pool, iterations, tolerance)
        self.logits.copy_(best.logits.log_softmax(-1))
        self.mean.copy_(best.mean)
        self.weight.copy_(best.weight)
        self.log_noise.copy_(best.log_noise[:, 0])

    def _maximize(self, x: Tensor, responsibilities: Tensor, floor: Tensor) -> None:
        """Set the parameters to the optimum given ``responsibilities`` [N, C] of ``x`` [N, X]; sigma^2 >= ``floor``."""
        D = self.weight.shape[-1]
        counts = responsibilities.sum(0).clamp_min(torch.finfo(x.dtype).tiny)  # [C]
        self.logits.copy_(counts.log() - math.log(len(x)))
        for c, (r, count) in enumerate(zip(responsibilities.T, counts, strict=True)):
            share = (r / count).unsqueeze(-1)  # [N, 1]
            mean = (share * x).sum(0)
            self.mean[c] = mean
            self.weight[c], variance = principal_plane((share * (x - mean)).T @ (x - mean), D, floor)
            self.log_noise[c] = variance.log() / 2
