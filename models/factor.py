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

Where features are missing (NaN), p(x) is that of the observed ones: L is the root of their part of Sigma, and W has the
rows that belong to them.
"""

from __future__ import annotations

__all__ = ["FactorAnalysis", "LinearGaussian"]

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal, TorchDistribution
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families.base import inverse_root, lower_triangle
from jensen.missing import has_holes, observed_root
from jensen.module import UniqueModule

from .base import check_latent, check_reals, data_plate, moments
from .conditioning import (
    Conditioned,
    by_blocks,
    condition,
    condition_observed,
    fill,
    in_blocks,
    predict,
    split_observed,
)
from .incomplete import Parameters, ascend, check_observed, climb, fit_incomplete, losses_of, observed_variance
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

    def _condition_observed(self, x: Tensor) -> Conditioned:
        """The posterior of z given the observed values of ``x`` [N, X], and their log-density."""
        raise NotImplementedError

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each missing value of ``x`` [N, X] given the observed values of its row: [N, X]."""
        raise NotImplementedError

    def _fit_observed(self, x: Tensor, iterations: int, tolerance: float) -> None:
        """Fit the parameters to the observed values of ``x`` [N, X] by EM, from the current ones."""
        raise NotImplementedError

    def _rescale(self, shift: Tensor, scale: Tensor) -> None:
        """Change the units of the features: p(x) becomes that of ``shift + scale * x``, both [X]."""
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
        return self._condition(x).log_density

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x) of each row of ``x`` [N, X]: a Gaussian of batch shape [N] and event shape [D]."""
        given = self._condition(x)
        return MultivariateNormal(given.mean, scale_tril=given.root)

    def completed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each missing value of ``x`` [N, X] given the observed values of its row.

        With o the observed and m the missing features, and C = W W^T + Sigma:

        .. math::
            \operatorname{E}[x_m \mid x_o] = \mu_m + C_{mo} C_{oo}^{-1} (x_o - \mu_o), \qquad
            \operatorname{Cov}[x_m \mid x_o] = C_{mm} - C_{mo} C_{oo}^{-1} C_{om}

        Returns:
            The mean [N, X] and the variance [N, X]; an observed value is its own mean, with variance 0.
        """
        check_reals(x, self.event_shape, type(self).__name__, self.weight)
        mean, variance = by_blocks(lambda rows: fill(rows, *self._predict(rows)), x, self.weight.numel())
        return mean, variance

    def _condition(self, x: Tensor) -> Conditioned:
        check_reals(x, self.event_shape, type(self).__name__, self.weight)
        if has_holes(x):
            return self._condition_observed(x)
        given = condition(self.whiten(x - self.mean), self.whiten(self.weight.T).T)
        return given._replace(log_density=given.log_density - self.log_det_root())

    @torch.no_grad()
    def fit_em(self, x: Tensor, iterations: int = 20_000, tolerance: float = 1e-11) -> Self:
        r"""Maximum likelihood by expectation maximization, from the current W and Sigma; returns the model.

        .. math::
            B = M^{-1} V^\top L^{-1}, \qquad \tilde W = S B^\top (M^{-1} + B S B^\top)^{-1}, \qquad
            \tilde\Sigma \leftarrow S - \tilde W B S

        with S the covariance of the data, divided by N. The last matrix is projected onto the noise that the model
        allows.

        Where values are missing (NaN), the likelihood is that of the observed values. Then the mean is a parameter of
        the M step too, every iteration reads all data, and extrapolation saves iterations. The likelihood may have
        several local maxima, and with most of the values missing the fit overfits: compare several starts, and judge
        the fit by data that were held out.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.
            tolerance: stop when one iteration gains fewer nats per data point than this.

        Raises:
            ValueError: for fewer than two data points, infinity, a constant feature or one of which nothing was
                observed, or data for which the likelihood has no maximum in the noise.
        """
        if has_holes(x):
            x, work = self._start(x)
            work._fit_observed(x, iterations, tolerance)
            self.load_state_dict(work.state_dict())
            return self
        mean, covariance = self._moments(x)
        work = copy.deepcopy(self).to(covariance)  # in float64
        work.mean.copy_(mean)
        before = -math.inf
        for _ in range(iterations):
            now, update = work._em(covariance)
            if now - before < tolerance:
                break
            before = now
            update()
        self.load_state_dict(work.state_dict())
        return self

    def fit_gradient(self, x: Tensor, iterations: int = 2_000) -> Self:
        """Maximum likelihood by L-BFGS on the exact log p(x), from the current W and Sigma; returns the model.

        Where values are missing (NaN), log p(x) is that of the observed values; see :meth:`fit_em`.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.

        Raises:
            ValueError: for fewer than two data points, infinity, a constant feature, one of which nothing was
                observed, or noise that becomes too small.
        """
        x, work = self._start(x)
        shift, scale = work.mean.detach().clone(), observed_variance(x).sqrt()
        work._rescale(-shift / scale, 1 / scale)  # L-BFGS needs features of about the same size
        x = (x - shift) / scale
        climb(work.parameters(), lambda: losses_of(work, x), iterations)
        work._rescale(shift, scale)
        self.load_state_dict(work.state_dict())
        return self

    def _em(self, covariance: Tensor) -> tuple[float, Callable[[], None]]:
        """The log-likelihood per data point, up to a constant, of data of this covariance, and the next iteration."""
        weight = self.whiten(self.weight.T).T  # [X, D]
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        root = inverse_root(weight.T @ weight + eye)
        white = self.whiten(self.whiten(covariance).T)  # L^{-1} S L^{-T}, [X, X]
        explained = (root.T @ (weight.T @ white @ weight) @ root).trace()
        log_det = self.log_det_root() - root.diagonal().log().sum()

        def update() -> None:
            inverse = root @ root.T
            cross = self.whiten(covariance) @ weight @ inverse  # S B^T, [X, D]
            second = inverse + inverse @ (weight.T @ white @ weight) @ inverse
            self.weight.copy_(torch.linalg.solve(second, cross.T).T)
            self.take_noise(covariance - self.weight @ cross.T, covariance)

        return -float(log_det + (white.trace() - explained) / 2), update

    def _start(self, x: Tensor) -> tuple[Tensor, Self]:
        """Data in float64, and a copy of the model in float64 with their mean."""
        x = check_observed(x, self.event_shape, type(self).__name__)
        self._check_variation(x)
        work = copy.deepcopy(self).to(x)
        with torch.no_grad():
            work.mean.copy_(x.nanmean(0))
        return x, work

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [X] and covariance [X, X] (divided by N) of the data, in float64."""
        mean, covariance = moments(x, self.event_shape, type(self).__name__)
        self._check_variation(x)
        return mean, covariance

    def _check_variation(self, x: Tensor) -> None:
        """Raise ValueError for a feature whose observed values are all the same."""
        lowest, highest = x.nan_to_num(math.inf).amin(0), x.nan_to_num(-math.inf).amax(0)
        if (still := lowest == highest).any():
            raise ValueError(
                f"{type(self).__name__} has no maximum of the likelihood for constant features: "
                f"x[:, {int(still.nonzero()[0])}] is always {lowest[still][0]:g}; remove such features, or add noise "
                "(dequantize)"
            )


class FactorAnalysis(_Linear):
    r"""Factor analysis: PPCA with a separate noise scale for each feature.

    .. math:: p(x) = \mathcal{N}(\mu, W W^\top + \operatorname{diag}(s)^2)

    Unlike PPCA, it does not depend on the units of the features. If the likelihood grows without bound as the noise of
    a feature vanishes (a Heywood case), ``fit_em`` stops at 1e-12 of that feature's variance.

    NaN in the data marks a missing value: log p(x) and the posterior are then those of the observed values.

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

    def _condition_observed(self, x: Tensor) -> Conditioned:
        return condition_observed(x, self.mean, self.weight, self.log_noise)

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return predict(self._condition_observed(x), self.mean, self.weight, self.log_noise)

    def _fit_observed(self, x: Tensor, iterations: int, tolerance: float) -> None:
        floor = 1e-12 * observed_variance(x)
        start = Parameters(x.new_zeros(1), self.mean[None], self.weight[None], self.log_noise[None])
        best = fit_incomplete(
            x, start, lambda squares, counts: (squares / counts).maximum(floor), iterations, tolerance
        )
        for parameter, value in zip((self.mean, self.weight, self.log_noise), best[1:], strict=True):
            parameter.copy_(value[0])

    def _rescale(self, shift: Tensor, scale: Tensor) -> None:
        _rescale(self.mean, self.weight, self.log_noise, shift, scale)


class LinearGaussian(_Linear):
    r"""The linear-Gaussian model with any noise covariance: the general case of PPCA and factor analysis.

    .. math:: x \mid z \sim \mathcal{N}(\mu + W z, \Sigma), \qquad p(x) = \mathcal{N}(\mu, W W^\top + \Sigma)

    W and Sigma are not identified by p(x), which is any Gaussian: at the maximum of the likelihood W W^T + Sigma is the
    covariance of the data, and the split between the two depends on where the fit started.

    NaN in the data marks a missing value: log p(x) and the posterior are then those of the observed values, which takes
    a matrix of size X x X for each data point.

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

    def _condition_observed(self, x: Tensor) -> Conditioned:
        noise = self.covariance

        def block(x: Tensor) -> Conditioned:
            values, observed = split_observed(x.to(noise.dtype))
            root = observed_root(noise, observed.bool())  # [N, X, X]
            y = torch.linalg.solve_triangular(root, ((values - self.mean) * observed).unsqueeze(-1), upper=False)
            weight = torch.linalg.solve_triangular(root, observed.unsqueeze(-1) * self.weight, upper=False)
            given = condition(y.squeeze(-1), weight)  # its rows of missing features are 0
            log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            missing = observed.shape[-1] - observed.sum(-1)
            return given._replace(log_density=given.log_density - log_det + missing * math.log(2 * math.pi) / 2)

        return Conditioned(*by_blocks(block, x, noise.numel()))

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        covariance = self.weight @ self.weight.T + self.covariance
        completed = _complete(x.to(covariance.dtype), self.mean, covariance)
        return completed.mean, (covariance.diagonal() - completed.gain.square().sum(-2)).clamp_min(0)

    def _fit_observed(self, x: Tensor, iterations: int, tolerance: float) -> None:
        parameters = list(self.parameters())

        def take(values: Sequence[Tensor]) -> None:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

        def step(now: Sequence[Tensor]) -> tuple[float, Callable[[], Sequence[Tensor]]]:
            take(now)
            log_likelihood, shift, covariance = self._expect(x)

            def following() -> Sequence[Tensor]:
                self.mean.add_(shift)
                _, update = self._em(covariance)
                update()
                return [parameter.clone() for parameter in parameters]

            return log_likelihood, following

        start = [parameter.clone() for parameter in parameters]
        take(ascend(start, step, lambda far: far, iterations, tolerance))

    def _expect(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Log p(x) per data point; the change of the mean [X], and the covariance [X, X], of the completed data."""
        marginal = self.weight @ self.weight.T + self.covariance
        total, first, second = x.new_zeros(()), torch.zeros_like(x[0]), torch.zeros_like(marginal)
        for rows in in_blocks(x, marginal.numel()):
            completed = _complete(rows, self.mean, marginal)
            missing = rows.isnan().to(x.dtype)
            r = torch.where(rows.isnan(), completed.mean, rows) - self.mean  # E x - mu, [n, X]
            gain = (completed.gain * missing.unsqueeze(-2)).flatten(0, 1)  # [n X, X]
            total += completed.log_density.sum()
            first += r.sum(0)
            second += r.T @ r + (missing.T @ missing) * marginal - gain.T @ gain
        shift = first / len(x)
        return float(total) / len(x), shift, second / len(x) - shift.outer(shift)

    def _rescale(self, shift: Tensor, scale: Tensor) -> None:
        _rescale(self.mean, self.weight, self.log_scale, shift, scale)


class _Completed(NamedTuple):
    """What follows from the observed values of a Gaussian of covariance C.

    Attributes:
        mean: E[x | x_o], [N, X]; at observed features it is not used.
        gain: G with G^T G = C_{:o} C_{oo}^{-1} C_{o:}, [N, X, X].
        log_density: log p(x_o), [N].
    """

    mean: Tensor
    gain: Tensor
    log_density: Tensor


def _complete(x: Tensor, mean: Tensor, covariance: Tensor) -> _Completed:
    values, observed = split_observed(x)
    root = observed_root(covariance, observed.bool())  # [N, X, X]
    y = torch.linalg.solve_triangular(root, ((values - mean) * observed).unsqueeze(-1), upper=False)
    gain = torch.linalg.solve_triangular(root, observed.unsqueeze(-1) * covariance, upper=False)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    distance = y.square().sum((-2, -1)) + observed.sum(-1) * math.log(2 * math.pi)
    return _Completed(mean + (gain.mT @ y).squeeze(-1), gain, -distance / 2 - log_det)


@torch.no_grad()
def _rescale(mean: Tensor, weight: Tensor, log_noise: Tensor, shift: Tensor, scale: Tensor) -> None:
    mean.mul_(scale).add_(shift)
    weight.mul_(scale.unsqueeze(-1))
    log_noise.add_(scale.log())
