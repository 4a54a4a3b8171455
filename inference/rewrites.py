r"""Rewriting of captured graphs before they are compiled: the same numbers to rounding, by cheaper operations.

- A product with a bias added becomes a product and a sum, which joins the loop of what follows it.
- Tanh in single precision takes one exponential, 2 sigmoid(2x) - 1, and its series where \|x\| < 1/2, which keeps it
  within three units in the last place.
- The log-likelihood of Bernoulli features takes one logarithm for up to a hundred of them:

.. math:: \sum_d \log(1 + e^{-|l_d|}) = \sum_j \log \prod_i (1 + e^{-|l_{ij}|})

Every factor lies in [1, 2]: a product of 100 stays below 2^100, far from overflow, and what rounding takes of a factor
it takes of single terms of the sum. Graphs are compared with what they were captured from after all this, before they
are used.
"""

from __future__ import annotations

__all__ = ["rewritten"]

import copy
from typing import Any

import torch
from torch.fx import GraphModule, Node

_ops = torch.ops.aten
# the series of tanh from x^15 down to x
_TANH = (-929569 / 638512875, 21844 / 6081075, -1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)
_LANES, _FACTORS = (16, 8), 100


def rewritten(module: GraphModule) -> GraphModule:
    """A copy of a captured graph with cheaper operations.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(torch.tanh)(torch.randn(3))
        >>> x = torch.linspace(-2, 2, 9)
        >>> torch.allclose(rewritten(graph)(x), x.tanh(), rtol=5e-7)
        True
    """
    module = copy.deepcopy(module)
    rules = {
        _ops.addmm.default: _unfused,
        _ops.tanh.default: _tanh,
        _ops.binary_cross_entropy_with_logits.default: _bernoulli,
    }
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in rules:
            rules[node.target](_Writer(module, node), node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _Writer:
    """Operations put before a node."""

    def __init__(self, module: GraphModule, before: Node) -> None:
        self.graph, self.before = module.graph, before

    def __call__(self, operation: Any, *arguments: Any) -> Node:
        with self.graph.inserting_before(self.before):
            return self.graph.call_function(operation, arguments)


def _unfused(write: _Writer, node: Node) -> None:
    b, a, w = node.args
    if node.kwargs or _shape(node) == _shape(b):
        return
    product = write(_ops.mm.default, a, w)  # minus minus b: product plus b would be made one operation again
    _replace(node, write(_ops.sub.Tensor, product, write(_ops.neg.default, b)))


def _tanh(write: _Writer, node: Node) -> None:
    (x,) = node.args
    value = node.meta["val"]
    if value.dtype != torch.float32 or value.is_cuda:
        return
    large = write(_ops.sigmoid.default, write(_ops.mul.Tensor, x, 2.0))
    large = write(_ops.sub.Tensor, write(_ops.mul.Tensor, large, 2.0), 1.0)
    square = write(_ops.mul.Tensor, x, x)
    series: Any = _TANH[0]
    for term in _TANH[1:]:
        series = write(_ops.add.Tensor, write(_ops.mul.Tensor, square, series), term)
    near = write(_ops.lt.Scalar, write(_ops.abs.default, x), 0.5)
    _replace(node, write(_ops.where.self, near, write(_ops.mul.Tensor, x, series), large))


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
    if tuple(rest) != (None, None, 0) or total.args[1:] != ([-1],) or _shape(steps[2]) != shape or lanes is None:
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
    """The shape of what an operation gave when it was captured; of an input, which may not be known, none."""
    return node.meta["val"].shape if "val" in node.meta else torch.Size()
