r"""Training: stochastic variational inference with any Pyro objective.

.. math:: \max_{\theta, \phi} \sum_n \mathbb{E}_{q_\phi(z \mid x_n)} \log \frac{p_\theta(x_n, z)}{q_\phi(z \mid x_n)}
"""

from __future__ import annotations

__all__ = ["fit"]

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from jensen.graphs.compile import Compile, check_compile
from jensen.graphs.products import product_route
from jensen.kernel.batches import Batches, Data, Device, Transform, as_tensors, check_rows, layout_on, listed
from jensen.kernel.layout import Layout
from jensen.kernel.modes import buffers_kept, modes_kept
from jensen.kernel.parameters import owners_of
from jensen.kernel.randomness import forked_rng, private_randomness
from jensen.kernel.weights import Program, check_pair, parameters_of
from jensen.results.files import read_checkpoint

from .callbacks import Callback, watched
from .checkpoint import MakeScheduler, Run
from .gradients import loss_is_finite
from .history import History
from .objectives import Objective
from .steps import BLOCK, Steps
from .validation import Validation

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
    device: Device = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    batch_transform: Transform | None = None,
    freeze: nn.Module | Iterable[nn.Module] = (),
    compile: Compile = "auto",
    callbacks: Callback | Iterable[Callback] = (),
    progress: bool = True,
) -> History:
    """Train a pair by stochastic variational inference.

    One step is that of ``pyro.infer.SVI``: the objective's loss on a batch, its gradient, one update. Trained are the
    parameters of both halves where they are modules, and all that ``pyro.param`` and ``pyro.module`` make.

    References:
        Hoffman, Blei, Wang and Paisley (2013), Stochastic Variational Inference. https://arxiv.org/abs/1206.7051
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.

    Args:
        model: any Pyro model, called as ``model(*batch)``.
        guide: its guide, called with the same batch.
        data: a tensor [N, ...], or a tuple of such tensors.
        objective: a Pyro objective with ``differentiable_loss``, or an :class:`~jensen.inference.Objective` (jensen's
            or your own), which is not changed: its knobs go by the steps of this run. ``Trace_ELBO()`` if None.
        epochs: passes over the data.
        batch_size: data per step, shuffled; the last batch of an epoch may be smaller. From N on, all data in their own
            order.
        lr: the learning rate.
        optimizer: called as ``optimizer(parameters, lr=lr)``: a class of ``torch.optim``.
        scheduler: called as ``scheduler(optimizer)``; its result is stepped after every epoch.
        validation: data like ``data``, whose ELBO, rate and distortion are taken after every epoch (8 particles, the
            same draws every time).
        patience: stop after so many epochs without a better validation ELBO, and go back to the best parameters.
        seed: makes the run repeatable and leaves the user's random stream alone; None draws from that stream.
        device: where to run; modules (which stay there) and batches are moved. None: where they are.
        checkpoint: a file written after every epoch, whole or not at all.
        resume: go on from ``checkpoint`` if it exists: the run ends as an uninterrupted one would.
        batch_transform: applied to the first tensor of every batch: ``torch.bernoulli`` binarizes grey images.
        freeze: modules whose parameters stay as they are, in evaluation mode: ``freeze=model`` fits the guide alone.
        compile: whether steps run in a compiled graph, captured from the pair once: ``"auto"`` where that pays,
            ``True`` wherever it can be done (else a warning says why not), ``False`` never. ``history.route`` says what
            was done.
        callbacks: what looks on after every epoch and is closed in the end, in this order: :class:`CSVLogger`,
            :class:`TensorBoardLogger`, or a :class:`Callback` of your own.
        progress: whether to show a progress bar.

    Returns:
        The :class:`History`.

    Raises:
        ValueError: for data that are empty, not finite or outside the support, sites that do not match, settings that
            make no sense, nothing to train, and a checkpoint that is torn or of another pair.
        TypeError: for an objective, optimizer or callback that does not serve, and data that are no tensors.
        FloatingPointError: at the first loss or gradient that is not finite; the parameters are those of the last good
            epoch, and so is the checkpoint.

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
    train = Batches(as_tensors(data), batch_size, device, batch_transform)
    held_out = None if validation is None else Batches(as_tensors(validation), batch_size, device, batch_transform)
    _check_settings(objective, epochs, batch_size, patience, held_out, resume, checkpoint)
    check_compile(compile)
    frozen = [freeze] if isinstance(freeze, nn.Module) else list(freeze)
    shaped = isinstance(objective, Objective) and objective.shaped
    history = History()

    earlier = checkpoint if resume and checkpoint is not None and os.path.exists(checkpoint) else None
    state = {} if earlier is None else read_checkpoint(earlier)
    begun = state.get("settings", {})  # as it was begun, so it goes on
    with (
        watched(callbacks, model, guide) as look_on,
        _training(model, guide, frozen, seed, device),
        product_route(train.where, begun.get("products")) as products,
    ):
        layout = _look(model, guide, train)
        if held_out is not None:
            measure = Validation(model, guide, held_out, _look(model, guide, held_out), compile, epochs)
        fixed = {p for module in frozen for p in module.parameters()}
        if not layout.sizes and layout.full_size is None and train.size < train.n:
            warnings.warn(
                f"the pyro.factor {listed(layout.joining)} stands outside every plate, so each batch counts all of it: "
                f"take batch_size={train.n}, or divide it by the number of batches, {-(-train.n // train.size)}"
                if layout.joining
                else "a latent site stands outside every plate, so each batch is scored against its whole prior: take "
                f"batch_size={train.n}, or subsample in the model (pyro.plate(..., subsample_size=...))",
                stacklevel=2,
            )
        with buffers_kept(model, guide):
            first = train.first()
            of_model, of_guide = parameters_of(model, guide, *first)
            if isinstance(objective, Objective):
                objective.check(model, guide, layout, *first)
        trained = [p for p in [*of_model, *of_guide] if p not in fixed]
        if not trained:
            raise ValueError("there is nothing to train: every parameter of the pair is frozen, or it has none")
        run = Run(model, guide, trained, _optimizer(optimizer, trained, lr), scheduler, history)
        run.configuration = {"objective": type(objective).__name__, "optimizer": type(run.optimizer).__name__}
        run.configuration |= {"n": train.n, "batch_size": min(train.size, train.n), "lr": lr}
        if earlier is not None:
            run.load(earlier, state)
        before, size = history.seconds, min(train.size, train.n)
        full, rest = epochs * (train.n // size), epochs * (train.n % size > 0)
        steps = Steps(run, objective, layout, fixed, compile, full, rest)
        steps.begun = begun.get("compiled")
        good, good_epoch, kept = run.snapshot(), len(history.elbo), history.steps
        unproved: tuple[list[Tensor], int] | None = None
        with tqdm(range(good_epoch, epochs), disable=not progress, desc="fit", unit="epoch") as bar:
            for epoch in bar:
                best = history.best_epoch
                if patience is not None and best is not None and len(history.validation) - best >= patience:
                    break
                losses, bounds, last = steps.epoch(train)
                if unproved is not None and isfinite(losses[0]):
                    good, good_epoch = unproved
                unproved = None
                look = checkpoint is not None or held_out is not None or epoch == epochs - 1 or not steps.compiled
                taken = history.steps - 1  # the last step
                if not isfinite(losses[-1]) or (look and not loss_is_finite(run, objective, layout, last, taken)):
                    run.restore(good)
                    raise FloatingPointError(
                        f"the loss is not finite at or after step {history.steps} (epoch {epoch + 1}); the parameters "
                        f"are back at the end of epoch {good_epoch}; lower lr={lr:g}, or scale the data"
                    )
                if look:
                    good, good_epoch, kept = run.snapshot(), epoch + 1, history.steps
                elif history.steps >= kept + BLOCK:  # the first loss of the next epoch will say whether it is good
                    unproved, kept = (run.snapshot(), epoch + 1), history.steps
                history.elbo.append(_per_datum(bounds, layout, train.n))
                if shaped:
                    history.shaped.append(-_per_datum(losses, layout, train.n))
                history.learning_rate.append(float(run.optimizer.param_groups[0].get("lr", lr)))
                if run.scheduler is not None:
                    run.scheduler.step()
                if held_out is not None:
                    measure(history)
                    if patience is not None and history.validation[-1] >= max(history.validation):
                        run.best, history.best_epoch = run.snapshot(), epoch + 1
                history.seconds = before + time.perf_counter() - start
                history.elapsed.append(history.seconds)
                if checkpoint is not None:
                    run.settings = {"compiled": steps.compiled, "products": products}
                    run.save(checkpoint)
                bar.set_postfix(elbo=f"{history.elbo[-1]:.3f}")
                look_on(history)
        if patience is not None and run.best is not None:
            run.restore(run.best)
    history.seconds = before + time.perf_counter() - start
    history.compiled, history.route = steps.compiled, steps.route
    return history


def _per_datum(bounds: list[float], layout: Layout, n: int) -> float:
    """The bound of an epoch per datum: batches add up, unless the model scales each of them up to all its data."""
    return sum(bounds) / n if layout.full_size is None else sum(bounds) / len(bounds) / layout.full_size


def _check_settings(
    objective: ELBO,
    epochs: int,
    batch_size: int,
    patience: int | None,
    held_out: Batches | None,
    resume: bool,
    checkpoint: str | os.PathLike[str] | None,
) -> None:
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size are at least 1, but got {epochs} and {batch_size}")
    if patience is not None and (held_out is None or patience < 1):
        raise ValueError(
            "patience counts epochs without a better validation ELBO: give validation data, and patience of at least "
            f"1 (got {patience})"
        )
    if resume and checkpoint is None:
        raise ValueError("resume goes on from a checkpoint: say which file")
    if not callable(getattr(objective, "differentiable_loss", None)):
        raise TypeError(f"{type(objective).__name__} has no differentiable_loss; fit needs an objective that has one")


def _optimizer(make: MakeOptimizer, trained: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    fused = make in _FUSED and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    try:
        made = make(trained, lr=lr, **({"fused": True} if fused else {}))
    except TypeError as error:
        raise TypeError(f"optimizer(parameters, lr=lr) fails: {error}; {_REMEDY}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer makes a torch.optim.Optimizer, but it made a {type(made).__name__}; {_REMEDY}")
    return made


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)  # one kernel for all parameters
_REMEDY = "give a class such as torch.optim.Adam (Pyro's own optimizers serve pyro.infer.SVI)"


def _look(model: Program, guide: Program, data: Batches) -> Layout:
    """Look at every datum once, in batches of the size to come, before the first step; the pair's layout."""
    with forked_rng(), buffers_kept(model, guide):
        parts = torch.arange(data.n).split(data.size)
        layout = check_pair(model, guide, *data.take(parts[0]))
        if 1 < data.size < data.n:
            smaller = layout_on(model, guide, data.first(), data.size - 1)
            if isinstance(smaller, Exception):  # a guide with a value per datum fits one size only
                raise ValueError(
                    f"the pair runs on {data.size} data but not on {data.size - 1}: a guide that holds a value for "
                    f"each datum (an AutoGuide) sees all data at every step: make a new one, and give batch_size="
                    f"{data.n} or more ({str(smaller).splitlines()[0]})"
                ) from smaller
        if data.size < data.n and layout.full_size is None and data.size not in layout.sizes:
            check_rows(layout, data.first(), data.size)
        for rows in parts[1:]:
            check_pair(model, guide, *data.take(rows))
    return layout


@contextmanager
def _training(
    model: Program, guide: Program, frozen: list[nn.Module], seed: int | None, device: Device
) -> Iterator[None]:
    """Training mode (evaluation mode for what is frozen), the user's restored; a random stream of its own if seeded."""
    modules = owners_of(model, guide)
    with warnings.catch_warnings(), modes_kept([*modules, *frozen]), private_randomness(seed):
        warnings.filterwarnings("ignore", "Encountered NaN")  # fit raises instead, and says where
        for module in modules:
            if device is not None:
                module.to(device)
            module.train()
        for module in frozen:
            module.eval()
        yield
