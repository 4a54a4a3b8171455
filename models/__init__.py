"""Generative models p(x, z): a Pyro module whose ``forward(x=None, *, n=1)`` is the model function.

``latents`` maps each latent site to its event shape, in generative order. Every site is inside ``pyro.plate("data")``,
``"x"`` is observed, and ``x=None`` samples n data points. A model with an exact log p(x) has
``log_evidence(x) -> [N]``.
"""

from .autoencoder import FlatPrior, LaplacePrior
from .conditional import ConditionalVAE
from .curved import Banana, Ring
from .discrete import BinaryLatentVAE, GaussianMixtureVAE
from .factor import FactorAnalysis, LinearGaussian
from .hierarchical import Hierarchical
from .linear import PPCA
from .mixture import MixtureOfPPCA
from .priors import LearnedPrior, StandardNormal, VampPrior
from .sequence import LinearGaussianSSM
from .vae import VAE

__all__ = [
    "PPCA",
    "VAE",
    "Banana",
    "BinaryLatentVAE",
    "ConditionalVAE",
    "FactorAnalysis",
    "FlatPrior",
    "GaussianMixtureVAE",
    "Hierarchical",
    "LaplacePrior",
    "LearnedPrior",
    "LinearGaussian",
    "LinearGaussianSSM",
    "MixtureOfPPCA",
    "Ring",
    "StandardNormal",
    "VampPrior",
]
