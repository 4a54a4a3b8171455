r"""Float32 matrix products on the CPU: PyTorch's default library, or oneDNN where it is faster and as accurate.

Some processors run oneDNN's float32 products at twice the pace of the default library's. The setting that sends them
there, ``torch.set_float32_matmul_precision("medium")``, also *allows* oneDNN to round to bfloat16, which it does where
the processor has the units for it. So products are tried out first, once per process: the route is taken only where
its largest error against float64 is that of float32 sums.
"""

from __future__ import annotations

__all__ = ["float32_products", "is_float32", "product_route"]

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

from jensen.kernel.randomness import forked_rng

Route = Literal["auto", "default", "onednn"]

_chosen: Route = "auto"


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
    """Take the faster route meanwhile, or the one asked for; yields the one taken."""
    route = _chosen if route is None else route
    allowed = route != "default" and device.type == "cpu" and _setting() == "highest"
    taken: Route = "onednn" if allowed and _pays() else "default"
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
    if not torch.backends.mkldnn.is_available():
        return False
    with forked_rng():
        torch.manual_seed(0)
        a, b = torch.randn(256, 784), torch.randn(784, 400)
    exact = a.double() @ b.double()
    seconds: list[float] = []
    errors: list[float] = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            times = []
            for _ in range(12):
                start = time.perf_counter()
                product = a @ b
                times.append(time.perf_counter() - start)
        finally:
            torch.set_float32_matmul_precision("highest")
        seconds.append(min(times))
        errors.append(float((product - exact).abs().max()))
    return is_float32(errors[1], 784) and seconds[1] < 0.9 * seconds[0]


def is_float32(error: float, terms: int) -> bool:
    """Whether the largest error of a sum of so many products of standard normals is that of float32 arithmetic.

    Rounding to bfloat16 makes it a thousand times larger.
    """
    return bool(error < 50 * torch.finfo(torch.float32).eps * terms**0.5)
