"""What a .tflite file holds: float inputs and outputs put on, our own description, and its operators read.

Importing this module imports ai_edge_litert; import it inside functions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from jettison.core.errors import CheckpointError
from jettison.targets.audit import Operator
from jettison.targets.converted import fingerprint

KEY = "jettison"
MAGIC = b"TFL3"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "CONV_3D")
MOVING = ("TRANSPOSE", "RESHAPE", "PAD", "PADV2", "SLICE", "STRIDED_SLICE", "SQUEEZE", "EXPAND_DIMS", "GATHER", "SHAPE")
TYPES = {schema.TensorType.INT8: "int8", schema.TensorType.FLOAT32: "fp32", schema.TensorType.FLOAT16: "fp16"}
OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}


def finish(data: bytes, about: str) -> bytes:
    """Return the file with float32 inputs and outputs where the converter made them int8, and with our description."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    firsts: list[Any] = []
    lasts: list[Any] = []
    graph.inputs, graph.outputs = list(graph.inputs), list(graph.outputs)
    for ends, operators, code in ((graph.inputs, firsts, "QUANTIZE"), (graph.outputs, lasts, "DEQUANTIZE")):
        for place, index in enumerate(list(ends)):
            if graph.tensors[index].type != schema.TensorType.INT8:
                continue
            outside = _add_tensor(model, graph, graph.tensors[index])
            ends[place] = outside
            pair = (outside, index) if code == "QUANTIZE" else (index, outside)
            operators.append(_make_operator(model, code, pair))
            for signature in model.signatureDefs or []:
                for named in (*signature.inputs, *signature.outputs):
                    named.tensorIndex = outside if named.tensorIndex == index else named.tensorIndex
    graph.operators = [*firsts, *graph.operators, *lasts]
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(about.encode(), np.uint8)
    model.buffers.append(buffer)
    entry.name, entry.buffer = KEY, len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(len(data) + 4096)
    builder.Finish(model.Pack(builder), MAGIC)
    return bytes(builder.Output())


def _add_tensor(model: Any, graph: Any, like: Any) -> int:
    """Add a float tensor shaped `like` another that holds nothing; returns its index."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.shapeSignature = like.name + b"_float", like.shape, like.shapeSignature
    tensor.type, tensor.buffer = schema.TensorType.FLOAT32, len(model.buffers)
    model.buffers.append(schema.BufferT())
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _make_operator(model: Any, name: str, pair: tuple[int, int]) -> Any:
    code = getattr(schema.BuiltinOperator, name)
    version = {"QUANTIZE": 1, "DEQUANTIZE": 2}[name]
    index = next((i for i, c in enumerate(model.operatorCodes) if c.builtinCode == code), None)
    if index is None:
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, code, version
        model.operatorCodes.append(entry)
        index = len(model.operatorCodes) - 1
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = index, [pair[0]], [pair[1]]
    return operator


def describe(data: bytes, path: Path) -> dict[str, Any]:
    """Return our own description out of a file; raises CheckpointError where the file is cut or not ours."""
    try:
        if data[4:8] != MAGIC:
            raise ValueError(f"its mark is {data[4:8]!r}")
        # Unpacks every buffer, and so meets the end of a cut file before the runtime reads beyond it.
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        place = next(entry.buffer for entry in model.metadata or [] if entry.name in (KEY, KEY.encode()))
        found: dict[str, Any] = json.loads(bytes(bytearray(model.buffers[place].data)))
    except (ValueError, TypeError, IndexError, StopIteration, struct.error) as error:
        raise CheckpointError(
            f"{path} is no network that LiteRT can load and jettison has written: {str(error) or 'no description'}. "
            "It may be cut short. Export it anew."
        ) from error
    return found


def list_operators(data: bytes, layers: Mapping[str, str]) -> tuple[Operator, ...]:
    """Return the operators in the file's order; `layers` has the fingerprint of each integer layer's weights."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    names = {digest: name for name, digest in layers.items()}
    kinds = [OPERATORS[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
    ends = {*graph.inputs, *graph.outputs}
    found = []
    for place, operator in enumerate(graph.operators):
        kind = kinds[operator.opcodeIndex]
        tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
        precision = _tell_precision(kind, [TYPES[t.type] for t in tensors if t.type in TYPES])
        name = _find_layer(model, tensors[1], names) if kind in WEIGHTED else None
        at_end = bool(ends & {*operator.inputs, *operator.outputs})
        found.append(
            Operator(
                name or f"{kind.lower()}_{place}",
                kind,
                precision,
                (name,) if name else (),
                precision == "rounding" and not at_end,
                None,
            )
        )
    return tuple(found)


def _find_layer(model: Any, weight: Any, names: Mapping[str, str]) -> str | None:
    stored = model.buffers[weight.buffer].data
    if weight.type != schema.TensorType.INT8 or stored is None:
        return None
    return names.get(fingerprint(np.asarray(stored, np.uint8)))


def _tell_precision(kind: str, types: Sequence[str]) -> str:
    if kind in ("QUANTIZE", "DEQUANTIZE"):
        return "rounding" if len(set(types)) > 1 else "int8"
    if kind in MOVING or not types:
        return "other"
    return types[0] if len(set(types)) == 1 else "fp32"
