"""Dynamic int8: weights are int8 once and for all, activations get their range anew from each call's input.

No calibration. For linear layers, whose inputs in a transformer vary too much for one fixed range, and for recurrent
ones. Convolutions and embeddings stay float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.core.errors import UnknownName
from jettison.quantization.attention import quantize_products
from jettison.quantization.constants import fold_constants
from jettison.quantization.convert import Quantized
from jettison.quantization.fold import copy_graph, find_weight
from jettison.quantization.ranges import choose_weight_scale
from jettison.quantization.recurrent import SMALLEST, can_run_on_integers, quantize_recurrent
from jettison.quantization.weight_only import (
    find_recurrent,
    finish,
    free_name,
    list_kinds,
    pick_layers,
    place_constants,
    read_weight,
)
from jettison.targets.integer import Levels, quantize_linear
from jettison.targets.operators import dynamic_operator


def quantize_dynamic(
    module: GraphModule,
    *,
    levels: Levels,
    exclude: Collection[str] = (),
    smallest: Mapping[str, int] = SMALLEST,
    attention: bool = False,
) -> Quantized:
    """Return a copy of a flat graph whose linear and recurrent layers multiply integers, ranges found at each call.

    `levels` are those of the target's weights (symmetric); there is one scale for each output. `exclude` names layers
    that stay float; so do recurrent layers with projections, and those with fewer units than `smallest` says for their
    kind. The range of a call spans its whole input, so that a row's result depends, a little, on the rows beside it; a
    recurrent layer's state has a range of its own at each step.

    With `attention` the products of two activations are on integers, too. That is not the default: in ONNX Runtime it
    made whole networks between 0.86 and 1.03 times as fast (a MiniLM at 512 tokens, a ViT-S), because rounding both
    sides costs about what the product saves (benchmarks/kinds.py). Raises UnknownName for an unknown layer,
    NonFiniteError for NaN or infinity in a weight.
    """
    copied = copy_graph(module).requires_grad_(False)
    fold_constants(copied)
    linear, recurrent = pick_layers(copied, ()), find_recurrent(copied)
    for name in exclude:
        if name not in {**linear, **recurrent}:
            raise UnknownName("linear or recurrent layer", name, {**linear, **recurrent})
    done = []
    for name, node in linear.items():
        if name not in exclude:
            _quantize_linear_layer(copied, node, levels)
            done.append(name)
    for name, node in recurrent.items():
        if name not in exclude and can_run_on_integers(node, copied, smallest):
            quantize_recurrent(copied, name, node, levels)
            done.append(name)
    note = ""
    if attention:
        products, left = quantize_products(copied)
        note = f"{products} products of two activations are on integers, {left} stayed float."
    finish(copied)
    return Quantized(copied, list_kinds(module, done, 1 + levels.q_max.bit_length()), note)


def _quantize_linear_layer(module: GraphModule, node: Node, levels: Levels) -> None:
    import torch

    weight_node = find_weight(node)
    assert weight_node is not None
    weight = read_weight(module, weight_node)
    scale = choose_weight_scale(weight, 0, levels)
    integers = quantize_linear(weight, scale[:, None], 0, levels).to(torch.int8).t().contiguous()
    stem = free_name(module, str(weight_node.target), node)
    parts: dict[str, Tensor | None] = {"": integers, "_scale": scale}
    bias = node.args[2] if len(node.args) > 2 else None
    node.args = (node.args[0], *place_constants(module, node, stem, parts), bias)
    node.target = dynamic_operator()
