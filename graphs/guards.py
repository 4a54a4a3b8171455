"""Check whether gradients are finite, at less cost than reading them.

The gradient of a weight matrix is the product of two, often smaller, matrices: the gradient of a layer's output, and
its input. If their largest entries, multiplied together and by the number of terms, are finite, so is the gradient.
"""

from __future__ import annotations

__all__ = ["Witnesses"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .capture import Graph, is_view


class Witnesses:
    """A graph with additional outputs that show whether its gradients are finite.

    Args:
        graph: the graph of a loss.
        first: the index of the first gradient among its outputs.

    Attributes:
        graph: the same graph with additional outputs.
    """

    def __init__(self, graph: Graph, first: int) -> None:
        copied = torch.fx.Graph()
        own = copied.graph_copy(graph.module.graph, {})
        assert isinstance(own, tuple | list)
        extra: list[Node] = []
        self._factors: list[tuple[int, ...]] = []  # per gradient: indices of its factors, and the number of terms
        for node in own[first:]:
            factors, terms = _factors(node)
            self._factors.append((*range(len(extra), len(extra) + len(factors)), terms))
            extra += factors
        copied.output((*own, *extra))
        self.graph = Graph(GraphModule(graph.module, copied), graph.constants)

    def finite(self, extra: Sequence[Tensor]) -> Tensor:
        """Whether every gradient is finite, from the additional outputs: a tensor of no dimensions."""
        sizes = []
        for *places, terms in self._factors:
            largest = [extra[i].abs().amax() for i in places]
            sizes.append(largest[0] * largest[1] * terms if len(places) == 2 else largest[0])
        return torch.stack(sizes).isfinite().all()


def _factors(node: Node) -> tuple[list[Node], int]:
    """The smaller matrices whose product is a gradient, and the number of terms of its sums; or the gradient."""
    source = node
    while is_view(source) and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if source.target is torch.ops.aten.mm.default:
        a, b = source.all_input_nodes if len(source.all_input_nodes) == 2 else source.all_input_nodes * 2
        if _size(a) + _size(b) < _size(source):
            return [a, b], a.meta["val"].shape[-1]
    return [node], 1


def _size(node: Node) -> int:
    size: int = node.meta["val"].numel()
    return size
