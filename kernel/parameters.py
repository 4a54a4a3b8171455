"""Parameters: a module's own values count, not the values that Pyro's store holds under the same name.

Pyro's store is global and works by name. A ``PyroModule`` that reads a ``PyroParam`` takes the value stored under its
name, whatever its origin: a second module without a name silently becomes the first. Under ``pyro.module`` the reverse
happens: the module computes with its own parameters, while optimizers receive those of the store, which then never
change. Here the modules *claim* their names: the store holds their own parameters while they are trained or measured.
An AutoGuide makes its parameters at its first call; it takes them from a store that was loaded, as in Pyro.
"""

from __future__ import annotations

__all__ = [
    "ParametersRead",
    "claim_parameters",
    "claiming",
    "is_autoguide",
    "mark_trained",
    "own_modules",
    "owners_of",
    "store_kept",
    "tensors_of",
    "trainable",
]

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

from .alone import alone
from .caller import outside
from .holders import modules_held
from .randomness import forked_rng
from .sites import Program

Result = TypeVar("Result")

_EARLIER = "earlier."
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # unconstrained parameters of PyroModules that were run here
_trained: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters of AutoGuides that were trained here


def claim_parameters(model: Program, guide: Program) -> None:
    """Put the parameters of the PyroModules into Pyro's store, where it holds other values under their names.

    Raises:
        ValueError: if model and guide have a constrained parameter of the same name, which Pyro would merge.

    Warns:
        UserWarning: if the store held other values, and if an AutoGuide will start from values that it holds.
    """
    seen: dict[str, Tensor] = {}
    for half in own_modules(model, guide):
        for name, value, constrained in _parameters(half, half._pyro_name) if isinstance(half, PyroModule) else ():
            if constrained and seen.setdefault(name, value) is not value:
                raise ValueError(
                    f"model and guide both have a constrained parameter named '{name}', and Pyro would merge them: "
                    "give one of the modules a name (super().__init__(name=...))"
                )
    own: dict[str, Tensor | None] = {}  # None: two modules share the name, and each reads its own value
    limits: dict[str, Any] = {}
    plain: dict[Tensor, bool] = {}
    unmade: list[AutoGuide] = []
    for root in _roots(owners_of(model, guide)):
        if is_autoguide(root) and root.prototype_trace is None:
            unmade.append(root)
        for name, value, constrained in _parameters(root, root._pyro_name):
            own[name] = value if own.setdefault(name, value) is value else None
            if not constrained:
                plain[value] = True
        limits |= _constraints(root, root._pyro_name)
    _claim({name: value for name, value in own.items() if value is not None}, limits, _known)
    _known.update(plain)
    for new in unmade:
        _before_the_first_call(new)


def claiming(run: Callable[[], Result]) -> Result:
    """Run model and guide; the modules that they register by ``pyro.module`` replace others in Pyro's store.

    If ``update_module_params=True`` reads the store's values into a module, these are its own from the next run on.

    Returns:
        The result of the run; of a second run, if the first one changed modules.

    Warns:
        UserWarning: if the store held other values under the names of modules.
    """
    with ParametersRead() as first:
        result = run()
    if not first.clashes():
        return result
    with forked_rng(), ParametersRead() as second:
        again = run()
    if clashes := second.clashes():
        _claim(clashes, {})
        return result
    return again


def mark_trained(*programs: Program) -> None:
    """Mark the values of AutoGuides as trained: a new AutoGuide of the same name does not start from them."""
    for guide in filter(is_autoguide, owners_of(*programs)):
        _trained.update(dict.fromkeys(guide.parameters(), True))


@contextmanager
def store_kept(earlier: bool = False) -> Iterator[None]:
    """Restore Pyro's store after values are claimed inside the block, in which no other thread runs programs.

    Args:
        earlier: keep the claimed values, and store the previous ones under the prefix ``"earlier."``.
    """
    with alone():
        store = pyro.get_param_store()
        before, limits = dict(store._params), dict(store._constraints)
        try:
            yield
        finally:
            _give_back(before, limits, earlier)


def _give_back(before: dict[str, Tensor], limits: dict[str, Any], earlier: bool) -> None:
    """Put replaced values back into Pyro's store; under another name if ``earlier``."""
    store = pyro.get_param_store()
    for name, value in before.items():
        now = store._params.get(name)
        if now is value or (earlier and name.startswith(_EARLIER)):
            continue
        if now is None or now.shape != value.shape or now.data_ptr() != value.data_ptr():
            _enter(_EARLIER + name if earlier else name, value, limits[name])


class ParametersRead(Messenger):
    """Collects the parameters that Pyro programs read inside the block.

    For a module registered by ``pyro.module``, its own parameters are collected, whatever the store holds.

    Attributes:
        parameters: the (unconstrained) parameters, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[nn.Parameter, None] = {}
        self._registered: dict[str, dict[nn.Parameter, None]] = {}

    def clashes(self) -> dict[str, Tensor]:
        """The parameters of registered modules that differ from the store's; not if two modules share the name."""
        stored = pyro.get_param_store()._params
        own = {name: next(iter(values)) for name, values in self._registered.items() if len(values) == 1}
        return {name: value for name, value in own.items() if stored.get(name) is not value}

    def _pyro_post_param(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        if "$$$" in name and isinstance(given, Tensor):
            self._registered.setdefault(name, {})[given] = None  # type: ignore[index]
            self.parameters[given] = None  # type: ignore[index]
        else:
            self.parameters[value.unconstrained()] = None


def _claim(own: Mapping[str, Tensor], limits: Mapping[str, Any], known: Container[Tensor] = ()) -> None:
    """Enter parameters into the store; warn if it held other values that are unknown, or that Pyro would read."""
    store = pyro.get_param_store()
    taken = [name for name, value in own.items() if store._params.get(name, value) is not value]
    said = [name for name in taken if name in limits or store._params[name] not in known]
    for name in taken:
        _enter(name, own[name], limits.get(name, constraints.real))
    if said:
        ways = dict.fromkeys(_way_in(name, name in limits) for name in said)
        warnings.warn(
            f"Pyro's parameter store held other values under the names {_listed(said)} than the modules: they were "
            "loaded, or left by other modules of the same name. The modules' own values count; measuring leaves the "
            f"store unchanged, and fit keeps its values under '{_EARLIER}<name>'. To continue from them, read them "
            f"into the modules ({', '.join(ways)}); to discard them, call pyro.clear_param_store()",
            stacklevel=outside(),
        )


def _way_in(name: str, constrained: bool) -> str:
    """How a module reads the value that the store holds under a name."""
    if constrained:
        return "one call of the program"
    registered = "$$$" in name
    return "pyro.module(name, module, update_module_params=True)" if registered else "p.data.copy_(pyro.param(name))"


def _listed(names: list[str]) -> list[str]:
    """The names of parameters; those of a registered module become the module's name."""
    return sorted({name.partition("$$$")[0] for name in names})


def _enter(name: str, value: Tensor, constraint: Any) -> None:
    """Make an unconstrained tensor the store's value under a name."""
    store = pyro.get_param_store()
    if name in store._params:
        store._param_to_name.pop(store._params[name], None)
    store._params[name] = value
    store._param_to_name[value] = name
    store._constraints[name] = constraint


def _before_the_first_call(guide: AutoGuide) -> None:
    """Warn which values an AutoGuide starts from if the store has its names; it ignores those trained for another."""
    store = pyro.get_param_store()
    found = [name for name in store if name.startswith(f"{guide._pyro_name}.")]
    others = [name for name in found if store._params[name] in _trained]
    for name in others:
        store._param_to_name.pop(store._params.pop(name), None)
        del store._constraints[name]
    if others:
        warnings.warn(
            f"Pyro's parameter store held other values under the names {others}: those of another "
            f"{type(guide).__name__}. This one starts anew; measuring leaves the store unchanged, and fit keeps its "
            f"values under '{_EARLIER}<name>'",
            stacklevel=outside(),
        )
    elif found:
        warnings.warn(
            f"this {type(guide).__name__} was not called before, so it takes the values that Pyro's parameter store "
            f"holds under the names {found}, as in Pyro; to start anew, call pyro.clear_param_store() first",
            stacklevel=outside(),
        )


def _roots(owners: list[nn.Module]) -> Iterator[PyroModule]:
    """The PyroModules among modules and their parts that are not parts of another one."""
    inner: set[int] = set()
    for part in (part for owner in owners for part in owner.modules()):
        if isinstance(part, PyroModule) and id(part) not in inner:
            inner |= {id(below) for below in part.modules()}
            yield part


def _parameters(module: PyroModule, prefix: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Name in Pyro's store, value, and whether constrained, of each parameter of a module."""
    dotted = f"{prefix}." if prefix else ""
    for name, value in module._parameters.items():
        if value is not None:
            plain = name.removesuffix("_unconstrained")
            constrained = plain in module._pyro_params
            yield dotted + (plain if constrained else name), value, constrained
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from _parameters(child, dotted + name)
        elif isinstance(child, nn.Module):
            for inner, value in child.named_parameters():
                yield f"{dotted}{name}$$${inner}", value, False
            for part in child.modules():  # for example in a ModuleList: Pyro does not name it by its place
                if isinstance(part, PyroModule):
                    yield from _parameters(part, part._pyro_name)


def _constraints(module: PyroModule, prefix: str) -> dict[str, Any]:
    """The constraints of a module's parameters, by name in Pyro's store."""
    dotted = f"{prefix}." if prefix else ""
    limits = {dotted + name: constraint for name, (constraint, _) in module._pyro_params.items()}
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            limits |= _constraints(child, dotted + name)
        elif isinstance(child, nn.Module):
            for part in child.modules():
                limits |= _constraints(part, part._pyro_name) if isinstance(part, PyroModule) else {}
    return limits


def is_autoguide(program: object) -> TypeGuard[AutoGuide]:
    """Whether a program is one of Pyro's AutoGuides, which hold a value per data point."""
    return isinstance(program, AutoGuide)


def own_modules(*programs: Program) -> list[nn.Module]:
    """The modules among programs, and the modules whose bound methods are programs."""
    owners = (getattr(program, "__self__", program) for program in programs)
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def owners_of(*programs: Program) -> list[nn.Module]:
    """The modules that programs hold in any place, their own modules first."""
    return list({id(module): module for module in (*own_modules(*programs), *modules_held(*programs))}.values())


def tensors_of(*programs: Program) -> list[Tensor]:
    """The parameters and buffers of the modules that programs hold, each once."""
    tensors = [t for owner in owners_of(*programs) for t in (*owner.parameters(), *owner.buffers())]
    return list({id(t): t for t in tensors}.values())


def trainable(
    model: Program, guide: Program, of_model: Iterable[nn.Parameter], of_guide: Iterable[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the model, and those of the guide only: owned or read.

    A parameter that only the guide reads belongs to the guide, even if the model's module owns it. For other modules
    that a program holds (in a function's closure), registration decides.
    """
    owners = [own_modules(half) for half in (model, guide)]
    owned = [[p for owner in modules for p in owner.parameters()] for modules in owners]
    of_guide_alone = set(of_guide) - set(of_model)
    if owners[0] == owners[1]:  # bound methods of one module: first the parameters that each one reads
        halves = [*of_model, *owned[0]], of_guide
    else:
        halves = [*owned[0], *of_model], [*owned[1], *of_guide]
    first = [p for p in dict.fromkeys(halves[0]) if p.requires_grad and p not in of_guide_alone]
    known = set(first)
    return first, [p for p in dict.fromkeys(halves[1]) if p.requires_grad and p not in known]
