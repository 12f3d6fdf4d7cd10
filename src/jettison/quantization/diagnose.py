"""Which layers suffer: signal-to-noise ratio of the quantized network against the float one, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from jettison.core.errors import CalibrationError
from jettison.quantization.fold import BATCH_NORM, CONVOLUTIONS, copy_graph, find_layers, name_operator
from jettison.quantization.ptq import read_clamp

WEIGHTED = frozenset({*CONVOLUTIONS, "aten.linear.default"})


def measure_sqnr(
    original: GraphModule, quantized: GraphModule, batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """Return 10 log10(sum y^2 / sum (y - y')^2) in dB at every weighted layer's output, errors before it included.

    A layer's output is taken after its BatchNorm and its clamping activation, where the runtime rounds. Layers
    equal on both sides have infinity. Raises CalibrationError without batches.
    """
    if not batches:
        raise CalibrationError("There are no inputs to compare the networks on. The ratio is undefined. Give a batch.")
    # Copies without in-place calls, which would change a layer's output after it was kept.
    original, quantized = copy_graph(original), copy_graph(quantized)
    left = {name: _find_end(node) for name, node in find_layers(original, WEIGHTED).items()}
    right = {name: _find_end(node) for name, node in find_layers(quantized, WEIGHTED).items()}
    signal, noise = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0.0)
    for batch in batches:
        wanted, given = _Tap(original, left).collect(batch), _Tap(quantized, right).collect(batch)
        for name in left:
            if name in given:
                signal[name] += float(wanted[name].double().square().sum())
                noise[name] += float((wanted[name].double() - given[name].double()).square().sum())
    return {name: _decibels(signal[name], noise[name]) for name in left if name in right}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _find_end(node: Node) -> Node:
    """Follow what belongs to the layer: BatchNorm, one clamp, and the rounding of the result."""
    while len(node.users) == 1:
        (user,) = node.users
        name = name_operator(user)
        if not (name == BATCH_NORM or read_clamp(user) is not None or "quantize_per_tensor" in name):
            break
        node = user
        if "dequantize" in name:
            return node
    if "quantize_per_tensor" in name_operator(node) and "dequantize" not in name_operator(node):
        # Several readers have a dequantization each; they all say the same.
        return next(iter(node.users))
    return node


class _Tap(Interpreter):
    """Runs a graph and keeps what the layers' ends give."""

    def __init__(self, module: GraphModule, ends: dict[str, Node]) -> None:
        super().__init__(module)
        self.names: dict[Node, list[str]] = {}
        for name, node in ends.items():
            self.names.setdefault(node, []).append(name)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, and keep its result if a layer ends here."""
        result = super().run_node(n)
        for name in self.names.get(n, ()):
            self.kept[name] = result
        return result

    def collect(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return each layer's output for this batch."""
        with torch.no_grad():
            self.run(*batch)
        return self.kept
