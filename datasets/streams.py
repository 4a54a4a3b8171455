"""The function ``stream``: data beyond memory, standardized by statistics of one pass."""

from __future__ import annotations

__all__ = ["Standardized", "stream"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jensen.checked import as_data, checked, shown
from jensen.sources import Batch, Blocks, Mapped, Source, as_blocks, as_source, converted

from .preparation import Moments, check_scale


class Standardized(Mapped):
    """Rows whose first tensor is standardized: (x - location) / scale, computed in float64.

    Args:
        source: the rows as they are.
        location: the mean of each feature, in float64.
        scale: the standard deviation of each feature, in float64.
        dtype: of the result.
    """

    def __init__(self, source: Source, location: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(source, self._standardized)
        self.location, self.scale, self.dtype = location, scale, dtype

    def _standardized(self, batch: Batch) -> Batch:
        return (((batch[0].double() - self.location) / self.scale).to(self.dtype), *batch[1:])


@checked
def stream(
    data: Any,
    *,
    rows: Sequence[int] | Tensor | NDArray[np.int64] | None = None,
    standardize: bool | Source = False,
    dtype: torch.dtype | None = None,
) -> Source:
    r"""Data that are read by the batch, for :func:`~jensen.inference.fit` and :func:`~jensen.inference.evaluate`.

    Both also take such data directly; this function selects rows of a file, standardizes, and sets the dtype. Mean and
    standard deviation of each feature are computed in float64, in one pass, with the update of Chan et al.

    .. math:: M \leftarrow M + M' + \delta^2 \frac{n n'}{n + n'}, \qquad \delta = \bar{x}' - \bar{x}

    for the sums M of squared deviations of the n rows so far and the n' rows of a batch; missing values (NaN) are left
    out.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance: Analysis and Recommendations.

    Args:
        data: a memory map of NumPy; the path of a ``.npy`` or Parquet file, or of a folder of Parquet files; a
            ``Dataset``, ``IterableDataset`` or ``DataLoader`` of torch, whose items are data points or tuples of
            tensors; a SciPy sparse matrix, which is made dense by the batch; or a result of this function.
        rows: of a file, the numbers of the rows to use, in any order; None: all of them.
        standardize: whether to standardize the first tensor; or another standardized result of this function, such as
            the training data, whose mean and standard deviation are then used.
        dtype: of the first tensor. None: torch's default for files, sparse matrices and standardized data; that of
            the items otherwise.

    Returns:
        The source: ``n`` rows (None for a stream that was not counted yet), ``head(rows)`` gives the first ones as
        tensors, ``in_order(rows)`` iterates over all. A standardized one has ``location`` and ``scale``.

    Raises:
        TypeError: for anything else, and for ``rows`` of data that are not a file.
        ValueError: for a file that is damaged, not of numbers or stored column by column, data without rows, row
            numbers that are repeated or not in the file, and features that are constant, infinite or too large to be
            squared if they are standardized.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/big.npy", np.arange(30.0).reshape(10, 3))
        ...     train = stream(f"{folder}/big.npy", rows=range(8), standardize=True)
        ...     test = stream(f"{folder}/big.npy", rows=range(8, 10), standardize=train)
        ...     train.n, train.location.tolist(), test.head(1)[0].dtype
        (8, [10.5, 11.5, 12.5], torch.float32)
    """
    blocks = as_blocks(data)
    if rows is not None:
        if blocks is None:
            raise TypeError(
                f"rows selects rows of a file or memory map, but data is {shown(data)}: of a Dataset use "
                "torch.utils.data.Subset(dataset, rows), of a matrix matrix[rows]"
            )
        blocks = blocks.only(_checked_rows(rows, blocks))
    found = as_source(data) if blocks is None else blocks
    if found is None:
        raise TypeError(f"data is read by the batch from a file, a Dataset or a loader, but it is {_told(data)}")
    to = dtype or torch.get_default_dtype()
    if isinstance(standardize, Source):
        if not isinstance(standardize, Standardized):
            raise TypeError("standardize is True, False, or a result of stream(..., standardize=True)")
        return Standardized(found, standardize.location, standardize.scale, to)
    if standardize:
        return _standardized(found, _name(data), to)
    return converted(found, to) if dtype is not None or blocks is not None else found


def _told(data: object) -> str:
    if isinstance(data, str) and not Path(data).expanduser().exists():
        return f"{data!r}, where there is no file"
    if isinstance(data, Tensor):
        return f"{shown(data)}: give it to fit and evaluate as it is"
    if isinstance(data, str):
        return f"{data!r}: only .npy and Parquet files are read by the batch; jensen.datasets.load reads others"
    return f"{shown(data)}: {as_data(data, 'data')}"


def _name(data: object) -> str:
    return Path(data).name if isinstance(data, str | Path) else "data"


def _checked_rows(rows: Any, blocks: Blocks) -> NDArray[np.int64]:
    kept: NDArray[np.int64] = np.sort(np.asarray(rows, np.int64).reshape(-1))
    n = blocks.n or 0
    if len(kept) and (kept[0] < 0 or kept[-1] >= n or not (np.diff(kept) > 0).all()):
        raise ValueError(f"rows must be different numbers from 0 to {n - 1}, but are from {kept[0]} to {kept[-1]}")
    return kept


def _standardized(source: Source, name: str, dtype: torch.dtype) -> Standardized:
    moments = Moments((source.head(1)[0].shape[-1],))

    def look(batch: Batch) -> None:
        if bool(batch[0].isinf().any()):
            raise ValueError(f"{name} holds infinite values: remove these rows before they are standardized")
        moments.add(batch[0].reshape(-1, batch[0].shape[-1]).double().numpy())

    n = source.survey(look).n
    check_scale(name, moments, n, dtype)
    return Standardized(source, torch.from_numpy(moments.location), torch.from_numpy(moments.scale), dtype)
