"""Data that are read by the batch: files larger than memory, data sets of torch, sparse matrices, streams.

| kind | order of an epoch |
| --- | --- |
| files (``.npy``, memory maps, Parquet): ``Blocks`` | blocks of rows in random order, rows permuted in a window |
| random access (torch ``Dataset``, sparse matrices): ``Items`` | exact: a random permutation of the rows |
| streams (``IterableDataset``, ``DataLoader`` with a sampler of its own): ``Flow`` | their own |

A file that fits into one window (32 MiB) is permuted exactly. A background thread prepares batches ahead. Files are
read into new buffers (``preadv``), not mapped, so that pages of the file do not count as memory of the process.
"""

from __future__ import annotations

__all__ = [
    "Blocks",
    "Flow",
    "Items",
    "Mapped",
    "Order",
    "Parquet",
    "Readable",
    "Rows",
    "Source",
    "Sparse",
    "Survey",
    "as_blocks",
    "as_source",
    "between",
    "converted",
    "in_memory",
    "prefetched",
]

import hashlib
import mmap
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from .missing import has_holes

Batch = tuple[Tensor, ...]
Some = tuple[Tensor, Batch]  # the numbers of some rows in all data, and the rows
T = TypeVar("T")

_NOTHING: Some = (
    torch.empty(0, dtype=torch.int64, device="cpu"),
    (),
)  # this process has no rows in a step of the others

BLOCK = 2**18  # bytes read at once
WINDOW = 2**25  # bytes permuted together
AHEAD = 2**24  # bytes of batches prepared ahead
_LEAST = 64  # blocks of a file, so that several processes get equal shares


class Order(NamedTuple):
    """The random stream that gives the order of an epoch (None: torch's), and the share of process ``rank``."""

    generator: torch.Generator | None = None
    rank: int = 0
    processes: int = 1


class Survey(NamedTuple):
    """What one pass over a source finds: the number of rows, and whether values are missing (NaN)."""

    n: int
    holes: bool


class Source(ABC):
    """Rows that are read by the batch: a tuple of tensors, one row per data point, as fit and evaluate take them.

    A subclass implements ``pieces`` and ``shuffled``; users call :meth:`in_order`, :meth:`epoch` and :meth:`head`.

    Attributes:
        size: the rows of its own batches; None: those that the caller asks for.
        sized: whether the number of rows is known without a pass.
        background: whether a background thread may read it: not if its own code draws from torch's random stream.

    Example:
        >>> from scipy.sparse import csr_matrix
        >>> source = as_source(csr_matrix(np.eye(5)))
        >>> source.n, [len(x) for (x,) in source.in_order(2)]
        (5, [2, 2, 1])
        >>> sorted(row for rows, _ in source.epoch(2) for row in rows.tolist())
        [0, 1, 2, 3, 4]
    """

    size: int | None = None
    sized = True
    background = True
    _n: int | None = None
    _survey: Survey | None = None
    _head: Batch | None = None

    @property
    def n(self) -> int | None:
        """The number of rows; None for a stream that was not counted yet."""
        return self._n

    @abstractmethod
    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order, in pieces of any size."""

    @abstractmethod
    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """The batches of :meth:`epoch`. Random numbers are drawn at the call, not by the iterator."""

    def in_order(self, rows: int, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order, ``rows`` at a time; the last batch may be smaller."""
        batches = _regrouped(self.pieces(first, last), rows)
        return prefetched(batches) if self.background else batches

    def epoch(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, count: int = 1
    ) -> Iterator[Some]:
        """One shuffled pass in batches: the numbers of the rows in all data, and the rows.

        Args:
            size: how many rows a step of all processes takes; at least n: all rows in their order.
            generator: gives the order; None: torch's random stream. It must be equal in all processes.
            rank: the number of this process.
            count: how many processes share the pass: each row is in one batch of one process. All of them get the same
                number of batches, of which some have no rows.
        """
        batches = self.shuffled(size, generator, rank, count)
        return prefetched(batches) if self.background else batches

    def head(self, rows: int) -> Batch:
        """The first rows, at most ``rows``; the random streams of the caller do not change.

        Raises:
            ValueError: if there is none.
        """
        if self._head is None or (len(self._head[0]) < rows and len(self._head[0]) != self.n):
            with torch.random.fork_rng(devices=[]):
                self._head = next(_regrouped(self.pieces(), rows), None)
        if self._head is None:
            raise ValueError("data has no rows")
        return tuple(x[:rows] for x in self._head)

    def survey(self, look: Callable[[Batch], None] | None = None) -> Survey:
        """The number of rows and whether values are missing, found in one pass at the first call.

        Args:
            look: called with every piece of the rows; there is then always a pass.
        """
        if self._survey is None or look is not None:
            n, holes = 0, False
            for batch in prefetched(self.pieces()) if self.background else self.pieces():
                n += len(batch[0])
                holes = holes or any(map(has_holes, batch))
                if look is not None:
                    look(batch)
            if not n:
                raise ValueError("data has no rows")
            self._n, self._survey = n, Survey(n, holes)
        return self._survey

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {'an unknown number of' if self.n is None else self.n} rows>"


class Mapped(Source):
    """The rows of another source, changed by a function of a batch that treats each row separately.

    Args:
        source: the source.
        change: from a batch to a batch with as many rows.
    """

    def __init__(self, source: Source, change: Callable[[Batch], Batch]) -> None:
        self.source, self.change = source, change
        self.size, self.sized, self.background = source.size, source.sized, source.background
        self._survey = source._survey

    @property
    def n(self) -> int | None:
        """The number of rows of the source."""
        return self.source.n

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order."""
        return map(self.change, self.source.pieces(first, last))

    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """The batches of an epoch."""
        batches = self.source.shuffled(size, generator, rank, count)
        return ((rows, self.change(batch) if len(rows) else ()) for rows, batch in batches)

    def take(self, rows: Tensor) -> Batch:
        """The given rows, in their order; not of a stream."""
        return self.change(_taken(self.source, rows))


def _taken(source: Source, rows: Tensor) -> Batch:
    if not isinstance(source, Mapped | Blocks | Items):
        raise TypeError(f"rows of {source!r} cannot be selected: they come in an order of their own")
    return source.take(rows)


class Blocks(Source):
    """Rows of one tensor that are stored in blocks, each of which is read at once.

    Args:
        edges: the first row of each block, and the number of rows in the end.
        shape: of a row, as stored.
        dtype: of the numbers, as they are read.
        kept: the numbers of the rows to use, increasing; None: all of them.
    """

    def __init__(
        self, edges: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype, kept: NDArray[np.int64] | None
    ) -> None:
        self._edges, self.shape, self.dtype = np.asarray(edges, np.int64), tuple(shape), dtype
        self._kept = None if kept is None else np.asarray(kept, np.int64)
        self._places = self._edges if self._kept is None else np.searchsorted(self._kept, self._edges)
        self._n = int(self._places[-1])
        if not self._n:
            raise ValueError("data has no rows")
        self._used: list[int] = np.flatnonzero(np.diff(self._places)).tolist()  # blocks with a row to use

    @abstractmethod
    def read(self, first: int, last: int, out: Tensor) -> None:
        """Read the rows of one block into a tensor of their shape."""

    @abstractmethod
    def only(self, kept: NDArray[np.int64]) -> Blocks:
        """The same data, of which only these rows are used; their numbers increase."""

    def _new(self, rows: int) -> Tensor:
        return torch.empty((rows, *self.shape), dtype=self.dtype, device="cpu")

    def _rows(self, i: int) -> tuple[int, int]:
        """The numbers of the used rows of a block among all used rows: the first, and the last plus one."""
        return int(self._places[i]), int(self._places[i + 1])

    def _held(self, i: int) -> int:
        """The number of used rows of a block."""
        begin, end = self._rows(i)
        return end - begin

    def _block(self, i: int, out: Tensor | None = None) -> Tensor:
        """The used rows of a block."""
        begin, end = self._rows(i)
        first, last = int(self._edges[i]), int(self._edges[i + 1])
        out = self._new(end - begin) if out is None else out
        if self._kept is None or end - begin == last - first:
            self.read(first, last, out)
            return out
        whole = self._new(last - first)
        self.read(first, last, whole)
        return torch.index_select(whole, 0, torch.from_numpy(self._kept[begin:end] - first), out=out)

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order."""
        begin = next((k for k, i in enumerate(self._used) if self._rows(i)[1] > first), len(self._used))
        skipped = self._rows(self._used[begin])[0] if begin < len(self._used) else first
        blocks = ((self._block(i),) for i in self._used[begin:])
        return between(blocks, first - skipped, None if last is None else last - first)

    def take(self, rows: Tensor) -> Batch:
        """The given rows, in their order."""
        order = rows.argsort()
        wanted = rows[order].numpy()
        made, places = self._new(len(rows)), np.searchsorted(wanted, self._places)
        for i in np.flatnonzero(np.diff(places)).tolist():
            first, last = int(places[i]), int(places[i + 1])
            some = torch.from_numpy(wanted[first:last] - self._places[i])
            made[order[first:last]] = self._block(i).index_select(0, some)
        return (made,)

    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """Blocks in random order; the rows of a window of several blocks in random order."""
        assert self._n is not None
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if size >= self._n:
            blocks = self._used[rank::count]
            return self._windows([blocks], size, None) if blocks else iter([_NOTHING])
        whole = torch.tensor(self._used)[torch.randperm(len(self._used), generator=own)].tolist()
        shares = [max(1, size // count + (r < size % count)) for r in range(count)]
        held_by = [sum(self._held(i) for i in whole[r::count]) for r in range(count)]
        steps = max(-(-rows // share) for rows, share in zip(held_by, shares, strict=True))
        order = whole[rank::count]
        width = self._new(1).numel() * self._new(1).element_size()
        windows: list[list[int]] = []
        held = WINDOW
        for i in order:
            if held >= WINDOW and (not windows or len(windows[-1]) > 1):
                windows.append([])
                held = 0
            windows[-1].append(i)
            held += self._held(i) * width
        own.manual_seed(int(torch.randint(2**62, (), generator=own)) + rank)
        batches = self._windows(windows, shares[rank], own)
        return chain(batches, repeat(_NOTHING, steps - -(-held_by[rank] // shares[rank])))

    def _windows(self, windows: list[list[int]], size: int, generator: torch.Generator | None) -> Iterator[Some]:
        """The batches of windows of blocks, one after the other; without a generator in their order."""
        most = max((sum(self._held(i) for i in window) for window in windows), default=0)
        pool, numbers = self._new(most + (size - 1 if len(windows) > 1 else 0)), _NOTHING[0]
        left = 0  # fewer rows than a batch at the beginning of the pool: they join the next window
        for k, window in enumerate(windows):
            rows = torch.cat([numbers[:left], *(torch.arange(*self._rows(i), device="cpu") for i in window)])
            at = left
            for i in window:
                self._block(i, pool[at : at + self._held(i)])
                at += self._held(i)
            order = (
                torch.arange(at, device="cpu")
                if generator is None
                else torch.randperm(at, generator=generator, device="cpu")
            )
            left = at % size if k + 1 < len(windows) else 0
            for chunk in order[: at - left].split(size):
                # NumPy's gather has one thread: torch's, in this thread, would spin beside those of the computation
                yield rows[chunk], (torch.from_numpy(np.take(pool.numpy(), chunk.numpy(), axis=0)),)
            numbers = rows[order[at - left :]]
            pool[:left] = pool.index_select(0, order[at - left :])


class Rows(Blocks):
    """The rows of an array in a file, which are stored one after the other.

    Args:
        path: the file.
        shape: of the array.
        dtype: of the array.
        offset: of its first byte.
        kept: as for :class:`Blocks`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        n, width = shape[0], int(np.prod(shape[1:])) * dtype.itemsize
        rows = max(1, min(BLOCK // max(1, width), -(-n // _LEAST)))
        native = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
        super().__init__([*range(0, n, rows), n], shape[1:], native, kept)
        self.path, self.stored, self.offset, self._width = Path(path), (shape, dtype), offset, width
        if offset + n * width > self.path.stat().st_size:
            raise ValueError(
                f"{path} is truncated: it has fewer bytes than its {n} rows of {width} bytes: write it again"
            )
        self._file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if (file := vars(self).pop("_file", None)) is not None:
            os.close(file)

    def __reduce__(self) -> Any:
        return type(self), (self.path, *self.stored, self.offset, self._kept)

    def only(self, kept: NDArray[np.int64]) -> Rows:
        """The same data, of which only these rows are used."""
        return Rows(self.path, *self.stored, self.offset, kept)

    def read(self, first: int, last: int, out: Tensor) -> None:
        """Read the rows of one block into a tensor of their shape."""
        made: NDArray[Any] = out.numpy()
        view, at = memoryview(made.reshape(-1).view(np.uint8).data), self.offset + first * self._width
        while len(view):
            got = os.preadv(self._file, [view], at)
            if not got:
                raise ValueError(f"{self.path} became shorter while it was read: write it again")
            view, at = view[got:], at + got
        if not self.stored[1].isnative:
            made.byteswap(inplace=True)


def _of_npy(path: Path) -> Rows:
    """The array of a ``.npy`` file."""
    from numpy.lib import format as npy

    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(
                file
            )
        except ValueError as error:
            raise ValueError(
                f"{path} is not a complete .npy file of numbers: save the array again ({error})"
            ) from error
        offset = file.tell()
    if fortran and len(shape) > 1:
        raise ValueError(
            f"{path} stores the array column by column, but rows are read: save it again by "
            f"numpy.save(path, numpy.ascontiguousarray(x))"
        )
    _check_array(str(path), shape, dtype)
    return Rows(path, shape, dtype, offset)


def _of_map(x: np.memmap[Any, Any]) -> Rows:
    """The array of a memory map, or some of its rows."""
    root: Any = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not x.flags.c_contiguous or x.mode == "c" or not isinstance(root.base, mmap.mmap) or x.filename is None:
        raise ValueError(
            "data is a memory map that is not a range of the rows of its file (columns or steps were selected, it is "
            "stored column by column, or its mode is 'c'): give the whole map, or the path of the file, and select in "
            "the model"
        )
    _check_array("data", x.shape, x.dtype)
    if x.mode != "r":
        x.flush()
    moved = x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return Rows(x.filename, x.shape, x.dtype, root.offset + moved)


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"{name} has dtype {dtype}, but numbers of at most 8 bytes were expected: save it as float32")
    if len(shape) < 2 or not np.prod(shape):
        raise ValueError(f"{name} has the shape {shape}, but [N, X] was expected")


class Parquet(Blocks):
    """The numeric columns of a Parquet file, or of all Parquet files of a folder in the order of their names.

    Args:
        paths: the files.
        kept: as for :class:`Blocks`.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: for a column that is not numeric, and files with other columns.
    """

    def __init__(self, paths: Sequence[Path], kept: NDArray[np.int64] | None = None) -> None:
        try:
            from pyarrow import parquet, types
        except ImportError as error:
            raise ImportError("reading Parquet files needs pyarrow: pip install pyarrow") from error
        self.paths = list(paths)
        self._alone = threading.Lock()  # a file of pyarrow is read by one thread at a time
        self._files = [parquet.ParquetFile(path, pre_buffer=False) for path in self.paths]
        self._groups: list[tuple[int, int]] = []
        edges = [0]
        first = self._files[0].schema_arrow
        for f, (path, file) in enumerate(zip(self.paths, self._files, strict=True)):
            if file.schema_arrow.names != first.names:
                raise ValueError(
                    f"{path} has the columns {file.schema_arrow.names}, but {self.paths[0]} has {first.names}: write "
                    "them alike"
                )
            for group in range(file.metadata.num_row_groups):
                self._groups.append((f, group))
                edges.append(edges[-1] + file.metadata.row_group(group).num_rows)
        number = (types.is_integer, types.is_floating, types.is_boolean)
        if wrong := [field.name for field in first if not any(kind(field.type) for kind in number)]:
            raise ValueError(f"{self.paths[0]}: the columns {wrong} are not numeric: write the files without them")
        super().__init__(edges, (len(first.names),), torch.get_default_dtype(), kept)

    def only(self, kept: NDArray[np.int64]) -> Parquet:
        """The same data, of which only these rows are used."""
        return Parquet(self.paths, kept)

    def __reduce__(self) -> Any:
        return type(self), (self.paths, self._kept)

    def read(self, first: int, last: int, out: Tensor) -> None:
        """Read the rows of one row group into a tensor of their shape."""
        f, group = self._groups[int(np.searchsorted(self._edges, first, "right")) - 1]
        with self._alone:
            table = self._files[f].read_row_group(group, use_threads=False)
        columns = out.numpy()
        for i, column in enumerate(table.columns):  # null becomes NaN
            columns[:, i] = column.cast("float64" if out.dtype is torch.float64 else "float32", safe=False).to_numpy()


class Items(Source):
    """Rows with random access: a torch ``Dataset`` with a length.

    Args:
        dataset: its items are data points, or tuples of tensors.
        collate: makes a batch of a list of items.
        size: the rows of its own batches, if a ``DataLoader`` sets them.
        shuffle: whether an epoch permutes the rows.
        drop_last: whether an epoch leaves out a last batch that is smaller.
        workers: settings of a ``DataLoader`` whose worker processes read the rows; without any, this process does.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] = default_collate,
        size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(
                f"the {type(dataset).__name__} has no length: define __len__, or derive it from "
                "torch.utils.data.IterableDataset"
            )
        self.dataset: Any = dataset
        self.collate, self.size, self.shuffle, self.drop_last = collate, size, shuffle, drop_last
        self._n = len(dataset)
        if not self._n:
            raise ValueError(f"the {type(dataset).__name__} is empty")
        self.workers = workers or {}
        before = torch.get_rng_state()
        self.take(torch.arange(1, device="cpu"))
        self.background = not self.workers and torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)

    def take(self, rows: Tensor) -> Batch:
        """The given rows, in their order."""
        dataset = self.dataset
        if isinstance(dataset, TensorDataset) and self.collate is default_collate:
            return tuple(x.index_select(0, rows.to(x.device)) for x in dataset.tensors)
        numbers = rows.tolist()
        many = getattr(dataset, "__getitems__", None)
        return _as_batch(self.collate(many(numbers) if many is not None else [dataset[i] for i in numbers]))

    def _read(self, batches: list[Tensor]) -> Iterator[Some]:
        if not self.workers:
            return ((rows, self.take(rows)) if len(rows) else _NOTHING for rows in batches)
        sampler: Any = [rows.tolist() for rows in batches if len(rows)]
        loader: DataLoader[Any] = DataLoader(
            self.dataset, batch_sampler=sampler, collate_fn=self.collate, **self.workers
        )
        read = map(_as_batch, iter(loader))
        return ((rows, next(read)) if len(rows) else _NOTHING for rows in batches)

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order."""
        assert self._n is not None
        rows = torch.arange(self._n, device="cpu")[first:last].split(self.size or _PIECE)
        return (batch for _, batch in self._read(list(rows)))

    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """A permutation of the rows in batches, of which each process takes its part."""
        assert self._n is not None
        same = size >= self._n or not self.shuffle
        order = (
            torch.arange(self._n, device="cpu") if same else torch.randperm(self._n, generator=generator, device="cpu")
        )
        batches = [batch for batch in order.split(size) if len(batch) == size or not self.drop_last]
        own = [batch.tensor_split(count)[rank] for batch in batches] if count > 1 else batches
        return self._read(own)


_PIECE = 128


class Sparse(Items):
    """The rows of a SciPy sparse matrix, made dense by the batch.

    Args:
        matrix: [N, X], of any format; it is converted to CSR.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix.tocsr()
        if len(self.matrix.shape) != 2 or not all(self.matrix.shape):
            raise ValueError(f"data has the shape {self.matrix.shape}, but [N, X] was expected")
        super().__init__(range(self.matrix.shape[0]))

    def take(self, rows: Tensor) -> Batch:
        """The given rows, in their order."""
        return (torch.from_numpy(self.matrix[rows.numpy()].toarray()).to(torch.get_default_dtype()),)


class Flow(Source):
    """A stream: batches in an order of its own, which may differ between passes in training, but not in measurements.

    Args:
        batches: makes an iterable of batches, for a number of rows per batch.
        size: the rows of its own batches, if it sets them.
        name: of the stream, for messages.
    """

    sized = False
    background = False  # a DataLoader has workers of its own, and its samplers draw from torch's random stream

    def __init__(self, batches: Callable[[int], Iterable[Any]], size: int | None, name: str) -> None:
        self._batches, self.size, self.name = batches, size, name
        self._digest: list[bytes] = []

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The rows from one number to another in their order.

        Raises:
            ValueError: if a complete pass has other rows than the first one.
        """
        return between(self._whole(), first, None if last is None or last == self._n else last - first)

    def _whole(self) -> Iterator[Batch]:
        digests: list[Any] = []  # of each tensor, whatever the batches are
        n = 0
        for given in self._batches(self.size or _PIECE):
            batch = _as_batch(given)
            digests = digests or [hashlib.blake2b(digest_size=16) for _ in batch]
            for digest, x in zip(digests, batch, strict=True):
                digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            n += len(batch[0])
            yield batch
        self._n, found = n, [digest.digest() for digest in digests]
        if self._digest and found != self._digest:
            raise ValueError(
                f"the {self.name} gives other rows, or another order, at each pass, but a measurement passes several "
                "times over its data: give one without shuffling and random transformations, or tensors"
            )
        self._digest = found

    def shuffled(self, size: int, generator: torch.Generator | None, rank: int, count: int) -> Iterator[Some]:
        """The stream's own batches, of which each process takes every ``count``-th."""

        def batches() -> Iterator[Some]:
            n, own, k = 0, _NOTHING, -1
            for k, given in enumerate(source):
                batch = _as_batch(given)
                if k % count == rank:
                    own = torch.arange(n, n + len(batch[0]), device="cpu"), batch
                n += len(batch[0])
                if (k + 1) % count == 0:  # a step of all processes
                    yield own
                    own = _NOTHING
            if (k + 1) % count:
                yield own
            if not n:
                raise ValueError(f"the {self.name} has no rows in this pass: its __iter__ must start anew at each pass")
            self._n = n

        share = self.size or size // count + (size % count > 0)
        source = self._batches(max(1, share))
        return batches()


def _of_loader(loader: DataLoader[Any]) -> Source:
    """A DataLoader: random access if its samplers are torch's own, else a stream."""
    name = type(loader).__name__
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ValueError(f"the {name} gives single rows (batch_size=None): give one with a batch_size")
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, torch.utils.data.DistributedSampler):
        raise ValueError(
            "the DataLoader has a DistributedSampler, which repeats rows so that all processes get the same number: "
            "give the data set itself; its rows are shared among the processes, each once per epoch"
        )
    plain = type(loader.batch_sampler) is BatchSampler and type(sampler) in (RandomSampler, SequentialSampler)
    if isinstance(sampler, RandomSampler):
        plain = plain and not sampler.replacement and sampler._num_samples is None
    if plain and not isinstance(loader.dataset, IterableDataset):
        workers = {}
        if loader.num_workers:
            names = ("num_workers", "prefetch_factor", "persistent_workers", "worker_init_fn", "pin_memory")
            workers = {key: getattr(loader, key) for key in (*names, "multiprocessing_context", "timeout")}
            workers["persistent_workers"] = False  # an epoch has its own order
        shuffle = isinstance(sampler, RandomSampler)
        return Items(loader.dataset, loader.collate_fn, loader.batch_size, shuffle, loader.drop_last, workers)
    return Flow(lambda _: loader, loader.batch_size or getattr(loader.batch_sampler, "batch_size", None), name)


Readable = Source | np.memmap | Dataset | DataLoader | str | os.PathLike  # type: ignore[type-arg]


def as_source(data: object) -> Source | None:
    """The source of data that are read by the batch; None for anything else, such as tensors.

    Args:
        data: a source; a memory map of NumPy; the path of a ``.npy`` or Parquet file, or of a folder of Parquet files;
            a ``Dataset``, ``IterableDataset`` or ``DataLoader`` of torch; or a SciPy sparse matrix.

    Raises:
        ValueError: for a file that is damaged, not of numbers, or stored column by column; and for a data set that is
            empty.
        TypeError: for a data set without a length.
    """
    if isinstance(data, Source):
        return data
    blocks = as_blocks(data)
    if blocks is not None:
        return converted(blocks)
    if isinstance(data, DataLoader):
        return _of_loader(data)
    if isinstance(data, IterableDataset):
        return Flow(lambda size: DataLoader(data, batch_size=size), None, type(data).__name__)
    if isinstance(data, Dataset):
        return Items(data)
    if type(data).__module__.startswith("scipy.sparse") and hasattr(data, "tocsr"):
        return Sparse(data)
    return None


def as_blocks(data: object) -> Blocks | None:
    """The rows of a memory map, a ``.npy`` or Parquet file, or a folder of Parquet files, as stored; else None."""
    if isinstance(data, np.memmap):
        return _of_map(data)
    if not isinstance(data, str | os.PathLike) or not (path := Path(data).expanduser()).exists():
        return None
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        return Parquet(files) if files else None
    if path.suffix == ".parquet":
        return Parquet([path])
    return _of_npy(path) if path.suffix == ".npy" else None


def converted(source: Source, dtype: torch.dtype | None = None) -> Mapped:
    """The source with its first tensor in another dtype; None: torch's default."""
    to = dtype or torch.get_default_dtype()
    return Mapped(source, lambda batch: (batch[0].to(to), *batch[1:]))


def in_memory(source: Source) -> Batch:
    """All rows of a source as tensors."""
    return _cat([(_NOTHING[0], batch) for batch in source.pieces()])[1]


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The items, prepared ahead by a background thread, which ends with the iteration.

    An error of the thread is raised here.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room, ended = threading.Semaphore(2), threading.Event()

    def work() -> None:
        wider = False
        try:
            for item in items:
                if not wider:  # more of small items
                    wider = True
                    for _ in range(min(64, AHEAD // max(1, _size(item))) - 2):
                        room.release()
                room.acquire()
                if ended.is_set():
                    return
                ready.put((item, None))
            ready.put((None, StopIteration()))
        except BaseException as error:  # raised again by the caller
            ready.put((None, error))

    thread = threading.Thread(target=work, name="jensen reads data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        ended.set()
        room.release()
        thread.join()


def between(pieces: Iterator[Batch], first: int, rows: int | None) -> Iterator[Batch]:
    """The same pieces without the first rows, and without those after the given number of rows."""
    for piece in pieces:
        n = len(piece[0])
        if first >= n:
            first -= n
            continue
        end = n if rows is None else first + rows
        some = tuple(x[first:end] for x in piece)
        first = 0
        yield some
        if rows is not None:
            rows -= len(some[0])
            if rows <= 0:
                return


def _regrouped(pieces: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The same rows, ``rows`` at a time."""
    left: list[Batch] = []
    held = 0
    for piece in pieces:
        left.append(piece)
        held += len(piece[0])
        if held < rows:
            continue
        whole = _cat([(_NOTHING[0], batch) for batch in left])[1]
        end = held // rows * rows
        yield from zip(*(x[:end].split(rows) for x in whole), strict=True)
        left, held = ([tuple(x[end:] for x in whole)] if end < held else []), held - end
    if held:
        yield _cat([(_NOTHING[0], batch) for batch in left])[1]


def _cat(parts: list[Some]) -> Some:
    if len(parts) == 1:
        return parts[0]
    rows, batches = zip(*parts, strict=True)
    return torch.cat(rows), tuple(map(torch.cat, zip(*batches, strict=True)))


def _as_batch(given: Any) -> Batch:
    """A batch of a data set or loader as a tuple of tensors."""
    batch = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not batch or not all(isinstance(x, Tensor) and x.dim() for x in batch):
        kind = type(given).__name__
        kinds = f"a {kind} of {[type(x).__name__ for x in batch]}" if isinstance(given, list | tuple) else f"a {kind}"
        raise TypeError(
            f"a batch must be a tensor or a tuple of tensors with one row per data point, but it is {kinds}: give a "
            "DataLoader with a collate_fn that makes one, such as "
            "collate_fn=lambda items: torch.stack([item['x'] for item in items])"
        )
    if len({len(x) for x in batch}) > 1:
        raise ValueError(
            f"the tensors of a batch must have the same number of rows, but have {[len(x) for x in batch]}"
        )
    return batch


def _size(item: object) -> int:
    parts = item if isinstance(item, tuple) else ()
    return sum(x.numel() * x.element_size() if isinstance(x, Tensor) else _size(x) for x in parts)
