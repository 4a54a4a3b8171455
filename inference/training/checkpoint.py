"""The contents of a checkpoint: the state of a training run, and how it is written into a model and guide."""

from __future__ import annotations

__all__ = ["MakeScheduler", "Run", "mark_of", "named_parameters", "read_contents", "restore"]

import errno
import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from typing import Any, NotRequired, TypedDict, cast

import pyro
import torch
from torch import Tensor, nn, optim

from jensen import processes
from jensen.checked import checked, shown
from jensen.graphs.products import Route
from jensen.kernel.parameters import own_modules, owners_of
from jensen.kernel.randomness import accelerator_states, derived_seed, set_accelerator_states
from jensen.kernel.weights import Program
from jensen.results.files import read_checkpoint, write_checkpoint
from jensen.results.schema import decoded

from .averaging import Average
from .history import History

FileMark = tuple[int, int]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

_ELEMENTWISE = (  # optimizers whose state has one value per number of a parameter
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.AdamW,
    optim.ASGD,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
)
_SCALARS = {"ax", "eta", "mu", "mu_product", "step"}
_STATE: dict[type, set[str]] = {optim.Adam: {"exp_avg", "exp_avg_sq", "step"}, optim.Adagrad: {"step", "sum"}}


class Settings(TypedDict):
    """The settings with which a run continues."""

    configuration: NotRequired[dict[str, Any]]
    compiled: NotRequired[bool]
    identity: NotRequired[str]
    products: NotRequired[Route]
    seed: NotRequired[int]


class OptimizerState(TypedDict):
    """The state of an optimizer, by the indices of its parameters, and its settings."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class Contents(TypedDict):
    """The schema of a checkpoint."""

    jensen_checkpoint: int
    versions: dict[str, str]
    names: list[str]
    parameters: list[Tensor]
    best: list[Tensor] | None
    average: NotRequired[list[Tensor]]
    average_steps: NotRequired[int]
    recent: NotRequired[list[Tensor]]
    optimizer: OptimizerState
    scheduler: dict[str, Any] | None
    history: History
    settings: Settings
    random: Tensor
    random_cuda: list[Tensor]
    random_of: NotRequired[tuple[list[Tensor], list[list[Tensor]]]]  # of all processes


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """The contents of a checkpoint, each field of the type that it should have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, changed since it was written, of another kind, or of a newer schema version.
    """
    state = read_checkpoint(path)
    try:
        found = cast(Contents, decoded(Contents, {"settings": {}, **state}, "checkpoint"))
        if len(found["parameters"]) < len(found["names"]):
            raise ValueError(f"there are {len(found['parameters'])} values for {len(found['names'])} parameters")
        if found["best"] is not None and len(found["best"]) != len(found["parameters"]):
            raise ValueError(f"there are {len(found['best'])} best values for {len(found['parameters'])}")
        of, others = found.get("random_of", ([], []))
        streams = {
            "random": [found["random"]],
            "random_cuda": found["random_cuda"],
            "random_of": [*of, *chain(*others)],
        }
        for name, some in streams.items():
            for stream in some:
                if stream.dtype != torch.uint8 or stream.dim() != 1:
                    raise ValueError(f"{name} is {stream.dtype} of shape {list(stream.shape)}: no state of a generator")
        for values in (found["parameters"], found["best"] or ()):
            for value in values:
                _check_storage(value)
        for value in (*found.get("average", ()), *found.get("recent", ())):
            _check_storage(value)
    except ValueError as error:
        raise ValueError(f"{path} is a damaged checkpoint: {error}; delete it and start again") from error
    return found


def _check_storage(value: Tensor) -> None:
    """Raise ValueError for a tensor whose shape claims more values than its storage has."""
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {list(value.shape)} has too few values")


def _check_like(values: Sequence[Tensor], own: Sequence[Tensor], what: str) -> None:
    """Raise ValueError unless values have the shapes and dtypes of the model's and guide's own."""
    given, expected = ([f"{x.dtype} {list(x.shape)}" for x in tensors] for tensors in (values, own))
    if given != expected:
        raise ValueError(f"its {what} are {given}, those of this model and guide are {expected}")


def _check_optimizer(saved: OptimizerState, optimizer: optim.Optimizer) -> None:
    """Raise ValueError for an impossible state of an optimizer of these parameters.

    ``Optimizer.load_state_dict`` compares only the numbers of parameters, and the fused kernels check nothing.
    """
    own = optimizer.state_dict()["param_groups"]
    listed = [group.get("params") for group in saved["param_groups"]]
    if listed != [group["params"] for group in own]:
        raise ValueError("its optimizer has other parameter groups than this run")
    for theirs, ours in zip(saved["param_groups"], own, strict=True):
        if unknown := sorted(map(str, set(theirs) - set(ours))):
            raise ValueError(f"its optimizer has settings unknown to this one: {unknown[:5]}")
        for name, value in theirs.items():
            _check_setting(name, value, ours[name])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if strange := [i for i in saved["state"] if not 0 <= i < len(parameters)]:
        raise ValueError(f"its optimizer has states of parameters {strange[:5]}, but there are {len(parameters)}")
    needed: set[str] = next((keys for kind, keys in _STATE.items() if isinstance(optimizer, kind)), set())
    for i, state in saved["state"].items():
        if not needed <= set(state) or set(state) != set(next(iter(saved["state"].values()))):
            raise ValueError(f"its optimizer has the state {sorted(map(str, state))} of parameter {i}")
        for name, value in state.items():
            if isinstance(value, Tensor):
                _check_state(str(name), value, parameters[i], optimizer)


def _check_setting(name: str, value: Any, own: Any) -> None:
    number = type(own) in (int, float) or isinstance(own, Tensor)
    given = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
    if number and (type(given) not in (int, float) or not math.isfinite(given)):
        raise ValueError(f"its optimizer has {name}={value}")
    if type(own) is bool and type(value) not in (bool, type(None)):
        raise ValueError(f"its optimizer has {name}={value}")
    if isinstance(own, tuple) and (not isinstance(value, list | tuple) or len(value) != len(own)):
        raise ValueError(f"its optimizer has {name}={value}")


def _check_state(name: str, value: Tensor, parameter: Tensor, optimizer: optim.Optimizer) -> None:
    _check_storage(value)
    what = f"{name} of {value.dtype} {list(value.shape)} for a parameter of {parameter.dtype} {list(parameter.shape)}"
    if isinstance(optimizer, _ELEMENTWISE):
        scalar = not value.dim() and name in _SCALARS
        if not scalar and (value.shape != parameter.shape or value.dtype != parameter.dtype):
            raise ValueError(f"its optimizer has {what}")
    if not value.isfinite().all():
        raise ValueError(f"its optimizer has {what} that is not finite")


_SCHEDULES = ("step", "state_dict", "load_state_dict")


def _made_by(scheduler: MakeScheduler, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    try:
        made = scheduler(optimizer)
    except TypeError as error:
        raise TypeError(f"scheduler(optimizer) fails: {error}") from error
    if not all(callable(getattr(made, name, None)) for name in _SCHEDULES):
        what = f"an object with {', '.join(_SCHEDULES)}"
        raise TypeError(f"scheduler(optimizer) makes {what}, but it made {shown(made)}")
    return made


class Run:
    """The state of a training run: the contents of a checkpoint, and snapshots of parameters.

    Args:
        model: the model.
        guide: its guide.
        trained: the parameters that the run updates.
        optimizer: of ``trained``.
        scheduler: called with the optimizer, or None.
        history: the history so far; :meth:`load` fills it in place.

    Attributes:
        best: a snapshot of the best epoch by validation.
        average: the average of the parameters over the steps, if it is kept.
        recent: the validation bound of each data point after the last epochs, if the run stops by it.
        identity: of the run, in every checkpoint that it writes.
        written: the identity of the checkpoint file as this run last saw it.
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
        self.scheduler = None if scheduler is None else _made_by(scheduler, optimizer)
        self.best: list[Tensor] | None = None
        self.average: Average | None = None
        self.recent: list[Tensor] = []
        self.configuration: dict[str, Any] = {}
        self.settings = Settings()
        self.buffers = [buffer for module in owners_of(model, guide) for buffer in module.buffers()]
        self._known = set(trained)
        self.identity = secrets.token_hex(8)  # from the system, so that no random stream changes
        self.written: FileMark | None = None

    def adopt(self, parameters: Iterable[nn.Parameter]) -> None:
        """Also train new ones of these parameters, in the optimizer's first group, whose rates schedulers change."""
        for p in parameters:
            if p not in self._known:
                self._known.add(p)
                self.trained.append(p)
                self.optimizer.param_groups[0]["params"].append(p)

    def names(self) -> list[str]:
        """A name and shape for each trained parameter, equal in every process."""
        known, store = named_parameters(self.model, self.guide), pyro.get_param_store()
        return [f"{known.get(id(p)) or store.param_name(p)} {list(p.shape)}" for p in self.trained]

    def snapshot(self) -> list[Tensor]:
        """A copy of the buffers and the trained parameters."""
        return [p.detach().clone() for p in [*self.buffers, *self.trained]]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Write a snapshot back, in place."""
        for p, value in zip(
            [*self.buffers, *self.trained], values, strict=False
        ):  # parameters created later are not changed
            p.copy_(value)

    def _with_buffers(self, values: list[Tensor]) -> list[Tensor]:
        """A snapshot of 0.1.0, which lacks buffers of modules that functions hold: their present values."""
        given = len(values) - len(self.trained)
        return [*values[:given], *(buffer.detach().clone() for buffer in self.buffers[given:]), *values[given:]]

    def _check_alone(self, path: str | os.PathLike[str]) -> None:
        """Raise FileExistsError if another run, or this run in another process, has written the checkpoint since."""
        now = mark_of(path)
        if now is None or now == self.written:
            return
        with suppress(ValueError, FileNotFoundError):  # a damaged file is not from this run
            state = read_contents(path)
            if (state["settings"].get("identity"), len(state["history"].elbo) + 1) == (
                self.identity,
                len(self.history.elbo),
            ):
                return  # it was copied or touched
        raise FileExistsError(
            errno.EEXIST,
            f"{path} was written by another run since the last epoch of this run: use a separate checkpoint or folder "
            "for each run",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, in process 0 only, with the random streams of all processes.

        Raises:
            FileExistsError: if another run writes to the same file.
        """
        streams = processes.gathered((torch.get_rng_state(), accelerator_states()))
        if processes.rank():
            return
        self._check_alone(path)
        self.settings["identity"] = self.identity
        write_checkpoint(
            path,
            {
                "names": self.names(),
                "parameters": self.snapshot(),
                "best": self.best,
                **self._averages(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "history": self.history.to_dict(),
                "settings": {**self.settings, "configuration": self.configuration},
                "random": torch.get_rng_state(),
                "random_cuda": accelerator_states(),
                **({"random_of": [list(of) for of in zip(*streams, strict=True)]} if len(streams) > 1 else {}),
            },
        )
        self.written = mark_of(path)

    def _averages(self) -> dict[str, Any]:
        recent = {"recent": self.recent} if self.recent else {}
        if self.average is None:
            return recent
        return {**recent, "average": self.average.of(self.trained), "average_steps": self.average.steps}

    def measured(self) -> AbstractContextManager[None]:
        """A block in which the parameters are those to be measured: their averages, if these are kept."""
        return nullcontext() if self.average is None else self.average.used(self.trained)

    def load(self, path: str | os.PathLike[str], state: Contents) -> None:
        """Continue from the contents of a checkpoint: parameters, optimizer, random stream, history.

        Raises:
            ValueError: if it belongs to another model or guide, or was started with other data or settings.
        """
        saved, own = state["names"], self.names()
        if saved != own:
            raise ValueError(
                f"{path} is a checkpoint of another model or guide: only it has {sorted(set(saved) - set(own))}, only "
                f"these have {sorted(set(own) - set(saved))}; build model and guide as before, or start without resume"
            )
        values = self._with_buffers(state["parameters"])
        shapes = [list(p.shape) for p in [*self.buffers, *self.trained]]
        if (given := [list(value.shape) for value in values]) != shapes:
            raise ValueError(
                f"{path} is a checkpoint of another model or guide: its buffers and parameters have the shapes "
                f"{given}, these have {shapes}; build model and guide as before, or start without resume"
            )
        begun = state["settings"].get("configuration", {})
        if differs := {name: value for name, value in begun.items() if self.configuration.get(name) != value}:
            now = {name: self.configuration.get(name) for name in differs}
            raise ValueError(
                f"{path} was started with {differs}, but now got {now}: use the first settings, or start without "
                "resume (jensen.inference.restore loads the parameters of a checkpoint)"
            )
        best = None if state["best"] is None else self._with_buffers(state["best"])
        try:
            own_values = [*self.buffers, *self.trained]
            _check_like(values, own_values, "buffers and parameters")
            if best is not None:
                _check_like(best, own_values, "best buffers and parameters")
            _check_optimizer(state["optimizer"], self.optimizer)
            if (self.average is None) != ("average" not in state):
                raise ValueError(
                    "an average of the parameters is kept by the checkpoint or by this run, but not by both"
                )
            if self.average is not None:
                _check_like(state["average"], self.trained, "averages")
            if (self.scheduler is None) != (state["scheduler"] is None):
                raise ValueError("a scheduler is used by the checkpoint or by this run, but not by both")
            if state["random"].shape != torch.get_rng_state().shape:
                raise ValueError("its random state is that of another generator")
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be resumed by this run: {error}; build model, guide and optimizer as before, or delete "
                "the file and start again"
            ) from error
        self.restore(values)
        self.best = best
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load(self.trained, state["average"], state["average_steps"])
        self.recent = list(state.get("recent", []))
        self.settings = state["settings"]
        self.identity = self.settings.get("identity", self.identity)
        vars(self.history).update(vars(state["history"]))
        (streams, others), here = state.get("random_of", ([state["random"]], [state["random_cuda"]])), processes.rank()
        if here and len(streams) != processes.count():  # there were fewer or more: a new stream for each epoch
            torch.manual_seed(derived_seed(torch.initial_seed(), "epoch", len(self.history.elbo)))
            return
        torch.set_rng_state(streams[here])
        set_accelerator_states(others[here])


def named_parameters(model: Program, guide: Program) -> dict[int, str]:
    """The names of the parameters that the modules of model and guide own, by the parameters' ids."""
    owners = {"model": own_modules(model), "guide": own_modules(guide)}
    modules = [(prefix, module) for prefix, modules_of in owners.items() for module in modules_of]
    return {id(p): f"{prefix}.{name}" for prefix, m in modules for name, p in m.named_parameters()}


def _called(program: Program) -> str:
    return str(getattr(program, "__qualname__", type(program).__name__))


def mark_of(path: str | os.PathLike[str]) -> FileMark | None:
    """The identity of a file, which changes if another file replaces it; None without a file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@checked
@torch.no_grad()
def restore(model: Program, guide: Program, checkpoint: str | os.PathLike[str], *, best: bool = True) -> History:
    """Load the parameters of a checkpoint into a model and its guide, to measure them or to sample from them.

    The file is read with ``weights_only=True``: no code from the file is executed. To continue training, pass the file
    to :func:`~jensen.inference.fit` instead.

    Args:
        model: built as the model of the run was.
        guide: built as the guide of the run was.
        checkpoint: the file that ``fit(..., checkpoint=...)`` wrote.
        best: whether to load the parameters of the best validation epoch, if the run had ``patience``; otherwise
            those of the last epoch (their average, if the run kept one).

    Returns:
        The :class:`~jensen.inference.History` so far.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, if it belongs to another model or guide, or if model and guide are swapped.

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
    state = read_contents(checkpoint)
    owned, names = named_parameters(model, guide), state["names"]
    parameters = {p for module in own_modules(model, guide) for p in module.parameters()}
    own = {f"{owned[id(p)]} {list(p.shape)}": p for p in parameters}
    buffers = [buffer for module in owners_of(model, guide) for buffer in module.buffers()]
    values = state["parameters"]
    if average := state.get("average"):
        values = [*values[: -len(average)], *average]
    values = state["best"] if best and state["best"] is not None else values
    values, given = values[-len(names) :], values[: -len(names)]
    buffers = buffers[: len(given)]  # a file of 0.1.0 lacks those of modules that functions hold
    if set(names) - set(own) or [b.shape for b in buffers] != [b.shape for b in given]:
        got = f"model={_called(model)} and guide={_called(guide)}"
        other = {"model": "guide", "guide": "model"}
        swapped = {f"{other[half]}.{rest}" for half, _, rest in (name.partition(".") for name in own)}
        if set(names) <= swapped:
            raise ValueError(
                f"restore got {got}, but in {checkpoint} the parameters of the first are those of the guide, and those "
                "of the second are the model's: call restore(model, guide, checkpoint) in this order"
            )
        raise ValueError(
            f"{checkpoint} does not belong to {got}: only it has {sorted(set(names) - set(own))}, only these have "
            f"{sorted(set(own) - set(names))}; build model and guide as they were in that run"
        )
    targets = [*buffers, *(own[name] for name in names)]
    try:
        if len(given) + len(values) != len(targets):
            raise ValueError(f"it has {len(values)} parameters for {len(names)} names")
        for target, value in zip(targets, [*given, *values], strict=True):
            _check_like([value.to(target.dtype)], [target], "buffers and parameters")
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} does not fit this model and guide: {error}; build both as they were in that run"
        ) from error
    for target, value in zip(targets, [*given, *values], strict=True):
        target.copy_(value)
    return state["history"]
