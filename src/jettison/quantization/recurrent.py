"""Dynamic int8 for recurrent layers: each layer of nn.LSTM, nn.GRU and nn.RNN becomes one operator on integers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.fold import name_operator
from jettison.quantization.ranges import choose_weight_scale
from jettison.quantization.weight_only import place_constants, read_weight
from jettison.targets.integer import Levels, quantize_linear
from jettison.targets.recurrent import lstm_operator, scan_operator

SMALLEST = {"lstm": 1, "gru": 256, "rnn_tanh": 64, "rnn_relu": 64}
"""From how many units on integers are not slower (benchmarks/kinds.py). ONNX Runtime has a kernel for integer LSTMs,
1.5 times faster than fp32 at 64 units. The others run step by step as a Scan, whose operators' calls cost more than
they save in small GRUs: 0.5 times the speed at 128 units, 1.05 at 256. Plain layers are 1.05 times as fast at 64."""
ORDERS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""Where the gates of the exported layer stand among torch's: input, forget, cell, output and reset, update, new."""


def can_run_on_integers(node: Node, module: GraphModule, smallest: Mapping[str, int] = SMALLEST) -> bool:
    """Say if a recurrent layer is one that has a form on integers, and is not slower in it."""
    kind, weights = name_operator(node).split(".")[1], node.args[2]
    assert isinstance(weights, (list, tuple))
    biased, layers, both = node.args[3], node.args[4], node.args[7]
    assert isinstance(layers, int)
    # A projection is a fifth parameter of each layer and direction. In training mode, dropout would run between layers.
    plain = len(weights) == layers * (2 if both else 1) * (4 if biased else 2)
    known = all(isinstance(w, Node) and w.op == "get_attr" for w in weights)
    if not plain or not known or (node.args[6] and node.args[5]):
        return False
    return read_weight(module, weights[1]).shape[1] >= smallest[kind]  # type: ignore[arg-type]


def quantize_recurrent(module: GraphModule, name: str, node: Node, levels: Levels) -> None:
    """Replace one call, in place, by one operator on integers for each of its layers and directions."""
    kind, graph = name_operator(node).split(".")[1], module.graph
    x, given, weights, biased, layers, _, _, both, batch_first = node.args
    assert isinstance(weights, (list, tuple)) and isinstance(layers, int)
    states = list(given) if isinstance(given, (list, tuple)) else [given]
    directions, each = 2 if both else 1, 4 if biased else 2

    def call(target: Any, *arguments: Any) -> Node:
        with graph.inserting_before(node):
            return graph.call_function(target, arguments)

    aten, lasts = torch.ops.aten, []
    value: Any = call(aten.transpose.int, x, 0, 1) if batch_first else x
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            parts = _round(module, weights[index * each : (index + 1) * each], kind, levels)
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            constants = place_constants(module, node, f"{name}.", {f"{k}_{suffix}": v for k, v in parts.items()})
            own = [call(aten.slice.Tensor, s, 0, index, index + 1) for s in states]
            arguments = (value, *own, *constants, bool(direction))
            if kind == "lstm":
                found = call(lstm_operator(), *arguments)
            else:
                found = call(scan_operator(), *arguments, kind.removeprefix("rnn_"))
            output, *last = (call(operator.getitem, found, i) for i in range(1 + len(states)))
            outputs.append(output)
            lasts.append(last)
        value = call(aten.cat.default, outputs, -1) if both else outputs[0]
    if batch_first:
        value = call(aten.transpose.int, value, 0, 1)
    results = [value, *(call(aten.cat.default, list(last), 0) for last in zip(*lasts, strict=True))]
    for user in list(node.users):
        result = results[user.args[1]]  # type: ignore[index]
        result.meta = dict(user.meta)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def _round(module: GraphModule, parameters: Any, kind: str, levels: Levels) -> dict[str, Tensor | None]:
    """Return integers, scales and biases of one layer and direction, gates in the exported order.

    Their names are none of torch's: the float weights may have another reader.
    """
    named: dict[str, Tensor | None] = {}
    for which, node in zip(("ih", "hh"), parameters, strict=False):
        weight = _order(read_weight(module, node), kind)
        scale = choose_weight_scale(weight, 0, levels)
        named[f"int8_{which}"] = quantize_linear(weight, scale[:, None], 0, levels).to(torch.int8).t().contiguous()
        named[f"scale_{which}"] = scale
    biases = [_order(read_weight(module, b), kind) for b in parameters[2:]] or [torch.zeros_like(scale)] * 2
    named["bias"] = torch.cat(biases)
    # ONNX Runtime's kernel has a dimension for directions.
    return {k: v.unsqueeze(0) if v is not None else v for k, v in named.items()} if kind == "lstm" else named


def _order(rows: Tensor, kind: str) -> Tensor:
    """Return a weight or bias with its gates in the exported order."""
    order = ORDERS.get(kind, (0,))
    chunks = rows.chunk(len(order))
    return torch.cat([chunks[i] for i in order])
