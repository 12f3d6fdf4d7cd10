"""What mixed precision chooses from: units of layers that decide together, their bytes, each alone on a coarse grid.

Knows nothing of limits and solvers: `flow.mixing` puts the numbers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.graph.trace import run_nodes
from jettison.quantization.bits import group_tensors, narrow_activation, narrow_weight
from jettison.quantization.fold import copy_graph, find_layers, find_weight, name_operator, read_attribute, set_buffer
from jettison.quantization.lsq import round_learned
from jettison.quantization.ranges import Histogram, Ranger, choose_scale, choose_weight_scale
from jettison.targets.integer import IntegerScheme, fake_quantize

Bits = tuple[int, int]
"""Of a layer's weight and of the tensor it multiplies."""
FLOAT: Bits = (32, 32)


@dataclass(frozen=True)
class Unit:
    """Layers that choose together, because what they multiply has one scale; `tensors` name those tensors' nodes."""

    layers: tuple[str, ...]
    tensors: tuple[str, ...]


def find_units(folded: GraphModule, scheme: IntegerScheme) -> tuple[Unit, ...]:
    """Return the layers with weights in the units they choose in, in the order of the graph."""
    layers = find_layers(folded, frozenset(scheme.weighted))
    place = {node: index for index, group in enumerate(group_tensors(folded, scheme)) for node in group}
    units: dict[int, list[tuple[str, str]]] = {}
    for name, node in layers.items():
        source = node.args[0]
        assert isinstance(source, Node)
        units.setdefault(place[source], []).append((name, source.name))
    return tuple(
        Unit(tuple(name for name, _ in pairs), tuple(dict.fromkeys(tensor for _, tensor in pairs)))
        for pairs in units.values()
    )


def collect_histograms(
    folded: GraphModule, units: Sequence[Unit], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, Histogram]:
    """Return the counts of what each unit multiplies, under the unit's first tensor; one for all its tensors."""
    found = {unit.tensors[0]: Histogram() for unit in units}
    owner = {tensor: found[unit.tensors[0]] for unit in units for tensor in unit.tensors}
    inputs = [node.name for node in folded.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        for batch in batches:
            for name, value in zip(inputs, batch, strict=True):
                if name in owner:
                    owner[name].add(value, f"the input {name}")
            for node, value, _ in run_nodes(folded, batch):
                if node.name in owner:
                    owner[node.name].add(value, f"the output of {node.name}")
    return found


def round_unit(
    folded: GraphModule, unit: Unit, bits: Bits, histogram: Histogram, scheme: IntegerScheme, ranger: Ranger
) -> GraphModule:
    """Return the float graph with one unit's weights and the tensors it multiplies rounded; `folded` is left alone."""
    alone = copy_graph(folded)
    if bits == FLOAT:
        return alone
    weight_levels = narrow_weight(scheme.weight, bits[0])
    levels = narrow_activation(scheme.activation, bits[1])
    low, high = (torch.tensor([end]) for end in ranger(histogram, levels))
    step, zero = choose_scale(low, high, levels)
    set_buffer(alone, "unit_step", step)
    set_buffer(alone, "unit_offset", -zero * step)
    layers = find_layers(alone, frozenset(scheme.weighted))
    for name in unit.layers:
        node = layers[name]
        weight_node, source = find_weight(node), node.args[0]
        assert weight_node is not None and isinstance(source, Node)
        axis = scheme.weighted[name_operator(node)]
        weight = read_attribute(alone, str(weight_node.target)).float()
        scale = choose_weight_scale(weight, axis, weight_levels)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        set_buffer(alone, str(weight_node.target), fake_quantize(weight, scale.view(shape), 0, weight_levels))
        with alone.graph.inserting_before(node):
            tensors = tuple(alone.graph.get_attr(name) for name in ("unit_step", "unit_offset"))
            given = (source, tensors[0], levels.q_min, levels.q_max)
            node.update_arg(0, alone.graph.call_function(round_learned, given, {"offset": tensors[1]}))
    alone.recompile()
    return alone


def count_bytes(folded: GraphModule, layer: str, bits: Bits, scheme: IntegerScheme) -> int:
    """Return the bytes of a layer's weight at its bits, packed, with its bias and, where integer, its scales."""
    node = find_layers(folded, frozenset(scheme.weighted))[layer]
    weight_node = find_weight(node)
    assert weight_node is not None
    weight = read_attribute(folded, str(weight_node.target))
    channels = weight.shape[scheme.weighted[name_operator(node)]]
    biased = len(node.args) > 2 and node.args[2] is not None
    scales = 0 if bits == FLOAT else 4 * channels
    return -(-weight.numel() * bits[0] // 8) + 4 * channels * biased + scales
