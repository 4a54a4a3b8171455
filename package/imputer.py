r"""An imputer of missing values with the interface of scikit-learn's transformers.

.. math:: E[x_\text{mis} \mid x_\text{obs}]
"""

from __future__ import annotations

__all__ = ["Imputer"]

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from jensen.families import MeanField, StudentT
from jensen.guides import ExactPosterior, amortize
from jensen.inference import IWAE, Imputation, evaluate, fit, impute
from jensen.kernel.randomness import private_randomness
from jensen.models import PPCA, VAE, FactorAnalysis, MixtureOfPPCA
from jensen.networks import Masked, mlp

_MODELS = ("ppca", "factor-analysis", "mixture-of-ppca", "vae")


class Imputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""Replace missing values (NaN) by their mean given the observed values of their row.

    ``fit`` standardizes the features by their observed values and fits a latent-variable model to what was observed;
    ``transform`` imputes the rows of any table with the same features, also other rows than those of ``fit``.

    | ``model`` | fitted by | mean of missing values |
    | --- | --- | --- |
    | ``"ppca"``, ``"factor-analysis"``, ``"mixture-of-ppca"`` | EM | exact |
    | ``"vae"`` | an importance-weighted bound (MIWAE) | self-normalized importance sampling |

    References:
        Tipping and Bishop (1999), Probabilistic Principal Component Analysis, section 4.
        Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
        https://arxiv.org/abs/1812.02633

    Args:
        model: the kind of model.
        latent: the number of latent features; if None, half of the features, between 1 and 10.
        components: the number of components of a mixture.
        hidden: the widths of the hidden layers of a VAE's networks.
        epochs: passes over the data to train a VAE.
        particles: the number of samples per row with a VAE.
        tol: EM stops when one iteration gains fewer nats per row than this.
        random_state: a seed, or a ``numpy.random.RandomState``, for starts, training and samples.

    Attributes:
        model_: the fitted model, of standardized data.
        guide_: its guide.
        location_: the mean of the observed values of each feature, [X].
        scale_: their standard deviation, [X]; 1 for a constant feature.
        n_features_in_: the number X of features.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(100, 1)) + 0.05 * rng.normal(size=(100, 3))
        >>> x[::2, 0] = np.nan
        >>> filled = Imputer(random_state=0).fit_transform(x)
        >>> filled.shape, bool(abs(filled[0, 0] - filled[0, 1]) < 0.2)
        ((100, 3), True)
    """

    def __init__(
        self,
        model: str = "ppca",
        *,
        latent: int | None = None,
        components: int = 2,
        hidden: tuple[int, ...] = (128, 128),
        epochs: int = 200,
        particles: int = 1000,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.latent = latent
        self.components = components
        self.hidden = hidden
        self.epochs = epochs
        self.particles = particles
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> Imputer:
        """Fit the model to the observed values of ``X`` [N, X].

        Args:
            X: a table of numbers, NaN where a value is missing.
            y: ignored.

        Returns:
            The imputer.

        Raises:
            ValueError: for a feature without any observed value, infinite values, and an unknown ``model``.
        """
        if self.model not in _MODELS:
            raise ValueError(f"model must be one of {', '.join(_MODELS)}, but got {self.model!r}")
        given = self._validated(X, reset=True)
        seen = ~np.isnan(given)
        empty = np.flatnonzero(~seen.any(0)).tolist()
        if empty:
            raise ValueError(
                f"features {empty} have no observed value, so nothing is known of them: remove them from X"
            )
        self.location_ = np.nanmean(given, 0)
        scale = np.nanstd(given, 0)
        self.scale_ = np.where(scale > 0, scale, 1.0)
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        x = self._standardized(given)
        features = x.shape[1]
        latent = max(1, min(10, features // 2)) if self.latent is None else self.latent
        with torch.device("cpu"), private_randomness(self._seed):  # as the arrays, whatever the default device
            if self.model == "vae":
                self._fit_vae(x.float(), latent)
            else:
                makers: dict[str, Any] = {"ppca": PPCA, "factor-analysis": FactorAnalysis}
                make: Any = makers.get(self.model)
                model: Any = make(features, latent) if make else MixtureOfPPCA(features, latent, self.components)
                self.model_: Any = model.double().fit_em(x, tolerance=self.tol)
                self.guide_: Any = ExactPosterior(self.model_) if make else None
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """``X`` with the mean of each missing value given the observed ones of its row, [N, X]."""
        given, x = self._read(X)
        if not np.isnan(given).any():
            return given
        if self.model == "vae":
            mean = self._imputed(x.float()).mean
        else:
            with torch.no_grad():
                mean = self.model_.completed(x)[0]
        filled: NDArray[np.float64] = mean.double().numpy() * self.scale_ + self.location_
        return np.where(np.isnan(given), filled, given)

    def impute(self, X: ArrayLike, draws: int = 5) -> Imputation:
        """The whole imputation of ``X``, in its own units: means, variances, quantiles, and ``draws`` samples.

        Raises:
            NotImplementedError: for a mixture of PPCA, which has no guide here.
        """
        _, x = self._read(X)
        if self.guide_ is None:
            raise NotImplementedError("samples need a guide of the mixture: use jensen.inference.impute with your own")
        found = self._imputed(x.float() if self.model == "vae" else x, draws)
        return found.in_units(torch.from_numpy(self.location_), torch.from_numpy(self.scale_))

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        r"""Log p(x_obs) of each row, in nats, of the data in their own units: [N]."""
        given, x = self._read(X)
        if self.model == "vae":
            how: dict[str, Any] = {"seed": self._seed, "progress": False}
            log_p = evaluate(self.model_, self.guide_, x.float(), self.particles, **how).best
        else:
            with torch.no_grad():
                log_p = self.model_.log_evidence(x)
        units: NDArray[np.float64] = (~np.isnan(given)) @ np.log(self.scale_)
        values: NDArray[np.float64] = log_p.double().numpy() - units
        return values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _imputed(self, x: Tensor, draws: int = 1) -> Imputation:
        how: dict[str, Any] = {"draws": draws, "seed": self._seed, "progress": False}
        names = tuple(getattr(self, "feature_names_in_", ()))
        return impute(self.model_, self.guide_, x, self.particles, columns=names, **how)

    def _fit_vae(self, x: Tensor, latent: int) -> None:
        features, widths = x.shape[1], list(self.hidden)
        self.model_ = VAE(mlp(latent, widths), StudentT(features, widths[-1]), latent)
        encoder = Masked(mlp(2 * features, widths), features)
        self.guide_ = amortize(self.model_, encoder, MeanField, context=widths[-1])
        objective = IWAE(20, gradient="dreg")
        size = min(64, len(x))
        how: dict[str, Any] = {"seed": self._seed, "progress": False}
        fit(self.model_, self.guide_, x, objective, epochs=self.epochs, batch_size=size, **how)

    def _read(self, X: ArrayLike) -> tuple[NDArray[np.float64], Tensor]:
        check_is_fitted(self, "model_")
        given = self._validated(X, reset=False)
        return given, self._standardized(given)

    def _validated(self, X: ArrayLike, reset: bool) -> NDArray[np.float64]:
        least: dict[str, int] = {"ensure_min_features": 2, "ensure_min_samples": 2} if reset else {}
        x: NDArray[np.float64] = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", **least
        )
        return x

    def _standardized(self, given: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy((given - self.location_) / self.scale_)
