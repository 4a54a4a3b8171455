r"""Training: stochastic variational inference with any Pyro objective.

.. math:: \max_{\theta, \phi} \sum_n \mathbb{E}_{q_\phi(z \mid x_n)} \log \frac{p_\theta(x_n, z)}{q_\phi(z \mid x_n)}
"""

from __future__ import annotations

__all__ = ["History", "fit"]

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoint as checkpoints
from .evidence import Data, Transform, as_tensors, measuring
from .weights import Program, check_pair, log_weights, parameters_of, trained_by

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass
class History:
    """What happened in :func:`fit`, epoch by epoch.

    Attributes:
        elbo: the objective's bound on the training data (minus its loss), nats per datum, averaged over the epoch.
        validation: the ELBO of the validation data after each epoch, nats per datum; empty without validation data.
        best_epoch: with ``patience``, the epoch whose parameters were kept, counted from 1; else None.
        steps: the number of optimizer steps.
        seconds: wall-clock time.

    Example:
        >>> history = History(elbo=[-3.0, -2.0], validation=[], steps=20, seconds=0.5)
        >>> print(history)
        2 epochs, 20 steps, 0.5 s: training bound -3.000 -> -2.000 nats per datum
    """

    elbo: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    steps: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{len(self.elbo)} epochs, {self.steps} steps, {self.seconds:.1f} s"
        if self.elbo:
            text += f": training bound {self.elbo[0]:.3f} -> {self.elbo[-1]:.3f} nats per datum"
        if self.validation:
            text += f", validation {self.validation[-1]:.3f}"
        if self.best_epoch is not None:
            text += f", kept epoch {self.best_epoch} at {self.validation[self.best_epoch - 1]:.3f}"
        return text


def fit(
    model: Program,
    guide: Program,
    data: Data,
    objective: ELBO | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: MakeOptimizer = torch.optim.Adam,
    scheduler: MakeScheduler | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    batch_transform: Transform | None = None,
    freeze: nn.Module | Iterable[nn.Module] = (),
    progress: bool = True,
) -> History:
    """Train a pair by stochastic variational inference.

    One step is that of ``pyro.infer.SVI``: the objective's loss on a batch, its gradient, one update. Trained are the
    parameters of both halves where they are modules, and all that ``pyro.param`` and ``pyro.module`` make.

    References:
        Hoffman, Blei, Wang and Paisley (2013), Stochastic Variational Inference.
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.

    Args:
        model: any Pyro model, called as ``model(*batch)``.
        guide: its guide, called with the same batch.
        data: a tensor [N, ...], or a tuple of such tensors.
        objective: a Pyro objective with ``differentiable_loss``; ``Trace_ELBO()`` if None.
        epochs: passes over the data.
        batch_size: data per step; the last batch of an epoch may be smaller.
        lr: the learning rate.
        optimizer: called as ``optimizer(parameters, lr=lr)``: a class of ``torch.optim``.
        scheduler: called as ``scheduler(optimizer)``; its result is stepped after every epoch.
        validation: data like ``data``, whose ELBO is taken after every epoch (8 particles, the same draws every time).
        patience: stop after so many epochs without a better validation ELBO, and go back to the best parameters.
        seed: makes the run repeatable and leaves the user's random stream alone; None draws from that stream.
        device: where to run; modules and batches are moved there. None: where they are.
        checkpoint: a file written after every epoch, whole or not at all.
        resume: go on from ``checkpoint`` if it exists: the run ends as an uninterrupted one would.
        batch_transform: applied to the first tensor of every batch: ``torch.bernoulli`` binarizes grey images.
        freeze: modules whose parameters stay as they are: ``freeze=model`` fits the guide alone.
        progress: whether to show a progress bar.

    Returns:
        The :class:`History`.

    Raises:
        ValueError: for data that are empty, not finite or outside the support, sites that do not match, nothing to
            train, and a checkpoint of another pair.
        FloatingPointError: at the first loss that is not finite; the parameters are those of the last whole epoch.

    Example:
        >>> from jensen.families import FullCovariance
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), FullCovariance, context=16)
        >>> history = fit(model, guide, torch.randn(64, 5), epochs=2, batch_size=32, seed=0, progress=False)
        >>> len(history.elbo), history.steps
        (2, 4)
    """
    start = time.perf_counter()
    objective = Trace_ELBO() if objective is None else objective
    train = as_tensors(data)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size are at least 1, but got {epochs} and {batch_size}")
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation ELBO: give validation data too")
    if resume and checkpoint is None:
        raise ValueError("resume goes on from a checkpoint: say which file")
    if not callable(getattr(objective, "differentiable_loss", None)):
        raise TypeError(f"{type(objective).__name__} has no differentiable_loss; fit needs an objective that has one")
    frozen = [freeze] if isinstance(freeze, nn.Module) else list(freeze)
    history = History()

    with _training(model, guide, frozen, seed, device):
        batch = _batch(train, torch.arange(min(batch_size, len(train[0]))), device, batch_transform)
        fixed = {p for module in frozen for p in module.parameters()}
        trained = [p for p in parameters_of(model, guide, *batch) if p not in fixed]
        if not trained:
            raise ValueError("there is nothing to train: every parameter of the pair is frozen, or it has none")
        _check_all(model, guide, train, device, batch_transform)
        run = _Run(model, guide, trained, optimizer(trained, lr=lr), scheduler, history)
        if resume and checkpoint is not None and os.path.exists(checkpoint):
            run.load(checkpoint)
        before = history.seconds
        with tqdm(range(len(history.elbo), epochs), disable=not progress, desc="fit", unit="epoch") as bar:
            for epoch in bar:
                if run.is_over(patience):
                    break
                good = run.snapshot()
                total = 0.0
                for rows in torch.randperm(len(train[0])).split(batch_size):
                    loss = _step(run, objective, _batch(train, rows, device, batch_transform), fixed)
                    history.steps += 1
                    if not math.isfinite(loss):
                        run.restore(good)
                        raise FloatingPointError(
                            f"the loss is {loss} at step {history.steps} (epoch {epoch + 1}); the parameters are back at "
                            f"the end of epoch {epoch}; lower lr={lr:g}, or scale the data"
                        )
                    total -= loss
                history.elbo.append(total / len(train[0]))
                if run.scheduler is not None:
                    run.scheduler.step()
                if validation is not None:
                    run.validate(as_tensors(validation), batch_size, device, batch_transform, patience)
                history.seconds = before + time.perf_counter() - start
                if checkpoint is not None:
                    run.save(checkpoint)
                bar.set_postfix(elbo=f"{history.elbo[-1]:.3f}")
        if patience is not None and run.best is not None:
            run.restore(run.best)
    history.seconds = before + time.perf_counter() - start
    return history


def _step(run: _Run, objective: ELBO, batch: tuple[Tensor, ...], fixed: set[nn.Parameter]) -> float:
    """One SVI step; the loss."""
    with trained_by() as read:
        try:
            loss: Tensor = objective.differentiable_loss(run.model, run.guide, *batch)  # type: ignore[attr-defined]
        except ValueError:  # Pyro refuses distributions whose parameters are not finite
            if all(bool(p.isfinite().all()) for p in run.trained):
                raise
            return math.nan
    for p in read:  # made by pyro.param at this step for the first time
        if p not in fixed and not any(p is known for known in run.trained):
            run.trained.append(p)
            run.optimizer.add_param_group({"params": [p]})
    value = float(loss.detach())
    if math.isfinite(value):
        run.optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=run.trained)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return value


class _Run:
    """The state of a run: what a checkpoint holds."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        trained: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: MakeScheduler | None,
        history: History,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer makes a torch.optim.Optimizer, but it made a {type(optimizer).__name__}; give a class such as "
                "torch.optim.Adam (Pyro's own optimizers serve pyro.infer.SVI)"
            )
        self.model, self.guide = model, guide
        self.trained, self.optimizer, self.history = trained, optimizer, history
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        self.best: list[Tensor] | None = None

    def names(self) -> list[str]:
        """A name and shape for each trained parameter, the same in every process."""
        halves = {"model": self.model, "guide": self.guide}
        modules = {prefix: half for prefix, half in halves.items() if isinstance(half, nn.Module)}
        known = {id(p): f"{prefix}.{name}" for prefix, m in modules.items() for name, p in m.named_parameters()}
        store = pyro.get_param_store()
        return [f"{known.get(id(p)) or store.param_name(p)} {list(p.shape)}" for p in self.trained]

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for p, value in zip(self.trained, values, strict=False):  # parameters made since stay as they are
            p.copy_(value)

    def validate(
        self,
        data: tuple[Tensor, ...],
        batch_size: int,
        device: torch.device | str | None,
        batch_transform: Transform | None,
        patience: int | None,
    ) -> None:
        """Append the ELBO of the validation data to the history; keep the parameters if it is the best."""
        total = 0.0
        with measuring(self.model, self.guide, seed=0):  # the same draws after every epoch
            for rows in torch.arange(len(data[0])).split(batch_size):
                batch = _batch(data, rows, device, batch_transform)
                total += float(log_weights(self.model, self.guide, *batch, particles=8).mean(0).sum())
        values = self.history.validation
        values.append(total / len(data[0]))
        if patience is not None and values[-1] >= max(values):
            self.best, self.history.best_epoch = self.snapshot(), len(values)

    def is_over(self, patience: int | None) -> bool:
        """Whether patience has run out."""
        best = self.history.best_epoch
        return patience is not None and best is not None and len(self.history.validation) - best >= patience

    def save(self, path: str | os.PathLike[str]) -> None:
        checkpoints.write(
            path,
            {
                "names": self.names(),
                "parameters": self.snapshot(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "history": self.history.to_dict(),
                "random": torch.get_rng_state(),
            },
        )

    def load(self, path: str | os.PathLike[str]) -> None:
        state = checkpoints.read(path)
        saved, own = state["names"], self.names()
        if saved != own:
            raise ValueError(
                f"{path} is a checkpoint of another pair: only it has {sorted(set(saved) - set(own))}, only this pair has "
                f"{sorted(set(own) - set(saved))}; build the pair as it was, or start without resume"
            )
        self.restore(state["parameters"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name, value in state["history"].items():
            setattr(self.history, name, value)
        torch.set_rng_state(state["random"])


def _batch(
    data: tuple[Tensor, ...], rows: Tensor, device: torch.device | str | None, batch_transform: Transform | None
) -> tuple[Tensor, ...]:
    first, *others = (x[rows.to(x.device)].to(device or x.device) for x in data)
    return (first if batch_transform is None else batch_transform(first), *others)


def _check_all(
    model: Program,
    guide: Program,
    data: tuple[Tensor, ...],
    device: torch.device | str | None,
    batch_transform: Transform | None,
) -> None:
    """Look at every datum once before the first step."""
    with torch.random.fork_rng():
        for rows in torch.arange(len(data[0])).split(4096):
            check_pair(model, guide, *_batch(data, rows, device, batch_transform))


@contextmanager
def _training(
    model: Program, guide: Program, frozen: list[nn.Module], seed: int | None, device: torch.device | str | None
) -> Iterator[None]:
    """Training mode (evaluation mode for what is frozen), restored afterwards; a random stream of its own if seeded."""
    halves = [half for half in (model, guide) if isinstance(half, nn.Module)]
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        for module in [*halves, *frozen]:
            stack.callback(module.train, module.training)
        for module in halves:
            if device is not None:
                module.to(device)
            module.train()
        for module in frozen:
            module.eval()
        yield
