"""Synthetic data with an exact log-density, to compare a model's log p(x) with the truth.

Each function samples n data points and returns a :class:`Dataset` whose ``log_density`` is the exact log-density of the
generating process, in nats. ``seed`` fixes the process (such as its weights) and the data.
"""

from __future__ import annotations

__all__ = ["bars", "linear_dynamics", "linear_gaussian", "pinwheel"]

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from jensen.checked import checked

from .cards import cards
from .dataset import Dataset
from .densities import BarsDensity, LinearDynamicsDensity, LinearGaussianDensity, PinwheelDensity
from .places import on_cpu
from .preparation import SPLITS, Split, draw_split

_SPLIT: Split = (0.8, 0.1, 0.1)


@checked
@on_cpu
def linear_gaussian(
    n: int = 5000,
    features: int = 8,
    latent: int = 2,
    *,
    noise: float = 0.5,
    split: Split = _SPLIT,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""Data of a linear-Gaussian model: probabilistic PCA is the true model.

    .. math:: x = W z + \mu + \sigma \epsilon, \quad z, \epsilon \sim \mathcal N(0, I),
              \qquad p(x) = \mathcal N(x; \mu, W W^T + \sigma^2 I)

    with the entries of W and mu standard normal.

    References:
        Tipping and Bishop (1999), Probabilistic Principal Component Analysis.

    Args:
        n: number of data points, N.
        features: observed features X.
        latent: latent features D.
        noise: sigma.
        split: shares that sum to 1, or numbers that sum to n.
        seed: fixes W, mu, and the data.
        dtype: of the data.

    Returns:
        Data [N, X]; ``log_density`` holds W, mu and sigma as ``weight``, ``mean`` and ``noise``.

    Raises:
        ValueError: if a size is below one, or the noise not positive.

    Example:
        >>> data = linear_gaussian(1000, features=5, latent=2)
        >>> data.log_density(data.test).shape
        torch.Size([100])
    """
    _positive(n=n, features=features, latent=latent, noise=noise)
    g = torch.Generator().manual_seed(seed)
    weight, mean = _normal(g, features, latent), _normal(g, features)
    x = _normal(g, n, latent) @ weight.T + mean + noise * _normal(g, n, features)  # [N, X]
    return _dataset("linear_gaussian", x, None, LinearGaussianDensity(weight, mean, noise), split, seed, dtype)


@checked
@on_cpu
def pinwheel(
    n: int = 5000,
    arms: int = 5,
    *,
    radial: float = 0.3,
    tangential: float = 0.1,
    rate: float = 0.25,
    split: Split = _SPLIT,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""Curved clusters in the plane, the arms of a pinwheel.

    A Gaussian next to the origin is rotated to its arm k, by an angle that grows with the radius:

    .. math:: x = R\big(\tfrac{2 \pi k}{A} + r e^{|u|}\big)\, u, \quad
              u \sim \mathcal N\big((1, 0), \mathrm{diag}(\sigma_r^2, \sigma_t^2)\big)

    The rotation preserves |x| = |u|, so u can be recovered from x, and it preserves areas: the density is the mean over
    arms of the Gaussian density at u. (Johnson et al. rotate by the first coordinate of u, which is not one-to-one.)

    References:
        Johnson, Duvenaud, Wiltschko, Adams and Datta (2016), Composing Graphical Models with Neural Networks for
        Structured Representations and Fast Inference.

    Args:
        n: number of data points, N.
        arms: number of arms A.
        radial: standard deviation along an arm.
        tangential: standard deviation across it.
        rate: r, the bend of the arms.
        split: shares that sum to 1, or numbers that sum to n.
        seed: fixes the data.
        dtype: of the data.

    Returns:
        Data [N, 2]; labels are the arms.

    Raises:
        ValueError: if n, the number of arms or a standard deviation is not positive.

    Example:
        >>> data = pinwheel(1000, arms=3)
        >>> data.train.shape, data.labels["train"].unique().tolist()
        (torch.Size([800, 2]), [0, 1, 2])
    """
    _positive(n=n, arms=arms, radial=radial, tangential=tangential)
    density = PinwheelDensity(arms, radial, tangential, rate)
    g = torch.Generator().manual_seed(seed)
    arm = torch.randint(arms, (n,), generator=g)
    u = _normal(g, n, 2) * torch.tensor([radial, tangential], dtype=torch.float64) + torch.tensor([1.0, 0.0])
    return _dataset("pinwheel", density.warp(u, arm), arm, density, split, seed, dtype)


@checked
@on_cpu
def bars(
    n: int = 5000,
    size: int = 4,
    *,
    probability: float | None = None,
    flip: float = 0.02,
    split: Split = _SPLIT,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""Binary images of random horizontal and vertical bars, with randomly flipped pixels.

    .. math:: p(x) = \sum_{h, v} p(h)\, p(v) \prod_{ij} \mathrm{flip}(x_{ij}; h_i \vee v_j)

    Given the horizontal bars h the columns are independent, so 2^size terms give the sum over all 4^size images.

    References:
        Földiák (1990), Forming Sparse Representations by Local Anti-Hebbian Learning.

    Args:
        n: number of data points, N.
        size: height and width of the images, at most 12.
        probability: the probability of each bar; if None, 1 / size: on average one bar of each direction.
        flip: probability that a pixel is flipped, between 0 and 1/2.
        split: shares that sum to 1, or numbers that sum to n.
        seed: fixes the data.
        dtype: of the data.

    Returns:
        Binary data [N, size * size]; ``log_density`` is the log of their probability.

    Raises:
        ValueError: if n is below one, size not in 1 ... 12, or a probability out of its range.

    Example:
        >>> data = bars(1000, size=3)
        >>> every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 9)
        >>> round(data.log_density(every).exp().sum().item(), 12)
        1.0
    """
    _positive(n=n, size=size)
    probability = 1 / size if probability is None and size > 1 else 0.5 if probability is None else probability
    density = BarsDensity(size, probability, flip)
    g = torch.Generator().manual_seed(seed)
    horizontal, vertical = (torch.rand(n, size, generator=g, dtype=torch.float64) < probability for _ in range(2))
    picture = horizontal[:, :, None] | vertical[:, None, :]  # [N, rows, columns]
    flipped = torch.rand(n, size, size, generator=g, dtype=torch.float64) < flip
    x = (picture ^ flipped).flatten(1).double()
    data = _dataset("bars", x, None, density, split, seed, dtype)
    return replace(data, image_shape=(size, size), value_range=(0.0, 1.0), levels=2)


@checked
@on_cpu
def linear_dynamics(
    n: int = 1000,
    steps: int = 20,
    features: int = 3,
    latent: int = 2,
    *,
    decay: float = 0.9,
    noise: float = 0.5,
    split: Split = _SPLIT,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    r"""Sequences of a linear-Gaussian state space model with rotating, decaying states driven by noise.

    .. math:: z_1 \sim \mathcal N(0, I), \quad z_t = \rho Q z_{t-1} + \sqrt{1 - \rho^2}\, \eta_t, \quad
              x_t = C z_t + \sigma \epsilon_t

    with Q a random rotation and the entries of C standard normal, so that every z_t is N(0, I). The density of a
    sequence is that of its innovations, by the Kalman filter.

    References:
        Kalman (1960), A New Approach to Linear Filtering and Prediction Problems.
        Roweis and Ghahramani (1999), A Unifying Review of Linear Gaussian Models.

    Args:
        n: number of sequences, N.
        steps: their length T.
        features: observed features X.
        latent: latent features D.
        decay: rho, between 0 and 1.
        noise: sigma.
        split: shares that sum to 1, or numbers that sum to n.
        seed: fixes Q, C, and the data.
        dtype: of the data.

    Returns:
        Sequences [N, T, X]; ``log_density`` gives one number per sequence.

    Raises:
        ValueError: if a size is below one, the noise not positive, or the decay not between 0 and 1.

    Example:
        >>> data = linear_dynamics(100, steps=12)
        >>> data.train.shape, data.log_density(data.test).shape
        (torch.Size([80, 12, 3]), torch.Size([10]))
    """
    _positive(n=n, steps=steps, features=features, latent=latent, noise=noise)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, but got {decay}")
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(_normal(g, latent, latent)).Q
    density = LinearDynamicsDensity(decay * rotation, _normal(g, features, latent), math.sqrt(1 - decay**2), noise)
    z, x = _normal(g, n, latent), []
    for _ in range(steps):
        x.append(z @ density.emission.T + noise * _normal(g, n, features))
        z = z @ density.transition.T + density.drive * _normal(g, n, latent)
    return _dataset("linear_dynamics", torch.stack(x, 1), None, density, split, seed, dtype)


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, but got {value}")


def _dataset(
    name: str,
    x: Tensor,
    labels: Tensor | None,
    density: Callable[[Tensor], Tensor],
    split: Split,
    seed: int,
    dtype: torch.dtype,
) -> Dataset:
    rows = {part: torch.as_tensor(r) for part, r in draw_split(len(x), split, seed).items()}
    card = cards()[name]
    return Dataset(
        name=name,
        train=x[rows["train"]].to(dtype),
        validation=x[rows["validation"]].to(dtype),
        test=x[rows["test"]].to(dtype),
        labels={} if labels is None else {part: labels[rows[part]] for part in SPLITS},
        image_shape=None,
        value_range=None,
        levels=None,
        dequantized=False,
        licence=card.licence,
        citation=card.citation,
        log_density=density,
    )
