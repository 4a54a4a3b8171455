"""Families of conditional distributions: a module that turns a context [..., H] into a Pyro distribution.

``family(h)`` has ``batch_shape == h.shape[:-1]`` and ``event_shape == (features,)``. Families contain no Pyro
statements. Guides use them for q(z | x), models for p(x | z).
"""

from . import divergence as divergence  # registers KL divergences
from .base import Family
from .chain import GaussMarkov
from .continuous import ContinuousBernoulli, Laplace
from .counts import Binomial, Categorical, NegativeBinomial, Poisson
from .discrete import Bernoulli, BinaryVector, OneHotCategorical
from .flows import IAF, MAF, Flow
from .gaussian import FullCovariance, Gaussian, LowRank, MeanField
from .logistic import DiscretizedLogistic
from .mixture import Mixture
from .point import Delta
from .splines import NeuralSpline
from .student import StudentT
from .sylvester import Sylvester
from .zuko import Zuko

__all__ = [
    "IAF",
    "MAF",
    "Bernoulli",
    "BinaryVector",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "Delta",
    "DiscretizedLogistic",
    "Family",
    "Flow",
    "FullCovariance",
    "GaussMarkov",
    "Gaussian",
    "Laplace",
    "LowRank",
    "MeanField",
    "Mixture",
    "NegativeBinomial",
    "NeuralSpline",
    "OneHotCategorical",
    "Poisson",
    "StudentT",
    "Sylvester",
    "Zuko",
]
