r"""Priors p(z): a module without input that returns a distribution of event shape [D].

| prior | p(z) |
| --- | --- |
| StandardNormal | N(z; 0, I) |
| LearnedPrior | a family without context, with learned parameters: Gaussian, mixture, flow |
| VampPrior | the guide's q(z given x), averaged over learned pseudo-inputs x |
"""

from __future__ import annotations

__all__ = ["LearnedPrior", "StandardNormal", "VampPrior"]

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from jensen.checked import checked, shown
from jensen.families import Family

from .base import origin


class StandardNormal(nn.Module):
    r"""The standard normal prior.

    .. math:: p(z) = \mathcal{N}(z; 0, I)

    Args:
        features: the number D of latent features.

    Returns:
        When called, a distribution of batch shape [] and event shape [D].

    Example:
        >>> StandardNormal(3)().sample().shape
        torch.Size([3])
    """

    loc: Tensor

    @checked
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", origin(features), persistent=False)

    def forward(self) -> TorchDistribution:
        """The distribution, in the module's precision and on its device."""
        prior: TorchDistribution = Normal(self.loc, 1.0).to_event(1)
        return prior


class LearnedPrior(nn.Module):
    r"""Any family as a prior with learned parameters, which do not depend on a context.

    .. math:: p(z) = p(z; \lambda)

    | family, built with ``context=None`` | prior |
    | --- | --- |
    | ``MeanField(D, None)`` | Gaussian with learned means and scales |
    | ``FullCovariance(D, None)`` | Gaussian with a learned covariance |
    | ``Mixture(D, None, components=10)`` | mixture of Gaussians |
    | ``MAF(D, None)``, ``NeuralSpline(D, None, coupling=True)`` | flow, log p(z) in one pass |
    | ``OneHotCategorical(C, None)``, ``BinaryVector(D, None)`` | learned probabilities |

    Training evaluates log p(z) at samples of the guide, so choose a flow with a cheap density: ``IAF`` and the
    autoregressive ``NeuralSpline`` need D passes for it.

    References:
        Dilokthanakul et al. (2016), Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders.
        https://arxiv.org/abs/1611.02648
        Chen et al. (2017), Variational Lossy Autoencoder. https://arxiv.org/abs/1611.02731

    Args:
        family: a family built with ``context=None``.
        spread: the standard deviation of the initial parameters. It must not be 0: identical components of a mixture
            would stay identical.

    Returns:
        When called, a distribution of batch shape [] and event shape [D].

    Raises:
        ValueError: if the family takes a context, has no density at values that it did not sample, or ``spread`` is not
            positive.

    Example:
        >>> from jensen.families import MAF, Gaussian, Mixture
        >>> from jensen.models import VAE
        >>> from jensen.networks import mlp
        >>> prior = LearnedPrior(Mixture(8, None, components=10))
        >>> model = VAE(mlp(8, [128]), Gaussian(64, 128), latent=8, prior=prior)
        >>> model = VAE(mlp(8, [128]), Gaussian(64, 128), latent=8, prior=LearnedPrior(MAF(8, None)))
        >>> model(n=5).shape
        torch.Size([5, 64])
    """

    @checked
    def __init__(self, family: Family, spread: float = 0.5) -> None:
        super().__init__()
        name = type(family).__name__
        if family.context is not None:
            raise ValueError(f"LearnedPrior needs a family without context: build it as {name}(..., context=None)")
        if not 0 < spread < float("inf"):
            raise ValueError(f"spread must be a positive standard deviation, but got {spread}")
        self.family = family
        self.value = nn.Parameter(spread * torch.randn(family.size))  # lambda
        try:
            with torch.no_grad():
                drawn = self()
                drawn.log_prob(drawn.sample().clone())
        except NotImplementedError as error:
            raise ValueError(
                f"a prior needs its log-density at samples of the guide, but {name} has it only at its own samples: "
                "use MAF, or NeuralSpline(..., coupling=True)"
            ) from error

    def forward(self) -> TorchDistribution:
        """The distribution at the current parameters."""
        return self.family.distribution(self.value)


class VampPrior(nn.Module):
    r"""Variational mixture of posteriors: the guide's q(z | x), averaged over C learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{C} \sum_{c=1}^C q(z \mid u_c)

    The best prior for the ELBO is the average of q(z | x) over the data; this prior approximates it with C terms. Build
    the encoder and the family first, and give both to the model and to the guide: the shared parameters are optimised
    once, and appear in both state dicts. Freezing the model (``fit(..., freeze=model)``) therefore also freezes the
    guide. Doubly reparameterized gradients need separate parameters and raise an error.

    References:
        Tomczak and Welling (2018), VAE with a VampPrior. https://arxiv.org/abs/1705.07120

    Args:
        posterior: a module from x, [C, *event_shape], to a distribution of batch shape [C] and event shape [D]:
            ``nn.Sequential(encoder, family)``.
        pseudo_inputs: initial pseudo-inputs, [C, *event_shape]: a few data points (they are copied), or noise.

    Returns:
        When called, a distribution of batch shape [] and event shape [D].

    Raises:
        ValueError: if the posterior's batch shape is not [C], or it has no density at values that it did not sample.

    Example:
        >>> from jensen.families import FullCovariance, Gaussian
        >>> from jensen.guides import Amortized
        >>> from jensen.models import VAE
        >>> from jensen.networks import mlp
        >>> x = torch.randn(100, 64)
        >>> encoder, family = mlp(64, [128]), FullCovariance(8, context=128)
        >>> prior = VampPrior(nn.Sequential(encoder, family), x[:20])
        >>> model = VAE(mlp(8, [128]), Gaussian(64, 128), latent=8, prior=prior)
        >>> guide = Amortized(encoder, {"z": family})
        >>> model(n=5).shape
        torch.Size([5, 64])
    """

    @checked
    def __init__(self, posterior: nn.Module, pseudo_inputs: Tensor) -> None:
        if not pseudo_inputs.is_floating_point() or not pseudo_inputs.isfinite().all():
            raise ValueError(
                "pseudo_inputs must be finite floating-point numbers, because they are trained, but got "
                f"{pseudo_inputs.dtype}{', NaN or infinity' if pseudo_inputs.is_floating_point() else ''}"
            )
        super().__init__()
        self.posterior = posterior
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())  # [C, *event_shape]
        try:
            with torch.no_grad():
                components = self.posterior(self.pseudo_inputs)
                components.log_prob(components.sample().clone())
        except AttributeError as error:
            raise TypeError(
                "posterior must be a module that returns a distribution of the latents, such as "
                f"nn.Sequential(encoder, family), but with pseudo_inputs it returned {shown(components)}"
            ) from error
        except NotImplementedError as error:
            raise ValueError(
                "a prior needs its log-density at samples of the guide for other data points, but this posterior has "
                "it only at its own samples: use a family with an inverse"
            ) from error
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"posterior cannot be called with the pseudo_inputs, {shown(pseudo_inputs)}; give them the shape and "
                f"type of the data: {str(error).splitlines()[0]}"
            ) from error
        if components.batch_shape != (C := pseudo_inputs.shape[:1]):
            raise ValueError(
                f"the posterior of {len(pseudo_inputs)} pseudo-inputs must have batch shape {tuple(C)}, but it has "
                f"{tuple(components.batch_shape)}: give pseudo_inputs as [C, *event_shape], like data"
            )

    def forward(self) -> TorchDistribution:
        """The mixture at the current parameters."""
        components = self.posterior(self.pseudo_inputs)  # [C], event [D]
        weights = Categorical(logits=self.pseudo_inputs.new_zeros(len(self.pseudo_inputs)))
        return _Mixture(weights, components)


class _Mixture(MixtureSameFamily):  # type: ignore[misc]
    """A mixture with the support of its components, for which ``biject_to`` is registered."""

    @property
    def support(self) -> Constraint:
        support: Constraint = self.component_distribution.support
        return support
