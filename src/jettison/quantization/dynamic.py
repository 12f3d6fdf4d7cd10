"""Dynamic int8: weights are int8 once and for all, activations get their range anew from each call's input.

No calibration. For linear layers, whose inputs in a transformer vary too much for one fixed range. Layers that are not
linear stay float.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.convert import Quantized
from jettison.quantization.fold import copy_graph, find_weight
from jettison.quantization.ranges import choose_weight_scale
from jettison.quantization.weight_only import finish, free_name, list_kinds, pick_layers, place_constants, read_weight
from jettison.targets.integer import Levels, quantize_linear
from jettison.targets.operators import dynamic_operator


def quantize_dynamic(module: GraphModule, *, levels: Levels, exclude: Collection[str] = ()) -> Quantized:
    """Return a copy of a flat graph whose linear layers multiply integers, with ranges found at each call.

    `levels` are those of the target's weights (symmetric); there is one scale for each output. `exclude` names layers
    that stay float. The range of a call spans its whole input, so that a row's result depends, a little, on the rows
    beside it. Raises UnknownName for an unknown layer, NonFiniteError for NaN or infinity in a weight.
    """
    import torch

    copied = copy_graph(module).requires_grad_(False)
    layers = pick_layers(copied, exclude)
    for node in layers.values():
        weight_node = find_weight(node)
        assert weight_node is not None
        weight = read_weight(copied, weight_node)
        scale = choose_weight_scale(weight, 0, levels)
        integers = quantize_linear(weight, scale[:, None], 0, levels).to(torch.int8).t().contiguous()
        stem = free_name(copied, str(weight_node.target), node)
        parts: dict[str, Tensor | None] = {"": integers, "_scale": scale}
        bias = node.args[2] if len(node.args) > 2 else None
        node.args = (node.args[0], *place_constants(copied, node, stem, parts), bias)
        node.target = dynamic_operator()
    finish(copied)
    return Quantized(copied, list_kinds(module, layers, 1 + levels.q_max.bit_length()))
