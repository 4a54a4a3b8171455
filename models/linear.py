r"""Probabilistic PCA: a linear-Gaussian model whose evidence and posterior are known exactly.

With prior scale nu and noise sigma:

.. math:: z \sim \mathcal{N}(0, \nu^2 I), \qquad x \mid z \sim \mathcal{N}(\mu + W z, \sigma^2 I)

| symbol | meaning | shape |
| --- | --- | --- |
| X, D | features of a data point, latent features | |
| W, mu, sigma | weight, mean, noise | [X, D], [X], [] |
| M = W^T W + (sigma / nu)^2 I | posterior precision, times sigma^2 | [D, D] |
| A, lower triangular, A A^T = M^{-1} | root of the inverse of M | [D, D] |

With r = x - mu, everything follows from one Cholesky factor of a D x D matrix (Woodbury):

.. math::
    p(z \mid x) &= \mathcal{N}(A A^\top W^\top r, \; \sigma^2 A A^\top) \\
    p(x) &= \mathcal{N}(\mu, C), \qquad C = \nu^2 W W^\top + \sigma^2 I \\
    \log\det C &= (X - D) \log \sigma^2 + D \log \nu^2 + \log\det M \\
    r^\top C^{-1} r &= \left(|r|^2 - |A^\top W^\top r|^2\right) / \sigma^2
    = \left(|r - W m|^2 + (\sigma / \nu)^2 |m|^2\right) / \sigma^2, \qquad m = A A^\top W^\top r

The last form is a sum of squares and accurate in float32; the form before it suffers from cancellation.

Where features are missing (NaN), p(x) is that of the observed ones, and the rows of W that belong to the missing ones
are left out.
"""

from __future__ import annotations

__all__ = ["PPCA"]

import copy
import math
import warnings

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families.base import inverse_root
from jensen.missing import has_holes
from jensen.module import UniqueModule

from .base import check_latent, check_reals, data_plate, moments, principal_plane
from .conditioning import Conditioned, by_blocks, condition_observed, fill, predict
from .incomplete import Parameters, check_observed, climb, fit_incomplete, losses_of, observed_variance


class PPCA(UniqueModule):
    r"""Probabilistic principal component analysis, the linear VAE whose evidence and posterior are known.

    .. math:: p(x) = \mathcal{N}(\mu, \nu^2 W W^\top + \sigma^2 I)

    Any rotation W R has the same p(x). ``fit_closed_form`` chooses the maximum with orthogonal columns, where a
    mean-field guide is exact; at a general rotation it is not.

    NaN in the data marks a missing value: log p(x) and the posterior are then those of the observed values.

    References:
        Tipping and Bishop (1999), Probabilistic Principal Component Analysis. https://www.jstor.org/stable/2680726

    Args:
        features: the number X of features of a data point.
        latent: the number D of latent features, less than ``features``.
        prior_scale: nu, the standard deviation of the prior.

    Raises:
        ValueError: if not 1 <= latent < features, or ``prior_scale`` is not positive.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 5).double() @ torch.randn(5, 5).double()
        >>> model = PPCA(5, latent=2).double().fit_closed_form(x)
        >>> model.log_evidence(x).shape, model.posterior(x).event_shape
        (torch.Size([100]), torch.Size([2]))
        >>> same_marginal = model.rotated(seed=0)
        >>> torch.allclose(model.log_evidence(x), same_marginal.log_evidence(x))
        True
    """

    @checked
    def __init__(self, features: int, latent: int, prior_scale: float = 1.0) -> None:
        check_latent("PPCA", latent, features)
        if not 0 < prior_scale < math.inf:
            raise ValueError(f"prior_scale is a positive standard deviation, but got {prior_scale}")
        super().__init__()
        self.prior_scale = float(prior_scale)
        self.mean = nn.Parameter(torch.zeros(features))
        self.weight = nn.Parameter(torch.randn(features, latent) / math.sqrt(features))
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.latents = {"z": Size((latent,))}
        self.event_shape = Size((features,))

    @property
    def noise(self) -> Tensor:
        """sigma, the standard deviation of the noise, in the units of x."""
        return self.log_noise.exp()

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, X], or samples ``n`` data points."""
        weight, mean, noise = self.weight, self.mean, self.noise
        with data_plate(x, self.event_shape, n, "PPCA"):
            prior = Normal(mean.new_zeros(weight.shape[1]), self.prior_scale).to_event(1)
            z = pyro.sample("z", prior)  # [N, D]
            return pyro.sample("x", Normal(mean + z @ weight.T, noise).to_event(1), obs=x)  # [N, X]

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x`` [N, X], in nats: [N]."""
        check_reals(x, self.event_shape, "PPCA", self.weight)
        if has_holes(x):
            return self._condition(x).log_density
        r = x - self.mean  # [N, X]
        root = _inverse_root(self.weight, self.noise, self.prior_scale)
        m = r @ self.weight @ root @ root.T  # [N, D], the posterior mean
        shrinkage = (self.noise / self.prior_scale).square() * m.square().sum(-1)
        distance = (r - m @ self.weight.T).square().sum(-1) + shrinkage  # [N]
        return _log_density(distance, root, self.noise, self.prior_scale, len(self.mean))

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x) of each row of ``x`` [N, X]: a Gaussian of batch shape [N] and event shape [D]."""
        check_reals(x, self.event_shape, "PPCA", self.weight)
        if has_holes(x):
            given = self._condition(x)
            return MultivariateNormal(self.prior_scale * given.mean, scale_tril=self.prior_scale * given.root)
        root = _inverse_root(self.weight, self.noise, self.prior_scale)
        loc = (x - self.mean) @ self.weight @ root @ root.T  # [N, D]
        return MultivariateNormal(loc, scale_tril=self.noise * root)

    def completed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each missing value of ``x`` [N, X] given the observed values of its row.

        .. math::
            \operatorname{E}[x_i \mid x_o] = \mu_i + w_i^\top \operatorname{E}[z \mid x_o], \qquad
            \operatorname{Var}[x_i \mid x_o] = w_i^\top \operatorname{Cov}[z \mid x_o] \, w_i + \sigma^2

        Returns:
            The mean [N, X] and the variance [N, X]; an observed value is its own mean, with variance 0.
        """
        check_reals(x, self.event_shape, "PPCA", self.weight)

        def block(x: Tensor) -> tuple[Tensor, Tensor]:
            weight = self.prior_scale * self.weight
            return fill(x, *predict(self._condition(x), self.mean, weight, self.log_noise))

        mean, variance = by_blocks(block, x, self.weight.numel())
        return mean, variance

    def _condition(self, x: Tensor) -> Conditioned:
        """The posterior of z / nu given the observed values of ``x`` [N, X], and their log-density."""
        log_noise = self.log_noise.expand(self.event_shape)
        return condition_observed(x, self.mean, self.prior_scale * self.weight, log_noise)

    def rotated(self, seed: int) -> PPCA:
        """A copy with the same p(x) and W rotated by a random orthogonal matrix R: W R has non-orthogonal columns.

        Args:
            seed: fixes R, which is uniform over rotations and reflections (Haar).
        """
        features, latent = self.weight.shape
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(latent, latent, generator=generator, dtype=torch.float64, device="cpu"))
        rotation = (q * r.diagonal().sign()).to(self.weight)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # the random initial weight is not used
            turned = PPCA(features, latent, self.prior_scale).to(self.weight)
        return turned._assign(self.mean, self.weight @ rotation, self.noise.square())

    @torch.no_grad()
    def fit_closed_form(self, x: Tensor) -> PPCA:
        r"""Maximum likelihood in closed form, from the eigenvalues of the covariance of ``x`` [N, X].

        .. math::
            W = U_D (\Lambda_D - \sigma^2 I)^{1/2} / \nu, \qquad \sigma^2 = \tfrac{1}{X - D} \sum_{i > D} \lambda_i

        The covariance divides by N (scikit-learn's ``PCA`` divides by N - 1). Returns the model.

        Raises:
            ValueError: for fewer than two data points, NaN (with missing values there is no closed form: use
                :meth:`fit_em`) or infinity, or no variance left outside D directions (sigma would be 0).
        """
        if has_holes(x):
            raise ValueError(
                "PPCA has no closed form for data with missing values (NaN): use fit_em(x), which accepts them"
            )
        mean, covariance = self._moments(x)
        weight, variance = principal_plane(covariance, self.weight.shape[1])
        return self._assign(mean, weight / self.prior_scale, variance)

    @torch.no_grad()
    def fit_em(self, x: Tensor, iterations: int = 20_000, tolerance: float = 1e-11) -> PPCA:
        r"""Maximum likelihood by expectation maximization, from the current W and sigma; returns the model.

        .. math::
            \tilde W = S W (\sigma^2 I + M^{-1} W^\top S W)^{-1}, \qquad
            \tilde\sigma^2 = \tfrac{1}{X} \operatorname{tr}(S - S W M^{-1} \tilde W^\top)

        with S the covariance of the data and prior scale 1 (Tipping and Bishop 1999, equations 29 and 30).

        Where values are missing (NaN), the likelihood is that of the observed values. Then the mean is a parameter of
        the M step too, every iteration reads all data, extrapolation saves iterations, and sigma^2 does not fall below
        1e-12 of the mean variance. The likelihood may have several local maxima, and with most of the values missing
        the fit overfits. For example, with 500 data points of 30 features, four latents and 90 % missing, six starts
        ended up to 0.11 nats per data point apart, and log p(x) of new data was 0.5 to 1.2 nats below that of the true
        model. With 20 features and five latents, sigma went to 0. Then compare several starts, and judge the fit by
        data that were held out.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.
            tolerance: stop when one iteration gains fewer nats per data point than this.

        Raises:
            ValueError: for fewer than two data points, infinity, no variance left outside D directions, or a feature
                of which nothing was observed.
        """
        if has_holes(x):
            return self._fit_incomplete(x, iterations, tolerance)
        mean, covariance = self._moments(x)
        weight = self.weight.double() * self.prior_scale  # the model with prior scale 1
        variance = self.noise.double().square()
        before = torch.tensor(-math.inf, dtype=torch.float64)
        total = covariance.trace()
        for _ in range(iterations):
            root = _inverse_root(weight, variance.sqrt(), 1.0)
            cross = covariance @ weight  # [X, D]
            explained = (root.T @ (weight.T @ cross) @ root).trace()
            now = _log_density(total - explained, root, variance.sqrt(), 1.0, len(mean))
            if now - before < tolerance:
                break
            before = now
            inverse = root @ root.T
            eye = torch.eye(len(root), dtype=torch.float64, device=x.device)
            weight = cross @ torch.linalg.inv(variance * eye + inverse @ weight.T @ cross)
            variance = (total - ((cross @ inverse) * weight).sum()) / len(mean)
        return self._assign(mean, weight / self.prior_scale, variance)

    def fit_gradient(self, x: Tensor, iterations: int = 2_000) -> PPCA:
        """Maximum likelihood by L-BFGS on the exact log p(x), from the current W and sigma; returns the model.

        Where values are missing (NaN), log p(x) is that of the observed values; see :meth:`fit_em`.

        Args:
            x: the data, [N, X].
            iterations: the maximal number of iterations.

        Raises:
            ValueError: for fewer than two data points, infinity, no variance left outside D directions, a feature of
                which nothing was observed, or noise that becomes too small.
        """
        if has_holes(x):
            x = check_observed(x, self.event_shape, "PPCA")
            work = copy.deepcopy(self).to(x)
            work.mean.data.copy_(x.nanmean(0))
            climb(work.parameters(), lambda: losses_of(work, x), iterations)
            self._warn_without_noise(x, work.noise.square())
            return self._assign(work.mean, work.weight, work.noise.square())
        mean, covariance = self._moments(x)
        weight = self.weight.detach().double().requires_grad_()
        log_noise = self.log_noise.detach().double().requires_grad_()

        def losses() -> list[Tensor]:
            noise = log_noise.exp()
            root = _inverse_root(weight, noise, self.prior_scale)
            explained = (root.T @ (weight.T @ covariance @ weight) @ root).trace()
            return [-_log_density(covariance.trace() - explained, root, noise, self.prior_scale, len(mean))]

        climb([weight, log_noise], losses, iterations)
        return self._assign(mean, weight.detach(), (2 * log_noise.detach()).exp())

    def _fit_incomplete(self, x: Tensor, iterations: int, tolerance: float) -> PPCA:
        x = check_observed(x, self.event_shape, "PPCA")
        floor = 1e-12 * observed_variance(x).mean()
        if not floor > 0:
            raise ValueError(
                "the observed values of every feature are constant, so the noise would be 0: use data that vary"
            )

        def pool(squares: Tensor, counts: Tensor) -> Tensor:
            return (squares.sum() / counts.sum()).maximum(floor).expand(squares.shape)

        weight, log_noise = self.weight.to(x) * self.prior_scale, self.log_noise.to(x).expand(self.event_shape)
        start = Parameters(x.new_zeros(1), x.nanmean(0)[None], weight[None], log_noise[None])
        best = fit_incomplete(x, start, pool, iterations, tolerance)
        variance = (2 * best.log_noise[0, 0]).exp()
        self._warn_without_noise(x, variance)
        return self._assign(best.mean[0], best.weight[0] / self.prior_scale, variance)

    def _warn_without_noise(self, x: Tensor, variance: Tensor) -> None:
        if variance < 1e-9 * observed_variance(x).mean():
            latent = self.weight.shape[1]
            warnings.warn(
                "the likelihood of the observed values is largest without noise, so log p(x) of new data will be far "
                f"too low: use {f'a latent below {latent}, or ' * (latent > 1)}more data points",
                stacklevel=4,
            )

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [X] and covariance [X, X] (divided by N) of the data, in float64."""
        mean, covariance = moments(x, self.event_shape, "PPCA")
        eigenvalues = torch.linalg.eigvalsh(covariance)  # ascending
        D = self.weight.shape[1]
        if eigenvalues[:-D].mean() <= 1e-12 * eigenvalues[-1]:
            raise ValueError(self._without_noise(covariance, eigenvalues, len(x)))
        return mean, covariance

    def _without_noise(self, covariance: Tensor, eigenvalues: Tensor, n: int) -> str:
        """The error message, with remedies, for data whose noise variance would be 0."""
        directions = int((eigenvalues > 1e-12 * eigenvalues[-1]).sum())
        if not directions:
            return "every feature of the data is constant, so the noise would be 0: use data that vary"
        constant = (covariance.diagonal() == 0).nonzero().flatten().tolist()
        remedies = [f"use latent={directions - 1} or less"] if directions > 1 else []
        if n <= self.weight.shape[1] + 1:
            remedies.append(f"use more data points ({n} of them span at most {n - 1} direction{'s' * (n > 2)})")
        else:
            remedies.append("add noise (dequantize)")
        also = f"; constant features: {constant[:10]}{' and others' * (len(constant) > 10)}" if constant else ""
        return (
            f"the data have no variance outside {directions} direction{'s' * (directions > 1)}, so the noise would be "
            f"0: {', or '.join(remedies)}{also}"
        )

    def _assign(self, mean: Tensor, weight: Tensor, variance: Tensor) -> PPCA:
        """Write parameters in place, so that optimizers and Pyro's parameter store keep their references."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.weight.copy_(weight)
            self.log_noise.copy_(variance.log() / 2)
        return self


def _inverse_root(weight: Tensor, noise: Tensor, prior_scale: float) -> Tensor:
    """A, lower triangular with A A^T = M^{-1}: [D, D]."""
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return inverse_root(weight.T @ weight + (noise / prior_scale).square() * eye)


def _log_density(distance: Tensor, root: Tensor, noise: Tensor, prior_scale: float, features: int) -> Tensor:
    """The log-density from ``distance`` = sigma^2 r^T C^{-1} r, of any shape; or the mean of both."""
    D = len(root)
    log_det = (
        2 * (features - D) * noise.log() + 2 * D * math.log(prior_scale) - 2 * root.diagonal().log().sum()
    )  # log det M = -2 sum log diag A
    return -0.5 * (features * math.log(2 * math.pi) + log_det + distance / noise.square())
