"""jensen: latent-variable models for Pyro whose likelihoods can be trusted.

A generative model p(x, z) and a guide q(z | x) are ordinary Pyro programs. Train them with SVI, then measure them: the
ELBO, an importance-weighted estimate of log p(x), and the exact value if it is known.

The subpackages: :mod:`jensen.models`, :mod:`jensen.guides`, :mod:`jensen.families`, :mod:`jensen.networks`,
:mod:`jensen.inference`, :mod:`jensen.datasets`, :mod:`jensen.plots`, :mod:`jensen.reports`,
:mod:`jensen.cli`.

``jensen`` itself has :func:`~jensen.datasets.load`, :func:`~jensen.guides.amortize`, :func:`~jensen.inference.fit`,
:func:`~jensen.inference.evaluate` and :func:`~jensen.inference.compare`, the transformer
:class:`~jensen.imputer.Imputer`, and the subpackages as attributes. Each is imported at its first use, so
``import jensen`` is fast.

Example:
    >>> import jensen as jn
    >>> model = jn.models.VAE(jn.networks.mlp(2, [16]), jn.families.Gaussian(4, 16), latent=2)
    >>> guide = jn.amortize(model, jn.networks.mlp(4, [16]), jn.families.MeanField, context=16)
    >>> evidence = jn.evaluate(model, guide, torch.randn(10, 4), particles=50, progress=False)
    >>> len(evidence.elbo)
    10
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import cli, datasets, families, guides, inference, models, networks, plots, reports
    from .datasets import load
    from .guides import amortize
    from .imputer import Imputer
    from .inference import compare, evaluate, fit

__all__ = [
    "Imputer",
    "__version__",
    "amortize",
    "cli",
    "compare",
    "datasets",
    "evaluate",
    "families",
    "fit",
    "guides",
    "inference",
    "load",
    "models",
    "networks",
    "plots",
    "reports",
]

__version__: str

_HOMES = {
    "Imputer": "imputer",
    "amortize": "guides",
    "compare": "inference",
    "evaluate": "inference",
    "fit": "inference",
    "load": "datasets",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("jensen")
    if name not in __all__:
        raise AttributeError(
            f"module 'jensen' has no attribute {name!r}; it has {', '.join(__all__)}; all other names are in its "
            "subpackages"
        )
    home = import_module(f"jensen.{_HOMES.get(name, name)}")
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return sorted(__all__)
