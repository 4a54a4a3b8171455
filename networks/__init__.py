"""Plain torch modules, [..., features] to [..., width]: any leading dimensions, no Pyro, no batch normalisation.

A network ends in its activation; the linear layer that follows belongs to the family that reads it.
"""

from .conditioned import Conditioned
from .corruption import GaussianNoise, MaskingNoise
from .mlp import mlp
from .tied import Transposed

__all__ = ["Conditioned", "GaussianNoise", "MaskingNoise", "Transposed", "mlp"]
