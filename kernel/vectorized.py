r"""Programs under ``torch.vmap``: sampling, writes and checks that a mapped program can do, each with its own rule.

``torch.vmap(program, randomness="different")`` runs a program once for all particles, and the program sees the shapes
that its author wrote. Almost every random operation of torch then samples for each particle; the others raise.
:func:`under_vmap` adds:

* an uninitialised tensor (``torch.empty``) belongs to each particle, so that in-place sampling works, as
  in ``torch.distributions``: ``torch.empty(shape).normal_()``;
* a write through a boolean mask becomes a ``torch.where``, and some operations without a rule in ``torch.vmap``
  are replaced by others: ``clamp_``, ``.data``, binomials of mixed shapes, fused attention, affine grids, recurrent
  networks;
* a Dirichlet (hence Beta, LKJ) is sampled by normalised gammas, a straight-through value by a shifted relaxed one,
  since ``torch.vmap`` does not support their derivatives in Pyro and torch;
* nothing is validated, since validation reads values.

Operations that cannot be done per particle raise: a seed or a generator inside the program, Python's or NumPy's random
numbers, a site whose sample is the same for every particle.
"""

from __future__ import annotations

__all__ = ["NotVectorized", "under_vmap"]

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Delta, ImproperUniform, Unit
from pyro.distributions.relaxed_straight_through import QuantizeBernoulli, QuantizeCategorical
from pyro.ops.special import _SafeLog
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.distributions import Distribution
from torch.distributions.dirichlet import _Dirichlet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import affine_grid, binary_cross_entropy_with_logits, dropout, linear
from torch.overrides import TorchFunctionMode

_EMPTY: set[Any] = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty}
_FILLED: set[Any] = {
    *(torch.zeros, torch.ones, torch.full, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, torch.clone, Tensor.clone),
}
_SELECTED = (
    "vmap: elements read or written through a boolean mask that differs between particles have no common shape: use "
    "torch.where(mask, a, b)"
)
_SMALL = 0.02  # below this concentration a gamma underflows in float64 once in a million draws
_BCE: Any = binary_cross_entropy_with_logits
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class NotVectorized(RuntimeError):
    """Raised inside :func:`under_vmap` if a program does something that differs when particles run together.

    Example:
        >>> issubclass(NotVectorized, RuntimeError)
        True
    """


@contextmanager
def under_vmap(*, buffers: bool = False) -> Iterator[None]:
    """Allow a Pyro program to sample, write and trace inside ``torch.vmap(..., randomness="different")``.

    Enter it around the call of the mapped function, with ``torch.fx.experimental.proxy_tensor.make_fx`` outside of it
    or not at all. Inside it, Pyro's and torch's validation are off, also for distributions built before.

    Args:
        buffers: whether tensors created with values (``torch.zeros``, ``torch.full``, ``clone``) also belong to each
            particle. A program that writes its latents into ``torch.zeros`` needs it; it multiplies the memory of
            every such tensor by K.

    Raises:
        NotVectorized: if the program seeds a random stream, samples from a ``torch.Generator``, from ``random`` or
            from ``numpy.random``, reads elements by a mask that differs between particles, or has a site with one
            sample for all particles.

    Example:
        >>> from pyro.distributions import Beta
        >>> def draw(scale):
        ...     return Beta(2.0 * scale, 3.0 * scale).rsample((4,))
        >>> with under_vmap():
        ...     z = torch.vmap(draw, randomness="different")(torch.ones(5))
        >>> z.shape, z.unique().numel()
        (torch.Size([5, 4]), 20)
    """
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(_replaced(Distribution, "_validate_args", _Unvalidated()))
        stack.enter_context(_replaced(_Dirichlet, "apply", staticmethod(_dirichlet)))
        stack.enter_context(_replaced(QuantizeCategorical, "apply", staticmethod(_one_hot)))
        stack.enter_context(_replaced(QuantizeBernoulli, "apply", staticmethod(_rounded)))
        stack.enter_context(_replaced(_SafeLog, "apply", staticmethod(_safe_log)))
        for owner, name in ((torch, "manual_seed"), (torch.random, "manual_seed"), (torch, "seed")):
            stack.enter_context(_replaced(owner, name, _no_seed))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fallback_warnings())
        stack.enter_context(_OneDrawEach())
        stack.enter_context(_PerParticle(_EMPTY | {Tensor.new} | (_FILLED if buffers else set())))
        before = _python_streams()
        yield
        if _python_streams() != before:
            raise NotVectorized(
                "the program uses Python's or NumPy's random numbers, which are the same for all particles under "
                "torch.vmap: sample with torch instead"
            )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class or module, and restore it afterwards, own or inherited."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _no_fallback_warnings() -> Iterator[None]:
    """Without torch's warning that an operation without a batching rule runs in a loop: slower, but correct."""
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # the state cannot be read
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


class _Unvalidated:
    """Replaces ``_validate_args`` of every distribution, whenever built, and keeps values that are set."""

    def __get__(self, instance: Any, owner: Any = None) -> bool:
        return False

    def __set__(self, instance: Any, value: bool) -> None:
        vars(instance)["_validate_args"] = value


def _no_seed(*args: Any, **kwargs: Any) -> Any:
    raise NotVectorized(
        "the program seeds torch's random stream, so every particle would have the same samples: seed outside of it"
    )


def _python_streams() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  the global stream is needed
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _mapped(tensor: Any) -> bool:
    """Whether a tensor has a value for each particle."""
    return isinstance(tensor, Tensor) and bool(_functorch.is_batchedtensor(tensor))


def _only_level() -> VmapInterpreter | None:
    """The map over particles; None outside of it, and inside other transforms."""
    stack = _functorch.get_interpreter_stack()
    if stack is None or len(stack) != 1:
        return None
    level = retrieve_current_functorch_interpreter()
    return level if isinstance(level, VmapInterpreter) else None


def _each(tensor: Any, filled: bool) -> Any:
    """A fresh tensor, made separate for each particle; unchanged if it already is, or without a map."""
    level = _only_level()
    if level is None or not isinstance(tensor, Tensor) or _mapped(tensor):
        return tensor
    if tensor.requires_grad and tensor.is_leaf:
        return tensor
    shape = (level.batch_size(), *tensor.shape)
    each = tensor.expand(shape).clone() if filled else tensor.new_empty(shape)
    return _functorch._add_batch_dim(each, 0, level.level())


class _Selected:
    """Elements read through a mask that differs between particles. Only a write through the same mask accepts them."""

    def __init__(self, source: Tensor, mask: Tensor) -> None:
        self.source, self.mask = source, mask

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotVectorized(_SELECTED)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotVectorized(_SELECTED)

    __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = __eq__ = __hash__ = __array__ = _refuse
    __float__ = __int__ = __index__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse


def _binomial(count: Tensor, prob: Tensor) -> Tensor:
    return torch.binomial(count + torch.zeros_like(prob), prob + torch.zeros_like(count))


def _clamp_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kept = tensor.clone() if torch.is_grad_enabled() else tensor  # autograd reads the old values
    return tensor.copy_(kept.clamp(*args, **kwargs))


def _affine_grid(theta: Tensor, size: Any, align_corners: bool | None = None) -> Tensor:
    """Sampling points of affinely transformed images: [B, H, W, 2] from theta [B, 2, 3]."""
    if not _mapped(theta) or len(size) != 4:
        return affine_grid(theta, size, align_corners)
    axes = []
    for n in size[2:]:
        ends = 0.0 if n < 2 else 1.0 if align_corners else (n - 1) / n
        axes.append(torch.linspace(-ends, ends, n, dtype=theta.dtype, device=theta.device))
    y, x = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)  # [H W, 3]
    return (points @ theta.mT).reshape(-1, *size[2:], 2)


def _cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """One operation for all particles if nothing is summed: torch's rule makes twelve, two of them exps."""
    level, given = _only_level(), {name for name, value in options.items() if value is not None}
    if level is None or given != {"reduction"} or options["reduction"] != "none" or logits.shape != target.shape:
        return _BCE(logits, target, **options)  # type: ignore[no-any-return]
    (logits, a), (target, b) = (_functorch._unwrap_batched(each, level.level()) for each in (logits, target))
    with level.lower():
        logits = logits[None] if a is None else logits.movedim(a, 0)
        target = target[None] if b is None else target.movedim(b, 0)
        each = _BCE(*torch.broadcast_tensors(logits, target), reduction="none")
    return each.squeeze(0) if a is b is None else _functorch._add_batch_dim(each, 0, level.level())


def _gru_step(i: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, -1), h.chunk(3, -1)
    update, new = torch.sigmoid(i_z + h_z), torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
    return (new + update * (state[0] - new),)


def _lstm_step(i: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    enter, forget, cell, leave = (i + h).chunk(4, -1)
    c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
    return torch.sigmoid(leave) * torch.tanh(c), c


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda i, h, state: (activation(i + h),)


def _cell(native: Any, step: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """One step of a recurrent network, written with operations that have a batching rule."""

    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if not any(map(_mapped, (x, *state, w_ih))):
            return native(x, hx, w_ih, w_hh, b_ih, b_hh)
        new = step(linear(x, w_ih, b_ih), linear(state[0], w_hh, b_hh), state)
        return new if isinstance(hx, tuple | list) else new[0]

    return run


def _recurrent(native: Any, step: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A recurrent network over a sequence, step by step; torch handles packed sequences and projections."""

    def run(*args: Any) -> Any:
        x, hx, weights, biased, layers, p, training, both, batch_first = args
        directions = 2 if both else 1
        several = isinstance(hx, tuple | list)
        states = tuple(hx) if several else (hx,)
        size = 4 if biased else 2
        packed = not isinstance(weights, tuple | list)
        if packed or not any(map(_mapped, (x, *states, *weights))) or len(weights) != size * layers * directions:
            return native(*args)
        x = x.transpose(0, 1) if batch_first else x  # [T, B, D]
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                w_ih, w_hh, *biases = weights[size * k : size * (k + 1)]
                b_ih, b_hh = biases or (None, None)
                state = tuple(each[k] for each in states)
                steps: list[Tensor] = []
                entered = linear(x.flip(0) if direction else x, w_ih, b_ih)  # [T, B, gates]
                for i in entered.unbind(0):
                    state = step(i, linear(state[0], w_hh, b_hh), state)
                    steps.append(state[0])
                outputs.append(torch.stack(steps[::-1] if direction else steps))
                last.append(state)
            x = torch.cat(outputs, -1)
            if p and training and layer < layers - 1:
                x = dropout(x, p)
        ends = tuple(torch.stack(each) for each in zip(*last, strict=True))
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return run


_STEPS = {
    "gru": _gru_step,
    "lstm": _lstm_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


_OTHERWISE: dict[Any, Callable[..., Any]] = {
    _DATA: lambda tensor, *_: tensor.detach(),
    Tensor.clamp_: _clamp_,
    torch.clamp_: _clamp_,
    Tensor.clamp_min_: lambda tensor, min: _clamp_(tensor, min=min),
    Tensor.clamp_max_: lambda tensor, max: _clamp_(tensor, max=max),
    torch.binomial: _binomial,
    affine_grid: _affine_grid,
    _BCE: _cross_entropy,
    **{getattr(torch, name): _recurrent(getattr(torch, name), step) for name, step in _STEPS.items()},
    **{getattr(torch, f"{name}_cell"): _cell(getattr(torch, f"{name}_cell"), step) for name, step in _STEPS.items()},
}


class _PerParticle(TorchFunctionMode):
    """Fresh tensors are separate per particle; masked reads and writes are ``torch.where``; generators are refused."""

    def __init__(self, fresh: set[Any]) -> None:
        super().__init__()
        self.fresh = fresh

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            raise NotVectorized(
                "the program samples from its own torch.Generator, which under torch.vmap does not give the samples of "
                "particles run alone: sample without a generator"
            )
        if function in self.fresh:
            return _each(function(*args, **kwargs), function not in _EMPTY)
        if function in _OTHERWISE:
            return _OTHERWISE[function](*args, **kwargs)
        if function is Tensor.__getitem__ and _is_mask(args[1]):
            return _Selected(*args)
        if function is Tensor.__setitem__:
            target, index, value = args
            if isinstance(value, _Selected):
                if index is not value.mask or value.source.shape != target.shape:
                    value._refuse()
                return _write(target, index, value.source)
            if _is_mask(index):
                tail = (1,) * (target.dim() - index.dim())
                value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
                if value.dim() > len(tail):
                    raise NotVectorized(_SELECTED)
                return _write(target, index, value)
        return function(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return _mapped(index) and index.dtype == torch.bool


def _write(target: Tensor, mask: Tensor, value: Tensor) -> None:
    """``target[mask] = value[mask]``: a mask indexes the leading dimensions."""
    mask = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
    target.copy_(torch.where(mask, value.to(target.dtype), target))


class _OneDrawEach(Messenger):
    """Refuses a site that samples one value for all particles, by any method."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Any] = []

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and msg["value"] is None and not site_is_subsample(msg):
            self.drawn.append(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not any(one is msg for one in self.drawn):
            return
        self.drawn = [one for one in self.drawn if one is not msg]
        value, stack = msg["value"], _functorch.get_interpreter_stack()
        if stack and isinstance(value, Tensor) and value.numel() and not _mapped(value) and not _is_point(msg["fn"]):
            raise NotVectorized(
                f"site '{msg['name']}': {type(msg['fn']).__name__} sampled one value for all particles under "
                "torch.vmap: its sample must use torch's random operations, outside of autograd functions"
            )


def _is_point(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta | Unit | ImproperUniform)


def _dirichlet(concentration: Tensor) -> Tensor:
    r"""Samples from a Dirichlet as normalised gammas, whose implicit derivatives ``torch.vmap`` supports: [..., C].

    If a concentration a is so small that a gamma would underflow, it is sampled as
    :math:`\log g_a = \log g_{a + 1} + \log(u) / a`.
    """
    a = concentration.double()
    small = a < _SMALL
    log_g = torch._standard_gamma(torch.where(small, a + 1, a)).log()
    boost = torch.log1p(-torch.rand(a.shape, dtype=a.dtype, device=a.device)) / a
    x = torch.softmax(log_g + torch.where(small, boost, 0.0), -1).to(concentration.dtype)
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.tiny, 1 - limits.eps / 2)


def _one_hot(soft: Tensor) -> Tensor:
    hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return _straight_through(hard, soft)


def _rounded(soft: Tensor) -> Tensor:
    return _straight_through(soft.round().detach(), soft)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard value with the derivative of the relaxed one, which Pyro's log-density reads."""
    value: Any = hard + (soft - soft.detach())
    value._unquantize = soft
    return value  # type: ignore[no-any-return]


def _safe_log(x: Tensor) -> Tensor:
    """The logarithm with a derivative of at most 1 / eps, as in Pyro."""
    at = x.detach()
    return at.log() + (x - at) / at.clamp(min=torch.finfo(x.dtype).eps)
