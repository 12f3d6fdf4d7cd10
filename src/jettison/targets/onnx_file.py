"""From a flat graph to one small, self-contained ONNX file that keeps the layers' names."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import ExportError
from jettison.core.plain import write_bytes
from jettison.targets import onnx_attention, onnx_recurrent
from jettison.targets.integer import quantize_operator
from jettison.targets.onnx_bodies import list_bodies, list_reads, rename_values, replace_nodes
from jettison.targets.onnx_direct import write
from jettison.targets.onnx_floats import keep_floats
from jettison.targets.onnx_kinds import (
    GROUPS_OPSET,
    make_translations,
    narrow_constants,
    pack_constants,
    read_bits,
    read_half,
)
from jettison.targets.onnx_norms import fold_norms
from jettison.targets.onnx_padding import fold_padding

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor
    from torch.fx import GraphModule

OPSET = 18


def export(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool,
) -> None:
    """Write a float or converted graph as one ONNX file, whole or not at all, and let ONNX check it.

    The first dimension of every input is named "batch" where `dynamic_batch`. Raises ExportError naming the
    operator that has no counterpart, StorageError where the file cannot be written.
    """
    import onnx

    proto = write(
        module, inputs, input_names=input_names, output_names=output_names, dynamic=dynamic_batch, opset=OPSET
    )
    if proto is None:
        proto = _convert(module, inputs, input_names, output_names, dynamic_batch)
        if _is_broken(proto):  # onnxscript's optimiser loses the ends of some clamps
            proto = _convert(module, inputs, input_names, output_names, dynamic_batch, optimize=False)
    pack_constants(proto, read_bits(module))
    narrow_constants(proto, read_half(module))
    fold_norms(proto)
    _pool_globally(proto)
    fold_padding(proto)
    keep_floats(proto)
    _name_turned(proto, module)
    _name_nodes(proto)
    _strip(proto)
    _own_zero_points(proto.graph)
    onnx_recurrent.expand_steps(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX refuses the exported network: {error}. {_REMEDY}") from error
    write_bytes(proto.SerializeToString(), path)


_REMEDY = "Replace the operator in the network, or leave the part that holds it out of the export."


def _convert(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: bool,
    *,
    optimize: bool = True,
) -> onnx.ModelProto:
    import torch

    # The exporter specialises a batch of 1; two rows keep the dimension free.
    if dynamic:
        inputs = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=GROUPS_OPSET if read_bits(module) else OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=shapes,
                custom_translation_table={
                    quantize_operator(): _translate_quantize(),
                    **make_translations(),
                    **onnx_recurrent.make_translations(),
                    **onnx_attention.make_translations(),
                },
                verbose=False,
                optimize=optimize,
            )
        except Exception as error:
            raise ExportError(_explain(error, module)) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    if dynamic:
        _name_batch(proto)
    return proto


def _is_broken(proto: onnx.ModelProto) -> bool:
    import onnx

    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError:
        return True
    return False


def _explain(error: BaseException, module: GraphModule) -> str:
    """Name the operator and the user's line, from the exporter's chain of errors; the first one says neither."""
    from jettison.graph.trace import source_line  # it imports torch

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(map(str, chain))
    untold = re.search(r"(?:No ONNX function found for|No decompositions registered for).*?([\w:.]+\.[\w.]+)", text)
    node = re.search(r"Error when translating node %(\w+) .*?target=(?:torch\.ops\.)?([\w.]+)\]", text)
    last = str(chain[-1]).strip().splitlines() or ["no message"]
    if untold:
        what = f"operator {untold.group(1)}. torch.onnx.export has no way to express it"
    elif node:
        what = f"operator {node.group(2)}: {type(chain[-1]).__name__}: {last[0][:200]}"
    else:
        what = f"{type(chain[-1]).__name__}: {last[0][:200]}"
    lines = [source_line(n) for n in module.graph.nodes if node and n.name == node.group(1)]
    where = f" It stands in {lines[0]}." if lines and lines[0] else ""
    return f"The network cannot be written as ONNX: {what.rstrip('.')}.{where} {_REMEDY}"


def _translate_quantize() -> Callable[..., Any]:
    """Return the ONNX form of `jettison::quantize_per_tensor`, QuantizeLinear."""
    import onnx_ir
    import onnxscript

    def quantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
        import numpy as np

        # Untyped on purpose: onnxscript's stubs describe eager tensors, the exporter passes graph values.
        op: Any = onnxscript.opset18
        kind = onnx_ir.DataType(dtype).numpy()
        zero = op.Constant(value=onnx_ir.serde.serialize_tensor(onnx_ir.tensor(np.array(zero_point, kind))))
        step = op.Constant(value=onnx_ir.serde.serialize_tensor(onnx_ir.tensor(np.array(scale, np.float32))))
        whole = op.QuantizeLinear(x, step, zero)
        ends = np.iinfo(kind)
        if (quant_min, quant_max) == (ends.min, ends.max):
            return whole
        # QuantizeLinear saturates at its type's ends; a coarser grid is cut in integers, so that kernels still fuse.
        cuts = [onnx_ir.serde.serialize_tensor(onnx_ir.tensor(np.array(end, kind))) for end in (quant_min, quant_max)]
        return op.Clip(whole, *(op.Constant(value=cut) for cut in cuts))

    return quantize


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's progress lines, its log and its deprecation warnings; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)")
        # Raised from generated code, for the loops that torch.export makes of recurrent layers (torch 2.13).
        warnings.filterwarnings("ignore", message="_check_is_size", category=FutureWarning)
        # In a flat graph training or not is written into each operator; the module's flag says nothing.
        warnings.filterwarnings("ignore", message="Exporting a model while it is in training mode")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _name_batch(proto: onnx.ModelProto) -> None:
    """Rename the exporter's symbol for the first dimension to "batch" wherever it stands."""
    symbols = {i.type.tensor_type.shape.dim[0].dim_param for i in proto.graph.input} - {""}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = "batch"


SEE_THROUGH = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast")
WITH_WEIGHT = ("Conv", "Gemm", "MatMul", "ConvTranspose")
RECURRENT = ("DynamicQuantizeLSTM", onnx_recurrent.STEPS)
BELONGING = ("Relu", "Clip", "LeakyRelu", "Add", "BatchNormalization")


def _trace_back(value: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """Return the value that this one is a repacking of."""
    while value in producers and producers[value].op_type in SEE_THROUGH:
        value = producers[value].input[0]
    return value


def _name_turned(proto: onnx.ModelProto, module: GraphModule) -> None:
    """Name constants after the weights that the exporter has transposed into them, as it does for linear layers."""
    from onnx import numpy_helper

    graph = proto.graph
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    taken = {i.name for i in graph.initializer}
    turned = {i.name: numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) == 2 and i.name not in tensors}
    shapes = {value.shape[::-1] for value in turned.values()}
    weights = {
        _digest(tensor.detach().cpu().double().numpy().T): name
        for name, tensor in tensors.items()
        if name not in taken and name.endswith(".weight") and tuple(tensor.shape) in shapes
    }
    renamed = {name: weights.pop(key) for name, value in turned.items() if (key := _digest(value)) in weights}
    for constant in graph.initializer:
        constant.name = renamed.get(constant.name, constant.name)
    for node in graph.node:
        rename_values(node, renamed)


def _digest(values: np.ndarray[Any, Any]) -> bytes:
    """Return what equal numbers share, whatever type and order they are stored in."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(values, np.float64).tobytes() + str(values.shape).encode()).digest()


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Name nodes and their outputs after their layers: "conv1", "conv1.relu"; the others get short names.

    The runtime names what it fuses after these, so profiles and audits can be read.
    """
    graph = proto.graph
    constants = {i.name for i in graph.initializer}
    kept = {value.name for value in (*graph.output, *graph.input)} | constants
    names = _Names(constants, kept)
    _name_graph(graph, names, "")
    for node in graph.node:
        rename_values(node, names.renamed)


@dataclass
class _Names:
    """What naming has found so far: `layers` by the values they give, `renamed` from old names of values to new."""

    constants: Set[str]
    kept: Set[str]
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)


def _name_graph(graph: onnx.GraphProto, names: _Names, prefix: str) -> None:
    """Name the nodes of a graph and of the graphs inside them, whose names start with their node's."""
    constants = names.constants
    for index, node in enumerate(graph.node):
        name = f"{prefix}{node.op_type.removesuffix('Linear').lower()}_{index}"
        sources = [_trace_back(value, names.producers) for value in node.input]
        if node.op_type in WITH_WEIGHT and sources[1] in constants and sources[1].endswith(".weight"):
            name = sources[1].removesuffix(".weight")
        elif node.op_type in RECURRENT and any(source in constants for source in sources[1:3]):
            # "lstm.int8_ih_l0" gives "lstm.ih_l0", "gru.int8_hh_l0_reverse" gives "gru.hh_l0_reverse".
            name = next(s for s in sources[1:3] if s in constants).replace(".int8_", ".")
        elif node.op_type in BELONGING:
            layers = [names.layers[s] for s in sources if s in names.layers]
            name = f"{layers[0]}.{node.op_type.lower()}" if layers else name
        if name in names.taken or name in names.kept:
            name = f"{name}_{index}"
        names.taken.add(name)
        if node.op_type in (*WITH_WEIGHT, *RECURRENT, *BELONGING):
            names.layers |= dict.fromkeys(node.output, name)
        names.producers |= dict.fromkeys(node.output, node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _name_graph(attribute.g, names, f"{name}.{attribute.name.removesuffix('_branch')}.")
        node.name = name
        for place, output in enumerate(node.output):
            if output and output not in names.kept:
                names.renamed[output] = name if place == 0 else f"{name}#{place}"


def _pool_globally(proto: onnx.ModelProto) -> None:
    """Write a mean over both picture axes as GlobalAveragePool, which has an integer kernel; ReduceMean has none."""
    from onnx import helper, numpy_helper

    graph = proto.graph
    constants = {i.name: i for i in graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input, *graph.output)}
    nodes = []
    for node in graph.node:
        axes = node.input[1] if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        rank = next((ranks[v] for v in (node.input[0], node.output[0]) if v in ranks), None) if axes else None
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        rank = rank + 2 if rank is not None and not keep and node.input[0] not in ranks else rank
        if axes not in constants or rank != 4 or {int(a) % 4 for a in numpy_helper.to_array(constants[axes])} != {2, 3}:
            nodes.append(node)
        elif keep:
            nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output)))
        else:
            pooled = f"{node.output[0]}_pooled"
            nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled]))
            nodes.append(helper.make_node("Flatten", [pooled], list(node.output), axis=1))
    replace_nodes(graph, nodes)


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what no runtime reads: stack traces, signatures, inner shapes, zero points of biases, equal constants."""
    graph = proto.graph
    proto.ClearField("metadata_props")
    _strip_graph(graph)
    graph.name = "jettison"
    kinds = {i.name: i.data_type for i in graph.initializer}
    int32 = 6  # onnx.TensorProto.INT32; a zero point of that type may only be zero, and is when it is left out
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and kinds.get(node.input[0]) == int32:
            del node.input[2]
    same: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    for constant in graph.initializer:
        if constant.name.endswith((".weight", ".bias")) or onnx_recurrent.find_layer(constant.name):
            continue
        name = constant.name
        constant.ClearField("name")
        renamed[name] = same.setdefault(constant.SerializeToString(), f"c{len(same)}")
        constant.name = name
    used: set[str] = set()
    for node in graph.node:
        rename_values(node, renamed)
        used.update(list_reads(node))
    kept = []
    for constant in graph.initializer:
        constant.name = renamed.get(constant.name, constant.name)
        if constant.name in used:
            used.discard(constant.name)
            kept.append(constant)
    copies = [type(constant).FromString(constant.SerializeToString()) for constant in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _strip_graph(graph: onnx.GraphProto) -> None:
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.ClearField("value_info")
    for node in graph.node:
        for body in list_bodies(node):
            _strip_graph(body)


def _own_zero_points(graph: onnx.GraphProto) -> None:
    """Give every weight's dequantization a zero point of its own: OpenVINO leaves layers that share one in float."""
    constants = {i.name: i for i in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants or len(node.input) < 3:
            continue
        shared = node.input[2]
        if shared in taken:
            own = type(constants[shared]).FromString(constants[shared].SerializeToString())
            own.name = f"{node.input[0]}_zero_point_{len(taken)}"
            graph.initializer.append(own)
            node.input[2] = own.name
        taken.add(node.input[2])
