"""How linear layers with small weights are written as ONNX, in the forms that the runtimes fuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from jettison.targets.onnx_bodies import rename_values, replace_nodes
from jettison.targets.operators import dynamic_operator, groups_operator, product_operator

if TYPE_CHECKING:
    import onnx
    from torch.fx import GraphModule

GROUPS_OPSET = 21
"""The first with a DequantizeLinear that has groups and four bits."""


def make_translations() -> dict[Any, Callable[..., Any]]:
    """Return the ONNX form of each operator in `targets.operators`."""
    return {
        groups_operator(): _translate_groups(),
        dynamic_operator(): _translate_dynamic(),
        product_operator(): _translate_product(),
    }


def read_bits(module: GraphModule) -> dict[str, int]:
    """Return the bits in which each constant of the grouped layers is to be stored, by its dotted name."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is groups_operator():
            for constant in (node.args[1], node.args[3]):
                if constant is not None:
                    found[str(constant.target)] = node.args[6]
    return found


def _translate_groups() -> Callable[..., Any]:
    """Weights in groups, still in eight bits: the exporter has no four-bit constants, see `pack_constants`."""
    import onnxscript

    def linear(
        x: Any, weight: Any, scale: Any, zero_point: Any, bias: Any, group: int, bits: int, rounding: int
    ) -> Any:
        # Untyped on purpose: onnxscript's stubs describe eager tensors, the exporter passes graph values.
        op: Any = onnxscript.opset21
        sources = (weight, scale) if zero_point is None else (weight, scale, zero_point)
        y = op.MatMul(x, op.DequantizeLinear(*sources, axis=0, block_size=group))
        return y if bias is None else op.Add(y, bias)

    return linear


def _translate_dynamic() -> Callable[..., Any]:
    """Dynamic quantization as ONNX Runtime knows it; the order of the products is the one it fuses."""
    import onnxscript

    def linear(x: Any, weight: Any, scale: Any, bias: Any) -> Any:
        op: Any = onnxscript.opset18
        quantized, step, zero_point = op.DynamicQuantizeLinear(x)
        summed = op.Cast(op.MatMulInteger(quantized, weight, zero_point), to=1)
        y = op.Mul(summed, op.Mul(step, scale))
        return y if bias is None else op.Add(y, bias)

    return linear


def _translate_product() -> Callable[..., Any]:
    """Both sides are rounded where they stand; ONNX Runtime fuses what comes after the product into it."""
    import onnxscript

    def product(a: Any, b: Any) -> Any:
        op: Any = onnxscript.opset18
        left, left_step, left_zero = op.DynamicQuantizeLinear(a)
        right, right_step, right_zero = op.DynamicQuantizeLinear(b)
        summed = op.Cast(op.MatMulInteger(left, right, left_zero, right_zero), to=1)
        return op.Mul(summed, op.Mul(left_step, right_step))

    return product


def pack_constants(proto: onnx.ModelProto, bits: Mapping[str, int]) -> None:
    """Turn the named int8 or uint8 constants of four bits into INT4 or UINT4: two to a byte, the first one lower."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    for constant in proto.graph.initializer:
        if bits.get(constant.name) != 4:
            continue
        halves = numpy_helper.to_array(constant).astype(np.uint8).reshape(-1) & 0xF
        halves = np.append(halves, np.zeros(halves.size % 2, np.uint8))
        signed = constant.data_type == TensorProto.INT8
        constant.ClearField("int32_data")
        constant.raw_data = (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8).tobytes()
        constant.data_type = TensorProto.INT4 if signed else TensorProto.UINT4


def read_half(module: GraphModule) -> str | None:
    """Return "fp16" or "bf16" where a graph's weights are stored so and cast when used, else None."""
    import torch

    kinds = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            dtype = getattr(attrgetter(str(node.target))(module), "dtype", None)
            if dtype in kinds:
                return kinds[dtype]
    return None


def narrow_constants(proto: onnx.ModelProto, kind: str | None) -> None:
    """Store weights in sixteen bits again, with a cast after them: the exporter computes casts of constants.

    Whatever has two dimensions or more and only values that the type holds exactly is stored so; that changes nothing.
    """
    from onnx import TensorProto, helper

    if kind is None:
        return
    casts, renamed = [], {}
    for constant in proto.graph.initializer:
        if (
            constant.data_type != TensorProto.FLOAT
            or len(constant.dims) < 2
            or (raw := _narrow(constant, kind)) is None
        ):
            continue
        constant.ClearField("float_data")
        constant.raw_data, constant.data_type = raw, TensorProto.FLOAT16 if kind == "fp16" else TensorProto.BFLOAT16
        renamed[constant.name] = f"{constant.name}_float"
        casts.append(helper.make_node("Cast", [constant.name], [renamed[constant.name]], to=TensorProto.FLOAT))
    for node in proto.graph.node:
        rename_values(node, renamed)
    replace_nodes(proto.graph, (*casts, *proto.graph.node))


def _narrow(constant: onnx.TensorProto, kind: str) -> bytes | None:
    """Return the bytes of a float32 constant in sixteen bits, None where a value would change."""
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(constant)
    if kind == "fp16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        return halves.tobytes() if np.array_equal(halves.astype(np.float32), values) else None
    words = np.ascontiguousarray(values).view(np.uint32)
    return None if bool((words & 0xFFFF).any()) else (words >> 16).astype(np.uint16).tobytes()
