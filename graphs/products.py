r"""Float32 matrix products on the CPU: PyTorch's default library, or oneDNN where it is faster and as accurate.

Some processors run oneDNN's float32 products at twice the pace of the default library's. The setting that sends them
there, ``torch.set_float32_matmul_precision("medium")``, also *allows* oneDNN to round to bfloat16, which it does where
the processor has the units for it. So products are tried out first, once per process: the route is taken only where
its largest error against float64 is that of float32 sums.
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

_chosen: Route = "auto"


@checked
def float32_products(route: Literal["auto", "default"]) -> None:
    """Choose how ``fit`` and ``evaluate`` multiply float32 matrices on the CPU, from now on in this process.

    Args:
        route: ``"auto"``: by oneDNN where a trial on this machine shows it faster and as accurate as float32;
            ``"default"``: by PyTorch's default. Whatever ``torch.set_float32_matmul_precision`` was set to, other than
            ``"highest"``, is left alone, and it is as before when they return.

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
    """Take the faster route meanwhile, or the one asked for; yields the one taken.

    Args:
        device: where products are made.
        route: that of a run that goes on here: it is not timed again, so that its digits stay what they were. None: the
            one that was chosen, and else what a trial says.

    Warns:
        UserWarning: where the run that goes on took oneDNN's products, which cannot be had here.
    """
    begun, route = route, _chosen if route is None else route
    allowed = route != "default" and device.type == "cpu" and _setting() == "highest"
    taken: Route = "onednn" if allowed and (_is_accurate() if begun == "onednn" else _pays()) else "default"
    if begun == "onednn" != taken:
        warnings.warn(
            "this run was begun with the float32 products of oneDNN, which are not to be had here (another processor "
            "or device, or torch.set_float32_matmul_precision was called): it goes on with the default's, so its last "
            "digits are not those of an uninterrupted run",
            stacklevel=outside(),
        )
    if taken == "onednn":
        torch.set_float32_matmul_precision("medium")
    try:
        yield taken
    finally:
        if taken == "onednn":
            torch.set_float32_matmul_precision("highest")


def _setting() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend
        return "by backend"


@cache
def _pays() -> bool:
    """Whether oneDNN's float32 products are faster here than the default library's, and as accurate."""
    if not _is_accurate():
        return False
    a, b = _factors()
    seconds = {"highest": math.inf, "medium": math.inf}
    for _ in range(12):  # in turn, so that a busy moment slows both
        for precision in seconds:
            start = time.perf_counter()
            _product(a, b, precision)
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    return seconds["medium"] < 0.9 * seconds["highest"]


@cache
def _is_accurate() -> bool:
    """Whether oneDNN's float32 products are to be had here, with the errors of float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = _factors()
    return is_float32(float((_product(a, b, "medium") - a.double() @ b.double()).abs().max()), a.shape[1])


def _factors() -> tuple[Tensor, Tensor]:
    with forked_rng():
        torch.manual_seed(0)
        return torch.randn(256, 784), torch.randn(784, 400)


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    torch.set_float32_matmul_precision(precision)
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision("highest")


def is_float32(error: float, terms: int) -> bool:
    """Whether the largest error of a sum of so many products of standard normals is that of float32 arithmetic.

    Rounding to bfloat16 makes it a thousand times larger.
    """
    return bool(error < 50 * torch.finfo(torch.float32).eps * terms**0.5)
