"""Arrays that are larger than memory: refused before they are made where that is known, else told in a sentence."""

from __future__ import annotations

__all__ = ["Within", "memory_told", "of_machine", "size_of", "training_memory"]

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
    """Raise MemoryError, in a sentence, where torch or NumPy could not get the memory for an array."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text
        found = _WANTED.search(text)
        told = isinstance(error, MemoryError) and text and found is None  # it has its sentence already
        if told or not lacking:
            raise
        much = "" if found is None else f" ({found[2] or size_of(int(found[1]))} for one array)"
        raise MemoryError(
            f"this takes more memory than there is{much}: take fewer of what makes arrays large, such as latents, "
            "widths of layers, data at once or draws"
        ) from error


def size_of(count: float) -> str:
    """A number of bytes, for people.

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
    """The bytes of memory of this machine, or of the container that the process runs in; infinite where unknown."""
    found = [float("inf")]
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in _LIMITS:
        with suppress(OSError, ValueError):  # it holds "max" where there is none
            found.append(int(Path(place).read_text()))
    return min(found)


class Within(TorchFunctionMode):
    """A block in which tensors may take so many bytes together; the first beyond them is refused before it is made.

    Args:
        limit: the bytes.
        what: who takes them, as the subject of the sentence.

    Raises:
        MemoryError: where they would take more.

    Example:
        >>> with Within(1000, "this example"):
        ...     x = torch.zeros(1000)
        Traceback (most recent call last):
        ...
        MemoryError: this example takes more than 4 kB, and there are 1 kB for it
    """

    def __init__(self, limit: float, what: str) -> None:
        super().__init__()
        self.limit, self.what, self.taken = limit, what, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what a maker of tensors is about to take, then let it."""
        kwargs = kwargs or {}
        if func in _MAKERS:
            plain = {name: value for name, value in kwargs.items() if name not in ("device", "generator", "out")}
            planned = func(*args, **plain, device="meta")
            self.taken += planned.numel() * planned.element_size()
            if self.taken > self.limit:
                raise MemoryError(
                    f"{self.what} takes more than {size_of(self.taken)}, and there are {size_of(self.limit)} for it"
                )
        return func(*args, **kwargs)


def training_memory(what: str) -> Within:
    """A block that makes what is to be trained: of its bytes there are to be gradients, moments and copies, too.

    Args:
        what: who takes them, as the subject of the sentence.
    """
    return Within(of_machine() / _COPIES, what)


_COPIES = 5  # a parameter, its gradient, two moments of Adam, and the last good value
