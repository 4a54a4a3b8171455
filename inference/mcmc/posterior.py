"""Draws from the posterior of single data: what they are, whether to trust them, how far a guide is from them."""

from __future__ import annotations

__all__ = ["MCMCConvergenceWarning", "PosteriorDraws"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jensen.kernel.batches import running
from jensen.kernel.coordinates import Coordinates
from jensen.kernel.weights import Program, terms
from jensen.results.tables import Printed, Table
from jensen.results.text import decimals, percent

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
        above: of rejection, the share of proposals where the density stood above its envelope: where it is not zero,
            draws are not quite exact.
        model: the model.
        data: the data.

    Example:
        >>> from jensen.inference import mcmc_posterior
        >>> from jensen.models import Ring
        >>> found = mcmc_posterior(Ring(), torch.ones(3, 1), method="rejection", seed=0, progress=False)
        >>> found.draws["z"].shape, found.r_hat.shape
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
    above: float
    model: Callable[..., Any]
    data: tuple[Tensor, ...]

    @property
    def converged(self) -> Tensor:
        """Whether all coordinates have R-hat of at most 1.01, an ESS of 100 for each chain, no divergence: [N]."""
        enough = (self.r_hat <= _LARGEST_R_HAT) & (self.ess >= _LEAST_ESS * self.chains)
        return enough.all(-1) & (self.divergences == 0)

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

    def guide_draws(self, guide: Program, draws: int, *, seed: int | None = None) -> Tensor:
        """Draws of a guide for the same data, in the same unconstrained coordinates: [N, M, F]."""
        with running(self.model, guide, seed=seed):
            coordinates = Coordinates(self.model, *self.data)
            values = terms(self.model, guide, *self.data, particles=draws).values
            return coordinates.free(values).transpose(0, 1).cpu()

    def advice(self) -> str:
        """What is wrong with the draws of which datum, and what to do; an empty string if nothing."""
        if bool(self.converged.all()):
            return ""
        i = int((~self.converged).nonzero()[0])
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
        per_datum = ("r_hat", "ess", "acceptance", "divergences", "seconds", "converged")
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
        above = f"the envelope of the rejection was too low at {percent(self.above)} of the proposals"
        return Table(
            f"posterior of {N} data in {F} coordinates by {self.method}: {S} draws each{chains}",
            ("datum", "R-hat, largest", "ESS, least", "accepted", "divergences", "seconds"),
            rows,
            notes=[above if self.above else "", self.advice()],
        )
