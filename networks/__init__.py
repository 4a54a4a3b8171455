"""Plain torch modules, [..., features] to [..., width]: any leading dimensions, no Pyro, no batch normalisation.

A network ends in its activation; the linear layer that follows belongs to the family that reads it.
"""

from .mlp import mlp
from .recurrent import recurrent

__all__ = ["mlp", "recurrent"]
