"""Models, guides, likelihoods and objectives by name, for all commands.

Each name stands for a class of :mod:`jensen.models`, :mod:`jensen.guides`, :mod:`jensen.families` or
:mod:`jensen.inference`. A run folder stores only names and numbers.
"""

from __future__ import annotations

__all__ = [
    "DENSITIES",
    "FAMILIES",
    "LIKELIHOODS",
    "MODELS",
    "OBJECTIVES",
    "Design",
    "encoder_of",
    "objective_of",
]

from collections.abc import Callable, Mapping, Sequence
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
from jensen.networks import Masked, mlp

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
    """A model and its guide, described by names and numbers.

    Attributes:
        model: the name of the model.
        guide: the name of the guide.
        latent: the number of latent dimensions; for a hierarchical model one per layer, nearest to the data first.
        hidden: the widths of the hidden layers, for each layer of latents.
        likelihood: the name of the likelihood; None if the model has a fixed one.
        components: the number of mixture components; None for other models.
        masked: whether the encoder reads missing values (NaN), with the mask as an additional input.

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
    masked: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"there is no model {self.model!r}: {suggestion(self.model, MODELS)}")
        if self.likelihood is not None and self.likelihood not in LIKELIHOODS:
            raise ValueError(f"there is no likelihood {self.likelihood!r}: {suggestion(self.likelihood, LIKELIHOODS)}")
        if not self.latent or not self.hidden or not all(self.hidden):
            raise ValueError("--latent and --hidden must have at least one number, but got none")
        kind = MODELS[self.model]
        if self.guide not in kind.guides:
            homes = [name for name, other in MODELS.items() if self.guide in other.guides]
            raise ValueError(
                f"--guide {self.guide} works only with --model {' or '.join(homes)}, but got --model {self.model}; its "
                f"guides are {', '.join(kind.guides)}"
            )
        if len(self.latent) > 1 and not kind.layers:
            raise ValueError(
                f"--model {self.model} has one layer of latents, so --latent must be one number, but got "
                f"{','.join(map(str, self.latent))}; only --model hierarchical has several layers"
            )
        if len(self.hidden) not in (1, len(self.latent)):
            raise ValueError(
                f"--hidden must have one list of widths, or one for each of the {len(self.latent)} layers of "
                f"latents (such as 200,200/100,100), but got {len(self.hidden)}"
            )
        if self.likelihood is not None and not kind.observes:
            raise ValueError(
                f"--model {self.model} has a fixed Gaussian likelihood: omit --likelihood, or use --model vae"
            )
        if self.components is not None and not kind.mixes:
            raise ValueError(f"--components is only for mixtures, but --model {self.model} is not a mixture: omit it")
        numbers = [*self.latent, *(w for widths in self.hidden for w in widths), self.components or 1]
        if min(numbers) < 1:
            raise ValueError(f"--latent, --hidden and --components must be at least 1, but got {min(numbers)}")

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Design:
        """The design from the result of :meth:`to_dict`."""
        hidden = tuple(tuple(widths) for widths in stored["hidden"])
        return cls(**{**stored, "latent": tuple(stored["latent"]), "hidden": hidden})

    def to_dict(self) -> dict[str, Any]:
        """Everything as names, numbers and lists."""
        return {**vars(self), "latent": list(self.latent), "hidden": [list(widths) for widths in self.hidden]}

    def build(self, features: int) -> Pair:
        """A new model and guide for data with this number of features."""
        model = MODELS[self.model].make(self, features)
        return model, self._guide(model, features)

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """The widths of hidden layers for each layer of latents."""
        return self.hidden * len(self.latent) if len(self.hidden) == 1 else self.hidden

    def _guide(self, model: Any, features: int) -> nn.Module:
        if self.guide == "exact":
            return ExactPosterior(model)
        width = 2 * features if self.masked else features
        if self.guide == "bottom-up":
            chain = BottomUp.of_widths(width, self.latent, self.widths)
            chain.encoder = _reading(chain.encoder, features, self.masked)
            return chain
        if self.guide == "ladder":
            ladder = Ladder.of_widths(model, width, self.widths)
            ladder.networks[0] = _reading(ladder.networks[0], features, self.masked)
            return ladder
        context = self.hidden[0][-1]
        encoder, family = encoder_of(features, self.hidden[0], self.masked), FAMILIES[self.guide]
        if "c" not in model.latents:
            return amortize(model, encoder, family, context=context)
        choices = model.latents["c"].numel()
        place = family(self.latent[0], context + choices)
        return Amortized(encoder, {"c": OneHotCategorical(choices, context), "z": place})


def encoder_of(features: int, widths: Sequence[int], masked: bool) -> nn.Module:
    """A network of the data, which gets the mask as an additional input if values are missing."""
    return _reading(mlp(2 * features if masked else features, widths), features, masked)


def _reading(network: nn.Module, features: int, masked: bool) -> nn.Module:
    return Masked(network, features) if masked else network


@dataclass(frozen=True)
class _Kind:
    """How to make a model, and the options that it accepts."""

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
    """The objective from the settings ``objective``, ``particles``, ``gradient``, ``alpha`` and ``beta`` of a run.

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
            raise ValueError(f"--{option} is only for --objective {home}, but the objective is {name}: omit it")
    more = {option: training[option] for option in ("alpha", "beta") if training[option] is not None}
    return OBJECTIVES[name](num_particles=training["particles"], gradient=training["gradient"], **more)
