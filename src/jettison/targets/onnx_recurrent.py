"""How recurrent layers on integers are written as ONNX: LSTMs as ONNX Runtime's own kernel, the others as a Scan."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jettison.targets.onnx_bodies import list_reads, replace_nodes
from jettison.targets.recurrent import lstm_operator, scan_operator

if TYPE_CHECKING:
    import onnx

RUNTIME_DOMAIN = "com.microsoft"
STEPS = "JettisonSteps"
"""Stands for a Scan while the exporter works, which has no way to write a body; `expand_steps` replaces it."""


def find_layer(constant: str) -> str:
    """Return the recurrent layer that a weight's name says it belongs to ("gru" for "gru.int8_hh_l0"), or ""."""
    found = re.match(r"(.+)\.int8_[ih]h_l\d+(_reverse)?$", constant)
    return found.group(1) if found else ""


def read_body(node: onnx.NodeProto) -> onnx.GraphProto | None:
    """Return the steps of a Scan, None for any other node."""
    return next((a.g for a in node.attribute if a.name == "body"), None) if node.op_type == "Scan" else None


def make_translations() -> dict[Any, Callable[..., Any]]:
    """Return the ONNX form of each operator in `targets.recurrent`."""
    return {lstm_operator(): _translate_lstm(), scan_operator(): _translate_scan()}


def _declare(name: str, inputs: str, outputs: str, attributes: tuple[str, ...]) -> Any:
    """Return an operator of the runtime's domain that the exporter can write; "name?" is an input it can do without."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    anything = [f"tensor({kind})" for kind in ("float", "int8", "uint8", "int32", "int64")]
    option = schema.FormalParameterOption

    def formal(text: str, place: int) -> Any:
        kind = option.Optional if text.endswith("?") else option.Single
        return schema.FormalParameter(text.rstrip("?"), f"T{place}", param_option=kind)

    given = [formal(text, i) for i, text in enumerate(inputs.split())]
    made = [schema.FormalParameter(text, "T0") for text in outputs.split()]
    declared = schema(
        name,
        RUNTIME_DOMAIN,
        1,
        inputs=given,
        outputs=made,
        type_constraints=[(f"T{i}", anything, "") for i in range(len(given))],
        attributes=[
            schema.Attribute(a, schema.AttrType.INT if a == "hidden_size" else schema.AttrType.STRING, required=False)
            for a in attributes
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(RUNTIME_DOMAIN, 1), name, declared)


def _translate_lstm() -> Callable[..., Any]:
    """One DynamicQuantizeLSTM; its weights have a zero point for each output, all zero."""
    import onnx_ir
    import onnxscript

    inputs = "X W R B sequence_lens? initial_h initial_c P? W_scale W_zero_point R_scale R_zero_point"
    kernel = _declare("DynamicQuantizeLSTM", inputs, "Y Y_h Y_c", ("hidden_size", "direction"))

    def lstm(
        x: Any, h: Any, c: Any, w: Any, w_scale: Any, r: Any, r_scale: Any, bias: Any, reverse: bool
    ) -> tuple[Any, Any, Any]:
        import numpy as np

        # Untyped on purpose: onnxscript's stubs describe eager tensors, the exporter passes graph values.
        op: Any = onnxscript.opset18
        _, units, outputs = (int(size) for size in r.shape)
        zero = op.Constant(value=onnx_ir.serde.serialize_tensor(onnx_ir.tensor(np.zeros((1, outputs), np.int8))))
        y, last, cell = kernel(
            *(x, w, r, bias, None, h, c, None, w_scale, zero, r_scale, zero),
            hidden_size=units,
            direction="reverse" if reverse else "forward",
        )
        return op.Squeeze(y, op.Constant(value_ints=[1])), last, cell

    return lstm


def _translate_scan() -> Callable[..., Any]:
    """The input's product over all steps at once, then a placeholder of the steps."""
    import onnxscript

    steps = _declare(STEPS, "h gates r r_scale bias", "last y", ("cell", "direction"))

    def scan(
        x: Any, h: Any, w: Any, w_scale: Any, r: Any, r_scale: Any, bias: Any, reverse: bool, cell: str
    ) -> tuple[Any, Any]:
        op: Any = onnxscript.opset18
        quantized, step, zero_point = op.DynamicQuantizeLinear(x)
        first = op.Constant(value_ints=[0])
        summed = op.Cast(op.MatMulInteger(quantized, w, zero_point), to=1)
        own = op.Slice(bias, first, op.Constant(value_ints=[int(w.shape[1])]), first)
        gates = op.Add(op.Mul(summed, op.Mul(step, w_scale)), own)
        direction = "reverse" if reverse else "forward"
        last, y = steps(op.Squeeze(h, first), gates, r, r_scale, bias, cell=cell, direction=direction)
        return y, op.Unsqueeze(last, first)

    return scan


def expand_steps(proto: onnx.ModelProto) -> None:
    """Replace, in place, each placeholder by a Scan that holds its own weights, which is up to a quarter faster so."""
    from onnx import helper

    graph = proto.graph
    constants = {i.name: i for i in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != STEPS:
            nodes.append(node)
            continue
        settings = {a.name: helper.get_attribute_value(a).decode() for a in node.attribute}
        state, gates, *held = node.input
        way = int(settings["direction"] == "reverse")
        scan = helper.make_node(
            "Scan",
            [state, gates],
            list(node.output),
            name=node.name,
            body=_make_body(settings["cell"], [constants[name] for name in held]),
            num_scan_inputs=1,
            scan_input_directions=[way],
            scan_output_directions=[way],
        )
        nodes.append(scan)
    used = {value for node in nodes for value in list_reads(node)} | {value.name for value in graph.output}
    kept = [type(i).FromString(i.SerializeToString()) for i in graph.initializer if i.name in used]
    replace_nodes(graph, nodes)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    used_domains = {node.domain for node in graph.node}
    for domain in [d for d in proto.opset_import if d.domain == RUNTIME_DOMAIN and d.domain not in used_domains]:
        proto.opset_import.remove(domain)


def _make_body(cell: str, held: list[onnx.TensorProto]) -> onnx.GraphProto:
    """Return one step: the state's product on integers, and the gates."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight, scale, bias = (constant.name for constant in held)
    units = held[0].dims[0]
    # The first half is that of the input's product, which is added outside.
    own = numpy_helper.from_array(np.split(numpy_helper.to_array(held[2]), 2)[1], bias)
    make = helper.make_node
    nodes = [
        make("DynamicQuantizeLinear", ["h"], ["h_int8", "h_step", "h_zero_point"]),
        make("MatMulInteger", ["h_int8", weight, "h_zero_point"], ["h_summed"]),
        make("Cast", ["h_summed"], ["h_float"], to=TensorProto.FLOAT),
        make("Mul", ["h_step", scale], ["h_scale"]),
        make("Mul", ["h_float", "h_scale"], ["h_scaled"]),
        make("Add", ["h_scaled", bias], ["given"]),
    ]
    constants = [*held[:2], own]
    if cell == "gru":
        constants.append(numpy_helper.from_array(np.array([2 * units, units]), "parts"))
        nodes += [
            make("Split", ["gates", "parts"], ["gates_2", "gates_1"], axis=-1),
            make("Split", ["given", "parts"], ["given_2", "given_1"], axis=-1),
            make("Add", ["gates_2", "given_2"], ["added"]),
            make("Sigmoid", ["added"], ["opened"]),
            make("Split", ["opened"], ["update", "reset"], axis=-1, num_outputs=2),
            make("Mul", ["reset", "given_1"], ["kept"]),
            make("Add", ["gates_1", "kept"], ["mixed"]),
            make("Tanh", ["mixed"], ["new"]),
            make("Sub", ["h", "new"], ["difference"]),
            make("Mul", ["update", "difference"], ["share"]),
            make("Add", ["new", "share"], ["next"]),
        ]
    else:
        nodes += [make("Add", ["gates", "given"], ["added"]), make(cell.capitalize(), ["added"], ["next"])]
    nodes.append(make("Identity", ["next"], ["y"]))
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.FLOAT, None) for name in ("h", "gates")]
    outputs = [value(name, TensorProto.FLOAT, None) for name in ("next", "y")]
    return helper.make_graph(nodes, "step", inputs, outputs, constants)
