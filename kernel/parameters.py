"""Whose values count: a module's own parameters, not what Pyro's store holds under the same name.

Pyro's store is global and works by name. A ``PyroModule`` that reads a ``PyroParam`` takes the value stored under its
name, whoever put it there: a second nameless module, or a second AutoGuide of one class, silently becomes the first.
"""

from __future__ import annotations

__all__ = ["claim_parameters", "is_autoguide", "owners_of", "tensors_of", "trainable"]

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn


def claim_parameters(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Clear Pyro's store of entries that stand under the names of the pair's modules but are not theirs.

    Raises:
        ValueError: if model and guide have a constrained parameter of the same name, which Pyro would merge.

    Warns:
        UserWarning: if the store held other values for constrained parameters of the pair.
    """
    store = pyro.get_param_store()
    taken: list[str] = []
    seen: dict[str, Tensor] = {}
    for half in (model, guide):
        half = getattr(half, "__self__", half)  # a bound method's module
        if not isinstance(half, PyroModule):
            continue
        own = list(_parameters(half, half._pyro_name))
        for name, value, constrained in own:
            if constrained and seen.setdefault(name, value) is not value:
                raise ValueError(
                    f"model and guide both have a constrained parameter named '{name}', and Pyro would make them one: "
                    "give one of the modules a name (super().__init__(name=...))"
                )
            if name in store and store._params[name] is not value:
                del store[name]
                taken += [name] * constrained
        if is_autoguide(half):  # it makes its parameters when first called, from the store if it can
            names = {name for name, _, _ in own}
            stale = [name for name in list(store) if name.startswith(f"{half._pyro_name}.") and name not in names]
            for name in stale:
                del store[name]
            taken += stale
    if taken:
        warnings.warn(
            f"Pyro's parameter store held other values under the names {sorted(taken)} than this pair's modules, left "
            "by modules of the same name, or loaded; the modules' own values count. Give modules names of their own; "
            "after pyro.get_param_store().load(...), call the model and the guide once to read them in",
            stacklevel=4,
        )


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
            for part in child.modules():  # in a ModuleList, say: Pyro does not name it after its place
                if isinstance(part, PyroModule):
                    yield from _parameters(part, part._pyro_name)


def is_autoguide(program: object) -> TypeGuard[AutoGuide]:
    """Whether a program is one of Pyro's AutoGuides: it is made for given data, and holds a value for each of them."""
    return isinstance(program, AutoGuide)


def owners_of(*programs: Callable[..., Any]) -> list[nn.Module]:
    """The modules among programs, and those whose bound methods programs are."""
    owners = (getattr(program, "__self__", program) for program in programs)
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def tensors_of(*programs: Callable[..., Any]) -> list[Tensor]:
    """The parameters and buffers of the modules behind programs, each once."""
    tensors = [t for owner in owners_of(*programs) for t in (*owner.parameters(), *owner.buffers())]
    return list({id(t): t for t in tensors}.values())


def trainable(
    model: Callable[..., Any], guide: Callable[..., Any], of_model: list[nn.Parameter], of_guide: list[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the model, and those of the guide alone: what they own, and what they read."""
    owners = [owners_of(half) for half in (model, guide)]
    if owners[0] and owners[0] == owners[1]:  # bound methods of one module: each half has what it reads
        rest = set(of_model) | set(of_guide)
        of_model = [*of_model, *(p for p in owners[0][0].parameters() if p not in rest)]
        owners = [[], []]
    owned = [[p for owner in modules for p in owner.parameters()] for modules in owners]
    first = [p for p in dict.fromkeys([*owned[0], *of_model]) if p.requires_grad]
    known = set(first)
    return first, [p for p in dict.fromkeys([*owned[1], *of_guide]) if p.requires_grad and p not in known]
