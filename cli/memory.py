"""Arrays larger than memory: an error before they are created if the size is known, else a clear error after."""

from __future__ import annotations

__all__ = ["Within", "free_memory", "memory_told", "of_machine", "size_of", "training_memory"]

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
_WANTED = re.compile(r"tried to allocate (\d+) bytes|(?:unable|tried) to allocate ([\d.]+ \w+)", re.IGNORECASE)


@contextmanager
def memory_told() -> Iterator[None]:
    """Raise a MemoryError with a clear message if torch or NumPy cannot allocate an array."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text
        found = _WANTED.search(text)
        told = isinstance(error, MemoryError) and text and found is None  # it has a clear message already
        if told or not lacking:
            raise
        much = "" if found is None else f" ({found[2] or size_of(int(found[1]))} for one array)"
        raise MemoryError(
            f"not enough memory{much}: reduce what makes arrays large, such as the number of latents, the width of "
            "layers, the batch size or the number of samples"
        ) from error


def size_of(count: float) -> str:
    """A number of bytes, in a readable unit.

    Example:
        >>> size_of(1_024_000_000_000)
        '1.02 TB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def of_machine() -> float:
    """The memory of this machine or container in bytes; infinite if unknown."""
    found = [float("inf")]
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in _LIMITS:
        with suppress(OSError, ValueError):  # the file holds "max" if there is no limit
            found.append(int(Path(place).read_text()))
    return min(found)


def free_memory() -> float:
    """The free memory of this machine or container in bytes; ``JENSEN_FREE_MEMORY`` replaces it."""
    if given := os.environ.get("JENSEN_FREE_MEMORY"):
        return float(given)
    found = [of_machine()]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat.get("file", 0)))  # pages of files are given back
    return min(found)


class Within(TorchFunctionMode):
    """A block with a limit on the total bytes of new tensors; the tensor that exceeds it is not created.

    Args:
        limit: in bytes.
        what: what needs the memory, for the error message.

    Raises:
        MemoryError: if the tensors need more.

    Example:
        >>> with Within(1000, "this example"):
        ...     x = torch.zeros(1000)
        Traceback (most recent call last):
        ...
        MemoryError: not enough memory for this example: more than 4 kB needed, but 1 kB available
    """

    def __init__(self, limit: float, what: str) -> None:
        super().__init__()
        self.limit, self.what, self.taken = limit, what, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add the bytes of the tensor that this function is about to create, then call the function."""
        kwargs = kwargs or {}
        if func in _MAKERS:
            plain = {name: value for name, value in kwargs.items() if name not in ("device", "generator", "out")}
            planned = func(*args, **plain, device="meta")
            self.taken += planned.numel() * planned.element_size()
            if self.taken > self.limit:
                raise MemoryError(
                    f"not enough memory for {self.what}: more than {size_of(self.taken)} needed, but "
                    f"{size_of(self.limit)} available"
                )
        return func(*args, **kwargs)


def training_memory(what: str) -> Within:
    """A block that creates what will be trained; the limit leaves memory for gradients, moments and copies.

    Args:
        what: what needs the memory, for the error message.
    """
    return Within(of_machine() / _COPIES, what)


_COPIES = 5  # a parameter, its gradient, two moments of Adam, and the last finite value
