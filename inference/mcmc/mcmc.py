r"""The posterior of the latents of a few data by Markov chain Monte Carlo, with the parameters as they are.

.. math:: p(z \mid x_n) \propto p(x_n, z), \qquad z = t(u), \qquad U(u) = -\log p(x_n, t(u)) - \log |\det t'(u)|

Pyro's kernels move one u in R^F, with one accept decision, at the potential U; so each datum has chains of its own.
"""

from __future__ import annotations

__all__ = ["mcmc_posterior"]

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from pyro.infer.mcmc import HMC, NUTS, RandomWalkKernel
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm import tqdm

from jensen.kernel.batches import Data, Device, Transform, as_tensors, placed, running
from jensen.kernel.weights import Program

from ..annealing.ais import path_of
from ..annealing.annealing import Path
from ..annealing.rejection import posterior_draws
from .chains import effective_sample_size, r_hat
from .posterior import MCMCConvergenceWarning, PosteriorDraws

Method = Literal["nuts", "hmc", "random_walk", "rejection"]
_MOST_DATA = 10
_MOST_CORRELATED = 32  # features whose correlations the kernels learn
_TRAJECTORY = 2.2  # of the 2 pi of a standard normal's period; whole steps make it shorter, about a quarter
_LENGTHS = {"nuts": (500, 300), "hmc": (500, 300), "random_walk": (5000, 2000), "rejection": (500, 0)}
_STARTS = 64  # draws of the prior for each chain, of which it takes the first with a finite density


class _Run(NamedTuple):
    """The draws of one datum, or of all at once: coordinates [N, C, S, F], and the rest per datum, [N]."""

    u: Tensor
    acceptance: Tensor
    divergences: Tensor
    seconds: Tensor


def mcmc_posterior(
    model: Program,
    data: Data,
    *,
    method: Method = "nuts",
    draws: int | None = None,
    warmup: int | None = None,
    chains: int = 4,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    device: Device = None,
    progress: bool = True,
) -> PosteriorDraws:
    r"""Draws from p(z | x) of up to ten data of a trained model, to hold an amortized guide against.

    ``"nuts"`` needs no thought. ``"hmc"`` has one length of trajectory, about a quarter of a period in units that the
    warmup learns. ``"random_walk"`` takes steps of one size in every direction, set for an acceptance of 23 %: it needs
    many more draws, and posteriors whose coordinates are alike. ``"rejection"`` draws exactly and independently, where
    there are one or two coordinates. Chains start at draws from the prior, far apart, as R-hat needs them, and move in
    unconstrained coordinates. With up to 32 of these the warmup of NUTS and HMC learns their correlations.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler.
        Neal (2011), MCMC Using Hamiltonian Dynamics.
        Roberts, Gelman and Gilks (1997), Weak Convergence and Optimal Scaling of Random Walk Metropolis Algorithms.

    Args:
        model: any Pyro model whose latent sites are continuous, called as ``model(*data)``, with one plate over its
            data around every site.
        data: a tensor [N, ...], or a tuple of such tensors, with N at most 10.
        method: ``"nuts"``, ``"hmc"``, ``"random_walk"`` or ``"rejection"``.
        draws: how many draws of each chain count, at least 4; rejection makes ``chains * draws`` in all. None: 500,
            and 5000 of a random walk.
        warmup: transitions before those, at least 1, that set step sizes and scales; not used by rejection. None: 300,
            and 2000 of a random walk.
        chains: the number C of chains of each datum, run one after the other.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`~jensen.inference.PosteriorDraws`.

    Raises:
        ValueError: for more than ten data, settings that make no sense, a discrete latent site, rejection with more
            than two coordinates, and on what :func:`~jensen.inference.ais` names.
        FloatingPointError: if log p(x, z) is finite at no draw from the prior.

    Warns:
        MCMCConvergenceWarning: for data with R-hat above 1.01, an effective sample size below 100 for each chain, or
            divergences.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(1, 5).double()
        >>> found = mcmc_posterior(model, x, draws=250, warmup=100, chains=2, seed=0, progress=False)
        >>> bool((found.draws["z"].mean(1) - model.posterior(x).mean).abs().max() < 0.2)
        True
    """
    tensors = as_tensors(data)
    n = len(tensors[0])
    draws, warmup = _lengths(n, method, draws, warmup, chains)
    with (
        running(model, model, seed=seed, device=device),
        tqdm(total=n * chains, disable=not progress, desc=method) as bar,
    ):
        tensors = placed(tensors, device, batch_transform)
        everything = path_of(model, None, tensors)
        coordinates = everything.coordinates
        above = 0.0
        if method == "rejection":
            found, above = _rejected(everything, chains * draws)
            bar.update(n * chains)
        else:
            runs = []
            for i in range(n):
                path = path_of(model, None, tuple(x[i : i + 1] for x in tensors))
                runs.append(_chains(_KERNELS[method], path, draws, warmup, chains, bar))
            u, acceptance, divergences, seconds = (torch.cat(part) for part in zip(*runs, strict=True))
            found = _Run(u, acceptance, divergences, seconds)
        flat = found.u.flatten(1, 2)  # [N, C S, F]
        values, _ = coordinates.values(flat.transpose(0, 1))
        sites = {name: z.movedim(coordinates.pieces[name].axis, 0) for name, z in values.items()}
    sizes = zip(coordinates.pieces, coordinates.sizes, strict=True)
    in_chains = found.u.permute(1, 2, 0, 3)  # [C, S, N, F]
    result = PosteriorDraws(
        draws={name: z.cpu() for name, z in sites.items()},
        unconstrained=flat.cpu(),
        names=tuple(f"{name}[{i}]" if size > 1 else name for name, size in sizes for i in range(size)),
        r_hat=r_hat(in_chains).cpu(),
        ess=effective_sample_size(in_chains).cpu(),
        acceptance=found.acceptance,
        divergences=found.divergences,
        seconds=found.seconds,
        method=method,
        chains=found.u.shape[1],
        warmup=warmup,
        above=above,
        model=model,
        data=tensors,
    )
    if advice := result.advice():
        warnings.warn(advice, MCMCConvergenceWarning, stacklevel=2)
    return result


def _lengths(n: int, method: str, draws: int | None, warmup: int | None, chains: int) -> tuple[int, int]:
    """How many draws count and how many warm up; ValueError for settings that make no sense."""
    if n > _MOST_DATA:
        raise ValueError(
            f"mcmc_posterior runs chains for one datum after the other, for at most {_MOST_DATA}, but got {n}: take "
            f"data[:{_MOST_DATA}]"
        )
    if method not in get_args(Method):
        raise ValueError(f"method is one of {list(get_args(Method))}, but got {method!r}")
    usual = _LENGTHS[method]
    for name, value, least in (("draws", draws, 4), ("warmup", warmup, 1), ("chains", chains, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is at least {least}, but got {value}")
    return usual[0] if draws is None else draws, usual[1] if warmup is None or method == "rejection" else warmup


def _rejected(path: Path, draws: int) -> tuple[_Run, float]:
    """Exact draws of all data, and how often the envelope was too low."""
    if (features := path.coordinates.features) > 2:
        raise ValueError(
            f"method='rejection' draws one or two latent coordinates, but this model has {features}: take 'nuts'"
        )
    began = time.perf_counter()
    found = posterior_draws(path.draw(4096), path.log_joint, draws)
    n = found.u.shape[1]
    seconds = torch.full((n,), (time.perf_counter() - began) / n, dtype=torch.float64)
    u = found.u.transpose(0, 1).unsqueeze(1)  # [N, 1, S, F]
    return _Run(u, found.kept.double().cpu(), torch.zeros(n, dtype=torch.long), seconds), found.above


def _chains(
    kernel_of: Callable[[Callable[[dict[str, Tensor]], Tensor], int], MCMCKernel],
    path: Path,
    draws: int,
    warmup: int,
    chains: int,
    bar: Any,
) -> _Run:
    """Run the chains of one datum."""
    began = time.perf_counter()
    starts = path.draw(_STARTS * chains)
    finite = (starts.base + starts.ratio).squeeze(-1).isfinite()  # [C']
    if int(finite.sum()) < chains:
        raise FloatingPointError(
            f"log p(x, z) is finite at {int(finite.sum())} of {len(finite)} draws from the prior: there is nowhere to "
            "start the chains"
        )

    def potential(values: dict[str, Tensor]) -> Tensor:
        """U, infinite where it is not a number: no chain goes there."""
        with torch.set_grad_enabled(values["u"].requires_grad):
            u = -path.log_joint(values["u"].reshape(1, 1, -1)).squeeze()
            return torch.where(u.isnan(), torch.inf, u)

    found, accepted, divergences = [], 0.0, 0
    for start in starts.u[finite][:chains]:
        kernel = kernel_of(potential, path.coordinates.features)
        kernel.initial_params = {"u": start.squeeze(0)}
        kernel.setup(warmup)
        values = kernel.initial_params
        for _ in range(warmup):
            values = kernel.sample(values)
        chain = []
        for _ in range(draws):
            values = kernel.sample(values)
            chain.append(values["u"].detach())
        found.append(torch.stack(chain))
        says = kernel.diagnostics()
        accepted += float(says["acceptance rate"]) / chains
        divergences += len(says.get("divergences", ()))
        kernel.cleanup()
        bar.update()
    return _Run(
        torch.stack(found).unsqueeze(0),
        torch.tensor([accepted], dtype=torch.float64),
        torch.tensor([divergences]),
        torch.tensor([time.perf_counter() - began], dtype=torch.float64),
    )


class _RandomWalk(RandomWalkKernel):
    """Pyro's kernel, at a potential of ours: its own setup makes one from a model."""

    def __init__(self, potential: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__(model=None)
        self.potential_fn = potential

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self._warmup_steps = warmup_steps
        self._energy_last = self.potential_fn(self.initial_params)


_KERNELS: dict[str, Callable[[Callable[[dict[str, Tensor]], Tensor], int], MCMCKernel]] = {
    "nuts": lambda potential, features: NUTS(potential_fn=potential, full_mass=features <= _MOST_CORRELATED),
    "hmc": lambda potential, features: HMC(
        potential_fn=potential,
        trajectory_length=_TRAJECTORY,
        target_accept_prob=0.9,
        full_mass=features <= _MOST_CORRELATED,
    ),
    "random_walk": lambda potential, features: _RandomWalk(potential),
}
