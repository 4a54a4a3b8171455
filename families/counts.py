r"""Families for integers: counts without and with an upper limit, and unordered levels.

| family | probability of one feature | support |
| --- | --- | --- |
| Poisson | m^x e^-m / x! | 0, 1, 2, ... |
| NegativeBinomial | a Poisson whose mean is Gamma distributed: mean m, variance m + m^2 / r | 0, 1, 2, ... |
| Binomial | number of successes in n trials, each with probability sigmoid(l) | 0, ..., n |
| Categorical | softmax(l)_x | 0, ..., C - 1 |

Samples are integers stored in the floating-point type of the context, so that a network can take them as input. Means
are a softplus of the affine map of the context, not an exponential, which could overflow. Log-probabilities of large
counts are small differences of large numbers, and are computed in float64.
"""

from __future__ import annotations

__all__ = ["Binomial", "Categorical", "NegativeBinomial", "Poisson"]

import pyro.distributions as dist
import torch
from pyro.distributions import Independent, TorchDistribution
from torch import Size, Tensor
from torch.nn import functional as F
from torch.types import _size

from jensen.checked import checked

from .base import Family, positive
from .scaled import Scale, Scaled


class Poisson(Family):
    r"""Independent counts whose variance is their mean.

    .. math:: p(x \mid h) = \prod_d \frac{m_d^{x_d} e^{-m_d}}{x_d!}, \qquad m = \operatorname{softplus}(A h + b)

    References:
        Gopalan, Hofman and Blei (2015), Scalable Recommendation with Hierarchical Poisson Factorization.
        https://arxiv.org/abs/1311.1704

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the D parameters (0 gives the mean 1).

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Example:
        >>> import torch
        >>> Poisson(4, context=8)(torch.zeros(5, 8)).sample().shape
        torch.Size([5, 4])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None) -> None:
        super().__init__(features, context, size=_numel(features))

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., D] to independent counts."""
        mean = positive(parameters.unflatten(-1, self.event_shape))
        counts = _Poisson(mean)  # type: ignore[no-untyped-call]
        return Independent(counts, len(self.event_shape))


class _Poisson(dist.Poisson):
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, mean = value.double(), self.rate.double()
        return (x.xlogy(mean) - mean - torch.lgamma(x + 1)).to(self.rate.dtype)


class NegativeBinomial(Scaled):
    r"""Independent counts with a variance above their mean, such as gene counts of single cells.

    .. math::
        p(x \mid h) = \prod_d \frac{\Gamma(x_d + r_d)}{x_d! \, \Gamma(r_d)}
        \Big(\frac{r_d}{r_d + m_d}\Big)^{r_d} \Big(\frac{m_d}{r_d + m_d}\Big)^{x_d}, \qquad
        \mathbb{E} x = m, \quad \operatorname{var} x = m + m^2 / r

    with m = softplus(A h + b). As r grows it becomes a Poisson.

    References:
        Lopez, Regier, Cole, Jordan and Yosef (2018), Deep Generative Modeling for Single-Cell Transcriptomics.
        https://doi.org/10.1038/s41592-018-0229-2

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the parameters.
        total_count: r. A number: fixed; ``"shared"``: one learned number; ``"diagonal"``: one learned number per
            feature; ``"context"``: a function of the context.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``total_count`` is not one of these, or a number that is not positive.

    Example:
        >>> import torch
        >>> NegativeBinomial(4, context=8)(torch.zeros(5, 8)).sample().shape
        torch.Size([5, 4])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, total_count: Scale = "diagonal") -> None:
        super().__init__(features, context, total_count, name="total_count")

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Parameters [..., D], or [..., 2 D] with means before total counts, to independent counts."""
        raw, total_count = self.split(parameters)
        logits = positive(raw).log() - total_count.log()
        return Independent(_NegativeBinomial(total_count, logits=logits), len(self.event_shape))


class _NegativeBinomial(dist.NegativeBinomial):  # type: ignore[misc]
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, r, logits = value.double(), self.total_count.double(), self.logits.double()
        ways = torch.lgamma(x + r) - torch.lgamma(x + 1) - torch.lgamma(r)
        log_p: Tensor = (ways + r * F.logsigmoid(-logits) + x * F.logsigmoid(logits)).to(self.logits.dtype)
        return log_p


class Binomial(Family):
    r"""Independent numbers of successes in n trials: ordered grey levels, counts with a limit.

    .. math:: p(x \mid h) = \prod_d \binom{n}{x_d} \pi_d^{x_d} (1 - \pi_d)^{n - x_d}, \qquad \pi = \sigma(A h + b)

    References:
        Bishop (2006), Pattern Recognition and Machine Learning, section 2.1.

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the D logits.
        trials: n, the number of trials: 255 for images of 256 grey levels.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``trials`` is less than 1.

    Example:
        >>> import torch
        >>> Binomial(4, context=8, trials=255)(torch.zeros(5, 8)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, trials: int) -> None:
        if trials < 1:
            raise ValueError(f"trials must be at least 1, but got {trials}")
        super().__init__(features, context, size=_numel(features))
        self.trials = trials

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., D] to independent numbers of successes."""
        logits = parameters.unflatten(-1, self.event_shape)
        return Independent(_Binomial(logits.new_tensor(self.trials), logits=logits), len(self.event_shape))

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, trials={self.trials}"


class _Binomial(dist.Binomial):
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, n, logits = value.double(), self.total_count.double(), self.logits.double()
        ways = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        return (ways + x * F.logsigmoid(logits) + (n - x) * F.logsigmoid(-logits)).to(self.logits.dtype)


class Categorical(Family):
    r"""Independent features with C unordered levels: grey levels, amino acids, answers to a question.

    .. math:: p(x \mid h) = \prod_d \operatorname{softmax}(l_d(h))_{x_d}, \qquad x_d \in \{0, \dots, C - 1\}

    References:
        van den Oord, Kalchbrenner and Kavukcuoglu (2016), Pixel Recurrent Neural Networks, section 3.3.
        https://arxiv.org/abs/1601.06759

    Args:
        features: the number D of features, or a tuple: the shape of an image.
        context: the width H of the context, or None: h already holds the C D logits, level by level.
        levels: the number C of levels: 256 for images of 256 grey levels.

    Returns:
        When called on [..., H], a distribution of batch shape [...] and event shape [D].

    Raises:
        ValueError: if ``levels`` is less than 2.

    Example:
        >>> import torch
        >>> Categorical(4, context=8, levels=3)(torch.zeros(5, 8)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    @checked
    def __init__(self, features: int | tuple[int, ...], context: int | None, levels: int) -> None:
        if levels < 2:
            raise ValueError(f"levels must be at least 2, but got {levels}")
        super().__init__(features, context, size=levels * _numel(features))
        self.levels = levels

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """Logits [..., C D], level by level, to independent levels."""
        logits = parameters.unflatten(-1, (self.levels, *self.event_shape)).movedim(-1 - len(self.event_shape), -1)
        return Independent(_Categorical(logits=logits), len(self.event_shape))

    def extra_repr(self) -> str:
        """The arguments shown when the module is printed."""
        return f"{super().extra_repr()}, levels={self.levels}"


class _Categorical(dist.Categorical):
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        drawn: Tensor = super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return drawn.to(self.logits.dtype)


def _numel(features: int | tuple[int, ...]) -> int:
    return Size((features,) if isinstance(features, int) else features).numel()
