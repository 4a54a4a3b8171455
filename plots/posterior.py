r"""The posterior of one data point and samples of a guide, in two latent dimensions.

.. math:: p(z \mid x) = \frac{p(x, z)}{\int p(x, z) \, dz}

The integral is a sum over a grid. Its window is found by search: it grows where the density reaches its edge, and
shrinks to the region where the density is high.
"""

from __future__ import annotations

__all__ = ["plot_posterior"]

from collections.abc import Callable
from typing import Any, Protocol

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Size, Tensor
from torch.nn import functional as F

from jensen.checked import checked
from jensen.inference import log_joint, terms
from jensen.kernel.modes import running

from .axes import COLOURS, own_axes, styled, text_size

_MASS = (0.99, 0.9, 0.5)
_TINTS = (0.2, 0.5, 0.9)  # how much colour there is in each band, from the outermost
_COARSE, _FINE = 65, 257  # points along each side of the grids that look for the window, and that crop it
_NATS = 9.0  # below the highest density, what is still in the window
_CHUNK = 4096  # points of the grid run at once


class _HasLatents(Protocol):
    latents: dict[str, Size]

    def __call__(self, x: Tensor, /) -> Any: ...


@checked
@styled
def plot_posterior(
    model: _HasLatents,
    guide: Callable[..., Any] | None,
    x: Tensor,
    *,
    draws: int = 2000,
    points: int = 201,
    mcmc: Tensor | None = None,
    seed: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The true posterior of one data point as filled contours, with samples of the guide as points over it.

    The bands enclose 50, 90 and 99 % of the posterior's mass. The grid gives the normalizing constant, so a posterior
    that is much narrower than a cell of the grid needs more points.

    Args:
        model: a model that declares its ``latents``: one site, of event shape [2].
        guide: its guide; None draws the true posterior alone.
        x: the data point, [1, ...] or [X].
        draws: the number of samples of the guide.
        points: the number of points along each side of the grid.
        mcmc: samples of the posterior to show as well, [S, 2]: ``posterior.draws["z"][i]`` of
            :func:`~jensen.inference.mcmc_posterior`.
        seed: makes the samples repeatable and leaves the global random stream alone; None samples from that stream.
        title: above the figure.
        ax: where to draw; a new figure if None.

    Returns:
        The axes, with equal units in both directions.

    Raises:
        ValueError: for more than one data point, latents other than one site of two dimensions, or a density that is
            not finite anywhere near the origin; and on what :func:`~jensen.inference.log_weights` names.

    Example:
        >>> from jensen.guides import amortize
        >>> from jensen.inference import fit
        >>> from jensen.models import Banana
        >>> from jensen.networks import mlp
        >>> model = Banana()
        >>> guide = amortize(model, mlp(1, [16]), "mean-field", context=16)
        >>> history = fit(model, guide, model(n=500).detach(), epochs=40, lr=0.02, seed=0, progress=False)
        >>> ax = plot_posterior(model, guide, torch.tensor([[2.0]]), draws=500, seed=0)
        >>> ax.get_xlabel()
        '$z_1$'
    """
    shapes = {site: list(shape) for site, shape in model.latents.items()}
    if list(shapes.values()) != [[2]]:
        raise ValueError(f"plot_posterior needs one latent site of event shape [2], but the model has {shapes}")
    (site,) = shapes
    x = x.unsqueeze(0) if x.dim() == 1 else x
    if x.dim() < 2 or len(x) != 1:
        raise ValueError(
            f"plot_posterior needs one data point, of shape [1, ...] or [X], but got {list(x.shape)}: take x[i : i + 1]"
        )
    if points < 16:
        raise ValueError(f"points is the number of points along each side of the grid, at least 16, but got {points}")

    if mcmc is not None and (mcmc.dim() != 2 or mcmc.shape[1] != 2):
        raise ValueError(f"mcmc needs samples of shape [S, 2], but got {list(mcmc.shape)}")

    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()

    def log_density(z: Tensor) -> Tensor:
        """Log p(x, z) on a grid [S, S, 2]: [S, S]."""
        flat = z.flatten(0, 1).unsqueeze(1).to(x.device, dtype)  # [K, 1, 2]
        parts = [log_joint(model, {site: part}, x).squeeze(-1) for part in flat.split(_CHUNK)]
        return torch.cat(parts).reshape(z.shape[:-1]).double().cpu()

    with running(model, model if guide is None else guide, "plot_posterior", seed=seed):
        low, high = _window(log_density)
        grid = _grid(low, high, points)  # [S, S, 2]
        log_p = log_density(grid)
        drawn = None if guide is None else terms(model, guide, x, particles=draws).values[site]
    cell = ((high - low) / (points - 1)).prod()
    density = (log_p - log_p.logsumexp((0, 1))).exp() / cell  # [S, S]

    ax = own_axes(ax, height=3.2)
    colours = [_tint(COLOURS[0], share) for share in _TINTS]
    levels = _levels(density, float(cell))
    ax.contourf(grid[0, :, 0], grid[:, 0, 1], density, levels=levels, colors=colours)
    bands = zip(reversed(_MASS), reversed(colours), strict=True)
    handles: list[Artist] = [Patch(color=colour, label=f"{100 * mass:.0f} %") for mass, colour in bands]
    if mcmc is not None:
        known = mcmc.detach().cpu()
        ax.scatter(known[:, 0], known[:, 1], s=9, marker="+", color="black", alpha=0.6, linewidths=0.5)
        handles.append(Line2D([], [], linestyle="", marker="+", markersize=4, color="black", label="MCMC"))
    if drawn is not None:
        z = drawn.reshape(-1, 2).double().cpu()  # [K, 2]
        ax.scatter(z[:, 0], z[:, 1], s=4, color=COLOURS[1], alpha=0.4, linewidths=0)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=4, color=COLOURS[1], label="guide"))
        low, high = low.minimum(z.quantile(0.005, 0)), high.maximum(z.quantile(0.995, 0))
    centre, reach = (low + high) / 2, 0.525 * (high - low).max()  # a square, and a margin
    ax.set_xlim(float(centre[0] - reach), float(centre[0] + reach))
    ax.set_ylim(float(centre[1] - reach), float(centre[1] + reach))
    ax.set_aspect("equal")
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    ax.legend(handles=handles, title="posterior", fontsize=text_size(ax), title_fontsize=text_size(ax))
    if title:
        ax.set_title(title, fontsize=text_size(ax, 1.0))
    return ax


def _grid(low: Tensor, high: Tensor, points: int) -> Tensor:
    """A grid over the box from ``low`` [2] to ``high`` [2]; its rows are z_2, its columns z_1: [S, S, 2]."""
    z1, z2 = (torch.linspace(float(a), float(b), points, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    return torch.stack(torch.meshgrid(z1, z2, indexing="xy"), -1)


def _window(log_density: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The corners, each [2], of a box around every z whose log density is within 9 nats of the highest."""
    low, high = torch.full((2,), -10.0).double(), torch.full((2,), 10.0).double()
    for _ in range(60):
        value = log_density(_grid(low, high, _COARSE))  # [S, S]
        finite = value.isfinite()
        if not finite.any():
            raise ValueError(
                f"log p(x, z) is not finite anywhere between {low.tolist()} and {high.tolist()}: there is no posterior "
                "to draw"
            )
        top = value[finite].max()
        value = torch.where(finite, value, top - 1e6)
        size, step = high - low, (high - low) / (_COARSE - 1)
        first, last = _extent(value > top - _NATS)
        cut_low, cut_high = first == 0, last == _COARSE - 1  # the density reaches the edge: look further
        # A ridge thinner than a cell passes between the points: where it is steep beside a point, it may rise on.
        first, last = _extent(value + _highest(value) + _highest(-value) > top - _NATS)
        low, high = (
            torch.where(cut_low, low - size, low + (first - 1).clamp_min(0) * step),
            torch.where(cut_high, high + size, low + (last + 1).clamp_max(_COARSE - 1) * step),
        )
        if not (cut_low | cut_high).any() and (high - low > 0.8 * size).all():
            break
    value = log_density(_grid(low, high, _FINE))
    first, last = _extent(value > value.max() - _NATS)
    step = (high - low) / (_FINE - 1)
    return low + (first - 1) * step, low + (last + 1) * step


def _highest(value: Tensor) -> Tensor:
    """The highest value among each point [S, S] and its eight neighbours."""
    return F.max_pool2d(value[None], 3, stride=1, padding=1)[0]


def _extent(inside: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last place along z_1 and z_2 where anything of a grid [S, S] is inside: each [2]."""
    places = [side.nonzero().squeeze(-1) for side in (inside.any(0), inside.any(1))]
    return torch.stack([side[0] for side in places]), torch.stack([side[-1] for side in places])


def _levels(density: Tensor, cell: float) -> list[float]:
    """The edges of the bands: the densities above which 99, 90 and 50 % of the mass lie, and one above them all."""
    ordered = density.flatten().sort(descending=True).values
    enclosed = ordered.cumsum(0) * cell
    edges = [float(ordered[int((enclosed < share).sum())]) for share in _MASS]
    levels = [edges[0]]
    for edge in [*edges[1:], float(ordered[0])]:
        levels.append(max(edge, levels[-1] * (1 + 1e-9)))  # a flat density: edges must rise all the same
    return levels


def _tint(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white."""
    red, green, blue = to_rgb(colour)
    return 1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue)
