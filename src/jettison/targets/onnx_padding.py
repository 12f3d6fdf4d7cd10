"""Padding with zeros before a convolution, written into the convolution itself.

Networks ported from TensorFlow pad by one more on one side, which PyTorch writes as an operator of its own. ONNX's
Conv takes uneven padding, so the operator, and in an int8 file the rounding around it, can go: zero is held exactly
by every range, so padding before or after rounding is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jettison.targets.onnx_bodies import list_reads, replace_nodes

if TYPE_CHECKING:
    import onnx


def fold_padding(proto: onnx.ModelProto) -> int:
    """Move zero padding of the picture axes into the convolutions that alone read it; returns how many went."""
    from onnx import numpy_helper

    graph = proto.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if _is_tensor_constant(n)}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in dict.fromkeys(list_reads(node)):
            readers.setdefault(value, []).append(node)
    makers = {output: node for node in graph.node for output in node.output}
    outputs = Counter(v.name for v in graph.output)
    gone: list[onnx.NodeProto] = []
    for pad in [n for n in graph.node if n.op_type == "Pad"]:
        widths = _read_widths(pad, constants)
        chain = _follow_rounding(pad, readers, outputs)
        if widths is None or chain is None:
            continue
        end = chain[-1].output[0] if chain else pad.output[0]
        convolutions = readers.get(end, [])
        if end in outputs or not convolutions or not all(_can_pad(n, end) for n in convolutions):
            continue
        source = makers.get(pad.input[0])
        if chain and source is not None and _same_step(source, chain, constants):
            start, doubled = pad.input[0], [pad, *chain]
        else:
            start, doubled = (chain[-1].output[0] if chain else pad.input[0]), [pad]
            if chain:
                chain[0].input[0] = pad.input[0]
        for convolution in convolutions:
            _add_padding(convolution, widths)
            convolution.input[0] = start
        gone += doubled
    replace_nodes(graph, (n for n in graph.node if not any(n is g for g in gone)))
    return sum(n.op_type == "Pad" for n in gone)


def _is_tensor_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value"


def _read_widths(pad: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[list[int], list[int]] | None:
    """Return the widths before and after each picture axis; None where it is no plain zero padding of those."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    if mode != b"constant" or len(pad.input) < 2 or pad.input[1] not in constants:
        return None
    if len(pad.input) > 3 and pad.input[3]:
        return None
    if len(pad.input) > 2 and pad.input[2]:
        value = constants.get(pad.input[2])
        if value is None or float(value.reshape(-1)[0]) != 0.0:
            return None
    widths = [int(w) for w in constants[pad.input[1]]]
    half = len(widths) // 2
    before, after = widths[:half], widths[half:]
    if half < 3 or min(widths) < 0 or any(before[:2]) or any(after[:2]):
        return None
    return before[2:], after[2:]


def _follow_rounding(
    pad: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], outputs: Mapping[str, int]
) -> list[onnx.NodeProto] | None:
    """Return the QuantizeLinear and DequantizeLinear between padding and its readers; None where it branches."""
    chain: list[onnx.NodeProto] = []
    value = pad.output[0]
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        found = readers.get(value, [])
        if value in outputs:
            return None
        if len(found) != 1 or found[0].op_type != kind:
            return [] if not chain and not any(n.op_type == "QuantizeLinear" for n in found) else None
        chain.append(found[0])
        value = found[0].output[0]
    return chain


def _same_step(source: onnx.NodeProto, chain: list[onnx.NodeProto], constants: Mapping[str, np.ndarray]) -> bool:
    """Say if what is rounded was dequantized with the very scale and zero point that it is rounded to."""
    if source.op_type != "DequantizeLinear" or len(source.input) != len(chain[0].input):
        return False
    pairs = zip(source.input[1:], chain[0].input[1:], strict=True)
    return all(a in constants and b in constants and np.array_equal(constants[a], constants[b]) for a, b in pairs)


def _can_pad(node: onnx.NodeProto, value: str) -> bool:
    automatic = next((a.s for a in node.attribute if a.name == "auto_pad"), b"NOTSET")
    return node.op_type == "Conv" and node.input[0] == value and automatic == b"NOTSET"


def _add_padding(node: onnx.NodeProto, widths: tuple[list[int], list[int]]) -> None:
    from onnx import helper

    more = [*widths[0], *widths[1]]
    own = next((list(a.ints) for a in node.attribute if a.name == "pads"), [0] * len(more))
    others = [a for a in node.attribute if a.name != "pads"]
    copies = [type(a).FromString(a.SerializeToString()) for a in others]
    del node.attribute[:]
    node.attribute.extend([*copies, helper.make_attribute("pads", [a + b for a, b in zip(own, more, strict=True)])])
