r"""Tracing: the Python code of a function runs once and yields a graph of tensor operations with the same results.

``torch.fx.experimental.proxy_tensor.make_fx`` records the operations below autograd that a function performs: handlers,
plates and distributions leave no trace in it, and gradients taken inside are ordinary operations. Random sampling is
an operation too, fresh at every call and controlled by ``torch.manual_seed``.

The graph receives its tensors as inputs: parameters and buffers as the tensors themselves, so that in-place updates
take effect, and all other tensors as ``constants``. Code that depends on a *value* (a loop until convergence, a
rejection sampler) cannot be traced, and Python's state between calls is frozen: so every graph is compared with its
original function, on other data and another seed, before it is used.
"""

from __future__ import annotations

__all__ = ["CannotCapture", "Graph", "agrees", "capture", "is_view", "split_draws", "storage_of", "writes"]

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from jensen.kernel.arguments import in_a_line
from jensen.kernel.randomness import forked_rng

Outputs = tuple[Tensor, ...]
_TOLERANCE = {False: 1e-3, True: 1e-7}  # relative to the norm: single, double precision


class CannotCapture(Exception):
    """The reason why a function has no graph, in one sentence."""


@dataclass(frozen=True)
class Graph:
    """A traced function of flat tensors, and the tensors that it reads beside its inputs."""

    module: GraphModule
    constants: tuple[Tensor, ...]

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Run it, operation by operation."""
        with torch.no_grad():
            return tuple(self.module(*inputs, *self.constants))


def capture(fn: Callable[..., Outputs], *inputs: Tensor) -> Graph:
    """The graph of a function of tensors, for the shapes, dtypes and devices of these inputs.

    The function may read its inputs as arguments or by other names (a module's parameters).

    Raises:
        CannotCapture: if the function depends on values.
    """
    try:
        with forked_rng(), pyro.validation_enabled(False):
            module = make_fx(fn)(*inputs)
    except CannotCapture:
        raise
    except Exception as error:  # user code runs here, under a tracer that it was not written for
        raise CannotCapture(in_a_line(error)) from error
    module.graph.eliminate_dead_code()
    constants = _lift_constants(module)
    return Graph(module, constants)


def _lift_constants(module: GraphModule) -> tuple[Tensor, ...]:
    """Turn the tensors that a graph holds into additional inputs."""
    lifted: dict[str, tuple[Tensor, Node]] = {}
    body = next(node for node in module.graph.nodes if node.op != "placeholder")
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in lifted:
            with module.graph.inserting_before(body):
                lifted[name] = getattr(module, name), module.graph.placeholder(name)
        node.replace_all_uses_with(lifted[name][1])
        module.graph.erase_node(node)
    for name in lifted:
        delattr(module, name)
    module.recompile()
    return tuple(value for value, _ in lifted.values())


def agrees(
    first: Callable[[], Outputs], second: Callable[[], Outputs], tolerance: float | None = None, seed: int = 1
) -> bool:
    """Whether two functions without arguments give the same numbers from the same seed, up to rounding.

    The tolerance is relative to the norm of each result; None: the tolerance of its precision.

    Raises:
        CannotCapture: if one of them fails.
    """
    results = []
    for fn in (first, second):
        with forked_rng():
            torch.manual_seed(seed)
            try:
                results.append([value.detach() for value in fn()])
            except (RuntimeError, ValueError) as error:
                raise CannotCapture(f"the graph cannot be compared with its function: {in_a_line(error)}") from error
    return len(results[0]) == len(results[1]) and all(_close(a, b, tolerance) for a, b in zip(*results, strict=True))


def _close(a: Tensor, b: Tensor, tolerance: float | None) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    known = a.isfinite()
    if not torch.equal(known, b.isfinite()):
        return False
    size, rest = a[known].double().norm(), (a[known].double() - b[known].double()).norm()
    return bool(rest <= (_TOLERANCE[a.dtype.itemsize >= 8] if tolerance is None else tolerance) * (size + 1e-6))


def split_draws(graph: Graph) -> tuple[Graph, Graph]:
    """Split a graph in two: operations that use no random sample, and the rest.

    The inputs of the rest are those of the graph and the results of the first part, which need not run again for new
    samples on the same inputs. Operations without cost (views, constants) stay in the second part.
    """
    nodes = list(graph.module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    drawn = _depend_on_draws(nodes)
    last = nodes[-1]
    needed: set[Node] = set()
    results: dict[Node, None] = {}
    waiting = [*drawn, *last.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in needed or node in results or node.op == "placeholder":
            continue
        if node in drawn or _costs_nothing(node):
            needed.add(node)
            waiting += node.all_input_nodes
        else:
            results[node] = None
    before, after = torch.fx.Graph(), torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in nodes[:-1]:
        if node not in drawn:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in results))
    copies = {node: after.node_copy(node) for node in inputs}
    copies |= {node: after.placeholder(f"{node.name}_once") for node in results}
    for node in nodes:
        if node in needed:
            copies[node] = after.node_copy(node, copies.__getitem__)
    after.output(torch.fx.node.map_arg(last.args[0], copies.__getitem__))
    modules = [GraphModule(graph.module, part) for part in (before, after)]
    modules[0].graph.eliminate_dead_code()
    modules[0].recompile()
    return Graph(modules[0], ()), Graph(modules[1], ())


def _depend_on_draws(nodes: list[Node]) -> set[Node]:
    """The operations that sample, all that use their results, and all tensors that are ever written to in place."""
    storage = storage_of(nodes)
    written = {storage[node.all_input_nodes[0]] for node in nodes if writes(node)}
    drawn: set[Node] = set()
    for node in nodes:
        if node.op == "call_function" and (
            _draws(node) or storage[node] in written or not drawn.isdisjoint(node.all_input_nodes)
        ):
            drawn.add(node)
    return drawn


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def storage_of(nodes: list[Node]) -> dict[Node, Node]:
    """For each node the node whose memory it shares: itself, unless it is a view."""
    storage: dict[Node, Node] = {}
    for node in nodes:
        storage[node] = storage[node.all_input_nodes[0]] if is_view(node) and node.all_input_nodes else node
    return storage


def writes(node: Node) -> bool:
    """Whether an operation writes to its first input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_view(node: Node) -> bool:
    """Whether an operation returns a view of its input's memory."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def _costs_nothing(node: Node) -> bool:
    return is_view(node) or not node.all_input_nodes
