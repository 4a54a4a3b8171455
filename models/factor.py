r"""Linear-Gaussian models whose noise differs between directions.

.. math:: z \sim \mathcal{N}(0, I), \qquad x \mid z \sim \mathcal{N}(\mu + W z, \Sigma), \qquad \Sigma = L L^\top

| model | Sigma | fitted by |
| --- | --- | --- |
| FactorAnalysis | diag(s)^2 | EM, SVI, gradient |
| LinearGaussian | any | EM, SVI, gradient |

In units of the noise, V = L^{-1} W and y = L^{-1} (x - mu), all of them are one model with noise I. With M = V^T V + I:

.. math::
    p(z \mid x) &= \mathcal{N}(m, M^{-1}), \qquad m = M^{-1} V^\top y \\
    p(x) &= \mathcal{N}(\mu, W W^\top + \Sigma) \\
    \log p(x) &= -\tfrac12 \left(|y - V m|^2 + |m|^2 + \log\det M + X \log 2\pi\right) - \log \det L

Only a D x D matrix is inverted, and the quadratic form is a sum of squares, which is accurate in float32.
"""

from __future__ import annotations

__all__ = ["FactorAnalysis", "LinearGaussian"]

import copy
import math
from typing import Self

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal, TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families.base import inverse_root, lower_triangle
from jensen.module import UniqueModule

from .base import check_latent, check_reals, data_plate, moments
from .conditioning import Conditioned, condition
from .priors import StandardNormal


class _Linear(UniqueModule):
    """The common part. A subclass defines its noise: its root, its inverse, and its fit to a residual."""

    def __init__(self, features: int, latent: int) -> None:
        if features < 1 or latent < 1:
            raise ValueError(
                f"{type(self).__name__} needs features and latent of at least 1, but got features={features}, "
                f"latent={latent}"
            )
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(features))
        self.weight = nn.Parameter(torch.randn(features, latent) / math.sqrt(features))
        self.prior = StandardNormal(latent)
        self.latents = {"z": Size((latent,))}
        self.event_shape = Size((features,))

    def likelihood(self, loc: Tensor) -> TorchDistribution:
        """p(x | z) at mu + W z = ``loc`` [..., X]."""
        raise NotImplementedError

    def whiten(self, x: Tensor) -> Tensor:
        """L^{-1} x of ``x`` [..., X]."""
        raise NotImplementedError

    def log_det_root(self) -> Tensor:
        """Log det L."""
        raise NotImplementedError

    @property
    def covariance(self) -> Tensor:
        """Sigma, the covariance of x given z: [X, X]."""
        raise NotImplementedError

    def take_noise(self, residual: Tensor, covariance: Tensor) -> None:
        """Set Sigma to the best fit to ``residual``, the part of ``covariance`` not explained by W z: both [X, X]."""
        raise NotImplementedError

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, X], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, type(self).__name__):
            z = pyro.sample("z", self.prior())  # [N, D]
            return pyro.sample("x", self.likelihood(self.mean + z @ self.weight.T), obs=x)  # [N, X]

    def marginal(self) -> MultivariateNormal:
        """p(x) = N(mu, W W^T + Sigma), as a distribution of event shape [X]."""
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + self.covariance)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, X], in nats: [N]."""
        return self._condition(x).log_density - self.log_det_root()

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x) of each row of ``x`` [N, X]: a Gaussian of batch shape [N] and event shape [D]."""
        conditioned = self._condition(x)
        return MultivariateNormal(conditioned.mean, scale_tril=conditioned.root)

    def _condition(self, x: Tensor) -> Conditioned:
        check_reals(x, self.event_shape, type(self).__name__, self.weight)
        return condition(self.whiten(x - self.mean), self.whiten(self.weight.T).T)

    @torch.no_grad()
    def fit_em(self, x: Tensor, iterations: int = 20_000, tolerance: float = 1e-11) -> Self:
        r"""Maximum likelihood by expectation maximization, from the current W and Sigma; returns the model.

        .. math::
            B = M^{-1} V^\top L^{-1}, \qquad \tilde W = S B^\top (M^{-1} + B S B^\top)^{-1}, \qquad
            \tilde\Sigma \leftarrow S - \tilde W B S

        with S the covariance of the data, divided by N. The last matrix is projected onto the noise that the model
        allows.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.
            tolerance: stop when one iteration gains fewer nats per data point than this.

        Raises:
            ValueError: for fewer than two data points, NaN or infinity, a constant feature, or data for which the
                likelihood has no maximum in the noise.
        """
        mean, covariance = self._moments(x)
        work = copy.deepcopy(self).to(covariance)  # in float64
        work.mean.copy_(mean)
        before = -math.inf
        for _ in range(iterations):
            weight = work.whiten(work.weight.T).T  # [X, D]
            eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            root = inverse_root(weight.T @ weight + eye)
            white = work.whiten(work.whiten(covariance).T)  # L^{-1} S L^{-T}, [X, X]
            explained = (root.T @ (weight.T @ white @ weight) @ root).trace()
            log_det = work.log_det_root() - root.diagonal().log().sum()
            now = -float(log_det + (white.trace() - explained) / 2)  # the log-likelihood, up to a constant
            if now - before < tolerance:
                break
            before = now
            inverse = root @ root.T
            cross = work.whiten(covariance) @ weight @ inverse  # S B^T, [X, D]
            second = inverse + inverse @ (weight.T @ white @ weight) @ inverse
            work.weight.copy_(torch.linalg.solve(second, cross.T).T)
            work.take_noise(covariance - work.weight @ cross.T, covariance)
        self.load_state_dict(work.state_dict())
        return self

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [X] and covariance [X, X] (divided by N) of the data, in float64."""
        owner = type(self).__name__
        mean, covariance = moments(x, self.event_shape, owner)
        if (still := (x == x[0]).all(0)).any():
            raise ValueError(
                f"{owner} has no maximum of the likelihood for constant features: x[:, {int(still.nonzero()[0])}] is "
                f"always {mean[still][0]:g}; remove such features, or add noise (dequantize)"
            )
        return mean, covariance


class FactorAnalysis(_Linear):
    r"""Factor analysis: PPCA with a separate noise scale for each feature.

    .. math:: p(x) = \mathcal{N}(\mu, W W^\top + \operatorname{diag}(s)^2)

    Unlike PPCA, it does not depend on the units of the features. If the likelihood grows without bound as the noise of
    a feature vanishes (a Heywood case), ``fit_em`` stops at 1e-12 of that feature's variance.

    References:
        Rubin and Thayer (1982), EM Algorithms for ML Factor Analysis. https://doi.org/10.1007/BF02293851
        Bartholomew, Knott and Moustaki (2011), Latent Variable Models and Factor Analysis.

    Args:
        features: the number X of features of a data point.
        latent: the number D of factors, less than ``features``.

    Raises:
        ValueError: if not 1 <= latent < features.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 5).double() * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
        >>> model = FactorAnalysis(5, latent=2).double().fit_em(x, tolerance=1e-6)
        >>> model.log_evidence(x).shape, model.posterior(x).event_shape
        (torch.Size([100]), torch.Size([2]))
        >>> torch.allclose(model.log_evidence(x), model.marginal().log_prob(x))
        True
    """

    @checked
    def __init__(self, features: int, latent: int) -> None:
        check_latent("FactorAnalysis", latent, features)
        super().__init__(features, latent)
        self.log_noise = nn.Parameter(torch.zeros(features))

    @property
    def noise(self) -> Tensor:
        """s, the standard deviation of each feature's noise, in the units of x: [X]."""
        return self.log_noise.exp()

    @property
    def covariance(self) -> Tensor:
        """diag(s)^2, the covariance of x given z: [X, X]."""
        return self.noise.square().diag()

    def likelihood(self, loc: Tensor) -> TorchDistribution:
        """p(x | z) at mu + W z = ``loc`` [..., X]."""
        normal: TorchDistribution = Normal(loc, self.noise).to_event(1)
        return normal

    def whiten(self, x: Tensor) -> Tensor:
        """``x`` [..., X] in units of the noise."""
        return x / self.noise

    def log_det_root(self) -> Tensor:
        """The sum of log s."""
        return self.log_noise.sum()

    @torch.no_grad()
    def take_noise(self, residual: Tensor, covariance: Tensor) -> None:
        """Set s^2 to the diagonal of ``residual`` [X, X]."""
        floor = 1e-12 * covariance.diagonal()
        self.log_noise.copy_(residual.diagonal().maximum(floor).log() / 2)


class LinearGaussian(_Linear):
    r"""The linear-Gaussian model with any noise covariance: the general case of PPCA and factor analysis.

    .. math:: x \mid z \sim \mathcal{N}(\mu + W z, \Sigma), \qquad p(x) = \mathcal{N}(\mu, W W^\top + \Sigma)

    W and Sigma are not identified by p(x), which is any Gaussian: at the maximum of the likelihood W W^T + Sigma is the
    covariance of the data, and the split between the two depends on where the fit started.

    References:
        Roweis and Ghahramani (1999), A Unifying Review of Linear Gaussian Models.
        https://doi.org/10.1162/089976699300016674

    Args:
        features: the number X of features of a data point.
        latent: the number D of latent features; it may exceed X.

    Raises:
        ValueError: if ``features`` or ``latent`` is less than 1.

    Example:
        >>> model = LinearGaussian(5, latent=2).double()
        >>> x = model(n=3).detach()
        >>> torch.allclose(model.log_evidence(x), model.marginal().log_prob(x))
        True
    """

    @checked
    def __init__(self, features: int, latent: int) -> None:
        super().__init__(features, latent)
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.below = nn.Parameter(torch.zeros(features * (features - 1) // 2))

    @property
    def scale_tril(self) -> Tensor:
        """L, lower triangular with L L^T = Sigma: diag(exp(log_scale)) (I + below), [X, X]."""
        scale = self.log_scale.exp()
        return scale.diag() + scale.unsqueeze(-1) * lower_triangle(self.below, len(scale))

    @property
    def covariance(self) -> Tensor:
        """Sigma, the covariance of x given z: [X, X]."""
        return self.scale_tril @ self.scale_tril.T

    def likelihood(self, loc: Tensor) -> TorchDistribution:
        """p(x | z) at mu + W z = ``loc`` [..., X]."""
        return MultivariateNormal(loc, scale_tril=self.scale_tril)

    def whiten(self, x: Tensor) -> Tensor:
        """L^{-1} x of ``x`` [..., X]."""
        white: Tensor = torch.linalg.solve_triangular(self.scale_tril, x.unsqueeze(-1), upper=False).squeeze(-1)
        return white

    def log_det_root(self) -> Tensor:
        """Log det L."""
        return self.log_scale.sum()

    @torch.no_grad()
    def take_noise(self, residual: Tensor, covariance: Tensor) -> None:
        """Set Sigma to ``residual`` [X, X]."""
        root, failed = torch.linalg.cholesky_ex((residual + residual.T) / 2)
        if failed or (root.diagonal().square() <= 1e-12 * covariance.diagonal()).any():
            raise ValueError(
                "LinearGaussian has no maximum of the likelihood, because the covariance of the data is singular: "
                "use more data points, remove features that are linear functions of others, or use FactorAnalysis"
            )
        rows, columns = torch.tril_indices(len(root), len(root), offset=-1, device=root.device)
        self.log_scale.copy_(root.diagonal().log())
        self.below.copy_((root / root.diagonal().unsqueeze(-1))[rows, columns])
