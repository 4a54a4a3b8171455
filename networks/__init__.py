"""Plain torch modules, [..., features] to [..., width]: any leading dimensions, no Pyro, no batch normalisation.

A network ends in its activation; the linear layer that follows belongs to the family that reads it.
"""

from .conditioned import Conditioned
from .convolutional import conv_decoder, conv_encoder
from .corruption import GaussianNoise, MaskingNoise
from .mlp import gated_mlp, mlp, residual_mlp
from .recurrent import recurrent
from .tied import Transposed

__all__ = [
    "Conditioned",
    "GaussianNoise",
    "MaskingNoise",
    "Transposed",
    "conv_decoder",
    "conv_encoder",
    "gated_mlp",
    "mlp",
    "recurrent",
    "residual_mlp",
]
