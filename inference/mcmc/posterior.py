r"""Samples from the posterior of a few data points by Markov chain Monte Carlo, with fixed parameters.

.. math:: p(z \mid x_n) \propto p(x_n, z), \qquad z = t(u), \qquad U(u) = -\log p(x_n, t(u)) - \log |\det t'(u)|

Pyro's kernels move one u in R^F, with one accept decision, at the potential U; so each data point has its own chains.
"""

from __future__ import annotations

__all__ = ["MCMCConvergenceWarning", "PosteriorDraws", "mcmc_posterior"]

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from pyro.infer.mcmc import HMC, NUTS, RandomWalkKernel
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.batches import Data, Device, Transform, as_tensors, placed, stream
from jensen.kernel.caller import outside
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.modes import running
from jensen.kernel.weights import Program, terms
from jensen.results.tables import Printed, Table, decimals, percent

from ..annealing.ais import Path, prior_of
from ..annealing.rejection import posterior_draws
from .chains import effective_sample_size, r_hat
from .distance import GuideDistance, measure_distance

_LARGEST_R_HAT = 1.01
_LEAST_ESS = 100  # for each chain


class MCMCConvergenceWarning(UserWarning):
    """Chains disagree, or their samples have too little information: take more samples, or another method.

    Example:
        >>> issubclass(MCMCConvergenceWarning, UserWarning)
        True
    """


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorDraws(Printed):
    """Samples of :func:`~jensen.inference.mcmc_posterior` from p(z | x): S for each of N data points, chain by chain.

    Attributes:
        draws: for each latent site [N, S, *event].
        unconstrained: the same as coordinates in all of R^F, the sites concatenated: [N, S, F].
        names: the names of the F coordinates.
        r_hat: rank-normalized split R-hat of each coordinate, float64 [N, F].
        ess: effective sample size of each coordinate, float64 [N, F].
        acceptance: the share of transitions that moved; for rejection, of proposals that were kept: float64 [N].
        divergences: divergent transitions after the warmup, int64 [N].
        seconds: the time for each data point; for rejection, an equal share: float64 [N].
        method: ``"nuts"``, ``"hmc"``, ``"random_walk"`` or ``"rejection"``.
        chains: C; 1 for rejection, whose samples are independent.
        warmup: discarded transitions at the start of each chain.
        above: for rejection, the share of proposals where the density was above its envelope, float64 [N]: if it
            is not zero, samples come from a truncated density, and the data point is not ``converged``. Else zeros.
        model: the model.
        data: the data.
        route: the method for many values at once, such as ``"outer plate"``.

    Example:
        >>> from jensen.inference import mcmc_posterior
        >>> from jensen.models import Ring
        >>> posterior = mcmc_posterior(Ring(), torch.ones(3, 1), method="rejection", seed=0, progress=False)
        >>> posterior.draws["z"].shape, posterior.r_hat.shape
        (torch.Size([3, 2000, 2]), torch.Size([3, 2]))
    """

    draws: dict[str, Tensor]
    unconstrained: Tensor
    names: tuple[str, ...]
    r_hat: Tensor
    ess: Tensor
    acceptance: Tensor
    divergences: Tensor
    seconds: Tensor
    method: str
    chains: int
    warmup: int
    above: Tensor
    model: Callable[..., Any]
    data: tuple[Tensor, ...]
    route: str = ""

    @property
    def converged(self) -> Tensor:
        """Whether all coordinates have R-hat of at most 1.01, an ESS of 100 per chain, and no divergence: [N].

        For rejection, also whether the envelope was valid at every proposal.
        """
        enough = (self.r_hat <= _LARGEST_R_HAT) & (self.ess >= _LEAST_ESS * self.chains)
        return enough.all(-1) & (self.divergences == 0) & (self.above == 0)

    def distance(self, guide: Program, *, draws: int | None = None, seed: int | None = None) -> GuideDistance:
        """The distance of a guide from these samples, per data point.

        Args:
            guide: a guide of the model, called with the same data.
            draws: the number of guide samples, at least 2; None: as many as posterior samples.
            seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.

        Returns:
            The :class:`~jensen.inference.GuideDistance`.

        Raises:
            ValueError: for fewer than two samples, and the errors of :func:`~jensen.inference.log_weights`.
        """
        N, S, F = self.unconstrained.shape
        draws = S if draws is None else draws
        if draws < 2:
            raise ValueError(f"draws is the number of samples from the guide, at least 2, but got {draws}")
        v = self.guide_draws(guide, draws, seed=seed)
        chains = self.unconstrained.reshape(N, self.chains, -1, F)
        return measure_distance(chains, v, self.ess, self.names)

    @checked
    def guide_draws(self, guide: Program, draws: int, *, seed: int | None = None) -> Tensor:
        """Samples of a guide for the same data, in the same unconstrained coordinates: [N, M, F]."""
        with running(self.model, guide, "guide_draws", seed=seed):
            coordinates = Coordinates(self.model, *self.data)
            values = terms(self.model, guide, *self.data, particles=draws).values
            return coordinates.free(values).transpose(0, 1).cpu()

    def advice(self) -> str:
        """The problem of the samples, its data point, and the remedy; an empty string if there is none."""
        if bool(self.converged.all()):
            return ""
        i = int((~self.converged).nonzero()[0])
        if low := int((self.above > 0).sum()):
            i = int(self.above.argmax())
            return (
                f"the samples of {low} of {len(self.above)} data points are not exact: the envelope of the rejection "
                f"sampling was too low, at data point {i} for {percent(float(self.above[i]))} of the proposals, since "
                "the posterior is narrow relative to the cells of the grid; use method='nuts'"
            )
        bad = self.r_hat[i].nan_to_num(torch.inf)
        worst = int(bad.argmax() if float(bad.max()) > _LARGEST_R_HAT else self.ess[i].argmin())
        return (
            f"{int((~self.converged).sum())} of {len(self.converged)} data points did not converge (R-hat above "
            f"{_LARGEST_R_HAT}, an ESS below {_LEAST_ESS * self.chains}, or divergences): at data point {i}, "
            f"coordinate {self.names[worst]}, R-hat is {decimals(float(self.r_hat[i, worst]))} and ESS "
            f"{decimals(float(self.ess[i, worst]), 0)}, with {int(self.divergences[i])} divergences; increase draws or "
            "warmup, or use another method"
        )

    def to_arviz(self) -> Any:
        """These samples in ArviZ's format: a tree whose group ``posterior`` has an array for each latent site.

        Returns:
            An ``xarray.DataTree``; its arrays have the dimensions chain, draw, datum, and those of the site's event.

        Raises:
            ImportError: without arviz-base, which is optional.
        """
        try:
            from arviz_base import from_dict
        except ImportError as error:
            raise ImportError("to_arviz needs arviz-base: pip install arviz-base, or use .draws") from error
        values = {
            name: z.unflatten(1, (self.chains, -1)).movedim(0, 2).cpu().numpy()  # [C, S / C, N, *event]
            for name, z in self.draws.items()
        }
        dims = {name: ["datum", *(f"{name}_{i}" for i in range(z.dim() - 2))] for name, z in self.draws.items()}
        return from_dict({"posterior": values}, dims=dims)

    def to_dict(self) -> dict[str, Any]:
        """The diagnostics of the samples as plain numbers and lists, without the samples."""
        per_datum = ("r_hat", "ess", "acceptance", "divergences", "seconds", "above", "converged")
        return {
            "method": self.method,
            "chains": self.chains,
            "warmup": self.warmup,
            "draws": self.unconstrained.shape[1],
            "names": list(self.names),
            "per_datum": {name: getattr(self, name).tolist() for name in per_datum},
        }

    def _table(self) -> Table:
        N, S, F = self.unconstrained.shape
        chains = f" in {self.chains} chains after a warmup of {self.warmup}" if self.method != "rejection" else ""
        rows = [
            [
                *(str(i), decimals(float(self.r_hat[i].max())), decimals(float(self.ess[i].min()), 0)),
                *(percent(float(self.acceptance[i])), str(int(self.divergences[i]))),
                decimals(float(self.seconds[i]), 1),
            ]
            for i in range(N)
        ]
        return Table(
            f"posterior of {N} data points in {F} coordinates by {self.method}: {S} samples each{chains}",
            ("data point", "R-hat, largest", "ESS, least", "accepted", "divergences", "seconds"),
            rows,
            notes=[self.advice()],
        )


Method = Literal["nuts", "hmc", "random_walk", "rejection"]
_MOST_DATA = 10
_MOST_CORRELATED = 32  # features whose correlations the kernels estimate
_TRAJECTORY = 2.2  # of a standard normal's period 2 pi; whole steps make it shorter, about a quarter
_LENGTHS = {"nuts": (500, 300), "hmc": (500, 300), "random_walk": (5000, 2000), "rejection": (500, 0)}
_STARTS = 64  # prior samples per chain, which starts at the first one with a finite density


class _Run(NamedTuple):
    """The samples of one data point, or of all at once: coordinates [N, C, S, F], and the rest per data point, [N]."""

    u: Tensor
    acceptance: Tensor
    divergences: Tensor
    seconds: Tensor


@checked
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
    r"""Samples from p(z | x) of up to ten data points of a trained model, as a reference for an amortized guide.

    ``"nuts"`` needs no settings. ``"hmc"`` has a fixed trajectory length, about a quarter of a period in units that the
    warmup estimates. ``"random_walk"`` takes steps of one size in every direction, set for an acceptance of 23 %: it
    needs many more samples, and posteriors whose coordinates have similar scales. ``"rejection"`` gives exact,
    independent samples with one or two coordinates. Chains start at samples from the prior, far apart, as R-hat
    requires, and move in unconstrained coordinates. With up to 32 of these the warmup of NUTS and HMC estimates their
    correlations.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler. https://arxiv.org/abs/1111.4246
        Neal (2011), MCMC Using Hamiltonian Dynamics.
        Roberts, Gelman and Gilks (1997), Weak Convergence and Optimal Scaling of Random Walk Metropolis Algorithms.

    Args:
        model: any Pyro model whose latent sites are continuous, called as ``model(*data)``, with one plate over its
            data around every site.
        data: a tensor [N, ...], or a tuple of such tensors, with N at most 10.
        method: ``"nuts"``, ``"hmc"``, ``"random_walk"`` or ``"rejection"``.
        draws: the number of samples per chain, at least 4; rejection makes ``chains * draws`` in total. None: 500,
            and 5000 for a random walk.
        warmup: transitions before those, at least 1, that set step sizes and scales; not used by rejection. None: 300,
            and 2000 for a random walk.
        chains: the number C of chains per data point, run one after the other.
        seed: makes the samples reproducible, with a random stream of its own; None uses the user's stream.
        batch_transform: applied to the first tensor, once, as in :func:`~jensen.inference.evaluate`.
        device: where to run; modules and data are moved there. None: no move.
        progress: whether to show a progress bar.

    Returns:
        The :class:`~jensen.inference.PosteriorDraws`.

    Raises:
        ValueError: for more than ten data points, invalid settings, a discrete latent site, rejection with more
            than two coordinates, and the errors of :func:`~jensen.inference.ais`.
        FloatingPointError: if log p(x, z) is not finite at any sample from the prior.

    Warns:
        MCMCConvergenceWarning: for data points with R-hat above 1.01, an effective sample size below 100 per chain, or
            divergences.

    Example:
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2).double()
        >>> x = torch.randn(1, 5).double()
        >>> posterior = mcmc_posterior(model, x, draws=250, warmup=100, chains=2, seed=0, progress=False)
        >>> bool((posterior.draws["z"].mean(1) - model.posterior(x).mean).abs().max() < 0.2)
        True
    """
    tensors = as_tensors(data)
    n = len(tensors[0])
    draws, warmup = _lengths(n, method, draws, warmup, chains)
    rejecting = method == "rejection"
    above = torch.zeros(n, dtype=torch.float64, device="cpu")
    with running(model, model, "mcmc_posterior", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        runs = []
        at_once = n if rejecting else 1  # chains are run for one data point at a time
        how: dict[str, Any] = {"at_once": at_once, "units": chains, "progress": progress, "seed": seed}
        for part in stream(model, prior_of(model), tensors, method, **how):
            path = Path(model, None, part.data, part.layout.nesting)
            if rejecting:
                run, above = _rejected(path, chains * draws)
            else:
                run = _chains(_KERNELS[method], path, draws, warmup, chains, part.advance)
            runs.append(run)
        joined = _Run(*(torch.cat(column) for column in zip(*runs, strict=True)))
        coordinates = Coordinates(model, *tensors)
        flat = joined.u.flatten(1, 2)  # [N, C S, F]
        values, _ = coordinates.values(flat.transpose(0, 1))
        sites = {name: z.movedim(coordinates.pieces[name].axis, 0) for name, z in values.items()}
    sizes = zip(coordinates.pieces, coordinates.sizes, strict=True)
    in_chains = joined.u.permute(1, 2, 0, 3)  # [C, S, N, F]
    result = PosteriorDraws(
        draws={name: z.cpu() for name, z in sites.items()},
        unconstrained=flat.cpu(),
        names=tuple(f"{name}[{i}]" if size > 1 else name for name, size in sizes for i in range(size)),
        r_hat=r_hat(in_chains).cpu(),
        ess=effective_sample_size(in_chains).cpu(),
        acceptance=joined.acceptance,
        divergences=joined.divergences,
        seconds=joined.seconds,
        method=method,
        chains=joined.u.shape[1],
        warmup=warmup,
        above=above.cpu(),
        model=model,
        data=tensors,
        route=path.way,
    )
    if advice := result.advice():
        warnings.warn(advice, MCMCConvergenceWarning, stacklevel=outside())
    return result


def _lengths(n: int, method: str, draws: int | None, warmup: int | None, chains: int) -> tuple[int, int]:
    """The numbers of samples and of warmup transitions; ValueError for invalid settings."""
    if n > _MOST_DATA:
        raise ValueError(
            f"mcmc_posterior runs chains for each data point in turn, for at most {_MOST_DATA}, but got {n}: use "
            f"data[:{_MOST_DATA}]"
        )
    if method not in get_args(Method):
        raise ValueError(f"method is one of {list(get_args(Method))}, but got {method!r}")
    usual = _LENGTHS[method]
    for name, value, least in (("draws", draws, 4), ("warmup", warmup, 1), ("chains", chains, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is at least {least}, but got {value}")
    return usual[0] if draws is None else draws, usual[1] if warmup is None or method == "rejection" else warmup


def _rejected(path: Path, draws: int) -> tuple[_Run, Tensor]:
    """Exact samples of all data points, and how often the envelope was too low."""
    if (features := path.coordinates.features) > 2:
        raise ValueError(
            f"method='rejection' samples one or two latent coordinates, but this model has {features}: use 'nuts'"
        )
    began = time.perf_counter()
    sample = posterior_draws(path.draw(4096), path.log_joint, draws)
    n = sample.u.shape[1]
    seconds = torch.full((n,), (time.perf_counter() - began) / n, dtype=torch.float64, device="cpu")
    u = sample.u.transpose(0, 1).unsqueeze(1)  # [N, 1, S, F]
    return _Run(u, sample.kept.double().cpu(), torch.zeros(n, dtype=torch.long, device="cpu"), seconds), sample.above


def _chains(
    kernel_of: Callable[[Callable[[dict[str, Tensor]], Tensor], int], MCMCKernel],
    path: Path,
    draws: int,
    warmup: int,
    chains: int,
    advance: Callable[[int], None],
) -> _Run:
    """Run the chains of one data point."""
    began = time.perf_counter()
    starts = path.draw(_STARTS * chains)
    finite = (starts.base + starts.ratio).squeeze(-1).isfinite()  # [C']
    if int(finite.sum()) < chains:
        raise FloatingPointError(
            f"log p(x, z) is finite at {int(finite.sum())} of {len(finite)} samples from the prior, which is too few "
            "to start the chains"
        )

    def potential(values: dict[str, Tensor]) -> Tensor:
        """U, infinite instead of NaN, so that no chain moves there."""
        with torch.set_grad_enabled(values["u"].requires_grad):
            u = -path.log_joint(values["u"].reshape(1, 1, -1)).squeeze()
            return torch.where(u.isnan(), torch.inf, u)

    samples, accepted, divergences = [], 0.0, 0
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
        samples.append(torch.stack(chain))
        diagnostics = kernel.diagnostics()
        accepted += float(diagnostics["acceptance rate"]) / chains
        divergences += len(diagnostics.get("divergences", ()))
        kernel.cleanup()
        advance(1)
    return _Run(
        torch.stack(samples).unsqueeze(0),
        torch.tensor([accepted], dtype=torch.float64, device="cpu"),
        torch.tensor([divergences], device="cpu"),
        torch.tensor([time.perf_counter() - began], dtype=torch.float64, device="cpu"),
    )


class _RandomWalk(RandomWalkKernel):
    """Pyro's kernel with a given potential: its own setup makes one from a model."""

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
