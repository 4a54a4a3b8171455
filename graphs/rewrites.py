r"""Rewriting of traced graphs before compilation: the same numbers up to rounding, with cheaper operations.

- A product with a bias added becomes a product and a sum, which is fused with the loop of the operations after it.
- Tanh in single precision becomes a quotient of polynomials, as in the Eigen library (Guennebaud and Jacob, 2010),
  within four units in the last place.
- The log-likelihood of Bernoulli features takes one logarithm for up to a hundred of them:

.. math:: \sum_d \log(1 + e^{-|l_d|}) = \sum_j \log \prod_i (1 + e^{-|l_{ij}|})

Every factor lies in [1, 2]: a product of 100 stays below 2^100, far from overflow, and the rounding error of a factor
equals that of single terms of the sum. After the rewriting, graphs are compared with their original functions before
they are used.
"""

from __future__ import annotations

__all__ = ["rewritten"]

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

_ops = torch.ops.aten
_ABOVE: tuple[float, ...] = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08)
_ABOVE += (1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # x^13, x^11, ..., x
_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)  # x^6, ..., 1
_LINEAR, _CERTAIN = 4e-4, 7.90531110763549805  # below the first, tanh x is x; above the second, it is 1
_LANES, _FACTORS = (16, 8), 100


def rewritten(module: GraphModule, rules: Iterable[str] | None = None) -> GraphModule:
    """A copy of a traced graph with cheaper operations.

    Args:
        module: the graph.
        rules: the names of the rules to apply, from ``"bias"``, ``"tanh"`` and ``"bernoulli"``; None: all.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(torch.tanh)(torch.randn(3))
        >>> x = torch.linspace(-2, 2, 9)
        >>> torch.allclose(rewritten(graph)(x), x.tanh(), rtol=5e-7)
        True
    """
    module = copy.deepcopy(module)
    applied = dict(_RULES[name] for name in (_RULES if rules is None else rules))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in applied:
            applied[node.target](_Writer(module, node), node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _Writer:
    """Inserts operations before a node."""

    def __init__(self, module: GraphModule, before: Node) -> None:
        self.graph, self.before = module.graph, before

    def __call__(self, operation: Any, *arguments: Any) -> Node:
        with self.graph.inserting_before(self.before):
            return self.graph.call_function(operation, arguments)


def _unfused(write: _Writer, node: Node) -> None:
    b, a, w = node.args
    if node.kwargs or _shape(node) == _shape(b):
        return
    product = write(_ops.mm.default, a, w)  # minus minus b, because product plus b would be fused again
    _replace(node, write(_ops.sub.Tensor, product, write(_ops.neg.default, b)))


def _tanh(write: _Writer, node: Node) -> None:
    (x,) = node.args
    value = node.meta["val"]
    if value.dtype != torch.float32 or value.is_cuda:
        return
    inside = write(_ops.clamp.default, x, -_CERTAIN, _CERTAIN)
    square = write(_ops.mul.Tensor, inside, inside)

    def polynomial(terms: tuple[float, ...]) -> Any:
        value: Any = terms[0]
        for term in terms[1:]:
            value = write(_ops.add.Tensor, write(_ops.mul.Tensor, square, value), term)
        return value

    ratio = write(_ops.div.Tensor, write(_ops.mul.Tensor, inside, polynomial(_ABOVE)), polynomial(_BELOW))
    small = write(_ops.lt.Scalar, write(_ops.abs.default, x), _LINEAR)
    _replace(node, write(_ops.where.self, small, x, ratio))


def _bernoulli(write: _Writer, node: Node) -> None:
    logits, x, *rest = node.args
    steps = [node]  # minus cross entropy, flattened, summed
    for operation in (_ops.neg.default, _ops.view.default, _ops.sum.dim_IntList):
        (after, *more) = steps[-1].users
        if more or after.target != operation:
            return
        steps.append(after)
    total, shape = steps[-1], _shape(node)
    lanes = next((n for n in _LANES if shape[-1:].numel() % n == 0 and shape[-1:].numel() // n <= _FACTORS), None)
    last = ([-1],), ([len(shape) - 1],)
    if tuple(rest) != (None, None, 0) or total.args[1:] not in last or _shape(steps[2]) != shape or lanes is None:
        return
    if node.meta["val"].dtype not in (torch.float32, torch.float64):
        return
    write.before = total
    slack = write(_ops.sub.Tensor, write(_ops.relu.default, logits), write(_ops.mul.Tensor, logits, x))
    tail = write(_ops.exp.default, write(_ops.neg.default, write(_ops.abs.default, logits)))
    factors = write(_ops.view.default, write(_ops.add.Tensor, tail, 1.0), [*shape[:-1], shape[-1] // lanes, lanes])
    logs = write(_ops.log.default, write(_ops.prod.dim_int, factors, -2))
    entropy = (write(_ops.sum.dim_IntList, part, [-1]) for part in (slack, logs))
    _replace(total, write(_ops.neg.default, write(_ops.add.Tensor, *entropy)))


def _replace(node: Node, by: Node) -> None:
    by.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(by)


def _shape(node: Any) -> torch.Size:
    """The shape of an operation's result during tracing; none for an input, whose shape may be unknown."""
    return node.meta["val"].shape if "val" in node.meta else torch.Size()


_RULES = {
    "bias": (_ops.addmm.default, _unfused),
    "tanh": (_ops.tanh.default, _tanh),
    "bernoulli": (_ops.binary_cross_entropy_with_logits.default, _bernoulli),
}
