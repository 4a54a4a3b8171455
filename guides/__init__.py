"""Guides q(z | x): a Pyro module called with the model's data that samples the model's latent sites.

A guide meets its model through the Pyro protocol alone. The families meant for posteriors are re-exported here.
"""

from jensen.families import FullCovariance, MeanField

from .amortized import Amortized, Through, amortize
from .exact import ExactPosterior, PriorGuide

__all__ = ["Amortized", "ExactPosterior", "FullCovariance", "MeanField", "PriorGuide", "Through", "amortize"]
