r"""Models with discrete latents: binary vectors with an exact evidence, and a mixture of Gaussians.

| model | latent sites, in generative order | p(x) |
| --- | --- | --- |
| BinaryLatentVAE | z in {0, 1}^D | a sum over 2^D states |
| GaussianMixtureVAE | c, one of C as a one-hot vector; z in R^D | a sum over C integrals |

With ``pyro.infer.config_enumerate`` and ``pyro.infer.TraceEnum_ELBO`` the discrete sites are summed out exactly, and
the guide omits them. A guide that samples them is trained with score-function gradients.
"""

from __future__ import annotations

__all__ = ["BinaryLatentVAE", "GaussianMixtureVAE"]

import pyro
import torch
from pyro.distributions import Normal
from torch import Size, Tensor, nn

from jensen.checked import checked
from jensen.families import BinaryVector, Family, OneHotCategorical
from jensen.families.base import positive
from jensen.missing import of_observed
from jensen.module import UniqueModule

from .base import check_width, data_plate

_MOST_LATENTS = 16
_STATES = 4096  # decoded at once
_NUMBERS = 2**20  # features of x scored at once, over states and data points


class BinaryLatentVAE(UniqueModule):
    r"""A VAE with D binary latents; p(x) is an exact sum for D <= 16.

    .. math::
        z_d \sim \text{Bernoulli}(\pi_d), \qquad x \sim p(x \mid f(z)), \qquad
        p(x) = \sum_{z \in \{0, 1\}^D} p(z) \, p(x \mid f(z))

    With ``nn.Identity()`` for f and a Bernoulli likelihood it is a sigmoid belief network of two layers. The prior's
    logits are learned, and start at 0.

    References:
        Neal (1992), Connectionist Learning of Belief Networks. https://doi.org/10.1016/0004-3702(92)90065-6
        Mnih and Gregor (2014), Neural Variational Inference and Learning in Belief Networks.
        https://arxiv.org/abs/1402.0030

    Args:
        decoder: a network from [..., latent] to [..., H].
        likelihood: the family of p(x | z), with context H.
        latent: the number D of binary latents.

    Raises:
        ValueError: if ``latent`` is less than 1.

    Example:
        >>> from jensen.families import Bernoulli
        >>> from jensen.networks import mlp
        >>> model = BinaryLatentVAE(mlp(4, [16]), Bernoulli(10, 16), latent=4)
        >>> x = model(n=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 10]), torch.Size([5]))
    """

    @checked
    def __init__(self, decoder: nn.Module, likelihood: Family, latent: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = BinaryVector(latent, None)
        self.logits = nn.Parameter(torch.zeros(latent))
        self.latents = {"z": Size((latent,))}
        self.event_shape = likelihood.event_shape

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, *event_shape], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, "BinaryLatentVAE"):
            z = pyro.sample("z", self.prior(self.logits))  # [N, D]
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)  # [N, *event_shape]

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row of ``x``, in nats, by the sum over all 2^D states: [N].

        States are decoded once, in chunks, so memory does not grow with their number, except for the gradient.

        Raises:
            NotImplementedError: for more than 16 latents.
        """
        check_width(x, self.event_shape, "BinaryLatentVAE")
        D = len(self.logits)
        if D > _MOST_LATENTS:
            raise NotImplementedError(
                f"{D} binary latents have 2^{D} states; the exact sum for log p(x) takes at most {_MOST_LATENTS} "
                "latents: estimate it with evaluate"
            )
        prior = self.prior(self.logits)
        parts = []
        for states in prior.enumerate_support().split(_STATES):  # [S, D]
            likelihood = of_observed(self.likelihood(self.decoder(states.unsqueeze(1))), x)  # batch shape [S, 1]
            rows = max(1, _NUMBERS // (len(states) * self.event_shape.numel()))
            log_prior = prior.log_prob(states).unsqueeze(1)  # [S, 1]
            batches = [(log_prior + likelihood.log_prob(batch)).logsumexp(0) for batch in x.split(rows)]
            parts.append(torch.cat(batches))
        return torch.stack(parts).logsumexp(0)


class GaussianMixtureVAE(UniqueModule):
    r"""A VAE that clusters: one of C components c, a Gaussian z around the centre of c, and x from z.

    .. math::
        c \sim \text{Categorical}(\pi), \qquad z \mid c \sim \mathcal{N}(\mu_c, \operatorname{diag}(s_c)^2), \qquad
        x \sim p(x \mid f(z))

    The weights, centres and scales of the components are learned; the centres are initialised from N(0, I). A guide
    samples c and then z, or z alone if c is summed out by enumeration; p(z) is then the mixture itself.

    References:
        Jiang, Zheng, Tan, Tang and Zhou (2017), Variational Deep Embedding. https://arxiv.org/abs/1611.05148
        Dilokthanakul et al. (2016), Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders.
        https://arxiv.org/abs/1611.02648

    Args:
        decoder: a network from [..., latent] to [..., H].
        likelihood: the family of p(x | z), with context H.
        latent: the number D of features of z.
        components: the number C of clusters.

    Raises:
        ValueError: if ``latent`` or ``components`` is less than 1.

    Example:
        >>> from jensen.families import Gaussian
        >>> from jensen.networks import mlp
        >>> model = GaussianMixtureVAE(mlp(2, [16]), Gaussian(10, 16), latent=2, components=3)
        >>> model.latents
        {'c': torch.Size([3]), 'z': torch.Size([2])}
        >>> model(n=5).shape
        torch.Size([5, 10])
    """

    @checked
    def __init__(self, decoder: nn.Module, likelihood: Family, latent: int, components: int) -> None:
        if latent < 1 or components < 1:
            raise ValueError(
                f"GaussianMixtureVAE needs latent and components of at least 1, but got {latent} and {components}"
            )
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.choice = OneHotCategorical(components, None)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.raw_scale = nn.Parameter(torch.zeros(components, latent))
        self.latents = {"c": Size((components,)), "z": Size((latent,))}
        self.event_shape = likelihood.event_shape

    def forward(self, x: Tensor | None = None, *, n: int = 1) -> Tensor:
        """The Pyro model: observes ``x`` of shape [N, *event_shape], or samples ``n`` data points."""
        with data_plate(x, self.event_shape, n, "GaussianMixtureVAE"):
            c = pyro.sample("c", self.choice(self.logits))  # [N, C]
            prior = Normal(c @ self.loc, c @ positive(self.raw_scale)).to_event(1)
            z = pyro.sample("z", prior)  # [N, D]
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)  # [N, *event_shape]
