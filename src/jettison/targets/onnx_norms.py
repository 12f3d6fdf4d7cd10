"""BatchNorm folded into the layer it follows, in the file: runtimes do so too, but lose the layer's name over it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jettison.targets.onnx_bodies import list_reads, replace_nodes

if TYPE_CHECKING:
    import onnx

OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
"""Where each operator's weight has its outputs; a Gemm's where it is stored as linear layers are."""


def fold_norms(proto: onnx.ModelProto) -> int:
    """Fold each BatchNormalization that alone reads a float layer with a weight of its own; returns how many went.

    W' = W g / sqrt(v + eps), b' = beta + (b - m) g / sqrt(v + eps), computed in float64.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = proto.graph
    constants = {i.name: i for i in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    reads = Counter(name for node in graph.node for name in list_reads(node)) + Counter(v.name for v in graph.output)
    gone: list[onnx.NodeProto] = []
    for norm in graph.node:
        layer = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if layer is None or not _can_take(layer, norm, constants, reads):
            continue
        scale, shift, mean, variance = (
            numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:5]
        )
        eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + eps)
        weight = numpy_helper.to_array(constants[layer.input[1]])
        shape = [-1 if axis == OUTPUT_AXIS[layer.op_type] else 1 for axis in range(weight.ndim)]
        bias = numpy_helper.to_array(constants[layer.input[2]]).astype(np.float64) if len(layer.input) > 2 else 0.0
        name = layer.input[2] if len(layer.input) > 2 else f"{layer.input[1].removesuffix('.weight')}.bias"
        scaled = (weight * factor.reshape(shape)).astype(weight.dtype)
        constants[layer.input[1]].CopyFrom(numpy_helper.from_array(scaled, layer.input[1]))
        made = numpy_helper.from_array((shift + (bias - mean) * factor).astype(weight.dtype), name)
        if name in constants:
            constants[name].CopyFrom(made)
        else:
            graph.initializer.append(made)
            layer.input.append(name)
        layer.output[0] = norm.output[0]
        gone.append(norm)
    replace_nodes(graph, (n for n in graph.node if not any(n is g for g in gone)))
    return len(gone)


def _can_take(
    layer: onnx.NodeProto, norm: onnx.NodeProto, constants: dict[str, onnx.TensorProto], reads: Counter[str]
) -> bool:
    """Say if a layer's parameters are its own, in floating point, and nobody else reads what it gives."""
    settings = {a.name: a for a in layer.attribute}
    if layer.op_type not in OUTPUT_AXIS or reads[layer.output[0]] != 1:
        return False
    if layer.op_type == "ConvTranspose" and "group" in settings and settings["group"].i != 1:
        return False
    if layer.op_type == "Gemm" and ("transB" not in settings or not settings["transB"].i):
        return False
    held = [constants.get(name) for name in (*layer.input[1:], *norm.input[1:5])]
    floats = all(c is not None and c.data_type in (1, 11) for c in held)  # onnx.TensorProto.FLOAT and DOUBLE
    fresh = len(layer.input) > 2 or f"{layer.input[1].removesuffix('.weight')}.bias" not in constants
    return floats and fresh and all(reads[name] == 1 for name in layer.input[1:])
