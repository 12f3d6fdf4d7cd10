"""Bits of single layers: which grid each tensor gets when layers differ, and which layers stand at the ends.

A layer's bits are those of its weight and of the tensor it multiplies. A tensor that several layers read, or that is
only moved or joined on its way, has one grid: the finest that any of its readers asks for. A tensor that no layer with
weights reads (a branch before an addition) keeps the scheme's own grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch.fx import GraphModule, Node

from jettison.core.errors import InputError, UnknownName
from jettison.quantization.fold import find_layers, name_operator
from jettison.targets.integer import IntegerScheme, Levels


def narrow_weight(levels: Levels, bits: int) -> Levels:
    """Return symmetric levels of so many bits, never more than the target has."""
    half = min(2 ** (bits - 1) - 1, levels.q_max)
    return Levels(-half, half, True)


def narrow_activation(levels: Levels, bits: int) -> Levels:
    """Return levels of so many bits, signed where the target's are, never more than the target has."""
    if 2**bits > levels.q_max - levels.q_min:
        return levels
    low = 0 if levels.q_min == 0 else -(2 ** (bits - 1))
    return Levels(low, low + 2**bits - 1, levels.symmetric)


def check_bits(scheme: IntegerScheme, layers: Collection[str]) -> None:
    """Raise UnknownName for a layer in `scheme.bits` that is none, InputError for bits that the target cannot have."""
    for name, pair in scheme.bits.items():
        if name not in layers:
            raise UnknownName("layer with weights", name, layers)
        if len(pair) != 2 or not all(type(bits) is int and 2 <= bits <= 8 for bits in pair):
            raise InputError(
                f"The bits of layer {name!r} are {pair!r}. They are those of its weight and of its input. "
                "Give two whole numbers from 2 to 8; a layer that shall stay float is excluded instead."
            )
        most = (1 + scheme.weight.q_max.bit_length(), (scheme.activation.q_max - scheme.activation.q_min).bit_length())
        if pair[1] < 8:
            refuse_coarse(scheme, f"bits={{{name!r}: {pair!r}}}")
        # A target of 7 bits takes 8 to mean its own most; a grid narrowed on purpose does not.
        if any(bits > limit and limit < 7 for bits, limit in zip(pair, most, strict=True)):
            raise InputError(
                f"The bits of layer {name!r} are {pair!r}, more than the {most} that all layers were narrowed to. "
                "Give the bits of every layer instead of narrowing all."
            )


def refuse_coarse(scheme: IntegerScheme, asked: str) -> None:
    """Raise InputError where a target's files would not keep activations of fewer than 8 bits."""
    if not scheme.cuts:
        raise InputError(
            f"{asked} with target={scheme.target!r}: its files round activations to 8 bits whatever the network says, "
            "and would compute something else. Give fewer bits to weights only, or choose onnxruntime, openvino or "
            "inductor as the target."
        )


def read_weight_levels(scheme: IntegerScheme, layer: str) -> Levels:
    """Return the levels of a layer's weight."""
    return narrow_weight(scheme.weight, scheme.bits[layer][0]) if layer in scheme.bits else scheme.weight


def find_tensor_levels(module: GraphModule, scheme: IntegerScheme) -> dict[Node, Levels]:
    """Return the levels of every tensor whose grid `scheme.bits` changes."""
    if not scheme.bits:
        return {}
    wanted: dict[Node, int] = {}
    for name, node in find_layers(module, frozenset(scheme.weighted)).items():
        if isinstance(source := node.args[0], Node):
            bits = scheme.bits[name][1] if name in scheme.bits else 8
            wanted[source] = max(bits, wanted.get(source, 0))
    found = {}
    for tensors in group_tensors(module, scheme):
        asked = [wanted[t] for t in tensors if t in wanted]
        if asked:
            found.update(dict.fromkeys(tensors, narrow_activation(scheme.activation, max(asked))))
    return found


def group_tensors(module: GraphModule, scheme: IntegerScheme) -> list[frozenset[Node]]:
    """Return the tensors of a graph in groups that must have one scale: what is moved, and what is joined."""
    group: dict[Node, set[Node]] = {node: {node} for node in module.graph.nodes}
    for node in module.graph.nodes:
        for source in _list_same(node, scheme):
            if group[source] is not group[node]:
                group[node] |= group[source]
                for member in group[source]:
                    group[member] = group[node]
    return list({id(members): frozenset(members) for members in group.values()}.values())


def _list_same(node: Node, scheme: IntegerScheme) -> list[Node]:
    """Return the inputs whose range the output of a node has."""
    operator = name_operator(node)
    if operator in scheme.inherited:
        return [a for a in node.args[:1] if isinstance(a, Node)]
    if operator in scheme.shared and isinstance(node.args[0], (list, tuple)):
        return [a for a in node.args[0] if isinstance(a, Node)]
    return []


def find_ends(module: GraphModule, scheme: IntegerScheme) -> frozenset[str]:
    """Return the first and the last layers: those with no other layer between them and an input, or an output."""
    layers = {node: name for name, node in find_layers(module, frozenset(scheme.weighted)).items()}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    outputs = [n for n in module.graph.nodes if n.op == "output"]
    firsts = _walk(inputs, layers, backwards=False)
    return frozenset([*firsts, *_walk(outputs, layers, backwards=True)])


def _walk(starts: list[Node], layers: dict[Node, str], *, backwards: bool) -> Iterator[str]:
    todo, seen = list(starts), set(starts)
    while todo:
        node = todo.pop()
        for near in node.all_input_nodes if backwards else list(node.users):
            if near in seen:
                continue
            seen.add(near)
            if near in layers:
                yield layers[near]
            else:
                todo.append(near)


def read_levels(node: Node) -> Levels:
    """Return the levels of a weighted call's weight in a converted graph."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    low, high = weight.args[4:6]
    assert isinstance(low, int) and isinstance(high, int)
    return Levels(low, high, True)


def describe_bits(scheme: IntegerScheme) -> str:
    """Return what must be said of layers with fewer bits than a kernel takes; empty where there are none."""
    fewer = [name for name, pair in scheme.bits.items() if min(pair) < 8]
    if not fewer:
        return ""
    names = ", ".join(fewer[:3]) + (", ..." if len(fewer) > 3 else "")
    return (
        f"A simulation for {len(fewer)} layers below 8 bits ({names}): no kernel of {scheme.target} computes on them. "
        "The exported file runs the coarser grid in 8 bits, at the speed and size of 8 bits."
    )


def split_bits(bits: Mapping[str, tuple[int, int]]) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Return the integer layers with their bits, for `IntegerScheme.bits`, and those at (32, 32), which stay float."""
    floats = frozenset(name for name, pair in bits.items() if tuple(pair) == (32, 32))
    return {name: pair for name, pair in bits.items() if name not in floats}, floats
