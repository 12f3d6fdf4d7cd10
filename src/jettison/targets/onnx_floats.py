"""Keeping float what was meant to stay float.

Where a convolution or a linear layer with float weights stands between a DequantizeLinear and a QuantizeLinear, ONNX
Runtime (1.20 and later, `WeightBiasQuantization`) rounds its weights itself, with one scale for all channels: a layer
that was left out because it cannot bear 8 bits then gets something worse. It only looks at direct neighbours, and sees
through clamps. So a LeakyRelu with the slope 1, which changes no number, is put before the QuantizeLinear; the runtime
computes it inside the layer's kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jettison.targets.onnx_bodies import list_reads, replace_nodes

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "ConvTranspose", "Gemm")
FLOAT_TYPES = (1, 10, 16)
"""onnx.TensorProto's FLOAT, FLOAT16 and BFLOAT16."""


def keep_floats(proto: onnx.ModelProto) -> int:
    """Guard every float layer between two roundings, in place; returns how many there were."""
    from onnx import helper

    graph = proto.graph
    weights = {i.name for i in graph.initializer if i.data_type in FLOAT_TYPES}
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in dict.fromkeys(list_reads(node)):
            readers.setdefault(value, []).append(node)
    outputs = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    guarded = 0
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in LAYERS or node.input[1] not in weights or node.output[0] in outputs:
            continue
        source, following = makers.get(node.input[0]), readers.get(node.output[0], [])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        if len(following) != 1 or following[0].op_type != "QuantizeLinear":
            continue
        guard = f"{node.output[0]}_kept_float"
        nodes.append(helper.make_node("LeakyRelu", [node.output[0]], [guard], alpha=1.0))
        following[0].input[0] = guard
        guarded += 1
    replace_nodes(graph, nodes)
    return guarded
