"""Runs the float and the quantized graph side by side over all batches, layer after layer.

Every rung above rounding to nearest needs, for each layer, what the *already quantized* layers before it give, and what
the float network gave there. Each node is computed once for all batches, and let go after its last reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from jettison.quantization.constants import evaluate
from jettison.quantization.convert import is_integer
from jettison.quantization.fold import find_layers, name_operator

Batches = Sequence[tuple[Tensor, ...]]
UNFOLDED = frozenset({"aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default"})
"""The weighted operators whose output is a matrix product of unfolded inputs, output channels first."""


def find_constants(module: GraphModule) -> frozenset[Node]:
    """Return the nodes that hang on parameters alone."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return frozenset(found)


class Replay:
    """A graph with the values of all batches up to some node; weights are read anew at each use, so they may change."""

    def __init__(self, module: GraphModule, batches: Batches) -> None:
        self.module, self.nodes, self.position = module, list(module.graph.nodes), 0
        self.values: dict[Node, list[Any]] = {}
        self._inputs, self.batches = iter(range(len(batches[0]))), batches
        self._constant = find_constants(module)
        self._last = self._find_last_readers()

    def _is_unpacking(self, node: Node) -> bool:
        """Say if a node only turns integers into floats: cheaper to do again than to keep."""
        return str(node.target) == "quantized_decomposed.dequantize_per_tensor.default"

    def _find_last_readers(self) -> dict[Node, int]:
        last: dict[Node, int] = {}
        order = {node: index for index, node in enumerate(self.nodes)}
        for node in reversed(self.nodes):
            passed = [last.get(user, 0) if self._is_unpacking(user) else 0 for user in node.users]
            last[node] = max([order[node], *map(order.__getitem__, node.users), *passed])
        return last

    def run_to(self, end: Node) -> None:
        """Compute what stands before `end`, and forget what neither it nor anything after it reads."""
        goal = self.nodes.index(end)
        while self.position < goal:
            node = self.nodes[self.position]
            if node.op == "placeholder":
                place = next(self._inputs)
                self.values[node] = [batch[place] for batch in self.batches]
            elif node.op == "call_function" and node not in self._constant and not self._is_unpacking(node):
                self.values[node] = self.compute(node)
            self.position += 1
            for old in [n for n in self.values if self._last[n] < self.position]:
                del self.values[old]

    def run_past(self, node: Node) -> None:
        """Compute everything up to and with `node`, whose value can then be read."""
        self.run_to(self.nodes[self.nodes.index(node) + 1])

    def compute(self, node: Node) -> list[Any]:
        """Return what a call gives for every batch."""
        constants = {s: self.evaluate(s) for s in node.all_input_nodes if s in self._constant}
        return [self._call(node, index, constants) for index in range(len(self.batches))]

    def read(self, node: Node, index: int) -> Any:
        """Return the value of a node already computed, for one batch."""
        if node in self._constant:
            return self.evaluate(node)
        return self._call(node, index, {}) if self._is_unpacking(node) else self.values[node][index]

    def knows(self, node: Node) -> bool:
        """Say if a node's value can be read."""
        if self._is_unpacking(node):
            source = node.args[0]
            return isinstance(source, Node) and source in self.values
        return node in self.values

    def read_all(self, node: Node) -> list[Any]:
        """Return the value of a node already computed, for every batch."""
        return [self.read(node, index) for index in range(len(self.batches))]

    def _call(self, node: Node, index: int, constants: dict[Node, Any]) -> Any:
        def look_up(source: Node) -> Any:
            return constants[source] if source in constants else self.read(source, index)

        assert callable(node.target)
        return node.target(*map_arg(node.args, look_up), **map_arg(node.kwargs, look_up))

    def evaluate(self, node: Node) -> Any:
        """Return the value of a node that hangs on parameters alone, as they are now."""
        return evaluate(self.module, node, {})


@dataclass(frozen=True)
class Layer:
    """One integer layer with the inputs it gets in both networks.

    `added` are, in the quantized and in the float graph, what is added to its output, where that is known already.
    """

    name: str
    node: Node
    original: Node
    quantized: Replay
    float: Replay
    added: tuple[Node, Node] | None

    @property
    def count(self) -> int:
        """How many items all batches hold."""
        return sum(len(batch[0]) for batch in self.quantized.batches)

    @property
    def weight(self) -> Tensor:
        """The float network's weight."""
        found: Tensor = self.float.evaluate(self._argument(1))
        return found

    @property
    def bias(self) -> Tensor | None:
        """The float network's bias, or None."""
        return self.float.evaluate(self._argument(2)) if self.original.args[2:3] not in ((), (None,)) else None

    def _argument(self, place: int) -> Node:
        found = self.original.args[place]
        assert isinstance(found, Node)
        return found

    def inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the layer's input in the quantized and in the float network, batch by batch."""
        for tensors in self.tensors():
            yield tensors[0], tensors[1]

    def tensors(self) -> Iterator[tuple[Tensor, ...]]:
        """Give both inputs, and what the tensor added to the output lacks against the float one, if there is one."""
        source, wanted = self.node.args[0], self.original.args[0]
        assert isinstance(source, Node) and isinstance(wanted, Node)
        for index in range(len(self.quantized.batches)):
            pair = self.quantized.read(source, index), self.float.read(wanted, index)
            if self.added is None:
                yield pair
            else:
                quantized, exact = self.added
                yield (*pair, self.float.read(exact, index) - self.quantized.read(quantized, index))


def walk_layers(folded: GraphModule, converted: GraphModule, batches: Batches) -> Iterator[Layer]:
    """Give the integer layers in the order of the graph; whoever takes one may change its weight before the next."""
    originals = find_layers(folded, UNFOLDED)
    quantized, floats = Replay(converted, batches), Replay(folded, batches)
    with torch.no_grad():
        for name, node in find_layers(converted, UNFOLDED).items():
            if name not in originals or not is_integer(node):
                continue
            quantized.run_to(node)
            floats.run_to(originals[name])
            left, right = _find_added(node), _find_added(originals[name])
            added = None
            if left is not None and right is not None and _is_alike(originals[name], right):
                added = (left, right) if quantized.knows(left) and floats.knows(right) else None
            yield Layer(name, node, originals[name], quantized, floats, added)


def _find_added(node: Node) -> Node | None:
    """Return the other operand of the one addition that reads a layer's output."""
    end = node
    while len(end.users) == 1 and "quantize_per_tensor" in str(next(iter(end.users)).target):
        end = next(iter(end.users))
    if len(end.users) != 1:
        return None
    (user,) = end.users
    others = [a for a in user.args if isinstance(a, Node) and a is not end]
    if name_operator(user) != "aten.add.Tensor" or user.kwargs or len(others) != 1 or len(user.args) != 2:
        return None
    return others[0]


def _is_alike(left: Node, right: Node) -> bool:
    """Say if two tensors of the float graph have one shape; a free batch is compared by its symbol."""
    shapes = [str(getattr(node.meta.get("val"), "shape", None)) for node in (left, right)]
    return shapes[0] == shapes[1] != "None"
