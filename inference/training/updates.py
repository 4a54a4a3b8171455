r"""The update of an optimizer as operations on tensors, so that a graph can contain it beside the gradient.

The optimizer of ``torch.optim`` remains the owner of its state: its own tensors are updated here, so a checkpoint, a
scheduler or a step of the optimizer itself finds valid state.

| optimizer | update of p by the gradient g |
| --- | --- |
| Adam, AdamW | m = lerp(m, g, 1 - b1), v = b2 v + (1 - b2) g^2, p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps) |
| SGD | b = momentum b + (1 - dampening) g, p -= lr b |

Numbers that schedulers move (rates, momenta) are passed in as a tensor.
"""

from __future__ import annotations

__all__ = ["Update", "update_of"]

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]


class Update(ABC):
    """The update of one kind of optimizer.

    Args:
        optimizer: the optimizer, whose state and groups are read.
        parameters: those that have a gradient, in their order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.device = parameters[0].device
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.groups = [group_of[p] for p in parameters]
        self.recount()
        self.moments = [self.make(p, optimizer.param_groups[i]) for p, i in zip(parameters, self.groups, strict=True)]

    def recount(self) -> None:
        """Read from the optimizer the number of steps it has taken with each parameter."""
        self.before = [self.taken(p) for p in self.parameters]

    @abstractmethod
    def taken(self, p: nn.Parameter) -> int:
        """The number of steps the optimizer has taken with a parameter."""

    @abstractmethod
    def make(self, p: nn.Parameter, group: Group) -> list[Tensor]:
        """The tensors of the optimizer's state for a parameter; created if missing."""

    @abstractmethod
    def numbers(self, group: Group, step: int) -> list[float]:
        """The numbers of a group that the update reads at a step, counted from 1."""

    @abstractmethod
    def apply(self, i: int, p: Tensor, g: Tensor, moments: list[Tensor], numbers: Tensor) -> list[Tensor]:
        """The new value of parameter i, and the new values of its moments."""

    @abstractmethod
    def told(self, p: nn.Parameter, step: int) -> None:
        """Write into the optimizer's state the number of steps taken with a parameter."""

    def hyper(self, step: int) -> Tensor:
        """The numbers of every parameter at a step of this update, [parameters, numbers], in float64."""
        groups = self.optimizer.param_groups
        if len(set(self.before)) == 1 and len(groups) == 1:
            return torch.tensor(
                [self.numbers(groups[0], self.before[0] + step)], dtype=torch.float64, device=self.device
            )
        rows = [self.numbers(groups[i], n + step) for i, n in zip(self.groups, self.before, strict=True)]
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    def tell(self, step: int) -> None:
        """Record in the optimizer that ``step`` steps were taken here, and count from there."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else its scheduler warns
        for p, n in zip(self.parameters, self.before, strict=True):
            self.told(p, n + step)
        self.recount()


class _Adam(Update):
    def taken(self, p: nn.Parameter) -> int:
        return int(self.optimizer.state[p].get("step", 0))

    def make(self, p: nn.Parameter, group: Group) -> list[Tensor]:
        state = self.optimizer.state[p]
        where = p.device if group["fused"] or group["capturable"] else None
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=where))
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return [state[name] for name in names if name in state]

    def numbers(self, group: Group, step: int) -> list[float]:
        (b1, b2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        decoupled = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        kept, added = (1 - lr * decay, 0.0) if decoupled else (1.0, decay)
        return [lr / (1 - b1**step), (1 - b2**step) ** -0.5, b1, b2, group["eps"], kept, added]

    def apply(self, i: int, p: Tensor, g: Tensor, moments: list[Tensor], numbers: Tensor) -> list[Tensor]:
        rate, correction, b1, b2, eps, kept, added = numbers.unbind()
        g = -g if self.optimizer.param_groups[self.groups[i]]["maximize"] else g
        p, g = p * kept, g - (-added) * p  # a sum would be fused into the product that made g, at the cost of a copy
        first, second, *largest = moments
        first = first + (1 - b1) * (g - first)
        second = b2 * second + (1 - b2) * g * g
        largest = [torch.maximum(largest[0], second)] if largest else []
        size = (largest[0] if largest else second).sqrt() * correction + eps
        return [p - rate * first / size, first, second, *largest]

    def told(self, p: nn.Parameter, step: int) -> None:
        self.optimizer.state[p]["step"].fill_(step)


class _SGD(Update):
    def taken(self, p: nn.Parameter) -> int:
        return int(self.optimizer.state[p].get("momentum_buffer") is not None)

    def make(self, p: nn.Parameter, group: Group) -> list[Tensor]:
        if not group["momentum"]:
            return []
        state = self.optimizer.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        return [state["momentum_buffer"]]

    def numbers(self, group: Group, step: int) -> list[float]:
        taken_in = 1.0 if step == 1 else 1 - group["dampening"]  # the first buffer is the gradient itself
        return [float(group["lr"]), group["momentum"], taken_in, group["weight_decay"]]

    def apply(self, i: int, p: Tensor, g: Tensor, moments: list[Tensor], numbers: Tensor) -> list[Tensor]:
        lr, momentum, taken_in, decay = numbers.unbind()
        group = self.optimizer.param_groups[self.groups[i]]
        g = (-g if group["maximize"] else g) + decay * p
        if not moments:
            return [p - lr * g]
        buffer = momentum * moments[0] + taken_in * g
        return [p - lr * (g + momentum * buffer if group["nesterov"] else buffer), buffer]

    def told(self, p: nn.Parameter, step: int) -> None:
        """Its state holds no count."""


_KINDS: dict[type, type[Update]] = {torch.optim.Adam: _Adam, torch.optim.AdamW: _Adam, torch.optim.SGD: _SGD}


def update_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Update | None:
    """The update of exactly this class of optimizer, or None if it is not implemented here."""
    kind = _KINDS.get(type(optimizer))
    return None if kind is None else kind(optimizer, parameters)
