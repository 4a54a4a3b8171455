"""Neural networks, [..., features] to [..., width]: torch modules for any leading dimensions, without Pyro.

There is no batch normalisation. A network ends in its activation; the next linear layer belongs to the family that
takes its output as context.
"""

from .conditioned import Conditioned
from .convolutional import conv_decoder, conv_encoder
from .corruption import GaussianNoise, MaskingNoise
from .masked import Masked
from .mlp import gated_mlp, mlp, residual_mlp
from .recurrent import recurrent
from .tied import Transposed

__all__ = [
    "Conditioned",
    "GaussianNoise",
    "Masked",
    "MaskingNoise",
    "Transposed",
    "conv_decoder",
    "conv_encoder",
    "gated_mlp",
    "mlp",
    "recurrent",
    "residual_mlp",
]
