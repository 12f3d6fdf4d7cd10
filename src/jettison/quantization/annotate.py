"""Where numbers become integers: a PT2E quantizer that reads a target's scheme, and its observers.

Importing this module imports torchao; import it inside functions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from jettison.core.errors import CalibrationError
from jettison.quantization.bits import find_tensor_levels, read_weight_levels
from jettison.quantization.clamps import keeps_values
from jettison.quantization.fold import find_layers, find_weight, name_operator
from jettison.quantization.ranges import Histogram, Ranger, choose_scale, choose_weight_scale, span_unit
from jettison.quantization.reads import find_moved, find_read
from jettison.targets.integer import IntegerScheme, Levels

KEY = "quantization_annotation"
SHARES = frozenset({"aten.softmax.int", "aten._softmax.default", "aten.sigmoid.default"})
"""Operators whose outputs lie between 0 and 1 by what they are; their range is not measured."""


class RangeObserver(ObserverBase):  # type: ignore[misc]
    """Counts an activation's values; its scale is the ranger's answer."""

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ranger: Ranger,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.levels = Levels(quant_min, quant_max, qscheme == torch.per_tensor_symmetric)
        self.ranger, self.histogram, self.where = ranger, Histogram(), "an unnamed tensor"
        self.chosen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Count, and pass on unchanged."""
        self.histogram.add(x, self.where)
        return x

    def calculate_qparams(self, **_: object) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; raises CalibrationError where nothing was seen."""
        if self.chosen is None:
            if self.histogram.seen == 0:
                raise CalibrationError(
                    f"No calibration value reached {self.where}. Its range for int8 is unknown. "
                    "Give at least one batch that is not empty."
                )
            low, high = self.ranger(self.histogram, self.levels)
            scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), self.levels)
            self.chosen = scale, zero_point.to(torch.int64)
        return self.chosen


class WeightPerChannelObserver(ObserverBase):  # type: ignore[misc]
    """Keeps one scale per output channel. PT2E passes `ch_axis` only to classes with PerChannel in their name."""

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ch_axis: int,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.quant_min, self.quant_max, self.qscheme, self.ch_axis = quant_min, quant_max, qscheme, ch_axis
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Choose the scales when the weight is first seen."""
        if self.scale is None:
            self.scale = choose_weight_scale(x, self.ch_axis, Levels(self.quant_min, self.quant_max, True))
        return x

    def calculate_qparams(self, **_: object) -> tuple[Tensor, Tensor]:
        """Return scales and zero points, one per channel."""
        assert self.scale is not None
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Marks which edges of the graph carry integers, after the scheme; `exclude` names layers that stay float."""

    def __init__(self, scheme: IntegerScheme, exclude: Collection[str], ranger: Ranger) -> None:
        super().__init__()
        self.scheme, self.exclude = scheme, frozenset(exclude)
        self.ranger = ranger
        self.specs: dict[tuple[Levels, Ranger], QuantizationSpec] = {}
        self.levels: dict[Node, Levels] = {}
        self.annotated: set[Node] = set()
        self.summed: set[Node] = set()
        self.read: frozenset[Node] = frozenset()
        self.moved: frozenset[Node] = frozenset()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate `model` in place, as PT2E asks, and return it."""
        layers = find_layers(model, frozenset(self.scheme.weighted))
        self.moved = find_moved(model)
        self.exclude |= {name for name, node in layers.items() if node not in self.moved}
        self.levels = find_tensor_levels(model, self.scheme)
        self.read = find_read(model, self.scheme, self.exclude)
        for name, node in layers.items():
            if name not in self.exclude:
                self._annotate_weighted(name, node)
        for node in model.graph.nodes:
            operator = name_operator(node)
            if operator in self.scheme.requantized:
                self._annotate_requantized(node)
            elif operator in self.scheme.shared:
                self._annotate_shared(node)
            elif operator in self.scheme.inherited and self._is_quantized(node.args[0]) and keeps_values(node):
                self._annotate_inherited(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what the scheme does not name stays float."""

    def _specify(self, tensor: Node) -> QuantizationSpec:
        """Return the spec of a tensor; PT2E takes two edges as one only where both have the very same object."""
        levels = self.levels.get(tensor, self.scheme.activation)
        ranger = span_unit if name_operator(tensor) in SHARES else self.ranger
        if (levels, ranger) not in self.specs:
            self.specs[levels, ranger] = QuantizationSpec(
                dtype=torch.int8 if levels.q_min < 0 else torch.uint8,
                observer_or_fake_quant_ctr=RangeObserver.with_args(ranger=ranger),
                quant_min=levels.q_min,
                quant_max=levels.q_max,
                qscheme=torch.per_tensor_symmetric if levels.symmetric else torch.per_tensor_affine,
            )
        return self.specs[levels, ranger]

    def _is_quantized(self, source: object) -> bool:
        """Say if the tensor is an output that the integer side of the graph gives."""
        return isinstance(source, Node) and source in self.annotated

    def _end_of(self, node: Node) -> Node:
        """Return the activation that fuses into `node`, or `node` itself."""
        users = list(node.users)
        return users[0] if len(users) == 1 and name_operator(users[0]) in self.scheme.fused else node

    def _give(self, node: Node, inputs: dict[Node, object], output: object) -> None:
        """Annotate; `output` is put on the activation that fuses into `node`, and on what only passes it on."""
        end = self._end_of(node)
        if end is node:
            node.meta[KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)
        else:
            node.meta[KEY] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
            end.meta[KEY] = QuantizationAnnotation(output_qspec=output, _annotated=True)
        if output is not None:
            self.annotated.add(end)

    def _annotate_weighted(self, name: str, node: Node) -> None:
        source, weight = node.args[0], find_weight(node)
        assert isinstance(source, Node) and weight is not None
        axis, levels = self.scheme.weighted[name_operator(node)], read_weight_levels(self.scheme, name)
        inputs: dict[Node, object] = {
            source: self._specify(source),
            weight: QuantizationSpec(
                dtype=torch.int8,
                observer_or_fake_quant_ctr=WeightPerChannelObserver,
                quant_min=levels.q_min,
                quant_max=levels.q_max,
                qscheme=torch.per_channel_symmetric,
                ch_axis=axis,
            ),
        }
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, Node):
            inputs[bias] = DerivedQuantizationSpec(
                derived_from=[(source, node), (weight, node)],
                derive_qparams_fn=derive_bias_scale,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        end = self._end_of(node)
        if self._is_summed(end):
            self.summed.add(end)
        floats = end in self.summed or (name_operator(node) in self.scheme.float_output and self._ends_in_float(node))
        self._give(node, inputs, None if floats else self._specify(end))

    def _is_summed(self, end: Node) -> bool:
        """Say if the kernel that gives `end` adds to it before it rounds; of two that could, the left one does."""
        readers = list(end.users)
        if len(readers) != 1 or name_operator(readers[0]) != "aten.add.Tensor" or len(readers[0].args) != 2:
            return False
        able = [a for a in readers[0].args if isinstance(a, Node) and len(a.users) == 1 and self._sums(a)]
        return bool(able) and able[0] is end

    def _sums(self, end: Node) -> bool:
        """Say if `end`, or the layer whose activation it is, has a kernel that adds before it rounds."""
        source = end.args[0] if name_operator(end) in self.scheme.fused and end.args else end
        return isinstance(source, Node) and name_operator(source) in self.scheme.summed and self._end_of(source) is end

    def _ends_in_float(self, node: Node) -> bool:
        """Say if no integer layer reads this output, so that rounding it would cost and bring nothing."""
        return self._end_of(node) not in self.read

    def _annotate_requantized(self, node: Node) -> None:
        sources = [a for a in node.args if isinstance(a, Node)]
        tensors = [a for a in sources if isinstance(a.meta.get("val"), Tensor)]
        both = name_operator(node) not in ("aten.add.Tensor", "aten.mul.Tensor") or len(tensors) == 2
        if not both or not all(a.meta["val"].is_floating_point() for a in tensors):
            return
        if not all(a in self.moved or a.op == "get_attr" for a in tensors):
            return
        if not any(self._is_quantized(tensor) or tensor in self.summed for tensor in tensors):
            return
        inputs: dict[Node, object] = {tensor: self._specify(tensor) for tensor in tensors if tensor not in self.summed}
        self._give(node, inputs, self._specify(self._end_of(node)))

    def _annotate_shared(self, node: Node) -> None:
        sources = node.args[0]
        assert isinstance(sources, (list, tuple))
        if not all(map(self._is_quantized, sources)):
            return
        nodes = [source for source in sources if isinstance(source, Node)]
        first = nodes[0]
        same = SharedQuantizationSpec((first, node))
        inputs: dict[Node, object] = {first: self._specify(first)}
        inputs.update({source: same for source in nodes[1:] if source is not first})
        node.meta[KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=same, _annotated=True)
        self.annotated.add(node)

    def _annotate_inherited(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        node.meta[KEY] = QuantizationAnnotation(
            input_qspec_map={source: self._specify(source)},
            output_qspec=SharedQuantizationSpec((source, node)),
            _annotated=True,
        )
        self.annotated.add(node)


def derive_bias_scale(observers: list[ObserverBase]) -> tuple[Tensor, Tensor]:
    """Return the bias's scale: the input's times the weight's, so that it adds to the int32 sum as it is."""
    source, weight = observers
    scale = source.calculate_qparams()[0] * weight.calculate_qparams()[0]
    return scale, torch.zeros_like(scale, dtype=torch.int64)
