"""Run many variants of one network that differ from some node on: what lies before that node is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.groups import Graph, Group
from jettison.graph.trace import Batch, evaluate_node, find_attribute


@dataclass
class Frontier:
    """The original's values that are alive before node number `place`, for every batch, by node name."""

    graph: Graph
    values: list[dict[str, Any]]
    place: int = 0

    def advance(self, place: int) -> None:
        """Compute the original up to node number `place`; a frontier only moves forward."""
        nodes = list(self.graph.module.graph.nodes)
        last_use = find_last_uses(self.graph.module)
        with torch.no_grad():
            for index in range(self.place, place):
                for values in self.values:
                    _step(self.graph.module, nodes[index], values)
                    for argument in nodes[index].all_input_nodes:
                        if last_use[argument.name] == nodes[index].name:
                            values.pop(argument.name, None)
        self.place = place

    def run(self, variant: fx.GraphModule) -> list[tuple[Tensor, ...]]:
        """Return the outputs of a variant that equals the original before the frontier."""
        before = {n.name for n in list(self.graph.module.graph.nodes)[: self.place]}
        last_use = find_last_uses(variant)
        outputs: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for start in self.values:
                values = dict(start)
                for node in variant.graph.nodes:
                    if node.name in before:
                        continue
                    _step(variant, node, values)
                    for argument in node.all_input_nodes:
                        if last_use[argument.name] == node.name:
                            values.pop(argument.name, None)
                    if node.op == "output":
                        outputs.append(values[node.name])
        return outputs


def start_frontier(graph: Graph, batches: Sequence[Batch]) -> Frontier:
    """Return the frontier before the first node, with the batches as the inputs' values."""
    names = [n.name for n in graph.module.graph.nodes if n.op == "placeholder"]
    return Frontier(graph, [dict(zip(names, batch, strict=True)) for batch in batches])


def find_first_use(graph: Graph, group: Group) -> int:
    """Return the number of the first node that reads a tensor of the group: before it nothing changes."""
    members = {m.tensor for m in group.members}
    for index, node in enumerate(graph.module.graph.nodes):
        named = {str(a.target) for a in node.all_input_nodes if a.op == "get_attr"}
        # A constant of a sub-graph is named by the path through it.
        if node.op == "call_function" and any(m in named or m.partition(".")[0] in named for m in members):
            return index
    return 0


def find_last_uses(module: fx.GraphModule) -> dict[str, str]:
    """Return for each node the name of the node that reads it last."""
    return {a.name: node.name for node in module.graph.nodes for a in node.all_input_nodes}


def _step(module: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    if node.op in ("placeholder", "get_attr"):
        return  # inputs are there from the start, tensors are read when used
    arguments = {
        a: find_attribute(module, str(a.target)) if a.op == "get_attr" else values[a.name] for a in node.all_input_nodes
    }
    values[node.name] = evaluate_node(node, arguments)
