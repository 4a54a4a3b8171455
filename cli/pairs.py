"""Models, guides, likelihoods and objectives by name: one table, which all commands share.

A name stands for a class of :mod:`jensen.models`, :mod:`jensen.guides`, :mod:`jensen.families` or
:mod:`jensen.inference`; what a run folder stores is names and numbers alone.
"""

from __future__ import annotations

__all__ = [
    "DENSITIES",
    "FAMILIES",
    "LIKELIHOODS",
    "MODELS",
    "OBJECTIVES",
    "Design",
    "objective_of",
]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from jensen.families import (
    IAF,
    Bernoulli,
    ContinuousBernoulli,
    Family,
    FullCovariance,
    Gaussian,
    Laplace,
    LowRank,
    MeanField,
    Mixture,
    NegativeBinomial,
    NeuralSpline,
    OneHotCategorical,
    Poisson,
    StudentT,
    Sylvester,
)
from jensen.guides import Amortized, BottomUp, ExactPosterior, Ladder, amortize
from jensen.inference import ELBO, IWAE, Renyi
from jensen.models import PPCA, VAE, FactorAnalysis, GaussianMixtureVAE, Hierarchical, MixtureOfPPCA
from jensen.networks import mlp

from .names import suggestion

Pair = tuple[nn.Module, nn.Module]
MakeFamily = Callable[[int, int], Family]

FAMILIES: dict[str, MakeFamily] = {
    "mean-field": MeanField,
    "low-rank": partial(LowRank, rank=2),
    "full-covariance": FullCovariance,
    "student-t": StudentT,
    "mixture": Mixture,
    "iaf": IAF,
    "spline": NeuralSpline,
    "spline-coupling": partial(NeuralSpline, coupling=True),
    "sylvester-orthogonal": partial(Sylvester, kind="orthogonal"),
    "sylvester-householder": partial(Sylvester, kind="householder"),
    "sylvester-triangular": partial(Sylvester, kind="triangular"),
}
LIKELIHOODS: dict[str, MakeFamily] = {
    "bernoulli": Bernoulli,
    "gaussian": partial(Gaussian, scale="shared"),
    "gaussian-diagonal": partial(Gaussian, scale="diagonal"),
    "laplace": partial(Laplace, scale="shared"),
    "student-t": partial(StudentT, scale="shared"),
    "continuous-bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "negative-binomial": NegativeBinomial,
}
DENSITIES = ("gaussian", "gaussian-diagonal", "laplace", "student-t", "continuous-bernoulli")
OBJECTIVES: dict[str, Callable[..., ELBO | IWAE | Renyi]] = {"elbo": ELBO, "iwae": IWAE, "renyi": Renyi}


@dataclass(frozen=True)
class Design:
    """A pair in names and numbers.

    Attributes:
        model: its name.
        guide: its name.
        latent: the number of latent features; of each layer, from the data up, for a hierarchical model.
        hidden: the widths of the networks' hidden layers, for each layer of latents.
        likelihood: the name of the observation model; None where the model brings its own.
        components: the number of components of a mixture; None for other models.

    Example:
        >>> design = Design("vae", "full-covariance", (8,), ((128,),), "gaussian")
        >>> model, guide = design.build(64)
        >>> guide(model(n=5))["z"].shape
        torch.Size([5, 8])
        >>> Design.of(design.to_dict()) == design
        True
    """

    model: str
    guide: str
    latent: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    likelihood: str | None = None
    components: int | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"there is no model {self.model!r}: {suggestion(self.model, MODELS)}")
        if self.likelihood is not None and self.likelihood not in LIKELIHOODS:
            raise ValueError(f"there is no likelihood {self.likelihood!r}: {suggestion(self.likelihood, LIKELIHOODS)}")
        if not self.latent or not self.hidden or not all(self.hidden):
            raise ValueError("--latent and --hidden are one number or more, but got none")
        kind = MODELS[self.model]
        if self.guide not in kind.guides:
            homes = [name for name, other in MODELS.items() if self.guide in other.guides]
            raise ValueError(
                f"--guide {self.guide} does not serve --model {self.model}, but {' and '.join(homes)}; for "
                f"{self.model} there are {', '.join(kind.guides)}"
            )
        if len(self.latent) > 1 and not kind.layers:
            raise ValueError(
                f"--model {self.model} has one layer of latents, so --latent is one number, but got "
                f"{','.join(map(str, self.latent))}; several are for --model hierarchical"
            )
        if len(self.hidden) not in (1, len(self.latent)):
            raise ValueError(
                f"--hidden gives the widths of one network, or of one for each of the {len(self.latent)} layers of "
                f"latents (200,200/100,100), but got {len(self.hidden)}"
            )
        if self.likelihood is not None and not kind.observes:
            raise ValueError(
                f"--model {self.model} brings its own Gaussian likelihood: leave --likelihood out, or take --model vae"
            )
        if self.components is not None and not kind.mixes:
            raise ValueError(f"--components is for mixtures, but --model {self.model} is none: leave it out")
        numbers = [*self.latent, *(w for widths in self.hidden for w in widths), self.components or 1]
        if min(numbers) < 1:
            raise ValueError(f"--latent, --hidden and --components are at least 1, but got {min(numbers)}")

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Design:
        """The design that :meth:`to_dict` described."""
        hidden = tuple(tuple(widths) for widths in stored["hidden"])
        return cls(**{**stored, "latent": tuple(stored["latent"]), "hidden": hidden})

    def to_dict(self) -> dict[str, Any]:
        """Everything as names, numbers and lists."""
        return {**vars(self), "latent": list(self.latent), "hidden": [list(widths) for widths in self.hidden]}

    def build(self, features: int) -> Pair:
        """A fresh pair for data of so many features."""
        model = MODELS[self.model].make(self, features)
        return model, self._guide(model, features)

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """The widths of hidden layers for each layer of latents."""
        return self.hidden * len(self.latent) if len(self.hidden) == 1 else self.hidden

    def _guide(self, model: Any, features: int) -> nn.Module:
        if self.guide == "exact":
            return ExactPosterior(model)
        if self.guide == "bottom-up":
            return BottomUp.of_widths(features, self.latent, self.widths)
        if self.guide == "ladder":
            return Ladder.of_widths(model, features, self.widths)
        context = self.hidden[0][-1]
        encoder, family = mlp(features, self.hidden[0]), FAMILIES[self.guide]
        if "c" not in model.latents:
            return amortize(model, encoder, family, context=context)
        choices = model.latents["c"].numel()
        place = family(self.latent[0], context + choices)
        return Amortized(encoder, {"c": OneHotCategorical(choices, context), "z": place})


@dataclass(frozen=True)
class _Kind:
    """A model by name: how it is made, and what goes with it."""

    make: Callable[[Design, int], nn.Module]
    guides: tuple[str, ...] = tuple(FAMILIES)
    observes: bool = False
    layers: bool = False
    mixes: bool = False


def _vae(design: Design, features: int) -> nn.Module:
    widths = design.hidden[0][::-1]
    return VAE(mlp(design.latent[0], widths), _likelihood(design)(features, widths[-1]), design.latent[0])


def _mixture_vae(design: Design, features: int) -> nn.Module:
    D, widths = design.latent[0], design.hidden[0][::-1]
    return GaussianMixtureVAE(mlp(D, widths), _likelihood(design)(features, widths[-1]), D, design.components or 10)


def _hierarchical(design: Design, features: int) -> nn.Module:
    return Hierarchical.of_widths(features, design.latent, design.widths, _likelihood(design))


def _likelihood(design: Design) -> MakeFamily:
    return LIKELIHOODS[design.likelihood or "gaussian"]


MODELS: dict[str, _Kind] = {
    "ppca": _Kind(lambda d, n: PPCA(n, d.latent[0]), guides=(*FAMILIES, "exact")),
    "factor-analysis": _Kind(lambda d, n: FactorAnalysis(n, d.latent[0]), guides=(*FAMILIES, "exact")),
    "mixture-of-ppca": _Kind(lambda d, n: MixtureOfPPCA(n, d.latent[0], d.components or 10), mixes=True),
    "vae": _Kind(_vae, observes=True),
    "gaussian-mixture-vae": _Kind(_mixture_vae, observes=True, mixes=True),
    "hierarchical": _Kind(_hierarchical, (*FAMILIES, "bottom-up", "ladder"), observes=True, layers=True),
}


def objective_of(training: Mapping[str, Any]) -> ELBO | IWAE | Renyi:
    """The objective that a run's settings describe: ``objective``, ``particles``, ``gradient``, ``alpha``, ``beta``.

    Raises:
        ValueError: for a setting that the objective does not have.

    Example:
        >>> settings = {"objective": "iwae", "particles": 5, "gradient": "dreg", "alpha": None, "beta": None}
        >>> type(objective_of(settings)).__name__
        'IWAE'
    """
    name = training["objective"]
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}: {suggestion(name, OBJECTIVES)}")
    for option, home in (("alpha", "renyi"), ("beta", "elbo")):
        if training[option] is not None and name != home:
            raise ValueError(
                f"--{option} is a setting of --objective {home}, but the objective is {name}: leave it out"
            )
    more = {option: training[option] for option in ("alpha", "beta") if training[option] is not None}
    return OBJECTIVES[name](num_particles=training["particles"], gradient=training["gradient"], **more)
