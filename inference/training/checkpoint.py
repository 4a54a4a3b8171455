"""What a checkpoint holds: the state of a training run, and the way from it to a pair's parameters."""

from __future__ import annotations

__all__ = ["MakeScheduler", "Run", "restore"]

import os
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from jensen.checked import checked
from jensen.kernel.parameters import own_modules, owners_of
from jensen.kernel.weights import Program
from jensen.results.files import read_checkpoint, write_checkpoint

from .history import History

MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Run:
    """The state of a training run: what a checkpoint holds, and a way back to earlier parameters.

    Args:
        model: one half of the pair.
        guide: the other half.
        trained: the parameters that the run moves.
        optimizer: of ``trained``.
        scheduler: called with the optimizer, or None.
        history: what happened so far; :meth:`load` fills it in place.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        trained: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: MakeScheduler | None,
        history: History,
    ) -> None:
        self.model, self.guide = model, guide
        self.trained, self.optimizer, self.history = trained, optimizer, history
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        self.best: list[Tensor] | None = None
        self.configuration: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.buffers = [buffer for module in owners_of(model, guide) for buffer in module.buffers()]
        self._known = set(trained)

    def adopt(self, parameters: Iterable[nn.Parameter]) -> None:
        """Train these parameters too, if they are new, as the optimizer's first group: schedulers move its rates."""
        for p in parameters:
            if p not in self._known:
                self._known.add(p)
                self.trained.append(p)
                self.optimizer.param_groups[0]["params"].append(p)

    def names(self) -> list[str]:
        """A name and shape for each trained parameter, the same in every process."""
        known, store = _named(self.model, self.guide), pyro.get_param_store()
        return [f"{known.get(id(p)) or store.param_name(p)} {list(p.shape)}" for p in self.trained]

    def snapshot(self) -> list[Tensor]:
        """A copy of the buffers and the trained parameters."""
        return [p.detach().clone() for p in [*self.buffers, *self.trained]]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Write a snapshot back, in place."""
        for p, value in zip(
            [*self.buffers, *self.trained], values, strict=False
        ):  # parameters made since stay as they are
            p.copy_(value)

    def _with_buffers(self, values: list[Tensor]) -> list[Tensor]:
        """A snapshot of 0.1.0, which lacks buffers of modules that functions hold: these as they are."""
        given = len(values) - len(self.trained)
        return [*values[:given], *(buffer.detach().clone() for buffer in self.buffers[given:]), *values[given:]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint."""
        write_checkpoint(
            path,
            {
                "names": self.names(),
                "parameters": self.snapshot(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "history": self.history.to_dict(),
                "settings": {**self.settings, "configuration": self.configuration},
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        )

    def load(self, path: str | os.PathLike[str], state: dict[str, Any]) -> None:
        """Go on from the contents of a checkpoint: parameters, optimizer, random stream, history.

        Raises:
            ValueError: if it is of another pair, or was begun with other data or settings.
        """
        saved, own = state["names"], self.names()
        if saved != own:
            raise ValueError(
                f"{path} is a checkpoint of another pair: only it has {sorted(set(saved) - set(own))}, only this pair "
                f"has {sorted(set(own) - set(saved))}; build the pair as it was, or start without resume"
            )
        values = self._with_buffers(state["parameters"])
        shapes = [list(p.shape) for p in [*self.buffers, *self.trained]]
        if (given := [list(value.shape) for value in values]) != shapes:
            raise ValueError(
                f"{path} is a checkpoint of another pair: its buffers and parameters have the shapes {given}, this "
                f"pair's {shapes}; build the pair as it was, or start without resume"
            )
        begun = state.get("settings", {}).get("configuration", {})
        if differs := {name: value for name, value in begun.items() if self.configuration.get(name) != value}:
            now = {name: self.configuration.get(name) for name in differs}
            raise ValueError(
                f"{path} was begun with {differs}, but now got {now}: go on as it was begun, or start without resume "
                "(jensen.inference.restore gives a pair the parameters of a checkpoint)"
            )
        self.restore(values)
        self.best = None if state["best"] is None else self._with_buffers(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.settings = state.get("settings", {})
        for name, value in state["history"].items():
            setattr(self.history, name, value)
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])


def _named(model: Program, guide: Program) -> dict[int, str]:
    """The names of the parameters that the pair's modules own, by the parameters' ids."""
    owners = {"model": own_modules(model), "guide": own_modules(guide)}
    modules = [(prefix, module) for prefix, modules_of in owners.items() for module in modules_of]
    return {id(p): f"{prefix}.{name}" for prefix, m in modules for name, p in m.named_parameters()}


@checked
@torch.no_grad()
def restore(model: Program, guide: Program, checkpoint: str | os.PathLike[str], *, best: bool = True) -> History:
    """Put the parameters of a checkpoint into a pair, to measure it or to draw from it.

    The file is read with ``weights_only=True``: nothing in it is run. To go on training, give it to
    :func:`~jensen.inference.fit` instead.

    Args:
        model: one half of a pair built as that of the run was.
        guide: the other half.
        checkpoint: the file that ``fit(..., checkpoint=...)`` wrote.
        best: whether to take the parameters of the best validation epoch, where the run had ``patience``; otherwise
            those of the last epoch.

    Returns:
        The :class:`~jensen.inference.History` so far.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is torn, or of another pair.

    Example:
        >>> import tempfile
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.inference import fit
        >>> from jensen.models import PPCA
        >>> model, copy = PPCA(5, latent=2), PPCA(5, latent=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/checkpoint.pt"
        ...     _ = fit(model, ExactPosterior(model), torch.randn(20, 5), epochs=2, checkpoint=file, progress=False)
        ...     history = restore(copy, ExactPosterior(copy), file)
        >>> len(history.elbo), torch.equal(copy.weight, model.weight)
        (2, True)
    """
    state = read_checkpoint(checkpoint)
    owned, names = _named(model, guide), state["names"]
    parameters = {p for module in own_modules(model, guide) for p in module.parameters()}
    own = {f"{owned[id(p)]} {list(p.shape)}": p for p in parameters}
    buffers = [buffer for module in owners_of(model, guide) for buffer in module.buffers()]
    values = state["best"] if best and state["best"] is not None else state["parameters"]
    values, given = values[-len(names) :], values[: -len(names)]
    buffers = buffers[: len(given)]  # a file of 0.1.0 lacks those of modules that functions hold
    if set(names) - set(own) or [b.shape for b in buffers] != [b.shape for b in given]:
        raise ValueError(
            f"{checkpoint} is a checkpoint of another pair: only it has {sorted(set(names) - set(own))}, only this "
            f"pair has {sorted(set(own) - set(names))}; build the pair as it was"
        )
    for target, value in zip([*buffers, *(own[name] for name in names)], [*given, *values], strict=True):
        target.copy_(value)
    return History(**state["history"])
