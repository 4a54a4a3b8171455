"""jensen: latent-variable models for Pyro whose likelihoods can be trusted.

A generative model p(x, z) and a guide q(z | x) are an ordinary Pyro pair. Train it with SVI, then measure it: the ELBO
beside an importance-weighted estimate of log p(x), beside the exact value where there is one.

The rooms: :mod:`jensen.models`, :mod:`jensen.guides`, :mod:`jensen.families`, :mod:`jensen.networks`,
:mod:`jensen.inference`, :mod:`jensen.datasets`, :mod:`jensen.plots`, :mod:`jensen.cli`.
"""

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'jensen' has no attribute {name!r}; its rooms are imported by name")
    from importlib.metadata import version

    return version("jensen")
