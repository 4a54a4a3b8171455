"""Guides q(z | x): a Pyro module called with the model's data that samples the model's latent sites.

A guide and its model share only the Pyro protocol. The families that suit posteriors are re-exported here.
"""

from jensen.families import (
    IAF,
    MAF,
    BinaryVector,
    Delta,
    FullCovariance,
    GaussMarkov,
    LowRank,
    MeanField,
    Mixture,
    NeuralSpline,
    OneHotCategorical,
    StudentT,
    Sylvester,
    Zuko,
)

from .amortized import Amortized, Joint, amortize
from .autoencoder import Contractive
from .exact import ExactPosterior, PriorGuide
from .hierarchical import BottomUp, Ladder
from .members import Constrained, Through
from .programs import Structured
from .refine import Laplace, SemiAmortized

__all__ = [
    "IAF",
    "MAF",
    "Amortized",
    "BinaryVector",
    "BottomUp",
    "Constrained",
    "Contractive",
    "Delta",
    "ExactPosterior",
    "FullCovariance",
    "GaussMarkov",
    "Joint",
    "Ladder",
    "Laplace",
    "LowRank",
    "MeanField",
    "Mixture",
    "NeuralSpline",
    "OneHotCategorical",
    "PriorGuide",
    "SemiAmortized",
    "Structured",
    "StudentT",
    "Sylvester",
    "Through",
    "Zuko",
    "amortize",
]
