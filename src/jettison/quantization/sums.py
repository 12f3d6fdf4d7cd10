"""Sums that stay float: the residual stream of a transformer, which no integer operator reads.

A stream that only LayerNorms and further sums read gains nothing from being rounded, and loses much: a few channels of
it are far larger than the rest, and eight bits for all of them leave little for the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import GraphModule, Node

from jettison.quantization.fold import find_layers, name_operator
from jettison.targets.integer import IntegerScheme

SUM = "aten.add.Tensor"


def find_float_sums(module: GraphModule, scheme: IntegerScheme, exclude: Collection[str]) -> frozenset[Node]:
    """Return the sums whose result no integer operator reads and whose parts all come in float.

    That takes layers which give float from their integer kernel; for a target without any the answer is empty.
    """
    if not scheme.float_output:
        return frozenset()
    layers = find_layers(module, frozenset(scheme.weighted))
    multiplied = {node for name, node in layers.items() if name not in exclude}
    read = _find_read(module, scheme, multiplied)
    floats = {node for node in module.graph.nodes if name_operator(node) == SUM and node not in read}
    while True:
        rounded = _find_rounded(module, scheme, multiplied, floats)
        refused = {node for node in floats if any(source in rounded for source in node.all_input_nodes)}
        if not refused:
            return frozenset(floats)
        floats -= refused


def _find_read(module: GraphModule, scheme: IntegerScheme, multiplied: Collection[Node]) -> set[Node]:
    """Return the tensors that an integer layer reads, maybe after other integer operators."""
    passing = (scheme.integer | scheme.fused) - scheme.weighted.keys()
    found: set[Node] = set()
    for node in reversed(module.graph.nodes):
        if any(u in multiplied or (u in found and name_operator(u) in passing) for u in node.users):
            found.add(node)
    return found


def _find_rounded(
    module: GraphModule, scheme: IntegerScheme, multiplied: Collection[Node], floats: Collection[Node]
) -> set[Node]:
    """Return the tensors that come rounded, with these sums in float."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        operator, sources = name_operator(node), node.all_input_nodes
        if node in multiplied:
            if operator not in scheme.float_output or _feeds_integers(node, scheme, floats):
                found.add(node)
        elif operator in scheme.shared:
            if all(source in found for source in sources):
                found.add(node)
        elif node not in floats and operator in scheme.integer | scheme.fused and _any(sources, found):
            found.add(node)
    return found


def _feeds_integers(node: Node, scheme: IntegerScheme, floats: Collection[Node]) -> bool:
    users = list(node.users)
    if len(users) == 1 and name_operator(users[0]) in scheme.fused:
        users = list(users[0].users)
    return any(name_operator(user) in scheme.integer and user not in floats for user in users)


def _any(sources: Iterable[Node], found: Collection[Node]) -> bool:
    return any(source in found for source in sources)
