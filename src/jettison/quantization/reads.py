"""What integer layers read. A linear layer gives float where none reads its result, and the sums after it stay float.

The residual stream of a transformer, which only LayerNorms and further sums read, gains nothing from being rounded,
and loses much: a few channels of it are far larger than the rest, and eight bits for all leave little for the others.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from jettison.quantization.fold import find_layers, name_operator
from jettison.targets.integer import IntegerScheme


def find_read(module: GraphModule, scheme: IntegerScheme, exclude: Collection[str]) -> frozenset[Node]:
    """Return the tensors that an integer layer reads, maybe after operators that move, join or add integers."""
    layers = find_layers(module, frozenset(scheme.weighted))
    multiplied = {node for name, node in layers.items() if name not in exclude}
    passing = (scheme.integer | scheme.fused) - scheme.weighted.keys()
    found: set[Node] = set()
    for node in reversed(module.graph.nodes):
        if any(u in multiplied or (u in found and name_operator(u) in passing) for u in node.users):
            found.add(node)
    return frozenset(found)


def find_moved(module: GraphModule) -> frozenset[Node]:
    """Return the nodes whose numbers hang on those of an input; a position table made for a batch's size does not.

    Runtimes compute the others when they load a network, and OpenVINO 2026.4 fails at integer layers among them.
    """
    moved: set[Node] = set()
    for node in module.graph.nodes:
        is_size = name_operator(node).startswith("aten.sym_")
        if node.op == "placeholder" or (not is_size and any(source in moved for source in node.all_input_nodes)):
            moved.add(node)
    return frozenset(moved)
