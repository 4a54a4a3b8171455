r"""Draws from the posterior of a few data by Markov chain Monte Carlo, with the parameters as they are.

.. math:: p(z \mid x_n) \propto p(x_n, z), \qquad z = t(u), \qquad U(u) = -\log p(x_n, t(u)) - \log |\det t'(u)|

Pyro's kernels move one u in R^F, with one accept decision, at the potential U; so each datum has chains of its own.
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
    """Chains that do not agree, or whose draws are worth too little: more of them, or another method.

    Example:
        >>> issubclass(MCMCConvergenceWarning, UserWarning)
        True
    """


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorDraws(Printed):
    """What :func:`~jensen.inference.mcmc_posterior` drew from p(z | x) of each of N data: S draws, chain after chain.

    Attributes:
        draws: for each latent site [N, S, *event].
        unconstrained: the same as coordinates in all of R^F, the sites one after the other: [N, S, F].
        names: what the F coordinates are called.
        r_hat: rank-normalized split R-hat of each coordinate, float64 [N, F].
        ess: effective sample size of each coordinate, float64 [N, F].
        acceptance: the share of transitions that moved; of rejection, of proposals that were kept: float64 [N].
        divergences: transitions after the warmup whose energy broke down, int64 [N].
        seconds: what each datum took; of rejection, an equal share: float64 [N].
        method: ``"nuts"``, ``"hmc"``, ``"random_walk"`` or ``"rejection"``.
        chains: C; 1 for rejection, whose draws are independent.
        warmup: transitions of each chain before those that count.
        above: of rejection, the share of proposals where the density stood above its envelope, float64 [N]: where it
            is not zero, draws come from a density that is cut off, and the datum is not ``converged``. Else zeros.
        model: the model.
        data: the data.
        route: the way that many values are run side by side: ``"outer plate"``, say.

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
        """Whether all coordinates have R-hat of at most 1.01, an ESS of 100 for each chain, no divergence: [N].

        Of rejection, whether the envelope held at every proposal, too.
        """
        enough = (self.r_hat <= _LARGEST_R_HAT) & (self.ess >= _LEAST_ESS * self.chains)
        return enough.all(-1) & (self.divergences == 0) & (self.above == 0)

    def distance(self, guide: Program, *, draws: int | None = None, seed: int | None = None) -> GuideDistance:
        """How far a guide is from these draws, per datum.

        Args:
            guide: a guide of the model, called with the same data.
            draws: how many draws of the guide, at least 2; None takes as many as there are of the posterior.
            seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.

        Returns:
            The :class:`~jensen.inference.GuideDistance`.

        Raises:
            ValueError: for fewer than two draws, and on what :func:`~jensen.inference.log_weights` names.
        """
        N, S, F = self.unconstrained.shape
        draws = S if draws is None else draws
        if draws < 2:
            raise ValueError(f"draws is the number of draws from the guide, at least 2, but got {draws}")
        v = self.guide_draws(guide, draws, seed=seed)
        chains = self.unconstrained.reshape(N, self.chains, -1, F)
        return measure_distance(chains, v, self.ess, self.names)

    @checked
    def guide_draws(self, guide: Program, draws: int, *, seed: int | None = None) -> Tensor:
        """Draws of a guide for the same data, in the same unconstrained coordinates: [N, M, F]."""
        with running(self.model, guide, "guide_draws", seed=seed):
            coordinates = Coordinates(self.model, *self.data)
            values = terms(self.model, guide, *self.data, particles=draws).values
            return coordinates.free(values).transpose(0, 1).cpu()

    def advice(self) -> str:
        """What is wrong with the draws of which datum, and what to do; an empty string if nothing."""
        if bool(self.converged.all()):
            return ""
        i = int((~self.converged).nonzero()[0])
        if low := int((self.above > 0).sum()):
            i = int(self.above.argmax())
            return (
                f"the draws of {low} of {len(self.above)} data are not of the posterior: the envelope of the rejection "
                f"was too low, at datum {i} at {percent(float(self.above[i]))} of the proposals, since the posterior "
                "is narrow against the cells of the grid; take method='nuts'"
            )
        bad = self.r_hat[i].nan_to_num(torch.inf)
        worst = int(bad.argmax() if float(bad.max()) > _LARGEST_R_HAT else self.ess[i].argmin())
        return (
            f"{int((~self.converged).sum())} of {len(self.converged)} data did not converge (R-hat above "
            f"{_LARGEST_R_HAT}, an ESS below {_LEAST_ESS * self.chains}, or divergences): at datum {i}, coordinate "
            f"{self.names[worst]}, R-hat is {decimals(float(self.r_hat[i, worst]))} and ESS "
            f"{decimals(float(self.ess[i, worst]), 0)}, with {int(self.divergences[i])} divergences; draw more, warm "
            "up for longer, or take another method"
        )

    def to_arviz(self) -> Any:
        """These draws as ArviZ takes them: a tree whose group ``posterior`` has an array for each latent site.

        Returns:
            An ``xarray.DataTree``; its arrays have the dimensions chain, draw, datum, and those of the site's event.

        Raises:
            ImportError: without arviz-base, which is optional.
        """
        try:
            from arviz_base import from_dict
        except ImportError as error:
            raise ImportError("to_arviz makes ArviZ's tree of draws: pip install arviz-base, or take draws") from error
        values = {
            name: z.unflatten(1, (self.chains, -1)).movedim(0, 2).cpu().numpy()  # [C, S / C, N, *event]
            for name, z in self.draws.items()
        }
        dims = {name: ["datum", *(f"{name}_{i}" for i in range(z.dim() - 2))] for name, z in self.draws.items()}
        return from_dict({"posterior": values}, dims=dims)

    def to_dict(self) -> dict[str, Any]:
        """What is known about the draws as plain numbers and lists; the draws themselves are left out."""
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
            f"posterior of {N} data in {F} coordinates by {self.method}: {S} draws each{chains}",
            ("datum", "R-hat, largest", "ESS, least", "accepted", "divergences", "seconds"),
            rows,
            notes=[self.advice()],
        )


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
    r"""Draws from p(z | x) of up to ten data of a trained model, to hold an amortized guide against.

    ``"nuts"`` needs no thought. ``"hmc"`` has one length of trajectory, about a quarter of a period in units that the
    warmup learns. ``"random_walk"`` takes steps of one size in every direction, set for an acceptance of 23 %: it needs
    many more draws, and posteriors whose coordinates are alike. ``"rejection"`` draws exactly and independently, where
    there are one or two coordinates. Chains start at draws from the prior, far apart, as R-hat needs them, and move in
    unconstrained coordinates. With up to 32 of these the warmup of NUTS and HMC learns their correlations.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler. https://arxiv.org/abs/1111.4246
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
        >>> posterior = mcmc_posterior(model, x, draws=250, warmup=100, chains=2, seed=0, progress=False)
        >>> bool((posterior.draws["z"].mean(1) - model.posterior(x).mean).abs().max() < 0.2)
        True
    """
    tensors = as_tensors(data)
    n = len(tensors[0])
    draws, warmup = _lengths(n, method, draws, warmup, chains)
    rejecting = method == "rejection"
    above = torch.zeros(n, dtype=torch.float64)
    with running(model, model, "mcmc_posterior", seed=seed, device=device):
        tensors = placed(tensors, device, batch_transform)
        runs = []
        at_once = n if rejecting else 1  # chains are run for one datum after the other
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


def _rejected(path: Path, draws: int) -> tuple[_Run, Tensor]:
    """Exact draws of all data, and how often the envelope was too low."""
    if (features := path.coordinates.features) > 2:
        raise ValueError(
            f"method='rejection' draws one or two latent coordinates, but this model has {features}: take 'nuts'"
        )
    began = time.perf_counter()
    sample = posterior_draws(path.draw(4096), path.log_joint, draws)
    n = sample.u.shape[1]
    seconds = torch.full((n,), (time.perf_counter() - began) / n, dtype=torch.float64)
    u = sample.u.transpose(0, 1).unsqueeze(1)  # [N, 1, S, F]
    return _Run(u, sample.kept.double().cpu(), torch.zeros(n, dtype=torch.long), seconds), sample.above


def _chains(
    kernel_of: Callable[[Callable[[dict[str, Tensor]], Tensor], int], MCMCKernel],
    path: Path,
    draws: int,
    warmup: int,
    chains: int,
    advance: Callable[[int], None],
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
