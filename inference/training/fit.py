r"""Training: stochastic variational inference with any Pyro objective.

.. math:: \max_{\theta, \phi} \sum_n \mathbb{E}_{q_\phi(z \mid x_n)} \log \frac{p_\theta(x_n, z)}{q_\phi(z \mid x_n)}
"""

from __future__ import annotations

__all__ = ["fit"]

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
)
from torch import Tensor, nn

from jensen import processes
from jensen.checked import checked, shown
from jensen.graphs.compile import Compile, ensure_cache
from jensen.graphs.products import product_route
from jensen.kernel.arguments import Given, prepared
from jensen.kernel.batches import (
    Batches,
    Device,
    Transform,
    check_rows,
    data_in_epoch,
    listed,
    nested,
    place_of,
)
from jensen.kernel.caller import outside
from jensen.kernel.layout import Layout
from jensen.kernel.lifts import LOOP, VMAP
from jensen.kernel.load import warn_if_busy
from jensen.kernel.looks import Incoming, held_by, layout_on, look_at, warn_of_no_plate
from jensen.kernel.modes import buffers_kept, calls_seen, fix, fixed_parameters, modes_kept
from jensen.kernel.parameters import mark_trained, own_modules, owners_of, store_kept, tensors_of
from jensen.kernel.randomness import forked_rng, private_randomness
from jensen.kernel.weights import Program, check_pair, parameters_of
from jensen.missing import Missing
from jensen.progress import progress_bar

from .averaging import Average, Averaging
from .callbacks import Callback, watched
from .checkpoint import MakeScheduler, Run, Settings, mark_of, read_contents
from .diagnosis import Falls, first_bad
from .gradients import loss_is_finite
from .history import History
from .objectives import Objective
from .schedules import Schedule
from .seconds import add_seconds
from .shares import shares_of
from .steps import BLOCK, Steps
from .stopping import WINDOW, has_converged
from .validation import Validation

MakeOptimizer = Callable[..., torch.optim.Optimizer]


@checked
@processes.together("fit")
def fit(
    model: Program,
    guide: Program,
    data: Given,
    objective: ELBO | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: MakeOptimizer = torch.optim.Adam,
    scheduler: MakeScheduler | None = None,
    schedule: Schedule = "constant",
    clip: float | None = None,
    weight_decay: float | None = None,
    average: Averaging | None = None,
    validation: Given | None = None,
    patience: int | None = None,
    tolerance: float | None = None,
    seed: int | None = None,
    device: Device = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    batch_transform: Transform | None = None,
    freeze: nn.Module | Iterable[nn.Module] = (),
    missing: Missing = None,
    max_plate_nesting: int | None = None,
    compile: Compile = "auto",
    callbacks: Callback | Iterable[Callback] = (),
    progress: bool = True,
) -> History:
    """Train a model and guide by stochastic variational inference.

    One step is that of ``pyro.infer.SVI``: the objective's loss on a batch, its gradient, one update. ``fit`` trains
    the parameters of model and guide if they are modules, and all parameters of ``pyro.param`` and ``pyro.module``,
    except those that require no gradient.

    References:
        Hoffman, Blei, Wang and Paisley (2013), Stochastic Variational Inference. https://arxiv.org/abs/1206.7051
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.
        Polyak and Juditsky (1992), Acceleration of Stochastic Approximation by Averaging.
        Dhaka et al. (2020), Robust, Accurate Stochastic Optimization for Variational Inference.
        https://arxiv.org/abs/2009.00666
        Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
        https://arxiv.org/abs/1812.02633

    Args:
        model: any Pyro model, called as ``model(*batch)``.
        guide: its guide, called with the same batch.
        data: a tensor [N, ...], or a tuple of such tensors; ``()`` if model and guide hold their data and are called
            without arguments, one step per epoch; or data that are read by the batch: a memory map or file, a
            ``Dataset``, ``IterableDataset`` or ``DataLoader`` of torch, a SciPy sparse matrix, a result of
            :func:`jensen.datasets.stream`. These are checked as they come. A file is shuffled by blocks, random access
            exactly, and streams keep their order.
        objective: a Pyro objective with ``differentiable_loss``, or an :class:`~jensen.inference.Objective` (jensen's
            or your own), which is not changed: its knobs follow the steps of this run. None: ``Trace_ELBO()``, or
            ``TraceEnum_ELBO`` if there are sites to be enumerated.
        epochs: passes over the data.
        batch_size: data points per step, shuffled; the last batch of an epoch may be smaller. If at least N: all data
            in their own order. A ``DataLoader`` has its own.
        lr: the learning rate.
        optimizer: called as ``optimizer(parameters, lr=lr)``: a class of ``torch.optim``.
        scheduler: called as ``scheduler(optimizer)``; its result is stepped after every epoch.
        schedule: the learning rate over the steps of all epochs: ``"cosine"`` falls to 0, ``"warmup"`` rises in the
            first twentieth, ``"warmup-cosine"`` does both. ``"constant"``: unchanged.
        clip: the largest norm of the gradient of all parameters; longer gradients are shortened.
        weight_decay: given to the optimizer, if not None: ``optimizer(parameters, lr=lr, weight_decay=weight_decay)``.
        average: ``"ema"`` or ``"polyak"``: the parameters are averaged over the steps, exponentially with a memory of
            up to 1,000 steps, or over all steps with weights that forget the first ones (as t^3). The
            averages are what is validated, kept and left in model and guide; callbacks see the present values.
        validation: data like ``data``, whose bound, rate and distortion are computed after every epoch, with the same
            samples every time: the ELBO (8 particles), or the bound that :class:`~jensen.inference.IWAE` or
            :class:`~jensen.inference.Renyi` trains, with their number of particles.
        patience: stop after this many epochs without a better validation bound, and restore the best parameters.
        tolerance: stop when the averaged parameters (``"ema"`` if ``average`` is None) have converged: when their
            improvement of the validation bound over the last 10 epochs is below this number of nats per data point,
            also at its upper limit of two standard errors (:mod:`~jensen.inference.training.stopping`). The averages of
            the last epoch are kept. Needs validation data with weights per data point.
        seed: makes the run reproducible, with a random stream of its own; None uses the user's stream.
        device: where to run; modules (which stay there) and batches are moved. None: no move.
        checkpoint: a file written after every epoch, in full or not at all.
        resume: continue from ``checkpoint`` if it exists: the result equals that of an uninterrupted run.
        batch_transform: applied to the first tensor of every batch: ``torch.bernoulli`` binarizes grey images.
        freeze: modules whose parameters do not change, in evaluation mode: ``freeze=model`` fits the guide alone.
        missing: ``"nan"``: NaN in the data is a missing value, and every observed site scores only what was observed
            (:func:`jensen.missing.observed_only`); or a Boolean mask of the first tensor, True where it is missing.
            None: NaN is accepted where every log-density stays finite, as with all models of jensen. The encoder of
            the guide must read NaN (:class:`jensen.networks.Masked`). With importance-weighted objectives this is
            MIWAE (Mattei and Frellsen 2019).
        max_plate_nesting: how many dimensions the plates take, for jensen's objectives (Pyro's own have it as an
            argument). None: found by a run of model and guide.
        compile: whether steps run in a compiled graph, traced once: ``"auto"`` where that pays, ``True`` wherever
            possible (else a warning gives the reason), ``False`` never. ``history.route`` describes the choice.
        callbacks: objects called after every epoch and closed at the end, in this order: :class:`CSVLogger`,
            :class:`TensorBoardLogger`, or your own :class:`Callback`.
        progress: whether to show a progress bar.

    Returns:
        The :class:`History`.

    Warns:
        UserWarning: if a bound fell far below that of the first step, and for parameters that are not trained.

    Raises:
        ValueError: for data that are empty, not finite or outside the support, sites that do not match, invalid
            settings, batches on which model and guide do not run, a plate over the data that does not follow their
            first dimension, nothing to train, and a checkpoint that is damaged or of another model or guide.
        TypeError: for an unsuitable objective, optimizer or callback, data that are not tensors, and a call
            that does not match the arguments of model or guide.
        FileExistsError: if another run writes the same checkpoint.
        FloatingPointError: at the first loss or gradient that is not finite, with the site and the rows of the first
            such quantity; the parameters are those of the last good epoch, and so is the checkpoint.

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
    warn_if_busy()
    start = time.perf_counter()
    device = processes.place(device)
    model, data = prepared(model, data, missing)
    train = Batches.of(data, batch_size, device, batch_transform)
    held_out = None
    if validation is not None:
        held_out = Batches.of(validation, batch_size, device, batch_transform)
    _check_settings(objective, epochs, batch_size, patience, held_out, resume, checkpoint)
    _check_rates(schedule, scheduler, clip, tolerance, patience, held_out)
    average = "ema" if tolerance is not None and average is None else average
    ensure_cache()
    frozen = [freeze] if isinstance(freeze, nn.Module) else list(freeze)
    shaped = isinstance(objective, Objective) and objective.shaped
    history = History()

    mark = None if checkpoint is None or processes.rank() else mark_of(checkpoint)  # before reading it
    earlier = checkpoint if resume else None
    state = processes.of_first(lambda: None if earlier is None or mark is None else read_contents(earlier))
    begun: Settings = {} if state is None else state["settings"]  # a resumed run keeps its first settings
    if checkpoint is not None and processes.rank() == 0:
        Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    seed = processes.shared_seed(begun.get("seed", seed))
    with (
        watched(callbacks, model, guide) as look_on,
        _training(model, guide, frozen, processes.own_seed(seed), device),
        product_route(place_of(train.tensors, device, model, guide), begun.get("products")) as products,
        ExitStack() as stack,
    ):
        still = fixed_parameters(owners_of(model, guide))
        layout = nested(_look(model, guide, train), max_plate_nesting)
        objective = _default(layout) if objective is None else objective
        count = 0 if train.known is None else _counted(model, guide, train)
        history.data = count or None
        if held_out is not None:
            measure = Validation(model, guide, objective, held_out, max_plate_nesting, compile, epochs)
        fixed = {p for module in frozen for p in module.parameters()}
        if not layout.sizes and layout.full_size is None:
            warn_of_no_plate(model, guide, train.first())
        if not layout.sizes and layout.full_size is None and not train.whole:
            batches = "the number of batches" + f", {-(-(train.known or 0) // train.size)}" * (train.known is not None)
            more = f"batch_size={train.known}, or " if train.source is None else ""
            warnings.warn(
                f"the pyro.factor {listed(layout.joining)} is outside every plate, so each batch counts all of it: use "
                f"{more}divide it by {batches}"
                if layout.joining
                else "a latent site is outside every plate, so each batch is scored against its whole prior: use "
                f"{more}subsample in the model (pyro.plate(..., subsample_size=...))",
                stacklevel=outside(),
            )
        if layout.enumerated and isinstance(objective, Trace_ELBO):
            warnings.warn(
                f"{type(objective).__name__} samples {sorted(layout.enumerated)} from the model, since the guide "
                "leaves these sites to be enumerated: use pyro.infer.TraceEnum_ELBO("
                f"max_plate_nesting={layout.nesting}), which sums over their states as evaluate does",
                stacklevel=outside(),
            )
        with buffers_kept(model, guide):
            first = train.first()
            trained = _trained(model, guide, first, frozen)
            if isinstance(objective, Objective):
                objective.check(model, guide, layout, *first)
        fix(still)
        if not any(p.requires_grad for p in trained):
            raise ValueError(
                "there is nothing to train: model and guide have no parameters, or all are frozen or require no "
                "gradient. Modules that a function calls count if pyro.module(name, module) registers them"
            )
        run = Run(model, guide, trained, _optimizer(optimizer, trained, lr, weight_decay), scheduler, history)
        if schedule != "constant":
            for group in run.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        run.configuration = {"objective": type(objective).__name__, "optimizer": type(run.optimizer).__name__}
        known = {"n": train.n} if train.source is None or train.source.sized else {}
        run.configuration |= known | {"batch_size": min(train.size, train.known or train.size), "lr": lr}
        run.configuration |= {"schedule": schedule, "clip": clip, "average": average, "tolerance": tolerance}
        run.written = mark
        n = train.known or (_ASSUMED * train.size if schedule == "constant" else train.n)
        size = min(train.size, n)
        full, rest = epochs * (n // size), epochs * (n % size > 0)
        processes.check_alike(
            parameters=run.names(),
            settings={
                **run.configuration,
                **{"particles": objective.num_particles, "epochs": epochs, "seed": seed, "patience": patience},
            },
            data=train.facts(),
            validation=[] if held_out is None else held_out.facts(),
        )
        processes.of_first_process([*tensors_of(model, guide), *trained])
        if average is not None:
            run.average = Average(average, trained)
        if earlier is not None and state is not None:
            run.load(earlier, state)
        if (shares := shares_of(run, objective, layout, train, seed)) is not None:
            stack.enter_context(shares.interruptible())
        if shares is not None and shares.reason:
            warnings.warn(
                f"{processes.count()} processes take the same batches, each with its own noise, since "
                f"{shares.reason}: gradients are averaged, but an epoch takes as long as with one process",
                stacklevel=outside(),
            )
        check = None if train.source is None else Incoming(model, guide, first)
        steps = Steps(run, objective, layout, fixed, compile, full, rest, shares, check, clip, schedule)
        steps.begun = begun.get("compiled")
        before, good, good_epoch, kept = history.seconds, run.snapshot(), len(history.elbo), history.steps
        falls = Falls(lr, patience is not None)
        first_bound = history.elbo[0] if history.elbo else 0.0
        unproved: tuple[list[Tensor], int] | None = None
        points = train.known or 0 if train.tensors else 0
        left = range(good_epoch, epochs)
        with progress_bar("fit", points, left, progress=progress, unit="epoch") as bar:
            for epoch in bar:
                best = history.best_epoch
                if patience is not None and best is not None and len(history.validation) - best >= patience:
                    break
                if tolerance is not None and has_converged(run.recent, tolerance):
                    break
                losses, bounds, last, rows = steps.epoch(train)
                if unproved is not None and isfinite(losses[0]):
                    good, good_epoch = unproved
                unproved = None
                look = checkpoint is not None or held_out is not None or epoch == epochs - 1 or not steps.compiled
                look = look or shares is not None
                taken = history.steps - 1  # the last step
                idle = len(last) < len(train.tensors)  # there are fewer rows than processes
                fine = idle or not look or not isfinite(losses[-1])
                fine = fine or loss_is_finite(run, objective, layout, last, taken)
                if not isfinite(losses[-1]) or not all(processes.gathered(fine)):
                    bad = "" if idle else first_bad(run, objective, layout, last, rows, taken)
                    bad = next(filter(None, processes.gathered(bad)), "")
                    run.restore(good)
                    raise FloatingPointError(
                        f"the loss is not finite at or after step {history.steps} (epoch {epoch + 1}){bad}; the "
                        f"parameters are those at the end of epoch {good_epoch}; lower lr={lr:g}, or scale the data"
                    )
                processes.of_first_process(run.buffers)
                if not count:  # a stream, now counted
                    count = history.data = _counted(model, guide, train)
                if not history.elbo:
                    first_bound = bounds[0] * train.n / (size * count)
                if look:
                    good, good_epoch, kept = run.snapshot(), epoch + 1, history.steps
                elif history.steps >= kept + BLOCK:  # the first loss of the next epoch shows whether it is good
                    unproved, kept = (run.snapshot(), epoch + 1), history.steps
                history.elbo.append(sum(bounds) / count)
                if shaped:
                    history.shaped.append(-sum(losses) / count)
                history.learning_rate.append(float(run.optimizer.param_groups[0].get("lr", lr)))
                if run.scheduler is not None:
                    run.scheduler.step()
                if held_out is not None:
                    with run.measured():
                        each = measure(history)
                        if patience is not None and history.validation[-1] >= max(history.validation):
                            run.best, history.best_epoch = run.snapshot(), epoch + 1
                    if tolerance is not None:
                        if each is None:
                            raise ValueError(_NO_ERROR)
                        run.recent = [*run.recent, each][-1 - WINDOW :]
                falls.look(first_bound, history, epoch == epochs - 1)
                history.seconds = before + time.perf_counter() - start
                history.elapsed.append(history.seconds)
                if checkpoint is not None:
                    run.settings = {"compiled": steps.compiled, "products": products}
                    if shares is not None:
                        run.settings["seed"] = shares.seed
                    run.save(checkpoint)
                bar.set_postfix(elbo=f"{history.elbo[-1]:.3f}")
                look_on(history)
                if shares is not None:
                    shares.agree(run.trained)
        if patience is not None and run.best is not None:
            run.restore(run.best)
        elif run.average is not None:
            run.average.write(run.trained)
    history.seconds = before + time.perf_counter() - start
    add_seconds(guide, history.seconds, before)
    history.compiled, history.route = steps.compiled, steps.route
    if isinstance(objective, Objective) and objective.way in (VMAP, LOOP):
        history.route += f" (particles: {objective.way})"
    if shares is not None:
        history.route += f"; {shares.sentence}"
    return history


def _counted(model: Program, guide: Program, data: Batches) -> int:
    """The number of data points by which the bounds of an epoch are divided."""
    with buffers_kept(model, guide):
        return data_in_epoch(model, guide, data)[1]


def _default(layout: Layout) -> ELBO:
    """The default objective."""
    if layout.enumerated or layout.summed:
        return TraceEnum_ELBO(max_plate_nesting=layout.nesting)
    return Trace_ELBO()


def _check_settings(
    objective: ELBO | None,
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
            "patience counts epochs without a better validation bound: give validation data, and patience of at least "
            f"1 (got {patience})"
        )
    if resume and checkpoint is None:
        raise ValueError("resume needs a checkpoint: give its file as checkpoint")
    if objective is not None:
        check_objective(objective)


def _check_rates(
    schedule: Schedule,
    scheduler: MakeScheduler | None,
    clip: float | None,
    tolerance: float | None,
    patience: int | None,
    held_out: Batches | None,
) -> None:
    if schedule != "constant" and scheduler is not None:
        raise ValueError(f"schedule={schedule!r} and scheduler both set the learning rate: give one of them")
    if clip is not None and not 0 < clip < inf:
        raise ValueError(f"clip is the largest norm of a gradient, above 0, but got {clip}")
    if tolerance is None:
        return
    if not 0 < tolerance < inf:
        raise ValueError(f"tolerance is an improvement of the validation bound in nats, above 0, but got {tolerance}")
    if held_out is None or patience is not None:
        raise ValueError(
            "tolerance stops when the validation bound no longer improves: give validation data, and no patience "
            "(which keeps the best epoch instead)"
        )


_NO_ERROR = (
    "tolerance needs a validation bound for each data point, to know the error of their mean, but the weights of this "
    "model and guide are joint, or the guide is a point estimate: use patience, or a fixed number of epochs"
)


def check_objective(objective: object) -> None:
    """Raise TypeError for an object that fit cannot use as an objective, and name one that it can."""
    if isinstance(objective, type):
        raise TypeError(f"objective is the class {objective.__name__}: give an instance, {objective.__name__}()")
    lacking = not callable(getattr(objective, "differentiable_loss", None))
    if lacking and not type(objective).__module__.startswith("pyro."):
        raise TypeError(
            f"objective must be one of Pyro's or jensen's, such as Trace_ELBO() or jensen.inference.IWAE(10), but got "
            f"{shown(objective)}"
        )
    if isinstance(objective, _TRACED) or lacking:
        raise TypeError(f"{type(objective).__name__} {_instead(objective)}")


_TRACED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO)


def _instead(objective: Any) -> str:
    """Why fit cannot use an objective of Pyro's, and the alternative: the rest of a sentence."""
    name, K = type(objective).__name__, getattr(objective, "num_particles", 1)
    if isinstance(objective, _TRACED):
        return (
            "uses torch.jit.trace, which is deprecated and freezes the choices of the first run: use "
            f"{name.removeprefix('Jit')}(); fit traces the steps of Trace_ELBO and of jensen's objectives"
        )
    lacks = "has no differentiable_loss, which fit needs"
    if name == "RenyiELBO":
        alpha = objective.alpha
        same = f"jensen.inference.IWAE({K})" if alpha == 0 else f"jensen.inference.Renyi({alpha:g}, {K})"
        return (
            f"{lacks}: use {same}, which keeps the scales of plates out of the logarithm (with scales, Pyro's number "
            "is different, and not a bound)"
        )
    if name in ("TraceGraph_ELBO", "JitTraceGraph_ELBO"):
        return (
            f"{lacks}: use jensen's own ELBO, jensen.inference.ELBO({K if K > 1 else 10}), whose gradient includes the "
            "score of the sites without rsample, with the other samples as baseline"
        )
    way = f"pyro.infer.SVI(model, guide, optim, {name}(...)).step(x)"
    return f"{lacks}: train with {way}, and measure the trained model and guide with evaluate and compare"


def _optimizer(
    make: MakeOptimizer, trained: list[nn.Parameter], lr: float, weight_decay: float | None
) -> torch.optim.Optimizer:
    more = {} if weight_decay is None else {"weight_decay": weight_decay}
    fused = make in _FUSED and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    try:
        made = make(trained, lr=lr, **more, **({"fused": True} if fused else {}))
    except TypeError as error:
        raise TypeError(f"optimizer(parameters, lr=lr) fails: {error}; {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"optimizer(parameters, lr={lr}) fails: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, but it made a {type(made).__name__}; {_REMEDY}")
    return made


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)  # one kernel for all parameters
_REMEDY = "give a class such as torch.optim.Adam (Pyro's own optimizers are for pyro.infer.SVI)"


def _look(model: Program, guide: Program, data: Batches) -> Layout:
    """Check every data point once, in batches of the given size, before the first step; returns the layout.

    Of data that are read by the batch, the first batch; the others are checked as they come.
    """
    with forked_rng(), buffers_kept(model, guide):
        whole = data.known or data.size + 1
        try:
            layout = look_at(model, guide, data.first())
        except (IndexError, RuntimeError, ValueError) as error:
            if min(data.size, whole) == 1 < whole and isinstance(_on(model, guide, data, 2), Layout):
                raise ValueError(
                    f"model and guide run on 2 rows but not on 1: give batch_size of 2 or more ({_why(error)})"
                ) from error
            raise
        if data.size < whole:
            _check_other_sizes(model, guide, data, layout)
        parts = torch.arange(data.n).split(data.size) if data.source is None else ()
        for rows in (parts[i] for i in processes.own_share(len(parts)) if i) if parts else ():
            try:
                check_pair(model, guide, *data.take(rows))
            except (IndexError, RuntimeError, ValueError) as error:
                if len(rows) == data.size or isinstance(_on(model, guide, data, len(rows)), Layout):
                    raise  # the data are the cause
                raise ValueError(_last_batch(model, guide, data, len(rows), error)) from error
    return layout


def _on(model: Program, guide: Program, data: Batches, rows: int) -> Layout | Exception:
    """The layout on the first ``rows`` rows, or the error that occurs there."""
    return layout_on(model, guide, data.head(rows), rows)


def _check_other_sizes(model: Program, guide: Program, data: Batches, layout: Layout) -> None:
    """Raise ValueError if model and guide run on one number of rows only, so that batches cannot be used."""
    size = data.size
    others = [k for k in (size - 1, size + 1) if k > 1]
    tried = {}
    for k in others:  # some models do not run on one row, some not on an odd number
        tried[k] = _on(model, guide, data, k)
        if isinstance(tried[k], Layout):
            break
    first, other = others[0], tried[others[0]]
    if isinstance(other, Exception) and all(isinstance(outcome, Exception) for outcome in tried.values()):
        held = held_by(model, guide, data.head(first))
        where = f"model and guide run on {size} rows but not on {' or '.join(map(str, others))}"
        if held is not None:
            more = "give tensors" if data.source is not None else f"give batch_size={data.n} or more"
            raise ValueError(
                f"{where}: {held}, so it needs all data at every step. Create a new guide, and {more}"
            ) from other
        more = f"batch_size={data.n} or more" if data.source is None else "tensors, and a batch_size of all of them"
        raise ValueError(
            f"{where}: {str(other).splitlines()[0]}; compute the number of rows, len(x), instead of the constant "
            f"{size}. If there is a value per data point, give {more}"
        ) from other
    for k, laid_out in {size: layout, **tried}.items():  # the plate may have one of these sizes by chance
        if isinstance(laid_out, Layout) and laid_out.full_size is None and k not in laid_out.sizes:
            check_rows(laid_out, data.head(k), k)


def _last_batch(model: Program, guide: Program, data: Batches, rows: int, error: Exception) -> str:
    """The message for a last batch that fails: a similar batch size that leaves another remainder."""
    near = sorted(range(2, data.n), key=lambda size: (abs(size - data.size), -size))[:_TRIED]
    rests = ((size, data.n % size) for size in near)
    good = (size for size, rest in rests if not rest or isinstance(_on(model, guide, data, rest), Layout))
    size = next(good, data.n)
    left = "no smaller batch" if data.n % size == 0 else f"a last batch of {data.n % size}"
    return (
        f"the last batch of an epoch has {rows} row{'s' * (rows > 1)} ({data.n} data points, batch_size={data.size}), "
        f"and model and guide do not run on it ({_why(error)}): give batch_size={size}, which leaves {left}"
    )


def _why(error: Exception) -> str:
    """The first line of an error, or its meaning if a batch normalisation receives one row."""
    if "Expected more than 1 value per channel" in str(error):
        return "batch normalisation divides by the standard deviation of a batch, and one row has none"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


_TRIED = 20  # batch sizes
_ASSUMED = 100  # batches of a stream of unknown length


@contextmanager
def _training(
    model: Program, guide: Program, frozen: list[nn.Module], seed: int | None, device: Device
) -> Iterator[None]:
    """Training mode (evaluation mode for frozen modules), restored afterwards; a private random stream if seeded.

    Modules that model or guide only hold keep the user's mode until it is known which of them are trained.
    """
    modules = owners_of(model, guide)
    with (
        store_kept(earlier=True),
        warnings.catch_warnings(),
        modes_kept([*modules, *frozen]),
        private_randomness(seed),
    ):
        warnings.filterwarnings("ignore", "Encountered NaN")  # fit raises an error with the site instead
        for module in modules:
            if device is not None:
                module.to(device)
        _train(own_modules(model, guide), frozen)
        try:
            yield
        finally:
            mark_trained(model, guide)


def _train(modules: Iterable[nn.Module], frozen: list[nn.Module]) -> None:
    for module in modules:
        module.train()
    for module in frozen:
        module.eval()


def _trained(model: Program, guide: Program, data: tuple[Tensor, ...], frozen: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters to train; the modules that hold them are put into training mode.

    Warns:
        UserWarning: for modules that a function calls but does not register: Pyro does not train them.
    """
    fixed = {p for module in frozen for p in module.parameters()}
    owners, own = owners_of(model, guide), own_modules(model, guide)
    held = [owner for owner in owners if owner not in own]
    with calls_seen(held) as called:
        trained = [p for half in parameters_of(model, guide, *data) for p in half if p not in fixed]
    known = {*trained, *fixed}
    _train([owner for owner in held if not known.isdisjoint(owner.parameters())], frozen)
    left = {
        f"{type(owner).__name__}{'.' * bool(name)}{name}": None
        for owner in held
        for name, part in owner.named_modules()
        if part in called and any(p.requires_grad and p not in known for p in part.parameters(recurse=False))
    }
    if left:
        warnings.warn(
            f"model or guide calls modules without registering them, so Pyro and fit do not train them: {list(left)}; "
            "register them in the program (pyro.module(name, module)) to train them, or give them as freeze=",
            stacklevel=outside(),
        )
    return trained
