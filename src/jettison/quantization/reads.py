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
