"""CUDA graphs: a compiled function whose operations are launched together, as they were recorded once.

Small operations take less time than their launch from Python or C++, so a replay is faster. A recording belongs to the
addresses of its inputs: those that the function writes to are used where they are, and those whose address changes
from call to call (batches) are copied into buffers of the recording. Results are copies, because the next replay
overwrites those of the recording.
"""

from __future__ import annotations

__all__ = ["Recorded", "cuda_graphs", "recordable", "written_inputs"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .capture import Graph, Outputs, storage_of, writes

_MOST = 8  # recordings of one function; beyond, its inputs never stay where they are
_chosen = False


def cuda_graphs(on: bool) -> None:
    """Whether functions that are compiled from now on for a CUDA device are replayed as CUDA graphs; not at first."""
    global _chosen
    _chosen = on


def recordable(arguments: Sequence[Tensor]) -> bool:
    """Whether a function of these inputs is to be recorded: values in the processor's memory would be frozen."""
    return _chosen and all(t.is_cuda for t in arguments)


def written_inputs(graph: Graph) -> frozenset[int]:
    """The positions of the inputs that a graph writes to."""
    nodes = list(graph.module.graph.nodes)
    storage = storage_of(nodes)
    written = {storage[node.all_input_nodes[0]] for node in nodes if writes(node)}
    inputs = (node for node in nodes if node.op == "placeholder")
    return frozenset(i for i, node in enumerate(inputs) if node in written)


class Recorded:
    """A function of tensors on a CUDA device, recorded at its second call and replayed from then on.

    Args:
        fn: the function, for inputs of constant shapes.
        written: the positions of the inputs that it writes to.
    """

    def __init__(self, fn: Callable[..., Outputs], written: frozenset[int]) -> None:
        self.fn, self.written = fn, written
        self.recordings = 0
        self._where: list[int] = []
        self._moving: set[int] = set()
        self._inputs: list[Tensor] = []
        self._outputs: Outputs = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *values: Tensor) -> Outputs:
        """The results, in tensors of their own."""
        now = [t.data_ptr() for t in values]
        moved = {i for i, (a, b) in enumerate(zip(now, self._where, strict=bool(self._where))) if a != b}
        moved -= self._moving
        if self._replay is None or moved:
            known, self._where = bool(self._where), now
            self._moving |= moved - self.written
            self._replay = self._recording(values) if known and self.recordings < _MOST else None
            if self._replay is None:
                return tuple(self.fn(*values))
        else:
            for i in self._moving:
                self._inputs[i].copy_(values[i])
        self._replay()
        return tuple(t.clone() for t in self._outputs)

    def _recording(self, values: Sequence[Tensor]) -> Callable[[], None] | None:
        self.recordings += 1
        self._inputs = [t.clone() if i in self._moving else t for i, t in enumerate(values)]
        try:
            replay, self._outputs = _record(lambda: tuple(self.fn(*self._inputs)))
        except RuntimeError:  # an operation that waits for the device cannot be recorded
            self.recordings, self._inputs = _MOST, []
            return None
        return replay


def _record(fn: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """The replay of a function, which has not run yet, and the tensors that will hold its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fn()
    return graph.replay, outputs
