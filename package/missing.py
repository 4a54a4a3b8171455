r"""Missing values: NaN in an observation means "not observed", and only what was observed is scored.

.. math:: p(x_\text{obs} \mid z) = \int p(x \mid z) \, dx_\text{mis}

| distribution | its marginal |
| --- | --- |
| independent features | the sum over the observed ones |
| Gaussian, Student's t with correlated features | that of the rows and columns of the covariance that are observed |
| mixture | the mixture of the marginals of its components |
| independent features after transforms of single features | the same in the transformed values |
| any other | defined if all features of a data point are observed, or none (then log p = 0) |

What is missing is taken to be missing at random: whether a value is missing may depend on the observed values, not on
the missing ones. Otherwise the likelihood of the observed values alone is biased (Rubin 1976).
"""

from __future__ import annotations

__all__ = [
    "HoledPlate",
    "Observed",
    "as_holes",
    "draw_missing",
    "equal_values",
    "expect_holes",
    "has_holes",
    "holes_forgotten",
    "observed_only",
    "observed_root",
    "of_observed",
    "prepared",
    "same_values",
    "transforms_of",
]

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Independent,
    Transform,
    biject_to,
    constraints,
)
from torch.distributions.utils import _sum_rightmost
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.types import _size

from jensen.checked import check_tensor, checked, shown

Missing = Literal["nan"] | Tensor | None


class _State:
    """Whether data with missing values are being run: for code that is traced and cannot read values."""

    expected = False


def expect_holes(*data: Tensor) -> None:
    """Let code that cannot read its values, inside a traced graph or ``torch.vmap``, allow for NaN if data hold it."""
    _State.expected = _State.expected or any(map(has_holes, data))


def holes_forgotten() -> None:
    """Let code that cannot read its values take data as complete from now on."""
    _State.expected = False


def has_holes(x: object) -> bool:
    """Whether a tensor holds NaN; where its values cannot be read, whether the data that are being run do.

    Example:
        >>> has_holes(torch.tensor([1.0, torch.nan])), has_holes(torch.tensor([1, 2]))
        (True, False)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if get_proxy_mode() is not None:
        return _State.expected
    try:
        return bool(x.detach().sum().isnan()) and bool(x.isnan().any())  # the sum needs no copy of large data
    except RuntimeError:  # inside torch.vmap
        return _State.expected


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and equal values; NaN, a missing value, equals NaN.

    Example:
        >>> x = torch.tensor([1.0, torch.nan])
        >>> same_values(x, x.clone()), torch.equal(x, x.clone())
        (True, False)
    """
    return a.shape == b.shape and (torch.equal(a, b) or (a.is_floating_point() and bool(equal_values(a, b).all())))


def equal_values(a: Tensor, b: Tensor) -> Tensor:
    """Where values are equal, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def prepared(model: Callable[..., Any], data: Any, missing: Missing) -> tuple[Callable[..., Any], Any]:
    """A model that scores the observed values only, and data with NaN where a value of the first tensor is missing.

    Args:
        model: a Pyro model.
        data: a tensor, or a tuple of tensors.
        missing: None (nothing changes), ``"nan"``, or a Boolean mask of the first tensor.

    Raises:
        ValueError: as :func:`as_holes`, and for a mask without data.
    """
    if missing is None:
        return model, data
    if isinstance(missing, Tensor):
        if isinstance(data, tuple) and not data:
            raise ValueError(
                "missing is a mask of the first tensor of the data, but data is (): give missing='nan', and NaN in the "
                "data that the model holds"
            )
        first, *rest = data if isinstance(data, tuple) else (data,)
        check_tensor(first, "data[0]" if rest else "data")
        first = as_holes(first, missing)
        data = (first, *rest) if isinstance(data, tuple) else first
    return observed_only(model), data


def as_holes(x: Tensor, missing: Missing) -> Tensor:
    """Data with NaN where a mask is True; ``"nan"`` and None leave them as they are.

    Whole numbers become real ones, which hold NaN: those of the default precision if it represents all of them.

    Raises:
        ValueError: for a mask that is not Boolean, or of another shape than x.

    Example:
        >>> as_holes(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[False, True], [False, False]]))
        tensor([[1., nan],
                [3., 4.]])
    """
    if missing is None or isinstance(missing, str):
        return x
    if missing.dtype != torch.bool:
        raise ValueError(f"missing must be 'nan' or a Boolean mask, True where x is missing, but got {shown(missing)}")
    if missing.shape != x.shape:
        raise ValueError(
            f"missing must have the shape of the data, {list(x.shape)}, but got a mask of shape {list(missing.shape)}"
        )
    if not x.is_floating_point():
        dtype = torch.get_default_dtype()
        if x.numel() and float(x.double().abs().max()) * torch.finfo(dtype).eps > 2:
            dtype = torch.float64
        x = x.to(dtype)
    return x.masked_fill(missing.to(x.device), math.nan)


class Observed(TorchDistribution):
    r"""The distribution of the observed features: ``log_prob(x)`` is log p(x_obs), where NaN in x is missing.

    Samples are complete. With a complete x, ``log_prob`` is that of the distribution itself, bitwise identical where
    features are independent.

    Args:
        base_dist: the distribution of all features.

    Example:
        >>> from pyro.distributions import Normal
        >>> p = Observed(Normal(torch.zeros(3), 1.0).to_event(1))
        >>> x = torch.tensor([[0.5, torch.nan, 1.0], [torch.nan, torch.nan, torch.nan]])
        >>> torch.allclose(p.log_prob(x)[0], Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 1.0])).sum())
        True
        >>> float(p.log_prob(x)[1])
        0.0
        >>> p.completed(x)
        tensor([[0.5000, 0.0000, 1.0000],
                [0.0000, 0.0000, 0.0000]])
    """

    arg_constraints = {}  # noqa: RUF012

    @checked
    def __init__(self, base_dist: Distribution) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    def __getattr__(self, name: str) -> Any:  # what is not defined here is that of the distribution itself
        if name.startswith("__") or "base_dist" not in vars(self):
            raise AttributeError(name)
        return getattr(self.base_dist, name)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples have derivatives."""
        return bool(self.base_dist.has_rsample)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the support can be listed."""
        return bool(self.base_dist.has_enumerate_support)

    @property
    def support(self) -> Any:
        """The support of complete values."""
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        """The mean of all features."""
        mean: Tensor = self.base_dist.mean
        return mean

    @property
    def variance(self) -> Tensor:
        """The variance of all features."""
        variance: Tensor = self.base_dist.variance
        return variance

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """A sample of all features."""
        x: Tensor = self.base_dist.sample(Size(sample_shape))
        return x

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """A sample of all features, with derivatives."""
        x: Tensor = self.base_dist.rsample(Size(sample_shape))
        return x

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values."""
        values: Tensor = self.base_dist.enumerate_support(expand=expand)
        return values

    def expand(self, batch_shape: _size, _instance: object = None) -> Observed:
        """The same distribution with another batch shape."""
        return Observed(self.base_dist.expand(Size(batch_shape)))

    def filled(self, x: Tensor) -> Tensor:
        """``x`` with a point of the support where it is missing."""
        return torch.where(x.isnan(), _point(self.base_dist, x), x)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(x_obs) in nats, of the batch shape; NaN in ``value`` is missing.

        Raises:
            NotImplementedError: if a data point is observed in part, and the features of the distribution depend on
                each other in a way whose marginal is not known.
        """
        missing = value.isnan()
        return _score(self.base_dist, torch.where(missing, _point(self.base_dist, value), value), ~missing)

    def completed(self, x: Tensor, how: Literal["mean", "sample"] = "mean") -> Tensor:
        r"""``x`` with :math:`E[x_\text{mis} \mid x_\text{obs}]`, or a sample given x_obs, where it is missing.

        Args:
            x: values, [*sample, *batch, *event].
            how: ``"mean"`` or ``"sample"``.

        Raises:
            NotImplementedError: as for :meth:`log_prob`.
        """
        shape = torch.broadcast_shapes(x.shape, self.batch_shape + self.event_shape)
        x = x.expand(shape)
        return _complete(self.base_dist, self.filled(x), ~x.isnan(), how)

    def log_prob_each(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Log p(y_j | x_obs) of each feature alone, where x is missing and y is not; else 0.

        Args:
            x: the observed values, NaN where missing: [*sample, *batch, *event].
            y: values of the missing ones.

        Returns:
            The log-densities of single features, of the shape of values: their sum is not log p(y | x_obs) unless the
            features are independent.
        """
        shape = torch.broadcast_shapes(x.shape, y.shape, self.batch_shape + self.event_shape)
        asked = (x.isnan() & ~y.isnan()).expand(shape)
        safe = torch.where(asked, y, _point(self.base_dist, y)).expand(shape)
        x = x.expand(shape)
        return torch.where(asked, _each(self.base_dist, self.filled(x), ~x.isnan(), safe), 0.0)


def _score(fn: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Log-density of the observed entries of ``x``, which holds points of the support elsewhere: of the batch shape."""
    if isinstance(fn, Independent):
        return _sum_rightmost(_score(fn.base_dist, x, seen), fn.reinterpreted_batch_ndims)
    kind = type(fn).__name__
    if kind == "MaskedDistribution":
        masked: Tensor = scale_and_mask(_score(fn.base_dist, x, seen), mask=fn._mask)
        return masked
    if kind == "ExpandedDistribution":
        value = _score(fn.base_dist, x, seen)
        return value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape))
    if len(fn.event_shape) == 0:
        return torch.where(seen, fn.log_prob(x), 0.0)
    if (gaussian := _gaussian(fn)) is not None:
        return _marginal(*gaussian, x, seen)
    if hasattr(fn, "component_distribution"):
        parts = _score(fn.component_distribution, _beside(x, len(fn.event_shape)), _beside(seen, len(fn.event_shape)))
        mixed: Tensor = (fn.mixture_distribution.logits.log_softmax(-1) + parts).logsumexp(-1)
        return mixed
    if (chain := _entrywise(fn)) is not None:
        jacobian: Any = 0.0
        for transform in reversed(chain):
            y, x = x, transform.inv(x)
            jacobian = jacobian + torch.where(seen, transform.log_abs_det_jacobian(x, y), 0.0)
        base = fn.base_dist
        return _score(base, x, seen) - _sum_rightmost(jacobian, len(fn.event_shape))
    whole = _whole(fn, seen)
    return torch.where(whole, fn.log_prob(x), 0.0)


def _complete(fn: Any, x: Tensor, seen: Tensor, how: str) -> Tensor:
    """``x`` with a conditional mean, or a sample, at the entries that are not observed; of the shape of ``x``."""
    kind = type(fn).__name__
    if isinstance(fn, Independent) or kind in ("MaskedDistribution", "ExpandedDistribution"):
        return _complete(fn.base_dist, x, seen, how)
    if len(fn.event_shape) == 0:
        return torch.where(seen, x, _made(fn, x, how))
    if (gaussian := _gaussian(fn)) is not None:
        loc, covariance, df = gaussian
        if how == "mean" or df is None:
            start = loc if how == "mean" else _made(fn, x, how)  # a sample moved to agree with x (Matheron's rule)
            return torch.where(seen, x, start + _moved(covariance, x - start, seen))
    if hasattr(fn, "component_distribution"):
        inside, known = _beside(x, len(fn.event_shape)), _beside(seen, len(fn.event_shape))
        logits = fn.mixture_distribution.logits + _score(fn.component_distribution, inside, known)  # [..., C]
        shape = (*x.shape[: x.dim() - len(fn.event_shape)], logits.shape[-1], *fn.event_shape)
        each = _complete(fn.component_distribution, inside.expand(shape), known.expand(shape), how)
        share = logits.softmax(-1)
        if how == "sample":
            which = torch.distributions.OneHotCategorical(probs=share).sample()
            share = which.to(x.dtype)
        weighted = each * share[(..., *(None,) * len(fn.event_shape))]
        return torch.where(seen, x, weighted.sum(-1 - len(fn.event_shape)))
    if how == "sample" and (chain := _entrywise(fn)) is not None:
        for transform in reversed(chain):
            x = transform.inv(x)
        x = _complete(fn.base_dist, x, seen, how)
        for transform in chain:
            x = transform(x)
        return x
    whole = _whole(fn, seen)
    return torch.where(whole[(..., *(None,) * len(fn.event_shape))], x, _made(fn, x, how))


def _each(fn: Any, x: Tensor, seen: Tensor, y: Tensor) -> Tensor:
    """Log-density of each entry of ``y`` alone, given the observed entries of ``x``; of the shape of ``x``."""
    kind = type(fn).__name__
    if isinstance(fn, Independent) or kind in ("MaskedDistribution", "ExpandedDistribution"):
        return _each(fn.base_dist, x, seen, y)
    if len(fn.event_shape) == 0:
        value: Tensor = fn.log_prob(y)
        return value.expand(x.shape)
    if (gaussian := _gaussian(fn)) is not None and gaussian[2] is None:
        loc, covariance, _ = gaussian
        mean = loc + _moved(covariance, x - loc, seen)
        variance = _spread(covariance, seen).diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(x.dtype).tiny)
        return -0.5 * ((y - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    if hasattr(fn, "component_distribution"):
        inside, known, asked = (_beside(part, len(fn.event_shape)) for part in (x, seen, y))
        logits = fn.mixture_distribution.logits + _score(fn.component_distribution, inside, known)
        shape = (*x.shape[: x.dim() - len(fn.event_shape)], logits.shape[-1], *fn.event_shape)
        each = _each(fn.component_distribution, *(part.expand(shape) for part in (inside, known, asked)))
        mixed: Tensor = (logits.log_softmax(-1)[(..., *(None,) * len(fn.event_shape))] + each).logsumexp(
            -1 - len(fn.event_shape)
        )
        return mixed
    raise NotImplementedError(
        f"the densities of single features of {_name(fn)} given others are not known: use a likelihood with "
        "independent features, or a Gaussian"
    )


Gaussian = tuple[Tensor, Tensor, Tensor | None]


def _gaussian(fn: Any) -> Gaussian | None:
    """Location, covariance (of a Student's t: squared scale) and degrees of freedom; None for other distributions."""
    if type(fn).__name__ == "MultivariateStudentT":
        return fn.loc, fn.scale_tril @ fn.scale_tril.mT, fn.df
    return (fn.loc, fn.covariance_matrix, None) if hasattr(fn, "loc") and hasattr(fn, "covariance_matrix") else None


def observed_root(covariance: Tensor, seen: Tensor) -> Tensor:
    """The Cholesky factor of the covariance of the observed features, of the identity for the others: [..., X, X].

    Args:
        covariance: of all features, [..., X, X].
        seen: which features are observed, bool [..., X].
    """
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    root: Tensor = torch.linalg.cholesky(torch.where(both, covariance, eye))
    return root


def _marginal(loc: Tensor, covariance: Tensor, df: Tensor | None, x: Tensor, seen: Tensor) -> Tensor:
    """Log-density of the observed features of a Gaussian or a multivariate Student's t."""
    root = observed_root(covariance, seen)
    r = torch.where(seen, x - loc, 0.0)
    y = torch.linalg.solve_triangular(root, r.unsqueeze(-1), upper=False).squeeze(-1)
    distance, log_det = y.square().sum(-1), root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    count = seen.sum(-1).to(x.dtype)
    if df is None:
        gaussian: Tensor = -0.5 * (distance + count * math.log(2 * math.pi)) - log_det
        return gaussian
    normalizer = torch.lgamma((df + count) / 2) - torch.lgamma(df / 2) - count / 2 * (df.log() + math.log(math.pi))
    student: Tensor = normalizer - log_det - (df + count) / 2 * (distance / df).log1p()
    return student


def _moved(covariance: Tensor, r: Tensor, seen: Tensor) -> Tensor:
    """The mean of all features given the observed ones, relative to their own mean, at residuals r: [..., X]."""
    root = observed_root(covariance, seen)
    inner = torch.cholesky_solve(torch.where(seen, r, 0.0).unsqueeze(-1), root).squeeze(-1)
    return (covariance @ torch.where(seen, inner, 0.0).unsqueeze(-1)).squeeze(-1)


def _spread(covariance: Tensor, seen: Tensor) -> Tensor:
    """The covariance of all features given the observed ones: [..., X, X]."""
    root = observed_root(covariance, seen)
    across = torch.where(seen.unsqueeze(-1), covariance, 0.0)  # rows of the observed features
    half = torch.linalg.solve_triangular(root, across, upper=False)
    left: Tensor = covariance - half.mT @ half
    return left


def _whole(fn: Any, seen: Tensor) -> Tensor:
    """Whether a data point is observed as a whole, of the batch shape.

    Raises:
        NotImplementedError: if one is observed in part.
    """
    flat = seen.flatten(seen.dim() - len(fn.event_shape))
    whole, some = flat.all(-1), flat.any(-1)
    try:
        parts = get_proxy_mode() is None and bool((some & ~whole).any())
    except RuntimeError:  # inside torch.vmap; the same data were checked outside of it
        parts = False
    if parts:
        raise NotImplementedError(
            f"{_name(fn)} is the distribution of dependent features, and its marginal of some of them is not known: "
            "use a likelihood with independent features, a Gaussian, or data points that are observed as a whole or "
            "not at all"
        )
    return whole


def transforms_of(fn: Any) -> list[Transform]:
    """The transforms of a distribution, in order."""
    flat: list[Transform] = []
    waiting = list(fn.transforms)
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, ComposeTransform):
            waiting = [*part.parts, *waiting]
        else:
            flat.append(part)
    return flat


def _entrywise(fn: Any) -> list[Any] | None:
    """The transforms of single features of a ``TransformedDistribution``; None for any other."""
    if not hasattr(fn, "transforms"):
        return None
    flat = transforms_of(fn)
    alone = all(part.domain.event_dim == part.codomain.event_dim == 0 for part in flat)
    return flat if alone and len(fn.base_dist.event_shape) == len(fn.event_shape) else None


def _made(fn: Any, x: Tensor, how: str) -> Tensor:
    """The mean, or a sample, of the shape of ``x``."""
    if how == "mean":
        try:
            mean: Tensor = fn.mean
        except NotImplementedError as error:
            raise NotImplementedError(
                f"the mean of {_name(fn)} is not known, so its missing values cannot be imputed"
            ) from error
        if isinstance(fn, torch.distributions.Categorical):  # PyTorch's mean of it is NaN
            states = fn.enumerate_support()
            mean = (states * fn.log_prob(states).exp()).sum(0)
        return mean.expand(x.shape)
    batch = x.shape[: x.dim() - len(fn.event_shape)]
    sample: Tensor = fn.expand(batch).sample()
    return sample.to(x.dtype)


def _point(fn: Any, like: Tensor) -> Tensor:
    """A point of the support of a distribution, which broadcasts with its values."""
    kind = type(fn).__name__
    if isinstance(fn, Independent) or kind in ("MaskedDistribution", "ExpandedDistribution", "Observed"):
        return _point(fn.base_dist, like)
    if hasattr(fn, "component_distribution"):
        inner = _point(fn.component_distribution, like)
        return inner if not inner.dim() else inner.select(-1 - len(fn.event_shape), 0)
    if hasattr(fn, "transforms"):
        point = _point(fn.base_dist, like)
        if not point.dim() and any(part.domain.event_dim for part in fn.transforms):
            point = point.expand(fn.base_dist.event_shape)
        for transform in fn.transforms:
            point = transform(point)
        return point
    try:
        support = fn.support
    except NotImplementedError:
        return like.new_zeros(())
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support.is_discrete:
        if support is constraints.one_hot:
            return torch.nn.functional.one_hot(torch.zeros((), dtype=torch.long), fn.event_shape[-1]).to(like)
        return torch.as_tensor(getattr(support, "lower_bound", 0), dtype=like.dtype, device=like.device)
    if support.event_dim == 0 and support is not constraints.real:
        inside: Tensor = biject_to(support)(like.new_zeros(()))
        return inside.detach()
    if support.event_dim:
        try:
            onto = biject_to(support)
            middle: Tensor = onto(like.new_zeros(onto.inverse_shape(fn.event_shape)))
        except NotImplementedError:  # no map from the reals is known
            return like.new_zeros(())
        return middle.detach()
    return like.new_zeros(())


def _beside(x: Tensor, event_dim: int) -> Tensor:
    """Values with a dimension for the components of a mixture."""
    return x.unsqueeze(-1 - event_dim)


def _name(fn: Any) -> str:
    return type(fn).__name__.lstrip("_")


def of_observed(fn: Any, x: Tensor) -> Any:
    """The distribution that scores x: of what was observed, if values of x are missing."""
    return Observed(fn) if has_holes(x) else fn


def _observe_only(msg: Any) -> None:
    """Let an observed site score only what is not NaN."""
    if msg["is_observed"] and not site_is_subsample(msg) and has_holes(msg["value"]):
        fn = msg["fn"]
        if isinstance(fn, Distribution) and not isinstance(fn, Observed):
            _State.expected = True  # also in graphs of a model that holds its data
            msg["fn"] = Observed(fn)


class HoledPlate(pyro.plate):
    """A plate inside which observed sites score only what is not NaN."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            _observe_only(msg)
        super()._process_message(msg)


class _ObservedOnly(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        _observe_only(msg)


class _DrawMissing(Messenger):
    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] and isinstance(msg["fn"], Observed):
            msg["value"] = msg["fn"].completed(msg["value"], "sample")


def draw_missing(model: Callable[..., Any]) -> Callable[..., Any]:
    r"""Any Pyro model, whose observed sites return a sample of their missing values given the observed ones.

    .. math:: x_\text{mis} \sim p(x_\text{mis} \mid x_\text{obs}, z)

    What is scored does not change: log p(x_obs | z). Replayed against a guide, the program returns complete data;
    :func:`jensen.inference.impute` weights such samples by their importance.

    Args:
        model: a Pyro model.

    Returns:
        A Pyro model with the same arguments.

    Example:
        >>> from jensen.models import PPCA
        >>> model, x = PPCA(3, latent=1), torch.tensor([[1.0, torch.nan, 2.0]])
        >>> model(x)
        tensor([[1., nan, 2.]])
        >>> draw_missing(model)(x).isfinite().tolist()
        [[True, True, True]]
    """
    wrapped: Callable[..., Any] = _DrawMissing()(observed_only(model))
    return wrapped


def _knows(model: object) -> bool:
    """Whether a model scores what was observed by itself: the program is one of jensen's models."""
    return isinstance(model, nn.Module) and type(model).forward.__module__.startswith("jensen.models")


def _run_observed(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _ObservedOnly():
        return model(*args, **kwargs)


def observed_only(model: Callable[..., Any]) -> Callable[..., Any]:
    r"""Any Pyro model, with NaN in its observations as missing values: each site scores what was observed.

    .. math:: \log p(x_\text{obs} \mid z)

    Models of jensen do so themselves. A guide reads the same data: its encoder must accept NaN, as
    :class:`jensen.networks.Masked` does. ``fit`` and ``evaluate`` do this with ``missing="nan"``.

    References:
        Rubin (1976), Inference and Missing Data. https://doi.org/10.1093/biomet/63.3.581

    Args:
        model: a Pyro model.

    Returns:
        A Pyro model with the same arguments; a model of jensen is returned as it is.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([1.0, torch.nan])
        >>> trace = pyro.poutine.trace(observed_only(model)).get_trace(x)
        >>> trace.compute_log_prob()
        >>> trace.nodes["x"]["log_prob"].isfinite().tolist()
        [True, True]
    """
    if _knows(model):
        return model
    if isinstance(model, nn.Module):  # a method of the module: its parameters, modes and state belong to the model
        return MethodType(_run_observed, model)
    wrapped: Callable[..., Any] = _ObservedOnly()(model)
    return wrapped
