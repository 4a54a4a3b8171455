r"""Float32 matrix products on the CPU: PyTorch's default library, or oneDNN where it is faster and as accurate.

Some processors run oneDNN's float32 products at twice the speed of the default library. The setting that selects
oneDNN, ``torch.set_float32_matmul_precision("medium")``, also *allows* it to round to bfloat16, which it does if the
processor supports it. So products are tried out first, once per process: oneDNN is used only if its largest error
against float64 is that of float32 sums.
"""

from __future__ import annotations

__all__ = ["float32_products", "is_float32", "product_route"]

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from jensen.checked import checked
from jensen.kernel.caller import outside
from jensen.kernel.randomness import forked_rng

Route = Literal["auto", "default", "onednn"]

_PAYS = 0.75  # of the time of the default library: far from 1, so that a busy moment does not change a run's digits

_chosen: Route = "auto"
_ours = False  # whether the present setting is that of a surrounding block with oneDNN


@checked
def float32_products(route: Literal["auto", "default"]) -> None:
    """Choose how ``fit`` and ``evaluate`` multiply float32 matrices on the CPU, from now on in this process.

    Args:
        route: ``"auto"``: with oneDNN if a trial on this machine shows it faster and as accurate as float32;
            ``"default"``: with PyTorch's default. A value of ``torch.set_float32_matmul_precision`` other than
            ``"highest"`` is not changed; the previous setting is restored when they return.

    Raises:
        ValueError: for another route.

    Example:
        >>> float32_products("default")
        >>> float32_products("auto")
    """
    global _chosen
    if route not in ("auto", "default"):
        raise ValueError(f"route is 'auto' or 'default', but got {route!r}")
    _chosen = route


@contextmanager
def product_route(device: torch.device, route: Route | None = None) -> Iterator[Route]:
    """Use the faster library, or the requested one, inside the block; yields the one in use.

    Blocks may be nested, as where a callback of a run trains or measures: each has its own library.

    Args:
        device: the device of the products.
        route: the library of a resumed run, which is used without a trial, so that its digits do not change. None: the
            chosen one, else the result of a trial.

    Warns:
        UserWarning: if the resumed run used oneDNN's products, which are not available here.
    """
    global _ours
    before, outer = _setting(), _ours
    free = before == "highest" or (outer and before == "medium")
    begun, route = route, _chosen if route is None else route
    allowed = route != "default" and device.type == "cpu" and free
    taken: Route = "onednn" if allowed and (_is_accurate() if begun == "onednn" else _pays()) else "default"
    if begun == "onednn" != taken:
        warnings.warn(
            "this run was started with the float32 products of oneDNN, which are not available here (another processor "
            "or device, or torch.set_float32_matmul_precision was called). It continues with the default library, so "
            "its last digits differ from those of an uninterrupted run",
            stacklevel=outside(),
        )
    here = ("medium" if taken == "onednn" else "highest") if free else before
    if here != before:
        torch.set_float32_matmul_precision(here)
    _ours = free and taken == "onednn"
    try:
        yield taken
    finally:
        _ours = outer
        if here != before:
            torch.set_float32_matmul_precision(before)


def _setting() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set separately for each backend
        return "by backend"


@cache
def _pays() -> bool:
    """Whether oneDNN's float32 products are much faster here than the default library's, and as accurate."""
    if not _is_accurate():
        return False
    a, b = _factors()
    seconds = {"highest": math.inf, "medium": math.inf}
    for _ in range(12):  # alternating, so that a busy moment slows both
        for precision in seconds:
            start = time.perf_counter()
            _product(a, b, precision)
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    return seconds["medium"] < _PAYS * seconds["highest"]


@cache
def _is_accurate() -> bool:
    """Whether oneDNN's float32 products are available here, with the errors of float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = _factors()
    return is_float32(float((_product(a, b, "medium") - a.double() @ b.double()).abs().max()), a.shape[1])


def _factors() -> tuple[Tensor, Tensor]:
    with forked_rng():
        torch.manual_seed(0)
        return torch.randn(256, 784), torch.randn(784, 400)


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision(before)


def is_float32(error: float, terms: int) -> bool:
    """Whether the largest error of a sum of ``terms`` products of standard normals is that of float32 arithmetic.

    Rounding to bfloat16 makes it a thousand times larger.
    """
    return bool(error < 50 * torch.finfo(torch.float32).eps * terms**0.5)
