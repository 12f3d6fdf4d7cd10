"""Bias correction (Nagel et al., 2019): rounding shifts a channel's mean, and the bias takes it back.

We depart from the paper twice: the shift is measured, not derived from BatchNorm, layer after layer on already
corrected inputs; and where an activation cuts off, only what it lets through counts. (The mean before a ReLU is mostly
that of values which the ReLU drops; on a trained CNN with 4-bit weights, correcting it did harm.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.clamps import find_clamp
from jettison.quantization.fold import copy_graph, read_attribute
from jettison.quantization.replay import Batches, Layer, walk_layers
from jettison.quantization.weights import Weight, name_axis, read_weight, write_weight
from jettison.targets.integer import IntegerScheme

POSITIONS = 2**16
"""Values of each channel that are compared, evenly over the batches."""
ROUNDS = 5


def correct_bias(
    folded: GraphModule, converted: GraphModule, batches: Batches, scheme: IntegerScheme, *, seed: int = 0
) -> GraphModule:
    """Return a converted graph whose layers' outputs have, channel by channel, the float layers' mean.

    Layers without a bias are left as they are. Nothing is drawn.
    """
    converted = copy_graph(converted)
    for layer in walk_layers(folded, converted, batches):
        found = read_weight(converted, layer.node)
        if found.bias is not None:
            write_weight(converted, layer.node, replace(found, bias=found.bias + measure_shift(folded, layer, found)))
    return converted


def measure_shift(folded: GraphModule, layer: Layer, weight: Weight) -> Tensor:
    """Return what each output channel's bias must grow by; 0 where that would not lower the channel's error."""
    axis, parts = name_axis(layer.node), []
    weight_node, bias_node = layer.original.args[1:3]
    assert isinstance(weight_node, Node) and isinstance(bias_node, Node)
    floats = read_attribute(folded, str(weight_node.target)), read_attribute(folded, str(bias_node.target))
    for given, wanted in layer.inputs():
        pair = (
            call(layer.original, wanted, *floats),
            call(layer.original, given, weight.values, weight.bias),
        )
        columns = [y.movedim(axis, 0).flatten(1) for y in pair]
        total = columns[0].shape[1] * len(layer.quantized.batches)
        stride = max(1, total // POSITIONS) | 1  # an odd stride does not fall in step with the layout
        parts.append(torch.stack([y[:, ::stride] for y in columns]))
    exact, rounded = torch.cat(parts, -1)
    return find_shift(exact, rounded, find_clamp(layer.original))


def find_shift(exact: Tensor, rounded: Tensor, ends: tuple[float, float]) -> Tensor:
    """Return for each row the shift of `rounded` with the least squared error to `exact`, both clamped to `ends`.

    Newton's method: positions that the clamp cuts off pull at nothing. Without a clamp it is the difference of means.
    """
    wanted = exact.clamp(*ends)
    shift = rounded.new_zeros(len(rounded))
    for _ in range(ROUNDS):
        shifted = rounded + shift.unsqueeze(1)
        live = (shifted >= ends[0]) & (shifted <= ends[1])
        gap = (wanted - shifted).mul_(live).sum(1, dtype=torch.float64)
        shift = shift + (gap / live.sum(1).clamp(min=1)).to(shift.dtype)

    def measure(values: Tensor) -> Tensor:
        return (values.clamp(*ends) - wanted).square().sum(1, dtype=torch.float64)

    better = measure(rounded + shift.unsqueeze(1)) < measure(rounded)
    return torch.where(better, shift, torch.zeros_like(shift))


def call(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a weighted call gives with another weight and bias."""
    function: Any = node.target
    output: Tensor = function(x, weight, bias, *node.args[3:])
    return output
