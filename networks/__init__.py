"""Plain torch modules, [..., features] to [..., width]: any leading dimensions, no Pyro, no batch normalisation.

A network ends in its activation; the linear layer that follows belongs to the family that reads it.
"""

from .conditioned import Conditioned
from .mlp import mlp

__all__ = ["Conditioned", "mlp"]
