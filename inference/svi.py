r"""Training: stochastic variational inference with any Pyro objective.

.. math:: \max_{\theta, \phi} \sum_n \mathbb{E}_{q_\phi(z \mid x_n)} \log \frac{p_\theta(x_n, z)}{q_\phi(z \mid x_n)}
"""

from __future__ import annotations

__all__ = ["fit"]

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from tqdm import tqdm

from .checkpoint import MakeScheduler, Run
from .history import History
from .inputs import Data, Transform, as_tensors, measuring
from .weights import Program, check_pair, log_weights, parameters_of, trained_by

MakeOptimizer = Callable[..., torch.optim.Optimizer]


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
        _check_all(model, guide, train, device, batch_transform)
        trained = [p for p in parameters_of(model, guide, *batch) if p not in fixed]
        if not trained:
            raise ValueError("there is nothing to train: every parameter of the pair is frozen, or it has none")
        run = Run(model, guide, trained, optimizer(trained, lr=lr), scheduler, history)
        if resume and checkpoint is not None and os.path.exists(checkpoint):
            run.load(checkpoint)
        before = history.seconds
        with tqdm(range(len(history.elbo), epochs), disable=not progress, desc="fit", unit="epoch") as bar:
            for epoch in bar:
                best = history.best_epoch
                if patience is not None and best is not None and len(history.validation) - best >= patience:
                    break
                good = run.snapshot()
                total = 0.0
                for rows in torch.randperm(len(train[0])).split(batch_size):
                    loss = _step(run, objective, _batch(train, rows, device, batch_transform), fixed)
                    history.steps += 1
                    if not math.isfinite(loss):
                        run.restore(good)
                        raise FloatingPointError(
                            f"the loss is {loss} at step {history.steps} (epoch {epoch + 1}); the parameters are back "
                            f"at the end of epoch {epoch}; lower lr={lr:g}, or scale the data"
                        )
                    total -= loss
                history.elbo.append(total / len(train[0]))
                if run.scheduler is not None:
                    run.scheduler.step()
                if validation is not None:
                    held_out = as_tensors(validation)
                    history.validation.append(_elbo(model, guide, held_out, batch_size, device, batch_transform))
                    if patience is not None and history.validation[-1] >= max(history.validation):
                        run.best, history.best_epoch = run.snapshot(), epoch + 1
                history.seconds = before + time.perf_counter() - start
                if checkpoint is not None:
                    run.save(checkpoint)
                bar.set_postfix(elbo=f"{history.elbo[-1]:.3f}")
        if patience is not None and run.best is not None:
            run.restore(run.best)
    history.seconds = before + time.perf_counter() - start
    return history


def _step(run: Run, objective: ELBO, batch: tuple[Tensor, ...], fixed: set[nn.Parameter]) -> float:
    """One SVI step; the loss."""
    with trained_by() as read:
        try:
            loss: Tensor = objective.differentiable_loss(run.model, run.guide, *batch)  # type: ignore[attr-defined]
        except (ValueError, LinAlgError):  # distributions refuse parameters that are not finite
            if _is_finite(run, objective, batch):
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


@torch.no_grad()
def _is_finite(run: Run, objective: ELBO, batch: tuple[Tensor, ...]) -> bool:
    """Whether a loss that could not be computed would be finite without validation."""
    try:
        with pyro.validation_enabled(False):
            loss = objective.differentiable_loss(run.model, run.guide, *batch)  # type: ignore[attr-defined]
    except LinAlgError:
        return False
    return bool(torch.as_tensor(loss).isfinite())


def _elbo(
    model: Program,
    guide: Program,
    data: tuple[Tensor, ...],
    batch_size: int,
    device: torch.device | str | None,
    batch_transform: Transform | None,
) -> float:
    """The ELBO in nats per datum, from 8 particles that are the same at every call."""
    total = 0.0
    with measuring(model, guide, seed=0):
        for rows in torch.arange(len(data[0])).split(batch_size):
            batch = _batch(data, rows, device, batch_transform)
            total += float(log_weights(model, guide, *batch, particles=8).mean(0).sum())
    return total / len(data[0])


def _batch(
    data: tuple[Tensor, ...],
    rows: Tensor,
    device: torch.device | str | None,
    batch_transform: Transform | None,
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
    model: Program,
    guide: Program,
    frozen: list[nn.Module],
    seed: int | None,
    device: torch.device | str | None,
) -> Iterator[None]:
    """Training mode (evaluation mode for what is frozen), restored afterwards; a random stream of its own if seeded."""
    halves = [half for half in (model, guide) if isinstance(half, nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Encountered NaN")  # fit raises instead, and says where
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
