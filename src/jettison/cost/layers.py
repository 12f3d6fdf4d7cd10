"""One layer as plain data, and many of them side by side as one ONNX model, so that a runtime can be timed on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jettison.core.errors import InputError

if TYPE_CHECKING:
    import onnx

OPERATORS = ("conv", "linear")
PRECISIONS = ("fp32", "int8")
OPSET = 21
"""The first opset whose QuantizeLinear covers all we write; every ONNX Runtime we support reads it."""


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer at batch 1, with everything its time depends on.

    `input_size` is the spatial size a convolution reads, or the leading dimensions (tokens) of a linear layer's
    input, `()` for one vector. `groups == in_channels` is a depthwise convolution. Empty `stride`, `padding` and
    `dilation` mean 1, 0 and 1. Raises InputError where the numbers describe no layer.
    """

    operator: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    groups: int = 1
    input_size: tuple[int, ...] = ()
    precision: str = "fp32"
    dilation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no runtime could build, and fill in the defaults so that equal layers compare equal."""
        rank = len(self.kernel)
        fault = ""
        if self.operator not in OPERATORS or self.precision not in PRECISIONS:
            fault = f"operator must be one of {OPERATORS} and precision one of {PRECISIONS}"
        elif min(self.in_channels, self.out_channels, self.groups) < 1:
            fault = "channels and groups must be positive"
        elif self.in_channels % self.groups or self.out_channels % self.groups:
            fault = "groups must divide both channel counts"
        elif self.operator == "linear" and (rank or self.groups != 1):
            fault = "a linear layer has neither kernel nor groups"
        elif self.operator == "conv" and not (rank and len(self.input_size) == rank):
            fault = "kernel and input_size must have one entry for each spatial dimension"
        elif any(len(v) not in (0, rank) for v in (self.stride, self.padding, self.dilation)):
            fault = "stride, padding and dilation must be empty or as long as kernel"
        if fault:
            raise InputError(f"{self} is no layer: {fault}. Build it from the traced network's own layer.")
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * rank)
        if any(n < 1 for n in self.output_size):
            raise InputError(f"{self} has an empty output. Give a larger input_size or a smaller kernel.")

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone, so that both widths move together."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def output_size(self) -> tuple[int, ...]:
        """The spatial size a convolution writes; a linear layer's leading dimensions."""
        if self.operator == "linear":
            return self.input_size
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.input_size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        taps = math.prod(self.kernel) * self.in_channels // self.groups
        return math.prod(self.output_size) * self.out_channels * taps

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight alone."""
        taps = math.prod(self.kernel) * self.in_channels // self.groups
        return self.out_channels * taps * (1 if self.precision == "int8" else 4)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of input and output."""
        return (math.prod(self.input_shape) + math.prod(self.output_shape)) * (1 if self.precision == "int8" else 4)

    def at(self, in_channels: int, out_channels: int) -> LayerShape:
        """Return the same layer at other widths; a depthwise layer's groups follow its input."""
        groups = in_channels if self.depthwise else self.groups
        return replace(self, in_channels=in_channels, out_channels=out_channels, groups=groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The ONNX input: `(1, channels, *size)` for a convolution, `(tokens, channels)` for a linear layer."""
        if self.operator == "conv":
            return (1, self.in_channels, *self.input_size)
        return (math.prod(self.input_size), self.in_channels)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The ONNX output, laid out as `input_shape`."""
        if self.operator == "conv":
            return (1, self.out_channels, *self.output_size)
        return (math.prod(self.input_size), self.out_channels)


def build_model(shapes: Sequence[LayerShape], *, seed: int = 0) -> onnx.ModelProto:
    """Return one ONNX model that holds each layer as a branch of its own.

    Branch i reads `x{i}` and writes `layer{i}_y`, float32 or (for int8 layers) uint8, as the tensor would be inside
    a network of that precision. Every node of the layer itself is named `layer{i}_...`, also after the runtime's
    fusions, which name the result after the node or its output; layout changes get names of the runtime's own.
    Weights are random.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    nodes: list[Any] = []
    weights: list[Any] = []
    inputs: list[Any] = []
    outputs: list[Any] = []
    for index, shape in enumerate(shapes):
        kind = TensorProto.UINT8 if shape.precision == "int8" else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(f"x{index}", kind, shape.input_shape))
        outputs.append(helper.make_tensor_value_info(f"layer{index}_y", kind, shape.output_shape))
        build = _build_int8 if shape.precision == "int8" else _build_fp32
        branch, held = build(shape, f"layer{index}_", f"x{index}", rng)
        nodes += branch
        weights += [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _weight_shape(shape: LayerShape) -> tuple[int, ...]:
    """Return the weight's dimensions: outputs, inputs of one group, kernel."""
    return (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)


def _describe(shape: LayerShape) -> tuple[str, dict[str, Any]]:
    """Return the ONNX operator and its attributes."""
    if shape.operator == "linear":
        return "Gemm", {"transB": 1}
    return "Conv", {
        "kernel_shape": shape.kernel,
        "strides": shape.stride,
        "pads": shape.padding * 2,
        "dilations": shape.dilation,
        "group": shape.groups,
    }


def _build_fp32(shape: LayerShape, tag: str, source: str, rng: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the node and the initialisers of a float branch."""
    import numpy as np
    from onnx import helper

    operator, attributes = _describe(shape)
    # Uniform is several times cheaper to draw than normal, and no kernel's time depends on the values.
    weight = rng.random(_weight_shape(shape), dtype=np.float32) - np.float32(0.5)
    held = {f"{tag}w": weight, f"{tag}b": np.zeros(shape.out_channels, np.float32)}
    node = helper.make_node(operator, [source, f"{tag}w", f"{tag}b"], [f"{tag}y"], f"{tag}op", **attributes)
    return [node], held


def _build_int8(shape: LayerShape, tag: str, source: str, rng: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the nodes and the initialisers of an integer branch: what QLinearConv and QGemm are fused from."""
    import numpy as np
    from onnx import helper

    operator, attributes = _describe(shape)
    channels = shape.out_channels
    held = {
        f"{tag}w": rng.integers(-127, 128, _weight_shape(shape), dtype=np.int8),
        f"{tag}ws": np.full(channels, 0.01, np.float32),
        f"{tag}wz": np.zeros(channels, np.int8),
        f"{tag}b": np.zeros(channels, np.int32),
        f"{tag}bs": np.full(channels, 0.01 * 0.02, np.float32),
        f"{tag}bz": np.zeros(channels, np.int32),
        f"{tag}xs": np.float32(0.02),
        f"{tag}ys": np.float32(0.5),
        f"{tag}z": np.uint8(128),
    }
    parts = [f"{tag}{name}" for name in ("xf", "wf", "bf")]
    nodes = [
        helper.make_node("DequantizeLinear", [source, f"{tag}xs", f"{tag}z"], [parts[0]], f"{tag}dqx"),
        helper.make_node("DequantizeLinear", [f"{tag}{v}" for v in ("w", "ws", "wz")], [parts[1]], f"{tag}dqw", axis=0),
        helper.make_node("DequantizeLinear", [f"{tag}{v}" for v in ("b", "bs", "bz")], [parts[2]], f"{tag}dqb", axis=0),
        helper.make_node(operator, parts, [f"{tag}yf"], f"{tag}op", **attributes),
        helper.make_node("QuantizeLinear", [f"{tag}yf", f"{tag}ys", f"{tag}z"], [f"{tag}y"], f"{tag}q"),
    ]
    return nodes, held
