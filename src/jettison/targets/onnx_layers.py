"""What an ONNX file asks for: its convolutions and matrix products, with their MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, ShapeError
from jettison.targets.onnx_recurrent import read_body

if TYPE_CHECKING:
    import numpy as np
    import onnx

DYNAMIC_LSTM = "DynamicQuantizeLSTM"
RECURRENT = ("LSTM", "GRU", "RNN", DYNAMIC_LSTM)
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger")
UNPACKING = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Reshape", "Identity")
ROUNDINGS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
STORED = {1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 16: "bf16", 21: "int4", 22: "int4"}
"""onnx.TensorProto's numbers of element types."""


@dataclass(frozen=True)
class FileLayer:
    """A convolution, matrix product or recurrent layer of a file, named after its node.

    MACs are for the shapes that were given. `weight` is the name of its constant, and `stored` that constant's type;
    both "" for a product of two activations. `weights_only` says that the weight is in integers and what it is
    multiplied with is not.
    """

    name: str
    operator: str
    weight: str
    stored: str
    macs: int
    depthwise: bool
    weights_only: bool = False


def read_input_types(path: Path) -> dict[str, np.dtype[Any]]:
    """Return the element type of each of a file's inputs by name.

    Raises CheckpointError where the file is no ONNX network.
    """
    from onnx import helper

    graph = _read(path).graph
    constants = {i.name for i in graph.initializer}
    return {
        i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
        for i in graph.input
        if i.name not in constants
    }


def _read(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's own error classes, and the operating system's
        raise CheckpointError(
            f"{path} is no ONNX file: {str(error).splitlines()[0][:200]}. Layers are read from ONNX. "
            "Give the file that `export` wrote."
        ) from error


def list_layers(path: Path, shapes: Sequence[Sequence[int]]) -> tuple[FileLayer, ...]:
    """Return the convolutions, matrix products and recurrent layers of a file in its order, for inputs of these shapes.

    A Scan with one product in it is a layer, too: a recurrent one that runs step by step. Raises CheckpointError where
    the file is no ONNX network, ShapeError where the shapes do not fit it.
    """
    model = _read(path)
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    sizes = _infer_sizes(model, shapes, path)
    found = []
    for node in graph.node:
        if node.op_type not in (*PRODUCTS, *RECURRENT) and _find_step(node) is None:
            continue
        weight, rounded = _read_weight(node, makers, constants)
        stored = STORED.get(weight.data_type, "") if weight is not None else ""
        macs, depthwise = _count(node, sizes)
        name = weight.name if weight is not None else ""
        only = stored.startswith("int") and not rounded
        found.append(FileLayer(node.name, node.op_type, name, stored, macs, depthwise, only))
    return tuple(found)


def list_roundings(path: Path) -> frozenset[str]:
    """Return the names of a file's QuantizeLinear and DequantizeLinear nodes."""
    import onnx

    return frozenset(n.name for n in onnx.load(str(path)).graph.node if n.op_type in ROUNDINGS)


def _read_weight(node: onnx.NodeProto, makers: Mapping[str, Any], constants: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the constant that a layer multiplies with, None where it is computed, and if the other side is rounded."""
    step = _find_step(node)
    if step is not None:
        return step[1], step[0].op_type == "MatMulInteger"
    source = makers.get(node.input[0])
    rounded = node.op_type == DYNAMIC_LSTM or (source is not None and source.op_type in ROUNDINGS)
    return _find_constant(node.input[1], makers, constants), rounded


def _find_step(node: onnx.NodeProto) -> tuple[Any, Any] | None:
    """Return the one product in a Scan's body and its weight, None where the node is something else."""
    body = read_body(node)
    if body is None:
        return None
    constants = {i.name: i for i in body.initializer}
    products = [n for n in body.node if n.op_type in PRODUCTS and n.input[1] in constants]
    return (products[0], constants[products[0].input[1]]) if len(products) == 1 else None


def _find_constant(value: str, makers: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    while value in makers and makers[value].op_type in UNPACKING:
        value = makers[value].input[0]
    if value in makers and makers[value].op_type == "Constant":
        return None
    return constants.get(value)


def _infer_sizes(model: onnx.ModelProto, shapes: Sequence[Sequence[int]], path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor once the inputs have these shapes."""
    import onnx

    constants = {i.name for i in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    if len(inputs) != len(shapes):
        raise ShapeError(
            f"{len(shapes)} inputs were given for {path.name}, which takes {len(inputs)}: "
            f"{', '.join(v.name for v in inputs)}. Give one for each."
        )
    for value, shape in zip(inputs, shapes, strict=True):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(shape) or any(d.dim_value and d.dim_value != s for d, s in zip(dims, shape, strict=True)):
            wanted = tuple(d.dim_value or None for d in dims)
            raise ShapeError(
                f"Input {value.name!r} has shape {tuple(shape)}, but {path.name} takes {wanted} (None is free). "
                "Give inputs of that shape."
            )
        for dim, size in zip(dims, shape, strict=True):
            dim.Clear()
            dim.dim_value = size
    # The outputs still say "batch"; inference fills them anew.
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    own = [(node, list(node.input)) for node in model.graph.node if node.op_type == DYNAMIC_LSTM]
    for node, given in own:  # ONNX knows no shapes for the runtime's own operator, which gives what LSTM gives
        node.op_type, node.domain, node.input[:] = "LSTM", "", given[:3]
    whole = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for node, given in own:
        node.op_type, node.domain, node.input[:] = DYNAMIC_LSTM, "com.microsoft", given
    sizes = {i.name: tuple(i.dims) for i in whole.initializer}
    for value in (*whole.input, *whole.value_info, *whole.output):
        sizes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return sizes


def _count(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, bool]:
    """Return a node's multiply-accumulates, and whether each of its channels is convolved for itself."""
    if (step := _find_step(node)) is not None:
        read = sizes.get(node.input[-1], ())  # every row of every step meets the weight once
        return math.prod(read[:-1]) * math.prod(step[1].dims) if read else 0, False
    left, right, out = (sizes.get(value, ()) for value in (node.input[0], node.input[1], node.output[0]))
    if node.op_type in ("Gemm", "MatMul", "MatMulInteger"):
        transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
        inner = left[-2] if transposed else left[-1] if left else 0
        return math.prod(out) * inner if out else 0, False
    if node.op_type in RECURRENT:
        state = sizes.get(node.input[2], ())
        # Weights are (directions, outputs, inputs): every row of every step meets them once.
        return math.prod(left[:2]) * (math.prod(right) + math.prod(state)) if left and right and state else 0, False
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if not right or not out or not left:
        return 0, False
    depthwise = groups > 1 and groups == left[1]
    if node.op_type == "ConvTranspose":
        return math.prod(left) * right[1] * math.prod(right[2:]), depthwise
    return math.prod(out) * right[1] * math.prod(right[2:]), depthwise
