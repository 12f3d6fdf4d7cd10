"""What any choice of widths would cost, predicted from the graph's own terms and a measured latency table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from jettison.core.plan import Cost
from jettison.cost.latency import LatencyTable, latency_ms, measure_table
from jettison.cost.layers import LayerShape
from jettison.cost.macs import count
from jettison.cost.timing import RUNTIMES
from jettison.graph.axes import Atom, Cat, Term, resolve
from jettison.graph.groups import Graph
from jettison.graph.layers import Layer, Recurrence, count_positions, find_layers, find_recurrences
from jettison.graph.trace import get_tensor, shape_of


@dataclass
class CostModel:
    """Predicts the Cost of kept counts per group.

    `scale` turns the sum over the table into the runtime's own time; it comes from
    measurements of whole networks. `overhead_bytes` is what the file holds beside weights.
    """

    graph: Graph
    layers: tuple[Layer, ...]
    table: LatencyTable | None
    bits: int
    overhead_bytes: int = 0
    scale: float = 1.0
    _seen: dict[tuple[int, tuple[int, ...]], float] = field(default_factory=dict)

    def predict(self, counts: Mapping[str, int]) -> Cost:
        """Return the cost of keeping `counts` positions of the named groups, all of the others."""
        kept = {self.graph.find(name).atom: number for name, number in counts.items()}
        macs = self.count_layer_macs(counts) + self._count_recurrent_macs(kept) + self._other_macs
        latency = None
        if self.table is not None:
            latency = self.scale * sum(self._time(i, layer, kept) for i, layer in enumerate(self.layers))
        return Cost(macs, self._count_bytes(kept) + self.overhead_bytes, latency)

    def count_layer_macs(self, counts: Mapping[str, int]) -> int:
        """Return the MACs of the layers alone."""
        kept = {self.graph.find(name).atom: number for name, number in counts.items()}
        return sum(self._count_macs(layer, kept) for layer in self.layers)

    @cached_property
    def _other_macs(self) -> int:
        """MACs of all else (attention, computed weights), taken at full width: never below the truth."""
        known = sum_layer_macs(self.graph.module) + self._count_recurrent_macs({})
        return count(self.graph.module).macs - known

    @cached_property
    def _recurrences(self) -> tuple[Recurrence, ...]:
        return find_recurrences(self.graph.module, len(self.graph.traced.example[0]))

    def _count_recurrent_macs(self, kept: Mapping[Atom, int]) -> int:
        tensors = self.graph.axes.tensors
        pairs = [(call.steps, tensors[name]) for call in self._recurrences for name in call.matrices]
        return sum(steps * math.prod(count_term(t, kept) for t in dims) for steps, dims in pairs)

    def _widths(self, layer: Layer, kept: Mapping[Atom, int]) -> tuple[int, int]:
        rows, columns = self.graph.axes.tensors[layer.weight][:2]
        return count_term(rows, kept), count_term(columns, kept)

    def _groups(self, layer: Layer, kept: Mapping[Atom, int]) -> int:
        axis = self.graph.axes.group_axes.get(layer.node)
        return layer.groups if axis is None else count_term(axis, kept)

    def _count_macs(self, layer: Layer, kept: Mapping[Atom, int]) -> int:
        outs, columns = self._widths(layer, kept)
        positions = count_positions(layer, len(self.graph.traced.example[0]))
        return positions * outs * columns * _kernel_size(self.graph, layer)

    def _count_bytes(self, kept: Mapping[Atom, int]) -> int:
        weights = {layer.weight for layer in self.layers}
        total = 0
        for name, dims in self.graph.axes.tensors.items():
            elements = math.prod(count_term(t, kept) for t in dims)
            total += elements * (self.bits // 8 if name in weights else 4)
        return total

    def _time(self, index: int, layer: Layer, kept: Mapping[Atom, int]) -> float:
        assert self.table is not None
        outs, columns = self._widths(layer, kept)
        groups = self._groups(layer, kept)
        key = (index, (outs, columns, groups))
        if key not in self._seen:
            shape = describe_layer(self.graph, layer, self.bits)
            if shape.groups == 1 or shape.depthwise:
                self._seen[key] = latency_ms(self.table, shape.at(columns * groups, outs))
            else:
                # The table knows dense and depthwise layers; a grouped one is taken in proportion to its MACs.
                share = outs * columns / (shape.out_channels * shape.in_channels / shape.groups)
                self._seen[key] = share * latency_ms(self.table, shape)
        return self._seen[key]


def find_timed(target: str) -> str:
    """Return the runtime whose single layers stand for a target's: its own where they can be timed there."""
    return target if target in RUNTIMES else "onnxruntime"


def make_cost_model(graph: Graph, *, bits: int, latency: bool, threads: int, target: str = "onnxruntime") -> CostModel:
    """Return the cost model of a graph, measuring the latency of its layers for `target` if `latency` asks for it."""
    layers = find_layers(graph.module)
    table = None
    if latency:
        shapes = [describe_layer(graph, layer, bits) for layer in layers]
        table = measure_table(shapes, runtime=find_timed(target), threads=threads)
    return CostModel(graph, layers, table, bits)


def describe_layer(graph: Graph, layer: Layer, bits: int) -> LayerShape:
    """Return a layer at its full width as the latency table names it."""
    weight = get_tensor(graph.module, layer.weight)
    source = layer.node.args[0]
    shape = shape_of(source) or ()  # type: ignore[arg-type]
    precision = "int8" if bits == 8 else "fp32"
    if layer.operator == "linear":
        tokens = count_positions(layer, len(graph.traced.example[0]))
        return LayerShape("linear", weight.shape[1], weight.shape[0], input_size=(tokens,), precision=precision)
    return LayerShape(
        "conv",
        weight.shape[1] * layer.groups,
        weight.shape[0],
        kernel=tuple(weight.shape[2:]),
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
        input_size=shape[2:],
        precision=precision,
        dilation=layer.dilation,
    )


def count_term(term: Term, kept: Mapping[Atom, int]) -> int:
    """Return the size of a term once each atom keeps so many positions."""
    term = resolve(term)
    if isinstance(term, Atom):
        return kept.get(term, term.size)
    if isinstance(term, Cat):
        return sum(count_term(p, kept) for p in term.parts)
    return math.prod(count_term(f, kept) for f in term.factors)


def list_macs(graph: Graph) -> dict[str, int]:
    """Return the MACs of each layer for one sample."""
    return {
        layer.name: count_positions(layer, len(graph.traced.example[0]))
        * get_tensor(graph.module, layer.weight).shape[0]
        * get_tensor(graph.module, layer.weight).shape[1]
        * _kernel_size(graph, layer)
        for layer in find_layers(graph.module)
    }


def sum_layer_macs(module: fx.GraphModule) -> int:
    """Return the MACs that `cost.macs` counts on a graph's layers."""
    names = {layer.node.name for layer in find_layers(module)}
    return sum(node.macs for node in count(module).nodes if node.name in names)


def _kernel_size(graph: Graph, layer: Layer) -> int:
    return get_tensor(graph.module, layer.weight)[0, 0].numel()
