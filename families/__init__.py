"""Families of conditional distributions: a module that turns a context [..., H] into a Pyro distribution.

``family(h)`` has ``batch_shape == h.shape[:-1]`` and ``event_shape == (features,)``. No Pyro effect happens here.
Guides use families for q(z | x), models for p(x | z).
"""

from .base import Family
from .discrete import Bernoulli
from .gaussian import FullCovariance, Gaussian, MeanField

__all__ = ["Bernoulli", "Family", "FullCovariance", "Gaussian", "MeanField"]
